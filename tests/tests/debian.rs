//! Debian's own kernel, recorded and replayed through the command line. Slow, and in need of a KVM
//! that can record: `scripts/test` runs these where there is one.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use hindsight_replay::{Answer, Event, Exit, JournalReader, JournalWriter, VERSION};
use hindsight_tests::debian::{Debian, Ran, copy};
use hindsight_tests::measure::Load;
use tempfile::TempDir;

mod breakpoints;
#[path = "debian/cause.rs"]
mod cause;
#[path = "debian/debugging.rs"]
mod debugging;
#[path = "debian/disks.rs"]
mod disks;
#[path = "debian/ends.rs"]
mod ends;
#[path = "debian/live.rs"]
mod live;
#[path = "debian/marks.rs"]
mod marks;
#[path = "debian/modules.rs"]
mod modules;
#[path = "debian/network.rs"]
mod network;
#[path = "debian/outputs.rs"]
mod outputs;
#[path = "debian/panics.rs"]
mod panics;
#[path = "debian/refusals.rs"]
mod refusals;
#[path = "debian/states.rs"]
mod states;
#[path = "debian/time_travel.rs"]
mod time_travel;
#[path = "debian/world.rs"]
mod world;

fn scratch() -> TempDir {
    tempfile::tempdir().expect("a temporary directory can be made")
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_boot_with_typed_input_replays_equal_twice() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let recorded = debian
        .record(&recording, "input", &[], b"hello\nworld\nquit\n")
        .expect(0);
    let console = recorded.text();
    assert!(
        console.contains("input: 1 HELLO") && console.contains("input: 2 WORLD"),
        "{console}"
    );
    for _ in 0..2 {
        let replayed = debian.replay(&recording, &["--verify", "memory"]).expect(0);
        assert!(
            replayed.stdout == recorded.stdout,
            "the console differs:\n{}",
            replayed.text()
        );
        assert!(
            replayed.stderr.contains("replay equal"),
            "{}",
            replayed.stderr
        );
    }
    the_console_is_told_with_its_times(&debian, &recording, &recorded.stdout);
    the_console_becomes_an_asciicast(&debian, &recording, &recorded.stdout);
}

fn the_console_is_told_with_its_times(debian: &Debian, recording: &Path, console: &[u8]) {
    let told = debian.run(&["console", path(recording), "--raw"]).expect(0);
    let (mut text, mut last) = (Vec::new(), 0.0);
    for line in told.stdout.split_inclusive(|byte| *byte == b'\n') {
        let (stamp, rest) = line.split_at(15);
        let stamp = std::str::from_utf8(stamp).expect("a time");
        let time = stamp.strip_prefix('[').and_then(|s| s.strip_suffix("] "));
        let time: f64 = time.expect(stamp).trim().parse().expect(stamp);
        assert!(time >= last && time < 1000.0, "{stamp}");
        last = time;
        text.extend_from_slice(rest);
    }
    assert!(last > 1.0 && text == console, "{}", told.text());
}

fn the_console_becomes_an_asciicast(debian: &Debian, recording: &Path, console: &[u8]) {
    let cast = recording.with_extension("cast");
    let options = ["console", path(recording), "--cast", path(&cast)];
    debian
        .run(&[&options[..], &["--size", "132x43"]].concat())
        .expect(0);
    let cast = std::fs::read_to_string(cast).expect("it was written");
    let mut lines = cast
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect(line));
    let header = lines.next().expect("a header");
    assert_eq!(
        header,
        serde_json::json!({"version": 2, "width": 132, "height": 43})
    );
    let (mut text, mut last) = (String::new(), 0.0);
    for event in lines {
        let time = event[0].as_f64().expect("a time");
        assert!(time >= last && event[1] == "o", "{event}");
        last = time;
        text.push_str(event[2].as_str().expect("text"));
    }
    assert_eq!(text, String::from_utf8_lossy(console));
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_crash_that_chaos_brings_out_replays_to_the_same_crash() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let options = ["--until-crash=60", "--chaos=1", "--json"];
    let recorded = debian.record(&recording, "race", &options, b"").expect(0);
    let summary = recorded.json();
    assert_eq!(summary["panicked"], true, "{summary}");
    assert_eq!(
        summary["chaos_seed"].as_u64(),
        summary["runs"].as_u64(),
        "{summary}"
    );
    for _ in 0..2 {
        let replayed = debian.replay(&recording, &[]).expect(0);
        let panics = replayed.text().contains("Attempted to kill init!");
        assert!(panics, "{}", replayed.text());
        assert!(
            replayed.stderr.contains("Attempted to kill init!"),
            "{}",
            replayed.stderr
        );
    }
    cause::is_found(&debian, &recording, dir.path());
}

fn wait_for_journal(recording: &Path, bytes: u64) {
    let start = Instant::now();
    while std::fs::metadata(recording.join("journal")).map_or(0, |meta| meta.len()) < bytes {
        assert!(
            start.elapsed() < Duration::from_secs(120),
            "the journal does not grow"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What Ctrl-C does.
fn interrupt(child: &std::process::Child) {
    signal(child, "INT");
}

fn signal(child: &std::process::Child, name: &str) {
    let status = std::process::Command::new("kill")
        .args(["-s", name, &child.id().to_string()])
        .status();
    assert!(status.expect("kill starts").success());
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_kernel_that_is_told_to_do_without_replays_equal_too() {
    let debian = Debian::from_env();
    for words in [
        "lapic=notscdeadline",
        "noapic",
        "noapic nolapic acpi=off reboot=k",
    ] {
        let dir = scratch();
        let recording = dir.path().join("r");
        let options = ["--cmdline", words, "--quiet"];
        debian.record(&recording, "hello", &options, b"").expect(0);
        let replayed = debian.replay(&recording, &[]).expect(0);
        let told = replayed.text();
        assert!(told.contains("hello from user space"), "{words}: {told}");
    }
}

#[test]
#[ignore = "needs a KVM that can record"]
fn memory_digests_on_the_way_are_compared() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    debian
        .record(
            &recording,
            "hello",
            &["--verify", "memory=1000", "--quiet"],
            b"",
        )
        .expect(0);
    let verdict = debian
        .replay(&recording, &["--verify", "memory=1000", "--json"])
        .expect(0)
        .json();
    assert!(verdict["memories_equal"].as_u64() >= Some(2), "{verdict}");
    let verdict = debian
        .replay(&recording, &["--until", "2000", "--json"])
        .expect(0)
        .json();
    assert_eq!(verdict["exits"].as_u64(), Some(2_000), "{verdict}");
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_guest_that_swaps_evicts_the_same_pages_in_a_replay_on_a_loaded_host() {
    let (debian, dir) = (Debian::from_env(), scratch());
    for mglru in ["mglru=7", "mglru=0"] {
        let recording = dir.path().join(mglru);
        let words = format!("quiet {mglru} seconds=4 mib=90");
        let more = ["--memory", "256M", "--cmdline", &words];
        let recorded = debian.record(&recording, "reclaim", &more, b"").expect(0);
        let console = recorded.text();
        assert!(
            console.contains("done, 0 of 3 processes failed"),
            "{console}"
        );
        let swapped_out = console.lines().find_map(|line| {
            let count = line.trim().strip_prefix("reclaim: pswpout ")?;
            count.parse::<u64>().ok()
        });
        assert!(swapped_out > Some(1_000), "it was to swap: {console}");
        let load = Load::start();
        let replayed = debian.replay(&recording, &[]).expect(0);
        drop(load);
        assert_eq!(replayed.text(), console);
        let verdict = replayed.stderr;
        // Every bit that the CPU could set was set: nothing is left to be masked.
        assert!(verdict.contains("replay equal:"), "{verdict}");
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_guest_that_enters_its_kernel_is_preempted_there_and_replays_equal() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    // Without patience: on a fast host the guest exits by itself before it would be at an end.
    let options = ["--preempt", "entries", "--patience", "0", "--json"];
    let recorded = debian
        .record(&recording, "entries", &options, b"")
        .expect(0);
    let summary = recorded.json();
    let preemptions = summary["preemptions"].as_u64().unwrap_or_default();
    // How many depends on how fast the host is: most ticks find an exit soon enough.
    assert!(preemptions > 0, "{summary}");
    let replayed = debian.replay(&recording, &["--json"]).expect(0).json();
    assert_eq!(replayed["verdict"], "equal", "{replayed}");
    assert_eq!(replayed["summary"]["preemptions"], preemptions);
    assert_eq!(
        replayed["summary"]["memory_digest"],
        summary["memory_digest"]
    );
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_guest_that_cannot_be_preempted_is_told_about_and_can_be_stopped() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let options = ["--preempt", "entries", "--json"];
    let mut command = debian.recording(&recording, "quiet", &options);
    let mut child = command.spawn().expect("hindsight starts");
    let mut stderr = child.stderr.take().expect("standard error is a pipe");
    let mut told = Vec::new();
    read_until(&mut stderr, &mut told, "without an exit");
    interrupt(&child);
    stderr.read_to_end(&mut told).expect("it can be read");
    let mut output = child.wait_with_output().expect("hindsight ends");
    output.stderr = told;
    let recorded = Ran::new(output).expect(0);
    assert!(recorded.stderr.contains("--preempt"), "{}", recorded.stderr);
    debian.replay(&recording, &[]).expect(0);
}

/// A command as a shell takes it.
fn shell_line(command: &std::process::Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let quoted = words.map(|word| format!("'{}'", word.to_str().expect("plain words")));
    quoted.collect::<Vec<_>>().join(" ")
}

/// Reads on until what has been read has `wanted` in it.
fn read_until(source: &mut impl Read, shown: &mut Vec<u8>, wanted: &str) {
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(shown).contains(wanted) {
        let count = source.read(&mut buffer).expect("it can be read");
        assert!(
            count > 0,
            "no {wanted:?} in:\n{}",
            String::from_utf8_lossy(shown)
        );
        shown.extend(&buffer[..count]);
    }
}

/// The guest time at which a line of the console begins, as a moment.
fn line_time(debian: &Debian, recording: &Path, line: &str) -> String {
    let told = debian.run(&["console", path(recording), "--raw"]).expect(0);
    let told = told.text();
    let stamped = told.lines().find(|told| told.contains(line)).expect(line);
    let time = stamped
        .strip_prefix('[')
        .and_then(|rest| rest.split(']').next());
    format!("{}s", time.expect(stamped).trim())
}

/// Ctrl-].
fn hindsight_escape() -> u8 {
    b']' & 0x1f
}

fn flip(value: &mut u64) -> bool {
    *value ^= 1;
    true
}

/// Rewrites a journal with the first event after exit 300 that `alter` takes changed; returns its
/// exit.
fn rewrite(recording: &Path, alter: fn(&mut Event) -> bool) -> Option<u64> {
    let journal = recording.join("journal");
    let bytes = std::fs::read(&journal).expect("the journal can be read");
    let mut reader = JournalReader::open(bytes.as_slice()).expect("the head is whole");
    let mut out = Vec::new();
    let mut writer = JournalWriter::create(&mut out, reader.header()).expect("a Vec takes all");
    let mut at = None;
    while let Some(frame) = reader.next_frame().expect("a slice can be read") {
        for mut record in frame.records() {
            if at.is_none() && record.exits > 300 && alter(&mut record.event) {
                at = Some(record.exits);
            }
            writer
                .append(record.exits, record.event)
                .expect("a Vec takes all");
        }
        writer
            .close_frame(frame.place.through, frame.place.now)
            .expect("a Vec takes all");
    }
    drop(writer);
    std::fs::write(&journal, out).expect("the journal can be written");
    at
}

/// An archive with one file, as the kernel unpacks it after another (cpio's format `newc`; Linux,
/// Documentation/driver-api/early-userspace/buffer-format.rst).
fn archive_of(name: &str, content: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, mode, content) in [(name, 0o100_644, content), ("TRAILER!!!", 0, &[][..])] {
        let size = content.len();
        let fields = [1, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend(b"070701");
        archive.extend(fields.map(|field| format!("{field:08x}")).concat().bytes());
        for part in [&[name.as_bytes(), b"\0"].concat(), content] {
            archive.extend(part);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
    }
    archive
}
