//! The recordings of the guests that the simulation has, and what they are replayed on.

use std::io::Cursor;

use hindsight_devices::{Nanos, NoDisks, Storage, StorageError};
use hindsight_replay::rng::{Rng, mix};
use hindsight_replay::{
    Changes, CheckpointHead, Checkpoints, Closed, Cpu, Detail, End, Exit, Header, JournalReader,
    Machine, RunError, Stateful, Turn,
};

use crate::busy_world;
use crate::sim::{Recording, RunEnd, Scenario, SimRecorder, Trace};
use crate::sim_world::SimWorld;
use crate::toy_counter::ToyCounter;
use crate::toy_cpu::ToyCpu;
use crate::toy_disks::ToyDisks;
use crate::toy_driver::ToyDriver;

/// A recording, and how to make what it is replayed on.
pub trait Recorded {
    type Cpu: Cpu + Stateful<Error = <Self::Cpu as Cpu>::Error>;
    type Disks: Storage + Stateful<Error = StorageError>;

    /// The head of the journal.
    fn header(&self) -> &Header;
    fn journal(&self) -> &[u8];
    fn end(&self) -> &End;
    fn exits(&self) -> u64;
    /// An exit before the last but one.
    fn place(&self, rng: &mut Rng) -> u64 {
        rng.below(self.exits() - 1)
    }
    /// On the host of `noise`.
    fn cpu(&self, noise: u64) -> Self::Cpu;
    fn disks(&self) -> Self::Disks;

    fn reader(&self) -> JournalReader<Cursor<&[u8]>> {
        JournalReader::open(Cursor::new(self.journal())).expect("the head is whole")
    }
}

/// The toy CPU's recording of a seed.
#[derive(Debug)]
pub struct Toy {
    seed: u64,
    counts: bool,
    distrusted: bool,
    header: Header,
    recording: Recording,
}

impl Toy {
    /// The same, replayed on CPUs whose state may be any.
    pub fn distrusted(self) -> Toy {
        Toy {
            distrusted: true,
            ..self
        }
    }

    /// Records it.
    pub fn record(seed: u64) -> Toy {
        Toy::record_by(seed, |machine, cpu, recorder, trace| {
            machine.run(cpu, &mut NoDisks, recorder, trace)
        })
    }

    /// Records it, and makes checkpoints in `store` meanwhile, which are as far apart as `spacing` says.
    pub fn record_keeping<K>(seed: u64, store: &mut K, mut spacing: impl FnMut() -> Nanos) -> Toy
    where
        K: Checkpoints<<ToyCpu as Stateful>::State, ()>,
    {
        Toy::record_by(seed, |machine, cpu, recorder, trace| {
            recorder.tell_places();
            let changes = Changes::from_power_on(cpu, &mut NoDisks);
            let mut changes = changes.expect("nothing is under way");
            loop {
                recorder.close_at_time(Some(machine.now() + spacing()));
                match machine.run(cpu, &mut NoDisks, recorder, trace) {
                    Err(RunError::Closed(Closed::Reached(_))) => {}
                    result => return result,
                }
                recorder.close_frame().expect("a Vec takes everything");
                let head = CheckpointHead::of(machine);
                let here = (&*machine, &mut *cpu, &mut NoDisks);
                let kept = changes.keep(here, recorder, store, head, None);
                kept.expect("it is at an exit").expect("there is room");
            }
        })
    }

    fn record_by(
        seed: u64,
        run: impl FnOnce(&mut Machine, &mut ToyCpu, &mut SimRecorder<'_>, &mut Trace) -> RunEnd,
    ) -> Toy {
        let mut scenario = Scenario::new(seed);
        // A quarter of them with a counter, since those take the longest, and half of these with trouble.
        let counts = seed.is_multiple_of(4);
        if counts {
            scenario = scenario.with_patience(20_000);
            scenario.chaos = seed.is_multiple_of(8).then_some(seed);
        }
        if seed.is_multiple_of(3) {
            scenario.panic_grace_ns = Some(1_000_000);
        }
        let detail = match mix(seed) % 8 {
            0 => Detail::Full,
            _ => Detail::Default,
        };
        let world = SimWorld::new(seed, scenario.pace_ns);
        let cpu = ToyCpu::new(seed, mix(seed));
        let cpu = match counts {
            true => counting(cpu, mix(seed)),
            false => cpu,
        };
        let (result, recording) = scenario.record_by(detail, world, cpu, run);
        Toy {
            seed,
            counts,
            distrusted: false,
            header: scenario.header(detail),
            recording: Recording {
                end: Some(result.expect("it is recorded")),
                ..recording
            },
        }
    }
}

fn counting(cpu: ToyCpu, noise: u64) -> ToyCpu {
    cpu.with_counter(ToyCounter::new(noise, 12, 13))
}

impl Recorded for Toy {
    type Cpu = ToyCpu;
    type Disks = NoDisks;

    fn header(&self) -> &Header {
        &self.header
    }
    fn journal(&self) -> &[u8] {
        &self.recording.journal
    }
    fn end(&self) -> &End {
        self.recording.end.as_ref().expect("it came to its end")
    }
    fn exits(&self) -> u64 {
        self.recording.exits
    }
    /// Every second time one at which the guest was preempted, if it was.
    fn place(&self, rng: &mut Rng) -> u64 {
        let place = rng.below(self.exits() - 1);
        let turns = &self.recording.trace.turns[..self.exits() as usize - 2];
        let preempted = |turn: &Turn| matches!(turn.exit, Exit::Preempted(_));
        let mut places = (1..)
            .zip(turns)
            .filter(|(at, turn)| *at >= place && preempted(turn));
        match rng.one_in(2) {
            true => places.next().map_or(place, |(at, _)| at),
            false => place,
        }
    }
    fn cpu(&self, noise: u64) -> ToyCpu {
        let cpu = ToyCpu::new(self.seed, noise);
        let cpu = match self.counts {
            true => counting(cpu, noise),
            false => cpu,
        };
        match self.distrusted {
            true => cpu.distrusted(),
            false => cpu,
        }
    }
    fn disks(&self) -> NoDisks {
        NoDisks
    }
}

/// The toy driver's recording of a seed.
#[derive(Debug)]
pub struct Driver {
    seed: u64,
    header: Header,
    recording: busy_world::Recorded,
}

impl Driver {
    /// Records it.
    pub fn record(seed: u64) -> Driver {
        Driver {
            seed,
            header: busy_world::header(seed),
            recording: busy_world::record(seed, ToyDisks::new(seed)),
        }
    }
}

impl Recorded for Driver {
    type Cpu = ToyDriver;
    type Disks = ToyDisks;

    fn header(&self) -> &Header {
        &self.header
    }
    fn journal(&self) -> &[u8] {
        &self.recording.journal
    }
    fn end(&self) -> &End {
        self.recording
            .result
            .as_ref()
            .expect("it ends with a reset")
    }
    fn exits(&self) -> u64 {
        self.recording.exits
    }
    fn cpu(&self, _: u64) -> ToyDriver {
        ToyDriver::new(&busy_world::devices(), self.seed)
    }
    fn disks(&self) -> ToyDisks {
        ToyDisks::new(self.seed)
    }
}
