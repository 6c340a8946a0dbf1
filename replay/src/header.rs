//! The head of a journal: which machine this is a recording of.

use hindsight_devices::{Devices, Output};
use serde::{Deserialize, Serialize};

use crate::cpuid::CpuidTable;
use crate::landing::Unit;
use crate::quick::QuickReads;

/// How much a journal says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Detail {
    /// What replay needs, and checks: time, inputs, interrupts, witnesses.
    #[default]
    Default,
    /// That, and every turn whole: readable without a replay, compared field by field in one.
    Full,
}

/// A file that belongs to the machine, named by its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3 of the content.
    pub blake3: [u8; 32],
}

impl Content {
    /// The hash in hexadecimal.
    pub fn hex(&self) -> String {
        self.blake3
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// The image of a disk. What the guest reads of it is named in the events; this is enough to refuse another
/// image at once, without reading it all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3 of a sample of its blocks: see docs/journal-format.md.
    pub sample: [u8; 32],
}

/// How many places of each kind were rewritten in the kernel, all but the last into trap ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrapCounts {
    /// RDTSC.
    pub rdtsc: u32,
    /// RDTSCP.
    pub rdtscp: u32,
    /// CPUID.
    pub cpuid: u32,
    /// MOV to CR4.
    pub cr4_writes: u32,
    /// MOV from CR4.
    pub cr4_reads: u32,
    /// PAUSE.
    pub pause: u32,
    /// Calls with which the kernel makes a module executable; without one, modules are not looked at.
    pub module_loads: u32,
    /// What keeps the Accessed bits of page-table entries set, and the kernel from asking for them; 0: nothing does.
    pub ages: u32,
}

/// The machine, as far as it decides what the guest computes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// The whole kernel command line.
    pub cmdline: String,
    /// The kernel as it was given (bzImage or ELF).
    pub kernel: Content,
    /// The version the kernel's own header gives.
    pub kernel_version: String,
    /// The initrd, if there was one.
    pub initrd: Option<Content>,
    /// What was rewritten in the kernel.
    pub traps: TrapCounts,
    /// The CPU the guest sees.
    pub cpuid: CpuidTable,
    /// The random bytes the kernel was given at boot.
    pub seed: [u8; 32],
    /// By how many nanoseconds guest time advances at each exit, corrections apart.
    pub ns_per_exit: u64,
    /// What is counted where the guest is preempted between two exits; `None`: it never is.
    pub preemption: Option<Unit>,
    /// How its kernel reads the time without exits; `None`: each read exits.
    pub quick_reads: Option<QuickReads>,
    /// Its virtio devices.
    pub devices: Devices,
    /// The images of its disks, in the order of the disks.
    pub images: Vec<Image>,
}

/// The branch counter of the host that recorded, as it was measured there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterFacts {
    /// The raw event.
    pub event: u64,
    /// How many of its kicks were looked at.
    pub kicks: u64,
    /// The latest of them, in branches.
    pub worst_skid: u64,
    /// The margin in use, in branches.
    pub margin: u64,
}

/// Which of the guest's consoles its operator sat at: what was typed went there, and what it says is
/// what is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OperatorConsole {
    /// COM1 (ttyS0).
    #[default]
    Serial,
    /// The virtio console (hvc0).
    Virtio,
}

impl OperatorConsole {
    /// The bytes of an output, if it is this console's.
    pub fn bytes(self, output: &Output) -> Option<&[u8]> {
        match (self, output) {
            (OperatorConsole::Serial, Output::Console(bytes))
            | (OperatorConsole::Virtio, Output::VirtioConsole(bytes)) => Some(bytes),
            _ => None,
        }
    }
}

/// Facts about the host that recorded: for a reader, and to refuse a CPU of another make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Program and version.
    pub recorder: String,
    /// CPU model name.
    pub cpu: String,
    /// Kernel release.
    pub kernel: String,
    /// When, in seconds since 1970-01-01 UTC.
    pub unix_seconds: u64,
    /// What the host cannot keep from the guest, in words; empty if nothing.
    pub holes: Vec<String>,
    /// Its branch counter, if it was used.
    pub counter: Option<CounterFacts>,
    /// The seed of the chaos that was made there.
    pub chaos: Option<u64>,
    /// The operator's console.
    pub console: OperatorConsole,
}

/// Everything a journal says before its first event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// How much it says.
    pub detail: Detail,
    /// Of which machine.
    pub machine: Machine,
    /// Recorded where.
    pub host: Host,
}
