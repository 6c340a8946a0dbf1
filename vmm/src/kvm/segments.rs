//! A program's segments, as its return from an interrupt would load them.
//!
//! Most programs have flat ones, but one may make its own in its LDT (modify_ldt(2)): with a base, a limit, and
//! code of 16 or 32 bits (Intel SDM vol. 3, 3.4.5 and 5.8).

use kvm_bindings::{kvm_segment, kvm_sregs};

use super::guest_text::GuestView;

/// Selector: the table is the LDT.
const TABLE_LOCAL: u16 = 1 << 2;
/// Type: code.
const CODE: u8 = 1 << 3;
/// Type of code: conforming.
const CONFORMING: u8 = 1 << 2;
/// Type of data: may be written.
const WRITABLE: u8 = 1 << 1;
/// Type: has been used. The CPU sets it as it loads a segment.
const ACCESSED: u8 = 1;

/// The code segment that a return to ring 3 loads from this selector; `None` where that would fault.
pub(super) fn user_code(
    view: &GuestView<'_>,
    sregs: &kvm_sregs,
    selector: u64,
) -> Option<kvm_segment> {
    let segment = descriptor(view, sregs, selector)?;
    let fits = segment.type_ & CODE != 0
        && (segment.dpl == 3 || segment.type_ & CONFORMING != 0)
        && (segment.l, segment.db) != (1, 1);
    fits.then_some(segment)
}

/// The same, for the stack segment.
pub(super) fn user_stack(
    view: &GuestView<'_>,
    sregs: &kvm_sregs,
    selector: u64,
) -> Option<kvm_segment> {
    let segment = descriptor(view, sregs, selector)?;
    let fits = segment.type_ & CODE == 0 && segment.type_ & WRITABLE != 0 && segment.dpl == 3;
    fits.then_some(segment)
}

/// How many bits the code in a segment has. One with `l` set is of long mode, which the vCPU must be in.
pub(super) fn code_bits(segment: &kvm_segment) -> u32 {
    match (segment.l, segment.db) {
        (1, _) => 64,
        (_, 1) => 32,
        _ => 16,
    }
}

/// The linear address of an offset in a code segment.
pub(super) fn linear(segment: &kvm_segment, offset: u64) -> u64 {
    match segment.l {
        1 => offset,
        _ => segment.base.wrapping_add(offset) & u64::from(u32::MAX),
    }
}

/// A present segment for programs, of the GDT or the LDT.
fn descriptor(view: &GuestView<'_>, sregs: &kvm_sregs, selector: u64) -> Option<kvm_segment> {
    let selector = u16::try_from(selector).ok()?;
    let (base, limit) = if selector & TABLE_LOCAL == 0 {
        (sregs.gdt.base, u32::from(sregs.gdt.limit))
    } else if sregs.ldt.unusable == 0 && sregs.ldt.present == 1 {
        (sregs.ldt.base, sregs.ldt.limit)
    } else {
        return None;
    };
    let offset = selector & !7;
    let is_null = selector & !3 == 0;
    if is_null || selector & 3 != 3 || u32::from(offset) + 7 > limit {
        return None;
    }
    let [raw] = view.words(base.wrapping_add(offset.into()))?;
    let segment = decode(raw, selector);
    (segment.present == 1 && segment.s == 1).then_some(segment)
}

/// Intel SDM vol. 3, figure 3-8.
fn decode(raw: u64, selector: u16) -> kvm_segment {
    let bit = |at: u32| (raw >> at & 1) as u8;
    let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
    let granular = bit(55);
    kvm_segment {
        base: raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000,
        limit: if granular != 0 {
            limit << 12 | 0xfff
        } else {
            limit
        },
        selector,
        type_: (raw >> 40 & 0xf) as u8 | ACCESSED,
        present: bit(47),
        dpl: (raw >> 45 & 3) as u8,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: granular,
        avl: bit(52),
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::GuestRam;
    use crate::kvm::memory::GuestMemory;
    use crate::kvm::page_walk::Paging;

    const GDT: u64 = 0x1000;
    const LDT: u64 = 0x2000;
    /// Present, ring 3, code of 32 bits, readable, pages.
    const CODE32: u64 = 0x00cf_fa00_0000_ffff;
    const DATA32: u64 = 0x00cf_f200_0000_ffff;

    /// Finds the code segment of a selector among these descriptors of the LDT.
    fn code(ldt: &[u64], selector: u64) -> Option<kvm_segment> {
        with_tables(ldt, |view, sregs| user_code(view, sregs, selector))
    }

    fn with_tables<T>(ldt: &[u64], look: impl FnOnce(&GuestView<'_>, &kvm_sregs) -> T) -> T {
        let mut memory = GuestMemory::new(1 << 20).expect("a mebibyte");
        let gdt = [0, 0, 0, 0, CODE32, DATA32, 0x00af_fa00_0000_ffff];
        for (at, table) in [(GDT, &gdt[..]), (LDT, ldt)] {
            let bytes: Vec<u8> = table.iter().flat_map(|raw| raw.to_le_bytes()).collect();
            memory.write(at, &bytes).expect("RAM");
        }
        let mut sregs = kvm_sregs::default();
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, (8 * gdt.len() - 1) as u16);
        (sregs.ldt.base, sregs.ldt.limit) = (LDT, (8 * ldt.len()).saturating_sub(1) as u32);
        (sregs.ldt.present, sregs.ldt.unusable) = (1, u8::from(ldt.is_empty()));
        let view = GuestView {
            paging: Paging::new(&sregs),
            memory: &memory,
        };
        look(&view, &sregs)
    }

    #[test]
    fn segments_of_the_ldt_have_their_own_base_limit_and_width() {
        // Base 0x12345678, limit 0x4321 bytes, 16 bits.
        let based16 = 0x1200_fa34_5678_4321;
        let found = code(&[CODE32, based16], 0xf).expect("it is code");
        assert_eq!((found.base, found.limit), (0x1234_5678, 0x4321));
        assert_eq!((code_bits(&found), found.dpl, found.g), (16, 3, 0));
        assert_eq!(linear(&found, 0xfff0), 0x1235_5668);
        let high = kvm_segment {
            base: 0xffff_fff0,
            ..found
        };
        assert_eq!(linear(&high, 0x20), 0x10, "linear addresses wrap at 4 GiB");
        let first = code(&[CODE32, based16], 7).expect("index 0 of an LDT is one like any other");
        assert_eq!((code_bits(&first), first.limit), (32, u32::MAX));
        let long = code(&[], 0x33).expect("of the GDT");
        assert_eq!((code_bits(&long), linear(&long, 1 << 40)), (64, 1 << 40));
    }

    #[test]
    fn what_a_return_would_fault_on_is_no_segment() {
        for (ldt, selector, what) in [
            (vec![CODE32], 0xf, "past the limit"),
            (vec![], 7, "no LDT"),
            (vec![CODE32 & !(1 << 47)], 7, "not present"),
            (vec![CODE32 & !(1 << 44)], 7, "of the system"),
            (vec![CODE32 & !(3 << 45)], 7, "of another ring"),
            (vec![CODE32 | 1 << 53], 7, "both 64 and 32 bits"),
            (vec![DATA32], 7, "data"),
            (vec![CODE32], 4, "not asked for by ring 3"),
            (vec![CODE32], 3, "null"),
            (vec![CODE32], 0x1_0007, "no selector"),
        ] {
            assert!(code(&ldt, selector).is_none(), "{what}");
        }
        let stack = |raw| with_tables(&[raw], |view, sregs| user_stack(view, sregs, 7));
        assert!(stack(DATA32).is_some() && stack(CODE32).is_none());
        assert!(stack(DATA32 & !(1 << 41)).is_none(), "read-only");
    }
}
