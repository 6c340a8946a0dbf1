//! Those who look on at a machine.

use hindsight_devices::{Input, Nanos, Output};

use super::digest::MemoryDigest;
use super::exit::Turn;
use super::left_open::LeftOpen;
use super::moment::Moment;

/// Sees what the machine does; cannot change it.
pub trait Observer {
    /// Something left the machine.
    fn output(&mut self, _exits: u64, _now: Nanos, _output: &Output) {}
    /// Something reached it from outside.
    fn input(&mut self, _exits: u64, _now: Nanos, _input: &Input) {}
    /// These bytes were written between the exit before and this one, without an exit.
    fn posted(&mut self, _exits: u64, _bytes: &[u8]) {}
    /// A turn has happened.
    fn turn(&mut self, _exits: u64, _turn: &Turn) {}
    /// An interrupt was delivered.
    fn interrupt(&mut self, _at: &Moment, _vector: u8, _now: Nanos) {}
    /// Something was found to be left open.
    fn left_open(&mut self, _exits: u64, _what: LeftOpen) {}
    /// Memory was digested.
    fn memory(&mut self, _exits: u64, _digest: MemoryDigest) {}
    /// The vCPU was kicked and nothing else happened.
    fn kicked(&mut self, _exits: u64) {}
}

/// Sees nothing.
impl Observer for () {}
