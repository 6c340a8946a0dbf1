//! The target that loads kernels: any bytes, or the contents of an ELF file whose headers are right, so that what looks
//! into its sections is reached.
//!
//! Whatever the file is, it is refused or loaded, in a time and with memory that its length bounds; and what was loaded is
//! what the rewriter meant to write.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use hindsight_kernel::rewrite::rewritten::{self, Changes, Rewritten};
use hindsight_kernel::rewrite::{caves, modules};
use hindsight_kernel::view::View;
use hindsight_kernel::{Elf, Kernel, Modules, QuickPlan, RewriteTargets, find_sites, unpack};
use hindsight_vmm::boot::{self, BootParameters, GuestRam, OutOfRam};

const PAGE: u64 = 4096;
const RAM_BYTES: u64 = 64 << 20;
/// What unpacking may take beside the file: the longest kernel, and room to let it grow.
const UNPACKING_BYTES: usize = 384 << 20;
/// What all the rest may take: this, and some for each byte of the unpacked kernel.
const LOOKING_BYTES: usize = 16 << 20;
const LOOKING_BYTES_PER_BYTE: usize = 24;

/// Where a sealed kernel is, and where it is loaded.
const VIRTUAL: u64 = 0xffff_ffff_8100_0000;
const PHYSICAL: u64 = 0x100_0000;
/// Names of a sealed kernel's sections.
const NAMES: [&str; 8] = [
    ".text",
    ".init.text",
    ".altinstr_replacement",
    ".altinstructions",
    ".rodata",
    ".data",
    ".BTF",
    ".init.data",
];
/// As much padding as caves are looked for in.
const ROOM_BYTES: usize = 48 << 10;
/// The first of them are code.
const CODE_NAMES: usize = 3;

static LIMIT: OnceLock<fn(usize)> = OnceLock::new();

/// Calls `limit` with how many bytes may be allocated from here on, beside those that are.
pub fn limit_allocations_by(limit: fn(usize)) {
    let _ = LIMIT.set(limit);
}

fn limit(bytes: usize) {
    if let Some(limit) = LIMIT.get() {
        limit(bytes);
    }
}

/// A kernel that was loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// How many instructions are trapped.
    pub sites: usize,
    /// How many of these are calls that load a module.
    pub module_calls: u32,
    /// How many became quick time reads.
    pub spans: usize,
    /// How many waits for the console's transmitter are left out.
    pub transmits: usize,
}

/// Boots `data` as far as the first instruction, if it is a kernel: its first byte says whether it is a file as it is
/// (even) or the contents of one (odd).
pub fn load_kernel(data: &[u8]) -> Option<Loaded> {
    let (first, rest) = data.split_first()?;
    let loaded = match first & 1 {
        0 => load_file(rest),
        _ => load_file(&seal_kernel(rest)),
    };
    limit(usize::MAX);
    loaded
}

/// An ELF file with one segment and these sections: each a byte that says its name, its length in two bytes,
/// little-endian, and its contents. If the byte's highest bit is set, room for stubs follows in the section.
pub fn seal_kernel(contents: &[u8]) -> Vec<u8> {
    let mut rest = contents;
    let mut next = || {
        let (head, after) = rest.split_at_checked(3)?;
        let length = usize::from(u16::from_le_bytes([head[1], head[2]]));
        let (part, after) = after.split_at(length.min(after.len()));
        rest = after;
        let room = if head[0] & 0x80 != 0 { ROOM_BYTES } else { 0 };
        let mut part = part.to_vec();
        part.resize(part.len() + room, caves::PADDING);
        Some((usize::from(head[0]) % NAMES.len(), part))
    };
    let (mut image, mut headers, mut names) = (Vec::new(), vec![0; 64], vec![0]);
    const START: usize = 64 + 56;
    while let Some((name, part)) = next() {
        image.resize(image.len().next_multiple_of(8), 0xcc);
        let flags: u64 = if name < CODE_NAMES { 6 } else { 3 };
        headers.extend((names.len() as u32).to_le_bytes());
        headers.extend(1_u32.to_le_bytes());
        let offset = (START + image.len()) as u64;
        let address = VIRTUAL + image.len() as u64;
        for word in [flags, address, offset, part.len() as u64, 0, 8, 0] {
            headers.extend(word.to_le_bytes());
        }
        names.extend(NAMES[name].as_bytes());
        names.push(0);
        image.extend(part);
    }
    headers.extend([0, 0, 0, 0, 3, 0, 0, 0]);
    let names_at = (START + image.len()) as u64;
    for word in [0, 0, names_at, names.len() as u64, 0, 1, 0] {
        headers.extend(word.to_le_bytes());
    }
    let count = (headers.len() / 64) as u16;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [PHYSICAL, 64, names_at + names.len() as u64] {
        file.extend(word.to_le_bytes());
    }
    file.extend([0; 4]);
    for half in [64, 56, 1, 64, count, count - 1] {
        file.extend(half.to_le_bytes());
    }
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let bytes = image.len() as u64;
    for word in [START as u64, VIRTUAL, PHYSICAL, bytes, bytes + PAGE, PAGE] {
        file.extend(word.to_le_bytes());
    }
    assert_eq!(file.len(), START);
    file.extend(image);
    file.extend(names);
    file.extend(headers);
    file
}

/// RAM of which only what is written is there.
struct Ram(BTreeMap<u64, Box<[u8; PAGE as usize]>>);

impl GuestRam for Ram {
    fn bytes(&self) -> u64 {
        RAM_BYTES
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), OutOfRam> {
        let bytes = data.len() as u64;
        if gpa.checked_add(bytes).is_none_or(|end| end > RAM_BYTES) {
            let ram_bytes = RAM_BYTES;
            return Err(OutOfRam {
                gpa,
                bytes,
                ram_bytes,
            });
        }
        for (at, byte) in (gpa..).zip(data) {
            let page = self.0.entry(at / PAGE);
            page.or_insert_with(|| Box::new([0; PAGE as usize]))[(at % PAGE) as usize] = *byte;
        }
        Ok(())
    }
}

impl Ram {
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> bool {
        for (at, byte) in (gpa..).zip(buffer.iter_mut()) {
            let page = self.0.get(&(at / PAGE));
            *byte = page.map_or(0, |page| page[(at % PAGE) as usize]);
        }
        gpa.checked_add(buffer.len() as u64)
            .is_some_and(|end| end <= RAM_BYTES)
    }
}

fn load_file(file: &[u8]) -> Option<Loaded> {
    limit(UNPACKING_BYTES + 24 * file.len());
    let kernel = unpack(file).ok()?;
    limit(LOOKING_BYTES + LOOKING_BYTES_PER_BYTE * kernel.elf.len());
    let elf = Elf::parse(&kernel.elf).ok()?;
    // What is known of its memory is refused or found as well, whatever its types say.
    let _ = View::new(&elf);
    let modules = modules::find(&elf);
    let found = find_sites(&elf, modules.loads()).ok()?;
    let places: Vec<u64> = found.sites.sites.iter().map(|site| site.address).collect();
    assert!(places.is_sorted(), "sites out of order");
    look_at_a_module(&elf, &modules);
    load(&kernel, &elf, &found)
}

/// The kernel's own bytes may be a module as well as any.
fn look_at_a_module(elf: &Elf<'_>, modules: &Modules) {
    let Some(layout) = modules.layout() else {
        return;
    };
    let read = |at: u64, buffer: &mut [u8]| {
        let got = (0..buffer.len())
            .zip(at..)
            .map_while(|(_, at)| elf.at(at, 1).map(|byte| byte[0]));
        let got: Vec<u8> = got.collect();
        buffer[..got.len()].copy_from_slice(&got);
        got.len()
    };
    for module in elf.data.iter().map(|data| data.address) {
        let text = layout.text(module, &read);
        for site in &text.sites {
            let inside = text
                .ranges
                .iter()
                .any(|range| range.contains(&site.address));
            assert!(inside, "a site outside of the module's text");
        }
    }
}

fn load(kernel: &Kernel, elf: &Elf<'_>, found: &RewriteTargets) -> Option<Loaded> {
    let mut ram = Ram(BTreeMap::new());
    let parameters = BootParameters {
        initrd: b"an initrd",
        cmdline: "console=ttyS0",
        seed: &[7; 32],
        regions: &boot::e820(RAM_BYTES),
        slots: &[],
    };
    let plan = boot::load(
        &mut ram,
        kernel,
        elf,
        &found.sites.patches(elf).ok()?,
        &parameters,
    )
    .ok()?;
    assert!(plan.entry < RAM_BYTES, "the entry is not in RAM");
    let quick = caves::find(elf)
        .and_then(|caves| caves.quick)
        .and_then(|caves| QuickPlan::new(elf, &found.spans, &found.transmits, &caves));
    let mut spans = &[][..];
    if let Some(quick) = &quick {
        boot::apply(&mut ram, quick.patches()).expect("the kernel is in RAM");
        spans = &found.spans[..];
    }
    let loaders = rewritten::loaders(elf, &found.sites);
    let clock = quick.as_ref().map(QuickPlan::clock);
    let kept = Rewritten::new(elf, &found.sites, &loaders, spans, clock);
    let changes = kept.changes(&|gpa, buffer| ram.read(gpa, buffer));
    assert_eq!(changes, Changes::default(), "what was written is not there");
    Some(Loaded {
        sites: found.sites.sites.len(),
        module_calls: found.sites.counts().module_loads,
        spans: spans.len(),
        transmits: found.transmits.len(),
    })
}
