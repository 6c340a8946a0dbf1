//! The virtual machine: what all of its vCPUs have in common.

use hindsight_kernel::rewrite::{alternatives, caves};
use hindsight_kernel::{Elf, EntryCaves, ModuleLayout, Modules, QuickClock, Rewritten, Sites};
use hindsight_replay::{PAGE_BYTES, memory};
use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_PMU_CAPABILITY, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};

use super::dirty_log::DirtyLog;
use super::entries::EntryState;
use super::error::{KvmError, Named};
use super::memory::GuestMemory;
use super::msr;
use super::posted::Posted;
use super::rewritten::Noticed;
use super::trap_sites::TrapSites;

/// Three pages below 4 GiB that Intel CPUs want for real mode; any hole will do.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// And a fourth.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// What is known of the kernel's text.
#[derive(Clone, Debug, Default)]
pub struct KernelText {
    /// The rewritten instructions.
    pub sites: TrapSites,
    /// Virtual addresses of `.init.text`, start and end.
    pub init: Option<(u64, u64)>,
    /// Where there is room for what counts kernel entries; `None` if they are not to be counted.
    pub caves: Option<EntryCaves>,
    /// The clock that is read without exits; `None` if each read exits.
    pub clock: Option<QuickClock>,
    /// Where a loaded module's text is; `None` if modules are left alone.
    pub modules: Option<ModuleLayout>,
    /// What of the text must stay as it was written.
    pub rewritten: Rewritten,
}

impl KernelText {
    /// What of a kernel a VM needs.
    pub fn new(elf: &Elf<'_>, sites: &Sites, modules: &Modules) -> KernelText {
        let init = elf.code.iter().find(|code| code.name == ".init.text");
        let alternatives = alternatives::read(elf).unwrap_or_default();
        KernelText {
            sites: TrapSites::of_kernel(sites, alternatives.iter()),
            init: init.map(|code| (code.address, code.address + code.file.len() as u64)),
            caves: caves::find(elf),
            clock: None,
            modules: modules.layout().cloned(),
            rewritten: Rewritten::default(),
        }
    }

    /// Whether an address lies in code that is gone after boot.
    pub fn is_init(&self, address: u64) -> bool {
        self.init
            .is_some_and(|(start, end)| (start..end).contains(&address))
    }
}

/// A VM: its memory, and what is known of the kernel in it.
#[derive(Debug)]
pub(super) struct Vm {
    // The order of the fields is the order of their end: the VM is gone before the memory is.
    pub(super) fd: VmFd,
    pub(super) memory: GuestMemory,
    dirty_log: DirtyLog,
    /// KVM notes which pages the guest writes.
    logs_changes: bool,
    pub(super) text: KernelText,
    /// What counts entries into that kernel.
    pub(super) entries: EntryState,
    /// Writes that wait until a vCPU exits for another reason.
    pub(super) posted: Posted,
    /// What traps were found to be gone.
    pub(super) noticed: Noticed,
}

impl Vm {
    /// A VM over `memory`, without vCPUs.
    pub(super) fn new(kvm: &Kvm, memory: GuestMemory) -> Result<Vm, KvmError> {
        let fd = kvm.create_vm().named("KVM_CREATE_VM")?;
        fd.set_tss_address(TSS_ADDRESS).named("KVM_SET_TSS_ADDR")?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .named("KVM_SET_IDENTITY_MAP_ADDR")?;
        msr::install_filter(&fd)?;
        tell_exceptions_apart(kvm, &fd)?;
        hide_counters(kvm, &fd)?;
        let posted = Posted::new(kvm, &fd)?;
        let dirty_log = DirtyLog::new(kvm, &fd)?;
        let vm = Vm {
            fd,
            posted,
            memory,
            dirty_log,
            logs_changes: false,
            text: KernelText::default(),
            entries: EntryState::default(),
            noticed: Noticed::default(),
        };
        vm.map_memory(0)?;
        Ok(vm)
    }

    /// Gives the guest its memory, or changes how it has it.
    fn map_memory(&self, flags: u32) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(self.memory.regions()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.gpa,
                memory_size: region.bytes,
                userspace_addr: region.host,
            };
            // SAFETY: the region is part of the mapping that `memory` owns; this value owns both,
            // and its fields are declared so that the VM is dropped first.
            unsafe { self.fd.set_user_memory_region(region) }
                .named("KVM_SET_USER_MEMORY_REGION")?;
        }
        Ok(())
    }

    /// The numbers of the pages of RAM that may have been written since this was asked last: by the guest, which KVM notes
    /// from the first time on (before, each page that the host has given it may be one), and by devices and by us, which
    /// [`GuestMemory`] notes.
    pub(super) fn take_changed_pages(&mut self) -> Result<Vec<u64>, KvmError> {
        let mut changed = memory::take_written(self.memory.ram());
        if !self.logs_changes {
            // Written from here on: each page is protected against writes until the first one.
            self.map_memory(KVM_MEM_LOG_DIRTY_PAGES)?;
            self.logs_changes = true;
            let say = |gpa| changed.push(gpa / PAGE_BYTES as u64);
            self.memory.each_page_backed(say)?;
            return Ok(changed);
        }
        for (slot, region) in (0..).zip(self.memory.regions()) {
            let written = self.dirty_log.take(&self.fd, slot, region.bytes)?;
            let first = region.gpa / PAGE_BYTES as u64;
            changed.extend(written.into_iter().map(|page| first + page));
        }
        Ok(changed)
    }

    /// Nobody will ask which pages have changed: the guest writes them as fast as it did.
    pub(super) fn forget_changed_pages(&mut self) -> Result<(), KvmError> {
        if std::mem::take(&mut self.logs_changes) {
            self.map_memory(0)?;
        }
        Ok(())
    }

    /// What is in its memory from now on.
    pub(super) fn set_text(&mut self, text: KernelText) {
        self.entries = EntryState::new(text.caves);
        self.text = text;
    }
}

/// Has KVM say of an exception whether it is raised or already on its way in, and not act on it when it is asked. The frame
/// that is pushed tells the two apart (RFLAGS.RF).
fn tell_exceptions_apart(kvm: &Kvm, vm: &VmFd) -> Result<(), KvmError> {
    if kvm.check_extension_raw(KVM_CAP_EXCEPTION_PAYLOAD.into()) == 0 {
        return Ok(());
    }
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_EXCEPTION_PAYLOAD,
        ..Default::default()
    };
    cap.args[0] = 1;
    vm.enable_cap(&cap).named("KVM_CAP_EXCEPTION_PAYLOAD")
}

/// Takes the performance counters away, where KVM can; elsewhere CPUID hides them.
fn hide_counters(kvm: &Kvm, vm: &VmFd) -> Result<(), KvmError> {
    if kvm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into()) as u32 & KVM_PMU_CAP_DISABLE == 0 {
        return Ok(());
    }
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        ..Default::default()
    };
    cap.args[0] = KVM_PMU_CAP_DISABLE.into();
    vm.enable_cap(&cap).named("KVM_CAP_PMU_CAPABILITY")
}
