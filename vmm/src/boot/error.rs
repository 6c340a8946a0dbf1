//! What can be wrong with a kernel, an initrd, a command line or the memory given for them.
//!
//! Every variant is a fact about the input, not about our code: which byte or size was found, what
//! was expected there, and what the person at the keyboard can do.

use hindsight_kernel::KernelError;
use thiserror::Error;

/// Why a machine could not be made ready to boot.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BootError {
    /// The kernel's file will not do.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The command line is longer than the kernel reads.
    #[error("the command line is {found} bytes long, this kernel reads {limit}; shorten it")]
    CommandLineTooLong {
        /// Its length in bytes.
        found: usize,
        /// The most that the kernel takes, in bytes.
        limit: usize,
    },
    /// The command line would end early.
    #[error(
        "the command line has a NUL at byte {at}, where the kernel would stop reading; remove it"
    )]
    CommandLineNul {
        /// Offset of the NUL.
        at: usize,
    },
    /// A part of the kernel wants the place of the boot tables.
    #[error(
        "the kernel's segment at {address:#x} lies below 1 MiB, where the boot tables are; expected {expected:#x} or above"
    )]
    SegmentTooLow {
        /// Its physical address.
        address: u64,
        /// The lowest address a kernel may have.
        expected: u64,
    },
    /// The guest's memory cannot hold kernel and initrd.
    #[error(
        "{what} needs guest memory up to {needed:#x} ({} MiB), but it ends at {found:#x}; give the machine that much and some 16 MiB to work in",
        needed.div_ceil(1 << 20)
    )]
    MemoryTooSmall {
        /// What does not fit.
        what: &'static str,
        /// Lowest sufficient end of low memory, in bytes.
        needed: u64,
        /// Where low memory ends, in bytes.
        found: u64,
    },
    /// The kernel cannot reach an initrd as high as this one would have to be.
    #[error(
        "the initrd of {bytes} bytes does not fit between the kernel's end {lowest:#x} and {highest:#x}, the highest place this kernel reads; make it smaller"
    )]
    InitrdTooLarge {
        /// Its size in bytes.
        bytes: u64,
        /// First free address above the kernel.
        lowest: u64,
        /// First address that the initrd may not cover.
        highest: u64,
    },
    /// The memory map has more entries than the zero page holds.
    #[error(
        "the memory map has {found} entries, the boot protocol carries {limit}; merge neighbours"
    )]
    MemoryMapTooLong {
        /// Entries given.
        found: usize,
        /// Entries possible.
        limit: usize,
    },
    /// The memory map names no RAM at 1 MiB.
    #[error(
        "the memory map has no RAM at 0x100000, where kernels live; give the machine more than 1 MiB"
    )]
    NoHighMemory,
    /// A write fell outside guest memory.
    #[error(transparent)]
    OutOfRam(#[from] OutOfRam),
}

/// A write that guest memory cannot take.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
#[error(
    "a write of {bytes} bytes at {gpa:#x} falls outside the guest's {ram_bytes} bytes of memory; give the machine more"
)]
pub struct OutOfRam {
    /// Guest physical address of the write.
    pub gpa: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Total memory of the guest in bytes.
    pub ram_bytes: u64,
}
