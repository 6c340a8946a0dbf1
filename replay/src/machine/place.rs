//! Where a vCPU can be stopped between two exits, and found again.

use serde::{Deserialize, Serialize};

/// What is counted to find a place between two exits again: by what a recorded guest is preempted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Unit {
    /// Retired conditional branches, by a performance counter.
    Branches,
    /// Entries into the guest's kernel, by the rewritten entries themselves.
    Entries,
}

/// A place between two exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// What is counted.
    pub unit: Unit,
    /// How many of them since the last counted exit.
    pub number: u64,
    /// The instruction pointer at which the vCPU stops, the first time with that number.
    pub rip: u64,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Place { unit, number, rip } = self;
        let unit = match unit {
            Unit::Branches => "branches",
            Unit::Entries => "kernel entries",
        };
        write!(f, "{number} {unit} on, at rip {rip:#x}")
    }
}

/// How far a vCPU may run before it must come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Horizon {
    /// To its next exit.
    Exit,
    /// To the first place that can be found again, once this much was counted since the last exit;
    /// or to the exit before it.
    From(u64),
    /// To exactly this place.
    At(Place),
}
