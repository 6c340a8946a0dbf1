//! The walk of a guest's page tables, over memory that the bytes describe.
//!
//! The memory is small and addresses in it wrap, so that tables lead to each other and to themselves.

use std::cell::Cell;

use arbitrary::{Result, Unstructured};
use hindsight_vmm::boot::GuestRam;
use hindsight_vmm::kvm::{GuestMemory, GuestView, Paging};

/// RAM of the guest, in bytes.
const RAM_BYTES: u64 = 64 << 10;
const PAGE: u64 = 4096;
/// Words that are not zero, and addresses that are looked up: more bytes than that make are ignored.
const WORDS_MAX: usize = 400;
const LOOKS_MAX: usize = 32;
/// The most entries that any form of tables has on the way to a page.
const READS_MAX: u32 = 5;
/// CR0.PG; CR4.PSE, PAE and LA57; EFER.LMA.
const BITS: [(usize, u64); 5] = [
    (0, 1 << 31),
    (2, 1 << 4),
    (2, 1 << 5),
    (2, 1 << 12),
    (3, 1 << 10),
];

/// Looks up addresses in tables made of `data`.
///
/// # Panics
///
/// If a walk reads more than it may, or finds what is not there.
pub fn walk(data: &[u8]) {
    // Bytes that end within something end the input.
    let _ = looked_up(&mut Unstructured::new(data));
}

fn looked_up(bytes: &mut Unstructured<'_>) -> Result<()> {
    let mut registers = [0, bytes.arbitrary()?, 0, 0];
    let set: u8 = bytes.arbitrary()?;
    for (bit, (register, mask)) in BITS.into_iter().enumerate() {
        registers[register] |= if set >> bit & 1 == 1 { mask } else { 0 };
    }
    let [cr0, cr3, cr4, efer] = registers;
    let paging = Paging::of(cr0, cr3 & (RAM_BYTES - 1), cr4, efer);
    let mut memory = GuestMemory::new(RAM_BYTES).expect("64 KiB can be mapped");
    let words = bytes.int_in_range(0..=WORDS_MAX)?;
    for _ in 0..words {
        let slot = u64::from(bytes.arbitrary::<u16>()?) & !7;
        let mut entry: u64 = bytes.arbitrary()?;
        if bytes.ratio(3, 4)? {
            // Leads to RAM, and is present.
            entry = entry & (RAM_BYTES - 1) | 1;
        }
        memory
            .write(slot, &entry.to_le_bytes())
            .expect("the slot is in RAM");
    }
    for _ in 0..LOOKS_MAX {
        look_up(&memory, paging, bytes.arbitrary()?, bytes.arbitrary()?);
    }
    Ok(())
}

fn look_up(memory: &GuestMemory, paging: Paging, gva: u64, bytes: u16) {
    let reads = Cell::new(0);
    let read = |gpa: u64, buffer: &mut [u8]| {
        reads.set(reads.get() + 1);
        memory.read(gpa, buffer)
    };
    let found = paging.translate(gva, &read);
    assert!(reads.get() <= READS_MAX, "{} reads", reads.get());
    assert_eq!(paging.translate(gva, &read), found, "another time");
    if let Some(gpa) = found {
        assert_eq!(gpa % PAGE, gva % PAGE, "{gva:#x} at {gpa:#x}");
    }

    let view = GuestView { paging, memory };
    assert_eq!(view.translate(gva), found);
    let bytes = usize::from(bytes);
    let pieces = view.pieces(gva, bytes);
    let mut buffer = vec![0; bytes];
    let got = view.read(gva, &mut buffer);
    assert_eq!(
        pieces.is_some(),
        got == bytes,
        "{gva:#x}, {bytes} bytes, {got} read"
    );
    let Some(pieces) = pieces else { return };
    let mut rest = &buffer[..];
    for (gpa, length) in pieces {
        let mut piece = vec![0; length];
        assert!(length as u64 <= PAGE && memory.read(gpa, &mut piece));
        assert_eq!(piece, rest[..length]);
        rest = &rest[length..];
    }
    assert!(rest.is_empty());
    view.instruction(gva, 64);
}
