//! Symbol tables as the kernel's build writes them, in both orders; and bytes that only look like some.

use proptest::prelude::*;

use super::*;
use crate::testing::{TINY_VIRTUAL, debian_kernels, tiny_elf_with};

const BASE: u64 = 0xffff_ffff_8100_0000;
const ALIGN: usize = 8;

/// How the addresses are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Whole,
    Relative,
    Signed,
}

/// What the kernel's build would write for these symbols, which are sorted by address.
fn image(symbols: &[(u64, String)], form: Form, since_6_5: bool, sequence: bool) -> Vec<u8> {
    let mut tokens: Vec<Vec<u8>> = (0..TOKENS).map(|byte| vec![byte as u8]).collect();
    // A zero cannot be its own token; and some stand for more than one character.
    tokens[0] = b"unused".to_vec();
    tokens[1] = b"module_".to_vec();
    tokens[2] = b"_x".to_vec();
    tokens[255] = b"load".to_vec();
    let pack = |name: &str| {
        let mut packed = vec![b'T'];
        let mut rest = name.as_bytes();
        while let [first, ..] = *rest {
            let long = [1, 2, 255]
                .into_iter()
                .find(|&t: &u8| rest.starts_with(&tokens[usize::from(t)]));
            let token = long.unwrap_or(first);
            packed.push(token);
            rest = &rest[tokens[usize::from(token)].len()..];
        }
        packed
    };

    let align = |part: &mut Vec<u8>| part.resize(part.len().next_multiple_of(ALIGN), 0);
    let mut addresses = Vec::new();
    for &(address, _) in symbols {
        match form {
            Form::Whole => addresses.extend(address.to_le_bytes()),
            Form::Relative => addresses.extend((address.wrapping_sub(BASE) as u32).to_le_bytes()),
            Form::Signed if address < BASE => addresses.extend((address as u32).to_le_bytes()),
            Form::Signed => addresses.extend((-1 - (address - BASE) as i32).to_le_bytes()),
        }
    }
    align(&mut addresses);
    if form != Form::Whole {
        addresses.extend(BASE.to_le_bytes());
    }
    let mut names = (symbols.len() as u64).to_le_bytes().to_vec();
    let (mut packed, mut markers) = (Vec::new(), Vec::new());
    for (number, (_, name)) in symbols.iter().enumerate() {
        if number.is_multiple_of(MARKED) {
            markers.extend((packed.len() as u32).to_le_bytes());
        }
        let name = pack(name);
        match name.len() {
            short @ ..0x80 => packed.push(short as u8),
            long => packed.extend([long as u8 | 0x80, (long >> 7) as u8]),
        }
        packed.extend(name);
    }
    names.extend(packed);
    align(&mut names);
    names.extend(markers);
    align(&mut names);
    let mut sequences = vec![0xa5; if sequence { 3 * symbols.len() } else { 0 }];
    align(&mut sequences);
    let (mut table, mut index) = (Vec::new(), Vec::new());
    for token in &tokens {
        index.extend((table.len() as u16).to_le_bytes());
        table.extend(token);
        table.push(0);
    }
    align(&mut table);
    table.extend(index);

    let mut image = vec![0x11; 4096];
    // Some other table of characters, as character sets have them.
    image.extend((b'!'..=b'~').flat_map(|c| [c, 0]));
    align(&mut image);
    let parts = match since_6_5 {
        false => [addresses, names, sequences, table],
        true => [names, table, addresses, sequences],
    };
    image.extend(parts.concat());
    image.extend([0x22; 100]);
    image
}

/// Per-CPU addresses first, if the form has them; two names for one address; one long name.
fn some(count: usize, form: Form) -> Vec<(u64, String)> {
    let mut symbols: Vec<(u64, String)> = (0..count)
        .map(|n| (BASE + 16 * n as u64, format!("module_function_{n}_x")))
        .collect();
    symbols[1].0 = BASE;
    symbols[2].1 = "x".repeat(300);
    symbols[count - 1].1 = "load_module".into();
    if form == Form::Signed {
        symbols.insert(0, (0x1fb80, "current_task".into()));
    }
    symbols
}

#[test]
fn every_symbol_is_found_by_name_and_by_address_in_each_order_and_form() {
    for form in [Form::Whole, Form::Relative, Form::Signed] {
        for (since_6_5, sequence) in [(false, false), (false, true), (true, true)] {
            for count in [FEWEST, 255, 256, 257, 2000] {
                let expected = some(count, form);
                let image = image(&expected, form, since_6_5, sequence);
                let what = format!("{form:?}, 6.5: {since_6_5}, {sequence}, {count} symbols");
                let symbols = Symbols::find(&image).expect(&what);
                assert_eq!(symbols.count(), expected.len(), "{what}");
                for (number, (address, name)) in expected.iter().enumerate() {
                    assert_eq!(symbols.lookup(name), Some(*address), "{what}: {name}");
                    let first = expected.iter().position(|(at, _)| at == address);
                    let first = first.expect("it is one of them");
                    let (found, after) = symbols.at(address + 3).expect(&what);
                    assert_eq!((&found, after), (&expected[first].1, 3), "{what}: {number}");
                }
                assert_eq!(symbols.lookup("module_"), None);
                assert_eq!(symbols.at(expected[0].0.wrapping_sub(1)), None);
            }
        }
    }
}

#[test]
fn a_table_that_does_not_hold_together_is_none() {
    let whole = image(&some(600, Form::Signed), Form::Signed, false, false);
    assert!(Symbols::find(&whole).is_some());
    assert!(Symbols::find(&[]).is_none());
    assert!(Symbols::find(DIGITS).is_none());
    let digits = memchr::memmem::rfind(&whole, DIGITS).expect("they are there");
    let number = memchr::memmem::find(&whole, &601u64.to_le_bytes()).expect("it is there");
    // The index of tokens, a marker, the number of symbols, the length of a name.
    for at in [digits + 600, digits - 118, number, number + 8] {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x40;
        assert!(Symbols::find(&damaged).is_none(), "{at}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_search_panic(
        cut in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        since_6_5 in any::<bool>(),
        wanted in any::<u64>(),
    ) {
        let mut image = image(&some(400, Form::Signed), Form::Signed, since_6_5, since_6_5);
        for (at, byte) in changes {
            let at = at.index(image.len());
            image[at] = byte;
        }
        // Half of them whole, so that more is reached than the search for the end.
        if wanted & 1 == 0 {
            image.truncate(cut.index(image.len()));
        }
        if let Some(symbols) = Symbols::find(&image) {
            symbols.lookup("load_module");
            symbols.at(wanted);
            symbols.at(BASE + (wanted & 0xffff));
        }
    }
}

#[test]
fn bytes_made_to_be_searched_for_ever_are_given_up() {
    // Digits without end, and numbers that could each be one of symbols.
    let many: Vec<u8> = DIGITS.repeat(50_000);
    assert!(Symbols::find(&many).is_none());
    let mut numbers: Vec<u8> = std::iter::repeat_n(1000u64.to_le_bytes(), 100_000)
        .flatten()
        .collect();
    let table = image(&some(FEWEST, Form::Whole), Form::Whole, true, false);
    numbers.extend(&table[4096..]);
    Symbols::find(&numbers);
}

#[test]
fn debians_kernels_name_what_is_where_their_headers_say() {
    for (path, image) in debian_kernels() {
        let kernel = crate::unpack(&image).unwrap();
        let elf = crate::Elf::parse(&kernel.elf).unwrap();
        let symbols = Symbols::find(&kernel.elf).unwrap_or_else(|| panic!("{path}: no symbols"));
        assert!(symbols.count() > 50_000, "{path}: {}", symbols.count());
        let text = elf.code.iter().find(|code| code.name == ".text").unwrap();
        assert_eq!(symbols.lookup("_text"), Some(text.address), "{path}");
        // The first instruction of a kernel that was compiled for tracing calls __fentry__ from each function.
        let load = symbols
            .lookup("load_module")
            .expect("Debian's kernels load modules");
        assert_eq!(elf.at(load, 1), Some(&[0xe8][..]), "{path}");
        assert_eq!(
            symbols.at(load + 5),
            Some(("load_module".into(), 5)),
            "{path}"
        );
        let entry = symbols.lookup("startup_64").and_then(|at| elf.physical(at));
        assert_eq!(entry, Some(elf.entry), "{path}");
    }
}

/// What is in front of the tables in [`image_from_itself`], in bytes.
const FRONT_BYTES: usize = 4096;

/// As 7.2 has it: aligned to 4, and each address from the place where it stands, of which `at` is that of the image.
fn image_from_itself(symbols: &[(u64, String)], at: u64) -> Vec<u8> {
    let old = image(symbols, Form::Relative, true, false);
    let start = FRONT_BYTES + 2 * usize::from(b'~' - b'!' + 1);
    let start = start.next_multiple_of(ALIGN);
    let tables = &old[start..];
    let digits = memchr::memmem::find(tables, DIGITS).unwrap();
    let (place, _) = tokens(tables, digits, ALIGN, &mut { STEPS_MAX }).unwrap();
    let names = names(tables, place.start, ALIGN, &mut { STEPS_MAX }).unwrap();
    let align = |part: &mut Vec<u8>| part.resize(part.len().next_multiple_of(4), 0);
    // Something that keeps what follows from being aligned to 8.
    let mut image = vec![0x11; FRONT_BYTES + 4];
    image.extend((symbols.len() as u32).to_le_bytes());
    image.extend(names.packed);
    align(&mut image);
    let markers = names.marked.iter();
    image.extend(markers.flat_map(|&mark| (mark as u32).to_le_bytes()));
    let index = place.end - 2 * TOKENS;
    image.extend(&tables[place.start..index]);
    while image.ends_with(&[0, 0]) {
        image.pop();
    }
    align(&mut image);
    image.extend(&tables[index..place.end]);
    for &(address, _) in symbols {
        let here = at + image.len() as u64;
        image.extend((address.wrapping_sub(here) as u32).to_le_bytes());
    }
    image.extend([0x22; 100]);
    image
}

#[test]
fn addresses_from_their_own_places_are_read_where_the_file_says_they_are() {
    let symbols = some(600, Form::Relative);
    let image = image_from_itself(&symbols, TINY_VIRTUAL);
    assert!(Symbols::find(&image).is_none(), "nobody says where it is");
    let sections = [(".text", 0, 16), (".rodata", 16, image.len() - 16)];
    let file = tiny_elf_with(&image, &sections);
    let found = Symbols::find(&file).expect("a table");
    assert_eq!(found.count(), symbols.len());
    for (address, name) in &symbols[3..] {
        assert_eq!(found.lookup(name), Some(*address), "{name}");
        assert_eq!(found.at(address + 5), Some((name.clone(), 5)));
    }
}
