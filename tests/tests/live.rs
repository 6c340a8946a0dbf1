//! A recording goes on from a moment as a live machine, and what is recorded of that is a recording like any other.
//!
//! `HINDSIGHT_SIM_SEEDS` and `HINDSIGHT_SIM_SEED` work as in `simulation.rs`.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io::Cursor;

use hindsight_devices::{Input, Nanos, NoDisks};
use hindsight_replay::rng::{Rng, mix};
use hindsight_replay::{
    Arrival, CheckpointHead, Checkpoints, Closed, Detail, End, Ending, Event, Header,
    JournalReader, Machine, MachineState, Outside, Pace, Pause, Record, Recorder, Replayer,
    RunError, StateOf, Stateful, Target, Timeline,
};
use hindsight_tests::sim::{
    Recording, Scenario, Trace, Unchecked, Verdict, machine_of, records_of, replay,
};
use hindsight_tests::sim_world::SimWorld;
use hindsight_tests::toy_counter::ToyCounter;
use hindsight_tests::toy_cpu::{Broken, ToyCpu};
use hindsight_tests::toy_store::ToyStore;

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

/// Goes on from `exit` of the recording of `seed` in the world of `future`, recorded from power-on on.
fn live(recording: &Recording, seed: u64, (exit, future): (u64, u64), header: &Header) -> Lived {
    let old = reader(&recording.journal);
    let mut machine = machine_of(old.header());
    let mut cpu = cpu(seed, mix(future ^ 0x22));
    let replayer = Replayer::new(old, None, None);
    let mut recorder =
        Recorder::create(replayer, Vec::new(), header).expect("a Vec takes everything");
    let mut trace = Trace::default();
    reach(&mut machine, &mut cpu, &mut recorder, &mut trace, exit);
    go_on((machine, cpu), recorder, trace, (seed, exit, future))
}

/// Makes checkpoints at random.
struct AtRandom(Rng);

impl Pace for AtRandom {
    fn exits(&self) -> u64 {
        4
    }

    fn look(&mut self, _: CheckpointHead) -> Pause {
        match self.0.one_in(4) {
            true => Pause::Checkpoint { cost: 0 },
            false => Pause::GoOn,
        }
    }
}

/// The same by the timeline, as the program does it: from a checkpoint in `store`, or from `state`; what was before is
/// copied from the old recording.
fn live_by_timeline(
    recording: &Recording,
    seed: u64,
    (exit, future): (u64, u64),
    state: Option<&State>,
    store: &mut ToyStore<<ToyCpu as Stateful>::State, ()>,
    header: &Header,
) -> Lived {
    let old = reader(&recording.journal);
    let machine = machine_of(old.header());
    let mut machine = Some(machine);
    let make = || {
        let machine = machine.take().expect("one is enough");
        Ok::<_, Infallible>((machine, cpu(seed, mix(future ^ 0x22)), NoDisks))
    };
    let mut timeline = Timeline::new(old, store.clone(), make);
    if let Some(state) = state {
        timeline.put(state).expect("it is of this recording");
    }
    let mut pace = AtRandom(Rng::new(future, 43));
    let arrival = timeline.go_to(Target::Exit(exit), &mut pace);
    assert!(matches!(arrival, Ok(Arrival::Reached)), "{arrival:?}");
    if future.is_multiple_of(2) {
        timeline.keep_here().expect("there is room");
        assert!(
            timeline
                .store()
                .heads()
                .iter()
                .any(|head| head.exits >= exit)
        );
    }
    *store = timeline.store().clone();
    let (machine, cpu, _, replayer) = timeline.into_parts().expect("it goes on from there");
    let place = replayer.place().expect("a replay has a place");
    let mut recorder =
        Recorder::create(replayer, Vec::new(), header).expect("a Vec takes everything");
    let copied = recorder.copy(&mut reader(&recording.journal), &place, machine.complete());
    copied.expect("it is of this journal");
    let trace = Trace::beginning_after(exit);
    go_on((machine, cpu), recorder, trace, (seed, exit, future))
}

/// What `recorder` is around is live from here on.
fn go_on(
    (mut machine, mut cpu): (Machine, ToyCpu),
    recorder: Door<'_>,
    mut trace: Trace,
    (seed, exit, future): (u64, u64, u64),
) -> Lived {
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

/// Futures of `exit` by the timeline, each of which begins with the records that a straight one begins with.
fn agrees_by_the_timeline(
    recording: &Recording,
    seed: u64,
    exit: u64,
    straight: &[Record],
    header: &Header,
) {
    if header.detail == Detail::Full && reader(&recording.journal).header().detail != Detail::Full {
        return;
    }
    let mut rng = Rng::new(seed, 44);
    let state = state(recording, seed, rng.below(exit + 1));
    // The second one has the checkpoints of the first.
    let mut store = ToyStore::new(None);
    for number in 0..3 {
        let future = mix(seed ^ number);
        let state = Some(&state).filter(|_| number == 2);
        let lived = live_by_timeline(recording, seed, (exit, future), state, &mut store, header);
        let records = records_of(&lived.journal);
        assert_eq!(before(&records, exit), before(straight, exit));
        let replayed = replay(&lived.journal, cpu(seed, mix(seed ^ 0x55)), None);
        match &replayed.verdict {
            Verdict::Equal(end) => assert_eq!(*end, lived.end),
            other => panic!("expected an equal replay, found {other:?}"),
        }
        assert_eq!(replayed.trace.after(exit).turns, lived.trace.turns);
        assert_eq!(
            replayed.trace.through(exit).turns,
            recording.trace.through(exit).turns
        );
    }
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
        let lived = live(&recording, seed, (exit, future), &header);

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

        agrees_by_the_timeline(&recording, seed, exit, &new, &header);
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
