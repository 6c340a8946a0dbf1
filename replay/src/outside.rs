//! The one door through which a host fact may reach the guest.
//!
//! The loop in [`crate::machine`] asks every question about the world here, and nowhere else.
//! [`crate::Live`] asks the world; [`crate::Recorder`] writes down what another door answered;
//! [`crate::Replayer`] reads the answers and refuses to go on where the machine differs.

use hindsight_devices::{FirstReads, Input, Nanos, Room};
use thiserror::Error;

use crate::digest::{Digest, MemoryDigest};
use crate::divergence::Divergence;
use crate::event::{End, Ending, LeftOpen};
use crate::exit::Turn;
use crate::journal::{JournalError, Tail};
use crate::landing::{Horizon, Place};
use crate::moment::Moment;

/// What the loop knows when it asks for the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeQuery {
    /// The exit the time is for.
    pub exits: u64,
    /// Guest time at the exit before.
    pub last: Nanos,
    /// The earliest that this exit can be: that, or later if the guest may have read later times since
    /// without an exit.
    pub earliest: Nanos,
    /// What the rule gives for this exit.
    pub rule: Nanos,
    /// When the board's next timer is due.
    pub deadline: Option<Nanos>,
    /// The machine is halted: nothing passes but time. `rule` is then the deadline, if any.
    pub halted: bool,
    /// What the machine has room for.
    pub room: Room,
    /// The guest was preempted at this place; else it exited by itself.
    pub preempted: Option<Place>,
    /// What the guest is doing there, as far as [`Outside::wants_sites`] asked for it: the same
    /// number is the same place in its programs.
    pub site: Option<u64>,
    /// Since when the guest is known to have panicked.
    pub panicked: Option<Nanos>,
}

/// Where the machine stands between two turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The last exit.
    pub exits: u64,
    /// Its instruction pointer.
    pub rip: u64,
    /// Guest time at that exit.
    pub now: Nanos,
    /// When the board's next timer is due.
    pub deadline: Option<Nanos>,
    /// What the machine has room for.
    pub room: Room,
    /// An interrupt waits for the guest to take it.
    pub pending: bool,
    /// Since when the guest is known to have panicked.
    pub panicked: Option<Nanos>,
}

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
    /// The journal cannot be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// The door.
pub trait Outside {
    /// Guest time at this exit; at least `query.earliest`. While the machine is halted this waits.
    fn time(&mut self, query: &TimeQuery) -> Result<Nanos, Closed>;

    /// Whether [`TimeQuery::site`] is worth finding out.
    fn wants_sites(&self) -> bool {
        false
    }

    /// The next input that reaches the machine at this exit, if there is one. `room` is what the
    /// machine has room for.
    fn arrival(&mut self, exits: u64, room: &Room) -> Result<Option<Input>, Closed>;

    /// The guest read blocks of a disk's image for the first time.
    fn first_reads(&mut self, exits: u64, reads: &FirstReads) -> Result<(), Closed>;

    /// The machine's network card has sent a frame. A world that is not there does not get it.
    fn send(&mut self, _frame: &[u8]) {}

    /// These are the bytes whose writes were posted between the exit before and this one. Told of each turn,
    /// just before it.
    fn posted(&mut self, exits: u64, bytes: &[u8]) -> Result<(), Closed>;

    /// This turn has happened; `digest` covers it.
    fn turn(&mut self, exits: u64, turn: &Turn, digest: Digest) -> Result<(), Closed>;

    /// An interrupt was delivered.
    fn interrupt(&mut self, at: &Moment, vector: u8) -> Result<(), Closed>;

    /// The monitor has found out at this exit that something is left open.
    fn left_open(&mut self, exits: u64, what: LeftOpen) -> Result<(), Closed>;

    /// Whether a digest of all of memory is wanted at this exit.
    fn wants_memory(&mut self, exits: u64) -> bool;

    /// The digest of all of memory at this exit.
    fn memory(&mut self, exits: u64, digest: MemoryDigest) -> Result<(), Closed>;

    /// All that belongs to the last exit is done: how far may the guest run on?
    fn horizon(&mut self, standing: &Standing) -> Result<Horizon, Closed>;

    /// The vCPU came back without an exit of the guest's after the last turn.
    fn kicked(&mut self, standing: &Standing) -> Result<(), Closed>;

    /// The run is over.
    fn end(&mut self, exits: u64, end: &End) -> Result<(), Closed>;

    /// The run cannot go on, for a reason of the host's; keep what there is through `exits`, and drop what
    /// has been said of a later exit.
    fn abandon(&mut self, exits: u64, now: Nanos) -> Result<(), Closed>;
}

/// What the live world offers, stripped to what the recorder needs.
pub trait World {
    /// Nanoseconds since the machine was switched on. Never runs backwards.
    fn now(&mut self) -> Nanos;
    /// The next input that is there already and that `room` has a place for.
    fn poll(&mut self, room: &Room) -> Option<Input>;
    /// Sleeps until `until`, or less if an input comes that `room` has a place for. `false` if
    /// neither can ever happen.
    fn sleep(&mut self, until: Option<Nanos>, room: &Room) -> bool;
    /// A frame that the machine sends.
    fn send(&mut self, _frame: &[u8]) {}
    /// The operator asked to stop, the guest has not exited since, and patience is at an end.
    fn gives_up(&mut self) -> bool;
    /// Sees to it that the vCPU is kicked at this time or before; `None`: no more.
    fn alarm(&mut self, at: Option<Nanos>);
    /// Whether an input is there that `room` has a place for.
    fn input_waits(&mut self, room: &Room) -> bool;
}
