//! The one way in which whatever comes from outside wakes the machine.
//!
//! Each input waits in a place of its own: typed bytes in their buffer, frames in their inbox, the operator's
//! wishes in flags. Whoever puts one there rings. That wakes a machine that is halted; one whose guest runs finds the
//! input at its next exit, and is kicked if that takes too long. Neither carries anything: they only have the vCPU's
//! thread look, and how many of them came changes nothing.
//!
//! None is lost because of the order: an input is in its place before its ring, and the vCPU's thread says that it
//! looks ([`Bell::looks`]) before it does. So a ring that comes before that is about something that the look finds,
//! and one that comes after it is still unseen, and ends the next wait or has the guest kicked.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use crate::kvm::Kicker;

/// How long an input waits for the guest to exit by itself, which costs it less than a kick. As long as a timer
/// that is due does, at least.
const EXIT_WAIT: Duration = Duration::from_nanos(hindsight_replay::Patience::SHORTEST_NS);

/// Wakes the machine. Every input's thread has one.
#[derive(Clone, Debug, Default)]
pub struct Bell(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    kicker: OnceLock<Kicker>,
    /// The vCPU's thread is where a kick has a meaning: neither asleep nor between two machines. A kick would
    /// come to nobody there, and be kept for the next entry.
    runs: AtomicBool,
    /// Somebody has rung since the vCPU's thread looked last.
    unseen: AtomicBool,
    rings: Mutex<Rings>,
    /// For the vCPU's thread when it sleeps.
    heard: Condvar,
    /// For the thread that kicks.
    kicks: Condvar,
}

#[derive(Debug, Default)]
struct Rings {
    /// Somebody has rung since the last wait.
    rung: bool,
    /// When what is unseen by then has waited for long enough.
    overdue_at: Option<Instant>,
}

impl Bell {
    /// From now on kicks go to the thread of `kicker`.
    pub fn kicks(&self, kicker: Kicker) {
        // The main thread's, whichever machine it is.
        let _ = self.0.kicker.set(kicker);
    }

    /// Something has come. A machine that sleeps looks at once; a guest that runs has a while to exit by itself.
    pub fn ring(&self) {
        self.0.unseen.store(true, Ordering::SeqCst);
        let mut rings = self.rings();
        rings.rung = true;
        if rings.overdue_at.is_none() {
            rings.overdue_at = Some(Instant::now() + EXIT_WAIT);
            self.0.kicks.notify_one();
        }
        drop(rings);
        self.0.heard.notify_all();
    }

    /// Something has come that cannot wait for the guest to exit by itself.
    pub fn ring_at_once(&self) {
        self.ring();
        self.kick();
    }

    /// The vCPU's thread is about to look at everything that may have come.
    pub fn looks(&self) {
        // Each exit comes by here, and a load costs less.
        if self.0.unseen.load(Ordering::SeqCst) {
            self.0.unseen.store(false, Ordering::SeqCst);
        }
    }

    /// Brings back a guest that runs.
    pub fn kick(&self) {
        if self.0.runs.load(Ordering::SeqCst)
            && let Some(kicker) = self.0.kicker.get()
        {
            kicker.kick();
        }
    }

    /// Whether there is a guest that runs and may be kicked.
    pub fn set_runs(&self, runs: bool) {
        self.0.runs.store(runs, Ordering::SeqCst);
    }

    /// Waits until somebody rings or has since the last call, but no longer than `most`. Whether somebody did.
    pub fn wait(&self, most: Option<Duration>) -> bool {
        let silent = |rings: &mut Rings| !rings.rung;
        let mut rings = match most {
            Some(most) => {
                let heard = self.0.heard.wait_timeout_while(self.rings(), most, silent);
                heard.expect("nobody panics at the bell").0
            }
            None => {
                let heard = self.0.heard.wait_while(self.rings(), silent);
                heard.expect("nobody panics at the bell")
            }
        };
        std::mem::take(&mut rings.rung)
    }

    /// Waits until something that has come is unseen for too long, but no longer than `most`. Whether it is: the guest
    /// is to be kicked then, once for all that has come.
    pub fn wait_until_overdue(&self, most: Duration) -> bool {
        let end = Instant::now() + most;
        let mut rings = self.rings();
        loop {
            let now = Instant::now();
            if rings.overdue_at.is_some_and(|at| at <= now) {
                rings.overdue_at = None;
                if self.0.unseen.load(Ordering::SeqCst) {
                    return true;
                }
            }
            if end <= now {
                return false;
            }
            let until = rings.overdue_at.map_or(end, |at| at.min(end));
            let waited = self.0.kicks.wait_timeout(rings, until - now);
            rings = waited.expect("nobody panics at the bell").0;
        }
    }

    fn rings(&self) -> MutexGuard<'_, Rings> {
        self.0.rings.lock().expect("nobody panics at the bell")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_bell_that_rang_before_the_wait_is_heard_once() {
        let bell = Bell::default();
        bell.ring();
        bell.ring();
        assert!(bell.wait(None));
        assert!(!bell.wait(Some(Duration::from_millis(1))));
    }

    #[test]
    fn a_ring_ends_a_wait_without_end() {
        let bell = Bell::default();
        let theirs = bell.clone();
        let waits = std::thread::spawn(move || theirs.wait(None));
        std::thread::sleep(Duration::from_millis(5));
        bell.ring();
        assert!(waits.join().unwrap());
    }

    #[test]
    fn what_comes_while_somebody_waits_is_overdue_once_when_the_guest_had_its_time() {
        let bell = Bell::default();
        let theirs = bell.clone();
        let waits = std::thread::spawn(move || (theirs.wait_until_overdue(LONG), Instant::now()));
        std::thread::sleep(Duration::from_millis(5));
        let start = Instant::now();
        bell.ring();
        bell.ring();
        let (overdue, at) = waits.join().unwrap();
        assert!(overdue && at - start >= EXIT_WAIT);
        assert!(at - start < LONG / 2, "{:?}", at - start);
        assert!(!bell.wait_until_overdue(5 * EXIT_WAIT), "once for both");
    }

    #[test]
    fn what_the_vcpus_thread_has_looked_for_is_not_overdue_and_what_came_later_is() {
        let bell = Bell::default();
        bell.ring();
        bell.looks();
        assert!(!bell.wait_until_overdue(5 * EXIT_WAIT));
        bell.looks();
        bell.ring();
        assert!(bell.wait_until_overdue(LONG));
    }
}
