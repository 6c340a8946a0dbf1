//! The one way in which whatever comes from outside wakes the machine.
//!
//! Each input waits in a place of its own: typed bytes in their buffer, frames in their inbox, the operator's
//! wishes in flags. Whoever puts one there rings. That wakes a machine that is halted; one whose guest
//! runs finds the input at its next exit, and is kicked if that is not soon enough. Neither carries anything: they
//! only have the vCPU's thread look, and how many of them came changes nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

use crate::kvm::Kicker;

/// How long an input that can wait does so for the guest to exit by itself. As long as a timer that is due
/// does, at least.
pub const PATIENCE: Duration = Duration::from_nanos(hindsight_replay::Patience::SHORTEST_NS);

/// Wakes the machine.
#[derive(Clone, Debug, Default)]
pub struct Bell(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    kicker: OnceLock<Kicker>,
    /// The vCPU's thread is where a kick has a meaning: neither asleep nor between two machines. A kick would
    /// come to nobody there, and be kept for the next entry.
    runs: AtomicBool,
    rung: Mutex<bool>,
    heard: Condvar,
}

impl Bell {
    /// From now on kicks go to the thread of `kicker`.
    pub fn kicks(&self, kicker: Kicker) {
        // The main thread's, whichever machine it is.
        let _ = self.0.kicker.set(kicker);
    }

    /// Something is there that was not: a machine that sleeps looks for it.
    pub fn ring(&self) {
        *self.rung() = true;
        self.0.heard.notify_all();
    }

    /// Brings back a guest that runs.
    pub fn kick(&self) {
        if self.0.runs.load(Ordering::SeqCst)
            && let Some(kicker) = self.0.kicker.get()
        {
            kicker.kick();
        }
    }

    /// For what cannot wait for the guest to exit by itself.
    pub fn ring_and_kick(&self) {
        self.ring();
        self.kick();
    }

    /// Whether there is a guest that runs and may be kicked. Returns whether there was.
    pub fn set_runs(&self, runs: bool) -> bool {
        self.0.runs.swap(runs, Ordering::SeqCst)
    }

    /// Waits until somebody rings or has since the last call, but no longer than `most`. Whether somebody did.
    pub fn wait(&self, most: Option<Duration>) -> bool {
        let silent = |rung: &mut bool| !*rung;
        let mut rung = match most {
            Some(most) => {
                let heard = self.0.heard.wait_timeout_while(self.rung(), most, silent);
                heard.expect("nobody panics at the bell").0
            }
            None => {
                let heard = self.0.heard.wait_while(self.rung(), silent);
                heard.expect("nobody panics at the bell")
            }
        };
        std::mem::take(&mut *rung)
    }

    fn rung(&self) -> std::sync::MutexGuard<'_, bool> {
        self.0.rung.lock().expect("nobody panics at the bell")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
