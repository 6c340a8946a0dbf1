//! Pages that were unpacked, or have just been packed: a seek wants most of those that the one before wanted.

use std::collections::{BTreeMap, VecDeque};

/// How much is kept, in bytes.
const BYTES_MAX: usize = 512 << 20;

/// Groups of pages by their numbers. The oldest go first.
#[derive(Debug, Default)]
pub(super) struct Unpacked {
    groups: BTreeMap<u64, Vec<u8>>,
    order: VecDeque<u64>,
    bytes: usize,
}

impl Unpacked {
    /// Nothing yet.
    pub(super) fn new() -> Unpacked {
        Unpacked::default()
    }

    /// Whether it is there.
    pub(super) fn has(&self, group: u64) -> bool {
        self.groups.contains_key(&group)
    }

    /// The pages of a group, if it is there.
    pub(super) fn get(&self, group: u64) -> Option<&[u8]> {
        self.groups.get(&group).map(Vec::as_slice)
    }

    /// Keeps a group.
    pub(super) fn keep(&mut self, group: u64, pages: Vec<u8>) {
        self.bytes += pages.len();
        if let Some(before) = self.groups.insert(group, pages) {
            self.bytes -= before.len();
        } else {
            self.order.push_back(group);
        }
        while self.bytes > BYTES_MAX
            && self.order.len() > 1
            && let Some(oldest) = self.order.pop_front()
        {
            self.bytes -= self.groups.remove(&oldest).map_or(0, |pages| pages.len());
        }
    }
}
