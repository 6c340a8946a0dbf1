//! What the guest has done to its disks, as a value: the blocks that it has written, and those of the images that it
//! has read.

use std::fs::File;
use std::os::unix::fs::FileExt;

use hindsight_devices::StorageError;
use hindsight_replay::Stateful;
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
    /// By ascending number.
    written: Vec<WrittenBlock>,
    seen: SeenBlocks,
}

/// A block that stands in the overlay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct WrittenBlock {
    number: u64,
    /// What it holds; empty if that is zeroes.
    bytes: Vec<u8>,
}

/// The leaves of a [`BlockSet`], by ascending number. As they are in memory: a range could name more blocks in a few
/// bytes than there is room for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SeenBlocks(Vec<(u64, Vec<u64>)>);

impl Disk {
    fn save(&self, number: usize) -> Result<DiskState, StorageError> {
        let block = |block: u64| {
            let start = block * BLOCK_BYTES;
            let mut bytes = vec![0; self.block_bytes(block)];
            self.read(number, start, &mut bytes)?;
            if bytes.iter().all(|byte| *byte == 0) {
                bytes.clear();
            }
            Ok(WrittenBlock {
                number: block,
                bytes,
            })
        };
        let seen = self.seen.0.iter();
        Ok(DiskState {
            written: self.written.iter().map(block).collect::<Result<_, _>>()?,
            seen: SeenBlocks(seen.map(|(leaf, words)| (*leaf, words.to_vec())).collect()),
        })
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

    fn restore(&mut self, number: usize, state: &DiskState) -> Result<(), StorageError> {
        let seen = self.checked(state).ok_or_else(|| damaged(number))?;
        let failed = |source| overlay_failed(number, &source);
        // Nothing of what was written before, and holes where zeroes are.
        let bytes = self.image.image.bytes.next_multiple_of(BLOCK_BYTES);
        self.overlay.set_len(0).map_err(failed)?;
        self.overlay.set_len(bytes).map_err(failed)?;
        self.written = BlockSet::default();
        for block in &state.written {
            let start = block.number * BLOCK_BYTES;
            self.overlay
                .write_all_at(&block.bytes, start)
                .map_err(failed)?;
            self.written.insert(block.number);
        }
        self.seen = seen;
        Ok(())
    }

    /// The blocks seen, if the state is one of a disk of this length.
    fn checked(&self, state: &DiskState) -> Option<BlockSet> {
        let blocks = self.image.image.bytes.div_ceil(BLOCK_BYTES);
        let ascend = state.written.is_sorted_by(|a, b| a.number < b.number);
        let fits = |block: &WrittenBlock| {
            block.number < blocks
                && (block.bytes.is_empty() || block.bytes.len() == self.block_bytes(block.number))
        };
        if !ascend || !state.written.iter().all(fits) {
            return None;
        }
        let leaves = &state.seen.0;
        let leaf = |(leaf, words): &(u64, Vec<u64>)| {
            let words = <[u64; 64]>::try_from(&words[..]).ok()?;
            (*leaf < blocks.div_ceil(LEAF_BLOCKS)).then(|| (*leaf, Box::new(words)))
        };
        let ascend = leaves.is_sorted_by(|a, b| a.0 < b.0);
        let seen = leaves.iter().map(leaf).collect::<Option<_>>()?;
        ascend.then_some(BlockSet(seen))
    }

    fn block_bytes(&self, block: u64) -> usize {
        (self.image.image.bytes - block * BLOCK_BYTES).min(BLOCK_BYTES) as usize
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
        let disks = self.disks.iter().enumerate();
        let states = disks.map(|(number, disk)| disk.save(number));
        Ok(DisksState(states.collect::<Result<_, _>>()?))
    }

    fn restore(&mut self, state: &DisksState) -> Result<(), StorageError> {
        if self.disks.len() != state.0.len() {
            return Err(damaged(state.0.len()));
        }
        self.first_reads = None;
        let disks = self.disks.iter_mut().zip(&state.0).enumerate();
        for (number, (disk, state)) in disks {
            disk.restore(number, state)?;
        }
        Ok(())
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
        let state = disks.save().unwrap();
        let (_file, mut others) = self::disks(BYTES);
        others.restore(&state).unwrap();
        assert_eq!(others.digest().unwrap(), read);
    }

    #[test]
    fn a_state_that_no_disk_of_this_length_could_have_is_refused() {
        let (_file, mut disks) = disks(3 * 4096 + 512);
        let block = |number, bytes: usize| WrittenBlock {
            number,
            bytes: vec![1; bytes],
        };
        let state = |written: Vec<WrittenBlock>, seen: Vec<(u64, Vec<u64>)>| {
            let seen = SeenBlocks(seen);
            DisksState(vec![DiskState { written, seen }])
        };
        let good = state(vec![block(0, 4096), block(3, 512)], vec![(0, vec![7; 64])]);
        disks.restore(&good).unwrap();
        assert_eq!(disks.save().unwrap(), good);
        for bad in [
            DisksState::default(),
            state(vec![block(0, 512)], vec![]),
            state(vec![block(3, 4096)], vec![]),
            state(vec![block(4, 512)], vec![]),
            state(vec![block(u64::MAX, 512)], vec![]),
            state(vec![block(1, 4096), block(1, 4096)], vec![]),
            state(vec![], vec![(1, vec![0; 64])]),
            state(vec![], vec![(0, vec![0; 63])]),
            state(vec![], vec![(0, vec![0; 64]), (0, vec![0; 64])]),
        ] {
            assert!(disks.restore(&bad).is_err(), "{bad:?}");
            assert_eq!(disks.save().unwrap(), good, "nothing was changed");
        }
    }
}
