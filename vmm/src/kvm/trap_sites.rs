//! Which OUTs of the guest's kernel are traps.
//!
//! A trap is an OUT to a port of ours, but not every such OUT is a trap: a kernel may write to any port,
//! and its port driver does so for whoever asks. What tells them apart is the place. A trap is where the loader, or the
//! loading of a module, put one, or where the kernel has copied one to by itself (alternatives). And
//! whatever else copies code takes the bytes along, `e6 PORT`, which the kernel's own code hardly ever has:
//! where it does, that was seen before anything was rewritten.

use std::collections::{BTreeMap, BTreeSet};

use hindsight_kernel::rewrite::modules::ModuleText;
use hindsight_kernel::rewrite::traps::SHORTEST;
use hindsight_kernel::{Alternative, SiteKind, Sites};
use serde::{Deserialize, Serialize};

/// A trap, by what it replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trap {
    /// The instruction that was there.
    pub kind: SiteKind,
    /// Its length in bytes.
    pub length: u8,
}

/// The traps in a guest's kernel, by virtual address.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrapSites {
    known: BTreeMap<u64, Trap>,
    /// OUTs to our ports that the guest's own code has.
    own_outs: BTreeSet<u64>,
}

impl TrapSites {
    /// Those of a kernel as it is loaded, and where its alternatives may take them. Each by its physical address, too,
    /// where it runs until its own page tables are in use.
    pub fn of_kernel<'a>(
        sites: &Sites,
        alternatives: impl IntoIterator<Item = &'a Alternative>,
    ) -> TrapSites {
        let mut found = TrapSites {
            known: BTreeMap::new(),
            own_outs: sites.own_outs.iter().copied().collect(),
        };
        for site in &sites.sites {
            found.insert(site.address, site.kind, site.length);
            found.insert(site.physical, site.kind, site.length);
        }
        for alternative in alternatives {
            let start = alternative.replacement;
            let end = start + u64::from(alternative.replacement_bytes);
            let first = sites.sites.partition_point(|site| site.address < start);
            let inside = sites.sites[first..]
                .iter()
                .take_while(|site| site.address < end);
            for site in inside {
                let copy = alternative.address + (site.address - start);
                found.known.entry(copy).or_insert(Trap {
                    kind: site.kind,
                    length: site.length,
                });
            }
        }
        found
    }

    /// Adds one.
    pub fn insert(&mut self, address: u64, kind: SiteKind, length: u8) {
        self.known.insert(address, Trap { kind, length });
    }

    /// A module has taken the place of whatever was there.
    pub(super) fn load_module(&mut self, text: &ModuleText) {
        let is_gone = |address: &u64| text.ranges.iter().any(|range| range.contains(address));
        self.known.retain(|address, _| !is_gone(address));
        self.own_outs.retain(|address| !is_gone(address));
        for site in &text.sites {
            self.insert(site.address, site.kind, site.length as u8);
        }
        self.own_outs.extend(&text.own_outs);
    }

    /// The trap of the OUT to `port` that the guest is at, or has just left where KVM emulates the OUT:
    /// its address, and what it is.
    pub fn at(&self, rip: u64, port: u8) -> Option<(u64, Trap)> {
        candidates(rip).find_map(|at| {
            let trap = self.known.get(&at)?;
            (trap.kind.port() == port).then_some((at, *trap))
        })
    }

    /// Whether the guest's own code has an OUT there.
    pub fn is_own_out(&self, address: u64) -> bool {
        self.own_outs.contains(&address)
    }
}

/// Where the OUT may be that brought the guest out at `rip`.
pub(super) fn candidates(rip: u64) -> impl Iterator<Item = u64> {
    [rip, rip.wrapping_sub(SHORTEST as u64)].into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hindsight_kernel::Site;
    use hindsight_kernel::rewrite::modules::ModuleSite;
    use hindsight_kernel::rewrite::traps::{TRAP_CPUID, TRAP_RDTSC};

    const SITE: u64 = 0xffff_ffff_8100_1000;

    fn sites() -> Sites {
        let site = |address: u64, kind, length| Site {
            address,
            physical: address & 0xfff_ffff,
            length,
            kind,
        };
        Sites {
            sites: vec![
                site(SITE, SiteKind::Rdtsc, 2),
                site(SITE + 0x103, SiteKind::Rdtscp, 3),
            ],
            own_outs: vec![SITE + 0x40],
        }
    }

    #[test]
    fn a_trap_is_known_at_its_out_and_after_it_by_its_own_port() {
        let known = TrapSites::of_kernel(&sites(), &[]);
        for rip in [SITE, SITE + 2] {
            let (at, trap) = known.at(rip, TRAP_RDTSC).expect("a trap");
            assert_eq!((at, trap.kind, trap.length), (SITE, SiteKind::Rdtsc, 2));
            assert_eq!(known.at(rip, TRAP_CPUID), None);
        }
        assert!(known.at(SITE & 0xfff_ffff, TRAP_RDTSC).is_some());
        assert_eq!(known.at(SITE + 1, TRAP_RDTSC), None);
        assert!(known.is_own_out(SITE + 0x40) && !known.is_own_out(SITE));
    }

    #[test]
    fn an_alternative_takes_its_traps_along() {
        let patched = Alternative {
            entry: 0,
            length_offset: 0,
            address: SITE + 0x20,
            bytes: 6,
            replacement: SITE + 0x100,
            replacement_bytes: 6,
        };
        let known = TrapSites::of_kernel(&sites(), &[patched]);
        let port = SiteKind::Rdtscp.port();
        let (at, trap) = known.at(SITE + 0x23, port).expect("a copy of the trap");
        assert_eq!((at, trap.length), (SITE + 0x23, 3));
        assert!(known.at(SITE + 0x103, port).is_some());
    }

    #[test]
    fn a_module_that_takes_anothers_place_takes_its_traps_away() {
        let module = |at: u64, sites, own_outs| ModuleText {
            ranges: vec![at..at + 0x100, at + 0x1000..at + 0x1100],
            sites,
            own_outs,
            is_cut: false,
        };
        let at = 0xffff_ffff_c000_0000;
        let site = |address| ModuleSite {
            address,
            length: 2,
            kind: SiteKind::Rdtsc,
        };
        let mut known = TrapSites::of_kernel(&sites(), &[]);
        known.load_module(&module(at, vec![site(at), site(at + 0x1000)], vec![at + 8]));
        assert!(known.at(at, TRAP_RDTSC).is_some() && known.is_own_out(at + 8));
        known.load_module(&module(at, vec![site(at + 0x10)], vec![]));
        assert!(known.at(at, TRAP_RDTSC).is_none() && !known.is_own_out(at + 8));
        assert!(known.at(at + 0x1000, TRAP_RDTSC).is_none());
        assert!(known.at(at + 0x10, TRAP_RDTSC).is_some());
        assert!(known.at(SITE, TRAP_RDTSC).is_some(), "the kernel's stay");
    }
}
