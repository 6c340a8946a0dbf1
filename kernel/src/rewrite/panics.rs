//! Where the kernel says that it panics.
//!
//! Anybody who may write to the console can print the words, and a kernel that is told to be quiet does not show them. But
//! all ways to a panic lead through one function, and that has one call in which it hands the formatted reason to printk:
//!
//! ```text
//! pr_emerg("Kernel panic - not syncing: %s\n", buf);
//! ```
//!
//! It comes before crash kernels, notifiers and the reset, and nothing decides whether it is made: what is shown is for
//! printk to say. (Linux, kernel/panic.c: `panic`, since 6.17 `vpanic`; the words have been the same since 2.6.) So the
//! call becomes a trap, and the reason is in guest memory where its second argument says.
//!
//! It is found by the words alone, without symbols: they stand once in the image, and one instruction loads their
//! address as a first argument.

use iced_x86::{Code as Opcode, FlowControl, Instruction, OpKind, Register};

use crate::image::Elf;
use crate::rewrite::traps::SiteKind;

/// The words, without the level that printk is told before them.
const WORDS: &[u8] = b"Kernel panic - not syncing: %s\n\0";
/// `KERN_EMERG`: ASCII SOH and the digit since Linux 3.6, `<0>` before; longest last.
const LEVELS: [&[u8]; 3] = [b"", b"\x010", b"<0>"];

/// Finds the call among a kernel's instructions, shown one after the other.
#[derive(Debug)]
pub(super) struct Panics {
    /// Addresses of the words with their level.
    words: Vec<u64>,
    /// The instruction at this address comes straight after one that loads them.
    loaded: Option<u64>,
}

impl Panics {
    /// For the kernel of this file.
    pub(super) fn of(elf: &Elf<'_>) -> Panics {
        let mut words = Vec::new();
        for segment in &elf.segments {
            let bytes = elf.bytes(&segment.file);
            for at in memchr::memmem::find_iter(bytes, WORDS) {
                let level = LEVELS.iter().rev().find(|l| bytes[..at].ends_with(l));
                let start = at - level.map_or(0, |level| level.len());
                words.push(segment.virtual_address.wrapping_add(start as u64));
            }
        }
        Panics {
            words,
            loaded: None,
        }
    }

    /// Sees the next instruction; says what it is if it is the call.
    pub(super) fn see(&mut self, instruction: &Instruction) -> Option<SiteKind> {
        let loaded = self.loaded.take() == Some(instruction.ip());
        match instruction.code() {
            Opcode::Call_rel32_64 if loaded => Some(SiteKind::Panic {
                target: instruction.near_branch_target(),
            }),
            _ => {
                // The other arguments may come after the first.
                let goes_on = instruction.flow_control() == FlowControl::Next
                    && !(loaded && instruction.op0_register().full_register() == Register::RDI);
                if self.loads_words(instruction) || (loaded && goes_on) {
                    self.loaded = Some(instruction.next_ip());
                }
                None
            }
        }
    }

    /// Whether it puts their address into RDI, the first argument (System V ABI, AMD64 supplement, 3.2.3).
    fn loads_words(&self, instruction: &Instruction) -> bool {
        if instruction.op0_kind() != OpKind::Register
            || instruction.op0_register().full_register() != Register::RDI
        {
            return false;
        }
        let address = match instruction.code() {
            Opcode::Mov_rm64_imm32 | Opcode::Mov_r64_imm64 => instruction.immediate(1),
            Opcode::Lea_r64_m if instruction.is_ip_rel_memory_operand() => {
                instruction.ip_rel_memory_address()
            }
            _ => return false,
        };
        self.words.contains(&address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rewrite::traps::{self, Sites};
    use crate::testing::{TINY_VIRTUAL, debian_kernels, tiny_elf_with};

    /// Sites in a kernel of this code, with the words at offset 64.
    fn sites(code: &[u8], words: &[u8]) -> Sites {
        let mut image = code.to_vec();
        image.extend([0x0f, 0x31]);
        let text = image.len();
        image.resize(64, 0xcc);
        image.extend(words);
        let file = tiny_elf_with(&image, &[(".text", 0, text), (".rodata", 64, words.len())]);
        traps::find(&Elf::parse(&file).unwrap(), &[]).unwrap()
    }

    fn call_of(code: &[u8], words: &[u8]) -> Option<(u64, SiteKind)> {
        let sites = sites(code, words);
        let mut calls = sites
            .sites
            .iter()
            .filter(|site| matches!(site.kind, SiteKind::Panic { .. }))
            .map(|site| (site.address - TINY_VIRTUAL, site.kind));
        let call = calls.next();
        assert_eq!(calls.next(), None);
        assert_eq!(sites.counts().panics, u32::from(call.is_some()));
        call
    }

    const NEW: &[u8] = b"\x010Kernel panic - not syncing: %s\n\0";
    /// mov $words,%rdi
    const LOAD: [u8; 7] = [0x48, 0xc7, 0xc7, 64, 0, 0, 0x81];
    /// call somewhere
    const CALL: [u8; 5] = [0xe8, 0x10, 0, 0, 0];

    #[test]
    fn the_call_that_prints_the_words_is_found_however_they_are_loaded() {
        let kind = |at| SiteKind::Panic {
            target: TINY_VIRTUAL + at + 5 + 0x10,
        };
        let direct = [&LOAD[..], &CALL].concat();
        assert_eq!(call_of(&direct, NEW), Some((7, kind(7))));
        let relative = [&[0x48, 0x8d, 0x3d, 57, 0, 0, 0][..], &CALL].concat();
        assert_eq!(call_of(&relative, NEW), Some((7, kind(7))));
        // mov $1,%esi; xor %eax,%eax
        let more = [&LOAD[..], &[0xbe, 1, 0, 0, 0, 0x31, 0xc0], &CALL].concat();
        assert_eq!(call_of(&more, NEW), Some((14, kind(14))));
        let old = b"<0>Kernel panic - not syncing: %s\n\0";
        assert_eq!(call_of(&direct, old), Some((7, kind(7))));
    }

    #[test]
    fn other_words_and_other_calls_are_left_alone() {
        let direct = [&LOAD[..], &CALL].concat();
        let end = b"\x010---[ end Kernel panic - not syncing: %s ]---\n\0";
        assert_eq!(call_of(&direct, end), None);
        // The words cut short; without a level they do.
        assert_eq!(call_of(&direct, &NEW[..NEW.len() - 1]), None);
        assert_eq!(call_of(&direct, &NEW[2..]), call_of(&direct, NEW));
        // A jump or another first argument in between: xor %edi,%edi.
        assert_eq!(call_of(&[&LOAD[..], &[0xeb, 0], &CALL].concat(), NEW), None);
        assert_eq!(
            call_of(&[&LOAD[..], &[0x31, 0xff], &CALL].concat(), NEW),
            None
        );
        // As a second argument: mov $words,%rsi.
        let second = [0x48, 0xc7, 0xc6, 64, 0, 0, 0x81];
        assert_eq!(call_of(&[&second[..], &CALL].concat(), NEW), None);
    }

    #[test]
    fn debians_kernels_have_one_such_call() {
        for (path, image) in debian_kernels() {
            let kernel = crate::unpack(&image).unwrap();
            let sites = traps::find(&Elf::parse(&kernel.elf).unwrap(), &[]).unwrap();
            assert_eq!(sites.counts().panics, 1, "{path}");
        }
    }
}
