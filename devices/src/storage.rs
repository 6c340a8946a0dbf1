//! What is lent to the board with each access: guest memory, and the bytes of the machine's disks.
//!
//! Devices that move data by themselves work on both and keep neither.

use std::fmt::Debug;

use thiserror::Error;
use vm_memory::bitmap::{AtomicBitmap, RefSlice};

/// Guest memory, as devices see it. It remembers which of its pages were written by way of it.
pub type Ram = vm_memory::GuestMemoryMmap<AtomicBitmap>;
/// Reads what a guest has put into a chain of buffers.
pub(crate) type Reader<'a> = virtio_queue::Reader<'a, RefSlice<'a, AtomicBitmap>>;
/// Writes to one.
pub(crate) type Writer<'a> = virtio_queue::Writer<'a, RefSlice<'a, AtomicBitmap>>;

/// What an access may work on beside the board itself.
#[derive(Debug)]
pub struct BusContext<'a> {
    /// Guest memory.
    pub ram: &'a Ram,
    /// The disks.
    pub storage: &'a mut dyn Storage,
}

/// The bytes of the machine's disks: for each, an image that never changes, and what the guest has
/// written since.
///
/// What a read gives must depend on that image and on earlier calls alone.
pub trait Storage: Debug {
    /// Reads from byte `offset` of disk number `disk` on; the range lies inside the disk.
    ///
    /// # Errors
    ///
    /// The host cannot give back what is there. The run cannot go on.
    fn read(&mut self, disk: usize, offset: u64, into: &mut [u8]) -> Result<(), StorageError>;

    /// Writes from byte `offset` on; the range lies inside the disk.
    ///
    /// # Errors
    ///
    /// The host has no room, or cannot write. The run cannot go on.
    fn write(&mut self, disk: usize, offset: u64, from: &[u8]) -> Result<(), StorageError>;

    /// Makes a range zero; it lies inside the disk.
    ///
    /// # Errors
    ///
    /// As for [`Storage::write`].
    fn clear(&mut self, disk: usize, offset: u64, bytes: u64) -> Result<(), StorageError>;

    /// A number for what the guest has written and for what it has read: equal for disks that will give
    /// the same answers from here on.
    ///
    /// # Errors
    ///
    /// The host cannot give back what is there. The run cannot go on.
    fn digest(&mut self) -> Result<u64, StorageError>;

    /// What was read from images for the first time since this was last asked.
    fn take_first_reads(&mut self) -> Option<FirstReads>;
}

/// Blocks of an image that the guest had not read before, under one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstReads {
    /// Number of the disk that the first of them is on.
    pub disk: usize,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How many bytes they are together.
    pub bytes: u64,
    /// XXH3-64 of each block, chained in the order of reading.
    pub check: u64,
}

/// The host failed a disk.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("disk {disk}: {what}")]
pub struct StorageError {
    /// Which disk, from 0.
    pub disk: usize,
    /// What happened and what to do.
    pub what: String,
}

/// A machine without disks.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDisks;

impl Storage for NoDisks {
    fn read(&mut self, disk: usize, _: u64, _: &mut [u8]) -> Result<(), StorageError> {
        none(disk)
    }
    fn write(&mut self, disk: usize, _: u64, _: &[u8]) -> Result<(), StorageError> {
        none(disk)
    }
    fn clear(&mut self, disk: usize, _: u64, _: u64) -> Result<(), StorageError> {
        none(disk)
    }
    fn digest(&mut self) -> Result<u64, StorageError> {
        Ok(0)
    }
    fn take_first_reads(&mut self) -> Option<FirstReads> {
        None
    }
}

fn none(disk: usize) -> Result<(), StorageError> {
    let what = "the machine has no such disk".into();
    Err(StorageError { disk, what })
}
