//! A world that sends what there is room for, to a machine with a virtio device of each kind.

use hindsight_devices::{Devices, DiskSpec, Input, Nanos, NetSpec, Output, Room};
use hindsight_replay::rng::Rng;
use hindsight_replay::{
    Detail, End, Header, Image, Live, Machine, Observer, Recorder, RunError, World,
};

use crate::sim::{Scenario, cpuid_table};
use crate::toy_disks::ToyDisks;
use crate::toy_driver::{Refused, ToyDriver};

const NS_PER_EXIT: Nanos = 1_000;

/// One device of each kind.
pub fn devices() -> Devices {
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

/// The head of the journals of a seed.
pub fn header(seed: u64) -> Header {
    let mut header = Scenario::new(seed).header(Detail::Default);
    header.machine.devices = devices();
    header.machine.quick_reads = None;
    let image = |disk: &DiskSpec| Image {
        bytes: disk.bytes,
        sample: [0; 32],
    };
    header.machine.images = header.machine.devices.disks.iter().map(image).collect();
    header.machine.ns_per_exit = NS_PER_EXIT;
    header
}

/// The machine.
pub fn machine() -> Machine {
    Machine::new(&devices(), cpuid_table(), NS_PER_EXIT)
}

/// Sends what there is room for, at times.
#[derive(Debug)]
pub struct BusyWorld {
    rng: Rng,
    now: Nanos,
    sent: Vec<Vec<u8>>,
}

impl World for BusyWorld {
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

/// What left the machine, with the exit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outputs(pub Vec<(u64, Output)>);

impl Observer for Outputs {
    fn output(&mut self, exits: u64, _: Nanos, output: &Output) {
        self.0.push((exits, output.clone()));
    }
}

/// What a recording came to.
#[derive(Debug)]
pub struct Recorded {
    /// The file.
    pub journal: Vec<u8>,
    /// How it ended.
    pub result: Result<End, RunError<Refused>>,
    /// Exits counted.
    pub exits: u64,
    /// What an observer saw.
    pub outputs: Outputs,
    /// Frames that reached the world.
    pub sent: Vec<Vec<u8>>,
}

/// Records the driver of a seed on these disks.
pub fn record(seed: u64, mut disks: ToyDisks) -> Recorded {
    let mut journal = Vec::new();
    let world = BusyWorld {
        rng: Rng::new(seed, 9),
        now: 0,
        sent: Vec::new(),
    };
    let live = Live::new(world, None);
    let mut recorder =
        Recorder::create(live, &mut journal, &header(seed)).expect("a Vec takes everything");
    let mut outputs = Outputs::default();
    let mut cpu = ToyDriver::new(&devices(), seed);
    let mut machine = machine();
    let result = machine.run(&mut cpu, &mut disks, &mut recorder, &mut outputs);
    let sent = recorder.into_inner().into_world().sent;
    Recorded {
        journal,
        result,
        exits: machine.at().exits,
        outputs,
        sent,
    }
}
