//! What is rewritten in a kernel, and where.
//!
//! [`traps`] finds the instructions whose answers KVM would not let us give, `spans` those of them that need not
//! exit each time, `ages` what would let the guest see the host's TLB. What is to stand in guest memory
//! instead comes out as [`Patch`]es, which somebody else applies. All of it is decided by the kernel's file alone.

mod ages;
pub mod alternatives;
pub mod caves;
pub mod modules;
mod named;
mod panics;
mod quick;
mod quick_stub;
pub mod rewritten;
mod spans;
mod transmit;
pub mod traps;

pub use ages::Ages;
pub use alternatives::Alternative;
pub use caves::{Cave, EntryCaves, QuickCaves};
pub use modules::{ModuleLayout, Modules};
pub use quick::{QuickClock, QuickPlan};
pub use rewritten::Rewritten;
pub use spans::Span;
pub use traps::{Site, SiteKind, Sites, TrapCounts};

use crate::error::KernelError;
use crate::image::Elf;
use crate::symbols::Symbols;

/// Bytes for guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch {
    /// Guest-physical address.
    pub gpa: u64,
    /// What is to stand there.
    pub bytes: Vec<u8>,
}

/// What is to be rewritten in a kernel.
#[derive(Debug)]
pub struct RewriteTargets {
    /// The instructions to trap.
    pub sites: Sites,
    /// Which of its time reads need not exit.
    pub spans: Vec<Span>,
    /// Virtual addresses of the calls with which its console waits, and need not.
    pub transmits: Vec<u64>,
    /// What keeps the Accessed bits of its page tables set.
    pub ages: Ages,
}

/// Finds what is to be rewritten in a kernel, in one look at its code.
///
/// # Errors
///
/// As [`traps::find`].
pub fn find_sites(elf: &Elf<'_>, loads: &[u64]) -> Result<RewriteTargets, KernelError> {
    let mut named = named::Named::by_data(elf);
    let mut transmits = transmit::Transmits::of(elf);
    let mut ages = ages::Search::of(elf);
    let mut sites = traps::find_and_show(elf, loads, &mut |instruction| {
        named.see(instruction);
        transmits.see(instruction);
        ages.see(instruction);
    })?;
    sites.leave_alone(Symbols::find(elf.file()).as_ref());
    Ok(RewriteTargets {
        spans: spans::find(elf, &sites, &named),
        transmits: transmits.finish(&named),
        ages: ages.finish(elf, &sites, &named),
        sites,
    })
}
