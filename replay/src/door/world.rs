//! The live world, stripped to what the door to it needs.

use hindsight_devices::{Input, Nanos, Room};

use crate::machine::Complete;

/// What the live world offers.
pub trait World {
    /// Nanoseconds since the machine was switched on. Never runs backwards.
    fn now(&mut self) -> Nanos;
    /// The next input that is there already and that `room` has a place for.
    fn poll(&mut self, room: &Room) -> Option<Input>;
    /// Sleeps until `until`, or less if an input comes that `room` has a place for. `false` if
    /// neither can ever happen.
    fn sleep(&mut self, until: Option<Nanos>, room: &Room) -> bool;
    /// All that belongs to this exit is done. More than once if the guest comes back without an exit.
    fn pass(&mut self, _complete: Complete) {}
    /// A frame that the machine sends.
    fn send(&mut self, _frame: &[u8]) {}
    /// The operator asked to stop, the guest has not exited since, and patience is at an end.
    fn gives_up(&mut self) -> bool;
    /// Sees to it that the vCPU is kicked at this time or before; `None`: no more.
    fn alarm(&mut self, at: Option<Nanos>);
    /// Whether an input is there that `room` has a place for.
    fn input_waits(&mut self, room: &Room) -> bool;
}
