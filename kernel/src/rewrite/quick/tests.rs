//! What is rewritten, and that it does what was there.

use iced_x86::{Code as Opcode, Instruction};

use super::super::{caves, find_sites};
use super::*;
use crate::testing::{TINY_PHYSICAL, TINY_VIRTUAL, debian_kernels, tiny_elf_with};

/// What is to stand in guest memory.
struct Ram(Vec<Patch>);

impl Ram {
    /// What was written at `gpa`.
    fn at(&self, gpa: u64) -> &[u8] {
        let written = self.0.iter().find(|patch| patch.gpa == gpa);
        &written
            .unwrap_or_else(|| panic!("nothing at {gpa:#x}"))
            .bytes
    }
}

const STUBS: u64 = 0x200;
const CLOCK: u64 = 0x800;

fn cave(offset: u64) -> Cave {
    Cave {
        address: TINY_VIRTUAL + offset,
        physical: TINY_PHYSICAL + offset,
    }
}

fn caves_of(stub_bytes: u64) -> QuickCaves {
    QuickCaves {
        stubs: cave(STUBS),
        stub_bytes,
        clock: cave(CLOCK),
    }
}

/// The plan for `code`, and what it writes.
fn plan(code: &[u8], caves: &QuickCaves) -> Option<(QuickPlan, Ram)> {
    let file = tiny_elf_with(code, &[(".text", 0, code.len())]);
    let elf = Elf::parse(&file).unwrap();
    let spans = find_sites(&elf, &[]).unwrap().spans;
    let plan = QuickPlan::new(&elf, &spans, &[], caves)?;
    let ram = Ram(plan.patches().to_vec());
    Some((plan, ram))
}

fn decoded(bytes: &[u8], address: u64) -> Vec<Instruction> {
    Decoder::with_ip(64, bytes, address, DecoderOptions::NONE)
        .into_iter()
        .collect()
}

/// `rdtsc; mov ecx, [rip + 0x100]; shl rdx, 32; or rax, rdx; ret`.
const READ: [u8; 16] = [
    0x0f, 0x31, 0x8b, 0x0d, 0, 1, 0, 0, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0, 0xc3,
];

#[test]
fn a_span_jumps_to_its_stub_and_what_moved_speaks_of_the_same_memory() {
    let code = [READ, READ].concat();
    let (plan, ram) = plan(&code, &caves_of(1 << 10)).expect("room");
    assert_eq!(plan.sites(), 2);
    assert_eq!(plan.clock().words, TINY_PHYSICAL + CLOCK);
    assert_eq!(plan.clock().stub, TINY_PHYSICAL + STUBS);
    for (index, start) in [0, READ.len() as u64].into_iter().enumerate() {
        let stub_at = TINY_VIRTUAL + STUBS + (index * STUB_BYTES) as u64;
        let jump = decoded(ram.at(TINY_PHYSICAL + start), TINY_VIRTUAL + start);
        assert_eq!(jump[0].near_branch_target(), stub_at);
        assert_eq!(jump.iter().map(Instruction::len).sum::<usize>(), 8);
        assert!(jump[1..].iter().all(|i| i.code() == Opcode::Nopd));

        let stub = ram.at(TINY_PHYSICAL + STUBS + (index * STUB_BYTES) as u64);
        let code = decoded(stub, stub_at);
        let moved = code[10];
        assert_eq!(moved.ip(), stub_at + MOVED_OFFSET as u64);
        assert_eq!(moved.code(), Opcode::Mov_r32_rm32);
        let named = TINY_VIRTUAL + start + 8 + 0x100;
        assert_eq!(moved.ip_rel_memory_address(), named);
        assert_eq!(code[11].near_branch_target(), TINY_VIRTUAL + start + 8);
    }
}

#[test]
fn what_has_no_room_or_lies_elsewhere_stays_an_exit() {
    let code = [READ, READ].concat();
    let sites = |caves| plan(&code, &caves).map(|(plan, _)| plan.sites());
    assert_eq!(sites(caves_of(2 * STUB_BYTES as u64)), Some(2));
    assert_eq!(sites(caves_of(2 * STUB_BYTES as u64 - 1)), Some(1));
    assert_eq!(sites(caves_of(STUB_BYTES as u64 - 1)), None);
    // Before the kernel's own page tables stand, distances are those of physical memory.
    let mut elsewhere = caves_of(1 << 10);
    elsewhere.clock.physical += 0x1000;
    assert_eq!(sites(elsewhere), None);
}

#[test]
fn another_rewriting_has_another_check() {
    let check = |code: &[u8], caves| plan(code, &caves).expect("room").0.check();
    let one = check(&READ, caves_of(1 << 10));
    assert_eq!(check(&READ, caves_of(1 << 9)), one);
    let mut other = READ;
    other[4] = 8;
    assert_ne!(check(&other, caves_of(1 << 10)), one);
    let mut elsewhere = caves_of(1 << 10);
    elsewhere.clock = cave(CLOCK + 64);
    assert_ne!(check(&READ, elsewhere), one);
}

#[test]
fn alternatives_of_a_span_patch_their_replacement_onto_itself() {
    // `rdtsc` and padding, `rdtscp` to replace it, and the entry that says so.
    let mut image = vec![0x0f, 0x31, 0x90, 0x90, 0x90, 0xc3, 0x90, 0x90];
    image.extend([0x0f, 0x01, 0xf9, 0x90]);
    image.extend((-12_i32).to_le_bytes());
    image.extend((8 - 16_i32).to_le_bytes());
    image.extend([0x6b, 0, 0, 0, 5, 3]);
    let sections = [
        (".text", 0, 8),
        (".init.replacement", 8, 4),
        (".altinstructions", 12, 14),
    ];
    let file = tiny_elf_with(&image, &sections);
    let elf = Elf::parse(&file).unwrap();
    let spans = find_sites(&elf, &[]).unwrap().spans;
    let plan = QuickPlan::new(&elf, &spans, &[], &caves_of(1 << 10)).expect("room");
    let ram = Ram(plan.patches().to_vec());
    assert_eq!(ram.at(TINY_PHYSICAL + 12), (-4_i32).to_le_bytes());
    assert_eq!(ram.at(TINY_PHYSICAL + 12 + 12), [3]);
    let jump = decoded(ram.at(TINY_PHYSICAL), TINY_VIRTUAL);
    assert_eq!(jump[0].near_branch_target(), TINY_VIRTUAL + STUBS);
    assert_eq!(jump.len(), 1);
}

#[test]
fn every_stub_of_debians_kernels_does_what_its_span_did() {
    for (path, image) in debian_kernels() {
        let kernel = crate::unpack(&image).unwrap();
        let elf = Elf::parse(&kernel.elf).unwrap();
        let found = find_sites(&elf, &[]).unwrap();
        let (spans, transmits) = (found.spans, found.transmits);
        let caves = caves::find(&elf).unwrap().quick.expect("room");
        let plan = QuickPlan::new(&elf, &spans, &transmits, &caves).unwrap();
        let sites = plan.sites() as usize;
        assert_eq!(sites, spans.len(), "{path}");
        let ram = Ram(plan.patches().to_vec());
        assert!(!transmits.is_empty(), "{path}: its console waits");
        for call in &transmits {
            let before = elf.at(*call, READY.len()).expect("it is in the kernel");
            assert_eq!(before[0], 0xe8, "{path}: {call:#x} is no call");
            assert_eq!(ram.at(elf.physical(*call).unwrap()), READY);
        }
        for (index, span) in spans.iter().enumerate() {
            let stub_at = caves.stubs.address + (index * STUB_BYTES) as u64;
            let start = elf.physical(span.address).unwrap();
            let jump = decoded(ram.at(start), span.address);
            assert_eq!(jump[0].near_branch_target(), stub_at, "{path}");

            let from = span.address + u64::from(span.bytes - span.moved);
            let was = decoded(elf.at(from, span.moved.into()).unwrap(), from);
            let stub = ram.at(caves.stubs.physical + (index * STUB_BYTES) as u64);
            let code = decoded(stub, stub_at);
            for (was, is) in was.iter().zip(&code[10..]) {
                let mut is = *is;
                assert!(!was.is_ip_rel_memory_operand() || is.is_ip_rel_memory_operand());
                is.set_ip(was.ip());
                // An operand that is relative to RIP says the address itself.
                assert_eq!(*was, is, "{path}");
            }
            let back = code[10 + was.len()];
            let end = span.address + u64::from(span.bytes);
            assert_eq!(back.near_branch_target(), end, "{path}");
        }
        assert!(
            spans.is_sorted_by(|a, b| a.address + u64::from(a.bytes) <= b.address),
            "{path}: spans overlap"
        );
    }
}
