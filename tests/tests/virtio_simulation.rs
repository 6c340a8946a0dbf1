//! The production loop over virtio drivers, seeded disks and a seeded world: recorded, replayed, and disturbed.

use std::convert::Infallible;

use hindsight_devices::{Devices, DiskSpec, Input, Nanos, NetSpec, Output, Room};
use hindsight_replay::rng::Rng;
use hindsight_replay::{
    Closed, Detail, Difference, End, Event, Header, Image, JournalReader, Live, Machine, Observer,
    Recorder, Replayer, RunError, TailReason, World,
};
use hindsight_tests::sim::{Scenario, cpuid_table, records_of};
use hindsight_tests::toy_disks::ToyDisks;
use hindsight_tests::toy_driver::ToyDriver;

const SEEDS: u64 = 300;
const NS_PER_EXIT: Nanos = 1_000;

fn devices() -> Devices {
    Devices {
        console: true,
        entropy: true,
        net: Some(NetSpec {
            mac: [2, 0, 0, 0, 0, 1],
        }),
        disks: vec![DiskSpec {
            bytes: 80 * 512,
            read_only: false,
            serial: "toy".into(),
        }],
    }
}

fn header(seed: u64) -> Header {
    let mut header = Scenario::new(seed).header(Detail::Default);
    header.machine.devices = devices();
    let image = |disk: &DiskSpec| Image {
        bytes: disk.bytes,
        sample: [0; 32],
    };
    header.machine.images = header.machine.devices.disks.iter().map(image).collect();
    header.machine.ns_per_exit = NS_PER_EXIT;
    header
}

fn machine() -> Machine {
    Machine::new(&devices(), cpuid_table(), NS_PER_EXIT)
}

/// Sends what there is room for, at times.
struct Busy {
    rng: Rng,
    now: Nanos,
    sent: Vec<Vec<u8>>,
}

impl World for Busy {
    fn now(&mut self) -> Nanos {
        self.now += self.rng.below(3_000);
        self.now
    }
    fn poll(&mut self, room: &Room) -> Option<Input> {
        let mut bytes = |most: u64| {
            let count = 1 + self.rng.below(most);
            (0..count).map(|_| self.rng.number() as u8).collect()
        };
        if room.entropy > 0 {
            return Some(Input::Entropy(bytes(room.entropy as u64)));
        }
        match bytes(6).len() {
            1 if room.frames > 0 => Some(Input::Frame(bytes(1500))),
            2 if room.virtio_console > 0 => Some(Input::VirtioConsole(bytes(
                40.min(room.virtio_console as u64),
            ))),
            _ => None,
        }
    }
    fn sleep(&mut self, _: Option<Nanos>, _: &Room) -> bool {
        false
    }
    fn send(&mut self, frame: &[u8]) {
        self.sent.push(frame.to_vec());
    }
    fn gives_up(&mut self) -> bool {
        false
    }
    fn alarm(&mut self, _: Option<Nanos>) {}
    fn input_waits(&mut self, _: &Room) -> bool {
        false
    }
}

#[derive(Default, PartialEq, Debug)]
struct Outputs(Vec<(u64, Output)>);

impl Observer for Outputs {
    fn output(&mut self, exits: u64, _: Nanos, output: &Output) {
        self.0.push((exits, output.clone()));
    }
}

struct Recorded {
    journal: Vec<u8>,
    result: Result<End, RunError<Infallible>>,
    outputs: Outputs,
    sent: Vec<Vec<u8>>,
}

fn record(seed: u64, mut disks: ToyDisks) -> Recorded {
    let mut journal = Vec::new();
    let world = Busy {
        rng: Rng::new(seed, 9),
        now: 0,
        sent: Vec::new(),
    };
    let live = Live::new(world, None);
    let mut recorder =
        Recorder::create(live, &mut journal, &header(seed)).expect("a Vec takes everything");
    let mut outputs = Outputs::default();
    let mut cpu = ToyDriver::new(&devices(), seed);
    let result = machine().run(&mut cpu, &mut disks, &mut recorder, &mut outputs);
    let sent = recorder.into_inner().into_world().sent;
    Recorded {
        journal,
        result,
        outputs,
        sent,
    }
}

fn replay(
    seed: u64,
    journal: &[u8],
    mut disks: ToyDisks,
) -> (Result<End, RunError<Infallible>>, Outputs) {
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
