//! A replay under a debugger: it goes to any place of the recording, forwards and backwards, and the recording is what it
//! was.
//!
//! A **place** is an exit, and how to come from there to where the guest is: run to such and such stops, so many times.
//! That leads to the same instruction every time, for between two exits the guest computes alone. What matters for going
//! back is a name without a history: the address, and how often it was come to since the exit. It is found by going
//! the way once more and counting.
//!
//! **Backwards** is forwards twice, as in rr: over the stretch before, noting the last stop before the present place; then
//! to that stop. Stretches are taken from the last one backwards.

mod before;
mod kept;
mod place;
mod replaying;

use kept::{Kept, Timeline};
use place::{Leg, Name, Place, lost, no_room, way};
use replaying::{Ran, Replaying};

use std::path::PathBuf;

use hindsight_replay::{Registers, When};

use super::make::open_kvm;
use super::moments::{travel, until_moment};
use super::open::RecordedPaths;
use super::preemption_plan::CounterWish;
use super::recording::Recording;
use super::replay::Until;
use crate::disk::Disks;
use crate::doctor;
use crate::failure::{Failure, Kind};
use crate::kvm::{GuestMemory, GuestRegisters, Hit, Stops};

/// So many exits pass from one look at whether somebody wants it stopped to the next.
const LOOK_EVERY: u64 = 64;
/// A way of more legs than this is shortened.
const LEGS_MAX: usize = 256;
/// So many steps can be taken back without a search.
const STEPS_KEPT: usize = 256;

/// What is to be debugged.
#[derive(Clone, Debug)]
pub struct DebugWish {
    /// The recording.
    pub recording: PathBuf,
    /// Files that take the place of its own.
    pub instead: RecordedPaths,
    /// The counter that finds the places between exits at which the guest was preempted.
    pub counter: CounterWish,
    /// The moment to begin at; `None`: power-on.
    pub at: Option<When>,
}

/// Why a debugger has the guest back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// It is at a stop.
    Hit(Hit),
    /// It is where the recording begins.
    Begin,
    /// It is where the recording ends: how.
    End(String),
    /// Somebody wanted it stopped. It is at an exit.
    Interrupted,
}

/// Tells whether somebody wants a run stopped.
pub type Interrupted<'a> = &'a mut dyn FnMut() -> bool;

/// A replay under a debugger.
#[derive(Debug)]
pub struct Debugger {
    wish: DebugWish,
    replay: Replaying,
    timeline: Kept,
    legs: Vec<Leg>,
    /// Where the last steps began, oldest first.
    steps: Vec<Place>,
    /// Whether breakpoints work here, in ring 0 and in ring 3.
    breakpoints: [bool; 2],
}

impl Debugger {
    /// The recorded machine, where `wish` wants it.
    ///
    /// # Errors
    ///
    /// A recording or a host that will not do, or a host that failed on the way.
    pub fn open(wish: &DebugWish) -> Result<Debugger, Failure> {
        let (kvm, _) = open_kvm()?;
        let breakpoints = doctor::check_breakpoints(&kvm);
        let recording = Recording::at(&wish.recording);
        let exit = match &wish.at {
            None => 0,
            Some(when) => find_exit(wish, when)?,
        };
        let mut replay = Replaying::begin(recording, &wish.instead, &wish.counter)?;
        let timeline = Kept::at_power_on(&mut replay)?;
        let mut debugger = Debugger {
            wish: wish.clone(),
            replay,
            timeline,
            legs: Vec::new(),
            steps: Vec::new(),
            breakpoints,
        };
        debugger.seek(exit, &mut || false)?;
        Ok(debugger)
    }

    /// What cannot be done here for want of debug registers, if that is anything: a sentence.
    pub fn lacks(&self) -> Option<&'static str> {
        match self.breakpoints {
            [true, true] => None,
            [true, false] => Some(
                "guests of this host have no debug registers in ring 3: breakpoints and steps in programs do not stop \
                 there",
            ),
            _ => Some(
                "guests of this host have no debug registers: only exits can be gone to (monitor seek EXIT), and \
                 nothing between them",
            ),
        }
    }

    /// The last exit.
    pub fn exit(&self) -> u64 {
        self.replay.exit()
    }

    /// Guest time there, in nanoseconds.
    pub fn now_ns(&self) -> u64 {
        self.replay.now()
    }

    /// Whether the guest is at that exit, and has not run since.
    pub fn is_at_exit(&self) -> bool {
        self.replay.is_at_exit()
    }

    /// How the recording ends, if the guest is at its end.
    pub fn ended(&self) -> Option<&str> {
        self.replay.ended()
    }

    /// How many debug registers there are for breakpoints and watchpoints here.
    pub fn free_debug_registers(&self) -> usize {
        self.replay.free_debug_registers()
    }

    /// How many of them are left where the guest is led to a place, too.
    pub fn registers_for_stops(&self) -> usize {
        let led = usize::from(self.replay.is_led());
        self.free_debug_registers().saturating_sub(led)
    }

    /// Whether it is known where the guest is. After an error it may not be: then [`Debugger::seek`] an exit.
    pub fn is_found(&self) -> bool {
        self.is_at_exit() || self.ended().is_some() || !self.legs.is_empty()
    }

    /// All registers.
    ///
    /// # Errors
    ///
    /// KVM failed.
    pub fn registers(&mut self) -> Result<GuestRegisters, Failure> {
        self.replay.all_registers()
    }

    /// Reads memory of the present address space, as far as it is mapped; returns how many bytes.
    pub fn read(&mut self, gva: u64, buffer: &mut [u8]) -> usize {
        self.replay.read(gva, buffer)
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        self.replay.memory()
    }

    /// The guest's disks, as they are now.
    pub fn disks(&self) -> &Disks {
        self.replay.disks()
    }

    /// Goes to an exit, or to the end of the recording if that comes before.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn seek(&mut self, exit: u64, interrupted: Interrupted<'_>) -> Result<Stopped, Failure> {
        self.steps.clear();
        self.go_to_exit(exit.min(self.timeline.before(exit.saturating_add(1))))?;
        self.forward(&Stops::default(), Some(exit), interrupted)
    }

    /// Goes to a moment.
    ///
    /// # Errors
    ///
    /// There is none, the replay diverged, or the host failed.
    pub fn go_to_moment(
        &mut self,
        when: &When,
        interrupted: Interrupted<'_>,
    ) -> Result<Stopped, Failure> {
        let exit = find_exit(&self.wish, when)?;
        self.seek(exit, interrupted)
    }

    /// Runs on to the next stop.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn resume(
        &mut self,
        stops: &Stops,
        interrupted: Interrupted<'_>,
    ) -> Result<Stopped, Failure> {
        self.refuse_without_registers(stops)?;
        self.steps.clear();
        self.forward(stops, None, interrupted)
    }

    /// Takes one step. Where an instruction is an exit, the exit belongs to it; where an interrupt comes first, the step
    /// leads to its handler.
    ///
    /// # Errors
    ///
    /// This host's guests have no debug registers; the replay diverged, or the host failed.
    pub fn step(&mut self, interrupted: Interrupted<'_>) -> Result<Stopped, Failure> {
        self.refuse_steps()?;
        if self.replay.ended().is_some() {
            return self.forward(&Stops::default(), None, interrupted);
        }
        if self.legs.len() >= LEGS_MAX {
            self.shorten()?;
        }
        let from = self.place();
        let stops = self.one_step()?;
        let stopped = self.forward(&stops, None, interrupted)?;
        if matches!(stopped, Stopped::Hit(_)) {
            if self.steps.len() >= STEPS_KEPT {
                self.steps.remove(0);
            }
            self.steps.push(from);
        }
        Ok(stopped)
    }

    /// Runs back to the last stop before the present place. One that is of data is gone to before the access.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn reverse_resume(
        &mut self,
        stops: &Stops,
        interrupted: Interrupted<'_>,
    ) -> Result<Stopped, Failure> {
        self.refuse_without_registers(stops)?;
        self.steps.clear();
        let name = self.name()?;
        let mut bound = name;
        loop {
            let from = match bound {
                Name::Exit(0) => {
                    self.go_to_exit(0)?;
                    return Ok(Stopped::Begin);
                }
                Name::Exit(exit) => self.timeline.before(exit),
                Name::Arrival { exit, .. } => exit,
                Name::End => self.timeline.before(self.exit()),
            };
            match self.last_stop(from, bound, stops, interrupted)? {
                Passed::Last(Some(place)) => {
                    let hit = self.go_to(&place)?;
                    if let Some(Hit::Data(_)) = hit {
                        let name = self.name()?;
                        self.go_before(name, interrupted)?;
                    }
                    return Ok(hit.map_or(Stopped::Interrupted, Stopped::Hit));
                }
                Passed::Last(None) => bound = Name::Exit(from),
                Passed::NoRoom(hit) => {
                    self.go_to_name(name)?;
                    return Ok(Stopped::Hit(hit));
                }
                Passed::Interrupted => {
                    self.go_to_name(name)?;
                    return Ok(Stopped::Interrupted);
                }
            }
        }
    }

    /// Takes one step back: to before the instruction that was executed last.
    ///
    /// # Errors
    ///
    /// This host's guests have no debug registers; the replay diverged, or the host failed; the instruction was not
    /// found.
    pub fn reverse_step(&mut self, interrupted: Interrupted<'_>) -> Result<Stopped, Failure> {
        self.refuse_steps()?;
        if let Some(place) = self.steps.pop() {
            self.go_to(&place)?;
            return Ok(Stopped::Hit(Hit::Step));
        }
        let name = self.name()?;
        self.go_before(name, interrupted)
    }
}

/// The exit that is called so.
fn find_exit(wish: &DebugWish, when: &When) -> Result<u64, Failure> {
    let recording = Recording::at(&wish.recording);
    match until_moment(&recording, &wish.instead, when)? {
        Until::Exit(exit) => Ok(exit),
        _ => Ok(travel(&recording, &wish.instead, &wish.counter, when)?.1),
    }
}

/// What was seen on a stretch.
enum Passed {
    /// The last stop on it, if there was any.
    Last(Option<Place>),
    /// There were too few registers.
    NoRoom(Hit),
    Interrupted,
}

impl Debugger {
    fn refuse_steps(&self) -> Result<(), Failure> {
        match self.breakpoints[0] {
            true => Ok(()),
            false => Err(self.cannot()),
        }
    }

    fn refuse_without_registers(&self, stops: &Stops) -> Result<(), Failure> {
        match stops.is_empty() || self.breakpoints[0] {
            true => Ok(()),
            false => Err(self.cannot()),
        }
    }

    fn cannot(&self) -> Failure {
        Failure::new(Kind::Unfit, self.lacks().unwrap_or_default())
    }

    fn place(&self) -> Place {
        Place {
            exit: self.exit(),
            legs: self.legs.clone(),
        }
    }

    /// Stops that a step of the present instruction needs.
    fn one_step(&mut self) -> Result<Stops, Failure> {
        Ok(Stops {
            step: Some(self.replay.begin_step()?),
            ..Stops::default()
        })
    }

    /// Runs on to the next stop, to an exit, or to the end, and keeps the way.
    fn forward(
        &mut self,
        stops: &Stops,
        until: Option<u64>,
        interrupted: Interrupted<'_>,
    ) -> Result<Stopped, Failure> {
        self.replay.stop_at(stops.clone())?;
        let mut begun = self.exit();
        let reached = Stopped::Interrupted;
        if until == Some(begun) && self.is_at_exit() {
            return Ok(reached);
        }
        loop {
            let next = (self.exit() / LOOK_EVERY + 1) * LOOK_EVERY;
            let next = until.map_or(next, |until| next.min(until));
            match self.replay.run(Some(next))? {
                Ran::Stopped(hit) => {
                    // From an exit that it came through the way is shorter.
                    let stops = if self.exit() == begun {
                        stops.clone()
                    } else {
                        self.legs.clear();
                        self.replay.stops_at_exit()
                    };
                    self.legs.push(Leg { stops, times: 1 });
                    return Ok(Stopped::Hit(hit));
                }
                Ran::Ended => {
                    self.legs.clear();
                    let how = self.replay.ended().unwrap_or_default();
                    return Ok(Stopped::End(how.into()));
                }
                Ran::Reached => {
                    self.legs.clear();
                    begun = u64::MAX;
                    self.timeline.pass(&mut self.replay, false)?;
                    if until == Some(next) || interrupted() {
                        return Ok(reached);
                    }
                }
            }
        }
    }

    fn go_to_exit(&mut self, exit: u64) -> Result<(), Failure> {
        self.legs.clear();
        if self.timeline.go_to(&mut self.replay, exit)? {
            return Ok(());
        }
        let message = format!("the recording ends before exit {exit}");
        Err(Failure::new(Kind::BadInput, message))
    }

    /// Goes to a place where the guest has been. Tells why it stopped there.
    fn go_to(&mut self, place: &Place) -> Result<Option<Hit>, Failure> {
        self.go_to_exit(place.exit)?;
        self.timeline.pass(&mut self.replay, true)?;
        self.walk(&place.legs)
    }

    /// Goes on from an exit.
    fn walk(&mut self, legs: &[Leg]) -> Result<Option<Hit>, Failure> {
        let exit = self.exit();
        let mut hit = None;
        for leg in legs {
            self.replay.stop_at(leg.stops.clone())?;
            for _ in 0..leg.times {
                hit = match self.replay.run(None)? {
                    Ran::Stopped(Hit::NoRoom { wanted, free }) => {
                        return Err(no_room(wanted, free));
                    }
                    Ran::Stopped(hit) if self.exit() == exit => Some(hit),
                    ran => return Err(lost(exit, &format!("it came to {ran:?}"))),
                };
            }
        }
        self.legs = legs.to_vec();
        Ok(hit)
    }

    fn go_to_name(&mut self, name: Name) -> Result<(), Failure> {
        match name {
            Name::Exit(exit) => self.go_to_exit(exit),
            Name::Arrival { exit, .. } => {
                let legs = way(name);
                self.go_to(&Place { exit, legs }).map(drop)
            }
            Name::End => {
                self.replay.stop_at(Stops::default())?;
                self.legs.clear();
                match self.replay.run(None)? {
                    Ran::Ended => Ok(()),
                    _ => Err(lost(self.exit(), "it is not the end")),
                }
            }
        }
    }

    /// Names the present place, and is there afterwards.
    fn name(&mut self) -> Result<Name, Failure> {
        if self.replay.ended().is_some() {
            return Ok(Name::End);
        }
        let exit = self.exit();
        if self.legs.is_empty() {
            return Ok(Name::Exit(exit));
        }
        let Registers(registers) = self.replay.registers()?;
        let address = Registers(registers).rip();
        if let [
            Leg {
                stops:
                    Stops {
                        arrival: Some((at, number)),
                        ..
                    },
                ..
            },
        ] = self.legs[..]
            && at == address
        {
            return Ok(Name::Arrival {
                exit,
                address,
                number,
            });
        }
        let legs = std::mem::take(&mut self.legs);
        self.go_to_exit(exit)?;
        self.timeline.pass(&mut self.replay, true)?;
        // Without anything that comes first, the first instruction is the one at the exit itself.
        let first = self.replay.registers()?.rip() == address && !self.replay.is_interrupted()?;
        self.replay.count_arrivals(address)?;
        self.walk(&legs)?;
        let number = self.replay.arrivals();
        if self.replay.registers()?.0 != registers || number == 0 {
            return Err(lost(exit, "its registers are others"));
        }
        if first && number == 1 {
            self.go_to_exit(exit)?;
            return Ok(Name::Exit(exit));
        }
        let name = Name::Arrival {
            exit,
            address,
            number,
        };
        self.legs = way(name);
        Ok(name)
    }

    /// The way to the present place becomes a short one.
    fn shorten(&mut self) -> Result<(), Failure> {
        let name = self.name()?;
        self.go_to_name(name)
    }

    /// Runs from the exit `from` up to `bound`, and tells where it came to one of `stops` last.
    fn last_stop(
        &mut self,
        from: u64,
        bound: Name,
        stops: &Stops,
        interrupted: Interrupted<'_>,
    ) -> Result<Passed, Failure> {
        self.go_to_exit(from)?;
        self.timeline.pass(&mut self.replay, true)?;
        self.replay.stop_at(stops.clone())?;
        let mut last: Option<Place> = None;
        let (exit, arrival) = match bound {
            Name::Exit(exit) => (Some(exit), None),
            Name::Arrival {
                exit,
                address,
                number,
            } => (Some(exit), Some((address, number))),
            Name::End => (None, None),
        };
        loop {
            let in_last = exit == Some(self.exit());
            if in_last && self.is_at_exit() {
                if arrival.is_none() {
                    return Ok(Passed::Last(last));
                }
                let stops = stops.clone();
                self.replay.stop_at(Stops { arrival, ..stops })?;
            }
            let look = (self.exit() / LOOK_EVERY + 1) * LOOK_EVERY;
            let until = match exit {
                Some(_) if in_last => None,
                Some(exit) => Some(exit.min(look)),
                None => Some(look),
            };
            match self.replay.run(until)? {
                Ran::Stopped(Hit::Arrival(_)) if in_last => return Ok(Passed::Last(last)),
                Ran::Stopped(hit @ Hit::NoRoom { .. }) => return Ok(Passed::NoRoom(hit)),
                Ran::Stopped(_) => {
                    let exit = self.exit();
                    let times = match &last {
                        Some(place) if place.exit == exit => place.legs[0].times + 1,
                        _ => 1,
                    };
                    let stops = stops.clone();
                    let legs = vec![Leg { stops, times }];
                    last = Some(Place { exit, legs });
                }
                Ran::Reached => {
                    if !in_last {
                        self.timeline.pass(&mut self.replay, false)?;
                    }
                    if interrupted() {
                        return Ok(Passed::Interrupted);
                    }
                }
                Ran::Ended if bound == Name::End => return Ok(Passed::Last(last)),
                Ran::Ended => return Err(lost(self.exit(), "the recording ends")),
            }
        }
    }
}
