//! Time reads without an exit: a clock in guest memory that the guest moves on by itself.
//!
//! Guest time changes only at exits, and an exit costs more than most of what the guest reads the
//! time for. So the kernel's time reads take their value from three words of its memory. Each
//! counted exit sets them by the time there; a read takes the next value and moves the clock on by a
//! fixed step; after a set number of reads, the next one exits. All of it is the guest's own
//! computing on values that exits gave it, so a replay that gives the same values at the same exits gets
//! the same reads.
//!
//! **Why time never runs backwards.** Let the time stamp at an exit be T, the step s, and the reads
//! between two exits at most n. The exit sets the next value to T + s and the end to T + (n + 1)·s.
//!
//! 1. A read takes the next value and adds s to it in one instruction, so each value is taken once, and
//!    values rise in the order in which they are taken. That holds across interrupts.
//! 2. A read takes a value only if it is below an end that was read before. So each value taken lies
//!    above the T of the last exit and below T + (n + 1)·s, or else it is refused and the read exits.
//! 3. Between two exits of a running guest at least (n + 1)·s passes: [`QuickReads::span_ns`] is a floor under what the
//!    rule and the world say. So the next exit's T' is at least T + (n + 1)·s: above each value
//!    that was taken. While the guest is halted no floor is needed, for nothing is read.
//!
//! The time stamp is guest time plus what the guest has added to it; where it changes that, by WRMSR, it
//! does so at an exit, and the clock is set after it. If a sum wraps around, the end lies below
//! the values, and every read exits.
//!
//! The span is at most what an exit takes by the rule (unless the rule says less than a nanosecond a
//! read), so reads do not make guest time run faster than exits would have.

use hindsight_devices::Nanos;
use serde::{Deserialize, Serialize};

/// How a machine reads the time without exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuickReads {
    /// How many of the kernel's time reads were rewritten.
    pub sites: u32,
    /// XXH3 of what they were rewritten to, and where.
    pub check: u64,
    /// How many reads there are at most from one exit to the next.
    pub reads: u32,
    /// By how much each moves the clock on, in nanoseconds.
    pub step_ns: u64,
}

impl QuickReads {
    /// Reads from one exit to the next: enough that exits are rare, and few enough that a guest which waits
    /// by reading the time sees it follow the host's.
    pub const READS: u32 = 32;

    /// Where an exit advances guest time by `ns_per_exit`.
    pub fn new(sites: u32, check: u64, ns_per_exit: u64) -> QuickReads {
        QuickReads {
            sites,
            check,
            reads: QuickReads::READS,
            step_ns: (ns_per_exit / (u64::from(QuickReads::READS) + 1)).max(1),
        }
    }

    /// What passes at least from one exit to the next of a guest that runs.
    pub fn span_ns(&self) -> Nanos {
        self.step_ns.saturating_mul(u64::from(self.reads) + 1)
    }

    /// The clock at an exit with this time stamp.
    pub fn shown(&self, tsc: u64) -> ShownClock {
        ShownClock {
            next: tsc.wrapping_add(self.step_ns),
            end: tsc.wrapping_add(self.span_ns()),
            step: self.step_ns,
        }
    }
}

/// The clock in guest memory: three words, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShownClock {
    /// The value that the next read takes.
    pub next: u64,
    /// The first value that no read may take.
    pub end: u64,
    /// What a read adds.
    pub step: u64,
}

impl ShownClock {
    /// Length in bytes.
    pub const BYTES: usize = 24;

    /// As it is in memory.
    pub fn to_bytes(self) -> [u8; ShownClock::BYTES] {
        let words = [self.next, self.end, self.step].map(u64::to_le_bytes);
        words.as_flattened().try_into().expect("three words")
    }

    /// What memory says.
    pub fn from_bytes(bytes: [u8; ShownClock::BYTES]) -> ShownClock {
        let word = |index: usize| u64::from_le_bytes(bytes.as_chunks::<8>().0[index]);
        ShownClock {
            next: word(0),
            end: word(1),
            step: word(2),
        }
    }

    /// Reads it, as the guest does; `None` if the read exits.
    pub fn read(&mut self) -> Option<u64> {
        let value = self.next;
        self.next = value.wrapping_add(self.step);
        (value < self.end).then_some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn so_many_reads_have_a_value_and_the_next_exits() {
        for ns_per_exit in [0, 1, 32, 33, 1_000, 60_000, 1 << 40] {
            let quick = QuickReads::new(1, 2, ns_per_exit);
            assert!(quick.span_ns() <= ns_per_exit.max(33));
            let mut clock = quick.shown(1_000);
            assert_eq!(ShownClock::from_bytes(clock.to_bytes()), clock);
            let mut last = 1_000;
            for _ in 0..QuickReads::READS {
                let value = clock.read().expect("not yet at the end");
                assert!(last < value && value < 1_000 + quick.span_ns());
                last = value;
            }
            assert_eq!(clock.read(), None);
            assert_eq!(clock.read(), None);
        }
    }

    #[test]
    fn a_clock_that_nobody_set_has_no_value() {
        assert_eq!(ShownClock::default().read(), None);
        let head = QuickReads {
            sites: 1,
            check: 0,
            reads: u32::MAX,
            step_ns: u64::MAX,
        };
        assert_eq!(head.span_ns(), u64::MAX);
    }

    #[test]
    fn a_sum_that_wraps_around_makes_reads_exit() {
        let quick = QuickReads::new(1, 0, 33_000);
        let mut clock = quick.shown(u64::MAX - 20_000);
        for _ in 0..10 {
            assert_eq!(clock.read(), None);
            clock = quick.shown(u64::MAX - 20_000);
        }
        let mut clock = quick.shown(u64::MAX);
        assert_eq!(clock.read(), Some(999));
    }

    /// One context's read, an instruction at a time.
    #[derive(Clone, Copy)]
    enum Reading {
        Begins,
        HasEnd(u64),
        Has { end: u64, value: u64 },
    }

    /// Contexts that interrupt each other between any two instructions of their reads, and exits
    /// there too, however unlikely: no value is taken out of order, and none lies above an exit after it.
    #[test]
    fn time_never_runs_backwards_whatever_interrupts_a_read() {
        for seed in 0..2_000 {
            let mut rng = Rng::new(seed, 9);
            let quick = QuickReads::new(1, 0, [0, 1_000, 60_000][rng.below(3) as usize]);
            let mut now = rng.below(1 << 40);
            let mut clock = quick.shown(now);
            let mut contexts = [Reading::Begins; 5];
            // The newest value, or exit, by the order in which they were taken.
            let mut newest = now;
            let mut given = Vec::new();
            for _ in 0..500 {
                if rng.one_in(40) {
                    now += quick.span_ns() + rng.below(3);
                    clock = quick.shown(now);
                    assert!(now >= newest, "seed {seed}: an exit below a value");
                    newest = now;
                }
                let context = rng.below(5) as usize;
                contexts[context] = match contexts[context] {
                    Reading::Begins => Reading::HasEnd(clock.end),
                    Reading::HasEnd(end) => {
                        let value = clock.next;
                        clock.next += clock.step;
                        if value < end {
                            assert!(value > newest, "seed {seed}: {value} after {newest}");
                            newest = value;
                        }
                        Reading::Has { end, value }
                    }
                    Reading::Has { end, value } if value < end => {
                        given.push(value);
                        Reading::Begins
                    }
                    Reading::Has { .. } => {
                        now += quick.span_ns();
                        clock = quick.shown(now);
                        assert!(now >= newest, "seed {seed}: an exit below a value");
                        newest = now;
                        Reading::Begins
                    }
                };
            }
            given.sort_unstable();
            let count = given.len();
            given.dedup();
            assert_eq!(given.len(), count, "seed {seed}: a value was taken twice");
        }
    }
}
