//! A point in the guest's execution, as the guest itself could count it.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A point in the guest's execution.
///
/// Positions are made of what the guest's own instructions cause, never of host time: how many
/// exits there have been, and where after the last exit the guest stands. A place between two exits
/// at which something happened counts as an exit too, from then on; `branches` tells how far after
/// the one before it lies. `rip` and `rcx` are the registers there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Moment {
    /// Exits since power-on. Exits that the guest causes count, wake-ups from HLT, and places at
    /// which it was preempted; signals, breakpoints and interrupt windows are the host's and do not.
    pub exits: u64,
    /// At a preemption, the conditional branches retired since the exit before it; else 0.
    pub branches: u64,
    /// Instruction pointer.
    pub rip: u64,
    /// RCX, which tells the iterations of one REP instruction apart.
    pub rcx: u64,
}

impl Moment {
    /// Power-on.
    pub const START: Moment = Moment {
        exits: 0,
        branches: 0,
        rip: 0,
        rcx: 0,
    };
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit {}", self.exits)?;
        if self.branches > 0 {
            write!(f, " ({} branches after the one before)", self.branches)?;
        }
        write!(f, " at rip {:#x}", self.rip)
    }
}

/// A moment as an operator names it: the number of an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExitNumber(pub u64);

impl FromStr for ExitNumber {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.replace(['_', ','], "").parse().map(ExitNumber)
    }
}
