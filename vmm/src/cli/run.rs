//! `hindsight run`: the machine without a recorder, the yardstick of what recording costs.

use std::time::Instant;

use anyhow::Context;
use clap::{Args, ValueEnum};
use hindsight_devices::{Devices, NetSpec};
use hindsight_replay::{
    KERNEL_BYTES_MAX, Live, Machine, MachineDescription, Patience, RunError, Unit,
};
use kvm_ioctls::Kvm;

use super::console::Console;
use super::summary::Summary;
use super::{Failure, MachineOptions, Outcome, TimeReads};
use crate::counting::Counting;
use crate::disk::{DiskError, Disks, OpenImage};
use crate::kvm::{KvmCpu, KvmError, Preemption};
use crate::machine::{LoadedKernel, build, describe, open_kvm};
use crate::net::Link;
use crate::recording::INITRD_BYTES_MAX;
use crate::regular_file::read;
use crate::tell::tell;
use crate::world::{HostWorld, Operator, RawTerminal};

/// Options of `run`.
#[derive(Debug, Args)]
#[command(after_help = "\
The guest's console is standard input and output; at a terminal, Ctrl-] ends the run, elsewhere
SIGINT, SIGTERM and SIGHUP do. SIGPWR presses the guest's power button.")]
pub struct Options {
    #[command(flatten)]
    machine: MachineOptions,
    /// Where a guest that does not exit is preempted.
    #[arg(long, value_enum, default_value_t)]
    preempt: RunPreempt,
    /// How long what is due waits for the guest to exit, in microseconds; without it, 1,000.
    #[arg(long, value_name = "US")]
    patience: Option<u64>,
    /// Print the summary as JSON on standard output, and nothing else.
    #[arg(long)]
    json: bool,
}

/// Where a bare machine is preempted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum RunPreempt {
    /// As often as a recorder would do it on this host: anywhere if there is a branch counter, else at
    /// kernel entries.
    #[default]
    AsRecorded,
    /// Anywhere, as nobody will look for the place again.
    Anywhere,
}

pub fn main(options: &Options) -> anyhow::Result<Outcome> {
    let start = Instant::now();
    // Before there is another thread.
    let operator = Operator::listen()?;
    let images = Images::read(&options.machine, &operator)?;
    let (kvm, _) = open_kvm()?;
    let words = options.machine.words();
    let unit = Counting::likely_unit();
    let quick = options.machine.time_reads != Some(TimeReads::Exit);
    let mut description = images.describe(&kvm, words, options.machine.memory, quick)?;
    description.preemption = Some(unit);
    let (mut cpu, mut machine) = images.build(&kvm, &description)?;
    let mut disks = images.fresh_disks()?;
    cpu.preempt_by(match (options.preempt, unit) {
        (RunPreempt::AsRecorded, Unit::Entries) => Preemption::Entries,
        _ => Preemption::Anywhere,
    });
    drop(images);

    let link = options.machine.network()?.map(Link::open).transpose()?;
    let raw = RawTerminal::enter();
    let world = HostWorld::start(operator, link, options.machine.console.into())?;
    let mut console = Console::new(
        options.json,
        options.machine.console.into(),
        Some(world.hold()),
    )?;
    let mut door = Live::new(world, None).with_patience(patience(options.patience));
    let result = machine.run(&mut cpu, &mut disks, &mut door, &mut console);
    let shown = console.finish();
    drop(raw);
    let end = result.map_err(host_failure)?;
    let host_ns = start.elapsed().as_nanos() as u64;
    Summary::new(&machine, &end, host_ns, None).print("the guest ended", options.json);
    if let Some(why) = door.into_world().failure() {
        return Err(Failure::new(Outcome::HostFailed, why).into());
    }
    match (shown.complaint(), shown.failed) {
        // Nothing else has what the guest wrote.
        (Some(complaint), Some(_)) => Err(Failure::new(Outcome::HostFailed, complaint).into()),
        (Some(complaint), None) => {
            tell!("hindsight: {complaint}");
            Ok(Outcome::Good)
        }
        (None, _) => Ok(Outcome::Good),
    }
}

/// The patience that an operator who names so many microseconds, or none, wants.
pub fn patience(us: Option<u64>) -> Patience {
    us.map_or(Patience::Fair, |us| {
        Patience::Fixed(us.saturating_mul(1_000))
    })
}

/// The files a machine is made of, read and taken apart, and what it has beside them.
pub struct Images {
    /// The kernel taken apart.
    pub kernel: LoadedKernel,
    /// The kernel's file.
    pub image: Vec<u8>,
    /// The initrd's file, empty if there is none.
    pub initrd: Vec<u8>,
    /// The images of its disks.
    pub disks: Vec<OpenImage>,
    devices: Devices,
}

impl Images {
    /// Reads what `options` name; an error if the operator wants to stop meanwhile.
    pub fn read(options: &MachineOptions, operator: &Operator) -> anyhow::Result<Images> {
        let image = read(&options.kernel, KERNEL_BYTES_MAX)?;
        let initrd = match &options.initrd {
            Some(path) => read(path, INITRD_BYTES_MAX)?,
            None => Vec::new(),
        };
        let found = options.disks.len();
        if found > Devices::DISKS_MAX {
            let expected = Devices::DISKS_MAX;
            return Err(DiskError::Count { found, expected }.into());
        }
        let disks = options.disks.iter().map(|disk| OpenImage::open(&disk.path));
        let disks = disks.collect::<Result<Vec<_>, _>>()?;
        let specs = options.disks.iter().zip(&disks);
        let devices = Devices {
            console: true,
            entropy: true,
            net: options.network()?.map(|_| NetSpec::default()),
            disks: specs.map(|(disk, image)| disk.spec(image)).collect(),
        };
        // A kernel seen for the first time takes seconds.
        let prepared = operator.unless_stopped(
            "preparing the kernel, as it was not seen before",
            move || (LoadedKernel::open(&image), image),
        );
        let (kernel, image) = prepared?
            .ok_or_else(|| Failure::new(Outcome::Different, "stopped before the guest ran"))?;
        Ok(Images {
            kernel: kernel.with_context(|| options.kernel.display().to_string())?,
            image,
            initrd,
            disks,
            devices,
        })
    }

    /// Describes a new machine made of them.
    pub fn describe(
        &self,
        kvm: &Kvm,
        words: String,
        memory_bytes: u64,
        quick: bool,
    ) -> anyhow::Result<MachineDescription> {
        let images = self.disks.iter().map(|disk| disk.image.clone()).collect();
        let devices = (self.devices.clone(), images);
        Ok(describe(
            kvm,
            &self.kernel,
            &self.initrd,
            words,
            memory_bytes,
            devices,
            quick,
        )?)
    }

    /// The machine that `description` describes.
    pub fn build(
        &self,
        kvm: &Kvm,
        description: &MachineDescription,
    ) -> anyhow::Result<(KvmCpu, Machine)> {
        Ok(build(kvm, description, &self.kernel, &self.initrd)?)
    }

    /// Its disks, with nothing written to them yet.
    pub fn fresh_disks(&self) -> Result<Disks, DiskError> {
        Disks::new(self.disks.clone())
    }
}

/// A run that could not go on because of the host.
pub fn host_failure(error: RunError<KvmError>) -> Failure {
    Failure::new(Outcome::HostFailed, error)
}
