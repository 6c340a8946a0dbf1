//! Micro-guests, written with an assembler in Rust, and the recipes of the larger guests.
//!
//! A [`MicroGuest`] is a few instructions in 64-bit mode, together with the tables that a CPU
//! needs to run them in ring 0 and ring 3: enough to ask a KVM one question. `hindsight doctor`
//! asks them of the host it finds; the tests ask them of the machine.

pub mod layout;
pub mod micro;
mod micro_guest;

pub use micro_guest::{MicroGuest, Ring};
