//! Stops in guest memory: HLT in the place of a byte, only while the guest runs.
//!
//! They are for what debug registers have no room for, and for hosts whose guests have none. The bytes are put in right
//! before the vCPU is entered and taken out as it comes back, so nobody else ever sees them: not a device, a digest, a
//! checkpoint or a debugger, and not what decodes the guest's instructions. They are not in the log of changed pages either:
//! nothing has changed.
//!
//! **HLT**, because each KVM exits with it, it has one byte, and no kernel writes one into its text. INT3 kernels do write
//! and execute themselves. In ring 0 it exits before anything happens but that RIP is moved on, which is taken back.
//!
//! **A program** may not execute HLT: it gets #GP. So while there are stops in pages that programs may use, there is one at
//! the kernel's entry for #GP as well. What the exception pushes must leave no trace. So meanwhile its gate leads to a stack
//! of another gate, that of machine checks, which never come, and what was there is put back. If it was the guest's own
//! #GP, the frame is moved to where the CPU would have pushed it.
//!
//! **Where a program's addresses are** changes only while its kernel runs. So while there are stops at addresses of
//! programs there is one at each instruction that returns to programs, too: those that follow the entry of system calls.
//! From there the guest is brought to the program's first instruction, where the stops' pages are looked up again.
//!
//! **The guest's own write wins**: a byte that is not HLT any more stays as it is.

use std::collections::BTreeMap;

use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use kvm_bindings::{KVM_EXIT_HLT, kvm_sregs};

use super::cpu::KvmCpu;
use super::error::{KvmError, Named};
use super::guest_text::GuestView;
use super::msr::LSTAR;
use super::page_walk::{Page, Paging};
use super::preemption::RFLAGS_RF;
use super::segments;

/// The byte.
const HLT: u8 = 0xf4;
/// Addresses from here on are the kernel's.
pub(super) const KERNEL_HALF: u64 = 1 << 63;
/// #GP.
const PROTECTION: u64 = 13;
/// NMI, #DF and #MC have stacks of their own. The first that may be used: machine checks and NMIs never come.
const STACK_OWNERS: [u64; 3] = [18, 2, 8];
/// Bytes of a gate (Intel SDM vol. 3, 6.14.1).
const GATE_BYTES: u64 = 16;
/// The byte of a gate that has the number of its stack, and the bits of that.
const GATE_IST: (u64, u8) = (4, 7);
/// Where a TSS has the stacks of ring 0 and of gates (Intel SDM vol. 3, 8.7).
const TSS_RSP0: u64 = 4;
const TSS_IST1: u64 = 36;
/// Words that #GP pushes: error code, RIP, CS, RFLAGS, RSP, SS.
const FRAME_WORDS: usize = 6;
const FRAME_BYTES: u64 = 8 * FRAME_WORDS as u64;
/// So much of the kernel's code is looked through for returns to programs, from the entry of system calls on. All of
/// Linux's entries follow it.
const ENTRY_TEXT_BYTES: usize = 24 << 10;

/// A stop in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    gpa: u64,
    for_programs: bool,
}

/// Stops in memory, as the guest is to run on with them.
#[derive(Clone, Debug, Default)]
pub(super) struct InMemory {
    places: Vec<Place>,
    /// If some are for programs.
    diversion: Option<Diversion>,
    /// Guest-physical address of the present instruction.
    here: Option<u64>,
}

impl InMemory {
    /// Whether one of them is at the present instruction, under whatever address.
    pub(super) fn are_here(&self) -> bool {
        self.places.iter().any(|place| Some(place.gpa) == self.here)
    }

    /// The present instruction is to be executed.
    pub(super) fn leave_out_here(&mut self) {
        let here = self.here;
        self.places.retain(|place| Some(place.gpa) != here);
        if self
            .diversion
            .as_ref()
            .is_some_and(|diversion| Some(diversion.entry.gpa) == here)
        {
            // Meanwhile no program is stopped.
            self.diversion = None;
            self.places.retain(|place| !place.for_programs);
        }
    }
}

/// How #GP is diverted.
#[derive(Clone, Debug)]
struct Diversion {
    /// The kernel's entry.
    entry: Place,
    /// The byte of the gate that is changed, and to what; `None` if the gate has a stack of its own.
    gate: Option<(u64, u8)>,
    /// Where RSP is at the entry.
    rsp: u64,
    /// Where the frame is.
    frame: [u64; FRAME_WORDS],
}

/// The kernel's entries as they were looked through last.
#[derive(Clone, Debug, Default)]
struct EntryText {
    address: u64,
    bytes: Vec<u8>,
    returns: Vec<u64>,
}

/// What is known of stops in memory.
#[derive(Clone, Debug, Default)]
pub(super) struct Inserted {
    text: EntryText,
    counts: StopCounts,
}

/// Where a debugger's stops are, as the guest ran on last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StopCounts {
    /// In debug registers.
    pub in_registers: usize,
    /// In memory.
    pub in_memory: usize,
    /// Nowhere: at addresses that are not mapped, or that a program cannot be stopped at.
    pub nowhere: usize,
    /// How many bytes in memory the guest has written over, since it was begun.
    pub written_over: u64,
}

/// How the vCPU came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entered {
    /// With KVM's exit reason, or `None` if the host interrupted it.
    Exit(Option<u32>),
    /// At a stop in memory.
    AtStop,
}

impl KvmCpu {
    /// Where the guest's stops are from now on.
    pub fn stop_counts(&self) -> StopCounts {
        self.inserted.counts
    }

    /// Which of these addresses have a debug register, and which are to be in memory.
    pub(super) fn divide(&mut self, wanted: &[u64]) -> (Vec<u64>, Vec<u64>) {
        let watched = self.debugger.watchpoints().len();
        let room = self.free_debug_registers().saturating_sub(watched);
        let (registers, memory) = wanted.split_at(room.min(wanted.len()));
        self.inserted.counts.in_registers = registers.len() + watched;
        (registers.to_vec(), memory.to_vec())
    }

    /// Stops in memory at these addresses, those that are mapped.
    pub(super) fn in_memory(&mut self, addresses: &[u64]) -> Result<InMemory, KvmError> {
        (self.inserted.counts.nowhere, self.inserted.counts.in_memory) = (0, 0);
        if addresses.is_empty() {
            return Ok(InMemory::default());
        }
        let mut wanted = addresses.to_vec();
        if addresses.iter().any(|address| *address < KERNEL_HALF) {
            wanted.extend(self.returns_to_programs()?);
        }
        wanted.sort_unstable();
        wanted.dedup();
        let rip = self.rip();
        let sregs = self.sregs()?;
        let paging = Paging::new(&sregs);
        let (mut places, mut page) = (Vec::new(), None);
        let here = self.place(paging, rip, &mut page);
        places
            .extend((wanted.iter()).filter_map(|address| self.place(paging, *address, &mut page)));
        let mut nowhere = wanted.len() - places.len();
        let for_programs = places.iter().any(|place| place.for_programs);
        let diversion = match for_programs {
            true => self.diversion(&sregs),
            false => None,
        };
        match &diversion {
            Some(diversion) => places.push(diversion.entry),
            // A program would take the fault itself.
            None if sregs.ss.dpl == 3 => {
                places.retain(|place| !place.for_programs);
                nowhere = wanted.len() - places.len();
            }
            None => {}
        }
        (self.inserted.counts.nowhere, self.inserted.counts.in_memory) = (nowhere, places.len());
        Ok(InMemory {
            places,
            diversion,
            here: here.map(|place| place.gpa),
        })
    }

    /// Where one is; `page` is that of the last one.
    fn place(&self, paging: Paging, address: u64, page: &mut Option<Page>) -> Option<Place> {
        let memory = &self.vm.memory;
        let read = |gpa: u64, buffer: &mut [u8]| memory.read(gpa, buffer);
        if page.is_none_or(|page| page.translate(address).is_none()) {
            *page = paging.page(address, &read);
            if page.is_none() && address >= KERNEL_HALF {
                // A program's page tables lack most of the kernel, where the two are isolated.
                *page = paging.of_kernel().page(address, &read);
            }
        }
        let found = (*page)?;
        let gpa = found.translate(address)?;
        memory.is_ram(gpa, 1).then_some(Place {
            gpa,
            for_programs: found.for_programs,
        })
    }

    /// Enters the guest once, with these stops.
    pub(super) fn enter_with(&mut self, stops: &InMemory) -> Result<Entered, KvmError> {
        let InMemory {
            places, diversion, ..
        } = stops;
        if places.is_empty() {
            return Ok(Entered::Exit(self.enter()?));
        }
        let memory = &self.vm.memory;
        let mut taken = BTreeMap::new();
        for place in places {
            if !taken.contains_key(&place.gpa)
                && let Some(byte) = memory.exchange(place.gpa, HLT)
            {
                taken.insert(place.gpa, byte);
            }
        }
        let kept = diversion.as_ref().map(|diversion| {
            if let Some((gpa, byte)) = diversion.gate {
                taken.insert(gpa, memory.exchange(gpa, byte).unwrap_or(byte));
            }
            diversion.frame.map(|gpa| self.word(gpa))
        });
        let entered = self.enter();

        // Whatever came of it, they are taken out.
        let mut frame = [0; FRAME_WORDS];
        if let (Some(diversion), Some(kept)) = (diversion, kept) {
            if let Some((gpa, byte)) = diversion.gate {
                self.take_out(gpa, byte, taken.remove(&gpa).unwrap_or(byte));
            }
            for ((word, gpa), kept) in frame.iter_mut().zip(diversion.frame).zip(kept) {
                *word = self.word(gpa);
                for (at, byte) in (gpa..).zip(kept.to_le_bytes()) {
                    self.vm.memory.exchange(at, byte);
                }
            }
        }
        for (gpa, byte) in &taken {
            self.take_out(*gpa, HLT, *byte);
        }
        let reason = entered?;
        let is_stop = reason == Some(KVM_EXIT_HLT) && self.is_stop(&taken)?;
        // A kick or a breakpoint in a register may come first.
        let is_program_stop = match diversion {
            Some(diversion) => self.sort_protection_fault(diversion, frame, &taken)?,
            None => false,
        };
        match is_stop || is_program_stop && reason.is_some() {
            true => Ok(Entered::AtStop),
            false => Ok(Entered::Exit(reason)),
        }
    }

    fn word(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.vm.memory.read(gpa, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Puts a byte back, if what was put there is there still.
    fn take_out(&mut self, gpa: u64, put: u8, byte: u8) {
        let found = self.vm.memory.exchange(gpa, byte);
        if let Some(found) = found
            && found != put
        {
            self.vm.memory.exchange(gpa, found);
            self.inserted.counts.written_over += 1;
        }
    }

    /// KVM came back with an HLT: whether it was one of ours. Then the guest is before it again.
    fn is_stop(&mut self, taken: &BTreeMap<u64, u8>) -> Result<bool, KvmError> {
        let at = self.rip().wrapping_sub(1);
        let gpa = self.view()?.translate(at);
        let is_stop = gpa.is_some_and(|gpa| taken.contains_key(&gpa));
        if is_stop {
            self.put_at(|registers| registers.rip = at)?;
        }
        Ok(is_stop)
    }

    /// Changes the registers and has KVM take them. With that it drops the #DB of a guest that single-steps, which it has
    /// raised for the HLT.
    pub(super) fn put_at(
        &mut self,
        change: impl FnOnce(&mut kvm_bindings::kvm_regs),
    ) -> Result<(), KvmError> {
        self.page().change_registers(change);
        self.vcpu.unfinished = true;
        self.finish_exit()
    }

    /// How #GP can be diverted, if it can.
    fn diversion(&self, sregs: &kvm_sregs) -> Option<Diversion> {
        let view = GuestView {
            paging: Paging::new(sregs),
            memory: &self.vm.memory,
        };
        let gate_at = |vector: u64| sregs.idt.base.wrapping_add(vector * GATE_BYTES);
        let gate = |vector: u64| {
            let inside = vector * GATE_BYTES + GATE_BYTES <= u64::from(sregs.idt.limit) + 1;
            let words = inside.then(|| view.words(gate_at(vector))).flatten();
            words.filter(|[low, _]: &[u64; 2]| low & 1 << 47 != 0)
        };
        let stack_of = |low: u64| (low >> 32) as u8 & GATE_IST.1;
        let [low, high] = gate(PROTECTION)?;
        let address = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        let own = stack_of(low);
        let mut stacks = STACK_OWNERS.into_iter().filter_map(gate);
        let stack = match own {
            0 => stacks.find_map(|[low, _]| Some(stack_of(low)).filter(|stack| *stack != 0))?,
            own => own,
        };
        let tss = sregs.tr.base.wrapping_add(TSS_IST1 - 8);
        let [top] = view.words(tss.wrapping_add(8 * u64::from(stack)))?;
        let rsp = (top & !15).checked_sub(FRAME_BYTES)?;
        let mut frame = [0; FRAME_WORDS];
        for (at, gpa) in (rsp..).step_by(8).zip(&mut frame) {
            // A stack is aligned, so no word of it lies across pages.
            *gpa = view
                .translate(at)
                .filter(|gpa| view.memory.is_ram(*gpa, 8))?;
        }
        let byte = view.translate(gate_at(PROTECTION).wrapping_add(GATE_IST.0))?;
        let changed = (low >> 32) as u8 & !GATE_IST.1 | stack;
        Some(Diversion {
            entry: self.place(view.paging, address, &mut None)?,
            gate: (own == 0).then_some((byte, changed)),
            rsp,
            frame,
        })
    }

    /// If the guest is at the kernel's entry for #GP, and has just come there by the exception: a program that came to a
    /// stop of ours is put back before it, and that is told; a frame of the guest's own is moved to where it belongs.
    fn sort_protection_fault(
        &mut self,
        diversion: &Diversion,
        frame: [u64; FRAME_WORDS],
        taken: &BTreeMap<u64, u8>,
    ) -> Result<bool, KvmError> {
        let at = self.rip();
        if self.page().registers().0[6] != diversion.rsp {
            return Ok(false);
        }
        let here = self.view()?.translate(at);
        let [error, rip, cs, rflags, rsp, ss] = frame;
        if here != Some(diversion.entry.gpa) {
            return Ok(false);
        }
        let mut sregs = self.sregs()?;
        if error == 0 && cs & 3 == 3 {
            let view = self.view()?;
            let code = segments::user_code(&view, &sregs, cs);
            let stack = segments::user_stack(&view, &sregs, ss);
            if let (Some(code), Some(stack)) = (code, stack)
                && let Some(gpa) = view.translate(segments::linear(&code, rip))
                && taken.contains_key(&gpa)
            {
                (sregs.cs, sregs.ss) = (code, stack);
                self.fd().set_sregs(&sregs).named("KVM_SET_SREGS")?;
                self.put_at(|registers| {
                    (registers.rip, registers.rsp) = (rip, rsp);
                    // The fault has set it.
                    registers.rflags = rflags & !RFLAGS_RF;
                })?;
                return Ok(true);
            }
        }
        if diversion.gate.is_none() {
            // It belongs where it was.
            self.write_frame(diversion.rsp, frame)?;
            return Ok(false);
        }
        let top = match cs & 3 {
            0 => Some(rsp),
            _ => {
                let at = sregs.tr.base.wrapping_add(TSS_RSP0);
                self.view()?.words(at).map(|[rsp]| rsp)
            }
        };
        // Intel SDM vol. 3, 6.14.2: whatever stack it is, it is aligned.
        let at = top.map(|top| (top & !15).wrapping_sub(FRAME_BYTES));
        match at {
            Some(at) if self.write_frame(at, frame)? => {
                self.page().change_registers(|registers| registers.rsp = at);
                Ok(false)
            }
            _ => Err(KvmError::Stopped {
                rip,
                bytes: self.view()?.instruction_bytes(rip),
                what: "its protection fault has no stack, and breakpoints in memory hide that; delete them".into(),
            }),
        }
    }

    fn write_frame(&mut self, at: u64, frame: [u64; FRAME_WORDS]) -> Result<bool, KvmError> {
        self.write_guest(at, frame.map(u64::to_le_bytes).as_flattened())
    }

    /// The instructions with which the kernel returns to programs.
    fn returns_to_programs(&mut self) -> Result<Vec<u64>, KvmError> {
        let entry = match self.vm.entries.system_call() {
            Some(entry) => entry,
            None => self.msr(LSTAR)?,
        };
        if entry == 0 {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; ENTRY_TEXT_BYTES];
        let got = self.view()?.read(entry, &mut bytes);
        bytes.truncate(got);
        let text = &mut self.inserted.text;
        // With isolated page tables a program's may lack it.
        if !bytes.is_empty() && (text.address, &text.bytes) != (entry, &bytes) {
            *text = EntryText {
                address: entry,
                returns: returns_in(&bytes, entry),
                bytes,
            };
        }
        Ok(text.returns.clone())
    }
}

/// Where the instructions are that return to programs, in code that begins at `address`.
fn returns_in(bytes: &[u8], address: u64) -> Vec<u64> {
    let decoder = Decoder::with_ip(64, bytes, address, DecoderOptions::NONE);
    let returns = decoder.into_iter().filter(|instruction| {
        matches!(
            instruction.mnemonic(),
            Mnemonic::Sysret
                | Mnemonic::Sysretq
                | Mnemonic::Sysexit
                | Mnemonic::Sysexitq
                | Mnemonic::Iretd
                | Mnemonic::Iretq
        )
    });
    returns.map(|instruction| instruction.ip()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn returns_to_programs_are_found_among_other_code() {
        // swapgs; sysretq; int3; mov eax, 0xcf48; iretq; sysretl.
        let code = [
            0x0f, 0x01, 0xf8, 0x48, 0x0f, 0x07, 0xcc, 0xb8, 0x48, 0xcf, 0, 0, 0x48, 0xcf, 0x0f,
            0x07,
        ];
        assert_eq!(returns_in(&code, 0x1000), [0x1003, 0x100c, 0x100e]);
    }
}
