//! What the trap ports lead to: CR4 with its TSD bit, debug registers, and the #GP entry.
//!
//! The loader rewrote certain instructions of the kernel into OUTs (see [`hindsight_kernel::rewrite::traps`]).
//! Time reads and CPUID are answered by the machine; the rest concerns the CPU alone and is done here. Whatever
//! ends an instruction for the guest ends it as the CPU would: one that is single-stepped raises #DB. CR4.TSD
//! is kept set, so that RDTSC in user mode raises #GP; the first instruction of the kernel's #GP entry is
//! rewritten too, and there a user-mode time read is told apart from a real fault.

use hindsight_replay::{Exit, LeftOpen, Mode, TimeInstruction};
use iced_x86::Mnemonic;
use kvm_bindings::kvm_sregs;
use serde::{Deserialize, Serialize};

use super::cpu::KvmCpu;
use super::debug::RFLAGS_TF;
use super::error::{KvmError, Named};
use super::run_page::PortExit;
use super::segments;
use super::trap_sites::candidates;
use hindsight_kernel::rewrite::traps::{OUT, SHORTEST, SiteKind, TRAP_GP_ENTRY, is_trap_port};

/// CR4.TSD: RDTSC and RDTSCP are for ring 0 alone (Intel SDM vol. 3, 2.5).
pub(super) const CR4_TSD: u64 = 1 << 2;
/// RFLAGS.AC, which CLAC clears.
const RFLAGS_AC: u64 = 1 << 18;
/// RFLAGS.RF, which a fault pushes set, and an instruction that completes leaves clear.
const RFLAGS_RF: u64 = 1 << 16;
/// #GP.
const GP_VECTOR: u8 = 13;
/// Addresses from here on are the kernel's.
const KERNEL_HALF: u64 = 1 << 63;

/// The instruction that was where the #GP entry was rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Overwritten {
    /// NOP or ENDBR64: nothing.
    Nothing,
    /// CLAC.
    Clac,
}

/// The trap of the present exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Here {
    /// Address of its OUT.
    pub address: u64,
    /// The instruction that was there.
    pub kind: SiteKind,
    /// How many bytes that had.
    pub length: u8,
}

impl Here {
    /// Where the next instruction begins.
    pub(super) fn end(&self) -> u64 {
        self.address.wrapping_add(self.length.into())
    }
}

/// What the traps remember of the CPU from one exit to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TrapMemory {
    /// The CR4 the guest believes in, once it has written one through a trap.
    guest_cr4: Option<u64>,
    /// Where the #GP entry is rewritten, and what was there before.
    gp_entry: Option<(u64, Overwritten)>,
}

impl TrapMemory {
    /// The CR4 that the guest believes in, if it has written one.
    pub(super) fn guest_cr4(&self) -> Option<u64> {
        self.guest_cr4
    }

    /// Where the #GP entry is rewritten.
    pub(super) fn gp_entry(&self) -> Option<u64> {
        self.gp_entry.map(|(entry, _)| entry)
    }
}

/// What the traps know of the CPU.
#[derive(Clone, Debug, Default)]
pub(super) struct TrapState {
    /// What they remember.
    pub memory: TrapMemory,
    /// A user-mode time read that waits for its value: what IRET would have loaded.
    user_read: Option<UserFrame>,
    /// The trap that waits for its answer.
    here: Option<Here>,
}

/// What a return from #GP to the instruction after the one that faulted loads: the pushed frame.
#[derive(Clone, Copy, Debug)]
struct UserFrame {
    /// The system registers as they are, with the frame's CS and SS.
    sregs: kvm_sregs,
    rip: u64,
    rflags: u64,
    rsp: u64,
}

impl TrapState {
    /// Remembers this, and waits for nothing.
    pub(super) fn put(&mut self, memory: &TrapMemory) {
        *self = TrapState {
            memory: memory.clone(),
            ..TrapState::default()
        };
    }
}

impl KvmCpu {
    /// Turns an OUT to a trap port into the exit it stands for; `None` if it is an ordinary OUT.
    pub(super) fn trapped(&mut self, io: &PortExit) -> Option<Exit> {
        let port = u8::try_from(io.port)
            .ok()
            .filter(|&port| is_trap_port(port))?;
        if io.read || (io.size, io.count) != (1, 1) {
            return None;
        }
        if port == TRAP_GP_ENTRY {
            let (entry, _) = self.vcpu.traps.memory.gp_entry?;
            let is_there = candidates(self.rip()).any(|at| at == entry);
            return is_there.then(|| self.gp_exit());
        }
        let here = self.trap_here(port)?;
        let registers = self.page().registers();
        let exit = match here.kind {
            SiteKind::Rdtsc => Exit::TimeRead {
                instruction: TimeInstruction::Rdtsc,
                mode: Mode::Kernel,
            },
            SiteKind::Rdtscp => Exit::TimeRead {
                instruction: TimeInstruction::Rdtscp,
                mode: Mode::Kernel,
            },
            SiteKind::Cpuid => Exit::Cpuid {
                leaf: registers.rax() as u32,
                subleaf: registers.rcx() as u32,
            },
            SiteKind::WriteCr4 { source } => Exit::WriteCr4 {
                value: general(&registers.0, source),
            },
            SiteKind::ReadCr4 { .. } => Exit::ReadCr4,
            SiteKind::WriteDr { number, source } => Exit::WriteDr {
                number,
                value: general(&registers.0, source),
            },
            SiteKind::Pause => Exit::Pause,
            SiteKind::Module { target, returns } => self.module_exit(here, target, returns),
            // RSI is the second argument (System V ABI, AMD64 supplement, 3.2.3).
            SiteKind::Panic { .. } => Exit::Panic {
                message: registers.0[4],
            },
        };
        self.vcpu.traps.here = Some(here);
        Some(exit)
    }

    /// The trap at which the guest wrote to `port`.
    fn trap_here(&mut self, port: u8) -> Option<Here> {
        let rip = self.rip();
        let known = self.vm.text.sites.at(rip, port);
        let known = known.map(|(address, trap)| Here {
            address,
            kind: trap.kind,
            length: trap.length,
        });
        if known.is_some() && rip >= KERNEL_HALF {
            return known;
        }
        // User code that was given the ports (iopl) talks to the board like any other.
        let sregs = self.sregs().ok()?;
        if sregs.ss.dpl != 0 || known.is_some() {
            return known.filter(|_| sregs.ss.dpl == 0);
        }
        // A copy, such as a kprobe's.
        let view = self.view().ok()?;
        let is_trap = |&at: &u64| {
            let mut bytes = [0; SHORTEST];
            !self.vm.text.sites.is_own_out(at)
                && view.read(segments::linear(&sregs.cs, at), &mut bytes) == SHORTEST
                && bytes == [OUT, port]
        };
        let address = candidates(rip).find(is_trap)?;
        let Some(kind) = SiteKind::of_port(port) else {
            // What it was to do only its place would say.
            if !self.vm.text.rewritten.is_empty() {
                self.vm.noticed.add(LeftOpen::Copied);
            }
            return None;
        };
        Some(Here {
            address,
            kind,
            length: SHORTEST as u8,
        })
    }

    /// The instruction of this exit's trap is done, but for what its end brings about.
    pub(super) fn end_trap(&mut self) -> Result<(), KvmError> {
        let Some(here) = self.vcpu.traps.here.take() else {
            return Ok(());
        };
        let stepped = self.page().registers().rflags() & RFLAGS_TF != 0;
        if !stepped {
            // KVM moves RIP past the OUT, and NOPs follow to the end.
            return Ok(());
        }
        let at_trap = candidates(self.rip()).any(|at| at == here.address);
        if at_trap {
            self.return_to(here.end())?;
        }
        self.raise_step()
    }

    /// The instruction of this exit's trap is not done, and will not be.
    pub(super) fn forget_trap(&mut self) {
        self.vcpu.traps.here = None;
    }

    /// Has the guest go on at `rip`, with nothing of this exit left to do.
    pub(super) fn return_to(&mut self, rip: u64) -> Result<(), KvmError> {
        self.finish_exit()?;
        self.page()
            .change_registers(|registers| registers.rip = rip);
        Ok(())
    }

    /// Performs a write of CR4, with TSD kept set, and looks after the #GP entry.
    pub(super) fn write_cr4(&mut self, here: Here, value: u64) -> Result<(), KvmError> {
        let mut sregs = self.sregs()?;
        sregs.cr4 = value | CR4_TSD;
        match self.fd().set_sregs(&sregs) {
            Ok(()) => {
                self.vcpu.traps.memory.guest_cr4 = Some(value);
                self.hook_gp_entry(&sregs)?;
                self.hook_gates(&sregs)
            }
            // Reserved bits: the CPU answers such a write with #GP.
            Err(error) if error.errno() == libc::EINVAL => self.raise_gp(here.address),
            Err(error) => Err(error).named("KVM_SET_SREGS"),
        }
    }

    /// Performs a read of CR4: the guest sees what it wrote.
    pub(super) fn read_cr4(&mut self, target: u8) -> Result<(), KvmError> {
        let real = self.sregs()?.cr4;
        let value = self.vcpu.traps.memory.guest_cr4.unwrap_or(real);
        self.page()
            .change_registers(|registers| *general_mut(registers, target) = value);
        Ok(())
    }

    /// Answers a trap that concerns the CPU alone.
    pub(super) fn answer_cpu_trap(&mut self, value: u64) -> Result<(), KvmError> {
        let Some(here) = self.vcpu.traps.here else {
            return Ok(());
        };
        match here.kind {
            SiteKind::WriteCr4 { .. } => self.write_cr4(here, value),
            SiteKind::ReadCr4 { target } => self.read_cr4(target),
            SiteKind::WriteDr { number, .. } => self.write_dr(here, number, value),
            SiteKind::Panic { target } => self.make_call(here.address, target, true),
            _ => Ok(()),
        }
    }

    /// Rewrites the first instruction of the #GP entry, if the guest's IDT has a final one. Looks
    /// again at every CR4 write, since the kernel patches its own text until it has booted.
    fn hook_gp_entry(&mut self, sregs: &kvm_sregs) -> Result<(), KvmError> {
        let view = self.view()?;
        let gate = sregs.idt.base.wrapping_add(u64::from(GP_VECTOR) * 16);
        let Some([low, high]) = view.words(gate) else {
            return Ok(());
        };
        // Intel SDM vol. 3, 6.14.1: 64-bit interrupt gate.
        let present = low & 1 << 47 != 0;
        let entry = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        if !present || entry < KERNEL_HALF || self.vm.text.is_init(entry) {
            return Ok(());
        }
        let bytes = view.instruction_bytes(entry);
        if bytes.starts_with(&[OUT, TRAP_GP_ENTRY]) {
            return Ok(());
        }
        let (length, overwritten) = match *bytes.as_slice() {
            [0x0f, 0x01, 0xca, ..] => (3, Overwritten::Clac),
            [0x0f, 0x1f, 0x00, ..] | [0x90, 0x90, 0x90, ..] => (3, Overwritten::Nothing),
            [0xf3, 0x0f, 0x1e, 0xfa, ..] => (4, Overwritten::Nothing),
            _ => return Ok(()),
        };
        let trap = [OUT, TRAP_GP_ENTRY, 0x90, 0x90];
        if self.write_guest(entry, &trap[..length])? {
            self.vcpu.traps.memory.gp_entry = Some((entry, overwritten));
            self.counts.gp_entry = Some(entry);
        }
        Ok(())
    }

    /// The guest is at the rewritten #GP entry: was it a time read in user mode?
    fn gp_exit(&mut self) -> Exit {
        match self.user_time_read() {
            Some((instruction, frame)) => {
                self.vcpu.traps.user_read = Some(frame);
                Exit::TimeRead {
                    instruction,
                    mode: Mode::User,
                }
            }
            None => Exit::ProtectionFault,
        }
    }

    fn user_time_read(&mut self) -> Option<(TimeInstruction, UserFrame)> {
        if self
            .vcpu
            .traps
            .memory
            .guest_cr4
            .is_some_and(|cr4| cr4 & CR4_TSD != 0)
        {
            // The guest forbids it to its users itself, so this fault is one it wants to see.
            return None;
        }
        let rsp = self.page().registers().0[6];
        let mut sregs = self.sregs().ok()?;
        let view = self.view().ok()?;
        let [error, rip, cs, rflags, rsp, ss] = view.words(rsp)?;
        if error != 0 || cs & 3 != 3 {
            return None;
        }
        sregs.cs = segments::user_code(&view, &sregs, cs)?;
        sregs.ss = segments::user_stack(&view, &sregs, ss)?;
        let bits = segments::code_bits(&sregs.cs);
        let found = view.instruction(segments::linear(&sregs.cs, rip), bits)?;
        let instruction = match found.mnemonic() {
            Mnemonic::Rdtsc => TimeInstruction::Rdtsc,
            Mnemonic::Rdtscp => TimeInstruction::Rdtscp,
            _ => return None,
        };
        let next = rip.wrapping_add(found.len() as u64);
        if bits != 64 && next.wrapping_sub(1) > sregs.cs.limit.into() {
            // It reaches past the segment's end: a fault of the program's.
            return None;
        }
        let frame = UserFrame {
            sregs,
            rip: match bits {
                64 => next,
                32 => next & 0xffff_ffff,
                _ => next & 0xffff,
            },
            rflags: rflags & !RFLAGS_RF,
            rsp,
        };
        Some((instruction, frame))
    }

    /// Returns from the #GP entry to the instruction after the time read, if it was one in user mode; a read through
    /// a trap port has nothing to return from.
    pub(super) fn finish_user_read(&mut self) -> Result<(), KvmError> {
        let Some(frame) = self.vcpu.traps.user_read.take() else {
            return Ok(());
        };
        self.fd().set_sregs(&frame.sregs).named("KVM_SET_SREGS")?;
        self.page().change_registers(|registers| {
            registers.rip = frame.rip;
            registers.rsp = frame.rsp;
            registers.rflags = frame.rflags;
        });
        if frame.rflags & RFLAGS_TF != 0 {
            self.raise_step()?;
        }
        Ok(())
    }

    /// Does what the overwritten first instruction of the #GP entry did.
    pub(super) fn finish_fault(&mut self) {
        if let Some((_, Overwritten::Clac)) = self.vcpu.traps.memory.gp_entry {
            self.page()
                .change_registers(|registers| registers.rflags &= !RFLAGS_AC);
        }
    }

    /// Raises #GP(0) for the instruction at `rip`, as the CPU does where it refuses one.
    pub(super) fn raise_gp(&mut self, rip: u64) -> Result<(), KvmError> {
        self.forget_trap();
        self.return_to(rip)?;
        self.page()
            .change_registers(|registers| registers.rflags |= RFLAGS_RF);
        self.inject(GP_VECTOR, Some(0))
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
