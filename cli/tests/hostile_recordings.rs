//! Journals that were made by somebody else, as a file alone, given to the program as a whole.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use hindsight_devices::DiskSpec;
use hindsight_replay::{
    Detail, End, Ending, Event, FRAME_RAW_MAX, Header, JournalWriter, MAGIC, Turn, VERSION,
};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// No command may have more memory of its own than this, in KiB.
const DATA_KIB_MAX: u32 = 64 << 10;

/// Would clear a terminal, name it anew, and turn text around.
const HOSTILE: &str = "\x1b[2J\x1b]0;x\x07\u{202e}\u{9b}31m\r";

fn header() -> Header {
    let mut header = Header::smallest();
    header.detail = Detail::Full;
    header.machine.cmdline = format!("quiet {HOSTILE}");
    header.machine.kernel_version = format!("6.1 {HOSTILE}");
    // "\x1b[2J", three times: the name of the CPU's maker.
    header.machine.cpuid.entries[0].values = [7, 0x4a32_5b1b, 0x4a32_5b1b, 0x4a32_5b1b];
    header.host.recorder = format!("hindsight {HOSTILE}");
    header.host.cpu = format!("a CPU {HOSTILE}");
    header.host.kernel = format!("6.1 {HOSTILE}");
    header.host.holes = vec![format!("RDRAND {HOSTILE}")];
    header
}

/// A journal of 1 KiB with two of the largest frames, of the smallest events: `event` over and over.
fn bomb(event: &Event, raw_bytes: usize) -> Vec<u8> {
    let mut journal = Vec::new();
    let mut writer = JournalWriter::create(&mut journal, &header()).expect("a Vec takes all");
    for frame in 1..=2_u64 {
        // The first is longer: it says where the registers are.
        for _ in 0..FRAME_RAW_MAX / raw_bytes - 20 {
            writer.append(frame, event.clone()).expect("there is room");
        }
        writer
            .close_frame(frame, u64::MAX)
            .expect("a Vec takes all");
    }
    journal
}

fn ended(header: &Header, panic: Option<&str>) -> Vec<u8> {
    let mut journal = Vec::new();
    let mut writer = JournalWriter::create(&mut journal, header).expect("a Vec takes all");
    let end = End {
        ending: Ending::StoppedRunning,
        panic: panic.map(Into::into),
        now: 0,
        digest: 0,
        state: None,
    };
    writer
        .append(1, Event::End(Box::new(end)))
        .expect("it is possible");
    writer.close_frame(1, 0).expect("a Vec takes all");
    journal
}

/// Runs the program with so much memory of its own and no more.
fn hindsight(arguments: &[&str]) -> Output {
    Command::new("sh")
        .arg("-c")
        .arg(format!("ulimit -d {DATA_KIB_MAX}; exec \"$0\" \"$@\""))
        .arg(env!("CARGO_BIN_EXE_hindsight"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("sh starts")
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

#[test]
fn no_command_that_reads_a_journal_takes_more_than_64_mib_for_a_few_kilobytes() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let file = dir.path().join("journal");
    let turn = Turn {
        vcpu: hindsight_replay::VcpuNumber::BOOT,
        exit: hindsight_replay::Exit::Halt,
        answer: hindsight_replay::Answer::Done,
        now: 0,
        registers: hindsight_replay::Registers::default(),
    };
    let bombs = [
        bomb(&Event::Turn(Box::new(turn)), 7),
        bomb(&Event::Time { ahead_ns: 0 }, 3),
    ];
    for bomb in bombs {
        assert!(bomb.len() < 4_000, "{}", bomb.len());
        std::fs::write(&file, &bomb).expect("it can be written");
        let file = path(&file);
        let commands: [&[&str]; 5] = [
            &["inspect", file],
            &["inspect", "--json", file],
            &["inspect", "--io", file],
            &["diff", file, file],
            &["diff", "--json", file, file],
        ];
        for command in commands {
            let output = hindsight(command);
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(3), "{command:?}: {stderr}");
        }
    }
}

#[test]
fn nothing_that_a_recording_says_reaches_a_terminal_as_it_is() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let (file, other) = (dir.path().join("journal"), dir.path().join("other"));
    std::fs::write(&file, ended(&header(), Some(HOSTILE))).expect("it can be written");
    let mut changed = header();
    changed.machine.cmdline = format!("other {HOSTILE}");
    changed.host.holes.clear();
    std::fs::write(&other, ended(&changed, None)).expect("it can be written");
    let commands: [&[&str]; 4] = [
        &["inspect", path(&file)],
        &["inspect", "--events", path(&file)],
        &["diff", path(&file), path(&other)],
        // Is no kernel's place: the error names what there is.
        &["replay", path(&file)],
    ];
    for command in commands {
        let output = hindsight(command);
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8(text).expect("what is printed is text");
        let obeyed = text
            .chars()
            .find(|c| *c != '\n' && (c.is_control() || *c == '\u{202e}'));
        assert_eq!(obeyed, None, "{command:?}: {text:?}");
        if command[0] != "replay" {
            assert!(
                text.contains(r"\x1b[2J\x1b]0;x\x07\u{202e}\u{9b}31m\r"),
                "{text}"
            );
        }
    }
    // A program gets what is exact.
    let output = hindsight(&["inspect", "--json", path(&file)]);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(value["end"]["panic"], HOSTILE);
    assert_eq!(
        value["header"]["machine"]["cmdline"],
        header().machine.cmdline
    );
}

#[test]
fn a_head_that_contradicts_itself_is_refused_by_every_command() {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let file = dir.path().join("journal");
    let mut disks = header();
    disks.machine.devices.disks = vec![DiskSpec {
        bytes: 512,
        read_only: false,
        serial: String::new(),
    }];
    let mut memory = header();
    memory.machine.memory_bytes = u64::MAX - 4095;
    let mut cpuid = header();
    cpuid.machine.cpuid.entries.clear();
    for header in [disks, memory, cpuid] {
        let body = postcard::to_stdvec(&header).expect("plain values serialise");
        let check = xxh3_64_with_seed(&body, u64::from(VERSION));
        let mut journal = MAGIC.to_vec();
        journal.extend(VERSION.to_le_bytes());
        journal.extend((body.len() as u32).to_le_bytes());
        journal.extend(check.to_le_bytes());
        journal.extend(body);
        std::fs::write(&file, &journal).expect("it can be written");
        let (file, out) = (path(&file), dir.path().join("out"));
        let commands: [&[&str]; 14] = [
            &["marks", file],
            &["mark", file, "--at", "1"],
            &["inspect", file],
            &["inspect", "--events", file],
            &["inspect", "--io", "--json", file],
            &["diff", file, file],
            &["replay", file],
            &["live", file, "--at", "1"],
            &["live", file, "--at", "1", "--record", path(&out)],
            &["fork", file, "--at", "1", "-n", "1"],
            &["console", file],
            &["pcap", file, "-o", path(&out)],
            &["disk", file, "--changed"],
            &["disk", file, "-o", path(&out)],
        ];
        for command in commands {
            let output = hindsight(command);
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{command:?}: {stderr}");
            assert!(
                stderr.contains("describes no machine"),
                "{command:?}: {stderr}"
            );
        }
        assert!(!out.exists(), "nothing was written");
    }
}
