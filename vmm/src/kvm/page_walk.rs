//! The guest's page tables, walked as the CPU walks them, and without its side effects.
//!
//! `KVM_TRANSLATE` would do it too, and set the Accessed bits on its way: looking would change guest
//! memory, and a recorder that looks more often than a replay would leave the guest another memory. So
//! this is the one walker, for every mode that has page tables (Intel SDM vol. 3, 4.3 to 4.5). It reads at most
//! five entries, whatever the tables say, and asks for no permission: it tells where memory is, not
//! who may touch it.

use kvm_bindings::kvm_sregs;

/// CR0.PG: there are page tables.
const CR0_PG: u64 = 1 << 31;
/// CR4.PSE: 32-bit tables may have pages of 4 MiB.
const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE: entries have 64 bits.
const CR4_PAE: u64 = 1 << 5;
/// CR4.LA57: five levels.
const CR4_LA57: u64 = 1 << 12;
/// EFER.LMA: long mode.
const EFER_LMA: u64 = 1 << 10;

/// An entry says that there is something.
const PRESENT: u64 = 1;
/// Programs may use what it leads to.
const USER: u64 = 1 << 2;
/// An entry of a higher level is a page, and not a table.
const LARGE: u64 = 1 << 7;
/// An entry of 64 bits forbids to execute what it leads to.
const NO_EXECUTE: u64 = 1 << 63;
/// The address in an entry of 64 bits, whatever flags are beside it.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The least page, in bytes.
const SMALL: u64 = 1 << 12;

/// The form of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// No tables: every address is physical.
    Flat,
    /// Entries of 32 bits, two levels.
    Legacy {
        /// Whether there are pages of 4 MiB.
        large: bool,
    },
    /// Entries of 64 bits, two levels below four entries.
    Pae,
    /// Entries of 64 bits, this many levels.
    Long {
        /// 4 or 5.
        levels: u32,
    },
}

/// What of a vCPU's state says how it addresses memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    form: Form,
    root: u64,
}

impl Paging {
    /// That of a vCPU with these registers.
    pub fn new(sregs: &kvm_sregs) -> Paging {
        Paging::of(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer)
    }

    /// The same, of the registers that count.
    pub fn of(cr0: u64, cr3: u64, cr4: u64, efer: u64) -> Paging {
        let has = |register: u64, bit: u64| register & bit != 0;
        let form = if !has(cr0, CR0_PG) {
            Form::Flat
        } else if has(efer, EFER_LMA) {
            let levels = if has(cr4, CR4_LA57) { 5 } else { 4 };
            Form::Long { levels }
        } else if has(cr4, CR4_PAE) {
            Form::Pae
        } else {
            let large = has(cr4, CR4_PSE);
            Form::Legacy { large }
        };
        Paging { form, root: cr3 }
    }

    /// That of the tables of four levels below the one at guest-physical address `root`.
    pub fn long(root: u64) -> Paging {
        let form = Form::Long { levels: 4 };
        Paging { form, root }
    }

    /// The guest-physical address of a virtual one; `None` where nothing is mapped. `read` fills a buffer
    /// from guest-physical memory, and says whether it is all RAM.
    pub fn translate(self, gva: u64, read: &dyn Fn(u64, &mut [u8]) -> bool) -> Option<u64> {
        self.page(gva, read).and_then(|page| page.translate(gva))
    }

    /// The page that a virtual address is on; `None` where nothing is mapped. `read` is as for [`Paging::translate`].
    pub fn page(self, gva: u64, read: &dyn Fn(u64, &mut [u8]) -> bool) -> Option<Page> {
        match self.form {
            Form::Flat => Some(Page::around(gva, gva, SMALL, false)),
            Form::Legacy { large } => {
                let gva = u32::try_from(gva).ok()?;
                legacy(self.root, gva, large, read)
            }
            Form::Pae => {
                let gva = u64::from(u32::try_from(gva).ok()?);
                let top = (self.root & 0xffff_ffe0) + 8 * (gva >> 30);
                let entry = entry64(top, read)?;
                // The entries at the top say nothing of programs (Intel SDM vol. 3, 4.4.1).
                descend(entry & ADDRESS, gva, 2, true, read)
            }
            Form::Long { levels } => {
                let unused = 64 - (12 + 9 * levels);
                let canonical = (gva.cast_signed() << unused >> unused).cast_unsigned() == gva;
                canonical.then_some(())?;
                descend(self.root & ADDRESS, gva, levels, true, read)
            }
        }
    }

    /// The same, of the tables that Linux keeps for its kernel beside those that it gives a program, where it isolates the
    /// two: 4 KiB before them (Linux, arch/x86/entry/calling.h, `PTI_USER_PGTABLE_BIT`).
    pub(super) fn of_kernel(self) -> Paging {
        const PTI_USER_TABLES: u64 = 1 << 12;
        let root = self.root & !PTI_USER_TABLES;
        Paging { root, ..self }
    }

    /// The entries that forbid to execute what is at an address: where each is, and what it would be without that. Only long
    /// mode is looked at. `read` is as for [`Paging::translate`].
    pub fn forbid(self, gva: u64, read: &dyn Fn(u64, &mut [u8]) -> bool) -> Vec<(u64, u64)> {
        let Form::Long { levels } = self.form else {
            return Vec::new();
        };
        let mut forbid = Vec::new();
        let mut table = self.root & ADDRESS;
        for level in (0..levels).rev() {
            let at = table + 8 * (gva >> (12 + 9 * level) & 0x1ff);
            let Some(entry) = entry64(at, read) else {
                break;
            };
            if entry & NO_EXECUTE != 0 {
                forbid.push((at, entry & !NO_EXECUTE));
            }
            if entry & LARGE != 0 {
                break;
            }
            table = entry & ADDRESS;
        }
        forbid
    }
}

/// A page, or as much of it as its smaller neighbours would have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Where it begins.
    gva: u64,
    gpa: u64,
    bytes: u64,
    /// Whether programs may use it.
    pub for_programs: bool,
}

impl Page {
    /// The page of this length around an address, which is mapped like that.
    fn around(gva: u64, gpa: u64, bytes: u64, for_programs: bool) -> Page {
        let start = |address: u64| address & !(bytes - 1);
        let (gva, gpa) = (start(gva), start(gpa));
        Page {
            gva,
            gpa,
            bytes,
            for_programs,
        }
    }

    /// The guest-physical address of a virtual one that is on it.
    pub fn translate(&self, gva: u64) -> Option<u64> {
        let inside = gva.checked_sub(self.gva)?;
        (inside < self.bytes).then(|| self.gpa + inside)
    }
}

/// An entry of 64 bits that is present.
fn entry64(at: u64, read: &dyn Fn(u64, &mut [u8]) -> bool) -> Option<u64> {
    let mut bytes = [0; 8];
    let entry = read(at, &mut bytes).then(|| u64::from_le_bytes(bytes))?;
    (entry & PRESENT != 0).then_some(entry)
}

/// Goes down `levels` levels of tables with 512 entries each, from the one at `table`.
fn descend(
    mut table: u64,
    gva: u64,
    levels: u32,
    mut for_programs: bool,
    read: &dyn Fn(u64, &mut [u8]) -> bool,
) -> Option<Page> {
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let entry = entry64(table + 8 * (gva >> shift & 0x1ff), read)?;
        for_programs &= entry & USER != 0;
        // Pages of 2 MiB and 1 GiB; the bit means nothing, or is reserved, further up.
        let is_page = level == 0 || (entry & LARGE != 0 && level <= 2);
        if is_page {
            return Some(Page::around(gva, entry & ADDRESS, 1 << shift, for_programs));
        }
        table = entry & ADDRESS;
    }
    None
}

fn legacy(root: u64, gva: u32, large: bool, read: &dyn Fn(u64, &mut [u8]) -> bool) -> Option<Page> {
    let entry = |at: u64| {
        let mut bytes = [0; 4];
        let entry = read(at, &mut bytes).then(|| u32::from_le_bytes(bytes))?;
        (u64::from(entry) & PRESENT != 0).then_some(u64::from(entry))
    };
    let gva = u64::from(gva);
    let upper = entry((root & 0xffff_f000) + 4 * (gva >> 22))?;
    if large && upper & LARGE != 0 {
        // Bits 20 to 13 are bits 39 to 32 of the address (PSE-36).
        let gpa = (upper >> 13 & 0xff) << 32 | upper & 0xffc0_0000;
        return Some(Page::around(gva, gpa, 1 << 22, upper & USER != 0));
    }
    let lower = entry((upper & 0xffff_f000) + 4 * (gva >> 12 & 0x3ff))?;
    let for_programs = upper & lower & USER != 0;
    Some(Page::around(gva, lower & 0xffff_f000, SMALL, for_programs))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Physical memory of a few words; what is not there reads as zero.
    #[derive(Default)]
    struct Words {
        words: BTreeMap<u64, u64>,
        reads: RefCell<u32>,
    }

    impl Words {
        fn read(&self, at: u64, buffer: &mut [u8]) -> bool {
            *self.reads.borrow_mut() += 1;
            let word = self.words.get(&(at & !7)).copied().unwrap_or(0);
            let bytes = word.to_le_bytes();
            let start = (at & 7) as usize;
            buffer.copy_from_slice(&bytes[start..start + buffer.len()]);
            true
        }

        fn translate(&self, paging: Paging, gva: u64) -> Option<u64> {
            paging.translate(gva, &|at, buffer| self.read(at, buffer))
        }
    }

    fn long(cr3: u64) -> Paging {
        Paging::of(CR0_PG, cr3, CR4_PAE, EFER_LMA)
    }

    const GVA: u64 = 0xffff_8123_4567_89ab;

    /// Tables that lead from `GVA` to a page at this level.
    fn tables(levels: u32, page_level: u32, page: u64) -> Words {
        let mut memory = Words::default();
        let mut table = 0x1000;
        for level in (page_level..levels).rev() {
            let at = table + 8 * (GVA >> (12 + 9 * level) & 0x1ff);
            let entry = if level == page_level {
                page | PRESENT | if level > 0 { LARGE } else { 0 }
            } else {
                (table + 0x1000) | PRESENT | 1 << 63
            };
            memory.words.insert(at, entry);
            table += 0x1000;
        }
        memory
    }

    #[test]
    fn pages_of_each_size_are_found_with_four_levels_and_with_five() {
        for (levels, form) in [
            (4, long(0x1fff)),
            (5, Paging::of(CR0_PG, 0x1000, CR4_PAE | CR4_LA57, EFER_LMA)),
        ] {
            for (page_level, page) in [(0, 0x7000), (1, 0x20_0000), (2, 0x4000_0000)] {
                let memory = tables(levels, page_level, page);
                let inside = GVA & ((1 << (12 + 9 * page_level)) - 1);
                assert_eq!(memory.translate(form, GVA), Some(page | inside));
            }
            assert_eq!(tables(levels, 3, 0).translate(form, GVA), None);
        }
    }

    #[test]
    fn what_forbids_to_execute_a_page_is_found_at_each_level() {
        let forbid = |memory: &Words| {
            let read = |at: u64, buffer: &mut [u8]| memory.read(at, buffer);
            long(0x1000).forbid(GVA, &read)
        };
        // All but the last of these forbid it.
        let mut memory = tables(4, 0, 0x7000);
        let found = forbid(&memory);
        assert_eq!(found.len(), 3);
        for (at, entry) in found {
            assert_eq!(memory.words.insert(at, entry), Some(entry | NO_EXECUTE));
        }
        assert_eq!(forbid(&memory), []);
        assert_eq!(memory.translate(long(0x1000), GVA), Some(0x79ab));
        // What a large page's entry leads to is no table.
        assert_eq!(forbid(&tables(4, 1, 0x20_0000)).len(), 2);
        assert_eq!(forbid(&Words::default()), []);
    }

    #[test]
    fn what_is_not_mapped_or_not_canonical_is_nowhere() {
        let memory = tables(4, 0, 0x7000);
        for gva in [
            GVA + (1 << 12),
            GVA + (1 << 21),
            GVA ^ 1 << 50,
            GVA ^ 1 << 63,
        ] {
            assert_eq!(memory.translate(long(0x1000), gva), None, "{gva:#x}");
        }
        let nowhere = long(0x1000).translate(GVA, &|_, _| false);
        assert_eq!(nowhere, None, "tables outside of RAM");
    }

    #[test]
    fn older_modes_have_their_own_tables() {
        assert_eq!(
            Words::default().translate(Paging::of(0, 0, 0, 0), 0xf_fff0),
            Some(0xf_fff0)
        );
        let mut memory = Words::default();
        memory.words.insert(0x1000 + 4 * 8, 0x2000 | PRESENT);
        memory.words.insert(0x2000 + 4 * 0x100, 0x5000 | PRESENT);
        memory
            .words
            .insert(0x1000 + 4 * 10, 0x0080_2000 | LARGE | PRESENT);
        let two_levels = Paging::of(CR0_PG, 0x1000, CR4_PSE, 0);
        assert_eq!(memory.translate(two_levels, 0x0210_0123), Some(0x5123));
        assert_eq!(
            memory.translate(two_levels, 0x0280_0123),
            Some(0x01_0080_0123)
        );
        assert_eq!(memory.translate(two_levels, 1 << 32 | 0x0210_0123), None);
        let mut memory = Words::default();
        memory.words.insert(0x1020 + 8 * 3, 0x2000 | PRESENT);
        memory.words.insert(0x2000 + 8, 0x60_0000 | LARGE | PRESENT);
        let pae = Paging::of(CR0_PG, 0x1020, CR4_PAE, 0);
        assert_eq!(memory.translate(pae, 0xc02a_bcde), Some(0x6a_bcde));
    }

    proptest! {
        #[test]
        fn a_walk_reads_five_entries_at_most(
            words in proptest::collection::btree_map((0u64..512).prop_map(|n| n * 8), any::<u64>(), 0..200),
            gva: u64, cr3: u64, cr0: u64, cr4: u64, efer: u64,
        ) {
            // Tables that lead to themselves.
            let memory = Words { words, ..Words::default() };
            let form = Paging::of(cr0, cr3, cr4, efer);
            let found = form.translate(gva, &|at, buffer| memory.read(at & 0xfff, buffer));
            prop_assert!(*memory.reads.borrow() <= 5);
            let again = form.translate(gva, &|at, buffer| memory.read(at & 0xfff, buffer));
            prop_assert_eq!(found, again);
        }
    }
}
