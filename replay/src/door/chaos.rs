//! Chaos: bringing out races by moving interrupts about, within what real hardware could do.
//!
//! A host may stall a machine at any instruction, for a moment or for many (its own interrupts, a
//! hypervisor above it, a slow bus), and processors run faster and slower. So the guest may at any
//! time find that more time has passed than it computed in, and timers that are due; that is all
//! that chaos does. What makes it better than waiting is where it does so: most of a program's
//! running time goes by at few of its places, and most races are at others. Stalls happen at rare
//! places as often as at common ones.
//!
//! Everything that chaos changes is guest time and the places of preemptions, which are in the
//! journal: a replay knows nothing of it.

use std::collections::BTreeMap;

use hindsight_devices::Nanos;

use crate::machine::{Guest, Horizon, Observer, Position, TimeQuery, Turn, Unit};
use crate::rng::Rng;

/// A stall is at most this long, unless the next timer is further away. Two or three time slices
/// of a scheduler.
const STALL_MAX_NS: Nanos = 12_000_000;
/// One in this number of the first visits of a place stalls; later ones stall more rarely.
const SHARE: u64 = 2;
/// From this number of visits on, a place is a common one.
const COMMON: u64 = 8;
/// One turn in this number ends at a counted place instead of an exit, where there is a counter.
const PREEMPTED_ONE_IN: u64 = 8;
/// The longest stretch before such a place is two to this power.
const BRANCHES_BITS: u64 = 21;
const ENTRIES_BITS: u64 = 5;

/// How often a guest's programs were at each place. One that looks on at a replay knows what is common there when the
/// machine goes on with chaos.
#[derive(Clone, Debug, Default)]
pub struct Visits(BTreeMap<u64, u64>);

impl Visits {
    /// One more; how many there are now.
    fn count(&mut self, site: u64) -> u64 {
        let visits = self.0.entry(site).or_insert(0);
        *visits += 1;
        *visits
    }
}

impl Observer for Visits {
    fn turn(&mut self, _exits: u64, _turn: &Turn, guest: &mut dyn Guest) {
        if let Some(site) = guest.site() {
            self.count(site);
        }
    }
}

/// A source of trouble, made of a seed.
#[derive(Debug)]
pub struct Chaos {
    rng: Rng,
    preempts: Option<Unit>,
    /// How far the guest's time is ahead of the host's.
    ahead_ns: Nanos,
    visits: Visits,
    /// The horizon drawn for the turn after this exit.
    drawn: Option<(u64, Horizon)>,
}

impl Chaos {
    /// The chaos of a seed; `preempts` says what is counted if the vCPU can be stopped between exits.
    pub fn new(seed: u64, preempts: Option<Unit>) -> Chaos {
        Chaos {
            rng: Rng::new(seed, 20),
            preempts,
            ahead_ns: 0,
            visits: Visits::default(),
            drawn: None,
        }
    }

    /// The same, for a guest whose programs were at some places before.
    pub fn after(self, visits: Visits) -> Chaos {
        Chaos { visits, ..self }
    }

    /// The time the guest sees when the host's is `now`.
    pub fn seen(&self, now: Nanos) -> Nanos {
        now.saturating_add(self.ahead_ns)
    }

    /// The host's time when the guest sees `now`.
    pub fn unseen(&self, now: Nanos) -> Nanos {
        now.saturating_sub(self.ahead_ns)
    }

    /// Perhaps stalls the guest here.
    pub fn meddle(&mut self, query: &TimeQuery, host: Nanos) {
        if query.halted || !self.stalls(query) {
            return;
        }
        let now = self.seen(host).max(query.rule);
        let stall_ns = self.rng.below(STALL_MAX_NS);
        let until = query.deadline.unwrap_or(0).max(now + stall_ns);
        self.ahead_ns += until.saturating_sub(self.seen(host));
    }

    /// Whether the guest is stalled at this exit. What works for no program is left alone: it is
    /// the kernel's start, and its idle loop.
    fn stalls(&mut self, query: &TimeQuery) -> bool {
        let Some(site) = query.site else {
            return false;
        };
        let share = SHARE * (1 + self.visits.count(site) / COMMON).pow(2);
        self.rng.one_in(share)
    }

    /// How far the guest may run after this exit.
    pub fn horizon(&mut self, position: &Position) -> Horizon {
        let Some(unit) = self.preempts else {
            return Horizon::Exit;
        };
        if position.pending || position.deadline.is_none() {
            return Horizon::Exit;
        }
        match self.drawn {
            Some((exits, horizon)) if exits == position.exits => horizon,
            _ => {
                let horizon = if self.rng.one_in(PREEMPTED_ONE_IN) {
                    let bits = self.rng.below(match unit {
                        Unit::Branches => BRANCHES_BITS,
                        Unit::Entries => ENTRIES_BITS,
                    });
                    Horizon::From(self.rng.below(2 << bits))
                } else {
                    Horizon::Exit
                };
                self.drawn = Some((position.exits, horizon));
                horizon
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Complete;

    fn query(site: Option<u64>, deadline: Option<Nanos>) -> TimeQuery {
        TimeQuery {
            exits: 1,
            vcpu: crate::machine::VcpuNumber::BOOT,
            complete: Complete::default(),
            earliest: 0,
            rule: 0,
            deadline,
            halted: false,
            room: hindsight_devices::Room::default(),
            preempted: None,
            site,
            panicked: None,
        }
    }

    #[test]
    fn a_rare_place_is_stalled_at_almost_as_often_as_a_common_one() {
        let mut stalls = [0; 2];
        for seed in 0..200 {
            let mut chaos = Chaos::new(seed, None);
            for visit in 0..10_000 {
                // One visit in a thousand is to the rare place.
                let rare = visit % 1_000 == 0;
                stalls[usize::from(rare)] +=
                    u32::from(chaos.stalls(&query(Some(rare.into()), None)));
            }
        }
        let [common, rare] = stalls;
        assert!(rare > 200 && common < 8 * rare, "{common} and {rare}");
    }

    #[test]
    fn a_place_that_was_common_before_is_common_to_chaos_that_begins_later() {
        let mut stalls = [0, 0];
        for seed in 0..200 {
            let mut visits = Visits::default();
            for _ in 0..1_000 {
                visits.count(0);
            }
            let mut chaos = Chaos::new(seed, None).after(visits);
            for (site, stalls) in stalls.iter_mut().enumerate() {
                *stalls += u32::from(chaos.stalls(&query(Some(site as u64), None)));
            }
        }
        let [common, rare] = stalls;
        assert!(common < 5 && rare > 70, "{common} and {rare}");
    }

    #[test]
    fn a_stall_ends_when_a_timer_is_due_and_the_guest_keeps_the_time_it_has_seen() {
        let mut chaos = Chaos::new(3, None);
        let mut ahead = 0;
        for round in 0..1_000 {
            let host = round * 1_000;
            let due = chaos.seen(host) + 40_000_000;
            chaos.meddle(&query(Some(round), Some(due)), host);
            assert!(chaos.ahead_ns >= ahead, "time ran backwards");
            if chaos.ahead_ns > ahead {
                assert!(chaos.seen(host) >= due);
            }
            ahead = chaos.ahead_ns;
        }
        assert!(ahead > 0, "a thousand new places and no stall");
    }

    #[test]
    fn nothing_happens_to_a_guest_that_runs_no_program() {
        let mut chaos = Chaos::new(1, None);
        for host in 0..1_000 {
            chaos.meddle(&query(None, Some(1 << 40)), host);
        }
        assert_eq!(chaos.ahead_ns, 0);
    }
}
