use hindsight_devices::{DiskSpec, Input};
use hindsight_replay::{
    End, Ending, Event, Header, Image, JournalReader, JournalWriter, QuickReads,
};

use super::*;

/// A head with something in every field that can be empty.
fn header() -> Header {
    let mut header = Header::smallest();
    let machine = &mut header.machine;
    machine.initrd = Some(machine.kernel.clone());
    machine.quick_reads = Some(QuickReads::new(1, 2, 3));
    machine.devices.disks = vec![DiskSpec {
        bytes: 512,
        read_only: false,
        serial: "s".into(),
    }];
    machine.images = vec![Image {
        bytes: 512,
        sample: [0; 32],
    }];
    header.host.holes = vec!["h".into()];
    header
}

fn typed(byte: u8) -> Event {
    Event::Input(Input::Console(vec![byte]))
}

fn end(ending: Ending) -> Event {
    Event::End(Box::new(End {
        ending,
        panic: None,
        now: 0,
        digest: 0,
        state: None,
    }))
}

/// A journal of one frame for each list of events, each event at an exit of its own.
fn journal(header: &Header, frames: &[&[Event]], through: u64) -> Vec<u8> {
    let mut journal = Vec::new();
    let mut writer = JournalWriter::create(&mut journal, header).unwrap();
    let mut exits = 0;
    for (number, events) in frames.iter().enumerate() {
        for event in *events {
            exits += 1;
            writer.append(exits, event.clone()).unwrap();
        }
        let last = number + 1 == frames.len();
        writer
            .close_frame(if last { through } else { exits }, 0)
            .unwrap();
    }
    journal
}

fn compare(a: &[u8], b: &[u8]) -> Comparison {
    let mut readers = [a, b].map(|journal| JournalReader::open(journal).unwrap());
    let [a, b] = &mut readers;
    Comparison::of(a, b).unwrap()
}

fn text(found: &Comparison) -> String {
    found.text(&["A".into(), "B".into()])
}

#[test]
fn equal_journals_are_equal_however_their_frames_are_divided() {
    let events = [typed(1), typed(2), end(Ending::Halted)];
    let one = journal(&header(), &[&events], 3);
    let two = journal(&header(), &[&events[..2], &events[2..]], 3);
    let found = compare(&one, &two);
    assert_eq!(found.outcome(), Outcome::Good);
    assert_eq!(text(&found), "3 events, all equal\n");
    assert_eq!(found.to_json()["equal"], true);
}

/// Every leaf of a head, as it is written for programs.
fn leaves(value: &mut Value, path: &str, change: &mut impl FnMut(&str, &mut Value)) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                leaves(value, &format!("{path}.{name}"), change);
            }
        }
        Value::Array(items) => {
            for (at, value) in items.iter_mut().enumerate() {
                leaves(value, &format!("{path}[{at}]"), change);
            }
        }
        leaf => change(path, leaf),
    }
}

#[test]
fn a_difference_in_any_field_of_the_heads_is_found() {
    let mut count = 0;
    leaves(
        &mut serde_json::to_value(header()).unwrap(),
        "",
        &mut |_, _| count += 1,
    );
    assert!(count > 100, "{count}");
    for changed in 0..count {
        let [original, mut other] = [(); 2].map(|()| serde_json::to_value(header()).unwrap());
        let (mut at, mut name) = (0, String::new());
        leaves(&mut other, "", &mut |path, leaf| {
            if at == changed {
                name = path.to_string();
                *leaf = json!("changed");
            }
            at += 1;
        });
        let mut found = Vec::new();
        find_differences(String::new(), &original, &other, &mut found);
        assert_eq!(found.len(), 1, "{name}: {found:?}");
        let field = format!(".{}", found[0].field);
        assert!(name.starts_with(&field), "{name}: {found:?}");
    }
}

#[test]
fn heads_that_differ_are_told_field_by_field() {
    let mut other = header();
    other.machine.devices.disks[0].read_only = true;
    other.machine.seed = [0xab; 32];
    other.machine.initrd = None;
    other.host.holes.push("\x1b[2K".into());
    let events = [end(Ending::Halted)];
    let found = compare(
        &journal(&header(), &[&events], 1),
        &journal(&other, &[&events], 1),
    );
    assert_eq!(found.outcome(), Outcome::Different);
    let text = text(&found);
    for line in [
        "machine.devices.disks[0].read_only differs: false / true",
        &format!(
            "machine.seed differs: {} / {}",
            "00".repeat(32),
            "ab".repeat(32)
        ),
        "host.holes[1] differs: none / \\x1b[2K",
        "1 events, all equal",
    ] {
        assert!(text.contains(line), "no {line:?} in {text}");
    }
    assert!(text.contains("machine.initrd differs: {"), "{text}");
    assert_eq!(found.to_json()["equal"], false);
}

#[test]
fn the_first_event_that_differs_is_shown_on_both_sides() {
    let ours = [typed(1), typed(2), end(Ending::Halted)];
    let theirs = [typed(1), typed(3), end(Ending::Halted)];
    let whole = journal(&header(), &[&ours], 3);
    let found = compare(&whole, &journal(&header(), &[&theirs], 3));
    assert_eq!(found.outcome(), Outcome::Different);
    assert!(text(&found).starts_with("1 events are equal; then\n  A: exit 2"));
    // One that ends earlier: it says how it ends.
    let short = journal(&header(), &[&ours[..2]], 2);
    let found = compare(&whole, &short);
    assert_eq!(found.outcome(), Outcome::Different);
    assert!(text(&found).contains("B: the journal ends after exit 2"));
}

#[test]
fn ends_that_differ_are_a_difference_and_two_cut_journals_are_not_called_equal() {
    let events = [typed(1), typed(2)];
    let cut = journal(&header(), &[&events], 2);
    let further = journal(&header(), &[&events], 9);
    let found = compare(&cut, &further);
    assert_eq!(found.outcome(), Outcome::Different);
    assert!(text(&found).contains("the ends differ:\n  A: the journal ends after exit 2"));

    let found = compare(&cut, &cut);
    assert_eq!(found.outcome(), Outcome::CutShort);
    assert!(text(&found).contains("as far as they go:\n  A: the journal ends after exit 2"));
    assert_eq!(found.to_json()["equal"], false);

    let closed = journal(&header(), &[&[end(Ending::Halted)]], 1);
    let glued = [&closed[..], b"x"].concat();
    let found = compare(&closed, &glued);
    assert_eq!(found.outcome(), Outcome::Different);
    assert!(text(&found).contains("B: the journal is damaged"));
}
