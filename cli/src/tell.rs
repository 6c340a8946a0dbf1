//! What is printed for people: `out!` to standard output, `tell!` to standard error. Unlike
//! `println!` and `eprintln!` they do not panic where nobody reads any more.

use std::fmt::Arguments;
use std::io::{ErrorKind, IsTerminal, Write};

use hindsight_replay::foreign::shown_lines;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::outcome::Outcome;

/// Prints a line to standard output. A reader that closed the pipe wants no more; if it cannot be
/// written for another reason, the program says so and ends, for what was asked for is not there.
macro_rules! out {
    ($($words:tt)*) => { $crate::tell::to_stdout(format_args!($($words)*)) };
}

/// Prints a line to standard error, as far as that can be written.
macro_rules! tell {
    ($($words:tt)*) => { $crate::tell::to_stderr(format_args!($($words)*)) };
}

pub(crate) use {out, tell};

/// `out!`, in a function.
pub(crate) fn to_stdout(line: Arguments<'_>) {
    let written = writeln!(std::io::stdout().lock(), "{line}");
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            tell!("hindsight: cannot write to standard output: {error}");
            std::process::exit(Outcome::HostFailed as i32);
        }
        _ => {}
    }
}

/// A reader of standard error that takes nothing for this long is not waited for: a terminal that has
/// stopped must not keep the program from its end.
const READER_WAIT: Timespec = Timespec {
    tv_sec: 2,
    tv_nsec: 0,
};

/// `tell!`, in a function.
pub(crate) fn to_stderr(line: Arguments<'_>) {
    let stderr = std::io::stderr();
    let ready = poll(
        &mut [PollFd::new(&stderr, PollFlags::OUT)],
        Some(&READER_WAIT),
    );
    if ready != Ok(0) {
        // There is no other place to say that it failed.
        let _ = writeln!(stderr.lock(), "{line}");
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
