use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::testing::{BtfBuilder, debian_kernels, tiny_elf};

const POINTER: u32 = 2;
const MODULE: u64 = 0xffff_ffff_c020_4040;
const TEXT: u64 = 0xffff_ffff_c020_0000;
const INIT: u64 = 0xffff_ffff_c020_9000;
const KALLSYMS: u64 = 0xffff_ffff_c020_b000;
const TABLE: u64 = 0xffff_ffff_c020_c000;

fn add_symbols(btf: &mut BtfBuilder, int: u32, pointer: u32) -> u32 {
    let members = [
        ("symtab", pointer, 0),
        ("num_symtab", int, 8),
        ("strtab", pointer, 16),
    ];
    let kallsyms = btf.structure("mod_kallsyms", 24, &members);
    btf.derived(POINTER, "", kallsyms)
}

/// As in 6.1.
fn old_types() -> Vec<u8> {
    let mut btf = BtfBuilder::default();
    let int = btf.int("unsigned int", 4);
    let pointer = btf.derived(POINTER, "", 0);
    let members = [
        ("base", pointer, 0),
        ("size", int, 8),
        ("text_size", int, 12),
    ];
    let layout = btf.structure("module_layout", 24, &members);
    let kallsyms = add_symbols(&mut btf, int, pointer);
    let members = [
        ("state", int, 0),
        ("core_layout", layout, 64),
        ("init_layout", layout, 128),
        ("kallsyms", kallsyms, 192),
    ];
    btf.structure("module", 256, &members);
    btf.build()
}

/// As in 6.4 and later.
fn new_types() -> Vec<u8> {
    let mut btf = BtfBuilder::default();
    let int = btf.int("unsigned int", 4);
    let pointer = btf.derived(POINTER, "", 0);
    let members = [("base", pointer, 0), ("is_rox", int, 8), ("size", int, 12)];
    let memory = btf.structure("module_memory", 64, &members);
    let array = btf.array(memory, int, 7);
    let kinds = [("MOD_TEXT", 0), ("MOD_DATA", 1), ("MOD_INIT_TEXT", 4)];
    btf.enumeration("mod_mem_type", &kinds);
    let kallsyms = add_symbols(&mut btf, int, pointer);
    btf.structure(
        "module",
        512,
        &[("mem", array, 8), ("kallsyms", kallsyms, 460)],
    );
    btf.build()
}

/// Guest memory of bytes here and there, which is mapped nowhere else.
#[derive(Clone, Debug, Default)]
struct Guest(BTreeMap<u64, u8>);

impl Guest {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.0.extend((at..).zip(bytes.iter().copied()));
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> usize {
        let bytes = (0..buffer.len() as u64).map_while(|n| self.0.get(&at.checked_add(n)?));
        let bytes: Vec<u8> = bytes.copied().collect();
        buffer[..bytes.len()].copy_from_slice(&bytes);
        bytes.len()
    }

    /// A module whose texts are these, with functions at these addresses.
    fn with_module(layout: &ModuleLayout, texts: [&[u8]; 2], functions: &[u64]) -> Guest {
        let mut guest = Guest::default();
        guest.put(MODULE, &[0; 600]);
        for ((place, base), text) in layout.texts.into_iter().zip([TEXT, INIT]).zip(texts) {
            guest.put(MODULE + u64::from(place.base), &base.to_le_bytes());
            let bytes = (text.len() as u32).to_le_bytes();
            guest.put(MODULE + u64::from(place.bytes), &bytes);
            guest.put(base, text);
        }
        let symbols = layout.symbols.expect("these types have them");
        guest.put(MODULE + u64::from(symbols.pointer), &KALLSYMS.to_le_bytes());
        guest.put(KALLSYMS + u64::from(symbols.table), &TABLE.to_le_bytes());
        let count = (functions.len() as u32).to_le_bytes();
        guest.put(KALLSYMS + u64::from(symbols.count), &count);
        for (at, function) in (TABLE..).step_by(SYMBOL_BYTES).zip(functions) {
            guest.put(at, &[0, 0, 0, 0, 0x10 | STT_FUNC, 0, 3, 0]);
            guest.put(at + 8, &function.to_le_bytes());
            guest.put(at + 16, &[0; 8]);
        }
        guest
    }

    fn text(&self, layout: &ModuleLayout) -> ModuleText {
        layout.text(MODULE, &|at, buffer| self.read(at, buffer))
    }
}

fn layouts() -> [ModuleLayout; 2] {
    [old_types(), new_types()]
        .map(|types| ModuleLayout::find(&Btf::parse(&types).unwrap()).unwrap())
}

fn site(address: u64, length: usize, kind: SiteKind) -> ModuleSite {
    ModuleSite {
        address,
        length,
        kind,
    }
}

#[test]
fn both_forms_of_struct_module_are_understood() {
    let [old, new] = layouts();
    let place = |base, bytes| TextPlace { base, bytes };
    assert_eq!(old.texts, [place(64, 76), place(128, 140)]);
    assert_eq!(new.texts, [place(8, 20), place(8 + 4 * 64, 20 + 4 * 64)]);
    let pointers = [old, new].map(|layout| layout.symbols.unwrap().pointer);
    assert_eq!(pointers, [192, 460]);
}

#[test]
fn what_is_to_be_trapped_is_found_in_both_texts() {
    let text = [
        0x0f, 0x31, 0xc3, 0x0f, 0x01, 0xf9, 0xf3, 0x90, 0xb8, 0x0f, 0x31, 0x0f, 0xa2,
    ];
    let init = [
        0x0f, 0xa2, 0x0f, 0x20, 0xe6, 0x66, 0x66, 0x66, 0x66, 0x0f, 0x31,
    ];
    for layout in layouts() {
        let found = Guest::with_module(&layout, [&text, &init], &[]).text(&layout);
        assert_eq!(found.ranges, [TEXT..TEXT + 13, INIT..INIT + 11]);
        assert_eq!(
            found.sites,
            [
                site(TEXT, 2, SiteKind::Rdtsc),
                site(TEXT + 3, 3, SiteKind::Rdtscp),
                site(TEXT + 6, 2, SiteKind::Pause),
                site(INIT, 2, SiteKind::Cpuid),
                site(INIT + 2, 3, SiteKind::ReadCr4 { target: 6 }),
                site(INIT + 5, 6, SiteKind::Rdtsc),
            ]
        );
    }
}

#[test]
fn a_function_behind_an_odd_number_of_zeroes_is_decoded_from_its_beginning() {
    // A decoder that comes from the zeroes reads `add %cl,(%rdi)`, and then an `xor`.
    let text = [0xc3, 0, 0, 0, 0x0f, 0x31, 0xc3];
    for layout in layouts() {
        let lost = Guest::with_module(&layout, [&text, &[]], &[]).text(&layout);
        assert_eq!(lost.sites, [], "this is why the symbols are read");
        let found = Guest::with_module(&layout, [&text, &[]], &[TEXT + 4, TEXT]).text(&layout);
        assert_eq!(found.sites, [site(TEXT + 4, 2, SiteKind::Rdtsc)]);
    }
}

#[test]
fn a_module_without_one_of_its_texts_or_its_symbols_is_read_as_far_as_it_goes() {
    for mut layout in layouts() {
        let mut guest = Guest::with_module(&layout, [&[0x0f, 0x31], &[0x0f, 0xa2]], &[]);
        guest.put(MODULE + u64::from(layout.texts[0].base), &[0; 8]);
        layout.symbols = None;
        assert_eq!(guest.text(&layout).sites, [site(INIT, 2, SiteKind::Cpuid)]);
        guest.0.remove(&(INIT + 1));
        assert_eq!(guest.text(&layout).sites, []);
        assert_eq!(Guest::default().text(&layout), ModuleText::default());
    }
}

#[test]
fn lengths_that_lie_cost_nothing_and_find_nothing() {
    for layout in layouts() {
        for claimed in [0, TEXT_BYTES + 1, TEXT_BYTES, u32::MAX] {
            let mut guest = Guest::with_module(&layout, [&[0x90], &[]], &[TEXT]);
            let claimed = claimed.to_le_bytes();
            guest.put(MODULE + u64::from(layout.texts[0].bytes), &claimed);
            guest.put(
                KALLSYMS + u64::from(layout.symbols.unwrap().count),
                &claimed,
            );
            assert_eq!(guest.text(&layout).sites, []);
        }
    }
}

proptest! {
    #[test]
    fn no_memory_makes_the_reader_panic(
        changes in prop::collection::vec((0..600u64, any::<u8>()), 0..40),
        text in prop::collection::vec(any::<u8>(), 0..60),
        functions in prop::collection::vec(TEXT..TEXT + 64, 0..8),
        new in any::<bool>(),
    ) {
        let layout = &layouts()[usize::from(new)];
        let mut guest = Guest::with_module(layout, [&text, &text], &functions);
        let whole = guest.text(layout);
        for site in &whole.sites {
            let inside = |range: &std::ops::Range<u64>| {
                range.contains(&site.address) && site.address + site.length as u64 <= range.end
            };
            prop_assert!(whole.ranges.iter().any(inside), "{site:?}");
        }
        for (at, byte) in changes {
            guest.put(MODULE + at, &[byte]);
        }
        guest.text(layout);
    }
}

#[test]
fn a_module_that_claims_more_than_any_has_is_cut_and_costs_little() {
    let [layout, _] = layouts();
    let guest = Guest::with_module(&layout, [&[], &[]], &[]);
    // The same page of RDTSCs wherever the guest maps it.
    let text = |bytes: u32| {
        layout.text(MODULE, &|at, buffer| {
            let place = layout.texts[0];
            if at == MODULE + u64::from(place.bytes) {
                buffer.copy_from_slice(&bytes.to_le_bytes());
                return buffer.len();
            }
            let known = MODULE..MODULE + 600;
            if (TEXT..TEXT + (1 << 29)).contains(&at) && !known.contains(&at) {
                for (offset, byte) in buffer.iter_mut().enumerate() {
                    *byte = [0x0f, 0x31][(at as usize + offset) % 2];
                }
                return buffer.len();
            }
            guest.read(at, buffer)
        })
    };
    let found = |bytes| {
        let text = text(bytes);
        (text.sites.len(), text.is_cut)
    };
    assert_eq!(found(64), (32, false));
    assert_eq!(found(1 << 20), (SITES_MAX, true));
    assert_eq!(found(256 << 20), (0, true));
}

#[test]
fn a_modules_own_out_to_a_trap_port_is_no_site() {
    let [layout, _] = layouts();
    let code = [0xe6, traps::TRAP_RDTSCP, 0xe6, 0x80, 0x0f, 0x31];
    let found = Guest::with_module(&layout, [&code, &[]], &[]).text(&layout);
    assert_eq!(found.own_outs, [TEXT]);
    assert_eq!(found.sites, [site(TEXT + 4, 2, SiteKind::Rdtsc)]);
}

#[test]
fn a_kernel_that_cannot_be_read_says_so_and_is_not_refused() {
    let file = tiny_elf(&[0x0f, 0x31]);
    let modules = find(&Elf::parse(&file).unwrap());
    assert!(matches!(modules, Modules::Untrapped(_)), "{modules:?}");
    assert!(modules.hole(0).unwrap().contains("CONFIG_KALLSYMS"));
    assert_eq!((modules.loads(), modules.layout()), (&[][..], None));
    assert_eq!(Modules::None.hole(0), None);
    let [layout, _] = layouts();
    let trapped = Modules::Trapped {
        loads: vec![1],
        layout,
    };
    assert_eq!(trapped.hole(1), None);
    assert!(trapped.hole(0).unwrap().contains("no direct call"));
}

#[test]
fn debians_kernels_call_what_makes_a_module_executable_once() {
    for (path, image) in debian_kernels() {
        let kernel = crate::unpack(&image).unwrap();
        let elf = Elf::parse(&kernel.elf).unwrap();
        let modules = find(&elf);
        let sites = traps::find(&elf, modules.loads()).unwrap();
        assert_eq!(sites.counts().module_loads, 1, "{path}");
        assert_eq!(modules.hole(1), None);
        assert!(modules.layout().unwrap().symbols.is_some(), "{path}");
        let call = |site: &&traps::Site| matches!(site.kind, SiteKind::Module { .. });
        let call = sites.sites.iter().find(call).unwrap();
        let symbols = Symbols::find(&kernel.elf).unwrap();
        let (caller, _) = symbols.at(call.address).unwrap();
        assert_eq!(caller, "load_module", "{path}");
        if path.contains("-6.1.0-") {
            let SiteKind::Module { target, returns } = call.kind else {
                unreachable!("it was looked for");
            };
            let target = symbols.at(target);
            assert_eq!(
                (target, returns),
                (Some(("module_enable_x".into(), 0)), true)
            );
        }
    }
}
