//! Writes to a port that wait until the guest exits for another reason.
//!
//! KVM keeps them in a ring (Linux, Documentation/virt/kvm/api.rst, 4.116, KVM_REGISTER_COALESCED_MMIO, and
//! KVM_CAP_COALESCED_PIO), and exits with the one that finds it full. When that is differs between versions of
//! Linux: before 6.11 a ring may be full with half of its 170 places taken. So such an exit only moves what is
//! in the ring into a longer queue here and counts for nothing; what exits is the write that
//! finds [`POSTED_MAX`] others waiting, on any host.

use std::collections::VecDeque;

use hindsight_devices::{POSTED_MAX, POSTED_PORT};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};

use super::error::{KvmError, Named};

/// What this host's KVM must have.
const NEEDED: &str = "posted port writes (KVM_CAP_COALESCED_PIO, Linux 5.0)";
/// The ring has fewer places than this.
const RING_MAX: usize = 170;
const PORT: IoEventAddress = IoEventAddress::Pio(POSTED_PORT as u64);

/// The writes that wait.
#[derive(Debug, Default)]
pub(super) struct Posted {
    queue: VecDeque<u8>,
    /// KVM keeps them. Where the queue is nearly full it does not: each is then looked at.
    kept_by_kvm: bool,
}

impl Posted {
    /// Has KVM keep byte writes to [`POSTED_PORT`].
    pub(super) fn new(kvm: &Kvm, vm: &VmFd) -> Result<Posted, KvmError> {
        if !kvm.check_extension(Cap::CoalescedPio) {
            return Err(KvmError::Lacks(NEEDED));
        }
        let mut posted = Posted::default();
        posted.have_kvm_keep(vm)?;
        Ok(posted)
    }

    /// Looks at the VM's ring, of which each vCPU has a view, through that of `vcpu`.
    pub(super) fn map_ring(&self, vcpu: &mut VcpuFd) -> Result<(), KvmError> {
        vcpu.map_coalesced_mmio_ring()
            .named("mapping the ring of posted writes")
    }

    /// The guest has exited with this write: whether it waits too.
    pub(super) fn add(&mut self, byte: u8, vm: &VmFd, vcpu: &mut VcpuFd) -> Result<bool, KvmError> {
        self.empty_ring(vcpu)?;
        if self.queue.len() >= POSTED_MAX {
            return Ok(false);
        }
        self.queue.push_back(byte);
        if self.kept_by_kvm && self.queue.len() + RING_MAX > POSTED_MAX {
            vm.unregister_coalesced_mmio(PORT, 1)
                .named("KVM_UNREGISTER_COALESCED_MMIO")?;
            self.kept_by_kvm = false;
        }
        Ok(true)
    }

    /// Takes the oldest one.
    pub(super) fn take(&mut self, vm: &VmFd, vcpu: &mut VcpuFd) -> Result<Option<u8>, KvmError> {
        self.empty_ring(vcpu)?;
        let byte = self.queue.pop_front();
        if byte.is_none() && !self.kept_by_kvm {
            self.have_kvm_keep(vm)?;
        }
        Ok(byte)
    }

    fn have_kvm_keep(&mut self, vm: &VmFd) -> Result<(), KvmError> {
        // Of one byte: wider writes do not fit in, and exit.
        vm.register_coalesced_mmio(PORT, 1)
            .named("KVM_REGISTER_COALESCED_MMIO")?;
        self.kept_by_kvm = true;
        Ok(())
    }

    fn empty_ring(&mut self, vcpu: &mut VcpuFd) -> Result<(), KvmError> {
        while let Some(entry) = vcpu
            .coalesced_mmio_read()
            .named("reading the ring of posted writes")?
        {
            self.queue.push_back(entry.data[0]);
        }
        Ok(())
    }
}
