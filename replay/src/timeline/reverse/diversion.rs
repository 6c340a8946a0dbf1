//! Diversions: what becomes of the machine if something in it is changed.
//!
//! A diversion begins at a place of the recording, where the vCPU or its memory is written to. From then on the machine runs
//! on by itself: no journal says what happens, and nobody is outside ([`Nobody`](crate::Nobody)). Whoever goes back, or to
//! a place of the recording, ends it, and it is thrown away: the machine is put where it was by a state that was saved,
//! so of all that was written and done nothing is left.

use std::io::{Read, Seek};

use hindsight_devices::{Storage, StorageError};

use super::place::Name;
use super::{Debuggable, Error, Outcome, Reverse, ReverseError, Stopped, StoppedAt};
use crate::machine::{Cpu, Machine, StateError, Stateful};
use crate::timeline::checkpoint::Checkpoints;
use crate::timeline::travel::{Arrival, Pace};

/// A diversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Diversion {
    /// The place where it began.
    from: Name,
    /// The last exit there.
    exit: u64,
}

impl<C, S, R, K, M, F> Reverse<C, S, R, K, M>
where
    C: Debuggable + Stateful<Error = <C as Cpu>::Error>,
    S: Storage + Stateful<Error = StorageError>,
    R: Read + Seek,
    K: Checkpoints<C::State, S::State>,
    M: FnMut() -> Result<(Machine, C, S), F>,
{
    /// Begins a diversion here, if there is none: gives the vCPU and its memory to be written to, with the last exit's
    /// instruction finished. With `wakes` it is not halted any more.
    ///
    /// # Errors
    ///
    /// It is the end of the recording, or the host failed.
    pub fn divert(&mut self, wakes: bool) -> Outcome<&mut C, C, F> {
        if self.ended.is_some() {
            return Err(ReverseError::NothingGoesOn);
        }
        if self.diversion.is_none() {
            let from = self.name()?;
            if self.is_at_exit() {
                // Else the way back may be long.
                self.timeline.keep_near()?;
            }
            let exit = self.exit();
            self.timeline.leave_recording();
            self.diversion = Some(Diversion { from, exit });
        }
        let parts = self.timeline.parts();
        let (machine, cpu, _) = parts.ok_or_else(|| Self::lost(0, "there is no machine"))?;
        cpu.settle().map_err(StateError::Cpu)?;
        if wakes {
            machine.wake();
        }
        Ok(cpu)
    }

    /// The last exit before the diversion that there is.
    pub fn diversion(&self) -> Option<u64> {
        self.diversion.map(|diversion| diversion.exit)
    }

    /// Ends the diversion, if there is one: everything is what it was where it began.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn end_diversion(&mut self) -> Outcome<(), C, F> {
        match self.diversion {
            None => Ok(()),
            Some(diversion) => self.go_to_name(diversion.from),
        }
    }

    /// Runs on to the next stop, in the diversion that there is. If the host fails there it has ended.
    pub(super) fn go_on_diverted(
        &mut self,
        stops: &C::Stops,
        pace: &mut dyn Pace,
    ) -> Result<StoppedAt<C>, Error<C, F>> {
        if let Some(how) = &self.ended {
            return Ok(Stopped::End(how.clone()));
        }
        self.stop_at(stops)?;
        pace.begin(self.exit(), None);
        match self.timeline.run_off(pace) {
            Ok(Arrival::AtStop) => Ok(Stopped::Hit(self.cpu()?.hit())),
            Ok(Arrival::Ended(end)) => {
                let how = end.to_string();
                self.ended = Some(how.clone());
                Ok(Stopped::End(how))
            }
            Ok(Arrival::Stopped | Arrival::Reached | Arrival::CutShort(_)) => {
                Ok(Stopped::Interrupted)
            }
            Err(error) => {
                self.end_diversion()?;
                Err(error.into())
            }
        }
    }
}
