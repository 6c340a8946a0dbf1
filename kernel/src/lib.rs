//! A Linux kernel as data.
//!
//! [`unpack`] takes a distribution's bzImage apart, [`Elf`] says what is inside, its symbols and BTF what it calls
//! things, and [`rewrite`] what has to stand in it instead so that it can be recorded. Nothing here touches KVM, the
//! host or guest memory: bytes go in, addresses and [`Patch`]es come out.
#![forbid(unsafe_code)]
#![warn(unreachable_pub)]

mod error;
mod image;
pub mod rewrite;
mod symbols;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod view;

pub use error::KernelError;
pub use image::{Code, Elf, Kernel, Segment, initramfs, setup_header, unpack};
pub use rewrite::{
    Ages, Alternative, Cave, EntryCaves, ModuleLayout, Modules, Patch, QuickCaves, QuickClock,
    QuickPlan, RewriteTargets, Rewritten, Site, SiteKind, Sites, Span, TrapCounts, find_sites,
};
pub use symbols::{Symbols, symbol_file};
