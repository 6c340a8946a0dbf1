//! What a guest writes to its console, written down: with times, as it came, or as an asciicast.

use std::io::{BufWriter, Write};

use hindsight_devices::{Input, Nanos};
use hindsight_replay::foreign::shown_bytes;
use hindsight_replay::{Observer, OperatorConsole};
use hindsight_vmm::failure::Failure;
use serde_json::json;

use crate::output::Output;

/// The size of a terminal of which nothing is known.
const USUAL_SIZE: (u16, u16) = (80, 24);

/// A line that is longer is shown in parts.
const LINE_BYTES_MAX: usize = 64 << 10;

/// How a transcript looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Each line after the time at which it began, fit for a terminal.
    Lines,
    /// The same with the guest's bytes as they are.
    Raw,
    /// Each line an object.
    Json,
    /// Asciicast, version 2: a header, then an event a line.
    Cast,
}

/// Writes down what the guest writes to its console.
#[derive(Debug)]
pub struct Transcript<W: Write> {
    out: Output<BufWriter<W>>,
    form: Form,
    console: OperatorConsole,
    /// When the line began that has not ended.
    began: Nanos,
    /// What came of that line; in an asciicast, the beginning of a character whose end has not come yet.
    rest: Vec<u8>,
    /// The size for the head of an asciicast, as far as it is known.
    pub(crate) size: Option<(u16, u16)>,
    /// The head is written.
    begun: bool,
}

impl<W: Write> Transcript<W> {
    /// A transcript of `console` that goes to `out`.
    pub fn new(out: W, form: Form, console: OperatorConsole) -> Transcript<W> {
        Transcript {
            out: Output::new(BufWriter::new(out)),
            form,
            console,
            began: 0,
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
            if self.rest.is_empty() {
                self.began = now;
            }
            self.rest.extend_from_slice(part);
            if part.last() == Some(&b'\n') || self.rest.len() >= LINE_BYTES_MAX {
                self.end_line();
            }
        }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.rest);
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        let stamp = stamp(self.began);
        let written = match self.form {
            Form::Raw => [stamp.as_bytes(), line, b"\n"].concat(),
            Form::Json => {
                let text = String::from_utf8_lossy(line);
                let object = json!({"guest_ns": self.began, "text": text.trim_end_matches('\r')});
                format!("{object}\n").into_bytes()
            }
            _ => format!("{stamp}{}\n", listed(line)).into_bytes(),
        };
        self.out.write(&written);
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

    /// Writes what is left. Where all of it went; `None` if nobody reads it any more.
    pub fn finish(mut self) -> Result<Option<W>, Failure> {
        if self.form == Form::Cast {
            self.begin_cast();
        } else if !self.rest.is_empty() {
            self.end_line();
        }
        let Some(buffer) = self.out.into_inner()? else {
            return Ok(None);
        };
        let out = buffer.into_inner().map_err(|error| error.into_error())?;
        Ok(Some(out))
    }
}

impl<W: Write> Observer for Transcript<W> {
    fn output(&mut self, _exits: u64, now: Nanos, output: &hindsight_devices::Output) {
        let Some(bytes) = self.console.bytes(output) else {
            return;
        };
        match self.form {
            Form::Cast => self.event(now, bytes),
            _ => self.lines(now, bytes),
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

/// A line as it is listed: without the carriage returns that end it, without colours, tabs as they are, and
/// with everything else spelled out that a terminal would obey.
fn listed(line: &[u8]) -> String {
    let end = line.iter().rposition(|byte| *byte != b'\r');
    let line = without_colours(&line[..end.map_or(0, |last| last + 1)]);
    let columns = line.split(|byte| *byte == b'\t').map(shown_bytes);
    columns.collect::<Vec<_>>().join("\t")
}

/// Leaves out what selects colours and the like (ECMA-48, 8.3.117: SGR).
fn without_colours(mut line: &[u8]) -> Vec<u8> {
    let mut kept = Vec::with_capacity(line.len());
    while let Some((&first, rest)) = line.split_first() {
        let parameters = line.strip_prefix(b"\x1b[").unwrap_or_default();
        let end = parameters
            .iter()
            .position(|byte| !matches!(byte, b'0'..=b'9' | b';' | b':'));
        match end {
            Some(end) if parameters[end] == b'm' => line = &parameters[end + 1..],
            _ => {
                kept.push(first);
                line = rest;
            }
        }
    }
    kept
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

    /// What is written down of `parts`, which come a second apart.
    fn transcript(form: Form, parts: &[&[u8]]) -> String {
        let mut written = Vec::new();
        let mut transcript = Transcript::new(&mut written, form, OperatorConsole::Serial);
        for (second, part) in (1..).zip(parts) {
            let output = hindsight_devices::Output::Console(part.to_vec());
            transcript.output(0, second * 1_000_000_000, &output);
        }
        transcript.finish().unwrap();
        String::from_utf8_lossy(&written).into_owned()
    }

    #[test]
    fn a_line_has_the_time_of_its_first_byte() {
        assert_eq!(stamp(12_034_567_890), "[   12.034567] ");
        let parts: [&[u8]; 4] = [b"on", b"e\r\ntwo\n", b"\n", b"three"];
        let expected =
            "[    1.000000] one\n[    2.000000] two\n[    3.000000] \n[    4.000000] three\n";
        assert_eq!(transcript(Form::Lines, &parts), expected);
        assert_eq!(
            transcript(Form::Json, &parts[..2]),
            "{\"guest_ns\":1000000000,\"text\":\"one\"}\n{\"guest_ns\":2000000000,\"text\":\"two\"}\n"
        );
    }

    #[test]
    fn a_listing_has_no_colours_and_nothing_that_a_terminal_obeys() {
        let coloured: &[u8] = b"[\x1b[0;1;32m  OK  \x1b[0m]\tup \xe2\x82\xac \xff";
        let hostile: &[u8] = b"\x1b[2K\x1b]0;title\x07\rfake\n";
        assert_eq!(
            transcript(Form::Lines, &[coloured, hostile]),
            "[    1.000000] [  OK  ]\tup \u{20ac} \\xff\\x1b[2K\\x1b]0;title\\x07\\rfake\n"
        );
        // A sequence that never ends hides nothing.
        assert_eq!(listed(b"a\x1b[31"), "a\\x1b[31");
        assert_eq!(listed(b"a\x1b[31mb\x1b[m"), "ab");
        let raw = transcript(Form::Raw, &[hostile]);
        assert_eq!(raw, "[    1.000000] \x1b[2K\x1b]0;title\x07\rfake\n");
    }

    #[test]
    fn a_line_without_an_end_is_shown_in_parts_and_kept_in_bounds() {
        let part = vec![b'x'; LINE_BYTES_MAX];
        let text = transcript(Form::Lines, &[&part, &part]);
        assert_eq!(text.lines().count(), 2);
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
}
