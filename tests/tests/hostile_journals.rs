//! Journals that were made to be read at a price: a few KB that ask for as much memory as can be had.
//!
//! What is allocated is counted, by an allocator of this test program's own. So its tests take turns.

use hindsight_devices::Input;
use hindsight_replay::rng::Rng;
use hindsight_replay::{
    ARRIVALS_MAX, Detail, EVENT_RAW_MAX, FRAME_PAYLOAD_MAX, FRAME_RAW_MAX, HEADER_MAX, Header,
    JournalReader, TailReason,
};
use hindsight_tests::drive::{MEMORY_BYTES_MAX, Target, drive, read_file, seal_journal};
use hindsight_tests::peak::{peak_bytes, turn};
use hindsight_tests::sim::Scenario;
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

fn header() -> Header {
    Scenario::new(0).header(Detail::Default)
}

fn head() -> Vec<u8> {
    postcard::to_stdvec(&header()).expect("plain values serialise")
}

/// Where and why a reader stops, and how many events it gives until then.
fn stops(journal: &[u8]) -> (u64, TailReason, u64) {
    let mut reader = JournalReader::open(journal).expect("the head is good");
    let mut events = 0;
    while reader.next_record().expect("memory can be read").is_some() {
        events += 1;
    }
    let tail = reader.tail().expect("it was read to its end").clone();
    (tail.through, tail.reason, events)
}

fn is_damaged(reason: &TailReason, word: &str) -> bool {
    matches!(reason, TailReason::Damaged(what) if what.contains(word))
}

/// Journals of a few KB whose frames are as large as a reader takes, of events that are as small as can be.
fn worst_journals() -> Vec<(&'static str, Vec<u8>)> {
    let frames = |bytes: usize, events: &[u8]| {
        let over_and_over = events.repeat(bytes / events.len());
        seal_journal(&head(), [&over_and_over[..], events])
    };
    let largest = |events: &[u8]| frames(FRAME_RAW_MAX, events);
    let quick = |events: &[u8]| frames(FRAME_RAW_MAX / 32, events);
    let entropy = |bytes: usize| {
        let mut event = vec![0, 2, 7];
        event.extend(postcard::to_stdvec(&vec![0_u8; bytes]).expect("it serialises"));
        event
    };
    // As many at an exit as can be.
    let inputs = |bytes: usize| {
        let mut events = entropy(bytes).repeat(ARRIVALS_MAX);
        events[0] = 1;
        events
    };
    vec![
        // A turn takes ten zeroes; as a value it has some 200 bytes.
        ("turns", largest(&[0; 10])),
        ("time corrections", quick(&[0, 1, 0])),
        ("witnesses", quick(&[0, 4, 0, 0])),
        ("interrupts", quick(&[0, 3, 0x30, 0, 0, 0])),
        ("posted bytes", quick(&[0, 9, 0])),
        ("vCPUs", quick(&[0, 11, 1, 0, 3, 0x30, 0, 0, 0])),
        ("inputs", quick(&inputs(0))),
        ("large inputs", largest(&inputs(60_000))),
    ]
}

#[test]
fn no_journal_of_a_few_kilobytes_takes_much_memory() {
    let _turn = turn();
    for (name, journal) in worst_journals() {
        assert!(journal.len() < 8_000, "{name}: {}", journal.len());
        let (through, reason, events) = stops(&journal);
        let peak = peak_bytes(|| read_file(&journal));
        println!(
            "{name}: {} bytes of journal, {events} events through exit {through} ({reason:?}); {peak} bytes",
            journal.len()
        );
        assert!(peak <= MEMORY_BYTES_MAX, "{name}: {peak} bytes");
    }
}

#[test]
fn a_bomb_of_a_frame_is_read_event_by_event() {
    let _turn = turn();
    let (_, bomb) = worst_journals().swap_remove(0);
    assert!(bomb.len() < 2_000, "{}", bomb.len());
    let (through, reason, events) = stops(&bomb);
    assert_eq!(
        (through, reason, events),
        (
            2 << 20,
            TailReason::NotClosed,
            FRAME_RAW_MAX as u64 / 10 + 1
        ),
    );
}

#[test]
fn lengths_that_are_only_claimed_are_not_reserved() {
    let _turn = turn();
    let whole = seal_journal(&head(), [&[0, 1, 0][..]]);
    let frame_at = 24 + head().len();
    // (offset of a u32, the largest claim that is not refused at once)
    let claims = [
        (12, HEADER_MAX),
        (frame_at + 8, FRAME_PAYLOAD_MAX),
        (frame_at + 12, FRAME_RAW_MAX),
    ];
    for (at, most) in claims {
        for claim in [most as u32, most as u32 + 1, u32::MAX] {
            let mut journal = whole.clone();
            journal[at..at + 4].copy_from_slice(&claim.to_le_bytes());
            let peak = peak_bytes(|| {
                if let Ok(mut reader) = JournalReader::open(journal.as_slice()) {
                    assert!(reader.next_frame().expect("memory can be read").is_none());
                }
            });
            assert!(peak < 200_000, "{claim} at {at}: {peak} bytes");
        }
    }
}

#[test]
fn a_length_inside_an_event_that_leads_past_it_is_not_reserved() {
    let _turn = turn();
    for length in [EVENT_RAW_MAX as u64, 1 << 20, 1 << 40, u64::MAX] {
        let length = postcard::to_stdvec(&length).expect("it serialises");
        // An input of typed bytes, posted bytes, a turn's differences, what a guest said in its panic.
        let before: [&[u8]; 4] = [&[0, 2, 1], &[0, 9], &[0, 0, 6, 0, 0, 0], &[0, 6, 1, 1]];
        for before in before {
            let events = [before, &length, &[b'a'; 100_000]].concat();
            let journal = seal_journal(&head(), [&events[..]]);
            let peak = peak_bytes(|| {
                let (_, reason, events) = stops(&journal);
                assert!(is_damaged(&reason, "decode"), "{before:?}: {reason:?}");
                assert_eq!(events, 0);
            });
            assert!(peak < 2 << 20, "{before:?}, {length:?}: {peak} bytes");
        }
    }
}

#[test]
fn more_inputs_at_an_exit_than_reach_a_machine_are_refused() {
    let _turn = turn();
    for (count, admitted) in [(ARRIVALS_MAX, true), (ARRIVALS_MAX + 1, false)] {
        // The first at exit 1, the others at the same.
        let mut events = vec![[0, 2, 3]; count];
        events[0][0] = 1;
        let journal = seal_journal(&head(), [events.as_flattened()]);
        let (_, reason, read) = stops(&journal);
        if admitted {
            assert_eq!((reason, read), (TailReason::NotClosed, count as u64));
        } else {
            assert!(is_damaged(&reason, "inputs"), "{reason:?}");
            assert_eq!(read, 0, "nothing of the frame is used");
        }
    }
}

#[test]
fn a_frame_of_nothing_is_refused() {
    let _turn = turn();
    let (_, reason, _) = stops(&seal_journal(&head(), [&[][..]]));
    assert!(is_damaged(&reason, "raw bytes"), "{reason:?}");
}

#[test]
fn a_head_as_long_as_can_be_takes_little_memory() {
    let _turn = turn();
    // The smallest items of the vectors in it: empty lines of what is left open, and CPUID entries.
    let mut holes = header();
    holes.host.holes = vec![String::new(); HEADER_MAX - 1_000];
    let mut entries = header();
    let entry = entries.machine.cpuid.entries[0];
    entries.machine.cpuid.entries = vec![entry; HEADER_MAX / 30];
    for header in [holes, entries] {
        let head = postcard::to_stdvec(&header).expect("it serialises");
        assert!(
            (HEADER_MAX / 3..=HEADER_MAX).contains(&head.len()),
            "{}",
            head.len()
        );
        let journal = seal_journal(&head, []);
        let peak = peak_bytes(|| {
            assert!(JournalReader::open(journal.as_slice()).is_err());
        });
        assert!(peak < 8 << 20, "{peak} bytes");
    }
}

#[test]
fn whatever_bytes_a_journal_is_made_of_memory_stays_in_bounds() {
    let _turn = turn();
    let input = postcard::to_stdvec(&Input::WallClock { unix_seconds: 1 }).expect("it serialises");
    for seed in 0..60 {
        let mut rng = Rng::new(seed, 23);
        // Sealed, with a good head, some of them with their events over and over.
        let mut data = vec![if rng.one_in(8) { 7 } else { 5 }];
        for _ in 0..1 + rng.below(3) {
            let mut events = Vec::new();
            for _ in 0..1 + rng.below(12) {
                // Mostly events that begin well.
                events.extend([rng.below(3) as u8, rng.below(12) as u8]);
                if rng.one_in(4) {
                    events.extend(&input);
                }
                events.extend((0..rng.below(12)).map(|_| match rng.one_in(2) {
                    true => 0,
                    false => rng.number() as u8,
                }));
            }
            data.extend((events.len() as u16).to_le_bytes());
            data.extend(events);
        }
        let peak = peak_bytes(|| drive(Target::Journal, &data));
        assert!(peak <= MEMORY_BYTES_MAX, "seed {seed}: {peak} bytes");
    }
}

#[test]
fn guest_time_at_its_end_is_survived() {
    let _turn = turn();
    for ahead in [i64::MAX, i64::MAX - 1, 1 << 62] {
        let mut events = Vec::new();
        for _ in 0..8 {
            // At the next exit each: the wall clock, and then time.
            events.extend([1, 1]);
            events.extend(postcard::to_stdvec(&ahead).expect("it serialises"));
            events.extend([0, 2]);
            let unix_seconds = u64::MAX;
            let clock = Input::WallClock { unix_seconds };
            events.extend(postcard::to_stdvec(&clock).expect("it serialises"));
        }
        let mut data = vec![5];
        data.extend((events.len() as u16).to_le_bytes());
        data.extend(events);
        drive(Target::Journal, &data);
    }
}
