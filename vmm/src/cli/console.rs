//! The guest's console on standard output.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use hindsight_devices::{Nanos, Output};
use hindsight_replay::{Guest, LeftOpen, Observer, OperatorConsole, Turn, Unit};
use indicatif::{ProgressBar, ProgressStyle};

use crate::tell::tell;
use crate::world::{Hold, Screen, Shown};

/// A guest that makes no exit for this long is spoken of: nothing can be delivered to it.
const SILENCE: Duration = Duration::from_secs(10);

/// Shows what the guest writes, and how far a replay is.
#[derive(Debug)]
pub struct Console {
    /// Where it is shown, if it is.
    screen: Option<Screen>,
    console: OperatorConsole,
    unit: Option<Unit>,
    pace: Option<Instant>,
    bar: Option<ProgressBar>,
    last_exit: (u64, Instant),
    warned: bool,
    stamp: u32,
}

impl Console {
    /// Shows output of `console` as it comes, unless `quiet`. It may hold a machine that is recorded back.
    pub fn new(
        quiet: bool,
        console: OperatorConsole,
        hold: Option<Hold>,
    ) -> std::io::Result<Console> {
        let screen = match quiet {
            true => None,
            false => Some(Screen::stdout(hold)?),
        };
        Ok(Console {
            screen,
            console,
            unit: None,
            pace: None,
            bar: None,
            last_exit: (0, Instant::now()),
            warned: false,
            stamp: 0,
        })
    }

    /// The guest is preempted by `unit`, if by anything.
    pub fn with_preemption(mut self, unit: Option<Unit>) -> Console {
        self.unit = unit;
        self
    }

    /// Shows output no earlier than it came when it was recorded.
    pub fn at_recorded_pace(mut self) -> Console {
        self.pace = Some(Instant::now());
        self
    }

    /// Shows a progress bar up to exit `last`, if a person can see it and it is in nobody's way.
    pub fn with_progress(mut self, last: u64) -> Console {
        let free = std::io::stderr().is_terminal()
            && (self.screen.is_none() || !std::io::stdout().is_terminal());
        if free {
            let style = ProgressStyle::with_template("{bar:40} {pos}/{len} exits, {eta} left");
            let bar = ProgressBar::new(last);
            self.bar = Some(style.map_or(bar.clone(), |style| bar.with_style(style)));
        }
        self
    }

    /// Shows what is left. Tells what became of all of it.
    pub fn finish(mut self) -> Shown {
        self.screen
            .take()
            .map_or_else(Shown::default, |mut screen| screen.finish())
    }
}

impl Observer for Console {
    fn output(&mut self, _exits: u64, now: Nanos, output: &Output) {
        let Some(bytes) = self.console.bytes(output) else {
            return;
        };
        if let Some(start) = self.pace {
            let due = start + Duration::from_nanos(now);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        if let Some(screen) = &mut self.screen {
            screen.show(bytes);
        }
    }

    fn turn(&mut self, exits: u64, _turn: &Turn, _guest: &mut dyn Guest) {
        // A clock would be dear here, at every exit; a count is not.
        self.stamp = self.stamp.wrapping_add(1);
        if self.stamp.is_multiple_of(4096)
            && let Some(bar) = &self.bar
        {
            bar.set_position(exits);
        }
    }

    fn left_open(&mut self, exits: u64, what: LeftOpen) {
        tell!("\r\nhindsight: left open from exit {exits} on: {what}\r");
    }

    fn kicked(&mut self, exits: u64) {
        if self.last_exit.0 != exits {
            self.last_exit = (exits, Instant::now());
            self.warned = false;
        } else if !self.warned && self.last_exit.1.elapsed() > SILENCE {
            self.warned = true;
            let seconds = SILENCE.as_secs();
            let (without, advice) = match self.unit {
                Some(Unit::Branches) => (
                    "an exit, or a branch at which its rounds could be told apart",
                    "",
                ),
                Some(Unit::Entries) | None => (
                    "an exit, a system call or a fault that it could be preempted at",
                    " A host with an exact branch counter can preempt it (--preempt branches; \
                     `hindsight doctor` tells whether this one has it).",
                ),
            };
            tell!(
                "\r\nhindsight: the guest has computed for {seconds} s without {without}, so nothing can be \
                 delivered to it.{advice} Ctrl-C ends it\r"
            );
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(screen) = &mut self.screen {
            screen.finish();
        }
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
