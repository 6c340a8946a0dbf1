//! The file: a bzImage or an ELF file, what packs it, and what it says of itself.

mod bzimage;
mod elf;
mod formats;
pub mod initramfs;
mod lzo;
mod payload;
pub mod setup_header;

pub use bzimage::{Kernel, unpack};
pub use elf::{Code, Elf, Segment};
