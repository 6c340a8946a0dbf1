//! What stands behind the trap ports: CR4 with its TSD bit, and the #GP entry.
//!
//! The loader rewrote certain instructions of the kernel into OUTs (see [`crate::boot::traps`]).
//! Time reads and CPUID are answered by the machine; the rest concerns the CPU alone and is done
//! here. CR4.TSD is kept set, so that RDTSC in user mode raises #GP; the first instruction of the
//! kernel's #GP entry is rewritten too, and there a user-mode time read is told from a real fault.

use hindsight_replay::{Exit, LeftOpen, Mode, TimeInstruction};
use iced_x86::Mnemonic;
use kvm_bindings::{kvm_dtable, kvm_segment, kvm_sregs};

use super::error::{KvmError, Named};
use super::vcpu::KvmCpu;
use crate::boot::GuestRam;
use crate::boot::traps::{
    SiteKind, TRAP_CPUID, TRAP_GP_ENTRY, TRAP_MODULE, TRAP_PAUSE, TRAP_RDTSC, TRAP_RDTSCP,
    TRAP_READ_CR4, TRAP_WRITE_CR4,
};

/// CR4.TSD: RDTSC and RDTSCP are for ring 0 alone (Intel SDM vol. 3, 2.5).
pub const CR4_TSD: u64 = 1 << 2;
/// RFLAGS.AC, which CLAC clears.
const RFLAGS_AC: u64 = 1 << 18;
/// RFLAGS.RF, which a fault pushes set, and an instruction that completes leaves clear.
const RFLAGS_RF: u64 = 1 << 16;
/// #GP.
const GP_VECTOR: u64 = 13;
/// Addresses from here on are the kernel's.
const KERNEL_HALF: u64 = 1 << 63;

/// The instruction that stood where the #GP entry was rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overwritten {
    /// NOP or ENDBR64: nothing.
    Nothing,
    /// CLAC.
    Clac,
}

/// What the traps remember of the CPU.
#[derive(Clone, Debug, Default)]
pub struct TrapState {
    /// The CR4 the guest believes in, once it has written one through a trap.
    guest_cr4: Option<u64>,
    /// Where the #GP entry is rewritten, and what stood there.
    gp_entry: Option<(u64, Overwritten)>,
    /// A user-mode time read that waits for its value: what IRET would have loaded.
    user_read: Option<UserFrame>,
}

/// What a return from #GP to behind the instruction that faulted loads: the pushed frame.
#[derive(Clone, Copy, Debug)]
struct UserFrame {
    /// The system registers as they are, with the frame's CS and SS.
    sregs: kvm_sregs,
    rip: u64,
    rflags: u64,
    rsp: u64,
}

impl KvmCpu {
    /// Turns an OUT to a trap port into the exit it stands for; `None` if it is an ordinary OUT.
    pub(super) fn trapped(&mut self, port: u16) -> Option<Exit> {
        let registers = self.page().registers();
        // User code that was given the ports (iopl) talks to the board like any other. The kernel
        // itself runs below its own half only before it has switched to its page tables.
        if registers.rip() < KERNEL_HALF && self.sregs().ok()?.cs.dpl != 0 {
            return None;
        }
        let exit = match u8::try_from(port).ok()? {
            TRAP_RDTSC => Exit::TimeRead {
                instruction: TimeInstruction::Rdtsc,
                mode: Mode::Kernel,
            },
            TRAP_RDTSCP => Exit::TimeRead {
                instruction: TimeInstruction::Rdtscp,
                mode: Mode::Kernel,
            },
            TRAP_CPUID => Exit::Cpuid {
                leaf: registers.rax() as u32,
                subleaf: registers.rcx() as u32,
            },
            TRAP_WRITE_CR4 | TRAP_READ_CR4 | TRAP_MODULE if self.operands_here().is_none() => {
                // It runs where nobody rewrote it, and what it was to do is not known.
                if !self.text.rewritten.is_empty() {
                    self.noticed.add(LeftOpen::Copied);
                }
                return None;
            }
            TRAP_WRITE_CR4 => match self.operands_here()?.1 {
                SiteKind::WriteCr4 { source } => Exit::WriteCr4 {
                    value: general(&registers.0, source),
                },
                _ => return None,
            },
            TRAP_READ_CR4 => match self.operands_here()?.1 {
                SiteKind::ReadCr4 { .. } => Exit::ReadCr4,
                _ => return None,
            },
            TRAP_PAUSE => Exit::Pause,
            TRAP_GP_ENTRY => self.gp_exit(),
            TRAP_MODULE => self.module_exit()?,
            _ => return None,
        };
        Some(exit)
    }

    /// The site of the OUT the guest stands at, or has just left where KVM emulates the OUT: its address, and what it was,
    /// if its port does not say all.
    pub(super) fn operands_here(&mut self) -> Option<(u64, SiteKind)> {
        let rip = self.rip();
        [rip, rip.wrapping_sub(2)]
            .into_iter()
            .find_map(|at| Some((at, *self.text.operands.get(&at)?)))
    }

    /// Performs a write of CR4, with TSD kept set, and looks after the #GP entry.
    pub(super) fn write_cr4(&mut self, value: u64) -> Result<(), KvmError> {
        let mut sregs = self.sregs()?;
        sregs.cr4 = value | CR4_TSD;
        match self.fd().set_sregs(&sregs) {
            Ok(()) => {
                self.traps.guest_cr4 = Some(value);
                self.hook_gp_entry(&sregs)?;
                self.hook_gates(&sregs);
                Ok(())
            }
            // Reserved bits: the CPU answers such a write with #GP.
            Err(error) if error.errno() == libc::EINVAL => self.inject_gp(),
            Err(error) => Err(error).named("KVM_SET_SREGS"),
        }
    }

    /// Performs a read of CR4: the guest sees what it wrote.
    pub(super) fn read_cr4(&mut self) -> Result<(), KvmError> {
        let real = self.sregs()?.cr4;
        let value = self.traps.guest_cr4.unwrap_or(real);
        if let Some((_, SiteKind::ReadCr4 { target })) = self.operands_here() {
            self.page()
                .change_registers(|registers| *general_mut(registers, target) = value);
        }
        Ok(())
    }

    /// Rewrites the first instruction of the #GP entry, if the guest's IDT has a final one. Looks
    /// again at every CR4 write, since the kernel patches its own text until it has booted.
    fn hook_gp_entry(&mut self, sregs: &kvm_sregs) -> Result<(), KvmError> {
        let Some([low, high]) = self.view().words(sregs.idt.base + GP_VECTOR * 16) else {
            return Ok(());
        };
        // Intel SDM vol. 3, 6.14.1: 64-bit interrupt gate.
        let present = low & 1 << 47 != 0;
        let entry = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        if !present || entry < KERNEL_HALF || self.text.is_init(entry) {
            return Ok(());
        }
        let bytes = self.view().instruction_bytes(entry);
        if bytes.starts_with(&[0xe6, TRAP_GP_ENTRY]) {
            return Ok(());
        }
        let (length, overwritten) = match *bytes.as_slice() {
            [0x0f, 0x01, 0xca, ..] => (3, Overwritten::Clac),
            [0x0f, 0x1f, 0x00, ..] | [0x90, 0x90, 0x90, ..] => (3, Overwritten::Nothing),
            [0xf3, 0x0f, 0x1e, 0xfa, ..] => (4, Overwritten::Nothing),
            _ => return Ok(()),
        };
        let Some(gpa) = self.view().translate(entry) else {
            return Ok(());
        };
        let trap = [0xe6, TRAP_GP_ENTRY, 0x90, 0x90];
        if self.memory.write(gpa, &trap[..length]).is_ok() {
            self.traps.gp_entry = Some((entry, overwritten));
            self.counts.gp_entry = Some(entry);
        }
        Ok(())
    }

    /// The guest is at the rewritten #GP entry: was it a time read in user mode?
    fn gp_exit(&mut self) -> Exit {
        match self.user_time_read() {
            Some((instruction, frame)) => {
                self.traps.user_read = Some(frame);
                Exit::TimeRead {
                    instruction,
                    mode: Mode::User,
                }
            }
            None => Exit::ProtectionFault,
        }
    }

    fn user_time_read(&mut self) -> Option<(TimeInstruction, UserFrame)> {
        if self.traps.guest_cr4.is_some_and(|cr4| cr4 & CR4_TSD != 0) {
            // The guest forbids it to its users itself, so this fault is one it wants to see.
            return None;
        }
        let rsp = self.page().registers().0[6];
        let [error, rip, cs, rflags, rsp, ss] = self.view().words(rsp)?;
        if error != 0 || cs & 3 != 3 {
            return None;
        }
        let mut sregs = self.sregs().ok()?;
        sregs.cs = self.descriptor(&sregs.gdt, cs as u16)?;
        sregs.ss = self.descriptor(&sregs.gdt, ss as u16)?;
        let bitness = if sregs.cs.l != 0 { 64 } else { 32 };
        let found = self.view().instruction(rip, bitness)?;
        let instruction = match found.mnemonic() {
            Mnemonic::Rdtsc => TimeInstruction::Rdtsc,
            Mnemonic::Rdtscp => TimeInstruction::Rdtscp,
            _ => return None,
        };
        let frame = UserFrame {
            sregs,
            rip: found.next_ip(),
            rflags: rflags & !RFLAGS_RF,
            rsp,
        };
        Some((instruction, frame))
    }

    /// Returns from the #GP entry to behind the time read, if it was one in user mode; a read through
    /// a trap port has nothing to return from.
    pub(super) fn finish_user_read(&mut self) -> Result<(), KvmError> {
        let Some(frame) = self.traps.user_read.take() else {
            return Ok(());
        };
        self.fd().set_sregs(&frame.sregs).named("KVM_SET_SREGS")?;
        self.page().change_registers(|registers| {
            registers.rip = frame.rip;
            registers.rsp = frame.rsp;
            registers.rflags = frame.rflags;
        });
        Ok(())
    }

    /// Does what the overwritten first instruction of the #GP entry did.
    pub(super) fn finish_fault(&mut self) {
        if let Some((_, Overwritten::Clac)) = self.traps.gp_entry {
            self.page()
                .change_registers(|registers| registers.rflags &= !RFLAGS_AC);
        }
    }

    /// Where in its programs the guest is, or its kernel works for, as one number: the user-mode
    /// instruction and the word on top of its stack, which in a library's function says who called it.
    ///
    /// Linux begins each task's kernel stack with what the entry from user mode pushed: RIP, CS,
    /// RFLAGS, RSP, SS. Kernel stacks are aligned (Linux, Documentation/arch/x86/kernel-stacks.rst);
    /// newer kernels leave two words free above.
    pub(super) fn user_site(&mut self) -> Option<u64> {
        const STACK_BYTES: u64 = 16 << 10;
        let registers = self.page().registers();
        let (rip, rsp) = if registers.rip() < KERNEL_HALF {
            (registers.rip(), registers.0[6])
        } else {
            let top = (registers.0[6] | (STACK_BYTES - 1)).wrapping_add(1);
            let words: [u64; 7] = self.view().words(top.wrapping_sub(56))?;
            let is_user =
                |frame: &&[u64]| frame[0] < KERNEL_HALF && matches!(frame[1], 0x23 | 0x33);
            let frame = [&words[2..], &words[..5]].into_iter().find(is_user)?;
            (frame[0], frame[3])
        };
        let caller = self.view().words(rsp).map_or(0, |[word]| word);
        Some(rip ^ caller.rotate_left(32))
    }

    fn inject_gp(&mut self) -> Result<(), KvmError> {
        let mut events = self.fd().get_vcpu_events().named("KVM_GET_VCPU_EVENTS")?;
        events.exception.injected = 1;
        events.exception.nr = GP_VECTOR as u8;
        events.exception.has_error_code = 1;
        events.exception.error_code = 0;
        self.fd()
            .set_vcpu_events(&events)
            .named("KVM_SET_VCPU_EVENTS")
    }

    /// A code or data segment from the guest's GDT, as IRET would load it.
    fn descriptor(&self, gdt: &kvm_dtable, selector: u16) -> Option<kvm_segment> {
        let offset = u64::from(selector & !7);
        if offset + 7 > u64::from(gdt.limit) {
            return None;
        }
        let [raw] = self.view().words(gdt.base + offset)?;
        // Intel SDM vol. 3, 3.4.5: segment descriptors.
        let bit = |at: u32| (raw >> at & 1) as u8;
        let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
        let granular = bit(55);
        Some(kvm_segment {
            base: raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000,
            limit: if granular != 0 {
                limit << 12 | 0xfff
            } else {
                limit
            },
            selector,
            type_: (raw >> 40 & 0xf) as u8 | 1,
            present: bit(47),
            dpl: 3,
            db: bit(54),
            s: bit(44),
            l: bit(53),
            g: granular,
            avl: bit(52),
            unusable: 0,
            padding: 0,
        })
    }
}

/// General register `number` in instruction order (rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8..),
/// out of the order of `struct kvm_regs`.
fn general(registers: &[u64], number: u8) -> u64 {
    const PLACE: [usize; 16] = [0, 2, 3, 1, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15];
    registers[PLACE[usize::from(number & 15)]]
}

fn general_mut(registers: &mut kvm_bindings::kvm_regs, number: u8) -> &mut u64 {
    match number & 15 {
        0 => &mut registers.rax,
        1 => &mut registers.rcx,
        2 => &mut registers.rdx,
        3 => &mut registers.rbx,
        4 => &mut registers.rsp,
        5 => &mut registers.rbp,
        6 => &mut registers.rsi,
        7 => &mut registers.rdi,
        8 => &mut registers.r8,
        9 => &mut registers.r9,
        10 => &mut registers.r10,
        11 => &mut registers.r11,
        12 => &mut registers.r12,
        13 => &mut registers.r13,
        14 => &mut registers.r14,
        _ => &mut registers.r15,
    }
}
