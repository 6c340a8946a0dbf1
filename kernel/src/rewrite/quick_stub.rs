//! The instructions that read the time where a RDTSC stood, without an exit most often.
//!
//! ```text
//!         mov  rdx, [rip + end]
//!         mov  rax, [rip + step]
//!         xadd [rip + next], rax
//!         cmp  rax, rdx
//!         jb   quick
//!         out  TRAP_RDTSC, al       ; answered with EDX:EAX
//!         jmp  moved
//! quick:  mov  rdx, rax
//!         shr  rdx, 32
//!         mov  eax, eax
//! moved:  what stood after the RDTSC
//!         jmp  back
//! ```
//!
//! The clock is three words of guest memory that each counted exit
//! sets anew. XADD takes a value and moves the clock on in one instruction, so no two reads get the same
//! one, whatever interrupts what. The end is read *before*: if an exit comes in between, it is the end
//! of the clock as it was then, and a value from after it is never given out: that read exits.
//!
//! Like RDTSC the stub changes RAX and RDX alone. It changes flags too, which is looked after where
//! spans are found. It uses no stack.

use crate::rewrite::traps::TRAP_RDTSC;

/// Distance of one stub from the next, in bytes.
pub(super) const STUB_BYTES: usize = 64;
/// The jump to a stub.
pub(super) const SPAN_MIN: usize = 5;
/// What moves along may be this long.
pub(super) const MOVED_MAX: usize = STUB_BYTES - MOVED_OFFSET - SPAN_MIN;
/// Where in a stub its OUT stands.
pub(super) const OUT_OFFSET: usize = 0x1b;
/// Where in a stub the moved instructions stand.
pub(super) const MOVED_OFFSET: usize = 0x28;

/// Offsets of the clock's words.
const NEXT: u64 = 0;
const END: u64 = 8;
const STEP: u64 = 16;

/// `jmp to`, to be put at `at`; `None` if that is more than 2 GiB away.
pub(super) fn jump(at: u64, to: u64) -> Option<[u8; SPAN_MIN]> {
    let [a, b, c, d] = relative(at + SPAN_MIN as u64, to)?;
    Some([0xe9, a, b, c, d])
}

/// The stub at `at`, which reads the clock at `clock`, executes `moved` and goes on at `back`; `None` if
/// they are more than 2 GiB away.
///
/// `moved` must already be what it has to be at `at + MOVED_OFFSET`.
pub(super) fn stub(at: u64, clock: u64, moved: &[u8], back: u64) -> Option<[u8; STUB_BYTES]> {
    assert!(moved.len() <= MOVED_MAX, "{} bytes moved", moved.len());
    let mut code = Vec::with_capacity(STUB_BYTES);
    let load = |code: &mut Vec<u8>, opcode: &[u8], word: u64| {
        code.extend_from_slice(opcode);
        let after = at + code.len() as u64 + 4;
        code.extend_from_slice(&relative(after, clock + word)?);
        Some(())
    };
    load(&mut code, &[0x48, 0x8b, 0x15], END)?;
    load(&mut code, &[0x48, 0x8b, 0x05], STEP)?;
    load(&mut code, &[0x48, 0x0f, 0xc1, 0x05], NEXT)?;
    code.extend([0x48, 0x39, 0xd0, 0x72, 0x04]);
    assert_eq!(code.len(), OUT_OFFSET);
    code.extend([0xe6, TRAP_RDTSC, 0xeb, 0x09]);
    code.extend([0x48, 0x89, 0xc2, 0x48, 0xc1, 0xea, 0x20, 0x89, 0xc0]);
    assert_eq!(code.len(), MOVED_OFFSET);
    code.extend_from_slice(moved);
    code.extend(jump(at + code.len() as u64, back)?);
    code.resize(STUB_BYTES, crate::rewrite::caves::PADDING);
    Some(code.try_into().expect("it was made that long"))
}

/// The distance from the end of an instruction to what it names.
pub(crate) fn relative(from: u64, to: u64) -> Option<[u8; 4]> {
    let distance = i32::try_from(to.wrapping_sub(from).cast_signed()).ok()?;
    Some(distance.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Register};

    use super::*;

    const AT: u64 = 0xffff_ffff_81a0_e800;
    const CLOCK: u64 = 0xffff_ffff_8301_6bc0;
    const BACK: u64 = 0xffff_ffff_8102_0304;
    /// `shl rdx, 32`.
    const SHL: [u8; 4] = [0x48, 0xc1, 0xe2, 0x20];

    fn decoded(bytes: &[u8]) -> Vec<Instruction> {
        Decoder::with_ip(64, bytes, AT, DecoderOptions::NONE)
            .into_iter()
            .collect()
    }

    #[test]
    fn a_stub_takes_a_value_or_exits_and_goes_on_where_the_span_ends() {
        let bytes = stub(AT, CLOCK, &SHL, BACK).expect("all within reach");
        let code = decoded(&bytes);
        let expected = [
            Code::Mov_r64_rm64,
            Code::Mov_r64_rm64,
            Code::Xadd_rm64_r64,
            Code::Cmp_rm64_r64,
            Code::Jb_rel8_64,
            Code::Out_imm8_AL,
            Code::Jmp_rel8_64,
            Code::Mov_rm64_r64,
            Code::Shr_rm64_imm8,
            Code::Mov_rm32_r32,
            Code::Shl_rm64_imm8,
            Code::Jmp_rel32_64,
        ];
        let found: Vec<_> = code[..12].iter().map(|i| i.code()).collect();
        assert_eq!(found, expected);
        let words = [END, STEP, NEXT].map(|word| CLOCK + word);
        let named: Vec<_> = code[..3]
            .iter()
            .map(Instruction::ip_rel_memory_address)
            .collect();
        assert_eq!(named, words);
        let registers = |i: &Instruction| (i.op0_register(), i.op1_register());
        assert_eq!(code[0].op0_register(), Register::RDX);
        assert_eq!(code[1].op0_register(), Register::RAX);
        assert_eq!(code[2].op1_register(), Register::RAX);
        assert_eq!(registers(&code[3]), (Register::RAX, Register::RDX));
        assert_eq!(registers(&code[7]), (Register::RDX, Register::RAX));
        assert_eq!(
            (code[8].op0_register(), code[8].immediate8()),
            (Register::RDX, 32)
        );
        assert_eq!(registers(&code[9]), (Register::EAX, Register::EAX));

        assert_eq!(code[4].near_branch_target(), code[7].ip(), "quick");
        assert_eq!(code[5].ip(), AT + OUT_OFFSET as u64);
        assert_eq!(code[5].immediate8(), TRAP_RDTSC);
        assert_eq!(code[6].near_branch_target(), code[10].ip(), "moved");
        assert_eq!(code[10].ip(), AT + MOVED_OFFSET as u64);
        assert_eq!(code[11].near_branch_target(), BACK);
        assert!(code[12..].iter().all(|i| i.code() == Code::Int3));
    }

    #[test]
    fn the_longest_that_moves_fits_and_nothing_need_move() {
        let bytes = stub(AT, CLOCK, &[0x90; MOVED_MAX], BACK).expect("within reach");
        let code = decoded(&bytes);
        let last = code.last().expect("something");
        assert_eq!(last.next_ip(), AT + STUB_BYTES as u64);
        assert_eq!(last.near_branch_target(), BACK);
        let bytes = stub(AT, CLOCK, &[], BACK).expect("within reach");
        assert_eq!(decoded(&bytes)[10].near_branch_target(), BACK);
    }

    #[test]
    fn what_is_out_of_reach_has_no_stub() {
        let user = 0x5555_0000_1000;
        assert_eq!(stub(AT, user, &SHL, BACK), None);
        assert_eq!(stub(AT, CLOCK, &SHL, user), None);
        assert_eq!(jump(user, AT), None);
    }
}
