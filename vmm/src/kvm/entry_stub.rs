//! The few instructions that are put in front of a kernel entry and count it.
//!
//! ```text
//!     dec  qword [rip + word]
//!     jnz  on
//!     out  TRAP_ENTRY, al
//! on: cmp  esp, esp
//!     jmp  the entry
//! ```
//!
//! They touch no register and no stack, so they may be in front of any entry: the stack may still be
//! the user's (SYSCALL) and GS too. Flags are free there, for SYSCALL and exceptions have saved
//! the program's. But DEC leaves in them what the word was, which is the monitor's business and differs
//! between a recording and its replay; CMP makes them the same again before the kernel can look.

use hindsight_kernel::rewrite::caves::{BLOCK_BYTES, PADDING};
use hindsight_kernel::rewrite::traps::TRAP_ENTRY;

/// Distance of one stub from the next, in bytes.
pub(super) const STUB_BYTES: u64 = 32;
/// How many there is room for.
pub(super) const STUBS: usize = (BLOCK_BYTES / STUB_BYTES) as usize;
/// Where in a stub its OUT is.
pub(super) const OUT_OFFSET: u64 = 9;
/// Length of the DEC, to whose end the word's address is relative.
const DEC_BYTES: u64 = 7;
/// Where the JMP ends, to which its target is relative.
const JMP_END: u64 = 18;

/// What is in memory where there is no stub yet.
pub(super) const NO_STUB: [u8; STUB_BYTES as usize] = [PADDING; STUB_BYTES as usize];

/// The stub at `at`, which counts in `word` and goes on at `entry`; `None` if they are more than
/// 2 GiB away.
pub(super) fn stub(at: u64, word: u64, entry: u64) -> Option<[u8; STUB_BYTES as usize]> {
    let mut bytes = NO_STUB;
    bytes[..3].copy_from_slice(&[0x48, 0xff, 0x0d]);
    bytes[3..7].copy_from_slice(&relative(at + DEC_BYTES, word)?);
    bytes[7..13].copy_from_slice(&[0x75, 0x02, 0xe6, TRAP_ENTRY, 0x39, 0xe4]);
    bytes[13] = 0xe9;
    bytes[14..18].copy_from_slice(&relative(at + JMP_END, entry)?);
    Some(bytes)
}

fn relative(from: u64, to: u64) -> Option<[u8; 4]> {
    let distance = i32::try_from(to.wrapping_sub(from).cast_signed()).ok()?;
    Some(distance.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Register};

    use super::*;

    const AT: u64 = 0xffff_ffff_81a0_e600;
    const WORD: u64 = 0xffff_ffff_8301_6b80;
    const ENTRY: u64 = 0xffff_ffff_81c0_0b40;

    fn decoded(bytes: &[u8]) -> Vec<Instruction> {
        Decoder::with_ip(64, bytes, AT, DecoderOptions::NONE)
            .into_iter()
            .collect()
    }

    #[test]
    fn a_stub_counts_and_goes_on_at_the_entry() {
        let bytes = stub(AT, WORD, ENTRY).expect("all within reach");
        let code = decoded(&bytes);
        let expected = [
            Code::Dec_rm64,
            Code::Jne_rel8_64,
            Code::Out_imm8_AL,
            Code::Cmp_rm32_r32,
            Code::Jmp_rel32_64,
        ];
        assert_eq!(
            code[..5].iter().map(|i| i.code()).collect::<Vec<_>>(),
            expected
        );
        let [dec, jne, out, cmp, jmp] = code[..5] else {
            unreachable!("five were compared")
        };
        assert!(dec.is_ip_rel_memory_operand());
        assert_eq!(dec.ip_rel_memory_address(), WORD);
        assert_eq!(jne.near_branch_target(), cmp.ip());
        assert_eq!((out.ip(), out.immediate8()), (AT + OUT_OFFSET, TRAP_ENTRY));
        assert_eq!(
            (cmp.op0_register(), cmp.op1_register()),
            (Register::ESP, Register::ESP)
        );
        assert_eq!(
            (jmp.near_branch_target(), jmp.next_ip()),
            (ENTRY, AT + JMP_END)
        );
        assert!(code[5..].iter().all(|i| i.code() == Code::Int3));
    }

    #[test]
    fn what_is_out_of_reach_has_no_stub() {
        let user = 0x5555_0000_1000;
        assert_eq!(stub(AT, user, ENTRY), None);
        assert_eq!(stub(AT, WORD, user), None);
        assert_eq!(stub(0x1000, 0x2000, 1 << 32), None);
    }
}
