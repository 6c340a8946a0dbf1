//! How much of a disk may be gone through to compare its files.
//!
//! What is on the disk is the guest's word: tables, trees and directories can lead to the same bytes again and again,
//! and 256 partitions can be one. So there is one budget for a whole disk, made from its length. A sound disk never
//! comes near to it.

use std::cell::Cell;

/// Names that are compared, changes that are reported, and how long all their paths may be, in bytes.
const NAMES_MAX: u64 = 20_000_000;
const CHANGES_MAX: u64 = 500_000;
const PATHS_MAX: u64 = 64 << 20;
/// Bytes of metadata that are gone through however small the disk is, and however large.
const METADATA_MIN: u64 = 64 << 20;
const METADATA_MAX: u64 = 64 << 30;

/// What may still be spent.
#[derive(Debug)]
pub(super) struct Budget {
    metadata_bytes: Cell<u64>,
    content_bytes: Cell<u64>,
    names: Cell<u64>,
    changes: Cell<u64>,
    path_bytes: Cell<u64>,
}

impl Budget {
    /// For a disk of `disk_bytes` bytes, at two times.
    pub(super) fn new(disk_bytes: u64) -> Budget {
        Budget {
            // Of a sound file system each block of metadata is read a few times over at most.
            metadata_bytes: Cell::new(
                disk_bytes
                    .saturating_mul(16)
                    .clamp(METADATA_MIN, METADATA_MAX),
            ),
            // Each block of a sound one belongs to one file.
            content_bytes: Cell::new(disk_bytes.saturating_mul(4)),
            names: Cell::new(NAMES_MAX),
            changes: Cell::new(CHANGES_MAX),
            path_bytes: Cell::new(PATHS_MAX),
        }
    }

    /// Metadata is gone through; whether it may be.
    #[must_use]
    pub(super) fn metadata(&self, bytes: u64) -> bool {
        spend(&self.metadata_bytes, bytes)
    }

    /// Content is compared.
    #[must_use]
    pub(super) fn content(&self, bytes: u64) -> bool {
        spend(&self.content_bytes, bytes)
    }

    /// Names are compared.
    #[must_use]
    pub(super) fn names(&self, count: u64) -> bool {
        spend(&self.names, count)
    }

    /// A change is reported, with a path of this many bytes.
    #[must_use]
    pub(super) fn change(&self, path_bytes: u64) -> bool {
        spend(&self.changes, 1) && spend(&self.path_bytes, path_bytes)
    }
}

fn spend(left: &Cell<u64>, amount: u64) -> bool {
    let rest = left.get().checked_sub(amount);
    left.set(rest.unwrap_or(0));
    rest.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spent_is_spent() {
        let budget = Budget::new(1 << 20);
        assert!(budget.content(3 << 20) && budget.content(1 << 20) && !budget.content(1));
        assert!(!budget.names(NAMES_MAX + 1) && !budget.names(1));
        assert!(budget.change(PATHS_MAX) && !budget.change(1));
    }
}
