//! Pages that were unpacked: a seek wants most of those that the one before wanted.

use std::collections::{BTreeMap, VecDeque};
use std::thread;

use hindsight_replay::PAGE_BYTES;
use zstd::bulk::Decompressor;

use super::CheckpointError;
use super::format::{GROUP_BYTES, check_of};

/// How much is kept, in bytes.
const BYTES_MAX: usize = 512 << 20;
/// Each thread has at least so many groups to unpack.
const GROUPS_EACH: usize = 16;
/// More threads than this gain nothing.
const THREADS_MAX: usize = 8;

/// A group of pages as it is in the file: its number, its bytes, and their check.
pub(super) type Packed<'a> = (u64, &'a [u8], u64);

/// Groups of pages by their numbers. The oldest go first.
#[derive(Debug)]
pub(super) struct Unpacked {
    groups: BTreeMap<u64, Vec<u8>>,
    order: VecDeque<u64>,
    bytes: usize,
    bytes_max: usize,
    threads: usize,
}

impl Unpacked {
    /// Nothing yet.
    pub(super) fn new() -> Unpacked {
        Unpacked::with_room(BYTES_MAX)
    }

    /// The same, which keeps no more than this.
    pub(super) fn with_room(bytes_max: usize) -> Unpacked {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        Unpacked {
            groups: BTreeMap::new(),
            order: VecDeque::new(),
            bytes: 0,
            bytes_max,
            threads: threads.min(THREADS_MAX),
        }
    }

    /// Whether it is there.
    pub(super) fn has(&self, group: u64) -> bool {
        self.groups.contains_key(&group)
    }

    /// The pages of a group, if it is there.
    pub(super) fn get(&self, group: u64) -> Option<&[u8]> {
        self.groups.get(&group).map(Vec::as_slice)
    }

    /// Checks, unpacks and keeps groups that are not there.
    pub(super) fn keep(&mut self, groups: &[Packed<'_>]) -> Result<(), CheckpointError> {
        let each = groups.len().div_ceil(self.threads).max(GROUPS_EACH);
        let mut shares = groups.chunks(each);
        let Some(ours) = shares.next() else {
            return Ok(());
        };
        let unpacked: Vec<_> = thread::scope(|scope| {
            let others: Vec<_> = shares.map(|share| scope.spawn(|| unpack(share))).collect();
            let ours = unpack(ours);
            let others = others.into_iter().map(|other| match other.join() {
                Ok(unpacked) => unpacked,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            std::iter::once(ours).chain(others).collect()
        });
        for share in unpacked {
            for (group, pages) in share? {
                self.bytes += pages.len();
                self.groups.insert(group, pages);
                self.order.push_back(group);
            }
        }
        Ok(())
    }

    /// Drops what there is no room for. What is wanted now is asked for after that: else some of it would be gone by the
    /// time that the rest is there.
    pub(super) fn make_room(&mut self) {
        while self.bytes > self.bytes_max
            && let Some(oldest) = self.order.pop_front()
        {
            self.bytes -= self.groups.remove(&oldest).map_or(0, |pages| pages.len());
        }
    }
}

/// Checks and unpacks groups.
fn unpack(groups: &[Packed<'_>]) -> Result<Vec<(u64, Vec<u8>)>, CheckpointError> {
    let mut decompressor = Decompressor::new()?;
    let groups = groups.iter().map(|(group, packed, check)| {
        if check_of(packed) != *check {
            return Err(CheckpointError::Damaged("pages have another check"));
        }
        let pages = decompressor.decompress(packed, GROUP_BYTES);
        let mut pages = pages.map_err(|_| CheckpointError::Damaged("pages do not unpack"))?;
        if pages.is_empty() || pages.len() % PAGE_BYTES != 0 {
            return Err(CheckpointError::Damaged("a group is not of whole pages"));
        }
        // There may be many that are not full, and each counts by its length.
        pages.shrink_to_fit();
        Ok((*group, pages))
    });
    groups.collect()
}
