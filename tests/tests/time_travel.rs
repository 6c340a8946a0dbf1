//! The law of travel: wherever a machine comes from, at an exit it is what a straight replay is there. Held to for each
//! guest that the simulation has, with checkpoints wherever they fall, and with a store that loses them.
//!
//! `HINDSIGHT_SIM_SEEDS` and `HINDSIGHT_SIM_SEED` work as in `simulation.rs`.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::Cursor;

use hindsight_replay::rng::Rng;
use hindsight_replay::{
    Arrival, CheckpointHead, Checkpoints, Closed, Pace, Pause, Replayer, RunError, StateOf, Target,
    Timeline,
};
use hindsight_tests::recorded::{Driver, Recorded, Toy};
use hindsight_tests::sim::machine_of;
use hindsight_tests::toy_store::ToyStore;

fn for_seeds(share: u64, check: impl Fn(u64)) {
    hindsight_tests::seeds::for_seeds("time_travel", 10_000, share, check);
}

type State<R> = StateOf<<R as Recorded>::Cpu, <R as Recorded>::Disks>;
type Store<R> = ToyStore<
    <<R as Recorded>::Cpu as hindsight_replay::Stateful>::State,
    <<R as Recorded>::Disks as hindsight_replay::Stateful>::State,
>;

/// Checkpoints and stops at random.
struct Random(Rng);

impl Pace for Random {
    fn exits(&self) -> u64 {
        3
    }

    fn look(&mut self, _: CheckpointHead) -> Pause {
        match self.0.below(8) {
            0 | 1 => Pause::Checkpoint,
            2 if self.0.one_in(8) => Pause::Stop,
            _ => Pause::GoOn,
        }
    }
}

/// The states of a straight replay at `exits`, and guest time at each exit.
fn straight<R: Recorded>(recorded: &R, exits: &[u64]) -> (BTreeMap<u64, State<R>>, Vec<u64>) {
    let (mut machine, mut cpu) = (machine_of(recorded.header()), recorded.cpu(1));
    let mut disks = recorded.disks();
    let mut door = Replayer::new(recorded.reader(), None, None);
    let (mut states, mut times) = (BTreeMap::new(), Vec::new());
    for exit in 0..recorded.exits() {
        door.close_after(Some(exit));
        let result = machine.run(&mut cpu, &mut disks, &mut door, &mut ());
        assert!(matches!(result, Err(RunError::Closed(Closed::Reached(_)))));
        times.push(machine.now());
        if exits.contains(&exit) {
            let state = machine.save(&mut cpu, &mut disks, &door);
            states.insert(exit, state.expect("it is at an exit"));
        }
    }
    (states, times)
}

fn travels_right<R: Recorded>(recorded: &R, seed: u64)
where
    <R::Cpu as hindsight_replay::Stateful>::State: Clone,
{
    let mut rng = Rng::new(seed, 41);
    let wanted: Vec<u64> = (0..8).map(|_| recorded.place(&mut rng)).collect();
    let (states, times) = straight(recorded, &wanted);
    let noise = rng.one_in(3).then_some(seed);
    let store: Store<R> = ToyStore::new(noise);
    let mut hosts = 2;
    let make = || {
        hosts += 1;
        let machine = machine_of(recorded.header());
        Ok::<_, Infallible>((machine, recorded.cpu(hosts), recorded.disks()))
    };
    let mut timeline: Timeline<_, _, Cursor<&[u8]>, _, _> =
        Timeline::new(recorded.reader(), store, make);
    let mut pace = Random(Rng::new(seed, 42));
    for _ in 0..16 {
        let exit = wanted[rng.below(wanted.len() as u64) as usize];
        let (target, expected) = match rng.below(8) {
            0 => (Target::End, None),
            1 => {
                let time = times[exit as usize];
                let first = times.iter().take_while(|at| **at < time).count();
                (Target::Time(time), Some(first as u64))
            }
            _ => (Target::Exit(exit), Some(exit)),
        };
        let arrival = loop {
            let arrival = timeline.go_to(target, &mut pace, &mut ());
            match arrival.unwrap_or_else(|error| panic!("to {target:?}: {error}")) {
                Arrival::Stopped => {}
                arrival => break arrival,
            }
        };
        match (arrival, expected) {
            (Arrival::Ended(end), None) => assert_eq!(end, *recorded.end()),
            (Arrival::Reached, Some(expected)) => {
                let (machine, _, _) = timeline.parts().expect("it is somewhere");
                assert_eq!(machine.at().exits, expected);
                if let Some(straight) = states.get(&expected) {
                    let here = timeline.save().expect("it is somewhere");
                    let here = here.expect("it is at an exit");
                    let differences = here.digest().differences(&straight.digest());
                    assert!(differences.is_empty(), "at {expected}: {differences:?}");
                    assert!(here == *straight, "at exit {expected}");
                }
            }
            (arrival, _) => panic!("to {target:?}: {arrival:?}"),
        }
        assert!(noise.is_some() || timeline.take_complaints().is_empty());
    }
    let heads = timeline.store().heads();
    assert!(heads.is_sorted_by(|a, b| a.exits < b.exits));
    assert!(recorded.exits() < 200 || noise.is_some() || !heads.is_empty());
}

#[test]
fn a_machine_that_travels_is_everywhere_what_a_straight_replay_is() {
    for_seeds(1, |seed| {
        let toy = Toy::record(seed);
        if toy.exits() > 2 {
            travels_right(&toy, seed);
        }
    });
}

#[test]
fn a_machine_with_disks_that_travels_is_everywhere_what_a_straight_replay_is() {
    for_seeds(10, |seed| travels_right(&Driver::record(seed), seed));
}
