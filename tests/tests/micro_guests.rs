//! Micro-guests on the host's own KVM: one for each exit and each trap port, recorded and replayed.
//!
//! The loop, the recorder and the replayer are those of the product, and so is the vCPU; only the
//! world is a seeded one. Every guest stays in ring 0, so that any KVM runs it, even one that
//! emulates. Where there is no `/dev/kvm`, or it lacks what a claim needs, the test says so and
//! passes.

use hindsight_tests::skip::skip;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hindsight_devices::{Access, Input, NoDisks, Output, POSTED_MAX, Reset, Width};
use hindsight_guest_images::layout::{
    CODE, DATA, DESCRIPTORS, GDT, IDT, KERNEL_CS, KERNEL_SS, MMIO, PAGE_DIRECTORY, PML4,
    PORT_FAULT, RAM_BYTES, STACK0,
};
use hindsight_guest_images::micro;
use hindsight_kernel::rewrite::modules::TextPlace;
use hindsight_kernel::rewrite::traps::{
    TRAP_CPUID, TRAP_MODULE, TRAP_PANIC, TRAP_PAUSE, TRAP_RDTSC, TRAP_RDTSCP, TRAP_READ_CR4,
    TRAP_WRITE_CR4,
};
use hindsight_kernel::{ModuleLayout, SiteKind};
use hindsight_replay::{
    Answer, Closed, CpuidTable, Detail, End, Ending, Event, Exit, JournalReader, Live, Mode,
    Moment, Observer, Recorder, Registers, Replayer, RunError, Tally, TimeInstruction, Turn,
};
use hindsight_tests::sim::{Scenario, Trace, machine_of, records_of};
use hindsight_tests::sim_world::SimWorld;
use hindsight_vmm::boot::{BootPlan, GuestRam};
use hindsight_vmm::kvm::probe::{Stuck, bounded};
use hindsight_vmm::kvm::{GuestMemory, KernelText, KvmCpu, KvmError, VcpuCounts};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kvm_ioctls::Kvm;

#[path = "micro_guests/accesses.rs"]
mod accesses;
#[path = "micro_guests/console.rs"]
mod console;
#[path = "micro_guests/debugging.rs"]
mod debugging;
#[path = "micro_guests/diversions.rs"]
mod diversions;
#[path = "micro_guests/interrupts.rs"]
mod interrupts;
#[path = "micro_guests/states.rs"]
mod states;
#[path = "micro_guests/stops.rs"]
mod stops;
#[path = "micro_guests/traps.rs"]
mod traps;

/// Worlds each guest is recorded in.
const SEEDS: [u64; 2] = [1, 2];
/// No guest needs a hundredth of this, even emulated in an emulated machine.
const LIMIT: Duration = Duration::from_secs(20);
/// A guest that was altered may run for ever; one that does not has ended by then.
const ALTERED_GUEST_TIME: Duration = Duration::from_millis(500);
/// Where the guests keep the operand of LIDT: limit and base of the IDT.
const IDT_POINTER: u64 = DATA + 0x100;
/// An operand of LIDT that leaves no IDT.
const NO_IDT_POINTER: u64 = DATA + 0x110;
/// The entry of [`TIMER_VECTOR`].
const ON_TIMER: u64 = CODE + 0x8000;
/// Where the guests put IRQ 0.
const TIMER_VECTOR: u8 = 0x20;
/// A port that nobody answers.
const NOBODY: u32 = 0xe8;

// Places in `Registers`.
const RAX: usize = 0;
const RBX: usize = 1;
const RCX: usize = 2;
const RDX: usize = 3;
const RSI: usize = 4;
const RSP: usize = 6;
const R8: usize = 8;

/// A guest: its code, and what stands at [`DATA`].
#[derive(Clone, Debug)]
struct Guest {
    code: Vec<u8>,
    data: &'static [u8],
    /// What the loader would have rewritten or found out.
    text: KernelText,
}

impl Guest {
    /// Assembles a guest. After what `write` writes it halts for good, by the first HLT of two: the
    /// second catches it should the first be altered.
    fn new(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Guest {
        Guest {
            code: assembled(CODE, |a| {
                write(a)?;
                a.cli()?;
                a.hlt()?;
                a.hlt()
            }),
            data: b"",
            text: KernelText::default(),
        }
    }

    /// The guest in a fresh VM, at its first instruction.
    fn load(&self, kvm: &Kvm, table: &CpuidTable) -> Result<KvmCpu, KvmError> {
        let mut memory = GuestMemory::new(RAM_BYTES)?;
        let mut tables = micro::halt();
        (tables.code, tables.data) = (self.code.clone(), self.data.to_vec());
        let idt_pointer = [&0xfffu16.to_le_bytes()[..], &IDT.to_le_bytes()].concat();
        let timer_gate = gate(ON_TIMER);
        let pieces = tables.image().into_iter().chain([
            (IDT_POINTER, idt_pointer),
            (IDT + 16 * u64::from(TIMER_VECTOR), timer_gate),
            (ON_TIMER, on_timer()),
        ]);
        for (gpa, bytes) in pieces {
            memory
                .write(gpa, &bytes)
                .expect("a guest fits into its RAM");
        }
        let mut cpu = KvmCpu::new(kvm, memory, table)?;
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
        cpu.boot(&plan, self.text.clone())?;
        Ok(cpu)
    }
}

fn assembled(at: u64, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("there are 64-bit guests");
    write(&mut a).expect("the instructions of a guest exist");
    a.assemble(at).expect("a guest's jumps reach")
}

/// Counts in EBX, tells the interrupt controller, and returns.
fn on_timer() -> Vec<u8> {
    assembled(ON_TIMER, |a| {
        a.push(rax)?;
        a.inc(ebx)?;
        a.mov(al, 0x20)?;
        a.out(0x20, al)?;
        a.pop(rax)?;
        a.iretq()
    })
}

/// An interrupt gate for ring 0 (Intel SDM vol. 3, 6.14.1).
fn gate(entry: u64) -> Vec<u8> {
    let present_interrupt = 0x8e00 << 32;
    let low = entry & 0xffff
        | u64::from(KERNEL_CS) << 16
        | present_interrupt
        | (entry >> 16 & 0xffff) << 48;
    [low.to_le_bytes(), (entry >> 32).to_le_bytes()].concat()
}

/// `out %al, $port`.
fn out(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(al, value)?;
    a.out(port, al)
}

/// Loads the IDT, has IRQ 0 arrive at [`TIMER_VECTOR`] and nothing else, and starts the timer once
/// for `ticks` (8259A data sheet, p. 10; 8254 data sheet, mode 0).
fn start_timer(a: &mut CodeAssembler, ticks: u32) -> Result<(), IcedError> {
    a.lidt(ptr(IDT_POINTER))?;
    for (port, value) in [
        (0x20, 0x11),
        (0x21, u32::from(TIMER_VECTOR)),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfe),
        (0x43, 0x30),
        (0x40, ticks & 0xff),
        (0x40, ticks >> 8),
    ] {
        out(a, port, value)?;
    }
    Ok(())
}

/// What a run left behind.
#[derive(Debug)]
struct Ran {
    outcome: Outcome,
    trace: Trace,
    tally: Tally,
    counts: VcpuCounts,
    memory: Vec<u8>,
    journal: Vec<u8>,
}

impl Ran {
    fn end(&self) -> &End {
        match &self.outcome {
            Outcome::Ended(end) => end,
            other => panic!("the run did not come to its end: {other:?}"),
        }
    }

    /// The exits, without the time and the registers.
    fn exits(&self) -> Vec<Exit> {
        self.trace.turns.iter().map(|turn| turn.exit).collect()
    }

    fn answers(&self) -> Vec<Answer> {
        self.trace.turns.iter().map(|turn| turn.answer).collect()
    }

    /// The registers at the last exit.
    fn registers(&self) -> [u64; Registers::COUNT] {
        let last = self
            .trace
            .turns
            .last()
            .expect("a guest exits at least once");
        last.registers.0
    }

    fn words<const N: usize>(&self, gpa: u64) -> [u64; N] {
        std::array::from_fn(|i| {
            let at = gpa as usize + 8 * i;
            u64::from_le_bytes(self.memory[at..at + 8].try_into().expect("eight bytes"))
        })
    }
}

#[derive(Debug)]
enum Outcome {
    /// To its end, and in a replay to the same.
    Ended(End),
    /// Not the recorded run.
    Diverged,
    /// The host could not go on: KVM gave up on an instruction, for one.
    Failed(String),
}

impl From<Result<End, RunError<KvmError>>> for Outcome {
    fn from(result: Result<End, RunError<KvmError>>) -> Outcome {
        match result {
            Ok(end) => Outcome::Ended(end),
            Err(RunError::Closed(Closed::Diverged(_))) => Outcome::Diverged,
            Err(other) => Outcome::Failed(other.to_string()),
        }
    }
}

/// Notes what happens, and has no patience with a guest that no longer exits.
#[derive(Default)]
struct Watch {
    trace: Trace,
    kicked: Arc<AtomicBool>,
}

impl Observer for Watch {
    fn output(&mut self, exits: u64, now: u64, output: &Output) {
        self.trace.output(exits, now, output);
    }
    fn turn(&mut self, exits: u64, turn: &Turn, guest: &mut dyn hindsight_replay::Guest) {
        self.trace.turn(exits, turn, guest);
    }
    fn interrupt(&mut self, at: &Moment, vector: u8, now: u64) {
        self.trace.interrupt(at, vector, now);
    }
    fn kicked(&mut self, exits: u64) {
        self.kicked.store(true, Ordering::Relaxed);
        // Not a panic: its backtrace would take longer than the guest is given.
        std::panic::resume_unwind(Box::new(format!("the guest runs on after exit {exits}")));
    }
}

/// How a guest is recorded.
#[derive(Clone, Copy, Debug)]
struct How {
    seed: u64,
    detail: Detail,
    memory_every: Option<u64>,
}

fn record(kvm: &Kvm, guest: &Guest, how: How) -> Ran {
    let scenario = Scenario {
        seed: how.seed,
        ns_per_exit: 1_000,
        pace_ns: 1_000,
        memory_every: how.memory_every,
        patience_ns: None,
        chaos: None,
        quick: false,
        panic_grace_ns: None,
    };
    let mut header = scenario.header(how.detail);
    header.machine.memory_bytes = RAM_BYTES;
    header.machine.cpuid = hindsight_vmm::kvm::cpuid::for_host(kvm).expect("KVM tells of its CPU");
    let world = SimWorld::new(scenario.seed, scenario.pace_ns);
    let live = Live::new(world, scenario.memory_every);
    let mut journal = Vec::new();
    let mut recorder =
        Recorder::create(live, &mut journal, &header).expect("a Vec takes everything");
    let mut cpu = guest
        .load(kvm, &header.machine.cpuid)
        .expect("KVM loads a guest");
    let mut machine = machine_of(&header);
    let mut watch = Watch::default();
    let result = machine.run(&mut cpu, &mut NoDisks, &mut recorder, &mut watch);
    drop(recorder);
    ran(result.into(), watch, machine.tally(), &cpu, journal)
}

fn replay(kvm: &Kvm, guest: &Guest, journal: &[u8], kicked: Arc<AtomicBool>) -> Ran {
    let reader = JournalReader::open(journal).expect("a whole journal opens");
    let mut cpu = guest
        .load(kvm, &reader.header().machine.cpuid)
        .expect("KVM loads a guest");
    let mut machine = machine_of(reader.header());
    let mut replayer = Replayer::new(reader, None, None);
    let mut watch = Watch {
        kicked,
        ..Watch::default()
    };
    let result = machine.run(&mut cpu, &mut NoDisks, &mut replayer, &mut watch);
    ran(result.into(), watch, machine.tally(), &cpu, Vec::new())
}

fn ran(outcome: Outcome, watch: Watch, tally: &Tally, cpu: &KvmCpu, journal: Vec<u8>) -> Ran {
    let mut memory = vec![0; RAM_BYTES as usize];
    assert!(cpu.memory().read(0, &mut memory), "all of it is RAM");
    Ran {
        outcome,
        trace: watch.trace,
        tally: tally.clone(),
        counts: cpu.counts(),
        memory,
        journal,
    }
}

/// The host's KVM, or word of what is missing.
fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            skip(&format!("/dev/kvm does not open: {error}"));
            None
        }
    }
}

/// Does `work` with a KVM of its own; a guest that hangs fails the test.
fn in_time<T: Send + 'static>(work: impl FnOnce(&Kvm) -> T + Send + 'static) -> T {
    let result = bounded(LIMIT, move |_| work(&kvm().expect("it opened before")));
    result.unwrap_or_else(|stuck| panic!("the run gave no result: {stuck:?}"))
}

/// Proves of `guest` what holds of every guest, and returns its recordings for the rest: those
/// that the operator did not stop.
fn proved(guest: &Guest) -> Vec<Ran> {
    if kvm().is_none() {
        return Vec::new();
    }
    let mut whole = Vec::new();
    for seed in SEEDS {
        let recordings = [
            (Detail::Default, None),
            (Detail::Full, None),
            (Detail::Default, Some(1)),
        ]
        .map(|(detail, memory_every)| {
            let how = How {
                seed,
                detail,
                memory_every,
            };
            let guest = guest.clone();
            in_time(move |kvm| recorded_and_replayed(kvm, &guest, how))
        });
        let [first, rest @ ..] = recordings;
        states::obeys_the_law(guest, &first);
        stops::are_unseen(guest, &first);
        diversions::leave_nothing(guest, &first);
        for other in rest {
            // Neither the detail of the journal nor a look at memory changes the run.
            assert_eq!(first.end(), other.end(), "seed {seed}");
            assert!(first.trace == other.trace, "seed {seed}: another run");
        }
        if first.end().ending != Ending::Stopped {
            whole.push(first);
        }
    }
    let first = whole.first().expect("some world lets the guest end");
    no_altered_guest_passes(guest, &first.journal);
    whole
}

fn recorded_and_replayed(kvm: &Kvm, guest: &Guest, how: How) -> Ran {
    let recorded = record(kvm, guest, how);
    recorded.end();
    for _ in 0..2 {
        let replayed = replay(kvm, guest, &recorded.journal, Arc::default());
        assert_eq!(replayed.end(), recorded.end(), "{how:?}");
        assert!(replayed.trace == recorded.trace, "{how:?}: another trace");
        assert!(replayed.memory == recorded.memory, "{how:?}: other memory");
    }
    recorded
}

/// Replays against the guest with one bit of one byte of its code flipped, each byte in turn.
fn no_altered_guest_passes(guest: &Guest, journal: &[u8]) {
    let mut diverged = 0;
    for at in 0..guest.code.len() {
        let (mut altered, journal) = (guest.clone(), journal.to_vec());
        altered.code[at] ^= 1;
        let kicked = Arc::new(AtomicBool::new(false));
        let theirs = kicked.clone();
        let result = bounded(ALTERED_GUEST_TIME, move |_| {
            let kvm = kvm().expect("it opened before");
            replay(&kvm, &altered, &journal, theirs).outcome
        });
        match result {
            Ok(Outcome::Diverged) => diverged += 1,
            Ok(Outcome::Failed(why)) => eprintln!("byte {at} altered: {why}"),
            Ok(Outcome::Ended(end)) => panic!("byte {at} altered, and yet it replays: {end:?}"),
            Err(Stuck::Panicked) if !kicked.load(Ordering::Relaxed) => {
                panic!("byte {at} altered, and the replayer panics")
            }
            // It runs on without an exit, so that nothing can be compared.
            Err(_) => eprintln!("byte {at} altered: it runs on"),
        }
    }
    eprintln!("{diverged} of {} altered guests diverged", guest.code.len());
    assert!(
        10 * diverged >= 7 * guest.code.len(),
        "of {} altered guests only {diverged} diverge",
        guest.code.len()
    );
}

fn port_read(port: u32, width: Width) -> Exit {
    let port = port as u16;
    Exit::Access(Access::PortRead { port, width })
}

fn port_write(port: u32, width: Width, value: u32) -> Exit {
    let port = port as u16;
    Exit::Access(Access::PortWrite { port, width, value })
}
