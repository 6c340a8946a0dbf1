//! From files to a machine that is ready to run, for recording and replaying alike.

use std::io::Read;

use hindsight_devices::Devices;
use hindsight_replay::{
    Content, CpuidTable, Host, Image, Machine, MachineDescription, OperatorConsole, QuickReads,
    ShownClock, TrapCounts, Unit, VCPUS,
};
use kvm_ioctls::Kvm;
use thiserror::Error;

use crate::failure::{Classified, Kind};

use super::kernel_cache::{Cache, Prepared};
use super::recording::content;
use crate::boot::{self, BootError};
use crate::doctor;
use crate::kvm::{GuestMemory, KernelText, KvmCpu, KvmError, cpuid, exit_cost};
use hindsight_kernel::rewrite::caves::isolates_page_tables;
use hindsight_kernel::rewrite::{caves, modules, rewritten};
use hindsight_kernel::{Elf, KernelError, QuickPlan, Rewritten, find_sites, unpack};

/// What the kernel has to know on this machine: where its console is, and to end on a panic; the
/// TSC counts nanoseconds and is read through traps, which the vDSO would go round; its random
/// numbers begin with the seed it is given. Page-table isolation would keep user space from the word
/// that counts kernel entries. There is no PCI bus, and `pci=noearly` keeps the kernel from searching
/// the 8,192 places of one, twice, for an AGP bridge, as it does on the AMD families that had them.
pub const MACHINE_CMDLINE: &str = "console=ttyS0 panic=-1 tsc_early_khz=1000000 tsc=reliable vdso=0 \
     random.trust_cpu=off random.trust_bootloader=on nopti pci=noearly";

/// Opens KVM and asks whether it can carry a machine that replays. Returns what it cannot keep from
/// the guest, a phrase each.
pub fn open_kvm() -> Result<(Kvm, Vec<String>), MachineError> {
    let kvm = Kvm::new().map_err(KvmError::Open)?;
    let holes = doctor::check_recorder(&kvm).map_err(MachineError::Unfit)?;
    Ok((kvm, holes))
}

/// Why there is no machine.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The kernel, the initrd or the command line will not do.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// On this host's KVM guests do not run as they do on hardware.
    #[error("{0}")]
    Unfit(String),
    /// KVM will not do.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host has no random bytes.
    #[error("cannot read random bytes: {0}")]
    Random(#[source] std::io::Error),
    /// Replay found other traps in the kernel than the recorder did.
    #[error(
        "{found:?} would be trapped in this kernel, recorded were {expected:?}; another version of Hindsight recorded it"
    )]
    Traps {
        found: TrapCounts,
        /// As recorded.
        expected: TrapCounts,
    },
    /// Replay would rewrite the kernel's time reads otherwise than the recorder did.
    #[error(
        "this kernel's time reads would become {found:x?}, recorded were {expected:x?}; another version of Hindsight recorded it"
    )]
    QuickReads {
        found: Option<QuickReads>,
        /// As recorded.
        expected: QuickReads,
    },
}

impl From<KernelError> for MachineError {
    fn from(error: KernelError) -> MachineError {
        MachineError::Boot(error.into())
    }
}

/// A kernel taken apart.
#[derive(Debug)]
pub struct LoadedKernel(Prepared);

impl LoadedKernel {
    /// Unpacks a kernel and finds what must be trapped in it.
    pub fn open(image: &[u8]) -> Result<LoadedKernel, MachineError> {
        LoadedKernel::open_as(image, content(image))
    }

    /// The same for an image of which it is known that this is its `content`.
    pub fn open_as(image: &[u8], content: Content) -> Result<LoadedKernel, MachineError> {
        let cache = Cache::of_user();
        if let Some(prepared) = cache.as_ref().and_then(|cache| cache.find(&content)) {
            return Ok(LoadedKernel(prepared));
        }
        let prepared = prepare(image, content)?;
        if let Some(cache) = cache {
            cache.keep(&prepared);
        }
        Ok(LoadedKernel(prepared))
    }

    /// The content of the file it came from.
    pub fn content(&self) -> &Content {
        &self.0.content
    }

    /// The kernel itself, unpacked.
    pub(super) fn elf(&self) -> Result<Elf<'_>, KernelError> {
        Elf::parse(&self.0.kernel.elf)
    }

    /// What lets it read the time, and print, without exits; `None` if it cannot.
    fn quick_plan(&self, elf: &Elf<'_>) -> Option<QuickPlan> {
        let caves = caves::find(elf)?.quick?;
        QuickPlan::new(elf, &self.0.spans, &self.0.transmits, &caves)
    }

    /// How much of it is rewritten.
    fn traps(&self) -> TrapCounts {
        let found = self.0.sites.counts();
        TrapCounts {
            rdtsc: found.rdtsc,
            rdtscp: found.rdtscp,
            cpuid: found.cpuid,
            cr4_writes: found.cr4_writes,
            cr4_reads: found.cr4_reads,
            pause: found.pause,
            module_loads: found.module_loads,
            dr_writes: found.dr_writes,
            panics: found.panics,
            ages: self.0.ages.rewrites.len() as u32,
        }
    }

    /// What of the world the guest may see, or the machine may not, because this kernel is as it is; in
    /// words.
    pub fn holes(&self) -> Vec<String> {
        let calls = self.traps().module_loads;
        let panics = (!self.shows_panics()).then(|| {
            "panics of this kernel: its image has no call that says that it panics; only pvpanic and a \
             triple fault are known"
                .into()
        });
        self.0
            .modules
            .hole(calls)
            .into_iter()
            .chain(panics)
            .chain(self.0.ages.hole())
            .collect()
    }

    /// Whether the machine knows by itself that this kernel panics.
    pub fn shows_panics(&self) -> bool {
        self.0.sites.counts().panics > 0
    }
}

/// Takes a kernel apart.
pub(crate) fn prepare(image: &[u8], content: Content) -> Result<Prepared, KernelError> {
    let kernel = unpack(image)?;
    let elf = Elf::parse(&kernel.elf)?;
    let modules = modules::find(&elf);
    let found = find_sites(&elf, modules.loads())?;
    Ok(Prepared {
        content,
        loaders: rewritten::loaders(&elf, &found.sites),
        kernel,
        sites: found.sites,
        spans: found.spans,
        transmits: found.transmits,
        ages: found.ages,
        modules,
    })
}

/// Describes a new machine to record, whose kernel reads the time without exits, as far as it can, if
/// `quick` says so.
pub fn describe(
    kvm: &Kvm,
    kernel: &LoadedKernel,
    initrd: &[u8],
    cmdline: String,
    memory_bytes: u64,
    (devices, images): (Devices, Vec<Image>),
    quick: bool,
) -> Result<MachineDescription, MachineError> {
    let ns_per_exit = exit_cost::measure(kvm)?;
    let plan = match quick {
        true => kernel.quick_plan(&Elf::parse(&kernel.0.kernel.elf)?),
        false => None,
    };
    Ok(MachineDescription {
        memory_bytes,
        vcpus: VCPUS,
        cmdline,
        kernel: kernel.content().clone(),
        kernel_version: kernel.0.kernel.version.clone(),
        initrd: (!initrd.is_empty()).then(|| content(initrd)),
        traps: kernel.traps(),
        cpuid: cpuid::for_host(kvm)?,
        seed: random_bytes()?,
        ns_per_exit,
        preemption: None,
        quick_reads: plan.map(|plan| quick_reads(&plan, ns_per_exit)),
        devices,
        images,
    })
}

/// The kernel's random numbers begin with the host's: no two machines draw the same. The bytes are
/// recorded, so a replay draws the same again.
pub(super) fn random_bytes() -> Result<[u8; 32], MachineError> {
    let mut bytes = [0; 32];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(MachineError::Random)?;
    Ok(bytes)
}

/// A number that no two calls give.
pub(super) fn random_number() -> Result<u64, MachineError> {
    let [first, ..] = *random_bytes()?.as_chunks::<8>().0 else {
        unreachable!("32 bytes are four words")
    };
    Ok(u64::from_le_bytes(first))
}

/// What a recording says of quick time reads, where an exit advances guest time by `ns_per_exit`.
fn quick_reads(plan: &QuickPlan, ns_per_exit: u64) -> QuickReads {
    const {
        assert!(
            ShownClock::BYTES == caves::CLOCK_BYTES,
            "what the stubs read is what is shown"
        )
    };
    QuickReads::new(plan.sites(), plan.check(), ns_per_exit)
}

/// Builds the machine that `description` describes.
pub fn build(
    kvm: &Kvm,
    description: &MachineDescription,
    kernel: &LoadedKernel,
    initrd: &[u8],
) -> Result<(KvmCpu, Machine), MachineError> {
    let Prepared {
        kernel: image,
        sites,
        modules,
        spans,
        loaders,
        ages,
        ..
    } = &kernel.0;
    let found = kernel.traps();
    if found != description.traps {
        return Err(MachineError::Traps {
            found,
            expected: description.traps,
        });
    }
    let mut memory = GuestMemory::new(description.memory_bytes)?;
    let parameters = boot::BootParameters {
        initrd,
        cmdline: &description.cmdline,
        seed: &description.seed,
        regions: &boot::e820(description.memory_bytes),
        slots: &description.devices.slots(),
    };
    let elf = Elf::parse(&image.elf)?;
    let mut patches = sites.patches(&elf).map_err(BootError::from)?;
    patches.extend(ages.patches(&elf));
    let mut text = KernelText::new(&elf, sites, modules);
    if let Some(recorded) = &description.quick_reads {
        let quick = kernel.quick_plan(&elf);
        let found = quick
            .as_ref()
            .map(|plan| quick_reads(plan, description.ns_per_exit));
        let same =
            |found: &QuickReads| (found.sites, found.check) == (recorded.sites, recorded.check);
        let Some(quick) = quick.filter(|_| found.as_ref().is_some_and(same)) else {
            return Err(MachineError::QuickReads {
                found,
                expected: *recorded,
            });
        };
        patches.extend_from_slice(quick.patches());
        text.clock = Some(quick.clock().clone());
    }
    let spans = if text.clock.is_some() {
        &spans[..]
    } else {
        &[]
    };
    text.rewritten = Rewritten::new(&elf, sites, loaders, spans, text.clock.as_ref());
    let plan = boot::load(&mut memory, image, &elf, &patches, &parameters)?;
    let mut cpu = KvmCpu::new(kvm, memory, &description.cpuid)?;
    let counts_entries = description.preemption == Some(Unit::Entries);
    if !counts_entries || isolates_page_tables(&description.cmdline, &description.cpuid.vendor()) {
        text.caves = None;
    }
    cpu.boot(&plan, text)?;
    let cpuid = description.cpuid.clone();
    let machine = Machine::new(&description.devices, cpuid, description.ns_per_exit);
    Ok((cpu, machine.with_quick_reads(description.quick_reads)))
}

/// The command line for a machine whose operator sits at `console`, from what the operator adds to it.
pub fn cmdline(added: &str, exact: bool, console: OperatorConsole) -> String {
    if exact {
        return added.into();
    }
    // Of several consoles the last is the one that /dev/console is. What follows `--` goes to init, so the
    // machine's own words stand first.
    let mut words = String::from(MACHINE_CMDLINE);
    if console == OperatorConsole::Virtio {
        words.push_str(" console=hvc0");
    }
    if !added.is_empty() {
        words.push(' ');
        words.push_str(added);
    }
    words
}

/// Refuses a host on which a recording would not replay.
pub(super) fn check_cpu(kvm: &Kvm, recorded: &CpuidTable) -> Result<(), KvmError> {
    cpuid::check_host(recorded, &cpuid::for_host(kvm)?)
}

/// Facts about this host.
pub fn host_facts(holes: Vec<String>) -> Host {
    let first = |path: &str, key: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text
            .lines()
            .find(|line| line.starts_with(key))
            .unwrap_or_default();
        line.split_once(':')
            .map_or(line, |(_, value)| value)
            .trim()
            .to_string()
    };
    let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Host {
        recorder: concat!("hindsight ", env!("CARGO_PKG_VERSION")).into(),
        cpu: first("/proc/cpuinfo", "model name"),
        kernel: first("/proc/sys/kernel/osrelease", ""),
        unix_seconds: unix.map_or(0, |since| since.as_secs()),
        holes,
        counter: None,
        chaos: None,
        console: hindsight_replay::OperatorConsole::default(),
    }
}

impl Classified for MachineError {
    fn kind(&self) -> Kind {
        match self {
            MachineError::Unfit(_) => Kind::Unfit,
            MachineError::Random(_) => Kind::HostFailed,
            MachineError::Kvm(error) => error.kind(),
            MachineError::Boot(_)
            | MachineError::Traps { .. }
            | MachineError::QuickReads { .. } => Kind::BadInput,
        }
    }
}
