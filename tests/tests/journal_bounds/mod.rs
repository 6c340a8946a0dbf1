//! Whatever a machine does, its recorder writes nothing that the reader refuses: not at the largest events, not at the
//! most of them, and not if the world never falls silent.

use hindsight_devices::{Input, Nanos, NoDisks, Room};
use hindsight_replay::{
    ARRIVALS_MAX, Detail, Event, Frame, JournalError, JournalReader, JournalWriter, Live, Patience,
    Record, Recorder, TailReason, World,
};
use hindsight_tests::sim::{Scenario, Verdict, machine_of, replay};
use hindsight_tests::toy_cpu::ToyCpu;
use proptest::prelude::*;

use super::{arbitrary, header, read};

/// What belongs to one exit, in the order in which a recorder says it, up to the largest that a machine can
/// take: a limited number of inputs, each up to the longest frame, and then any number of interrupts.
fn exit_plan() -> impl Strategy<Value = Vec<Event>> {
    let bytes = prop_oneof![
        6 => 0..64usize,
        1 => Just(hindsight_devices::FRAME_BYTES_MAX),
    ];
    let input = (0..5u8, bytes, any::<u64>()).prop_map(|(kind, length, seed)| {
        // Bytes that cannot be compressed.
        let mut rng = hindsight_replay::rng::Rng::new(seed, 1);
        let bytes: Vec<u8> = (0..length).map(|_| rng.number() as u8).collect();
        Event::Input(match kind {
            0 => Input::Console(bytes),
            1 => Input::VirtioConsole(bytes),
            2 => Input::Frame(bytes),
            3 => Input::Entropy(bytes),
            _ => Input::PowerButton,
        })
    });
    let inputs = prop_oneof![
        6 => proptest::collection::vec(input.clone(), 0..3),
        1 => proptest::collection::vec(input, ARRIVALS_MAX),
    ];
    let interrupts = prop_oneof![
        6 => proptest::collection::vec(arbitrary::interrupt(), 0..3),
        1 => proptest::collection::vec(arbitrary::interrupt(), 20_000),
    ];
    let full = any::<bool>();
    let posted = proptest::collection::vec(any::<u8>(), 0..hindsight_devices::POSTED_MAX);
    (
        arbitrary::time(),
        inputs,
        posted,
        full,
        arbitrary::turn(),
        interrupts,
    )
        .prop_map(|(time, inputs, posted, full, turn, interrupts)| {
            let mut events = vec![time];
            events.extend(inputs);
            if full {
                if !posted.is_empty() {
                    events.push(Event::Posted(posted));
                }
                events.push(Event::Turn(Box::new(turn)));
            }
            events.extend(interrupts);
            events
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(25))]

    #[test]
    fn a_frame_that_is_written_is_never_refused_whatever_happened(
        plan in proptest::collection::vec((1..1_000u64, exit_plan()), 1..25),
        end in arbitrary::end(),
    ) {
        let mut journal = Vec::new();
        let mut writer = JournalWriter::create(&mut journal, &header()).unwrap();
        let (mut exits, mut now) = (0, 0);
        let mut said = Vec::new();
        for (distance, events) in plan {
            // As the recorder does it: frames are closed between turns, and between interrupts.
            writer.turn_is_complete(exits, now, false).unwrap();
            exits += distance;
            for mut event in events {
                match &mut event {
                    Event::Turn(turn) => {
                        now += turn.now;
                        turn.now = now;
                    }
                    Event::Interrupt { at, .. } => at.exits = exits,
                    _ => {}
                }
                let interrupt = matches!(event, Event::Interrupt { .. });
                writer.append(exits, event.clone()).unwrap();
                said.push(Record { exits, event });
                if interrupt {
                    writer.close_if_full(exits, now).unwrap();
                }
            }
        }
        writer.append(exits, end.clone()).unwrap();
        said.push(Record { exits, event: end });
        writer.close_frame(exits, now).unwrap();
        let mut reader = JournalReader::open(journal.as_slice()).unwrap();
        for said in &said {
            let found = reader.next_record().unwrap();
            prop_assert_eq!(found.as_ref(), Some(said));
        }
        prop_assert_eq!(reader.next_record().unwrap(), None);
        prop_assert_eq!(&reader.tail().unwrap().reason, &TailReason::Closed);
    }
}

#[test]
fn what_a_reader_would_refuse_is_not_written_and_all_else_goes_on() {
    let mut journal = Vec::new();
    let mut writer = JournalWriter::create(&mut journal, &header()).unwrap();
    let typed = |length| Event::Input(Input::Frame(vec![0xa5; length]));
    let longest = hindsight_devices::FRAME_BYTES_MAX;
    writer.append(1, typed(longest)).unwrap();
    for exits in [1, 2] {
        let refused = writer.append(exits, typed(longest + 100)).unwrap_err();
        assert!(matches!(refused, JournalError::Refused(_)), "{refused}");
    }
    // One was taken.
    for _ in 1..ARRIVALS_MAX {
        writer.append(1, typed(1)).unwrap();
    }
    let refused = writer.append(1, typed(1)).unwrap_err();
    assert!(
        refused.to_string().contains("inputs at exit 1"),
        "{refused}"
    );
    // A frame that nobody closes is full at last.
    let mut exits = 1;
    let refused = loop {
        exits += 1;
        match writer.append(exits, typed(longest)) {
            Ok(()) => {}
            Err(refused) => break refused,
        }
    };
    assert!(
        refused.to_string().contains("a frame has more"),
        "{refused}"
    );
    writer.close_frame(exits - 1, 0).unwrap();
    let end = Event::End(Box::new(hindsight_replay::End {
        ending: hindsight_replay::Ending::Halted,
        panic: None,
        now: 0,
        digest: 0,
        state: None,
    }));
    writer.append(exits, end).unwrap();
    assert!(writer.append(exits, typed(1)).is_err(), "after the end");
    writer.close_frame(exits, 0).unwrap();
    let (frames, tail) = read(journal.as_slice()).unwrap();
    assert_eq!(tail.reason, TailReason::Closed);
    let records: Vec<Record> = frames.iter().flat_map(Frame::records).collect();
    assert_eq!(records.len(), ARRIVALS_MAX + (exits as usize - 2) + 1);
}

/// A world that always has something more to say, and ends after a number of looks at it.
struct Flood {
    now: Nanos,
    polls: usize,
}

impl World for Flood {
    fn now(&mut self) -> Nanos {
        self.now += 1_000;
        self.now
    }

    fn poll(&mut self, _room: &Room) -> Option<Input> {
        self.polls = self.polls.saturating_sub(1);
        Some(match self.polls {
            0 => Input::Stop,
            polls => Input::Resize {
                columns: polls as u16,
                rows: 1,
            },
        })
    }

    fn sleep(&mut self, _until: Option<Nanos>, _room: &Room) -> bool {
        true
    }

    fn gives_up(&mut self) -> bool {
        false
    }

    fn alarm(&mut self, _at: Option<Nanos>) {}

    fn input_waits(&mut self, _room: &Room) -> bool {
        true
    }
}

#[test]
fn a_world_that_never_falls_silent_is_heard_a_stated_number_of_times_at_each_exit() {
    let scenario = Scenario::new(1);
    let header = scenario.header(Detail::Full);
    let exits = 40;
    let flood = Flood {
        now: 0,
        polls: exits * ARRIVALS_MAX,
    };
    let mut journal = Vec::new();
    let live = Live::new(flood, None).with_patience(Patience::Endless);
    let mut recorder = Recorder::create(live, &mut journal, &header).unwrap();
    let mut machine = machine_of(&header);
    machine
        .run(&mut ToyCpu::new(1, 1), &mut NoDisks, &mut recorder, &mut ())
        .unwrap();
    let last = machine.at().exits;
    assert!((2..=exits as u64).contains(&last), "{last} exits");
    let mut reader = JournalReader::open(journal.as_slice()).unwrap();
    let mut inputs = std::collections::BTreeMap::new();
    while let Some(record) = reader.next_record().unwrap() {
        if let Event::Input(_) = record.event {
            *inputs.entry(record.exits).or_insert(0) += 1;
        }
    }
    assert_eq!(reader.tail().unwrap().reason, TailReason::Closed);
    for exit in 1..=last {
        assert_eq!(inputs.get(&exit), Some(&ARRIVALS_MAX), "exit {exit}");
    }
    let replayed = replay(&journal, ToyCpu::new(1, 2), None);
    assert!(
        matches!(replayed.verdict, Verdict::Equal(_)),
        "{:?}",
        replayed.verdict
    );
}
