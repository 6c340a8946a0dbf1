//! Disks made of a seed, for machines without a host.

use std::collections::{BTreeMap, BTreeSet};

use hindsight_devices::{FirstReads, Storage, StorageError};
use hindsight_replay::rng::mix;
use hindsight_replay::{PAGE_BYTES, Stateful};
use serde::{Deserialize, Serialize};

/// Sector size in bytes; the toy's blocks are sectors.
const SECTOR: u64 = 512;
const PAGE_SECTORS: u64 = PAGE_BYTES as u64 / SECTOR;
/// More than any toy has.
const PAGES: u64 = 1 << 20;

/// One disk whose image is a function of a seed.
#[derive(Clone, Debug, Default)]
pub struct ToyDisks {
    seed: u64,
    /// One sector of the image that is not what the seed says.
    altered: Option<u64>,
    /// Fails at this call.
    fails_at: Option<u64>,
    calls: u64,
    written: BTreeSet<u64>,
    /// What was written; there may be more, which nobody reads.
    data: BTreeMap<u64, Vec<u8>>,
    seen: BTreeSet<u64>,
    /// Pages that were written since somebody asked.
    changed: BTreeSet<u64>,
    first_reads: Option<FirstReads>,
}

impl ToyDisks {
    /// A disk.
    pub fn new(seed: u64) -> ToyDisks {
        ToyDisks {
            seed,
            ..ToyDisks::default()
        }
    }

    /// The same, with another byte in this sector.
    pub fn altered(self, sector: u64) -> ToyDisks {
        ToyDisks {
            altered: Some(sector),
            ..self
        }
    }

    /// The same, but the host fails at its call number `call`, from 1.
    pub fn failing(self, call: u64) -> ToyDisks {
        ToyDisks {
            fails_at: Some(call),
            ..self
        }
    }

    fn sector(&mut self, sector: u64) -> Vec<u8> {
        if self.written.contains(&sector) {
            return self.written_data(sector);
        }
        let mut data = vec![mix(self.seed ^ sector) as u8; SECTOR as usize];
        if self.altered == Some(sector) {
            data[77] ^= 1;
        }
        if self.seen.insert(sector) {
            let reads = self.first_reads.get_or_insert(FirstReads {
                disk: 0,
                offset: sector * SECTOR,
                bytes: 0,
                check: 0,
            });
            reads.bytes += SECTOR;
            reads.check = data
                .iter()
                .fold(reads.check, |check, byte| mix(check ^ u64::from(*byte)));
        }
        data
    }

    fn written_data(&self, sector: u64) -> Vec<u8> {
        let zeroes = || vec![0; SECTOR as usize];
        self.data.get(&sector).cloned().unwrap_or_else(zeroes)
    }

    fn call(&mut self) -> Result<(), StorageError> {
        self.calls += 1;
        if self.fails_at == Some(self.calls) {
            let what = "it failed, as the test ordered".into();
            return Err(StorageError { disk: 0, what });
        }
        Ok(())
    }
}

impl Storage for ToyDisks {
    fn read(&mut self, _: usize, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        self.call()?;
        for (sector, into) in (offset / SECTOR..).zip(into.chunks_mut(SECTOR as usize)) {
            let data = self.sector(sector);
            into.copy_from_slice(&data[..into.len()]);
        }
        Ok(())
    }

    fn write(&mut self, _: usize, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        self.call()?;
        for (sector, from) in (offset / SECTOR..).zip(from.chunks(SECTOR as usize)) {
            self.written.insert(sector);
            self.data.insert(sector, from.to_vec());
            self.changed.insert(sector / PAGE_SECTORS);
        }
        Ok(())
    }

    fn clear(&mut self, disk: usize, offset: u64, bytes: u64) -> Result<(), StorageError> {
        self.write(disk, offset, &vec![0; bytes as usize])
    }

    fn digest(&mut self) -> Result<u64, StorageError> {
        let words = self.written.iter().map(|sector| {
            self.written_data(*sector)
                .iter()
                .fold(*sector, |digest, byte| mix(digest ^ u64::from(*byte)))
        });
        let words = words.chain(self.seen.iter().copied());
        Ok(words.fold(0, |digest, word| mix(digest ^ word)))
    }

    fn take_first_reads(&mut self) -> Option<FirstReads> {
        self.first_reads.take()
    }
}

/// What the guest has done to a [`ToyDisks`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DisksState {
    written: BTreeSet<u64>,
    seen: BTreeSet<u64>,
}

impl Stateful for ToyDisks {
    type State = DisksState;
    type Error = StorageError;

    fn save(&mut self) -> Result<DisksState, StorageError> {
        assert!(self.first_reads.is_none(), "not all first reads were told");
        Ok(DisksState {
            written: self.written.clone(),
            seen: self.seen.clone(),
        })
    }

    fn restore(&mut self, state: &DisksState) -> Result<(), StorageError> {
        self.written = state.written.clone();
        self.seen = state.seen.clone();
        self.first_reads = None;
        Ok(())
    }

    fn pages(&mut self) -> Result<Vec<u64>, StorageError> {
        let pages: BTreeSet<u64> = self.written.iter().map(|at| at / PAGE_SECTORS).collect();
        Ok(pages.into_iter().collect())
    }

    fn has_page(&self, number: u64) -> bool {
        number < PAGES
    }

    fn read_page(&mut self, number: u64, into: &mut [u8; PAGE_BYTES]) -> Result<(), StorageError> {
        into.fill(0);
        for (sector, into) in (number * PAGE_SECTORS..).zip(into.chunks_mut(SECTOR as usize)) {
            if let Some(data) = self.data.get(&sector) {
                into.copy_from_slice(data);
            }
        }
        Ok(())
    }

    fn write_page(&mut self, number: u64, from: &[u8; PAGE_BYTES]) -> Result<(), StorageError> {
        for (sector, from) in (number * PAGE_SECTORS..).zip(from.chunks(SECTOR as usize)) {
            self.data.insert(sector, from.to_vec());
        }
        Ok(())
    }

    fn take_changed_pages(&mut self) -> Result<Vec<u64>, StorageError> {
        Ok(std::mem::take(&mut self.changed).into_iter().collect())
    }
}
