//! The one door through which a host fact may reach the guest, from the loop's side.
//!
//! The loop asks every question about the world here, and nowhere else. What is on the other side (a live
//! world, a journal) is in `door/`; why it will not answer is its own affair.

use hindsight_devices::{FirstReads, Input, Nanos, Room};
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::ending::{End, Ending};
use super::exit::Turn;
use super::full_digest::FullDigest;
use super::left_open::LeftOpen;
use super::moment::{Moment, VcpuNumber};
use super::place::{Horizon, Place};

/// The last exit that is complete: its turn has happened, and whatever fails now, a recording holds it.
/// This is where the loop keeps count of that; doors are given it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Complete {
    /// Its number; 0 at power-on.
    pub exits: u64,
    /// Guest time there.
    pub now: Nanos,
}

/// What the loop knows when it asks for the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeQuery {
    /// The exit the time is for.
    pub exits: u64,
    /// The vCPU whose exit it is.
    pub vcpu: VcpuNumber,
    /// The exit before it.
    pub complete: Complete,
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
    /// That vCPU was preempted at this place; else it exited by itself.
    pub preempted: Option<Place>,
    /// What the guest is doing there, as far as [`Outside::wants_sites`] asked for it: the same
    /// number is the same place in its programs.
    pub site: Option<u64>,
    /// Since when the guest is known to have panicked.
    pub panicked: Option<Nanos>,
}

/// Where the machine is between two turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The last exit.
    pub exits: u64,
    /// The vCPU that runs on from there.
    pub vcpu: VcpuNumber,
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

/// Where a door is in the journal that it reads, when all records of an exit have been taken that are before its
/// horizon, and what it has counted and remembers by then.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalPlace {
    /// Offset of the frame before the one that the last record was taken from, in bytes; `None`: that is the first
    /// one, or none was taken.
    pub frame_before: Option<u64>,
    /// How many records of its frame were taken.
    pub records: u64,
    /// The check of that frame, or of the journal's head if none was taken.
    pub check: u64,
    /// The last exit at which the machine was seen to be the recorded one.
    pub equal_through: u64,
    /// Witnesses that were equal.
    pub witnesses_checked: u64,
    /// Memory digests that were equal, or equal but for Accessed bits.
    pub states_checked: u64,
    /// Of those, how many were equal but for those bits.
    pub states_but_accessed: u64,
    /// The last turns, for a report, oldest first, with the numbers of their exits.
    pub history: Vec<(u64, Turn)>,
}

/// Why a door will not answer.
pub trait Closing: std::error::Error {
    /// How the run is over, if that is all there is to it; else it cannot go on.
    fn ending(&self) -> Option<&Ending>;
}

/// The door.
pub trait Outside {
    /// Why it will not answer.
    type Closed: Closing;

    /// Guest time at this exit; at least `query.earliest`. While the machine is halted this waits.
    fn time(&mut self, query: &TimeQuery) -> Result<Nanos, Self::Closed>;

    /// Whether [`TimeQuery::site`] is worth finding out.
    fn wants_sites(&self) -> bool {
        false
    }

    /// The next input that reaches the machine at this exit, if there is one. `room` is what the
    /// machine has room for.
    fn arrival(&mut self, exits: u64, room: &Room) -> Result<Option<Input>, Self::Closed>;

    /// The guest read blocks of a disk's image for the first time.
    fn first_reads(&mut self, exits: u64, reads: &FirstReads) -> Result<(), Self::Closed>;

    /// The machine's network card has sent a frame. A world that is not there does not get it.
    fn send(&mut self, _frame: &[u8]) {}

    /// These are the bytes whose writes were posted between the exit before and this one. Called once for each turn,
    /// just before it.
    fn posted(&mut self, exits: u64, bytes: &[u8]) -> Result<(), Self::Closed>;

    /// This turn has happened; `digest` covers it.
    fn turn(&mut self, exits: u64, turn: &Turn, digest: Digest) -> Result<(), Self::Closed>;

    /// An interrupt was delivered.
    fn interrupt(&mut self, at: &Moment, vector: u8) -> Result<(), Self::Closed>;

    /// The monitor has found out at this exit that something is left open.
    fn left_open(&mut self, exits: u64, what: LeftOpen) -> Result<(), Self::Closed>;

    /// Whether a digest of all of memory is wanted at this exit.
    fn wants_state(&mut self, exits: u64) -> bool;

    /// The digest of all of memory at this exit.
    fn state(&mut self, exits: u64, digest: FullDigest) -> Result<(), Self::Closed>;

    /// All that belongs to the last exit is done: how far may the guest run on?
    fn horizon(&mut self, position: &Position) -> Result<Horizon, Self::Closed>;

    /// The vCPU came back without an exit of the guest's after the last turn.
    fn kicked(&mut self, position: &Position) -> Result<(), Self::Closed>;

    /// The vCPU is where whoever debugs it wants it stopped, between two exits. A door that does not close lets it go on.
    fn stopped(&mut self, _position: &Position) -> Result<(), Self::Closed> {
        Ok(())
    }

    /// The run is over.
    fn end(&mut self, exits: u64, end: &End) -> Result<(), Self::Closed>;

    /// Where it is in the journal that it reads; `None` if it reads none, or cannot be put there again.
    fn place(&self) -> Option<JournalPlace> {
        None
    }

    /// The run cannot go on, for a reason of the host's; keep what there is through the last complete exit, and
    /// drop what has been said of a later one.
    fn abandon(&mut self, complete: Complete) -> Result<(), Self::Closed>;
}
