//! Micro-guests on the host's own KVM: one for each exit and each trap port, recorded and replayed.
//!
//! The loop, the recorder and the replayer are those of the product, and so is the vCPU; only the
//! world is a seeded one. Every guest stays in ring 0, so that any KVM runs it, even one that
//! emulates. Where there is no `/dev/kvm`, or it lacks what a claim needs, the test says so and
//! passes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hindsight::boot::modules::TextPlace;
use hindsight::boot::traps::{
    TRAP_CPUID, TRAP_MODULE, TRAP_PANIC, TRAP_PAUSE, TRAP_RDTSC, TRAP_RDTSCP, TRAP_READ_CR4,
    TRAP_WRITE_CR4,
};
use hindsight::boot::{BootPlan, GuestRam, ModuleLayout, SiteKind};
use hindsight::kvm::probe::{Stuck, bounded};
use hindsight::kvm::{GuestMemory, KernelText, KvmCpu, KvmError, VcpuCounts};
use hindsight_devices::{Access, Input, NoDisks, Output, POSTED_MAX, Reset, Width};
use hindsight_guest_images::layout::{
    CODE, DATA, DESCRIPTORS, GDT, IDT, KERNEL_CS, KERNEL_SS, MMIO, PML4, PORT_FAULT, RAM_BYTES,
    STACK0,
};
use hindsight_guest_images::micro;
use hindsight_replay::{
    Answer, Closed, CpuidTable, Detail, End, Ending, Event, Exit, JournalReader, Live, Mode,
    Moment, Observer, Recorder, Registers, Replayer, RunError, Tally, TimeInstruction, Turn,
};
use hindsight_tests::sim::{Scenario, Trace, machine_of, records_of};
use hindsight_tests::sim_world::SimWorld;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kvm_ioctls::Kvm;

#[path = "micro_guests/debugging.rs"]
mod debugging;

/// Worlds each guest is recorded in.
const SEEDS: [u64; 2] = [1, 2];
/// No guest needs a hundredth of this, even emulated in an emulated machine.
const LIMIT: Duration = Duration::from_secs(20);
/// A guest that was altered may run for ever; one that does not has ended by then.
const PATIENCE: Duration = Duration::from_millis(500);
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
    /// Assembles a guest. Behind what `write` writes it halts for good, by the first HLT of two: the
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
        std::panic::resume_unwind(Box::new(format!("the guest runs on behind exit {exits}")));
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
    header.machine.cpuid = hindsight::kvm::cpuid::for_host(kvm).expect("KVM tells of its CPU");
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
            eprintln!("skipped: /dev/kvm does not open: {error}");
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
        let result = bounded(PATIENCE, move |_| {
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

#[test]
fn a_port_takes_and_gives_one_two_and_four_bytes() {
    let guest = Guest::new(|a| {
        a.mov(eax, 0xdead_beefu32)?;
        a.out(NOBODY, al)?;
        a.out(NOBODY, ax)?;
        a.out(NOBODY, eax)?;
        a.mov(rax, 0x1111_2222_3333_4444u64)?;
        a.in_(al, 0x92)?;
        a.mov(rbx, rax)?;
        a.in_(ax, 0x91)?;
        a.mov(rcx, rax)?;
        a.in_(eax, 0x90)
    });
    for ran in proved(&guest) {
        let expected = [
            port_write(NOBODY, Width::Byte, 0xef),
            port_write(NOBODY, Width::Word, 0xbeef),
            port_write(NOBODY, Width::Dword, 0xdead_beef),
            port_read(0x92, Width::Byte),
            port_read(0x91, Width::Word),
            port_read(0x90, Width::Dword),
            Exit::Halt,
        ];
        assert_eq!(ran.exits(), expected);
        // Port 0x92 says that A20 is open; its neighbours float.
        let registers = ran.registers();
        assert_eq!(registers[RBX], 0x1111_2222_3333_4402);
        assert_eq!(registers[RCX], 0x1111_2222_3333_02ff);
        assert_eq!(registers[RAX], 0xff02_ffff, "a 32-bit read clears the rest");
        assert_eq!(ran.end().ending, Ending::Halted);
    }
}

#[test]
fn each_byte_of_a_string_instruction_is_an_exit_of_its_own() {
    let mut guest = Guest::new(|a| {
        a.cld()?;
        a.mov(rsi, DATA)?;
        a.mov(ecx, 5)?;
        a.mov(edx, NOBODY)?;
        a.rep().outsb()?;
        a.mov(rdi, DATA + 0x10)?;
        a.mov(ecx, 4)?;
        a.mov(edx, 0x92)?;
        a.rep().insb()
    });
    guest.data = b"hello";
    for ran in proved(&guest) {
        let written = b"hello".map(|byte| port_write(NOBODY, Width::Byte, byte.into()));
        let read = [port_read(0x92, Width::Byte); 4];
        let expected = [&written[..], &read, &[Exit::Halt]].concat();
        assert_eq!(ran.exits(), expected);
        assert_eq!(ran.words(DATA + 0x10), [0x0202_0202]);
        assert_eq!(ran.registers()[RCX], 0);
        assert_eq!(ran.registers()[RSI], DATA + 5);
    }
}

#[test]
fn memory_without_ram_takes_stores_and_floats_in_every_width() {
    let guest = Guest::new(|a| {
        a.mov(rdi, MMIO)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(byte_ptr(rdi), al)?;
        a.mov(word_ptr(rdi + 2), ax)?;
        a.mov(dword_ptr(rdi + 4), eax)?;
        a.mov(qword_ptr(rdi + 8), rax)?;
        a.mov(al, byte_ptr(rdi))?;
        a.mov(rbx, rax)?;
        a.mov(ax, word_ptr(rdi + 2))?;
        a.mov(rcx, rax)?;
        a.mov(eax, dword_ptr(rdi + 4))?;
        a.mov(rdx, qword_ptr(rdi + 8))
    });
    let store = |gpa, width, value| Exit::Access(Access::MemoryWrite { gpa, width, value });
    let load = |gpa, width| Exit::Access(Access::MemoryRead { gpa, width });
    for ran in proved(&guest) {
        let expected = [
            store(MMIO, Width::Byte, 0x88),
            store(MMIO + 2, Width::Word, 0x7788),
            store(MMIO + 4, Width::Dword, 0x5566_7788),
            store(MMIO + 8, Width::Qword, 0x1122_3344_5566_7788),
            load(MMIO, Width::Byte),
            load(MMIO + 2, Width::Word),
            load(MMIO + 4, Width::Dword),
            load(MMIO + 8, Width::Qword),
            Exit::Halt,
        ];
        assert_eq!(ran.exits(), expected);
        let registers = ran.registers();
        assert_eq!(registers[RBX], 0x1122_3344_5566_77ff);
        assert_eq!(registers[RCX], 0x1122_3344_5566_ffff);
        assert_eq!(registers[RAX], 0xffff_ffff);
        assert_eq!(registers[RDX], u64::MAX);
    }
}

#[test]
fn an_access_across_a_page_edge_arrives_whole() {
    let edge = MMIO + 0x1000;
    let guest = Guest::new(|a| {
        a.mov(rdi, edge - 3)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(qword_ptr(rdi), rax)?;
        a.mov(rbx, qword_ptr(rdi))
    });
    for ran in proved(&guest) {
        let (mut stored, mut loaded) = (Vec::<u8>::new(), 0);
        for exit in ran.exits() {
            match exit {
                Exit::Access(Access::MemoryWrite { gpa, width, value }) => {
                    assert_eq!(gpa, edge - 3 + stored.len() as u64);
                    stored.extend(&value.to_le_bytes()[..width.bytes()]);
                }
                Exit::Access(Access::MemoryRead { gpa, width }) => {
                    assert_eq!(gpa, edge - 3 + loaded);
                    loaded += width.bytes() as u64;
                }
                exit => assert_eq!(exit, Exit::Halt),
            }
        }
        assert_eq!(stored, 0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!((loaded, ran.registers()[RBX]), (8, u64::MAX));
    }
}

#[test]
fn the_board_answers_for_the_time_stamp_counter_and_its_neighbour() {
    let guest = Guest::new(|a| {
        a.mov(ecx, 0xc000_0103u32)?;
        a.mov(eax, 0x1234)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(rax, -1i64)?;
        a.mov(rdx, -1i64)?;
        a.rdmsr()?;
        a.mov(r8, rax)?;
        a.mov(ecx, 0x10)?;
        a.rdmsr()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)
    });
    for ran in proved(&guest) {
        let aux = 0xc000_0103;
        let expected = [
            Exit::Access(Access::MsrWrite {
                index: aux,
                value: 0x1234,
            }),
            Exit::Access(Access::MsrRead { index: aux }),
            Exit::Access(Access::MsrRead { index: 0x10 }),
            Exit::Halt,
        ];
        assert_eq!(ran.exits(), expected);
        let registers = ran.registers();
        assert_eq!(registers[R8], 0x1234);
        assert_eq!(
            registers[RAX], ran.trace.turns[2].now,
            "one tick per nanosecond"
        );
    }
}

#[test]
fn a_register_that_the_board_refuses_is_a_protection_fault() {
    let guest = Guest::new(|a| {
        a.lidt(ptr(IDT_POINTER))?;
        a.mov(ecx, 0x198)?;
        a.rdmsr()
    });
    for ran in proved(&guest) {
        let fault = port_write(
            PORT_FAULT.into(),
            Width::Byte,
            ran.registers()[RAX] as u32 & 0xff,
        );
        let read = Exit::Access(Access::MsrRead { index: 0x198 });
        assert_eq!(ran.exits(), [read, fault, Exit::Halt]);
        assert_eq!(ran.answers()[0], Answer::Fault);
        // The default entry leaves vector, error code and RIP on the stack.
        let stack = ran.trace.turns[1].registers.0[RSP];
        let rdmsr = CODE + guest.code.len() as u64 - 5;
        assert_eq!(ran.words(stack), [13, 0, rdmsr, KERNEL_CS.into()]);
    }
}

#[test]
fn time_reads_through_trap_ports_land_in_the_right_registers() {
    let guest = Guest::new(|a| {
        a.mov(ecx, 0xc000_0103u32)?;
        a.mov(eax, 0x77)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        for trap in [TRAP_RDTSC, TRAP_RDTSCP] {
            a.mov(rax, -1i64)?;
            a.mov(rcx, -1i64)?;
            a.mov(rdx, -1i64)?;
            a.out(u32::from(trap), al)?;
            a.out(NOBODY, al)?;
        }
        Ok(())
    });
    let read = |instruction| Exit::TimeRead {
        instruction,
        mode: Mode::Kernel,
    };
    for ran in proved(&guest) {
        let turns = &ran.trace.turns;
        assert_eq!(turns.len(), 6);
        assert_eq!(turns[1].exit, read(TimeInstruction::Rdtsc));
        assert_eq!(turns[3].exit, read(TimeInstruction::Rdtscp));
        for (at, counter, aux) in [(1, u64::MAX, 0), (3, 0x77, 0x77)] {
            let tsc = turns[at].now;
            assert_eq!(turns[at].answer, Answer::Time { tsc, aux });
            let behind = turns[at + 1].registers.0;
            assert_eq!(behind[RAX], tsc & 0xffff_ffff);
            assert_eq!((behind[RCX], behind[RDX]), (counter, tsc >> 32));
        }
    }
}

#[test]
fn cpuid_through_its_trap_port_answers_from_the_table() {
    let guest = Guest::new(|a| {
        a.mov(rax, 0xffff_ffff_8000_0002u64)?;
        a.mov(rcx, -1i64)?;
        a.out(u32::from(TRAP_CPUID), al)?;
        a.out(NOBODY, eax)?;
        a.mov(eax, 0x4000_0000)?;
        a.out(u32::from(TRAP_CPUID), al)
    });
    for ran in proved(&guest) {
        let [first, _, second, halt] = ran.trace.turns[..] else {
            panic!("four exits, not {:?}", ran.exits());
        };
        let table = in_time(|kvm| hindsight::kvm::cpuid::for_host(kvm).expect("a table"));
        let answer = table.answer(0x8000_0002, 0xffff_ffff);
        let cpuid = |leaf| Exit::Cpuid {
            leaf,
            subleaf: first.registers.rcx() as u32,
        };
        assert_eq!(first.exit, cpuid(0x8000_0002));
        assert_eq!(first.answer, Answer::Cpuid(answer));
        let behind = ran.trace.turns[1].registers.0;
        let order = [RAX, RBX, RCX, RDX].map(|at| behind[at]);
        assert_eq!(order, answer.map(u64::from));
        // Nobody tells this guest of the hypervisor.
        assert_eq!(second.answer, Answer::Cpuid([0; 4]));
        assert_eq!(halt.registers.0[..4], [0; 4]);
    }
}

#[test]
fn a_pause_through_its_trap_port_changes_no_register() {
    let guest = Guest::new(|a| {
        a.mov(rax, -1i64)?;
        a.out(u32::from(TRAP_PAUSE), al)
    });
    for ran in proved(&guest) {
        assert_eq!(ran.exits(), [Exit::Pause, Exit::Halt]);
        let [pause, halt] = [0, 1].map(|at| ran.trace.turns[at].registers.0);
        assert_eq!(pause[..16], halt[..16]);
    }
}

#[test]
fn control_register_4_reads_back_as_it_was_written() {
    // PAE, which it had, and OSFXSR. The time-stamp bit that the machine keeps set stays hidden.
    let value = 1 << 5 | 1 << 9;
    let mut guest = Guest::new(|a| {
        a.mov(ebx, value as u32)?;
        a.out(u32::from(TRAP_WRITE_CR4), al)?;
        a.mov(rsi, -1i64)?;
        a.out(u32::from(TRAP_READ_CR4), al)
    });
    // By the registers' numbers in instructions: RBX is 3, RSI 6.
    let sites = [
        (TRAP_WRITE_CR4, SiteKind::WriteCr4 { source: 3 }),
        (TRAP_READ_CR4, SiteKind::ReadCr4 { target: 6 }),
    ];
    for (trap, kind) in sites {
        let at = guest.code.windows(2).position(|two| two == [0xe6, trap]);
        let at = CODE + at.expect("the guest has this trap") as u64;
        guest.text.sites.insert(at, kind, 3);
    }
    for ran in proved(&guest) {
        assert_eq!(
            ran.exits(),
            [Exit::WriteCr4 { value }, Exit::ReadCr4, Exit::Halt]
        );
        assert_eq!(ran.registers()[RSI], value);
    }
}

#[test]
fn a_refused_write_of_control_register_4_faults_where_it_stands() {
    let mut guest = Guest::new(|a| {
        a.lidt(ptr(IDT_POINTER))?;
        // A bit that no CPU has.
        a.mov(rbx, 1u64 << 63)?;
        a.db(&[0xe6, TRAP_WRITE_CR4, 0x90])
    });
    let trap = [0xe6, TRAP_WRITE_CR4, 0x90];
    let at = guest.code.windows(3).position(|three| three == trap);
    let at = CODE + at.expect("the guest has this trap") as u64;
    let kind = SiteKind::WriteCr4 { source: 3 };
    guest.text.sites.insert(at, kind, 3);
    for ran in proved(&guest) {
        let write = Exit::WriteCr4 { value: 1 << 63 };
        let fault = port_write(PORT_FAULT.into(), Width::Byte, 0);
        assert_eq!(ran.exits(), [write, fault, Exit::Halt]);
        let [vector, error, rip, code] = ran.words(ran.registers()[RSP]);
        assert_eq!([vector, error, code], [13, 0, KERNEL_CS.into()]);
        assert_eq!(rip, at, "what the fault pushed");
    }
}

#[test]
fn a_kernel_that_says_that_it_panics_is_seen_and_its_call_is_made() {
    let mut guest = Guest::new(|a| {
        let (mut start, mut print) = (a.create_label(), a.create_label());
        a.jmp(start)?;
        a.set_label(&mut print)?;
        a.mov(r8, qword_ptr(rsp))?;
        a.ret()?;
        a.set_label(&mut start)?;
        a.mov(rsi, DATA)?;
        a.db(&[0xe6, TRAP_PANIC, 0x90, 0x90, 0x90])
    });
    guest.data = b"the toaster is on fire\nand more\0";
    let find = |bytes: &[u8]| {
        let at = guest.code.windows(bytes.len()).position(|at| at == bytes);
        CODE + at.expect("the guest has this") as u64
    };
    let (call, target) = (find(&[0xe6, TRAP_PANIC]), find(&[0x4c, 0x8b, 0x04, 0x24]));
    guest.text.sites.insert(call, SiteKind::Panic { target }, 5);
    for ran in proved(&guest) {
        assert_eq!(ran.exits(), [Exit::Panic { message: DATA }, Exit::Halt]);
        assert_eq!(ran.registers()[R8], call + 5, "what the call pushed");
        let panic = ran.end().panic.as_deref();
        assert_eq!(panic, Some("the toaster is on fire"));
    }
}

/// A guest that "loads a module" of two functions, one across the edge of two pages, by a call or a jump that the loader
/// has rewritten; `target` of it begins with the load of R8.
fn module_guest(returns: bool) -> (Guest, u64) {
    let mut guest = Guest::new(|a| {
        let mut start = a.create_label();
        let mut behind = a.create_label();
        a.jmp(start)?;
        a.mov(r8, qword_ptr(rsp))?;
        for function in MODULE_TEXTS {
            a.mov(rbx, function)?;
            a.call(rbx)?;
        }
        if returns {
            a.ret()?;
        } else {
            a.jmp(behind)?;
        }
        a.set_label(&mut start)?;
        a.mov(rdi, MODULE)?;
        for (place, (at, code)) in MODULE_TEXTS.into_iter().zip(MODULE_CODE).enumerate() {
            a.mov(rax, u64::from_le_bytes(code.0))?;
            a.mov(rbx, at)?;
            a.mov(qword_ptr(rbx), rax)?;
            a.mov(qword_ptr(rdi + 16 * place), rbx)?;
            a.mov(dword_ptr(rdi + 16 * place + 8), code.1)?;
        }
        a.db(&[0xe6, TRAP_MODULE, 0x90, 0x90, 0x90])?;
        a.set_label(&mut behind)?;
        a.nop()
    });
    let find = |bytes: &[u8]| {
        let at = guest.code.windows(bytes.len()).position(|at| at == bytes);
        CODE + at.expect("the guest has this") as u64
    };
    let (call, target) = (find(&[0xe6, TRAP_MODULE]), find(&[0x4c, 0x8b, 0x04, 0x24]));
    let kind = SiteKind::Module { target, returns };
    guest.text.sites.insert(call, kind, 5);
    let place = |base| TextPlace {
        base,
        bytes: base + 8,
    };
    guest.text.modules = Some(ModuleLayout {
        texts: [place(0), place(16)],
        symbols: None,
    });
    (guest, call)
}

/// Where the guest's kernel keeps its `struct module`.
const MODULE: u64 = 0x6_0000;
const MODULE_TEXTS: [u64; 2] = [0x5_0fff, 0x5_2000];
/// RDTSC and RDTSCP, each with a RET, and their lengths in bytes.
const MODULE_CODE: [([u8; 8], u32); 2] = [
    ([0x0f, 0x31, 0xc3, 0, 0, 0, 0, 0], 3),
    ([0x0f, 0x01, 0xf9, 0xc3, 0, 0, 0, 0], 4),
];

#[test]
fn a_module_is_rewritten_at_the_call_that_makes_it_executable_and_the_call_is_made() {
    for returns in [true, false] {
        let (guest, call) = module_guest(returns);
        for ran in proved(&guest) {
            let read = |instruction| Exit::TimeRead {
                instruction,
                mode: Mode::Kernel,
            };
            let loaded = Exit::Module {
                module: MODULE,
                sites: 2,
            };
            let [rdtsc, rdtscp] = [TimeInstruction::Rdtsc, TimeInstruction::Rdtscp].map(read);
            assert_eq!(ran.exits(), [loaded, rdtsc, rdtscp, Exit::Halt]);
            assert_eq!(ran.tally.module_sites, 2);
            assert_eq!(ran.registers()[RSP], STACK0);
            let text = |at: u64, bytes: usize| &ran.memory[at as usize..][..bytes];
            assert_eq!(text(MODULE_TEXTS[0], 3), [0xe6, TRAP_RDTSC, 0xc3]);
            assert_eq!(text(MODULE_TEXTS[1], 4), [0xe6, TRAP_RDTSCP, 0x90, 0xc3]);
            if returns {
                assert_eq!(ran.registers()[R8], call + 5, "what the call pushed");
            }
        }
    }
}

#[test]
fn the_timer_wakes_a_halted_guest_through_the_interrupt_controller() {
    let guest = Guest::new(|a| {
        start_timer(a, 200)?;
        a.xor(ebx, ebx)?;
        a.sti()?;
        a.hlt()?;
        a.mov(r8d, ebx)
    });
    for ran in proved(&guest) {
        let vectors: Vec<u8> = ran.trace.interrupts.iter().map(|i| i.1).collect();
        assert_eq!(vectors, [TIMER_VECTOR]);
        assert_eq!(
            ran.registers()[R8],
            1,
            "once, and before the next instruction"
        );
        assert!(ran.exits().contains(&Exit::Woken));
        assert_eq!(ran.tally.windows, 0, "a wake-up needs no window");
        let set = 200 * 1_000_000_000 / 1_193_182;
        assert!(ran.end().now >= set, "200 ticks are {set} ns");
    }
}

/// Writes a register that fits into EAX.
fn write_msr(a: &mut CodeAssembler, index: u32, value: u32) -> Result<(), IcedError> {
    a.mov(ecx, index)?;
    a.mov(eax, value)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

#[test]
fn the_local_apic_is_the_boards_and_its_deadline_wakes_a_halted_guest() {
    // As an x2APIC: KVM lets no filter near its registers, and hands them on all the same.
    let guest = Guest::new(|a| {
        a.lidt(ptr(IDT_POINTER))?;
        a.xor(ebx, ebx)?;
        write_msr(a, 0x1b, 0xfee0_0d00)?;
        write_msr(a, 0x832, 2 << 17 | u32::from(TIMER_VECTOR))?;
        write_msr(a, 0x6e0, 3_000_000)?;
        a.sti()?;
        a.hlt()?;
        write_msr(a, 0x80b, 0)?;
        write_msr(a, 0x83f, TIMER_VECTOR.into())?;
        a.nop()?;
        a.mov(r8d, ebx)?;
        a.mov(ecx, 0x803)?;
        a.rdmsr()
    });
    for ran in proved(&guest) {
        let vectors: Vec<u8> = ran.trace.interrupts.iter().map(|i| i.1).collect();
        assert_eq!(
            vectors, [TIMER_VECTOR; 2],
            "the deadline and an IPI to itself"
        );
        assert_eq!(ran.registers()[R8], 2);
        assert_eq!(ran.registers()[RAX], 0x0005_0014, "its version");
        assert!(ran.exits().contains(&Exit::Woken) && ran.end().now >= 3_000_000);
    }
}

#[test]
fn a_guest_that_uses_cr8_goes_on() {
    let guest = Guest::new(|a| {
        a.mov(eax, 15)?;
        a.mov(cr8, rax)?;
        a.xor(eax, eax)?;
        a.mov(cr8, rax)?;
        out(a, NOBODY, 1)
    });
    for ran in proved(&guest) {
        assert_eq!(
            ran.exits(),
            [port_write(NOBODY, Width::Byte, 1), Exit::Halt]
        );
    }
}

#[test]
fn a_guest_can_turn_the_machine_off() {
    let guest = Guest::new(|a| {
        a.mov(edx, 0x605)?;
        out_dx(a, 0x34)
    });
    for ran in proved(&guest) {
        assert_eq!(ran.end().ending, Ending::PowerOff);
    }
}

#[test]
fn a_pending_interrupt_lands_behind_the_instruction_that_follows_sti() {
    let guest = Guest::new(|a| {
        start_timer(a, 1)?;
        out(a, 0x20, 0x0a)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.in_(al, 0x20)?;
        a.test(al, 1)?;
        a.jz(again)?;
        a.xor(ebx, ebx)?;
        a.sti()?;
        a.mov(r8d, ebx)?;
        a.mov(r9d, ebx)
    });
    for ran in proved(&guest) {
        if ran.tally.windows == 0
            && let Err(why) = in_time(hindsight::doctor::check_recorder)
        {
            eprintln!("skipped: no window opened, and {why}");
            return;
        }
        let [(at, TIMER_VECTOR)] = ran.trace.interrupts[..] else {
            panic!("one interrupt, not {:?}", ran.trace.interrupts);
        };
        assert_eq!(ran.registers()[R8..=R8 + 1], [0, 1]);
        // Behind the two moves, of three bytes each, stand CLI and two HLT.
        let behind_r8 = CODE + guest.code.len() as u64 - 3 - 3;
        assert_eq!(at.rip, behind_r8);
        assert!(ran.tally.windows >= 1, "{:?}", ran.counts);
    }
}

#[test]
fn a_guest_that_halts_behind_sti_does_not_sleep_through_a_pending_interrupt() {
    let guest = Guest::new(|a| {
        start_timer(a, 1)?;
        out(a, 0x20, 0x0a)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.in_(al, 0x20)?;
        a.test(al, 1)?;
        a.jz(again)?;
        a.xor(ebx, ebx)?;
        a.sti()?;
        a.hlt()?;
        a.mov(r8d, ebx)
    });
    for ran in proved(&guest) {
        let [(at, TIMER_VECTOR)] = ran.trace.interrupts[..] else {
            panic!("one interrupt, not {:?}", ran.trace.interrupts);
        };
        // Behind HLT stand a move of three bytes, CLI and two HLT.
        assert_eq!(at.rip, CODE + guest.code.len() as u64 - 6);
        assert_eq!(ran.registers()[R8], 1);
    }
}

#[test]
fn a_triple_fault_ends_the_run() {
    let guest = Guest::new(|a| {
        a.lidt(ptr(NO_IDT_POINTER))?;
        a.ud2()
    });
    for ran in proved(&guest) {
        assert_eq!(ran.exits(), [Exit::Shutdown]);
        assert_eq!(ran.end().ending, Ending::TripleFault);
    }
}

#[test]
fn the_keyboard_controller_resets_the_machine() {
    let guest = Guest::new(|a| out(a, 0x64, 0xfe));
    for ran in proved(&guest) {
        assert_eq!(ran.exits(), [port_write(0x64, Width::Byte, 0xfe)]);
        assert_eq!(ran.end().ending, Ending::Reset(Reset::Keyboard));
    }
}

#[test]
fn what_the_guest_prints_is_seen() {
    let guest = Guest::new(|a| {
        a.mov(edx, 0x3f8)?;
        for byte in b"ok" {
            a.mov(al, u32::from(*byte))?;
            a.out(dx, al)?;
        }
        Ok(())
    });
    for ran in proved(&guest) {
        assert_eq!(ran.exits(), [Exit::Halt]);
        assert_eq!(ran.trace.output, [(1, b"ok".to_vec())]);
    }
}

#[test]
fn what_the_guest_prints_waits_for_the_next_exit_as_far_as_there_is_room() {
    let mut guest = Guest::new(|a| {
        // Another port, and a wider write: neither waits.
        a.mov(edx, 0x3ff)?;
        out_dx(a, 7)?;
        a.cld()?;
        a.mov(edx, 0x3f8)?;
        a.mov(ebx, 210)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(rsi, DATA)?;
        a.mov(ecx, 10)?;
        a.rep().outsb()?;
        a.dec(ebx)?;
        a.jnz(again)?;
        a.mov(eax, 0x4241)?;
        a.out(dx, ax)?;
        a.mov(edx, 0x3fd)?;
        a.in_(al, dx)
    });
    guest.data = b"0123456789";
    let byte = |at: usize| guest.data[at % guest.data.len()];
    for ran in proved(&guest) {
        let full = |count| {
            port_write(
                0x3f8,
                Width::Byte,
                byte(count * (POSTED_MAX + 1) - 1).into(),
            )
        };
        let expected = [
            port_write(0x3ff, Width::Byte, 7),
            full(1),
            full(2),
            port_write(0x3f8, Width::Word, 0x4241),
            port_read(0x3fd, Width::Byte),
            Exit::Halt,
        ];
        assert_eq!(ran.exits(), expected);
        let output: Vec<u8> = ran.trace.output.iter().flat_map(|o| o.1.clone()).collect();
        let printed: Vec<u8> = (0..2100).map(byte).collect();
        assert!(output.starts_with(&printed), "{output:?}");
        assert_eq!(ran.trace.output.len(), 3, "each exit shows what waited");
    }
}

#[test]
fn what_is_typed_comes_back_as_an_echo() {
    // RTS up, then ninety looks at the line status (16550D data sheet, 8.4).
    let guest = Guest::new(|a| {
        a.mov(edx, 0x3fc)?;
        out_dx(a, 2)?;
        a.mov(ecx, 90)?;
        let (mut again, mut nothing) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.mov(edx, 0x3fd)?;
        a.in_(al, dx)?;
        a.test(al, 1)?;
        a.jz(nothing)?;
        a.mov(edx, 0x3f8)?;
        a.in_(al, dx)?;
        a.out(dx, al)?;
        a.set_label(&mut nothing)?;
        a.dec(ecx)?;
        a.jnz(again)
    });
    let runs = proved(&guest);
    let mut echoed = 0;
    for ran in &runs {
        let inputs = records_of(&ran.journal).into_iter();
        let typed: Vec<u8> = inputs
            .filter_map(|record| match record.event {
                Event::Input(Input::Console(bytes)) => Some(bytes),
                _ => None,
            })
            .flatten()
            .collect();
        let output: Vec<u8> = ran.trace.output.iter().flat_map(|o| o.1.clone()).collect();
        assert!(typed.starts_with(&output), "{typed:?} came as {output:?}");
        echoed += output.len();
    }
    assert!(echoed > 0 || runs.is_empty(), "somebody types something");
}

/// `out %al, %dx`.
fn out_dx(a: &mut CodeAssembler, value: u32) -> Result<(), IcedError> {
    a.mov(al, value)?;
    a.out(dx, al)
}
