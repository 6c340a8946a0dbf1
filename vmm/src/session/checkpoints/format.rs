//! How checkpoints stand in their file. `docs/journal-format.md` says the same for those who read it elsewhere.

use hindsight_devices::Nanos;
use hindsight_replay::{PAGE_BYTES, PagePlace};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh64::xxh64;

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
/// The state but for its pages, unpacked: devices, and the end of a journal.
pub(super) const CORE_BYTES_MAX: usize = 64 << 20;
/// What the pages of a checkpoint are called, unpacked: enough for a terabyte of memory.
const DIRECTORY_BYTES_MAX: usize = 1 << 30;
/// Neither is longer in the file.
const PACKED_BYTES_MAX: u32 = 128 << 20;
/// In a directory pages on disks are numbered from here on.
const DISKS_FROM: u64 = 1 << 52;

/// The check of something that is long. XXH64 rather than XXH3: emulated hosts have a slow vector unit.
pub(super) fn check_of(bytes: &[u8]) -> u64 {
    xxh64(bytes, 0)
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
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Directory {
    /// Of each group its length in bytes, and its check.
    pub(super) groups: Vec<(u32, u64)>,
    /// By ascending place: how many places are skipped, and the name.
    changes: Vec<(u64, u64)>,
    /// What happened since the checkpoint before; empty if that is not known.
    pub(super) notes: Vec<u8>,
}

impl Directory {
    pub(super) fn new(
        groups: Vec<(u32, u64)>,
        changes: &[(PagePlace, PageName)],
        notes: Vec<u8>,
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
        Directory {
            changes: changes.collect(),
            groups,
            notes,
        }
    }

    pub(super) fn unpack(packed: &[u8]) -> Option<Directory> {
        let bytes = zstd::bulk::decompress(packed, DIRECTORY_BYTES_MAX).ok()?;
        postcard::from_bytes(&bytes).ok()
    }

    /// The changes; `None` if there is a page that a machine with `memory` pages of memory does not have, or a name
    /// above `names`.
    pub(super) fn changes(&self, memory: u64, names: u64) -> Option<Vec<(PagePlace, PageName)>> {
        let mut next = 0u64;
        let place = |(skipped, name): &(u64, u64)| {
            let number = next
                .checked_add(*skipped)
                .filter(|number| *number < 1 << 62)?;
            next = number + 1;
            let place = match number.checked_sub(DISKS_FROM) {
                None => (number < memory).then(|| PagePlace::in_memory(number))?,
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
        let directory = Directory::new(vec![], &changes, vec![]);
        assert_eq!(directory.changes(5, 9).as_deref(), Some(&changes[..]));
        assert_eq!(directory.changes(4, 9), None);
        assert_eq!(directory.changes(5, 8), None);
        let far = Directory {
            changes: vec![(u64::MAX, 0), (1, 0)],
            groups: vec![],
            notes: vec![],
        };
        assert_eq!(far.changes(u64::MAX, 9), None);
    }
}
