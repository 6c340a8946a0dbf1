//! The STI-shadow rule.
//!
//! STI takes effect behind the instruction that follows it (Intel SDM vol. 2, STI). On some hosts
//! an interrupt of the host's that lands in between makes KVM forget this, and the window opens one
//! instruction early; whether it does is the host's doing, and a replay would differ. So a window
//! is never accepted behind an STI byte: the guest takes one step, and the window counts as open
//! where that leads. A byte 0xfb that only ends some other instruction costs a step and no more,
//! for the rule looks at the guest's memory alone and gives the same place every time.

use iced_x86::Mnemonic;
use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP, kvm_guest_debug,
};

use super::error::{KvmError, Named};
use super::vcpu::KvmCpu;

/// The opcode of STI.
const STI: u8 = 0xfb;

impl KvmCpu {
    /// An open window has been reported: moves on to where it may be used. Returns the exit reason
    /// to go on with: the window's, or that of an exit the step ran into.
    pub(super) fn leave_shadow(&mut self) -> Result<u32, KvmError> {
        loop {
            let mut before = [0];
            let rip = self.rip();
            let behind_sti =
                self.view().read(rip.wrapping_sub(1), &mut before) == 1 && before[0] == STI;
            if !behind_sti {
                return Ok(KVM_EXIT_IRQ_WINDOW_OPEN);
            }
            self.check_can_step(rip)?;
            let reason = self.step()?;
            if reason != KVM_EXIT_DEBUG {
                return Ok(reason);
            }
        }
    }

    /// Runs one instruction with interrupts held back.
    fn step(&mut self) -> Result<u32, KvmError> {
        self.page().request_window(false);
        self.debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ)?;
        let reason = loop {
            if let Some(reason) = self.enter()? {
                break reason;
            }
        };
        self.debug(0)?;
        // Breakpoints went with it.
        self.stops.clear();
        self.counts.shadow_steps += 1;
        Ok(reason)
    }

    fn debug(&mut self, control: u32) -> Result<(), KvmError> {
        let debug = kvm_guest_debug {
            control,
            ..Default::default()
        };
        self.fd()
            .set_guest_debug(&debug)
            .named("KVM_SET_GUEST_DEBUG")
    }

    /// KVM steps with RFLAGS.TF, which these instructions leak, drop or hide.
    fn check_can_step(&mut self, rip: u64) -> Result<(), KvmError> {
        use Mnemonic::{
            Int, Int1, Int3, Iretd, Iretq, Popf, Popfd, Popfq, Pushf, Pushfd, Pushfq, Syscall,
            Sysenter, Sysexit, Sysexitq, Sysret, Sysretq,
        };
        let instruction = self.view().instruction(rip, 64);
        match instruction.map(|instruction| instruction.mnemonic()) {
            Some(
                mnemonic @ (Int | Int1 | Int3 | Iretd | Iretq | Popf | Popfd | Popfq | Pushf
                | Pushfd | Pushfq | Syscall | Sysenter | Sysexit | Sysexitq | Sysret
                | Sysretq),
            ) => Err(KvmError::Stopped {
                rip,
                bytes: self.view().instruction_bytes(rip),
                what: format!(
                    "the guest has {mnemonic:?} behind STI, which cannot be stepped over"
                ),
            }),
            _ => Ok(()),
        }
    }
}
