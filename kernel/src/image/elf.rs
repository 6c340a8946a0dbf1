//! Reads the unpacked kernel: what to load where, where to begin, and which of it is code.
//!
//! The structures are those of the crate `object`; its reader is not used. A kernel needs three tables of the ELF file,
//! each of fixed-size records; what it needs beyond that is that every number be checked against the
//! file and against the others before anybody uses it, since a wrong one would put a trap into the wrong byte.

use std::ops::Range;

use object::elf;
use object::endian::LittleEndian;
use object::pod::{self, Pod};

use crate::error::KernelError;

type FileHeader = elf::FileHeader64<LittleEndian>;
type ProgramHeader = elf::ProgramHeader64<LittleEndian>;
type SectionHeader = elf::SectionHeader64<LittleEndian>;

/// No segment ends as close to the end of the address space: the kernel's half ends 1 GiB below it.
const ROUNDING_BYTES: u64 = 2 << 20;
/// Linux has five program headers.
const PROGRAM_HEADERS_MAX: u16 = 128;

/// A part of the kernel that goes to guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Where the kernel sees it once its own page tables stand.
    pub virtual_address: u64,
    /// Where it is loaded.
    pub physical_address: u64,
    /// Its bytes in the file.
    pub file: Range<usize>,
    /// Its size in memory, in bytes; what the file does not fill is zero.
    pub memory_bytes: u64,
    /// May be executed.
    pub executable: bool,
    /// May be written.
    pub writable: bool,
}

impl Segment {
    /// First physical address after it.
    pub fn physical_end(&self) -> u64 {
        self.physical_address + self.memory_bytes
    }

    /// Does the part of it that is in the file hold this range of virtual addresses?
    fn holds(&self, address: u64, bytes: u64) -> bool {
        address
            .checked_sub(self.virtual_address)
            .and_then(|offset| offset.checked_add(bytes))
            .is_some_and(|end| end <= self.file.len() as u64)
    }
}

/// A section, or a segment where there are no sections; most often one of nothing but instructions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Code {
    /// The section's name; empty for a segment.
    pub name: String,
    /// Virtual address of its first byte.
    pub address: u64,
    /// Its bytes in the file.
    pub file: Range<usize>,
}

/// A kernel's ELF file, with all its numbers checked.
#[derive(Debug, Clone)]
pub struct Elf<'a> {
    file: &'a [u8],
    /// Physical address of the first instruction (`startup_64`).
    pub entry: u64,
    /// What to load, in the file's order.
    pub segments: Vec<Segment>,
    /// What is code, in ascending order of address; no two overlap.
    pub code: Vec<Code>,
    /// The sections that are loaded and are not code, in the file's order; empty where the file names no
    /// sections.
    pub data: Vec<Code>,
    /// The virtual addresses that sections take in memory, in the file's order; empty where the file
    /// names no sections.
    pub taken: Vec<Range<u64>>,
}

/// What the section headers say.
#[derive(Default)]
struct Sections {
    code: Vec<Code>,
    data: Vec<Code>,
    taken: Vec<Range<u64>>,
}

impl<'a> Elf<'a> {
    /// Reads the headers of a 64-bit x86 kernel.
    ///
    /// # Errors
    ///
    /// A file for another machine, one that was cut short, or one whose tables contradict each other.
    pub fn parse(file: &'a [u8]) -> Result<Self, KernelError> {
        let header: &FileHeader = &records(file, "the ELF header", 0, 1)?[0];
        let ident = &header.e_ident;
        if ident.magic != elf::ELFMAG {
            return Err(KernelError::NotAKernel {
                found: file[..8].to_vec(),
            });
        }
        let machine = header.e_machine.get(LittleEndian);
        for (what, found, expected) in [
            (
                "the ELF class",
                ident.class.0.into(),
                elf::ELFCLASS64.0.into(),
            ),
            (
                "the ELF byte order",
                ident.data.0.into(),
                elf::ELFDATA2LSB.0.into(),
            ),
            ("the ELF machine", machine.0, elf::EM_X86_64.0),
        ] {
            if found != expected {
                return Err(KernelError::NotX86_64 {
                    what,
                    found: found.into(),
                    expected: expected.into(),
                });
            }
        }
        let kind = header.e_type.get(LittleEndian);
        if kind != elf::ET_EXEC && kind != elf::ET_DYN {
            return Err(KernelError::BadElf {
                what: "the ELF type",
                found: kind.0.into(),
                expected: "2 or 3, a program; 1 is an object file such as a module, 4 a core dump",
            });
        }
        let segments = segments(file, header)?;
        let Sections {
            mut code,
            data,
            taken,
        } = match sections(file, header, &segments)? {
            Some(found) => found,
            None => Sections {
                code: code_of_segments(&segments)?,
                ..Sections::default()
            },
        };
        code.sort_by_key(|code| code.address);
        let entry = entry(&segments, &code, header.e_entry.get(LittleEndian))?;
        Ok(Elf {
            file,
            entry,
            segments,
            code,
            data,
            taken,
        })
    }

    /// The whole file.
    pub fn file(&self) -> &'a [u8] {
        self.file
    }

    /// The bytes of the first section of this name; `None` without one, or without section headers.
    pub fn section(&self, wanted: &str) -> Option<&'a [u8]> {
        let header: &FileHeader = records(self.file, "the ELF header", 0, 1).ok()?.first()?;
        let table = section_headers(self.file, header).ok()?;
        let names = names(self.file, table, header).ok()?;
        let section = table
            .iter()
            .find(|section| name(names, section.sh_name.get(LittleEndian)) == wanted)?;
        let place = section_bytes(self.file, "a section", section).ok()?;
        (section.sh_type.get(LittleEndian) == elf::SHT_PROGBITS).then(|| &self.file[place])
    }

    /// The file's bytes at `range`, which is one of this value's own ranges.
    pub fn bytes(&self, range: &Range<usize>) -> &'a [u8] {
        &self.file[range.clone()]
    }

    /// The code that holds virtual address `address`.
    pub fn code_at(&self, address: u64) -> Option<&Code> {
        let after = self.code.partition_point(|code| code.address <= address);
        let code = self.code.get(after.checked_sub(1)?)?;
        (address - code.address < code.file.len() as u64).then_some(code)
    }

    /// The `bytes` bytes that the file has for virtual address `address`.
    pub fn at(&self, address: u64, bytes: usize) -> Option<&'a [u8]> {
        let segment = self
            .segments
            .iter()
            .find(|segment| segment.holds(address, bytes as u64))?;
        // `holds` has bounded the offset by the segment's length in the file.
        let start = segment.file.start + (address - segment.virtual_address) as usize;
        Some(&self.file[start..start + bytes])
    }

    /// The virtual address of the file's byte at `offset`, if a segment loads it.
    pub fn address_of(&self, offset: usize) -> Option<u64> {
        self.segments.iter().find_map(|segment| {
            let inside = segment.file.contains(&offset);
            inside.then(|| segment.virtual_address + (offset - segment.file.start) as u64)
        })
    }

    /// Where virtual address `address` is loaded, if the kernel's segments cover it.
    pub fn physical(&self, address: u64) -> Option<u64> {
        self.segments.iter().find_map(|segment| {
            let offset = address.checked_sub(segment.virtual_address)?;
            (offset < segment.memory_bytes).then(|| segment.physical_address + offset)
        })
    }
}

/// The PT_LOAD entries of the program header table.
fn segments(file: &[u8], header: &FileHeader) -> Result<Vec<Segment>, KernelError> {
    let count = header.e_phnum.get(LittleEndian);
    if count > PROGRAM_HEADERS_MAX {
        return Err(KernelError::BadElf {
            what: "the number of program headers",
            found: count.into(),
            expected: "128 or fewer",
        });
    }
    let table: &[ProgramHeader] = table(
        file,
        "the program headers",
        header.e_phoff.get(LittleEndian),
        count,
        header.e_phentsize.get(LittleEndian),
    )?;
    let mut segments = Vec::new();
    for program in table {
        let file_bytes = program.p_filesz.get(LittleEndian);
        let memory_bytes = program.p_memsz.get(LittleEndian);
        if program.p_type.get(LittleEndian) != elf::PT_LOAD || memory_bytes == 0 {
            continue;
        }
        let virtual_address = program.p_vaddr.get(LittleEndian);
        let physical_address = program.p_paddr.get(LittleEndian);
        if file_bytes > memory_bytes {
            let expected = "at most its size in memory";
            return Err(KernelError::BadElf {
                what: "a segment's size in the file",
                found: file_bytes,
                expected,
            });
        }
        for (what, address) in [
            ("a segment's physical address", physical_address),
            ("a segment's virtual address", virtual_address),
        ] {
            // Nor may a few pages more wrap: whoever rounds an address up in the kernel need not think of it.
            let end = address.checked_add(memory_bytes);
            if end
                .and_then(|end| end.checked_add(ROUNDING_BYTES))
                .is_none()
            {
                return Err(KernelError::BadElf {
                    what,
                    found: address,
                    expected: "one that its size does not wrap around",
                });
            }
        }
        let flags = program.p_flags.get(LittleEndian);
        segments.push(Segment {
            virtual_address,
            physical_address,
            file: range(
                file,
                "a segment",
                program.p_offset.get(LittleEndian),
                file_bytes,
            )?,
            memory_bytes,
            executable: flags.contains(elf::PF_X),
            writable: flags.contains(elf::PF_W),
        });
    }
    if segments.is_empty() {
        return Err(KernelError::BadElf {
            what: "the number of segments to load",
            found: 0,
            expected: "one or more",
        });
    }
    // Each byte of the file is loaded once, to a place of its own: so what all of it costs is bounded by the file's
    // length.
    let in_file = segments.iter().map(|segment| &segment.file);
    apart(
        "a segment's place in the file",
        in_file.map(|file| file.start as u64..file.end as u64),
    )?;
    let physical = |segment: &Segment| segment.physical_address..segment.physical_end();
    apart(
        "a segment's physical address",
        segments.iter().map(physical),
    )?;
    let seen =
        |segment: &Segment| segment.virtual_address..segment.virtual_address + segment.memory_bytes;
    apart("a segment's virtual address", segments.iter().map(seen))?;
    Ok(segments)
}

/// Refuses ranges of which two overlap. Empty ones overlap nothing.
fn apart(what: &'static str, ranges: impl Iterator<Item = Range<u64>>) -> Result<(), KernelError> {
    let mut ranges: Vec<_> = ranges.filter(|range| !range.is_empty()).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    match ranges.windows(2).find(|two| two[1].start < two[0].end) {
        None => Ok(()),
        Some(two) => Err(KernelError::BadElf {
            what,
            found: two[1].start,
            expected: "one outside of every other one",
        }),
    }
}

/// The entry as a physical address, in one of the sections of code. Linux gives a physical one (`phys_startup_64`), other
/// kernels a virtual one.
///
/// The segments' flags are not asked: newer kernels begin in `.init.text`, in a segment that is for data.
fn entry(segments: &[Segment], code: &[Code], entry: u64) -> Result<u64, KernelError> {
    let physical = |address: u64| {
        segments.iter().find_map(|segment| {
            let offset = address.checked_sub(segment.virtual_address)?;
            (offset < segment.file.len() as u64).then(|| segment.physical_address + offset)
        })
    };
    let offset_in = |start: u64, code: &Code| {
        entry
            .checked_sub(start)
            .filter(|&offset| offset < code.file.len() as u64)
    };
    let places = || {
        code.iter()
            .filter_map(|code| Some((physical(code.address)?, code)))
    };
    if places().any(|(start, code)| offset_in(start, code).is_some()) {
        return Ok(entry);
    }
    places()
        .find_map(|(start, code)| Some(start + offset_in(code.address, code)?))
        .ok_or(KernelError::BadElf {
            what: "the entry",
            found: entry,
            expected: "an address in a section of code",
        })
}

/// The sections; `None` where the file has no section headers.
fn sections(
    file: &[u8],
    header: &FileHeader,
    segments: &[Segment],
) -> Result<Option<Sections>, KernelError> {
    if header.e_shoff.get(LittleEndian) == 0 || header.e_shnum.get(LittleEndian) == 0 {
        return Ok(None);
    }
    let table = section_headers(file, header)?;
    let names = names(file, table, header)?;
    let mut found = Sections::default();
    for section in table {
        let flags = section.sh_flags.get(LittleEndian);
        let address = section.sh_addr.get(LittleEndian);
        let bytes = section.sh_size.get(LittleEndian);
        let is_loaded = flags.contains(elf::SHF_ALLOC);
        if is_loaded {
            found.taken.push(address..address.saturating_add(bytes));
        }
        let is_data = section.sh_type.get(LittleEndian) == elf::SHT_PROGBITS;
        if !is_data || !is_loaded || bytes == 0 {
            continue;
        }
        let range = section_bytes(file, "a section", section)?;
        // What is found through the section is written through the segment: they must mean the same bytes.
        let same = segments.iter().any(|segment| {
            segment.holds(address, bytes)
                && segment.file.start as u64 + (address - segment.virtual_address)
                    == range.start as u64
        });
        if !same {
            let expected = "one that a segment loads from the section's own bytes";
            return Err(KernelError::BadElf {
                what: "a section's address",
                found: address,
                expected,
            });
        }
        let name = name(names, section.sh_name.get(LittleEndian));
        // Since 6.14 `.data` is executable as well: it holds the little code that kexec copies elsewhere. To take
        // data for code would be to rewrite it.
        let is_code = flags.contains(elf::SHF_EXECINSTR)
            && (!flags.contains(elf::SHF_WRITE) || name.contains("text"));
        let list = match is_code {
            true => &mut found.code,
            false => &mut found.data,
        };
        list.push(Code {
            name,
            address,
            file: range,
        });
    }
    // Segments do not overlap, so neither do these in the file.
    let taken = found.code.iter().chain(&found.data);
    apart(
        "a section's address",
        taken.map(|code| code.address..code.address + code.file.len() as u64),
    )?;
    Ok(Some(found))
}

fn section_headers<'a>(
    file: &'a [u8],
    header: &FileHeader,
) -> Result<&'a [SectionHeader], KernelError> {
    table(
        file,
        "the section headers",
        header.e_shoff.get(LittleEndian),
        header.e_shnum.get(LittleEndian),
        header.e_shentsize.get(LittleEndian),
    )
}

/// Where a section's bytes are in the file.
fn section_bytes(
    file: &[u8],
    what: &'static str,
    section: &SectionHeader,
) -> Result<Range<usize>, KernelError> {
    let offset = section.sh_offset.get(LittleEndian);
    range(file, what, offset, section.sh_size.get(LittleEndian))
}

/// The section names' string table; empty where the file names none.
fn names<'a>(
    file: &'a [u8],
    table: &[SectionHeader],
    header: &FileHeader,
) -> Result<&'a [u8], KernelError> {
    let index = header.e_shstrndx.get(LittleEndian).0;
    match table.get(usize::from(index)) {
        Some(section) if index != 0 => {
            Ok(&file[section_bytes(file, "the section names", section)?])
        }
        _ => Ok(&[]),
    }
}

fn name(names: &[u8], offset: u32) -> String {
    let text = names.get(offset as usize..).unwrap_or(&[]);
    let end = text
        .iter()
        .take(64)
        .position(|&byte| byte == 0)
        .unwrap_or(0);
    String::from_utf8_lossy(&text[..end]).into_owned()
}

/// Without sections: the executable segments, as long as none of them is also writable and so holds data.
fn code_of_segments(segments: &[Segment]) -> Result<Vec<Code>, KernelError> {
    let mut code = Vec::new();
    for segment in segments
        .iter()
        .filter(|segment| segment.executable && !segment.file.is_empty())
    {
        if segment.writable {
            return Err(KernelError::CodeUnknown {
                address: segment.virtual_address,
            });
        }
        code.push(Code {
            name: String::new(),
            address: segment.virtual_address,
            file: segment.file.clone(),
        });
    }
    Ok(code)
}

/// A table of `count` records, each of which is said to have `record_bytes` bytes.
fn table<'a, T: Pod>(
    file: &'a [u8],
    what: &'static str,
    offset: u64,
    count: u16,
    record_bytes: u16,
) -> Result<&'a [T], KernelError> {
    if count != 0 && usize::from(record_bytes) != size_of::<T>() {
        return Err(KernelError::BadElf {
            what: "a table's entry size",
            found: u64::from(record_bytes),
            expected: "56 for segments, 64 for sections",
        });
    }
    records(file, what, offset, count)
}

/// Records that stand in the file, wherever that is.
fn records<'a, T: Pod>(
    file: &'a [u8],
    what: &'static str,
    offset: u64,
    count: u16,
) -> Result<&'a [T], KernelError> {
    const { assert!(align_of::<T>() == 1, "object has the feature `unaligned`") };
    let bytes = range(file, what, offset, u64::from(count) * size_of::<T>() as u64)?;
    Ok(pod::slice_from_all_bytes(&file[bytes]).expect("whole records"))
}

/// A range of the file, known to lie in it.
fn range(
    file: &[u8],
    what: &'static str,
    offset: u64,
    bytes: u64,
) -> Result<Range<usize>, KernelError> {
    let (needed, found) = (offset.saturating_add(bytes), file.len() as u64);
    if needed > found {
        return Err(KernelError::Truncated {
            what,
            needed,
            found,
        });
    }
    Ok(offset as usize..needed as usize)
}

#[cfg(test)]
mod tests;
