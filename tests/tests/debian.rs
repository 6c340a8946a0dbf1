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

#[path = "debian/disks.rs"]
mod disks;
#[path = "debian/network.rs"]
mod network;
#[path = "debian/outputs.rs"]
mod outputs;
#[path = "debian/panics.rs"]
mod panics;
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
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_relogged_recording_says_what_inspect_io_prints() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let (recording, full) = (dir.path().join("r"), dir.path().join("full"));
    debian.record(&recording, "hello", &[], b"").expect(0);
    let relog = full.to_str().expect("a plain path");
    debian
        .replay(&recording, &["--relog", relog, "--quiet"])
        .expect(0);
    let by_replay = debian.inspect(&recording, &["--io"]).expect(0);
    let by_reading = debian.inspect(&full, &["--io"]).expect(0);
    assert!(by_replay.stdout == by_reading.stdout, "the listings differ");
    let listing = by_reading.text();
    for wanted in [
        "in8 port",
        "out8 port",
        "rdtsc ->",
        "cpuid 0x",
        "interrupt 0x",
    ] {
        assert!(
            listing.contains(wanted),
            "no {wanted:?} among {} lines",
            listing.lines().count()
        );
    }
    debian.replay(&full, &["--quiet"]).expect(0);

    // And back again: the default recording of the full one is the first one's own journal.
    let again = dir.path().join("again");
    let relog = again.to_str().expect("a plain path");
    debian
        .replay(&full, &["--relog", relog, "--detail", "default", "--quiet"])
        .expect(0);
    let journals =
        [&recording, &again].map(|d| std::fs::read(d.join("journal")).expect("a journal"));
    assert!(journals[0] == journals[1], "the journals differ");
    assert_eq!(
        debian.run(&["diff", path(&recording), path(&again)]).code,
        0
    );
    assert_eq!(debian.run(&["diff", path(&recording), path(&full)]).code, 1);

    each_altered_value_is_refused_at_its_event(&debian, &full, dir.path());
}

/// Alters one value of a kind in the middle of a full recording, with all checksums made right, and
/// expects the replay to stop at exactly that event.
fn each_altered_value_is_refused_at_its_event(debian: &Debian, full: &Path, dir: &Path) {
    type Alter = fn(&mut Event) -> bool;
    let kinds: [(&str, Alter); 7] = [
        ("a device read", |event| match event {
            Event::Turn(turn) => match (&turn.exit, &mut turn.answer) {
                (Exit::Access(_), Answer::Value(value)) => flip(value),
                _ => false,
            },
            _ => false,
        }),
        ("a time read", |event| match event {
            Event::Turn(turn) => match &mut turn.answer {
                Answer::Time { tsc, .. } => flip(tsc),
                _ => false,
            },
            _ => false,
        }),
        ("a posted write", |event| match event {
            Event::Posted(bytes) => {
                bytes[0] ^= 1;
                true
            }
            _ => false,
        }),
        ("a cpuid", |event| match event {
            Event::Turn(turn) => match &mut turn.answer {
                Answer::Cpuid(values) => {
                    values[3] ^= 1;
                    true
                }
                _ => false,
            },
            _ => false,
        }),
        ("a register", |event| match event {
            Event::Turn(turn) => flip(&mut turn.registers.0[5]),
            _ => false,
        }),
        ("an interrupt's vector", |event| match event {
            Event::Interrupt { vector, .. } => {
                *vector ^= 1;
                true
            }
            _ => false,
        }),
        ("an interrupt's place", |event| match event {
            Event::Interrupt { at, .. } => flip(&mut at.rip),
            _ => false,
        }),
    ];
    for (what, alter) in kinds {
        let altered = dir.join("altered");
        copy(full, &altered);
        let exit = rewrite(&altered, alter).unwrap_or_else(|| panic!("{what}: none was found"));
        let refused = debian.replay(&altered, &["--quiet"]).expect(1);
        let expected = format!("left the recording at exit {exit} ");
        assert!(
            refused.stderr.contains(&expected),
            "{what}: not {expected}:\n{}",
            refused.stderr
        );
    }
}

fn flip(value: &mut u64) -> bool {
    *value ^= 1;
    true
}

/// Rewrites a journal with the first event behind exit 300 that `alter` takes changed; returns its
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

#[test]
#[ignore = "needs a KVM that can record"]
fn what_is_not_the_recorded_machine_is_refused_with_both_sides() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    debian.record(&recording, "hello", &[], b"").expect(0);
    let other = debian.image("spin");
    let refused = debian
        .replay(&recording, &["--initrd", path(&other)])
        .expect(2);
    assert!(
        refused.stderr.contains("is not the recorded initrd"),
        "{}",
        refused.stderr
    );
    let refused = debian
        .replay(&recording, &["--kernel", path(&other)])
        .expect(2);
    assert!(
        refused.stderr.contains("is not the recorded kernel"),
        "{}",
        refused.stderr
    );
    let refused = debian.replay(&recording, &["--memory", "512M"]).expect(2);
    assert!(refused.stderr.contains("536870912") && refused.stderr.contains("268435456"));

    let mut journal = std::fs::read(recording.join("journal")).expect("a journal");
    journal[8] += 1;
    std::fs::write(recording.join("journal"), journal).expect("the journal can be written");
    let refused = debian.replay(&recording, &[]).expect(2);
    let versions = [
        format!("version {}", VERSION + 1),
        format!("version {VERSION}"),
    ];
    assert!(
        versions.iter().all(|v| refused.stderr.contains(v)),
        "{}",
        refused.stderr
    );
    std::fs::remove_file(recording.join("journal")).expect("it is there");
    debian.replay(&recording, &[]).expect(2);
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_killed_recorder_leaves_what_replays_to_the_last_whole_frame() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let mut child = debian
        .recording(&recording, "boot", &["--quiet"])
        .spawn()
        .expect("it starts");
    wait_for_journal(&recording, 6_000);
    child.kill().expect("it can be killed");
    child.wait().expect("it ends");
    let replayed = debian.replay(&recording, &["--quiet"]).expect(3);
    assert!(
        replayed.stderr.contains("replay cut short"),
        "{}",
        replayed.stderr
    );

    // Cut inside the last frames: still a prefix, and the words say where.
    let whole = std::fs::read(recording.join("journal")).expect("a journal");
    let cut = dir.path().join("cut");
    for cut_at in [whole.len() - 1, whole.len() * 2 / 3] {
        copy(&recording, &cut);
        std::fs::write(cut.join("journal"), &whole[..cut_at]).expect("it can be written");
        let replayed = debian.replay(&cut, &["--quiet"]).expect(3);
        assert!(
            replayed
                .stderr
                .contains("breaks off inside a frame at byte"),
            "{}",
            replayed.stderr
        );
    }
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

#[test]
#[ignore = "needs a KVM that can record, and root to mount a small file system"]
fn a_full_file_system_ends_the_recording_and_loses_nothing_written() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let small = dir.path().join("small");
    std::fs::create_dir(&small).expect("it can be made");
    let bytes = |path: &Path| std::fs::metadata(path).expect("it is there").len();
    let images = bytes(debian.kernel()) + bytes(&debian.image("hello"));
    // Room for some frames of the journal, and not for all of it.
    let size = format!("size={}", images + (40 << 10));
    let mount = |arguments: &[&str]| {
        let status = std::process::Command::new("mount")
            .args(arguments)
            .arg(&small)
            .status();
        assert!(status.expect("mount starts").success(), "mount failed");
    };
    mount(&["-t", "tmpfs", "-o", &size, "tmpfs"]);
    let recording = small.join("r");
    let recorded = debian.record(&recording, "hello", &["--detail", "full", "--quiet"], b"");
    let replayed = (recorded.code == 5).then(|| debian.replay(&recording, &["--quiet"]));
    let unmounted = std::process::Command::new("umount")
        .arg("-l")
        .arg(&small)
        .status();
    assert!(unmounted.expect("umount starts").success());
    let recorded = recorded.expect(5);
    assert!(
        recorded.stderr.contains("No space left on device"),
        "{}",
        recorded.stderr
    );
    let replayed: Ran = replayed.expect("it failed as expected");
    assert_eq!(replayed.code, 3, "{}", replayed.stderr);
    assert!(
        replayed.stderr.contains("whole up to exit"),
        "{}",
        replayed.stderr
    );
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
fn an_interrupted_recording_is_closed_and_replays_equal() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let child = debian
        .recording(&recording, "boot", &["--quiet"])
        .spawn()
        .expect("it starts");
    wait_for_journal(&recording, 5_000);
    interrupt(&child);
    let recorded = Ran::new(child.wait_with_output().expect("it ends")).expect(0);
    assert!(
        recorded.stderr.contains("asked to stop"),
        "{}",
        recorded.stderr
    );
    let replayed = debian.replay(&recording, &["--quiet"]).expect(0);
    assert!(
        replayed.stderr.contains("replay equal: asked to stop"),
        "{}",
        replayed.stderr
    );
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_guest_that_turns_itself_off_ends_its_recording_and_replays_equal() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let recorded = debian.record(&recording, "off", &[], b"").expect(0);
    assert!(
        recorded.text().contains("off: good night") && recorded.stderr.contains("powered off"),
        "{}",
        recorded.stderr
    );
    let replayed = debian.replay(&recording, &["--quiet"]).expect(0);
    assert!(
        replayed.stderr.contains("replay equal: powered off"),
        "{}",
        replayed.stderr
    );
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
#[ignore = "needs a KVM that can record, and the kernel's modules in /lib/modules"]
fn the_power_button_turns_a_guest_off_that_listens() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let (recording, initrd) = (dir.path().join("r"), dir.path().join("initrd"));
    let kernel = debian.kernel().file_name().expect("a file");
    let version = kernel
        .to_str()
        .expect("a plain name")
        .trim_start_matches("vmlinuz-");
    let module = format!("/lib/modules/{version}/kernel/drivers/acpi/button.ko");
    let module = std::fs::read(&module).unwrap_or_else(|error| panic!("{module}: {error}"));
    let mut archives = std::fs::read(debian.image("off")).expect("the image is built");
    archives.extend(archive_of("button.ko", &module));
    std::fs::write(&initrd, archives).expect("it can be written");

    let mut command = debian.command(&["record", "-o", path(&recording)]);
    command.arg("--kernel").arg(debian.kernel());
    let mut child = command
        .arg("--initrd")
        .arg(&initrd)
        .spawn()
        .expect("it starts");
    let mut console = child.stdout.take().expect("it is piped");
    let mut shown = Vec::new();
    read_until(&mut console, &mut shown, "waiting for the power button");
    signal(&child, "PWR");
    console.read_to_end(&mut shown).expect("it can be read");
    let recorded = Ran::new(child.wait_with_output().expect("it ends")).expect(0);
    let shown = String::from_utf8_lossy(&shown);
    assert!(shown.contains("off: pressed"), "{shown}");
    assert!(
        recorded.stderr.contains("powered off"),
        "{}",
        recorded.stderr
    );
    let replayed = debian.replay(&recording, &[]).expect(0);
    assert!(replayed.text() == shown, "{}", replayed.text());
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_module_loader_that_is_led_away_from_is_told_at_once_and_shown_as_left_open() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let recorded = debian.record(&recording, "changed", &[], b"").expect(0);
    let what = "the function that loads them is livepatched";
    let told = |text: &str| text.contains("left open") && text.contains(what);
    assert!(told(&recorded.stderr), "{}", recorded.stderr);
    let inspected = debian.inspect(&recording, &[]).expect(0).text();
    assert!(told(&inspected), "{inspected}");
    debian.replay(&recording, &[]).expect(0);

    // A guest that leaves its kernel alone is not spoken of.
    let recorded = debian
        .record(&recording, "hello", &["--force"], b"")
        .expect(0);
    assert!(
        !recorded.stderr.contains("left open"),
        "{}",
        recorded.stderr
    );
}

#[test]
#[ignore = "needs a KVM that can record"]
fn another_kernel_that_the_guest_starts_is_told_and_shown_as_left_open() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let (recording, initrd) = (dir.path().join("r"), dir.path().join("initrd"));
    let kernel = std::fs::read(debian.kernel()).expect("it reads");
    let mut archives = std::fs::read(debian.image("changed")).expect("the image is built");
    archives.extend(archive_of("kernel", &kernel));
    std::fs::write(&initrd, archives).expect("it can be written");
    let mut command = debian.command(&["record", "-q", "--memory", "512M", "-o", path(&recording)]);
    command.arg("--kernel").arg(debian.kernel());
    command.arg("--initrd").arg(&initrd);
    let recorded = Ran::new(command.output().expect("it runs")).expect(0);
    let what = "another kernel, which runs in place of the one that was loaded";
    assert!(recorded.stderr.contains(what), "{}", recorded.stderr);
    let inspected = debian.inspect(&recording, &[]).expect(0).text();
    assert!(inspected.contains(what), "{inspected}");
}

/// An archive with one file, as the kernel unpacks it behind another (cpio's format `newc`; Linux,
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

#[test]
#[ignore = "needs a KVM that can record"]
fn no_damage_to_a_journal_makes_a_command_panic_or_approve() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    debian
        .record(&recording, "hello", &["--quiet"], b"")
        .expect(0);
    let whole = std::fs::read(recording.join("journal")).expect("a journal");
    let damaged = dir.path().join("damaged");
    copy(&recording, &damaged);
    // Places all over the file; `replay` only where it ends early.
    let step = whole.len() / 60;
    for (turn, at) in (0..whole.len()).step_by(step).enumerate() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (turn % 8);
        std::fs::write(damaged.join("journal"), &bytes).expect("it can be written");
        let inspected = debian.inspect(&damaged, &["--json"]);
        assert!(
            matches!(inspected.code, 2 | 3),
            "byte {at}: {}",
            inspected.stderr
        );
        let compared = debian.run(&["diff", path(&recording), path(&damaged)]);
        assert!(
            matches!(compared.code, 1 | 2),
            "byte {at}: {}",
            compared.stderr
        );
        if at < 3 * step {
            let replayed = debian.replay(&damaged, &["--quiet"]);
            assert!(
                matches!(replayed.code, 2 | 3),
                "byte {at}: {}",
                replayed.stderr
            );
        }
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
fn a_terminal_is_raw_while_the_guest_has_it_and_the_escape_key_ends_the_recording() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let command = debian.recording(&recording, "input", &[]);
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| format!("'{}'", word.to_str().expect("plain words")))
        .collect();
    // script(1) gives the program a terminal of its own, fed from our pipe.
    let mut script = std::process::Command::new("script")
        .args(["-qefc", &words.join(" "), "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script starts");
    let mut keyboard = script.stdin.take().expect("it is piped");
    let mut screen = script.stdout.take().expect("it is piped");
    let mut shown = Vec::new();
    let mut await_text = |wanted: &str| read_until(&mut screen, &mut shown, wanted);
    await_text("input: ready");
    keyboard.write_all(b"abc\r").expect("keys can be pressed");
    await_text("input: 1 ABC");
    keyboard
        .write_all(&[hindsight_escape()])
        .expect("keys can be pressed");
    await_text("asked to stop");
    assert!(script.wait().expect("script ends").success());
    let replayed = debian.replay(&recording, &[]).expect(0);
    assert!(
        replayed.text().contains("input: 1 ABC"),
        "{}",
        replayed.text()
    );
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

/// Ctrl-].
fn hindsight_escape() -> u8 {
    b']' & 0x1f
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

#[test]
#[ignore = "needs a KVM that can record"]
fn a_module_that_reads_the_time_ten_thousand_times_replays_equal() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let (recording, full) = (dir.path().join("r"), dir.path().join("full"));
    let recorded = debian.record(&recording, "module", &[], b"").expect(0);
    let console = recorded.text();
    // Twice: the second stands where the first stood. The stock modules have their say as well.
    for (line, times) in [
        ("tsc: 10 reads before the beginning", 2),
        ("tsc: 11112 reads, 0 went backwards", 2),
        ("tsc: 11113 reads at the end", 2),
        ("tsc: CR4.TSD is 0", 2),
        ("module: /lib/zstd_compress.ko: loaded", 1),
        ("module: ok", 1),
    ] {
        assert_eq!(console.matches(line).count(), times, "{line}:\n{console}");
    }
    for _ in 0..2 {
        let replayed = debian.replay(&recording, &["--verify", "memory"]).expect(0);
        assert!(
            replayed.stdout == recorded.stdout,
            "the console differs:\n{}",
            replayed.text()
        );
    }
    let relog = debian
        .replay(&recording, &["--relog", path(&full), "--json"])
        .expect(0)
        .json();
    let summary = &relog["summary"];
    assert_eq!(summary["modules"], 5, "{summary}");
    assert!(
        summary["module_sites"].as_u64() >= Some(2 * 10 + 1 + 4),
        "{summary}"
    );
    let exits = &summary["exits_by_kind"];
    // Some thousand more are the kernel's own, and those of jitterentropy_rng.
    assert!(
        exits["kernel time reads"].as_u64() >= Some(2 * 11_113),
        "{exits}"
    );
    let listed = debian.inspect(&full, &["--io"]).expect(0).text();
    assert_eq!(listed.matches(" module 0x").count(), 5);
    let inspected = debian.inspect(&recording, &[]).expect(0).text();
    assert!(inspected.contains("1 module loads"), "{inspected}");
    assert!(!inspected.contains("loadable modules"), "{inspected}");
}
