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
//!
//! **Diversions** leave the recording, and end where they began (`diversion.rs`).

mod before;
mod debuggable;
mod diversion;
mod near_by;
mod place;
mod ways;

pub use debuggable::{Debuggable, HitKind};

use std::io::{Read, Seek};

use hindsight_devices::{Nanos, Storage, StorageError};
use thiserror::Error;

use super::checkpoint::Checkpoints;
use super::travel::{Pace, Target, Timeline, TravelError};
use crate::machine::{Cpu, Machine, Registers, StateError, StateOf, Stateful};
use diversion::Diversion;
use place::{Leg, Name, Place};
use ways::{Alone, Passed};

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
    /// It is the end of the recording, with which no diversion can begin.
    #[error(
        "the recording ends here, and nothing goes on from its end: go back before writing (monitor seek end-1)"
    )]
    NothingGoesOn,
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
/// What comes of going along it.
type Outcome<T, C, F> = Result<T, Error<C, F>>;
/// Where it was stopped.
type StoppedAt<C> = Stopped<<C as Debuggable>::Hit>;
/// A way to where it is.
type PlaceOf<C> = Place<<C as Debuggable>::Stops>;

/// A recording that is gone along by instructions.
///
/// Long ways ask their [`Pace`] at exits on the way; [`Pause::Stop`](super::Pause::Stop) stops them.
pub struct Reverse<C: Debuggable + Stateful, S: Stateful, R: Read, K, M> {
    timeline: Timeline<C, S, R, K, M>,
    /// How to come here from the last exit.
    legs: Vec<Leg<C::Stops>>,
    /// Where the last steps began, oldest first.
    steps: Vec<PlaceOf<C>>,
    /// How the recording ends, if this is its end; or the diversion.
    ended: Option<String>,
    diversion: Option<Diversion>,
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
            .field("diversion", &self.diversion)
            .finish_non_exhaustive()
    }
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
    pub fn new(mut timeline: Timeline<C, S, R, K, M>) -> Result<Self, Error<C, F>> {
        timeline.come_near(Target::Exit(0))?;
        Ok(Reverse {
            timeline,
            legs: Vec::new(),
            steps: Vec::new(),
            ended: None,
            diversion: None,
        })
    }

    /// The timeline, for whoever looks for something on it. When it has been moved, [`Reverse::go_to`] says where to. A
    /// diversion is over.
    pub fn timeline(&mut self) -> Outcome<&mut Timeline<C, S, R, K, M>, C, F> {
        self.quiet()?;
        self.legs.clear();
        self.steps.clear();
        (self.ended, self.diversion) = (None, None);
        Ok(&mut self.timeline)
    }

    /// What was wrong with checkpoints since this was asked last: it has cost time.
    pub fn take_complaints(&mut self) -> Vec<String> {
        self.timeline.take_complaints()
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

    /// How the recording ends, if this is its end; or how the diversion does.
    pub fn ended(&self) -> Option<&str> {
        self.ended.as_deref()
    }

    /// Whether it is known where the guest is. After an error it may not be: then go to an exit.
    pub fn is_found(&self) -> bool {
        let is_named = self.ended.is_some() || !self.legs.is_empty();
        self.is_at_exit() || is_named || self.diversion.is_some()
    }

    /// The whole state at this exit.
    ///
    /// # Errors
    ///
    /// It is not at an exit of the recording.
    pub fn save(&mut self) -> Result<StateOf<C, S>, StateError<<C as Cpu>::Error>> {
        if self.diversion.is_some() {
            return Err(StateError::NotAtAnExit);
        }
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

    /// Marks the present place, to come back to. A diversion ends: it is the place where it began.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn mark(&mut self) -> Result<Mark, Error<C, F>> {
        self.end_diversion()?;
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
            self.timeline.keep_near()?;
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
        if self.diversion.is_some() {
            return self.go_on_diverted(stops, pace);
        }
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
        if self.diversion.is_some() {
            let stops = self.after_one()?;
            return self.go_on_diverted(&stops, pace);
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
        self.end_diversion()?;
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
        self.end_diversion()?;
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
}
