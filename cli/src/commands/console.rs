//! `hindsight console`: what the guest wrote to its console, and when.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::options::ConsoleOption;
use crate::outcome::Outcome;
use crate::output::settle;
use crate::transcript::{Form, Transcript};
use crate::watching::watch;
use hindsight_vmm::failure::Failure;
use hindsight_vmm::output_file::Plan;
use hindsight_vmm::session::Recording;

/// Options of `console`.
#[derive(Debug, Args)]
#[command(after_help = "\
The recording is replayed, and checked as it runs. Times are the guest's, in seconds since it was
switched on; a line has the time of its first byte.

A guest can write what a terminal obeys. So colours are left out of the listing, and other control
characters are spelled out (ESC is \\x1b). --raw leaves every byte as it is, and an asciicast has what a
terminal would have got.")]
pub struct Options {
    /// The recording.
    recording: PathBuf,
    /// Which of the guest's consoles; without it, the one that was the operator's.
    #[arg(long = "console", value_enum, value_name = "WHICH")]
    which: Option<ConsoleOption>,
    /// Write an asciicast (version 2), which asciinema plays, to FILE; - is standard output.
    ///
    /// The file is there when it is complete: not if the replay is refused or diverges. A pipe or a
    /// device such as /dev/null is written as the replay goes. Nothing is written through a link to
    /// a file, nor to a file of the recording.
    #[arg(long, value_name = "FILE")]
    cast: Option<PathBuf>,
    /// With --cast: replace FILE if it exists.
    #[arg(long, requires = "cast")]
    force: bool,
    /// Leave the guest's bytes as they are, escape sequences and all.
    #[arg(long, conflicts_with = "cast")]
    raw: bool,
    /// Print JSON: one object for each line, with the guest time in nanoseconds.
    #[arg(long, conflicts_with_all = ["raw", "cast"])]
    json: bool,
    /// Width and height of the terminal that the asciicast is for.
    ///
    /// Without it, those of the operator's terminal if the recording has them, else 80x24.
    #[arg(long, value_name = "COLUMNSxROWS", value_parser = parse_size, requires = "cast")]
    size: Option<(u16, u16)>,
}

fn parse_size(text: &str) -> Result<(u16, u16), String> {
    let sides = text
        .split_once('x')
        .and_then(|(columns, rows)| Some((columns.parse().ok()?, rows.parse().ok()?)));
    sides
        .filter(|(columns, rows)| *columns > 0 && *rows > 0)
        .ok_or(format!("{text:?}: expected columns x rows, such as 80x24"))
}

pub fn main(options: &Options) -> Result<Outcome, Failure> {
    let recording = Recording::at(&options.recording);
    let journal = recording.journal()?;
    let console = match options.which {
        Some(which) => which.into(),
        None => journal.header().host.console,
    };
    let (path, form) = match &options.cast {
        None if options.json => (Path::new("-"), Form::Json),
        None if options.raw => (Path::new("-"), Form::Raw),
        None => (Path::new("-"), Form::Lines),
        Some(path) => (&**path, Form::Cast),
    };
    let plan = Plan::new(path, options.force, recording.kept())?;
    let begin = || {
        let mut transcript = Transcript::new(plan.begin()?, form, console);
        transcript.size = options.size;
        Ok(transcript)
    };
    watch(
        recording,
        journal,
        begin,
        |transcript, right| match transcript.finish()? {
            Some(output) => settle(output, right),
            None => Ok(()),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_has_columns_and_rows() {
        assert_eq!(parse_size("132x43"), Ok((132, 43)));
        for bad in ["80", "0x24", "80x", "x", "80x24x1", "99999x1"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
