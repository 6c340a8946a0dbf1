//! The local APIC's timer (Intel SDM vol. 3, 11.5.4).
//!
//! It counts a bus clock of 25 MHz, 40 ns of guest time a tick before the divider: fine enough for a
//! timer, and slow enough for Linux, which uses 23 bits of it, to sleep five seconds. Or it waits until the
//! time stamp counter has come to a deadline. However often a period has passed since the last look, the
//! timer has fired once.
//!
//! It does not fire before the guest had the time to get on since it was armed, or fired. Exits are costly to this
//! machine, and more so on a host that is busy: where the handful of exits that a timer's handler makes takes longer
//! than its period, the next one would be due before the handler has returned, and the interrupted program would never
//! run again. Time is no measure of that, since it follows the host's; exits are. So a timer waits for
//! [`EXITS_MIN`] of them, unless the guest is known to have got on: it was preempted, halted, or read the time in a
//! program. Silicon has no such bound because a handler there takes less than the shortest period that Linux programs.

use serde::{Deserialize, Serialize};

use crate::Nanos;
use crate::restore::{RestoreError, ensure};

/// One tick of the bus clock.
const BUS_NS: u64 = 40;

/// A deadline later than this, 292 years, does not come. A halted machine waits for its deadline, and
/// by how much it was woken earlier must fit a signed number in the journal.
const NEVER: Nanos = i64::MAX as Nanos;

/// A timer does not fire before so many exits. Linux makes some five from one that is armed in a handler to the program
/// that was interrupted, and a dozen if each read of the time exits.
const EXITS_MIN: u8 = 16;

/// Guest time and the time stamp counter at one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Time {
    /// Nanoseconds since power-on.
    pub now: Nanos,
    /// What RDTSC reads then.
    pub tsc: u64,
}

/// Bits 18:17 of the timer's LVT entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    Deadline,
    Reserved,
}

impl Mode {
    /// From the two bits.
    pub(super) fn from_bits(bits: u32) -> Mode {
        match bits & 3 {
            0 => Mode::OneShot,
            1 => Mode::Periodic,
            2 => Mode::Deadline,
            _ => Mode::Reserved,
        }
    }

    /// Whether the timer counts down.
    pub(super) fn counts(self) -> bool {
        matches!(self, Mode::OneShot | Mode::Periodic)
    }
}

/// The timer. At most one of the count and the deadline is armed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Timer {
    /// The divide configuration register.
    divide: u8,
    /// The initial-count register.
    initial: u32,
    /// What the count was at `since`; 0 if it does not run.
    loaded: u32,
    since: Nanos,
    /// IA32_TSC_DEADLINE; 0 if it is not armed.
    deadline: u64,
    /// How many exits there were since it was armed, up to [`EXITS_MIN`].
    exits: u8,
    /// When it is due: it fires then, or as soon as there were exits enough. Derived, and kept because it is asked at
    /// every exit.
    due: Option<Nanos>,
}

impl Timer {
    pub(super) fn new() -> Timer {
        Timer {
            divide: 0,
            initial: 0,
            loaded: 0,
            since: 0,
            deadline: 0,
            exits: 0,
            due: None,
        }
    }

    /// An exit has happened, at which the guest is known to have `got_on`, or not.
    pub(super) fn count_exit(&mut self, got_on: bool) {
        self.exits = match got_on {
            true => EXITS_MIN,
            false => (self.exits + 1).min(EXITS_MIN),
        };
    }

    /// When it is due. It may have been already, and wait for exits.
    pub(super) fn due(&self) -> Option<Nanos> {
        self.due
    }

    /// Whether it has fired by now.
    pub(super) fn advance(&mut self, time: Time, mode: Mode) -> bool {
        let Time { now, .. } = time;
        if self.due.is_none_or(|due| due > now) || self.exits < EXITS_MIN {
            return false;
        }
        let ran_down = self.ran_down();
        self.deadline = 0;
        self.loaded = 0;
        self.due = None;
        if mode == Mode::Periodic
            && self.initial != 0
            && let Some(ran_down) = ran_down
        {
            let period = u64::from(self.initial) * self.tick_ns();
            let since = ran_down + (now - ran_down) / period * period;
            self.start(self.initial, since);
        }
        true
    }

    /// A write to the initial-count register: starts over, or stops.
    pub(super) fn load(&mut self, count: u32, now: Nanos) {
        self.initial = count;
        self.start(count, now);
    }

    /// A write to the divide configuration register. A count that runs goes on from where it is.
    pub(super) fn set_divide(&mut self, divide: u8, now: Nanos) {
        let count = self.count(now);
        let runs = self.loaded != 0 && self.due.is_some();
        self.divide = divide;
        if count != 0 || runs {
            self.start(count.max(1), now);
        }
    }

    /// Arms the deadline, or disarms it with 0.
    pub(super) fn set_deadline(&mut self, deadline: u64, time: Time) {
        self.deadline = deadline;
        self.exits = 0;
        self.move_tsc(time);
    }

    /// The TSC has moved against guest time.
    pub(super) fn move_tsc(&mut self, time: Time) {
        if self.deadline != 0 || self.loaded == 0 {
            self.due = self.deadline_due(time);
        }
    }

    /// Stops everything.
    pub(super) fn disarm(&mut self) {
        *self = Timer {
            divide: self.divide,
            ..Timer::new()
        };
    }

    /// The initial-count register.
    pub(super) fn initial(&self) -> u32 {
        self.initial
    }

    /// The current-count register.
    pub(super) fn count(&self, now: Nanos) -> u32 {
        let ticks = (now - self.since) / self.tick_ns();
        // A count that has run down has fired, and was stopped or started again by that.
        self.loaded
            .saturating_sub(u32::try_from(ticks).unwrap_or(u32::MAX))
    }

    /// The divide configuration register.
    pub(super) fn divide(&self) -> u8 {
        self.divide
    }

    /// IA32_TSC_DEADLINE.
    pub(super) fn deadline(&self) -> u64 {
        self.deadline
    }

    /// Refuses a saved state that no sequence of accesses could have reached by `time`.
    pub(super) fn check(&self, time: Time, mode: Mode) -> Result<(), RestoreError> {
        ensure("APIC timer divider", self.divide & !0xb == 0)?;
        ensure("APIC timer start", self.since <= time.now)?;
        ensure(
            "APIC timer mode",
            match mode {
                Mode::OneShot | Mode::Periodic => self.deadline == 0,
                Mode::Deadline => self.loaded == 0 && self.initial == 0,
                Mode::Reserved => self.loaded == 0 && self.initial == 0 && self.deadline == 0,
            },
        )?;
        ensure("APIC timer exits", self.exits <= EXITS_MIN)?;
        let due = match self.deadline {
            0 => self.ran_down(),
            _ => self.deadline_due(time),
        };
        // Since when one has passed that waits for exits is not known from the deadline.
        let passed = |due: Option<Nanos>| due.is_some_and(|due| due <= time.now);
        let right = due == self.due || (self.deadline != 0 && passed(due) && passed(self.due));
        ensure("APIC timer deadline", right)
    }

    /// Starts a count that has run since `since`.
    fn start(&mut self, count: u32, since: Nanos) {
        self.loaded = count;
        self.since = since;
        self.exits = 0;
        self.due = self.ran_down();
    }

    /// When the count has run down, if it runs.
    fn ran_down(&self) -> Option<Nanos> {
        match self.loaded {
            0 => None,
            count => self.since.checked_add(u64::from(count) * self.tick_ns()),
        }
    }

    /// When the deadline that is armed is due: now, if it has passed.
    fn deadline_due(&self, time: Time) -> Option<Nanos> {
        if self.deadline == 0 {
            return None;
        }
        let left_ns = self.deadline.saturating_sub(time.tsc);
        let due = time.now.checked_add(left_ns)?;
        Some(due).filter(|due| *due <= NEVER)
    }

    /// How long one step of the count takes. The divider is a power of two: 000 is 2, 110 is 128, 111
    /// is 1.
    fn tick_ns(&self) -> u64 {
        let bits = self.divide & 3 | self.divide >> 1 & 4;
        BUS_NS << ((bits + 1) & 7)
    }
}
