//! The machine the guest sees, as plain state machines.
//!
//! No unsafe, no clock, no file, no thread, no KVM. A [`Board`] takes an [`Access`] with its
//! [`BusContext`] and answers with a [`Reply`]; takes an [`Input`]; is given the time; and says
//! whether it wants an interrupt delivered. Whatever a guest does is answered with data; an assertion
//! that fails is a bug of ours.
#![forbid(unsafe_code)]
#![warn(unreachable_pub)]

mod access;
pub mod acpi;
mod board;
mod chipset;
mod ioapic;
mod lapic;
mod msr;
mod pic;
mod pit;
mod restore;
mod rtc;
mod storage;
mod uart;
mod virtio;
pub mod wiring;

pub use access::{Access, Input, Nanos, Output, Reply, Reset, Room, Width};
pub use board::{Board, BoardState, POSTED_MAX, POSTED_PORT};
pub use chipset::PvPanic;
pub use lapic::APIC_BASE_AT_POWER_ON;
pub use restore::RestoreError;
pub use storage::{BusContext, FirstReads, NoDisks, Ram, Storage, StorageError};
pub use virtio::{Devices, DiskSpec, FRAME_BYTES_MAX, FRAME_BYTES_MIN, NetSpec};
pub use wiring::Slot;
