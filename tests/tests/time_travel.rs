//! The law of travel: wherever a machine comes from, at an exit it is what a straight replay is there. Held to for each
//! guest that the simulation has, with checkpoints wherever they fall, and with a store that loses them.
//!
//! `HINDSIGHT_SIM_SEEDS` and `HINDSIGHT_SIM_SEED` work as in `simulation.rs`.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::Cursor;

use hindsight_devices::{Nanos, Output};
use hindsight_replay::rng::Rng;
use hindsight_replay::{
    Arrival, CheckpointHead, Checkpoints, Closed, Exit, Guest, Observer, Pace, Pause, Replayer,
    RunError, StateOf, Stateful, Stretch, Target, Timeline, Turn,
};
use hindsight_tests::damage::damage;
use hindsight_tests::recorded::{Driver, Recorded, Toy};
use hindsight_tests::sim::machine_of;
use hindsight_tests::toy_store::ToyStore;
use hindsight_vmm::session::{CheckpointFile, PageLimit};

fn for_seeds(share: u64, check: impl Fn(u64)) {
    hindsight_tests::seeds::for_seeds("time_travel", 10_000, share, check);
}

type State<R> = StateOf<<R as Recorded>::Cpu, <R as Recorded>::Disks>;
type CpuState<R> = <<R as Recorded>::Cpu as Stateful>::State;
type DisksState<R> = <<R as Recorded>::Disks as Stateful>::State;

/// Checkpoints and stops at random.
struct Random(Rng);

impl Pace for Random {
    fn exits(&self) -> u64 {
        3
    }

    fn look(&mut self, _: CheckpointHead) -> Pause {
        match self.0.below(8) {
            0 | 1 => Pause::Checkpoint { cost: 1 },
            2 if self.0.one_in(8) => Pause::Stop,
            _ => Pause::GoOn,
        }
    }
}

/// The states of a straight replay at some exits, guest time at each, and the exits that an observer sees.
fn straight<R: Recorded>(recorded: &R, seed: u64) -> Straight<R> {
    let mut rng = Rng::new(seed, 40);
    let exits: Vec<u64> = (0..8).map(|_| recorded.place(&mut rng)).collect();
    let (mut machine, mut cpu) = (machine_of(recorded.header()), recorded.cpu(1));
    let mut disks = recorded.disks();
    let mut door = Replayer::new(recorded.reader(), None, None);
    let (mut states, mut times) = (BTreeMap::new(), Vec::new());
    let mut seen = Seen::default();
    for exit in 0..recorded.exits() {
        door.close_after(Some(exit));
        let result = machine.run(&mut cpu, &mut disks, &mut door, &mut seen);
        assert!(matches!(result, Err(RunError::Closed(Closed::Reached(_)))));
        times.push(machine.now());
        if exits.contains(&exit) {
            let state = machine.save(&mut cpu, &mut disks, &door);
            states.insert(exit, state.expect("it is at an exit"));
        }
    }
    door.close_after(None);
    let ended = machine.run(&mut cpu, &mut disks, &mut door, &mut seen);
    assert_eq!(ended.expect("it ends"), *recorded.end());
    Straight {
        states,
        times,
        seen,
    }
}

/// A straight replay's states at some exits, its times, and what an observer sees.
struct Straight<R: Recorded> {
    states: BTreeMap<u64, State<R>>,
    times: Vec<u64>,
    seen: Seen,
}

/// Travels about in `recorded`, and compares. Returns how often checkpoints were complained of, and the store.
fn travel<R: Recorded, K: Checkpoints<CpuState<R>, DisksState<R>> + std::fmt::Debug>(
    recorded: &R,
    straight: &Straight<R>,
    store: K,
    seed: u64,
) -> (usize, K) {
    let mut rng = Rng::new(seed, 41);
    let wanted: Vec<u64> = straight.states.keys().copied().collect();
    let mut hosts = 2;
    let make = || {
        hosts += 1;
        let machine = machine_of(recorded.header());
        Ok::<_, Infallible>((machine, recorded.cpu(hosts), recorded.disks()))
    };
    let mut timeline: Timeline<_, _, Cursor<&[u8]>, _, _> =
        Timeline::new(recorded.reader(), store, make);
    let mut pace = Random(Rng::new(seed, 42));
    let mut complaints = 0;
    for _ in 0..16 {
        let exit = wanted[rng.below(wanted.len() as u64) as usize];
        let (target, expected) = match rng.below(8) {
            0 => (Target::End, None),
            1 => {
                let time = straight.times[exit as usize];
                let first = straight.times.iter().take_while(|at| **at < time).count();
                (Target::Time(time), Some(first as u64))
            }
            _ => (Target::Exit(exit), Some(exit)),
        };
        let arrival = loop {
            let arrival = timeline.go_to(target, &mut pace);
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
                if let Some(straight) = straight.states.get(&expected) {
                    let here = timeline.save().expect("it is at an exit");
                    let differences = here.digest().differences(&straight.digest());
                    assert!(differences.is_empty(), "at {expected}: {differences:?}");
                    assert!(here == *straight, "at exit {expected}");
                }
            }
            (arrival, _) => panic!("to {target:?}: {arrival:?}"),
        }
        complaints += timeline.take_complaints().len();
    }
    (complaints, timeline.into_store())
}

/// What an observer has seen.
#[derive(Default)]
struct Seen {
    exits: Vec<u64>,
    panics: Vec<u64>,
    /// What it has read on consoles, and at which exit.
    said: Vec<(u64, Output)>,
}

impl Observer for Seen {
    fn turn(&mut self, exits: u64, turn: &Turn, _: &mut dyn Guest) {
        self.exits.push(exits);
        if matches!(turn.exit, Exit::Panic { .. }) {
            self.panics.push(exits);
        }
    }

    fn output(&mut self, exits: u64, _: Nanos, output: &Output) {
        if !matches!(output, Output::Frame(_)) {
            self.said.push((exits, output.clone()));
        }
    }
}

/// Compares what is noted beside checkpoints with what was seen. How many have notes.
fn notes_are_right<C, S, K: Checkpoints<C, S>>(store: &mut K, seen: &Seen) -> usize {
    let heads = store.heads().to_vec();
    let (mut from, mut noted) = (0, 0);
    for (number, head) in heads.iter().enumerate() {
        if let Some(notes) = store.notes(number) {
            let mut told = Seen::default();
            let mut panics = seen.panics.iter().copied();
            let panic = panics.find(|at| *at > from).filter(|at| *at <= head.exits);
            assert_eq!(notes.tell(from, &mut told), panic);
            let between = seen
                .said
                .iter()
                .filter(|(at, _)| *at > from && *at <= head.exits);
            // What is said at power-on belongs to the first.
            let first = seen.said.iter().filter(|(at, _)| from == 0 && *at == 0);
            let expected: Vec<_> = first.chain(between).cloned().collect();
            assert!(told.said == expected, "{from} to {}", head.exits);
            noted += 1;
        }
        from = head.exits;
    }
    noted
}

/// Looks on from a moment in `recorded` to its end, past the checkpoints of `store`, and compares with `all`.
fn looks_on<R: Recorded, K: Checkpoints<CpuState<R>, DisksState<R>> + std::fmt::Debug>(
    recorded: &R,
    all: &[u64],
    store: K,
    seed: u64,
) {
    let make = || {
        let machine = machine_of(recorded.header());
        Ok::<_, Infallible>((machine, recorded.cpu(5), recorded.disks()))
    };
    let mut timeline: Timeline<_, _, Cursor<&[u8]>, _, _> =
        Timeline::new(recorded.reader(), store, make);
    let from = recorded.place(&mut Rng::new(seed, 45));
    let arrival = timeline.go_to(Target::Exit(from), &mut Random(Rng::new(seed, 46)));
    let reached = matches!(arrival, Ok(Arrival::Reached | Arrival::Stopped));
    assert!(reached, "{arrival:?}");
    let (machine, _, _) = timeline.parts().expect("it is somewhere");
    let from = machine.at().exits;
    let mut seen = Seen::default();
    let mut pace = Random(Rng::new(seed, 47));
    while !matches!(
        timeline.run_to(Target::End, &mut pace, &mut seen),
        Ok(Arrival::Ended(_))
    ) {}
    let expected: Vec<u64> = all.iter().copied().filter(|exit| *exit > from).collect();
    assert!(
        seen.exits == expected,
        "from exit {from}: {seen:?}",
        seen = seen.exits
    );
}

fn travels_right<R: Recorded>(recorded: &R, seed: u64)
where
    CpuState<R>: std::fmt::Debug,
{
    let straight = straight(recorded, seed);
    let noise = seed.is_multiple_of(3).then_some(seed);
    let store: ToyStore<CpuState<R>, DisksState<R>> = ToyStore::new(noise);
    let (complaints, mut store) = travel(recorded, &straight, store, seed);
    assert!(noise.is_some() || complaints == 0);
    let heads = store.heads().to_vec();
    assert!(heads.is_sorted_by(|a, b| a.exits < b.exits));
    assert!(recorded.exits() < 200 || noise.is_some() || !heads.is_empty());
    let noted = notes_are_right(&mut store, &straight.seen);
    assert!(noise.is_some() || heads.is_empty() || noted > 0);
    looks_on(recorded, &straight.seen.exits, store, seed);
}

/// What a file has room for: more than any toy's memory.
const LIMIT: PageLimit = PageLimit {
    memory: 1 << 10,
    disks: 1 << 10,
};

/// Checkpoints in files that somebody damages, deletes, or writes to at the same time.
fn survives_damage<R: Recorded>(recorded: &R, seed: u64) {
    let mut rng = Rng::new(seed, 43);
    let straight = straight(recorded, seed);
    let directory = tempfile::tempdir().expect("there is room");
    let path = directory.path().join("checkpoints");
    let journal = recorded.reader().start().check;
    let open = || CheckpointFile::open(&path, journal, LIMIT).expect("there is room");
    let (complaints, mut whole) = travel(recorded, &straight, open(), seed);
    assert_eq!(complaints, 0);
    whole.settle().expect("there is room");
    if rng.one_in(4) {
        // Another process has it open: nothing is written, and nothing is wrong.
        let (complaints, second) = travel(recorded, &straight, open(), seed + 1);
        assert!(complaints == 0 && !second.is_open());
        assert_eq!(second.heads(), whole.heads());
    }
    let heads = whole.heads().to_vec();
    drop(whole);
    let again = open();
    assert_eq!(again.heads(), heads, "what was written is read");
    let (complaints, mut again) = travel(recorded, &straight, again, seed + 2);
    assert_eq!(complaints, 0);
    if rng.one_in(4) {
        let thin = again.thinned(&path, |number| number % 2 == 0);
        let mut thin = thin.expect("there is room");
        let is_noted = notes_are_right::<CpuState<R>, DisksState<R>, _>(&mut thin, &straight.seen);
        assert_eq!(is_noted == 0, thin.heads().is_empty());
        assert_eq!(thin.heads().len(), again.heads().len().div_ceil(2));
        let (complaints, _) = travel(recorded, &straight, thin, seed + 3);
        assert_eq!(complaints, 0);
    }
    drop(again);
    let mut bytes = std::fs::read(&path).expect("it is there");
    for _ in 0..1 + rng.below(3) {
        if !bytes.is_empty() {
            damage(&mut bytes, &mut rng);
        }
    }
    std::fs::write(&path, &bytes).expect("there is room");
    let damaged = open();
    if rng.one_in(4) {
        std::fs::remove_file(&path).expect("it is there");
    }
    travel(recorded, &straight, damaged, seed + 4);
}

#[test]
fn checkpoints_in_a_damaged_file_cost_time_and_nothing_else() {
    for_seeds(50, |seed| {
        let toy = Toy::record(seed);
        if toy.exits() > 2 {
            survives_damage(&toy, seed);
        }
    });
    for_seeds(200, |seed| survives_damage(&Driver::record(seed), seed));
}

#[test]
fn the_checkpoints_of_another_recording_are_none() {
    let directory = tempfile::tempdir().expect("there is room");
    let path = directory.path().join("checkpoints");
    let (one, other) = (Driver::record(1), Driver::record(2));
    let open = |driver: &Driver| {
        let journal = driver.reader().start().check;
        CheckpointFile::open(&path, journal, LIMIT).expect("there is room")
    };
    let (_, file) = travel(&one, &straight(&one, 1), open(&one), 1);
    assert!(!file.heads().is_empty());
    drop(file);
    assert!(open(&other).heads().is_empty());
    travel(&other, &straight(&other, 2), open(&other), 2);
}

/// Checks `recorded` stretch by stretch; then again with one checkpoint altered.
fn is_checked_in_stretches<R: Recorded>(recorded: &R, seed: u64)
where
    CpuState<R>: std::fmt::Debug,
{
    let store: ToyStore<CpuState<R>, DisksState<R>> = ToyStore::new(None);
    let straight = straight(recorded, seed);
    let (_, mut store) = travel(recorded, &straight, store, seed);
    let checkpoints = store.heads().len();
    if checkpoints == 0 {
        return;
    }
    let mut rng = Rng::new(seed, 44);
    let altered = rng.below(checkpoints as u64) as usize;
    for is_altered in [false, true] {
        if is_altered {
            store.alter(altered);
        }
        let make = || {
            let machine = machine_of(recorded.header());
            Ok::<_, Infallible>((machine, recorded.cpu(7), recorded.disks()))
        };
        let mut timeline: Timeline<_, _, Cursor<&[u8]>, _, _> =
            Timeline::new(recorded.reader(), store.clone(), make);
        let mut numbers: Vec<usize> = (0..=checkpoints).collect();
        numbers.rotate_left(rng.below(checkpoints as u64) as usize);
        for number in numbers {
            let from = number.checked_sub(1);
            let to = (number < checkpoints).then_some(number);
            let checked = timeline.check_stretch(from, to, &mut ());
            if is_altered && to == Some(altered) {
                let Ok(Stretch::Elsewhere(parts)) = checked else {
                    panic!("stretch {number}: {checked:?}");
                };
                assert!(
                    parts.iter().all(|part| part.starts_with("memory at")),
                    "{parts:?}"
                );
            } else if !is_altered || from != Some(altered) {
                match checked.unwrap_or_else(|error| panic!("stretch {number}: {error}")) {
                    Stretch::Equal if to.is_some() => {}
                    Stretch::Ended(end) if to.is_none() => assert_eq!(end, *recorded.end()),
                    other => panic!("stretch {number}: {other:?}"),
                }
            }
        }
    }
}

#[test]
fn a_recording_is_checked_stretch_by_stretch_and_a_wrong_checkpoint_is_named_by_the_one_before_it()
{
    for_seeds(10, |seed| {
        let toy = Toy::record(seed);
        if toy.exits() > 2 {
            is_checked_in_stretches(&toy, seed);
        }
    });
    for_seeds(50, |seed| {
        is_checked_in_stretches(&Driver::record(seed), seed)
    });
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

/// A recording with checkpoints of its recorder's, and the same without.
fn is_recorded_with_checkpoints(seed: u64) -> usize {
    let mut rng = Rng::new(seed, 48);
    let mut store: ToyStore<CpuState<Toy>, DisksState<Toy>> = ToyStore::new(None);
    // From one at each exit to hardly any.
    let span = 1 << rng.below(28);
    let toy = Toy::record_keeping(seed, &mut store, || rng.below(span));
    let plain = Toy::record(seed);
    let records = |toy: &Toy| hindsight_tests::sim::records_of(toy.journal());
    assert!(
        records(&toy) == records(&plain) && toy.end() == plain.end(),
        "whoever looks on changes nothing"
    );
    let checkpoints = store.heads().len();
    let make = || {
        let machine = machine_of(toy.header());
        Ok::<_, Infallible>((machine, toy.cpu(9), toy.disks()))
    };
    let mut timeline: Timeline<_, _, Cursor<&[u8]>, _, _> =
        Timeline::new(toy.reader(), store.clone(), make);
    for number in 0..=checkpoints {
        let (from, to) = (
            number.checked_sub(1),
            (number < checkpoints).then_some(number),
        );
        match timeline.check_stretch(from, to, &mut ()) {
            Ok(Stretch::Equal) if to.is_some() => {}
            Ok(Stretch::Ended(end)) if to.is_none() => assert_eq!(end, *toy.end()),
            other => panic!("stretch {number} of {checkpoints}: {other:?}"),
        }
    }
    if toy.exits() > 2 {
        let (complaints, _) = travel(&toy, &straight(&toy, seed), store, seed);
        assert_eq!(complaints, 0);
    }
    checkpoints
}

#[test]
fn a_recorder_makes_the_checkpoints_that_a_replay_makes_and_the_recording_is_the_same() {
    let made = std::cell::Cell::new(0);
    for_seeds(10, |seed| {
        made.set(made.get() + is_recorded_with_checkpoints(seed));
    });
    assert!(made.get() > 0, "none was made");
}
