//! `hindsight diff`: the first difference between two recordings.

use std::collections::VecDeque;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Args;
use hindsight_replay::{Entry, Event, Header, JournalReader, Tail};

use super::Outcome;
use crate::recording::Recording;
use crate::tell::out;

/// How many events before the difference are shown.
const HISTORY: usize = 8;

/// Options of `diff`.
#[derive(Debug, Args)]
pub struct Options {
    /// One recording.
    a: PathBuf,
    /// The other.
    b: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn main(options: &Options) -> anyhow::Result<Outcome> {
    let mut a = Side::open(&options.a)?;
    let mut b = Side::open(&options.b)?;
    let notes = header_differences(a.journal.header(), b.journal.header());
    if !options.json {
        for note in &notes {
            out!("{note}");
        }
    }
    let mut history = VecDeque::with_capacity(HISTORY + 1);
    let mut common = 0u64;
    let difference = loop {
        match (a.next()?, b.next()?) {
            (None, None) => break None,
            (Some(x), Some(y)) if x == y => {
                common += 1;
                history.push_back(x);
                if history.len() > HISTORY {
                    history.pop_front();
                }
            }
            (x, y) => break Some((x, y)),
        }
    };
    let (left, right) = match &difference {
        None => (None, None),
        Some((x, y)) => (Some(a.show(x.as_ref())), Some(b.show(y.as_ref()))),
    };
    if options.json {
        let value = serde_json::json!({
            "equal": difference.is_none() && notes.is_empty(),
            "header": notes,
            "common_events": common,
            "a": left,
            "b": right,
        });
        out!("{value}");
    } else if let (Some(left), Some(right)) = (&left, &right) {
        out!(
            "{common} events are equal; then\n  {}: {left}",
            options.a.display()
        );
        out!("  {}: {right}", options.b.display());
        if !history.is_empty() {
            out!("what led up to it:");
        }
        for entry in &history {
            out!("  {}", describe(entry));
        }
    } else {
        out!("{common} events, all equal");
    }
    let equal = difference.is_none() && notes.is_empty();
    Ok(if equal {
        Outcome::Good
    } else {
        Outcome::Different
    })
}

/// One of the two journals.
struct Side<R: Read> {
    journal: JournalReader<R>,
    ahead: VecDeque<Entry>,
}

impl Side<std::io::BufReader<std::fs::File>> {
    fn open(path: &Path) -> anyhow::Result<Self> {
        Ok(Side {
            journal: Recording::at(path).journal()?,
            ahead: VecDeque::new(),
        })
    }
}

impl<R: Read> Side<R> {
    fn next(&mut self) -> anyhow::Result<Option<Entry>> {
        while self.ahead.is_empty() {
            match self.journal.next_frame()? {
                Some(frame) => self.ahead.extend(frame.entries),
                None => return Ok(None),
            }
        }
        Ok(self.ahead.pop_front())
    }

    fn show(&self, entry: Option<&Entry>) -> String {
        match entry {
            Some(entry) => describe(entry),
            None => self.journal.tail().map(Tail::to_string).unwrap_or_default(),
        }
    }
}

fn describe(entry: &Entry) -> String {
    let exits = entry.exits;
    match &entry.event {
        Event::Turn(turn) => format!("exit {exits}: {turn}"),
        event => format!("exit {exits}: {event:?}"),
    }
}

/// What differs between two machines, in words.
fn header_differences(a: &Header, b: &Header) -> Vec<String> {
    let (x, y) = (&a.machine, &b.machine);
    let initrd = |m: &hindsight_replay::MachineDescription| {
        m.initrd
            .as_ref()
            .map_or("none".into(), hindsight_replay::Content::hex)
    };
    let sides = [
        (
            "detail",
            format!("{:?}", a.detail),
            format!("{:?}", b.detail),
        ),
        ("kernel", x.kernel.hex(), y.kernel.hex()),
        ("initrd", initrd(x), initrd(y)),
        (
            "memory",
            x.memory_bytes.to_string(),
            y.memory_bytes.to_string(),
        ),
        (
            "seed",
            format!("{:02x?}", x.seed),
            format!("{:02x?}", y.seed),
        ),
        ("traps", format!("{:?}", x.traps), format!("{:?}", y.traps)),
        ("cmdline", x.cmdline.clone(), y.cmdline.clone()),
        ("cpuid", format!("{:?}", x.cpuid), format!("{:?}", y.cpuid)),
        (
            "ns per exit",
            x.ns_per_exit.to_string(),
            y.ns_per_exit.to_string(),
        ),
        (
            "time reads",
            format!("{:?}", x.quick_reads),
            format!("{:?}", y.quick_reads),
        ),
    ];
    let differs = sides.into_iter().filter(|(_, a, b)| a != b);
    differs
        .map(|(what, a, b)| format!("{what} differs: {a} / {b}"))
        .collect()
}
