//! Why a door will not answer.

use thiserror::Error;

use super::divergence::Divergence;
use crate::journal::{JournalError, Tail};
use crate::machine::{Closing, Ending};

/// Why a door will not answer.
#[derive(Debug, Error)]
pub enum Closed {
    /// The run is over here, for this reason. Not a failure.
    #[error("the run ends here: {0:?}")]
    End(Ending),
    /// The machine did something else than the recorded one.
    #[error("{0}")]
    Diverged(Box<Divergence>),
    /// The recording ends before the guest did.
    #[error("{0}")]
    CutShort(Tail),
    /// The exit the operator asked for is reached.
    #[error("reached exit {0}")]
    Reached(u64),
    /// The vCPU is where whoever debugs it wants it stopped.
    #[error("stopped between two exits, after exit {0}")]
    Stopped(u64),
    /// The journal cannot be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl Closing for Closed {
    fn ending(&self) -> Option<&Ending> {
        match self {
            Closed::End(ending) => Some(ending),
            _ => None,
        }
    }
}
