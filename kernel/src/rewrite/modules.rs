//! Loadable modules: when the kernel is about to run one, where its text is, and what in it must be trapped.
//!
//! A module comes from the initrd or a disk, is linked by the guest's kernel, and is code that the loader never saw. So
//! one call in the kernel becomes a trap: that of `module_enable_x` (6.10 and later: `module_enable_text_rox`), which
//! makes a module's text executable. At that call
//!
//! * the text stands where it will run, relocated;
//! * alternatives, paravirtual calls, retpolines and returns have been patched (`module_finalize`);
//! * nothing of the module has run, nor could have: its pages are not executable yet. `do_init_module`, which one would
//!   think of first, is too late by a little: module parameters are parsed before it, with the module's own functions.
//!
//! **What is patched later** cannot bring an instruction back that was trapped. Jump labels swap a NOP for a jump and back,
//! static calls and ftrace the target of a call or a NOP, SMP locks a prefix (`0xf0`) for another (`0x3e`), kprobes and
//! livepatch are the operator's doing. All write over their own sites, of which none is one of ours, and none writes a
//! RDTSC, RDTSCP or CPUID. Alternatives are applied once, from replacements that nobody runs or copies again.
//!
//! The call is rewritten where it is made, and not the function that it leads to: ftrace checks how functions begin before
//! it patches them, and switches itself off for good when it finds something else.
//!
//! Older kernels have `module_enable_x` inlined; there it is `ftrace_module_init`, called just before, or else
//! `do_init_module`. The function's address comes from the kernel's own symbols (`symbols::kallsyms`);
//! where `struct module`, its one argument, says where the text is comes from its own types
//! (`symbols::btf`): since 6.4 in `mem[]`, before that in `core_layout` and `init_layout`.
//!
//! **Decoded, never searched**, as in the kernel. A module's sections lie side by side with zeroes between them, and a
//! decoder may take the last of these for the beginning of an instruction. So the module's own symbols, which the kernel
//! has read by then, say where functions and sections begin.

use serde::{Deserialize, Serialize};

use crate::image::Elf;
use crate::rewrite::traps::{self, SiteKind};
use crate::symbols::btf::{Btf, Type};
use crate::symbols::kallsyms::Symbols;

/// Functions of one argument, the module, that are called before anything of it runs; the best first.
const LOADS: [&str; 4] = [
    "module_enable_text_rox",
    "module_enable_x",
    "ftrace_module_init",
    "do_init_module",
];
/// A kernel without this function loads no modules.
const LOADER: &str = "load_module";
/// No module's text is longer: of the largest known one it is some 30 MiB. A guest may claim what it likes, and map the
/// same page over and over; what is longer is not looked at.
const TEXT_BYTES: u32 = 64 << 20;
/// No module has more instructions to trap; of the largest known ones, some hundreds. What comes after them is left
/// alone.
const SITES_MAX: usize = 1 << 16;
/// No module has more symbols.
const SYMBOLS: u32 = 1 << 20;
/// An entry of the symbol table (ELF-64, "Symbol Table").
const SYMBOL_BYTES: usize = 24;
const STT_FUNC: u8 = 2;
const STT_SECTION: u8 = 3;

/// What becomes of the modules of a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Modules {
    /// It has none.
    None,
    /// They are rewritten before they run.
    Trapped {
        /// Addresses of the functions to look for calls of, the best first.
        loads: Vec<u64>,
        /// Where a module's text is.
        layout: ModuleLayout,
    },
    /// They are left alone, for this reason.
    Untrapped(String),
}

/// Where `struct module` tells of the text. Offsets are in bytes, from its beginning unless said otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleLayout {
    /// The text for good, and that of its beginning.
    pub texts: [TextPlace; 2],
    /// Its symbols.
    pub symbols: Option<SymbolPlace>,
}

/// A pointer to a text, and its length in bytes, of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextPlace {
    /// Where the pointer is.
    pub base: u32,
    /// Where the length is.
    pub bytes: u32,
}

/// A pointer to a structure that has a pointer to a symbol table, and the number of its entries, of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SymbolPlace {
    /// Where the pointer to the structure is.
    pub pointer: u32,
    /// Where the pointer to the table is, in that structure.
    pub table: u32,
    /// Where the number of entries is, in that structure.
    pub count: u32,
}

/// An instruction to trap in a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleSite {
    /// Its virtual address.
    pub address: u64,
    /// Its length in bytes.
    pub length: usize,
    /// What it is.
    pub kind: SiteKind,
}

/// A module's texts, and what is to be trapped in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModuleText {
    /// Virtual addresses of the texts, each from its beginning to its end.
    pub ranges: Vec<std::ops::Range<u64>>,
    /// The sites.
    pub sites: Vec<ModuleSite>,
    /// Virtual addresses of OUTs to a trap port that the module has itself.
    pub own_outs: Vec<u64>,
    /// Not all of it could be read, or there is more than any module has: some of it is not trapped.
    pub is_cut: bool,
}

/// Reads guest memory at a virtual address, as far as it is mapped; returns how many bytes.
pub type ReadGuest<'a> = &'a dyn Fn(u64, &mut [u8]) -> usize;

/// What is to be known of a kernel to trap its modules.
pub fn find(elf: &Elf<'_>) -> Modules {
    let untrapped = |why: &str| Modules::Untrapped(why.into());
    let Some(symbols) = Symbols::find(elf.file()) else {
        return untrapped("the kernel's image has no symbol table (CONFIG_KALLSYMS)");
    };
    if symbols.lookup(LOADER).is_none() {
        return Modules::None;
    }
    let loads: Vec<u64> = LOADS
        .iter()
        .filter_map(|name| symbols.lookup(name))
        .collect();
    if loads.is_empty() {
        return untrapped("the kernel has none of the functions that are looked for");
    }
    let Some(btf) = Btf::of_kernel(elf, &symbols) else {
        return untrapped("the kernel's image does not describe its types (CONFIG_DEBUG_INFO_BTF)");
    };
    match ModuleLayout::find(&btf) {
        Some(layout) => Modules::Trapped { loads, layout },
        None => untrapped("the kernel's struct module is of a form that is not known"),
    }
}

impl Modules {
    /// The functions to look for calls of.
    pub fn loads(&self) -> &[u64] {
        match self {
            Modules::Trapped { loads, .. } => loads,
            Modules::None | Modules::Untrapped(_) => &[],
        }
    }

    /// Where a module's text is, if it is to be looked at.
    pub fn layout(&self) -> Option<&ModuleLayout> {
        match self {
            Modules::Trapped { layout, .. } => Some(layout),
            Modules::None | Modules::Untrapped(_) => None,
        }
    }

    /// What a module could get at for want of traps; `calls` is how many calls of [`Self::loads`] were found.
    pub fn hole(&self, calls: u32) -> Option<String> {
        let why = match self {
            Modules::None => return None,
            Modules::Trapped { .. } if calls > 0 => return None,
            Modules::Trapped { .. } => {
                "the kernel makes no direct call to where modules are loaded"
            }
            Modules::Untrapped(why) => why,
        };
        Some(format!(
            "rdtsc, rdtscp and cpuid in loadable modules: {why}"
        ))
    }
}

impl ModuleLayout {
    /// Out of the kernel's own types.
    fn find(btf: &Btf<'_>) -> Option<ModuleLayout> {
        let module = btf.structure("module")?;
        let texts = texts_since_6_4(btf, module).or_else(|| texts_before_6_4(btf, module))?;
        Some(ModuleLayout {
            texts,
            symbols: symbol_place(btf, module),
        })
    }

    /// Reads the texts of the module at `module`, and finds what is to be trapped in them.
    pub fn text(&self, module: u64, read: ReadGuest<'_>) -> ModuleText {
        let mut found = ModuleText::default();
        let mut starts = None;
        for place in self.texts {
            let base = word(read, module.wrapping_add(place.base.into()));
            let bytes = half(read, module.wrapping_add(place.bytes.into()));
            let (Some(base), Some(bytes)) = (base, bytes) else {
                continue;
            };
            if base == 0 || bytes == 0 {
                // A module without a text of this kind.
                continue;
            }
            let end = base.checked_add(bytes.into());
            let Some(end) = end.filter(|_| bytes <= TEXT_BYTES) else {
                found.is_cut = true;
                continue;
            };
            let starts = starts.get_or_insert_with(|| self.starts(module, read));
            let text = read_all(read, base, bytes as usize);
            let first = starts.partition_point(|&start| start < base);
            let all = traps::each_instruction(&text, base, &starts[first..], |instruction| {
                if found.sites.len() + found.own_outs.len() == SITES_MAX {
                    return Err(());
                }
                if let Some(kind) = SiteKind::of(instruction) {
                    found.sites.push(ModuleSite {
                        address: instruction.ip(),
                        length: instruction.len(),
                        kind,
                    });
                } else if traps::is_own_out(instruction) {
                    found.own_outs.push(instruction.ip());
                }
                Ok(())
            });
            found.is_cut |= all.is_err() || text.len() < bytes as usize;
            found.ranges.push(base..end);
        }
        found
    }

    /// Where the module's functions and sections begin, in ascending order.
    fn starts(&self, module: u64, read: ReadGuest<'_>) -> Vec<u64> {
        let table = self.symbols.and_then(|place| {
            let symbols = word(read, module.wrapping_add(place.pointer.into()))?;
            let table = word(read, symbols.wrapping_add(place.table.into()))?;
            let count = half(read, symbols.wrapping_add(place.count.into()))?;
            (count <= SYMBOLS).then(|| read_all(read, table, count as usize * SYMBOL_BYTES))
        });
        let mut starts: Vec<u64> = table
            .unwrap_or_default()
            .chunks_exact(SYMBOL_BYTES)
            .filter(|symbol| matches!(symbol[4] & 0xf, STT_FUNC | STT_SECTION))
            .filter_map(|symbol| symbol.get(8..)?.first_chunk().copied())
            .map(u64::from_le_bytes)
            .collect();
        starts.sort_unstable();
        starts.dedup();
        starts
    }
}

/// `mem[]`, of which each kind of memory has its own.
fn texts_since_6_4(btf: &Btf<'_>, module: Type) -> Option<[TextPlace; 2]> {
    let mem = btf.member(module, "mem")?;
    let (of, count) = btf.elements(mem.of)?;
    let place = |kind| {
        let number = btf.constant("mod_mem_type", kind)?;
        let at = number.checked_mul(btf.bytes(of)?)?;
        (number < count).then_some(())?;
        text_place(btf, of, "size", mem.offset.checked_add(at)?)
    };
    Some([place("MOD_TEXT")?, place("MOD_INIT_TEXT")?])
}

/// Two layouts, whose first `text_size` bytes are text.
fn texts_before_6_4(btf: &Btf<'_>, module: Type) -> Option<[TextPlace; 2]> {
    let place = |name| {
        let layout = btf.member(module, name)?;
        text_place(btf, layout.of, "text_size", layout.offset)
    };
    Some([place("core_layout")?, place("init_layout")?])
}

fn text_place(btf: &Btf<'_>, of: Type, bytes: &str, at: u32) -> Option<TextPlace> {
    Some(TextPlace {
        base: at.checked_add(sized_member(btf, of, "base", 8)?)?,
        bytes: at.checked_add(sized_member(btf, of, bytes, 4)?)?,
    })
}

fn symbol_place(btf: &Btf<'_>, module: Type) -> Option<SymbolPlace> {
    let pointer = btf.member(module, "kallsyms")?;
    let of = btf.pointee(pointer.of)?;
    Some(SymbolPlace {
        pointer: pointer.offset,
        table: sized_member(btf, of, "symtab", 8)?,
        count: sized_member(btf, of, "num_symtab", 4)?,
    })
}

/// Offset of a member that has `bytes` bytes.
fn sized_member(btf: &Btf<'_>, of: Type, name: &str, bytes: u32) -> Option<u32> {
    let member = btf.member(of, name)?;
    (btf.bytes(member.of)? == bytes).then_some(member.offset)
}

fn word(read: ReadGuest<'_>, at: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    (read(at, &mut bytes) == 8).then(|| u64::from_le_bytes(bytes))
}

fn half(read: ReadGuest<'_>, at: u64) -> Option<u32> {
    let mut bytes = [0; 4];
    (read(at, &mut bytes) == 4).then(|| u32::from_le_bytes(bytes))
}

/// Up to `bytes` bytes; fewer where mapped memory ends. Room is made as they come, so that a length that the guest
/// only claims costs nothing.
fn read_all(read: ReadGuest<'_>, at: u64, bytes: usize) -> Vec<u8> {
    const STEP: usize = 64 << 10;
    let mut all = Vec::new();
    while all.len() < bytes {
        let (done, step) = (all.len(), STEP.min(bytes - all.len()));
        all.resize(done + step, 0);
        let got = read(at.wrapping_add(done as u64), &mut all[done..]);
        all.truncate(done + got);
        if got < step {
            break;
        }
    }
    all
}

#[cfg(test)]
mod tests;
