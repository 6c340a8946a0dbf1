//! What a new machine is to be made of, and the files of it, read and taken apart.

use std::path::PathBuf;

use hindsight_devices::{Devices, DiskSpec, NetSpec};
use hindsight_replay::{KERNEL_BYTES_MAX, Machine, MachineDescription, OperatorConsole};
use kvm_ioctls::Kvm;

use super::make::{LoadedKernel, build, describe};
use super::recording::INITRD_BYTES_MAX;
use crate::disk::{DiskError, Disks, OpenImage};
use crate::failure::{Failure, Kind};
use crate::kvm::KvmCpu;
use crate::regular_file::read;
use crate::world::Operator;
use crate::world::net::Network;

/// What a new machine is to be made of.
#[derive(Clone, Debug)]
pub struct MachineWish {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initrd's.
    pub initrd: Option<PathBuf>,
    /// The whole command line.
    pub cmdline: String,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Its disks.
    pub disks: Vec<DiskWish>,
    /// The network that its card is on, if it has one.
    pub network: Option<Network>,
    /// Which of its consoles is the operator's.
    pub console: OperatorConsole,
    /// Whether its kernel reads the time without exits, as far as it can.
    pub quick_time_reads: bool,
}

/// A disk that it is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskWish {
    /// The image.
    pub path: PathBuf,
    /// Whether the guest's writes are refused.
    pub read_only: bool,
    /// Its serial number, of at most 20 bytes.
    pub serial: String,
}

/// The files a machine is made of, read and taken apart.
#[derive(Debug)]
pub(super) struct Images {
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
    /// Reads what `wish` names.
    ///
    /// # Errors
    ///
    /// What will not do; or the operator wanted to stop meanwhile.
    pub(super) fn read(wish: &MachineWish, operator: &Operator) -> Result<Images, Failure> {
        let image = read(&wish.kernel, KERNEL_BYTES_MAX)?;
        let initrd = match &wish.initrd {
            Some(path) => read(path, INITRD_BYTES_MAX)?,
            None => Vec::new(),
        };
        let found = wish.disks.len();
        if found > Devices::DISKS_MAX {
            let expected = Devices::DISKS_MAX;
            return Err(DiskError::Count { found, expected }.into());
        }
        let disks = wish.disks.iter().map(|disk| OpenImage::open(&disk.path));
        let disks = disks.collect::<Result<Vec<_>, _>>()?;
        let specs = wish.disks.iter().zip(&disks).map(|(wish, image)| DiskSpec {
            bytes: image.image.bytes,
            read_only: wish.read_only,
            serial: wish.serial.clone(),
        });
        let devices = Devices {
            console: true,
            entropy: true,
            net: wish.network.as_ref().map(|_| NetSpec::default()),
            disks: specs.collect(),
        };
        // A kernel seen for the first time takes seconds.
        let prepared = operator.unless_stopped(
            "preparing the kernel, as it was not seen before",
            move || (LoadedKernel::open(&image), image),
        );
        let (kernel, image) = prepared?
            .ok_or_else(|| Failure::new(Kind::Different, "stopped before the guest ran"))?;
        let kernel = kernel.map_err(|error| Failure::from(error).about(wish.kernel.display()))?;
        Ok(Images {
            kernel,
            image,
            initrd,
            disks,
            devices,
        })
    }

    /// Describes a new machine made of them.
    pub(super) fn describe(
        &self,
        kvm: &Kvm,
        wish: &MachineWish,
    ) -> Result<MachineDescription, Failure> {
        let images = self.disks.iter().map(|disk| disk.image.clone()).collect();
        Ok(describe(
            kvm,
            &self.kernel,
            &self.initrd,
            wish.cmdline.clone(),
            wish.memory_bytes,
            (self.devices.clone(), images),
            wish.quick_time_reads,
        )?)
    }

    /// The machine that `description` describes.
    pub(super) fn build(
        &self,
        kvm: &Kvm,
        description: &MachineDescription,
    ) -> Result<(KvmCpu, Machine), Failure> {
        Ok(build(kvm, description, &self.kernel, &self.initrd)?)
    }

    /// Its disks, with nothing written to them yet.
    ///
    /// # Errors
    ///
    /// No room for an overlay.
    pub(super) fn fresh_disks(&self) -> Result<Disks, DiskError> {
        Disks::new(self.disks.clone())
    }
}
