//! Places in a recording: ways to come there, and names.

use crate::failure::{Failure, Kind};
use crate::kvm::Stops;

/// One stretch of a way: from stop to stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leg {
    pub(super) stops: Stops,
    pub(super) times: u64,
}

/// Where the guest is, as a way to come there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) exit: u64,
    pub(super) legs: Vec<Leg>,
}

/// The same, as a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// An exit; nothing has run since.
    Exit(u64),
    /// Before the instruction at this address, come to for this number of times since the exit.
    Arrival {
        exit: u64,
        address: u64,
        number: u64,
    },
    /// The end of the recording.
    End,
}

/// The way to a named place from its exit.
pub(super) fn way(name: Name) -> Vec<Leg> {
    match name {
        Name::Arrival {
            address, number, ..
        } => vec![Leg {
            stops: Stops {
                arrival: Some((address, number)),
                ..Stops::default()
            },
            times: 1,
        }],
        Name::Exit(_) | Name::End => Vec::new(),
    }
}

/// There are too few debug registers for this.
pub(super) fn no_room(wanted: usize, free: usize) -> Failure {
    Failure::new(
        Kind::BadInput,
        format!(
            "{wanted} debug registers are needed to go there, and {free} are free; delete breakpoints or watchpoints"
        ),
    )
}

/// The guest went another way than before.
pub(super) fn lost(exit: u64, why: &str) -> Failure {
    Failure::new(
        Kind::HostFailed,
        format!(
            "a place after exit {exit} was not found again ({why}); go to an exit (monitor seek {exit})"
        ),
    )
}
