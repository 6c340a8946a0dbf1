//! `hindsight console`: what the guest wrote to its console, and when.

use std::io::{BufWriter, Write};
use std::path::PathBuf;

use clap::Args;
use hindsight_devices::{Input, Nanos};
use hindsight_replay::{Observer, OperatorConsole};
use serde_json::json;

use super::output::Output;
use super::replay::watch;
use super::{ConsoleOption, Outcome};
use crate::recording::{Recording, RecordingError};

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
    /// Write an asciicast (version 2), which asciinema plays, to FILE instead.
    #[arg(long, value_name = "FILE")]
    cast: Option<PathBuf>,
    /// Width and height of the terminal that the asciicast is for. Without it, those of the operator's
    /// terminal if the recording has them, else 80x24.
    #[arg(long, value_name = "COLUMNSxROWS", value_parser = parse_size, requires = "cast")]
    size: Option<(u16, u16)>,
}

/// The size of a terminal of which nothing is known.
const USUAL_SIZE: (u16, u16) = (80, 24);

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
    let transcript = match &options.cast {
        None => Transcript::new(Box::new(std::io::stdout()), Form::Lines, console),
        Some(path) => {
            let file = std::fs::File::create(path).map_err(|source| RecordingError::Write {
                path: path.clone(),
                source,
            })?;
            let mut transcript = Transcript::new(Box::new(file), Form::Cast, console);
            transcript.size = options.size;
            transcript
        }
    };
    watch(&recording, journal, transcript, Transcript::finish)
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
struct Transcript {
    out: Output<BufWriter<Box<dyn Write>>>,
    form: Form,
    console: OperatorConsole,
    /// A line has begun and not ended.
    in_line: bool,
    /// The beginning of a character whose end has not come yet.
    rest: Vec<u8>,
    /// The size for the head of an asciicast, as far as it is known.
    size: Option<(u16, u16)>,
    /// The head is written.
    begun: bool,
}

impl Transcript {
    fn new(out: Box<dyn Write>, form: Form, console: OperatorConsole) -> Transcript {
        Transcript {
            out: Output::new(BufWriter::new(out)),
            form,
            console,
            in_line: false,
            rest: Vec::new(),
            size: None,
            begun: false,
        }
    }

    /// Writes the head of an asciicast, if it is not there. A size that came before anything was shown is
    /// the size that the terminal had from the start.
    fn begin_cast(&mut self) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let (width, height) = self.size.unwrap_or(USUAL_SIZE);
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
        self.begin_cast();
        let (seconds, micros) = split(now);
        let line = format!("[{seconds}.{micros:06}, \"{kind}\", {}]\n", json!(text));
        self.out.write(line.as_bytes());
    }

    fn resized(&mut self, now: Nanos, columns: u16, rows: u16) {
        // Players choke on a terminal without columns or rows, which is one that does not know its size.
        if columns == 0 || rows == 0 {
            return;
        }
        if !self.begun && self.size.is_none_or(|size| size == (columns, rows)) {
            self.size = Some((columns, rows));
        } else {
            self.cast_event(now, "r", &format!("{columns}x{rows}"));
        }
    }

    fn finish(mut self) -> anyhow::Result<()> {
        if self.form == Form::Cast {
            self.begin_cast();
        }
        if self.in_line {
            self.out.write(b"\n");
        }
        self.out.finish()
    }
}

impl Observer for Transcript {
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
            self.resized(now, *columns, *rows);
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

    /// What becomes of these inputs and outputs, line by line.
    fn cast(size: Option<(u16, u16)>, events: &[(&str, (u16, u16))]) -> Vec<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let out = Box::new(file.reopen().unwrap());
        let mut transcript = Transcript::new(out, Form::Cast, OperatorConsole::Virtio);
        transcript.size = size;
        for (second, (text, (columns, rows))) in (0..).zip(events) {
            let now = second * 1_000_000_000;
            if text.is_empty() {
                let (columns, rows) = (*columns, *rows);
                transcript.input(0, now, &Input::Resize { columns, rows });
            } else {
                let bytes = text.as_bytes().to_vec();
                transcript.output(0, now, &hindsight_devices::Output::VirtioConsole(bytes));
            }
        }
        transcript.finish().unwrap();
        let text = std::fs::read_to_string(file.path()).unwrap();
        text.lines().map(String::from).collect()
    }

    const RESIZED: &str = "";

    #[test]
    fn a_cast_begins_with_the_size_that_the_terminal_had() {
        let no = (0, 0);
        let head =
            |width: u16, height: u16| json!({"version": 2, "width": width, "height": height});
        let shown = cast(
            None,
            &[(RESIZED, (132, 43)), ("a", no), (RESIZED, (100, 30))],
        );
        assert_eq!(shown[0], head(132, 43).to_string());
        assert_eq!(
            shown[1..],
            ["[1.000000, \"o\", \"a\"]", "[2.000000, \"r\", \"100x30\"]"]
        );
        assert_eq!(cast(None, &[("a", no)])[0], head(80, 24).to_string());
        assert_eq!(cast(None, &[]), [head(80, 24).to_string()]);
        let asked = cast(Some((90, 20)), &[(RESIZED, (132, 43)), ("a", no)]);
        assert_eq!(asked[0], head(90, 20).to_string());
        assert_eq!(asked[1], "[0.000000, \"r\", \"132x43\"]");
    }

    #[test]
    fn a_cast_has_no_terminal_of_size_0() {
        let events = [
            (RESIZED, (0, 0)),
            ("a", (0, 0)),
            (RESIZED, (80, 0)),
            (RESIZED, (0, 24)),
        ];
        let shown = cast(None, &events);
        assert_eq!(shown.len(), 2, "{shown:?}");
        assert!(shown[0].contains("\"width\":80"), "{shown:?}");
    }

    #[test]
    fn a_terminal_has_columns_and_rows() {
        assert_eq!(parse_size("132x43"), Ok((132, 43)));
        for bad in ["80", "0x24", "80x", "x", "80x24x1", "99999x1"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
