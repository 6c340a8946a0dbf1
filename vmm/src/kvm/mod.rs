//! The machine's CPU and memory, on stock KVM. With `perf`, the only place of unsafe code.

pub mod cpuid;
mod error;
pub mod exit_cost;
mod guest_text;
mod memory;
pub mod msr;
pub mod probe;
mod run_page;
mod shadow;
mod signals;
mod traps;
mod vcpu;

pub use error::KvmError;
pub use memory::GuestMemory;
pub use signals::{Kicker, install_kick, kick_signal, stop_requested};
pub use vcpu::{KernelText, KvmCpu, VcpuCounts};
