//! The bytes of a machine's disks: raw images that are never written, and what the guest has written.
//!
//! What the guest writes goes to an overlay, a file without a name in the directory for temporary files
//! (`TMPDIR`): it is gone when the machine is, and a replay makes it again. The overlay is kept block by block.
//! A block of the image that the guest reads for the first time is hashed, and the hash goes into the
//! journal, so that nobody has to read an image of many gigabytes before the guest can start, and a replay still
//! notices whatever differs in what its guest sees.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hindsight_devices::{DiskSpec, FirstReads, Storage, StorageError};
use hindsight_replay::Image;
use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The unit of the overlay and of the hashes, in bytes.
pub const BLOCK_BYTES: u64 = 4096;
/// How many blocks of an image its sample has at most.
const SAMPLE_BLOCKS: u64 = 64;
/// The first bytes of QEMU's own image format.
const QCOW_MAGIC: &[u8] = b"QFI\xfb";

/// Why a file will not do as a disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// It cannot be opened or read.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is no raw image.
    #[error(
        "{path} is a qcow2 image, expected a raw one; convert it: qemu-img convert -O raw {path} disk.img"
    )]
    Qcow {
        /// Which.
        path: PathBuf,
    },
    /// It cannot be divided into sectors.
    #[error(
        "{path} has {found} bytes, expected a raw disk image: a multiple of 512 bytes and not empty"
    )]
    Length {
        /// Which.
        path: PathBuf,
        /// Its length.
        found: u64,
    },
    /// It is not the image that was recorded.
    #[error(
        "{path} is not the recorded image of disk {disk}: it has {found_bytes} bytes and sample {found}, recorded \
         were {expected_bytes} bytes and {expected}; name the right one with --disk"
    )]
    Other {
        /// Which.
        path: PathBuf,
        /// Number of the disk.
        disk: usize,
        /// Its length.
        found_bytes: u64,
        /// Its sample.
        found: String,
        /// The recorded length.
        expected_bytes: u64,
        /// The recorded sample.
        expected: String,
    },
    /// There are too many or too few.
    #[error("{found} disks were given, expected {expected}")]
    Count {
        /// How many.
        found: usize,
        /// How many there can be, or were recorded.
        expected: usize,
    },
    /// There is no room for an overlay.
    #[error("cannot make a temporary file in {path}: {source}")]
    Overlay {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// An image, opened and found fit.
#[derive(Clone, Debug)]
pub struct OpenImage {
    path: PathBuf,
    file: Arc<File>,
    /// How the journal names it.
    pub image: Image,
}

impl OpenImage {
    /// Opens a raw image. Takes a few reads, however large it is.
    pub fn open(path: &Path) -> Result<OpenImage, DiskError> {
        let failed = |source| DiskError::File {
            path: path.into(),
            source,
        };
        let mut file = File::open(path).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        let mut magic = Vec::new();
        (&mut file)
            .take(QCOW_MAGIC.len() as u64)
            .read_to_end(&mut magic)
            .map_err(failed)?;
        if magic == QCOW_MAGIC {
            return Err(DiskError::Qcow { path: path.into() });
        }
        if bytes == 0 || bytes % 512 != 0 {
            return Err(DiskError::Length {
                path: path.into(),
                found: bytes,
            });
        }
        let sample = sample(&file, bytes).map_err(failed)?;
        Ok(OpenImage {
            path: path.into(),
            file: Arc::new(file),
            image: Image { bytes, sample },
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses an image that cannot be the recorded one.
    pub fn check(&self, disk: usize, recorded: &Image) -> Result<(), DiskError> {
        if self.image == *recorded {
            return Ok(());
        }
        Err(DiskError::Other {
            path: self.path.clone(),
            disk,
            found_bytes: self.image.bytes,
            found: hex(&self.image.sample),
            expected_bytes: recorded.bytes,
            expected: hex(&recorded.sample),
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// BLAKE3 of blocks spread evenly over the image, the first and the last among them.
fn sample(file: &File, bytes: u64) -> std::io::Result<[u8; 32]> {
    let blocks = bytes.div_ceil(BLOCK_BYTES);
    let count = blocks.min(SAMPLE_BLOCKS);
    let mut hash = blake3::Hasher::new();
    for index in 0..count {
        let block = if count == 1 {
            0
        } else {
            (blocks - 1) * index / (count - 1)
        };
        let start = block * BLOCK_BYTES;
        let mut data = vec![0; (bytes - start).min(BLOCK_BYTES) as usize];
        file.read_exact_at(&mut data, start)?;
        hash.update(&data);
    }
    Ok(*hash.finalize().as_bytes())
}

/// One bit for each block of a disk.
#[derive(Debug)]
struct BlockSet(Vec<u64>);

impl BlockSet {
    fn new(blocks: u64) -> BlockSet {
        BlockSet(vec![0; blocks.div_ceil(64) as usize])
    }

    fn has(&self, block: u64) -> bool {
        self.0[(block / 64) as usize] >> (block % 64) & 1 != 0
    }

    /// Adds a block; whether it was new.
    fn insert(&mut self, block: u64) -> bool {
        let new = !self.has(block);
        self.0[(block / 64) as usize] |= 1 << (block % 64);
        new
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
            let blocks = bytes.div_ceil(BLOCK_BYTES);
            Ok(Disk {
                image,
                overlay,
                written: BlockSet::new(blocks),
                seen: BlockSet::new(blocks),
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
        let blocks = self
            .disks
            .get(disk)
            .map_or(0, |disk| disk.image.image.bytes.div_ceil(BLOCK_BYTES));
        (0..blocks).filter(move |block| self.disks[disk].written.has(*block))
    }

    /// Reads what the guest would, and leaves no trace of it.
    pub fn peek(&self, disk: usize, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        self.disks[disk].read(disk, offset, into)
    }

    /// Hashes what of the image this range covers and nobody has read before.
    fn see(&mut self, number: usize, offset: u64, bytes: u64) -> Result<(), StorageError> {
        let mut block_bytes = [0; BLOCK_BYTES as usize];
        for block in offset / BLOCK_BYTES..(offset + bytes).div_ceil(BLOCK_BYTES) {
            let disk = &mut self.disks[number];
            if disk.written.has(block) || !disk.seen.insert(block) {
                continue;
            }
            let data = disk.image_block(number, block, &mut block_bytes)?;
            let reads = self.first_reads.get_or_insert(FirstReads {
                disk: number,
                offset: block * BLOCK_BYTES,
                bytes: 0,
                check: 0,
            });
            reads.bytes += data.len() as u64;
            reads.check = xxh3_64_with_seed(data, reads.check);
        }
        Ok(())
    }

    /// Moves a block that is about to be written in part to the overlay.
    fn fetch(&mut self, number: usize, block: u64) -> Result<(), StorageError> {
        if self.disks[number].written.has(block) {
            return Ok(());
        }
        self.see(number, block * BLOCK_BYTES, 1)?;
        let disk = &mut self.disks[number];
        let mut bytes = [0; BLOCK_BYTES as usize];
        let data = disk.image_block(number, block, &mut bytes)?;
        disk.overlay
            .write_all_at(data, block * BLOCK_BYTES)
            .map_err(|source| overlay_failed(number, &source))?;
        disk.written.insert(block);
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
            self.disks[number].written.insert(block);
        }
        Ok(())
    }
}

impl Disk {
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
        self.image.file.read_exact_at(into, offset).map_err(|source| StorageError {
            disk: number,
            what: format!(
                "cannot read {} bytes at {offset} of its image {}: {source}; an image must stay as it is for as \
                 long as a machine runs on it",
                into.len(),
                self.image.path.display()
            ),
        })
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
    fn read(&mut self, disk: usize, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        self.see(disk, offset, into.len() as u64)?;
        self.disks[disk].read(disk, offset, into)
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
        // A hole reads as zeroes, and gives the host its room back.
        let overlay = &self.disks[disk].overlay;
        let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        if rustix::fs::fallocate(overlay, mode, offset, bytes).is_ok() {
            return Ok(());
        }
        let zeroes = vec![0; bytes.min(1 << 20) as usize];
        for done in (0..bytes).step_by(zeroes.len()) {
            let count = (bytes - done).min(zeroes.len() as u64) as usize;
            overlay
                .write_all_at(&zeroes[..count], offset + done)
                .map_err(|source| overlay_failed(disk, &source))?;
        }
        Ok(())
    }

    fn take_first_reads(&mut self) -> Option<FirstReads> {
        self.first_reads.take()
    }
}

/// What an operator says of a disk: `IMG[,ro][,serial=S]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOption {
    /// The image.
    pub path: PathBuf,
    /// Whether the guest's writes are refused.
    pub read_only: bool,
    /// Its serial number.
    pub serial: String,
    /// All of that as it was said.
    pub text: String,
}

/// Parses `IMG[,ro][,serial=S]`. A comma in a name is written twice.
pub fn parse_disk(text: &str) -> Result<DiskOption, String> {
    let words = text.replace(",,", "\0");
    let mut words = words.split(',').map(|word| word.replace('\0', ","));
    let path = words.next().filter(|path| !path.is_empty());
    let mut option = DiskOption {
        path: path.ok_or("expected IMG[,ro][,serial=S]")?.into(),
        read_only: false,
        serial: String::new(),
        text: text.into(),
    };
    for word in words {
        match word.split_once('=') {
            None if word == "ro" => option.read_only = true,
            Some(("serial", serial)) if serial.len() <= 20 => option.serial = serial.into(),
            Some(("serial", serial)) => {
                return Err(format!(
                    "the serial number {serial:?} has more than 20 bytes"
                ));
            }
            _ => return Err(format!("{word:?}: expected ro or serial=S")),
        }
    }
    Ok(option)
}

impl DiskOption {
    /// The disk as the guest sees it, over `image`.
    pub fn spec(&self, image: &OpenImage) -> DiskSpec {
        DiskSpec {
            bytes: image.image.bytes,
            read_only: self.read_only,
            serial: self.serial.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn what_is_written_is_read_and_the_image_stays_as_it_was() {
        let content: Vec<u8> = (0..40_960u32).map(|i| (i / 7) as u8).collect();
        let (file, mut disks) = image(&content);
        let mut model = content.clone();
        let mut rng = hindsight_replay::rng::Rng::new(7, 7);
        for _ in 0..400 {
            let offset = rng.below(80) * 512;
            let bytes = (1 + rng.below(20)) * 512;
            let bytes = bytes.min(40_960 - offset);
            let range = offset as usize..(offset + bytes) as usize;
            match rng.below(3) {
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

    #[test]
    fn disks_are_named_with_what_is_to_be_said_of_them() {
        let option = parse_disk("a,,b.img,ro,serial=xyz").unwrap();
        assert_eq!(option.path, Path::new("a,b.img"));
        assert!(option.read_only && option.serial == "xyz");
        for bad in ["", ",ro", "a,rw", "a,serial=123456789012345678901"] {
            assert!(parse_disk(bad).is_err(), "{bad}");
        }
    }
}
