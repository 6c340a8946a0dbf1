//! The kernel's own list of code that it patches for the CPU it finds itself on.
//!
//! Each entry of `.altinstructions` names a place in the code, a replacement, and the CPU feature on
//! which the replacement is copied there (Linux, arch/x86/include/asm/alternative.h). Its layout has
//! changed over time, so all are tried: only one makes sense of every entry.

use std::ops::Range;

use crate::image::Elf;

/// An entry: `struct alt_instr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alternative {
    /// Virtual address of the entry; it begins with the distance from here to the code, 32 bits.
    pub entry: u64,
    /// Offset in the entry of the byte that says how long the place is.
    pub length_offset: u64,
    /// Virtual address of the code that is patched.
    pub address: u64,
    /// How long the place is, in bytes.
    pub bytes: u8,
    /// Virtual address of what is copied there.
    pub replacement: u64,
    /// How long that is, in bytes; the rest becomes NOPs.
    pub replacement_bytes: u8,
}

impl Alternative {
    /// The code that is patched.
    pub fn range(&self) -> Range<u64> {
        self.address..self.address + u64::from(self.bytes)
    }
}

/// Bytes of an entry, and where in it the two lengths begin: Linux 6.3 and later (32 bits of
/// feature and flags), 5.17 and later (16 bits of feature), and before (a third length).
const LAYOUTS: [(usize, usize); 3] = [(14, 12), (12, 10), (13, 10)];

/// All entries of a kernel, in the order of what they patch.
#[derive(Debug, Default)]
pub struct Alternatives {
    entries: Vec<Alternative>,
}

/// All entries; `None` if they are there and cannot be understood.
pub fn read(elf: &Elf<'_>) -> Option<Alternatives> {
    let Some(table) = elf.data.iter().find(|d| d.name == ".altinstructions") else {
        return Some(Alternatives::default());
    };
    let bytes = elf.bytes(&table.file);
    let mut entries = LAYOUTS
        .into_iter()
        .find_map(|(size, lengths)| with_layout(elf, table.address, bytes, size, lengths))?;
    // Several for one place stay in the kernel's order, in which it applies them.
    entries.sort_by_key(|entry| entry.address);
    Some(Alternatives { entries })
}

impl Alternatives {
    /// All of them, by the address of the code that is patched.
    pub fn iter(&self) -> impl Iterator<Item = &Alternative> {
        self.entries.iter()
    }

    /// Those that patch any of these addresses.
    pub fn touching(&self, range: Range<u64>) -> impl Iterator<Item = &Alternative> {
        // None is longer than its length in a byte says.
        let first = range.start.saturating_sub(u8::MAX.into());
        let first = self.entries.partition_point(|entry| entry.address < first);
        self.entries[first..]
            .iter()
            .take_while(move |entry| entry.address < range.end)
            .filter(move |entry| range.start < entry.range().end)
    }
}

fn with_layout(
    elf: &Elf<'_>,
    address: u64,
    bytes: &[u8],
    size: usize,
    lengths: usize,
) -> Option<Vec<Alternative>> {
    if !bytes.len().is_multiple_of(size) {
        return None;
    }
    let entries = bytes.chunks_exact(size).zip((address..).step_by(size));
    entries
        .map(|(raw, entry)| {
            let offset = |at: usize| i32::from_le_bytes(raw[at..at + 4].try_into().expect("four"));
            let found = Alternative {
                entry,
                length_offset: lengths as u64,
                address: entry.wrapping_add_signed(offset(0).into()),
                bytes: raw[lengths],
                replacement: (entry + 4).wrapping_add_signed(offset(4).into()),
                replacement_bytes: raw[lengths + 1],
            };
            let is_code = |at: u64, bytes: u8| {
                elf.code_at(at).is_some_and(|code| {
                    u64::from(bytes) <= code.file.len() as u64 - (at - code.address)
                })
            };
            // Since 6.14 one is for code among the data: the little that kexec copies elsewhere.
            let is_there = elf.at(found.address, found.bytes.into()).is_some();
            let sound = found.replacement_bytes <= found.bytes
                && is_there
                && (found.replacement_bytes == 0
                    || is_code(found.replacement, found.replacement_bytes));
            sound.then_some(found)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TINY_VIRTUAL, debian_kernels, tiny_elf_with};

    /// Entries of `size` bytes, each for 5 bytes of code that 3 are copied to.
    fn table(size: usize, lengths: usize, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for index in 0..count {
            let at = (64 + index * size) as i32;
            let mut entry = vec![0; size];
            entry[..4].copy_from_slice(&(5 * index as i32 - at).to_le_bytes());
            entry[4..8].copy_from_slice(&(40 - (at + 4)).to_le_bytes());
            entry[8] = 0x6b;
            (entry[lengths], entry[lengths + 1]) = (5, 3);
            bytes.extend(entry);
        }
        bytes
    }

    fn read_table(table: &[u8]) -> Option<Vec<Alternative>> {
        let mut image = vec![0x90; 64];
        image.extend(table);
        let sections = [(".text", 0, 64), (".altinstructions", 64, table.len())];
        let file = tiny_elf_with(&image, &sections);
        read(&Elf::parse(&file).unwrap()).map(|found| found.entries)
    }

    #[test]
    fn each_layout_is_told_from_the_others() {
        for (size, lengths) in LAYOUTS {
            for count in 1..8 {
                let found = read_table(&table(size, lengths, count)).expect("sound");
                assert_eq!(found.len(), count);
                let last = found[count - 1];
                let expected = Alternative {
                    entry: TINY_VIRTUAL + 64 + ((count - 1) * size) as u64,
                    length_offset: lengths as u64,
                    address: TINY_VIRTUAL + 5 * (count as u64 - 1),
                    bytes: 5,
                    replacement: TINY_VIRTUAL + 40,
                    replacement_bytes: 3,
                };
                assert_eq!(last, expected);
            }
        }
    }

    #[test]
    fn a_table_that_makes_no_sense_is_not_guessed_at() {
        assert_eq!(read_table(&[0xff; 14]), None);
        let mut cut = table(14, 12, 3);
        cut.pop();
        assert_eq!(read_table(&cut), None);
    }

    #[test]
    fn debians_kernels_have_a_table_that_is_understood() {
        for (path, image) in debian_kernels() {
            let kernel = crate::unpack(&image).unwrap();
            let elf = Elf::parse(&kernel.elf).unwrap();
            let found = read(&elf).unwrap_or_else(|| panic!("{path}: not understood"));
            let count = found.entries.len();
            assert!(count > 1_000, "{path}: {count}");
        }
    }
}
