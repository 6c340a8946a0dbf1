//! Keeps the Accessed bits of page-table entries set, and keeps Linux from asking what they were.
//!
//! The CPU sets the bit when it walks to an entry, which it does only when its TLB has not got the page.
//! Linux clears it without a flush (arch/x86/mm/pgtable.c: `ptep_clear_flush_young` "does not flush"), so whether a
//! cleared bit comes back depends on how long the page stays in a TLB, and that on what the host does: a switch to
//! another thread, a change of its own page tables. A CPU may also set it for a walk that it only speculated on. Which
//! pages Linux reclaims hangs on the answer.
//!
//! Each entry that Linux makes has the bit set (arch/x86/include/asm/pgtable_types.h: `___A` in every protection). So
//! where nobody ever clears it, the CPU has nothing to set, and the bit is a constant whatever a TLB holds. That is
//! what is done here, in a few functions that [`Symbols`] finds:
//!
//! | | becomes |
//! |---|---|
//! | the functions that test and clear the bit | "it was not set", with nothing cleared |
//! | `folio_referenced`, `page_referenced` | "by nobody": some kernels look at the bit themselves before they clear it |
//! | `walk_pud_range`, which ages page tables for the multi-generational LRU | "there is no more to walk", as it says itself at the end |
//! | what makes an old entry of a young one, for a child or after a move | an AND that leaves the bit alone |
//!
//! The answer is "not used" and not "used", though all bits are set: a kernel that finds each page in use reclaims
//! none. So it reclaims in the order of its lists, and by what faults back in.
//!
//! A function is given its answer where it begins, after the call that function tracing patches: nothing but
//! its first few instructions changes, and no other instruction of it runs any more.

use std::ops::Range;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Register};
use serde::{Deserialize, Serialize};

use super::Patch;
use crate::image::Elf;
use crate::rewrite::alternatives;
use crate::rewrite::named::Named;
use crate::rewrite::traps::Sites;
use crate::symbols::kallsyms::Symbols;

/// `_PAGE_ACCESSED` (Linux, arch/x86/include/asm/pgtable_types.h; Intel SDM vol. 3, 4.5).
const ACCESSED: i64 = 0x20;
/// What else is taken from an entry in the same AND where it is made old: leave to write (`_PAGE_RW`), and the bits that
/// are software's. An AND that takes others away compares, and makes nothing old: `pmd_bad` looks at an entry without
/// `_PAGE_USER` and this one.
const TAKEN: i64 = ACCESSED | 0x2 | 0xe00;

/// `int3`.
const PADDING: u8 = 0xcc;

/// A function that is to give one answer from now on.
struct Constant {
    /// Its name; it is the first of these that the kernel has.
    names: &'static [&'static str],
    /// It must be there in a kernel with this symbol; where that is empty, in each kernel.
    with: &'static str,
    /// What it becomes.
    code: &'static [u8],
}

/// `xor eax, eax; ret`.
const NOT_YOUNG: &[u8] = &[0x31, 0xc0, 0xc3];
/// `mov qword [rcx], 0; xor eax, eax; ret`: the fourth argument takes the flags of the areas that refer to the page.
const BY_NOBODY: &[u8] = &[0x48, 0xc7, 0x01, 0, 0, 0, 0, 0x31, 0xc0, 0xc3];
/// `mov eax, 1; ret`.
const NO_MORE: &[u8] = &[0xb8, 1, 0, 0, 0, 0xc3];

/// Kernels without huge pages have none of the functions for entries above the lowest.
const CONSTANTS: [Constant; 7] = [
    Constant {
        names: &["ptep_test_and_clear_young"],
        with: "",
        code: NOT_YOUNG,
    },
    Constant {
        names: &["ptep_clear_flush_young"],
        with: "",
        code: NOT_YOUNG,
    },
    Constant {
        names: &["pmdp_test_and_clear_young"],
        with: "pmdp_set_access_flags",
        code: NOT_YOUNG,
    },
    Constant {
        names: &["pmdp_clear_flush_young"],
        with: "pmdp_set_access_flags",
        code: NOT_YOUNG,
    },
    Constant {
        names: &["pudp_test_and_clear_young"],
        with: "pudp_set_access_flags",
        code: NOT_YOUNG,
    },
    Constant {
        names: &["folio_referenced", "page_referenced"],
        with: "",
        code: BY_NOBODY,
    },
    Constant {
        names: &["walk_pud_range"],
        with: "lru_gen_add_mm",
        code: NO_MORE,
    },
];

/// The functions that make an old entry of a young one; which of them are inlined into which differs from kernel to
/// kernel.
const OLDENING: [&str; 19] = [
    "copy_page_range",
    "copy_pte_range",
    "copy_present_pte",
    "copy_present_ptes",
    "__copy_present_ptes",
    "copy_huge_pmd",
    "copy_huge_pud",
    "remove_migration_pte",
    "remove_migration_pmd",
    "__split_huge_pmd",
    "__split_huge_pmd_locked",
    "split_huge_pmd_locked",
    "unuse_pte_range",
    "unuse_pte",
    "madvise_cold_or_pageout_pte_range",
    "restore_exclusive_pte",
    "damon_mkold_hugetlb_entry",
    "damon_hugetlb_mkold",
    "damon_hugetlb_ptep_mkold",
];

/// How [`Ages`] names what a kernel has no symbols for.
const NO_SYMBOLS: &str = "all of them: it names none of its functions";

/// Bytes that take the place of others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rewrite {
    /// Virtual address.
    pub address: u64,
    /// What is to stand there.
    pub bytes: Vec<u8>,
}

impl Rewrite {
    fn range(&self) -> Range<u64> {
        self.address..self.address + self.bytes.len() as u64
    }
}

/// What is rewritten in a kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ages {
    /// Where, and what is to stand there.
    pub rewrites: Vec<Rewrite>,
    /// The functions that could not be, by name.
    pub missing: Vec<String>,
}

impl Ages {
    /// What is to stand in guest memory, over the kernel's own. An address that this kernel does not have becomes one
    /// that no memory has.
    pub fn patches(&self, elf: &Elf<'_>) -> Vec<Patch> {
        let patch = |rewrite: &Rewrite| Patch {
            gpa: elf.physical(rewrite.address).unwrap_or(u64::MAX),
            bytes: rewrite.bytes.clone(),
        };
        self.rewrites.iter().map(patch).collect()
    }

    /// What the guest may see of the host's TLB because this kernel is as it is: a phrase.
    pub fn hole(&self) -> Option<String> {
        (!self.missing.is_empty()).then(|| {
            format!(
                "which pages its kernel reclaims may differ in a replay, for functions that ask whether a page was used are not known: {}",
                self.missing.join(", ")
            )
        })
    }
}

/// Looks for it while a kernel's code is decoded from the first byte to the last.
#[derive(Debug)]
pub(super) struct Search {
    /// Of each of [`CONSTANTS`] that this kernel must have: its number and where it stands.
    constants: Vec<(usize, Option<Range<u64>>)>,
    oldening: Vec<Range<u64>>,
    fentry: Option<u64>,
    symbols: bool,
    /// The ANDs that were found, as they are to be.
    ands: Vec<Rewrite>,
}

impl Search {
    /// For this kernel.
    pub(super) fn of(elf: &Elf<'_>) -> Search {
        let Some(symbols) = Symbols::find(elf.file()) else {
            return Search::to(false, &|_| None);
        };
        let names: Vec<&str> = CONSTANTS
            .iter()
            .flat_map(|constant| constant.names.iter().copied().chain([constant.with]))
            .chain(OLDENING)
            .chain(["__fentry__"])
            .collect();
        let extents = symbols.extents(&names);
        let found: Vec<_> = names.iter().copied().zip(extents).collect();
        Search::to(true, &|name| {
            let of_name = found.iter().find(|(known, _)| *known == name);
            of_name.and_then(|(_, extent)| extent.clone())
        })
    }

    fn to(symbols: bool, extent: &dyn Fn(&str) -> Option<Range<u64>>) -> Search {
        let wanted = CONSTANTS
            .iter()
            .enumerate()
            .filter_map(|(index, constant)| {
                let range = constant.names.iter().find_map(|name| extent(name));
                let needed = constant.with.is_empty() || extent(constant.with).is_some();
                (needed || range.is_some()).then_some((index, range))
            });
        let mut oldening: Vec<_> = OLDENING.iter().filter_map(|name| extent(name)).collect();
        oldening.sort_by_key(|range| range.start);
        Search {
            constants: wanted.collect(),
            oldening,
            fentry: extent("__fentry__").map(|range| range.start),
            symbols,
            ands: Vec::new(),
        }
    }

    /// The next instruction.
    pub(super) fn see(&mut self, instruction: &Instruction) {
        let next = self
            .oldening
            .partition_point(|range| range.start <= instruction.ip());
        let inside = next > 0 && self.oldening[next - 1].contains(&instruction.ip());
        if inside && let Some(and) = kept_young(instruction) {
            self.ands.push(and);
        }
    }

    /// What is to be rewritten, and what should be and cannot.
    pub(super) fn finish(self, elf: &Elf<'_>, sites: &Sites, named: &Named) -> Ages {
        if !self.symbols {
            return Ages {
                rewrites: Vec::new(),
                missing: vec![NO_SYMBOLS.into()],
            };
        }
        let mut ages = Ages::default();
        let patched = alternatives::read(elf);
        for (index, extent) in &self.constants {
            let constant = &CONSTANTS[*index];
            let rewrite = extent
                .as_ref()
                .and_then(|extent| answer(elf, extent, self.fentry, constant.code))
                .filter(|(rewrite, inside)| {
                    let range = rewrite.range();
                    let free = patched.as_ref().is_some_and(|patched| {
                        let meets = |of: &Range<u64>| of.start < range.end && range.start < of.end;
                        !patched.iter().any(|patch| meets(&patch.range()))
                    });
                    free && !inside.iter().any(|at| named.contains(*at))
                        && !sites.sites.iter().any(|site| range.contains(&site.address))
                });
            match rewrite {
                Some((rewrite, _)) => ages.rewrites.push(rewrite),
                None => ages.missing.push(constant.names[0].into()),
            }
        }
        ages.rewrites.extend(self.ands);
        ages.rewrites.sort_by_key(|rewrite| rewrite.address);
        ages
    }
}

/// The function at `extent`, as it is to begin, and the instructions that this takes the place of but for the first;
/// `None` if it is too short, or begins in a way that is not known.
fn answer(
    elf: &Elf<'_>,
    extent: &Range<u64>,
    fentry: Option<u64>,
    code: &[u8],
) -> Option<(Rewrite, Vec<u64>)> {
    let bytes = elf.at(extent.start, (extent.end - extent.start) as usize)?;
    let mut decoder = Decoder::with_ip(64, bytes, extent.start, DecoderOptions::NONE);
    let mut instruction = decoder.decode();
    if instruction.code() == Code::Endbr64 {
        instruction = decoder.decode();
    }
    // Tracing patches the call, or what the compiler left for one, and looks at what stands there.
    let calls_fentry = instruction.code() == Code::Call_rel32_64
        && Some(instruction.near_branch_target()) == fentry;
    if calls_fentry || (instruction.code() == Code::Nop_rm32 && instruction.len() == 5) {
        instruction = decoder.decode();
    }
    let (start, mut inside) = (instruction.ip(), Vec::new());
    while instruction.next_ip() - start < code.len() as u64 {
        instruction = decoder.decode();
        inside.push(instruction.ip());
        if instruction.is_invalid() {
            return None;
        }
    }
    // What is left of the last instruction is reached by nobody.
    let mut bytes = code.to_vec();
    bytes.resize((instruction.next_ip() - start) as usize, PADDING);
    let rewrite = Rewrite {
        address: start,
        bytes,
    };
    (!instruction.is_invalid()).then_some((rewrite, inside))
}

/// An instruction that clears an entry's Accessed bit in a register, made to leave it as it is.
fn kept_young(instruction: &Instruction) -> Option<Rewrite> {
    let wide = match instruction.code() {
        Code::And_rm64_imm8 => 1,
        Code::And_rm64_imm32 | Code::And_RAX_imm32 => 4,
        _ => return None,
    };
    if instruction.op0_register() == Register::None {
        return None;
    }
    let mask = instruction.immediate(1).cast_signed();
    let cleared = !mask;
    if cleared & ACCESSED == 0 || cleared & !TAKEN != 0 {
        return None;
    }
    // The immediate comes last.
    let bytes = (mask | ACCESSED).to_le_bytes()[..wide].to_vec();
    Some(Rewrite {
        address: instruction.next_ip() - wide as u64,
        bytes,
    })
}

#[cfg(test)]
mod tests;
