//! Reads the door's answers from a journal, and checks the machine against it.
//!
//! Long, because all that is compared with a recording is here, in the order in which the loop passes it on.

use std::collections::VecDeque;
use std::io::{Read, Seek};

use hindsight_devices::{FirstReads, Input, Nanos, Room};

use super::closed::Closed;
use super::divergence::{Difference, Divergence, first_difference};
use super::recorder::WITNESS_EVERY;
use crate::journal::{
    Detail, Event, JournalError, JournalReader, Record, RecordPlace, TIME_MAX, TailReason,
};
use crate::machine::{
    Complete, Digest, End, Ending, FullDigest, Horizon, JournalPlace, LeftOpen, Likeness, Moment,
    Outside, Place, Position, TimeQuery, Turn, VcpuNumber,
};

/// How many turns a divergence report shows.
pub(super) const HISTORY: usize = 8;
/// No replay counts so far.
const COUNT_MAX: u64 = 1 << 62;

/// The door to a recorded world.
#[derive(Debug)]
pub struct Replayer<R: Read> {
    journal: JournalReader<R>,
    /// The next event, if it was looked at.
    ahead: Option<Record>,
    /// The last one that was taken.
    taken: RecordPlace,
    /// Stop here.
    until: Option<u64>,
    /// Or after the first exit at this time.
    until_time: Option<Nanos>,
    memory_every: Option<u64>,
    history: VecDeque<(u64, Turn)>,
    equal_through: u64,
    states_checked: u64,
    states_but_accessed: u64,
    witnesses_checked: u64,
    /// Met where nothing could be refused; the next look at the journal refuses.
    failed: Option<JournalError>,
}

impl<R: Read> Replayer<R> {
    /// A door to what `journal` holds, closed after exit `until` if given; digests memory every
    /// `memory_every` exits for whoever listens, beside what the journal asks for.
    pub fn new(
        journal: JournalReader<R>,
        until: Option<u64>,
        memory_every: Option<u64>,
    ) -> Replayer<R> {
        Replayer {
            taken: journal.start(),
            journal,
            ahead: None,
            until,
            until_time: None,
            memory_every,
            history: VecDeque::with_capacity(HISTORY + 1),
            equal_through: 0,
            states_checked: 0,
            states_but_accessed: 0,
            witnesses_checked: 0,
            failed: None,
        }
    }

    /// The door to what `journal` holds after `place`, as one is that has come there by itself. The place may come
    /// from a file: one that is not in this journal is refused.
    pub fn at(journal: JournalReader<R>, place: &JournalPlace) -> Result<Replayer<R>, JournalError>
    where
        R: Seek,
    {
        let mut replayer = Replayer::new(journal, None, None);
        replayer.go_to(place)?;
        Ok(replayer)
    }

    /// Goes to where a door to this journal was at `place`, wherever this one has come to. After an error it is not to be
    /// used until it was put somewhere else.
    pub fn go_to(&mut self, place: &JournalPlace) -> Result<(), JournalError>
    where
        R: Seek,
    {
        let counts = [
            place.equal_through,
            place.witnesses_checked,
            place.states_checked,
            place.states_but_accessed,
        ];
        let vcpus = self.journal.header().machine.vcpus;
        let is_possible = |(_, turn): &(u64, Turn)| turn.vcpu.is_among(vcpus);
        if place.history.len() > HISTORY
            || counts.iter().any(|count| *count > COUNT_MAX)
            || !place.history.iter().all(is_possible)
        {
            let what = "what was counted by then could not have been";
            return Err(JournalError::Place(what.into()));
        }
        self.taken = RecordPlace {
            frame_before: place.frame_before,
            records: place.records,
            check: place.check,
        };
        (self.ahead, self.failed) = (None, None);
        self.journal.go_to(self.taken)?;
        self.history = place.history.iter().copied().collect();
        self.equal_through = place.equal_through;
        self.states_checked = place.states_checked;
        self.states_but_accessed = place.states_but_accessed;
        self.witnesses_checked = place.witnesses_checked;
        Ok(())
    }

    /// Goes to the beginning, wherever it has come to.
    pub fn go_to_start(&mut self) -> Result<(), JournalError>
    where
        R: Seek,
    {
        let check = self.journal.start().check;
        self.go_to(&JournalPlace {
            check,
            ..JournalPlace::default()
        })
    }

    /// Closes after exit `until`, if given, and no longer where it closed before.
    pub fn close_after(&mut self, until: Option<u64>) {
        self.until = until;
    }

    /// Closes after the first exit at guest time `time` or later, if given, and no longer where it closed before.
    pub fn close_at_time(&mut self, time: Option<Nanos>) {
        self.until_time = time;
    }

    /// How many memory digests were compared and found equal, or equal but for Accessed bits of page tables.
    pub fn states_checked(&self) -> u64 {
        self.states_checked
    }

    /// How many of them were equal but for those bits.
    pub fn states_but_accessed(&self) -> u64 {
        self.states_but_accessed
    }

    /// How many witnesses were compared and found equal.
    pub fn witnesses_checked(&self) -> u64 {
        self.witnesses_checked
    }

    /// The journal.
    pub fn journal(&self) -> &JournalReader<R> {
        &self.journal
    }

    /// The next event, reading on if the present frame is used up.
    fn peek(&mut self) -> Result<Option<&Record>, JournalError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        if self.ahead.is_none() {
            self.ahead = self.journal.next_record()?;
        }
        Ok(self.ahead.as_ref())
    }

    /// Takes the next event if it belongs to `exits` and `wanted` turns it into something.
    fn take<T>(
        &mut self,
        exits: u64,
        wanted: impl FnOnce(&Event) -> Option<T>,
    ) -> Result<Option<T>, Closed> {
        let found = match self.peek()? {
            Some(record) if record.exits == exits => wanted(&record.event),
            _ => None,
        };
        if found.is_some() {
            self.forget_ahead();
        }
        Ok(found)
    }

    /// The event that was looked at is taken.
    fn forget_ahead(&mut self) {
        self.ahead = None;
        self.taken = self.journal.place();
    }

    /// Refuses to go on if the journal has an event for an exit before `exits`.
    fn nothing_missed(&mut self, exits: u64) -> Result<(), Closed> {
        let missed = match self.peek()? {
            Some(record) if record.exits < exits => record.to_string(),
            _ => return Ok(()),
        };
        let at = self.last_moment(exits);
        Err(self.diverged(at, Difference::Missed { expected: missed }))
    }

    /// Refuses a preemption that the recording does not have, and an exit where it has one.
    fn check_preemption(&mut self, query: &TimeQuery) -> Result<(), Closed> {
        let exits = query.exits;
        let expected = self.take(exits, |event| match event {
            Event::Preempted { vcpu, place } => Some((*vcpu, *place)),
            _ => None,
        })?;
        let found = query.preempted.map(|place| (query.vcpu, place));
        if expected == found {
            return Ok(());
        }
        let say = |preempted: Option<(VcpuNumber, Place)>| {
            preempted.map_or_else(
                || "an exit of its own".to_string(),
                |(vcpu, place)| Event::Preempted { vcpu, place }.to_string(),
            )
        };
        let difference = Difference::Preemption {
            expected: say(expected),
            found: say(found),
        };
        Err(self.diverged(self.last_moment(exits), difference))
    }

    /// No event is left: the recording was cut. Everything through its last exit is known.
    fn cut_short(&mut self, exits: u64) -> Result<(), Closed> {
        match self.journal.tail() {
            Some(tail) if exits >= tail.through && tail.reason != TailReason::Closed => {
                Err(Closed::CutShort(tail.clone()))
            }
            _ => Ok(()),
        }
    }

    fn last_moment(&self, exits: u64) -> Moment {
        self.history.back().map_or(
            Moment {
                exits,
                ..Moment::START
            },
            |(_, turn)| moment(exits, turn),
        )
    }

    /// Compares memory with what was recorded of it. Which records of its page tables a CPU has marked as accessed
    /// is no guest's doing, so a difference there is counted and does not end the replay.
    fn compare_state(
        &mut self,
        exits: u64,
        expected: Option<FullDigest>,
        found: Option<FullDigest>,
    ) -> Result<(), Closed> {
        let likeness = match (expected, found) {
            (None, None) => return Ok(()),
            (Some(expected), Some(found)) => expected.likeness(&found),
            _ => Likeness::Different,
        };
        if likeness == Likeness::Different {
            let difference = Difference::State { expected, found };
            return Err(self.diverged(self.last_moment(exits), difference));
        }
        self.states_checked += 1;
        self.states_but_accessed += u64::from(likeness == Likeness::ButAccessed);
        Ok(())
    }

    fn diverged(&self, at: Moment, difference: Difference) -> Closed {
        let history = self.history.iter().copied().collect();
        Closed::Diverged(Box::new(Divergence {
            at,
            difference,
            history,
        }))
    }
}

impl<R: Read> Outside for Replayer<R> {
    type Closed = Closed;

    fn time(&mut self, query: &TimeQuery) -> Result<Nanos, Closed> {
        let exits = query.exits;
        self.nothing_missed(exits)?;
        if self.peek()?.is_none() {
            self.cut_short(query.complete.exits)?;
        }
        self.check_preemption(query)?;
        let ahead = self.take(exits, |event| match event {
            Event::Time { ahead_ns } => Some(*ahead_ns),
            _ => None,
        })?;
        if ahead.is_none() && query.halted && query.deadline.is_none() {
            return Err(Closed::End(Ending::Halted));
        }
        let ahead_ns = ahead.unwrap_or(0);
        let what = match query.rule.checked_add_signed(ahead_ns) {
            Some(now) if (query.earliest..=TIME_MAX).contains(&now) => return Ok(now),
            Some(now) if now > TIME_MAX => {
                format!(
                    "guest time would be {now} ns, and no machine runs longer than {TIME_MAX} ns"
                )
            }
            _ => format!(
                "a time correction by {ahead_ns} ns from {} ns would run backwards from {} ns",
                query.rule, query.earliest
            ),
        };
        Err(self.diverged(self.last_moment(exits), Difference::Impossible { what }))
    }

    fn arrival(&mut self, exits: u64, room: &Room) -> Result<Option<Input>, Closed> {
        let input = self.take(exits, |event| match event {
            Event::Input(input) => Some(input.clone()),
            _ => None,
        })?;
        let (what, found, room) = match &input {
            Some(Input::Console(bytes)) => ("bytes typed", bytes.len(), room.console),
            Some(Input::VirtioConsole(bytes)) => ("bytes typed", bytes.len(), room.virtio_console),
            Some(Input::Entropy(bytes)) => ("random bytes", bytes.len(), room.entropy),
            Some(Input::Frame(_)) => ("frames", 1, room.frames),
            _ => return Ok(input),
        };
        if found > room {
            let what = format!("{found} {what} where there is room for {room}");
            return Err(self.diverged(self.last_moment(exits), Difference::Impossible { what }));
        }
        Ok(input)
    }

    fn first_reads(&mut self, exits: u64, reads: &FirstReads) -> Result<(), Closed> {
        let expected = self.take(exits, |event| match event {
            Event::FirstReads { check } => Some(*check),
            _ => None,
        })?;
        if expected == Some(reads.check) {
            return Ok(());
        }
        if self.peek()?.is_none() {
            self.cut_short(exits - 1)?;
        }
        let difference = Difference::Image {
            disk: reads.disk,
            offset: reads.offset,
            bytes: reads.bytes,
            expected: expected.map_or("nothing is read".into(), |check| format!("{check:016x}")),
            found: format!("{:016x}", reads.check),
        };
        Err(self.diverged(self.last_moment(exits), difference))
    }

    fn posted(&mut self, exits: u64, bytes: &[u8]) -> Result<(), Closed> {
        let recorded = self.take(exits, |event| match event {
            Event::Posted(bytes) => Some(bytes.clone()),
            _ => None,
        })?;
        let expected = match recorded {
            Some(expected) => expected,
            None if self.journal.header().detail == Detail::Full => Vec::new(),
            None => return Ok(()),
        };
        if expected == bytes {
            return Ok(());
        }
        let difference = Difference::Turn {
            field: "what was written without an exit",
            expected: format!("\"{}\"", expected.escape_ascii()),
            found: format!("\"{}\"", bytes.escape_ascii()),
        };
        Err(self.diverged(self.last_moment(exits), difference))
    }

    fn turn(&mut self, exits: u64, turn: &Turn, digest: Digest) -> Result<(), Closed> {
        let at = moment(exits, turn);
        let recorded = self.take(exits, |event| match event {
            Event::Turn(recorded) => Some(**recorded),
            _ => None,
        })?;
        if let Some(recorded) = recorded
            && let Some((field, expected, found)) = first_difference(&recorded, turn)
        {
            return Err(self.diverged(
                at,
                Difference::Turn {
                    field,
                    expected,
                    found,
                },
            ));
        }
        self.history.push_back((exits, *turn));
        if self.history.len() > HISTORY {
            self.history.pop_front();
        }
        let check = self.take(exits, |event| match event {
            Event::Witness { check } => Some(*check),
            _ => None,
        })?;
        if let Some(expected) = check {
            let found = digest.check();
            if expected != found {
                let equal_through = self.equal_through;
                let difference = Difference::Witness {
                    equal_through,
                    expected,
                    found,
                };
                return Err(self.diverged(at, difference));
            }
            self.witnesses_checked += 1;
        }
        // A journal that lost its checks must not pass for one that agrees.
        let missing = if recorded.is_none() && self.journal.header().detail == Detail::Full {
            Some("turn")
        } else if check.is_none() && exits.is_multiple_of(WITNESS_EVERY) {
            Some("witness")
        } else {
            None
        };
        if let Some(missing) = missing {
            let what = format!("it has no {missing} for exit {exits}");
            return Err(self.diverged(at, Difference::Impossible { what }));
        }
        if recorded.is_some() || check.is_some() {
            self.equal_through = exits;
        }
        Ok(())
    }

    fn interrupt(&mut self, at: &Moment, vector: u8) -> Result<(), Closed> {
        let expected = match self.peek()? {
            Some(Record {
                event: Event::Interrupt { vector: v, at: a },
                ..
            }) if *v == vector && a == at => {
                self.forget_ahead();
                return Ok(());
            }
            Some(record) => record.to_string(),
            None => {
                self.cut_short(at.exits)?;
                format!("no more interrupts through exit {}", self.journal.through())
            }
        };
        let found = Record {
            exits: at.exits,
            event: Event::Interrupt { vector, at: *at },
        }
        .to_string();
        Err(self.diverged(*at, Difference::Interrupt { expected, found }))
    }

    fn left_open(&mut self, exits: u64, what: LeftOpen) -> Result<(), Closed> {
        let expected = self.take(exits, |event| match event {
            Event::LeftOpen(what) => Some(*what),
            _ => None,
        })?;
        if expected == Some(what) {
            return Ok(());
        }
        if expected.is_none() && self.peek()?.is_none() {
            self.cut_short(exits)?;
        }
        let difference = Difference::Turn {
            field: "what is left open",
            expected: expected.map_or("nothing".into(), |what| what.to_string()),
            found: what.to_string(),
        };
        Err(self.diverged(self.last_moment(exits), difference))
    }

    fn wants_state(&mut self, exits: u64) -> bool {
        let recorded = match self.peek() {
            Ok(Some(Record {
                exits: at,
                event: Event::State { .. },
            })) => *at == exits,
            Ok(_) => false,
            Err(error) => {
                self.failed = Some(error);
                false
            }
        };
        recorded
            || self
                .memory_every
                .is_some_and(|every| exits.is_multiple_of(every))
    }

    fn state(&mut self, exits: u64, digest: FullDigest) -> Result<(), Closed> {
        let recorded = self.take(exits, |event| match event {
            Event::State { digest } => Some(*digest),
            _ => None,
        })?;
        let Some(expected) = recorded else {
            return Ok(());
        };
        self.compare_state(exits, Some(expected), Some(digest))
    }

    fn horizon(&mut self, position: &Position) -> Result<Horizon, Closed> {
        let exits = position.exits;
        let late = self.until_time.is_some_and(|time| position.now >= time);
        if late || self.until.is_some_and(|until| exits >= until) {
            return Err(Closed::Reached(exits));
        }
        let expected = match self.peek()? {
            None => {
                self.cut_short(exits)?;
                return Ok(Horizon::Exit);
            }
            Some(record) if record.exits > exits => {
                return Ok(match record.event {
                    // The place of another vCPU is not a place of this one's: its next exit differs.
                    Event::Preempted { vcpu, place }
                        if record.exits == exits + 1 && vcpu == position.vcpu =>
                    {
                        Horizon::At(place)
                    }
                    _ => Horizon::Exit,
                });
            }
            Some(Record {
                event: Event::Interrupt { .. },
                ..
            }) if position.pending => return Ok(Horizon::Exit),
            Some(Record {
                event: Event::End(end),
                ..
            }) if end.ending == Ending::StoppedRunning => {
                return Err(Closed::End(Ending::StoppedRunning));
            }
            Some(record) => record.to_string(),
        };
        Err(self.diverged(self.last_moment(exits), Difference::Missed { expected }))
    }

    fn kicked(&mut self, _standing: &Position) -> Result<(), Closed> {
        Ok(())
    }

    fn stopped(&mut self, position: &Position) -> Result<(), Closed> {
        Err(Closed::Stopped(position.exits))
    }

    fn place(&self) -> Option<JournalPlace> {
        Some(JournalPlace {
            frame_before: self.taken.frame_before,
            records: self.taken.records,
            check: self.taken.check,
            equal_through: self.equal_through,
            witnesses_checked: self.witnesses_checked,
            states_checked: self.states_checked,
            states_but_accessed: self.states_but_accessed,
            history: self.history.iter().copied().collect(),
        })
    }

    fn abandon(&mut self, _complete: Complete) -> Result<(), Closed> {
        Ok(())
    }

    fn end(&mut self, exits: u64, found: &End) -> Result<(), Closed> {
        let at = self.last_moment(exits);
        let expected = match self.peek()? {
            Some(Record {
                exits: recorded,
                event: Event::End(end),
            }) if *recorded == exits => end.clone(),
            Some(record) => {
                let expected = record.to_string();
                let found = format!("exit {exits}: end: {found}");
                return Err(self.diverged(
                    at,
                    Difference::End {
                        field: "the end",
                        expected,
                        found,
                    },
                ));
            }
            None => {
                self.cut_short(exits)?;
                let expected = "a journal that goes on".to_string();
                let found = format!("exit {exits}: end: {found}");
                return Err(self.diverged(
                    at,
                    Difference::End {
                        field: "the end",
                        expected,
                        found,
                    },
                ));
            }
        };
        let fields = [
            (
                "how it ended",
                expected.ending.to_string(),
                found.ending.to_string(),
            ),
            (
                "guest time",
                expected.now.to_string(),
                found.now.to_string(),
            ),
            (
                "the digest",
                format!("{:016x}", expected.digest),
                format!("{:016x}", found.digest),
            ),
            (
                "the panic",
                format!("{:?}", expected.panic),
                format!("{:?}", found.panic),
            ),
        ];
        for (field, expected, found) in fields {
            if expected != found {
                return Err(self.diverged(
                    at,
                    Difference::End {
                        field,
                        expected,
                        found,
                    },
                ));
            }
        }
        self.compare_state(exits, expected.state, found.state)?;
        self.forget_ahead();
        // Look after the end: a file that was tampered with or glued together is not whole.
        assert!(
            self.peek()?.is_none(),
            "the reader lets no event through after the end"
        );
        match self.journal.tail() {
            Some(tail) if tail.reason != TailReason::Closed => Err(Closed::CutShort(tail.clone())),
            _ => Ok(()),
        }
    }
}

/// Where `turn` was the last to happen when exit `exits` differed.
fn moment(exits: u64, turn: &Turn) -> Moment {
    Moment {
        exits,
        vcpu: turn.vcpu,
        branches: 0,
        rip: turn.registers.rip(),
        rcx: turn.registers.rcx(),
    }
}
