//! The vCPU: exits out, answers in.
//!
//! One ioctl per exit in the common case: KVM copies the registers into the shared page at every
//! exit, and takes changed ones from there at the next entry. Trap ports are OUTs, so that no
//! unfinished register write stands between an exit and its answer.

use hindsight_devices::{APIC_BASE_AT_POWER_ON, Access, POSTED_PORT, Ram, Width};
use hindsight_replay::{
    Answer, Back, Cpu, CpuidTable, Exit, Horizon, LeftOpen, MemoryDigest, Registers, ShownClock,
};
use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_EXIT_HLT, KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVMIO, kvm_enable_cap, kvm_interrupt, kvm_regs,
    kvm_segment, kvm_sregs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::debug::Breakpoints;
use super::error::{KvmError, Named};
use super::guest_text::GuestView;
use super::memory::GuestMemory;
use super::modules::LoadingModule;
use super::page_walk::Paging;
use super::posted::Posted;
use super::preemption::Preemption;
use super::run_page::{PortExit, RunPage};
use super::traps::TrapState;
use super::vm::{KernelText, Vm};
use super::{cpuid, signals};
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

/// A vCPU, and the VM that it is in.
#[derive(Debug)]
pub struct KvmCpu {
    fd: VcpuFd,
    pub(super) vm: Vm,
    pub(super) traps: TrapState,
    /// The module that is being loaded at this exit.
    pub(super) loading: Option<LoadingModule>,
    /// The guest's breakpoints.
    pub(super) breakpoints: Breakpoints,
    /// Whether its accesses to debug registers are KVM's to do.
    pub(super) watched: bool,
    pub(super) counts: VcpuCounts,
    /// How it is stopped between two exits.
    pub(super) preemption: Preemption,
    /// Where breakpoints are set, for us and not for the guest.
    pub(super) stops: Vec<u64>,
    posted: Posted,
    string: Option<StringAccess>,
    pub(super) unfinished: bool,
    /// KVM's reason for an exit that came while another was being finished.
    held: Option<u32>,
}

/// A port access of several elements, or a memory access of an odd length, taken one by one.
#[derive(Clone, Copy, Debug)]
struct StringAccess {
    kind: StringKind,
    next: usize,
    count: usize,
}

#[derive(Clone, Copy, Debug)]
enum StringKind {
    Ports(PortExit),
    Bytes {
        gpa: u64,
        write: bool,
        data: [u8; 8],
    },
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
        let mut fd = vm.fd.create_vcpu(0).named("KVM_CREATE_VCPU")?;
        fd.set_cpuid2(&cpuid::for_kvm(table)?)
            .named("KVM_SET_CPUID2")?;
        hide_paravirtual_features(&fd)?;
        let posted = Posted::new(kvm, &vm.fd, &mut fd)?;
        RunPage::of(&mut fd).keep_registers();
        Ok(KvmCpu {
            fd,
            vm,
            traps: TrapState::default(),
            loading: None,
            breakpoints: Breakpoints::default(),
            watched: false,
            counts: VcpuCounts::default(),
            preemption: Preemption::default(),
            stops: Vec::new(),
            posted,
            string: None,
            unfinished: false,
            held: None,
        })
    }

    /// Sets the registers as the 64-bit boot protocol wants them (Linux,
    /// Documentation/arch/x86/boot.rst, "64-bit boot protocol").
    pub fn boot(&mut self, plan: &BootPlan, text: KernelText) -> Result<(), KvmError> {
        let mut sregs = self.fd.get_sregs().named("KVM_GET_SREGS")?;
        let code = flat_segment(plan.code_selector, 0xb, true);
        let data = flat_segment(plan.data_selector, 0x3, false);
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
        (sregs.gs, sregs.ss) = (data, data);
        sregs.gdt.base = plan.gdt_base;
        sregs.gdt.limit = plan.gdt_limit;
        sregs.cr3 = plan.page_table;
        // CR0: PG AM WP NE ET MP PE. CR4: PAE. EFER: LMA LME.
        sregs.cr0 = 0x8005_0033;
        sregs.cr4 = 1 << 5;
        sregs.efer = 1 << 10 | 1 << 8;
        // The board keeps IA32_APIC_BASE for the guest. By KVM's own, CPUID shows programs an APIC.
        sregs.apic_base = APIC_BASE_AT_POWER_ON;
        self.fd.set_sregs(&sregs).named("KVM_SET_SREGS")?;
        let registers = kvm_regs {
            rip: plan.entry,
            rsp: plan.rsp,
            rsi: plan.boot_params,
            rflags: 2,
            ..Default::default()
        };
        self.fd.set_regs(&registers).named("KVM_SET_REGS")?;
        let mut fpu = self.fd.get_fpu().named("KVM_GET_FPU")?;
        (fpu.fcw, fpu.mxcsr) = (0x37f, 0x1f80);
        self.fd.set_fpu(&fpu).named("KVM_SET_FPU")?;
        self.vm.set_text(text);
        Ok(())
    }

    /// Drops what is left of an exit that nobody answers.
    pub(super) fn forget_exit(&mut self) {
        self.string = None;
    }

    /// KVM's reason for an exit that came while another was being finished.
    pub(super) fn take_held(&mut self) -> Option<u32> {
        self.held.take()
    }

    /// What was counted beside exits.
    pub fn counts(&self) -> VcpuCounts {
        self.counts
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.vm.memory
    }

    pub(super) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    pub(super) fn page(&mut self) -> RunPage<'_> {
        RunPage::of(&mut self.fd)
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
        self.fd.get_sregs().named("KVM_GET_SREGS")
    }

    /// Enters the guest once. Returns KVM's exit reason, or `None` if the host interrupted it.
    pub(super) fn enter(&mut self) -> Result<Option<u32>, KvmError> {
        loop {
            let reason = signals::enter(&mut self.fd)?;
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
        self.posted.add(byte, &self.vm.fd, &mut self.fd)
    }

    /// Has KVM finish the instruction of the last exit, if it has not.
    pub(super) fn finish_exit(&mut self) -> Result<(), KvmError> {
        if self.unfinished {
            self.unfinished = false;
            self.counts.settles += 1;
            match signals::finish(&mut self.fd)? {
                None => {}
                // The rest of an access across a page: the same instruction, its next exit.
                Some(KVM_EXIT_MMIO) => self.held = Some(KVM_EXIT_MMIO),
                Some(reason) => {
                    let rip = self.rip();
                    let what = format!("it came back with reason {reason} instead of at once");
                    return Err(KvmError::Stopped {
                        rip,
                        bytes: Vec::new(),
                        what,
                    });
                }
            }
        }
        Ok(())
    }

    /// The exit that KVM's reason stands for.
    pub(super) fn decode(&mut self, reason: u32) -> Result<Exit, KvmError> {
        self.unfinished = matches!(
            reason,
            KVM_EXIT_IO | KVM_EXIT_MMIO | KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR
        );
        match reason {
            KVM_EXIT_IO => {
                let io = self.page().port().expect("the reason is a port access");
                if let Some(exit) = self.trapped(&io) {
                    return Ok(exit);
                }
                self.string = Some(StringAccess {
                    kind: StringKind::Ports(io),
                    next: 0,
                    count: io.count,
                });
                Ok(self.next_element().expect("a port access moves something"))
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

    fn decode_mmio(&mut self) -> Exit {
        let mmio = self
            .page()
            .mmio()
            .expect("the reason is a memory-mapped access");
        let value = u64::from_le_bytes(mmio.data);
        match Width::from_bytes(mmio.bytes) {
            Some(width) if mmio.write => Exit::Access(Access::MemoryWrite {
                gpa: mmio.gpa,
                width,
                value: value & width.ones(),
            }),
            Some(width) => Exit::Access(Access::MemoryRead {
                gpa: mmio.gpa,
                width,
            }),
            // An access across a page comes in parts of any length: take them byte by byte.
            None => {
                let kind = StringKind::Bytes {
                    gpa: mmio.gpa,
                    write: mmio.write,
                    data: mmio.data,
                };
                self.string = Some(StringAccess {
                    kind,
                    next: 0,
                    count: mmio.bytes.max(1),
                });
                self.next_element().expect("an access moves something")
            }
        }
    }

    /// The present element of a string access, as an exit of its own.
    fn next_element(&mut self) -> Option<Exit> {
        let StringAccess { kind, next, count } = self.string?;
        if next == count {
            self.string = None;
            return None;
        }
        Some(Exit::Access(match kind {
            StringKind::Ports(io) => {
                let width = Width::from_bytes(io.size).expect("ports are 1, 2 or 4 bytes wide");
                if io.read {
                    Access::PortRead {
                        port: io.port,
                        width,
                    }
                } else {
                    let value = self.page().port_data(&io, next);
                    Access::PortWrite {
                        port: io.port,
                        width,
                        value,
                    }
                }
            }
            StringKind::Bytes { gpa, write, data } => {
                let (gpa, width) = (gpa.wrapping_add(next as u64), Width::Byte);
                if write {
                    Access::MemoryWrite {
                        gpa,
                        width,
                        value: data[next].into(),
                    }
                } else {
                    Access::MemoryRead { gpa, width }
                }
            }
        }))
    }

    /// Hands the value of a read to where KVM will take it from.
    fn give(&mut self, value: u64) {
        match self.string {
            Some(StringAccess {
                kind: StringKind::Ports(io),
                next,
                ..
            }) => {
                self.page().set_port_data(&io, next, value as u32);
            }
            Some(StringAccess {
                kind: StringKind::Bytes { .. },
                next,
                ..
            }) => {
                let mut data = self.page().mmio().expect("an MMIO exit is open").data;
                data[next] = value as u8;
                self.page().set_mmio_data(data);
            }
            None => {
                let mut page = self.page();
                if page.msr().is_some() {
                    page.set_msr(Some(value));
                } else {
                    page.set_mmio_data(value.to_le_bytes());
                }
            }
        }
    }
}

impl Cpu for KvmCpu {
    type Error = KvmError;

    fn run(&mut self, horizon: Horizon) -> Result<Back, KvmError> {
        if let Some(exit) = self.next_element() {
            return Ok(Back::Exit(exit));
        }
        if let Some(reason) = self.take_held() {
            return self.decode(reason).map(Back::Exit);
        }
        self.run_to(horizon)
    }

    fn posted(&mut self) -> Result<Option<u8>, KvmError> {
        self.posted.take(&self.vm.fd, &mut self.fd)
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
        self.end_trap()?;
        if let Some(string) = &mut self.string {
            string.next += 1;
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<bool, KvmError> {
        if self.string.is_some_and(|string| string.next < string.count) {
            // Between two elements of one instruction; the next exit is at hand.
            return Ok(false);
        }
        self.finish_exit()?;
        if self.held.is_some() {
            return Ok(false);
        }
        Ok(self.page().ready_for_interrupt())
    }

    fn interrupt(&mut self, vector: u8) -> Result<(), KvmError> {
        let interrupt = kvm_interrupt { irq: vector.into() };
        // SAFETY: the ioctl reads a `kvm_interrupt` and nothing else; the fd is a vCPU's.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_INTERRUPT(), &interrupt) };
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
}

/// What CPUID does not show, KVM shall not offer either.
fn hide_paravirtual_features(fd: &VcpuFd) -> Result<(), KvmError> {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        ..Default::default()
    };
    cap.args[0] = 1;
    fd.enable_cap(&cap)
        .map_err(|_| KvmError::Lacks("KVM_CAP_ENFORCE_PV_FEATURE_CPUID (Linux 5.10)"))
}

fn flat_segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}
