//! Host time, as far as the guest is to see it: less the time for which this program did not run.
//!
//! A recorder that is stopped (by a shell, a debugger, a frozen cgroup, or a host too busy to run it) and goes on
//! after a minute must not hand its guest that minute in one step: the guest would find that a task
//! has held the CPU for all of it, and say so as a soft lockup, or panic. So time is what lies between one
//! look at the host's clock and the next, but no more than a second of it; somebody looks ten times a second
//! as long as the program runs at all.

use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use hindsight_devices::Nanos;

/// From one look to the next at most so much time passes: far more than a host that runs us lets go by between
/// two looks, and far less than any watchdog of a guest waits.
pub(super) const STEP_MAX_NS: Nanos = 1_000_000_000;

/// How much time has passed, by a clock that is looked at now and then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RunningTime {
    /// What the clock showed when it began.
    from: Nanos,
    /// The host's time at the last look.
    seen: Nanos,
    /// Since it began.
    passed: Nanos,
    /// Nothing passes.
    held: bool,
}

impl RunningTime {
    /// A clock that goes on from `from` when the host's shows 0.
    fn from(from: Nanos) -> RunningTime {
        RunningTime {
            from,
            ..RunningTime::default()
        }
    }

    /// What it shows when the host's clock shows `host`. Looks may come in any order.
    pub(super) fn look(&mut self, host: Nanos) -> Nanos {
        let step = host.saturating_sub(self.seen);
        self.seen = self.seen.max(host);
        if !self.held {
            self.passed += step.min(STEP_MAX_NS);
        }
        self.from + self.passed
    }

    /// Nothing passes from now on, or time goes on.
    pub(super) fn hold(&mut self, held: bool, host: Nanos) {
        self.look(host);
        self.held = held;
    }

    /// How much of the host's time was left out so far.
    pub(super) fn left_out(&self) -> Nanos {
        self.seen - self.passed
    }
}

/// The clock that all threads of a recorder look at.
#[derive(Debug)]
pub(super) struct HostClock(Mutex<(Instant, RunningTime)>);

impl HostClock {
    /// A clock that starts now.
    pub(super) fn new() -> HostClock {
        HostClock(Mutex::new((Instant::now(), RunningTime::default())))
    }

    fn look<T>(&self, at: impl FnOnce(&mut RunningTime, Nanos) -> T) -> T {
        let mut clock = self.lock();
        // Inside the lock: looks come in the order of their times.
        let host = u64::try_from(clock.0.elapsed().as_nanos()).expect("584 years have not passed");
        at(&mut clock.1, host)
    }

    fn lock(&self) -> MutexGuard<'_, (Instant, RunningTime)> {
        self.0.lock().expect("nobody panics with the clock in hand")
    }

    /// Nanoseconds since it started, as far as the program ran, and what it started from. Never runs backwards.
    pub(super) fn now(&self) -> Nanos {
        self.look(RunningTime::look)
    }

    /// Stands still until [`HostClock::go_on`].
    pub(super) fn hold(&self) {
        self.look(|time, host| time.hold(true, host));
    }

    /// Goes on.
    pub(super) fn go_on(&self) {
        self.look(|time, host| time.hold(false, host));
    }

    /// How much of the host's time was left out by the last look.
    pub(super) fn left_out(&self) -> Nanos {
        self.lock().1.left_out()
    }

    /// Starts over, from this time on.
    pub(super) fn restart(&self, from: Nanos) {
        *self.lock() = (Instant::now(), RunningTime::from(from));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Nanos = 1_000_000_000;

    #[test]
    fn a_minute_in_which_nobody_looked_passes_as_a_second() {
        let mut time = RunningTime::default();
        assert_eq!(time.look(SECOND / 2), SECOND / 2);
        assert_eq!(time.look(70 * SECOND), SECOND / 2 + STEP_MAX_NS);
        assert_eq!(time.left_out(), 70 * SECOND - SECOND / 2 - STEP_MAX_NS);
        assert_eq!(time.look(70 * SECOND + 5), SECOND / 2 + STEP_MAX_NS + 5);
    }

    #[test]
    fn a_clock_that_goes_on_shows_what_was_shown_last_and_then_what_passes() {
        let from = 7 * SECOND;
        let mut time = RunningTime::from(from);
        assert_eq!(time.look(0), from);
        assert_eq!(time.look(SECOND / 2), from + SECOND / 2);
        time.hold(true, SECOND / 2);
        assert_eq!(time.look(SECOND), from + SECOND / 2);
        time.hold(false, SECOND);
        assert_eq!(time.look(60 * SECOND), from + SECOND / 2 + STEP_MAX_NS);
        assert_eq!(time.left_out(), 60 * SECOND - SECOND / 2 - STEP_MAX_NS);
        // Of all that was shown before, by whatever machine, nothing is left.
        let clock = HostClock::new();
        clock.hold();
        clock.restart(from);
        let (first, second) = (clock.now(), clock.now());
        assert!((from..from + SECOND).contains(&first) && second >= first);
        clock.restart(0);
        assert!(clock.now() < SECOND, "another one, from its power-on");
    }

    #[test]
    fn nothing_passes_while_it_is_held() {
        let mut time = RunningTime::default();
        time.hold(true, 100);
        for host in [200, 300, 400] {
            assert_eq!(time.look(host), 100);
        }
        time.hold(false, 500);
        assert_eq!((time.look(500), time.look(510)), (100, 110));
    }

    proptest! {
        #[test]
        fn time_never_runs_backwards_nor_faster_than_the_host(
            looks in prop::collection::vec((0..100 * SECOND, any::<bool>()), 0..200)
        ) {
            let mut time = RunningTime::default();
            let (mut before, mut latest) = (0, 0);
            for (host, held) in looks {
                let now = time.look(host);
                prop_assert!(now >= before, "backwards");
                prop_assert!(now - before <= host.saturating_sub(latest).min(STEP_MAX_NS));
                latest = latest.max(host);
                prop_assert_eq!(now + time.left_out(), latest);
                time.hold(held, host);
                before = now;
            }
        }

        #[test]
        fn a_host_that_looks_often_enough_sees_its_own_time(
            steps in prop::collection::vec(0..=STEP_MAX_NS, 0..100)
        ) {
            let mut time = RunningTime::default();
            let mut host = 0;
            for step in steps {
                host += step;
                prop_assert_eq!(time.look(host), host);
            }
        }
    }
}
