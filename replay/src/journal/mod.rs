//! The journal: a head and a chain of checked, compressed frames. See `docs/journal-format.md`.
//!
//! The writer closes a frame only where the events of an exit are complete, but for interrupts that the guest
//! may yet take there, and a frame says up to which exit that is; so whatever happens to the end of a
//! journal, the frames before it replay. Writer and reader hold the same bounds (`limits.rs`).

mod codec;
mod event;
mod frame;
mod header;
mod limits;
mod reader;
mod text;
mod writer;

use std::io;

use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64_with_seed;

pub use event::{Event, Record};
pub use frame::{FRAME_HEAD_BYTES, FRAME_MAGIC, Frame, FrameHead, IndexEntry, Records};
pub use header::{
    Content, CounterFacts, DISK_BYTES_MAX, Detail, Header, Host, Image, KERNEL_BYTES_MAX,
    MEMORY_BYTES_MAX, MachineDescription, OperatorConsole, TrapCounts,
};
pub(crate) use limits::TIME_MAX;
pub use limits::{EVENT_RAW_MAX, FRAME_PAYLOAD_MAX, FRAME_RAW_MAX, HEADER_MAX};
pub use reader::{JournalReader, RecordPlace};
pub use writer::JournalWriter;

/// First bytes of every journal. The high bit and the line ends catch text-mode copies, as in PNG.
pub const MAGIC: [u8; 8] = *b"\x89HSJ\r\n\x1a\n";
/// The version this code writes, and the only one it reads.
pub const VERSION: u32 = 8;
/// Why a journal cannot be opened, written, or followed.
#[derive(Debug, Error)]
pub enum JournalError {
    /// The sink refused bytes: a full disk, most often.
    #[error("cannot write the journal: {0}; what was written before replays")]
    Write(#[source] io::Error),
    /// The source failed.
    #[error("cannot read the journal: {0}")]
    Read(#[source] io::Error),
    /// Not a journal.
    #[error("this is not a journal: it begins with {found:02x?}, expected {MAGIC:02x?}")]
    NotAJournal {
        /// What is in place of the magic.
        found: Vec<u8>,
    },
    /// Another version.
    #[error(
        "the journal has version {found}, this program reads version {VERSION}; use the program that recorded it"
    )]
    Version {
        /// The journal's.
        found: u32,
    },
    /// The head is cut or damaged: nothing can be replayed.
    #[error("the journal's head is damaged: {0}")]
    Head(String),
    /// The head is whole, and describes what no recorder makes.
    #[error("the journal's head describes no machine of Hindsight's: {0}; it cannot be used")]
    Impossible(String),
    /// A place that is said to be in it is not.
    #[error("this is no place in the journal: {0}; take another state, or replay from the start")]
    Place(String),
    /// What is to be written down is nothing that a reader would take.
    #[error("the journal cannot hold this: {0}; what was written before replays")]
    Refused(String),
}

/// Where and why the readable part of a journal ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Offset in the journal of the first byte that is not part of a whole frame.
    pub offset: u64,
    /// Exits up to and including this one are fully covered.
    pub through: u64,
    pub reason: TailReason,
}

/// Why the readable part of a journal ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TailReason {
    /// It was closed: there is an end event and nothing after it.
    Closed,
    /// The file ends at a frame's edge, but the recording was never closed.
    NotClosed,
    /// The file ends inside a frame.
    Torn,
    /// A frame does not check.
    Damaged(String),
}

impl std::fmt::Display for Tail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Tail {
            offset,
            through,
            reason,
        } = self;
        match reason {
            TailReason::Closed => write!(f, "the journal was closed after exit {through}"),
            TailReason::NotClosed => write!(
                f,
                "the journal ends after exit {through} (byte {offset}) without having been closed: \
                 the recorder was killed or the file was cut"
            ),
            TailReason::Torn => write!(
                f,
                "the journal breaks off inside a frame at byte {offset}: the recorder was killed, \
                 the disk was full, or the file was cut; it is whole up to exit {through}"
            ),
            TailReason::Damaged(what) => write!(
                f,
                "the journal is damaged in the frame at byte {offset} ({what}); it is whole up to \
                 exit {through}"
            ),
        }
    }
}

/// The check of a head; the first frame's is seeded with it.
fn head_check(version: u32, body: &[u8]) -> u64 {
    xxh3_64_with_seed(body, u64::from(version))
}
