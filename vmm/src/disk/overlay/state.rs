//! What the guest has done to its disks, as a value: which blocks it has written, and which of the images it has read. What
//! the written ones hold are pages.

use std::fs::File;
use std::os::unix::fs::FileExt;

use hindsight_devices::StorageError;
use hindsight_replay::{DISK_BYTES_MAX, PAGE_BYTES, Stateful};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh64::xxh64;

use super::{BLOCK_BYTES, BlockSet, Disk, Disks, LEAF_BLOCKS, SharedDisks, overlay_failed};

/// How much of an overlay is read at a time to be digested; whole blocks.
const DIGEST_BYTES: usize = 1 << 20;

/// All of a machine's disks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DisksState(Vec<DiskState>);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct DiskState {
    written: SavedBlocks,
    seen: SavedBlocks,
}

/// The leaves of a [`BlockSet`], by ascending number. As they are in memory: a range could name more blocks in a few
/// bytes than there is room for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedBlocks(Vec<(u64, Vec<u64>)>);

impl SavedBlocks {
    fn of(set: &BlockSet) -> SavedBlocks {
        let leaves = set.0.iter();
        SavedBlocks(
            leaves
                .map(|(leaf, words)| (*leaf, words.to_vec()))
                .collect(),
        )
    }

    /// The set, if all of it is below block `blocks`.
    fn set(&self, blocks: u64) -> Option<BlockSet> {
        let leaf = |(leaf, words): &(u64, Vec<u64>)| {
            let words = <[u64; 64]>::try_from(&words[..]).ok()?;
            (*leaf < blocks.div_ceil(LEAF_BLOCKS)).then(|| (*leaf, Box::new(words)))
        };
        let ascend = self.0.is_sorted_by(|a, b| a.0 < b.0);
        let set = BlockSet(self.0.iter().map(leaf).collect::<Option<_>>()?);
        (ascend && set.iter().all(|block| block < blocks)).then_some(set)
    }
}

/// Blocks as the pages of a machine: the number of the disk above, that of the block below. What a page of a block that
/// was not written holds is nothing that the guest can read.
const DISK_SHIFT: u32 = 48;
const _: () = assert!(DISK_BYTES_MAX / BLOCK_BYTES < 1 << DISK_SHIFT);
const _: () = assert!(BLOCK_BYTES as usize == PAGE_BYTES);

fn page_number(disk: usize, block: u64) -> u64 {
    (disk as u64) << DISK_SHIFT | block
}

/// Disk and block of a page.
fn of_page(number: u64) -> (usize, u64) {
    (
        (number >> DISK_SHIFT) as usize,
        number & ((1 << DISK_SHIFT) - 1),
    )
}

impl Disk {
    fn save(&self) -> DiskState {
        DiskState {
            written: SavedBlocks::of(&self.written),
            seen: SavedBlocks::of(&self.seen),
        }
    }

    /// A number for what was written and what was read, chained to `before`. Holes in the overlay are zeroes, and are
    /// not read: a guest may clear more than there is time to look at.
    pub(super) fn digest(&self, number: usize, before: u64) -> Result<u64, StorageError> {
        let mut digest = before;
        for set in [&self.written, &self.seen] {
            for (leaf, words) in &set.0 {
                let words = words.map(u64::to_le_bytes);
                digest = xxh64(words.as_flattened(), digest ^ leaf);
            }
        }
        let mut buffer = vec![0; DIGEST_BYTES];
        let failed = |source| overlay_failed(number, &source);
        let mut at = 0;
        while let Some(data) = next_data(&self.overlay, at).map_err(failed)? {
            let start = data - data % DIGEST_BYTES as u64;
            let bytes = self.overlay.metadata().map_err(failed)?.len() - start;
            let piece = &mut buffer[..bytes.min(DIGEST_BYTES as u64) as usize];
            self.overlay.read_exact_at(piece, start).map_err(failed)?;
            for (block, bytes) in (start..)
                .step_by(BLOCK_BYTES as usize)
                .zip(piece.chunks(BLOCK_BYTES as usize))
            {
                if bytes.iter().any(|byte| *byte != 0) {
                    digest = xxh64(bytes, digest ^ block);
                }
            }
            at = start + DIGEST_BYTES as u64;
        }
        Ok(digest)
    }

    /// How many blocks it has; the last one may be shorter.
    fn blocks(&self) -> u64 {
        self.image.image.bytes.div_ceil(BLOCK_BYTES)
    }

    /// The overlay's bytes of a block, whether it was written or not.
    fn read_block(&self, block: u64, into: &mut [u8; PAGE_BYTES]) -> std::io::Result<()> {
        let bytes = self.block_bytes(block);
        into[bytes..].fill(0);
        self.overlay
            .read_exact_at(&mut into[..bytes], block * BLOCK_BYTES)
    }

    /// Zeroes are a hole.
    fn write_block(&self, block: u64, from: &[u8; PAGE_BYTES]) -> std::io::Result<()> {
        let (start, bytes) = (block * BLOCK_BYTES, self.block_bytes(block));
        if from.iter().all(|byte| *byte == 0) && self.punch(start, BLOCK_BYTES) {
            return Ok(());
        }
        self.overlay.write_all_at(&from[..bytes], start)
    }

    fn block_bytes(&self, block: u64) -> usize {
        (self.image.image.bytes - block * BLOCK_BYTES).min(BLOCK_BYTES) as usize
    }
}

impl Disks {
    fn disk_of(&self, page: u64) -> Result<(usize, &Disk, u64), StorageError> {
        let (number, block) = of_page(page);
        let disk = self.disks.get(number).filter(|disk| block < disk.blocks());
        let disk = disk.ok_or_else(|| damaged(number))?;
        Ok((number, disk, block))
    }
}

impl Stateful for Disks {
    type State = DisksState;
    type Error = StorageError;

    fn save(&mut self) -> Result<DisksState, StorageError> {
        assert!(
            self.first_reads.is_none(),
            "what was read first was not told"
        );
        Ok(DisksState(self.disks.iter().map(Disk::save).collect()))
    }

    fn restore(&mut self, state: &DisksState) -> Result<(), StorageError> {
        if self.disks.len() != state.0.len() {
            return Err(damaged(state.0.len()));
        }
        let sets = self.disks.iter().zip(&state.0).enumerate();
        let sets = sets.map(|(number, (disk, state))| {
            let sets = (state.written.set(disk.blocks())).zip(state.seen.set(disk.blocks()));
            sets.ok_or_else(|| damaged(number))
        });
        let sets: Vec<_> = sets.collect::<Result<_, _>>()?;
        for (disk, (written, seen)) in self.disks.iter_mut().zip(sets) {
            (disk.written, disk.seen) = (written, seen);
        }
        self.first_reads = None;
        Ok(())
    }

    fn pages(&mut self) -> Result<Vec<u64>, StorageError> {
        let disks = self.disks.iter().enumerate();
        let pages = disks.flat_map(|(number, disk)| {
            let blocks = disk.written.iter();
            blocks.map(move |block| page_number(number, block))
        });
        Ok(pages.collect())
    }

    fn has_page(&self, number: u64) -> bool {
        self.disk_of(number).is_ok()
    }

    fn read_page(&mut self, number: u64, into: &mut [u8; PAGE_BYTES]) -> Result<(), StorageError> {
        let (number, disk, block) = self.disk_of(number)?;
        let read = disk.read_block(block, into);
        read.map_err(|source| overlay_failed(number, &source))
    }

    fn write_page(&mut self, number: u64, from: &[u8; PAGE_BYTES]) -> Result<(), StorageError> {
        let (number, disk, block) = self.disk_of(number)?;
        let written = disk.write_block(block, from);
        written.map_err(|source| overlay_failed(number, &source))
    }

    fn take_changed_pages(&mut self) -> Result<Vec<u64>, StorageError> {
        let disks = self.disks.iter_mut().enumerate();
        let pages = disks.flat_map(|(number, disk)| {
            let changed = std::mem::take(&mut disk.changed);
            let blocks: Vec<_> = changed.iter().collect();
            blocks
                .into_iter()
                .map(move |block| page_number(number, block))
        });
        Ok(pages.collect())
    }
}

impl Stateful for SharedDisks {
    type State = DisksState;
    type Error = StorageError;

    fn save(&mut self) -> Result<DisksState, StorageError> {
        self.0.borrow_mut().save()
    }

    fn restore(&mut self, state: &DisksState) -> Result<(), StorageError> {
        self.0.borrow_mut().restore(state)
    }

    fn pages(&mut self) -> Result<Vec<u64>, StorageError> {
        self.0.borrow_mut().pages()
    }

    fn has_page(&self, number: u64) -> bool {
        self.0.borrow().has_page(number)
    }

    fn read_page(&mut self, number: u64, into: &mut [u8; PAGE_BYTES]) -> Result<(), StorageError> {
        self.0.borrow_mut().read_page(number, into)
    }

    fn write_page(&mut self, number: u64, from: &[u8; PAGE_BYTES]) -> Result<(), StorageError> {
        self.0.borrow_mut().write_page(number, from)
    }

    fn take_changed_pages(&mut self) -> Result<Vec<u64>, StorageError> {
        self.0.borrow_mut().take_changed_pages()
    }
}

/// The next byte of `file` from `at` on that is in no hole.
fn next_data(file: &File, at: u64) -> std::io::Result<Option<u64>> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn damaged(disk: usize) -> StorageError {
    let what = "its saved state is damaged, or is another disk's; take an earlier state, or replay \
                from the start";
    StorageError {
        disk,
        what: what.into(),
    }
}

/// Disks with what their pages hold, for tests.
#[cfg(test)]
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Whole(DisksState, Vec<(u64, [u8; PAGE_BYTES])>);

#[cfg(test)]
impl Whole {
    pub(super) fn of(disks: &mut Disks) -> Whole {
        let state = disks.save().unwrap();
        let pages = disks.pages().unwrap().into_iter();
        let pages = pages.map(|page| {
            let mut bytes = [0; PAGE_BYTES];
            disks.read_page(page, &mut bytes).unwrap();
            (page, bytes)
        });
        Whole(state, pages.collect())
    }

    pub(super) fn put(&self, disks: &mut Disks) {
        for page in disks.pages().unwrap() {
            disks.write_page(page, &[0; PAGE_BYTES]).unwrap();
        }
        for (page, bytes) in &self.1 {
            disks.write_page(*page, bytes).unwrap();
        }
        disks.restore(&self.0).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(bytes: usize) -> (tempfile::NamedTempFile, Disks) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![5; bytes]).unwrap();
        let image = crate::disk::OpenImage::open(file.path()).unwrap();
        (file, Disks::new(vec![image]).unwrap())
    }

    #[test]
    fn the_digest_knows_what_was_written_read_and_cleared_and_not_how_it_is_kept() {
        use hindsight_devices::Storage;
        const BYTES: usize = 3 << 20;
        let (_file, mut disks) = disks(BYTES);
        let fresh = disks.digest().unwrap();
        disks.write(0, (BYTES - 512) as u64, &[1; 512]).unwrap();
        let written = disks.digest().unwrap();
        disks.write(0, 8192, &[0; 4096]).unwrap();
        let zeroes = disks.digest().unwrap();
        disks.clear(0, 8192, 4096).unwrap();
        assert_eq!(disks.digest().unwrap(), zeroes);
        disks.write(0, 1 << 20, &[2; 4096]).unwrap();
        let more = disks.digest().unwrap();
        disks.read(0, 40960, &mut [0; 512]).unwrap();
        disks.take_first_reads();
        let read = disks.digest().unwrap();
        let all = [fresh, written, zeroes, more, read];
        assert_eq!(
            all.iter().collect::<std::collections::BTreeSet<_>>().len(),
            5
        );
        let (_file, mut others) = self::disks(BYTES);
        others.write(0, 4096, &[7; 8192]).unwrap();
        others.take_changed_pages().unwrap();
        Whole::of(&mut disks).put(&mut others);
        assert_eq!(others.digest().unwrap(), read);
    }

    #[test]
    fn what_was_written_changed_and_its_last_block_may_be_short() {
        use hindsight_devices::Storage;
        let (_file, mut disks) = disks(3 * 4096 + 512);
        assert!(disks.take_changed_pages().unwrap().is_empty());
        disks.write(0, 3 * 4096, &[9; 512]).unwrap();
        disks.write(0, 4000, &[1; 100]).unwrap();
        disks.read(0, 8192, &mut [0; 4096]).unwrap();
        disks.take_first_reads();
        assert_eq!(disks.take_changed_pages().unwrap(), [0, 1, 3]);
        assert!(disks.take_changed_pages().unwrap().is_empty());
        disks.clear(0, 0, 4096).unwrap();
        assert_eq!(disks.take_changed_pages().unwrap(), [0]);
        assert_eq!(disks.pages().unwrap(), [0, 1, 3]);
        let mut last = [1; PAGE_BYTES];
        disks.read_page(3, &mut last).unwrap();
        assert!(last[..512] == [9; 512] && last[512..].iter().all(|byte| *byte == 0));
        let (_file, mut others) = self::disks(3 * 4096 + 512);
        Whole::of(&mut disks).put(&mut others);
        assert_eq!(others.digest().unwrap(), disks.digest().unwrap());
        for missing in [4, 1 << DISK_SHIFT, u64::MAX >> 1] {
            assert!(!disks.has_page(missing));
            assert!(disks.read_page(missing, &mut last).is_err());
            assert!(disks.write_page(missing, &last).is_err());
        }
    }

    #[test]
    fn a_state_that_no_disk_of_this_length_could_have_is_refused() {
        let (_file, mut disks) = disks(3 * 4096 + 512);
        let state = |written: Vec<(u64, Vec<u64>)>, seen: Vec<(u64, Vec<u64>)>| {
            let (written, seen) = (SavedBlocks(written), SavedBlocks(seen));
            DisksState(vec![DiskState { written, seen }])
        };
        let leaf = |first: u64| {
            let mut words = vec![0; 64];
            words[0] = first;
            words
        };
        let good = state(vec![(0, leaf(0b1001))], vec![(0, leaf(7))]);
        disks.restore(&good).unwrap();
        assert_eq!(disks.save().unwrap(), good);
        for bad in [
            DisksState::default(),
            state(vec![(0, leaf(1 << 4))], vec![]),
            state(vec![], vec![(0, leaf(1 << 63))]),
            state(vec![(1, leaf(0))], vec![]),
            state(vec![], vec![(u64::MAX, leaf(1))]),
            state(vec![(0, leaf(1)), (0, leaf(1))], vec![]),
            state(vec![], vec![(0, vec![0; 63])]),
        ] {
            assert!(disks.restore(&bad).is_err(), "{bad:?}");
            assert_eq!(disks.save().unwrap(), good, "nothing was changed");
        }
    }
}
