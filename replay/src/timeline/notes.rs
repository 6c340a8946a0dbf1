//! What happened between two checkpoints that somebody may look for later: without them a text or a panic is found by
//! replaying all that comes before.

use hindsight_devices::{Nanos, Output};
use serde::{Deserialize, Serialize};

use crate::machine::{Exit, Guest, Observer, Turn};

/// More than this is not kept, in bytes.
const SAID_MAX: usize = 8 << 20;
/// Notes that are longer, as they are kept or in memory, are none: some more than what two checkpoints may have.
pub const NOTES_BYTES_MAX: usize = 32 << 20;

/// What the guest wrote to one of its consoles at an exit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Said {
    /// Exits since the one before, or since the notes begin.
    exits: u64,
    /// The virtio console rather than the serial one.
    virtio: bool,
    bytes: Vec<u8>,
}

impl Said {
    /// In memory.
    fn size(bytes: &[u8]) -> usize {
        bytes.len() + size_of::<Said>()
    }
}

/// What the guest said after one exit and up to another, and whether its kernel panicked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Notes {
    /// Exits from where they begin to the first panic.
    panic: Option<u64>,
    said: Vec<Said>,
}

impl Notes {
    /// As they are kept.
    pub fn to_bytes(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("plain values serialise")
    }

    /// Those that were kept; `None` if these are none, or too many.
    pub fn from_bytes(bytes: &[u8]) -> Option<Notes> {
        let (panic, rest) = postcard::take_from_bytes(bytes).ok()?;
        let (count, mut rest) = postcard::take_from_bytes::<u64>(rest).ok()?;
        let (mut said, mut size) = (Vec::new(), 0);
        for _ in 0..count {
            let (one, after) = postcard::take_from_bytes::<Said>(rest).ok()?;
            size += Said::size(&one.bytes);
            if size > NOTES_BYTES_MAX {
                return None;
            }
            said.push(one);
            rest = after;
        }
        rest.is_empty().then_some(Notes { panic, said })
    }

    /// Tells `observer` what was seen, as it would have seen it after exit `from`; returns the first exit at which the guest
    /// panicked. Times are not kept.
    pub fn tell(&self, from: u64, observer: &mut dyn Observer) -> Option<u64> {
        let mut exits = from;
        for said in &self.said {
            exits = exits.saturating_add(said.exits);
            let bytes = said.bytes.clone();
            let output = match said.virtio {
                true => Output::VirtioConsole(bytes),
                false => Output::Console(bytes),
            };
            observer.output(exits, 0, &output);
        }
        self.panic.map(|exits| from.saturating_add(exits))
    }

    /// These, and after so many exits from where they begin others.
    #[must_use]
    pub fn followed_by(mut self, exits: u64, mut others: Notes) -> Notes {
        let since = |exits: u64, said: &Said| exits.saturating_sub(said.exits);
        let after_last = self.said.iter().fold(exits, since);
        if let Some(first) = others.said.first_mut() {
            first.exits = first.exits.saturating_add(after_last);
        }
        let panic = others.panic.map(|panic| panic.saturating_add(exits));
        self.said.append(&mut others.said);
        self.panic = self.panic.or(panic);
        self
    }
}

/// Takes notes.
#[derive(Debug, Default)]
pub struct NoteTaker {
    /// After which exit they begin.
    from: u64,
    /// The exit of what was said last.
    last: u64,
    notes: Notes,
    /// How much is kept; more than [`SAID_MAX`]: not all of it.
    size: usize,
}

impl NoteTaker {
    /// Begins anew after exit `from`.
    pub fn begin(&mut self, from: u64) {
        *self = NoteTaker {
            from,
            last: from,
            ..NoteTaker::default()
        };
    }

    /// What was seen after exit `from`, if that is known.
    pub fn since(&self, from: u64) -> Option<Notes> {
        (self.from == from && self.size <= SAID_MAX).then(|| self.notes.clone())
    }
}

impl Observer for NoteTaker {
    fn turn(&mut self, exits: u64, turn: &Turn, _guest: &mut dyn Guest) {
        if matches!(turn.exit, Exit::Panic { .. }) {
            self.notes.panic.get_or_insert(exits - self.from);
        }
    }

    fn output(&mut self, exits: u64, _now: Nanos, output: &Output) {
        let (virtio, bytes) = match output {
            Output::Console(bytes) => (false, bytes),
            Output::VirtioConsole(bytes) => (true, bytes),
            Output::Frame(_) => return,
        };
        self.size += Said::size(bytes);
        if self.size <= SAID_MAX {
            let since = exits - std::mem::replace(&mut self.last, exits);
            self.notes.said.push(Said {
                exits: since,
                virtio,
                bytes: bytes.clone(),
            });
        }
    }
}
