//! How checkpoints stand in their file. `docs/journal-format.md` says the same for those who read it elsewhere.

use std::io::{self, Read};

use hindsight_devices::Nanos;
use hindsight_replay::{NOTES_BYTES_MAX, PAGE_BYTES, PagePlace};
use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh64::xxh64;
use zstd::stream::read::Decoder;

use super::PageLimit;
use super::table::PageName;

/// First bytes of the file.
const MAGIC: [u8; 8] = *b"HSchkpts";
/// The version that this program writes and reads.
const VERSION: u32 = 2;
/// Magic, version, nothing, check of the journal's head, check.
pub(super) const FILE_HEAD_BYTES: usize = 32;
/// First bytes of a checkpoint.
const CHECKPOINT_MAGIC: u32 = u32::from_le_bytes(*b"HSck");
/// Length of its head.
pub(super) const HEAD_BYTES: usize = 64;
/// How many pages are compressed together: alone, a third more time and a tenth more room.
pub(super) const GROUP_PAGES: u64 = 16;
pub(super) const GROUP_BYTES: usize = GROUP_PAGES as usize * PAGE_BYTES;
/// The state but for its pages and what is known of blocks on disks, unpacked: some hundred times what one has.
const CORE_BYTES_MAX: u64 = 8 << 20;
/// What is known of blocks on disks: enough for half a terabyte of which all was read and written.
const BLOCKS_BYTES_MAX: u64 = 64 << 20;
/// What the pages of a checkpoint are called, unpacked.
const DIRECTORY_BYTES_MAX: u64 = 1 << 30;
/// What is written has a window of 512 KiB; nobody says more of one than this (8 MiB).
const WINDOW_LOG_MAX: u32 = 23;
/// Neither is longer in the file.
const PACKED_BYTES_MAX: u32 = 128 << 20;
/// In a directory pages on disks are numbered from here on.
const DISKS_FROM: u64 = 1 << 52;

/// The check of something that is long. XXH64 rather than XXH3: emulated hosts have a slow vector unit.
pub(super) fn check_of(bytes: &[u8]) -> u64 {
    xxh64(bytes, 0)
}

/// What was packed, if it is not longer than `most`. Memory is taken for what comes out, not for what is said to.
pub(super) fn unpack(packed: &[u8], most: u64) -> io::Result<Vec<u8>> {
    let mut decoder = Decoder::with_buffer(packed)?;
    decoder.window_log_max(WINDOW_LOG_MAX)?;
    let mut bytes = Vec::new();
    let count = decoder.take(most + 1).read_to_end(&mut bytes)? as u64;
    match count <= most {
        true => Ok(bytes),
        false => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The core of a checkpoint of a machine with so many pages, unpacked.
pub(super) fn unpack_core(packed: &[u8], limit: PageLimit) -> io::Result<Vec<u8>> {
    // Of each 4096 blocks of a disk it is kept in 64 words, of ten bytes at most, which were written, and which were read.
    unpack(
        packed,
        CORE_BYTES_MAX + BLOCKS_BYTES_MAX.min(limit.disks / 2),
    )
}

/// The head of the file for the journal whose head has this check.
pub(super) fn file_head(journal: u64) -> [u8; FILE_HEAD_BYTES] {
    let mut head = [0; FILE_HEAD_BYTES];
    head[..8].copy_from_slice(&MAGIC);
    head[8..12].copy_from_slice(&VERSION.to_le_bytes());
    head[16..24].copy_from_slice(&journal.to_le_bytes());
    let check = xxh64(&head[..24], 0);
    head[24..].copy_from_slice(&check.to_le_bytes());
    head
}

/// What the head of a checkpoint says. Groups of pages, directory and core follow it in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) exits: u64,
    pub(super) now: Nanos,
    pub(super) groups_bytes: u64,
    pub(super) directory_bytes: u32,
    pub(super) core_bytes: u32,
    pub(super) cost: u32,
    pub(super) directory_check: u64,
    pub(super) core_check: u64,
}

impl Head {
    /// As it stands in the file after a checkpoint whose head has the check `before`; and its check.
    pub(super) fn to_bytes(self, before: u64) -> ([u8; HEAD_BYTES], u64) {
        let mut bytes = Vec::with_capacity(HEAD_BYTES);
        bytes.extend(CHECKPOINT_MAGIC.to_le_bytes());
        bytes.extend(self.directory_bytes.to_le_bytes());
        bytes.extend(self.exits.to_le_bytes());
        bytes.extend(self.now.to_le_bytes());
        bytes.extend(self.groups_bytes.to_le_bytes());
        bytes.extend(self.directory_check.to_le_bytes());
        bytes.extend(self.core_check.to_le_bytes());
        bytes.extend(self.core_bytes.to_le_bytes());
        bytes.extend(self.cost.to_le_bytes());
        let check = xxh64(&bytes, before);
        bytes.extend(check.to_le_bytes());
        let bytes = bytes.try_into().expect("eight words");
        (bytes, check)
    }

    /// The head, and its check; `None` if it is none, does not follow `before`, or cannot be.
    pub(super) fn from_bytes(bytes: &[u8; HEAD_BYTES], before: u64) -> Option<(Head, u64)> {
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let head = Head {
            directory_bytes: (long(0) >> 32) as u32,
            exits: long(8),
            now: long(16),
            groups_bytes: long(24),
            directory_check: long(32),
            core_check: long(40),
            core_bytes: long(48) as u32,
            cost: (long(48) >> 32) as u32,
        };
        let (expected, check) = head.to_bytes(before);
        let is_possible = head.directory_bytes.max(head.core_bytes) <= PACKED_BYTES_MAX;
        (expected == *bytes && is_possible).then_some((head, check))
    }

    /// Length of what follows it.
    pub(super) fn body_bytes(&self) -> Option<u64> {
        let rest = u64::from(self.directory_bytes) + u64::from(self.core_bytes);
        self.groups_bytes.checked_add(rest)
    }
}

/// What a checkpoint adds: groups of pages, and which of a machine's pages are called otherwise than at the one before.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Directory {
    /// Of each group its length in bytes, and its check.
    pub(super) groups: Vec<(u32, u64)>,
    /// By ascending place: how many places are skipped, and the name.
    changes: Vec<(u64, u64)>,
    /// What happened since the checkpoint before; empty if that is not known.
    pub(super) notes: Vec<u8>,
}

/// How much there may be in a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct DirectoryLimit {
    pub(super) groups: u64,
    pub(super) changes: u64,
}

impl DirectoryLimit {
    /// Integers have five bytes at most, or ten.
    fn bytes(self) -> u64 {
        let items =
            (self.groups.saturating_mul(15)).saturating_add(self.changes.saturating_mul(20));
        items
            .saturating_add(NOTES_BYTES_MAX as u64 + 30)
            .min(DIRECTORY_BYTES_MAX)
    }
}

/// A Vec at the beginning of `bytes` of at most so many items, which is looked at before there is memory for them; and
/// what follows it.
fn take_items<T: DeserializeOwned>(bytes: &[u8], most: u64) -> Option<(Vec<T>, &[u8])> {
    let (count, _) = postcard::take_from_bytes::<u64>(bytes).ok()?;
    let items = (count <= most).then(|| postcard::take_from_bytes(bytes))?;
    items.ok()
}

impl Directory {
    /// Notes that are too long are not kept.
    pub(super) fn new(
        groups: Vec<(u32, u64)>,
        changes: &[(PagePlace, PageName)],
        mut notes: Vec<u8>,
    ) -> Directory {
        let mut next = 0;
        let changes = changes.iter().map(|(place, name)| {
            let number = match place.number() {
                Ok(number) => number,
                Err(number) => DISKS_FROM + number,
            };
            let skipped = number - next;
            next = number + 1;
            (skipped, name.0)
        });
        if notes.len() > NOTES_BYTES_MAX {
            notes.clear();
        }
        Directory {
            changes: changes.collect(),
            groups,
            notes,
        }
    }

    /// As it is in the file, not compressed.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("plain values serialise")
    }

    /// What was packed; `None` if there is more in it than there may be.
    pub(super) fn unpack(packed: &[u8], limit: DirectoryLimit) -> Option<Directory> {
        let bytes = unpack(packed, limit.bytes()).ok()?;
        let (groups, rest) = take_items::<(u32, u64)>(&bytes, limit.groups)?;
        let (changes, rest) = take_items(rest, limit.changes)?;
        let (notes, rest) = take_items(rest, NOTES_BYTES_MAX as u64)?;
        let is_whole = rest.is_empty() && groups.iter().all(|(bytes, _)| *bytes > 0);
        is_whole.then_some(Directory {
            groups,
            changes,
            notes,
        })
    }

    /// The changes; `None` if there is a page that a machine with such pages does not have, or a name above `names`.
    pub(super) fn changes(
        &self,
        limit: PageLimit,
        names: u64,
    ) -> Option<Vec<(PagePlace, PageName)>> {
        let mut next = 0u64;
        let place = |(skipped, name): &(u64, u64)| {
            let number = next
                .checked_add(*skipped)
                .filter(|number| *number < 1 << 62)?;
            next = number + 1;
            let place = match number.checked_sub(DISKS_FROM) {
                None => (number < limit.memory).then(|| PagePlace::in_memory(number))?,
                Some(number) => PagePlace::on_disks(number),
            };
            (*name <= names).then_some((place, PageName(*name)))
        };
        self.changes.iter().map(place).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_as_it_was_written_and_only_in_its_place() {
        let head = Head {
            exits: 1,
            now: 2,
            groups_bytes: 3,
            directory_bytes: 4,
            core_bytes: 5,
            cost: 7,
            directory_check: 6,
            core_check: 7,
        };
        let (bytes, check) = head.to_bytes(8);
        assert_eq!(Head::from_bytes(&bytes, 8), Some((head, check)));
        assert_eq!(Head::from_bytes(&bytes, 9), None);
        for bit in 0..8 * HEAD_BYTES {
            let mut bytes = bytes;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Head::from_bytes(&bytes, 8), None, "bit {bit}");
        }
        let (bytes, _) = Head {
            core_bytes: u32::MAX,
            ..head
        }
        .to_bytes(8);
        assert_eq!(Head::from_bytes(&bytes, 8), None);
    }

    #[test]
    fn a_directory_says_what_it_was_told_and_names_no_page_that_cannot_be() {
        let changes = [
            (PagePlace::in_memory(3), PageName(9)),
            (PagePlace::in_memory(4), PageName(0)),
            (PagePlace::on_disks(1 << 48), PageName(2)),
        ];
        let directory = Directory::new(vec![(7, 8)], &changes, vec![9]);
        let limit = |memory| PageLimit { memory, disks: 1 };
        assert_eq!(
            directory.changes(limit(5), 9).as_deref(),
            Some(&changes[..])
        );
        assert_eq!(directory.changes(limit(4), 9), None);
        assert_eq!(directory.changes(limit(5), 8), None);
        let packed = zstd::bulk::compress(&directory.to_bytes(), 1).unwrap();
        let unpack =
            |groups, changes| Directory::unpack(&packed, DirectoryLimit { groups, changes });
        assert_eq!(unpack(1, 3), Some(directory));
        assert_eq!((unpack(0, 3), unpack(1, 2)), (None, None));
        let far = Directory {
            changes: vec![(u64::MAX, 0), (1, 0)],
            groups: vec![],
            notes: vec![],
        };
        assert_eq!(far.changes(limit(u64::MAX), 9), None);
    }
}
