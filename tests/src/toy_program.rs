//! What the toy CPU executes: instructions made of a seed and of everything the CPU has seen.

use std::collections::VecDeque;

use hindsight_devices::{Access, Width};
use hindsight_replay::{Exit, Mode, TimeInstruction};

use hindsight_replay::rng::{Rng, mix};
use serde::{Deserialize, Serialize};

/// One instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// One that exits.
    Exit(Exit),
    /// Reads the time without an exit: this one. The program itself never says so.
    Read(u64),
    /// Writes this byte to the port whose writes are posted. The program itself never says so.
    Post(u8),
    /// Loads a word of memory into a register.
    Load,
    /// Stores a register into memory.
    Store,
    /// Sets IF; interrupts are held off until the instruction after it is done.
    Sti,
    /// Sets IF at once, as POPF does.
    Popf,
    /// Clears IF.
    Cli,
    /// Returns from an interrupt handler.
    Iret,
    /// Only computes.
    Mix,
}

/// How a program ends if nobody stops it first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    KeyboardReset,
    FastReset,
    ControlReset,
    PowerOff,
    TripleFault,
    HaltForever,
    /// The kernel panics, and the CPU shuts down.
    Panic,
    /// The kernel panics, and waits for good.
    PanicAndStay,
    /// Prints the words of a panic.
    Words,
    Spin,
}

/// What the program is about to do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Instructions decided on; then `h` decides.
    ops: VecDeque<Op>,
    said_last: bool,
}

/// The instruction stream.
#[derive(Clone, Debug)]
pub struct Program {
    plan: Plan,
    /// One instruction in this number is more than computing.
    calm: u64,
    /// Exits after which the program ends.
    length: u64,
    last: Last,
    /// Vectors of the two 8259s.
    bases: [u8; 2],
    /// Whether interrupts come by way of the I/O APIC, with the vectors below.
    apic: bool,
}

/// Vectors of the local APIC's timer, and of the I/O APIC's pins: this plus the pin.
const APIC_TIMER: u8 = 0xe0;
const APIC_PINS: u8 = 0x60;

const COM1: u16 = 0x3f8;

fn out(port: u16, value: u8) -> Op {
    let value = u32::from(value);
    Op::Exit(Exit::Access(Access::PortWrite {
        port,
        width: Width::Byte,
        value,
    }))
}

fn store(gpa: u64, value: u32) -> Op {
    Op::Exit(Exit::Access(Access::MemoryWrite {
        gpa,
        width: Width::Dword,
        value: value.into(),
    }))
}

fn local_apic(offset: u64, value: u32) -> Op {
    store(0xfee0_0000 + offset, value)
}

fn input(port: u16) -> Op {
    Op::Exit(Exit::Access(Access::PortRead {
        port,
        width: Width::Byte,
    }))
}

impl Program {
    /// The program of a seed.
    pub fn new(seed: u64) -> Program {
        let mut rng = Rng::new(seed, 1);
        let last = match rng.below(10) {
            9 => Last::PowerOff,
            0 => Last::KeyboardReset,
            1 => Last::FastReset,
            2 => Last::ControlReset,
            3 => Last::TripleFault,
            4 => Last::HaltForever,
            5 => Last::Panic,
            6 => Last::Words,
            7 => Last::PanicAndStay,
            _ => Last::Spin,
        };
        let bases = if rng.one_in(4) {
            [rng.number() as u8 & 0xf8, rng.number() as u8 & 0xf8]
        } else {
            [0x30, 0x38]
        };
        let length = 40 + rng.below(280);
        let apic = rng.one_in(2);
        let mut program = Program {
            plan: Plan::default(),
            calm: 1,
            length,
            last,
            bases,
            apic,
        };
        program.power_on(&mut rng);
        program
    }

    /// The same program with long stretches of computing in it: one instruction in `calm` is more.
    pub fn calmed(self, calm: u64) -> Program {
        Program { calm, ..self }
    }

    /// What it is about to do.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Goes on with this plan; `false` if no program comes to it.
    pub fn set_plan(&mut self, plan: Plan) -> bool {
        let possible = plan.ops.iter().all(|op| match op {
            Op::Exit(exit) => exit.wants_answer(),
            Op::Read(_) | Op::Post(_) => false,
            _ => true,
        });
        if possible {
            self.plan = plan;
        }
        possible
    }

    /// What a kernel does first, with the choices left to the seed.
    fn power_on(&mut self, rng: &mut Rng) {
        self.plan.ops.push_back(Op::Exit(Exit::Cpuid {
            leaf: 0,
            subleaf: 0,
        }));
        // 8259A: ICW1 to ICW4, then the masks (8259A data sheet, p. 10).
        let auto_eoi = if rng.one_in(8) { 3 } else { 1 };
        let [first, second] = self.bases;
        for (port, value) in [
            (0x20, 0x11),
            (0x21, first),
            (0x21, 4),
            (0x21, auto_eoi),
            (0xa0, 0x11),
            (0xa1, second),
            (0xa1, 2),
            (0xa1, auto_eoi),
            (0x21, if rng.one_in(6) { rng.number() as u8 } else { 0 }),
            (0xa1, if rng.one_in(6) { rng.number() as u8 } else { 0 }),
        ] {
            self.plan.ops.push_back(out(port, value));
        }
        let [low, high, ..] = rng.number().to_le_bytes();
        self.program_timer(mode_of(rng.number()), low, high);
        // UART: interrupts on, OUT2 gates the line (16550D data sheet, 8.6 and 8.7).
        self.plan.ops.push_back(out(COM1 + 4, 0x0b));
        let enabled = if rng.one_in(3) {
            rng.number() as u8 & 0xf
        } else {
            1
        };
        self.plan.ops.push_back(out(COM1 + 1, enabled));
        if rng.one_in(2) {
            // RTC: periodic, at 1 to 8 kHz (MC146818A data sheet, table 5).
            let rate = 0x20 | (3 + rng.below(4)) as u8;
            for (port, value) in [(0x70, 0x0a), (0x71, rate), (0x70, 0x0b), (0x71, 0x42)] {
                self.plan.ops.push_back(out(port, value));
            }
        }
        if self.apic {
            self.switch_to_the_apics(rng);
        }
        self.plan
            .ops
            .push_back(if rng.one_in(2) { Op::Sti } else { Op::Popf });
    }

    /// Masks the 8259s, gives the I/O APIC's pins their vectors, and starts a timer.
    fn switch_to_the_apics(&mut self, rng: &mut Rng) {
        self.plan.ops.extend([out(0x21, 0xff), out(0xa1, 0xff)]);
        for pin in [2, 4, 8, 9] {
            let level = if pin == 9 { 1 << 15 } else { 0 };
            self.plan.ops.extend([
                store(0xfec0_0000, 0x10 + 2 * u32::from(pin)),
                store(0xfec0_0010, u32::from(APIC_PINS + pin) | level),
            ]);
        }
        let timer = u32::from(APIC_TIMER);
        match rng.below(3) {
            // One shot and periodic, at most 4 ms.
            mode @ 0..2 => self.plan.ops.extend([
                local_apic(0x320, timer | (mode as u32) << 17),
                local_apic(0x3e0, 0xb),
                local_apic(0x380, 100 + rng.below(100_000) as u32),
            ]),
            _ => self.plan.ops.extend([
                local_apic(0x320, timer | 2 << 17),
                deadline(rng.below(100_000_000)),
            ]),
        }
        // The power button and the timer of ACPI.
        self.plan.ops.extend([out(0x602, 1), out(0x603, 1)]);
    }

    fn program_timer(&mut self, mode: u8, low: u8, high: u8) {
        self.plan
            .ops
            .extend([out(0x43, 0x30 | mode << 1), out(0x40, low), out(0x40, high)]);
    }

    /// The next instruction, or `None` where the program only spins. `h` stands for all that the
    /// CPU has seen; `exits` is how often it has exited.
    pub fn next(&mut self, h: u64, exits: u64) -> Option<Op> {
        if let Some(op) = self.plan.ops.pop_front() {
            return Some(op);
        }
        if exits < self.length && !mix(h ^ 5).is_multiple_of(self.calm) {
            return Some([Op::Mix, Op::Load, Op::Store][h as usize % 3]);
        }
        if exits < self.length {
            return Some(self.decide(h));
        }
        Some(match self.last {
            Last::KeyboardReset => out(0x64, 0xfe),
            Last::FastReset => out(0x92, 0x01),
            Last::ControlReset => out(0xcf9, 0x06),
            Last::PowerOff => out(0x605, 0x34),
            Last::TripleFault => Op::Exit(Exit::Shutdown),
            Last::HaltForever => self.then(Op::Cli, [Op::Exit(Exit::Halt)]),
            Last::Spin => return None,
            Last::Panic | Last::Words if self.plan.said_last => Op::Exit(Exit::Shutdown),
            Last::PanicAndStay if self.plan.said_last => Op::Exit(Exit::Pause),
            Last::Panic | Last::PanicAndStay => {
                self.plan.said_last = true;
                Op::Exit(Exit::Panic { message: h % 4096 })
            }
            Last::Words => {
                self.plan.said_last = true;
                let line = b"\nKernel panic - not syncing: the toy is broken\r\n";
                // DLAB off, or the line would set the baud rate.
                self.then(out(COM1 + 3, 3), line.map(|byte| out(COM1, byte)))
            }
        })
    }

    /// The CPU took an interrupt: the handler comes before what was decided on.
    pub fn enter_handler(&mut self, vector: u8, h: u64) {
        if self.apic && vector >= APIC_PINS {
            return self.enter_apic_handler(vector, h);
        }
        let line = vector & 7;
        let second = vector & 0xf8 == self.bases[1] && self.bases[0] != self.bases[1];
        let mut handler = vec![Op::Store, Op::Load];
        match (second, line) {
            (false, 4) => {
                handler.extend([input(COM1 + 2), input(COM1 + 5), input(COM1), Op::Store]);
            }
            (true, 0) => handler.extend([out(0x70, 0x0c), input(0x71)]),
            _ => {}
        }
        if h.is_multiple_of(16) {
            // A nested interrupt may come in here.
            handler.extend([Op::Sti, Op::Mix, Op::Mix, Op::Cli]);
        }
        if !h.is_multiple_of(61) {
            handler.push(out(0x20, 0x20));
            if second {
                handler.push(out(0xa0, 0x20));
            }
        }
        handler.push(Op::Iret);
        self.before_all_else(handler);
    }

    fn enter_apic_handler(&mut self, vector: u8, h: u64) {
        let mut handler = vec![Op::Store, Op::Load];
        match vector.wrapping_sub(APIC_PINS) {
            4 => handler.extend([input(COM1 + 2), input(COM1 + 5), input(COM1), Op::Store]),
            8 => handler.extend([out(0x70, 0x0c), input(0x71)]),
            9 => handler.extend([out(0x600, 1), out(0x601, 1)]),
            _ if vector == APIC_TIMER && h & 1 == 0 => handler.push(deadline(mix(h) >> 36)),
            _ => {}
        }
        if h.is_multiple_of(16) {
            handler.extend([Op::Sti, Op::Mix, Op::Mix, Op::Cli]);
        }
        if !h.is_multiple_of(61) {
            handler.push(local_apic(0xb0, 0));
        }
        handler.push(Op::Iret);
        self.before_all_else(handler);
    }

    fn before_all_else(&mut self, ops: Vec<Op>) {
        for op in ops.into_iter().rev() {
            self.plan.ops.push_front(op);
        }
    }

    fn then<const N: usize>(&mut self, first: Op, rest: [Op; N]) -> Op {
        self.plan.ops.extend(rest);
        first
    }

    /// Decides by `h` alone.
    fn decide(&mut self, h: u64) -> Op {
        let choice = mix(h);
        let [kind, a, b, c, ..] = choice.to_le_bytes();
        let wide = mix(choice);
        match kind {
            0..60 => Op::Mix,
            60..80 => Op::Load,
            80..110 => Op::Store,
            110..120 => Op::Cli,
            120..132 => Op::Sti,
            132..140 => Op::Popf,
            140..148 => self.then(Op::Sti, [Op::Exit(Exit::Halt)]),
            148..152 => self.then(Op::Popf, [Op::Mix, Op::Exit(Exit::Halt)]),
            152..160 => {
                self.program_timer(mode_of(wide), b, if c < 200 { c & 0xf } else { c });
                Op::Mix
            }
            160..172 => Op::Exit(Exit::TimeRead {
                instruction: if a & 1 == 0 {
                    TimeInstruction::Rdtsc
                } else {
                    TimeInstruction::Rdtscp
                },
                mode: if a & 2 == 0 { Mode::Kernel } else { Mode::User },
            }),
            172..178 => Op::Exit(Exit::Cpuid {
                leaf: u32::from(a & 3),
                subleaf: u32::from(b & 1),
            }),
            178..180 => Op::Exit(Exit::WriteCr4 { value: wide }),
            180 => match a & 1 {
                0 => Op::Exit(Exit::ReadCr4),
                _ => Op::Exit(Exit::WriteDr {
                    number: b & 3,
                    value: wide,
                }),
            },
            181 => Op::Exit(Exit::Module {
                module: wide,
                sites: b.into(),
            }),
            182 => Op::Exit(Exit::ProtectionFault),
            183 => Op::Exit(Exit::Pause),
            184..192 => Op::Exit(Exit::Access(msr(a, wide))),
            192..198 => Op::Exit(Exit::Access(mmio(a, wide))),
            198..206 => self.then(
                out(0x70, b & 0x7f),
                [if a & 3 == 0 {
                    out(0x71, c)
                } else {
                    input(0x71)
                }],
            ),
            206..212 => {
                // Latch and read the timer (8254 data sheet, p. 9).
                self.then(
                    out(0x43, if a & 1 == 0 { 0 } else { 0xe2 }),
                    [input(0x40), input(0x40)],
                )
            }
            212..216 => self.then(out(COM1 + 3, 3), [out(COM1 + 1, a & 0xf)]),
            216..220 => out(0x21, if a & 3 == 0 { b } else { 0 }),
            220..222 => out(0xa1, if a & 3 == 0 { b } else { 0 }),
            222..224 => out(0x20, 0x20),
            224..248 => {
                let port = PORTS[usize::from(a) % PORTS.len()];
                if b < 170 { input(port) } else { out(port, c) }
            }
            _ => Op::Exit(Exit::Access(any_port(a, wide))),
        }
    }
}

/// Ports that the program touches without a plan. Those that reset the machine are left out.
const PORTS: [u16; 28] = [
    0x20, 0xa0, 0x21, 0xa1, 0x40, 0x41, 0x42, 0x61, 0x60, 0x64, 0x70, 0x71, 0x80, 0x3f8, 0x3f8,
    0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fd, 0x3fe, 0x3ff, 0xcf8, 0x600, 0x601, 0x602, 0x608,
];

/// Arms the local APIC's timer for this value of the TSC, if it is in that mode.
fn deadline(tsc: u64) -> Op {
    Op::Exit(Exit::Access(Access::MsrWrite {
        index: 0x6e0,
        value: tsc,
    }))
}

fn mode_of(choice: u64) -> u8 {
    [2, 2, 2, 3, 0, 0, 4, 1][choice as usize % 8]
}

fn any_port(a: u8, wide: u64) -> Access {
    let width = [Width::Byte, Width::Word, Width::Dword][usize::from(a) % 3];
    let port = wide as u16;
    if a & 0x80 == 0 {
        Access::PortRead { port, width }
    } else {
        let value = ((wide >> 16) & width.ones()) as u32;
        Access::PortWrite { port, width, value }
    }
}

fn mmio(a: u8, wide: u64) -> Access {
    let width = [Width::Byte, Width::Word, Width::Dword, Width::Qword][usize::from(a & 3)];
    let page = [0xfed0_0000, 0xfec0_0000, 0xfee0_0000, 0xd000_0000][usize::from(a >> 2 & 3)];
    let gpa = page + (wide & 0xff8);
    if a & 0x80 == 0 {
        Access::MemoryRead { gpa, width }
    } else {
        Access::MemoryWrite {
            gpa,
            width,
            value: wide >> 12 & width.ones(),
        }
    }
}

fn msr(a: u8, wide: u64) -> Access {
    let x2apic = 0x800 + (wide as u32 & 0x3f);
    let known = [
        0x10,
        0x3b,
        0x1b,
        0x6e0,
        0x8b,
        0xc000_0103,
        x2apic,
        wide as u32,
    ];
    let index = known[usize::from(a & 7)];
    if a & 0x80 == 0 {
        Access::MsrRead { index }
    } else {
        Access::MsrWrite { index, value: wide }
    }
}
