//! The journal: a head and a chain of checked, compressed frames. See `docs/journal-format.md`.
//!
//! The writer closes a frame only between turns, and a frame says up to which exit it is
//! complete; so whatever happens to the end of a journal, the frames before it replay.

use std::io::{self, Read, Write};

use hindsight_devices::Nanos;
use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::event::{Codec, Entry, Event};
use crate::header::Header;

/// First bytes of every journal. The high bit and the line ends catch text-mode copies, as in PNG.
pub const MAGIC: [u8; 8] = *b"\x89HSJ\r\n\x1a\n";
/// The version this code writes, and the only one it reads.
pub const VERSION: u32 = 5;
/// First bytes of every frame.
pub const FRAME_MAGIC: [u8; 4] = *b"HSfr";
/// Length of a frame's own head in bytes.
pub const FRAME_HEAD_BYTES: usize = 56;
/// No frame holds more raw bytes than this; a larger claim is damage.
pub const FRAME_RAW_MAX: usize = 16 << 20;
/// The head of a journal is no longer than this.
pub const HEADER_MAX: usize = 1 << 20;
/// A frame with more raw bytes than this is closed at the next turn.
const FRAME_RAW_GOAL: usize = 256 << 10;
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
    /// It was closed: there is an end event and nothing behind it.
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

/// A frame's own head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHead {
    /// Number of the frame, from 0.
    pub sequence: u32,
    /// Bytes of the zstd frame behind this head.
    pub compressed_bytes: u32,
    /// Bytes it unpacks to.
    pub raw_bytes: u32,
    /// Exits up to here are in earlier frames.
    pub first: u64,
    /// Exits up to and including this one are complete with this frame.
    pub through: u64,
    /// Guest time at which the frame was closed.
    pub now: Nanos,
    /// XXH3 of the head (this field zero) and the zstd frame, seeded with the check before it.
    pub check: u64,
}

impl FrameHead {
    fn to_bytes(self) -> [u8; FRAME_HEAD_BYTES] {
        let mut bytes = [0; FRAME_HEAD_BYTES];
        bytes[..4].copy_from_slice(&FRAME_MAGIC);
        bytes[4..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.compressed_bytes.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.raw_bytes.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.first.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.through.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.now.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.check.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; FRAME_HEAD_BYTES]) -> Result<FrameHead, String> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        if bytes[..4] != FRAME_MAGIC {
            return Err(format!(
                "it begins with {:02x?}, expected {FRAME_MAGIC:02x?}",
                &bytes[..4]
            ));
        }
        if long(40) != 0 {
            return Err("its reserved bytes are not zero".into());
        }
        Ok(FrameHead {
            sequence: word(4),
            compressed_bytes: word(8),
            raw_bytes: word(12),
            first: long(16),
            through: long(24),
            now: long(32),
            check: long(48),
        })
    }

    /// The check this head should carry.
    fn computed_check(self, payload: &[u8], seed: u64) -> u64 {
        let head = FrameHead { check: 0, ..self }.to_bytes();
        xxh3_64_with_seed(payload, xxh3_64_with_seed(&head, seed))
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
    first: u64,
    last_close_ns: Nanos,
    offset: u64,
    index: Vec<IndexEntry>,
}

/// Where a frame lies: what the index holds, and what a scan finds where there is no index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct IndexEntry {
    /// Offset of the frame's head in the journal.
    pub offset: u64,
    /// Exits up to here are in earlier frames.
    pub first: u64,
    /// Exits up to and including this one are complete with this frame.
    pub through: u64,
    /// Guest time at which the frame was closed.
    pub now: Nanos,
}

impl<W: Write> JournalWriter<W> {
    /// Writes the head.
    pub fn create(mut sink: W, header: &Header) -> Result<JournalWriter<W>, JournalError> {
        let body = postcard::to_stdvec(header).expect("a header of plain values serialises");
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
            first: 0,
            last_close_ns: 0,
            offset: bytes.len() as u64,
            index: Vec::new(),
        })
    }

    /// Appends an event; it reaches the sink with its frame.
    pub fn append(&mut self, exits: u64, event: Event) {
        self.raw = self
            .codec
            .encode(std::mem::take(&mut self.raw), &Entry { exits, event });
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
        if self.raw.len() >= FRAME_RAW_GOAL || (span_ns >= limit_ns && !self.raw.is_empty()) {
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

/// A whole frame, checked and unpacked.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Where it lies and what it covers.
    pub place: IndexEntry,
    /// Its head.
    pub head: FrameHead,
    /// Its events.
    pub entries: Vec<Entry>,
    /// Raw bytes of each event.
    pub sizes: Vec<u32>,
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
    ended: bool,
    tail: Option<Tail>,
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
        let mut body = vec![0; length];
        let got = read_up_to(&mut source, &mut body)?;
        if got < length {
            return Err(JournalError::Head(format!(
                "it is cut: {got} bytes of {length}"
            )));
        }
        let seed = head_check(version, &body);
        if seed != check {
            return Err(JournalError::Head(format!(
                "its checksum is {seed:016x}, expected {check:016x}"
            )));
        }
        let header: Header =
            postcard::from_bytes(&body).map_err(|e| JournalError::Head(e.to_string()))?;
        if !header.machine.devices.are_possible() {
            return Err(JournalError::Head(
                "it describes devices that no machine has".into(),
            ));
        }
        let offset = 24 + length as u64;
        Ok(JournalReader {
            source,
            header,
            seed,
            sequence: 0,
            offset,
            through: 0,
            now: 0,
            ended: false,
            tail: None,
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

    /// The last exit that the frames read so far cover completely.
    pub fn through(&self) -> u64 {
        self.through
    }

    /// The next whole frame, or `None` behind the last.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, JournalError> {
        if self.tail.is_some() {
            return Ok(None);
        }
        let mut head = [0; FRAME_HEAD_BYTES];
        let got = read_up_to(&mut self.source, &mut head)?;
        if got == 0 {
            let reason = if self.ended {
                TailReason::Closed
            } else {
                TailReason::NotClosed
            };
            return Ok(self.stop(reason));
        }
        if self.ended {
            return Ok(self.stop(TailReason::Damaged("there are bytes behind the end".into())));
        }
        if got < head.len() {
            return Ok(self.stop(TailReason::Torn));
        }
        let head = match FrameHead::from_bytes(&head) {
            Ok(head) => head,
            Err(what) => return Ok(self.stop(TailReason::Damaged(what))),
        };
        let lengths = [head.compressed_bytes, head.raw_bytes];
        if lengths.iter().any(|&bytes| bytes as usize > FRAME_RAW_MAX) {
            let what = format!("it claims {lengths:?} bytes, at most {FRAME_RAW_MAX}");
            return Ok(self.stop(TailReason::Damaged(what)));
        }
        let mut payload = vec![0; head.compressed_bytes as usize];
        if read_up_to(&mut self.source, &mut payload)? < payload.len() {
            return Ok(self.stop(TailReason::Torn));
        }
        match self.check_frame(&head, &payload) {
            Err(what) => Ok(self.stop(TailReason::Damaged(what))),
            Ok((entries, sizes)) => {
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
                self.offset += (FRAME_HEAD_BYTES + payload.len()) as u64;
                self.seed = head.check;
                self.sequence += 1;
                self.through = through;
                self.now = now;
                self.ended = matches!(
                    entries.last(),
                    Some(Entry {
                        event: Event::End(_),
                        ..
                    })
                );
                Ok(Some(Frame {
                    place,
                    head,
                    entries,
                    sizes,
                }))
            }
        }
    }

    fn check_frame(
        &self,
        head: &FrameHead,
        payload: &[u8],
    ) -> Result<(Vec<Entry>, Vec<u32>), String> {
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
                "it covers exits {} to {} at {} ns, behind exit {} at {} ns",
                head.first, head.through, head.now, self.through, self.now
            ));
        }
        let raw = zstd::bulk::decompress(payload, head.raw_bytes as usize)
            .map_err(|error| format!("it does not unpack: {error}"))?;
        if raw.len() != head.raw_bytes as usize {
            return Err(format!(
                "it unpacks to {} bytes, expected {}",
                raw.len(),
                head.raw_bytes
            ));
        }
        let mut codec = Codec::new(head.first);
        let mut rest = raw.as_slice();
        let mut entries = Vec::new();
        let mut sizes = Vec::new();
        while !rest.is_empty() {
            let before = rest.len();
            let entry = codec
                .decode(&mut rest)
                .map_err(|e| format!("it does not decode: {e}"))?;
            if entry.exits > head.through {
                return Err(format!(
                    "it has an event at exit {}, behind its end",
                    entry.exits
                ));
            }
            if matches!(
                entries.last(),
                Some(Entry {
                    event: Event::End(_),
                    ..
                })
            ) {
                return Err("it has an event behind the end".into());
            }
            entries.push(entry);
            sizes.push((before - rest.len()) as u32);
        }
        Ok((entries, sizes))
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
