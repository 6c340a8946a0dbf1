//! How late overflow signals are, and the margin that follows.
//!
//! A PMU raises its interrupt some time after the counter has overflowed, and the guest runs on
//! until then. So a counter is armed short of its target by a margin, and the rest is walked. If
//! the margin is too small the target is overrun, and only an earlier checkpoint leads back to it.

use serde::{Deserialize, Serialize};

/// What is added to twice the worst skid seen: the least step of a counter, and small change.
const EXTRA: u64 = 32;

/// How far short of a target to arm, in branches. Twice the worst seen now, for the tail is long
/// and a calibration short; and no less than what was ever seen of CPUs of this kind.
pub(super) fn margin(worst_seen: u64, worst_known: u64) -> u64 {
    worst_seen.saturating_mul(2).max(worst_known) + EXTRA
}

/// How many signals were at least so late, and less than twice so late.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bucket {
    /// Zero or a power of two, in branches.
    pub from: u64,
    /// Signals.
    pub count: u64,
}

/// How late signals were, in conditional branches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Skid {
    /// Signals measured.
    pub signals: u64,
    /// Half of them were no later.
    pub median: u64,
    /// 99 of 100 were no later.
    pub percentile_99: u64,
    /// None was later.
    pub worst: u64,
    /// How they spread; empty buckets are left out.
    pub histogram: Vec<Bucket>,
}

impl Skid {
    /// The figures of these signals.
    pub(crate) fn of(mut late: Vec<u64>) -> Skid {
        late.sort_unstable();
        let count = late.len();
        // The smallest that `percent` of a hundred do not exceed.
        let percentile = |percent: usize| {
            let rank = (count * percent).div_ceil(100).max(1);
            late.get(rank - 1).copied().unwrap_or(0)
        };
        let mut histogram: Vec<Bucket> = Vec::new();
        for &branches in &late {
            let from = branches.checked_ilog2().map_or(0, |bits| 1 << bits);
            match histogram.last_mut() {
                Some(bucket) if bucket.from == from => bucket.count += 1,
                _ => histogram.push(Bucket { from, count: 1 }),
            }
        }
        Skid {
            signals: count as u64,
            median: percentile(50),
            percentile_99: percentile(99),
            worst: percentile(100),
            histogram,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_those_of_the_sorted_signals() {
        let skid = Skid::of((1..=200).rev().collect());
        assert_eq!((skid.signals, skid.median), (200, 100));
        assert_eq!((skid.percentile_99, skid.worst), (198, 200));
        let skid = Skid::of(vec![7]);
        assert_eq!((skid.median, skid.percentile_99, skid.worst), (7, 7, 7));
        assert_eq!(Skid::of(Vec::new()), Skid::default());
    }

    #[test]
    fn the_histogram_has_every_signal_once_in_powers_of_two() {
        let skid = Skid::of(vec![0, 0, 1, 2, 3, 4, 1609]);
        let buckets: Vec<(u64, u64)> = skid.histogram.iter().map(|b| (b.from, b.count)).collect();
        assert_eq!(buckets, [(0, 2), (1, 1), (2, 2), (4, 1), (1024, 1)]);
    }

    #[test]
    fn the_margin_is_above_what_was_seen_and_what_is_known() {
        assert_eq!(margin(0, 0), 32);
        assert_eq!(margin(200, 0), 432);
        assert_eq!(margin(30, 1609), 1641);
    }
}
