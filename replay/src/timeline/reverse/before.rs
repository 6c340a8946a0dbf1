//! The instruction that was executed last, which no debug register tells.
//!
//! If its address is known, its place is: where that was come to last before the present place. So addresses are
//! guessed by the vCPU and tried: from there one step has to lead to the present place. Where no guess is right, the
//! stretch since the exit before is stepped through, which is as right, and slow.

use std::io::{Read, Seek};

use hindsight_devices::{Storage, StorageError};

use super::near_by::NearBy;
use super::place::{Name, Place};
use super::ways::{Alone, Passed, Ran};
use super::{Error, Reverse, ReverseError, Stopped, StoppedAt};
use crate::machine::{Cpu, Machine, StateError, Stateful};
use crate::timeline::checkpoint::Checkpoints;
use crate::timeline::reverse::{Debuggable, HitKind};
use crate::timeline::travel::{Pace, Target};

/// So many steps are taken on a stretch.
const STEPS_MAX: u64 = 1_000_000;

impl<C, S, R, K, M, F> Reverse<C, S, R, K, M>
where
    C: Debuggable + Stateful<Error = <C as Cpu>::Error>,
    S: Storage + Stateful<Error = StorageError>,
    R: Read + Seek,
    K: Checkpoints<C::State, S::State>,
    M: FnMut() -> Result<(Machine, C, S), F>,
{
    /// Goes to before the instruction that was executed last before `bound`, the present place.
    pub(super) fn go_before(
        &mut self,
        bound: Name,
        pace: &mut dyn Pace,
    ) -> Result<StoppedAt<C>, Error<C, F>> {
        let start = match bound {
            Name::Exit(0) => return Ok(Stopped::Begin),
            Name::Exit(exit) => exit - 1,
            Name::Arrival { exit, .. } => exit,
            Name::End => self.exit().saturating_sub(1),
        };
        let cpu = self.cpu()?;
        let guesses = cpu.guesses().map_err(StateError::Cpu)?;
        let room = cpu.addresses_max().max(1);
        for some in guesses.chunks(room) {
            match self.last_stop(start, bound, &C::before_guesses(some), pace)? {
                Passed::Last(Some(place)) => {
                    if self.step_leads_to(&place, bound)? {
                        self.go_to_place(&place, &mut Alone)?;
                        return Ok(Stopped::Hit(C::stepped()));
                    }
                }
                Passed::Last(None) | Passed::NoRoom(_) => {}
                Passed::Interrupted => return self.interrupted_at(bound),
            }
        }
        self.step_through(start, bound, pace)
    }

    /// Whether one step from `place` leads to `bound`. Where the vCPU is then, it is anyway.
    fn step_leads_to(&mut self, place: &Place<C::Stops>, bound: Name) -> Result<bool, Error<C, F>> {
        self.go_to_exit(place.exit, &mut Alone)?;
        let arrival = bound.arrival();
        let counted = arrival.filter(|_| bound.exit() == Some(place.exit));
        self.count_arrivals(counted.map(|(address, _)| address))?;
        self.walk(&place.legs, &mut Alone)?;
        let stops = self.after_one()?;
        self.stop_at(&stops)?;
        let target = match bound {
            Name::Exit(exit) => Target::Exit(exit),
            Name::Arrival { exit, .. } => Target::Exit(exit + 1),
            Name::End => Target::End,
        };
        self.legs.clear();
        let alone = &mut Alone;
        let mut near = NearBy::new(alone, self.here(), None);
        Ok(match self.run(target, &mut near)? {
            Ran::Stopped(hit) => {
                let is_stop = C::kind(&hit) != HitKind::NoRoom;
                is_stop && counted.is_some() && self.is_at(arrival)?
            }
            Ran::Reached => arrival.is_none(),
            Ran::Ended => bound == Name::End,
            Ran::Interrupted => false,
        })
    }

    /// Steps from the exit `start` to `bound`, and goes to where the last step began.
    fn step_through(
        &mut self,
        start: u64,
        bound: Name,
        pace: &mut dyn Pace,
    ) -> Result<StoppedAt<C>, Error<C, F>> {
        self.go_to_exit(start, &mut Alone)?;
        let mut address = self.registers()?.rip();
        let arrival = bound.arrival();
        self.count_arrivals(arrival.map(|(address, _)| address))?;
        let target = match bound {
            Name::End => Target::End,
            _ => Target::Exit(start + 1),
        };
        for _ in 0..STEPS_MAX {
            let stops = self.after_one()?;
            self.stop_at(&stops)?;
            let here = self.here();
            let is_there = match self.run(target, &mut NearBy::new(&mut Alone, here, None))? {
                Ran::Stopped(hit) if C::kind(&hit) == HitKind::NoRoom => {
                    return Err(ReverseError::NoRoom(hit));
                }
                Ran::Stopped(_) => self.is_at(arrival)?,
                Ran::Reached | Ran::Ended if arrival.is_none() => true,
                Ran::Reached if self.is_preempted_at(arrival) => true,
                ran => return Err(Self::lost(start, format!("a step came to {ran:?}"))),
            };
            if is_there {
                let passed = self.last_stop(start, bound, &C::before(&[address]), &mut Alone)?;
                let place = match passed {
                    Passed::Last(Some(place)) => place,
                    // It was the first instruction after the exit, of which nothing had run.
                    Passed::Last(None) => Place {
                        exit: start,
                        legs: Vec::new(),
                    },
                    _ => return Err(Self::lost(start, "the step before was not seen")),
                };
                self.go_to_place(&place, &mut Alone)?;
                return Ok(Stopped::Hit(C::stepped()));
            }
            if NearBy::new(pace, here, None).is_stopped() {
                return self.interrupted_at(bound);
            }
            address = self.registers()?.rip();
        }
        self.go_to_name(bound)?;
        Err(ReverseError::TooFar {
            exit: start,
            steps: STEPS_MAX,
        })
    }
}
