//! The law of states: save anywhere, restore elsewhere, and nothing is different. Stated once, and held to for each
//! guest that the simulation has: the toy CPU (time reads, preemption, posted writes, chaos) and the toy driver (virtio,
//! disks, input of all kinds).
//!
//! `HINDSIGHT_SIM_SEEDS` and `HINDSIGHT_SIM_SEED` work as in `simulation.rs`.

use std::io::Cursor;

use hindsight_devices::NoDisks;
use hindsight_replay::rng::{Rng, mix};
use hindsight_replay::{
    Closed, Cpu, End, Ending, JournalError, Machine, MachineState, Pages, Replayer, RunError,
    StateDigest, StateError, StateOf, VcpuNumber,
};
use hindsight_tests::recorded::{Driver, Recorded, Toy};
use hindsight_tests::sim::{Trace, machine_of};

fn for_seeds(share: u64, check: impl Fn(u64)) {
    hindsight_tests::seeds::for_seeds("states", 5_000, share, check);
}

type State<R> = StateOf<<R as Recorded>::Cpu, <R as Recorded>::Disks>;
type Failure<R> = RunError<<<R as Recorded>::Cpu as Cpu>::Error>;
type Refusal<R> = StateError<<<R as Recorded>::Cpu as Cpu>::Error>;

/// A machine in the middle of a replay.
struct Replay<'a, R: Recorded> {
    machine: Machine,
    cpu: R::Cpu,
    disks: R::Disks,
    door: Replayer<Cursor<&'a [u8]>>,
    trace: Trace,
}

impl<'a, R: Recorded> Replay<'a, R> {
    fn new(recorded: &'a R, noise: u64) -> Replay<'a, R> {
        Replay {
            machine: machine_of(recorded.header()),
            cpu: recorded.cpu(noise),
            disks: recorded.disks(),
            door: Replayer::new(recorded.reader(), None, None),
            trace: Trace::default(),
        }
    }

    /// Puts it where `state` was taken.
    fn restore(&mut self, recorded: &'a R, state: &State<R>) -> Result<(), Refusal<R>> {
        self.machine
            .restore(state, &mut self.cpu, &mut self.disks)?;
        let place = state.core.journal.as_ref().expect("a replay has a place");
        let door = Replayer::at(recorded.reader(), place);
        self.door = door.map_err(|error| StateError::Damaged(error.to_string()))?;
        // Its observer begins to look here.
        self.trace = Trace::beginning_after(self.machine.at().exits);
        Ok(())
    }

    fn run(&mut self, until: Option<u64>) -> Result<End, Failure<R>> {
        self.door.close_after(until);
        self.machine.run(
            &mut self.cpu,
            &mut self.disks,
            &mut self.door,
            &mut self.trace,
        )
    }

    fn run_to(&mut self, until: u64) {
        match self.run(Some(until)) {
            Err(RunError::Closed(Closed::Reached(exits))) => assert_eq!(exits, until),
            other => panic!("on the way to exit {until}: {other:?}"),
        }
    }

    fn save(&mut self) -> State<R> {
        let state = self
            .machine
            .save(&mut self.cpu, &mut self.disks, &self.door);
        state.unwrap_or_else(|error| panic!("it could not be saved: {error}"))
    }
}

fn assert_same<R: Recorded>(what: &str, a: &State<R>, b: &State<R>) {
    let differences = a.digest().differences(&b.digest());
    assert!(
        a.to_bytes() == b.to_bytes() && differences.is_empty(),
        "{what}: the states differ in {differences:?}"
    );
    assert_eq!(a.digest().value(), b.digest().value());
}

/// Saves a replay somewhere, restores it elsewhere, and compares all that can be seen from there on.
fn obeys_the_law<R: Recorded>(recorded: &R, seed: u64) {
    if recorded.exits() < 3 {
        return;
    }
    let mut rng = Rng::new(seed, 21);
    let here = recorded.place(&mut rng);
    let there = here + 1 + rng.below(recorded.exits() - here - 1);
    let noise = |number: u64| mix(seed ^ number << 32);

    // Straight, without a save before the later place.
    let mut straight = Replay::new(recorded, noise(1));
    straight.run_to(there);
    let expected = straight.save();
    let end = straight.run(None).expect("it is the recording");
    assert_eq!(end, *recorded.end());
    let memory = Pages::of_memory(straight.cpu.ram());

    // Saved, and run on.
    let mut saved = Replay::new(recorded, noise(2));
    saved.run_to(here);
    let state = saved.save();
    assert_same::<R>("saved twice", &state, &saved.save());
    saved.run_to(there);
    assert_same::<R>("after a save", &saved.save(), &expected);

    // Restored: on another host, in a fresh machine, in one that is elsewhere, or in one that has ended.
    let bytes = state.to_bytes();
    let state: State<R> = MachineState::from_bytes(&bytes).expect("it was kept");
    assert!(state.to_bytes() == bytes);
    let mut restored = match rng.below(3) {
        0 => Replay::new(recorded, noise(3)),
        1 => saved,
        _ => {
            saved.run(None).expect("it is the recording");
            saved
        }
    };
    let done = restored.restore(recorded, &state);
    done.unwrap_or_else(|error| panic!("it could not be restored: {error}"));
    assert_same::<R>("restored", &restored.save(), &state);
    restored.run_to(there);
    assert_same::<R>("after a restore", &restored.save(), &expected);
    assert_eq!(restored.run(None).expect("it is the recording"), end);
    // A window that opens after the exit was open in both, and before this was looked at in one.
    assert_eq!(restored.trace.after(here), straight.trace.after(here));
    assert_eq!(restored.machine.tally(), straight.machine.tally());
    assert!(end.ending == Ending::StoppedRunning || Pages::of_memory(restored.cpu.ram()) == memory);
}

/// What became of states that were altered.
#[derive(Debug, Default)]
struct Altered {
    refused: u64,
    noticed: u64,
    without_effect: u64,
}

impl Altered {
    /// Whoever tries a few seeds may be lucky.
    fn assert_many_kinds(self) {
        println!("{self:?}");
        let all = self.refused + self.noticed + self.without_effect;
        let many = self.refused * 20 > all && self.noticed * 4 > all;
        assert!(many || all < 500, "{self:?}");
    }
}

/// Flips bits of a state's bytes. Whatever that makes of it is refused, or noticed by the replay, or has no effect:
/// the replay sees and does all that the recording says from there on.
fn survives_alteration<R: Recorded>(recorded: &R, seed: u64, times: u64, altered: &mut Altered) {
    let mut rng = Rng::new(seed, 22);
    let here = rng.below(recorded.exits());
    let mut straight = Replay::new(recorded, 1);
    straight.run_to(here);
    let state = straight.save();
    straight.run(None).expect("it is the recording");
    let memory = Pages::of_memory(straight.cpu.ram());
    let body = postcard::to_stdvec(&state).expect("plain values serialise");
    let page_bytes: usize = state.pages.iter().map(|(_, bytes)| bytes.len()).sum();
    for _ in 0..times {
        let mut bytes = body.clone();
        // Most of it is memory, and of that one byte is like another.
        let at = match rng.one_in(4) {
            true => rng.below(bytes.len() as u64) as usize,
            false => rng.below((bytes.len() - page_bytes) as u64) as usize,
        };
        bytes[at] ^= 1 << rng.below(8);
        let sealed = seal(&bytes);
        let Ok(other) = State::<R>::from_bytes(&sealed) else {
            altered.refused += 1;
            continue;
        };
        let mut replay = Replay::new(recorded, 2);
        if replay.restore(recorded, &other).is_err() {
            altered.refused += 1;
            continue;
        }
        match replay.run(None) {
            Err(_) => {
                altered.noticed += 1;
                // Wherever it has gone astray, it can be brought back.
                let back = replay.restore(recorded, &state);
                back.unwrap_or_else(|error| panic!("it could not be restored: {error}"));
                assert_same::<R>("brought back", &replay.save(), &state);
                let found = replay.run(None).expect("it is the recording");
                assert_eq!(found, *recorded.end());
            }
            Ok(end) => {
                assert_eq!(end, *recorded.end());
                let seen = replay.trace.after(here);
                assert_eq!(seen, straight.trace.after(here), "byte {at}");
                let same = Pages::of_memory(replay.cpu.ram()) == memory;
                assert!(same || end.ending == Ending::StoppedRunning);
                altered.without_effect += 1;
            }
        }
    }
}

/// How often a part of a state was another exit's, and how often that was noticed.
#[derive(Clone, Copy, Debug, Default)]
struct Noticed {
    times: u64,
    of: u64,
}

/// Puts one part of a state of another exit into a state.
fn notices_each_part<R: Recorded>(recorded: &R, seed: u64, noticed: &mut [Noticed; 6]) {
    if recorded.exits() < 40 {
        return;
    }
    let mut rng = Rng::new(seed, 25);
    let early = rng.below(recorded.exits() - 30);
    let late = early + 1 + rng.below(recorded.exits() - early - 20);
    let mut straight = Replay::new(recorded, 1);
    straight.run_to(early);
    let other = straight.save();
    straight.run_to(late);
    let state = straight.save();
    for (part, noticed) in noticed.iter_mut().enumerate() {
        let (mut mixed, other) = (state.clone(), other.clone());
        match part {
            0 => mixed.core.progress = other.core.progress,
            1 => mixed.core.board = other.core.board,
            2 => mixed.core.cpu = other.core.cpu,
            3 => mixed.core.disks = other.core.disks,
            4 => mixed.pages = other.pages,
            _ => mixed.core.journal = other.core.journal,
        }
        if mixed == state {
            continue;
        }
        let differences = mixed.digest().differences(&state.digest());
        assert_eq!(differences, [StateDigest::PARTS[part]]);
        let mut replay = Replay::new(recorded, 2);
        let went_on = replay.restore(recorded, &mixed);
        noticed.times += u64::from(went_on.is_err() || replay.run(None).is_err());
        noticed.of += 1;
    }
}

/// A state whose check is right, whatever it says.
fn seal(body: &[u8]) -> Vec<u8> {
    let mut bytes = b"HSst\x03\0\0\0".to_vec();
    bytes.extend(xxhash_rust::xxh3::xxh3_64_with_seed(body, 3).to_le_bytes());
    bytes.extend(body);
    bytes
}

#[test]
fn a_machine_saved_anywhere_and_restored_elsewhere_goes_on_as_if_nothing_had_been() {
    for_seeds(1, |seed| obeys_the_law(&Toy::record(seed), seed));
}

#[test]
fn a_machine_with_disks_and_cards_saved_anywhere_goes_on_elsewhere() {
    for_seeds(10, |seed| obeys_the_law(&Driver::record(seed), seed));
}

#[test]
fn an_altered_state_is_refused_or_noticed_or_has_no_effect() {
    let altered = std::cell::RefCell::new(Altered::default());
    for_seeds(2, |seed| {
        let toy = Toy::record(seed).distrusted();
        survives_alteration(&toy, seed, 3, &mut altered.borrow_mut());
    });
    altered.into_inner().assert_many_kinds();
}

#[test]
fn an_altered_state_of_disks_and_cards_is_refused_or_noticed_or_has_no_effect() {
    let altered = std::cell::RefCell::new(Altered::default());
    for_seeds(20, |seed| {
        survives_alteration(&Driver::record(seed), seed, 6, &mut altered.borrow_mut());
    });
    altered.into_inner().assert_many_kinds();
}

/// The law would hold of a state that leaves something out if nobody ever looked at that.
#[test]
fn each_part_of_a_state_is_missed_where_it_is_another_exits() {
    let noticed = std::cell::RefCell::new([[Noticed::default(); 6]; 2]);
    for_seeds(20, |seed| {
        let toy = Toy::record(seed).distrusted();
        notices_each_part(&toy, seed, &mut noticed.borrow_mut()[0]);
    });
    for_seeds(50, |seed| {
        notices_each_part(&Driver::record(seed), seed, &mut noticed.borrow_mut()[1]);
    });
    for noticed in noticed.into_inner() {
        for (part, Noticed { times, of }) in StateDigest::PARTS.iter().zip(noticed) {
            println!("{part}: noticed {times} of {of} times");
            assert!(times * 3 > of || of < 20, "{part}: {times} of {of} times");
        }
    }
}

#[test]
fn bytes_that_were_kept_are_refused_when_a_bit_of_them_has_changed() {
    for_seeds(50, |seed| {
        let toy = Toy::record(seed);
        let mut replay = Replay::new(&toy, 1);
        replay.run_to(toy.exits() / 2);
        let bytes = replay.save().to_bytes();
        let mut rng = Rng::new(seed, 23);
        for _ in 0..20 {
            let mut changed = bytes.clone();
            changed[rng.below(bytes.len() as u64) as usize] ^= 1 << rng.below(8);
            assert!(State::<Toy>::from_bytes(&changed).is_err());
            let cut = &bytes[..rng.below(bytes.len() as u64) as usize];
            assert!(State::<Toy>::from_bytes(cut).is_err());
        }
    });
}

#[test]
fn the_state_of_a_vcpu_that_the_machine_does_not_have_is_refused() {
    let toy = Toy::record(1);
    let mut replay = Replay::new(&toy, 1);
    replay.run_to(toy.exits() / 2);
    let state = replay.save();
    let body = postcard::to_stdvec(&state).expect("plain values serialise");
    // What comes first: the name of the machine, and the number of the exit.
    let description = |body: &[u8]| {
        postcard::take_from_bytes::<(u64, u64)>(body).map(|(_, rest)| body.len() - rest.len())
    };
    let at = description(&body).expect("two numbers");
    for number in 1..=u8::MAX {
        let mut other = body.clone();
        assert_eq!(std::mem::replace(&mut other[at], number), 0);
        let other = State::<Toy>::from_bytes(&seal(&other)).expect("it is a state");
        assert_eq!(other.core.progress.at().vcpu, VcpuNumber(number));
        let refused = replay.restore(&toy, &other);
        assert!(
            matches!(&refused, Err(StateError::Damaged(what)) if what.contains("vCPU")),
            "{refused:?}"
        );
    }
}

#[test]
fn the_state_of_another_machine_is_refused() {
    let toy = Toy::record(1);
    let mut replay = Replay::new(&toy, 1);
    replay.run_to(toy.exits() / 2);
    let state = replay.save();
    let mut other = toy.header().clone();
    other.machine.ns_per_exit += 1;
    let refused = machine_of(&other).restore(&state, &mut toy.cpu(1), &mut NoDisks);
    assert!(
        matches!(refused, Err(StateError::OtherMachine)),
        "{refused:?}"
    );
}

#[test]
fn a_machine_between_two_exits_or_at_its_end_has_no_state() {
    let toy = Toy::record(1);
    let mut replay = Replay::new(&toy, 1);
    replay.save();
    replay.run(None).expect("it is the recording");
    let none = replay
        .machine
        .save(&mut replay.cpu, &mut replay.disks, &replay.door);
    assert!(matches!(none, Err(StateError::NotAtAnExit)), "{none:?}");
}

#[test]
fn a_place_that_is_not_in_the_journal_is_refused() {
    for_seeds(100, |seed| {
        let toy = Toy::record(seed);
        let mut replay = Replay::new(&toy, 1);
        replay.run_to(toy.exits() - 1);
        let place = replay.save().core.journal.expect("a replay has a place");
        let mut rng = Rng::new(seed, 24);
        let whole = Replayer::at(toy.reader(), &place);
        assert!(whole.is_ok(), "{:?}", whole.err());
        for _ in 0..20 {
            let mut other = place.clone();
            match rng.below(5) {
                0 => other.records += 1 << rng.below(64).max(20),
                1 => other.frame_before = Some(rng.number() >> rng.below(64)),
                2 => other.history = vec![other.history[0]; 9],
                3 => other.history[0].1.vcpu = VcpuNumber(1 + rng.below(255) as u8),
                _ => other.witnesses_checked = u64::MAX - rng.below(9),
            }
            if other.frame_before == place.frame_before && other.records == place.records {
                assert!(Replayer::at(toy.reader(), &other).is_err());
                continue;
            }
            match Replayer::at(toy.reader(), &other) {
                Err(JournalError::Place(_)) => {}
                // By chance, another place in it.
                Ok(_) => assert!(other.frame_before < Some(toy.journal().len() as u64)),
                Err(error) => panic!("{error}"),
            }
        }
    });
}
