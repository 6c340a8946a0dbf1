//! A disk written out as an image of its own.

use std::fs::File;
use std::io::Error;
use std::os::unix::fs::FileExt;

use hindsight_devices::StorageError;
use thiserror::Error;

use super::{BLOCK_BYTES, Disks};

/// How much is read at once, in bytes.
const PIECE_BYTES: u64 = 1 << 20;

/// Why an image was not written.
#[derive(Debug, Error)]
pub enum ExportError {
    /// The disk cannot be read.
    #[error(transparent)]
    Disk(#[from] StorageError),
    /// The image cannot be written.
    #[error(transparent)]
    Write(#[from] Error),
}

/// Writes a disk as it is now as a raw image to the empty file `to`, leaving holes where it is zero.
/// `progress` is called with how many bytes of the disk are done.
///
/// Returns how many bytes are not in holes.
pub fn export(
    disks: &Disks,
    disk: usize,
    to: &File,
    mut progress: impl FnMut(u64),
) -> Result<u64, ExportError> {
    let length = disks.bytes(disk).unwrap_or(0);
    to.set_len(length)?;
    let mut piece = vec![0; PIECE_BYTES as usize];
    let mut kept = 0;
    for offset in (0..length).step_by(PIECE_BYTES as usize) {
        let piece = &mut piece[..(length - offset).min(PIECE_BYTES) as usize];
        disks.peek(disk, offset, piece)?;
        kept += write_blocks(to, offset, piece)?;
        progress(offset + piece.len() as u64);
    }
    Ok(kept)
}

/// Writes those blocks of `piece` that are not zero, neighbours at once; returns how many bytes.
fn write_blocks(file: &File, offset: u64, piece: &[u8]) -> Result<u64, Error> {
    let (mut start, mut kept) = (0, 0);
    while start < piece.len() {
        let zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
        let blocks = piece[start..].chunks(BLOCK_BYTES as usize);
        let run: usize = blocks
            .take_while(|block| !zero(block))
            .map(<[u8]>::len)
            .sum();
        if run > 0 {
            file.write_all_at(&piece[start..start + run], offset + start as u64)?;
            kept += run as u64;
        }
        // After the run there is a block of zeroes, or the end.
        start += run + BLOCK_BYTES as usize;
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use hindsight_devices::Storage;

    use super::*;
    use crate::disk::OpenImage;

    #[test]
    fn the_image_written_is_the_disk_and_has_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (base, to) = (dir.path().join("base"), dir.path().join("to"));
        let length = 3 * PIECE_BYTES as usize + 512;
        let mut content = vec![0; length];
        content[5000] = 1;
        content[PIECE_BYTES as usize - 1] = 2;
        std::fs::write(&base, &content).unwrap();
        let mut disks = Disks::new(vec![OpenImage::open(&base).unwrap()]).unwrap();
        disks.write(0, length as u64 - 512, &[3; 512]).unwrap();
        disks.clear(0, 4096, 4096).unwrap();
        content[length - 512..].fill(3);
        content[5000] = 0;
        let mut last = 0;
        let file = File::create_new(&to).unwrap();
        let kept = export(&disks, 0, &file, |done| last = done).unwrap();
        assert_eq!((kept, last), (4096 + 512, length as u64));
        assert!(std::fs::read(&to).unwrap() == content);
        let found = std::fs::metadata(&to).unwrap();
        assert!(found.blocks() * 512 < PIECE_BYTES, "it has no holes");
    }
}
