//! The toy CPU under a debugger: stopped before instructions, after stores, and after single steps.

use hindsight_replay::{Cpu, Debuggable, HitKind, Registers};

use crate::toy_cpu::{Broken, ToyCpu};

/// Where a toy is to be stopped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToyStops {
    /// Before the instructions at these addresses.
    pub execution: Vec<u64>,
    /// After a store to the words of memory at these.
    pub data: Vec<u64>,
    /// Where it comes to an address for this number of times since the last exit.
    pub arrival: Option<(u64, u64)>,
    /// After one step; whether the instruction was executed by now.
    pub step: Option<bool>,
}

/// Why a toy has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToyHit {
    /// It is about to execute the instruction there.
    Execution(u64),
    /// It is so for as often as was asked for.
    Arrival(u64),
    /// It has stored a word there.
    Data(u64),
    /// The step is done.
    Step,
}

/// An instruction that the toy has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coming {
    /// Before it is executed.
    pub registers: Registers,
    /// The word that the instruction before it has stored.
    pub stored: Option<u64>,
}

/// What a toy remembers for a debugger.
#[derive(Clone, Debug, Default)]
pub struct ToyDebugger {
    stops: ToyStops,
    stops_at_exit: ToyStops,
    at_exit: bool,
    /// It has come to the present instruction already.
    looked: bool,
    /// What the instruction before has stored, if that was not told.
    stored: Option<u64>,
    arrivals: u64,
    counted: Option<(u64, u64)>,
    hit: Option<ToyHit>,
    /// All that it comes to, if somebody wants to know.
    seen: Option<Vec<Coming>>,
}

impl ToyDebugger {
    /// It runs on from where it came back.
    pub(crate) fn begin(&mut self) {
        if std::mem::take(&mut self.at_exit) {
            self.stops_at_exit = self.stops.clone();
        }
    }

    /// It came back with an exit; whether it was only stopped there.
    pub(crate) fn exited(&mut self, preempted: bool) {
        self.at_exit = true;
        self.looked = false;
        self.arrivals = 0;
        if let Some((_, count)) = &mut self.counted {
            *count = 0;
        }
        if let (Some(step), false) = (&mut self.stops.step, preempted) {
            *step = true;
        }
    }

    /// It has got on: by an instruction, or to a handler.
    pub(crate) fn moved(&mut self, stored: Option<u64>) {
        self.looked = false;
        let is_noted = |word: &u64| self.seen.is_some() || self.stops.data.contains(word);
        self.stored = stored.filter(is_noted).or(self.stored);
        if let Some(step) = &mut self.stops.step {
            *step = true;
        }
    }

    /// Its state is another one.
    pub(crate) fn restored(&mut self) {
        *self = ToyDebugger {
            at_exit: true,
            ..ToyDebugger::default()
        };
    }

    /// Whether it is to be stopped after what it has stored, whatever else it is to do here.
    pub(crate) fn has_stored(&self) -> bool {
        self.stored
            .is_some_and(|word| self.stops.data.contains(&word))
    }

    /// Whether it is to be stopped before its next instruction.
    pub(crate) fn stops(&mut self, registers: &Registers) -> bool {
        if std::mem::replace(&mut self.looked, true) {
            return false;
        }
        let rip = registers.rip();
        let stored = self.stored.take();
        if let Some(seen) = &mut self.seen {
            let registers = *registers;
            seen.push(Coming { registers, stored });
        }
        if self.stops.arrival.is_some_and(|(at, _)| at == rip) {
            self.arrivals += 1;
        }
        if let Some((at, count)) = &mut self.counted
            && *at == rip
        {
            *count += 1;
        }
        self.hit = match stored.filter(|word| self.stops.data.contains(word)) {
            Some(word) => Some(ToyHit::Data(word)),
            None if self.stops.arrival == Some((rip, self.arrivals)) => Some(ToyHit::Arrival(rip)),
            None if self.stops.execution.contains(&rip) => Some(ToyHit::Execution(rip)),
            None => self.stops.step.filter(|done| *done).map(|_| ToyHit::Step),
        };
        if self.hit.is_some() {
            self.stops.step = None;
        }
        self.hit.is_some()
    }
}

impl ToyCpu {
    /// The same CPU, which writes down all that it comes to.
    pub fn watched(mut self) -> ToyCpu {
        self.debugger.seen = Some(Vec::new());
        self
    }

    /// What it has come to since this was asked last.
    pub fn take_seen(&mut self) -> Vec<Coming> {
        let seen = self.debugger.seen.as_mut();
        seen.map(std::mem::take).unwrap_or_default()
    }
}

impl Debuggable for ToyCpu {
    type Stops = ToyStops;
    type Hit = ToyHit;

    fn before(addresses: &[u64]) -> ToyStops {
        ToyStops {
            execution: addresses.to_vec(),
            ..ToyStops::default()
        }
    }

    fn or_arrival(stops: &ToyStops, address: u64, number: u64) -> ToyStops {
        ToyStops {
            arrival: Some((address, number)),
            ..stops.clone()
        }
    }

    fn after_one(&mut self) -> Result<ToyStops, Broken> {
        self.settle()?;
        Ok(ToyStops {
            step: Some(false),
            ..ToyStops::default()
        })
    }

    fn stop_at(&mut self, stops: &ToyStops) -> Result<(), Broken> {
        if stops.arrival != self.debugger.stops.arrival {
            self.debugger.arrivals = 0;
        }
        self.debugger.stops = stops.clone();
        Ok(())
    }

    fn stops_at_exit(&self) -> ToyStops {
        self.debugger.stops_at_exit.clone()
    }

    fn hit(&self) -> ToyHit {
        self.debugger.hit.expect("it has stopped")
    }

    fn stepped() -> ToyHit {
        ToyHit::Step
    }

    fn kind(hit: &ToyHit) -> HitKind {
        match hit {
            ToyHit::Data(_) => HitKind::Data,
            ToyHit::Execution(_) | ToyHit::Arrival(_) | ToyHit::Step => HitKind::Instruction,
        }
    }

    fn count_arrivals(&mut self, address: Option<u64>) -> Result<(), Broken> {
        self.debugger.counted = address.map(|address| (address, 0));
        Ok(())
    }

    fn arrivals(&self) -> u64 {
        self.debugger.counted.map_or(0, |(_, count)| count)
    }

    fn is_interrupted(&self) -> Result<bool, Broken> {
        // One that is delivered has changed the registers at once.
        Ok(false)
    }

    fn addresses_max(&self) -> usize {
        3
    }

    /// An instruction leads at most sixteen places on. A quarter of them is forgotten here, and so is each handler's.
    fn guesses(&mut self) -> Result<Vec<u64>, Broken> {
        let rip = Cpu::registers(self).rip();
        let before = |distance: u64| rip & !63 | rip.wrapping_sub(distance) & 63;
        let known = (1..=16).filter(|distance| distance % 4 != 0);
        Ok(known.map(before).collect())
    }
}
