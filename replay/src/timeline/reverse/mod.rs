//! Going along a recording by instructions, forwards and backwards.
//!
//! A **place** is an exit, and how to come from there to where the guest is: run to such and such stops, so many times.
//! That leads to the same instruction every time, for between two exits the guest computes alone. What matters for going
//! back is a name without a history: the address, and how often it was come to since the exit. It is found by going
//! the way once more and counting.
//!
//! **Backwards** is forwards twice, as in rr: over the stretch before, noting the last stop before the present place; then
//! to that stop. Stretches are taken from the last one backwards. They begin at checkpoints and at states kept in memory, of
//! which there are the more the nearer they are to the present place.

mod before;
mod debuggable;
mod near_by;
mod place;

pub use debuggable::{Debuggable, HitKind};

use std::io::{Read, Seek};

use hindsight_devices::{Nanos, Storage, StorageError};
use thiserror::Error;

use super::checkpoint::{CheckpointHead, Checkpoints};
use super::travel::{Arrival, Pace, Pause, Target, Timeline, TravelError};
use crate::machine::{Cpu, Machine, Registers, StateError, StateOf, Stateful};
use near_by::NearBy;
use place::{Leg, Name, Place};

/// A way of more legs than this is shortened.
const LEGS_MAX: usize = 256;
/// So many steps can be taken back without a search.
const STEPS_KEPT: usize = 256;

/// Why whoever goes along a recording has the guest back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stopped<H> {
    /// It is at a stop.
    Hit(H),
    /// It is where the recording begins.
    Begin,
    /// It is where the recording ends: how.
    End(String),
    /// It is at the exit that it was to go to, or at one on the way because its pace wanted it stopped. A way back that is
    /// stopped leads to where it began.
    Interrupted,
}

/// Why the guest is not where it was to go. Where it is instead may not be known ([`Reverse::is_found`]).
#[derive(Debug, Error)]
pub enum ReverseError<E: std::error::Error, H, F> {
    /// The timeline failed.
    #[error("{0}")]
    Travel(TravelError<E, F>),
    /// The guest went another way than before.
    #[error(
        "a place after exit {exit} was not found again ({why}); go to an exit (monitor seek {exit})"
    )]
    Lost {
        /// The exit.
        exit: u64,
        /// What was found instead.
        why: String,
    },
    /// The vCPU cannot stop wherever it would have to on the way.
    #[error("the vCPU cannot stop wherever it would have to on the way")]
    NoRoom(H),
    /// There is no such exit.
    #[error("the recording ends before exit {0}")]
    EndsBefore(u64),
    /// The instruction before was not guessed, and is too far to step there.
    #[error(
        "the instruction before this one is more than {steps} steps after exit {exit}: go back by a breakpoint"
    )]
    TooFar {
        /// The exit.
        exit: u64,
        /// How many steps were taken.
        steps: u64,
    },
}

impl<E: std::error::Error, H, F> From<TravelError<E, F>> for ReverseError<E, H, F> {
    fn from(error: TravelError<E, F>) -> Self {
        ReverseError::Travel(error)
    }
}

impl<E: std::error::Error, H, F> From<StateError<E>> for ReverseError<E, H, F> {
    fn from(error: StateError<E>) -> Self {
        TravelError::State(error).into()
    }
}

/// A place of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(Name);

/// Why a recording with such a vCPU cannot be gone along.
type Error<C, F> = ReverseError<<C as Cpu>::Error, <C as Debuggable>::Hit, F>;
/// Where it was stopped.
type StoppedAt<C> = Stopped<<C as Debuggable>::Hit>;
/// A way to where it is.
type PlaceOf<C> = Place<<C as Debuggable>::Stops>;

/// A recording that is gone along by instructions.
///
/// Long ways ask their [`Pace`] at exits on the way; [`Pause::Stop`] stops them.
pub struct Reverse<C: Debuggable + Stateful, S: Stateful, R: Read, K, M> {
    timeline: Timeline<C, S, R, K, M>,
    /// How to come here from the last exit.
    legs: Vec<Leg<C::Stops>>,
    /// Where the last steps began, oldest first.
    steps: Vec<PlaceOf<C>>,
    /// How the recording ends, if this is its end.
    ended: Option<String>,
}

impl<C, S, R, K, M> std::fmt::Debug for Reverse<C, S, R, K, M>
where
    C: Debuggable + Stateful,
    S: Stateful,
    R: Read,
    K: std::fmt::Debug,
{
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reverse")
            .field("timeline", &self.timeline)
            .field("legs", &self.legs)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

/// How a stretch came to its end.
#[derive(Debug)]
enum Ran<H> {
    /// It is where it was to be stopped, between two exits.
    Stopped(H),
    /// It is at the exit that it was to go to.
    Reached,
    /// It is at an exit before, for it was wanted stopped.
    Interrupted,
    /// The recording ends here.
    Ended,
}

/// What was seen on a stretch.
enum Passed<C: Debuggable> {
    /// The last stop on it, if there was any.
    Last(Option<PlaceOf<C>>),
    /// There was no room for all stops.
    NoRoom(C::Hit),
    Interrupted,
}

impl<C, S, R, K, M, F> Reverse<C, S, R, K, M>
where
    C: Debuggable + Stateful<Error = <C as Cpu>::Error>,
    S: Storage + Stateful<Error = StorageError>,
    R: Read + Seek,
    K: Checkpoints<C::State, S::State>,
    M: FnMut() -> Result<(Machine, C, S), F>,
{
    /// Goes along `timeline`, from power-on.
    ///
    /// # Errors
    ///
    /// No machine can be made.
    pub fn new(
        mut timeline: Timeline<C, S, R, K, M>,
    ) -> Result<Reverse<C, S, R, K, M>, Error<C, F>> {
        timeline.come_near(Target::Exit(0))?;
        Ok(Reverse {
            timeline,
            legs: Vec::new(),
            steps: Vec::new(),
            ended: None,
        })
    }

    /// The timeline, for whoever looks for something on it. When it has been moved, [`Reverse::go_to`] says where to.
    pub fn timeline(&mut self) -> Result<&mut Timeline<C, S, R, K, M>, Error<C, F>> {
        self.quiet()?;
        self.legs.clear();
        self.steps.clear();
        self.ended = None;
        Ok(&mut self.timeline)
    }

    /// The vCPU.
    ///
    /// # Errors
    ///
    /// There is none, for it could not be made.
    pub fn cpu(&mut self) -> Result<&mut C, Error<C, F>> {
        let parts = self.timeline.parts();
        let (_, cpu, _) = parts.ok_or_else(|| Self::lost(0, "there is no machine"))?;
        Ok(cpu)
    }

    /// The machine and its vCPU, to look at.
    pub fn machine(&self) -> Option<(&Machine, &C)> {
        self.timeline.machine()
    }

    /// The machine's disks, to look at.
    pub fn disks(&self) -> Option<&S> {
        self.timeline.disks()
    }

    /// The last exit.
    pub fn exit(&self) -> u64 {
        self.machine().map_or(0, |(machine, _)| machine.at().exits)
    }

    /// Guest time there.
    pub fn now(&self) -> Nanos {
        self.machine().map_or(0, |(machine, _)| machine.now())
    }

    /// Whether nothing of the guest has run since the last exit, and the recording goes on.
    pub fn is_at_exit(&self) -> bool {
        self.ended.is_none() && self.timeline.is_at_exit()
    }

    /// How the recording ends, if this is its end.
    pub fn ended(&self) -> Option<&str> {
        self.ended.as_deref()
    }

    /// Whether it is known where the guest is. After an error it may not be: then go to an exit.
    pub fn is_found(&self) -> bool {
        self.is_at_exit() || self.ended.is_some() || !self.legs.is_empty()
    }

    /// The whole state at this exit.
    ///
    /// # Errors
    ///
    /// It is not at an exit.
    pub fn save(&mut self) -> Result<StateOf<C, S>, StateError<<C as Cpu>::Error>> {
        self.timeline.save()
    }

    /// The general registers, with the last exit's instruction finished.
    ///
    /// # Errors
    ///
    /// The host failed.
    pub fn registers(&mut self) -> Result<Registers, Error<C, F>> {
        let cpu = self.cpu()?;
        cpu.settle().map_err(StateError::Cpu)?;
        Ok(cpu.registers())
    }

    /// Marks the present place, to come back to.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn mark(&mut self) -> Result<Mark, Error<C, F>> {
        self.name().map(Mark)
    }

    /// Goes to a place that was marked.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn go_to_mark(&mut self, mark: Mark) -> Result<(), Error<C, F>> {
        self.steps.clear();
        self.go_to_name(mark.0)
    }

    /// Goes to a target, or to the end of the recording if that comes before.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn go_to(
        &mut self,
        target: Target,
        pace: &mut dyn Pace,
    ) -> Result<StoppedAt<C>, Error<C, F>> {
        self.timeline()?.come_near(target)?;
        self.quiet()?;
        let stopped = self.forward(&C::Stops::default(), target, pace)?;
        if self.is_at_exit() {
            self.timeline.keep_here()?;
        }
        Ok(stopped)
    }

    /// Runs on to the next stop.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn resume(
        &mut self,
        stops: &C::Stops,
        pace: &mut dyn Pace,
    ) -> Result<StoppedAt<C>, Error<C, F>> {
        self.steps.clear();
        self.forward(stops, Target::End, pace)
    }

    /// Takes one step. Where an instruction is an exit, the exit belongs to it; where an interrupt comes first, the step
    /// leads to its handler.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn step(&mut self, pace: &mut dyn Pace) -> Result<StoppedAt<C>, Error<C, F>> {
        if let Some(how) = &self.ended {
            return Ok(Stopped::End(how.clone()));
        }
        if self.legs.len() >= LEGS_MAX {
            let name = self.name()?;
            self.go_to_name(name)?;
        }
        let from = self.place();
        let stops = self.after_one()?;
        let stopped = self.forward(&stops, Target::End, pace)?;
        match &stopped {
            Stopped::Hit(hit) if C::kind(hit) == HitKind::NoRoom => {}
            Stopped::Hit(_) | Stopped::End(_) => {
                if self.steps.len() >= STEPS_KEPT {
                    self.steps.remove(0);
                }
                self.steps.push(from);
            }
            Stopped::Begin | Stopped::Interrupted => self.steps.clear(),
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
        stops: &C::Stops,
        pace: &mut dyn Pace,
    ) -> Result<StoppedAt<C>, Error<C, F>> {
        self.steps.clear();
        let name = self.name()?;
        let mut bound = name;
        loop {
            let from = match bound {
                Name::Exit(0) => {
                    self.go_to_exit(0, &mut Alone)?;
                    return Ok(Stopped::Begin);
                }
                Name::Exit(exit) => self.timeline.last_before(exit),
                Name::Arrival { exit, .. } => exit,
                Name::End => self.timeline.last_before(self.exit()),
            };
            let place = match self.last_stop(from, bound, stops, pace)? {
                Passed::Last(Some(place)) => place,
                Passed::Last(None) => {
                    bound = Name::Exit(from);
                    continue;
                }
                Passed::NoRoom(hit) => {
                    self.go_to_name(name)?;
                    return Ok(Stopped::Hit(hit));
                }
                Passed::Interrupted => return self.interrupted_at(name),
            };
            if !self.go_to_place(&place, pace)? {
                return self.interrupted_at(name);
            }
            let hit = self.cpu()?.hit();
            if C::kind(&hit) == HitKind::Data {
                let after = self.name()?;
                if self.go_before(after, pace)? == Stopped::Interrupted {
                    return self.interrupted_at(name);
                }
            }
            return Ok(Stopped::Hit(hit));
        }
    }

    /// Takes one step back: to before the instruction that was executed last.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed; the instruction was not found.
    pub fn reverse_step(&mut self, pace: &mut dyn Pace) -> Result<StoppedAt<C>, Error<C, F>> {
        let Some(before) = self.steps.pop() else {
            let name = self.name()?;
            return self.go_before(name, pace);
        };
        let (here, is_end) = (self.place(), self.ended.is_some());
        if self.go_to_place(&before, pace)? {
            return Ok(Stopped::Hit(C::stepped()));
        }
        self.steps.push(before);
        match is_end {
            true => self.go_to_name(Name::End)?,
            false => drop(self.go_to_place(&here, &mut Alone)?),
        }
        Ok(Stopped::Interrupted)
    }

    fn place(&self) -> PlaceOf<C> {
        Place {
            exit: self.exit(),
            legs: self.legs.clone(),
        }
    }

    fn here(&self) -> CheckpointHead {
        CheckpointHead {
            exits: self.exit(),
            now: self.now(),
        }
    }

    fn lost(exit: u64, why: impl Into<String>) -> Error<C, F> {
        let why = why.into();
        ReverseError::Lost { exit, why }
    }

    /// Stops the vCPU nowhere.
    fn quiet(&mut self) -> Result<(), Error<C, F>> {
        if self.machine().is_none() {
            return Ok(());
        }
        self.stop_at(&C::Stops::default())?;
        self.count_arrivals(None)
    }

    fn stop_at(&mut self, stops: &C::Stops) -> Result<(), Error<C, F>> {
        Ok(self.cpu()?.stop_at(stops).map_err(StateError::Cpu)?)
    }

    fn count_arrivals(&mut self, address: Option<u64>) -> Result<(), Error<C, F>> {
        let counted = self.cpu()?.count_arrivals(address);
        Ok(counted.map_err(StateError::Cpu)?)
    }

    /// Whether it has come to where `arrival` says, which is being counted.
    fn is_at(&mut self, arrival: Option<(u64, u64)>) -> Result<bool, Error<C, F>> {
        let here = (self.registers()?.rip(), self.cpu()?.arrivals());
        Ok(arrival == Some(here))
    }

    /// Stops after one step.
    fn after_one(&mut self) -> Result<C::Stops, Error<C, F>> {
        Ok(self.cpu()?.after_one().map_err(StateError::Cpu)?)
    }

    /// Runs on to its next stop; without stops to `target`.
    fn run(&mut self, target: Target, near: &mut NearBy<'_>) -> Result<Ran<C::Hit>, Error<C, F>> {
        if self.ended.is_some() {
            return Ok(Ran::Ended);
        }
        near.go_on(self.exit());
        let how = match self.timeline.run_to(target, near, &mut ())? {
            Arrival::Reached => return Ok(Ran::Reached),
            Arrival::Stopped => return Ok(Ran::Interrupted),
            Arrival::AtStop => return Ok(Ran::Stopped(self.cpu()?.hit())),
            Arrival::Ended(end) => end.to_string(),
            Arrival::CutShort(tail) => tail.to_string(),
        };
        self.ended = Some(how);
        Ok(Ran::Ended)
    }

    /// Runs on to the next stop, to `target`, or to the end, and keeps the way.
    fn forward(
        &mut self,
        stops: &C::Stops,
        target: Target,
        pace: &mut dyn Pace,
    ) -> Result<StoppedAt<C>, Error<C, F>> {
        self.stop_at(stops)?;
        let begun = self.exit();
        let to = match target {
            Target::Exit(exit) => Some(exit),
            Target::Time(_) | Target::End => None,
        };
        // Until it has got there it is not known where it is.
        let legs = std::mem::take(&mut self.legs);
        let ran = self.run(target, &mut NearBy::new(pace, self.here(), to))?;
        if self.exit() == begun {
            self.legs = legs;
        }
        match ran {
            Ran::Stopped(hit) if C::kind(&hit) == HitKind::NoRoom => {
                // Where that was noticed is no place.
                let place = self.place();
                self.go_to_place(&place, &mut Alone)?;
                Ok(Stopped::Hit(hit))
            }
            Ran::Stopped(hit) => {
                // From an exit that it came through the way is shorter.
                let stops = match self.exit() == begun {
                    true => stops.clone(),
                    false => self.cpu()?.stops_at_exit(),
                };
                self.legs.push(Leg::Stops { stops, times: 1 });
                Ok(Stopped::Hit(hit))
            }
            Ran::Ended => {
                self.legs.clear();
                Ok(Stopped::End(self.ended.clone().unwrap_or_default()))
            }
            Ran::Reached | Ran::Interrupted => {
                self.legs.clear();
                Ok(Stopped::Interrupted)
            }
        }
    }

    /// Goes to an exit, and keeps the state there. `false`: it was wanted stopped on the way.
    fn go_to_exit(&mut self, exit: u64, pace: &mut dyn Pace) -> Result<bool, Error<C, F>> {
        self.legs.clear();
        self.ended = None;
        self.timeline.come_near(Target::Exit(exit))?;
        self.quiet()?;
        let mut near = NearBy::new(pace, self.here(), Some(exit));
        match self.run(Target::Exit(exit), &mut near)? {
            Ran::Reached => {
                self.timeline.keep_here()?;
                Ok(true)
            }
            Ran::Interrupted => Ok(false),
            Ran::Ended => Err(ReverseError::EndsBefore(exit)),
            ran @ Ran::Stopped(_) => Err(Self::lost(exit, format!("it came to {ran:?}"))),
        }
    }

    /// Goes to a place where the guest has been. `false`: it was wanted stopped on the way.
    fn go_to_place(
        &mut self,
        place: &PlaceOf<C>,
        pace: &mut dyn Pace,
    ) -> Result<bool, Error<C, F>> {
        Ok(self.go_to_exit(place.exit, pace)? && self.walk(&place.legs, pace)?)
    }

    /// Goes on from an exit.
    fn walk(&mut self, legs: &[Leg<C::Stops>], pace: &mut dyn Pace) -> Result<bool, Error<C, F>> {
        let exit = self.exit();
        let mut near = NearBy::new(pace, self.here(), Some(exit));
        for leg in legs {
            let (stops, times) = match leg {
                Leg::Stops { stops, times } => (stops.clone(), *times),
                Leg::Arrival { address, number } => {
                    let none = C::Stops::default();
                    (C::or_arrival(&none, *address, *number), 1)
                }
            };
            self.stop_at(&stops)?;
            for _ in 0..times {
                match self.run(Target::Exit(exit + 1), &mut near)? {
                    Ran::Stopped(hit) if C::kind(&hit) == HitKind::NoRoom => {
                        return Err(ReverseError::NoRoom(hit));
                    }
                    Ran::Stopped(_) if self.exit() == exit => {}
                    ran => return Err(Self::lost(exit, format!("it came to {ran:?}"))),
                }
                if near.is_stopped() {
                    return Ok(false);
                }
            }
        }
        self.legs = legs.to_vec();
        Ok(true)
    }

    /// Goes back to where it was, whatever is wanted meanwhile.
    fn go_to_name(&mut self, name: Name) -> Result<(), Error<C, F>> {
        let exit = match name {
            Name::Exit(exit) | Name::Arrival { exit, .. } => exit,
            Name::End => {
                self.timeline()?.come_near(Target::End)?;
                return match self.forward(&C::Stops::default(), Target::End, &mut Alone)? {
                    Stopped::End(_) => Ok(()),
                    _ => Err(Self::lost(self.exit(), "it is not the end")),
                };
            }
        };
        let arrival = name.arrival();
        let legs = arrival.map(|(address, number)| Leg::Arrival { address, number });
        let legs = legs.into_iter().collect();
        self.go_to_place(&Place { exit, legs }, &mut Alone)?;
        Ok(())
    }

    /// A way back was stopped, which began there.
    fn interrupted_at(&mut self, name: Name) -> Result<StoppedAt<C>, Error<C, F>> {
        self.go_to_name(name)?;
        Ok(Stopped::Interrupted)
    }

    /// Names the present place, and is there afterwards.
    fn name(&mut self) -> Result<Name, Error<C, F>> {
        if self.ended.is_some() {
            return Ok(Name::End);
        }
        let exit = self.exit();
        if self.legs.is_empty() {
            return Ok(Name::Exit(exit));
        }
        let registers = self.registers()?;
        let address = registers.rip();
        if let [
            Leg::Arrival {
                address: at,
                number,
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
        self.go_to_exit(exit, &mut Alone)?;
        // Without anything that comes first, the first instruction is the one at the exit itself.
        let interrupted = self.cpu()?.is_interrupted().map_err(StateError::Cpu)?;
        let first = self.registers()?.rip() == address && !interrupted;
        self.count_arrivals(Some(address))?;
        self.walk(&legs, &mut Alone)?;
        let number = self.cpu()?.arrivals();
        if self.registers()? != registers || number == 0 {
            return Err(Self::lost(exit, "its registers are others"));
        }
        if first && number == 1 {
            self.go_to_exit(exit, &mut Alone)?;
            return Ok(Name::Exit(exit));
        }
        self.legs = vec![Leg::Arrival { address, number }];
        Ok(Name::Arrival {
            exit,
            address,
            number,
        })
    }

    /// Runs from the exit `from` up to `bound`, and tells where it came to one of `stops` last.
    fn last_stop(
        &mut self,
        from: u64,
        bound: Name,
        stops: &C::Stops,
        pace: &mut dyn Pace,
    ) -> Result<Passed<C>, Error<C, F>> {
        if !self.go_to_exit(from, pace)? {
            return Ok(Passed::Interrupted);
        }
        self.stop_at(stops)?;
        let (exit, arrival) = (bound.exit(), bound.arrival());
        let mut near = NearBy::new(pace, self.here(), exit);
        let mut last: Option<PlaceOf<C>> = None;
        loop {
            let in_last = exit == Some(self.exit());
            if in_last && self.is_at_exit() {
                let Some((address, number)) = arrival else {
                    return Ok(Passed::Last(last));
                };
                self.count_arrivals(Some(address))?;
                self.stop_at(&C::or_arrival(stops, address, number))?;
            }
            let target = match exit {
                Some(exit) => Target::Exit(exit + u64::from(in_last)),
                None => Target::End,
            };
            let hit = match self.run(target, &mut near)? {
                Ran::Stopped(hit) => hit,
                Ran::Reached if !in_last => continue,
                Ran::Reached if Some(self.registers()?.rip()) == arrival.map(|(at, _)| at) => {
                    // The guest was preempted right there.
                    return Ok(Passed::Last(last));
                }
                Ran::Interrupted => return Ok(Passed::Interrupted),
                Ran::Ended if bound == Name::End => return Ok(Passed::Last(last)),
                Ran::Reached | Ran::Ended => {
                    return Err(Self::lost(self.exit(), "it does not come there"));
                }
            };
            let kind = C::kind(&hit);
            if kind == HitKind::NoRoom {
                return Ok(Passed::NoRoom(hit));
            }
            let is_bound = in_last && self.is_at(arrival)?;
            // What has accessed data has done so before it came here.
            if !is_bound || kind == HitKind::Data {
                let exit = self.exit();
                let before = match last.as_ref().map(|place| (place.exit, &place.legs[..])) {
                    Some((at, [Leg::Stops { times, .. }])) if at == exit => *times,
                    _ => 0,
                };
                let stops = stops.clone();
                let times = before + 1;
                let legs = vec![Leg::Stops { stops, times }];
                last = Some(Place { exit, legs });
            }
            if is_bound {
                return Ok(Passed::Last(last));
            }
            if near.is_stopped() {
                return Ok(Passed::Interrupted);
            }
        }
    }
}

/// The pace of short ways that nobody stops.
struct Alone;

impl Pace for Alone {
    fn exits(&self) -> u64 {
        u64::MAX
    }

    fn look(&mut self, _: CheckpointHead) -> Pause {
        Pause::GoOn
    }
}
