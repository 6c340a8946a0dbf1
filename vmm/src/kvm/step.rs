//! Where one instruction of the guest's may lead.
//!
//! It is decoded; what it would load is read where it would read it: a return address from the stack, a target from
//! memory, the kernel's entries from MSRs and from the IDT. Faults lead to gates of the IDT: those that the instruction may
//! take. One that takes another is stepped over as if it were a call: the step ends where the instruction has been executed
//! after all.

use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind, Register};
use kvm_bindings::{Msrs, kvm_msr_entry};

use super::cpu::KvmCpu;
use super::error::{KvmError, Named};
use super::msr::{LSTAR, SYSENTER};

/// #DE, #UD, #NM, #GP, #PF.
const DIVIDE: u8 = 0;
const BREAKPOINT: u8 = 3;
const OVERFLOW: u8 = 4;
const INVALID: u8 = 6;
const NO_FPU: u8 = 7;
const PROTECTION: u8 = 13;
const PAGE_FAULT: u8 = 14;
const ICEBP: u8 = 1;
/// The bytes of a gate in long mode (Intel SDM vol. 3, 6.14.1).
const GATE_BYTES: u64 = 16;

impl KvmCpu {
    /// Where a gate of the IDT leads; `None` if there is none.
    fn gate(&self, vector: u8) -> Result<Option<u64>, KvmError> {
        let sregs = self.sregs()?;
        let gate = sregs.idt.base.wrapping_add(u64::from(vector) * GATE_BYTES);
        let words = self.view()?.words(gate);
        Ok(words
            .filter(|[low, _]| low & 1 << 47 != 0)
            .map(|[low, high]| low & 0xffff | low >> 32 & 0xffff_0000 | high << 32))
    }

    /// Where the exception or the interrupt leads that the vCPU has to take before its next instruction, if it has.
    pub(super) fn entry_under_way(&self) -> Result<Option<u64>, KvmError> {
        let events = self.fd().get_vcpu_events().named("KVM_GET_VCPU_EVENTS")?;
        let vector = if events.exception.injected | events.exception.pending != 0 {
            events.exception.nr
        } else if events.interrupt.injected != 0 {
            events.interrupt.nr
        } else {
            return Ok(None);
        };
        // Without a gate it faults on its way, which is nowhere either.
        Ok(Some(self.gate(vector)?.unwrap_or(0)))
    }

    /// Where the vCPU may be after its present instruction, or before its next if something comes before that. The
    /// likeliest come first.
    pub(super) fn step_targets(&mut self) -> Result<Vec<u64>, KvmError> {
        if let Some(entry) = self.entry_under_way()? {
            return Ok(vec![entry]);
        }
        let rip = self.rip();
        let bitness = self.bitness(rip)?;
        let instruction = self.view()?.instruction(rip, bitness);
        if self.vcpu.parts.are_left() {
            // It is over when they are, and then the vCPU has exited.
            return Ok(Vec::new());
        }
        let Some(instruction) = instruction else {
            // It is not there, or is none.
            let faults = [PAGE_FAULT, INVALID, PROTECTION];
            return self.gates(&faults);
        };
        let mut targets = self.successors(&instruction)?;
        targets.extend(self.gates(&faults(&instruction))?);
        let mut seen = Vec::new();
        targets.retain(|target| {
            let is_new = !seen.contains(target);
            seen.push(*target);
            is_new
        });
        Ok(targets)
    }

    fn gates(&self, vectors: &[u8]) -> Result<Vec<u64>, KvmError> {
        let mut entries = Vec::new();
        for vector in vectors {
            entries.extend(self.gate(*vector)?);
        }
        Ok(entries)
    }

    /// Where it leads if it does not fault.
    fn successors(&mut self, instruction: &Instruction) -> Result<Vec<u64>, KvmError> {
        let next = instruction.next_ip();
        let stack = self.page().registers().0[6];
        let word = |cpu: &KvmCpu, at: u64| -> Result<Option<u64>, KvmError> {
            Ok(cpu.view()?.words::<1>(at).map(|[word]| word))
        };
        let narrow = |word: u64| match loads_32_bits(instruction) {
            true => word & u64::from(u32::MAX),
            false => word,
        };
        Ok(match instruction.mnemonic() {
            Mnemonic::Syscall => vec![self.msr(LSTAR)?],
            Mnemonic::Sysret | Mnemonic::Sysretq => vec![self.page().registers().rcx()],
            Mnemonic::Sysexit | Mnemonic::Sysexitq => vec![self.page().registers().0[3]],
            Mnemonic::Sysenter => vec![self.msr(*SYSENTER.end())?],
            Mnemonic::Int => self.gates(&[instruction.immediate8()])?,
            Mnemonic::Int3 => self.gates(&[BREAKPOINT])?,
            Mnemonic::Int1 => self.gates(&[ICEBP])?,
            Mnemonic::Into => [self.gates(&[OVERFLOW])?, vec![next]].concat(),
            Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq | Mnemonic::Ret | Mnemonic::Retf => {
                word(self, stack)?.map(narrow).into_iter().collect()
            }
            _ => match instruction.flow_control() {
                FlowControl::UnconditionalBranch | FlowControl::Call
                    if instruction.near_branch_target() != 0 =>
                {
                    vec![instruction.near_branch_target()]
                }
                FlowControl::ConditionalBranch | FlowControl::XbeginXabortXend => {
                    vec![instruction.near_branch_target(), next]
                }
                FlowControl::IndirectBranch | FlowControl::IndirectCall => {
                    self.operand(instruction)?.into_iter().collect()
                }
                // However often a string instruction is repeated, RIP is at it until it is done.
                _ => vec![next],
            },
        })
    }

    /// An MSR that KVM keeps for the guest.
    pub(super) fn msr(&self, index: u32) -> Result<u64, KvmError> {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).expect("it is one");
        let count = self.fd().get_msrs(&mut msrs).named("KVM_GET_MSRS")?;
        match msrs.as_slice() {
            [msr] if count == 1 => Ok(msr.data),
            _ => Err(KvmError::Lacks("an MSR that it keeps for guests")),
        }
    }

    /// Where an indirect branch leads.
    fn operand(&mut self, instruction: &Instruction) -> Result<Option<u64>, KvmError> {
        let registers = self.page().registers();
        let sregs = self.sregs()?;
        let value = |register: Register, _: usize, _: usize| match register {
            Register::FS => Some(sregs.fs.base),
            Register::GS => Some(sregs.gs.base),
            register if register.is_segment_register() => Some(0),
            register => {
                let full = match register.full_register() {
                    Register::RIP => instruction.next_ip(),
                    full if full.is_gpr64() => registers.0[PLACE[full.number()]],
                    _ => return None,
                };
                Some(match register.size() {
                    4 => full & u64::from(u32::MAX),
                    _ => full,
                })
            }
        };
        Ok(match instruction.op0_kind() {
            OpKind::Register => value(instruction.op0_register(), 0, 0),
            OpKind::Memory => match instruction.virtual_address(0, 0, value) {
                Some(at) => self.view()?.words::<1>(at).map(|[word]| word),
                None => None,
            },
            _ => None,
        })
    }
}

/// Where the registers of an instruction are in [`hindsight_replay::Registers`].
const PLACE: [usize; 16] = [0, 2, 3, 1, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15];

/// Whether what a return or a branch loads has 32 bits.
fn loads_32_bits(instruction: &Instruction) -> bool {
    matches!(
        instruction.code(),
        Code::Iretd | Code::Retnd | Code::Retnd_imm16 | Code::Retfd | Code::Retfd_imm16
    )
}

/// The faults that an instruction may take, likeliest first.
fn faults(instruction: &Instruction) -> Vec<u8> {
    let mut faults = Vec::new();
    match instruction.mnemonic() {
        Mnemonic::Div | Mnemonic::Idiv => faults.push(DIVIDE),
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => faults.push(INVALID),
        _ => {}
    }
    let is_memory = |operand| instruction.op_kind(operand) == OpKind::Memory;
    let touches = (0..instruction.op_count()).any(is_memory)
        || instruction.is_stack_instruction()
        || instruction.is_string_instruction();
    if touches {
        faults.push(PAGE_FAULT);
    }
    if instruction.is_privileged() || touches {
        faults.push(PROTECTION);
    }
    let names_vectors = instruction.op_count() > 0
        && (0..instruction.op_count())
            .any(|operand| instruction.op_register(operand).is_vector_register());
    if names_vectors || instruction.mnemonic() == Mnemonic::Emms {
        faults.push(NO_FPU);
    }
    faults
}
