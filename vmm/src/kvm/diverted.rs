//! What a debugger changes of the vCPU and its memory, in a diversion ([`hindsight_replay::Reverse::divert`]).
//!
//! Memory is written where the page tables lead, whatever they permit: a debugger means the bytes that it sees. The vCPU may
//! have looked the tables up before, so its TLB is flushed. All that is written is noted as written by us, so that whatever
//! puts a state back puts these pages back too.

use super::cpu::KvmCpu;
use super::error::{KvmError, Named};
use super::guest_registers::GuestRegisters;
use super::inserted::KERNEL_HALF;
use crate::boot::GuestRam;

impl GuestRegisters {
    /// Why registers cannot be made `wanted`, if they cannot: a sentence.
    pub fn refuses(&self, wanted: &GuestRegisters) -> Option<&'static str> {
        let is_in_kernel = |registers: &GuestRegisters| registers.general.rip() >= KERNEL_HALF;
        let written = GuestRegisters {
            general: wanted.general,
            fs_base: wanted.fs_base,
            gs_base: wanted.gs_base,
            fpu: wanted.fpu,
            ..*self
        };
        if written != *wanted {
            return Some(
                "segments and control registers are not written: only general registers, eflags, fs_base, gs_base, \
                 x87 and SSE",
            );
        }
        (is_in_kernel(self) != is_in_kernel(wanted)).then_some(
            "rip would lead from the kernel to a program, or back: call a program's functions where the processor runs \
             it (break there), and the kernel's where it runs the kernel",
        )
    }
}

impl KvmCpu {
    /// Whether it is in the middle of an instruction that makes several accesses: it is another one's turn only then.
    pub fn is_in_instruction(&self) -> bool {
        self.vcpu.parts.are_left()
    }

    /// Makes the registers `wanted`, which is not [refused](GuestRegisters::refuses), between two instructions.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn write_registers(&mut self, wanted: &GuestRegisters) -> Result<(), KvmError> {
        let present = self.guest_registers()?;
        if wanted.fpu != present.fpu {
            self.write_fxsave_area(&wanted.fpu)?;
        }
        if (wanted.fs_base, wanted.gs_base) != (present.fs_base, present.gs_base) {
            let mut system = self.sregs()?;
            (system.fs.base, system.gs.base) = (wanted.fs_base, wanted.gs_base);
            self.fd().set_sregs(&system).named("KVM_SET_SREGS")?;
        }
        if wanted.general != present.general {
            let [general @ .., rip, rflags] = wanted.general.0;
            let [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, others @ ..] = general;
            let [r8, r9, r10, r11, r12, r13, r14, r15] = others;
            self.put_at(|registers| {
                *registers = kvm_bindings::kvm_regs {
                    rax,
                    rbx,
                    rcx,
                    rdx,
                    rsi,
                    rdi,
                    rsp,
                    rbp,
                    r8,
                    r9,
                    r10,
                    r11,
                    r12,
                    r13,
                    r14,
                    r15,
                    rip,
                    rflags,
                }
            })?;
            if rip != present.general.rip() {
                self.debugger.got_on();
            }
        }
        Ok(())
    }

    /// Writes memory of the present address space; `false`, and nothing is written, if it is not all mapped to RAM.
    ///
    /// # Errors
    ///
    /// KVM failed.
    pub fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<bool, KvmError> {
        let written = self.write_guest(gva, bytes)?;
        self.flush_tlb()?;
        Ok(written)
    }

    /// The same at a guest-physical address.
    ///
    /// # Errors
    ///
    /// KVM failed.
    pub fn write_physical(&mut self, gpa: u64, bytes: &[u8]) -> Result<bool, KvmError> {
        let written = self.vm.memory.write(gpa, bytes).is_ok();
        self.flush_tlb()?;
        Ok(written)
    }

    /// Has the page tables permit that the guest executes what is at these addresses. A debugger has a function that it
    /// calls return to the stack, to a breakpoint there; where that is in memory, the guest must come to it.
    ///
    /// # Errors
    ///
    /// KVM failed.
    pub fn let_execute(&mut self, addresses: &[u64]) -> Result<(), KvmError> {
        let view = self.view()?;
        let forbid = addresses.iter().flat_map(|address| view.forbid(*address));
        let entries: Vec<(u64, u64)> = forbid.collect();
        for (gpa, entry) in &entries {
            let written = self.vm.memory.write(*gpa, &entry.to_le_bytes());
            written.expect("it was read there");
        }
        match entries.is_empty() {
            true => Ok(()),
            false => self.flush_tlb(),
        }
    }

    fn flush_tlb(&mut self) -> Result<(), KvmError> {
        let system = self.sregs()?;
        self.put_system_registers(&system)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> GuestRegisters {
        GuestRegisters {
            general: hindsight_replay::Registers::default(),
            segments: [0; 6],
            fs_base: 0,
            gs_base: 0,
            kernel_gs_base: 0,
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            fpu: [0; 512],
        }
    }

    #[test]
    fn what_the_machine_hangs_on_is_not_written() {
        let present = registers();
        let refused = |change: fn(&mut GuestRegisters)| {
            let mut wanted = registers();
            change(&mut wanted);
            present.refuses(&wanted).is_some()
        };
        assert!(!refused(|_| {}));
        assert!(!refused(|wanted| wanted.general.0[16] = 0x1000));
        assert!(!refused(|wanted| wanted.fpu[40] = 1));
        assert!(!refused(|wanted| wanted.fs_base = 1));
        assert!(refused(|wanted| wanted.general.0[16] = KERNEL_HALF));
        assert!(refused(|wanted| wanted.segments[0] = 0x10));
        assert!(refused(|wanted| wanted.cr3 = 0x1000));
        assert!(refused(|wanted| wanted.efer = 1));
    }
}
