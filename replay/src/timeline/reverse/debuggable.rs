//! What a vCPU must be able to do for whoever goes along its way by instructions.

use std::fmt::Debug;

use crate::machine::Cpu;

/// A vCPU that can be stopped between two exits without the guest's knowing ([`crate::Back::Stopped`]).
///
/// A *stop* is where it is about to execute an instruction, with no exception and no interrupt to take first. Between
/// two exits the guest computes alone, so from an exit the same stops lead to the same places. It *comes to* an
/// instruction once, however often it is stopped before it, and however often the instruction faults.
///
/// When its state is restored, it has no stops.
pub trait Debuggable: Cpu {
    /// Where it is to be stopped; by default nowhere.
    type Stops: Clone + Debug + Default + PartialEq;
    /// Why it has stopped.
    type Hit: Clone + Debug + PartialEq;

    /// Before the instructions at these addresses.
    fn before(addresses: &[u64]) -> Self::Stops;

    /// At `stops`, and where it comes to `address` for the `number`th time since the last exit.
    fn or_arrival(stops: &Self::Stops, address: u64, number: u64) -> Self::Stops;

    /// After the instruction that it is about to execute, or before the first one of a handler to which it goes first. An
    /// instruction that is an exit takes the exit with it.
    fn after_one(&mut self) -> Result<Self::Stops, Self::Error>;

    /// Has it stop there from now on, and nowhere else.
    fn stop_at(&mut self, stops: &Self::Stops) -> Result<(), Self::Error>;

    /// Where it was to stop when it ran on from its last exit.
    fn stops_at_exit(&self) -> Self::Stops;

    /// Why it has stopped; it has.
    fn hit(&self) -> Self::Hit;

    /// Why it would have stopped if one step had led to where it is.
    fn stepped() -> Self::Hit;

    /// What matters about that.
    fn kind(hit: &Self::Hit) -> HitKind;

    /// Has it count, from here to its next exit, how often it comes to `address`; or no more.
    fn count_arrivals(&mut self, address: Option<u64>) -> Result<(), Self::Error>;

    /// How often it has.
    fn arrivals(&self) -> u64;

    /// Whether an interrupt or an exception comes before its next instruction.
    fn is_interrupted(&self) -> Result<bool, Self::Error>;

    /// Before how many addresses it can be stopped at the same time, beside one that it is to arrive at; at least 1.
    fn addresses_max(&self) -> usize;

    /// Addresses at which the instruction may be that was executed last, the likeliest first. They are tried; where none
    /// is right it takes longer.
    fn guesses(&mut self) -> Result<Vec<u64>, Self::Error>;
}

/// What matters about why a vCPU has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HitKind {
    /// It is about to execute an instruction before which it was to stop.
    Instruction,
    /// It has accessed data that is watched.
    Data,
    /// It cannot stop wherever it was to.
    NoRoom,
}
