//! Landing torture: micro-guests with every class of instruction in them, stopped at random counts of
//! branches, interrupted there, and replayed.
//!
//!     torture [LANDINGS [FIRST_SEED]]
//!
//! The machine, the vCPU, the landing code, the recorder and the replayer are those of the product.
//! Recordings are of full detail, so that the replay compares all registers at each landing. Needs
//! a KVM that can record and an exact branch counter: `scripts/box --pmu`.

use std::process::ExitCode;
use std::time::Instant;

use hindsight_devices::{Devices, FirstReads, Input, Nanos, NoDisks, Room};
use hindsight_guest_images::layout::{
    CODE, DATA, DESCRIPTORS, GDT, KERNEL_CS, KERNEL_SS, PML4, RAM_BYTES, STACK0,
};
use hindsight_guest_images::micro::{self, Reach, Torture, Tortured};
use hindsight_replay::rng::Rng;
use hindsight_replay::{
    Closed, Complete, Content, CpuidTable, Detail, Digest, End, Exit, FullDigest, Guest, Header,
    Horizon, JournalReader, LeftOpen, Live, MachineDescription, Moment, Observer, Outside,
    Position, Recorder, Replayer, TimeQuery, TrapCounts, Turn, Unit, VCPUS, World,
};
use hindsight_tests::sim::bare_machine;
use hindsight_vmm::boot::{BootPlan, GuestRam};
use hindsight_vmm::kvm::{GuestMemory, KernelText, KvmCpu, cpuid};
use hindsight_vmm::session::{CounterWish, PreemptionPlan, PreemptionWish, host_facts, open_kvm};
use kvm_ioctls::Kvm;

/// Guest time passes by so much at each exit, and the timer ticks every second or third.
const NS_PER_EXIT: u64 = 20_000;
const TIMER_TICKS: u16 = 60;
const ROUNDS: u32 = 12;
/// Landings are up to two to this power branches apart.
const STRETCH_BITS: u64 = 10;

fn main() -> ExitCode {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<u64>());
    let (landings, first) = match (numbers.next(), numbers.next()) {
        (None, _) => (2_000, 1),
        (Some(Ok(landings)), None) => (landings, 1),
        (Some(Ok(landings)), Some(Ok(first))) => (landings, first),
        _ => {
            eprintln!("usage: torture [LANDINGS [FIRST_SEED]]");
            return ExitCode::from(2);
        }
    };
    match torture(landings, first) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("torture: {error}");
            ExitCode::FAILURE
        }
    }
}

fn torture(landings: u64, first: u64) -> Result<(), Box<dyn std::error::Error>> {
    let (kvm, holes) = open_kvm()?;
    let wish = PreemptionWish::Exactly(Some(Unit::Branches));
    let plan = PreemptionPlan::choose(&kvm, wish, &CounterWish::default())?;
    let facts = plan.facts().expect("branches were asked for");
    println!(
        "event {:#x}; of {} kicks the latest came {} branches late, so the margin is {}",
        facts.event, facts.kicks, facts.worst_skid, facts.margin
    );
    let mut bench = Bench {
        host: host_facts(holes),
        table: cpuid::for_host(&kvm)?,
        kvm,
        plan,
    };
    let start = Instant::now();
    let (mut done, mut interrupts, mut faults, mut seeds) = (0, 0, 0, 0);
    let mut times = [0.0; 2];
    for seed in first.. {
        if done >= landings {
            break;
        }
        let ran = bench
            .record_and_replay(seed)
            .map_err(|error| format!("seed {seed}: {error}"))?;
        done += ran.landings;
        interrupts += ran.tortured.interrupts;
        faults += ran.tortured.faults;
        seeds += 1;
        times[0] += ran.seconds[0];
        times[1] += ran.seconds[1];
    }
    println!(
        "SUMMARY {done} landings at random counts over {seeds} seeds, all found again with the same \
         registers ({interrupts} interrupts, {faults} page faults; memory equal at each end); recording \
         took {:.1} s, replaying {:.1} s, all {:.1} s",
        times[0],
        times[1],
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

struct Bench {
    kvm: Kvm,
    table: CpuidTable,
    plan: PreemptionPlan,
    host: hindsight_replay::Host,
}

struct Ran {
    landings: u64,
    tortured: Tortured,
    seconds: [f64; 2],
}

impl Bench {
    fn record_and_replay(&mut self, seed: u64) -> Result<Ran, Box<dyn std::error::Error>> {
        let header = self.header(seed);
        let mut journal = Vec::new();
        let live = Live::new(TortureWorld::default(), None);
        let poke = Poke {
            inner: live,
            rng: Rng::new(seed, 30),
            drawn: None,
        };
        let mut recorder = Recorder::create(poke, &mut journal, &header)?;
        let start = Instant::now();
        let (end, recorded) = self.run(seed, &mut recorder)?;
        let recording_s = start.elapsed().as_secs_f64();
        drop(recorder);

        let start = Instant::now();
        let mut replayer = Replayer::new(JournalReader::open(journal.as_slice())?, None, None);
        let (again, replayed) = self.run(seed, &mut replayer)?;
        if again != end || replayed.landings != recorded.landings {
            return Err("the replay is not the recording, and did not say so".into());
        }
        if replayed.tortured != recorded.tortured {
            return Err("the sums in memory differ, and the replay did not say so".into());
        }
        Ok(Ran {
            seconds: [recording_s, start.elapsed().as_secs_f64()],
            ..recorded
        })
    }

    fn run(
        &self,
        seed: u64,
        outside: &mut dyn Outside<Closed = Closed>,
    ) -> Result<(End, Ran), Box<dyn std::error::Error>> {
        let guest = micro::torture(Torture {
            seed,
            rounds: ROUNDS,
            reach: Reach::Both,
            timer_ticks: Some(TIMER_TICKS),
        });
        let mut memory = GuestMemory::new(RAM_BYTES)?;
        for (gpa, bytes) in guest.image() {
            memory
                .write(gpa, &bytes)
                .expect("a guest fits into its RAM");
        }
        let mut cpu = KvmCpu::new(&self.kvm, memory, &self.table)?;
        let plan = BootPlan {
            entry: CODE,
            rsp: STACK0,
            boot_params: 0,
            page_table: PML4,
            gdt_base: GDT,
            gdt_limit: (DESCRIPTORS * 8 - 1) as u16,
            code_selector: KERNEL_CS,
            data_selector: KERNEL_SS,
        };
        cpu.boot(&plan, KernelText::default())?;
        self.plan.apply(&mut cpu)?;
        let mut machine = bare_machine(self.table.clone(), NS_PER_EXIT);
        let mut count = Count(0);
        let end = machine.run(&mut cpu, &mut NoDisks, outside, &mut count)?;
        let mut data = [0; Tortured::BYTES];
        assert!(cpu.memory().read(DATA, &mut data), "DATA is RAM");
        let ran = Ran {
            landings: count.0,
            tortured: Tortured::read(&data),
            seconds: [0.0; 2],
        };
        Ok((end, ran))
    }

    fn header(&self, seed: u64) -> Header {
        Header {
            detail: Detail::Full,
            machine: MachineDescription {
                memory_bytes: RAM_BYTES,
                vcpus: VCPUS,
                cmdline: format!("torture {seed}"),
                kernel: Content {
                    bytes: seed,
                    blake3: [0; 32],
                },
                kernel_version: "torture".into(),
                initrd: None,
                traps: TrapCounts::default(),
                cpuid: self.table.clone(),
                seed: [0; 32],
                ns_per_exit: NS_PER_EXIT,
                preemption: self.plan.unit(),
                quick_reads: None,
                devices: Devices::default(),
                images: Vec::new(),
            },
            host: self.host.clone(),
        }
    }
}

/// Counts landings.
struct Count(u64);

impl Observer for Count {
    fn turn(&mut self, _exits: u64, turn: &Turn, _guest: &mut dyn Guest) {
        self.0 += u64::from(matches!(turn.exit, Exit::Preempted(_)));
    }
}

/// A clock that goes with the rule, and an operator who stops the guest when it has come to its
/// end and halts.
#[derive(Debug, Default)]
struct TortureWorld {
    now: Nanos,
    halted: bool,
}

impl World for TortureWorld {
    fn now(&mut self) -> Nanos {
        self.now += NS_PER_EXIT;
        self.now
    }
    fn poll(&mut self, _room: &Room) -> Option<Input> {
        std::mem::take(&mut self.halted).then_some(Input::Stop)
    }
    fn sleep(&mut self, _until: Option<Nanos>, _room: &Room) -> bool {
        self.halted = true;
        true
    }
    fn gives_up(&mut self) -> bool {
        false
    }
    fn alarm(&mut self, _at: Option<Nanos>) {}
    fn input_waits(&mut self, _room: &Room) -> bool {
        false
    }
}

/// Stops the guest at a random count after each exit.
struct Poke<O> {
    inner: O,
    rng: Rng,
    drawn: Option<(u64, Horizon)>,
}

impl<O: Outside<Closed = Closed>> Outside for Poke<O> {
    type Closed = Closed;

    fn horizon(&mut self, position: &Position) -> Result<Horizon, Closed> {
        self.inner.horizon(position)?;
        Ok(match self.drawn {
            Some((exits, horizon)) if exits == position.exits => horizon,
            _ => {
                let bits = self.rng.below(STRETCH_BITS);
                let horizon = Horizon::From(self.rng.below(2 << bits));
                self.drawn = Some((position.exits, horizon));
                horizon
            }
        })
    }
    fn time(&mut self, query: &TimeQuery) -> Result<Nanos, Closed> {
        self.inner.time(query)
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
        self.inner.turn(exits, turn, digest)
    }
    fn interrupt(&mut self, at: &Moment, vector: u8) -> Result<(), Closed> {
        self.inner.interrupt(at, vector)
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
