//! Reads a journal, frame by frame.

use std::io::{self, Read, Seek, SeekFrom};

use hindsight_devices::Nanos;

use super::event::Record;
use super::frame::{FRAME_HEAD_BYTES, Frame, FrameHead, IndexEntry, Records};
use super::header::Header;
use super::limits::{HEADER_MAX, Rules};
use super::{JournalError, MAGIC, Tail, TailReason, VERSION, head_check};

/// Where a record lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecordPlace {
    /// Offset of the frame before the record's own; `None` if that is the first one.
    pub frame_before: Option<u64>,
    /// Its number in its frame, from 1; 0 for no record at all, before the first.
    pub records: u64,
    /// The check of its frame, which covers all of the journal up to there; of the head, if there is no record.
    pub check: u64,
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
    /// The frame that [`Self::next_record`] is in.
    records: Option<Records<Vec<u8>>>,
    /// The first frame: its offset, and what its check is seeded with.
    first: (u64, u64),
    /// Offsets of the last two frames that were read, the last one first.
    last: [Option<u64>; 2],
    /// Records of the last one that were taken.
    taken: u64,
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
        let rules = Rules::at(0, header.machine.vcpus);
        Ok(JournalReader {
            source,
            header,
            seed,
            sequence: 0,
            offset,
            through: 0,
            now: 0,
            rules,
            tail: None,
            records: None,
            first: (offset, seed),
            last: [None; 2],
            taken: 0,
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
    pub fn next_record(&mut self) -> Result<Option<Record>, JournalError> {
        loop {
            if let Some(record) = self.records.as_mut().and_then(Iterator::next) {
                self.taken += 1;
                return Ok(Some(record));
            }
            match self.next_frame()? {
                Some(frame) => self.records = Some(frame.into_records()),
                None => return Ok(None),
            }
        }
    }

    /// The next whole frame, or `None` after the last. Events of a frame before that nobody has asked for are
    /// passed over.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, JournalError> {
        // Before the next one is unpacked.
        self.records = None;
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
                self.last = [Some(self.offset), self.last[0]];
                self.taken = 0;
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

    /// Where the record lies that [`Self::next_record`] gave last.
    pub fn place(&self) -> RecordPlace {
        RecordPlace {
            frame_before: self.last[1],
            records: self.taken,
            check: self.seed,
        }
    }

    /// The place before the first record.
    pub fn start(&self) -> RecordPlace {
        RecordPlace {
            frame_before: None,
            records: 0,
            check: self.first.1,
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

impl<R: Read + Seek> JournalReader<R> {
    /// Goes to where the record at `place` has just been taken, and reads its frame. What comes before is not read,
    /// but for the head of one frame: it has the check that this one's is seeded with.
    pub fn go_to(&mut self, place: RecordPlace) -> Result<(), JournalError> {
        let (offset, seed) = self.first;
        let (mut at, mut next) = (offset, (seed, 0, 0, 0));
        if let Some(before) = place.frame_before {
            if before < offset || place.records == 0 {
                return Err(JournalError::Place(format!(
                    "no frame begins at byte {before}"
                )));
            }
            let head = self.frame_head_at(before)?;
            let bytes = FRAME_HEAD_BYTES as u64 + u64::from(head.compressed_bytes);
            at = before.saturating_add(bytes);
            let sequence = head.sequence.wrapping_add(1);
            next = (head.check, sequence, head.through, head.now);
        }
        self.seek(at)?;
        (self.seed, self.sequence, self.through, self.now) = next;
        self.offset = at;
        self.rules = Rules::at(self.through, self.header.machine.vcpus);
        self.tail = None;
        self.records = None;
        self.last = [place.frame_before, None];
        self.taken = 0;
        for taken in 0..place.records {
            // All in one frame.
            let record = match &mut self.records {
                None => self.next_record()?,
                Some(records) => records.next().inspect(|_| self.taken += 1),
            };
            if record.is_none() {
                let what = format!("the frame at byte {at} has no record {taken}");
                return Err(JournalError::Place(what));
            }
        }
        if self.seed != place.check {
            return Err(JournalError::Place(format!(
                "up to byte {} it is another journal: its check is {:016x}, expected {:016x}",
                self.offset, self.seed, place.check
            )));
        }
        Ok(())
    }

    fn frame_head_at(&mut self, offset: u64) -> Result<FrameHead, JournalError> {
        let mut bytes = [0; FRAME_HEAD_BYTES];
        self.seek(offset)?;
        let got = read_up_to(&mut self.source, &mut bytes)?;
        let head = match got == bytes.len() {
            true => FrameHead::from_bytes(&bytes),
            false => Err("the journal is over there".into()),
        };
        head.map_err(|what| {
            JournalError::Place(format!("no frame begins at byte {offset}: {what}"))
        })
    }

    fn seek(&mut self, offset: u64) -> Result<(), JournalError> {
        let found = self.source.seek(SeekFrom::Start(offset));
        found.map(drop).map_err(JournalError::Read)
    }
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
