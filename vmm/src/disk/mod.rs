//! The bytes of a machine's disks: raw images that are never written, and what the guest has written.
//!
//! What the guest writes goes to an overlay, a file without a name in the directory for temporary files
//! (`TMPDIR`): it is gone when the machine is, and a replay makes it again. The overlay is kept block by block.
//! A block of the image that the guest reads for the first time is hashed, and the hash goes into the
//! journal, so that nobody has to read an image of many gigabytes before the guest can start, and a replay still
//! notices whatever differs in what its guest sees.

mod budget;
mod changes;
mod compare;
mod export;
mod ext;
mod files;
mod formats;
mod image;
mod lookup;
mod overlay;
mod partitions;
mod path;

use std::path::PathBuf;

use thiserror::Error;

use crate::failure::{Classified, Kind};

pub use changes::{Range, written_ranges};
pub use export::{ExportError, export};
pub use ext::{ExtError, Source};
pub use files::{Change, FileChange, Files, Medium, changed_files, changes};
pub use image::OpenImage;
pub use lookup::find_on_disks;
pub use overlay::{Disks, DisksState, SharedDisks};
pub use path::TreeFile;
pub(crate) use path::{Tree, resolve};

/// The unit of the overlay and of the hashes, in bytes.
pub const BLOCK_BYTES: u64 = 4096;

/// Why a file will not do as a disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// It cannot be opened or read.
    #[error("{path}: {source}")]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// It is nothing that a disk can be made over.
    #[error("{path} is {found}, expected a raw disk image or a block device")]
    Kind {
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// It is no raw image.
    #[error("{path} is {found}, expected a raw disk image; {advice}")]
    Format {
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What makes a raw image of it.
        advice: &'static str,
    },
    /// It cannot be divided into sectors.
    #[error(
        "{path} has {found} bytes, expected a raw disk image: a multiple of 512 bytes and not empty"
    )]
    Length {
        path: PathBuf,
        /// Its length.
        found: u64,
    },
    /// It is not the image that was recorded.
    #[error(
        "{path} is not the recorded image of disk {disk}: it has {found_bytes} bytes and sample {found}, recorded \
         were {expected_bytes} bytes and {expected}; put the right one in its place, or name it (replay --disk, disk --image)"
    )]
    Other {
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
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl Classified for DiskError {
    fn kind(&self) -> Kind {
        match self {
            DiskError::Overlay { .. } => Kind::HostFailed,
            _ => Kind::BadInput,
        }
    }
}
