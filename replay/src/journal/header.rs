//! The head of a journal: which machine this is a recording of.

use hindsight_devices::{Devices, Output};
use serde::{Deserialize, Serialize};

use crate::machine::{CpuidEntry, CpuidTable, PAGE_BYTES, QuickReads, Unit, VCPUS};

/// The most RAM that a machine has: 1 TiB.
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;
/// The longest disk: 64 TiB.
pub const DISK_BYTES_MAX: u64 = 1 << 46;
/// The longest file that is taken as a kernel: as much as one may unpack to; with all its debugging information
/// one has not yet as much.
pub const KERNEL_BYTES_MAX: u64 = 1 << 30;
/// The longest time that an exit takes by the rule: it is tens of microseconds on the slowest host.
const EXIT_NS_MAX: u64 = 1_000_000_000;
/// The longest command line: Linux on x86-64 reads 2047 bytes of one.
const CMDLINE_BYTES_MAX: usize = 4096;
/// Any other text: names of a kernel, a CPU, a program; what a host leaves open.
const TEXT_BYTES_MAX: usize = 1024;
/// How many lines there are of what a host leaves open.
const HOLES_MAX: usize = 64;
/// The longest serial number of a disk that a guest can see (virtio 1.3, 5.2.6).
const SERIAL_BYTES_MAX: usize = 20;
/// As many as KVM takes (`KVM_MAX_CPUID_ENTRIES`).
const CPUID_ENTRIES_MAX: usize = 256;

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
    /// MOV to DR0 to DR3 or DR7.
    pub dr_writes: u32,
    /// Calls with which the kernel says that it panics; without one, its panics are not seen.
    pub panics: u32,
    /// What keeps the Accessed bits of page-table entries set, and the kernel from asking for them; 0: nothing does.
    pub ages: u32,
}

/// The machine, as far as it decides what the guest computes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDescription {
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// How many vCPUs it has, numbered from 0: [`VCPUS`].
    pub vcpus: u8,
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
    /// What the host cannot keep from the guest, a phrase each; empty if it can keep everything.
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
    pub machine: MachineDescription,
    /// Recorded where.
    pub host: Host,
}

impl Header {
    /// The head of the smallest machine that can be: a page of RAM, one CPUID leaf and no device. Heads that
    /// are made to be read by tests begin from it.
    pub fn smallest() -> Header {
        let nothing = Content {
            bytes: 0,
            blake3: [0; 32],
        };
        Header {
            detail: Detail::Default,
            machine: MachineDescription {
                memory_bytes: PAGE_BYTES as u64,
                vcpus: VCPUS,
                cmdline: String::new(),
                kernel: nothing,
                kernel_version: String::new(),
                initrd: None,
                traps: TrapCounts::default(),
                cpuid: CpuidTable {
                    entries: vec![CpuidEntry {
                        leaf: 0,
                        subleaf: None,
                        values: [0; 4],
                    }],
                },
                seed: [0; 32],
                ns_per_exit: 0,
                preemption: None,
                quick_reads: None,
                devices: Devices::default(),
                images: Vec::new(),
            },
            host: Host {
                recorder: String::new(),
                cpu: String::new(),
                kernel: String::new(),
                unix_seconds: 0,
                holes: Vec::new(),
                counter: None,
                chaos: None,
                console: OperatorConsole::default(),
            },
        }
    }

    /// Refuses what no recorder of ours writes: a head that contradicts itself, or that asks for more than
    /// any machine has. Whoever has a [`Header`] from a [`crate::JournalReader`] may rely on all of this.
    pub fn check(&self) -> Result<(), String> {
        self.machine.check()?;
        self.host.check()
    }
}

/// Refuses `found` if it is more than `most`.
fn at_most(what: &str, found: u64, most: u64) -> Result<(), String> {
    match found <= most {
        true => Ok(()),
        false => Err(format!("{what}: {found}, expected at most {most}")),
    }
}

fn text_at_most(what: &str, text: &str, most: usize) -> Result<(), String> {
    at_most(&format!("bytes of {what}"), text.len() as u64, most as u64)
}

impl MachineDescription {
    fn check(&self) -> Result<(), String> {
        let memory = self.memory_bytes;
        if memory == 0 || !memory.is_multiple_of(PAGE_BYTES as u64) {
            return Err(format!(
                "bytes of RAM: {memory}, expected a multiple of {PAGE_BYTES} and not zero"
            ));
        }
        at_most("bytes of RAM", memory, MEMORY_BYTES_MAX)?;
        if self.vcpus != VCPUS {
            return Err(format!(
                "vCPUs: {}, and this version runs machines with {VCPUS}",
                self.vcpus
            ));
        }
        text_at_most("the command line", &self.cmdline, CMDLINE_BYTES_MAX)?;
        if self.cmdline.contains('\0') {
            return Err("the command line has a byte that is zero".into());
        }
        text_at_most("the kernel's version", &self.kernel_version, TEXT_BYTES_MAX)?;
        at_most(
            "bytes of the kernel's file",
            self.kernel.bytes,
            KERNEL_BYTES_MAX,
        )?;
        if let Some(initrd) = &self.initrd {
            at_most("bytes of the initrd, in RAM", initrd.bytes, memory)?;
        }
        at_most("nanoseconds an exit", self.ns_per_exit, EXIT_NS_MAX)?;
        if let Some(quick) = &self.quick_reads {
            if quick.reads == 0 || quick.step_ns == 0 {
                return Err("time reads without exits: none, or none that moves the clock".into());
            }
            at_most("nanoseconds of time reads", quick.span_ns(), EXIT_NS_MAX)?;
        }
        self.cpuid.check()?;
        self.check_disks()
    }

    fn check_disks(&self) -> Result<(), String> {
        let disks = &self.devices.disks;
        if !self.devices.are_possible() {
            return Err("it has devices that no machine has".into());
        }
        at_most("disks", disks.len() as u64, Devices::DISKS_MAX as u64)?;
        if disks.len() != self.images.len() {
            return Err(format!(
                "{} disks over {} images",
                disks.len(),
                self.images.len()
            ));
        }
        for (number, (disk, image)) in disks.iter().zip(&self.images).enumerate() {
            if disk.bytes != image.bytes {
                return Err(format!(
                    "disk {number} has {} bytes, its image {}",
                    disk.bytes, image.bytes
                ));
            }
            at_most(
                &format!("bytes of disk {number}"),
                disk.bytes,
                DISK_BYTES_MAX,
            )?;
            text_at_most(
                &format!("the serial number of disk {number}"),
                &disk.serial,
                SERIAL_BYTES_MAX,
            )?;
        }
        Ok(())
    }
}

impl CpuidTable {
    /// Each leaf once, in order, and not more of them than a CPU has.
    fn check(&self) -> Result<(), String> {
        let entries = &self.entries;
        at_most(
            "CPUID entries",
            entries.len() as u64,
            CPUID_ENTRIES_MAX as u64,
        )?;
        if entries.is_empty() {
            return Err("CPUID entries: none".into());
        }
        let place = |at: usize| (entries[at].leaf, entries[at].subleaf);
        match (1..entries.len()).find(|&at| place(at - 1) >= place(at)) {
            Some(at) => Err(format!(
                "CPUID leaf {:#x} comes after leaf {:#x}",
                entries[at].leaf,
                entries[at - 1].leaf
            )),
            None => Ok(()),
        }
    }
}

impl Host {
    fn check(&self) -> Result<(), String> {
        text_at_most("the recorder's name", &self.recorder, TEXT_BYTES_MAX)?;
        text_at_most("the host's CPU", &self.cpu, TEXT_BYTES_MAX)?;
        text_at_most("the host's kernel", &self.kernel, TEXT_BYTES_MAX)?;
        at_most(
            "lines of what is left open",
            self.holes.len() as u64,
            HOLES_MAX as u64,
        )?;
        let mut holes = self.holes.iter();
        holes.try_for_each(|hole| text_at_most("what is left open", hole, TEXT_BYTES_MAX))
    }
}

#[cfg(test)]
mod tests;
