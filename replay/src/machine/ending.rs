//! How a guest's run ends.

use hindsight_devices::{Nanos, Reset};
use serde::{Deserialize, Serialize};

use super::full_digest::FullDigest;

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
