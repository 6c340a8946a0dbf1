//! One vCPU of a VM: what KVM has of it, and what we remember of it from one exit to the next.

use hindsight_devices::APIC_BASE_AT_POWER_ON;
use hindsight_replay::CpuidTable;
use kvm_bindings::{KVM_CAP_ENFORCE_PV_FEATURE_CPUID, kvm_enable_cap, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::cpuid;
use super::debug::Breakpoints;
use super::error::{KvmError, Named};
use super::parts::Parts;
use super::run_page::RunPage;
use super::traps::TrapState;
use super::vm::Vm;
use crate::boot::BootPlan;

/// A vCPU.
#[derive(Debug)]
pub(super) struct Vcpu {
    pub(super) fd: VcpuFd,
    pub(super) traps: TrapState,
    /// The guest's breakpoints.
    pub(super) breakpoints: Breakpoints,
    /// Breakpoints in debug registers do not stop it.
    pub(super) no_debug_registers: bool,
    /// Whether its accesses to debug registers are KVM's to do.
    pub(super) watched: bool,
    /// Where breakpoints are set, for us and not for the guest.
    pub(super) stops: Vec<u64>,
    /// Whether data is watched, for a debugger.
    pub(super) watches: bool,
    /// What is left of the instruction of the last exit.
    pub(super) parts: Parts,
    /// KVM has not finished that instruction.
    pub(super) unfinished: bool,
}

impl Vcpu {
    /// Number `number` of `vm`, which sees the CPU that `table` describes.
    pub(super) fn new(vm: &Vm, number: u64, table: &CpuidTable) -> Result<Vcpu, KvmError> {
        let mut fd = vm.fd.create_vcpu(number).named("KVM_CREATE_VCPU")?;
        fd.set_cpuid2(&cpuid::for_kvm(table)?)
            .named("KVM_SET_CPUID2")?;
        hide_paravirtual_features(&fd)?;
        RunPage::of(&mut fd).keep_registers();
        Ok(Vcpu {
            fd,
            traps: TrapState::default(),
            breakpoints: Breakpoints::default(),
            no_debug_registers: false,
            watched: false,
            stops: Vec::new(),
            watches: false,
            parts: Parts::default(),
            unfinished: false,
        })
    }

    /// Sets the registers as the 64-bit boot protocol wants them (Linux,
    /// Documentation/arch/x86/boot.rst, "64-bit boot protocol").
    pub(super) fn boot(&mut self, plan: &BootPlan) -> Result<(), KvmError> {
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
        Ok(())
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
