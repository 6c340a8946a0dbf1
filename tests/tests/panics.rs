//! What the machine takes for a panic of its guest, and what becomes of a guest that stays after one.

use hindsight_replay::{Detail, Ending, Exit};
use hindsight_tests::sim::{Recording, Scenario, Verdict, replay};
use hindsight_tests::toy_cpu::ToyCpu;

/// Guest time at which its kernel panicked, if it did.
fn panicked(recording: &Recording) -> Option<u64> {
    let mut turns = recording.trace.turns.iter();
    let panic = turns.find(|turn| matches!(turn.exit, Exit::Panic { .. }));
    panic.map(|turn| turn.now)
}

#[test]
fn a_kernel_that_says_so_has_panicked_and_a_program_that_prints_the_words_has_not() {
    let (mut panics, mut words) = (0, 0);
    for seed in 0..400 {
        let recording = Scenario::new(seed).record(Detail::Default, 1);
        let says = recording.trace.output.iter().flat_map(|(_, bytes)| bytes);
        let says: Vec<u8> = says.copied().collect();
        let says = String::from_utf8_lossy(&says).contains("Kernel panic - not syncing: the toy");
        let panicked = panicked(&recording).is_some();
        let end = recording.end.expect("it ended");
        assert_eq!(end.panic.is_some(), panicked, "seed {seed}");
        panics += u32::from(panicked);
        words += u32::from(says && !panicked);
    }
    assert!(
        panics >= 20 && words >= 10,
        "{panics} panics, {words} words"
    );
}

#[test]
fn a_guest_that_stays_after_a_panic_is_stopped_when_its_grace_is_over_and_replays() {
    let mut stopped = 0;
    for seed in 0..400 {
        let scenario = Scenario::new(seed);
        let grace_ns = 20 * scenario.ns_per_exit.max(scenario.pace_ns);
        let scenario = Scenario {
            panic_grace_ns: Some(grace_ns),
            ..scenario
        };
        let recording = scenario.record(Detail::Default, 1);
        let Some(since) = panicked(&recording) else {
            continue;
        };
        let (last, before) = recording.trace.turns.split_last().expect("it panicked");
        let over = |now| now >= since + grace_ns;
        assert!(before.iter().all(|turn| !over(turn.now)), "seed {seed}");
        let end = recording.end.clone().expect("it ended");
        assert!(end.panic.is_some(), "seed {seed}");
        if over(last.now) && end.ending == Ending::Stopped {
            stopped += 1;
        }
        let replayed = replay(&recording.journal, ToyCpu::new(seed, 2), None);
        assert!(
            matches!(&replayed.verdict, Verdict::Equal(found) if *found == end),
            "seed {seed}: {:?}",
            replayed.verdict
        );
    }
    assert!(stopped >= 10, "{stopped}");
}
