//! What can be wrong with a kernel's file.
//!
//! Every variant is a fact about the input, not about our code: which byte or size was found, what
//! was expected there, and what the person at the keyboard can do.

use thiserror::Error;

/// Why a file is no kernel that can be booted here.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum KernelError {
    /// The file is no kernel that this loader knows.
    #[error(
        "the file starts with {found:02x?} and is neither a bzImage (0xaa55 at offset 0x1fe) nor an ELF \
         file (7f 45 4c 46); give the kernel itself, such as /boot/vmlinuz-*"
    )]
    NotAKernel {
        /// The first bytes of the file, at most eight.
        found: Vec<u8>,
    },
    /// The file is something else that is known.
    #[error("the kernel's file is {what}; {advice}")]
    OtherFormat {
        /// What it is.
        what: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// The file ends before something that its headers promise.
    #[error(
        "{what} needs {needed} bytes of the file, which has {found}; it was cut short, fetch it again"
    )]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// How long the file would have to be at least, in bytes.
        needed: u64,
        /// How long it is, in bytes.
        found: u64,
    },
    /// A boot sector without Linux's setup header.
    #[error(
        "the boot sector has {found:#010x} at offset 0x202, where Linux has 0x53726448 (\"HdrS\"); \
         give a Linux kernel newer than 2.6"
    )]
    NoSetupHeader {
        /// What is at 0x202.
        found: u32,
    },
    /// The boot protocol is too old to say where the compressed kernel lies.
    #[error(
        "boot protocol {}.{:02} does not say where the kernel proper lies; expected 2.08 or later \
         (Linux 2.6.26)", found >> 8, found & 0xff
    )]
    OldProtocol {
        /// The protocol version found, major in the high byte.
        found: u16,
    },
    /// A zImage, loaded below 1 MiB.
    #[error("loadflags are {loadflags:#04x} without LOADED_HIGH (bit 0): a zImage; give a bzImage")]
    NotLoadedHigh {
        /// The loadflags byte at 0x211.
        loadflags: u8,
    },
    /// A kernel for another kind of machine.
    #[error("{what} is {found:#x}, expected {expected:#x}; Hindsight runs 64-bit x86 kernels only")]
    NotX86_64 {
        /// Which field says so.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The value of a 64-bit x86 kernel.
        expected: u64,
    },
    /// No compression that Linux offers begins like this.
    #[error(
        "the kernel's payload starts with {found:02x?}, which is none of gzip, bzip2, lzma, xz, lzo, lz4, \
         zstd; unpack it (scripts/extract-vmlinux in the Linux tree) and give the vmlinux"
    )]
    UnknownCompression {
        /// The first bytes of the payload, at most six.
        found: Vec<u8>,
    },
    /// The compressed kernel does not unpack.
    #[error("the kernel's {compression} payload is damaged: {reason}; fetch the kernel again")]
    Damaged {
        /// The compression found.
        compression: &'static str,
        /// What the decompressor said.
        reason: String,
    },
    /// The unpacked kernel is larger than any kernel is.
    #[error(
        "the kernel unpacks to {found} bytes or more, the limit is {limit}; this is not a plain kernel"
    )]
    TooLarge {
        /// The size announced or reached, in bytes.
        found: u64,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The unpacked size differs from the one that the kernel's build appended.
    #[error(
        "the kernel's {compression} payload unpacks to {found} bytes, but it says of itself that it holds \
         {expected}; fetch the kernel again"
    )]
    WrongSize {
        /// The compression found.
        compression: &'static str,
        /// The size that the build appended to the payload.
        expected: u64,
        /// The size after unpacking.
        found: u64,
    },
    /// Something in the ELF file contradicts the rest of it.
    #[error("the kernel's ELF file is inconsistent: {what} is {found:#x}, expected {expected}")]
    BadElf {
        /// Which field.
        what: &'static str,
        /// Its value.
        found: u64,
        /// What would have been consistent.
        expected: &'static str,
    },
    /// Without section headers code can be told from data only where segments keep them apart.
    #[error(
        "the kernel has no section headers, and its segment at {address:#x} is both writable and executable: \
         code cannot be told from data; give a kernel with section headers (strip keeps them)"
    )]
    CodeUnknown {
        /// Virtual address of the segment.
        address: u64,
    },
    /// There is nothing to trap, so time would leak in unseen.
    #[error(
        "no rdtsc among {code_bytes} bytes of code: not a kernel we can trap; give an unmodified \
         x86-64 Linux kernel"
    )]
    NoTimeReads {
        /// How much code was looked at, in bytes.
        code_bytes: u64,
    },
    /// More to trap than any kernel has.
    #[error(
        "more than {limit} instructions to trap: not a kernel, but a file made to look like one; give an \
         unmodified x86-64 Linux kernel"
    )]
    TooManySites {
        /// The most that are taken.
        limit: usize,
    },
    /// An instruction to be trapped that carries more prefixes than a compiler writes.
    #[error(
        "the instruction to trap at {address:#x} is {length} bytes long, expected 2 to 4; report this kernel"
    )]
    OddSite {
        /// Virtual address of the instruction.
        address: u64,
        /// Its length in bytes.
        length: usize,
    },
    /// The list of trap sites was made for another kernel.
    #[error(
        "there is no {kind} at {address:#x} in this kernel: the trap sites were found in another one; find them anew"
    )]
    ForeignSite {
        /// Virtual address of the site.
        address: u64,
        /// What should stand there.
        kind: &'static str,
    },
}
