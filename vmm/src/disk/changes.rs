//! Where the guest has written to a disk.

use serde::Serialize;

use super::{BLOCK_BYTES, Disks};

/// Bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Range {
    /// The first of them, a multiple of [`BLOCK_BYTES`].
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

/// What the guest has written or discarded on a disk, by whole blocks: ascending, and as few ranges as
/// there can be.
pub fn written_ranges(disks: &Disks, disk: usize) -> Vec<Range> {
    let length = disks.bytes(disk).unwrap_or(0);
    let mut ranges: Vec<Range> = Vec::new();
    for block in disks.written(disk) {
        let offset = block * BLOCK_BYTES;
        let bytes = BLOCK_BYTES.min(length - offset);
        match ranges.last_mut() {
            Some(last) if last.offset + last.bytes == offset => last.bytes += bytes,
            _ => ranges.push(Range { offset, bytes }),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use hindsight_devices::Storage;

    use super::*;
    use crate::disk::OpenImage;

    #[test]
    fn blocks_side_by_side_are_one_range_and_the_last_ends_with_the_disk() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(10 * 4096 + 512).unwrap();
        let mut disks = Disks::new(vec![OpenImage::open(file.path()).unwrap()]).unwrap();
        assert_eq!(written_ranges(&disks, 0), []);
        disks.write(0, 4096 + 512, &[1; 512]).unwrap();
        disks.clear(0, 2 * 4096, 8192).unwrap();
        disks.write(0, 10 * 4096, &[1; 512]).unwrap();
        let range = |offset, bytes| Range { offset, bytes };
        let expected = [range(4096, 3 * 4096), range(10 * 4096, 512)];
        assert_eq!(written_ranges(&disks, 0), expected);
    }
}
