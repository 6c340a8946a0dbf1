//! A CPU that fits on two screens, for the production loop to drive.
//!
//! Every instruction depends on all registers, and every value read, interrupt taken and place
//! reached goes into the registers: two runs whose inputs differ part at once. What differs
//! between hosts (kicks, and when KVM finishes an instruction) comes from a seed of its own, the
//! noise, so that a recording and its replay can be given different hosts.
//!
//! Long, because it is a whole CPU: what it executes, how it is preempted, and what of it is saved.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;

use hindsight_devices::{Access, POSTED_PORT, Ram, Width};
use hindsight_replay::{
    Ahead, Answer, Back, Cpu, CpuDigest, Exit, Horizon, Lander, LeftOpen, MemoryDigest, Mode,
    Overshoot, PAGE_BYTES, Registers, ShownClock, Stateful, TimeInstruction, Walk, WalkEnd,
};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::toy_counter::{Pmu, ToyCounter};
use crate::toy_debug::ToyDebugger;
use crate::toy_memory::ToyMemory;
use crate::toy_program::{Op, Plan, Program};
use hindsight_replay::rng::{Rng, mix};

/// Memory in bytes. The second page is the stack of the interrupt handlers, the last has the clock that
/// is read without exits.
pub const MEMORY_BYTES: usize = 3 * PAGE_BYTES;
/// Where that clock is.
const CLOCK: usize = 2 * PAGE_BYTES;
/// IF, and the bit that is always one (Intel SDM vol. 1, 3.4.3).
const FLAG_IF: u64 = 1 << 9;
const FLAG_ONE: u64 = 1 << 1;
/// A toy that has executed this many instructions triple faults, whatever it was doing.
const INSTRUCTIONS_MAX: u64 = 20_000;
/// The same for a toy that only spins, counted in kicks.
const SPINS_MAX: u64 = 500;

/// Something that breaks at an exit: the `exit`th that the CPU itself makes, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub exit: u64,
    pub kind: FaultKind,
}

/// What breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// One bit of one register flips.
    Register {
        /// Index into [`Registers`].
        index: usize,
        /// Which bit.
        bit: u32,
    },
    /// One bit of memory flips.
    Memory { bit: usize },
    /// The host's virtual CPU stops working.
    Host,
}

/// The host's virtual CPU stopped working.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// As the test ordered.
    Ordered,
    /// It ran past its place.
    Overshot(Overshoot),
    /// What it was to become is nothing that a toy can be.
    Refused,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Broken::Ordered => f.write_str("the toy CPU is broken, as the test ordered"),
            Broken::Overshot(overshoot) => overshoot.fmt(f),
            Broken::Refused => f.write_str("no toy CPU can be in this state"),
        }
    }
}

impl From<Overshoot> for Broken {
    fn from(overshoot: Overshoot) -> Broken {
        Broken::Overshot(overshoot)
    }
}

impl From<Infallible> for Broken {
    fn from(never: Infallible) -> Broken {
        match never {}
    }
}

impl std::error::Error for Broken {}

/// The CPU and its memory.
#[derive(Debug)]
pub struct ToyCpu {
    program: Program,
    registers: Registers,
    memory: ToyMemory,
    /// Interrupts wait for the instruction after STI.
    shadow: bool,
    /// The window was asked for.
    window: bool,
    /// The exit that was reported, and what it was answered; KVM may finish it late.
    unfinished: Option<(Exit, Answer)>,
    exits: u64,
    instructions: u64,
    spins: u64,
    noise: Rng,
    kicks_in_a_row: u32,
    fault: Option<Fault>,
    /// Its state may be any: it is not for the toy to complain.
    distrusted: bool,
    /// What counts its branches; a ghost's are not counted.
    pmu: Option<Pmu>,
    lander: Option<Lander<ToyCounter>>,
    /// Writes that wait for the next exit.
    posted: VecDeque<u8>,
    /// The time that the program has seen last, unless it has set the time stamp counter since.
    seen: Option<u64>,
    /// How often it was asked what is left open, and what it has not said yet.
    looks: (u64, Vec<LeftOpen>),
    /// Where it is to be stopped.
    pub(crate) debugger: ToyDebugger,
}

/// How many writes may wait: few, so that now and then one does not.
const POSTED_MAX: usize = 3;
/// Where the guest sets the time stamp counter.
const TSC_MSRS: [u32; 2] = [0x10, 0x3b];

impl ToyCpu {
    /// A CPU with the program of `seed`, on the host of `noise`.
    pub fn new(seed: u64, noise: u64) -> ToyCpu {
        let mut registers = Registers::default();
        registers.0[15] = mix(seed);
        registers.0[16] = 0x1000;
        registers.0[17] = FLAG_ONE;
        let unsaid = if mix(seed ^ 11).is_multiple_of(4) {
            LeftOpen::ALL.to_vec()
        } else {
            Vec::new()
        };
        ToyCpu {
            looks: (mix(seed), unsaid),
            program: Program::new(seed),
            registers,
            memory: ToyMemory::new(MEMORY_BYTES),
            shadow: false,
            window: false,
            unfinished: None,
            exits: 0,
            instructions: 0,
            spins: 0,
            noise: Rng::new(noise, 3),
            kicks_in_a_row: 0,
            fault: None,
            distrusted: false,
            pmu: None,
            lander: None,
            posted: VecDeque::new(),
            seen: None,
            debugger: ToyDebugger::default(),
        }
    }

    /// The same CPU, with a counter, and with a program that has use for it.
    pub fn with_counter(self, counter: ToyCounter) -> ToyCpu {
        ToyCpu {
            program: self.program.calmed(50),
            pmu: Some(counter.pmu()),
            lander: Some(Lander::new(counter)),
            ..self
        }
    }

    /// The same CPU, but it breaks.
    pub fn with_fault(self, fault: Fault) -> ToyCpu {
        ToyCpu {
            fault: Some(fault),
            ..self
        }
    }

    /// The same CPU, which takes any state that it is given for one that it could have been in.
    pub fn distrusted(self) -> ToyCpu {
        ToyCpu {
            distrusted: true,
            ..self
        }
    }

    /// Its memory.
    pub fn memory(&self) -> &ToyMemory {
        &self.memory
    }

    /// Writes to a register and to a word of memory, as a debugger does.
    pub fn scribble(&mut self, rng: &mut Rng) {
        match rng.below(4) {
            0 => self.registers.0[17] ^= FLAG_IF,
            1 => self.registers.0[16] ^= rng.below(64),
            _ => self.registers.0[rng.below(15) as usize] ^= rng.number(),
        }
        self.store(rng.below(1 << 16), rng.number());
    }

    fn takes_interrupts(&self) -> bool {
        self.registers.interrupts_enabled() && !self.shadow
    }

    /// All that the CPU has seen, in one number.
    fn hash(&self) -> u64 {
        self.registers.0.iter().fold(0, |h: u64, register| {
            (h.rotate_left(29) ^ register).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        })
    }

    fn word(&self, at: u64) -> (usize, u64) {
        let at = at as usize % (CLOCK / 8) * 8;
        (at, self.memory.word(at))
    }

    fn store(&mut self, at: u64, value: u64) {
        let at = at as usize % (CLOCK / 8) * 8;
        self.memory.set_word(at, value);
    }

    fn push(&mut self, value: u64) {
        self.registers.0[6] = self.registers.0[6].wrapping_sub(1);
        self.store(self.stack(), value);
    }

    fn pop(&mut self) -> u64 {
        let (_, value) = self.word(self.stack());
        self.registers.0[6] = self.registers.0[6].wrapping_add(1);
        value
    }

    fn stack(&self) -> u64 {
        let words = (PAGE_BYTES / 8) as u64;
        words + self.registers.0[6] % words
    }

    /// The next instruction; `None` where the program only spins.
    fn next_op(&mut self, h: u64) -> Option<Op> {
        if self.instructions > INSTRUCTIONS_MAX || self.spins > SPINS_MAX {
            return Some(Op::Exit(Exit::Shutdown));
        }
        let op = self.program.next(h, self.exits)?;
        self.instructions += 1;
        Some(match op {
            Op::Exit(exit) => match self.posts(&exit) {
                Some(byte) => Op::Post(byte),
                None => self.read_clock(&exit).map_or(op, Op::Read),
            },
            op => op,
        })
    }

    /// The byte, if this is a write that waits for the next exit.
    fn posts(&self, exit: &Exit) -> Option<u8> {
        match *exit {
            Exit::Access(Access::PortWrite {
                port: POSTED_PORT,
                width: Width::Byte,
                value,
            }) if self.posted.len() < POSTED_MAX => Some(value as u8),
            _ => None,
        }
    }

    /// The kernel's RDTSC, as its stub does it: the time, if this read need not exit.
    fn read_clock(&mut self, exit: &Exit) -> Option<u64> {
        let kernel = matches!(
            exit,
            Exit::TimeRead {
                instruction: TimeInstruction::Rdtsc,
                mode: Mode::Kernel,
            }
        );
        if !kernel {
            return None;
        }
        let [next, end, step] = [0, 8, 16].map(|offset| self.memory.word(CLOCK + offset));
        let mut clock = ShownClock { next, end, step };
        let value = clock.read();
        self.memory.set_word(CLOCK, clock.next);
        value
    }

    /// The program sees this time, which is never less than what it saw before.
    fn see_time(&mut self, tsc: u64) {
        if let Some(seen) = self.seen.replace(tsc) {
            // A fault may have hit the clock, or what was seen of it.
            // The guest may have set the counter to where it soon wraps.
            let right = tsc.wrapping_sub(seen).cast_signed() >= 0;
            let right = right || self.fault.is_some() || self.distrusted;
            assert!(right, "time ran backwards: {tsc} after {seen}");
        }
        let r = &mut self.registers.0;
        r[0] = tsc & 0xffff_ffff;
        r[3] = tsc >> 32;
    }

    /// A copy to look ahead with.
    fn ghost(&self) -> ToyCpu {
        ToyCpu {
            program: self.program.clone(),
            registers: self.registers,
            memory: self.memory.ghost(),
            shadow: self.shadow,
            window: self.window,
            unfinished: self.unfinished,
            exits: self.exits,
            instructions: self.instructions,
            spins: self.spins,
            noise: self.noise.clone(),
            kicks_in_a_row: self.kicks_in_a_row,
            fault: self.fault,
            distrusted: self.distrusted,
            looks: self.looks.clone(),
            pmu: None,
            lander: None,
            posted: self.posted.clone(),
            seen: self.seen,
            debugger: ToyDebugger::default(),
        }
    }

    /// Executes what does not exit.
    fn execute(&mut self, op: Op, h: u64) {
        let place = mix(h ^ 1) % (PAGE_BYTES / 8) as u64;
        let register = (h >> 40) as usize % 6;
        let stored = (op == Op::Store).then_some(place * 8);
        match op {
            Op::Load => self.registers.0[register] ^= self.word(place).1,
            Op::Store => self.store(place, self.registers.0[register].wrapping_add(h)),
            Op::Sti => {
                self.shadow = !self.registers.interrupts_enabled();
                self.registers.0[17] |= FLAG_IF;
            }
            Op::Popf => self.registers.0[17] |= FLAG_IF,
            Op::Cli => self.registers.0[17] &= !FLAG_IF,
            Op::Iret => {
                self.registers.0[17] = self.pop() & FLAG_IF | FLAG_ONE;
                self.registers.0[16] = self.pop();
            }
            Op::Mix => self.registers.0[register] = self.registers.0[register].rotate_left(7) ^ h,
            Op::Read(tsc) => self.see_time(tsc),
            Op::Post(byte) => self.posted.push_back(byte),
            Op::Exit(_) => unreachable!("an exit is not executed here"),
        }
        self.step(h);
        self.debugger.moved(stored);
        if is_branch(h)
            && let Some(pmu) = &self.pmu
        {
            pmu.retire();
        }
    }

    /// After every instruction: the next place, and everything seen so far in R15.
    fn step(&mut self, h: u64) {
        // Round and round on 64 places, so that a place is more than its address.
        let rip = self.registers.0[16];
        self.registers.0[16] = rip & !63 | rip.wrapping_add(1 + (h >> 60)) & 63;
        self.registers.0[15] = mix(h);
    }

    /// Hands the result of the last exit to the program.
    fn finish_instruction(&mut self) {
        let Some((exit, answer)) = self.unfinished.take() else {
            return;
        };
        if matches!(exit, Exit::Access(Access::MsrWrite { index, .. }) if TSC_MSRS.contains(&index))
        {
            self.seen = None;
        }
        if let Answer::Time { tsc, .. } = answer {
            self.see_time(tsc);
        }
        let r = &mut self.registers.0;
        match answer {
            Answer::Done => {}
            Answer::Value(value) => r[0] = value,
            Answer::Fault => r[3] ^= 0x6000_0000_0000_000d,
            Answer::Time { aux, .. } => r[2] = u64::from(aux),
            Answer::Cpuid(values) => {
                for (register, value) in [0, 1, 2, 3].into_iter().zip(values) {
                    r[register] = u64::from(value);
                }
            }
        }
        if matches!(exit, Exit::Access(Access::PortRead { .. })) && self.registers.0[0] & 8 != 0 {
            // What was read goes to memory too.
            self.store(self.registers.0[0] % 64, self.registers.0[15]);
        }
        let h = self.hash();
        self.step(h);
    }

    fn breaks(&mut self) -> Result<(), Broken> {
        match self.fault {
            Some(Fault { exit, kind }) if exit == self.exits => match kind {
                FaultKind::Register { index, bit } => self.registers.0[index] ^= 1 << bit,
                FaultKind::Memory { bit } => {
                    let at = bit / 64 * 8;
                    let word = self.memory.word(at) ^ 1 << (bit % 64);
                    self.memory.set_word(at, word);
                }
                FaultKind::Host => return Err(Broken::Ordered),
            },
            _ => {}
        }
        Ok(())
    }
}

/// Whether the instruction that is executed with this hash is a conditional branch.
fn is_branch(h: u64) -> bool {
    h >> 8 & 3 == 0
}

impl Walk for ToyCpu {
    type Error = Broken;

    fn rip(&mut self) -> u64 {
        self.registers.rip()
    }

    fn go(&mut self, stops: &[u64]) -> Result<WalkEnd, Broken> {
        let mut first = true;
        loop {
            if self.window && self.takes_interrupts() {
                return Ok(WalkEnd::Back(Back::Window));
            }
            let is_at_stop = !first && stops.contains(&self.registers.rip());
            if is_at_stop && !self.debugger.has_stored() {
                return Ok(WalkEnd::AtStop);
            }
            if self.debugger.stops(&self.registers) {
                return Ok(WalkEnd::Back(Back::Stopped));
            }
            let called = self.pmu.as_ref().is_some_and(Pmu::calls);
            if called || (self.kicks_in_a_row < 3 && self.noise.one_in(24)) {
                self.kicks_in_a_row += 1;
                return Ok(WalkEnd::Back(Back::Kicked));
            }
            self.kicks_in_a_row = 0;
            first = false;
            let h = self.hash();
            let Some(op) = self.next_op(h) else {
                self.spins += 1;
                if stops.contains(&self.registers.rip()) {
                    return Ok(WalkEnd::AtStop);
                }
                return Ok(WalkEnd::Back(Back::Kicked));
            };
            self.shadow = false;
            if let Op::Exit(exit) = op {
                self.exits += 1;
                self.breaks()?;
                return Ok(WalkEnd::Back(Back::Exit(exit)));
            }
            self.execute(op, h);
        }
    }

    /// Now and then this is wrong, and only the way to somewhere after the next branches.
    fn ahead(&mut self) -> Result<Ahead, Broken> {
        let wrong = self.noise.one_in(8).then(|| 1 + self.noise.below(12));
        let mut ghost = self.ghost();
        for distance in 0.. {
            if wrong == Some(distance) {
                return Ok(Ahead::Look(ghost.registers.rip()));
            }
            let h = ghost.hash();
            match ghost.next_op(h) {
                None if distance == 0 => return Ok(Ahead::Still),
                None | Some(Op::Exit(_)) => break,
                Some(op) => ghost.execute(op, h),
            }
            if is_branch(h) && wrong.is_none() {
                let next = ghost.registers.rip();
                // Where it leads if it is not taken, or taken: somewhere else.
                return Ok(Ahead::Branch([next, next ^ 32]));
            }
            if distance > 20 {
                break;
            }
        }
        Ok(Ahead::Unclear)
    }
}

impl Cpu for ToyCpu {
    type Error = Broken;

    fn run(&mut self, horizon: Horizon) -> Result<Back, Broken> {
        self.finish_instruction();
        self.debugger.begin();
        let back = match self.lander.take() {
            None => match self.go(&[])? {
                WalkEnd::Back(back) => back,
                WalkEnd::AtStop => unreachable!("no stop was set"),
            },
            Some(mut lander) => {
                let back = lander.run(self, horizon);
                self.lander = Some(lander);
                back?
            }
        };
        if let Back::Exit(exit) = back {
            if self.lander.is_some() {
                self.spins = 0;
            }
            let preempted = matches!(exit, Exit::Preempted(_));
            self.debugger.exited(preempted);
        }
        Ok(back)
    }

    fn posted(&mut self) -> Result<Option<u8>, Broken> {
        Ok(self.posted.pop_front())
    }

    fn registers(&mut self) -> Registers {
        self.registers
    }

    fn answer(&mut self, exit: &Exit, answer: &Answer) -> Result<(), Broken> {
        assert!(self.unfinished.is_none(), "answered twice");
        self.unfinished = Some((*exit, *answer));
        if *exit == Exit::Halt || self.noise.one_in(2) {
            // Some exits are finished when they are answered, some at the next run. HLT leaves
            // nothing to finish: KVM reports it with RIP after the instruction.
            self.finish_instruction();
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<bool, Broken> {
        self.finish_instruction();
        Ok(self.takes_interrupts())
    }

    fn interrupt(&mut self, vector: u8) -> Result<(), Broken> {
        assert!(
            self.unfinished.is_none(),
            "interrupted inside an instruction"
        );
        assert!(
            self.takes_interrupts(),
            "interrupted where no interrupt can be taken"
        );
        let h = self.hash();
        self.push(self.registers.rip());
        self.push(self.registers.rflags());
        self.registers.0[17] &= !FLAG_IF;
        self.registers.0[14] = mix(h ^ u64::from(vector));
        self.registers.0[16] = 0x10_0000 + 16 * u64::from(vector);
        self.program.enter_handler(vector, h);
        self.debugger.moved(None);
        Ok(())
    }

    fn request_window(&mut self, wanted: bool) {
        self.window = wanted;
    }

    fn show_clock(&mut self, clock: ShownClock) {
        for (offset, word) in [(0, clock.next), (8, clock.end), (16, clock.step)] {
            self.memory.set_word(CLOCK + offset, word);
        }
    }

    fn site(&mut self) -> Option<u64> {
        Some(self.registers.rip())
    }

    fn read(&mut self, gva: u64, buffer: &mut [u8]) -> usize {
        let ram = self.memory.ram();
        ram.read(buffer, GuestAddress(gva)).unwrap_or(0)
    }

    fn left_open(&mut self, at_end: bool) -> Vec<LeftOpen> {
        let (looks, unsaid) = &mut self.looks;
        *looks = looks.wrapping_add(1);
        let found = at_end || mix(*looks).is_multiple_of(97);
        match found {
            true => unsaid.pop().into_iter().collect(),
            false => Vec::new(),
        }
    }

    fn ram(&self) -> &Ram {
        self.memory.ram()
    }

    fn memory_digest(&mut self) -> Result<MemoryDigest, Broken> {
        let mut digest = MemoryDigest::default();
        let memory = self.memory.to_vec();
        let pages = memory.as_chunks::<PAGE_BYTES>().0.iter();
        for (page, gpa) in pages.zip((0..).step_by(PAGE_BYTES)) {
            digest.absorb_page(gpa, page);
        }
        Ok(digest)
    }

    fn state_digest(&mut self) -> Result<CpuDigest, Broken> {
        let registers = self.registers.0.map(u64::to_le_bytes);
        let seen = self.seen.unwrap_or_default().to_le_bytes();
        let shadow = [u8::from(self.shadow)];
        let general = registers.as_flattened();
        Ok(CpuDigest::of([general, &[], &[], &[], &[], &shadow, &seen]))
    }
}

/// All that a [`ToyCpu`] has of its own, and another with the same program has not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ToyState {
    plan: Plan,
    registers: Registers,
    shadow: bool,
    window: bool,
    exits: u64,
    instructions: u64,
    seen: Option<u64>,
    looks: (u64, Vec<LeftOpen>),
}

impl Stateful for ToyCpu {
    type State = ToyState;
    type Error = Broken;

    fn save(&mut self) -> Result<ToyState, Broken> {
        assert!(self.unfinished.is_none(), "it was not settled");
        assert!(self.posted.is_empty(), "not all that was posted was taken");
        Ok(ToyState {
            plan: self.program.plan().clone(),
            registers: self.registers,
            shadow: self.shadow,
            window: self.window,
            exits: self.exits,
            instructions: self.instructions,
            seen: self.seen,
            looks: self.looks.clone(),
        })
    }

    fn restore(&mut self, state: &ToyState) -> Result<(), Broken> {
        let ToyState {
            plan,
            registers,
            shadow,
            window,
            exits,
            instructions,
            seen,
            looks,
        } = state.clone();
        let counts = [exits, instructions];
        if counts.iter().any(|count| *count > 1 << 62) || !self.program.set_plan(plan) {
            return Err(Broken::Refused);
        }
        (self.registers, self.shadow, self.window) = (registers, shadow, window);
        (self.exits, self.instructions) = (exits, instructions);
        (self.seen, self.looks) = (seen, looks);
        // Nothing of what was before, and nothing that is the host's.
        (self.unfinished, self.spins, self.kicks_in_a_row) = (None, 0, 0);
        self.posted.clear();
        self.debugger.restored();
        if let Some(lander) = &mut self.lander {
            lander.begin_at_exit()?;
        }
        Ok(())
    }

    crate::pages_of_ram!(Broken);
}
