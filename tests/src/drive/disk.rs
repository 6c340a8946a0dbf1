//! Disks of any size for the fuzz targets, which count what is asked of them.

use std::collections::BTreeMap;
use std::ops::Range;

use hindsight_devices::{FirstReads, Storage, StorageError};

const SECTOR_BYTES: u64 = 512;

/// What was asked of the disks since this was last taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Calls.
    pub calls: u64,
    /// Bytes read and written.
    pub moved_bytes: u64,
    /// Bytes made zero.
    pub cleared_bytes: u64,
}

/// The disks.
#[derive(Clone, Debug)]
pub struct Disks {
    bytes: Vec<u64>,
    written: BTreeMap<(usize, u64), Vec<u8>>,
    cleared: Vec<(usize, Range<u64>)>,
    /// What was asked.
    pub work: Work,
}

impl Disks {
    /// Disks of these lengths.
    pub fn new(bytes: Vec<u64>) -> Disks {
        Disks {
            bytes,
            written: BTreeMap::new(),
            cleared: Vec::new(),
            work: Work::default(),
        }
    }

    /// The sectors of a range, which must lie on the disk.
    fn sectors(&mut self, disk: usize, offset: u64, bytes: u64) -> Range<u64> {
        let end = offset.checked_add(bytes).expect("a range on the disk");
        assert!(
            end <= self.bytes[disk],
            "{bytes} bytes at {offset} lie outside disk {disk}"
        );
        assert!(
            offset.is_multiple_of(SECTOR_BYTES) && bytes.is_multiple_of(SECTOR_BYTES),
            "whole sectors"
        );
        self.work.calls += 1;
        offset / SECTOR_BYTES..end / SECTOR_BYTES
    }
}

impl Storage for Disks {
    fn read(&mut self, disk: usize, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        let sectors = self.sectors(disk, offset, into.len() as u64);
        self.work.moved_bytes += into.len() as u64;
        for (sector, into) in sectors.zip(into.chunks_mut(SECTOR_BYTES as usize)) {
            let is_clear =
                |(other, range): &(usize, Range<u64>)| *other == disk && range.contains(&sector);
            if let Some(data) = self.written.get(&(disk, sector)) {
                into.copy_from_slice(data);
            } else if self.cleared.iter().any(is_clear) {
                into.fill(0);
            } else {
                // Nothing that stands for an address in guest memory.
                into.fill(0x80 | sector as u8);
            }
        }
        Ok(())
    }

    fn write(&mut self, disk: usize, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        let sectors = self.sectors(disk, offset, from.len() as u64);
        self.work.moved_bytes += from.len() as u64;
        for (sector, from) in sectors.zip(from.chunks(SECTOR_BYTES as usize)) {
            self.written.insert((disk, sector), from.to_vec());
        }
        Ok(())
    }

    fn clear(&mut self, disk: usize, offset: u64, bytes: u64) -> Result<(), StorageError> {
        let sectors = self.sectors(disk, offset, bytes);
        self.work.cleared_bytes += bytes;
        self.written
            .retain(|(other, sector), _| *other != disk || !sectors.contains(sector));
        let cleared = (disk, sectors);
        if !self.cleared.contains(&cleared) {
            self.cleared.push(cleared);
        }
        Ok(())
    }

    fn digest(&mut self) -> Result<u64, StorageError> {
        Ok(0)
    }

    fn take_first_reads(&mut self) -> Option<FirstReads> {
        None
    }
}
