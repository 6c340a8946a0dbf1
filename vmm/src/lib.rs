//! The shell around the machine: KVM, boot, trap ports, the live world, and the command line.

pub mod boot;
pub mod cli;
pub mod counting;
pub mod disk;
pub mod doctor;
mod kernel_cache;
// Where the project meets the kernel: ioctls, mappings, the page shared with KVM.
#[allow(unsafe_code)]
pub mod kvm;
pub mod machine;
pub mod net;
pub mod perf;
pub mod recording;
mod tell;
pub mod world;
