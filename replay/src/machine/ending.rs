//! How a guest's run ends.

use std::fmt;

use hindsight_devices::{Nanos, Reset};
use serde::{Deserialize, Serialize};

use super::full_digest::FullDigest;
use crate::foreign::shown;

/// How the guest's run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// The guest reset itself.
    Reset(Reset),
    /// The CPU shut down: a triple fault.
    TripleFault,
    /// HLT with nothing left that could wake the machine.
    Halted,
    /// The operator asked it to stop, at an exit.
    Stopped,
    /// The operator asked it to stop, and the guest did not exit any more.
    StoppedRunning,
    /// The guest turned itself off.
    PowerOff,
}

/// The last event of a whole recording.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// How it ended.
    pub ending: Ending,
    /// The reason that the guest's kernel gave if it panicked, or what it wrote to the pvpanic port.
    pub panic: Option<String>,
    /// Guest time in nanoseconds.
    pub now: Nanos,
    /// The digest of every turn and interrupt.
    pub digest: u64,
    /// The digest of the whole state; `None` where the guest was still running.
    pub state: Option<FullDigest>,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Ending::Reset(Reset::Keyboard) => "reset by the keyboard controller",
            Ending::Reset(Reset::ControlRegister) => "reset by the reset control register (0xcf9)",
            Ending::Reset(Reset::FastReset) => "reset by port 0x92",
            Ending::TripleFault => "triple fault",
            Ending::Halted => "halted for good",
            Ending::Stopped => "asked to stop",
            Ending::StoppedRunning => "asked to stop, between two exits",
            Ending::PowerOff => "powered off",
        })
    }
}

/// How the guest ended. The reason of a panic is the guest's, or a journal's: it is escaped.
impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(reason) = &self.panic else {
            return self.ending.fmt(f);
        };
        write!(f, "kernel panic ({}), then ", shown(reason))?;
        match self.ending {
            Ending::Stopped => f.write_str("stopped, for it had not reset itself"),
            ref ending => ending.fmt(f),
        }
    }
}
