//! The guest's own debug registers and single-steps, beside ours.
//!
//! While the vCPU is led to a place it has breakpoints of ours in debug registers that KVM sets for us
//! (`KVM_GUESTDBG_USE_HW_BP`). Then every #DB comes to us and the guest's own breakpoints do not count. So
//! those that the guest has enabled are set beside ours, in the registers where the guest has them; ours
//! take what is left, and what is the guest's in a #DB is given back to it, exactly as the CPU would have raised it.
//! Between two counted exits the guest's do not change: its writes of DR0 to DR3 and DR7 are exits (see
//! [`hindsight_kernel::rewrite::traps`]). DR6, which the guest reads and clears at each #DB, is left to KVM.
//!
//! The same door serves what we finish for the guest: an instruction that ends with RFLAGS.TF set
//! raises #DB, whoever executed it.

use kvm_bindings::{KVM_GUESTDBG_ENABLE, kvm_debugregs, kvm_guest_debug, kvm_guest_debug_arch};
use serde::{Deserialize, Serialize};

use super::cpu::KvmCpu;
use super::debugger::Watchpoint;
use super::error::{KvmError, Named};
use super::signals;
use super::traps::Here;

/// DR6: which breakpoints were hit (Intel SDM vol. 3, 17.2.3).
const HITS: u64 = 0xf;
/// DR6.BD: a debug register was about to be accessed.
const BD: u64 = 1 << 13;
/// DR6.BS: a single-step.
const BS: u64 = 1 << 14;
/// DR6.BT: a task switch.
const BT: u64 = 1 << 15;
/// The bits of DR6 that are set whatever happened.
const DR6_FIXED: u64 = 0xffff_0ff0;
/// The bits of DR7 that are the guest's to set.
const DR7_FREE: u64 = 0xffff_2bff;
/// The bit of DR7 that is always set.
const DR7_FIXED: u64 = 1 << 10;
/// DR7.GD: accesses to debug registers raise #DB.
const DR7_GD: u64 = 1 << 13;
/// #DB.
const DB_VECTOR: u8 = 1;
/// ICEBP, which raises #DB and says nothing of it in DR6.
const ICEBP: u8 = 0xf1;
/// RFLAGS.TF: #DB after each instruction.
pub(super) const RFLAGS_TF: u64 = 1 << 8;

/// `kvm_guest_debug::control` of a guest that has no breakpoint of ours, and may get one: each of its accesses to a debug
/// register is KVM's to do.
pub(super) const WATCHED: u32 = KVM_GUESTDBG_ENABLE;

/// Whose a #DB is that came to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DebugExit {
    /// A stop of ours.
    Stop,
    /// The guest's, and it has it.
    Guest,
    /// A watchpoint of a debugger's.
    Seen,
}

/// The guest's DR0 to DR3 and DR7: what it last wrote to them.
///
/// KVM has them too, but not always. Where nobody debugs a guest that touches a debug register, KVM lets it have the
/// real ones until its next exit and reads them back there; if a signal comes between, and breakpoints of ours are set for
/// the next entry, it warns and reads those back as the guest's (`KVM_DEBUGREG_WONT_EXIT`, seen with Linux 6.1). So a guest
/// that may be led to places is always debugged ([`WATCHED`]), and this is what counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Breakpoints {
    addresses: [u64; 4],
    dr7: u64,
}

impl Default for Breakpoints {
    fn default() -> Breakpoints {
        Breakpoints {
            addresses: [0; 4],
            dr7: DR7_FIXED,
        }
    }
}

impl Breakpoints {
    /// Whether these registers hold them.
    fn are_in(&self, registers: &kvm_debugregs) -> bool {
        (registers.db, registers.dr7) == (self.addresses, self.dr7)
    }

    /// Flips bits of an address.
    pub(super) fn flip(&mut self, number: usize, bits: u64) {
        self.addresses[number] ^= bits;
    }

    /// Whether one is enabled, for its task or for all.
    fn is_enabled(&self, number: usize) -> bool {
        self.dr7 >> (2 * number) & 3 != 0
    }

    /// Whether one is on execution: type 0.
    fn is_on_execution(&self, number: usize) -> bool {
        self.dr7 >> (16 + 4 * number) & 3 == 0
    }

    /// The numbers of those that are not enabled.
    fn free(&self) -> impl Iterator<Item = usize> + '_ {
        (0..4).filter(|&number| !self.is_enabled(number))
    }

    /// How many are not enabled.
    pub(super) fn free_count(&self) -> usize {
        self.free().count()
    }

    /// The bits of DR6 for those that are on execution of the instruction at `address`.
    fn at(&self, address: u64) -> u64 {
        let hits = |&number: &usize| {
            self.is_enabled(number)
                && self.is_on_execution(number)
                && self.addresses[number] == address
        };
        (0..4).filter(hits).map(|number| 1 << number).sum()
    }

    /// The bits of DR6 that speak of them: of those that are on data, or of those that are on execution.
    fn mask(&self, on_execution: bool) -> u64 {
        let asked = |&number: &usize| {
            self.is_enabled(number) && self.is_on_execution(number) == on_execution
        };
        (0..4).filter(asked).map(|number| 1 << number).sum()
    }

    /// The registers with stops and watchpoints in them as well, in those that are free.
    ///
    /// # Panics
    ///
    /// If there are more of them than free registers.
    pub(super) fn with_stops(&self, stops: &[u64], watched: &[Watchpoint]) -> kvm_guest_debug_arch {
        let mut arch = kvm_guest_debug_arch::default();
        arch.debugreg[7] = DR7_FIXED | self.dr7 & DR7_FREE & !DR7_GD;
        for number in 0..4 {
            if self.is_enabled(number) {
                arch.debugreg[number] = self.addresses[number];
            } else {
                // Neither type nor length of one that is not enabled.
                arch.debugreg[7] &= !(0xf << (16 + 4 * number));
            }
        }
        let mut free = self.free();
        for stop in stops {
            let number = free.next().expect("the caller asked how many there are");
            arch.debugreg[number] = *stop;
            // Intel SDM vol. 3, 17.2.4: enabled globally, on execution, of one byte.
            arch.debugreg[7] |= 2 << (2 * number);
        }
        for watchpoint in watched {
            let number = free.next().expect("the caller asked how many there are");
            arch.debugreg[number] = watchpoint.address;
            arch.debugreg[7] |= 2 << (2 * number);
            arch.debugreg[7] |= watchpoint.type_and_length() << (16 + 4 * number);
        }
        arch
    }
}

/// Which of the watchpoints that follow `stops` in the free registers a #DB with these bits in DR6 is of.
fn watched(
    dr6: u64,
    guest: &Breakpoints,
    stops: usize,
    watchpoints: &[Watchpoint],
) -> Option<Watchpoint> {
    let numbers = guest.free().skip(stops);
    let mut hits = numbers.zip(watchpoints);
    let hit = hits.find(|(number, _)| dr6 >> number & 1 != 0);
    hit.map(|(_, watchpoint)| *watchpoint)
}

/// What to make of a #DB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It is at a stop.
    Stop,
    /// These bits of DR6 are the guest's.
    Guest(u64),
}

/// Whose a #DB with these bits in DR6 is, at `rip`, where it has these breakpoints beside the stops.
fn judge(dr6: u64, rip: u64, guest: &Breakpoints, stops: &[u64]) -> Verdict {
    // What ended the instruction before comes before what begins with the next (Intel SDM vol. 3, 6.9), so a stop waits
    // until the guest is back from its handler, as it would if there were no stop.
    let traps = dr6 & (BS | BT | BD | guest.mask(false));
    if traps != 0 {
        return Verdict::Guest(traps);
    }
    if stops.contains(&rip) && dr6 & HITS != 0 {
        return Verdict::Stop;
    }
    Verdict::Guest(dr6 & guest.mask(true))
}

impl KvmCpu {
    /// Has KVM debug the guest in this way, beside watching it if it is watched.
    pub(super) fn debug(
        &mut self,
        control: u32,
        arch: kvm_guest_debug_arch,
    ) -> Result<(), KvmError> {
        let watched = if self.vcpu.watched { WATCHED } else { 0 };
        let debug = kvm_guest_debug {
            control: control | watched,
            arch,
            ..Default::default()
        };
        self.fd()
            .set_guest_debug(&debug)
            .named("KVM_SET_GUEST_DEBUG")
    }

    /// The guest may be led to places from now on.
    pub(super) fn watch_debug_registers(&mut self) -> Result<(), KvmError> {
        if self.vcpu.watched {
            return Ok(());
        }
        self.vcpu.watched = true;
        self.debug(0, kvm_guest_debug_arch::default())?;
        if !self.vcpu.unfinished {
            // Before the first entry the shared page has no registers.
            signals::finish(&mut self.vcpu.fd)?;
        }
        Ok(())
    }

    /// What KVM has in the guest's debug registers.
    fn debug_registers(&self) -> Result<kvm_debugregs, KvmError> {
        self.fd().get_debug_regs().named("KVM_GET_DEBUGREGS")
    }

    fn set_debug_registers(&self, registers: &kvm_debugregs) -> Result<(), KvmError> {
        self.fd()
            .set_debug_regs(registers)
            .named("KVM_SET_DEBUGREGS")
    }

    /// Takes breakpoints of ours out of the guest's registers, if KVM has put them there.
    pub(super) fn keep_own_breakpoints(&mut self) -> Result<(), KvmError> {
        let mut registers = self.debug_registers()?;
        if self.vcpu.breakpoints.are_in(&registers) {
            return Ok(());
        }
        // It took DR6 along: what that says of free registers is of ours.
        for number in self.vcpu.breakpoints.free() {
            registers.dr6 &= !(1 << number);
        }
        (registers.db, registers.dr7) =
            (self.vcpu.breakpoints.addresses, self.vcpu.breakpoints.dr7);
        self.counts.breakpoints_restored += 1;
        self.set_debug_registers(&registers)
    }

    /// Raises #DB where the guest is, with these bits in DR6, as the CPU does when an instruction has
    /// ended. The registers may be changed after it: KVM forgets only what it has not begun to deliver.
    pub(super) fn raise_debug(&mut self, bits: u64) -> Result<(), KvmError> {
        let mut registers = self.debug_registers()?;
        registers.dr6 = registers.dr6 & !HITS | DR6_FIXED | bits;
        self.vcpu.breakpoints.dr7 &= !DR7_GD;
        (registers.db, registers.dr7) =
            (self.vcpu.breakpoints.addresses, self.vcpu.breakpoints.dr7);
        self.set_debug_registers(&registers)?;
        self.inject(DB_VECTOR, None)
    }

    /// Has KVM deliver an exception before the next instruction.
    pub(super) fn inject(&mut self, vector: u8, error_code: Option<u32>) -> Result<(), KvmError> {
        let mut events = self.fd().get_vcpu_events().named("KVM_GET_VCPU_EVENTS")?;
        events.exception.injected = 1;
        events.exception.pending = 0;
        events.exception.nr = vector;
        events.exception.has_error_code = error_code.is_some().into();
        events.exception.error_code = error_code.unwrap_or(0);
        // An instruction has ended, and with it the shadow that it was in.
        events.interrupt.shadow = 0;
        self.fd()
            .set_vcpu_events(&events)
            .named("KVM_SET_VCPU_EVENTS")?;
        // Whether an interrupt can be taken KVM said before that. It cannot: settling asks again.
        self.vcpu.unfinished = true;
        Ok(())
    }

    /// The instruction of a trap has ended, and the guest single-steps.
    pub(super) fn raise_step(&mut self) -> Result<(), KvmError> {
        self.raise_debug(BS)
    }

    /// KVM came back with a #DB. Gives the guest what is its own of it.
    pub(super) fn sort_debug_exit(&mut self) -> Result<DebugExit, KvmError> {
        let dr6 = self.page().debug_status();
        self.keep_own_breakpoints()?;
        let guest = self.vcpu.breakpoints;
        let rip = self.rip();
        let (stops, watchpoints) = (&self.vcpu.stops, self.debugger.watchpoints());
        let seen = watched(dr6, &guest, stops.len(), watchpoints);
        let verdict = judge(dr6, rip, &guest, stops);
        if let Some(watchpoint) = seen {
            self.debugger.saw(watchpoint);
        }
        let bits = match verdict {
            Verdict::Stop => return Ok(DebugExit::Stop),
            Verdict::Guest(0) if seen.is_some() => return Ok(DebugExit::Seen),
            Verdict::Guest(bits) => bits,
        };
        if bits == 0 && self.byte_at(rip) == Some(ICEBP) {
            // Intel's CPUs come back before it.
            self.page().change_registers(|registers| registers.rip += 1);
        }
        self.raise_debug(bits)?;
        Ok(DebugExit::Guest)
    }

    /// The guest has taken a step of ours. Gives it what is its own of it; tells whether there was anything.
    pub(super) fn sort_step(&mut self) -> Result<bool, KvmError> {
        let dr6 = self.page().debug_status();
        let bits = dr6 & self.vcpu.breakpoints.mask(false);
        if bits != 0 {
            self.raise_debug(bits)?;
        }
        Ok(bits != 0)
    }

    /// The guest is about to execute an instruction that it has a breakpoint on, and that a stop of ours is on too:
    /// raises its #DB. Tells whether there was anything.
    pub(super) fn raise_own_breakpoint(&mut self) -> Result<bool, KvmError> {
        let rip = self.rip();
        let bits = self.vcpu.breakpoints.at(rip);
        if bits != 0 {
            self.raise_debug(bits)?;
        }
        Ok(bits != 0)
    }

    /// Performs a write of a debug register.
    pub(super) fn write_dr(&mut self, here: Here, number: u8, value: u64) -> Result<(), KvmError> {
        if self.is_guarded(here)? {
            return Ok(());
        }
        match number {
            7 if value >> 32 != 0 => return self.raise_gp(here.address),
            7 => self.vcpu.breakpoints.dr7 = value & DR7_FREE | DR7_FIXED,
            number => self.vcpu.breakpoints.addresses[usize::from(number & 3)] = value,
        }
        let mut registers = self.debug_registers()?;
        (registers.db, registers.dr7) =
            (self.vcpu.breakpoints.addresses, self.vcpu.breakpoints.dr7);
        self.set_debug_registers(&registers)
    }

    /// Raises the #DB of an access to a debug register, if the guest wants one (DR7.GD).
    fn is_guarded(&mut self, here: Here) -> Result<bool, KvmError> {
        let guarded = self.vcpu.breakpoints.dr7 & DR7_GD != 0;
        if guarded {
            self.forget_trap();
            self.return_to(here.address)?;
            self.raise_debug(BD)?;
        }
        Ok(guarded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Enabled: 0 on execution of 0x1000, 2 on writes of 8 bytes at 0x2000.
    fn two() -> Breakpoints {
        Breakpoints {
            addresses: [0x1000, 0x5555, 0x2000, 0x7777],
            dr7: 1 | 2 << 4 | 0b1001 << 24 | 0b1101 << 28 | DR7_FIXED,
        }
    }

    #[test]
    fn stops_take_the_registers_that_the_guest_has_not_enabled() {
        assert_eq!(two().free_count(), 2);
        let arch = two().with_stops(&[0xa000, 0xb000], &[]);
        assert_eq!(arch.debugreg[..4], [0x1000, 0xa000, 0x2000, 0xb000]);
        let dr7 = 1 | 2 << 2 | 2 << 4 | 2 << 6 | 0b1001 << 24 | DR7_FIXED;
        assert_eq!(arch.debugreg[7], dr7);
        let all = Breakpoints { dr7: 0xff, ..two() };
        assert_eq!(all.free_count(), 0);
        assert_eq!(Breakpoints::default().free_count(), 4);
        let registers = kvm_debugregs {
            db: two().addresses,
            dr7: two().dr7,
            ..Default::default()
        };
        assert!(two().are_in(&registers) && !all.are_in(&registers));
    }

    #[test]
    fn each_hit_goes_to_its_owner_and_what_ends_an_instruction_goes_first() {
        let guest = two();
        let stops = [0x1000, 0xa000];
        let at = |dr6, rip| judge(dr6, rip, &guest, &stops);
        assert_eq!(at(1 << 1, 0xa000), Verdict::Stop);
        assert_eq!(at(1 << 2, 0xc000), Verdict::Guest(1 << 2), "a write");
        assert_eq!(at(BS, 0xc000), Verdict::Guest(BS));
        assert_eq!(at(1 << 1 | 1 << 2, 0xa000), Verdict::Guest(1 << 2), "both");
        assert_eq!(at(BS | 1 << 1, 0xa000), Verdict::Guest(BS));
        assert_eq!(at(1, 0x1000), Verdict::Stop, "the same instruction");
        assert_eq!(at(1 << 3, 0xc000), Verdict::Guest(0), "one that is off");
        assert_eq!(at(0, 0xa000), Verdict::Guest(0), "an ICEBP before a stop");
        assert_eq!(
            judge(1, 0x1000, &guest, &[]),
            Verdict::Guest(1),
            "its own breakpoint"
        );
        assert_eq!((guest.at(0x1000), guest.at(0x2000)), (1, 0));
    }
}
