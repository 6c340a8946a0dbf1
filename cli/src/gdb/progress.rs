//! How far a long way has come, on one line of the terminal that gdb shares with us.

use std::cell::Cell;
use std::io::{IsTerminal, Write};
use std::rc::Rc;
use std::time::{Duration, Instant};

use hindsight_vmm::session::{Progress, ProgressHook};

use crate::format::thousands;

/// From one word to the next, and before the first.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// Goes to the beginning of the line, and deletes it.
const CLEAR: &str = "\r\x1b[K";

/// The line.
#[derive(Clone, Debug, Default)]
pub(super) struct ProgressLine {
    /// When something was told last, or the way began; `None` where no way has begun.
    since: Rc<Cell<Option<Instant>>>,
    is_shown: Rc<Cell<bool>>,
}

impl ProgressLine {
    /// What tells it, if standard error is a terminal.
    pub(super) fn hook(&self) -> Option<ProgressHook> {
        let line = self.clone();
        std::io::stderr().is_terminal().then(|| {
            let hook: ProgressHook = Box::new(move |progress| {
                if line.is_due(Instant::now()) {
                    line.is_shown.set(true);
                    write(&format!("{CLEAR}{}", words(progress)));
                }
            });
            hook
        })
    }

    /// Whether it is time for a word.
    fn is_due(&self, now: Instant) -> bool {
        let Some(since) = self.since.get() else {
            self.since.set(Some(now));
            return false;
        };
        let is_due = now.duration_since(since) >= TELL_EVERY;
        if is_due {
            self.since.set(Some(now));
        }
        is_due
    }

    /// The way is at its end.
    pub(super) fn end(&self) {
        self.since.set(None);
        if self.is_shown.replace(false) {
            write(CLEAR);
        }
    }
}

/// A terminal that takes nothing now is told nothing.
fn write(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes());
    let _ = stderr.flush();
}

fn words(progress: Progress) -> String {
    let at = thousands(progress.at_exit);
    match progress.to_exit {
        Some(to) => format!(
            "hindsight: exit {at}, on the way to {}; Ctrl-C stops",
            thousands(to)
        ),
        None => format!("hindsight: exit {at}; Ctrl-C stops"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_way_says_nothing_and_a_long_one_twice_a_second() {
        let (line, start) = (ProgressLine::default(), Instant::now());
        let due = |ms| line.is_due(start + Duration::from_millis(ms));
        let told: Vec<u64> = (0..2000).step_by(10).filter(|ms| due(*ms)).collect();
        assert_eq!(told, [500, 1000, 1500]);
        line.end();
        assert!(!due(2400) && !due(2500));
    }
}
