//! `hindsight console`: what the guest wrote to its console, and when.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use hindsight_devices::{Input, Nanos};
use hindsight_replay::{Observer, OperatorConsole};
use serde_json::json;

use super::output::{Output, tell_withheld};
use super::replay::watch;
use super::{ConsoleOption, Outcome};
use crate::output_file::{OutputFile, Plan};
use crate::recording::Recording;

/// Options of `console`.
#[derive(Debug, Args)]
#[command(after_help = "\
The recording is replayed, and checked as it runs. Times are the guest's, in seconds since it was
switched on; a line has the time of its first byte.")]
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
    /// Width and height of the terminal that the asciicast is for.
    #[arg(long, value_name = "COLUMNSxROWS", default_value = "80x24", value_parser = parse_size, requires = "cast")]
    size: (u16, u16),
}

fn parse_size(text: &str) -> Result<(u16, u16), String> {
    let sides = text
        .split_once('x')
        .and_then(|(columns, rows)| Some((columns.parse().ok()?, rows.parse().ok()?)));
    sides
        .filter(|(columns, rows)| *columns > 0 && *rows > 0)
        .ok_or(format!("{text:?}: expected columns x rows, such as 80x24"))
}

pub fn main(options: &Options) -> anyhow::Result<Outcome> {
    let recording = Recording::at(&options.recording);
    let journal = recording.journal()?;
    let console = match options.which {
        Some(which) => which.into(),
        None => journal.header().host.console,
    };
    let (path, form) = match &options.cast {
        None => (Path::new("-"), Form::Lines),
        Some(path) => (&**path, Form::Cast),
    };
    let plan = Plan::new(path, options.force, recording.kept())?;
    let begin = || {
        let mut transcript = Transcript::new(plan.begin()?, form, console);
        if form == Form::Cast {
            transcript.begin_cast(options.size);
        }
        Ok(transcript)
    };
    watch(&recording, journal, begin, Transcript::finish)
}

/// How a transcript looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Each line behind the time at which it began.
    Lines,
    /// Asciicast, version 2: a header, then an event a line.
    Cast,
}

/// Writes down what the guest writes to its console.
struct Transcript<W: Write> {
    out: Output<BufWriter<W>>,
    form: Form,
    console: OperatorConsole,
    /// A line has begun and not ended.
    in_line: bool,
    /// The beginning of a character whose end has not come yet.
    rest: Vec<u8>,
}

impl<W: Write> Transcript<W> {
    fn new(out: W, form: Form, console: OperatorConsole) -> Transcript<W> {
        Transcript {
            out: Output::new(BufWriter::new(out)),
            form,
            console,
            in_line: false,
            rest: Vec::new(),
        }
    }

    fn begin_cast(&mut self, (width, height): (u16, u16)) {
        let header = json!({"version": 2, "width": width, "height": height});
        self.out.write(format!("{header}\n").as_bytes());
    }

    fn lines(&mut self, now: Nanos, bytes: &[u8]) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            if !self.in_line {
                self.out.write(stamp(now).as_bytes());
            }
            self.out.write(part);
            self.in_line = part.last() != Some(&b'\n');
        }
    }

    fn event(&mut self, now: Nanos, bytes: &[u8]) {
        self.rest.extend_from_slice(bytes);
        let whole = whole_characters(&self.rest);
        let text = String::from_utf8_lossy(&self.rest[..whole]).into_owned();
        self.rest.drain(..whole);
        if !text.is_empty() {
            self.cast_event(now, "o", &text);
        }
    }

    /// One event of an asciicast: "o" for output, "r" for a new size.
    fn cast_event(&mut self, now: Nanos, kind: &str, text: &str) {
        let (seconds, micros) = split(now);
        let line = format!("[{seconds}.{micros:06}, \"{kind}\", {}]\n", json!(text));
        self.out.write(line.as_bytes());
    }
}

impl Transcript<OutputFile> {
    /// Puts the file in its place if it is `right`.
    fn finish(mut self, right: bool) -> anyhow::Result<()> {
        if self.in_line {
            self.out.write(b"\n");
        }
        let Some(buffer) = self.out.into_inner()? else {
            return Ok(());
        };
        let output = buffer.into_inner().map_err(|error| error.into_error())?;
        if right {
            output.finish()?;
        } else {
            tell_withheld(&output);
        }
        Ok(())
    }
}

impl<W: Write> Observer for Transcript<W> {
    fn output(&mut self, _exits: u64, now: Nanos, output: &hindsight_devices::Output) {
        let Some(bytes) = self.console.bytes(output) else {
            return;
        };
        match self.form {
            Form::Lines => self.lines(now, bytes),
            Form::Cast => self.event(now, bytes),
        }
    }

    fn input(&mut self, _exits: u64, now: Nanos, input: &Input) {
        if let (Form::Cast, Input::Resize { columns, rows }) = (self.form, input) {
            self.cast_event(now, "r", &format!("{columns}x{rows}"));
        }
    }
}

fn split(now: Nanos) -> (u64, u64) {
    (now / 1_000_000_000, now % 1_000_000_000 / 1_000)
}

/// As the kernel's own log has it.
fn stamp(now: Nanos) -> String {
    let (seconds, micros) = split(now);
    format!("[{seconds:5}.{micros:06}] ")
}

/// How many bytes of `bytes` can be read as text already: all but the beginning of a character.
fn whole_characters(bytes: &[u8]) -> usize {
    let last = bytes
        .utf8_chunks()
        .last()
        .map_or(&[][..], |chunk| chunk.invalid());
    let begun = std::str::from_utf8(last).is_err_and(|error| error.error_len().is_none());
    bytes.len() - if begun { last.len() } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_is_whole_when_all_of_it_has_come() {
        let euro = "€".as_bytes();
        assert_eq!(whole_characters(b"abc"), 3);
        assert_eq!(whole_characters(&[b"ab", &euro[..2]].concat()), 2);
        assert_eq!(whole_characters(&[b"ab", euro].concat()), 5);
        assert_eq!(whole_characters(&[b"\xff\xfe", &euro[..1]].concat()), 2);
    }

    #[test]
    fn a_line_has_the_time_of_its_first_byte() {
        assert_eq!(stamp(12_034_567_890), "[   12.034567] ");
    }

    #[test]
    fn a_terminal_has_columns_and_rows() {
        assert_eq!(parse_size("132x43"), Ok((132, 43)));
        for bad in ["80", "0x24", "80x", "x", "80x24x1", "99999x1"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
