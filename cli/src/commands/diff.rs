//! `hindsight diff`: what differs between two recordings, and the first event at which they part.

use std::collections::{BTreeSet, VecDeque};
use std::io::Read;
use std::path::PathBuf;

use clap::Args;
use hindsight_replay::{Event, Header, JournalError, JournalReader, Record, Tail, TailReason};
use serde::Serialize;
use serde_json::{Value, json};

use crate::outcome::Outcome;
use crate::tell::out;
use hindsight_vmm::failure::Failure;
use hindsight_vmm::foreign::{shown, shown_path};
use hindsight_vmm::session::Recording;

/// How many events before the difference are shown.
const HISTORY: usize = 8;

/// Options of `diff`.
#[derive(Debug, Args)]
#[command(after_help = "\
The whole of both heads is compared, then event by event, then how both end. Exit code 3: all is equal,
but neither recording was closed.")]
pub struct Options {
    /// One recording.
    a: PathBuf,
    /// The other.
    b: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn main(options: &Options) -> Result<Outcome, Failure> {
    let mut a = Recording::at(&options.a).journal()?;
    let mut b = Recording::at(&options.b).journal()?;
    let found = Comparison::of(&mut a, &mut b)?;
    if options.json {
        out!("{}", found.to_json());
    } else {
        let names = [&options.a, &options.b].map(|path| shown_path(path).to_string());
        out!("{}", found.text(&names).trim_end());
    }
    Ok(found.outcome())
}

/// A field in which two heads differ.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeadDifference {
    /// Its name, as in the JSON of `inspect`: `machine.memory_bytes`.
    pub field: String,
    /// What one says; null if it has no such field.
    pub a: Value,
    /// What the other says.
    pub b: Value,
}

/// Two journals, compared to the end of both or to the first event that differs.
#[derive(Debug)]
pub struct Comparison {
    heads: Vec<HeadDifference>,
    /// How many events are equal.
    common: u64,
    /// The last of them.
    history: VecDeque<Record>,
    /// The first that differs; on one side there may be none.
    event: Option<[Option<Record>; 2]>,
    /// Where and why each journal ends, as far as it was read to its end.
    tails: [Option<Tail>; 2],
}

impl Comparison {
    /// Compares two journals, holding one event of each.
    pub fn of(
        a: &mut JournalReader<impl Read>,
        b: &mut JournalReader<impl Read>,
    ) -> Result<Comparison, JournalError> {
        let heads = head_differences(a.header(), b.header());
        let mut history = VecDeque::with_capacity(HISTORY + 1);
        let mut common = 0;
        let event = loop {
            match (a.next_record()?, b.next_record()?) {
                (None, None) => break None,
                (Some(x), Some(y)) if x == y => {
                    common += 1;
                    history.push_back(x);
                    if history.len() > HISTORY {
                        history.pop_front();
                    }
                }
                (x, y) => break Some([x, y]),
            }
        };
        Ok(Comparison {
            heads,
            common,
            history,
            event,
            tails: [a.tail().cloned(), b.tail().cloned()],
        })
    }

    /// Whether the journals end at different exits, or one was closed and the other was not. Frames may be
    /// divided otherwise: then equal journals have different lengths.
    fn tails_differ(&self) -> bool {
        let end = |tail: &Option<Tail>| {
            let tail = tail.as_ref();
            tail.map(|tail| (tail.reason == TailReason::Closed, tail.through))
        };
        self.event.is_none() && end(&self.tails[0]) != end(&self.tails[1])
    }

    fn is_closed(&self) -> bool {
        let mut tails = self.tails.iter().flatten();
        tails.all(|tail| tail.reason == TailReason::Closed)
    }

    /// Different in anything; or else not known to be equal to the end.
    pub fn outcome(&self) -> Outcome {
        if !self.heads.is_empty() || self.event.is_some() || self.tails_differ() {
            Outcome::Different
        } else if self.is_closed() {
            Outcome::Good
        } else {
            Outcome::CutShort
        }
    }

    /// What one side says where they part.
    fn side(&self, side: usize) -> Option<String> {
        let record = self.event.as_ref()?[side].as_ref();
        let tail = self.tails[side].as_ref().map(Tail::to_string);
        Some(record.map_or_else(|| tail.unwrap_or_default(), describe))
    }

    /// For programs.
    pub fn to_json(&self) -> Value {
        let tail = |tail: &Option<Tail>| {
            tail.as_ref().map(|tail| {
                json!({
                    "closed": tail.reason == TailReason::Closed,
                    "through": tail.through,
                    "text": tail.to_string(),
                })
            })
        };
        json!({
            "equal": self.outcome() == Outcome::Good,
            "header": self.heads,
            "common_events": self.common,
            "a": self.side(0),
            "b": self.side(1),
            "tails": {"a": tail(&self.tails[0]), "b": tail(&self.tails[1])},
        })
    }

    /// For people; `names` are those of the recordings.
    pub fn text(&self, names: &[String; 2]) -> String {
        let mut text = String::new();
        let mut line = |line: String| text.extend([line.as_str(), "\n"]);
        for difference in &self.heads {
            let HeadDifference { field, a, b } = difference;
            line(format!("{field} differs: {} / {}", value(a), value(b)));
        }
        let common = self.common;
        if self.event.is_some() {
            line(format!("{common} events are equal; then"));
            for (side, name) in names.iter().enumerate() {
                let says = self.side(side).unwrap_or_default();
                line(format!("  {name}: {}", shown(&says)));
            }
            if !self.history.is_empty() {
                line("what led up to it:".into());
            }
            for record in &self.history {
                line(format!("  {}", shown(&describe(record))));
            }
            return text;
        }
        line(format!("{common} events, all equal"));
        if self.tails_differ() {
            line("the ends differ:".into());
        } else if !self.is_closed() {
            line("as far as they go:".into());
        } else {
            return text;
        }
        for (name, tail) in names.iter().zip(&self.tails) {
            let tail = tail.as_ref().map(Tail::to_string).unwrap_or_default();
            line(format!("  {name}: {}", shown(&tail)));
        }
        text
    }
}

fn describe(record: &Record) -> String {
    let exits = record.exits;
    match &record.event {
        Event::Turn(turn) => format!("exit {exits}: {turn}"),
        Event::Interrupt { vector, at } => {
            format!("interrupt {vector:#04x} at {at}, rcx {:#x}", at.rcx)
        }
        Event::Preempted { vcpu, place } => {
            format!("exit {exits}: preempted {place}{}", vcpu.suffix())
        }
        event => format!("exit {exits}: {event:?}"),
    }
}

/// All that differs between two heads. They are compared as they are written for programs, field by field,
/// so that none can be forgotten here.
fn head_differences(a: &Header, b: &Header) -> Vec<HeadDifference> {
    let json = |header| serde_json::to_value(header).expect("plain values serialise");
    let mut found = Vec::new();
    find_differences(String::new(), &json(a), &json(b), &mut found);
    found
}

fn find_differences(field: String, a: &Value, b: &Value, found: &mut Vec<HeadDifference>) {
    if a == b {
        return;
    }
    let within = |name: &str| match field.as_str() {
        "" => name.to_string(),
        field => format!("{field}.{name}"),
    };
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            let names: BTreeSet<&String> = x.keys().chain(y.keys()).collect();
            for name in names {
                find_differences(within(name), &a[name], &b[name], found);
            }
        }
        (Value::Array(x), Value::Array(y)) if !are_numbers(x) && !are_numbers(y) => {
            let item = |of: &[Value], at| of.get(at).cloned().unwrap_or_default();
            for at in 0..x.len().max(y.len()) {
                let field = format!("{field}[{at}]");
                find_differences(field, &item(x, at), &item(y, at), found);
            }
        }
        _ => found.push(HeadDifference {
            field,
            a: a.clone(),
            b: b.clone(),
        }),
    }
}

/// Whether this is one value in several numbers: a hash, an address, four registers.
fn are_numbers(values: &[Value]) -> bool {
    !values.is_empty() && values.iter().all(Value::is_number)
}

/// A value of a head for a person: a hash is one number.
fn value(value: &Value) -> String {
    let bytes = value.as_array().filter(|list| list.len() >= 6);
    let bytes: Option<Vec<u8>> = bytes.and_then(|list| {
        let byte = |value: &Value| value.as_u64().and_then(|byte| u8::try_from(byte).ok());
        list.iter().map(byte).collect()
    });
    match (value, bytes) {
        (_, Some(bytes)) => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        (Value::Null, _) => "none".into(),
        (Value::String(text), _) => shown(text).to_string(),
        (value, _) => shown(&value.to_string()).to_string(),
    }
}

#[cfg(test)]
mod tests;
