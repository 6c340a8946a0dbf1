//! The kernel's own symbols as an ELF file, for a debugger.
//!
//! The file has the kernel's sections at their addresses, without their bytes, and a symbol table made from its
//! kallsyms. There is nothing of lines, types or frames in it: that is in no image that a distribution ships.

use object::elf;
use object::endian::Endianness;
use object::write::elf::{FileHeader, SectionHeader, SectionIndex, Sym, Writer};

use super::kallsyms::{Symbol, Symbols};
use crate::image::Elf;

/// A part of the address space that symbols lie in.
struct Section {
    name: String,
    address: u64,
    bytes: u64,
    is_code: bool,
}

/// An ELF file with the symbols that the kernel has of itself; `None` if it has none.
pub fn symbol_file(kernel: &Elf<'_>) -> Option<Vec<u8>> {
    let symbols = Symbols::find(kernel.file())?;
    let mut symbols: Vec<Symbol> = symbols.all().collect();
    // An ELF file's local symbols come before its global ones.
    symbols.sort_by_key(|symbol| !symbol.is_local());
    written(kernel.entry, &sections(kernel), &symbols).ok()
}

/// The kernel's sections, ascending; no two overlap.
fn sections(kernel: &Elf<'_>) -> Vec<Section> {
    let code = kernel.code.iter().map(|code| Section {
        name: code.name.clone(),
        address: code.address,
        bytes: code.file.len() as u64,
        is_code: true,
    });
    let named = |address| kernel.data.iter().find(|data| data.address == address);
    let data = kernel.taken.iter().map(|range| Section {
        name: named(range.start).map_or_else(|| ".bss".into(), |data| data.name.clone()),
        address: range.start,
        bytes: range.end - range.start,
        is_code: false,
    });
    let mut all: Vec<Section> = code.chain(data).collect();
    // Of two that begin in one place, code comes first.
    all.sort_by_key(|section| (section.address, !section.is_code));
    let mut end = 0;
    all.retain(|section| {
        let is_free = section.address >= end && section.bytes > 0;
        if is_free {
            end = section.address.saturating_add(section.bytes);
        }
        is_free
    });
    all
}

fn written(entry: u64, sections: &[Section], symbols: &[Symbol]) -> object::write::Result<Vec<u8>> {
    let mut file = Vec::new();
    let mut writer = Writer::new(Endianness::Little, true, &mut file);
    writer.reserve_file_header();
    writer.reserve_null_section_index();
    let section_names: Vec<_> = (sections.iter())
        .map(|section| writer.add_section_name(section.name.as_bytes()))
        .collect();
    let indices: Vec<SectionIndex> = (sections.iter())
        .map(|_| writer.reserve_section_index())
        .collect();
    writer.reserve_symtab_section_index();
    writer.reserve_strtab_section_index();
    writer.reserve_shstrtab_section_index();
    writer.reserve_null_symbol_index();
    let places: Vec<Option<usize>> = (symbols.iter())
        .map(|symbol| place(sections, symbol.address))
        .collect();
    let mut names = Vec::with_capacity(symbols.len());
    for (symbol, place) in symbols.iter().zip(&places) {
        writer.reserve_symbol_index(place.map(|index| indices[index]));
        names.push(writer.add_string(symbol.name.as_bytes()));
    }
    writer.reserve_symtab();
    writer.reserve_strtab()?;
    writer.reserve_shstrtab()?;
    writer.reserve_section_headers();
    writer.write_file_header(&FileHeader {
        os_abi: elf::ELFOSABI_NONE,
        abi_version: 0,
        e_type: elf::ET_EXEC,
        e_machine: elf::EM_X86_64,
        e_entry: entry,
        e_flags: elf::FileFlags(0),
    })?;
    writer.write_null_symbol();
    for ((symbol, place), name) in symbols.iter().zip(&places).zip(names) {
        let section = place.map(|index| &sections[index]);
        let left = section.map_or(0, |section| {
            section.address + section.bytes - symbol.address
        });
        let binding = match symbol.is_local() {
            true => elf::STB_LOCAL,
            false => elf::STB_GLOBAL,
        };
        let kind = match section {
            None => elf::STT_NOTYPE,
            Some(section) if section.is_code => elf::STT_FUNC,
            Some(_) => elf::STT_OBJECT,
        };
        writer.write_symbol(&Sym {
            section: place.map(|index| indices[index].0),
            st_name: writer.string_offset(Some(name)),
            st_info: elf::SymbolInfo((binding.0 << 4) | kind.0),
            st_other: elf::SymbolOther(0),
            st_shndx: elf::SHN_ABS,
            st_value: symbol.address,
            st_size: symbol.bytes.min(left),
        });
    }
    writer.write_strtab();
    writer.write_shstrtab();
    writer.write_null_section_header();
    for (section, name) in sections.iter().zip(section_names) {
        let kind = match section.is_code {
            true => elf::SHF_EXECINSTR,
            false => elf::SHF_WRITE,
        };
        writer.write_section_header(&SectionHeader {
            sh_name: writer.section_name_offset(Some(name)),
            sh_type: elf::SHT_NOBITS,
            sh_flags: elf::SHF_ALLOC | kind,
            sh_addr: section.address,
            sh_offset: 0,
            sh_size: section.bytes,
            sh_link: 0,
            sh_info: 0,
            sh_addralign: 1,
            sh_entsize: 0,
        });
    }
    let locals = symbols.partition_point(Symbol::is_local) as u32;
    writer.write_symtab_section_header(locals + 1);
    writer.write_strtab_section_header();
    writer.write_shstrtab_section_header();
    drop(writer);
    Ok(file)
}

/// The section that an address is in. One just after it marks its end, and belongs to it too.
fn place(sections: &[Section], address: u64) -> Option<usize> {
    let after = sections.partition_point(|section| section.address <= address);
    after.checked_sub(1).filter(|index| {
        let section = &sections[*index];
        address - section.address <= section.bytes
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::unpack;
    use crate::testing::debian_kernels;

    #[test]
    fn debians_kernels_have_their_symbols_where_they_load_them() {
        for (name, image) in debian_kernels() {
            let kernel = unpack(&image).expect("a kernel of Debian's");
            let elf = Elf::parse(&kernel.elf).expect("a kernel of Debian's");
            let symbols = Symbols::find(elf.file()).expect("symbols of Debian's");
            let file = symbol_file(&elf).expect("symbols of Debian's");
            // Read back by other code than what wrote it: its table is 24 bytes a symbol, and sorted by nothing.
            let table = object_symbols(&file);
            assert_eq!(table.len(), symbols.count(), "{name}");
            for wanted in ["panic", "do_syscall_64", "jiffies"] {
                let address = symbols.lookup(wanted).expect("it has that");
                let found = table.iter().find(|(name, _, _)| name == wanted);
                let (_, value, section) = found.expect("the file has it");
                assert_eq!(
                    (*value, *section != 0xfff1),
                    (address, true),
                    "{name}: {wanted}"
                );
            }
            let panic = symbols.lookup("panic").expect("it has that");
            assert!(elf.code_at(panic).is_some(), "{name}");
        }
    }

    /// Names, values and sections of the symbols in an ELF file.
    fn object_symbols(file: &[u8]) -> Vec<(String, u64, u16)> {
        let word = |at: usize, bytes: usize| {
            let mut value = [0; 8];
            value[..bytes].copy_from_slice(&file[at..at + bytes]);
            u64::from_le_bytes(value) as usize
        };
        let (headers, count) = (word(0x28, 8), word(0x3c, 2));
        let section = |index: usize| headers + 64 * index;
        let table = (0..count).find(|index| word(section(*index) + 4, 4) == 2);
        let table = section(table.expect("a symbol table"));
        let strings = section(word(table + 0x28, 4));
        let (start, bytes) = (word(table + 0x18, 8), word(table + 0x20, 8));
        let names = word(strings + 0x18, 8);
        (1..bytes / 24)
            .map(|index| {
                let at = start + 24 * index;
                let name = &file[names + word(at, 4)..];
                let end = name.iter().position(|byte| *byte == 0).expect("an end");
                let name = String::from_utf8_lossy(&name[..end]).into_owned();
                (name, word(at + 8, 8) as u64, word(at + 6, 2) as u16)
            })
            .collect()
    }
}
