//! The host: KVM, performance counters, boot, the live world, disks, and the sessions that make, replay and watch
//! recordings with them. Nothing here prints, ends the process or parses options.
#![warn(unreachable_pub)]

pub mod boot;
pub mod disk;
pub mod doctor;
pub mod failure;
// Where the project meets the kernel: ioctls, mappings, the page shared with KVM.
#[allow(unsafe_code)]
pub mod kvm;
pub mod output_file;
pub mod perf;
mod regular_file;
pub mod session;
pub mod world;
