//! Those who look on at a machine.

use hindsight_devices::{Input, Nanos, Output};

use super::exit::Turn;
use super::full_digest::FullDigest;
use super::guest::Guest;
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
    /// A turn has happened; the guest is as it was before the answer.
    fn turn(&mut self, _exits: u64, _turn: &Turn, _guest: &mut dyn Guest) {}
    /// An interrupt was delivered.
    fn interrupt(&mut self, _at: &Moment, _vector: u8, _now: Nanos) {}
    /// Something was found to be left open.
    fn left_open(&mut self, _exits: u64, _what: LeftOpen) {}
    /// Memory was digested.
    fn state(&mut self, _exits: u64, _digest: FullDigest) {}
    /// The vCPU was kicked and nothing else happened.
    fn kicked(&mut self, _exits: u64) {}
}

/// Sees nothing.
impl Observer for () {}

/// Lent, it sees what it would see.
impl<A: Observer + ?Sized> Observer for &mut A {
    fn output(&mut self, exits: u64, now: Nanos, output: &Output) {
        (**self).output(exits, now, output);
    }

    fn input(&mut self, exits: u64, now: Nanos, input: &Input) {
        (**self).input(exits, now, input);
    }

    fn posted(&mut self, exits: u64, bytes: &[u8]) {
        (**self).posted(exits, bytes);
    }

    fn turn(&mut self, exits: u64, turn: &Turn, guest: &mut dyn Guest) {
        (**self).turn(exits, turn, guest);
    }

    fn interrupt(&mut self, at: &Moment, vector: u8, now: Nanos) {
        (**self).interrupt(at, vector, now);
    }

    fn left_open(&mut self, exits: u64, what: LeftOpen) {
        (**self).left_open(exits, what);
    }

    fn state(&mut self, exits: u64, digest: FullDigest) {
        (**self).state(exits, digest);
    }

    fn kicked(&mut self, exits: u64) {
        (**self).kicked(exits);
    }
}

/// Both see the same, the first one first.
impl<A: Observer, B: Observer> Observer for (A, B) {
    fn output(&mut self, exits: u64, now: Nanos, output: &Output) {
        self.0.output(exits, now, output);
        self.1.output(exits, now, output);
    }

    fn input(&mut self, exits: u64, now: Nanos, input: &Input) {
        self.0.input(exits, now, input);
        self.1.input(exits, now, input);
    }

    fn posted(&mut self, exits: u64, bytes: &[u8]) {
        self.0.posted(exits, bytes);
        self.1.posted(exits, bytes);
    }

    fn turn(&mut self, exits: u64, turn: &Turn, guest: &mut dyn Guest) {
        self.0.turn(exits, turn, guest);
        self.1.turn(exits, turn, guest);
    }

    fn interrupt(&mut self, at: &Moment, vector: u8, now: Nanos) {
        self.0.interrupt(at, vector, now);
        self.1.interrupt(at, vector, now);
    }

    fn left_open(&mut self, exits: u64, what: LeftOpen) {
        self.0.left_open(exits, what);
        self.1.left_open(exits, what);
    }

    fn state(&mut self, exits: u64, digest: FullDigest) {
        self.0.state(exits, digest);
        self.1.state(exits, digest);
    }

    fn kicked(&mut self, exits: u64) {
        self.0.kicked(exits);
        self.1.kicked(exits);
    }
}
