//! What [`super::Elf`] accepts, refuses and says of a kernel.

use super::*;
use crate::testing::{TINY_OFFSET, TINY_PHYSICAL, TINY_VIRTUAL, tiny_elf, tiny_elf_with};

#[test]
fn a_kernel_gives_its_entry_its_segments_and_its_code() {
    let file = tiny_elf(&[0x90, 0x0f, 0x31]);
    let elf = Elf::parse(&file).unwrap();
    assert_eq!(elf.entry, TINY_PHYSICAL);
    let [segment] = &elf.segments[..] else {
        panic!("{:?}", elf.segments)
    };
    assert_eq!(
        (
            segment.physical_address,
            segment.memory_bytes,
            segment.executable
        ),
        (TINY_PHYSICAL, 0x1003, true)
    );
    let [code] = &elf.code[..] else {
        panic!("{:?}", elf.code)
    };
    assert_eq!((&code.name[..], code.address), (".init.text", TINY_VIRTUAL));
    assert_eq!(elf.bytes(&code.file), [0x90, 0x0f, 0x31]);
    assert_eq!(elf.at(TINY_VIRTUAL + 1, 2), Some(&[0x0f, 0x31][..]));
    assert_eq!(elf.at(TINY_VIRTUAL + 2, 2), None);
    assert_eq!(elf.physical(TINY_VIRTUAL + 2), Some(TINY_PHYSICAL + 2));
    assert_eq!(elf.physical(TINY_VIRTUAL + 0x1003), None);
    assert_eq!(elf.physical(0), None);
}

#[test]
fn a_virtual_entry_is_translated() {
    let mut file = tiny_elf(&[0x90; 8]);
    file[24..32].copy_from_slice(&(TINY_VIRTUAL + 4).to_le_bytes());
    assert_eq!(Elf::parse(&file).unwrap().entry, TINY_PHYSICAL + 4);
    file[24..32].copy_from_slice(&77_u64.to_le_bytes());
    assert!(matches!(
        Elf::parse(&file),
        Err(KernelError::BadElf {
            what: "the entry",
            found: 77,
            ..
        })
    ));
}

#[test]
fn data_sections_are_not_code() {
    let file = tiny_elf_with(&[0x90; 16], &[(".text", 0, 8), (".rodata", 8, 8)]);
    let elf = Elf::parse(&file).unwrap();
    assert_eq!(
        elf.code
            .iter()
            .map(|code| &code.name[..])
            .collect::<Vec<_>>(),
        [".text"]
    );
}

#[test]
fn without_sections_a_read_only_segment_is_code_and_a_writable_one_is_refused() {
    let mut file = tiny_elf_with(&[0x90; 16], &[]);
    assert_eq!(
        Elf::parse(&file).unwrap().code,
        [Code {
            name: String::new(),
            address: TINY_VIRTUAL,
            file: TINY_OFFSET..TINY_OFFSET + 16
        }]
    );
    file[68] = 7;
    assert!(matches!(
        Elf::parse(&file),
        Err(KernelError::CodeUnknown {
            address: TINY_VIRTUAL
        })
    ));
}

#[test]
fn a_section_that_no_segment_loads_is_refused() {
    let mut file = tiny_elf(&[0x90; 16]);
    let headers = u64_in(&file, 40) as usize;
    file[headers + 64 + 16] ^= 1; // the code section's address
    let error = Elf::parse(&file).unwrap_err();
    assert!(
        matches!(
            error,
            KernelError::BadElf {
                what: "a section's address",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn another_machines_kernel_is_refused() {
    let mut file = tiny_elf(&[0x90]);
    file[18] = 183;
    assert!(matches!(
        Elf::parse(&file),
        Err(KernelError::NotX86_64 {
            what: "the ELF machine",
            found: 183,
            expected: 62
        })
    ));
}

#[test]
fn no_cut_and_no_spoilt_byte_is_a_panic() {
    let file = tiny_elf_with(&[0x90; 16], &[(".text", 0, 8), (".init.text", 8, 8)]);
    for length in 0..file.len() {
        assert!(
            Elf::parse(&file[..length]).is_err(),
            "accepted at {length} of {}",
            file.len()
        );
    }
    for offset in 0..file.len() {
        for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let mut spoilt = file.clone();
            spoilt[offset] = value;
            if let Ok(elf) = Elf::parse(&spoilt) {
                elf.code
                    .iter()
                    .for_each(|code| assert!(elf.at(code.address, code.file.len()).is_some()));
            }
        }
    }
}

#[test]
fn code_is_what_sections_say_whatever_their_segment_is_for() {
    let mut file = tiny_elf_with(
        &[0x90; 24],
        &[(".text", 0, 8), (".init.text", 8, 8), (".data", 16, 8)],
    );
    file[68] = 6; // the segment is for data
    file[24..32].copy_from_slice(&(TINY_PHYSICAL + 12).to_le_bytes());
    let headers = u64_in(&file, 40) as usize;
    file[headers + 3 * 64 + 8] = 7; // .data is writable, and executable too
    let elf = Elf::parse(&file).unwrap();
    assert_eq!(elf.entry, TINY_PHYSICAL + 12);
    let names =
        |list: &[Code]| -> Vec<String> { list.iter().map(|code| code.name.clone()).collect() };
    assert_eq!(names(&elf.code), [".text", ".init.text"]);
    assert_eq!(names(&elf.data), [".data"]);
    file[24..32].copy_from_slice(&(TINY_PHYSICAL + 16).to_le_bytes());
    let error = Elf::parse(&file).unwrap_err();
    assert!(
        matches!(
            error,
            KernelError::BadElf {
                what: "the entry",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn overlapping_sections_and_segments_are_refused() {
    let sections = [(".text", 0, 8), (".init.text", 4, 8)];
    let error = Elf::parse(&tiny_elf_with(&[0x90; 16], &sections)).unwrap_err();
    let overlaps = |error: &KernelError| {
        matches!(
            error,
            KernelError::BadElf {
                expected: "one outside of every other one",
                ..
            }
        )
    };
    assert!(overlaps(&error), "{error}");

    // Two segments of the same bytes, at other addresses.
    let file = tiny_elf_with(&[0x90; 200], &[(".text", 100, 100)]);
    let mut twice = file.clone();
    let second = file[64..TINY_OFFSET].to_vec();
    twice[TINY_OFFSET..TINY_OFFSET + second.len()].copy_from_slice(&second);
    twice[TINY_OFFSET + 16..][..8].copy_from_slice(&(TINY_VIRTUAL + 0x10_0000).to_le_bytes());
    twice[TINY_OFFSET + 24..][..8].copy_from_slice(&(TINY_PHYSICAL + 0x10_0000).to_le_bytes());
    twice[56] = 2;
    let error = Elf::parse(&twice).unwrap_err();
    assert!(overlaps(&error), "{error}");
}

#[test]
fn counts_and_lengths_that_no_kernel_has_are_refused_before_they_cost_anything() {
    let file = tiny_elf(&[0x90; 16]);
    let mut segments = file.clone();
    segments[56..58].fill(0xff);
    let mut module = file.clone();
    module[16] = 1;
    let mut memory = file.clone();
    memory[64 + 40..64 + 48].fill(0xff);
    for file in [segments, module, memory] {
        let error = Elf::parse(&file).unwrap_err();
        assert!(matches!(error, KernelError::BadElf { .. }), "{error}");
    }
    let mut section = file;
    let headers = u64_in(&section, 40) as usize;
    section[headers + 64 + 32..][..8].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    let error = Elf::parse(&section).unwrap_err();
    assert!(matches!(error, KernelError::Truncated { .. }), "{error}");
}

fn u64_in(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}
