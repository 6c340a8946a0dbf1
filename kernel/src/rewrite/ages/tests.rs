//! What is rewritten, in small functions and in real kernels.

use super::super::{find_sites, traps};
use super::*;
use crate::testing::{TINY_PHYSICAL, TINY_VIRTUAL, debian_kernels, tiny_elf_with};

const TEXT: usize = 256;
/// Where the tracer's function stands.
const FENTRY: u64 = TINY_VIRTUAL + 200;

const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// `mov rax, [rdx]; and eax, 0x20; je +6; lock btr qword [rdx], 5; ret`.
const TEST_AND_CLEAR: [u8; 15] = [
    0x48, 0x8b, 0x02, 0x83, 0xe0, 0x20, 0x74, 0x06, 0xf0, 0x48, 0x0f, 0xba, 0x32, 0x05, 0xc3,
];

/// `call FENTRY`, to be put at this offset.
fn fentry(at: u64) -> [u8; 5] {
    traps::call(TINY_VIRTUAL + at, FENTRY)
}

/// What is made of a kernel of one page of code, with these functions, each of a name and where it stands.
fn ages(code: &[u8], functions: &[(&str, Range<u64>)]) -> Ages {
    ages_with(code, functions, &[])
}

/// The same with data after its code.
fn ages_with(code: &[u8], functions: &[(&str, Range<u64>)], data: &[u8]) -> Ages {
    let mut image = code.to_vec();
    image.resize(TEXT, 0x90);
    image[TEXT - 2..].copy_from_slice(&[0x0f, 0x31]);
    image.extend(data);
    let sections = [(".text", 0, TEXT), (".rodata", TEXT, data.len())];
    let file = tiny_elf_with(&image, &sections);
    let elf = Elf::parse(&file).unwrap();
    let mut named = Named::by_data(&elf);
    let mut search = Search::to(true, &|name| {
        let of_name = functions.iter().find(|(known, _)| *known == name);
        let range = of_name.map(|(_, range)| TINY_VIRTUAL + range.start..TINY_VIRTUAL + range.end);
        range.or_else(|| (name == "__fentry__").then_some(FENTRY..FENTRY + 1))
    });
    let sites = traps::find_and_show(&elf, &[], &mut |instruction| {
        named.see(instruction);
        search.see(instruction);
    });
    search.finish(&elf, &sites.unwrap(), &named)
}

const TESTS: &str = "ptep_test_and_clear_young";

/// Where the answer stands, and what it is, if this function is given one.
fn answered(code: &[u8]) -> Option<(u64, Vec<u8>)> {
    let ages = ages(code, &[(TESTS, 0..code.len() as u64)]);
    assert_eq!(
        ages.missing.contains(&TESTS.to_string()),
        ages.rewrites.is_empty()
    );
    let rewrite = ages.rewrites.into_iter().next()?;
    Some((rewrite.address - TINY_VIRTUAL, rewrite.bytes))
}

#[test]
fn a_function_answers_no_behind_what_tracing_patches() {
    let no = NOT_YOUNG.to_vec();
    assert_eq!(answered(&TEST_AND_CLEAR), Some((0, no.clone())));
    let traced = [&fentry(0)[..], &TEST_AND_CLEAR].concat();
    assert_eq!(answered(&traced), Some((5, no.clone())));
    let marked = [&ENDBR64[..], &fentry(4), &TEST_AND_CLEAR].concat();
    assert_eq!(answered(&marked), Some((9, no.clone())));
    let prepared = [&ENDBR64[..], &[0x0f, 0x1f, 0x44, 0, 0], &TEST_AND_CLEAR].concat();
    assert_eq!(answered(&prepared), Some((9, no)));
    // Another call is part of the function.
    let calls = [&traps::call(TINY_VIRTUAL, FENTRY + 8)[..], &TEST_AND_CLEAR].concat();
    assert_eq!(
        answered(&calls),
        Some((0, [NOT_YOUNG, &[PADDING; 2]].concat()))
    );
}

#[test]
fn what_cannot_be_given_an_answer_is_named() {
    assert_eq!(answered(&[0xc3]), None);
    // `push rbx; mov rax, [rdx]`, and something that jumps to the second.
    let range = 0..TEST_AND_CLEAR.len() as u64 + 1;
    let two = [&[0x53][..], &TEST_AND_CLEAR].concat();
    let jumped_into = [&two[..], &[0xeb, 0xef]].concat();
    assert_eq!(ages(&two, &[(TESTS, range.clone())]).rewrites.len(), 1);
    assert!(
        ages(&jumped_into, &[(TESTS, range.clone())])
            .rewrites
            .is_empty()
    );
    // Data speaks of it.
    let spoken_of = (TINY_VIRTUAL + 1).to_le_bytes();
    let found = ages_with(&two, &[(TESTS, range)], &spoken_of);
    assert!(found.rewrites.is_empty());
    // A trap stands there.
    let reads_time = [&[0x90][..], &[0x0f, 0x31], &TEST_AND_CLEAR].concat();
    assert_eq!(answered(&reads_time), None);
    let hole = found.hole().expect("functions are missing");
    for name in [TESTS, "ptep_clear_flush_young", "folio_referenced"] {
        assert!(hole.contains(name), "{hole}");
    }
    // Without huge pages, and without the multi-generational LRU, there is nothing of theirs to miss.
    assert!(
        !hole.contains("pmdp_") && !hole.contains("walk_pud"),
        "{hole}"
    );
    let generations = ages(&[], &[("lru_gen_add_mm", 100..101)]);
    assert!(generations.missing.contains(&"walk_pud_range".to_string()));
}

#[test]
fn each_function_has_its_own_answer() {
    let code = [0x90; 64];
    let found = ages(
        &code,
        &[
            ("ptep_test_and_clear_young", 0..16),
            ("ptep_clear_flush_young", 16..32),
            ("page_referenced", 32..48),
            ("walk_pud_range", 48..64),
        ],
    );
    assert!(found.missing.is_empty() && found.hole().is_none());
    let bytes: Vec<_> = found.rewrites.iter().map(|r| &r.bytes[..]).collect();
    assert_eq!(bytes, [NOT_YOUNG, NOT_YOUNG, BY_NOBODY, NO_MORE]);
    // Newer kernels have the other name.
    let newer = ages(&code, &[("folio_referenced", 32..48)]);
    assert_eq!(newer.rewrites[0].bytes, BY_NOBODY);
}

#[test]
fn a_kernel_without_symbols_is_left_as_it_is_and_says_so() {
    let file = tiny_elf_with(&[0x0f, 0x31, 0xc3], &[(".text", 0, 3)]);
    let elf = Elf::parse(&file).unwrap();
    let found = find_sites(&elf, &[]).unwrap().ages;
    assert!(found.rewrites.is_empty());
    assert!(found.hole().expect("nothing is known").contains(NO_SYMBOLS));
}

#[test]
fn what_makes_an_entry_old_leaves_the_bit_and_takes_the_others() {
    let young = |code: &[u8]| {
        let found = ages(code, &[("copy_page_range", 0..32)]);
        let rewrites = found.rewrites.into_iter();
        let list: Vec<_> = rewrites
            .map(|r| (r.address - TINY_VIRTUAL, r.bytes))
            .collect();
        list
    };
    let none: Vec<(u64, Vec<u8>)> = Vec::new();
    // and rax, ~0x20; and rdi, ~0x22; and rbx, ~0x420; and rax, ~0x420 in its short form
    assert_eq!(young(&[0x48, 0x83, 0xe0, 0xdf]), [(3, vec![0xff])]);
    assert_eq!(young(&[0x48, 0x83, 0xe7, 0xdd]), [(3, vec![0xfd])]);
    let saved = vec![0xff, 0xfb, 0xff, 0xff];
    assert_eq!(
        young(&[0x48, 0x81, 0xe3, 0xdf, 0xfb, 0xff, 0xff]),
        [(3, saved.clone())]
    );
    assert_eq!(young(&[0x48, 0x25, 0xdf, 0xfb, 0xff, 0xff]), [(2, saved)]);
    // Of 32 bits; with the user's or the dirty bit, as a look for bad tables has it; in memory; only the dirty bit; a test.
    assert_eq!(young(&[0x83, 0xe0, 0xdf]), none);
    assert_eq!(young(&[0x48, 0x83, 0xe0, 0xdb]), none);
    assert_eq!(young(&[0x48, 0x83, 0xe0, 0x9f]), none);
    assert_eq!(young(&[0x48, 0x83, 0x20, 0xdf]), none);
    assert_eq!(young(&[0x48, 0x83, 0xe0, 0xbf]), none);
    assert_eq!(young(&[0x48, 0xa9, 0x20, 0, 0, 0]), none);
    // In another function.
    let elsewhere = [&[0x90; 32][..], &[0x48, 0x83, 0xe0, 0xdf]].concat();
    assert_eq!(young(&elsewhere), none);
}

#[test]
fn debians_kernels_never_clear_an_accessed_bit() {
    for (path, image) in debian_kernels() {
        let kernel = crate::unpack(&image).unwrap();
        let elf = Elf::parse(&kernel.elf).unwrap();
        let ages = find_sites(&elf, &[]).unwrap().ages;
        assert_eq!(ages.hole(), None, "{path}");
        let symbols = Symbols::find(elf.file()).unwrap();
        let answer = |name: &str| {
            let extent = symbols.extents(&[name])[0].clone()?;
            let inside = |rewrite: &&Rewrite| extent.contains(&rewrite.address);
            let rewrite = ages.rewrites.iter().find(inside)?;
            assert!(rewrite.address - extent.start <= 9, "{path}: {name}");
            Some(rewrite.bytes.clone())
        };
        for name in [
            "ptep_test_and_clear_young",
            "pmdp_test_and_clear_young",
            "pudp_test_and_clear_young",
            "ptep_clear_flush_young",
            "pmdp_clear_flush_young",
        ] {
            let bytes = answer(name).unwrap_or_else(|| panic!("{path}: {name}"));
            assert!(bytes.starts_with(NOT_YOUNG), "{path}: {name}");
            // The only instructions that clear the bit in memory stand after the answers.
            let extent = symbols.extents(&[name])[0].clone().unwrap();
            let code = elf.at(extent.start, (extent.end - extent.start) as usize);
            let clears = |i: Instruction| i.code() == Code::Btr_rm64_imm8 && i.immediate8() == 5;
            let mut decoder = Decoder::with_ip(64, code.unwrap(), extent.start, 0);
            assert!(decoder.iter().any(clears), "{path}: {name} clears nothing");
        }
        let referenced = answer("folio_referenced").or_else(|| answer("page_referenced"));
        assert!(referenced.unwrap().starts_with(BY_NOBODY), "{path}");
        if symbols.lookup("lru_gen_add_mm").is_some() {
            assert!(
                answer("walk_pud_range").unwrap().starts_with(NO_MORE),
                "{path}"
            );
        }
        // After the answers, ANDs that are the same but for the bit.
        let ands = ages
            .rewrites
            .iter()
            .filter(|r| matches!(r.bytes.len(), 1 | 4));
        let mut counted = 0;
        for and in ands {
            let was = elf.at(and.address, and.bytes.len()).unwrap();
            let (first, rest) = (was[0] | 0x20, &was[1..]);
            assert_eq!(and.bytes, [&[first], rest].concat(), "{path}");
            assert_ne!(was[0], first, "{path}");
            counted += 1;
        }
        for name in ["copy_page_range", "copy_huge_pmd", "remove_migration_pte"] {
            assert!(answered_in(&ages, &symbols, name), "{path}: {name}");
        }
        assert!(
            (5..30).contains(&counted),
            "{path}: {counted} make entries old"
        );
    }
}

fn answered_in(ages: &Ages, symbols: &Symbols<'_>, name: &str) -> bool {
    let extent = symbols.extents(&[name])[0].clone();
    extent.is_some_and(|extent| ages.rewrites.iter().any(|r| extent.contains(&r.address)))
}

#[test]
fn rewrites_go_to_where_the_kernel_is_loaded() {
    let file = tiny_elf_with(&[0x90; 64], &[(".text", 0, 64)]);
    let elf = Elf::parse(&file).unwrap();
    let ages = Ages {
        rewrites: vec![Rewrite {
            address: TINY_VIRTUAL + 7,
            bytes: vec![1, 2],
        }],
        missing: Vec::new(),
    };
    let expected = Patch {
        gpa: TINY_PHYSICAL + 7,
        bytes: vec![1, 2],
    };
    assert_eq!(ages.patches(&elf), [expected]);
}
