//! What a vCPU brings out of the guest and what it takes back: values, owned and comparable.

use std::fmt;

use hindsight_devices::{Access, Nanos};
use serde::{Deserialize, Serialize};

use super::moment::VcpuNumber;
use super::place::Place;

/// The general registers at an exit, in the order of `struct kvm_regs`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers(pub [u64; Registers::COUNT]);

impl Registers {
    /// Sixteen general registers, RIP and RFLAGS.
    pub const COUNT: usize = 18;
    /// Their names, in order.
    pub const NAMES: [&'static str; Registers::COUNT] = [
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15", "rip", "rflags",
    ];

    pub fn rax(&self) -> u64 {
        self.0[0]
    }
    pub fn rcx(&self) -> u64 {
        self.0[2]
    }
    /// Instruction pointer.
    pub fn rip(&self) -> u64 {
        self.0[16]
    }
    pub fn rflags(&self) -> u64 {
        self.0[17]
    }
    /// RFLAGS.IF: whether the guest takes maskable interrupts (Intel SDM vol. 1, 3.4.3.3).
    pub fn interrupts_enabled(&self) -> bool {
        self.rflags() & (1 << 9) != 0
    }
}

/// Which time-stamp instruction asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TimeInstruction {
    /// RDTSC.
    Rdtsc,
    /// RDTSCP, which also reads TSC_AUX into ECX.
    Rdtscp,
}

/// At which privilege the guest was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Ring 0.
    Kernel,
    /// Ring 3.
    User,
}

/// One thing that ends a stretch of undisturbed running, and counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// It touched a device, or a model-specific register that KVM does not keep.
    Access(Access),
    /// It read the time-stamp counter, through a trap port or a faulting user-mode read.
    TimeRead {
        /// Which instruction.
        instruction: TimeInstruction,
        /// From where.
        mode: Mode,
    },
    /// It executed CPUID through a trap port.
    Cpuid {
        /// EAX.
        leaf: u32,
        /// ECX.
        subleaf: u32,
    },
    /// It wrote CR4 through a trap port.
    WriteCr4 {
        /// The value it wrote, as the guest means it.
        value: u64,
    },
    /// It read CR4 through a trap port.
    ReadCr4,
    /// It entered its #GP handler for a reason of its own.
    ProtectionFault,
    /// It executed HLT.
    Halt,
    /// It was halted and time or input came; nothing of it ran.
    Woken,
    /// Triple fault, or another shutdown condition of the CPU.
    Shutdown,
    /// It executed PAUSE through a trap port: it waits for somebody else.
    Pause,
    /// It was stopped between two exits, at this place.
    Preempted(Place),
    /// Its kernel is about to make a loaded module executable.
    Module {
        /// Address of the kernel's `struct module`.
        module: u64,
        /// How many instructions in its text are rewritten into trap ports before it runs.
        sites: u32,
    },
    /// It wrote a debug register through a trap port.
    WriteDr {
        /// Which: 0 to 3, or 7.
        number: u8,
        /// The value.
        value: u64,
    },
    /// Its kernel says that it panics.
    Panic {
        /// Guest-virtual address of the reason, a string that ends with a zero byte.
        message: u64,
    },
}

impl Exit {
    /// Whether the guest did something that waits for an answer.
    pub fn wants_answer(&self) -> bool {
        !matches!(self, Exit::Woken | Exit::Preempted(_))
    }

    /// Number of kinds that [`Exit::kind`] tells apart.
    pub const KINDS: usize = 18;

    /// Index into [`Exit::KIND_NAMES`].
    pub fn kind(&self) -> usize {
        match self {
            Exit::Access(Access::PortRead { .. }) => 0,
            Exit::Access(Access::PortWrite { .. }) => 1,
            Exit::Access(Access::MemoryRead { .. } | Access::MemoryWrite { .. }) => 2,
            Exit::Access(Access::MsrRead { .. } | Access::MsrWrite { .. }) => 3,
            Exit::TimeRead {
                mode: Mode::Kernel, ..
            } => 4,
            Exit::TimeRead {
                mode: Mode::User, ..
            } => 5,
            Exit::Cpuid { .. } => 6,
            Exit::WriteCr4 { .. } => 7,
            Exit::ReadCr4 => 8,
            Exit::ProtectionFault => 9,
            Exit::Halt => 10,
            Exit::Woken => 11,
            Exit::Shutdown => 12,
            Exit::Pause => 13,
            Exit::Preempted(_) => Exit::PREEMPTED,
            Exit::Module { .. } => Exit::MODULE,
            Exit::WriteDr { .. } => 16,
            Exit::Panic { .. } => 17,
        }
    }

    /// The kind of a preemption.
    pub const PREEMPTED: usize = 14;

    /// The kind of a loaded module.
    pub const MODULE: usize = 15;

    /// Names of the kinds.
    pub const KIND_NAMES: [&'static str; Exit::KINDS] = [
        "port reads",
        "port writes",
        "MMIO accesses",
        "MSR accesses",
        "kernel time reads",
        "user time reads",
        "CPUID",
        "CR4 writes",
        "CR4 reads",
        "#GP entries",
        "HLT",
        "wake-ups",
        "shutdowns",
        "PAUSE",
        "preemptions",
        "module loads",
        "DR writes",
        "kernel panics",
    ];
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Exit::Access(access) => match access {
                Access::PortRead { port, width } => {
                    write!(f, "in{} port {port:#06x}", 8 * width.bytes())
                }
                Access::PortWrite { port, width, value } => {
                    write!(f, "out{} port {port:#06x} = {value:#x}", 8 * width.bytes())
                }
                Access::MemoryRead { gpa, width } => {
                    write!(f, "load{} {gpa:#x}", 8 * width.bytes())
                }
                Access::MemoryWrite { gpa, width, value } => {
                    write!(f, "store{} {gpa:#x} = {value:#x}", 8 * width.bytes())
                }
                Access::MsrRead { index } => write!(f, "rdmsr {index:#x}"),
                Access::MsrWrite { index, value } => write!(f, "wrmsr {index:#x} = {value:#x}"),
            },
            Exit::TimeRead { instruction, mode } => {
                let name = match instruction {
                    TimeInstruction::Rdtsc => "rdtsc",
                    TimeInstruction::Rdtscp => "rdtscp",
                };
                match mode {
                    Mode::Kernel => f.write_str(name),
                    Mode::User => write!(f, "{name} (user)"),
                }
            }
            Exit::Cpuid { leaf, subleaf } => write!(f, "cpuid {leaf:#x}.{subleaf:#x}"),
            Exit::WriteCr4 { value } => write!(f, "cr4 = {value:#x}"),
            Exit::ReadCr4 => f.write_str("read cr4"),
            Exit::ProtectionFault => f.write_str("#GP"),
            Exit::Halt => f.write_str("hlt"),
            Exit::Woken => f.write_str("woken"),
            Exit::Shutdown => f.write_str("shutdown"),
            Exit::Pause => f.write_str("pause"),
            Exit::Preempted(place) => write!(f, "preempted {place}"),
            Exit::WriteDr { number, value } => write!(f, "dr{number} = {value:#x}"),
            Exit::Module { module, sites } => write!(f, "module {module:#x}, {sites} trapped"),
            Exit::Panic { message } => write!(f, "kernel panic, reason at {message:#x}"),
        }
    }
}

/// What the machine answered to an [`Exit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Nothing to hand back: go on.
    Done,
    /// The value of a read.
    Value(u64),
    /// #GP(0).
    Fault,
    /// EDX:EAX of a time read, and ECX for RDTSCP.
    Time {
        /// Time-stamp counter.
        tsc: u64,
        /// TSC_AUX.
        aux: u32,
    },
    /// EAX, EBX, ECX, EDX.
    Cpuid([u32; 4]),
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Answer::Done => f.write_str("done"),
            Answer::Value(value) => write!(f, "{value:#x}"),
            Answer::Fault => f.write_str("#GP(0)"),
            Answer::Time { tsc, aux } => write!(f, "{tsc} (aux {aux})"),
            Answer::Cpuid([a, b, c, d]) => write!(f, "{a:08x} {b:08x} {c:08x} {d:08x}"),
        }
    }
}

/// Everything about one counted exit: what happened, when, where, and what was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// The vCPU whose exit it is.
    pub vcpu: VcpuNumber,
    /// What the guest did.
    pub exit: Exit,
    /// What the machine answered.
    pub answer: Answer,
    /// Guest time at this exit, in nanoseconds.
    pub now: Nanos,
    /// The registers of that vCPU as the guest left them.
    pub registers: Registers,
}

impl fmt::Display for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.exit, self.vcpu.suffix())?;
        if self.answer != Answer::Done {
            write!(f, " -> {}", self.answer)?;
        }
        write!(f, " (rip {:#x}, {} ns)", self.registers.rip(), self.now)
    }
}
