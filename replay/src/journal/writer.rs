//! Writes a journal, frame by frame.

use std::io::Write;

use hindsight_devices::Nanos;

use super::codec::Codec;
use super::event::{Event, Record};
use super::frame::{FrameHead, IndexEntry};
use super::header::Header;
use super::limits::{FRAME_RAW_GOAL, FRAME_RAW_MAX, HEADER_MAX, Rules};
use super::reader::RecordPlace;
use super::{JournalError, MAGIC, VERSION, head_check};

/// A frame that spans more guest time than this is closed at the next turn.
const FRAME_SPAN_NS: Nanos = 1_000_000_000;
/// Before the machine waits, a frame is closed if it spans more than this.
const FRAME_SPAN_IDLE_NS: Nanos = 250_000_000;
/// zstd's own default; higher levels gain a few percent for several times the work.
const ZSTD_LEVEL: i32 = 3;

/// Writes a journal to any sink.
#[derive(Debug)]
pub struct JournalWriter<W: Write> {
    sink: W,
    head_check: u64,
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
    /// How many records the open frame has, and the one before it.
    records: [u64; 2],
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
            head_check: seed,
            seed,
            sequence: 0,
            raw: Vec::new(),
            codec: Codec::new(0),
            rules: Some(Rules::at(0, header.machine.vcpus)),
            first: 0,
            last_close_ns: 0,
            offset: bytes.len() as u64,
            index: Vec::new(),
            records: [0; 2],
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
        let record = Record { exits, event };
        let before = (self.raw.len(), self.codec.clone(), self.rules);
        self.raw = self.codec.encode(std::mem::take(&mut self.raw), &record);
        self.records[0] += 1;
        let Some(rules) = &mut self.rules else {
            return Ok(());
        };
        let refused = match rules.admit(&record, self.raw.len() - before.0) {
            Ok(()) if self.raw.len() <= FRAME_RAW_MAX => return Ok(()),
            Ok(()) => format!("a frame has more than {FRAME_RAW_MAX} bytes, through exit {exits}"),
            Err(what) => what,
        };
        self.raw.truncate(before.0);
        self.records[0] -= 1;
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
        self.records = [0, self.records[0]];
        Ok(())
    }

    /// The check of the head.
    pub fn head_check(&self) -> u64 {
        self.head_check
    }

    /// Where the last record lies, if it is in a closed frame: as [`super::JournalReader::place`] says it that has just
    /// read it.
    pub fn place(&self) -> Option<RecordPlace> {
        let before = self.index.len().checked_sub(2);
        self.raw.is_empty().then(|| RecordPlace {
            frame_before: before.map(|before| self.index[before].offset),
            records: self.records[1],
            check: self.seed,
        })
    }

    /// The sink; what is not in a closed frame is lost.
    pub fn into_sink(self) -> W {
        self.sink
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
