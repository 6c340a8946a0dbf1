//! What is in front of a session: the guest's console on standard output, and what is said on standard error.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use hindsight_devices::{Nanos, Output};
use hindsight_replay::{Guest, LeftOpen, Observer, OperatorConsole, Turn, Unit};
use indicatif::{ProgressBar, ProgressStyle};

use hindsight_vmm::failure::Failure;
use hindsight_vmm::session::{Front, View, Viewed};
use hindsight_vmm::world::{Shown, StandardOutput};

use crate::tell::{interrupt_line, notice};

/// The terminal that the program was started at, or what stands in its place.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Terminal {
    /// Do not show the guest's console.
    pub quiet: bool,
    /// Show it no earlier than it came when it was recorded.
    pub real_time: bool,
}

impl Front for Terminal {
    fn notice(&mut self, what: &str) {
        notice(what);
    }

    fn view(&mut self, viewed: Viewed) -> Result<Box<dyn View>, Failure> {
        Ok(Box::new(Screen::new(*self, viewed)?))
    }
}

/// A guest that makes no exit for this long is spoken of: nothing can be delivered to it.
const SILENCE: Duration = Duration::from_secs(10);

/// Shows what the guest writes, and how far a replay is.
#[derive(Debug)]
pub(crate) struct Screen {
    /// Where it is shown, if it is.
    screen: Option<StandardOutput>,
    console: OperatorConsole,
    unit: Option<Unit>,
    pace: Option<Instant>,
    bar: Option<ProgressBar>,
    last_exit: (u64, Instant),
    warned: bool,
    stamp: u32,
}

impl Screen {
    /// Shows output of the operator's console as it comes, unless the terminal is to be quiet; and how far a replay is,
    /// if a person can see it and it is in nobody's way.
    pub(crate) fn new(terminal: Terminal, viewed: Viewed) -> Result<Screen, Failure> {
        let screen = match terminal.quiet {
            true => None,
            false => Some(StandardOutput::new(viewed.hold)?),
        };
        let mut bar = None;
        if let Some(last) = viewed.last_exit {
            let free = std::io::stderr().is_terminal()
                && (screen.is_none() || !std::io::stdout().is_terminal());
            bar = free.then(|| progress_bar(last, "{bar:40} {pos}/{len} exits, {eta} left"));
        }
        Ok(Screen {
            screen,
            console: viewed.console,
            unit: viewed.preemption,
            pace: terminal.real_time.then(Instant::now),
            bar,
            last_exit: (0, Instant::now()),
            warned: false,
            stamp: 0,
        })
    }
}

impl View for Screen {
    fn finish(mut self: Box<Self>) -> Shown {
        self.screen
            .take()
            .map_or_else(Shown::default, |mut screen| screen.finish())
    }
}

/// A bar of this length.
pub(crate) fn progress_bar(length: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

impl Observer for Screen {
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
        // To read a clock at every exit would be costly; to count is not.
        self.stamp = self.stamp.wrapping_add(1);
        if self.stamp.is_multiple_of(4096)
            && let Some(bar) = &self.bar
        {
            bar.set_position(exits);
        }
    }

    fn left_open(&mut self, exits: u64, what: LeftOpen) {
        interrupt_line(&format!("left open from exit {exits} on: {what}"));
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
            interrupt_line(&format!(
                "the guest has computed for {seconds} s without {without}, so nothing can be \
                 delivered to it.{advice} Ctrl-C ends it"
            ));
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if let Some(screen) = &mut self.screen {
            screen.finish();
        }
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
