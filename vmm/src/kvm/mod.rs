//! The machine's CPU and memory, on stock KVM. With `perf`, the only place of unsafe code.

mod clock;
pub mod cpuid;
mod deadline;
mod debug;
mod entries;
mod entry_stub;
mod error;
pub(crate) mod exit_cost;
mod guest_text;
mod memory;
mod modules;
pub(crate) mod msr;
mod page_walk;
mod posted;
mod preemption;
pub mod probe;
mod real_mode;
mod rewritten;
mod run_page;
mod segments;
mod shadow;
mod signals;
mod tap;
mod trap_sites;
mod traps;
mod vcpu;
mod vm;

pub use error::KvmError;
pub use guest_text::GuestView;
pub use memory::GuestMemory;
pub use page_walk::Paging;
pub(crate) use preemption::Preemption;
pub(crate) use signals::{Alarm, Kicker, before_crash, kick_signal};
pub(crate) use tap::open_tap;
pub use vcpu::{KvmCpu, VcpuCounts};
pub use vm::KernelText;
