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
    "{0:?} names no moment: expected an exit number, a guest time such as 12.5s, `end`, `crash`, or `console:TEXT`; \
     +N or -N after it is N exits later or earlier"
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
        let anchor = anchor(name).ok_or_else(|| NoMoment(text.into()))?;
        Ok(When { anchor, offset })
    }
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
            "s",
            "-1",
            "+1",
            "1.s",
            ".5s",
            "1.5",
            "12 s",
            "1.0000000001s",
            "End",
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
        assert_eq!(moment("console:x+1").to_string(), "console:\"x\"+1");
        assert_eq!(moment("12.5s-3").to_string(), "12.500000000s-3");
    }
}
