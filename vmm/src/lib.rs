//! The shell around the machine: KVM, boot, trap ports, the live world, and the command line.

pub mod boot;
pub mod cli;
pub mod counting;
pub mod disk;
pub mod doctor;
pub mod foreign;
pub mod index;
mod kernel_cache;
// Where the project meets the kernel: ioctls, mappings, the page shared with KVM.
#[allow(unsafe_code)]
pub mod kvm;
pub mod machine;
pub mod net;
pub mod new_recording;
pub mod output_file;
pub mod perf;
pub mod recording;
pub mod regular_file;
mod tell;
pub mod world;
