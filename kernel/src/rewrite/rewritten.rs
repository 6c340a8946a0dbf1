//! How to tell, while the guest runs, that what was rewritten in its kernel is still as it was written.
//!
//! A guest may take the traps away: another kernel takes this one's place (kexec), a kprobe or a livepatch changes an
//! instruction. It then reads the host's time, or CPUID, and nothing says so. It cannot be kept from that, but it can be
//! noticed: a sample of what was written is compared with what is in memory now.
//!
//! Linux patches its own text all the time, and none of that may be taken for it. So only what stays as it is for as long
//! as the kernel runs is looked at: places in `.text` (what is in `.init.text` and the replacements of alternatives is
//! freed after boot), where no alternative is applied, and whose trap no quick read has taken over. Jump labels, static
//! calls, ftrace and SMP locks have places of their own, of which none is a trap.
//!
//! A livepatch leaves the old function as it is but for its first instruction, by which ftrace leads away from it. So of
//! the functions that load modules, that one is looked at too.

use std::ops::Range;

use crate::image::Elf;
use crate::rewrite::alternatives;
use crate::rewrite::quick::QuickClock;
use crate::rewrite::spans::Span;
use crate::rewrite::traps::{self, SiteKind, Sites};
use crate::symbols::kallsyms::Symbols;

/// What begins a function that may be called indirectly: ENDBR64.
const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// `call` and `jmp`, with 32-bit displacements.
const LEADS_AWAY: [u8; 2] = [0xe8, 0xe9];
/// Length of the instruction that ftrace patches.
const FTRACE_BYTES: usize = 5;
/// The function of the kernel's that everything about loading a module is in, or called from.
const LOADER: &str = "load_module";

/// Reads guest-physical memory; `false` where it is not all RAM.
pub type ReadPhysical<'a> = &'a dyn Fn(u64, &mut [u8]) -> bool;

/// What is wrong with the text now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Most of it is another's.
    pub replaced: bool,
    /// The call at which modules are rewritten is not a trap any more.
    pub module_call: bool,
    /// A function that loads modules is led away from.
    pub module_loader: bool,
    /// Another trap is no longer there.
    pub traps: bool,
}

/// A trap that stays.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Trap {
    physical: u64,
    bytes: Vec<u8>,
    is_module_call: bool,
}

/// Where a function that loads modules begins, after an ENDBR64.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Beginning {
    physical: u64,
    /// As the kernel's file has it.
    bytes: [u8; FTRACE_BYTES],
}

/// What was rewritten in a kernel and stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewritten {
    traps: Vec<Trap>,
    loaders: Vec<Beginning>,
    clock_stub: Option<(u64, Vec<u8>)>,
    /// Virtual addresses of `.text`, and by how much more than the physical ones they are.
    text: Option<(Range<u64>, u64)>,
}

/// The beginnings of the functions that load modules: those that have a trapped call, and `load_module`.
pub fn loaders(elf: &Elf<'_>, sites: &Sites) -> Vec<u64> {
    let calls = sites.sites.iter().filter(|site| is_module_call(site.kind));
    let calls: Vec<u64> = calls.map(|site| site.address).collect();
    if calls.is_empty() {
        return Vec::new();
    }
    let Some(symbols) = Symbols::find(elf.file()) else {
        return Vec::new();
    };
    let around = calls.iter().filter_map(|&call| {
        let (_, offset) = symbols.at(call)?;
        Some(call - offset)
    });
    let mut found: Vec<u64> = around.chain(symbols.lookup(LOADER)).collect();
    found.sort_unstable();
    found.dedup();
    found
}

fn is_module_call(kind: SiteKind) -> bool {
    matches!(kind, SiteKind::Module { .. })
}

impl Rewritten {
    /// Of a kernel with these sites, whose functions at `loaders` load modules, and in which these `spans` became quick
    /// reads of this clock.
    pub fn new(
        elf: &Elf<'_>,
        sites: &Sites,
        loaders: &[u64],
        spans: &[Span],
        clock: Option<&QuickClock>,
    ) -> Rewritten {
        let Some(text) = elf.code.iter().find(|code| code.name == ".text") else {
            return Rewritten::default();
        };
        let range = text.address..text.address + text.file.len() as u64;
        // Without their list it is not known which places Linux patches.
        let alternatives = alternatives::read(elf);
        let stays = |address: u64, length: u64| {
            let place = address..address + length;
            let patched = match &alternatives {
                None => true,
                Some(alternatives) => alternatives.touching(place).next().is_some(),
            };
            range.contains(&address) && !patched
        };
        // Both are in the order of their addresses.
        let is_span = |address: u64| {
            spans
                .binary_search_by_key(&address, |span| span.address)
                .is_ok()
        };
        let traps = sites.sites.iter().filter_map(|site| {
            let plain = stays(site.address, site.length.into()) && !is_span(site.address);
            let (trap, length) = traps::rewrite(site.kind, site.length.into());
            plain.then(|| Trap {
                physical: site.physical,
                bytes: trap[..length].to_vec(),
                is_module_call: is_module_call(site.kind),
            })
        });
        let loaders = loaders.iter().filter_map(|&start| {
            let plain = elf.at(start, ENDBR64.len())? != ENDBR64;
            let at = start + if plain { 0 } else { ENDBR64.len() as u64 };
            Some(Beginning {
                physical: elf.physical(at)?,
                bytes: elf.at(at, FTRACE_BYTES)?.try_into().ok()?,
            })
        });
        let shift = elf
            .physical(range.start)
            .map(|physical| range.start.wrapping_sub(physical));
        Rewritten {
            traps: traps.collect(),
            loaders: loaders.collect(),
            clock_stub: clock.map(|clock| (clock.stub, clock.stub_bytes.to_vec())),
            text: shift.map(|shift| (range.clone(), shift)),
        }
    }

    /// Where the kernel's code at this virtual address was loaded; `None` if it is not the kernel's.
    pub fn physical(&self, address: u64) -> Option<u64> {
        let (range, shift) = self.text.as_ref()?;
        range
            .contains(&address)
            .then(|| address.wrapping_sub(*shift))
    }

    /// Whether there is anything to look at.
    pub fn is_empty(&self) -> bool {
        self.traps.is_empty()
    }

    /// What has changed. Memory is that of a counted exit, so the answer is the same in a replay.
    pub fn changes(&self, read: ReadPhysical<'_>) -> Changes {
        let is = |physical: u64, expected: &[u8]| {
            let mut found = [0; 64];
            match found.get_mut(..expected.len()) {
                Some(found) => read(physical, found) && *found == *expected,
                None => false,
            }
        };
        let mut changes = Changes::default();
        let mut changed = 0;
        for trap in &self.traps {
            if !is(trap.physical, &trap.bytes) {
                changed += 1;
                match trap.is_module_call {
                    true => changes.module_call = true,
                    false => changes.traps = true,
                }
            }
        }
        let stub_is_gone = self
            .clock_stub
            .as_ref()
            .is_some_and(|(stub, bytes)| !is(*stub, bytes));
        if stub_is_gone || changed * 2 > self.traps.len() {
            return Changes {
                replaced: true,
                ..Changes::default()
            };
        }
        changes.module_loader = self.loaders.iter().any(|loader| {
            let mut found = [0; FTRACE_BYTES];
            read(loader.physical, &mut found)
                && found != loader.bytes
                && LEADS_AWAY.contains(&found[0])
        });
        changes
    }
}

#[cfg(test)]
mod tests;
