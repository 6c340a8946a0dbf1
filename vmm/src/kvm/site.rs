//! Which place in its programs a guest is at, as chaos tells places apart: the instruction, and who called the function
//! that it is in.
//!
//! A program reads the time, or makes any system call, in a library's function, and often by way of one of its own. So the
//! word on top of the stack says who called the library, and frame pointers, where the program has them, who called that.

use super::cpu::KvmCpu;
use super::inserted::KERNEL_HALF;

/// So many callers above the first make a place.
const CALLERS: usize = 3;
/// A frame is no longer than this.
const FRAME_BYTES_MAX: u64 = 64 << 10;
/// The longest CALL that is told by its bytes.
const CALL_BYTES: u64 = 7;
/// Spreads what differs in few bits.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// Where a program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct InProgram {
    rip: u64,
    rsp: u64,
    rbp: u64,
}

impl KvmCpu {
    /// Where in its programs the guest is, or its kernel works for, as one number.
    ///
    /// Linux begins each task's kernel stack with what the entry from user mode pushed: the general registers, and RIP, CS,
    /// RFLAGS, RSP, SS above them (`struct pt_regs`). Kernel stacks are aligned (Linux,
    /// Documentation/arch/x86/kernel-stacks.rst); newer kernels leave two words free above.
    pub(super) fn user_site(&mut self) -> Option<u64> {
        const STACK_BYTES: u64 = 16 << 10;
        /// From RBP to RIP in `struct pt_regs`.
        const RBP_BEFORE: u64 = 12 * 8;
        let registers = self.page().registers();
        let view = self.view().ok()?;
        let at = if registers.rip() < KERNEL_HALF {
            InProgram {
                rip: registers.rip(),
                rsp: registers.0[6],
                rbp: registers.0[7],
            }
        } else {
            let top = (registers.0[6] | (STACK_BYTES - 1)).wrapping_add(1);
            let frames = [40, 56].map(|bytes| top.wrapping_sub(bytes));
            let frame = frames.into_iter().find_map(|frame| {
                let [rip, cs, _, rsp, _] = view.words(frame)?;
                let is_user = rip < KERNEL_HALF && matches!(cs, 0x23 | 0x33);
                is_user.then_some((frame, rip, rsp))
            });
            let (frame, rip, rsp) = frame?;
            let [rbp] = view.words(frame.wrapping_sub(RBP_BEFORE)).unwrap_or([0]);
            InProgram { rip, rsp, rbp }
        };
        let caller = view.words(at.rsp).map_or(0, |[word]| word);
        let read = |address, bytes: &mut [u8]| view.read(address, bytes) == bytes.len();
        let callers = callers(at, &read).into_iter();
        Some(
            callers.fold(at.rip ^ caller.rotate_left(32), |site, caller| {
                site.wrapping_mul(SPREAD) ^ caller
            }),
        )
    }
}

/// Who called the function that a program is in, and who that, as far as frame pointers lead and what they lead to is
/// returned to after a CALL: in a program that uses RBP for something else, that is nobody.
fn callers(at: InProgram, read: &dyn Fn(u64, &mut [u8]) -> bool) -> Vec<u64> {
    let (mut callers, mut below, mut frame) = (Vec::new(), at.rsp, at.rbp);
    while callers.len() < CALLERS {
        let above = frame.wrapping_sub(below);
        if !frame.is_multiple_of(8) || above > FRAME_BYTES_MAX {
            break;
        }
        let mut words = [[0; 8]; 2];
        if !read(frame, words.as_flattened_mut()) {
            break;
        }
        let [next, caller] = words.map(u64::from_le_bytes);
        let mut before = [0; CALL_BYTES as usize];
        let is_there = caller < KERNEL_HALF && read(caller.wrapping_sub(CALL_BYTES), &mut before);
        if !is_there || !ends_in_call(before) {
            break;
        }
        callers.push(caller);
        (below, frame) = (frame.wrapping_add(16), next);
    }
    callers
}

/// Whether bytes may end in a CALL, near and relative or by a register or memory (Intel SDM vol. 2, CALL).
fn ends_in_call(bytes: [u8; CALL_BYTES as usize]) -> bool {
    let is_indirect = |length: usize| {
        let [opcode, modrm] = [0, 1].map(|at| bytes[bytes.len() - length + at]);
        opcode == 0xff && modrm >> 3 & 7 == 2
    };
    bytes[2] == 0xe8 || [2, 3, 4, 6, 7].into_iter().any(is_indirect)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory at 0x1000 on.
    fn memory(words: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = vec![0; 0x1000];
        for (address, word) in words {
            let at = (address - 0x1000) as usize;
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        // CALL rel32 before 0x1105, and CALL RAX before 0x1202.
        (bytes[0x100], bytes[0x200], bytes[0x201]) = (0xe8, 0xff, 0xd0);
        bytes
    }

    fn found(words: &[(u64, u64)], rbp: u64) -> Vec<u64> {
        let bytes = memory(words);
        let read = |address: u64, buffer: &mut [u8]| {
            let at = address.wrapping_sub(0x1000);
            let end = at.checked_add(buffer.len() as u64);
            match end.filter(|end| *end <= bytes.len() as u64) {
                Some(end) => buffer.copy_from_slice(&bytes[at as usize..end as usize]),
                None => return false,
            }
            true
        };
        let at = InProgram {
            rip: 0x1300,
            rsp: 0x1800,
            rbp,
        };
        callers(at, &read)
    }

    #[test]
    fn callers_are_found_by_frame_pointers() {
        let stack = [
            (0x1820, 0x1840),
            (0x1828, 0x1105),
            (0x1840, 0x1820),
            (0x1848, 0x1202),
        ];
        assert_eq!(found(&stack, 0x1820), [0x1105, 0x1202], "and no circles");
        assert_eq!(found(&stack, 0x1840), [0x1202]);
    }

    #[test]
    fn what_is_no_frame_pointer_leads_to_nobody() {
        let stack = [
            (0x1808, 0x1105),
            (0x1828, 0x1106),
            (0x1838, 1 << 63),
            (0x17f8, 0x1105),
        ];
        for rbp in [
            0,
            0x17f0,
            0x1801,
            0x1820,
            0x1830,
            0x1ff8,
            0x1800 + FRAME_BYTES_MAX + 8,
            u64::MAX,
        ] {
            assert_eq!(found(&stack, rbp), Vec::<u64>::new(), "{rbp:#x}");
        }
        assert_eq!(found(&stack, 0x1800), [0x1105]);
    }
}
