//! Which time reads give way to a jump, and why others do not.

use std::collections::BTreeMap;

use super::*;
use crate::rewrite::traps;
use crate::testing::{TINY_VIRTUAL, debian_kernels, tiny_elf_with};

/// `shl rdx, 32` and `or rax, rdx`, as after most time reads; the flags are free.
const JOINS: [u8; 7] = [0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0];
const RET: u8 = 0xc3;
/// Where the replacements stand, and the table of alternatives after them.
const REPLACEMENTS: usize = 64;
const TABLE: usize = 96;

/// The span of the first time read in `.text`, with these further sections.
fn first(image: &[u8], sections: &[(&str, usize, usize)]) -> Result<Span, Refusal> {
    let file = tiny_elf_with(image, sections);
    let elf = Elf::parse(&file).unwrap();
    let mut named = Named::by_data(&elf);
    let sites = traps::find_and_show(&elf, &[], &mut |i| named.see(i)).unwrap();
    let alternatives = alternatives::read(&elf).unwrap();
    span(&elf, &sites.sites[0], &sites, &named, &alternatives)
}

/// The same for code alone.
fn of(code: &[u8]) -> Result<Span, Refusal> {
    first(code, &[(".text", 0, code.len())])
}

fn behind_rdtsc(rest: &[u8]) -> Vec<u8> {
    [&[0x0f, 0x31], rest].concat()
}

fn span_of(bytes: u8) -> Result<Span, Refusal> {
    Ok(Span {
        address: TINY_VIRTUAL,
        bytes,
        moved: bytes - 2,
    })
}

#[test]
fn a_span_is_as_long_as_whole_instructions_make_five_bytes() {
    assert_eq!(
        of(&behind_rdtsc(&[&JOINS[..], &[RET]].concat())),
        span_of(6)
    );
    // and eax, 0x3ff; ret
    assert_eq!(of(&behind_rdtsc(&[0x25, 0xff, 3, 0, 0, RET])), span_of(7));
    // xor ecx, eax; mov [rsi + 0x1478], ecx; ret
    let code = [0x31, 0xc1, 0x89, 0x8e, 0x78, 0x14, 0, 0, RET];
    assert_eq!(of(&behind_rdtsc(&code)), span_of(10));
    // mov ecx, [rip + 0x10]; then as always
    let code = [&[0x8b, 0x0d, 0x10, 0, 0, 0][..], &JOINS, &[RET]].concat();
    assert_eq!(of(&behind_rdtsc(&code)), span_of(8));
}

#[test]
fn what_cannot_be_moved_stays_where_it_is() {
    for (rest, what) in [
        (&[0xeb, 0x00, 0x90][..], "jmp"),
        (&[0xe8, 0, 0, 0, 0], "call"),
        (&[RET, 0xcc, 0xcc], "ret"),
        (&[0x74, 0x01, 0x90], "je"),
        (&[0x0f, 0x1f, 0x00], "nop, which may be a jump label's"),
        (&[0x66, 0x90, 0x90], "nop"),
        (&[0xfb, 0x90, 0x90], "sti"),
        (&[0xf0, 0x48, 0x01, 0x02], "lock add"),
        (&[0x8e, 0xd8, 0x90], "mov ds"),
        (&[0x0f, 0x22, 0xd8], "mov cr3"),
        (&[0x0f, 0x0b, 0x90], "ud2"),
        (&[0xcc, 0xcc, 0xcc], "int3"),
        (&[0x50, 0x50, 0x50], "push"),
        (&[0xf3, 0xa4, 0x90], "rep movsb"),
    ] {
        let code = [rest, &JOINS, &[RET]].concat();
        assert_eq!(of(&behind_rdtsc(&code)), Err(Refusal::Immovable), "{what}");
    }
}

#[test]
fn nothing_moves_over_a_sections_end_or_another_site() {
    assert_eq!(of(&behind_rdtsc(&JOINS[..4])), span_of(6));
    assert_eq!(of(&behind_rdtsc(&[0x31])), Err(Refusal::SectionEnd));
    assert_eq!(of(&behind_rdtsc(&[])), Err(Refusal::SectionEnd));
    // A section after it in the same segment is not its own.
    let image = behind_rdtsc(&[&JOINS[..], &[RET]].concat());
    let sections = [(".text", 0, 4), (".init.text", 4, image.len() - 4)];
    assert_eq!(first(&image, &sections), Err(Refusal::SectionEnd));
    // xor ecx, eax; rdtsc
    let code = [0x31, 0xc1, 0x0f, 0x31, 0x31, 0xc1, RET];
    assert_eq!(of(&behind_rdtsc(&code)), Err(Refusal::Immovable));
    assert_eq!(
        of(&[0x0f, 0x01, 0xf9, 0x0f, 0x31]),
        Err(Refusal::OtherInstruction)
    );
}

#[test]
fn nothing_moves_that_something_may_lead_to() {
    let code = behind_rdtsc(&[&JOINS[..], &[RET]].concat());
    let leads = |jump: &[u8]| of(&[&code[..], jump].concat());
    // The code is ten bytes long, its span six.
    assert_eq!(leads(&[0xeb, 0xf4]), span_of(6), "to the RDTSC");
    assert_eq!(leads(&[0xeb, 0xf5]), span_of(6), "into no instruction");
    assert_eq!(leads(&[0xeb, 0xf6]), Err(Refusal::Named), "to what moves");
    assert_eq!(leads(&[0xeb, 0xfa]), span_of(6), "after it");
    assert_eq!(leads(&[0x75, 0xf6]), Err(Refusal::Named), "conditionally");
    let lea = [0x48, 0x8d, 0x05, 0xf1, 0xff, 0xff, 0xff];
    assert_eq!(leads(&lea), Err(Refusal::Named), "as an operand");

    let mut image = code;
    image.resize(16, 0xcc);
    for (word, expected) in [
        (-14, Err(Refusal::Named)),
        (-16, span_of(6)),
        (-10, span_of(6)),
    ] {
        let image = [&image[..], &i32::to_le_bytes(word)].concat();
        let sections = [(".text", 0, 16), ("__ex_table", 16, 4)];
        assert_eq!(first(&image, &sections), expected, "{word}");
    }
}

#[test]
fn flags_must_be_overwritten_before_anything_looks() {
    for (rest, dead, what) in [
        (&[0x75, 0x00, RET][..], false, "jne"),
        (&[0x89, 0xc2, 0x9c, RET], false, "pushf"),
        (&[0x89, 0xc2, 0x11, 0xc2, RET], false, "adc"),
        (&[0xff, 0xc2, 0x72, 0x00, RET], false, "inc keeps CF, jc"),
        (&[0xff, 0xc2, 0x31, 0xc0, RET], true, "inc, xor"),
        (
            &[0xd3, 0xe2, 0x74, 0x00, RET],
            false,
            "shl by CL may do nothing",
        ),
        (&[0xe8, 0, 0, 0, 0], true, "call"),
        (&[0x89, 0xc2, 0xeb, 0xfc], false, "round and round"),
        (&[0xeb, 0x01, 0xcc, 0x31, 0xc0, RET], true, "after a jump"),
        (&[0xff, 0xe0], false, "a jump to nobody knows where"),
        (&[0x0f, 0x0b], false, "ud2"),
    ] {
        // mov esi, eax; mov edi, edx
        let code = behind_rdtsc(&[&[0x89, 0xc6, 0x89, 0xd7], rest].concat());
        let expected = if dead {
            span_of(6)
        } else {
            Err(Refusal::Flags)
        };
        assert_eq!(of(&code), expected, "{what}");
    }
}

/// An image with a RDTSC and padding, and alternatives for it: each says where it patches how many bytes, and
/// with what.
fn patched(code: &[u8], patches: &[(usize, u8, &[u8])]) -> Result<Span, Refusal> {
    let mut image = code.to_vec();
    image.resize(REPLACEMENTS, 0x90);
    let mut table = Vec::new();
    for (at, bytes, replacement) in patches {
        let entry = TABLE + table.len();
        table.extend((*at as i32 - entry as i32).to_le_bytes());
        table.extend((image.len() as i32 - (entry as i32 + 4)).to_le_bytes());
        table.extend([0x6b, 0, 0, 0, *bytes, replacement.len() as u8]);
        image.extend(*replacement);
    }
    let replacements = image.len() - REPLACEMENTS;
    image.resize(TABLE, 0x90);
    image.extend(&table);
    let sections = [
        (".text", 0, REPLACEMENTS),
        // Executable, so that `alternatives` takes it for code.
        (".init.replacement", REPLACEMENTS, replacements),
        (".altinstructions", TABLE, table.len()),
    ];
    first(&image, &sections)
}

/// `rdtsc_ordered()`: `rdtsc` and padding, `lfence; rdtsc`, `rdtscp`.
const SLOT: [u8; 6] = [0x0f, 0x31, 0x90, 0x90, 0x90, RET];
const FENCED: &[u8] = &[0x0f, 0xae, 0xe8, 0x0f, 0x31];
const RDTSCP: &[u8] = &[0x0f, 0x01, 0xf9];

#[test]
fn a_place_that_is_patched_to_other_time_reads_is_a_span_as_it_is() {
    let expected = Ok(Span {
        address: TINY_VIRTUAL,
        bytes: 5,
        moved: 0,
    });
    assert_eq!(patched(&SLOT, &[(0, 5, FENCED), (0, 5, RDTSCP)]), expected);
    assert_eq!(patched(&SLOT, &[(0, 5, RDTSCP)]), expected);
}

#[test]
fn what_is_patched_otherwise_is_left_to_the_kernel() {
    let code = behind_rdtsc(&[&JOINS[..], &[RET]].concat());
    for (code, patches, what) in [
        (
            &SLOT[..],
            &[(0, 5, &[0x31, 0xc0][..])][..],
            "not by a time read",
        ),
        (&SLOT, &[(0, 5, &[0x0f, 0x31, 0x0f, 0x31])], "by two"),
        (&SLOT, &[(0, 5, FENCED), (0, 4, RDTSCP)], "by two lengths"),
        (&SLOT, &[(0, 4, RDTSCP)], "too short for a jump"),
        (&code, &[(0, 6, RDTSCP)], "with something to do after it"),
        (&code, &[(4, 5, RDTSCP)], "in what would move"),
        (
            &[&[0x90][..], &SLOT].concat(),
            &[(0, 6, RDTSCP)],
            "from before it",
        ),
    ] {
        assert_eq!(patched(code, patches), Err(Refusal::Patched), "{what}");
    }
    // After the span is nobody's business.
    assert_eq!(patched(&code, &[(6, 4, RDTSCP)]), span_of(6));
}

#[test]
fn replacements_and_what_is_no_rdtsc_stay_exits() {
    let image = behind_rdtsc(&[&JOINS[..], &[RET]].concat());
    let sections = [(".text.x", 0, image.len())];
    assert_eq!(first(&image, &sections), span_of(6));
    assert_eq!(
        of(&[&[0x0f, 0x01, 0xf9][..], &JOINS, &image].concat()),
        Err(Refusal::OtherInstruction)
    );
}

#[test]
fn most_time_reads_of_debians_kernels_are_spans() {
    for (path, image) in debian_kernels() {
        let kernel = crate::unpack(&image).unwrap();
        let elf = Elf::parse(&kernel.elf).unwrap();
        let mut named = Named::by_data(&elf);
        let sites = traps::find_and_show(&elf, &[], &mut |i| named.see(i)).unwrap();
        let alternatives = alternatives::read(&elf).unwrap();
        let mut refused = BTreeMap::<Refusal, Vec<u64>>::new();
        let mut spans = 0;
        for site in &sites.sites {
            match span(&elf, site, &sites, &named, &alternatives) {
                Ok(_) => spans += 1,
                Err(Refusal::OtherInstruction) => {}
                Err(why) => refused.entry(why).or_default().push(site.address),
            }
        }
        println!("{path}: {spans} of {}, {refused:x?}", sites.counts().rdtsc);
        assert!(spans > 60, "{path}: {spans} spans, refused {refused:x?}");
    }
}
