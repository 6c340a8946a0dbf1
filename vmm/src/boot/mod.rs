//! From a kernel to a machine that is ready to run its first instruction.
//!
//! [`load()`] writes the kernel, what is rewritten in it (`hindsight_kernel`), the initrd and the boot tables to
//! guest memory in the layout of `layout`. Nothing here touches KVM or the host: bytes go in, bytes and addresses
//! come out, so the same kernel file gives the same machine every time.

mod acpi;
mod error;
pub(crate) mod layout;
mod load;
mod zero_page;

pub use error::{BootError, OutOfRam};
pub use load::{BootParameters, BootPlan, E820Entry, GuestRam, Seed, apply, e820, load};
