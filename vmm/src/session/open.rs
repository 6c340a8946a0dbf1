//! The files that a recording is of, found to be the recorded ones, and the machine made of them.

use std::path::{Path, PathBuf};

use hindsight_replay::{Header, Host, Machine};

use super::make::{LoadedKernel, build, check_cpu, host_facts, open_kvm};
use super::preemption_plan::{CounterWish, PreemptionPlan, PreemptionWish};
use super::recording::Recording;
use crate::disk::{DiskError, Disks, OpenImage};
use crate::failure::Failure;
use crate::kvm::KvmCpu;

/// Files that take the place of the recording's own.
#[derive(Clone, Debug, Default)]
pub struct RecordedPaths {
    /// The kernel.
    pub kernel: Option<PathBuf>,
    /// The initrd.
    pub initrd: Option<PathBuf>,
    /// The images of the disks, in their order; none, or one for each.
    pub disks: Vec<PathBuf>,
}

impl RecordedPaths {
    /// Those that are given, with what each is.
    pub fn named(&self) -> impl Iterator<Item = (&Path, &'static str)> {
        let kernel = self
            .kernel
            .iter()
            .map(|path| (path, "the kernel of this recording"));
        let initrd = self
            .initrd
            .iter()
            .map(|path| (path, "the initrd of this recording"));
        let disks = (self.disks.iter()).map(|path| (path, "the image of a disk of this recording"));
        let all = kernel.chain(initrd).chain(disks);
        all.map(|(path, what)| (path.as_path(), what))
    }
}

/// A recorded machine on this host, at power-on.
#[derive(Debug)]
pub(super) struct Here {
    pub cpu: KvmCpu,
    pub machine: Machine,
    /// The host.
    pub host: Host,
    /// What the operator should know of how its guest is preempted: sentences.
    pub warnings: Vec<String>,
}

/// The files a recording is of.
#[derive(Debug)]
pub struct RecordedImages {
    /// The kernel's file.
    pub image: Vec<u8>,
    /// The initrd's, empty if there is none.
    pub initrd: Vec<u8>,
    /// The images of its disks.
    pub disks: Vec<OpenImage>,
    kernel: LoadedKernel,
}

impl RecordedImages {
    /// Reads the recording's own files, or those given in their place.
    ///
    /// # Errors
    ///
    /// Files that are not the recorded ones.
    pub fn open(
        recording: &Recording,
        header: &Header,
        instead: &RecordedPaths,
    ) -> Result<RecordedImages, Failure> {
        let initrd = recording.initrd(header, instead.initrd.as_deref())?;
        // Nothing is unpacked, nor taken from the cache, but what is known to be the recorded kernel.
        let image = recording.kernel(header, instead.kernel.as_deref())?;
        let kernel = LoadedKernel::open_as(&image, header.machine.kernel.clone())?;
        Ok(RecordedImages {
            image,
            initrd,
            disks: recording.disks(header, &instead.disks)?,
            kernel,
        })
    }

    /// Disks over the images, with nothing written to them yet.
    ///
    /// # Errors
    ///
    /// No room for an overlay.
    pub fn fresh_disks(&self) -> Result<Disks, DiskError> {
        Disks::new(self.disks.clone())
    }

    /// The machine, ready to run from its beginning.
    ///
    /// # Errors
    ///
    /// A host that cannot replay this recording.
    pub fn machine(
        &self,
        header: &Header,
        counter: &CounterWish,
    ) -> Result<(KvmCpu, Machine), Failure> {
        let here = self.machine_here(header, counter)?;
        Ok((here.cpu, here.machine))
    }

    /// The same, with what a recording of what it does here has to say of this host.
    pub(super) fn machine_here(
        &self,
        header: &Header,
        counter: &CounterWish,
    ) -> Result<Here, Failure> {
        let (kvm, mut holes) = open_kvm()?;
        holes.extend(self.kernel.holes());
        check_cpu(&kvm, &header.machine.cpuid)?;
        let wish = PreemptionWish::Exactly(header.machine.preemption);
        let plan = PreemptionPlan::choose(&kvm, wish, counter)?;
        let (mut cpu, machine) = build(&kvm, &header.machine, &self.kernel, &self.initrd)?;
        plan.apply(&mut cpu)?;
        let host = Host {
            counter: plan.facts(),
            ..host_facts(holes)
        };
        let warnings = plan.warnings().to_vec();
        Ok(Here {
            cpu,
            machine,
            host,
            warnings,
        })
    }
}
