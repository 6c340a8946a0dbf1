//! What a journal says, as people read it. Every command and every report has it from here.

use std::fmt;

use hindsight_devices::{Input, POSTED_PORT};

use super::event::{Event, Record};

/// On one line, and with everything that two events can differ in. What the guest or the world wrote is escaped.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Turn(turn) => turn.fmt(f),
            Event::Time { ahead_ns } => write!(f, "guest time corrected by {ahead_ns:+} ns"),
            Event::Input(input) => write!(f, "input: {}", InputText(input)),
            Event::Interrupt { vector, at } => {
                write!(
                    f,
                    "interrupt {vector:#04x}{} at rip {:#x} rcx {:#x}",
                    at.vcpu.suffix(),
                    at.rip,
                    at.rcx
                )?;
                match at.branches {
                    0 => Ok(()),
                    branches => write!(f, ", {branches} branches after the exit before"),
                }
            }
            Event::Witness { check: [low, high] } => write!(f, "witness {high:02x}{low:02x}"),
            Event::State { digest } => write!(f, "memory {}, state {digest}", digest.memory),
            Event::End(end) => write!(f, "end: {end}"),
            Event::Preempted { vcpu, place } => {
                write!(f, "preempted {place}{}", vcpu.suffix())
            }
            Event::FirstReads { check } => write!(f, "first reads of a disk's image {check:016x}"),
            Event::Posted(bytes) => {
                let bytes = bytes.escape_ascii();
                write!(f, "port {POSTED_PORT:#06x} was written \"{bytes}\"")
            }
            Event::LeftOpen(what) => write!(f, "left open: {what}"),
        }
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit {}: {}", self.exits, self.event)
    }
}

struct InputText<'a>(&'a Input);

impl fmt::Display for InputText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Input::WallClock { unix_seconds } => {
                write!(f, "the wall clock, {unix_seconds} s after 1970-01-01 UTC")
            }
            Input::Console(bytes) => write!(f, "typed \"{}\"", bytes.escape_ascii()),
            Input::VirtioConsole(bytes) => {
                write!(f, "typed at hvc0 \"{}\"", bytes.escape_ascii())
            }
            Input::Stop => f.write_str("the operator asks it to stop"),
            Input::PowerButton => f.write_str("the power button"),
            Input::Resize { columns, rows } => write!(f, "a terminal of {columns}x{rows}"),
            Input::Frame(bytes) => write!(f, "a frame of {} bytes, {}", bytes.len(), Hex(bytes)),
            Input::Entropy(bytes) => write!(f, "{} random bytes, {}", bytes.len(), Hex(bytes)),
        }
    }
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{End, Ending, Moment};

    fn line(event: Event) -> String {
        let exits = 7;
        Record { exits, event }.to_string()
    }

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        let hostile = "\x1b[2J\r\u{202e}";
        let end = Event::End(Box::new(End {
            ending: Ending::Halted,
            panic: Some(hostile.into()),
            now: 0,
            digest: 0,
            state: None,
        }));
        let events = [
            end,
            Event::Posted(hostile.into()),
            Event::Input(Input::Console(hostile.into())),
            Event::Input(Input::VirtioConsole(hostile.into())),
        ];
        for event in events {
            let text = line(event);
            let obeyed = text.contains(|c: char| c.is_control() || c == '\u{202e}');
            assert!(!obeyed, "{text:?}");
        }
    }

    #[test]
    fn events_that_differ_read_differently() {
        let at = Moment {
            exits: 7,
            rip: 1,
            rcx: 2,
            ..Moment::START
        };
        let vector = 0x20;
        let later = Moment { branches: 3, ..at };
        assert_ne!(
            line(Event::Interrupt { vector, at }),
            line(Event::Interrupt { vector, at: later })
        );
        let frame = |byte| line(Event::Input(Input::Frame(vec![byte; 60])));
        assert_ne!(frame(1), frame(2));
        assert_eq!(
            line(Event::Time { ahead_ns: 5 }),
            "exit 7: guest time corrected by +5 ns"
        );
    }
}
