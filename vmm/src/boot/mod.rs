//! From a kernel file to a machine that is ready to run its first instruction.
//!
//! The order of work is the order of the files: [`unpack`] takes a distribution's bzImage
//! apart, [`Elf`] says what is inside, [`traps`] finds the instructions whose answers KVM would
//! not let us give, `windows` those of them that need not exit each time, and [`load()`] writes it all to guest memory in the layout of [`layout`].
//! Nothing here touches KVM or the host: bytes go in, bytes and addresses come out, so the same
//! kernel file gives the same machine every time.

pub mod acpi;
mod alternatives;
pub mod btf;
mod bzimage;
pub mod caves;
mod elf;
mod error;
pub mod kallsyms;
pub mod layout;
mod load;
mod lzo;
pub mod modules;
mod named;
mod payload;
mod quick;
mod quick_stub;
#[cfg(test)]
mod testing;
pub mod traps;
mod windows;
mod zero_page;

pub use bzimage::{Kernel, unpack};
pub use caves::{Cave, EntryCaves, QuickCaves};
pub use elf::{Code, Elf, Segment};
pub use error::{BootError, OutOfRam};
pub use kallsyms::Symbols;
pub use load::{BootPlan, E820Entry, Given, GuestRam, Seed, e820, load};
pub use modules::{ModuleLayout, Modules};
pub use quick::{QuickClock, QuickPlan};
pub use traps::{Site, SiteKind, Sites};
pub use windows::Window;

/// Finds the instructions to trap in a kernel, and which of its time reads need not exit: one look at
/// its code for both.
///
/// # Errors
///
/// As [`traps::find`].
pub fn find_sites(elf: &Elf<'_>, loads: &[u64]) -> Result<(Sites, Vec<Window>), BootError> {
    let mut named = named::Named::by_data(elf);
    let sites = traps::find_and_show(elf, loads, &mut |instruction| named.see(instruction))?;
    let windows = windows::find(elf, &sites, &named);
    Ok((sites, windows))
}
