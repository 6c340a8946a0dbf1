//! Finds room in a kernel for what counts its entries and reads its time: some code, and some words of data.
//!
//! The stubs (see `kvm::entry_stub` and `quick_stub`) must be mapped executable for as long as the guest runs, the
//! word writable, and neither may be anybody else's. Linux has both to spare. It aligns its entry text to
//! 2 MiB, so `.text` holds runs of up to 2 MiB of INT3 that no symbol covers and nobody jumps to;
//! shorter runs are passed by, since some belong to code that is copied as a whole (kexec's).
//! And where a section of its data ends inside a page, the rest of that page stays mapped with it.
//! Both are found in the section headers alone, without symbols.

use std::ops::Range;

use crate::image::{Elf, Segment};

/// Length and alignment of the block for the stubs, so that it never crosses a page.
pub const BLOCK_BYTES: u64 = 512;
/// What the linker fills `.text` up with (`:text = 0xcccc`, Linux, arch/x86/kernel/vmlinux.lds.S).
pub const PADDING: u8 = 0xcc;
/// A run with fewer blocks may be part of something.
const BLOCKS_MIN: usize = 64;
/// The word has a cache line of its own, so that counting disturbs nobody.
const LINE_BYTES: u64 = 64;
/// Where in the word's line the clock is if there is no line for it: what is left of a page is a matter of chance.
const CLOCK_IN_LINE: u64 = LINE_BYTES / 2;
/// Length of the clock: three words.
pub const CLOCK_BYTES: usize = 24;
const _: () = assert!(CLOCK_IN_LINE as usize + CLOCK_BYTES <= LINE_BYTES as usize);
const PAGE: u64 = 4096;

/// A place in the kernel's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cave {
    /// Virtual address.
    pub address: u64,
    /// Guest-physical address.
    pub physical: u64,
}

/// Room for the stubs and for their word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryCaves {
    /// [`BLOCK_BYTES`] of [`PADDING`] in `.text`.
    pub stubs: Cave,
    /// A zeroed cache line between two sections of writable data.
    pub word: Cave,
    /// Room after both of them.
    pub quick: Option<QuickCaves>,
}

/// Room for quick time reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuickCaves {
    /// [`PADDING`] in `.text`.
    pub stubs: Cave,
    /// How much of it there is, in bytes.
    pub stub_bytes: u64,
    /// Zeroed, for the clock.
    pub clock: Cave,
}

/// The room in this kernel; `None` if it has not enough of either.
pub fn find(elf: &Elf<'_>) -> Option<EntryCaves> {
    let text = elf.code.iter().find(|code| code.name == ".text")?;
    let padding = longest_padding(elf.bytes(&text.file), text.address)?;
    let stubs = text.address + padding.start;
    let word = elf
        .segments
        .iter()
        .filter(|segment| segment.writable)
        .flat_map(|segment| gaps(&kept(segment, elf), &elf.taken))
        .max_by_key(|gap| (gap.end - gap.start, std::cmp::Reverse(gap.start)))?;
    let cave = |address| {
        let physical = elf.physical(address)?;
        Some(Cave { address, physical })
    };
    let quick = || {
        let clock = match word.end - word.start {
            LINE_BYTES => word.start + CLOCK_IN_LINE,
            _ => word.start + LINE_BYTES,
        };
        Some(QuickCaves {
            stubs: cave(stubs + BLOCK_BYTES)?,
            stub_bytes: padding.end - padding.start - BLOCK_BYTES,
            clock: cave(clock)?,
        })
    };
    Some(EntryCaves {
        stubs: cave(stubs)?,
        word: cave(word.start)?,
        quick: quick(),
    })
}

/// Offsets of the aligned blocks in the longest run of padding.
fn longest_padding(text: &[u8], address: u64) -> Option<Range<u64>> {
    let first = address.next_multiple_of(BLOCK_BYTES) - address;
    let blocks = text
        .get(first as usize..)?
        .chunks_exact(BLOCK_BYTES as usize);
    let (mut longest, mut run) = (0..0, 0..0);
    for (index, block) in blocks.enumerate() {
        if !block.iter().all(|&byte| byte == PADDING) {
            run = index + 1..index + 1;
            continue;
        }
        run.end = index + 1;
        if run.len() > longest.len() {
            longest = run.clone();
        }
    }
    let offset = |block: usize| first + block as u64 * BLOCK_BYTES;
    (longest.len() >= BLOCKS_MIN).then(|| offset(longest.start)..offset(longest.end))
}

/// The virtual addresses of a segment up to where what is freed after boot begins: 6.12 has that in a segment of its
/// own, 7.2 in that of its data.
fn kept(segment: &Segment, elf: &Elf<'_>) -> Range<u64> {
    let (start, bytes) = (segment.virtual_address, segment.memory_bytes);
    let freed = elf.code.iter().chain(&elf.data);
    let freed =
        freed.filter(|section| section.name.starts_with(".init") && section.address >= start);
    let end = freed.map(|section| section.address).min();
    start..end.map_or(start + bytes, |end| end.min(start + bytes))
}

/// What sections leave over in a range of addresses, after the end of one and on the same page: whole lines.
fn gaps(range: &Range<u64>, taken: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut taken: Vec<_> = taken.iter().filter(|section| !section.is_empty()).collect();
    taken.sort_unstable_by_key(|section| section.start);
    let mut found = Vec::new();
    // Where all sections so far end.
    let mut end: Option<u64> = None;
    let beyond = range.end..u64::MAX;
    for section in taken.into_iter().chain([&beyond]) {
        let last = end.replace(end.map_or(section.end, |end| end.max(section.end)));
        let Some(last) = last.filter(|last| range.start < *last && *last < range.end) else {
            continue;
        };
        let start = last.next_multiple_of(LINE_BYTES);
        let stop = section
            .start
            .min(range.end)
            .min(last.next_multiple_of(PAGE))
            & !(LINE_BYTES - 1);
        if start < stop {
            found.push(start..stop);
        }
    }
    found
}

/// Whether Linux hides its data from the page tables that user programs run on (page-table isolation): an
/// entry from user mode would then run into a page fault at the word. `vendor` is CPUID's.
///
/// As `pti_check_boottime_disable` and the list of CPUs without Meltdown decide it (Linux 6.1,
/// arch/x86/mm/pti.c, arch/x86/kernel/cpu/common.c), except that CPUs of other makes are all taken
/// for vulnerable.
pub fn isolates_page_tables(cmdline: &str, vendor: &str) -> bool {
    let last = |name: &str| {
        let words = cmdline.split_whitespace().rev();
        words.filter_map(|word| word.strip_prefix(name)).next()
    };
    let vulnerable = !matches!(vendor, "AuthenticAMD" | "HygonGenuine");
    let off = cmdline.split_whitespace().any(|word| word == "nopti")
        || last("mitigations=").is_some_and(|how| how == "off");
    match last("pti=") {
        Some("off") => false,
        Some("on") => true,
        Some("auto") => vulnerable,
        _ => vulnerable && !off,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_tables_are_isolated_on_intel_unless_the_command_line_says_no() {
        let (intel, amd) = ("GenuineIntel", "AuthenticAMD");
        for (words, on_intel, on_amd) in [
            ("", true, false),
            ("panic=-1 nopti", false, false),
            ("nopti pti=on", true, true),
            ("pti=on pti=off", false, false),
            ("nopti pti=auto", true, false),
            ("mitigations=off", false, false),
            ("mitigations=off mitigations=auto", true, false),
            ("nopti=1", true, false),
        ] {
            assert_eq!(isolates_page_tables(words, intel), on_intel, "{words}");
            assert_eq!(isolates_page_tables(words, amd), on_amd, "{words}");
        }
    }

    const BASE: u64 = 0xffff_ffff_8100_0000;

    fn text(runs: &[(usize, usize)]) -> Vec<u8> {
        let mut text = vec![0x90; 256 << 10];
        for &(start, length) in runs {
            text[start..start + length].fill(PADDING);
        }
        text
    }

    fn data(bytes: u64) -> Range<u64> {
        BASE..BASE + bytes
    }

    #[test]
    fn debians_kernels_have_room_for_stubs_a_word_and_a_clock() {
        for (path, image) in crate::testing::debian_kernels() {
            let kernel = crate::unpack(&image).unwrap();
            let elf = Elf::parse(&kernel.elf).unwrap();
            let caves = find(&elf).unwrap_or_else(|| panic!("{path}: no room"));
            let quick = caves.quick.unwrap_or_else(|| panic!("{path}: no clock"));
            eprintln!("{path}: {caves:x?}");
            assert!(quick.stub_bytes >= 16 << 10, "{path}: {}", quick.stub_bytes);
        }
    }

    #[test]
    fn stubs_go_to_the_first_aligned_block_of_the_longest_padding() {
        let text = text(&[(0x100, 40 << 10), (0x1_0001, 100 << 10)]);
        assert_eq!(longest_padding(&text, BASE), Some(0x1_0200..0x2_9000));
        let odd = longest_padding(&text, BASE + 0x1ff);
        assert_eq!(odd, Some(0x1_0001..0x2_9001));
    }

    #[test]
    fn padding_too_short_to_be_nobodys_is_left_alone() {
        assert_eq!(longest_padding(&text(&[(0x1000, 2083)]), BASE), None);
        assert_eq!(longest_padding(&[], BASE), None);
        let just = BLOCKS_MIN * BLOCK_BYTES as usize;
        let found = longest_padding(&text(&[(0x200, just)]), BASE);
        assert_eq!(found, Some(0x200..0x200 + just as u64));
        assert_eq!(longest_padding(&text(&[(0x200, just - 1)]), BASE), None);
    }

    #[test]
    fn the_word_lies_behind_a_section_on_its_last_page_and_in_nobody_else() {
        let at = |start: u64, end: u64| BASE + start..BASE + end;
        let two = [at(0, 0x1004), at(0x2000, 0x3000)];
        assert_eq!(gaps(&data(0x3000), &two), [at(0x1040, 0x2000)]);
        let close = [at(0, 0x1004), at(0x1080, 0x2000)];
        assert_eq!(gaps(&data(0x3000), &close), [at(0x1040, 0x1080)]);
        let covered = [at(0, 0x1004), at(0x800, 0x2000)];
        assert_eq!(gaps(&data(0x3000), &covered), []);
        let whole = [at(0, 0x3000)];
        assert_eq!(gaps(&data(0x3000), &whole), []);
    }
}
