//! Writes down what passes through another door.
//!
//! Over a [`super::Live`] door this is the recorder; over a [`super::Replayer`] it turns one
//! recording into another of a different detail. Over first the one and then the other it is the recording of a
//! machine that was replayed up to a moment and is live from there on.

use std::io::{Read, Write};

use hindsight_devices::{FirstReads, Input, Nanos, Room};

use super::closed::Closed;
use super::replayer::HISTORY;
use crate::journal::{
    Detail, Event, Header, IndexEntry, JournalError, JournalReader, JournalWriter, RecordPlace,
};
use crate::machine::{
    Complete, Digest, End, FullDigest, Horizon, JournalPlace, LeftOpen, Moment, Outside, Position,
    TimeQuery, Turn,
};

/// How many exits there are from one witness of the digest to the next: drift is noticed at most this late
/// where a recording holds no whole turns.
pub const WITNESS_EVERY: u64 = 16;

/// A door that writes down what the door that it wraps says.
#[derive(Debug)]
pub struct Recorder<O: Outside<Closed = Closed>, W: Write> {
    inner: O,
    journal: JournalWriter<W>,
    detail: Detail,
    counts: [u64; Event::KINDS],
    /// What belongs to an exit whose turn has not come yet: it is written when the turn is.
    pending: Vec<Event>,
    /// The exit of the last turn.
    complete: Complete,
    /// The turn of that exit is over, and nothing has happened since.
    at_exit: bool,
    /// Close at the first exit at this guest time or later.
    until_time: Option<Nanos>,
    /// What a replay has counted and remembers by now, if anybody wants to know.
    replayed: Option<JournalPlace>,
}

impl<O: Outside<Closed = Closed>, W: Write> Recorder<O, W> {
    /// Starts a journal in `sink` for what passes through `inner`.
    pub fn create(inner: O, sink: W, header: &Header) -> Result<Recorder<O, W>, JournalError> {
        let journal = JournalWriter::create(sink, header)?;
        Ok(Recorder {
            inner,
            journal,
            detail: header.detail,
            counts: [0; Event::KINDS],
            pending: Vec::new(),
            complete: Complete::default(),
            at_exit: false,
            until_time: None,
            replayed: None,
        })
    }

    /// Bytes of journal written so far.
    pub fn journal_bytes(&self) -> u64 {
        self.journal.bytes()
    }

    /// The check of the journal's head.
    pub fn head_check(&self) -> u64 {
        self.journal.head_check()
    }

    /// The frames written so far.
    pub fn index(&self) -> &[IndexEntry] {
        self.journal.index()
    }

    /// Events written so far, by [`Event::kind`].
    pub fn counts(&self) -> &[u64; Event::KINDS] {
        &self.counts
    }

    /// The door that this one wraps; what is not in a closed frame is lost.
    pub fn into_inner(self) -> O {
        self.inner
    }

    /// The sink that the journal was written to; what is not in a closed frame is lost.
    pub fn into_sink(self) -> W {
        self.journal.into_sink()
    }

    /// The door that this one wraps.
    pub fn inner(&mut self) -> &mut O {
        &mut self.inner
    }

    /// The same recorder around another door, from between two turns on: where [`Outside::horizon`] has closed.
    pub fn map_inner<P>(self, exchange: impl FnOnce(O) -> P) -> Recorder<P, W>
    where
        P: Outside<Closed = Closed>,
    {
        assert!(
            self.pending.is_empty(),
            "doors are exchanged between two turns"
        );
        let Recorder {
            inner,
            journal,
            detail,
            counts,
            pending,
            complete,
            at_exit,
            until_time,
            replayed,
        } = self;
        Recorder {
            inner: exchange(inner),
            journal,
            detail,
            counts,
            pending,
            complete,
            at_exit,
            until_time,
            replayed,
        }
    }

    /// From here on, which is power-on, it can tell where a replay is in its journal that has come as far: see
    /// [`Outside::place`].
    pub fn tell_places(&mut self) {
        assert_eq!(self.complete, Complete::default(), "nothing has happened");
        self.replayed = Some(JournalPlace::default());
    }

    /// Closes after the first exit at guest time `time` or later, if given, and no longer where it closed before.
    pub fn close_at_time(&mut self, time: Option<Nanos>) {
        self.until_time = time;
    }

    /// Closes the frame, where the turn of an exit is over: what was said is in the sink.
    pub fn close_frame(&mut self) -> Result<(), JournalError> {
        assert!(self.pending.is_empty(), "a frame ends between two turns");
        let Complete { exits, now } = self.complete;
        self.journal.close_frame(exits, now)
    }

    /// Begins with what another journal of the same machine says up to `place`, which the inner door goes on from;
    /// `complete` is the last exit before it. Of whole turns nothing is written that this journal's detail does
    /// not ask for.
    pub fn copy(
        &mut self,
        journal: &mut JournalReader<impl Read>,
        place: &JournalPlace,
        complete: Complete,
    ) -> Result<(), JournalError> {
        self.complete = complete;
        if self.detail == Detail::Full && journal.header().detail != Detail::Full {
            let what = "its journal does not hold every turn up to there";
            return Err(JournalError::Place(what.into()));
        }
        let (mut frame_before, mut left) = (None, place.records);
        while left > 0 {
            let Some(frame) = journal.next_frame()? else {
                let what = "its journal does not come as far as that";
                return Err(JournalError::Place(what.into()));
            };
            let is_last = frame_before == place.frame_before;
            let count = if is_last { left } else { u64::MAX };
            for record in frame.records().take(count as usize) {
                left -= u64::from(is_last);
                let of_turns = matches!(record.event, Event::Turn(_) | Event::Posted(_));
                if self.detail == Detail::Full || !of_turns {
                    self.append(record.exits, record.event)?;
                }
            }
            if is_last && left > 0 {
                let what = "its journal has fewer records there";
                return Err(JournalError::Place(what.into()));
            }
            if !is_last {
                self.journal
                    .close_frame(frame.place.through, frame.place.now)?;
            }
            frame_before = Some(frame.place.offset);
        }
        Ok(())
    }

    fn append(&mut self, exits: u64, event: Event) -> Result<(), JournalError> {
        let kind = event.kind();
        self.journal.append(exits, event)?;
        self.counts[kind] += 1;
        Ok(())
    }

    /// Writes what was said before the turn at `exits`, or before an end without one.
    fn append_pending(&mut self, exits: u64) -> Result<(), JournalError> {
        for event in std::mem::take(&mut self.pending) {
            self.append(exits, event)?;
        }
        Ok(())
    }
}

impl<O: Outside<Closed = Closed>, W: Write> Outside for Recorder<O, W> {
    type Closed = Closed;

    fn time(&mut self, query: &TimeQuery) -> Result<Nanos, Closed> {
        // Everything that belongs to earlier exits has been said by now.
        let Complete { exits, now } = query.complete;
        self.journal.turn_is_complete(exits, now, query.halted)?;
        let now = self.inner.time(query)?;
        // First of all that belongs to its exit: a replay must know it before the guest runs there.
        if let Some(place) = query.preempted {
            let vcpu = query.vcpu;
            self.pending.push(Event::Preempted { vcpu, place });
        }
        let ahead_ns = now.wrapping_sub(query.rule).cast_signed();
        // A halted machine without a deadline is woken by the world alone: without an event here,
        // replay would take it for one that nothing can wake.
        let woken_by_world = query.halted && query.deadline.is_none();
        if ahead_ns != 0 || woken_by_world {
            self.pending.push(Event::Time { ahead_ns });
        }
        Ok(now)
    }

    fn wants_sites(&self) -> bool {
        self.inner.wants_sites()
    }

    fn arrival(&mut self, exits: u64, room: &Room) -> Result<Option<Input>, Closed> {
        let input = self.inner.arrival(exits, room)?;
        self.pending.extend(input.clone().map(Event::Input));
        Ok(input)
    }

    fn first_reads(&mut self, exits: u64, reads: &FirstReads) -> Result<(), Closed> {
        let check = reads.check;
        self.pending.push(Event::FirstReads { check });
        self.inner.first_reads(exits, reads)
    }

    fn send(&mut self, frame: &[u8]) {
        self.inner.send(frame);
    }

    fn posted(&mut self, exits: u64, bytes: &[u8]) -> Result<(), Closed> {
        if self.detail == Detail::Full && !bytes.is_empty() {
            self.pending.push(Event::Posted(bytes.to_vec()));
        }
        self.inner.posted(exits, bytes)
    }

    fn turn(&mut self, exits: u64, turn: &Turn, digest: Digest) -> Result<(), Closed> {
        self.complete = Complete {
            exits,
            now: turn.now,
        };
        self.inner.turn(exits, turn, digest)?;
        self.append_pending(exits)?;
        if self.detail == Detail::Full {
            self.append(exits, Event::Turn(Box::new(*turn)))?;
        }
        let is_witness = exits.is_multiple_of(WITNESS_EVERY);
        if is_witness {
            let check = digest.check();
            self.append(exits, Event::Witness { check })?;
        }
        self.at_exit = true;
        if let Some(replayed) = &mut self.replayed {
            replayed.history.push((exits, *turn));
            if replayed.history.len() > HISTORY {
                replayed.history.remove(0);
            }
            replayed.witnesses_checked += u64::from(is_witness);
            if is_witness || self.detail == Detail::Full {
                replayed.equal_through = exits;
            }
        }
        Ok(())
    }

    fn interrupt(&mut self, at: &Moment, vector: u8) -> Result<(), Closed> {
        self.inner.interrupt(at, vector)?;
        self.append(at.exits, Event::Interrupt { vector, at: *at })?;
        let Complete { exits, now } = self.complete;
        self.journal.close_if_full(exits, now)?;
        Ok(())
    }

    fn left_open(&mut self, exits: u64, what: LeftOpen) -> Result<(), Closed> {
        self.inner.left_open(exits, what)?;
        // What belongs to an end without a turn, the time among it, comes before.
        self.append_pending(exits)?;
        self.append(exits, Event::LeftOpen(what))?;
        Ok(())
    }

    fn wants_state(&mut self, exits: u64) -> bool {
        self.inner.wants_state(exits)
    }

    fn state(&mut self, exits: u64, digest: FullDigest) -> Result<(), Closed> {
        self.inner.state(exits, digest)?;
        self.append(exits, Event::State { digest })?;
        if let Some(replayed) = &mut self.replayed {
            replayed.states_checked += 1;
        }
        Ok(())
    }

    fn horizon(&mut self, position: &Position) -> Result<Horizon, Closed> {
        let at_exit = std::mem::take(&mut self.at_exit);
        if at_exit && self.until_time.is_some_and(|time| position.now >= time) {
            return Err(Closed::Reached(position.exits));
        }
        self.inner.horizon(position)
    }

    fn kicked(&mut self, position: &Position) -> Result<(), Closed> {
        self.inner.kicked(position)
    }

    fn stopped(&mut self, position: &Position) -> Result<(), Closed> {
        self.inner.stopped(position)
    }

    fn end(&mut self, exits: u64, end: &End) -> Result<(), Closed> {
        self.inner.end(exits, end)?;
        self.append_pending(exits)?;
        self.append(exits, Event::End(Box::new(end.clone())))?;
        self.journal.close_frame(exits, end.now)?;
        Ok(())
    }

    /// Of a replay of what it writes; known where a frame was just closed.
    fn place(&self) -> Option<JournalPlace> {
        let RecordPlace {
            frame_before,
            records,
            check,
        } = self.journal.place()?;
        self.replayed.clone().map(|replayed| JournalPlace {
            frame_before,
            records,
            check,
            ..replayed
        })
    }

    fn abandon(&mut self, complete: Complete) -> Result<(), Closed> {
        // Of a later exit, whose turn will not come.
        self.pending.clear();
        self.journal.close_frame(complete.exits, complete.now)?;
        self.inner.abandon(complete)
    }
}
