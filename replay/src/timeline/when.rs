//! How a moment of a recording is named.

use std::fmt;
use std::str::FromStr;

use hindsight_devices::Nanos;
use thiserror::Error;

use crate::machine::ExitNumber;

/// What a moment is counted from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// An exit, by its number.
    Exit(u64),
    /// The first exit at this guest time or later.
    Time(Nanos),
    /// The last exit.
    End,
    /// The exit at which the guest was known to have panicked.
    Crash,
    /// The exit at which this text was complete on a console.
    Console(String),
    /// The mark of this name; or, where there is none and the name ends like an offset, the one of the name before that
    /// (see [`When::marks`]).
    Mark(String),
}

/// The longest name of a mark, in bytes.
const MARK_NAME_BYTES_MAX: usize = 64;

/// Whether a mark may have this name: a letter or `_`, then letters, digits, `-`, `_` and `.`; 64 at most. So a shell
/// takes it as it is, and it is neither a number nor an option.
pub fn is_mark_name(text: &str) -> bool {
    let begins = |first: char| first.is_ascii_alphabetic() || first == '_';
    let goes_on = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    text.starts_with(begins) && text.bytes().all(goes_on) && text.len() <= MARK_NAME_BYTES_MAX
}

/// A moment of a recording: an exit that is named somehow, or some exits before or after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct When {
    /// What it is counted from.
    pub anchor: Anchor,
    /// How many exits later; earlier if it is negative.
    pub offset: i64,
}

/// The text names no moment.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{0:?} names no moment: expected an exit number, a guest time such as 12.5s, `end`, `crash`, `console:TEXT`, or \
     the name of a mark; +N or -N after it is N exits later or earlier"
)]
pub struct NoMoment(String);

impl From<Anchor> for When {
    fn from(anchor: Anchor) -> When {
        When { anchor, offset: 0 }
    }
}

impl FromStr for When {
    type Err = NoMoment;

    fn from_str(text: &str) -> Result<When, NoMoment> {
        let (name, offset) = split_offset(text);
        let named = anchor(name).map(|anchor| When { anchor, offset });
        named.or_else(|| mark(text)).ok_or(NoMoment(text.into()))
    }
}

impl When {
    /// Which marks it may be counted from, the one that it is counted from if that exists first, each with how many
    /// exits later it is. `login-1` may be a mark of that name, or the exit before the mark `login`: no recording
    /// is at hand where a name is read.
    pub fn marks(&self) -> Vec<(&str, i64)> {
        let Anchor::Mark(text) = &self.anchor else {
            return Vec::new();
        };
        let mut marks = vec![(text.as_str(), self.offset)];
        let (name, offset) = split_offset(text);
        if name != text {
            marks.push((name, self.offset.saturating_add(offset)));
        }
        marks
    }
}

/// A mark, with an offset that cannot be a part of its name.
fn mark(text: &str) -> Option<When> {
    let text = text.strip_prefix("mark:").unwrap_or(text);
    let (name, offset) = match split_offset(text) {
        (name, offset) if text[name.len()..].starts_with('+') => (name, offset),
        _ => (text, 0),
    };
    let anchor = is_mark_name(name).then(|| Anchor::Mark(name.into()))?;
    Some(When { anchor, offset })
}

/// The offset at the end of a name. A text in quotes has none inside.
fn split_offset(text: &str) -> (&str, i64) {
    let number = text.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    let sign = number.saturating_sub(1);
    let is_sign = matches!(text.as_bytes().get(sign), Some(b'+' | b'-'));
    match text[number..].parse::<i64>() {
        Ok(offset) if is_sign && sign > 0 => {
            let offset = if text.as_bytes()[sign] == b'-' {
                -offset
            } else {
                offset
            };
            (&text[..sign], offset)
        }
        _ => (text, 0),
    }
}

fn anchor(name: &str) -> Option<Anchor> {
    if let Some(text) = name.strip_prefix("console:") {
        let quoted = text
            .strip_prefix('"')
            .and_then(|text| text.strip_suffix('"'));
        let text = quoted.unwrap_or(text);
        return (!text.is_empty()).then(|| Anchor::Console(text.into()));
    }
    match name {
        "end" => Some(Anchor::End),
        "crash" => Some(Anchor::Crash),
        _ => match name.strip_suffix('s') {
            Some(time) => nanos(time).map(Anchor::Time),
            None if name.starts_with(|first: char| first.is_ascii_digit()) => {
                let exit = name.parse().ok();
                exit.map(|ExitNumber(exit)| Anchor::Exit(exit))
            }
            None => None,
        },
    }
}

/// A number in digits alone.
fn digits(text: &str) -> Option<u64> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| plain)
}

/// Seconds with up to nine decimals.
fn nanos(text: &str) -> Option<Nanos> {
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    digits(part).filter(|_| part.len() <= 9)?;
    let part = digits(&format!("{part:0<9}"))?;
    digits(whole)?.checked_mul(1_000_000_000)?.checked_add(part)
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.anchor {
            Anchor::Exit(exit) => write!(f, "exit {exit}")?,
            Anchor::Time(time) => {
                let second = 1_000_000_000;
                write!(f, "{}.{:09}s", time / second, time % second)?;
            }
            Anchor::End => f.write_str("end")?,
            Anchor::Crash => f.write_str("crash")?,
            Anchor::Console(text) => write!(f, "console:{text:?}")?,
            Anchor::Mark(name) => write!(f, "mark:{name}")?,
        }
        match self.offset {
            0 => Ok(()),
            offset => write!(f, "{offset:+}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_named_as_the_help_says() {
        let moment = |text: &str| text.parse::<When>().expect(text);
        let when = |anchor, offset| When { anchor, offset };
        for (text, anchor) in [
            ("0", Anchor::Exit(0)),
            ("1_000,000", Anchor::Exit(1_000_000)),
            ("18446744073709551615", Anchor::Exit(u64::MAX)),
            ("0s", Anchor::Time(0)),
            ("12.5s", Anchor::Time(12_500_000_000)),
            ("1.000000001s", Anchor::Time(1_000_000_001)),
            ("end", Anchor::End),
            ("crash", Anchor::Crash),
            ("console:login:", Anchor::Console("login:".into())),
            ("console:\"a-3\"", Anchor::Console("a-3".into())),
        ] {
            assert_eq!(moment(text), when(anchor.clone(), 0), "{text}");
            assert_eq!(moment(&format!("{text}+7")), when(anchor.clone(), 7));
            assert_eq!(moment(&format!("{text}-12")), when(anchor, -12));
        }
        for text in [
            "",
            "-1",
            "+1",
            "1.s",
            ".5s",
            "1.5",
            "12 s",
            "1.0000000001s",
            "mark:",
            "mark:1",
            "a b",
            "-a",
            "a\u{e9}",
            "a++1",
            "a+1+1",
            "console:",
            "console:\"\"",
            "18446744073709551616",
            "99999999999s",
            "+",
            "crash+",
            "12+x",
        ] {
            assert!(text.parse::<When>().is_err(), "{text:?}");
        }
        let long = "x".repeat(MARK_NAME_BYTES_MAX);
        assert!(long.parse::<When>().is_ok() && format!("{long}x").parse::<When>().is_err());
        assert_eq!(moment("console:x+1").to_string(), "console:\"x\"+1");
        assert_eq!(moment("12.5s-3").to_string(), "12.500000000s-3");
    }
    #[test]
    fn a_mark_is_named_by_itself_and_its_name_may_end_like_an_offset() {
        for (text, marks) in [
            ("login", vec![("login", 0)]),
            ("mark:login", vec![("login", 0)]),
            ("login+10", vec![("login", 10)]),
            ("login-10", vec![("login-10", 0), ("login", -10)]),
            ("mark-1", vec![("mark-1", 0), ("mark", -1)]),
            ("mark-1+0", vec![("mark-1", 0), ("mark", -1)]),
            ("mark-1-2", vec![("mark-1-2", 0), ("mark-1", -2)]),
            ("mark:mark-1+7", vec![("mark-1", 7), ("mark", 6)]),
            // What is something else needs the word before it.
            ("mark:crash", vec![("crash", 0)]),
            ("mark:end-1", vec![("end-1", 0), ("end", -1)]),
            ("crash", vec![]),
            ("end-1", vec![]),
            ("_x.y", vec![("_x.y", 0)]),
        ] {
            let when: When = text.parse().expect(text);
            assert_eq!(when.marks(), marks, "{text}");
        }
        let when: When = "login+2".parse().unwrap();
        assert_eq!(when.to_string(), "mark:login+2");
    }
}
