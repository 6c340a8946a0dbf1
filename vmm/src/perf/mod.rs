//! The PMU: a position between exits, counted in retired conditional branches of the guest.
//!
//! [`CounterEvent`] says which event counts them on this CPU, [`BranchCounter`] counts, and
//! [`calibrate`] finds out with micro-guests whether this host counts exactly and how late its
//! overflow signals are. `docs/counters.md` tells the whole.

mod affinity;
mod calibration;
mod counter;
mod error;
mod event;
mod exactness;
mod processor;
mod settings;
mod skid;
mod spec_lock_map;
// perf's system calls, its shared page, and RDPMC.
#[allow(unsafe_code)]
mod sys;

pub use calibration::{Calibration, Effort, calibrate, reading_costs};
pub use counter::BranchCounter;
pub use error::CounterError;
pub use event::CounterEvent;
pub use exactness::{Disturbances, Flaw, Inexact};
pub use processor::Processor;
pub use settings::{REMEDY, Throttling};
pub use skid::{Skid, margin};
pub use spec_lock_map::SpecLockMap;
