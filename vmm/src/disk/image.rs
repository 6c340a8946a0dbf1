//! The raw image that a disk is made over.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hindsight_replay::Image;

use super::{BLOCK_BYTES, DiskError};

/// How many blocks of an image its sample has at most.
const SAMPLE_BLOCKS: u64 = 64;
/// The first bytes of QEMU's own image format.
const QCOW_MAGIC: &[u8] = b"QFI\xfb";

/// An image, opened and found fit.
#[derive(Clone, Debug)]
pub struct OpenImage {
    path: PathBuf,
    target: PathBuf,
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
        let target = path.canonicalize().map_err(failed)?;
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
            target,
            file: Arc::new(file),
            image: Image { bytes, sample },
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it is, without links: a link to it stays right when links on the way to it change.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Whether `path` is this very file, by whatever name.
    pub fn is(&self, path: &Path) -> bool {
        let (Ok(own), Ok(other)) = (self.file.metadata(), std::fs::metadata(path)) else {
            return false;
        };
        (own.dev(), own.ino()) == (other.dev(), other.ino())
    }

    /// Fills `into` with what stands at `offset`.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(into, offset)
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
