//! Journals name vCPUs, and a machine has one so far. A number that it does not have is refused where a journal says it,
//! and is a difference where a machine is on another vCPU than the recorded one.

use hindsight_devices::{FirstReads, Input, Nanos, NoDisks, Room};
use hindsight_replay::rng::{Rng, mix};
use hindsight_replay::{
    Closed, Complete, Detail, Difference, Digest, End, FullDigest, Horizon, JournalError,
    JournalReader, JournalWriter, LeftOpen, Moment, Outside, Position, Record, Replayer, RunError,
    TailReason, TimeQuery, Turn, VCPUS, VcpuNumber,
};
use hindsight_tests::sim::{
    Recording, Scenario, Verdict, machine_of, move_to_vcpu, records_of, replay, write_records,
};
use hindsight_tests::sim_world::SimWorld;
use hindsight_tests::toy_counter::ToyCounter;
use hindsight_tests::toy_cpu::ToyCpu;

fn for_seeds(share: u64, check: impl Fn(u64)) {
    hindsight_tests::seeds::for_seeds("vcpus", 600, share, check);
}

fn scenario(seed: u64) -> Scenario {
    Scenario::new(seed).with_patience(20_000)
}

fn cpu(seed: u64, noise: u64) -> ToyCpu {
    ToyCpu::new(seed, noise).with_counter(ToyCounter::new(noise, 12, 13))
}

/// A recording with preemptions, so that it has all kinds of events that are of a vCPU.
fn recorded(seed: u64, detail: Detail) -> Recording {
    let scenario = scenario(seed);
    let world = SimWorld::new(seed, scenario.pace_ns);
    let (end, recording) = scenario.record_with(detail, world, cpu(seed, mix(seed)));
    let end = Some(end.expect("it is recorded"));
    Recording { end, ..recording }
}

fn detail(seed: u64) -> Detail {
    match seed % 3 {
        0 => Detail::Full,
        _ => Detail::Default,
    }
}

fn other_vcpu(rng: &mut Rng) -> VcpuNumber {
    VcpuNumber(VCPUS + rng.below(u64::from(u8::MAX - VCPUS) + 1) as u8)
}

#[test]
fn an_event_of_a_vcpu_that_the_machine_does_not_have_is_refused_by_name() {
    for_seeds(1, |seed| {
        let header = scenario(seed).header(detail(seed));
        let recording = recorded(seed, detail(seed));
        let mut records = records_of(&recording.journal);
        let of_vcpus = (0..records.len()).filter(|at| records[*at].event.vcpu().is_some());
        let of_vcpus: Vec<usize> = of_vcpus.collect();
        let mut rng = Rng::new(seed, 31);
        if of_vcpus.is_empty() {
            return;
        }
        let at = of_vcpus[rng.below(of_vcpus.len() as u64) as usize];
        let VcpuNumber(number) = other_vcpu(&mut rng);
        move_to_vcpu(&mut records[at].event, VcpuNumber(number));
        let Record { exits, event } = records[at].clone();
        let named = format!("vCPU {number} at exit {exits}, and the machine has {VCPUS},");

        let journal = write_records(&header, &records, 1 + rng.below(50) as usize);
        let replayed = replay(&journal, cpu(seed, mix(seed ^ 1)), None);
        let Verdict::CutShort(tail) = replayed.verdict else {
            panic!("{event:?}: {:?}", replayed.verdict);
        };
        assert!(
            matches!(&tail.reason, TailReason::Damaged(what) if what.contains(&named)),
            "{tail}"
        );
        assert!(tail.through <= exits, "{tail}");
        assert_eq!(replayed.trace, recording.trace.through(tail.through));

        let mut journal = Vec::new();
        let mut writer = JournalWriter::create(&mut journal, &header).expect("a Vec takes all");
        match writer.append(exits, event) {
            Err(JournalError::Refused(what)) => assert!(what.contains(&named), "{what}"),
            other => panic!("it was written: {other:?}"),
        }
    });
}

/// A door that takes the machine to be on another vCPU at one exit.
struct Elsewhere<D> {
    inner: D,
    exits: u64,
    vcpu: VcpuNumber,
}

impl<D> Elsewhere<D> {
    fn vcpu(&self, exits: u64, vcpu: VcpuNumber) -> VcpuNumber {
        match exits == self.exits {
            true => self.vcpu,
            false => vcpu,
        }
    }
}

impl<D: Outside<Closed = Closed>> Outside for Elsewhere<D> {
    type Closed = Closed;

    fn time(&mut self, query: &TimeQuery) -> Result<Nanos, Closed> {
        let vcpu = self.vcpu(query.exits, query.vcpu);
        self.inner.time(&TimeQuery { vcpu, ..*query })
    }
    fn arrival(&mut self, exits: u64, room: &Room) -> Result<Option<Input>, Closed> {
        self.inner.arrival(exits, room)
    }
    fn first_reads(&mut self, exits: u64, reads: &FirstReads) -> Result<(), Closed> {
        self.inner.first_reads(exits, reads)
    }
    fn posted(&mut self, exits: u64, bytes: &[u8]) -> Result<(), Closed> {
        self.inner.posted(exits, bytes)
    }
    fn turn(&mut self, exits: u64, turn: &Turn, digest: Digest) -> Result<(), Closed> {
        let vcpu = self.vcpu(exits, turn.vcpu);
        self.inner.turn(exits, &Turn { vcpu, ..*turn }, digest)
    }
    fn interrupt(&mut self, at: &Moment, vector: u8) -> Result<(), Closed> {
        let vcpu = self.vcpu(at.exits, at.vcpu);
        self.inner.interrupt(&Moment { vcpu, ..*at }, vector)
    }
    fn left_open(&mut self, exits: u64, what: LeftOpen) -> Result<(), Closed> {
        self.inner.left_open(exits, what)
    }
    fn wants_state(&mut self, exits: u64) -> bool {
        self.inner.wants_state(exits)
    }
    fn state(&mut self, exits: u64, digest: FullDigest) -> Result<(), Closed> {
        self.inner.state(exits, digest)
    }
    fn horizon(&mut self, position: &Position) -> Result<Horizon, Closed> {
        let vcpu = self.vcpu(position.exits + 1, position.vcpu);
        self.inner.horizon(&Position { vcpu, ..*position })
    }
    fn kicked(&mut self, position: &Position) -> Result<(), Closed> {
        self.inner.kicked(position)
    }
    fn end(&mut self, exits: u64, end: &End) -> Result<(), Closed> {
        self.inner.end(exits, end)
    }
    fn abandon(&mut self, complete: Complete) -> Result<(), Closed> {
        self.inner.abandon(complete)
    }
}

#[test]
fn a_machine_on_another_vcpu_than_the_recorded_one_differs_at_that_exit() {
    let noticed = std::cell::Cell::new([0; 3]);
    for_seeds(1, |seed| {
        let recording = recorded(seed, detail(seed));
        let records = records_of(&recording.journal);
        let mut rng = Rng::new(seed, 32);
        let of_vcpus = records
            .iter()
            .filter(|record| record.event.vcpu().is_some());
        let of_vcpus: Vec<&Record> = of_vcpus.collect();
        if of_vcpus.is_empty() {
            return;
        }
        let Record { exits, event } = of_vcpus[rng.below(of_vcpus.len() as u64) as usize];
        let reader = JournalReader::open(recording.journal.as_slice()).expect("it opens");
        let mut machine = machine_of(reader.header());
        let mut door = Elsewhere {
            inner: Replayer::new(reader, None, None),
            exits: *exits,
            vcpu: other_vcpu(&mut rng),
        };
        let mut cpu = cpu(seed, mix(seed ^ 1));
        let result = machine.run(&mut cpu, &mut NoDisks, &mut door, &mut ());
        let Err(RunError::Closed(Closed::Diverged(divergence))) = result else {
            panic!("{event:?}: {result:?}");
        };
        assert_eq!(divergence.at.exits, *exits, "{divergence}");
        let kind = match divergence.difference {
            Difference::Turn { field, .. } => {
                assert_eq!(field, "the vCPU");
                0
            }
            Difference::Interrupt { ref found, .. } => {
                let named = format!("on vCPU {}", door.vcpu.0);
                assert!(found.contains(&named), "{divergence}");
                1
            }
            Difference::Preemption { .. } => 2,
            _ => panic!("{divergence}"),
        };
        let mut counts = noticed.get();
        counts[kind] += 1;
        noticed.set(counts);
    });
    let noticed = noticed.get();
    println!("turns, interrupts and preemptions: {noticed:?}");
    let few = noticed.iter().sum::<u64>() < 300;
    assert!(
        few || noticed.iter().all(|count| *count > 20),
        "{noticed:?}"
    );
}
