//! The machine the guest sees, as plain state machines.
//!
//! No unsafe, no clock, no file, no thread, no KVM. A [`Board`] takes an [`Access`] and
//! answers with a [`Reply`]; takes an [`Input`]; is told what time it is; and says whether it
//! wants an interrupt delivered.
#![forbid(unsafe_code)]

mod access;
pub use access::{Access, Input, Nanos, Reply, Reset, Width};
