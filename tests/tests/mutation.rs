//! A damaged journal is noticed: every bit, every length, every frame out of place.
//!
//! The rule for all of it: a replay of a changed file is refused, or cut short after a beginning
//! that is equal to the recording, or diverges. It is never equal, never a panic, never endless.

mod arbitrary;

use hindsight_replay::rng::Rng;
use hindsight_replay::{
    Detail, Difference, Event, Frame, IndexEntry, JournalError, JournalReader, JournalWriter,
    Record, Tail, TailReason, VcpuNumber,
};
use hindsight_tests::sim::{
    Recording, Replayed, Scenario, Trace, Verdict, move_to_vcpu, records_of, relog, replay,
    write_records,
};
use hindsight_tests::sim_world::{EXITS_MAX, SimWorld};
use hindsight_tests::toy_cpu::ToyCpu;
use proptest::prelude::*;

/// No replay of anything here needs more exits; one that takes more hangs.
const EXITS_BOUND: u64 = 2 * EXITS_MAX;

/// A recording and where its parts lie.
struct Victim {
    scenario: Scenario,
    recording: Recording,
    frames: Vec<Frame>,
}

impl Victim {
    /// A recording with several frames that is small enough to try everything on it.
    fn small(detail: Detail, bytes_max: usize) -> Victim {
        (0..)
            .map(|seed| {
                let scenario = Scenario {
                    seed,
                    ns_per_exit: 5_000,
                    pace_ns: 15_000_000,
                    memory_every: Some(9),
                    patience_ns: None,
                    chaos: None,
                    quick: true,
                    panic_grace_ns: None,
                };
                Victim::of(scenario, scenario.record(detail, 1))
            })
            .find(|victim| {
                let events = records_of(&victim.recording.journal).len();
                victim.frames.len() >= 5
                    && events >= 150
                    && victim.recording.trace.interrupts.len() >= 10
                    && victim.recording.journal.len() <= bytes_max
            })
            .expect("some seed is small")
    }

    fn of(scenario: Scenario, recording: Recording) -> Victim {
        let mut reader = JournalReader::open(recording.journal.as_slice()).expect("it opens");
        let mut frames = Vec::new();
        while let Some(frame) = reader.next_frame().expect("it reads") {
            frames.push(frame);
        }
        Victim {
            scenario,
            recording,
            frames,
        }
    }

    fn places(&self) -> Vec<IndexEntry> {
        self.frames.iter().map(|frame| frame.place).collect()
    }

    fn head_bytes(&self) -> usize {
        self.frames[0].place.offset as usize
    }

    /// The bytes of frame `i`.
    fn frame(&self, i: usize) -> &[u8] {
        let end = self
            .frames
            .get(i + 1)
            .map_or(self.recording.journal.len(), |next| {
                next.place.offset as usize
            });
        &self.recording.journal[self.frames[i].place.offset as usize..end]
    }

    /// The head, then these frames.
    fn rebuilt<'a>(&self, frames: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
        let mut journal = self.recording.journal[..self.head_bytes()].to_vec();
        for frame in frames {
            journal.extend(frame);
        }
        journal
    }

    fn replay(&self, journal: &[u8]) -> Replayed {
        replay(
            journal,
            ToyCpu::new(self.scenario.seed, 77),
            Some(EXITS_BOUND),
        )
    }

    /// Replays a damaged journal that must break off exactly at `offset`, after exit `through`.
    fn breaks_off(&self, journal: &[u8], offset: u64, through: u64) -> Tail {
        let replayed = self.replay(journal);
        let Verdict::CutShort(tail) = replayed.verdict else {
            panic!(
                "expected it to break off at byte {offset}: {:?}",
                replayed.verdict
            );
        };
        assert_eq!((tail.offset, tail.through), (offset, through), "{tail}");
        assert_eq!(
            replayed.trace,
            self.recording.trace.through(through),
            "the beginning is equal"
        );
        assert!(
            tail.to_string().contains(&through.to_string()),
            "it says how far it is whole"
        );
        tail
    }

    /// The same for damage inside or at the beginning of frame `i`.
    fn breaks_off_at_frame(&self, journal: &[u8], i: usize) -> Tail {
        let IndexEntry { offset, first, .. } = self.frames[i].place;
        self.breaks_off(journal, offset, first)
    }
}

#[test]
fn every_flipped_bit_is_noticed_where_it_lies() {
    let victim = Victim::small(Detail::Default, 3_500);
    for place in 0..victim.recording.journal.len() {
        for bit in 0..8 {
            let mut journal = victim.recording.journal.clone();
            journal[place] ^= 1 << bit;
            let frame = victim
                .places()
                .iter()
                .rposition(|f| f.offset as usize <= place);
            match frame {
                Some(frame) => {
                    let tail = victim.breaks_off_at_frame(&journal, frame);
                    let why = matches!(tail.reason, TailReason::Damaged(_) | TailReason::Torn);
                    assert!(why, "byte {place}, bit {bit}: {tail}");
                }
                None => match victim.replay(&journal).verdict {
                    Verdict::Refused(JournalError::NotAJournal { .. }) => assert!(place < 8),
                    Verdict::Refused(JournalError::Version { .. }) => {
                        assert!((8..12).contains(&place));
                    }
                    Verdict::Refused(JournalError::Head(_)) => assert!(place >= 12),
                    other => panic!("byte {place}, bit {bit}: {other:?}"),
                },
            }
        }
    }
}

#[test]
fn a_journal_cut_at_any_length_replays_through_its_last_whole_frame() {
    for victim in [
        Victim::small(Detail::Default, 3_500),
        Victim::small(Detail::Full, 30_000),
    ] {
        let whole = &victim.recording.journal;
        for length in 0..whole.len() {
            let journal = &whole[..length];
            if length < victim.head_bytes() {
                let replayed = victim.replay(journal);
                assert!(
                    matches!(replayed.verdict, Verdict::Refused(_)),
                    "{length} bytes"
                );
                assert!(replayed.trace.turns.is_empty());
                continue;
            }
            let cut = victim
                .places()
                .iter()
                .rposition(|f| f.offset as usize <= length);
            let cut = cut.expect("the head is whole");
            let tail = victim.breaks_off_at_frame(journal, cut);
            let at_an_edge = victim.frames[cut].place.offset as usize == length;
            let reason = if at_an_edge {
                TailReason::NotClosed
            } else {
                TailReason::Torn
            };
            assert_eq!(tail.reason, reason, "{length} bytes");
        }
        let replayed = victim.replay(whole);
        assert!(
            matches!(replayed.verdict, Verdict::Equal(_)),
            "{:?}",
            replayed.verdict
        );
        assert_eq!(replayed.trace, victim.recording.trace);
    }
}

#[test]
fn a_cut_journal_recorded_again_holds_all_that_was_left() {
    let victim = Victim::small(Detail::Default, 3_500);
    let header = victim.scenario.header(Detail::Default);
    for cut in victim.places() {
        let journal = &victim.recording.journal[..cut.offset as usize];
        let cpu = ToyCpu::new(victim.scenario.seed, 3);
        let (verdict, copy) = relog(journal, &header, cpu);
        assert!(matches!(verdict, Verdict::CutShort(_)), "{verdict:?}");
        assert!(copy == journal, "cut after exit {}", cut.first);
    }
}

#[test]
fn a_frame_that_claims_more_than_it_says_diverges_at_the_first_interrupt_it_lacks() {
    let victim = Victim::small(Detail::Default, 3_500);
    let header = victim.scenario.header(Detail::Default);
    let records = records_of(&victim.recording.journal);
    let last = victim.recording.exits;
    for (i, record) in records.iter().enumerate() {
        if !matches!(record.event, Event::Interrupt { .. }) || record.exits == last {
            continue;
        }
        let mut journal = Vec::new();
        let mut writer = JournalWriter::create(&mut journal, &header).expect("a Vec takes all");
        for record in &records[..i] {
            writer
                .append(record.exits, record.event.clone())
                .expect("it was recorded");
        }
        writer.close_frame(last, 0).expect("a Vec takes all");
        match victim.replay(&journal).verdict {
            Verdict::Diverged(divergence) => {
                assert_eq!(divergence.at.exits, record.exits, "{divergence}");
                let named = matches!(divergence.difference, Difference::Interrupt { .. });
                assert!(named, "{divergence}");
            }
            other => panic!("without {record:?}: {other:?}"),
        }
    }
}

#[test]
fn frames_that_change_places_are_noticed_at_the_first_of_them() {
    let victim = Victim::small(Detail::Default, 3_500);
    let count = victim.frames.len();
    for i in 0..count {
        for j in i + 1..count {
            let mut order: Vec<usize> = (0..count).collect();
            order.swap(i, j);
            let journal = victim.rebuilt(order.iter().map(|f| victim.frame(*f)));
            victim.breaks_off_at_frame(&journal, i);
        }
    }
}

#[test]
fn a_frame_removed_or_doubled_is_noticed() {
    let victim = Victim::small(Detail::Default, 3_500);
    let count = victim.frames.len();
    for i in 0..count {
        let without = victim.rebuilt((0..count).filter(|f| *f != i).map(|f| victim.frame(f)));
        let tail = victim.breaks_off_at_frame(&without, i);
        assert_eq!(
            tail.reason == TailReason::NotClosed,
            i + 1 == count,
            "{tail}"
        );

        let twice = (0..=i).chain(i..count);
        let journal = victim.rebuilt(twice.map(|f| victim.frame(f)));
        let offset = victim.frames[i].place.offset + victim.frame(i).len() as u64;
        victim.breaks_off(&journal, offset, victim.frames[i].place.through);
    }
}

#[test]
fn bytes_behind_the_end_are_noticed() {
    let victim = Victim::small(Detail::Default, 3_500);
    let whole = victim.recording.journal.clone();
    let mut rng = Rng::new(5, 0);
    let random: Vec<Vec<u8>> = (1..80)
        .map(|length| (0..length).map(|_| rng.number() as u8).collect())
        .collect();
    let appended = [
        vec![0],
        whole.clone(),
        victim.frame(0).to_vec(),
        vec![0; 4096],
    ];
    for bytes in random.into_iter().chain(appended) {
        let journal = [whole.clone(), bytes].concat();
        let last = victim
            .frames
            .last()
            .expect("there are frames")
            .place
            .through;
        let tail = victim.breaks_off(&journal, whole.len() as u64, last);
        assert!(matches!(tail.reason, TailReason::Damaged(_)), "{tail}");
    }
}

#[test]
fn frames_of_another_recording_are_noticed() {
    let victim = Victim::small(Detail::Default, 3_500);
    let count = victim.frames.len();
    // The same machine with the same head in another world: nothing but the chain of checks tells
    // these frames apart.
    let others: Vec<Victim> = (0..20)
        .map(|n| {
            let world = SimWorld::new(1_000 + n, victim.scenario.pace_ns);
            let cpu = ToyCpu::new(victim.scenario.seed, 1);
            let (end, recording) = victim.scenario.record_with(Detail::Default, world, cpu);
            let end = Some(end.expect("the recording goes well"));
            Victim::of(victim.scenario, Recording { end, ..recording })
        })
        .filter(|other| !other.frames.is_empty())
        .collect();
    for (seed, other) in others.iter().enumerate() {
        let mut rng = Rng::new(seed as u64, 11);
        for _ in 0..60 {
            let place = rng.below(count as u64) as usize;
            let from = rng.below(other.frames.len() as u64) as usize;
            let length = 1 + rng.below((other.frames.len() - from) as u64) as usize;
            let skip = rng.below((count - place) as u64 + 1) as usize;
            let foreign = (from..from + length).map(|f| other.frame(f));
            let journal = victim.rebuilt(
                (0..place)
                    .map(|f| victim.frame(f))
                    .chain(foreign)
                    .chain((place + skip..count).map(|f| victim.frame(f))),
            );
            if place == 0 && from == 0 {
                // The head is the other's too: this is the other recording, whole or cut.
                let replayed = other.replay(&journal);
                if journal == other.recording.journal {
                    assert!(matches!(replayed.verdict, Verdict::Equal(_)));
                    continue;
                }
                assert!(!matches!(replayed.verdict, Verdict::Equal(_)));
                let Verdict::CutShort(tail) = replayed.verdict else {
                    panic!("expected a recording cut short: {:?}", replayed.verdict);
                };
                assert_eq!(replayed.trace, other.recording.trace.through(tail.through));
                continue;
            }
            victim.breaks_off_at_frame(&journal, place);
        }
    }
}

/// One change to the list of events.
#[derive(Clone, Debug)]
enum Change {
    Remove(prop::sample::Index),
    Double(prop::sample::Index),
    Swap(prop::sample::Index),
    Move(prop::sample::Index, i64),
    Replace(prop::sample::Index, Event),
    Insert(prop::sample::Index, Event),
    /// Of the vCPU with this number, if it is of one.
    Vcpu(prop::sample::Index, u8),
}

fn change() -> impl Strategy<Value = Change> {
    let at = any::<prop::sample::Index>;
    let far = prop_oneof![-3..4i64, -600..600i64, Just(1 << 50)];
    prop_oneof![
        at().prop_map(Change::Remove),
        at().prop_map(Change::Double),
        at().prop_map(Change::Swap),
        (at(), far).prop_map(|(at, by)| Change::Move(at, by)),
        (at(), arbitrary::event()).prop_map(|(at, event)| Change::Replace(at, event)),
        (at(), arbitrary::event()).prop_map(|(at, event)| Change::Insert(at, event)),
        (at(), any::<u8>()).prop_map(|(at, number)| Change::Vcpu(at, number)),
        (at(), arbitrary::end()).prop_map(|(at, event)| Change::Insert(at, event)),
        (at(), arbitrary::end()).prop_map(|(at, event)| Change::Replace(at, event)),
    ]
}

fn changed(mut records: Vec<Record>, changes: &[Change]) -> Vec<Record> {
    for change in changes {
        if records.is_empty() {
            break;
        }
        let count = records.len();
        match change {
            Change::Remove(at) => {
                records.remove(at.index(count));
            }
            Change::Double(at) => records.insert(at.index(count), records[at.index(count)].clone()),
            Change::Swap(at) => {
                let at = at.index(count);
                if at + 1 < count {
                    let (a, b) = (records[at].exits, records[at + 1].exits);
                    records.swap(at, at + 1);
                    (records[at].exits, records[at + 1].exits) = (a, b);
                }
            }
            Change::Move(at, by) => {
                let record = &mut records[at.index(count)];
                record.exits = record.exits.saturating_add_signed(*by);
            }
            Change::Replace(at, event) => records[at.index(count)].event = event.clone(),
            Change::Vcpu(at, number) => {
                move_to_vcpu(&mut records[at.index(count)].event, VcpuNumber(*number));
            }
            Change::Insert(at, event) => {
                let exits = records[at.index(count)].exits;
                records.insert(
                    at.index(count),
                    Record {
                        exits,
                        event: event.clone(),
                    },
                );
            }
        }
    }
    // The writer takes events in the order of exits, with moments that agree.
    records.sort_by_key(|record| record.exits);
    for record in &mut records {
        if let Event::Interrupt { at, .. } = &mut record.event {
            at.exits = record.exits;
        }
    }
    records
}

/// What may come of a journal whose checks are all right and whose events are not the recorded
/// ones.
fn judge(victim: &Victim, records: &[Record], original: &[Record], replayed: &Replayed) {
    match &replayed.verdict {
        Verdict::Equal(end) => {
            assert_eq!(Some(end), victim.recording.end.as_ref());
            // An input that the guest never takes note of leaves no other trace than itself.
            let seen = |trace: &Trace| Trace {
                inputs: Vec::new(),
                ..trace.clone()
            };
            assert_eq!(seen(&replayed.trace), seen(&victim.recording.trace));
            let (found, recorded) = (noticeable(records), noticeable(original));
            assert!(
                found == recorded,
                "equal, though the events are not those recorded"
            );
        }
        Verdict::CutShort(tail) => {
            assert!(tail.reason != TailReason::Closed, "{tail}");
        }
        Verdict::Diverged(divergence) => assert!(!divergence.to_string().is_empty()),
        // The guest went on to no end because the next event is out of reach.
        Verdict::Reached(_) => {}
        Verdict::Refused(error) => panic!("the file is whole, but: {error}"),
        Verdict::Failed(broken) => panic!("no host failed, but: {broken}"),
    }
}

/// The events that every machine notices. Not a byte typed that the guest never reads, not a time
/// correction by nothing, and not a digest of memory, of which a recording has as many as it likes.
fn noticeable(records: &[Record]) -> Vec<&Record> {
    let counts = |record: &&Record| {
        !matches!(
            record.event,
            Event::Input(_) | Event::Time { ahead_ns: 0 } | Event::State { .. }
        )
    };
    records.iter().filter(counts).collect()
}

#[test]
fn a_time_correction_by_centuries_is_a_difference() {
    for seed in 0..10 {
        for full in [Detail::Default, Detail::Full] {
            let scenario = Scenario::new(seed);
            let victim = Victim::of(scenario, scenario.record(full, 1));
            let original = records_of(&victim.recording.journal);
            for at in 0..original.len() {
                let mut records = original.clone();
                let exits = original[at].exits;
                let ahead_ns = i64::MAX;
                let event = Event::Time { ahead_ns };
                records.insert(at, Record { exits, event });
                let records = changed(records, &[]);
                let journal = write_records(&scenario.header(full), &records, 50);
                let replayed = victim.replay(&journal);
                judge(&victim, &records, &original, &replayed);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_500))]

    #[test]
    fn a_journal_with_right_checks_and_wrong_events_is_never_equal(
        seed in 0..40u64,
        full in any::<bool>(),
        changes in proptest::collection::vec(change(), 1..5),
        per_frame in 1..200usize,
    ) {
        let scenario = Scenario::new(seed);
        let detail = if full { Detail::Full } else { Detail::Default };
        let victim = Victim::of(scenario, scenario.record(detail, 1));
        let original = records_of(&victim.recording.journal);
        let records = changed(original.clone(), &changes);
        let journal = write_records(&scenario.header(detail), &records, per_frame);
        let replayed = victim.replay(&journal);
        judge(&victim, &records, &original, &replayed);
    }

    #[test]
    fn a_journal_of_random_events_is_never_equal_and_never_endless(
        seed in 0..40u64,
        full in any::<bool>(),
        events in proptest::collection::vec((0..40u64, arbitrary::event()), 0..40),
        end in proptest::option::of(arbitrary::end()),
        per_frame in 1..20usize,
    ) {
        let scenario = Scenario::new(seed);
        let detail = if full { Detail::Full } else { Detail::Default };
        let mut exits = 0;
        let mut records = Vec::new();
        for (distance, event) in events.into_iter().chain(end.map(|end| (1, end))) {
            exits += distance;
            records.push(Record { exits, event });
        }
        let records = changed(records, &[]);
        let journal = write_records(&scenario.header(detail), &records, per_frame);
        let cpu = ToyCpu::new(seed, 5);
        let replayed = replay(&journal, cpu, Some(EXITS_BOUND));
        prop_assert!(!matches!(replayed.verdict, Verdict::Equal(_)), "{:?}", replayed.verdict);
    }

    #[test]
    fn random_bytes_are_not_a_journal(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let replayed = replay(&bytes, ToyCpu::new(0, 5), Some(EXITS_BOUND));
        prop_assert!(matches!(replayed.verdict, Verdict::Refused(_)));
    }
}
