//! A counter of an event in the guests of one thread, and its alarm.
//!
//! One perf event does both. Setting a new period (`PERF_EVENT_IOC_PERIOD`) folds what the
//! hardware counter holds into the count and starts it again at minus the period; the counter
//! stands still meanwhile, because the guest does. So re-arming loses and adds nothing, whenever it
//! is done, and a second event for the alarm would only take another of the few counters.

use std::fs::File;
use std::io::Read;

use hindsight_replay::Counter;

use super::error::CounterError;
use super::event::{CounterEvent, Pmu};
use super::settings::Throttling;
use super::sys::{self, Count, Page, Records};

/// A period that no guest comes to the end of. perf takes less than 2^63, and splits what the
/// hardware counter has no room for.
const FAR: u64 = 1 << 62;

/// Counts an event in the guests that the calling thread runs, and nowhere else. It stays with that
/// thread.
#[derive(Debug)]
pub struct BranchCounter {
    page: Page,
    file: File,
    event: String,
    signal: libc::c_int,
    last: u64,
    /// Whether a signal may come before the count is [`FAR`].
    armed: bool,
    seen: Records,
}

impl BranchCounter {
    /// Opens and starts it at 0. `signal`, which must have a handler, goes to this thread when the
    /// count that was armed is reached. On a hybrid CPU the thread is kept from now on to cores of
    /// the kind that has the event.
    pub fn open(event: &CounterEvent, signal: i32) -> Result<BranchCounter, CounterError> {
        let pmu = Pmu::named(&event.pmu)?;
        if let Some(cpus) = &pmu.cpus {
            cpus.keep_this_thread()?;
        }
        let file = sys::open(pmu.kind, event.event, FAR)
            .map_err(|source| CounterError::open(event.to_string(), source))?;
        let call = |call| move |source| CounterError::Call { call, source };
        sys::signal_this_thread(&file, signal).map_err(call("fcntl"))?;
        let page = Page::of(&file).map_err(call("mmap"))?;
        let mut counter = BranchCounter {
            page,
            file,
            event: event.to_string(),
            signal,
            last: 0,
            armed: false,
            seen: Records::default(),
        };
        // A pinned event for which there is no room shows that at the first read.
        counter.read_by_call()?;
        Ok(counter)
    }

    /// What it counts, to be shown.
    pub fn name(&self) -> &str {
        &self.event
    }

    /// The count since it was opened. Without a system call where the kernel allows that.
    pub fn read(&mut self) -> Result<u64, CounterError> {
        match self.page.count() {
            Some(Count { count, .. }) => self.note(count),
            None => self.read_by_call(),
        }
    }

    /// The count, without a system call or not at all.
    pub fn read_by_rdpmc(&mut self) -> Option<u64> {
        self.page.count().map(|count| count.count)
    }

    /// The count, asked of the kernel.
    pub fn read_by_call(&mut self) -> Result<u64, CounterError> {
        let Count { count, .. } = self.read_with_times()?;
        self.note(count)
    }

    fn read_with_times(&mut self) -> Result<Count, CounterError> {
        let mut words = [0; 24];
        let bytes = self
            .file
            .read(&mut words)
            .map_err(|source| CounterError::Call {
                call: "read",
                source,
            })?;
        // perf's way to say that a pinned event has lost its counter (perf_event_open(2), pinned).
        if bytes != words.len() {
            return Err(CounterError::PinLost {
                event: self.event.clone(),
            });
        }
        let word = |i: usize| {
            let bytes = words[8 * i..8 * i + 8].try_into();
            u64::from_ne_bytes(bytes.expect("eight bytes are eight bytes"))
        };
        Ok(Count {
            count: word(0),
            enabled_ns: word(1),
            running_ns: word(2),
        })
    }

    fn note(&mut self, now: u64) -> Result<u64, CounterError> {
        if now < self.last {
            return Err(CounterError::Backwards {
                event: self.event.clone(),
                before: self.last,
                now,
            });
        }
        self.last = now;
        Ok(now)
    }

    /// Has the signal sent when the count reaches `at`, as [`read`](Self::read) counts; at once if
    /// it has. It comes late, by the skid, and when `at` is the very next branch, by one more: perf
    /// arms for two at least. Until armed anew it comes again after each such number of branches. `None` takes
    /// it back, but a signal on its way still arrives: only the count says what it means.
    pub fn arm(&mut self, at: Option<u64>) -> Result<(), CounterError> {
        self.take_records();
        if at.is_none() && !self.armed {
            return Ok(());
        }
        let now = self.read()?;
        let ahead = at.and_then(|at| at.checked_sub(now)).filter(|n| *n > 0);
        let period = ahead.unwrap_or(FAR).min(FAR);
        let call = |call| move |source| CounterError::Call { call, source };
        sys::set_period(&self.file, period).map_err(call("PERF_EVENT_IOC_PERIOD"))?;
        self.armed = period < FAR;
        if at.is_some() && ahead.is_none() {
            sys::signal_myself(self.signal).map_err(call("raise"))?;
        }
        Ok(())
    }

    fn take_records(&mut self) {
        let records = self.page.take_records();
        self.seen.throttles += records.throttles;
        self.seen.lost += records.lost;
    }

    /// Whether every branch since it was opened was counted. Without a system call while the
    /// counter runs.
    pub fn check(&mut self) -> Result<(), CounterError> {
        self.take_records();
        let Count {
            count,
            enabled_ns,
            running_ns,
        } = match self.page.count() {
            Some(count) => count,
            None => self.read_with_times()?,
        };
        self.note(count)?;
        if self.seen.throttles > 0 {
            return Err(CounterError::Throttled {
                event: self.event.clone(),
                times: self.seen.throttles,
                settings: Throttling::of_host(),
            });
        }
        if enabled_ns != running_ns {
            return Err(CounterError::Multiplexed {
                event: self.event.clone(),
                enabled_ns,
                running_ns,
            });
        }
        if self.seen.lost > 0 {
            return Err(CounterError::RecordsLost {
                records: self.seen.lost,
            });
        }
        Ok(())
    }
}

/// The host's branch counter, with the margin that it needs.
#[derive(Debug)]
pub struct HostCounter {
    counter: BranchCounter,
    margin: u64,
}

impl HostCounter {
    /// `counter`, which must be armed `margin` branches ahead of its target.
    pub fn new(counter: BranchCounter, margin: u64) -> HostCounter {
        HostCounter { counter, margin }
    }
}

impl Counter for HostCounter {
    type Error = CounterError;

    fn read(&mut self) -> Result<u64, CounterError> {
        self.counter.read()
    }

    fn arm(&mut self, at: Option<u64>) -> Result<(), CounterError> {
        self.counter.arm(at)
    }

    fn margin(&self) -> u64 {
        self.margin
    }

    fn check(&mut self) -> Result<(), CounterError> {
        self.counter.check()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    static SIGNALS: AtomicU32 = AtomicU32::new(0);

    extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        SIGNALS.fetch_add(1, Ordering::Relaxed);
    }

    /// A counter, where there is a PMU.
    fn counter() -> Option<BranchCounter> {
        let signal = libc::SIGRTMIN() + 3;
        vmm_sys_util::signal::register_signal_handler(signal, on_signal).unwrap();
        let event = CounterEvent::of_host().ok()?;
        let opened = BranchCounter::open(&event, signal);
        if let Err(error) = &opened {
            println!("no counter: {error}");
        }
        opened.ok()
    }

    #[test]
    fn a_count_is_the_same_by_either_way_of_reading() {
        let Some(mut counter) = counter() else { return };
        assert_eq!(counter.read_by_call().unwrap(), 0, "no guest has run");
        assert_eq!(counter.read().unwrap(), 0);
        assert!(matches!(counter.read_by_rdpmc(), None | Some(0)));
        counter.check().unwrap();
    }

    #[test]
    fn a_count_that_is_reached_already_is_signalled_at_once() {
        let Some(mut counter) = counter() else { return };
        let before = SIGNALS.load(Ordering::Relaxed);
        counter.arm(Some(1)).unwrap();
        counter.arm(None).unwrap();
        assert_eq!(SIGNALS.load(Ordering::Relaxed), before);
        counter.arm(Some(0)).unwrap();
        assert_eq!(SIGNALS.load(Ordering::Relaxed), before + 1);
        counter.check().unwrap();
    }

    #[test]
    fn a_counter_for_which_the_pmu_has_no_room_is_refused() {
        let Some(first) = counter() else { return };
        let event = CounterEvent::of_host().unwrap();
        // No CPU has 64 counters that take one event.
        let mut open = vec![first];
        let error = loop {
            match BranchCounter::open(&event, libc::SIGRTMIN() + 3) {
                Ok(counter) => open.push(counter),
                Err(error) => break error,
            }
            assert!(open.len() < 64);
        };
        println!("{} counters fit", open.len());
        assert!(
            matches!(error, CounterError::PinLost { .. })
                && error.to_string().contains("nmi_watchdog"),
            "{error}"
        );
        for counter in &mut open {
            counter.check().unwrap();
        }
    }
}
