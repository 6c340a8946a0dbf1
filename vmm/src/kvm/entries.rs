//! Kernel entries as moments: the guest counts them itself, and stops at the one we name.
//!
//! Without a performance counter there is no telling how far a guest has come between two exits.
//! But its system calls and faults all lead through a few entry points of its kernel, and those can be
//! counted: each gets a stub (see `entry_stub.rs`) that decrements one word in guest memory and
//! exits when it comes to zero. So an entry costs a few instructions and no exit, and entry number
//! n after a counted exit is a place where the guest can be stopped, in a recording and in its replay.
//! A guest that computes without entering its kernel has no such places.
//!
//! What is hooked, and when, follows from what the guest does at counted exits: LSTAR and CSTAR when
//! it writes them, the gates of its IDT at its writes of CR4. The word is zero at every counted exit, so
//! memory there says nothing of who waited for what.
//!
//! Left alone: NMI, #DB, #DF and #MC, which may come inside any other entry; #GP, which is an exit
//! already; and SYSENTER, since a single-stepped one would raise #DB in the stub, where
//! Linux does not expect it.

use kvm_bindings::kvm_sregs;

use super::cpu::KvmCpu;
use super::entry_stub::{NO_STUB, OUT_OFFSET, STUB_BYTES, STUBS, stub};
use super::error::KvmError;
use super::memory::GuestMemory;
use super::msr::{self, CSTAR, LSTAR};
use crate::boot::GuestRam;
use hindsight_kernel::EntryCaves;
use hindsight_kernel::rewrite::traps::TRAP_ENTRY;

/// The exceptions that are counted, and Linux's 32-bit system call: one stub for each, in this order.
const VECTORS: [u8; 14] = [0, 3, 4, 5, 6, 7, 10, 11, 12, PAGE_FAULT, 16, 17, 19, 0x80];
const PAGE_FAULT: u8 = 14;
const PAGE_FAULT_STUB: usize = 9;
const LSTAR_STUB: usize = VECTORS.len();
const CSTAR_STUB: usize = VECTORS.len() + 1;
/// Bytes of a gate (Intel SDM vol. 3, 6.14.1).
const GATE_BYTES: usize = 16;

const _: () = {
    assert!(VECTORS[PAGE_FAULT_STUB] == PAGE_FAULT);
    assert!(CSTAR_STUB < STUBS);
};

/// A stop at a kernel entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EntryStop {
    /// Its number, counted from the last counted exit; the first is 1.
    pub number: u64,
    /// Address of the stub's OUT: which entry it is.
    pub rip: u64,
}

/// The kernel's own entry after each stub that is installed.
pub(super) type KernelEntries = [Option<u64>; STUBS];

/// What is known of the stubs in the guest.
#[derive(Clone, Debug, Default)]
pub(super) struct EntryState {
    caves: Option<EntryCaves>,
    kernel_entries: KernelEntries,
    /// The entry that is waited for, and that the word counts down to.
    target: Option<u64>,
}

impl EntryState {
    /// Without any stub yet.
    pub(super) fn new(caves: Option<EntryCaves>) -> EntryState {
        EntryState {
            caves,
            ..EntryState::default()
        }
    }

    /// The kernel's own entries.
    pub(super) fn kernel_entries(&self) -> KernelEntries {
        self.kernel_entries
    }

    /// The kernel's own entry for system calls, if a stub is in front of it.
    pub(super) fn system_call(&self) -> Option<u64> {
        self.kernel_entries[LSTAR_STUB]
    }

    /// How many stubs are installed.
    pub(super) fn count(&self) -> u32 {
        self.kernel_entries.iter().flatten().count() as u32
    }

    /// Takes these as installed in guest memory, with nothing waited for. `false`, and nothing is changed, if there is
    /// no room for stubs in this kernel.
    pub(super) fn put_kernel_entries(&mut self, entries: &KernelEntries) -> bool {
        let fits = self.caves.is_some() || entries.iter().all(Option::is_none);
        if fits {
            (self.kernel_entries, self.target) = (*entries, None);
        }
        fits
    }

    /// Which stub has its OUT at this address.
    fn stub_at(&self, out: u64) -> Option<usize> {
        let offset = out.checked_sub(self.caves?.stubs.address + OUT_OFFSET)?;
        let index = usize::try_from(offset / STUB_BYTES).ok()?;
        let is_installed =
            offset.is_multiple_of(STUB_BYTES) && self.kernel_entries.get(index)?.is_some();
        is_installed.then_some(index)
    }
}

/// The counter of kernel entries.
#[derive(Debug)]
pub struct EntryCounter<'a> {
    memory: &'a mut GuestMemory,
    state: &'a mut EntryState,
}

impl EntryCounter<'_> {
    /// Whether the ways from a program into the kernel are counted: system calls and page faults.
    /// They are not before the kernel has set them up, nor in a kernel without room for stubs. A
    /// function of what the guest did at counted exits.
    pub fn available(&self) -> bool {
        let is_installed = |stub: usize| self.state.kernel_entries[stub].is_some();
        is_installed(LSTAR_STUB) && is_installed(PAGE_FAULT_STUB)
    }

    /// Entries since the last counted exit.
    pub fn done(&self) -> u64 {
        self.state.target.unwrap_or(0).wrapping_sub(self.word())
    }

    /// Stops the guest at entry number `at`, counted from the last counted exit. A guest that has just reached
    /// an earlier target still stops there. One that has been already, by the word, is not waited for: the word is in
    /// the guest's memory, and a guest that writes there itself has no such places until its next exit.
    pub fn set_target(&mut self, at: u64) {
        assert!(self.available(), "no entry is counted");
        let done = self.done();
        if self.state.target == Some(done) {
            return;
        }
        if let Some(left @ 1..) = at.checked_sub(done) {
            self.state.target = Some(at);
            self.set_word(left);
        }
    }

    /// A counted exit has happened: counts from zero, and waits for nothing. Must come before
    /// anybody looks at memory.
    pub fn turn(&mut self) {
        self.state.target = None;
        if self.state.kernel_entries.iter().any(Option::is_some) {
            self.set_word(0);
        }
    }

    /// Whether a stop is still to come.
    pub fn is_waited_for(&self) -> bool {
        self.state.target.is_some()
    }

    fn word(&self) -> u64 {
        let mut bytes = [0; 8];
        match self.state.caves {
            Some(caves) if self.memory.read(caves.word.physical, &mut bytes) => {
                u64::from_le_bytes(bytes)
            }
            _ => 0,
        }
    }

    fn set_word(&mut self, word: u64) {
        let caves = self.state.caves.expect("a stub is installed");
        self.memory
            .write(caves.word.physical, &word.to_le_bytes())
            .expect("the stub was installed with this word");
    }
}

impl KvmCpu {
    /// The counter of kernel entries.
    pub fn entries(&mut self) -> EntryCounter<'_> {
        EntryCounter {
            memory: &mut self.vm.memory,
            state: &mut self.vm.entries,
        }
    }

    /// Whether the vCPU came back with the OUT of a stub, for a target that is reached. An OUT to that
    /// port from anywhere else is an ordinary one.
    pub(super) fn entry_stop(&mut self) -> Option<EntryStop> {
        let io = self.page().port()?;
        if io.read || io.port != u16::from(TRAP_ENTRY) {
            return None;
        }
        // RIP is at the OUT, or after it where it emulates.
        let rip = self.rip();
        let out = [rip, rip.wrapping_sub(2)]
            .into_iter()
            .find(|&at| self.vm.entries.stub_at(at).is_some())?;
        let number = self.vm.entries.target?;
        let reached = self.entries().done() == number;
        reached.then_some(EntryStop { number, rip: out })
    }

    /// The guest has written an MSR of the board's: those that say where SYSCALL enters are ours to load.
    pub(super) fn wrote_msr(&mut self, index: u32, value: u64) -> Result<(), KvmError> {
        if index == LSTAR {
            self.check_entry(value);
        }
        let stub = match index {
            LSTAR => LSTAR_STUB,
            CSTAR => CSTAR_STUB,
            index if msr::SYSENTER.contains(&index) => return msr::load(self.fd(), index, value),
            _ => return Ok(()),
        };
        let data = self.install(stub, value).unwrap_or(value);
        msr::load(self.fd(), index, data)
    }

    /// Puts stubs between the gates of the IDT and the entries they lead to, if those are final.
    pub(super) fn hook_gates(&mut self, sregs: &kvm_sregs) -> Result<(), KvmError> {
        if self.vm.entries.caves.is_none() {
            return Ok(());
        }
        let mut table = [0; (VECTORS[VECTORS.len() - 1] as usize + 1) * GATE_BYTES];
        let length = table.len().min(usize::from(sregs.idt.limit) + 1);
        let length = self.view()?.read(sregs.idt.base, &mut table[..length]);
        let (gates, _) = table[..length].as_chunks::<GATE_BYTES>();
        for (index, vector) in VECTORS.into_iter().enumerate() {
            let hooked = gates
                .get(usize::from(vector))
                .and_then(|gate| self.hooked(index, u128::from_le_bytes(*gate)));
            let offset = u64::from(vector) * GATE_BYTES as u64;
            if let Some(gate) = hooked {
                // A table need not be aligned: its gates may lie across pages.
                self.write_guest(sregs.idt.base.wrapping_add(offset), &gate.to_le_bytes())?;
            }
        }
        Ok(())
    }

    /// The gate with a stub before its entry; `None` if it is to stay as it is.
    fn hooked(&mut self, index: usize, gate: u128) -> Option<u128> {
        let entry = entry_of(gate).filter(|&entry| !self.vm.text.is_init(entry))?;
        Some(leading_to(gate, self.install(index, entry)?))
    }

    /// Writes the stub that counts and goes on at `entry`. Returns its address; `None` if it is
    /// there already, or cannot.
    fn install(&mut self, index: usize, entry: u64) -> Option<u64> {
        let caves = self.vm.entries.caves?;
        let offset = index as u64 * STUB_BYTES;
        let (at, gpa) = (caves.stubs.address + offset, caves.stubs.physical + offset);
        let before = self.vm.entries.kernel_entries[index].take();
        if entry == at {
            self.vm.entries.kernel_entries[index] = before;
            return None;
        }
        // Another kernel may have taken this one's place (kexec): then these addresses are no longer ours.
        let mut found = NO_STUB;
        let ours = self.vm.memory.read(gpa, &mut found)
            && (found == NO_STUB
                || before.is_some_and(|e| Some(found) == stub(at, caves.word.address, e)));
        let view = self.view().ok()?;
        let mapped = view.translate(at) == Some(gpa)
            && view.translate(caves.word.address) == Some(caves.word.physical);
        let bytes = stub(at, caves.word.address, entry)?;
        if !ours || !mapped || self.vm.memory.write(gpa, &bytes).is_err() {
            return None;
        }
        self.vm.entries.kernel_entries[index] = Some(entry);
        self.counts.entry_points = self.vm.entries.count();
        Some(at)
    }
}

/// The bits of a gate that say where it leads (Intel SDM vol. 3, 6.14.1).
const GATE_OFFSET: u128 = 0xffff_ffff_ffff << 48 | 0xffff;

/// Where a gate leads: one that is present, for an interrupt or a trap (types 14 and 15), and uses no
/// stack of its own.
fn entry_of(gate: u128) -> Option<u64> {
    let (present, kind, stack) = (gate >> 47 & 1, gate >> 40 & 0x1f, gate >> 32 & 7);
    let entry = gate & 0xffff | gate >> 32 & 0xffff_ffff_ffff_0000;
    (present == 1 && kind & 0x1e == 0xe && stack == 0).then_some(entry as u64)
}

/// The same gate, leading elsewhere.
fn leading_to(gate: u128, to: u64) -> u128 {
    let to = u128::from(to);
    gate & !GATE_OFFSET | to & 0xffff | (to & 0xffff_ffff_ffff_0000) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use hindsight_kernel::Cave;

    const WORD: u64 = 0x1040;

    fn hooked() -> (GuestMemory, EntryState) {
        let cave = |physical| Cave {
            address: 0xffff_ffff_8100_0000 + physical,
            physical,
        };
        let mut state = EntryState::new(Some(EntryCaves {
            stubs: cave(0x2000),
            word: cave(WORD),
            quick: None,
        }));
        state.kernel_entries[LSTAR_STUB] = Some(0xffff_ffff_8100_3000);
        state.kernel_entries[PAGE_FAULT_STUB] = Some(0xffff_ffff_8100_3040);
        let memory = GuestMemory::new(1 << 20).expect("a mebibyte");
        (memory, state)
    }

    /// What a stub does; tells whether it exits.
    fn enter(memory: &mut GuestMemory) -> bool {
        let mut bytes = [0; 8];
        assert!(memory.read(WORD, &mut bytes));
        let word = u64::from_le_bytes(bytes).wrapping_sub(1);
        memory.write(WORD, &word.to_le_bytes()).expect("RAM");
        word == 0
    }

    #[test]
    fn the_guest_stops_at_the_entry_that_was_named_and_at_no_other() {
        let (mut memory, mut state) = hooked();
        for named in 4..20 {
            let mut exits = Vec::new();
            for number in 1..=30 {
                if number == 4 {
                    let mut counter = EntryCounter {
                        memory: &mut memory,
                        state: &mut state,
                    };
                    assert_eq!(counter.done(), 3);
                    counter.set_target(named + 10);
                    counter.set_target(named);
                    assert_eq!(counter.done(), 3);
                }
                if enter(&mut memory) {
                    exits.push(number);
                    break;
                }
            }
            assert_eq!(exits, [named]);
            let mut counter = EntryCounter {
                memory: &mut memory,
                state: &mut state,
            };
            assert_eq!(counter.done(), named);
            // On its way to the OUT: a new target changes nothing.
            counter.set_target(named + 1);
            assert_eq!((counter.word(), counter.done()), (0, named));
            counter.turn();
            assert_eq!((counter.word(), counter.done()), (0, 0));
        }
    }

    #[test]
    fn a_turn_leaves_the_same_memory_whatever_was_waited_for() {
        let (mut memory, mut state) = hooked();
        for target in [None, Some(5), Some(1 << 40)] {
            let mut counter = EntryCounter {
                memory: &mut memory,
                state: &mut state,
            };
            if let Some(target) = target {
                counter.set_target(target);
            }
            assert!(!enter(counter.memory));
            assert_eq!(counter.done(), 1);
            counter.turn();
            assert_eq!(counter.word(), 0);
        }
    }

    #[test]
    fn whatever_the_guest_writes_to_the_word_is_no_panic() {
        for word in [0, 1, 2, 5, u64::MAX, 1 << 63, u64::MAX - 5] {
            for before in [None, Some(3), Some(u64::MAX)] {
                for target in [0, 1, 7, u64::MAX] {
                    let (mut memory, mut state) = hooked();
                    let mut counter = EntryCounter {
                        memory: &mut memory,
                        state: &mut state,
                    };
                    if let Some(before) = before {
                        counter.set_target(before);
                    }
                    counter
                        .memory
                        .write(WORD, &word.to_le_bytes())
                        .expect("RAM");
                    counter.set_target(target);
                    counter.set_target(counter.done().saturating_add(1));
                    counter.turn();
                    assert_eq!((counter.word(), counter.done()), (0, 0));
                }
            }
        }
    }

    #[test]
    fn only_the_out_of_a_stub_that_stands_is_one() {
        let (_, state) = hooked();
        let stub = |index: usize| 0xffff_ffff_8100_2000 + index as u64 * STUB_BYTES;
        assert_eq!(
            state.stub_at(stub(LSTAR_STUB) + OUT_OFFSET),
            Some(LSTAR_STUB)
        );
        for address in [
            stub(LSTAR_STUB),
            stub(LSTAR_STUB) + OUT_OFFSET + 2,
            stub(CSTAR_STUB) + OUT_OFFSET,
            stub(STUBS) + OUT_OFFSET,
            stub(0) - STUB_BYTES + OUT_OFFSET,
            0x40_0009,
        ] {
            assert_eq!(state.stub_at(address), None, "{address:#x}");
        }
    }

    #[test]
    fn a_gate_leads_elsewhere_and_stays_the_same_otherwise() {
        let low = 0x8100_8e00_0010_3040_u128;
        let gate = 0xffff_ffff_u128 << 64 | low;
        assert_eq!(entry_of(gate), Some(0xffff_ffff_8100_3040));
        let moved = leading_to(gate, 0xffff_ffff_81a0_e620);
        assert_eq!(moved, 0xffff_ffff_u128 << 64 | 0x81a0_8e00_0010_e620);
        for (bits, what) in [
            (1 << 47, "not present"),
            (1 << 41, "no gate"),
            (1 << 32, "own stack"),
        ] {
            assert_eq!(entry_of(gate ^ bits), None, "{what}");
        }
    }
}
