//! From a kernel file to a machine that is ready to run its first instruction.
//!
//! The order of work is the order of the files: [`unpack`] takes a distribution's bzImage
//! apart, [`Elf`] says what is inside, [`traps`] finds the instructions whose answers KVM would
//! not let us give, and [`load()`] writes it all to guest memory in the layout of [`layout`].
//! Nothing here touches KVM or the host: bytes go in, bytes and addresses come out, so the same
//! kernel file gives the same machine every time.

pub mod acpi;
mod bzimage;
pub mod caves;
mod elf;
mod error;
pub mod layout;
mod load;
mod lzo;
mod payload;
#[cfg(test)]
mod testing;
pub mod traps;
mod zero_page;

pub use bzimage::{Kernel, unpack};
pub use caves::{Cave, EntryCaves};
pub use elf::{Code, Elf, Segment};
pub use error::{BootError, OutOfRam};
pub use load::{BootPlan, E820Entry, Given, GuestRam, Seed, e820, load};
pub use traps::{Site, SiteKind, Sites};
