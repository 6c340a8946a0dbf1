//! What the guest has done to its disks, as a value: the blocks that it has written, and those of the images that it
//! has read.

use hindsight_devices::StorageError;
use hindsight_replay::Stateful;
use serde::{Deserialize, Serialize};

use super::{BLOCK_BYTES, BlockSet, Disk, Disks, LEAF_BLOCKS, SharedDisks, overlay_failed};

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
            std::os::unix::fs::FileExt::write_all_at(&self.overlay, &block.bytes, start)
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
