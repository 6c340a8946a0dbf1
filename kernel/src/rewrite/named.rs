//! Which instructions of the kernel something else in the kernel speaks of.
//!
//! Instructions can be moved elsewhere if nobody but the instruction before them leads to them. A
//! stripped kernel has no relocations left that would say so. But whatever leads to an instruction has
//! its address in one of few forms: the target of a direct branch, an operand, or a word of data
//! that is the address itself or the distance to it. The tables of exceptions, jump labels, static
//! calls, locks and bugs all hold such words (Linux, include/linux/jump_label.h,
//! arch/x86/include/asm/extable.h and others), wherever in the data they stand. So
//! every word is taken for one. Of the words that mean something else a few hit code by chance, which
//! only leaves an instruction where it is.

use iced_x86::{Instruction, OpKind};

use crate::image::{Code, Elf};

/// Sections without anything that leads to code: text, types, and what the unwinder knows of each instruction,
/// reached or not. The alternatives are read by [`crate::rewrite::alternatives`]. The list of all calls is
/// there to patch where they lead, and Linux passes over what is no call any more
/// (arch/x86/kernel/callthunks.c, `call_get_dest`).
const SILENT: [&str; 8] = [
    ".call_sites",
    ".BTF",
    ".notes",
    "__ksymtab_strings",
    ".orc_header",
    ".orc_unwind",
    ".orc_unwind_ip",
    ".altinstructions",
];

/// A set of addresses in code.
#[derive(Debug)]
pub(super) struct Named {
    /// In ascending order of address.
    sections: Vec<Bits>,
}

#[derive(Debug)]
struct Bits {
    address: u64,
    bytes: u64,
    words: Vec<u64>,
}

impl Named {
    /// What the data of a kernel names. [`Named::see`] adds what its code does.
    pub(super) fn by_data(elf: &Elf<'_>) -> Named {
        let sections = elf.code.iter().map(|code| Bits {
            address: code.address,
            bytes: code.file.len() as u64,
            words: vec![0; code.file.len().div_ceil(64)],
        });
        let mut named = Named {
            sections: sections.collect(),
        };
        for data in &elf.data {
            if !SILENT.contains(&&data.name[..]) {
                named.read(elf.bytes(&data.file), data);
            }
        }
        named
    }

    /// Takes each aligned word as an address, and each half as one that is relative to itself or
    /// has its sign extended.
    fn read(&mut self, bytes: &[u8], data: &Code) {
        // The file's bytes begin where the section does; what is aligned is the address.
        let first = (data.address.next_multiple_of(4) - data.address) as usize;
        let halves = bytes.get(first..).unwrap_or(&[]).as_chunks::<4>().0;
        let mut low = None;
        for (half, at) in halves
            .iter()
            .zip((data.address + first as u64..).step_by(4))
        {
            let value = i64::from(i32::from_le_bytes(*half));
            self.add(at.wrapping_add_signed(value));
            self.add(value.cast_unsigned());
            match low {
                Some(low) if at % 8 == 4 => {
                    self.add(u64::from(low) | value.cast_unsigned() << 32);
                }
                _ => {}
            }
            low = Some(u32::from_le_bytes(*half));
        }
    }

    /// Adds what an instruction names: where it branches to, and what its operands are.
    pub(super) fn see(&mut self, instruction: &Instruction) {
        if instruction.is_ip_rel_memory_operand() {
            self.add(instruction.ip_rel_memory_address());
        }
        for operand in 0..instruction.op_count() {
            match instruction.op_kind(operand) {
                OpKind::NearBranch64 => self.add(instruction.near_branch_target()),
                OpKind::Immediate32 | OpKind::Immediate32to64 | OpKind::Immediate64 => {
                    // As the CPU extends it, where it does.
                    self.add(instruction.immediate(operand));
                }
                _ => {}
            }
        }
    }

    fn add(&mut self, address: u64) {
        if let Some(at) = self.section_of(address) {
            let bits = &mut self.sections[at];
            let offset = address - bits.address;
            bits.words[(offset / 64) as usize] |= 1 << (offset % 64);
        }
    }

    /// Whether anything names this address.
    pub(super) fn contains(&self, address: u64) -> bool {
        self.section_of(address).is_some_and(|at| {
            let bits = &self.sections[at];
            let offset = address - bits.address;
            bits.words[(offset / 64) as usize] >> (offset % 64) & 1 != 0
        })
    }

    fn section_of(&self, address: u64) -> Option<usize> {
        let after = self
            .sections
            .partition_point(|bits| bits.address <= address);
        let at = after.checked_sub(1)?;
        let bits = &self.sections[at];
        (address - bits.address < bits.bytes).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rewrite::traps;
    use crate::testing::{TINY_VIRTUAL, tiny_elf_with};

    const TEXT: usize = 32;

    /// The offsets in `.text` that `code`, or `data` after it, names.
    fn named(code: &[u8], data: &[u8]) -> Vec<u64> {
        named_from(code, data, ".rodata")
    }

    fn named_from(code: &[u8], data: &[u8], section: &str) -> Vec<u64> {
        let mut image = code.to_vec();
        image.extend([0x0f, 0x31]);
        image.resize(TEXT, 0x90);
        image.extend(data);
        let sections = [(".text", 0, TEXT), (section, TEXT, data.len())];
        let file = tiny_elf_with(&image, &sections);
        let elf = Elf::parse(&file).unwrap();
        let mut named = Named::by_data(&elf);
        traps::find_and_show(&elf, &[], &mut |instruction| named.see(instruction)).unwrap();
        let offsets = 0..TEXT as u64;
        offsets
            .filter(|at| named.contains(TINY_VIRTUAL + at))
            .collect()
    }

    #[test]
    fn branches_and_operands_name_what_they_lead_to() {
        assert_eq!(named(&[0xeb, 0x05], &[]), [7]); // jmp
        assert_eq!(named(&[0x74, 0x06], &[]), [8]); // je
        assert_eq!(named(&[0xe8, 4, 0, 0, 0], &[]), [9]); // call
        assert_eq!(named(&[0x48, 0x8d, 0x05, 9, 0, 0, 0], &[]), [16]); // lea 9(%rip),%rax
        // mov $TINY_VIRTUAL+17,%rax; push $TINY_VIRTUAL+18
        assert_eq!(named(&[0x48, 0xc7, 0xc0, 17, 0, 0, 0x81], &[]), [17]);
        assert_eq!(named(&[0x68, 18, 0, 0, 0x81], &[]), [18]);
        let mut movabs = vec![0x48, 0xb8];
        movabs.extend((TINY_VIRTUAL + 19).to_le_bytes());
        assert_eq!(named(&movabs, &[]), [19]);
    }

    #[test]
    fn words_of_data_name_what_they_may_mean() {
        let here = TEXT as i32;
        let relative = |at: i32, from: i32| (at - here - from).to_le_bytes();
        assert_eq!(named(&[], &relative(7, 0)), [7]);
        assert_eq!(named(&[], &[[0; 4], relative(8, 4)].concat()), [8]);
        assert_eq!(named(&[], &(TINY_VIRTUAL + 9).to_le_bytes()), [9]);
        assert_eq!(named(&[], &(TINY_VIRTUAL as u32 + 10).to_le_bytes()), [10]);
        // Not aligned, or nowhere near.
        let odd = [&[0][..], &relative(7, 1)].concat();
        assert!(named(&[], &odd).is_empty());
        assert!(named(&[], &[0xcc; 64]).is_empty());
        assert!(named_from(&[], &relative(7, 0), ".orc_unwind_ip").is_empty());
    }
}
