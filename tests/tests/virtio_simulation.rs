//! The production loop over virtio drivers, seeded disks and a seeded world: recorded, replayed, and disturbed.

use hindsight_devices::{Input, Output};
use hindsight_replay::{
    Closed, Difference, End, Event, JournalReader, Replayer, RunError, TailReason,
};
use hindsight_tests::busy_world::{Outputs, devices, machine, record};
use hindsight_tests::sim::records_of;
use hindsight_tests::toy_disks::ToyDisks;
use hindsight_tests::toy_driver::{Refused, ToyDriver};

const SEEDS: u64 = 300;

fn replay(
    seed: u64,
    journal: &[u8],
    mut disks: ToyDisks,
) -> (Result<End, RunError<Refused>>, Outputs) {
    let reader = JournalReader::open(journal).expect("the head is whole");
    let mut replayer = Replayer::new(reader, None, None);
    let mut outputs = Outputs::default();
    let mut cpu = ToyDriver::new(&devices(), seed);
    let result = machine().run(&mut cpu, &mut disks, &mut replayer, &mut outputs);
    (result, outputs)
}

#[test]
fn whatever_goes_through_rings_replays_equal() {
    let mut events = [0; Event::KINDS];
    let (mut frames, mut consoles, mut inputs) = (0, 0, [0; 3]);
    for seed in 0..SEEDS {
        let recorded = record(seed, ToyDisks::new(seed));
        let end = recorded.result.expect("it ends with a reset");
        let (replayed, outputs) = replay(seed, &recorded.journal, ToyDisks::new(seed));
        assert_eq!(replayed.expect("it replays"), end, "seed {seed}");
        assert_eq!(outputs, recorded.outputs, "seed {seed}");
        for (_, output) in &outputs.0 {
            frames += usize::from(matches!(output, Output::Frame(_)));
            consoles += usize::from(matches!(output, Output::VirtioConsole(_)));
        }
        for record in records_of(&recorded.journal) {
            events[record.event.kind()] += 1;
            match record.event {
                Event::Input(Input::Frame(_)) => inputs[0] += 1,
                Event::Input(Input::Entropy(_)) => inputs[1] += 1,
                Event::Input(Input::VirtioConsole(_)) => inputs[2] += 1,
                _ => {}
            }
        }
        let sent = outputs
            .0
            .iter()
            .filter(|(_, output)| matches!(output, Output::Frame(_)));
        assert_eq!(
            sent.count(),
            recorded.sent.len(),
            "a frame went missing on its way out"
        );
    }
    let first_reads = events[Event::FirstReads { check: 0 }.kind()];
    println!(
        "{frames} frames and {consoles} console outputs; inputs {inputs:?}; {first_reads} first reads"
    );
    let most = |count: usize| count as u64 >= 2 * SEEDS;
    assert!(most(frames) && most(consoles) && inputs.into_iter().all(most) && most(first_reads));
}

#[test]
fn another_byte_in_a_block_that_was_read_is_noticed_and_in_one_that_was_not_is_not() {
    let (mut noticed, mut unnoticed) = (0, 0);
    for seed in 0..SEEDS {
        let recorded = record(seed, ToyDisks::new(seed));
        let end = recorded.result.expect("it ends with a reset");
        let disks = ToyDisks::new(seed).altered(seed % 64);
        match replay(seed, &recorded.journal, disks).0 {
            Ok(found) => {
                assert_eq!(found, end);
                unnoticed += 1;
            }
            Err(RunError::Closed(Closed::Diverged(divergence))) => {
                let is_image = matches!(divergence.difference, Difference::Image { disk: 0, .. });
                assert!(is_image, "seed {seed}: {divergence}");
                noticed += 1;
            }
            Err(other) => panic!("seed {seed}: {other}"),
        }
    }
    assert!(
        noticed > 30 && unnoticed > 30,
        "{noticed} noticed, {unnoticed} not"
    );
}

#[test]
fn a_disk_that_fails_leaves_a_recording_that_replays_to_the_exit_before() {
    let mut failed = 0;
    for seed in 0..SEEDS {
        let recorded = record(seed, ToyDisks::new(seed).failing(1 + seed % 20));
        let exits = match recorded.result {
            Ok(_) => continue,
            Err(RunError::Storage { exits, .. }) => exits,
            Err(other) => panic!("seed {seed}: {other}"),
        };
        failed += 1;
        match replay(seed, &recorded.journal, ToyDisks::new(seed)).0 {
            Err(RunError::Closed(Closed::CutShort(tail))) => {
                assert_eq!(tail.reason, TailReason::NotClosed, "seed {seed}");
                assert_eq!(tail.through, exits - 1, "seed {seed}");
            }
            other => panic!("seed {seed}: {other:?}"),
        }
    }
    assert!(failed > SEEDS / 2, "{failed} of {SEEDS}");
}
