//! A frame: its head, where it lies, and its events, which are unpacked one at a time.

use hindsight_devices::Nanos;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::codec::Codec;
use super::event::Record;
use super::limits::{FRAME_PAYLOAD_MAX, FRAME_RAW_MAX, Rules};

/// First bytes of every frame.
pub const FRAME_MAGIC: [u8; 4] = *b"HSfr";
/// Length of a frame's own head in bytes.
pub const FRAME_HEAD_BYTES: usize = 56;

/// A frame's own head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHead {
    /// Number of the frame, from 0.
    pub sequence: u32,
    /// Bytes of the zstd frame after this head.
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
    pub(crate) fn to_bytes(self) -> [u8; FRAME_HEAD_BYTES] {
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

    pub(crate) fn from_bytes(bytes: &[u8; FRAME_HEAD_BYTES]) -> Result<FrameHead, String> {
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
        let lengths = [
            (word(8), 1, FRAME_PAYLOAD_MAX, "compressed"),
            (word(12), 1, FRAME_RAW_MAX, "raw"),
        ];
        for (found, least, most, what) in lengths {
            if !(least..=most).contains(&(found as usize)) {
                return Err(format!(
                    "it claims {found} {what} bytes, expected {least} to {most}"
                ));
            }
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
    pub(crate) fn computed_check(self, payload: &[u8], seed: u64) -> u64 {
        let head = FrameHead { check: 0, ..self }.to_bytes();
        xxh3_64_with_seed(payload, xxh3_64_with_seed(&head, seed))
    }
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

/// A whole frame, checked and unpacked.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Where it lies and what it covers.
    pub place: IndexEntry,
    /// Its head.
    pub head: FrameHead,
    /// Its events as they are written; each was decoded once and found good.
    raw: Vec<u8>,
}

impl Frame {
    /// Unpacks a frame whose check and place were found good, and looks at each of its events. Returns the
    /// rules as its last event leaves them; an error says what is wrong with it.
    pub(crate) fn unpack(
        place: IndexEntry,
        head: FrameHead,
        payload: &[u8],
        mut rules: Rules,
    ) -> Result<(Frame, Rules), String> {
        let expected = head.raw_bytes as usize;
        // Into a buffer of the length that the head claims, which is bounded: zstd needs no window beside it.
        let raw = zstd::bulk::decompress(payload, expected)
            .map_err(|error| format!("it does not unpack: {error}"))?;
        if raw.len() != expected {
            return Err(format!(
                "it unpacks to {} bytes, expected {expected}",
                raw.len()
            ));
        }
        let frame = Frame { place, head, raw };
        let mut records = frame.records();
        while !records.is_at_end() {
            let before = records.position();
            let record = records
                .decode()
                .map_err(|error| format!("it does not decode: {error}"))?;
            if record.exits > head.through {
                return Err(format!(
                    "it has an event at exit {}, after its last exit",
                    record.exits
                ));
            }
            rules.admit(&record, records.position() - before)?;
        }
        Ok((frame, rules))
    }

    /// Its events, one at a time.
    pub fn records(&self) -> Records<&[u8]> {
        Records::new(&self.raw, self.head.first)
    }

    /// The same, for whoever has no more use for the frame.
    pub fn into_records(self) -> Records<Vec<u8>> {
        Records::new(self.raw, self.head.first)
    }
}

/// The events of a frame, decoded as they are asked for: a frame of a few MiB can say so much that all of it
/// at once would take a hundred times that.
#[derive(Clone, Debug)]
pub struct Records<B: AsRef<[u8]>> {
    raw: B,
    position: usize,
    codec: Codec,
}

impl<B: AsRef<[u8]>> Records<B> {
    fn new(raw: B, first: u64) -> Records<B> {
        Records {
            raw,
            position: 0,
            codec: Codec::new(first),
        }
    }

    /// How many raw bytes the events so far took.
    pub fn position(&self) -> usize {
        self.position
    }

    fn is_at_end(&self) -> bool {
        self.position == self.raw.as_ref().len()
    }

    fn decode(&mut self) -> Result<Record, postcard::Error> {
        let mut rest = &self.raw.as_ref()[self.position..];
        let before = rest.len();
        let record = self.codec.decode(&mut rest)?;
        self.position += before - rest.len();
        Ok(record)
    }
}

impl<B: AsRef<[u8]>> Iterator for Records<B> {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        if self.is_at_end() {
            return None;
        }
        let record = self.decode();
        Some(record.expect("the events of a frame are decoded before it is handed out"))
    }
}
