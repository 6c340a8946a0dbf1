//! What is taken for a change of the kernel's text, and what is not.

use super::super::{find_sites, modules};
use super::*;
use crate::testing::{TINY_PHYSICAL, TINY_VIRTUAL, debian_kernels, tiny_elf_with};
use crate::unpack;

const TEXT: usize = 128;
/// Offsets of a function that loads modules, of its call, and of where that leads.
const LOADER: u64 = 0x40;
const CALL: u64 = 0x4b;
const LOAD: u64 = 0x70;

/// A kernel with four traps and a module's call, each with its bytes as they stand in memory.
fn kernel() -> Vec<u8> {
    let mut text = vec![0x90; TEXT];
    text[..2].copy_from_slice(&[0x0f, 0x31]); // rdtsc
    text[0x10..0x12].copy_from_slice(&[0x0f, 0xa2]); // cpuid
    text[0x18..0x1a].copy_from_slice(&[0xf3, 0x90]); // pause
    text[0x20..0x23].copy_from_slice(&[0x0f, 0x20, 0xe0]); // mov %cr4,%rax: early, and left alone
    text[LOADER as usize..][..4].copy_from_slice(&ENDBR64);
    text[LOADER as usize + 4..][..5].copy_from_slice(&[0xe8, 0x11, 0x22, 0x33, 0x44]);
    let distance = (LOAD - CALL - 5) as u32;
    text[CALL as usize] = 0xe8;
    text[CALL as usize + 1..][..4].copy_from_slice(&distance.to_le_bytes());
    tiny_elf_with(&text, &[(".text", 0, TEXT)])
}

/// The kernel's memory after loading, and what must stay of it.
fn loaded() -> (Vec<u8>, Rewritten) {
    let file = kernel();
    let elf = Elf::parse(&file).unwrap();
    let sites = traps::find(&elf, &[TINY_VIRTUAL + LOAD]).unwrap();
    assert_eq!(sites.counts().module_loads, 1);
    let mut memory = elf.at(TINY_VIRTUAL, TEXT).unwrap().to_vec();
    for site in &sites.sites {
        let (trap, length) = traps::rewrite(site.kind, site.length.into());
        let at = (site.physical - TINY_PHYSICAL) as usize;
        memory[at..at + length].copy_from_slice(&trap[..length]);
    }
    let rewritten = Rewritten::new(&elf, &sites, &[TINY_VIRTUAL + LOADER], &[], None);
    (memory, rewritten)
}

fn changes(memory: &[u8], rewritten: &Rewritten) -> Changes {
    rewritten.changes(&|gpa, buffer| {
        let found = gpa
            .checked_sub(TINY_PHYSICAL)
            .and_then(|at| memory.get(at as usize..)?.get(..buffer.len()));
        found.map(|found| buffer.copy_from_slice(found)).is_some()
    })
}

#[test]
fn a_kernel_that_patches_its_own_places_has_changed_nothing() {
    let (mut memory, rewritten) = loaded();
    assert_eq!(changes(&memory, &rewritten), Changes::default());
    // What ftrace makes of the calls at the beginning of functions when the kernel boots.
    memory[LOADER as usize + 4..][..5].copy_from_slice(&[0x0f, 0x1f, 0x44, 0x00, 0x00]);
    memory[0x28] = 0xe9; // a jump label
    assert_eq!(changes(&memory, &rewritten), Changes::default());
}

#[test]
fn a_kprobe_on_a_trap_a_livepatched_loader_and_another_kernel_are_told_apart() {
    let (whole, rewritten) = loaded();
    let spoilt = |places: &[(u64, u8)]| {
        let mut memory = whole.clone();
        for &(at, byte) in places {
            memory[at as usize] = byte;
        }
        changes(&memory, &rewritten)
    };
    let none = Changes::default();
    let traps = Changes {
        traps: true,
        ..none
    };
    let module_call = Changes {
        module_call: true,
        ..none
    };
    let module_loader = Changes {
        module_loader: true,
        ..none
    };
    let replaced = Changes {
        replaced: true,
        ..none
    };
    assert_eq!(spoilt(&[(0x10, 0xcc)]), traps);
    assert_eq!(spoilt(&[(CALL, 0xcc)]), module_call);
    assert_eq!(spoilt(&[(LOADER + 5, 0x77)]), module_loader);
    assert_eq!(spoilt(&[(0, 0), (0x10, 0), (0x18, 0)]), replaced);
    let nothing = rewritten.changes(&|_, _| false);
    assert_eq!(nothing, replaced);
}

#[test]
fn the_clocks_stub_gone_is_another_kernel() {
    let (memory, mut rewritten) = loaded();
    rewritten.clock_stub = Some((TINY_PHYSICAL + 0x60, vec![0x90; 8]));
    assert_eq!(changes(&memory, &rewritten), Changes::default());
    rewritten.clock_stub = Some((TINY_PHYSICAL + 0x60, vec![0xcc; 8]));
    assert!(changes(&memory, &rewritten).replaced);
}

#[test]
fn an_entry_is_the_kernels_where_its_text_was_loaded() {
    let (_, rewritten) = loaded();
    let last = TEXT as u64 - 1;
    assert_eq!(rewritten.physical(TINY_VIRTUAL), Some(TINY_PHYSICAL));
    assert_eq!(
        rewritten.physical(TINY_VIRTUAL + last),
        Some(TINY_PHYSICAL + last)
    );
    assert_eq!(rewritten.physical(TINY_VIRTUAL + last + 1), None);
    assert_eq!(rewritten.physical(TINY_VIRTUAL - 1), None);
}

#[test]
fn of_debians_kernels_many_traps_stay_and_the_module_loader_is_known() {
    for (path, image) in debian_kernels() {
        let kernel = unpack(&image).unwrap();
        let elf = Elf::parse(&kernel.elf).unwrap();
        let modules = modules::find(&elf);
        let found = find_sites(&elf, modules.loads()).unwrap();
        let loaders = loaders(&elf, &found.sites);
        let kept = Rewritten::new(&elf, &found.sites, &loaders, &found.spans, None);
        assert!(kept.traps.len() > 100, "{path}: {}", kept.traps.len());
        assert!(kept.traps.iter().any(|trap| trap.is_module_call), "{path}");
        assert!(!kept.loaders.is_empty(), "{path}");
    }
}
