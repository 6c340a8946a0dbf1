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
mod formats;
pub mod kallsyms;
pub mod layout;
mod load;
mod lzo;
pub mod modules;
mod named;
mod payload;
mod quick;
mod quick_stub;
pub mod rewritten;
#[cfg(test)]
mod testing;
mod transmit;
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
pub use rewritten::Rewritten;
pub use traps::{Site, SiteKind, Sites};
pub use windows::Window;

/// What is to be rewritten in a kernel.
#[derive(Debug)]
pub struct Found {
    /// The instructions to trap.
    pub sites: Sites,
    /// Which of its time reads need not exit.
    pub windows: Vec<Window>,
    /// Virtual addresses of the calls with which its console waits, and need not.
    pub transmits: Vec<u64>,
}

/// Finds what is to be rewritten in a kernel, in one look at its code.
///
/// # Errors
///
/// As [`traps::find`].
pub fn find_sites(elf: &Elf<'_>, loads: &[u64]) -> Result<Found, BootError> {
    let mut named = named::Named::by_data(elf);
    let mut transmits = transmit::Transmits::of(elf);
    let mut sites = traps::find_and_show(elf, loads, &mut |instruction| {
        named.see(instruction);
        transmits.see(instruction);
    })?;
    sites.leave_alone(Symbols::find(elf.file()).as_ref());
    Ok(Found {
        windows: windows::find(elf, &sites, &named),
        transmits: transmits.finish(&named),
        sites,
    })
}
