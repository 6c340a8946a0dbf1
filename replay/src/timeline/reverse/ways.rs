//! Ways from stop to stop and from exit to exit, and the names of where they lead.

use std::io::{Read, Seek};

use hindsight_devices::{Storage, StorageError};

use super::near_by::NearBy;
use super::place::{Leg, Name, Place};
use super::{Debuggable, Error, HitKind, PlaceOf, Reverse, ReverseError, Stopped, StoppedAt};
use crate::machine::{Cpu, Machine, StateError, Stateful};
use crate::timeline::checkpoint::{CheckpointHead, Checkpoints};
use crate::timeline::travel::{Arrival, Pace, Pause, Target};

/// How a stretch came to its end.
#[derive(Debug)]
pub(super) enum Ran<H> {
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
pub(super) enum Passed<C: Debuggable> {
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
    pub(super) fn place(&self) -> PlaceOf<C> {
        Place {
            exit: self.exit(),
            legs: self.legs.clone(),
        }
    }

    pub(super) fn here(&self) -> CheckpointHead {
        CheckpointHead {
            exits: self.exit(),
            now: self.now(),
            cost: 0,
        }
    }

    pub(super) fn lost(exit: u64, why: impl Into<String>) -> Error<C, F> {
        let why = why.into();
        ReverseError::Lost { exit, why }
    }

    /// Stops the vCPU nowhere.
    pub(super) fn quiet(&mut self) -> Result<(), Error<C, F>> {
        if self.machine().is_none() {
            return Ok(());
        }
        self.stop_at(&C::Stops::default())?;
        self.count_arrivals(None)
    }

    pub(super) fn stop_at(&mut self, stops: &C::Stops) -> Result<(), Error<C, F>> {
        Ok(self.cpu()?.stop_at(stops).map_err(StateError::Cpu)?)
    }

    pub(super) fn count_arrivals(&mut self, address: Option<u64>) -> Result<(), Error<C, F>> {
        let counted = self.cpu()?.count_arrivals(address);
        Ok(counted.map_err(StateError::Cpu)?)
    }

    /// Whether it has come to where `arrival` says, which is being counted.
    pub(super) fn is_at(&mut self, arrival: Option<(u64, u64)>) -> Result<bool, Error<C, F>> {
        let here = (self.registers()?.rip(), self.cpu()?.arrivals());
        Ok(arrival == Some(here))
    }

    /// Whether the exit that it is at is one at which it was preempted there, before it could be stopped.
    pub(super) fn is_preempted_at(&self, arrival: Option<(u64, u64)>) -> bool {
        let at = self.machine().map(|(machine, _)| machine.at());
        let preempted = at.filter(|at| at.branches != 0);
        preempted.is_some_and(|at| arrival.is_some_and(|(address, _)| at.rip == address))
    }

    /// Stops after one step.
    pub(super) fn after_one(&mut self) -> Result<C::Stops, Error<C, F>> {
        Ok(self.cpu()?.after_one().map_err(StateError::Cpu)?)
    }

    /// Runs on to its next stop; without stops to `target`.
    pub(super) fn run(
        &mut self,
        target: Target,
        near: &mut NearBy<'_>,
    ) -> Result<Ran<C::Hit>, Error<C, F>> {
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
    pub(super) fn forward(
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
    pub(super) fn go_to_exit(
        &mut self,
        exit: u64,
        pace: &mut dyn Pace,
    ) -> Result<bool, Error<C, F>> {
        self.legs.clear();
        (self.ended, self.diversion) = (None, None);
        self.timeline.come_near(Target::Exit(exit))?;
        self.quiet()?;
        let mut near = NearBy::new(pace, self.here(), Some(exit));
        match self.run(Target::Exit(exit), &mut near)? {
            Ran::Reached => {
                self.timeline.keep_near()?;
                Ok(true)
            }
            Ran::Interrupted => Ok(false),
            Ran::Ended => Err(ReverseError::EndsBefore(exit)),
            ran @ Ran::Stopped(_) => Err(Self::lost(exit, format!("it came to {ran:?}"))),
        }
    }

    /// Goes to a place where the guest has been. `false`: it was wanted stopped on the way.
    pub(super) fn go_to_place(
        &mut self,
        place: &PlaceOf<C>,
        pace: &mut dyn Pace,
    ) -> Result<bool, Error<C, F>> {
        Ok(self.go_to_exit(place.exit, pace)? && self.walk(&place.legs, pace)?)
    }

    /// Goes on from an exit.
    pub(super) fn walk(
        &mut self,
        legs: &[Leg<C::Stops>],
        pace: &mut dyn Pace,
    ) -> Result<bool, Error<C, F>> {
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
                    Ran::Reached if self.is_preempted_at(leg.arrival()) => return Ok(true),
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
    pub(super) fn go_to_name(&mut self, name: Name) -> Result<(), Error<C, F>> {
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
    pub(super) fn interrupted_at(&mut self, name: Name) -> Result<StoppedAt<C>, Error<C, F>> {
        self.go_to_name(name)?;
        Ok(Stopped::Interrupted)
    }

    /// Names the present place, and is there afterwards.
    pub(super) fn name(&mut self) -> Result<Name, Error<C, F>> {
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
    pub(super) fn last_stop(
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
                Ran::Reached if self.is_preempted_at(arrival) => return Ok(Passed::Last(last)),
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
pub(super) struct Alone;

impl Pace for Alone {
    fn exits(&self) -> u64 {
        u64::MAX
    }

    fn look(&mut self, _: CheckpointHead) -> Pause {
        Pause::GoOn
    }
}
