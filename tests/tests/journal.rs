//! The journal as a file: what is written is read, and damage has a name and a place.

mod arbitrary;
mod journal_bounds;

use std::io::{self, Read, Write};

use hindsight_devices::{Input, NoDisks};
use hindsight_replay::{Closed, IndexEntry};
use hindsight_replay::{
    Detail, Event, FRAME_HEAD_BYTES, Frame, Header, JournalError, JournalReader, JournalWriter,
    Live, MAGIC, Moment, Patience, Record, Recorder, Replayer, RunError, Tail, TailReason, VERSION,
};
use hindsight_tests::drive;
use hindsight_tests::sim::{Recording, Scenario, Trace, Verdict, machine_of, replay};
use hindsight_tests::sim_world::SimWorld;
use hindsight_tests::toy_cpu::ToyCpu;
use proptest::prelude::*;

fn header() -> Header {
    Scenario::new(0).header(Detail::Full)
}

/// What goes into one frame: events with their distance in exits, and how much further the frame
/// says it is complete.
type FramePlan = (Vec<(u64, Event)>, u64);

fn frame_plan() -> impl Strategy<Value = FramePlan> {
    let distance = prop_oneof![4 => 0..3u64, 1 => 0..100_000u64, 1 => Just(1 << 40)];
    (
        proptest::collection::vec((distance, arbitrary::event()), 1..12),
        0..100u64,
    )
}

/// A journal whose checks are right, whatever its head and its frames say.
fn sealed(header: &Header, frames: &[&[u8]]) -> Vec<u8> {
    let head = postcard::to_stdvec(header).expect("plain values serialise");
    drive::seal_journal(&head, frames.iter().copied())
}

/// Writes frames; returns the file, what was said in each frame, and where the frames lie.
fn written(
    header: &Header,
    plan: &[FramePlan],
    end: Option<&Event>,
) -> (Vec<u8>, Vec<Vec<Record>>, Vec<IndexEntry>) {
    let mut journal = Vec::new();
    let mut writer = JournalWriter::create(&mut journal, header).expect("a Vec takes all");
    let mut frames = Vec::new();
    let (mut exits, mut now) = (0, 0);
    for (number, (events, further)) in plan.iter().enumerate() {
        let mut records = Vec::new();
        for (distance, event) in events {
            exits += distance;
            let mut event = event.clone();
            match &mut event {
                Event::Turn(turn) => {
                    now += turn.now;
                    turn.now = now;
                }
                Event::Interrupt { at, .. } => at.exits = exits,
                _ => {}
            }
            writer.append(exits, event.clone()).expect("it is possible");
            records.push(Record { exits, event });
        }
        if let Some(end) = end.filter(|_| number + 1 == plan.len()) {
            writer.append(exits, end.clone()).expect("it is possible");
            records.push(Record {
                exits,
                event: end.clone(),
            });
        }
        exits += further;
        writer.close_frame(exits, now).expect("a Vec takes all");
        frames.push(records);
    }
    let index = writer.index().to_vec();
    (journal, frames, index)
}

fn read(source: impl Read) -> Result<(Vec<Frame>, Tail), JournalError> {
    let mut reader = JournalReader::open(source)?;
    let mut frames = Vec::new();
    while let Some(frame) = reader.next_frame()? {
        frames.push(frame);
    }
    assert!(
        reader.next_frame()?.is_none(),
        "there is nothing after the tail"
    );
    Ok((
        frames,
        reader.tail().expect("known after the last frame").clone(),
    ))
}

/// Gives and takes one byte at a time, and is interrupted every second time.
struct Dribble<T>(T, bool);

impl<T> Dribble<T> {
    fn pause(&mut self) -> io::Result<()> {
        self.1 = !self.1;
        if self.1 {
            Err(io::ErrorKind::Interrupted.into())
        } else {
            Ok(())
        }
    }
}

impl<R: Read> Read for Dribble<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.pause()?;
        let one = buffer.len().min(1);
        self.0.read(&mut buffer[..one])
    }
}

impl<W: Write> Write for Dribble<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.pause()?;
        self.0.write(&buffer[..buffer.len().min(1)])
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// A disk with room for a number of bytes.
struct Disk {
    bytes: Vec<u8>,
    room: usize,
}

impl Write for &mut Disk {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.room - self.bytes.len());
        if count == 0 && !buffer.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend(&buffer[..count]);
        Ok(count)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Fails once, before the byte at `fails_at`; whoever asks again reads on.
struct FailsOnce<'a> {
    bytes: &'a [u8],
    at: usize,
    fails_at: Option<usize>,
}

impl Read for FailsOnce<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.fails_at == Some(self.at) {
            self.fails_at = None;
            return Err(io::Error::other("bad sector"));
        }
        let end = self
            .fails_at
            .unwrap_or(self.bytes.len())
            .min(self.at + buffer.len());
        let count = end.max(self.at) - self.at;
        buffer[..count].copy_from_slice(&self.bytes[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_is_written_is_read(
        plan in proptest::collection::vec(frame_plan(), 0..6),
        end in proptest::option::of(arbitrary::end()),
    ) {
        let header = header();
        let (journal, said, index) = written(&header, &plan, end.as_ref());
        let reader = JournalReader::open(journal.as_slice()).unwrap();
        prop_assert_eq!(reader.header(), &header);
        let (frames, tail) = read(journal.as_slice()).unwrap();
        prop_assert_eq!(frames.iter().map(|f| f.place).collect::<Vec<_>>(), index);
        for (frame, said) in frames.iter().zip(&said) {
            let mut records = frame.records();
            for said in said {
                prop_assert_eq!(records.next(), Some(said.clone()));
            }
            prop_assert_eq!(records.next(), None);
            prop_assert_eq!(records.position(), frame.head.raw_bytes as usize);
        }
        prop_assert_eq!(frames.len(), said.len());
        prop_assert_eq!(tail.offset, journal.len() as u64);
        prop_assert_eq!(tail.through, frames.last().map_or(0, |frame| frame.head.through));
        let closed = end.is_some() && !plan.is_empty();
        prop_assert_eq!(tail.reason == TailReason::Closed, closed);
        prop_assert_eq!(tail.reason == TailReason::NotClosed, !closed);
    }

    #[test]
    fn a_frame_says_the_same_whatever_came_before_it(
        one in frame_plan(), other in frame_plan(), mut frame in frame_plan(),
    ) {
        // Turns count guest time from the frame before them in this test's own writer.
        frame.0.retain(|(_, event)| !matches!(event, Event::Turn(_)));
        prop_assume!(!frame.0.is_empty());
        let reach = |plan: &FramePlan| plan.0.iter().map(|(distance, _)| distance).sum::<u64>();
        let through = reach(&one).max(reach(&other));
        let payload = |before: &FramePlan| {
            let before = (before.0.clone(), through - reach(before));
            let (journal, said, index) = written(&header(), &[before, frame.clone()], None);
            let at = index[1].offset as usize + FRAME_HEAD_BYTES;
            (journal[at..].to_vec(), said[1].clone())
        };
        prop_assert_eq!(payload(&one), payload(&other));
    }

    #[test]
    fn short_writes_short_reads_and_signals_change_nothing(
        plan in proptest::collection::vec(frame_plan(), 1..3),
    ) {
        let (journal, said, _) = written(&header(), &plan, None);
        let mut slow = Dribble(Vec::new(), false);
        let mut writer = JournalWriter::create(&mut slow, &header()).unwrap();
        let mut now = 0;
        for (records, (_, further)) in said.iter().zip(&plan) {
            let mut exits = 0;
            for record in records {
                if let Event::Turn(turn) = &record.event {
                    now = turn.now;
                }
                writer.append(record.exits, record.event.clone()).unwrap();
                exits = record.exits;
            }
            writer.close_frame(exits + further, now).unwrap();
        }
        prop_assert_eq!(&slow.0, &journal);
        let (frames, _) = read(Dribble(journal.as_slice(), false)).unwrap();
        let found: Vec<Vec<_>> = frames.iter().map(|frame| frame.records().collect()).collect();
        prop_assert_eq!(found, said);
    }
}

/// A small journal of three frames, from a plan that never changes.
fn small() -> (Vec<u8>, Vec<IndexEntry>) {
    let at = Moment {
        rip: 0x1234,
        rcx: 7,
        ..Moment::START
    };
    let frame = |n: u64| {
        let events = vec![
            (
                1,
                Event::Time {
                    ahead_ns: 5 - n as i64,
                },
            ),
            (0, Event::Input(Input::Console(vec![n as u8; 30]))),
            (n, Event::Interrupt { vector: 0x30, at }),
            (
                2,
                Event::Witness {
                    check: [n as u8, 1],
                },
            ),
        ];
        (events, n)
    };
    let (journal, _, index) = written(&header(), &[frame(0), frame(1), frame(2)], None);
    (journal, index)
}

#[test]
fn a_file_of_another_kind_is_not_a_journal() {
    let (journal, _) = small();
    for damage in 0..MAGIC.len() {
        let mut journal = journal.clone();
        journal[damage] ^= 0x20;
        let error = JournalReader::open(journal.as_slice()).unwrap_err();
        assert!(matches!(error, JournalError::NotAJournal { .. }), "{error}");
    }
    for length in 0..MAGIC.len() {
        let error = JournalReader::open(&journal[..length]).unwrap_err();
        assert!(matches!(&error, JournalError::NotAJournal { found } if found.len() == length));
    }
    // A copy in text mode loses the carriage return.
    let text: Vec<u8> = journal
        .iter()
        .copied()
        .filter(|byte| *byte != b'\r')
        .collect();
    let error = JournalReader::open(text.as_slice()).unwrap_err();
    assert!(matches!(error, JournalError::NotAJournal { .. }), "{error}");
}

#[test]
fn another_version_is_named() {
    let (mut journal, _) = small();
    for version in [0, VERSION + 1, u32::MAX] {
        journal[8..12].copy_from_slice(&version.to_le_bytes());
        let error = JournalReader::open(journal.as_slice()).unwrap_err();
        assert!(
            matches!(error, JournalError::Version { found } if found == version),
            "{error}"
        );
        assert!(error.to_string().contains(&version.to_string()));
    }
}

#[test]
fn a_head_with_devices_that_no_machine_has_is_refused() {
    let disk = |bytes| hindsight_devices::DiskSpec {
        bytes,
        read_only: false,
        serial: String::new(),
    };
    for disks in [vec![disk(512); 9], vec![disk(0)], vec![disk(513)]] {
        let mut header = header();
        header.machine.devices.disks = disks;
        let mut journal = Vec::new();
        let refused = JournalWriter::create(&mut journal, &header);
        assert!(matches!(refused, Err(JournalError::Impossible(_))));
        assert!(journal.is_empty(), "nothing was written");
        let journal = sealed(&header, &[]);
        let refused = JournalReader::open(journal.as_slice());
        assert!(matches!(refused, Err(JournalError::Impossible(_))));
    }
}

#[test]
fn a_damaged_head_is_named() {
    let (journal, index) = small();
    let head = index[0].offset as usize;
    for place in 12..head {
        let mut journal = journal.clone();
        journal[place] ^= 1;
        let error = JournalReader::open(journal.as_slice()).unwrap_err();
        assert!(
            matches!(error, JournalError::Head(_)),
            "byte {place}: {error}"
        );
    }
    for length in MAGIC.len()..head {
        let error = JournalReader::open(&journal[..length]).unwrap_err();
        assert!(
            matches!(error, JournalError::Head(_)),
            "{length} bytes: {error}"
        );
    }
    let mut journal = journal.clone();
    journal[12..16].fill(0xff);
    let error = JournalReader::open(journal.as_slice()).unwrap_err();
    assert!(
        matches!(error, JournalError::Head(_)),
        "4 GiB of head: {error}"
    );
}

#[test]
fn a_frame_that_claims_too_much_is_refused_before_it_is_believed() {
    let (journal, index) = small();
    let at = index[1].offset as usize;
    for field in [8, 12] {
        let mut journal = journal.clone();
        journal[at + field..at + field + 4].fill(0xff);
        let (frames, tail) = read(journal.as_slice()).unwrap();
        assert_eq!(frames.len(), 1);
        assert_eq!(
            (tail.offset, tail.through),
            (index[1].offset, index[0].through)
        );
        assert!(matches!(tail.reason, TailReason::Damaged(_)), "{tail}");
    }
}

#[test]
fn a_full_disk_loses_at_most_the_last_frame() {
    let (journal, index) = small();
    let (frames, _) = read(journal.as_slice()).unwrap();
    for room in 0..=journal.len() {
        let mut disk = Disk {
            bytes: Vec::new(),
            room,
        };
        let mut written = 0;
        let result = JournalWriter::create(&mut disk, &header()).and_then(|mut writer| {
            for frame in &frames {
                for record in frame.records() {
                    writer.append(record.exits, record.event)?;
                }
                writer.close_frame(frame.head.through, frame.head.now)?;
                written += 1;
            }
            Ok(())
        });
        assert_eq!(result.is_ok(), room == journal.len());
        assert_eq!(
            disk.bytes,
            journal[..room],
            "what is on the disk is a beginning of the journal"
        );
        if room < index[0].offset as usize {
            assert!(read(disk.bytes.as_slice()).is_err());
            continue;
        }
        let (found, tail) = read(disk.bytes.as_slice()).unwrap();
        assert_eq!(
            found.len(),
            written,
            "every frame that was closed without an error is there"
        );
        assert_eq!(
            tail.through,
            found.last().map_or(0, |frame| frame.head.through)
        );
        for (found, frame) in found.iter().zip(&frames) {
            assert!(found.records().eq(frame.records()));
        }
    }
}

/// A recording with several frames, small enough to try everything on it.
fn small_recording() -> (Scenario, Recording) {
    let recordings = (0..).map(|seed| {
        let scenario = Scenario {
            seed,
            ns_per_exit: 5_000,
            pace_ns: 15_000_000,
            memory_every: Some(5),
            patience_ns: None,
            chaos: None,
            quick: true,
            panic_grace_ns: None,
        };
        (scenario, scenario.record(Detail::Default, 1))
    });
    recordings
        .into_iter()
        .find(|(_, r)| {
            let frames = read(r.journal.as_slice()).expect("it reads").0.len();
            (60..300).contains(&r.exits) && frames >= 4 && r.journal.len() < 3_000
        })
        .expect("some seed is small")
}

#[test]
fn a_recorder_on_a_full_disk_stops_and_what_it_wrote_replays() {
    let (scenario, whole) = small_recording();
    let header = scenario.header(Detail::Default);
    for room in 0..whole.journal.len() {
        let mut disk = Disk {
            bytes: Vec::new(),
            room,
        };
        let live = Live::new(
            SimWorld::new(scenario.seed, scenario.pace_ns),
            scenario.memory_every,
        )
        .with_patience(Patience::Endless);
        if let Ok(mut recorder) = Recorder::create(live, &mut disk, &header) {
            let mut cpu = ToyCpu::new(scenario.seed, 1);
            let failure = machine_of(&header)
                .run(&mut cpu, &mut NoDisks, &mut recorder, &mut ())
                .unwrap_err();
            assert!(
                matches!(
                    failure,
                    RunError::Closed(Closed::Journal(JournalError::Write(_)))
                ),
                "{failure}"
            );
            let replayed = replay(&disk.bytes, ToyCpu::new(scenario.seed, 2), None);
            let Verdict::CutShort(tail) = replayed.verdict else {
                panic!("{room} bytes: {:?}", replayed.verdict);
            };
            assert_eq!(replayed.trace, whole.trace.through(tail.through));
        }
    }
}

#[test]
fn a_journal_that_cannot_be_read_is_an_error_wherever_the_bad_sector_lies() {
    let (scenario, whole) = small_recording();
    let header = scenario.header(Detail::Default);
    for fails_at in 0..=whole.journal.len() {
        let source = FailsOnce {
            bytes: &whole.journal,
            at: 0,
            fails_at: Some(fails_at),
        };
        let error = match JournalReader::open(source) {
            Err(error) => error,
            Ok(reader) => {
                let mut replayer = Replayer::new(reader, None, None);
                let mut cpu = ToyCpu::new(scenario.seed, 2);
                let result = machine_of(&header).run(
                    &mut cpu,
                    &mut NoDisks,
                    &mut replayer,
                    &mut Trace::default(),
                );
                match result {
                    Err(RunError::Closed(Closed::Journal(error))) => error,
                    other => panic!("byte {fails_at}: {other:?}"),
                }
            }
        };
        assert!(
            matches!(error, JournalError::Read(_)),
            "byte {fails_at}: {error}"
        );
    }
}

#[test]
fn the_format_that_is_documented_is_the_one_that_is_written() {
    let page = include_str!("../../docs/journal-format.md");
    for said in [
        format!("The format version is **{VERSION}**."),
        format!("| 8 | 4 | version, u32: {VERSION} |"),
        format!("and version == {VERSION}\n"),
    ] {
        assert!(
            page.contains(&said),
            "docs/journal-format.md lacks {said:?}"
        );
    }
}
