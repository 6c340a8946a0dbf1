//! Places in a recording: ways to come there, and names.

/// One stretch of a way: from stop to stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Leg<P> {
    /// To the stop after as many.
    Stops { stops: P, times: u64 },
    /// To where this address is come to for this number of times since the exit.
    Arrival { address: u64, number: u64 },
}

impl<P> Leg<P> {
    /// What it arrives at.
    pub(super) fn arrival(&self) -> Option<(u64, u64)> {
        match self {
            Leg::Arrival { address, number } => Some((*address, *number)),
            Leg::Stops { .. } => None,
        }
    }
}

/// Where the guest is, as a way to come there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place<P> {
    pub(super) exit: u64,
    pub(super) legs: Vec<Leg<P>>,
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

impl Name {
    /// The exit that it is at or after; `None` at the end.
    pub(super) fn exit(self) -> Option<u64> {
        match self {
            Name::Exit(exit) | Name::Arrival { exit, .. } => Some(exit),
            Name::End => None,
        }
    }

    /// What has to be counted from the exit on.
    pub(super) fn arrival(self) -> Option<(u64, u64)> {
        match self {
            Name::Arrival {
                address, number, ..
            } => Some((address, number)),
            Name::Exit(_) | Name::End => None,
        }
    }
}
