//! All registers of a guest, for a debugger to show.

use hindsight_replay::Registers;

use super::cpu::KvmCpu;
use super::error::KvmError;
use super::state::{KERNEL_GS_BASE, kept_msrs};

/// The registers of a guest, for a debugger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestRegisters {
    /// General registers, RIP and RFLAGS.
    pub general: Registers,
    /// Selectors: CS, SS, DS, ES, FS, GS.
    pub segments: [u16; 6],
    /// The base of FS.
    pub fs_base: u64,
    /// The base of GS.
    pub gs_base: u64,
    /// What SWAPGS exchanges with it.
    pub kernel_gs_base: u64,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4, as the guest believes it to be.
    pub cr4: u64,
    /// CR8.
    pub cr8: u64,
    /// EFER.
    pub efer: u64,
    /// x87 and SSE, as FXSAVE stores them (Intel SDM vol. 1, 10.5.1).
    pub fpu: [u8; 512],
}

impl KvmCpu {
    /// All registers that a debugger shows. By then the last exit's instruction is finished.
    ///
    /// # Errors
    ///
    /// KVM failed.
    pub fn guest_registers(&mut self) -> Result<GuestRegisters, KvmError> {
        self.watch_debug_registers()?;
        let general = self.page().registers();
        let system = self.sregs()?;
        let msrs = kept_msrs().zip(self.kept_msr_values()?);
        let kernel_gs = msrs.filter(|(index, _)| *index == KERNEL_GS_BASE);
        let segments = [
            system.cs, system.ss, system.ds, system.es, system.fs, system.gs,
        ];
        Ok(GuestRegisters {
            general,
            segments: segments.map(|segment| segment.selector),
            fs_base: system.fs.base,
            gs_base: system.gs.base,
            kernel_gs_base: kernel_gs.map(|(_, value)| value).next().unwrap_or(0),
            cr0: system.cr0,
            cr2: system.cr2,
            cr3: system.cr3,
            cr4: self.vcpu.traps.memory.guest_cr4().unwrap_or(system.cr4),
            cr8: system.cr8,
            efer: system.efer,
            fpu: self.fxsave_area()?,
        })
    }
}
