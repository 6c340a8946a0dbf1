//! Places between exits: the production landing code over a toy counter that calls late, and one
//! that miscounts.
//!
//! `HINDSIGHT_SIM_SEEDS` says how many seeds (default 10,000), `HINDSIGHT_SIM_SEED` picks one.

use hindsight_replay::rng::{Rng, mix};
use hindsight_replay::{Detail, Ending, Event, Exit, WITNESS_EVERY};
use hindsight_tests::seeds::for_seeds;
use hindsight_tests::sim::{Recording, Scenario, Verdict, records_of, replay};
use hindsight_tests::sim_world::SimWorld;
use hindsight_tests::toy_counter::ToyCounter;
use hindsight_tests::toy_cpu::{Broken, ToyCpu};

const SEEDS: u64 = 10_000;

/// A scenario in which what is due waits for a short while, or not at all.
fn scenario(seed: u64) -> Scenario {
    let mut rng = Rng::new(seed, 12);
    let patience_ns = [0, 0, 1_000, 100_000][rng.below(4) as usize];
    Scenario {
        chaos: rng.one_in(3).then(|| rng.number()),
        ..Scenario::new(seed).with_patience(patience_ns)
    }
}

/// A host's counter: its own noise and skid, and a margin that covers it.
fn counter(noise: u64) -> ToyCounter {
    let skid = [0, 1, 5, 50][Rng::new(noise, 13).below(4) as usize];
    ToyCounter::new(noise, skid, skid + 1)
}

fn record(scenario: &Scenario, detail: Detail, noise: u64, counter: ToyCounter) -> Recording {
    let world = SimWorld::new(scenario.seed, scenario.pace_ns);
    let cpu = ToyCpu::new(scenario.seed, noise).with_counter(counter);
    let (result, recording) = scenario.record_with(detail, world, cpu);
    let end = result.unwrap_or_else(|failure| panic!("the recording failed: {failure}"));
    Recording {
        end: Some(end),
        ..recording
    }
}

fn preemptions(recording: &Recording) -> u64 {
    let preempted = |turn: &&hindsight_replay::Turn| matches!(turn.exit, Exit::Preempted(_));
    recording.trace.turns.iter().filter(preempted).count() as u64
}

/// The trace and the memory of a replay are those of the recording.
fn is_equal(recording: &Recording, replayed: &hindsight_tests::sim::Replayed) -> bool {
    let running = recording
        .end
        .as_ref()
        .is_some_and(|end| end.ending == Ending::StoppedRunning);
    recording.trace == replayed.trace && (running || recording.memory == replayed.memory)
}

#[test]
fn every_preemption_is_found_again_on_a_host_with_another_skid() {
    let landed = std::cell::Cell::new(0);
    for_seeds("landing", SEEDS, 1, |seed| {
        let (here, there) = (mix(seed ^ 0x11), mix(seed ^ 0x22));
        let scenario = scenario(seed);
        let detail = if seed % 4 == 0 {
            Detail::Full
        } else {
            Detail::Default
        };
        let recording = record(&scenario, detail, here, counter(here));
        let cpu = ToyCpu::new(seed, there).with_counter(counter(there));
        let replayed = replay(&recording.journal, cpu, None);
        match &replayed.verdict {
            Verdict::Equal(end) => assert_eq!(Some(end), recording.end.as_ref()),
            other => panic!("expected an equal replay, found {other:?}"),
        }
        assert!(is_equal(&recording, &replayed), "equal, and yet it is not");
        let journaled = records_of(&recording.journal)
            .iter()
            .filter(|record| matches!(record.event, Event::Preempted { .. }))
            .count() as u64;
        assert_eq!(journaled, preemptions(&recording));
        landed.set(landed.get() + journaled);
    });
    if std::env::var_os("HINDSIGHT_SIM_SEED").is_none() {
        println!("{} preemptions", landed.get());
        assert!(landed.get() > SEEDS, "only {} preemptions", landed.get());
    }
}

#[test]
fn a_miscount_never_passes_for_an_equal_replay() {
    let noticed = std::cell::Cell::new([0u64; 3]);
    for_seeds("landing", SEEDS, 2, |seed| {
        let (here, there) = (mix(seed ^ 0x33), mix(seed ^ 0x44));
        let mut rng = Rng::new(seed, 14);
        let scenario = scenario(seed);
        let share = 1 + rng.below(200);
        let (mine, theirs) = match rng.below(3) {
            0 => (counter(here).miscounting(share), counter(there)),
            1 => (counter(here), counter(there).miscounting(share)),
            _ => (
                counter(here).miscounting(share),
                counter(there).miscounting(share),
            ),
        };
        let recording = record(&scenario, Detail::Default, here, mine);
        let cpu = ToyCpu::new(seed, there).with_counter(theirs);
        let replayed = replay(&recording.journal, cpu, None);
        let mut counts = noticed.get();
        match &replayed.verdict {
            // By luck: nothing was miscounted before a place.
            Verdict::Equal(_) => {
                assert!(is_equal(&recording, &replayed), "equal, and yet it is not");
                counts[0] += 1;
            }
            Verdict::Failed(Broken::Overshot(overshoot)) => {
                assert!(overshoot.found >= overshoot.expected.number, "{overshoot}");
                counts[1] += 1;
            }
            Verdict::Diverged(divergence) => {
                let first = recording.trace.first_difference(&replayed.trace);
                let at = divergence.at.exits;
                assert!(
                    first.is_none_or(|first| at < first + 2 * WITNESS_EVERY),
                    "first affected at {first:?}, noticed at {at}"
                );
                counts[2] += 1;
            }
            other => panic!("expected a refusal, found {other:?}"),
        }
        noticed.set(counts);
    });
    let [equal, overshot, diverged] = noticed.get();
    println!("equal {equal}, overshot {overshot}, diverged {diverged}");
    if std::env::var_os("HINDSIGHT_SIM_SEED").is_none() {
        assert!(overshot > 100 && diverged > 20, "{:?}", noticed.get());
    }
}

#[test]
fn a_margin_below_the_skid_is_an_error_and_never_a_wrong_replay() {
    let late = std::cell::Cell::new([0u64; 2]);
    for_seeds("landing", SEEDS, 2, |seed| {
        let (here, there) = (mix(seed ^ 0x55), mix(seed ^ 0x66));
        let scenario = scenario(seed);
        let recording = record(&scenario, Detail::Default, here, counter(here));
        let late_counter = ToyCounter::new(there, 40, 2);
        let cpu = ToyCpu::new(seed, there).with_counter(late_counter);
        let replayed = replay(&recording.journal, cpu, None);
        let mut counts = late.get();
        match &replayed.verdict {
            Verdict::Equal(_) => {
                assert!(is_equal(&recording, &replayed), "equal, and yet it is not");
                counts[0] += 1;
            }
            Verdict::Failed(Broken::Overshot(_)) => counts[1] += 1,
            // It ran past its place and into an exit.
            Verdict::Diverged(_) => counts[1] += 1,
            other => panic!("expected a refusal, found {other:?}"),
        }
        late.set(counts);
    });
    println!("equal {}, noticed {}", late.get()[0], late.get()[1]);
    if std::env::var_os("HINDSIGHT_SIM_SEED").is_none() {
        assert!(late.get()[1] > 100, "{:?}", late.get());
    }
}
