//! The kernel's own symbol table, out of its image.
//!
//! A distribution strips its kernel, but the kernel names its own functions (in an oops, in /proc/kallsyms) from tables
//! inside itself, which stay. Their place is written nowhere. What gives them away is the table of tokens that the names
//! are packed with: the characters that names consist of stand for themselves, so the digits follow each other in it, and
//! an index after it repeats where each token begins. From there all else is found and checked against each other.
//!
//! The layout is that of `scripts/kallsyms.c`, each part aligned to 8 bytes, of late to 4:
//!
//! | Linux | order |
//! |---|---|
//! | 4.20 to 6.4 | offsets, base, number, names, markers, (6.2: sequence numbers), tokens, index |
//! | 6.5 and later | number, names, markers, tokens, index, offsets, base, sequence numbers |
//! | 7.2 (seen there; 6.12 is not so) | the same without a base, aligned to 4: each offset is from its own place |
//!
//! Symbols are sorted by address. Names stay packed: a [`Symbols`] borrows the image and reads what it is asked for.

use std::ops::Range;

use crate::image::Elf;

/// Alignments of the tables, and at the same time lengths of the number of symbols.
const ALIGNS: [usize; 2] = [8, 4];
/// How many tokens there are: one for each byte of a packed name.
const TOKENS: usize = 256;
/// A marker says where the name of each symbol of this multiple is.
const MARKED: usize = 256;
/// Tokens `0` to `9`.
const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
/// Further back than this the first of the 48 tokens before `0` is not looked for.
const TOKENS_BEFORE_DIGITS_BYTES: usize = 4096;
/// Fewer symbols than this is no kernel, but an accident of bytes.
const FEWEST: usize = 16;
/// How many steps the search may take before it is given up: real kernels take less than a hundredth.
const STEPS_MAX: usize = 50_000_000;
/// Kernel addresses begin here.
const KERNEL_HALF: u64 = 1 << 63;
/// A name is no longer (KSYM_NAME_LEN, Linux 6.1).
const NAME_BYTES: usize = 512;

/// The symbols of a kernel.
#[derive(Clone, Debug)]
pub struct Symbols<'a> {
    tokens: Vec<&'a [u8]>,
    names: Names<'a>,
    addresses: Addresses<'a>,
}

/// The packed names.
#[derive(Clone, Debug)]
struct Names<'a> {
    count: usize,
    packed: &'a [u8],
    /// Where every 256th name begins in `packed`: checked when it was found.
    marked: Vec<usize>,
    /// Where the number of symbols stands in the image.
    count_at: usize,
}

/// A symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Symbol {
    /// Where it is.
    pub(crate) address: u64,
    /// How far the next address is that has one; 0 if there is none.
    pub(crate) bytes: u64,
    /// What it is, as nm says it.
    pub(crate) kind: u8,
    /// What it is called.
    pub(crate) name: String,
}

impl Symbol {
    /// Whether it is known in one file of the kernel's source alone.
    pub(crate) fn is_local(&self) -> bool {
        self.kind.is_ascii_lowercase()
    }
}

#[derive(Clone, Copy, Debug)]
enum Addresses<'a> {
    /// 64 bits each (without CONFIG_KALLSYMS_BASE_RELATIVE).
    Whole(&'a [u8]),
    /// 32 bits each, to be added to a base.
    Relative { offsets: &'a [u8], base: u64 },
    /// Those below zero count down from the base, the others are addresses of per-CPU data
    /// (CONFIG_KALLSYMS_ABSOLUTE_PERCPU).
    Signed { offsets: &'a [u8], base: u64 },
    /// 32 bits each, to be added to where they stand themselves: the first at this address.
    FromItself { offsets: &'a [u8], at: u64 },
}

impl<'a> Symbols<'a> {
    /// The symbol table in a kernel's image (an ELF file, or memory); `None` if none is found that is consistent.
    pub fn find(image: &'a [u8]) -> Option<Symbols<'a>> {
        let mut steps = STEPS_MAX;
        let elf = Elf::parse(image).ok();
        let mut found = |digits, align| {
            let (place, tokens) = tokens(image, digits, align, &mut steps)?;
            let names = names(image, place.start, align, &mut steps)?;
            let addresses = addresses(image, &names, place.end, align, elf.as_ref())?;
            Some(Symbols {
                tokens,
                names,
                addresses,
            })
        };
        memchr::memmem::find_iter(image, DIGITS)
            .find_map(|digits| ALIGNS.into_iter().find_map(|align| found(digits, align)))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.names.count
    }

    /// The address of the first symbol of this name.
    pub fn lookup(&self, name: &str) -> Option<u64> {
        let name = name.as_bytes();
        let index = self
            .names
            .from(0)
            .position(|packed| self.is(packed, name))?;
        Some(self.addresses.get(index))
    }

    /// For each of `names`: from the address of the first symbol of this name to the next address that has one.
    pub fn extents(&self, names: &[&str]) -> Vec<Option<Range<u64>>> {
        let mut extents = vec![None; names.len()];
        let mut found = Vec::with_capacity(NAME_BYTES);
        for (index, packed) in self.names.from(0).enumerate() {
            self.unpack(packed, &mut found);
            let wanted = names.iter().zip(&mut extents);
            for (_, extent) in wanted.filter(|(name, _)| name.as_bytes() == found) {
                extent.get_or_insert_with(|| self.extent(index));
            }
        }
        extents
    }

    /// All of them, in the order of their addresses.
    pub(crate) fn all(&self) -> impl Iterator<Item = Symbol> {
        let mut name = Vec::with_capacity(NAME_BYTES);
        let mut above = 0;
        self.names.from(0).enumerate().map(move |(index, packed)| {
            let address = self.addresses.get(index);
            while above < self.count() && self.addresses.get(above) <= address {
                above += 1;
            }
            let end = if above < self.count() {
                self.addresses.get(above)
            } else {
                address
            };
            self.unpack(packed, &mut name);
            Symbol {
                address,
                bytes: end - address,
                kind: self.kind(packed),
                name: String::from_utf8_lossy(&name).into_owned(),
            }
        })
    }

    /// The type of a packed name: its first character.
    fn kind(&self, packed: &[u8]) -> u8 {
        let first = packed
            .iter()
            .map(|&token| self.tokens[usize::from(token)].first());
        first.flatten().next().copied().unwrap_or(b'?')
    }

    fn extent(&self, index: usize) -> Range<u64> {
        let start = self.addresses.get(index);
        let above = (index..self.count()).map(|later| self.addresses.get(later));
        start
            ..above
                .into_iter()
                .find(|&address| address > start)
                .unwrap_or(start)
    }

    /// The symbol that `address` lies after or at, and how many bytes after. Where several have one address, the
    /// first.
    pub fn at(&self, address: u64) -> Option<(String, u64)> {
        let after = partition(self.count(), |index| self.addresses.get(index) <= address);
        let found = self.addresses.get(after.checked_sub(1)?);
        let first = partition(after, |index| self.addresses.get(index) < found);
        Some((self.name(first)?, address - found))
    }

    fn name(&self, index: usize) -> Option<String> {
        let mut name = Vec::new();
        self.unpack(self.names.from(index).next()?, &mut name);
        Some(String::from_utf8_lossy(&name).into_owned())
    }

    /// Whether a packed name is `wanted`. Looks no further than where they differ.
    fn is(&self, packed: &[u8], wanted: &[u8]) -> bool {
        let (mut rest, mut is_type) = (wanted, true);
        for &token in packed {
            let mut characters = self.tokens[usize::from(token)];
            if is_type && let Some((_, after)) = characters.split_first() {
                (characters, is_type) = (after, false);
            }
            match rest.strip_prefix(characters) {
                Some(left) => rest = left,
                None => return false,
            }
        }
        rest.is_empty()
    }

    /// A name's characters: its tokens', but the first, which is the symbol's type.
    fn unpack(&self, packed: &[u8], name: &mut Vec<u8>) {
        name.clear();
        for &token in packed {
            name.extend_from_slice(self.tokens[usize::from(token)]);
            if name.len() > NAME_BYTES {
                break;
            }
        }
        if !name.is_empty() {
            name.remove(0);
        }
    }
}

impl<'a> Names<'a> {
    /// The packed names from number `index` on.
    fn from(&self, index: usize) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let packed = self.packed;
        let mut at = self.marked.get(index / MARKED).copied();
        let left = self.count.saturating_sub(index - index % MARKED);
        let names = std::iter::from_fn(move || {
            let name = packed_name(packed, at?)?;
            at = Some(name.end);
            packed.get(name)
        });
        names.take(left).skip(index % MARKED)
    }
}

impl Addresses<'_> {
    /// Address of symbol `index`, which there is.
    fn get(&self, index: usize) -> u64 {
        match *self {
            Addresses::Whole(table) => u64_at(table, 8 * index).unwrap_or(0),
            Addresses::Relative { offsets, base } => {
                base.wrapping_add(u32_at(offsets, 4 * index).unwrap_or(0).into())
            }
            Addresses::Signed { offsets, base } => {
                match u32_at(offsets, 4 * index).unwrap_or(0).cast_signed() {
                    offset @ 0.. => offset as u64,
                    offset => base.wrapping_add((-1 - i64::from(offset)) as u64),
                }
            }
            Addresses::FromItself { offsets, at } => {
                let offset = u32_at(offsets, 4 * index).unwrap_or(0).cast_signed();
                let place = at.wrapping_add(4 * index as u64);
                place.wrapping_add_signed(offset.into())
            }
        }
    }
}

/// The tokens around their digits, and the place of their table with its index.
fn tokens<'a>(
    image: &'a [u8],
    digits: usize,
    align: usize,
    steps: &mut usize,
) -> Option<(Range<usize>, Vec<&'a [u8]>)> {
    let least = digits.saturating_sub(TOKENS_BEFORE_DIGITS_BYTES);
    let mut before = 0;
    for start in (least..digits).rev() {
        *steps = steps.checked_sub(1)?;
        before += usize::from(image[start] == 0);
        if before > usize::from(b'0') {
            return None;
        }
        if before == usize::from(b'0')
            && start.is_multiple_of(align)
            && let Some(found) = indexed_tokens(image, start, align, steps)
        {
            return Some(found);
        }
    }
    None
}

/// 256 strings from `start` on, if the index after them says where they begin.
fn indexed_tokens<'a>(
    image: &'a [u8],
    start: usize,
    align: usize,
    steps: &mut usize,
) -> Option<(Range<usize>, Vec<&'a [u8]>)> {
    let mut tokens = Vec::with_capacity(TOKENS);
    let mut starts = Vec::with_capacity(TOKENS);
    let mut at = start;
    for _ in 0..TOKENS {
        let rest = image.get(at..)?;
        let length = rest.iter().take(NAME_BYTES).position(|&byte| byte == 0);
        *steps = steps.checked_sub(length.unwrap_or(NAME_BYTES))?;
        let length = length?;
        starts.push(at - start);
        tokens.push(&rest[..length]);
        at += length + 1;
    }
    let index = at.next_multiple_of(align);
    let end = index + 2 * TOKENS;
    let (index, _) = image.get(index..end)?.as_chunks::<2>();
    let indexed = index.iter().map(|&at| usize::from(u16::from_le_bytes(at)));
    indexed.eq(starts).then_some((start..end, tokens))
}

/// The names before the table of tokens at `tokens`: their number, they themselves, and markers that agree with them.
fn names<'a>(image: &'a [u8], tokens: usize, align: usize, steps: &mut usize) -> Option<Names<'a>> {
    for start in (align..tokens).rev().filter(|at| at.is_multiple_of(align)) {
        *steps = steps.checked_sub(1)?;
        let count_at = start - align;
        let count = match align {
            4 => u32_at(image, count_at)?.into(),
            _ => u64_at(image, count_at)?,
        } as usize;
        // Each takes a byte for its length and one for its type.
        if (FEWEST..=(tokens - start) / 2).contains(&count)
            && let Some(names) = counted_names(image, start..tokens, count, align, steps)
        {
            return Some(names);
        }
    }
    None
}

fn counted_names<'a>(
    image: &'a [u8],
    place: Range<usize>,
    count: usize,
    align: usize,
    steps: &mut usize,
) -> Option<Names<'a>> {
    let packed = &image[place.clone()];
    let (mut at, mut marked) = (0, Vec::new());
    for number in 0..count {
        *steps = steps.checked_sub(1)?;
        if number.is_multiple_of(MARKED) {
            marked.push(at);
        }
        at = packed_name(packed, at)?.end;
    }
    let markers = at.next_multiple_of(align);
    // Up to the tokens there is nothing else, or a sequence number of three bytes for each symbol. A few bytes that look
    // like names are soon found; that they end where they must is what tells.
    let end = (markers + 4 * marked.len()).next_multiple_of(align);
    let sequences = (3 * count).next_multiple_of(align);
    if ![end, end + sequences].contains(&packed.len()) {
        return None;
    }
    let (markers, _) = packed
        .get(markers..markers + 4 * marked.len())?
        .as_chunks::<4>();
    let agree = markers
        .iter()
        .map(|&marker| u32::from_le_bytes(marker) as usize)
        .eq(marked.iter().copied());
    agree.then(|| Names {
        count,
        packed: &packed[..at],
        marked,
        count_at: place.start - align,
    })
}

/// Where the tokens of the name at `at` are, with its type's. Lengths from 128 on take a second byte (Linux 6.1).
fn packed_name(packed: &[u8], at: usize) -> Option<Range<usize>> {
    let (start, length) = match *packed.get(at..)? {
        [short @ 1..0x80, ..] => (at + 1, usize::from(short)),
        [long @ 0x80..=0xff, high, ..] => {
            (at + 2, usize::from(long & 0x7f) | usize::from(high) << 7)
        }
        _ => return None,
    };
    (start + length <= packed.len()).then_some(start..start + length)
}

/// The addresses: before the number of symbols, or after the index of tokens at `index_end`.
fn addresses<'a>(
    image: &'a [u8],
    names: &Names<'_>,
    index_end: usize,
    align: usize,
    elf: Option<&Elf<'_>>,
) -> Option<Addresses<'a>> {
    let (count, number) = (names.count, names.count_at);
    let relative = |start: usize| {
        let end = start.checked_add(4 * count)?;
        let offsets = image.get(start..end)?;
        let base = u64_at(image, end.next_multiple_of(align))?;
        let signed = u32_at(offsets, 4 * (count - 1))?.cast_signed() < 0;
        Some(match signed {
            true => Addresses::Signed { offsets, base },
            false => Addresses::Relative { offsets, base },
        })
    };
    let whole = |start: usize| {
        Some(Addresses::Whole(
            image.get(start..start.checked_add(8 * count)?)?,
        ))
    };
    let from_itself = |start: usize| {
        let at = elf?.address_of(start)?;
        let offsets = image.get(start..start.checked_add(4 * count)?)?;
        Some(Addresses::FromItself { offsets, at })
    };
    let after = index_end.next_multiple_of(align);
    let before = |bytes: usize| number.checked_sub(bytes);
    [
        before(8 + (4 * count).next_multiple_of(align)).and_then(relative),
        relative(after),
        before(8 * count).and_then(whole),
        whole(after),
        from_itself(after),
    ]
    .into_iter()
    .flatten()
    .find(|addresses| {
        let sorted = (1..count).all(|index| addresses.get(index - 1) <= addresses.get(index));
        sorted && addresses.get(count - 1) >= KERNEL_HALF
    })
}

/// How many of `0..count` come before the first for which `holds` does not; it holds for those up to some place only.
fn partition(count: usize, holds: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        if holds(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests;
