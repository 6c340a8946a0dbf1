//! The journal: a head and a chain of checked, compressed frames. See `docs/journal-format.md`.
//!
//! The writer closes a frame only where the events of an exit are complete, but for interrupts that the guest
//! may yet take there, and a frame says up to which exit that is; so whatever happens to the end of a
//! journal, the frames before it replay. Writer and reader hold the same bounds (`limits.rs`).

use std::io::{self, Read, Write};

use hindsight_devices::Nanos;
use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::event::{Codec, Entry, Event};
use crate::frame::{Entries, FRAME_HEAD_BYTES, Frame, FrameHead, IndexEntry};
use crate::header::Header;
use crate::limits::{FRAME_RAW_GOAL, FRAME_RAW_MAX, HEADER_MAX, Rules};

/// First bytes of every journal. The high bit and the line ends catch text-mode copies, as in PNG.
pub const MAGIC: [u8; 8] = *b"\x89HSJ\r\n\x1a\n";
/// The version this code writes, and the only one it reads.
pub const VERSION: u32 = 5;
/// A frame that spans more guest time than this is closed at the next turn.
const FRAME_SPAN_NS: Nanos = 1_000_000_000;
/// Before the machine waits, a frame is closed if it spans more than this.
const FRAME_SPAN_IDLE_NS: Nanos = 250_000_000;
/// zstd's own default; higher levels gain a few percent for several times the work.
const ZSTD_LEVEL: i32 = 3;

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
        /// What stands in place of the magic.
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
    /// Why.
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

/// Writes a journal to any sink.
#[derive(Debug)]
pub struct JournalWriter<W: Write> {
    sink: W,
    seed: u64,
    sequence: u32,
    raw: Vec<u8>,
    codec: Codec,
    /// What a reader would refuse is refused here; `None`: it is written.
    rules: Option<Rules>,
    first: u64,
    last_close_ns: Nanos,
    offset: u64,
    index: Vec<IndexEntry>,
}

impl<W: Write> JournalWriter<W> {
    /// Writes the head.
    pub fn create(mut sink: W, header: &Header) -> Result<JournalWriter<W>, JournalError> {
        header.check().map_err(JournalError::Impossible)?;
        let body = postcard::to_stdvec(header).expect("a header of plain values serialises");
        if body.len() > HEADER_MAX {
            let what = format!("it has {} bytes, at most {HEADER_MAX}", body.len());
            return Err(JournalError::Impossible(what));
        }
        let seed = head_check(VERSION, &body);
        let mut bytes = Vec::with_capacity(body.len() + 24);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(
            u32::try_from(body.len())
                .expect("a header is small")
                .to_le_bytes(),
        );
        bytes.extend(seed.to_le_bytes());
        bytes.extend(&body);
        sink.write_all(&bytes)
            .and_then(|()| sink.flush())
            .map_err(JournalError::Write)?;
        Ok(JournalWriter {
            sink,
            seed,
            sequence: 0,
            raw: Vec::new(),
            codec: Codec::new(0),
            rules: Some(Rules::default()),
            first: 0,
            last_close_ns: 0,
            offset: bytes.len() as u64,
            index: Vec::new(),
        })
    }

    /// The same writer, which writes whatever it is given: for tests of what a reader refuses.
    pub fn unchecked(self) -> JournalWriter<W> {
        JournalWriter {
            rules: None,
            ..self
        }
    }

    /// Appends an event; it reaches the sink with its frame. Refuses one that no reader would take, as if
    /// nobody had asked.
    pub fn append(&mut self, exits: u64, event: Event) -> Result<(), JournalError> {
        let entry = Entry { exits, event };
        let before = (self.raw.len(), self.codec.clone(), self.rules);
        self.raw = self.codec.encode(std::mem::take(&mut self.raw), &entry);
        let Some(rules) = &mut self.rules else {
            return Ok(());
        };
        let refused = match rules.admit(&entry, self.raw.len() - before.0) {
            Ok(()) if self.raw.len() <= FRAME_RAW_MAX => return Ok(()),
            Ok(()) => format!("a frame has more than {FRAME_RAW_MAX} bytes, through exit {exits}"),
            Err(what) => what,
        };
        self.raw.truncate(before.0);
        (self.codec, self.rules) = (before.1, before.2);
        Err(JournalError::Refused(refused))
    }

    /// Between two turns: closes the frame if it is large or old enough, `idle` if the machine is
    /// about to wait. `through` is the last complete exit.
    pub fn turn_is_complete(
        &mut self,
        through: u64,
        now: Nanos,
        idle: bool,
    ) -> Result<(), JournalError> {
        let span_ns = now.saturating_sub(self.last_close_ns);
        let limit_ns = if idle {
            FRAME_SPAN_IDLE_NS
        } else {
            FRAME_SPAN_NS
        };
        if span_ns >= limit_ns {
            return self.close_frame(through, now);
        }
        self.close_if_full(through, now)
    }

    /// Where the turn of exit `through` is over and the guest may take more interrupts before the next one:
    /// closes the frame if it is large enough. A guest can take any number of them there.
    pub fn close_if_full(&mut self, through: u64, now: Nanos) -> Result<(), JournalError> {
        if self.raw.len() >= FRAME_RAW_GOAL {
            self.close_frame(through, now)?;
        }
        Ok(())
    }

    /// Closes the frame and hands it to the sink, whole.
    pub fn close_frame(&mut self, through: u64, now: Nanos) -> Result<(), JournalError> {
        self.last_close_ns = now;
        if self.raw.is_empty() {
            return Ok(());
        }
        let payload = zstd::bulk::compress(&self.raw, ZSTD_LEVEL).map_err(JournalError::Write)?;
        let mut head = FrameHead {
            sequence: self.sequence,
            compressed_bytes: u32::try_from(payload.len()).expect("frames are small"),
            raw_bytes: u32::try_from(self.raw.len()).expect("frames are small"),
            first: self.first,
            through,
            now,
            check: 0,
        };
        head.check = head.computed_check(&payload, self.seed);
        let mut bytes = head.to_bytes().to_vec();
        bytes.extend(&payload);
        self.sink
            .write_all(&bytes)
            .and_then(|()| self.sink.flush())
            .map_err(JournalError::Write)?;
        self.index.push(IndexEntry {
            offset: self.offset,
            first: self.first,
            through,
            now,
        });
        self.offset += bytes.len() as u64;
        self.seed = head.check;
        self.sequence += 1;
        self.first = through;
        self.codec = Codec::new(through);
        self.raw.clear();
        Ok(())
    }

    /// Bytes handed to the sink so far.
    pub fn bytes(&self) -> u64 {
        self.offset
    }

    /// The frames written so far.
    pub fn index(&self) -> &[IndexEntry] {
        &self.index
    }
}

/// Reads a journal from any source, frame by frame.
#[derive(Debug)]
pub struct JournalReader<R: Read> {
    source: R,
    header: Header,
    seed: u64,
    sequence: u32,
    offset: u64,
    through: u64,
    now: Nanos,
    rules: Rules,
    tail: Option<Tail>,
    /// The frame that [`Self::next_entry`] is in.
    entries: Option<Entries<Vec<u8>>>,
}

impl<R: Read> JournalReader<R> {
    /// Reads and checks the head.
    pub fn open(mut source: R) -> Result<JournalReader<R>, JournalError> {
        let mut fixed = [0; 24];
        let got = read_up_to(&mut source, &mut fixed)?;
        if got < 8 || fixed[..8] != MAGIC {
            return Err(JournalError::NotAJournal {
                found: fixed[..got.min(8)].to_vec(),
            });
        }
        if got < fixed.len() {
            return Err(JournalError::Head(format!(
                "it has {got} bytes, expected at least 24"
            )));
        }
        let version = u32::from_le_bytes(fixed[8..12].try_into().expect("4 bytes"));
        if version != VERSION {
            return Err(JournalError::Version { found: version });
        }
        let length = u32::from_le_bytes(fixed[12..16].try_into().expect("4 bytes")) as usize;
        let check = u64::from_le_bytes(fixed[16..24].try_into().expect("8 bytes"));
        if length > HEADER_MAX {
            return Err(JournalError::Head(format!(
                "it claims {length} bytes, at most {HEADER_MAX}"
            )));
        }
        let body = read_at_most(&mut source, length)?;
        if body.len() < length {
            return Err(JournalError::Head(format!(
                "it is cut: {} bytes of {length}",
                body.len()
            )));
        }
        let seed = head_check(version, &body);
        if seed != check {
            return Err(JournalError::Head(format!(
                "its checksum is {seed:016x}, expected {check:016x}"
            )));
        }
        let (header, rest) = postcard::take_from_bytes::<Header>(&body)
            .map_err(|error| JournalError::Head(error.to_string()))?;
        if !rest.is_empty() {
            let what = format!("{} bytes of it say nothing", rest.len());
            return Err(JournalError::Head(what));
        }
        header.check().map_err(JournalError::Impossible)?;
        let offset = 24 + length as u64;
        Ok(JournalReader {
            source,
            header,
            seed,
            sequence: 0,
            offset,
            through: 0,
            now: 0,
            rules: Rules::default(),
            tail: None,
            entries: None,
        })
    }

    /// The head.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where and why the readable part ends; known once [`Self::next_frame`] has returned `None`.
    pub fn tail(&self) -> Option<&Tail> {
        self.tail.as_ref()
    }

    /// The last exit that the frames read so far cover.
    pub fn through(&self) -> u64 {
        self.through
    }

    /// The next event, whichever frame it is in, or `None` after the last. One frame is held meanwhile.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, JournalError> {
        loop {
            if let Some(entry) = self.entries.as_mut().and_then(Iterator::next) {
                return Ok(Some(entry));
            }
            match self.next_frame()? {
                Some(frame) => self.entries = Some(frame.into_entries()),
                None => return Ok(None),
            }
        }
    }

    /// The next whole frame, or `None` after the last. Events of a frame before that nobody has asked for are
    /// passed over.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, JournalError> {
        // Before the next one is unpacked.
        self.entries = None;
        if self.tail.is_some() {
            return Ok(None);
        }
        let mut head = [0; FRAME_HEAD_BYTES];
        let got = read_up_to(&mut self.source, &mut head)?;
        if got == 0 {
            let reason = if self.rules.ended() {
                TailReason::Closed
            } else {
                TailReason::NotClosed
            };
            return Ok(self.stop(reason));
        }
        if self.rules.ended() {
            return Ok(self.stop(TailReason::Damaged("there are bytes after the end".into())));
        }
        if got < head.len() {
            return Ok(self.stop(TailReason::Torn));
        }
        let head = match FrameHead::from_bytes(&head) {
            Ok(head) => head,
            Err(what) => return Ok(self.stop(TailReason::Damaged(what))),
        };
        let payload = read_at_most(&mut self.source, head.compressed_bytes as usize)?;
        if payload.len() < head.compressed_bytes as usize {
            return Ok(self.stop(TailReason::Torn));
        }
        let FrameHead {
            first,
            through,
            now,
            ..
        } = head;
        let place = IndexEntry {
            offset: self.offset,
            first,
            through,
            now,
        };
        let unpacked = self
            .check_head(&head, &payload)
            .and_then(|()| Frame::unpack(place, head, &payload, self.rules));
        match unpacked {
            Err(what) => Ok(self.stop(TailReason::Damaged(what))),
            Ok((frame, rules)) => {
                self.offset += (FRAME_HEAD_BYTES + payload.len()) as u64;
                self.seed = head.check;
                self.sequence = self.sequence.wrapping_add(1);
                self.through = through;
                self.now = now;
                self.rules = rules;
                Ok(Some(frame))
            }
        }
    }

    /// Whether a frame checks and is the one that comes next.
    fn check_head(&self, head: &FrameHead, payload: &[u8]) -> Result<(), String> {
        let computed = head.computed_check(payload, self.seed);
        if computed != head.check {
            return Err(format!(
                "its checksum is {computed:016x}, expected {:016x}",
                head.check
            ));
        }
        if head.sequence != self.sequence {
            return Err(format!(
                "it is frame {}, expected {}",
                head.sequence, self.sequence
            ));
        }
        if head.first != self.through || head.through < head.first || head.now < self.now {
            return Err(format!(
                "it covers exits {} to {} at {} ns, after exit {} at {} ns",
                head.first, head.through, head.now, self.through, self.now
            ));
        }
        Ok(())
    }

    fn stop<T>(&mut self, reason: TailReason) -> Option<T> {
        self.tail = Some(Tail {
            offset: self.offset,
            through: self.through,
            reason,
        });
        None
    }
}

fn head_check(version: u32, body: &[u8]) -> u64 {
    xxh3_64_with_seed(body, u64::from(version))
}

/// The next `length` bytes, or what there is. Memory is reserved for what comes, not for what is claimed.
fn read_at_most(source: &mut impl Read, length: usize) -> Result<Vec<u8>, JournalError> {
    let mut bytes = Vec::new();
    source
        .by_ref()
        .take(length as u64)
        .read_to_end(&mut bytes)
        .map_err(JournalError::Read)?;
    Ok(bytes)
}

/// Fills as much of `buffer` as the source has.
fn read_up_to(source: &mut impl Read, buffer: &mut [u8]) -> Result<usize, JournalError> {
    let mut got = 0;
    while got < buffer.len() {
        match source.read(&mut buffer[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(JournalError::Read(error)),
        }
    }
    Ok(got)
}
