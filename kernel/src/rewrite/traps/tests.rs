//! Which instructions become traps, and which only look as if they should.

use super::*;
use crate::testing::{TINY_PHYSICAL, TINY_VIRTUAL, debian_kernels, tiny_elf, tiny_elf_with};

fn kinds(code: &[u8]) -> Vec<(u64, u8, SiteKind)> {
    let file = tiny_elf(code);
    let sites = find(&Elf::parse(&file).unwrap(), &[]).unwrap();
    sites
        .sites
        .iter()
        .map(|site| (site.address - TINY_VIRTUAL, site.length, site.kind))
        .collect()
}

#[test]
fn every_kind_of_site_is_found_with_its_length_and_register() {
    let code = [
        &[0x0f, 0x31][..],
        &[0x0f, 0x01, 0xf9],
        &[0x0f, 0xa2],
        &[0x0f, 0x22, 0xe7],
        &[0x41, 0x0f, 0x22, 0xe0],
        &[0x0f, 0x20, 0xe1],
        &[0x41, 0x0f, 0x20, 0xe7],
    ];
    assert_eq!(
        kinds(&code.concat()),
        [
            (0, 2, SiteKind::Rdtsc),
            (2, 3, SiteKind::Rdtscp),
            (5, 2, SiteKind::Cpuid),
            (7, 3, SiteKind::WriteCr4 { source: 7 }),
            (10, 4, SiteKind::WriteCr4 { source: 8 }),
            (14, 3, SiteKind::ReadCr4 { target: 1 }),
            (17, 4, SiteKind::ReadCr4 { target: 15 }),
        ]
    );
}

#[test]
fn bytes_that_only_look_like_a_site_are_left_alone() {
    let code = [
        &[0xb8, 0x0f, 0x31, 0x0f, 0xa2][..], // mov $0xa20f310f,%eax
        &[0x48, 0x8b, 0x05, 0x0f, 0x01, 0xf9, 0x00], // mov 0xf9010f(%rip),%rax
        &[0x81, 0x3d, 0x0f, 0x31, 0, 0, 0x0f, 0x22, 0xe0, 0], // cmpl $0xe0220f,0x310f(%rip)
        &[0x0f, 0x22, 0xc0],                 // mov %rax,%cr0
        &[0x0f, 0x20, 0xd8],                 // mov %cr3,%rax
        &[0x0f, 0x31],                       // the only rdtsc
    ];
    assert_eq!(kinds(&code.concat()), [(28, 2, SiteKind::Rdtsc)]);
}

#[test]
fn after_a_bad_byte_decoding_goes_on_with_the_next() {
    assert_eq!(kinds(&[0x06, 0x0f, 0x31]), [(1, 2, SiteKind::Rdtsc)]);
    // A section that ends inside an instruction has no site there.
    assert_eq!(kinds(&[0x0f, 0x31, 0x0f]), [(0, 2, SiteKind::Rdtsc)]);
}

#[test]
fn data_is_not_searched() {
    let file = tiny_elf_with(
        &[0x0f, 0x31, 0x0f, 0x31],
        &[(".text", 0, 2), (".rodata", 2, 2)],
    );
    assert_eq!(
        find(&Elf::parse(&file).unwrap(), &[]).unwrap().counts(),
        TrapCounts {
            rdtsc: 1,
            ..TrapCounts::default()
        }
    );
}

#[test]
fn cr4_in_the_first_page_of_text_is_left_alone_and_time_there_is_not() {
    let page = usize::try_from(EARLY_BYTES).unwrap();
    let mut code = vec![NOP; page + 3];
    code[..5].copy_from_slice(&[0x0f, 0x22, 0xe0, 0x0f, 0x31]);
    code[page - 3..].copy_from_slice(&[0x0f, 0x20, 0xe0, 0x0f, 0x22, 0xe0]);
    let file = tiny_elf_with(&code, &[(".text", 0, code.len())]);
    let sites = find(&Elf::parse(&file).unwrap(), &[]).unwrap();
    assert_eq!(
        sites.counts(),
        TrapCounts {
            rdtsc: 1,
            cr4_writes: 1,
            ..TrapCounts::default()
        }
    );
    let early = TINY_VIRTUAL + EARLY_BYTES;
    assert!(sites.sites.iter().any(|site| site.address == early));

    let file = tiny_elf_with(&[0x0f, 0x22, 0xe0, 0x0f, 0x31], &[(".head.text", 0, 5)]);
    let sites = find(&Elf::parse(&file).unwrap(), &[]).unwrap();
    assert_eq!(
        sites.counts(),
        TrapCounts {
            rdtsc: 1,
            ..TrapCounts::default()
        }
    );
}

#[test]
fn a_kernel_without_time_reads_is_refused() {
    let file = tiny_elf(&[0x0f, 0x01, 0xf9, 0x0f, 0xa2]);
    assert_eq!(
        find(&Elf::parse(&file).unwrap(), &[]),
        Err(KernelError::NoTimeReads { code_bytes: 5 })
    );
}

#[test]
fn a_site_behind_piled_up_prefixes_is_refused() {
    let file = tiny_elf(&[0x66, 0x66, 0x66, 0x0f, 0x31]);
    let error = find(&Elf::parse(&file).unwrap(), &[]).unwrap_err();
    assert_eq!(
        error,
        KernelError::OddSite {
            address: TINY_VIRTUAL,
            length: 5
        }
    );
}

#[test]
fn a_trap_is_as_long_as_what_it_replaces_and_decodes_to_an_out_and_nops() {
    for (kind, length, bytes) in [
        (SiteKind::Rdtsc, 2, &[0xe6, 0xf1][..]),
        (SiteKind::Rdtscp, 3, &[0xe6, 0xf2, 0x90]),
        (SiteKind::Cpuid, 2, &[0xe6, 0xf3]),
        (
            SiteKind::WriteCr4 { source: 8 },
            4,
            &[0xe6, 0xf4, 0x90, 0x90],
        ),
        (SiteKind::ReadCr4 { target: 0 }, 3, &[0xe6, 0xf5, 0x90]),
    ] {
        let (trap, trap_length) = rewrite(kind, length);
        assert_eq!(&trap[..trap_length], bytes);
        let decoded: Vec<_> = Decoder::new(64, bytes, DecoderOptions::NONE)
            .iter()
            .map(|i| i.code())
            .collect();
        assert_eq!(decoded[0], Opcode::Out_imm8_AL);
        assert!(
            decoded[1..].iter().all(|&code| code == Opcode::Nopd),
            "{decoded:?}"
        );
    }
}

#[test]
fn calls_of_the_first_function_that_is_called_are_sites_and_written_back_as_they_were() {
    let at = |offset: u64| TINY_VIRTUAL + offset;
    // 0: rdtsc; 2: call 17; 7: jmp 17; 12: call 18; 17: ret; 18: ret
    let code = [
        &[0x0f, 0x31][..],
        &[0xe8, 10, 0, 0, 0],
        &[0xe9, 5, 0, 0, 0],
        &[0xe8, 1, 0, 0, 0],
        &[0xc3, 0xc3],
    ];
    let file = tiny_elf(&code.concat());
    let elf = Elf::parse(&file).unwrap();
    let calls = |loads: &[u64]| -> Vec<Site> {
        let sites = find(&elf, loads).unwrap().sites;
        let call = |site: &Site| site.kind.port() == TRAP_MODULE;
        sites.into_iter().filter(call).collect()
    };
    let found = calls(&[at(1), at(17), at(18)]);
    let expected = [(at(2), true), (at(7), false)];
    assert_eq!(found.len(), 2);
    for (site, (address, returns)) in found.iter().zip(expected) {
        let target = at(17);
        assert_eq!(site.address, address);
        assert_eq!(site.kind, SiteKind::Module { target, returns });
        assert_eq!(check(&elf, site), Ok(()));
        assert_eq!(rewrite(site.kind, 5).0[..5], [0xe6, 0xf9, 0x90, 0x90, 0x90]);
        let other = SiteKind::Module {
            target: target + 1,
            returns,
        };
        assert!(
            check(
                &elf,
                &Site {
                    kind: other,
                    ..*site
                }
            )
            .is_err()
        );
    }
    assert_eq!(call(at(2), at(17)), code[1]);
    assert_eq!(call(at(12), at(2)), [0xe8, 0xf1, 0xff, 0xff, 0xff]);
    assert_eq!(calls(&[at(18)]).len(), 1);
    assert_eq!(calls(&[]), []);
}

#[test]
fn sites_of_another_kernel_are_refused() {
    let file = tiny_elf(&[0x0f, 0x31, 0x90]);
    let elf = Elf::parse(&file).unwrap();
    let site = Site {
        address: TINY_VIRTUAL,
        physical: TINY_PHYSICAL,
        length: 2,
        kind: SiteKind::Rdtsc,
    };
    assert_eq!(check(&elf, &site), Ok(()));
    for foreign in [
        Site {
            address: TINY_VIRTUAL + 1,
            ..site
        },
        Site {
            physical: TINY_PHYSICAL + 1,
            ..site
        },
        Site {
            kind: SiteKind::Cpuid,
            ..site
        },
        Site { length: 0, ..site },
        Site { length: 3, ..site },
        Site {
            address: u64::MAX,
            ..site
        },
    ] {
        assert!(
            matches!(check(&elf, &foreign), Err(KernelError::ForeignSite { .. })),
            "{foreign:?}"
        );
    }
}

#[test]
fn debians_kernels_have_the_sites_that_objdump_shows() {
    for (path, image) in debian_kernels() {
        let kernel = crate::unpack(&image).unwrap();
        let elf = Elf::parse(&kernel.elf).unwrap();
        let started = std::time::Instant::now();
        let modules = crate::rewrite::modules::find(&elf);
        let sites = find(&elf, modules.loads()).unwrap();
        let counts = sites.counts();
        eprintln!("{path}: {counts:?}, {:?}", started.elapsed());
        let caves = crate::rewrite::caves::find(&elf);
        eprintln!("{path}: {caves:x?}");
        assert!(caves.is_some(), "{path} has no room to count entries");
        if let Ok(folder) = std::env::var("HINDSIGHT_KEEP_SITES") {
            let name = kernel.version.split(' ').next().unwrap();
            let lines: String = sites
                .sites
                .iter()
                .map(|site| format!("{:x} {}\n", site.address, site.kind.name()))
                .collect();
            std::fs::write(format!("{folder}/elf-{name}"), &kernel.elf).unwrap();
            std::fs::write(format!("{folder}/sites-{name}"), lines).unwrap();
        }
        if path.contains("-6.1.0-") {
            let expected = if path.contains("cloud") {
                (107, 17, 24)
            } else {
                (110, 17, 41)
            };
            assert_eq!(
                (counts.rdtsc, counts.rdtscp, counts.cpuid),
                expected,
                "{path}"
            );
        }
    }
}
