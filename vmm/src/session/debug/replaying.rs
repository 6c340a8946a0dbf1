//! A replay that can be run, stopped and put elsewhere.

use std::fs::File;
use std::io::BufReader;

use hindsight_replay::{Closed, Cpu, Machine, Registers, Replayer, RunError, Unit};

use crate::disk::Disks;
use crate::failure::{Failure, Kind};
use crate::kvm::{GuestMemory, GuestRegisters, Hit, KvmCpu, Step, Stops};
use crate::session::open::{RecordedImages, RecordedPaths};
use crate::session::preemption_plan::CounterWish;
use crate::session::recording::Recording;
use crate::session::state_file::State;

/// How a stretch came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ran {
    /// It is where it was to be stopped, between two exits.
    Stopped(Hit),
    /// It is at the exit that it was to go to.
    Reached,
    /// The recording ends here.
    Ended,
}

/// A replay: a machine, its vCPU and disks, and the door to its journal.
#[derive(Debug)]
pub(super) struct Replaying {
    recording: Recording,
    cpu: KvmCpu,
    machine: Machine,
    disks: Disks,
    door: Replayer<BufReader<File>>,
    /// How the recording ends, if the replay has come to its end.
    ended: Option<String>,
    /// Nothing of the guest has run since the last exit.
    at_exit: bool,
}

impl Replaying {
    /// The recorded machine at power-on.
    pub(super) fn begin(
        recording: Recording,
        instead: &RecordedPaths,
        counter: &CounterWish,
    ) -> Result<Replaying, Failure> {
        let journal = recording.journal()?;
        let header = journal.header().clone();
        let images = RecordedImages::open(&recording, &header, instead)?;
        let (cpu, machine) = images.machine(&header, counter)?;
        Ok(Replaying {
            recording,
            cpu,
            machine,
            disks: images.fresh_disks()?,
            door: Replayer::new(journal, None, None),
            ended: None,
            at_exit: true,
        })
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        self.cpu.memory()
    }

    pub(super) fn disks(&self) -> &Disks {
        &self.disks
    }

    /// The last exit.
    pub(super) fn exit(&self) -> u64 {
        self.machine.at().exits
    }

    /// Guest time there, in nanoseconds.
    pub(super) fn now(&self) -> u64 {
        self.machine.now()
    }

    /// Whether the guest is led to places between exits, by a debug register.
    pub(super) fn is_led(&self) -> bool {
        self.door.journal().header().machine.preemption == Some(Unit::Branches)
    }

    /// Whether nothing of the guest has run since the last exit, and the recording goes on.
    pub(super) fn is_at_exit(&self) -> bool {
        self.at_exit && self.ended.is_none()
    }

    /// How the recording ends, if this is its end.
    pub(super) fn ended(&self) -> Option<&str> {
        self.ended.as_deref()
    }

    /// The state at this exit.
    pub(super) fn save(&mut self) -> Result<State, Failure> {
        Ok((self.machine).save(&mut self.cpu, &mut self.disks, &self.door)?)
    }

    /// Goes to where `state` was taken.
    pub(super) fn restore(&mut self, state: &State) -> Result<(), Failure> {
        (self.machine).restore(state, &mut self.cpu, &mut self.disks)?;
        let place = state.core.journal.as_ref();
        let place = place.expect("a replay's state says where it is in the journal");
        let journal = self.recording.journal()?;
        self.door = Replayer::at(journal, place)?;
        (self.ended, self.at_exit) = (None, true);
        Ok(())
    }

    /// Runs on to its next stop; without stops to the exit `until`, or to the end.
    pub(super) fn run(&mut self, until: Option<u64>) -> Result<Ran, Failure> {
        if self.ended.is_some() {
            return Ok(Ran::Ended);
        }
        self.door.close_after(until);
        self.at_exit = false;
        let result = (self.machine).run(&mut self.cpu, &mut self.disks, &mut self.door, &mut ());
        match result {
            Err(RunError::Closed(Closed::Stopped(_))) => {
                let hit = self.cpu.hit();
                Ok(Ran::Stopped(hit.expect("a vCPU that is stopped says why")))
            }
            Err(RunError::Closed(Closed::Reached(_))) => {
                self.at_exit = true;
                Ok(Ran::Reached)
            }
            Ok(end) => {
                self.ended = Some(end.to_string());
                Ok(Ran::Ended)
            }
            Err(RunError::Closed(Closed::CutShort(tail))) => {
                self.ended = Some(tail.to_string());
                Ok(Ran::Ended)
            }
            Err(RunError::Closed(Closed::Diverged(divergence))) => {
                Err(Failure::new(Kind::Different, divergence))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Runs on to an exit and stops nowhere before. `false`: it ends before.
    pub(super) fn run_to_exit(&mut self, exit: u64) -> Result<bool, Failure> {
        self.stop_at(Stops::default())?;
        self.cpu.count_arrivals(None)?;
        if self.exit() == exit && self.is_at_exit() {
            return Ok(true);
        }
        Ok(self.run(Some(exit))? == Ran::Reached)
    }

    pub(super) fn stop_at(&mut self, stops: Stops) -> Result<(), Failure> {
        Ok(self.cpu.stop_at(stops)?)
    }

    pub(super) fn count_arrivals(&mut self, address: u64) -> Result<(), Failure> {
        Ok(self.cpu.count_arrivals(Some(address))?)
    }

    pub(super) fn arrivals(&self) -> u64 {
        self.cpu.arrivals()
    }

    /// Where it was wanted to stop when it ran on from its last exit.
    pub(super) fn stops_at_exit(&self) -> Stops {
        self.cpu.stops_at_exit().clone()
    }

    pub(super) fn begin_step(&mut self) -> Result<Step, Failure> {
        Ok(self.cpu.begin_step()?)
    }

    pub(super) fn free_debug_registers(&self) -> usize {
        self.cpu.free_debug_registers()
    }

    /// The general registers, with the last exit's instruction finished.
    pub(super) fn registers(&mut self) -> Result<Registers, Failure> {
        self.cpu.settle()?;
        Ok(self.cpu.registers())
    }

    /// All registers that a debugger shows.
    pub(super) fn all_registers(&mut self) -> Result<GuestRegisters, Failure> {
        self.cpu.settle()?;
        Ok(self.cpu.guest_registers()?)
    }

    /// Whether an interrupt or an exception comes before the next instruction.
    pub(super) fn is_interrupted(&self) -> Result<bool, Failure> {
        Ok(self.cpu.is_interrupted()?)
    }

    /// Reads memory of the present address space, as far as it is mapped; returns how many bytes.
    pub(super) fn read(&mut self, gva: u64, buffer: &mut [u8]) -> usize {
        self.cpu.read(gva, buffer)
    }
}
