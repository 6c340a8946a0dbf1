//! Text that somebody else wrote, shown to a person.
//!
//! A recording, a guest and a disk may come from anybody, and a terminal obeys what is printed on it: an
//! escape sequence can wipe a line of ours and write another in its place, and a mark of writing direction
//! or an invisible character can make one name look like another. So what is foreign is printed with such
//! characters spelled out: names of hosts, CPUs and kernels, command lines, what a guest said when it
//! panicked, names of files, and errors that quote any of them. A backslash is not doubled, for file names
//! have their own; what is exact is the JSON that commands print with `--json`.

use std::fmt::{self, Display, Write as _};

/// Shows `text` on one line.
pub fn shown(text: &str) -> Shown<&str> {
    Shown { text, lines: false }
}

/// Shows what `of` says, line breaks as they are: for messages of ours that quote something foreign.
pub fn shown_lines(of: impl Display) -> Shown<String> {
    Shown {
        text: of.to_string(),
        lines: true,
    }
}

/// Shows a path on one line.
pub fn shown_path(path: &std::path::Path) -> Shown<String> {
    Shown {
        text: path.display().to_string(),
        lines: false,
    }
}

/// Shows bytes that should be text on one line, those that are not as `\xNN`.
pub fn shown_bytes(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        let _ = write!(out, "{}", shown(chunk.valid()));
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// Foreign text, as it is shown.
#[derive(Clone, Copy, Debug)]
pub struct Shown<T> {
    text: T,
    lines: bool,
}

impl<T: AsRef<str>> Display for Shown<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.text.as_ref().chars() {
            match character {
                '\n' if self.lines => f.write_char('\n')?,
                '\n' => f.write_str("\\n")?,
                '\r' => f.write_str("\\r")?,
                '\t' => f.write_str("\\t")?,
                '\0'..='\x1f' | '\x7f' => write!(f, "\\x{:02x}", u32::from(character))?,
                _ if character.is_control() || is_invisible(character) => {
                    write!(f, "\\u{{{:x}}}", u32::from(character))?;
                }
                _ => f.write_char(character)?,
            }
        }
        Ok(())
    }
}

/// What leaves no mark of its own, or changes what others look like: Unicode's
/// `Default_Ignorable_Code_Point` (DerivedCoreProperties.txt), among which are all marks of direction; the
/// separators of lines and paragraphs; and the annotation characters.
fn is_invisible(character: char) -> bool {
    matches!(
        character,
        '\u{ad}'
            | '\u{34f}'
            | '\u{61c}'
            | '\u{115f}'..='\u{1160}'
            | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{feff}'
            | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}'
            | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_spelled_out() {
        let hostile = "a\x1b[2K\rb\x07\u{9b}31m\x7f\n\t\0";
        let expected = r"a\x1b[2K\rb\x07\u{9b}31m\x7f\n\t\x00";
        assert_eq!(shown(hostile).to_string(), expected);
        for code in (0..0x20).chain(0x7f..0xa0) {
            let text = char::from(code).to_string();
            let found = shown(&text).to_string();
            assert!(found.starts_with('\\'), "{code:#x}: {found:?}");
        }
    }

    #[test]
    fn what_cannot_be_seen_or_turns_text_around_is_spelled_out() {
        for hidden in [
            '\u{202e}',
            '\u{2066}',
            '\u{2069}',
            '\u{200b}',
            '\u{200f}',
            '\u{2028}',
            '\u{feff}',
            '\u{e0041}',
            '\u{3164}',
            '\u{ad}',
            '\u{fe0f}',
            '\u{61c}',
            '\u{e0100}',
        ] {
            let found = shown(&format!("x{hidden}y")).to_string();
            assert_eq!(found, format!("x\\u{{{:x}}}y", u32::from(hidden)));
        }
    }

    #[test]
    fn what_people_write_stays_as_it_is() {
        let text = "/etc/systemd/dev-disk-by\\x2dlabel \"é\" e\u{301} 日本 עברית €";
        assert_eq!(shown(text).to_string(), text);
        let ours = "the replay left the recording\n  recorded: x";
        assert_eq!(shown_lines(ours).to_string(), ours);
        assert_eq!(shown_lines("a\x1bb\nc").to_string(), "a\\x1bb\nc");
    }

    #[test]
    fn bytes_that_are_no_text_are_shown_by_number() {
        assert_eq!(
            shown_bytes(b"ab\xff\xc3\xa9\xc3\x1b"),
            "ab\\xff\u{e9}\\xc3\\x1b"
        );
    }
}
