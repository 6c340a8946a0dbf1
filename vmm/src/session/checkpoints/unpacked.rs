//! Pages that were unpacked: a seek wants most of those that the one before wanted.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use super::format::GROUP_BYTES;

/// How much is kept, in bytes.
const BYTES_MAX: usize = 512 << 20;

/// Groups of pages by their numbers. The oldest go first.
pub(super) struct Unpacked {
    groups: BTreeMap<u64, Vec<u8>>,
    order: VecDeque<u64>,
    bytes: usize,
    decompressor: zstd::bulk::Decompressor<'static>,
}

impl std::fmt::Debug for Unpacked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacked")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Unpacked {
    /// Nothing yet.
    pub(super) fn new() -> io::Result<Unpacked> {
        Ok(Unpacked {
            groups: BTreeMap::new(),
            order: VecDeque::new(),
            bytes: 0,
            decompressor: zstd::bulk::Decompressor::new()?,
        })
    }

    /// Whether it is there.
    pub(super) fn has(&self, group: u64) -> bool {
        self.groups.contains_key(&group)
    }

    /// The pages of a group, if it is there.
    pub(super) fn get(&self, group: u64) -> Option<&[u8]> {
        self.groups.get(&group).map(Vec::as_slice)
    }

    /// Unpacks and keeps a group that is not there.
    pub(super) fn keep(&mut self, group: u64, packed: &[u8]) -> io::Result<()> {
        let pages = self.decompressor.decompress(packed, GROUP_BYTES)?;
        self.bytes += pages.len();
        self.groups.insert(group, pages);
        self.order.push_back(group);
        while self.bytes > BYTES_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.bytes -= self.groups.remove(&oldest).map_or(0, |pages| pages.len());
        }
        Ok(())
    }
}
