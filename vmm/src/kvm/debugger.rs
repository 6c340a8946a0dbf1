//! Stopping the vCPU for a debugger: breakpoints, watchpoints and steps between two exits, of which the guest knows
//! nothing.
//!
//! All of it is debug registers, in those that neither the guest nor the way to a place needs (see [`super::debug`]), and
//! what has no room there is in memory while the guest runs (see [`super::inserted`]);
//! only data is watched by registers alone.
//! **A step** is no single-step of KVM's, which sets RFLAGS.TF: instructions leak that or drop it, and an exception
//! pushes it to the guest's stack. It is breakpoints at all places to which the instruction may lead, found by decoding
//! it (`step.rs`). What the way goes through meanwhile is left as it is: an exit in the middle of a step is an exit of
//! the loop's, and an interrupt delivered there leads the step to its handler.
//!
//! **A stop** is where the vCPU is about to execute an instruction, with no exception and no interrupt to take first. So a
//! watchpoint and a step end at such a place as well, and every stop can be named by its address and by how often
//! that was come to since the last exit. What faults and is executed again is not come to again.

use serde::{Deserialize, Serialize};

use super::cpu::KvmCpu;
use super::error::KvmError;
use super::preemption::RFLAGS_RF;

/// What a watchpoint looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum WatchKind {
    /// Writes.
    Write,
    /// Reads and writes: no debug register tells reads alone.
    Access,
}

/// Data that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Watchpoint {
    /// Linear address, a multiple of the length.
    pub address: u64,
    /// Length in bytes: 1, 2, 4 or 8.
    pub bytes: u8,
    /// What is looked for.
    pub kind: WatchKind,
}

impl Watchpoint {
    /// Whether a debug register can hold it (Intel SDM vol. 3, 17.2.5).
    pub fn is_possible(&self) -> bool {
        matches!(self.bytes, 1 | 2 | 4 | 8) && self.address.is_multiple_of(self.bytes.into())
    }

    /// Its type and length as DR7 has them (Intel SDM vol. 3, 17.2.4).
    pub(super) fn type_and_length(&self) -> u64 {
        let kind = match self.kind {
            WatchKind::Write => 0b01,
            WatchKind::Access => 0b11,
        };
        let length = match self.bytes {
            1 => 0b00,
            2 => 0b01,
            8 => 0b10,
            _ => 0b11,
        };
        length << 2 | kind
    }
}

/// A step under way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Where the instruction may lead.
    targets: Vec<u64>,
    /// It was an exit. It has ended, wherever the vCPU is.
    exited: bool,
    /// The instruction that it began with may be among those that it leads to.
    begun: bool,
}

/// Where a debugger wants the vCPU stopped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stops {
    /// Before the instructions at these linear addresses.
    pub execution: Vec<u64>,
    /// After these are accessed.
    pub data: Vec<Watchpoint>,
    /// Where it has come to an address for this number of times since the last exit.
    pub arrival: Option<(u64, u64)>,
    /// After one instruction, which [`KvmCpu::begin_step`] has looked at.
    pub step: Option<Step>,
    /// None of them is to be in memory: some may be in the middle of an instruction.
    pub in_registers: bool,
}

impl Stops {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.execution.is_empty()
            && self.data.is_empty()
            && self.arrival.is_none()
            && self.step.is_none()
    }

    fn is_before(&self, address: u64) -> bool {
        let steps_to = |step: &Step| step.targets.contains(&address);
        self.execution.contains(&address) || self.step.as_ref().is_some_and(steps_to)
    }

    /// The addresses before whose instructions the vCPU must come back; those that must be exact come first.
    fn addresses(&self) -> Vec<u64> {
        let steps = self.step.iter().flat_map(|step| &step.targets);
        let arrival = self.arrival.iter().map(|(address, _)| address);
        let all = arrival.chain(steps).chain(&self.execution);
        all.copied().collect()
    }
}

/// Why the vCPU has stopped for a debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hit {
    /// It is about to execute the instruction there.
    Execution(u64),
    /// It is about to execute the instruction there for as often as was asked for.
    Arrival(u64),
    /// It has accessed this.
    Data(Watchpoint),
    /// The step is done.
    Step,
    /// There are fewer debug registers left than it takes: the guest uses the others, or the way to a place does.
    NoRoom {
        /// How many it takes.
        wanted: usize,
        /// How many there are.
        free: usize,
    },
}

/// What the vCPU remembers for a debugger.
#[derive(Debug, Default)]
pub(super) struct Debugger {
    stops: Stops,
    /// The same, as they were when the guest ran on from its last exit.
    stops_at_exit: Stops,
    /// Nothing has run since the last exit.
    at_exit: bool,
    /// It has been stopped before the instruction here, and is to execute it now.
    passed: Option<u64>,
    /// Seen, and not told yet.
    seen: Option<Watchpoint>,
    /// How often it came to the address of [`Stops::arrival`] since the last exit.
    arrivals: u64,
    /// And to another address, which it does not stop at.
    counted: Option<(u64, u64)>,
    hit: Option<Hit>,
}

impl Debugger {
    /// Whether it has anything to look for.
    pub(super) fn is_on(&self) -> bool {
        !self.stops.is_empty() || self.counted.is_some()
    }

    /// The vCPU was put elsewhere, at an exit.
    pub(super) fn moved(&mut self) {
        *self = Debugger {
            at_exit: true,
            ..Debugger::default()
        };
    }

    /// It goes on from where it came back.
    pub(super) fn begin(&mut self) {
        if std::mem::take(&mut self.at_exit) {
            self.stops_at_exit = self.stops.clone();
        }
    }

    /// It came back with an exit: the instruction that was stepped is over, unless the vCPU was stopped before it.
    pub(super) fn exited(&mut self, preempted: bool) {
        self.at_exit = true;
        self.passed = None;
        self.arrivals = 0;
        if let Some((_, count)) = &mut self.counted {
            *count = 0;
        }
        if let (Some(step), false) = (&mut self.stops.step, preempted) {
            step.exited = true;
        }
    }

    /// An access that is watched was made.
    pub(super) fn saw(&mut self, watchpoint: Watchpoint) {
        self.seen = Some(watchpoint);
    }

    /// It has got on, from wherever it was stopped.
    pub(super) fn got_on(&mut self) {
        self.passed = None;
    }

    /// It has come to the instruction at `rip`.
    fn come_to(&mut self, rip: u64) {
        if self.stops.arrival.is_some_and(|(at, _)| at == rip) {
            self.arrivals += 1;
        }
        if let Some((at, count)) = &mut self.counted
            && *at == rip
        {
            *count += 1;
        }
    }

    /// What is watched.
    pub(super) fn watchpoints(&self) -> &[Watchpoint] {
        &self.stops.data
    }

    /// Whether no stop is to be in memory.
    pub(super) fn in_registers(&self) -> bool {
        self.stops.in_registers
    }

    /// The addresses at which it must come back.
    pub(super) fn addresses(&self) -> Vec<u64> {
        let counted = self.counted.iter().map(|(address, _)| *address);
        counted.chain(self.stops.addresses()).collect()
    }

    /// Whether one of them is this.
    fn looks_at(&self, rip: u64) -> bool {
        let is_rip = |place: &(u64, u64)| place.0 == rip;
        self.counted.as_ref().is_some_and(is_rip)
            || self.stops.arrival.as_ref().is_some_and(is_rip)
            || self.stops.is_before(rip)
    }
}

impl KvmCpu {
    /// Has the vCPU stop there from now on, and nowhere else, for a debugger ([`hindsight_replay::Back::Stopped`]).
    ///
    /// # Errors
    ///
    /// KVM failed.
    pub fn stop_at(&mut self, stops: Stops) -> Result<(), KvmError> {
        if !stops.is_empty() {
            self.watch_debug_registers()?;
        }
        if stops.arrival != self.debugger.stops.arrival {
            self.debugger.arrivals = 0;
        }
        self.debugger.stops = stops;
        Ok(())
    }

    /// Has it count, from here to its next exit, how often it comes to `address`; or no more.
    ///
    /// # Errors
    ///
    /// KVM failed.
    pub fn count_arrivals(&mut self, address: Option<u64>) -> Result<(), KvmError> {
        self.watch_debug_registers()?;
        self.debugger.counted = address.map(|address| (address, 0));
        Ok(())
    }

    /// How often it has come there.
    pub fn arrivals(&self) -> u64 {
        self.debugger.counted.map_or(0, |(_, count)| count)
    }

    /// Where it was wanted to stop when it ran on from its last exit, if it has.
    pub fn stops_at_exit(&self) -> &Stops {
        &self.debugger.stops_at_exit
    }

    /// Why it has stopped.
    pub fn hit(&self) -> Option<Hit> {
        self.debugger.hit
    }

    /// Whether an interrupt or an exception comes before its next instruction.
    ///
    /// # Errors
    ///
    /// KVM failed.
    pub fn is_interrupted(&self) -> Result<bool, KvmError> {
        self.event_is_under_way()
    }

    /// How many debug registers there are for a debugger: those that the guest has not enabled.
    pub fn free_debug_registers(&self) -> usize {
        match self.vcpu.no_debug_registers {
            true => 0,
            false => self.vcpu.breakpoints.free_count(),
        }
    }

    /// Stops shall use no debug registers: this host's do not stop the guest.
    pub fn use_no_debug_registers(&mut self) {
        self.vcpu.no_debug_registers = true;
    }

    /// A step of the instruction that it is about to execute, or of what comes before that.
    ///
    /// # Errors
    ///
    /// KVM failed.
    pub fn begin_step(&mut self) -> Result<Step, KvmError> {
        self.watch_debug_registers()?;
        hindsight_replay::Cpu::settle(self)?;
        Ok(Step {
            targets: self.step_targets()?,
            exited: false,
            begun: false,
        })
    }

    /// Whether it is to stop right here.
    pub(super) fn is_at_debug_stop(&mut self) -> Result<bool, KvmError> {
        let registers = self.page().registers();
        let rip = registers.rip();
        let debugger = &self.debugger;
        // What is executed again after a fault was come to before.
        let comes = debugger.passed != Some(rip) && registers.rflags() & RFLAGS_RF == 0;
        let looks = comes && debugger.looks_at(rip);
        let stepping = debugger.stops.step.is_some();
        let seen = debugger.seen.is_some();
        if !(looks || stepping || seen) {
            return Ok(false);
        }
        if let Some(entry) = self.entry_under_way()? {
            // It goes there first. What has been already is told there.
            if stepping || seen {
                self.debugger.stops.step = Some(Step {
                    targets: vec![entry],
                    exited: false,
                    begun: true,
                });
            }
            return Ok(false);
        }
        let debugger = &mut self.debugger;
        let step = debugger.stops.step.as_mut();
        let (exited, begins) = step.map_or((false, false), |step| {
            (step.exited, !std::mem::replace(&mut step.begun, true))
        });
        if !(looks || exited || seen) {
            return Ok(false);
        }
        if comes {
            debugger.come_to(rip);
        }
        let arrived = debugger.stops.arrival == Some((rip, debugger.arrivals));
        let hit = match debugger.seen.take() {
            Some(watchpoint) => Some(Hit::Data(watchpoint)),
            None if arrived => Some(Hit::Arrival(rip)),
            None if comes && debugger.stops.execution.contains(&rip) => Some(Hit::Execution(rip)),
            None if exited => Some(Hit::Step),
            None if !begins && debugger.stops.is_before(rip) => Some(Hit::Step),
            None => None,
        };
        // Told or not: the next time round is another one.
        debugger.passed = Some(rip);
        if hit.is_some() {
            debugger.hit = hit;
            debugger.stops.step = None;
        }
        Ok(hit.is_some())
    }

    /// Whether there are debug registers for what must be in some, where the guest is to come back at so many addresses. If
    /// not, the vCPU is stopped.
    pub(super) fn has_room(&mut self, addresses: usize) -> bool {
        let stops = &self.debugger.stops;
        let addresses = if stops.in_registers { addresses } else { 0 };
        let wanted = addresses + stops.data.len();
        let free = self.free_debug_registers();
        if wanted > free {
            self.debugger.hit = Some(Hit::NoRoom { wanted, free });
        }
        wanted <= free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watchpoint_is_one_that_a_debug_register_can_hold() {
        let watch = |address, bytes| Watchpoint {
            address,
            bytes,
            kind: WatchKind::Write,
        };
        assert!(watch(0x1000, 8).is_possible() && watch(0x1001, 1).is_possible());
        assert!(!watch(0x1004, 8).is_possible() && !watch(0x1000, 3).is_possible());
        assert_eq!(watch(0x1000, 8).type_and_length(), 0b1001);
        assert_eq!(watch(0x1000, 4).type_and_length(), 0b1101);
    }

    #[test]
    fn what_must_be_exact_comes_first() {
        let stops = Stops {
            execution: vec![1, 2],
            arrival: Some((2, 7)),
            step: Some(Step {
                targets: vec![1, 3],
                exited: false,
                begun: false,
            }),
            ..Stops::default()
        };
        assert_eq!(stops.addresses(), [2, 1, 3, 1, 2]);
        assert!(stops.is_before(3) && !stops.is_before(4));
    }
}
