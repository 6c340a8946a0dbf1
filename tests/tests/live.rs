//! A recording goes on from a moment as a live machine, and what is recorded of that is a recording like any other.
//!
//! `HINDSIGHT_SIM_SEEDS` and `HINDSIGHT_SIM_SEED` work as in `simulation.rs`.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io::Cursor;

use hindsight_devices::{Input, Nanos, NoDisks};
use hindsight_replay::rng::{Rng, mix};
use hindsight_replay::{
    Closed, Detail, End, Ending, Event, Header, JournalReader, Machine, MachineState, Record,
    Recorder, Replayer, RunError, StateOf,
};
use hindsight_tests::sim::{
    Recording, Scenario, Trace, Unchecked, Verdict, machine_of, records_of, replay,
};
use hindsight_tests::sim_world::SimWorld;
use hindsight_tests::toy_counter::ToyCounter;
use hindsight_tests::toy_cpu::{Broken, ToyCpu};

type State = StateOf<ToyCpu, NoDisks>;
type Door<'a> = Recorder<Replayer<Cursor<&'a [u8]>>, Vec<u8>>;

fn for_seeds(share: u64, check: impl Fn(u64)) {
    hindsight_tests::seeds::for_seeds("live", 5_000, share, check);
}

/// The scenario of a seed: a third of them with a counter, and half of those with chaos.
fn scenario(seed: u64) -> Scenario {
    let mut scenario = Scenario::new(seed);
    if seed.is_multiple_of(3) {
        scenario = scenario.with_patience(20_000);
        scenario.chaos = seed.is_multiple_of(2).then_some(seed);
    }
    scenario
}

fn cpu(seed: u64, noise: u64) -> ToyCpu {
    let cpu = ToyCpu::new(seed, noise);
    match seed.is_multiple_of(3) {
        true => cpu.with_counter(ToyCounter::new(noise, 12, 13)),
        false => cpu,
    }
}

fn record(seed: u64, detail: Detail) -> Recording {
    let scenario = scenario(seed);
    let world = SimWorld::new(seed, scenario.pace_ns);
    let (result, recording) = scenario.record_with(detail, world, cpu(seed, mix(seed)));
    Recording {
        end: Some(result.expect("it is recorded")),
        ..recording
    }
}

fn reader(journal: &[u8]) -> JournalReader<Cursor<&[u8]>> {
    JournalReader::open(Cursor::new(journal)).expect("the head is whole")
}

/// Runs to exit `until`, in stretches, as whoever wants to be heard on the way does.
fn reach(
    machine: &mut Machine,
    cpu: &mut ToyCpu,
    door: &mut Door<'_>,
    trace: &mut Trace,
    until: u64,
) {
    while machine.at().exits < until {
        let stretch = (machine.at().exits + 50).min(until);
        door.inner().close_after(Some(stretch));
        match machine.run(cpu, &mut NoDisks, door, trace) {
            Err(RunError::Closed(Closed::Reached(exits))) => assert_eq!(exits, stretch),
            other => panic!("on the way to exit {until}: {other:?}"),
        }
    }
}

/// The state at an exit.
fn state(recording: &Recording, seed: u64, exit: u64) -> State {
    let reader = reader(&recording.journal);
    let mut machine = machine_of(reader.header());
    let mut cpu = cpu(seed, mix(seed ^ 0x11));
    let mut door = Replayer::new(reader, Some(exit), None);
    let reached = machine.run(&mut cpu, &mut NoDisks, &mut door, &mut ());
    assert!(matches!(reached, Err(RunError::Closed(Closed::Reached(_)))));
    let state = machine.save(&mut cpu, &mut NoDisks, &door);
    MachineState::from_bytes(&state.expect("it is at an exit").to_bytes()).expect("it was kept")
}

/// What a machine came to that was live from an exit on.
struct Lived {
    end: End,
    journal: Vec<u8>,
    /// From the exit on from which there is one: 0, or that of a state.
    trace: Trace,
    /// Guest time at the exit from which it was live.
    now: Nanos,
}

/// Goes on from `exit` of the recording of `seed` in the world of `future`, replaying from `state` or from the start.
fn live(
    recording: &Recording,
    seed: u64,
    (exit, future): (u64, u64),
    state: Option<&State>,
    header: &Header,
) -> Lived {
    let old = reader(&recording.journal);
    let mut machine = machine_of(old.header());
    let mut cpu = cpu(seed, mix(future ^ 0x22));
    let place = state.map(|state| state.core.journal.clone().expect("a replay has a place"));
    if let Some(state) = state {
        let restored = machine.restore(state, &mut cpu, &mut NoDisks);
        restored.expect("it is of this machine");
    }
    let replayer = match &place {
        None => Replayer::new(old, None, None),
        Some(place) => Replayer::at(old, place).expect("it is of this journal"),
    };
    let mut recorder =
        Recorder::create(replayer, Vec::new(), header).expect("a Vec takes everything");
    if let Some(place) = &place {
        let mut old = reader(&recording.journal);
        let copied = recorder.copy(&mut old, place, machine.complete());
        copied.expect("it is of this journal");
    }
    let mut trace = Trace::beginning_after(machine.at().exits);
    reach(&mut machine, &mut cpu, &mut recorder, &mut trace, exit);
    let now = machine.now();
    let scenario = scenario(seed);
    let mut world = SimWorld::new(future, scenario.pace_ns);
    if exit > 0 {
        world = world.going_on(now);
    }
    let mut recorder = recorder.map_inner(|_| scenario.live(world));
    let result = machine.run(&mut cpu, &mut NoDisks, &mut recorder, &mut trace);
    let end = result.unwrap_or_else(|error| panic!("it could not go on: {error}"));
    Lived {
        end,
        journal: recorder.into_sink(),
        trace,
        now,
    }
}

fn before(records: &[Record], exit: u64) -> Vec<&Record> {
    let before = records.iter().take_while(|record| record.exits < exit);
    before.collect()
}

#[test]
fn a_machine_live_from_any_exit_makes_a_recording_that_replays_equal_and_begins_as_the_old_one() {
    let (went_on, others) = (Cell::new(0_u32), Cell::new(0_u32));
    for_seeds(10, |seed| {
        let mut rng = Rng::new(seed, 41);
        let detail = match rng.one_in(4) {
            true => Detail::Full,
            false => Detail::Default,
        };
        let recording = record(seed, detail);
        let exit = rng.below(recording.exits.max(1));
        let future = mix(seed ^ 0x33);
        let header = scenario(seed).header(match rng.one_in(2) {
            true => detail,
            false => Detail::Default,
        });
        let lived = live(&recording, seed, (exit, future), None, &header);

        let replayed = replay(&lived.journal, cpu(seed, mix(seed ^ 0x44)), None);
        match &replayed.verdict {
            Verdict::Equal(end) => assert_eq!(*end, lived.end),
            other => panic!("expected an equal replay, found {other:?}"),
        }
        assert_eq!(replayed.trace, lived.trace);
        assert_eq!(
            replayed.trace.through(exit).turns,
            recording.trace.through(exit).turns
        );
        let new = records_of(&lived.journal);
        if header.detail == detail {
            let old = records_of(&recording.journal);
            assert_eq!(before(&new, exit), before(&old, exit));
        }
        if let Some(turn) = lived.trace.turns.get(exit as usize) {
            assert!(turn.now >= lived.now, "guest time ran backwards");
            went_on.set(went_on.get() + 1);
        }
        others.set(others.get() + u32::from(lived.trace != recording.trace));

        // From a state before it, the same is written down of what was.
        let from = state(&recording, seed, rng.below(exit + 1));
        let shorter = live(&recording, seed, (exit, future), Some(&from), &header);
        let also = records_of(&shorter.journal);
        assert_eq!(before(&also, exit), before(&new, exit));
        let replayed = replay(&shorter.journal, cpu(seed, mix(seed ^ 0x55)), None);
        match &replayed.verdict {
            Verdict::Equal(end) => assert_eq!(*end, shorter.end),
            other => panic!("expected an equal replay, found {other:?}"),
        }
        let from = from.core.progress.at().exits;
        assert_eq!(replayed.trace.after(from).turns, shorter.trace.turns);
    });
    let (went_on, others) = (went_on.get(), others.get());
    println!("{went_on} went on, {others} otherwise than it was");
    assert!(went_on == 0 || others > 0, "a future is not the past");
}

/// A mark is at the last of these when somebody asks for it.
#[test]
fn a_world_hears_of_each_exit_where_a_replay_can_stop() {
    for_seeds(8, |seed| {
        let recording = record(seed, Detail::Default);
        let passed = &recording.passed;
        let exits: BTreeSet<u64> = passed.iter().map(|at| at.exits).collect();
        let all_but_the_last = (0..recording.exits).all(|exit| exits.contains(&exit));
        assert!(all_but_the_last, "seed {seed}: {exits:?}");
        assert!(passed.is_sorted_by_key(|at| at.exits), "seed {seed}");
        for at in passed.iter().filter(|at| at.exits > 0) {
            let turn = &recording.trace.turns[at.exits as usize - 1];
            assert_eq!(at.now, turn.now, "seed {seed}, exit {}", at.exits);
        }
        let mut rng = Rng::new(seed, 12);
        let at = passed[rng.below(passed.len() as u64) as usize];
        let reader = reader(&recording.journal);
        let mut machine = machine_of(reader.header());
        let mut cpu = cpu(seed, mix(seed ^ 0x33));
        let mut door = Replayer::new(reader, Some(at.exits), None);
        let reached = machine.run(&mut cpu, &mut NoDisks, &mut door, &mut ());
        assert!(matches!(reached, Err(RunError::Closed(Closed::Reached(_)))));
        assert_eq!(machine.complete(), at, "seed {seed}");
    });
}

#[test]
fn a_recording_of_whole_turns_cannot_go_on_from_a_state_of_one_without_them() {
    let recording = record(1, Detail::Default);
    let state = state(&recording, 1, recording.exits / 2);
    let header = scenario(1).header(Detail::Full);
    let place = state.core.journal.expect("a replay has a place");
    let old = Replayer::at(reader(&recording.journal), &place).expect("it is of this journal");
    let mut recorder = Recorder::create(old, Vec::new(), &header).expect("a Vec takes everything");
    let copied = recorder.copy(
        &mut reader(&recording.journal),
        &place,
        hindsight_replay::Complete::default(),
    );
    let told = copied.expect_err("it has no turns").to_string();
    assert!(told.contains("every turn"), "{told}");
}

/// Runs until the door closes, stopped or not on the way.
fn run_through(seed: u64, records: &[Record], exits_max: u64) -> (Trace, u64, u32) {
    let mut machine = machine_of(&scenario(seed).header(Detail::Default));
    let mut cpu = cpu(seed, mix(seed ^ 0x66));
    let mut door = Unchecked::new(records, exits_max);
    let mut trace = Trace::default();
    let mut stops = 0;
    loop {
        let result: Result<End, RunError<Broken>> =
            machine.run(&mut cpu, &mut NoDisks, &mut door, &mut trace);
        match result {
            Ok(end) if end.ending == Ending::Stopped => stops += 1,
            _ => return (trace, machine.digest().value(), stops),
        }
    }
}

#[test]
fn a_machine_that_was_stopped_runs_on_as_if_it_had_not_been() {
    let stopped = Cell::new(0_u32);
    for_seeds(10, |seed| {
        // Those that are preempted at counted places need a recording to be led by.
        let seed = 3 * seed + 1;
        let recording = record(seed, Detail::Default);
        let mut records = records_of(&recording.journal);
        // The operator's own wish comes at the end, and the run is followed to the exit before.
        let last = recording.exits.saturating_sub(1);
        let mut straight = run_through(seed, &records, last);
        assert_eq!(straight.2, 0);
        let exits = 1 + Rng::new(seed, 42).below(last.max(1));
        records.push(Record {
            exits,
            event: Event::Input(Input::Stop),
        });
        let (mut trace, digest, stops) = run_through(seed, &records, last);
        trace.inputs.retain(|(_, input)| *input != Input::Stop);
        // What can be found out at the end alone is found out at each.
        trace.left_open.clear();
        straight.0.left_open.clear();
        assert!(trace == straight.0, "stopped at exit {exits}");
        assert_eq!(digest, straight.1);
        stopped.set(stopped.get() + stops);
    });
    assert!(stopped.get() > 0, "none was stopped");
}
