//! Mappings, in a list and in a tree.

use super::toy::{Age, SPECIAL, Toy};
use super::{FILE, MM, init, program};
use crate::view::{Listing, Mapping, ViewError};

/// Mappings and nodes.
const AREAS: u64 = 0xffff_8880_0300_0000;
const NODES: u64 = 0xffff_8880_0400_0000;

/// Mappings of the program's file, of memory, of the heap and the stack, and one of the kernel's.
fn areas(toy: &mut Toy) -> [u64; 5] {
    let mut number = 0;
    let mut area = |start: u64, pages: u64, flags: u64, file: u64| {
        let at = AREAS + 0x1000 * number;
        number += 1;
        for (member, value) in [
            ("vm_area_struct.vm_start", start),
            ("vm_area_struct.vm_end", start + 4096 * pages),
            ("vm_area_struct.vm_flags", flags),
            ("vm_area_struct.vm_pgoff", 2),
            ("vm_area_struct.vm_file", file),
            ("vm_area_struct.vm_ops", 0),
            ("vm_area_struct.vm_private_data", 0),
            ("vm_area_struct.vm_next", 0),
        ] {
            toy.set(at, member, value);
        }
        at
    };
    let found = [
        area(0x40_0000, 1, 5, FILE),
        area(0x50_0000, 1, 0x83, 0),
        area(0x60_0000, 2, 3, 0),
        area(0x7fff_0000, 1, 3, 0),
        area(0x7fff_f000, 1, 5, 0),
    ];
    toy.set(found[4], "vm_area_struct.vm_ops", SPECIAL);
    toy.set(
        found[4],
        "vm_area_struct.vm_private_data",
        AREAS + 0x10_0000,
    );
    toy.set(
        AREAS + 0x10_0000,
        "vm_special_mapping.name",
        AREAS + 0x10_1000,
    );
    toy.write(AREAS + 0x10_1000, b"[vdso]\0");
    found
}

/// Those as `/proc/PID/maps` has them.
const MAPS: [&str; 5] = [
    "400000-401000 r-xp 2000 /mnt/bin/sh",
    "500000-501000 rw-s 0 ",
    "600000-602000 rw-p 0 [heap]",
    "7fff0000-7fff1000 rw-p 0 [stack]",
    "7ffff000-80000000 r-xp 0 [vdso]",
];

fn lines(found: &Listing<Mapping>) -> Vec<String> {
    let line = |m: &Mapping| {
        let (from, to, what) = (m.start, m.end, m.permissions());
        format!("{from:x}-{to:x} {what} {:x} {}", m.offset, m.name)
    };
    found.items.iter().map(line).collect()
}

#[test]
fn mappings_are_read_from_a_list() {
    let mut toy = program(Age::Old);
    let areas = areas(&mut toy);
    toy.set(MM, "mm_struct.mmap", areas[0]);
    for (at, next) in areas.iter().zip(&areas[1..]) {
        toy.set(*at, "vm_area_struct.vm_next", *next);
    }
    let task = init(&mut toy);
    let view = toy.view.clone();
    let found = view.maps(&mut toy, &task).unwrap();
    assert_eq!(
        (lines(&found), &found.broken),
        (MAPS.map(String::from).to_vec(), &None)
    );

    toy.set(areas[4], "vm_area_struct.vm_next", areas[2]);
    let found = view.maps(&mut toy, &task).unwrap();
    assert_eq!(lines(&found), MAPS);
    let (what, address) = ("mappings", areas[2]);
    assert_eq!(found.broken, Some(ViewError::Circle { what, address }));
}

/// A node: where it is, its kind, and slots with the last address of each.
fn node(toy: &mut Toy, at: u64, kind: u64, slots: &[(u64, u64)]) -> u64 {
    let (pivot, slot) = match kind {
        3 => ("maple_arange_64.pivot", "maple_arange_64.slot"),
        _ => ("maple_range_64.pivot", "maple_range_64.slot"),
    };
    let (pivot, slot) = (toy.place(at, pivot), toy.place(at, slot));
    toy.write(at, &[0; 256]);
    let pivots = if kind == 3 { 9 } else { 15 };
    for (number, (to, last)) in (0..).zip(slots) {
        toy.write(slot + 8 * number, &to.to_le_bytes());
        if number < pivots {
            toy.write(pivot + 8 * number, &last.to_le_bytes());
        }
    }
    at | kind << 3 | 4
}

#[test]
fn mappings_are_read_from_a_tree() {
    let mut toy = program(Age::New);
    let [a, b, c, d, e] = areas(&mut toy);
    let last = u64::MAX;
    // What is left over after a node's last slot counts for nothing.
    let first = node(
        &mut toy,
        NODES,
        1,
        &[
            (0, 0x3f_ffff),
            (a, 0x40_0fff),
            (0, 0x4f_ffff),
            (b, 0x50_0fff),
            (e, 0),
        ],
    );
    let second = node(
        &mut toy,
        NODES + 0x100,
        1,
        &[
            (c, 0x60_1fff),
            (0, 0x7ffe_ffff),
            (d, 0x7fff_0fff),
            (0, 0x7fff_efff),
            (e, 0x7fff_ffff),
            (0, last),
        ],
    );
    let root = node(
        &mut toy,
        NODES + 0x200,
        3,
        &[(first, 0x50_0fff), (second, last), (first, 9)],
    );
    toy.set(MM, "mm_struct.mm_mt.ma_root", root | 2);
    let task = init(&mut toy);
    let view = toy.view.clone();
    let found = view.maps(&mut toy, &task).unwrap();
    assert_eq!(
        (lines(&found), &found.broken),
        (MAPS.map(String::from).to_vec(), &None)
    );

    // A node that is its own child, and one of a kind that there is not.
    let round = NODES + 0x300;
    let strange = (NODES + 0x400) | (7 << 3);
    let round = node(
        &mut toy,
        round,
        2,
        &[(round | 2 << 3, 1), (strange, 2), (second, last)],
    );
    toy.set(MM, "mm_struct.mm_mt.ma_root", round | 2);
    let found = view.maps(&mut toy, &task).unwrap();
    assert_eq!(lines(&found), MAPS[2..]);
    assert!(found.broken.unwrap().to_string().contains("in a circle"));

    toy.set(MM, "mm_struct.mm_mt.ma_root", 0);
    assert_eq!(view.maps(&mut toy, &task), Ok(Listing::default()));
}
