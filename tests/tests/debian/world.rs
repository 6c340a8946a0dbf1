//! What comes from outside, and how: signals, a flood of input, a recorder that is stopped for a while.

use std::io::Write;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use hindsight_tests::debian::{Debian, Ran};

use super::{hindsight_escape, read_until, scratch, shell_line, signal, wait_for_journal};

/// How long a recorder may take to close its recording: far less than the guest would run.
const SOON: Duration = Duration::from_secs(10);

fn ended(child: Child) -> Ran {
    Ran::new(child.wait_with_output().expect("hindsight ends"))
}

/// Resident memory, in KiB.
fn memory_kib(child: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id()));
    let status = status.expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    number.expect("it has memory").parse().expect("a number")
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_terminal_that_hangs_up_closes_the_recording_and_one_under_nohup_goes_on() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let mut command = debian.recording(&recording, "boot", &["--quiet"]);
    let child = command.spawn().expect("it starts");
    wait_for_journal(&recording, 5_000);
    signal(&child, "HUP");
    let recorded = ended(child).expect(0);
    assert!(recorded.stderr.contains("asked to stop"), "{recorded:?}");
    let replayed = debian.replay(&recording, &["--quiet"]).expect(0);
    assert!(replayed.stderr.contains("replay equal"), "{replayed:?}");

    let recording = dir.path().join("nohup");
    let command = debian.recording(&recording, "hello", &["--quiet"]);
    let mut nohup = std::process::Command::new("nohup");
    nohup.arg(command.get_program()).args(command.get_args());
    let child = nohup
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nohup starts");
    wait_for_journal(&recording, 3_000);
    signal(&child, "HUP");
    let recorded = ended(child).expect(0);
    assert!(!recorded.stderr.contains("asked to stop"), "{recorded:?}");
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_flood_of_input_takes_no_memory_and_keeps_nobody_waiting() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    // A guest that reads nothing.
    let mut command = debian.recording(&recording, "spin", &["--quiet"]);
    let mut child = command.stdin(Stdio::piped()).spawn().expect("it starts");
    let mut stdin = child.stdin.take().expect("it is piped");
    let floods = std::thread::spawn(move || {
        let mut bytes = 0u64;
        while let Ok(count) = stdin.write(&[b'y'; 65_536]) {
            bytes += count as u64;
        }
        bytes
    });
    wait_for_journal(&recording, 5_000);
    let before = memory_kib(&child);
    std::thread::sleep(Duration::from_secs(3));
    let grown = memory_kib(&child).saturating_sub(before);
    // The guest's own memory grows as it touches it, to 256 MiB at most, but a boot is over by now.
    assert!(grown < 64 << 10, "{grown} KiB in 3 s");
    let asked = Instant::now();
    signal(&child, "INT");
    let recorded = ended(child).expect(0);
    assert!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
    assert!(recorded.stderr.contains("asked to stop"), "{recorded:?}");
    let bytes = floods.join().expect("it ends");
    assert!(
        bytes < 4 << 20,
        "{bytes} bytes went into a guest that reads none"
    );
    debian.replay(&recording, &["--quiet"]).expect(0);
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_recorder_that_was_stopped_shows_its_guest_a_second_of_it_and_no_lockup() {
    const STOPPED: Duration = Duration::from_secs(30);
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let words = ["--cmdline", "softlockup_panic=1", "--json"];
    let child = debian
        .recording(&recording, "boot", &words)
        .spawn()
        .expect("it starts");
    wait_for_journal(&recording, 5_000);
    signal(&child, "STOP");
    std::thread::sleep(STOPPED);
    signal(&child, "CONT");
    let summary = ended(child).expect(0).json();
    assert_eq!(summary["panicked"], false, "{summary}");
    let number = |name: &str| summary[name].as_u64().expect("a number");
    let left_out_ns = number("host_ns").saturating_sub(number("guest_ns"));
    assert!(left_out_ns > 28_000_000_000, "{summary}");
    debian.replay(&recording, &["--quiet"]).expect(0);
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_loop_gets_on_under_timers_that_are_due_before_their_handlers_return() {
    let (debian, dir) = (Debian::from_env(), scratch());
    for (name, more) in [
        ("plain", &[][..]),
        ("exits", &["--time-reads", "exit"]),
        ("chaos", &["--chaos=7"]),
    ] {
        let recording = dir.path().join(name);
        let recorded = debian.record(&recording, "alarms", more, b"").expect(0);
        let console = recorded.text();
        for us in [1_000, 100, 10, 1] {
            let line = format!("alarms: every {us} us: ");
            let line = console
                .lines()
                .find_map(|l| l.split_once(&line))
                .expect(&line);
            let (signals, ns) = line.1.split_once(" signals, ").expect(&console);
            let ns: u64 = ns
                .trim_end_matches(" ns\r")
                .trim_end_matches(" ns")
                .parse()
                .expect(ns);
            assert!(ns < 20_000_000_000, "{name}: {signals} signals, {ns} ns");
        }
        debian.replay(&recording, &["--quiet"]).expect(0);
    }
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_terminal_is_as_it_was_after_each_way_to_end() {
    let (debian, dir) = (Debian::from_env(), scratch());
    for name in ["TERM", "HUP", "ABRT", "escape"] {
        let recording = dir.path().join(name);
        let (run, pid) = (dir.path().join("run"), dir.path().join("pid"));
        let command = debian.recording(&recording, "input", &[]);
        let line = shell_line(&command);
        let text = format!("echo $$ >{}\nexec {line}\n", pid.display());
        std::fs::write(&run, text).expect("it can be written");
        // A shell that looks at the terminal before and after, and has set it up as nobody else would.
        let shell = format!(
            "stty -echoctl min 3; stty -g; sh {}; echo; stty -g; echo looked at twice",
            run.display()
        );
        let mut script = std::process::Command::new("script")
            .args(["-qec", &shell, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("script starts");
        let mut keyboard = script.stdin.take().expect("it is piped");
        let mut screen = script.stdout.take().expect("it is piped");
        let mut shown = Vec::new();
        read_until(&mut screen, &mut shown, "input: ready");
        if name == "escape" {
            let escape = [hindsight_escape()];
            keyboard.write_all(&escape).expect("keys can be pressed");
        } else {
            let pid = std::fs::read_to_string(&pid).expect("it was written");
            let killed = std::process::Command::new("kill")
                .args(["-s", name, pid.trim()])
                .status();
            assert!(killed.expect("kill starts").success());
        }
        read_until(&mut screen, &mut shown, "looked at twice");
        let shown = String::from_utf8_lossy(&shown);
        let modes: Vec<&str> = shown
            .lines()
            .map(str::trim)
            .filter(|line| line.matches(':').count() > 10)
            .collect();
        assert!(
            modes.len() == 2 && modes[0] == modes[1],
            "{name}: {modes:?}\n{shown}"
        );
        script.wait().expect("script ends");
    }
}
