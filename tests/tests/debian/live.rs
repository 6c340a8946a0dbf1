//! A recording goes on as a running machine; a recorder lets its guest go on without it.

use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout};

use super::*;

fn json(debian: &Debian, recording: &Path, more: &[&str]) -> serde_json::Value {
    let options = [&["--quiet", "--json"], more].concat();
    debian.replay(recording, &options).expect(0).json()
}

fn live(debian: &Debian, recording: &Path, more: &[&str]) -> Ran {
    debian.run(&[&["live", path(recording)], more].concat())
}

/// A guest that is typed at, with what it has shown so far.
struct Typing {
    child: Child,
    keyboard: ChildStdin,
    screen: ChildStdout,
    shown: Vec<u8>,
}

impl Typing {
    fn at(mut command: std::process::Command) -> Typing {
        let mut child = command
            .stdin(Stdio::piped())
            .spawn()
            .expect("hindsight starts");
        Typing {
            keyboard: child.stdin.take().expect("it is piped"),
            screen: child.stdout.take().expect("it is piped"),
            child,
            shown: Vec::new(),
        }
    }

    fn read_until(&mut self, wanted: &str) {
        read_until(&mut self.screen, &mut self.shown, wanted);
    }

    fn type_in(&mut self, text: &str) {
        let typed = self.keyboard.write_all(text.as_bytes());
        typed.expect("keys can be pressed");
    }

    /// All that was shown, and how it ended.
    fn end(mut self) -> (String, Ran) {
        drop(self.keyboard);
        let rest = self.screen.read_to_end(&mut self.shown);
        rest.expect("it can be read");
        let ran = Ran::new(self.child.wait_with_output().expect("hindsight ends"));
        (String::from_utf8_lossy(&self.shown).into_owned(), ran)
    }
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_machine_that_is_live_again_ends_by_itself_and_its_recording_stands_alone() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("hello");
    debian
        .record(&recording, "hello", &["--quiet"], b"")
        .expect(0);
    let exits = json(&debian, &recording, &[])["exits"].as_u64();
    let exits = exits.expect("a number");
    let state = dir.path().join("state");
    let early = (exits / 3).to_string();
    let save = ["--quiet", "--until", &early, "--save", path(&state)];
    debian.replay(&recording, &save).expect(0);

    let mut futures: Vec<PathBuf> = Vec::new();
    for (number, more) in [
        (1, &[][..]),
        (2, &["--from", path(&state)]),
        (3, &["--chaos=5", "--verify", "memory=5000"]),
    ] {
        let exit = (exits * number / 4).to_string();
        let new = dir.path().join(format!("new-{number}"));
        let options = ["--at", &exit, "--json", "--record", path(&new)];
        let lived = live(&debian, &recording, &[&options, more].concat()).expect(0);
        let told = format!("live from exit {exit} on");
        assert!(lived.stderr.contains(&told), "{}", lived.stderr);
        let summary = lived.json();
        let ending = summary["ending"].as_str().expect("it ended");
        assert!(ending.contains("reset"), "{summary}");
        assert_eq!(summary["live_from"].to_string(), exit);
        futures.push(new);
    }
    what_cannot_be_gone_on_from_leaves_nothing(&debian, &recording, dir.path());
    several_futures_are_lived_and_compared(&debian, &recording, dir.path(), exits / 2);

    // A recording of its own: what it came from may go.
    std::fs::remove_dir_all(&recording).expect("it can be removed");
    for new in &futures {
        let replayed = debian.replay(new, &["--verify", "memory"]).expect(0);
        assert!(
            replayed.stderr.contains("replay equal"),
            "{}",
            replayed.stderr
        );
        let console = replayed.text();
        assert!(console.contains("hello from user space"), "{console}");
        debian.inspect(new, &[]).expect(0);
    }
    // The future of a future.
    let again = dir.path().join("again");
    let options = ["--at", &early, "--quiet", "--record", path(&again)];
    live(&debian, &futures[0], &options).expect(0);
    debian.replay(&again, &["--quiet"]).expect(0);
}

fn what_cannot_be_gone_on_from_leaves_nothing(debian: &Debian, recording: &Path, dir: &Path) {
    let none = dir.join("none");
    for (more, code, said) in [
        (&["--at", "99999999"][..], 2, "its last exit is"),
        (&["--at", "9999s"], 2, "it ends before"),
        (&["--at", "end"], 2, "the guest itself ended there"),
        (&["--at", "1", "--detail", "full"], 2, "make one that does"),
        (&["--at", "100", "--net", "user"], 2, "has no network card"),
        (
            &["--at", "1", "--from", path(&dir.join("state"))],
            2,
            "take an earlier state",
        ),
    ] {
        let options = [more, &["--record", path(&none)]].concat();
        let refused = live(debian, recording, &options).expect(code);
        assert!(
            refused.stderr.contains(said),
            "{more:?}: {}",
            refused.stderr
        );
        assert!(!none.exists(), "{more:?}");
    }
    let itself = ["--at", "100", "--force", "--record", path(recording)];
    let refused = live(debian, recording, &itself).expect(2);
    assert!(refused.stderr.contains("the recording itself"));

    // One that does not replay to there.
    let damaged = dir.join("damaged");
    copy(recording, &damaged);
    let at = rewrite(&damaged, |event| match event {
        Event::Interrupt { at, .. } => flip(&mut at.rcx),
        _ => false,
    });
    let late = (at.expect("there is an interrupt") + 1).to_string();
    let options = ["--quiet", "--at", &late, "--record", path(&none)];
    let refused = live(debian, &damaged, &options).expect(1);
    let said = "; nothing was written";
    assert!(refused.stderr.contains(said), "{}", refused.stderr);
    assert!(!none.exists());
}

fn several_futures_are_lived_and_compared(debian: &Debian, recording: &Path, dir: &Path, at: u64) {
    let kept = dir.join("futures");
    let at = at.to_string();
    let options = [
        "fork",
        path(recording),
        "--at",
        &at,
        "-n",
        "2",
        "--jobs",
        "2",
        "--seed",
        "7",
        "--for",
        "30",
        "--json",
        "--record",
        path(&kept),
    ];
    let told = debian.run(&options).expect(0).json();
    let futures = told["futures"].as_array().expect("a list");
    assert_eq!(futures.len(), 2);
    for (future, seed) in futures.iter().zip([7, 8]) {
        assert_eq!(future["seed"], seed, "{told}");
        assert_eq!(future["exit_code"], 0, "{told}");
        assert!(future["parted_at"].as_u64() > at.parse().ok(), "{told}");
        let place = kept.join(format!("seed-{seed}"));
        let replayed = json(debian, &place, &[]);
        assert_eq!(replayed["verdict"], "equal", "{replayed}");
        assert_eq!(replayed["exits"], future["exits"]);
        assert_eq!(replayed["summary"]["digest"], future["digest"]);
    }
    let short = ["fork", path(recording), "--at", "99999999", "-n", "1"];
    let refused = debian.run(&short).expect(2);
    assert!(refused.stderr.contains("its last exit is"), "{refused:?}");
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_guest_that_is_live_again_answers_what_is_typed_then_and_its_clock_goes_on() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let mut typing = Typing::at(debian.recording(&recording, "input", &[]));
    typing.read_until("input: ready");
    typing.type_in("one\n");
    typing.read_until("input: 1 ONE");
    typing.type_in("quit\n");
    let (shown, ran) = typing.end();
    ran.expect(0);
    assert!(shown.contains("input: 1 lines"), "{shown}");

    let moment = line_time(&debian, &recording, "input: 1 ONE");
    let new = dir.path().join("new");
    for more in [&["--record", path(&new)][..], &[]] {
        let command =
            debian.command(&[&["live", path(&recording), "--at", &moment], more].concat());
        let mut typing = Typing::at(command);
        // The second one begins at a checkpoint of the first, and shows what is after that.
        if !more.is_empty() {
            typing.read_until("input: 1 ONE");
        }
        typing.type_in("two\n");
        typing.read_until("input: 2 TWO");
        typing.type_in("quit\n");
        let (shown, ran) = typing.end();
        let ran = ran.expect(0);
        assert!(shown.contains("input: 2 lines"), "{shown}");
        assert!(ran.stderr.contains("live from exit"), "{}", ran.stderr);
        if more.is_empty() {
            assert!(ran.stderr.contains("the guest ended"), "{}", ran.stderr);
            continue;
        }
        let replayed = debian.replay(&new, &[]).expect(0);
        assert_eq!(replayed.text(), shown);
        // Each line says when it was read: one comes seconds after the other, not minutes.
        let at = |word: &str| -> u64 {
            let line = shown.lines().find(|line| line.contains(word)).expect(word);
            let words = line
                .split(" at ")
                .nth(1)
                .and_then(|rest| rest.split(' ').next());
            words.expect(line).parse().expect(line)
        };
        let passed_ns = at("input: 2 TWO").checked_sub(at("input: 1 ONE"));
        assert!(passed_ns < Some(20_000_000_000), "{shown}");
        assert!(passed_ns.is_some(), "{shown}");
    }
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_recorder_that_is_told_to_leaves_its_guest_running_and_a_recording_that_replays_equal() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let mut typing = Typing::at(debian.recording(&recording, "input", &[]));
    typing.read_until("input: ready");
    typing.type_in("one\n");
    typing.read_until("input: 1 ONE");
    signal(&typing.child, "USR1");
    let mut stderr = typing.child.stderr.take().expect("it is piped");
    let mut told = Vec::new();
    read_until(&mut stderr, &mut told, "is no longer recorded");
    let journal = recording.join("journal");
    let bytes = std::fs::metadata(&journal).expect("a journal").len();
    typing.type_in("two\n");
    typing.read_until("input: 2 TWO");
    // There is no other recording to be left.
    signal(&typing.child, "USR1");
    read_until(&mut stderr, &mut told, "no such recording");
    typing.type_in("quit\n");
    let (shown, ran) = typing.end();
    ran.expect(0);
    stderr.read_to_end(&mut told).expect("it can be read");
    let told = String::from_utf8_lossy(&told);
    assert!(shown.contains("input: 2 lines"), "{shown}");
    let (recorded, ended) = (told.find("recorded in"), told.find("the guest ended"));
    assert!(recorded.is_some() && recorded < ended, "{told}");

    assert_eq!(bytes, std::fs::metadata(&journal).expect("a journal").len());
    let replayed = debian.replay(&recording, &["--verify", "memory"]).expect(0);
    let verdict = &replayed.stderr;
    assert!(verdict.contains("replay equal: asked to stop"), "{verdict}");
    let console = replayed.text();
    assert!(console.contains("input: 1 ONE") && !console.contains("input: 2"));

    // Its guest had not ended, so it has a future.
    let new = dir.path().join("new");
    let options = [
        "live",
        path(&recording),
        "--at",
        "end",
        "--record",
        path(&new),
    ];
    let mut typing = Typing::at(debian.command(&options));
    typing.type_in("three\nquit\n");
    let (shown, ran) = typing.end();
    ran.expect(0);
    assert!(shown.contains("input: 2 THREE"), "{shown}");
    let replayed = debian.replay(&new, &[]).expect(0);
    let console = replayed.text();
    assert!(console.contains("input: 1 ONE") && console.contains("input: 2 THREE"));
    assert!(
        replayed.stderr.contains("replay equal"),
        "{}",
        replayed.stderr
    );
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_recorder_that_makes_checkpoints_is_killed_and_they_serve_and_are_right() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let every = ["--checkpoint-every", "1"];
    let mut typing = Typing::at(debian.recording(&recording, "input", &every));
    typing.read_until("input: ready");
    typing.child.kill().expect("it can be killed");
    let (_, ran) = typing.end();
    assert_eq!(ran.code, -1);
    // Each is what a replay comes to.
    let told = debian.run(&["verify", path(&recording), "--jobs", "4", "--json"]);
    assert!(told.code == 3 || told.code == 0, "{told:?}");
    let exits = debian.inspect(&recording, &["--json"]).expect(3).json();
    let file = std::fs::metadata(recording.join("checkpoints")).expect("it is there");
    assert!(file.len() > 1 << 20, "{} bytes: {exits}", file.len());
    let new = dir.path().join("new");
    let options = [
        "live",
        path(&recording),
        "--at",
        "end",
        "--for",
        "3",
        "--record",
        path(&new),
    ];
    let started = Instant::now();
    debian.run(&options).expect(0);
    println!(
        "live at the end, and for 3 s, after {:?}",
        started.elapsed()
    );
    debian.replay(&new, &["--quiet"]).expect(0);
}
