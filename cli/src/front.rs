//! Standard output and standard error in front of a session.

use std::io::IsTerminal;

use hindsight_replay::foreign::shown_lines;
use hindsight_vmm::failure::Failure;
use hindsight_vmm::session::{Front, View, Viewed};

use crate::screen::Screen;
use crate::tell::tell;

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

/// Says something in lines of its own. A terminal may be raw, and its cursor anywhere in a line that is over.
pub(crate) fn notice(what: &str) {
    let what = shown_lines(what);
    match std::io::stderr().is_terminal() {
        true => tell!("\rhindsight: {what}\r"),
        false => tell!("hindsight: {what}"),
    }
}

/// The same while the guest writes to the terminal, which may be in the middle of a line.
pub(crate) fn interrupt_line(what: &str) {
    if std::io::stderr().is_terminal() {
        tell!("\r");
    }
    notice(what);
}
