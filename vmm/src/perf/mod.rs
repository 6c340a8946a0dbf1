//! The PMU: a position between exits, counted in retired conditional branches of the guest.
//!
//! [`CounterEvent`] says which event counts them on this CPU, `BranchCounter` counts. Whether this host counts
//! exactly is found out with micro-guests, by [`crate::doctor`]. `docs/counters.md` tells the whole.

mod affinity;
mod counter;
mod error;
mod event;
mod processor;
mod settings;
// perf's system calls, its shared page, and RDPMC.
#[allow(unsafe_code)]
mod sys;

pub(crate) use affinity::CpuList;
pub(crate) use counter::{BranchCounter, HostCounter};
pub use error::CounterError;
pub use event::CounterEvent;
pub(crate) use processor::{Processor, host_cpuid};
pub(crate) use settings::{REMEDY, Throttling, USUAL_RATE};
