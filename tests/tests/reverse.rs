//! The law of going back: wherever a guest is gone to by stops and steps, forwards and backwards, the next stop on either
//! side is the one that a straight replay comes to, and from wherever it is it runs on to the recorded end. Diversions on
//! the way, in which anything is written and done, change nothing of that.
//!
//! `HINDSIGHT_SIM_SEEDS` and `HINDSIGHT_SIM_SEED` work as in `simulation.rs`.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::Cursor;

use hindsight_devices::NoDisks;
use hindsight_replay::rng::Rng;
use hindsight_replay::{
    CheckpointHead, Closed, Cpu, JournalReader, Machine, Pace, Pause, Registers, Replayer, Reverse,
    RunError, StateOf, Stopped, Target, Timeline,
};
use hindsight_tests::recorded::{Recorded, Toy};
use hindsight_tests::sim::machine_of;
use hindsight_tests::toy_cpu::{ToyCpu, ToyState};
use hindsight_tests::toy_debug::{ToyHit, ToyStops};
use hindsight_tests::toy_store::ToyStore;

/// Somewhere that the guest can be.
#[derive(Clone, Copy, Debug)]
struct Spot {
    /// The last exit.
    exit: u64,
    registers: Registers,
    /// It is about to execute an instruction, and not at an exit at which something else comes first.
    executes: bool,
    /// What the instruction before has stored.
    stored: Option<u64>,
}

/// All that a straight replay comes to.
struct Straight {
    spots: Vec<Spot>,
    /// The spots at which the exits are.
    exits: Vec<usize>,
    states: BTreeMap<u64, StateOf<ToyCpu, NoDisks>>,
    /// Guest time at each exit.
    times: Vec<u64>,
}

fn straight(toy: &Toy, seed: u64) -> Straight {
    let mut rng = Rng::new(seed, 50);
    let saved: Vec<u64> = (0..8).map(|_| toy.place(&mut rng)).collect();
    let (mut machine, mut cpu) = (machine_of(toy.header()), toy.cpu(1).watched());
    let mut door = Replayer::new(toy.reader(), None, None);
    let mut straight = Straight {
        spots: Vec::new(),
        exits: Vec::new(),
        states: BTreeMap::new(),
        times: Vec::new(),
    };
    for exit in 0.. {
        door.close_after(Some(exit));
        let result = machine.run(&mut cpu, &mut NoDisks, &mut door, &mut ());
        straight.come_to(exit, &mut cpu);
        match result {
            Err(RunError::Closed(Closed::Reached(_))) => {}
            Ok(end) => {
                assert_eq!(end, *toy.end());
                break;
            }
            other => panic!("{other:?}"),
        }
        cpu.settle().expect("the host works");
        straight.exits.push(straight.spots.len());
        straight.spots.push(Spot {
            exit,
            registers: cpu.registers(),
            executes: false,
            stored: None,
        });
        straight.times.push(machine.now());
        if saved.contains(&exit) {
            let state = machine.save(&mut cpu, &mut NoDisks, &door);
            (straight.states).insert(exit, state.expect("it is at an exit"));
        }
    }
    straight
}

impl Straight {
    /// Takes what the guest came to on its way to `exit`.
    fn come_to(&mut self, exit: u64, cpu: &mut ToyCpu) {
        for coming in cpu.take_seen() {
            let spot = Spot {
                exit: exit - 1,
                registers: coming.registers,
                executes: true,
                stored: coming.stored,
            };
            match self.spots.last_mut() {
                // The first instruction after an exit is at the exit.
                Some(at) if !at.executes && at.registers == spot.registers => *at = spot,
                _ => self.spots.push(spot),
            }
        }
    }

    /// Whether it goes round in a loop in which nothing changes. There, one place is like the other.
    fn spins(&self) -> bool {
        let executes = |pair: &[Spot]| pair.iter().all(|spot| spot.executes);
        let mut pairs = self.spots.windows(2).filter(|pair| executes(pair));
        pairs.any(|pair| pair[0].registers == pair[1].registers)
    }

    fn is_hit(&self, spot: usize, stops: &ToyStops) -> Option<ToyHit> {
        let spot = self.spots.get(spot)?;
        let rip = spot.registers.rip();
        let data = spot.stored.filter(|word| stops.data.contains(word));
        match data.map(ToyHit::Data) {
            _ if !spot.executes => None,
            None if stops.execution.contains(&rip) => Some(ToyHit::Execution(rip)),
            hit => hit,
        }
    }

    /// Addresses and words that are come to and stored, some of them often.
    fn stops(&self, rng: &mut Rng) -> ToyStops {
        let mut stops = ToyStops::default();
        for _ in 0..1 + rng.below(3) {
            let spot = self.spots[rng.below(self.spots.len() as u64) as usize];
            stops.execution.push(spot.registers.rip());
        }
        let stored: Vec<u64> = self.spots.iter().filter_map(|spot| spot.stored).collect();
        if !stored.is_empty() && rng.one_in(2) {
            for _ in 0..1 + rng.below(3) {
                stops
                    .data
                    .push(stored[rng.below(stored.len() as u64) as usize]);
            }
        }
        if !stops.data.is_empty() && rng.one_in(2) {
            stops.execution.clear();
        }
        stops
    }
}

/// Makes checkpoints, and stops, at random.
struct Random {
    rng: Rng,
    stops: bool,
}

impl Pace for Random {
    fn exits(&self) -> u64 {
        5
    }

    fn look(&mut self, _: CheckpointHead) -> Pause {
        match self.rng.below(16) {
            0 => Pause::Checkpoint { cost: 0 },
            1 if self.stops => Pause::Stop,
            2 => Pause::Keep,
            _ => Pause::GoOn,
        }
    }
}

/// Neither.
struct Calm;

impl Pace for Calm {
    fn exits(&self) -> u64 {
        100
    }

    fn look(&mut self, _: CheckpointHead) -> Pause {
        Pause::GoOn
    }
}

type Make<'a> = Box<dyn FnMut() -> Result<(Machine, ToyCpu, NoDisks), Infallible> + 'a>;
type Replay<'a> = Reverse<ToyCpu, NoDisks, Cursor<&'a [u8]>, ToyStore<ToyState, ()>, Make<'a>>;

/// A replay, and where a straight one would be.
struct Walker<'a> {
    straight: &'a Straight,
    replay: Replay<'a>,
    /// Which spot it is at; after the last: the end.
    at: usize,
    /// Where it was before its last steps.
    steps: Vec<usize>,
    pace: Random,
}

impl Walker<'_> {
    fn end(&self) -> usize {
        self.straight.spots.len()
    }

    /// It must be at this spot.
    fn is_at(&mut self, spot: usize, what: &str) {
        self.at = spot;
        if spot == self.end() {
            assert!(
                self.replay.ended().is_some(),
                "{what}: it is not at the end"
            );
            return;
        }
        let expected = self.straight.spots[spot];
        let registers = self.replay.registers().expect("the host works");
        let mut found = self.straight.spots.iter();
        let found = found.position(|spot| spot.registers == registers);
        assert!(
            registers == expected.registers && self.replay.ended().is_none(),
            "{what}: it is not at spot {spot} after exit {} but at {found:?} after exit {} of {}",
            expected.exit,
            self.replay.exit(),
            self.end(),
        );
        if self.replay.is_at_exit()
            && let Some(state) = self.straight.states.get(&self.replay.exit())
        {
            let here = self.replay.save().expect("it is at an exit");
            let differences = here.digest().differences(&state.digest());
            assert!(differences.is_empty(), "{what}: {differences:?}");
            assert!(here == *state, "{what}");
        }
    }

    /// It was stopped on its way forwards: it is at an exit.
    fn is_at_some_exit(&mut self, what: &str) {
        assert!(self.replay.is_at_exit(), "{what}");
        let spot = self.straight.exits[self.replay.exit() as usize];
        assert!(spot >= self.at, "{what}: it went back");
        self.is_at(spot, what);
    }

    /// Writes something, goes on from there, and mostly does so again. What comes next ends it.
    fn divert(&mut self, rng: &mut Rng, stops: &ToyStops) {
        if self.at == self.end() {
            assert!(self.replay.divert(false).is_err(), "it is the end");
            return;
        }
        let exit = self.replay.exit();
        // What was written may have left a guest that waits for ever.
        let stops_at_exits = std::mem::replace(&mut self.pace.stops, true);
        for _ in 0..1 + rng.below(4) {
            let cpu = self.replay.divert(rng.one_in(2));
            cpu.expect("the host works").scribble(rng);
            assert_eq!(self.replay.diversion(), Some(exit));
            for _ in 0..rng.below(4) {
                let stopped = match rng.below(3) {
                    0 => self.replay.resume(stops, &mut self.pace),
                    _ => self.replay.step(&mut self.pace),
                };
                stopped.unwrap_or_else(|error| panic!("in a diversion: {error}"));
                assert!(
                    self.replay.save().is_err(),
                    "it is no state of the recording"
                );
            }
            if self.replay.ended().is_some() {
                break;
            }
        }
        self.pace.stops = stops_at_exits;
        match rng.below(3) {
            0 => {
                let ended = self.replay.end_diversion();
                ended.unwrap_or_else(|error| panic!("back from a diversion: {error}"));
                self.is_at(self.at, "after a diversion");
            }
            1 => self.reverse_step(),
            _ if rng.one_in(2) => self.reverse_resume(stops),
            _ => self.seek(rng),
        }
        assert_eq!(self.replay.diversion(), None);
    }

    fn seek(&mut self, rng: &mut Rng) {
        let exit = rng.below(self.straight.exits.len() as u64);
        let (target, spot) = match rng.below(8) {
            0 => (Target::End, self.end()),
            1 => {
                let time = self.straight.times[exit as usize];
                let times = self.straight.times.iter();
                let first = times.take_while(|at| **at < time).count();
                (Target::Time(time), self.straight.exits[first])
            }
            _ => (Target::Exit(exit), self.straight.exits[exit as usize]),
        };
        let stopped = self.replay.go_to(target, &mut self.pace);
        self.steps.clear();
        match stopped.unwrap_or_else(|error| panic!("to {target:?}: {error}")) {
            Stopped::Interrupted if self.pace.stops => {
                self.at = 0;
                self.is_at_some_exit("a way that was stopped");
            }
            Stopped::Interrupted | Stopped::End(_) => self.is_at(spot, "a way to a target"),
            other => panic!("to {target:?}: {other:?}"),
        }
    }

    fn resume(&mut self, stops: &ToyStops) {
        // At an exit it has not come to its instruction yet; and what it has stored before that has been forgotten.
        let spot = self.straight.spots.get(self.at);
        let at_exit = spot.is_some_and(|spot| {
            spot.executes && (self.replay.is_at_exit() || spot.exit != self.replay.exit())
        });
        let execution = ToyStops {
            execution: stops.execution.clone(),
            ..ToyStops::default()
        };
        let here = self.straight.is_hit(self.at, &execution);
        let here = here.filter(|_| at_exit).map(|hit| (self.at, hit));
        let mut after = (self.at + 1).min(self.end())..self.end();
        let hit = here
            .or_else(|| after.find_map(|spot| Some((spot, self.straight.is_hit(spot, stops)?))));
        let stopped = self.replay.resume(stops, &mut self.pace);
        self.steps.clear();
        match stopped.unwrap_or_else(|error| panic!("resuming: {error}")) {
            Stopped::Interrupted if self.pace.stops => self.is_at_some_exit("resuming"),
            Stopped::End(_) => {
                assert_eq!(hit, None, "it ran past a stop");
                self.is_at(self.end(), "resuming");
            }
            Stopped::Hit(found) => {
                let (spot, hit) = hit.unwrap_or_else(|| panic!("no stop before the end"));
                assert_eq!(found, hit);
                let exit = self.straight.spots[spot].exit;
                if self.replay.exit() + 1 == exit && matches!(found, ToyHit::Data(_)) {
                    // It was preempted right after the store, perhaps for an interrupt: that is seen at the exit.
                    let target = Target::Exit(exit);
                    let stopped = self.replay.go_to(target, &mut Calm);
                    assert_eq!(stopped.expect("it replays"), Stopped::Interrupted);
                }
                self.is_at(spot, &format!("resuming to {stops:?}"));
            }
            other => panic!("resuming: {other:?}"),
        }
    }

    fn step(&mut self) {
        let from = self.at;
        let mut after = (self.at + 1).min(self.end())..self.end();
        let next = after.find(|spot| self.straight.spots[*spot].executes);
        let stopped = self.replay.step(&mut self.pace);
        match stopped.unwrap_or_else(|error| panic!("stepping: {error}")) {
            Stopped::Interrupted if self.pace.stops => {
                self.steps.clear();
                self.is_at_some_exit("stepping");
            }
            Stopped::End(_) => {
                let passed = self.straight.spots.get(from..).unwrap_or_default();
                assert_eq!(next, None, "from {from} it stepped past one of {passed:x?}");
                if from != self.end() {
                    self.steps.push(from);
                }
                self.is_at(self.end(), "stepping");
            }
            Stopped::Hit(ToyHit::Step) => {
                let next = next.unwrap_or_else(|| panic!("there is no instruction"));
                self.steps.push(from);
                self.is_at(next, "stepping");
            }
            other => panic!("stepping: {other:?}"),
        }
    }

    fn reverse_step(&mut self) {
        let mut before = self.steps.last().copied().or(self.at.checked_sub(1));
        if self.steps.is_empty() && self.at == self.end() {
            // Nothing has run since an exit at which the recording ends.
            let last = self.straight.spots[self.end() - 1];
            if !last.executes && last.exit == self.replay.exit() {
                before = before.and_then(|before| before.checked_sub(1));
            }
        }
        let stopped = self.replay.reverse_step(&mut self.pace);
        match stopped.unwrap_or_else(|error| panic!("stepping back from {}: {error}", self.at)) {
            Stopped::Interrupted if self.pace.stops => self.is_at(self.at, "a step back, stopped"),
            Stopped::Begin => assert_eq!(before, None),
            Stopped::Hit(ToyHit::Step) => {
                self.steps.pop();
                let what = format!("a step back from {}", self.at);
                self.is_at(before.expect("it is after the first"), &what);
            }
            other => panic!("stepping back: {other:?}"),
        }
    }

    fn reverse_resume(&mut self, stops: &ToyStops) {
        // A store is before the spot after it.
        let is_hit = |spot: &usize| match self.straight.is_hit(*spot, stops) {
            Some(ToyHit::Data(_)) => true,
            Some(_) => *spot < self.at,
            None => false,
        };
        let hit = (0..=self.at.min(self.end() - 1)).rev().find(is_hit);
        let from = self.at;
        let stopped = self.replay.reverse_resume(stops, &mut self.pace);
        self.steps.clear();
        match stopped.unwrap_or_else(|error| panic!("back from {from}: {error}")) {
            Stopped::Interrupted if self.pace.stops => self.is_at(from, "back, stopped"),
            Stopped::Begin => {
                assert_eq!(hit, None, "it went past a stop, from {from}");
                self.is_at(0, "back to the beginning");
            }
            Stopped::Hit(found) => {
                let hit = hit.unwrap_or_else(|| panic!("{found:?} is not before {from}"));
                assert_eq!(Some(found), self.straight.is_hit(hit, stops), "from {from}");
                let is_data = matches!(found, ToyHit::Data(_));
                let what = format!("back from {from} to {stops:?}");
                self.is_at(hit - usize::from(is_data), &what);
            }
            other => panic!("back from {from}: {other:?}"),
        }
    }
}

fn goes_both_ways(toy: &Toy, seed: u64) {
    let straight = straight(toy, seed);
    if straight.spins() {
        return;
    }
    let mut hosts = 2;
    let make: Make<'_> = Box::new(move || {
        hosts += 1;
        Ok((machine_of(toy.header()), toy.cpu(hosts), toy.disks()))
    });
    let reader: JournalReader<Cursor<&[u8]>> = toy.reader();
    // Now and then it loses what it is to keep.
    let store = ToyStore::new(seed.is_multiple_of(3).then_some(seed));
    let replay = Reverse::new(Timeline::new(reader, store, make)).expect("it is made");
    let mut walker = Walker {
        straight: &straight,
        replay,
        at: 0,
        steps: Vec::new(),
        pace: Random {
            rng: Rng::new(seed, 51),
            stops: false,
        },
    };
    let mut rng = Rng::new(seed, 52);
    let mut stops = straight.stops(&mut rng);
    for _ in 0..40 {
        walker.pace.stops = rng.one_in(5);
        if rng.one_in(5) {
            stops = straight.stops(&mut rng);
        }
        match rng.below(14) {
            12.. => walker.divert(&mut rng, &stops),
            0 | 1 => walker.seek(&mut rng),
            2 | 3 => walker.resume(&stops),
            4..6 => walker.reverse_resume(&stops),
            6..8 => walker.reverse_step(),
            8..10 => walker.step(),
            _ => {
                // As many steps back as forwards.
                walker.pace.stops = false;
                let (from, before) = (walker.at, walker.steps.len());
                for _ in 0..rng.below(12) {
                    walker.step();
                }
                while walker.steps.len() > before {
                    walker.reverse_step();
                }
                assert_eq!(walker.at, from);
            }
        }
    }
    walker.pace.stops = false;
    let stopped = walker.replay.resume(&ToyStops::default(), &mut walker.pace);
    let stopped = stopped.unwrap_or_else(|error| panic!("to the end: {error}"));
    assert_eq!(stopped, Stopped::End(toy.end().to_string()));
}

#[test]
fn a_guest_that_is_debugged_comes_to_each_stop_and_step_of_a_straight_replay_in_both_directions() {
    hindsight_tests::seeds::for_seeds("reverse", 10_000, 4, |seed| {
        let toy = Toy::record(seed);
        if toy.exits() > 2 {
            goes_both_ways(&toy, seed);
        }
    });
}
