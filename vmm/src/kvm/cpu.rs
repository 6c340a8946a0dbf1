//! The CPU, as the loop knows one: exits out, answers in.
//!
//! One ioctl per exit in the common case: KVM copies the registers into the shared page at every
//! exit, and takes changed ones from there at the next entry. Trap ports are OUTs, so that no
//! unfinished register write comes between an exit and its answer.

use hindsight_devices::{Access, POSTED_PORT, Ram};
use hindsight_replay::{
    Answer, Back, Cpu, CpuDigest, CpuidTable, Exit, Horizon, LeftOpen, MemoryDigest, Registers,
    ShownClock,
};
use kvm_bindings::{
    KVM_EXIT_HLT, KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR, KVMIO, kvm_interrupt, kvm_sregs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::debugger::Debugger;
use super::error::{KvmError, Named};
use super::guest_text::GuestView;
use super::inserted::Inserted;
use super::memory::GuestMemory;
use super::modules::LoadingModule;
use super::page_walk::Paging;
use super::preemption::Preemption;
use super::run_page::RunPage;
use super::signals;
use super::vcpu::Vcpu;
use super::vm::{KernelText, Vm};
use crate::boot::BootPlan;

ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);

/// What the vCPU counts beside exits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuCounts {
    /// Steps taken out of an STI shadow.
    pub shadow_steps: u64,
    /// Instructions finished by an extra entry.
    pub settles: u64,
    /// Times the host interrupted the guest.
    pub kicks: u64,
    /// Where the #GP entry was rewritten.
    pub gp_entry: Option<u64>,
    /// How many of the kernel's entry points are counted.
    pub entry_points: u32,
    /// Times KVM had taken breakpoints of ours for the guest's.
    pub breakpoints_restored: u64,
}

/// A VM with a vCPU in it, as the loop runs one: the vCPU that runs, what all of them have in common, and how the one
/// that runs is stopped.
#[derive(Debug)]
pub struct KvmCpu {
    // The order of the fields is the order of their end: a vCPU is gone before its VM is.
    pub(super) vcpu: Vcpu,
    pub(super) vm: Vm,
    /// The module that is being loaded at this exit.
    pub(super) loading: Option<LoadingModule>,
    pub(super) counts: VcpuCounts,
    /// How it is stopped between two exits.
    pub(super) preemption: Preemption,
    /// Where it is stopped for a debugger.
    pub(super) debugger: Debugger,
    /// What is known of stops in memory.
    pub(super) inserted: Inserted,
}

impl KvmCpu {
    /// A vCPU over `memory`, which sees the CPU that `table` describes.
    pub fn new(kvm: &Kvm, memory: GuestMemory, table: &CpuidTable) -> Result<KvmCpu, KvmError> {
        let sync = kvm.check_extension_int(Cap::SyncRegs);
        if sync & 1 == 0 {
            return Err(KvmError::Lacks(
                "register synchronisation (KVM_CAP_SYNC_REGS)",
            ));
        }
        let vm = Vm::new(kvm, memory)?;
        let mut vcpu = Vcpu::new(&vm, 0, table)?;
        vm.posted.map_ring(&mut vcpu.fd)?;
        Ok(KvmCpu {
            vcpu,
            vm,
            loading: None,
            counts: VcpuCounts::default(),
            preemption: Preemption::default(),
            debugger: Debugger::default(),
            inserted: Inserted::default(),
        })
    }

    /// Sets the registers as a kernel's 64-bit boot protocol wants them, and takes `text` as what is in memory.
    pub fn boot(&mut self, plan: &BootPlan, text: KernelText) -> Result<(), KvmError> {
        self.vcpu.boot(plan)?;
        self.vm.set_text(text);
        Ok(())
    }

    /// Drops what is left of an exit that nobody answers.
    pub(super) fn forget_exit(&mut self) {
        self.vcpu.parts.begin();
    }

    /// What was counted beside exits.
    pub fn counts(&self) -> VcpuCounts {
        self.counts
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.vm.memory
    }

    /// Nobody will ask which pages have changed: what noting that costs ends.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn forget_changed_pages(&mut self) -> Result<(), KvmError> {
        self.vm.forget_changed_pages()
    }

    pub(super) fn fd(&self) -> &VcpuFd {
        &self.vcpu.fd
    }

    pub(super) fn page(&mut self) -> RunPage<'_> {
        RunPage::of(&mut self.vcpu.fd)
    }

    pub(super) fn rip(&mut self) -> u64 {
        self.page().registers().rip()
    }

    /// Guest-virtual memory as it is mapped now.
    pub(super) fn view(&self) -> Result<GuestView<'_>, KvmError> {
        Ok(GuestView {
            paging: Paging::new(&self.sregs()?),
            memory: &self.vm.memory,
        })
    }

    /// The byte at a linear address, if one is mapped there.
    pub(super) fn byte_at(&self, address: u64) -> Option<u8> {
        let mut byte = [0];
        (self.view().ok()?.read(address, &mut byte) == 1).then_some(byte[0])
    }

    pub(super) fn sregs(&self) -> Result<kvm_sregs, KvmError> {
        self.vcpu.fd.get_sregs().named("KVM_GET_SREGS")
    }

    /// Enters the guest once. Returns KVM's exit reason, or `None` if the host interrupted it.
    pub(super) fn enter(&mut self) -> Result<Option<u32>, KvmError> {
        loop {
            let reason = signals::enter(&mut self.vcpu.fd)?;
            if reason != Some(KVM_EXIT_IO) || !self.exit_is_posted()? {
                return Ok(reason);
            }
        }
    }

    /// Whether the port access that KVM came back with waits for the next exit instead.
    fn exit_is_posted(&mut self) -> Result<bool, KvmError> {
        let io = self.page().port().expect("the reason is a port access");
        if io.read || (io.port, io.size, io.count) != (POSTED_PORT, 1, 1) {
            return Ok(false);
        }
        let byte = self.page().port_data(&io, 0) as u8;
        self.vm.posted.add(byte, &self.vm.fd, &mut self.vcpu.fd)
    }

    /// The exit that KVM's reason stands for.
    pub(super) fn decode(&mut self, reason: u32) -> Result<Exit, KvmError> {
        self.vcpu.parts.begin();
        self.vcpu.unfinished = matches!(
            reason,
            KVM_EXIT_IO | KVM_EXIT_MMIO | KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR
        );
        match reason {
            KVM_EXIT_IO => {
                let io = self.page().port().expect("the reason is a port access");
                if let Some(exit) = self.trapped(&io) {
                    return Ok(exit);
                }
                Ok(self.decode_port(io))
            }
            KVM_EXIT_MMIO => Ok(self.decode_mmio()),
            KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => {
                let (index, value) = self.page().msr().expect("the reason is an MSR access");
                Ok(Exit::Access(match value {
                    None => Access::MsrRead { index },
                    Some(value) => Access::MsrWrite { index, value },
                }))
            }
            KVM_EXIT_HLT => Ok(Exit::Halt),
            KVM_EXIT_SHUTDOWN => Ok(Exit::Shutdown),
            _ => {
                let rip = self.rip();
                let bytes = self.view()?.instruction_bytes(rip);
                Err(KvmError::Stopped {
                    rip,
                    bytes,
                    what: self.page().complaint(),
                })
            }
        }
    }
}

impl Cpu for KvmCpu {
    type Error = KvmError;

    fn run(&mut self, horizon: Horizon) -> Result<Back, KvmError> {
        match self.finish_parts()? {
            Some(exit) => {
                self.debugger.begin();
                self.debugger.exited(false);
                Ok(Back::Exit(exit))
            }
            None => self.run_to(horizon),
        }
    }

    fn posted(&mut self) -> Result<Option<u8>, KvmError> {
        self.vm.posted.take(&self.vm.fd, &mut self.vcpu.fd)
    }

    fn registers(&mut self) -> Registers {
        self.page().registers()
    }

    fn answer(&mut self, exit: &Exit, answer: &Answer) -> Result<(), KvmError> {
        match (*exit, *answer) {
            (Exit::WriteCr4 { value } | Exit::WriteDr { value, .. }, _) => {
                self.answer_cpu_trap(value)?;
            }
            (Exit::ReadCr4 | Exit::Panic { .. }, _) => self.answer_cpu_trap(0)?,
            (Exit::ProtectionFault, _) => self.finish_fault(),
            (Exit::Module { .. }, _) => self.finish_module()?,
            (_, Answer::Value(value)) => self.give(value),
            (_, Answer::Fault) => self.page().set_msr(None),
            (Exit::Access(Access::MsrWrite { index, value }), Answer::Done) => {
                self.page().set_msr(Some(value));
                self.wrote_msr(index, value)?;
            }
            (Exit::TimeRead { instruction, .. }, Answer::Time { tsc, aux }) => {
                self.finish_user_read()?;
                self.page().change_registers(|registers| {
                    registers.rax = tsc & 0xffff_ffff;
                    registers.rdx = tsc >> 32;
                    if instruction == hindsight_replay::TimeInstruction::Rdtscp {
                        registers.rcx = aux.into();
                    }
                });
            }
            (_, Answer::Cpuid([a, b, c, d])) => self.page().change_registers(|registers| {
                registers.rax = a.into();
                registers.rbx = b.into();
                registers.rcx = c.into();
                registers.rdx = d.into();
            }),
            (_, Answer::Done | Answer::Time { .. }) => {}
        }
        self.end_trap()
    }

    fn settle(&mut self) -> Result<bool, KvmError> {
        if !self.vcpu.parts.is_reading() {
            self.finish_exit()?;
        }
        // Between two parts of one instruction the next exit is at hand.
        Ok(!self.vcpu.parts.are_left() && self.page().ready_for_interrupt())
    }

    fn interrupt(&mut self, vector: u8) -> Result<(), KvmError> {
        let interrupt = kvm_interrupt { irq: vector.into() };
        // SAFETY: the ioctl reads a `kvm_interrupt` and nothing else; the fd is a vCPU's.
        let result = unsafe { ioctl_with_ref(&self.vcpu.fd, KVM_INTERRUPT(), &interrupt) };
        if result < 0 {
            Err(kvm_ioctls::Error::last()).named("KVM_INTERRUPT")
        } else {
            Ok(())
        }
    }

    fn request_window(&mut self, wanted: bool) {
        self.page().request_window(wanted);
    }

    fn show_clock(&mut self, clock: ShownClock) {
        self.write_clock(clock);
    }

    fn site(&mut self) -> Option<u64> {
        self.user_site()
    }

    fn read(&mut self, gva: u64, buffer: &mut [u8]) -> usize {
        self.view().map_or(0, |view| view.read(gva, buffer))
    }

    fn left_open(&mut self, at_end: bool) -> Vec<LeftOpen> {
        self.take_noticed(at_end)
    }

    fn ram(&self) -> &Ram {
        self.vm.memory.ram()
    }

    fn memory_digest(&mut self) -> Result<MemoryDigest, KvmError> {
        self.vm.memory.digest()
    }

    fn state_digest(&mut self) -> Result<CpuDigest, KvmError> {
        self.digest()
    }
}
