//! The door of a machine that is run off its recording: there is nobody outside.
//!
//! Nothing comes in, and nobody hears what goes out. Time follows the rule, and skips to the next timer where the guest is
//! halted; so what the machine does is decided by its state alone.

use hindsight_devices::{FirstReads, Input, Nanos, Room};

use super::closed::Closed;
use crate::journal::TIME_MAX;
use crate::machine::{
    Complete, Digest, End, Ending, FullDigest, Horizon, LeftOpen, Moment, Outside, Position,
    TimeQuery, Turn,
};

/// The door.
#[derive(Debug, Default)]
pub struct Nobody {
    until: Option<u64>,
}

impl Nobody {
    /// Closes after exit `until`; and in any case where the vCPU is stopped or kicked.
    pub fn close_after(&mut self, until: u64) {
        self.until = Some(until);
    }
}

impl Outside for Nobody {
    type Closed = Closed;

    fn time(&mut self, query: &TimeQuery) -> Result<Nanos, Closed> {
        let waits_for_ever = query.halted && query.deadline.is_none();
        match waits_for_ever || query.rule > TIME_MAX {
            true => Err(Closed::End(Ending::Halted)),
            false => Ok(query.rule),
        }
    }

    fn arrival(&mut self, _exits: u64, _room: &Room) -> Result<Option<Input>, Closed> {
        Ok(None)
    }

    fn first_reads(&mut self, _exits: u64, _reads: &FirstReads) -> Result<(), Closed> {
        Ok(())
    }

    fn posted(&mut self, _exits: u64, _bytes: &[u8]) -> Result<(), Closed> {
        Ok(())
    }

    fn turn(&mut self, _exits: u64, _turn: &Turn, _digest: Digest) -> Result<(), Closed> {
        Ok(())
    }

    fn interrupt(&mut self, _at: &Moment, _vector: u8) -> Result<(), Closed> {
        Ok(())
    }

    fn left_open(&mut self, _exits: u64, _what: LeftOpen) -> Result<(), Closed> {
        Ok(())
    }

    fn wants_state(&mut self, _exits: u64) -> bool {
        false
    }

    fn state(&mut self, _exits: u64, _digest: FullDigest) -> Result<(), Closed> {
        Ok(())
    }

    fn horizon(&mut self, position: &Position) -> Result<Horizon, Closed> {
        let exits = position.exits;
        match self.until.is_some_and(|until| exits >= until) {
            true => Err(Closed::Reached(exits)),
            false => Ok(Horizon::Exit),
        }
    }

    /// A guest may run for ever without an exit: whoever kicks it wants to look.
    fn kicked(&mut self, position: &Position) -> Result<(), Closed> {
        Err(Closed::Reached(position.exits))
    }

    fn stopped(&mut self, position: &Position) -> Result<(), Closed> {
        Err(Closed::Stopped(position.exits))
    }

    fn end(&mut self, _exits: u64, _end: &End) -> Result<(), Closed> {
        Ok(())
    }

    fn abandon(&mut self, _complete: Complete) -> Result<(), Closed> {
        Ok(())
    }
}
