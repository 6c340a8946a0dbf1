//! What the guest has written, over the images.

mod state;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use hindsight_devices::{FirstReads, Storage, StorageError};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{BLOCK_BYTES, DiskError, OpenImage};
pub use state::DisksState;

/// Blocks of a disk that one leaf of a [`BlockSet`] has.
const LEAF_BLOCKS: u64 = 64 * 64;

/// Some of the blocks of a disk. It takes room for those regions that have any: an image can be a few kilobytes in
/// a file that says it has exabytes.
#[derive(Debug, Default)]
struct BlockSet(BTreeMap<u64, Box<[u64; 64]>>);

impl BlockSet {
    fn place(block: u64) -> (u64, usize, u64) {
        let within = block % LEAF_BLOCKS;
        (
            block / LEAF_BLOCKS,
            (within / 64) as usize,
            1 << (within % 64),
        )
    }

    fn has(&self, block: u64) -> bool {
        let (leaf, word, bit) = BlockSet::place(block);
        self.0
            .get(&leaf)
            .is_some_and(|words| words[word] & bit != 0)
    }

    /// Adds a block; whether it was new.
    fn insert(&mut self, block: u64) -> bool {
        let (leaf, word, bit) = BlockSet::place(block);
        let words = self.0.entry(leaf).or_insert_with(|| Box::new([0; 64]));
        let new = words[word] & bit == 0;
        words[word] |= bit;
        new
    }

    /// Whether one of these blocks is in it.
    fn has_any(&self, blocks: std::ops::Range<u64>) -> bool {
        let leaves = blocks.start / LEAF_BLOCKS..blocks.end.div_ceil(LEAF_BLOCKS);
        self.0.range(leaves).any(|(leaf, _)| {
            let start = leaf * LEAF_BLOCKS;
            (blocks.start.max(start)..blocks.end.min(start + LEAF_BLOCKS))
                .any(|block| self.has(block))
        })
    }

    /// All of them, ascending.
    fn iter(&self) -> impl Iterator<Item = u64> {
        self.0.iter().flat_map(|(leaf, words)| {
            let blocks = (0..LEAF_BLOCKS)
                .filter(|within| words[(within / 64) as usize] >> (within % 64) & 1 != 0);
            blocks.map(move |within| leaf * LEAF_BLOCKS + within)
        })
    }
}

/// One disk.
#[derive(Debug)]
struct Disk {
    image: OpenImage,
    overlay: File,
    /// Blocks that stand in the overlay.
    written: BlockSet,
    /// Blocks of the image that have been hashed.
    seen: BlockSet,
    /// Blocks that were written since somebody asked.
    changed: BlockSet,
}

/// All disks of a machine.
#[derive(Debug, Default)]
pub struct Disks {
    disks: Vec<Disk>,
    first_reads: Option<FirstReads>,
}

impl Disks {
    /// Disks over these images, nothing written to them yet.
    pub fn new(images: Vec<OpenImage>) -> Result<Disks, DiskError> {
        let disks = images.into_iter().map(|image| {
            let directory = std::env::temp_dir();
            let failed = |source| DiskError::Overlay {
                path: directory.clone(),
                source,
            };
            let overlay = tempfile::tempfile_in(&directory).map_err(failed)?;
            let bytes = image.image.bytes;
            overlay
                .set_len(bytes.next_multiple_of(BLOCK_BYTES))
                .map_err(failed)?;
            Ok(Disk {
                image,
                overlay,
                written: BlockSet::default(),
                seen: BlockSet::default(),
                changed: BlockSet::default(),
            })
        });
        Ok(Disks {
            disks: disks.collect::<Result<_, DiskError>>()?,
            first_reads: None,
        })
    }

    /// Length of a disk in bytes.
    pub fn bytes(&self, disk: usize) -> Option<u64> {
        self.disks.get(disk).map(|disk| disk.image.image.bytes)
    }

    /// The image that a disk was made over.
    pub fn image(&self, disk: usize) -> Option<&OpenImage> {
        self.disks.get(disk).map(|disk| &disk.image)
    }

    /// The blocks of a disk that the guest has written, ascending.
    pub fn written(&self, disk: usize) -> impl Iterator<Item = u64> {
        self.disks
            .get(disk)
            .into_iter()
            .flat_map(|disk| disk.written.iter())
    }

    /// Whether the guest has written anything to these bytes of a disk, or to the blocks that they are in.
    pub fn has_written(&self, disk: usize, offset: u64, bytes: u64) -> bool {
        let blocks = offset / BLOCK_BYTES..offset.saturating_add(bytes).div_ceil(BLOCK_BYTES);
        self.disks
            .get(disk)
            .is_some_and(|disk| disk.written.has_any(blocks))
    }

    /// Reads what the guest would, and leaves no trace of it.
    pub fn peek(&self, disk: usize, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        self.disks[disk].read(disk, offset, into)
    }

    /// Puts a block of the image that nobody has read before under the check.
    fn note(&mut self, number: usize, start: u64, data: &[u8]) {
        let reads = self.first_reads.get_or_insert(FirstReads {
            disk: number,
            offset: start,
            bytes: 0,
            check: 0,
        });
        reads.bytes += data.len() as u64;
        reads.check = xxh3_64_with_seed(data, reads.check);
    }

    /// Moves a block that is about to be written in part to the overlay.
    fn fetch(&mut self, number: usize, block: u64) -> Result<(), StorageError> {
        let disk = &mut self.disks[number];
        if disk.written.has(block) {
            return Ok(());
        }
        let mut bytes = [0; BLOCK_BYTES as usize];
        let data = disk.image_block(number, block, &mut bytes)?;
        let start = block * BLOCK_BYTES;
        disk.overlay
            .write_all_at(data, start)
            .map_err(|source| overlay_failed(number, &source))?;
        disk.is_written(block);
        if disk.seen.insert(block) {
            self.note(number, start, data);
        }
        Ok(())
    }

    /// Makes ready to write a range: blocks that it covers in part are fetched, and all are the overlay's then.
    fn take_over(&mut self, number: usize, offset: u64, bytes: u64) -> Result<(), StorageError> {
        let end = offset + bytes;
        let length = self.disks[number].image.image.bytes;
        let (first, last) = (offset / BLOCK_BYTES, (end - 1) / BLOCK_BYTES);
        if !offset.is_multiple_of(BLOCK_BYTES) {
            self.fetch(number, first)?;
        }
        if !end.is_multiple_of(BLOCK_BYTES) && end != length {
            self.fetch(number, last)?;
        }
        for block in first..=last {
            self.disks[number].is_written(block);
        }
        Ok(())
    }
}

impl Disk {
    /// A block is the overlay's from here on, and is about to change.
    fn is_written(&mut self, block: u64) {
        self.written.insert(block);
        self.changed.insert(block);
    }

    /// Reads block `block` of the image.
    fn image_block<'a>(
        &self,
        number: usize,
        block: u64,
        into: &'a mut [u8; BLOCK_BYTES as usize],
    ) -> Result<&'a [u8], StorageError> {
        let start = block * BLOCK_BYTES;
        let bytes = (self.image.image.bytes - start).min(BLOCK_BYTES) as usize;
        let into = &mut into[..bytes];
        self.read_image(number, start, into)?;
        Ok(into)
    }

    fn read_image(&self, number: usize, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        self.image.read_at(offset, into).map_err(|source| StorageError {
            disk: number,
            what: format!(
                "cannot read {} bytes at {offset} of its image {}: {source}; an image must stay as it is for as \
                 long as a machine runs on it",
                into.len(),
                self.image.path().display()
            ),
        })
    }

    /// Makes a hole in the overlay, which reads as zeroes and gives the host its room back; `false` where the host's file
    /// system has none.
    fn punch(&self, offset: u64, bytes: u64) -> bool {
        let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.overlay, mode, offset, bytes).is_ok()
    }

    fn read(&self, number: usize, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        // Stretches of blocks that stand in the same place are read at once.
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let written = self.written.has(at / BLOCK_BYTES);
            let end = offset + into.len() as u64;
            let mut stop = (at / BLOCK_BYTES + 1) * BLOCK_BYTES;
            while stop < end && self.written.has(stop / BLOCK_BYTES) == written {
                stop += BLOCK_BYTES;
            }
            let count = (stop.min(end) - at) as usize;
            let into = &mut into[done..done + count];
            if written {
                self.overlay
                    .read_exact_at(into, at)
                    .map_err(|source| overlay_failed(number, &source))?;
            } else {
                self.read_image(number, at, into)?;
            }
            done += count;
        }
        Ok(())
    }
}

/// Disks that the machine has, and somebody else can look at beside it and when it is gone.
#[derive(Clone, Debug)]
pub struct SharedDisks(Rc<RefCell<Disks>>);

impl SharedDisks {
    /// Shares `disks`.
    pub fn new(disks: Disks) -> SharedDisks {
        SharedDisks(Rc::new(RefCell::new(disks)))
    }

    /// The disks as they are now. The machine must not run while this is held.
    pub fn look(&self) -> std::cell::Ref<'_, Disks> {
        self.0.borrow()
    }
}

impl Storage for SharedDisks {
    fn read(&mut self, disk: usize, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        self.0.borrow_mut().read(disk, offset, into)
    }

    fn write(&mut self, disk: usize, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        self.0.borrow_mut().write(disk, offset, from)
    }

    fn clear(&mut self, disk: usize, offset: u64, bytes: u64) -> Result<(), StorageError> {
        self.0.borrow_mut().clear(disk, offset, bytes)
    }

    fn digest(&mut self) -> Result<u64, StorageError> {
        self.0.borrow_mut().digest()
    }

    fn take_first_reads(&mut self) -> Option<FirstReads> {
        self.0.borrow_mut().take_first_reads()
    }
}

fn overlay_failed(disk: usize, source: &std::io::Error) -> StorageError {
    StorageError {
        disk,
        what: format!(
            "what the guest writes cannot be kept in {}: {source}; set TMPDIR to a directory with room",
            std::env::temp_dir().display()
        ),
    }
}

impl Storage for Disks {
    fn read(&mut self, number: usize, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        self.disks[number].read(number, offset, into)?;
        let end = offset + into.len() as u64;
        for block in offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
            let disk = &mut self.disks[number];
            if disk.written.has(block) || !disk.seen.insert(block) {
                continue;
            }
            let start = block * BLOCK_BYTES;
            let stop = (start + BLOCK_BYTES).min(disk.image.image.bytes);
            // The part of the block that is asked for, and all of it if that is more.
            let (from, to) = (start.max(offset), stop.min(end));
            let asked = (from - offset) as usize..(to - offset) as usize;
            if (from, to) == (start, stop) {
                self.note(number, start, &into[asked]);
            } else {
                let mut bytes = [0; BLOCK_BYTES as usize];
                let data = disk.image_block(number, block, &mut bytes)?;
                self.note(number, start, data);
                // What the guest gets is what was hashed, even if somebody writes to the image.
                into[asked].copy_from_slice(&data[(from - start) as usize..(to - start) as usize]);
            }
        }
        Ok(())
    }

    fn write(&mut self, disk: usize, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        if from.is_empty() {
            return Ok(());
        }
        self.take_over(disk, offset, from.len() as u64)?;
        let overlay = &self.disks[disk].overlay;
        overlay
            .write_all_at(from, offset)
            .map_err(|source| overlay_failed(disk, &source))
    }

    fn clear(&mut self, disk: usize, offset: u64, bytes: u64) -> Result<(), StorageError> {
        if bytes == 0 {
            return Ok(());
        }
        self.take_over(disk, offset, bytes)?;
        if self.disks[disk].punch(offset, bytes) {
            return Ok(());
        }
        let overlay = &self.disks[disk].overlay;
        let zeroes = vec![0; bytes.min(1 << 20) as usize];
        for done in (0..bytes).step_by(zeroes.len()) {
            let count = (bytes - done).min(zeroes.len() as u64) as usize;
            overlay
                .write_all_at(&zeroes[..count], offset + done)
                .map_err(|source| overlay_failed(disk, &source))?;
        }
        Ok(())
    }

    fn digest(&mut self) -> Result<u64, StorageError> {
        let mut disks = self.disks.iter().enumerate();
        disks.try_fold(0, |digest, (number, disk)| disk.digest(number, digest))
    }

    fn take_first_reads(&mut self) -> Option<FirstReads> {
        self.first_reads.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_blocks_has_those_that_were_put_in_and_no_others() {
        let mut rng = hindsight_replay::rng::Rng::new(3, 7);
        let (mut set, mut model) = (BlockSet::default(), std::collections::BTreeSet::new());
        for _ in 0..2_000 {
            let block = [
                rng.below(200),
                LEAF_BLOCKS - 100 + rng.below(200),
                u64::MAX / 4096 - rng.below(9),
            ][rng.below(3) as usize];
            assert_eq!(set.insert(block), model.insert(block));
            let start = rng.below(2 * LEAF_BLOCKS);
            let range = start..start + rng.below(200);
            assert_eq!(
                set.has_any(range.clone()),
                model.range(range).next().is_some()
            );
        }
        assert!(set.iter().eq(model));
    }

    fn image(content: &[u8]) -> (tempfile::NamedTempFile, Disks) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let disks = Disks::new(vec![OpenImage::open(file.path()).unwrap()]).unwrap();
        (file, disks)
    }

    fn read(disks: &mut Disks, offset: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        disks.read(0, offset, &mut data).unwrap();
        data
    }

    #[test]
    fn what_is_written_is_read_and_each_block_of_the_image_is_hashed_once() {
        for seed in 0..100 {
            agrees_with_a_model(seed);
        }
    }

    fn agrees_with_a_model(seed: u64) {
        let content: Vec<u8> = (0..40_960u32).map(|i| (i / 7) as u8).collect();
        let (file, mut disks) = image(&content);
        let mut model = content.clone();
        // Blocks that stand in the overlay, and those that have been hashed.
        let (mut written, mut seen) = ([false; 10], [false; 10]);
        let mut rng = hindsight_replay::rng::Rng::new(seed, 7);
        for _ in 0..40 {
            if rng.one_in(10) {
                // Whoever goes on from a state goes on as if nothing had been.
                let whole = state::Whole::of(&mut disks);
                if rng.one_in(2) {
                    disks = Disks::new(vec![OpenImage::open(file.path()).unwrap()]).unwrap();
                } else {
                    disks.write(0, 512, &[rng.number() as u8; 8192]).unwrap();
                    disks.clear(0, 20_480, 4096).unwrap();
                }
                whole.put(&mut disks);
                assert_eq!(state::Whole::of(&mut disks), whole);
            }
            let offset = rng.below(80) * 512;
            let bytes = (1 + rng.below(20)) * 512;
            let bytes = bytes.min(40_960 - offset);
            let range = offset as usize..(offset + bytes) as usize;
            let kind = rng.below(3);
            let mut expected: Option<FirstReads> = None;
            for block in offset / 4096..(offset + bytes).div_ceil(4096) {
                let (start, index) = (block * 4096, block as usize);
                let whole = offset <= start && start + 4096 <= offset + bytes;
                let read = !written[index] && (kind == 2 || !whole);
                if read && !seen[index] {
                    seen[index] = true;
                    let reads = expected.get_or_insert(FirstReads {
                        disk: 0,
                        offset: start,
                        bytes: 0,
                        check: 0,
                    });
                    reads.bytes += 4096;
                    let data = &content[start as usize..start as usize + 4096];
                    reads.check = xxh3_64_with_seed(data, reads.check);
                }
                written[index] |= kind != 2;
            }
            match kind {
                0 => {
                    let data = vec![rng.number() as u8; bytes as usize];
                    model[range].copy_from_slice(&data);
                    disks.write(0, offset, &data).unwrap();
                }
                1 => {
                    model[range].fill(0);
                    disks.clear(0, offset, bytes).unwrap();
                }
                _ => assert_eq!(read(&mut disks, offset, bytes as usize), model[range]),
            }
            assert_eq!(disks.take_first_reads(), expected);
        }
        assert_eq!(read(&mut disks, 0, 40_960), model);
        assert_eq!(std::fs::read(file.path()).unwrap(), content);
    }

    #[test]
    fn a_block_is_told_of_once_and_only_if_it_is_the_images() {
        let (_file, mut disks) = image(&[5; 5 * 4096]);
        disks.write(0, 4096, &[1; 4096]).unwrap();
        assert_eq!(disks.take_first_reads(), None);
        read(&mut disks, 512, 8192);
        let reads = disks.take_first_reads().unwrap();
        assert_eq!((reads.disk, reads.offset, reads.bytes), (0, 0, 8192));
        read(&mut disks, 0, 3 * 4096);
        assert_eq!(disks.take_first_reads(), None);
        // Writing part of a block needs the rest of it.
        disks.write(0, 3 * 4096, &[2; 512]).unwrap();
        assert_eq!(disks.take_first_reads().unwrap().offset, 3 * 4096);
    }

    #[test]
    fn another_image_in_a_block_that_is_read_gives_another_check() {
        let check = |content: &[u8]| {
            let (_file, mut disks) = image(content);
            read(&mut disks, 0, 8192);
            disks.take_first_reads().unwrap().check
        };
        let mut content = vec![5; 5 * 4096];
        let same = check(&content);
        content[4 * 4096] = 6;
        assert_eq!(check(&content), same, "nobody reads there");
        content[8191] = 6;
        assert_ne!(check(&content), same);
    }

    #[test]
    fn an_image_that_shrinks_is_an_error_that_names_it() {
        let (file, mut disks) = image(&[5; 5 * 4096]);
        file.as_file().set_len(4096).unwrap();
        let error = disks.read(0, 8192, &mut [0; 512]).unwrap_err();
        assert!(
            error.what.contains(&*file.path().to_string_lossy()),
            "{error}"
        );
    }

    #[test]
    fn a_disk_of_half_a_block_more_is_read_and_written_to_its_end() {
        let (_file, mut disks) = image(&[5; 4096 + 512]);
        assert_eq!(read(&mut disks, 4096, 512), [5; 512]);
        disks.write(0, 4096, &[6; 512]).unwrap();
        assert_eq!(
            read(&mut disks, 4096 - 512, 1024),
            [[5; 512], [6; 512]].concat()
        );
    }
}
