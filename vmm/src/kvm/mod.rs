//! The machine's CPU and memory, on stock KVM. With `perf`, the only place of unsafe code.

mod clock;
pub mod cpuid;
pub mod deadline;
mod debug;
pub mod entries;
mod entry_stub;
mod error;
pub mod exit_cost;
mod guest_text;
mod memory;
mod modules;
pub mod msr;
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

pub use error::KvmError;
pub use guest_text::GuestView;
pub use memory::GuestMemory;
pub use page_walk::Paging;
pub use preemption::Preemption;
pub use signals::{Alarm, Kicker, before_crash, install_kick, kick_signal};
pub use tap::open_tap;
pub use trap_sites::{Trap, TrapSites};
pub use vcpu::{KernelText, KvmCpu, VcpuCounts};
