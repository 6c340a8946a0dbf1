//! The STI-shadow rule.
//!
//! STI takes effect after the instruction that follows it (Intel SDM vol. 2, STI). On some hosts
//! an interrupt of the host's that lands in between makes KVM forget this, and the window opens one
//! instruction early; whether it does is the host's doing, and a replay would differ. So a window
//! is never accepted right after an STI byte: the guest takes one step, and the window counts as open
//! where that leads. A byte 0xfb that only ends some other instruction costs a step and no more,
//! for the rule looks at the guest's state alone and gives the same place every time.
//!
//! **Where there can be no shadow of STI** the window is open: in a program, which may not execute STI (its
//! CPL is above RFLAGS.IOPL), and where the guest single-steps, for its own #DB has ended the shadow.
//!
//! **MOV SS and POP SS** cast a shadow too, but none that a window is waited for in: it does not change IF, so an
//! interrupt that is pending where IF is set has been delivered at the exit before, or its window was open before.
//!
//! **What cannot be stepped.** KVM steps with RFLAGS.TF, which some instructions leak, drop or hide. PUSHF and POPF
//! are done here instead. Of the others (INT n, IRET, SYSRET and their like) none follows an STI in a kernel that
//! wants to live; after another 0xfb the window is simply open there, and so it is after a real STI on a host that
//! forgets no shadow. That is all of them but the emulated ones.

use iced_x86::{Code, Instruction, Mnemonic};
use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP, kvm_guest_debug_arch, kvm_sregs,
};

use super::cpu::KvmCpu;
use super::debug::RFLAGS_TF;
use super::error::KvmError;
use super::segments;

/// The opcode of STI.
const STI: u8 = 0xfb;
/// RFLAGS.IOPL.
const RFLAGS_IOPL: u32 = 12;
/// RFLAGS.RF and VM, which PUSHF stores as zeroes and POPF leaves clear.
const RFLAGS_RF_VM: u64 = 3 << 16;
/// The flags that POPF loads in ring 0: CF, PF, AF, ZF, SF, TF, IF, DF, OF, IOPL, NT, AC, ID.
const RFLAGS_POPPED: u64 = 0x24_7fd5;

/// The flags on a stack of 64-bit code.
const FLAGS_BYTES: u64 = 8;

/// What an instruction after STI needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// A step.
    Taken,
    /// To be done here: it pushes the flags.
    Push,
    /// To be done here: it pops them.
    Pop,
    /// Neither can be done.
    Refused,
}

impl Step {
    fn of(instruction: Option<&Instruction>) -> Step {
        use Mnemonic::{
            Int, Int1, Int3, Iret, Iretd, Iretq, Popf, Popfd, Pushf, Pushfd, Syscall, Sysenter,
            Sysexit, Sysexitq, Sysret, Sysretq,
        };
        let Some(instruction) = instruction else {
            // It will fault as it is fetched.
            return Step::Refused;
        };
        match (instruction.code(), instruction.mnemonic()) {
            (Code::Pushfq, _) => Step::Push,
            (Code::Popfq, _) => Step::Pop,
            (
                _,
                Int | Int1 | Int3 | Iret | Iretd | Iretq | Popf | Popfd | Pushf | Pushfd | Syscall
                | Sysenter | Sysexit | Sysexitq | Sysret | Sysretq,
            ) => Step::Refused,
            _ => Step::Taken,
        }
    }
}

impl KvmCpu {
    /// An open window has been reported: moves on to where it may be used. Returns the exit reason
    /// to go on with, the window's or that of an exit the step ran into; `None` if the guest has an exception to take
    /// first, and is to run on.
    pub(super) fn leave_shadow(&mut self) -> Result<Option<u32>, KvmError> {
        loop {
            let Some(sregs) = self.shadowed()? else {
                return Ok(Some(KVM_EXIT_IRQ_WINDOW_OPEN));
            };
            let rip = segments::linear(&sregs.cs, self.rip());
            let bits = segments::code_bits(&sregs.cs);
            let instruction = self.view()?.instruction(rip, bits);
            let length = instruction.map_or(0, |instruction| instruction.len() as u64);
            let done = match Step::of(instruction.as_ref()) {
                Step::Push => self.push_flags(length)?,
                Step::Pop => self.pop_flags(length)?,
                Step::Refused => false,
                Step::Taken => {
                    let reason = self.step()?;
                    if reason != KVM_EXIT_DEBUG {
                        return Ok(Some(reason));
                    }
                    if self.sort_step()? {
                        self.page().request_window(true);
                        return Ok(None);
                    }
                    true
                }
            };
            if !done {
                return Ok(Some(KVM_EXIT_IRQ_WINDOW_OPEN));
            }
        }
    }

    /// Whether the present instruction may be in the shadow of an STI; then the system registers.
    fn shadowed(&mut self) -> Result<Option<kvm_sregs>, KvmError> {
        let registers = self.page().registers();
        if registers.rflags() & RFLAGS_TF != 0 {
            return Ok(None);
        }
        let sregs = self.sregs()?;
        let privileged = u64::from(sregs.ss.dpl) <= registers.rflags() >> RFLAGS_IOPL & 3;
        let before = segments::linear(&sregs.cs, registers.rip().wrapping_sub(1));
        Ok((privileged && self.byte_at(before) == Some(STI)).then_some(sregs))
    }

    /// PUSHF of a kernel, which is in no shadow any more then. `false` if there is no stack.
    fn push_flags(&mut self, length: u64) -> Result<bool, KvmError> {
        let registers = self.page().registers();
        let rsp = registers.0[6].wrapping_sub(FLAGS_BYTES);
        let flags = registers.rflags() & !RFLAGS_RF_VM;
        if !self.write_guest(rsp, &flags.to_le_bytes())? {
            return Ok(false);
        }
        self.page().change_registers(|registers| {
            registers.rsp = rsp;
            registers.rip += length;
        });
        Ok(true)
    }

    /// The same, of POPF.
    fn pop_flags(&mut self, length: u64) -> Result<bool, KvmError> {
        let rsp = self.page().registers().0[6];
        let Some([flags]) = self.view()?.words(rsp) else {
            return Ok(false);
        };
        self.page().change_registers(|registers| {
            let kept = registers.rflags & !(RFLAGS_POPPED | RFLAGS_RF_VM);
            registers.rflags = kept | flags & RFLAGS_POPPED;
            registers.rsp = rsp.wrapping_add(FLAGS_BYTES);
            registers.rip += length;
        });
        Ok(true)
    }

    /// Runs one instruction with interrupts held back.
    pub(super) fn step(&mut self) -> Result<u32, KvmError> {
        self.page().request_window(false);
        let step = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ;
        self.debug(step, kvm_guest_debug_arch::default())?;
        let reason = loop {
            if let Some(reason) = self.enter()? {
                break reason;
            }
        };
        self.debug(0, kvm_guest_debug_arch::default())?;
        // Breakpoints went with it.
        self.forget_stops();
        self.counts.shadow_steps += 1;
        Ok(reason)
    }
}
