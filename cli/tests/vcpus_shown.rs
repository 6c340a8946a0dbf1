//! Who reads a listing sees the number of a vCPU where there is more than one; a program sees it always.

use std::process::Command;

use hindsight_replay::{
    Answer, Event, Exit, Header, JournalWriter, Moment, Place, Registers, Turn, Unit, VcpuNumber,
};

/// A journal with an event of each kind that is of a vCPU; the interrupt has this RCX.
fn journal(rcx: u64) -> Vec<u8> {
    let vcpu = VcpuNumber::BOOT;
    let place = Place {
        unit: Unit::Branches,
        number: 9,
        rip: 0x1000,
    };
    let turn = Turn {
        vcpu,
        exit: Exit::Preempted(place),
        answer: Answer::Done,
        now: 0,
        registers: Registers::default(),
    };
    let at = Moment {
        exits: 1,
        rcx,
        ..Moment::START
    };
    let mut journal = Vec::new();
    let header = Header::smallest();
    let mut writer = JournalWriter::create(&mut journal, &header).expect("a Vec takes all");
    for event in [
        Event::Preempted { vcpu, place },
        Event::Turn(Box::new(turn)),
        Event::Interrupt { vector: 0x30, at },
    ] {
        writer.append(1, event).expect("a Vec takes all");
    }
    writer.close_frame(1, 0).expect("a Vec takes all");
    journal
}

fn printed(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_hindsight"))
        .args(arguments)
        .output()
        .expect("it starts");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn listings_say_the_vcpu_to_programs_and_not_of_a_machine_that_has_one_to_people() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let paths = [7, 8].map(|rcx| {
        let path = dir.path().join(rcx.to_string());
        std::fs::write(&path, journal(rcx)).expect("it can be written");
        path.to_str().expect("a plain path").to_string()
    });
    let [a, b] = [&paths[0][..], &paths[1][..]];

    let lines = printed(&["inspect", "--events", "--json", a]);
    assert_eq!(lines.lines().count(), 3, "{lines}");
    for line in lines.lines() {
        assert!(line.contains("\"vcpu\":0"), "{line}");
    }
    let overview = printed(&["inspect", "--json", a]);
    let overview: serde_json::Value = serde_json::from_str(&overview).expect("JSON");
    assert_eq!(overview["header"]["machine"]["vcpus"], 1);

    let text = printed(&["inspect", "--events", a]);
    assert_eq!(text.lines().count(), 3, "{text}");
    let diff = printed(&["diff", a, b]);
    assert!(
        diff.contains("exit 1: interrupt 0x30 at rip 0x0 rcx 0x7"),
        "{diff}"
    );
    assert!(diff.contains("rcx 0x8"), "{diff}");
    for text in [text, diff] {
        assert!(!text.to_lowercase().contains("vcpu"), "{text}");
    }
}
