//! The live world behind the door: when guest time follows the host and when it follows the rule,
//! and how long what is due may wait for the guest to exit.

use hindsight_devices::{FirstReads, Input, Nanos, Room};

use super::chaos::Chaos;
use super::closed::Closed;
use super::world::World;
use crate::machine::{
    Complete, Digest, End, Ending, FullDigest, Horizon, LeftOpen, Moment, Outside, Place, Position,
    TimeQuery, Turn, Unit,
};

/// Guest time may be this far from the host's before it is corrected. A smaller tolerance buys a
/// finer clock with a larger journal.
pub const TOLERANCE_NS: Nanos = 1_000_000;

/// How long a timer that is due, or an input, waits for the guest to exit by itself before it
/// preempts the guest. Most guests do exit, and an exit costs less than a preemption.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Patience {
    /// For so long that preemptions take a small share of the time on this host: one part in
    /// [`Patience::SHARE`] at most, but never shorter than [`Patience::SHORTEST_NS`] nor longer
    /// than [`Patience::LONGEST_NS`].
    #[default]
    Fair,
    /// This long.
    Fixed(Nanos),
    /// For ever.
    Endless,
}

impl Patience {
    /// One part in this number of the time may go into preemptions.
    pub const SHARE: u64 = 10;
    /// A guest that computes sees its timers this late at least.
    pub const SHORTEST_NS: Nanos = 1_000_000;
    /// And this late at most: less than a scheduler's time slice is meant to be.
    pub const LONGEST_NS: Nanos = 5_000_000;

    /// How long that is where a preemption costs `cost_ns`; `None`: for ever.
    fn ns(self, cost_ns: Nanos) -> Option<Nanos> {
        match self {
            Patience::Fair => Some(
                cost_ns
                    .saturating_mul(Patience::SHARE)
                    .clamp(Patience::SHORTEST_NS, Patience::LONGEST_NS),
            ),
            Patience::Fixed(ns) => Some(ns),
            Patience::Endless => None,
        }
    }
}

/// A guest that was to be stopped, for its panic or its time, and has not exited for this long is stopped where it is.
const STUCK_NS: Nanos = 1_000_000_000;
/// A preemption that has not come about after this long is tried again.
const RETRY_NS: Nanos = 10_000_000;
/// Each preemption's cost changes what the next is expected to cost by one part in this number.
const COST_INERTIA: u64 = 8;

/// The door to a live world. Alone it is what `run` uses; under a recorder, what `record` does.
#[derive(Debug)]
pub struct Live<W: World> {
    world: W,
    memory_every: Option<u64>,
    patience: Patience,
    /// Something has waited for longer than that: the host's time when this was noticed.
    overdue: Option<Nanos>,
    /// What a preemption is expected to cost.
    cost_ns: Nanos,
    chaos: Option<Chaos>,
    /// How long a guest that has panicked may run on; `None`: until it resets.
    panic_grace: Option<Nanos>,
    /// The guest time at which any guest is stopped.
    stops_at: Option<Nanos>,
    /// The guest has had its time.
    time_is_over: bool,
}

impl<W: World> Live<W> {
    /// A door to `world`, which asks for a memory digest every `memory_every` exits, if given.
    pub fn new(world: W, memory_every: Option<u64>) -> Live<W> {
        Live {
            world,
            memory_every,
            patience: Patience::default(),
            overdue: None,
            cost_ns: 0,
            chaos: None,
            panic_grace: None,
            stops_at: None,
            time_is_over: false,
        }
    }

    /// The same door, which stops the guest at its first exit at guest time `stops_at` or later.
    pub fn with_stop(self, stops_at: Option<Nanos>) -> Live<W> {
        Live { stops_at, ..self }
    }

    /// The same door, which stops a guest that has not reset itself so long after a panic.
    pub fn with_panic_grace(self, panic_grace: Option<Nanos>) -> Live<W> {
        Live {
            panic_grace,
            ..self
        }
    }

    /// The same door, which lets `chaos` meddle with the time.
    pub fn with_chaos(self, chaos: Option<Chaos>) -> Live<W> {
        Live { chaos, ..self }
    }

    /// The world, which another machine may be switched on in.
    pub fn into_world(self) -> W {
        self.world
    }

    /// The host's time, as the guest is to see it.
    fn now(&mut self) -> Nanos {
        let now = self.world.now();
        self.chaos.as_ref().map_or(now, |chaos| chaos.seen(now))
    }

    /// The same door, which has this much patience with a guest that does not exit.
    pub fn with_patience(self, patience: Patience) -> Live<W> {
        Live { patience, ..self }
    }

    /// The world.
    pub fn world(&mut self) -> &mut W {
        &mut self.world
    }
}

impl<W: World> Live<W> {
    /// The host's time at which the guest sees `at`.
    fn unseen(&self, at: Nanos) -> Nanos {
        self.chaos.as_ref().map_or(at, |chaos| chaos.unseen(at))
    }

    /// When the guest is to be stopped, if it has panicked then.
    fn time_ends(&self, panicked: Option<Nanos>) -> Option<Nanos> {
        let grace = panicked.zip(self.panic_grace);
        let grace_ends = grace.map(|(since, grace)| since.saturating_add(grace));
        [self.stops_at, grace_ends].into_iter().flatten().min()
    }

    /// When the patience with a guest that does not exit is at an end. A guest that has an interrupt
    /// pending and does not take it is not helped by another one.
    fn alarm_at(&self, position: &Position) -> Option<Nanos> {
        let due = position.deadline.filter(|_| !position.pending)?;
        Some(due.saturating_add(self.patience.ns(self.cost_ns)?))
    }

    /// A preemption was wanted from `since` on, and has come about at `place`.
    fn has_preempted(&mut self, since: Nanos, place: &Place) {
        if place.unit != Unit::Branches {
            // The guest was left to run on to its own next entry.
            return;
        }
        let cost_ns = self.world.now().saturating_sub(since);
        self.cost_ns -= self.cost_ns / COST_INERTIA;
        self.cost_ns += cost_ns.min(Patience::LONGEST_NS) / COST_INERTIA;
    }
}

impl<W: World> Outside for Live<W> {
    type Closed = Closed;

    fn time(&mut self, query: &TimeQuery) -> Result<Nanos, Closed> {
        let TimeQuery {
            earliest,
            rule,
            deadline,
            halted,
            room,
            preempted,
            panicked,
            ..
        } = *query;
        if let (Some(since), Some(place)) = (self.overdue.take(), preempted) {
            self.has_preempted(since, &place);
        }
        if let Some(chaos) = &mut self.chaos {
            chaos.meddle(query, self.world.now());
        }
        let time_ends = self.time_ends(panicked);
        let until = [deadline, time_ends].into_iter().flatten().min();
        let until = until.map(|due| self.unseen(due));
        if halted && !self.world.sleep(until, &room) {
            return Err(Closed::End(Ending::Halted));
        }
        let host = self.now();
        let due = deadline.is_some_and(|due| rule < due && due <= host);
        let follows_rule = if halted {
            deadline.is_some_and(|due| due <= host && host - due <= TOLERANCE_NS)
        } else {
            !due && host.abs_diff(rule) <= TOLERANCE_NS
        };
        let now = if follows_rule {
            rule
        } else {
            host.max(earliest)
        };
        self.time_is_over = time_ends.is_some_and(|end| end <= now);
        Ok(now)
    }

    fn wants_sites(&self) -> bool {
        self.chaos.is_some()
    }

    fn arrival(&mut self, _exits: u64, room: &Room) -> Result<Option<Input>, Closed> {
        if std::mem::take(&mut self.time_is_over) {
            return Ok(Some(Input::Stop));
        }
        Ok(self.world.poll(room))
    }

    fn first_reads(&mut self, _exits: u64, _reads: &FirstReads) -> Result<(), Closed> {
        Ok(())
    }

    fn send(&mut self, frame: &[u8]) {
        self.world.send(frame);
    }

    fn posted(&mut self, _exits: u64, _bytes: &[u8]) -> Result<(), Closed> {
        Ok(())
    }

    fn turn(&mut self, _exits: u64, _turn: &Turn, _digest: Digest) -> Result<(), Closed> {
        Ok(())
    }

    fn interrupt(&mut self, _at: &Moment, _vector: u8) -> Result<(), Closed> {
        Ok(())
    }

    fn wants_state(&mut self, exits: u64) -> bool {
        self.memory_every
            .is_some_and(|every| exits.is_multiple_of(every))
    }

    fn left_open(&mut self, _exits: u64, _what: LeftOpen) -> Result<(), Closed> {
        Ok(())
    }

    fn state(&mut self, _exits: u64, _digest: FullDigest) -> Result<(), Closed> {
        Ok(())
    }

    fn horizon(&mut self, position: &Position) -> Result<Horizon, Closed> {
        self.world.pass(Complete {
            exits: position.exits,
            now: position.now,
        });
        if self.overdue.is_some() {
            let again_at = self.world.now().saturating_add(RETRY_NS);
            self.world.alarm(Some(again_at));
            return Ok(Horizon::From(0));
        }
        let alarm = self.alarm_at(position).map(|at| self.unseen(at));
        self.world.alarm(alarm);
        Ok(match &mut self.chaos {
            Some(chaos) => chaos.horizon(position),
            None => Horizon::Exit,
        })
    }

    fn kicked(&mut self, position: &Position) -> Result<(), Closed> {
        if self.world.gives_up() {
            return Err(Closed::End(Ending::StoppedRunning));
        }
        let now = self.now();
        let time_ends = self.time_ends(position.panicked);
        if time_ends.is_some_and(|end| end.saturating_add(STUCK_NS) <= now) {
            return Err(Closed::End(Ending::StoppedRunning));
        }
        let late = [self.alarm_at(position), time_ends];
        let late = late.into_iter().flatten().any(|at| at <= now);
        let preempts = self.patience != Patience::Endless;
        if late || (preempts && self.world.input_waits(&position.room)) {
            self.overdue = self.overdue.or(Some(self.world.now()));
        }
        Ok(())
    }

    fn end(&mut self, _exits: u64, _end: &End) -> Result<(), Closed> {
        Ok(())
    }

    fn abandon(&mut self, _complete: Complete) -> Result<(), Closed> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::VcpuNumber;

    #[test]
    fn patience_grows_with_what_a_preemption_costs_and_has_its_bounds() {
        let fair = |cost_ns| Patience::Fair.ns(cost_ns);
        assert_eq!(fair(0), Some(Patience::SHORTEST_NS));
        assert_eq!(fair(200_000), Some(2_000_000));
        assert_eq!(fair(u64::MAX), Some(Patience::LONGEST_NS));
        assert_eq!(Patience::Fixed(0).ns(u64::MAX), Some(0));
        assert_eq!(Patience::Endless.ns(0), None);
    }

    /// A world whose clock stays where it is put.
    #[derive(Default)]
    struct Clock {
        now: Nanos,
        alarm: Option<Nanos>,
    }

    impl World for Clock {
        fn now(&mut self) -> Nanos {
            self.now
        }
        fn poll(&mut self, _room: &Room) -> Option<Input> {
            None
        }
        fn sleep(&mut self, until: Option<Nanos>, _room: &Room) -> bool {
            self.now = until.unwrap_or(self.now);
            until.is_some()
        }
        fn gives_up(&mut self) -> bool {
            false
        }
        fn alarm(&mut self, at: Option<Nanos>) {
            self.alarm = at;
        }
        fn input_waits(&mut self, _room: &Room) -> bool {
            false
        }
    }

    /// Preempts a guest that never exits `times` times, each of which takes `cost_ns`. Returns how
    /// long the last was waited with.
    fn waited(cost_ns: Nanos, unit: Unit, times: u64) -> Nanos {
        let mut live = Live::new(Clock::default(), None);
        let mut waited = 0;
        for exits in 0..times {
            let due = live.world.now;
            let position = Position {
                exits,
                vcpu: VcpuNumber::BOOT,
                rip: 0,
                now: due,
                deadline: Some(due),
                room: Room::default(),
                pending: false,
                panicked: None,
            };
            assert_eq!(live.horizon(&position).unwrap(), Horizon::Exit);
            let alarm = live.world.alarm.expect("what is due wakes somebody");
            waited = alarm - due;
            live.world.now = alarm - 1;
            live.kicked(&position).unwrap();
            assert_eq!(live.horizon(&position).unwrap(), Horizon::Exit, "too early");
            live.world.now = alarm;
            live.kicked(&position).unwrap();
            assert_eq!(live.horizon(&position).unwrap(), Horizon::From(0));
            assert!(live.world.alarm > Some(alarm), "it is tried again");
            live.world.now += cost_ns;
            let place = Place {
                unit,
                number: 1,
                rip: 0,
            };
            let query = TimeQuery {
                exits: exits + 1,
                vcpu: VcpuNumber::BOOT,
                complete: Complete { exits, now: due },
                earliest: due,
                rule: due,
                deadline: Some(due),
                halted: false,
                room: Room::default(),
                preempted: Some(place),
                site: None,
                panicked: None,
            };
            assert_eq!(live.time(&query).unwrap(), live.world.now);
        }
        waited
    }

    /// A machine that panicked at 1,000,000, and a door that stops it 5,000,000 later.
    fn panicked() -> (Live<Clock>, Position, TimeQuery) {
        let live = Live::new(Clock::default(), None)
            .with_patience(Patience::Endless)
            .with_panic_grace(Some(5_000_000));
        let position = Position {
            exits: 7,
            vcpu: VcpuNumber::BOOT,
            rip: 0,
            now: 1_000_000,
            deadline: None,
            room: Room::default(),
            pending: false,
            panicked: Some(1_000_000),
        };
        let query = TimeQuery {
            exits: 8,
            vcpu: VcpuNumber::BOOT,
            complete: Complete {
                exits: 7,
                now: 1_000_000,
            },
            earliest: 1_000_000,
            rule: 1_000_000,
            deadline: None,
            halted: false,
            room: Room::default(),
            preempted: None,
            site: None,
            panicked: Some(1_000_000),
        };
        (live, position, query)
    }

    #[test]
    fn a_guest_that_panicked_is_stopped_at_its_first_exit_after_its_grace() {
        let (mut live, _, query) = panicked();
        let mut stops_at = |now, query: &TimeQuery| {
            live.world.now = now;
            live.time(query).unwrap();
            live.arrival(query.exits, &query.room).unwrap()
        };
        assert_eq!(stops_at(4_000_000, &query), None);
        let well = TimeQuery {
            panicked: None,
            ..query
        };
        assert_eq!(stops_at(7_500_000, &well), None);
        assert_eq!(stops_at(7_500_000, &query), Some(Input::Stop));
        assert_eq!(stops_at(4_000_000, &query), None, "once is enough");
    }

    #[test]
    fn a_guest_that_halts_after_a_panic_is_woken_to_be_stopped() {
        for deadline in [None, Some(9_000_000)] {
            let (mut live, _, query) = panicked();
            let query = TimeQuery {
                halted: true,
                rule: deadline.unwrap_or(query.rule),
                deadline,
                ..query
            };
            assert_eq!(live.time(&query).unwrap(), 6_000_000);
            let stop = live.arrival(query.exits, &query.room).unwrap();
            assert_eq!(stop, Some(Input::Stop));
        }
    }

    #[test]
    fn a_guest_that_does_not_exit_after_a_panic_is_stopped_where_it_is() {
        let (mut live, position, _) = panicked();
        live.world.now = 6_000_000 + STUCK_NS - 1;
        live.kicked(&position).unwrap();
        live.world.now += 1;
        let closed = live.kicked(&position);
        assert!(matches!(closed, Err(Closed::End(Ending::StoppedRunning))));
    }

    #[test]
    fn a_guest_whose_time_is_limited_is_stopped_at_its_first_exit_after_it_or_where_it_is() {
        let (live, position, query) = panicked();
        let mut live = live.with_stop(Some(3_000_000));
        let (position, query) = (
            Position {
                panicked: None,
                ..position
            },
            TimeQuery {
                panicked: None,
                ..query
            },
        );
        for (now, stops) in [(2_999_999, None), (3_000_000, Some(Input::Stop))] {
            live.world.now = now;
            live.time(&query).unwrap();
            assert_eq!(live.arrival(query.exits, &query.room).unwrap(), stops);
        }
        live.world.now = 3_000_000 + STUCK_NS;
        let closed = live.kicked(&position);
        assert!(matches!(closed, Err(Closed::End(Ending::StoppedRunning))));
    }

    #[test]
    fn slow_preemptions_become_rare_and_quick_ones_do_not() {
        assert_eq!(waited(10_000, Unit::Branches, 100), Patience::SHORTEST_NS);
        let slow = waited(300_000, Unit::Branches, 100);
        assert!((2_900_000..=3_000_000).contains(&slow), "{slow}");
        let slower = waited(1 << 40, Unit::Branches, 100);
        assert_eq!(slower, Patience::LONGEST_NS);
        // How long the guest takes to its next entry is its own affair.
        assert_eq!(waited(1 << 40, Unit::Entries, 100), Patience::SHORTEST_NS);
    }
}
