//! Marks that are made while a recording is, in each of the ways that there are, and afterwards.

use std::io::Write;
use std::process::Stdio;

use serde_json::Value;

use super::*;

/// Ctrl-^.
const MARK: u8 = b'^' & 0x1f;

fn json(debian: &Debian, arguments: &[&str]) -> Value {
    debian.run(arguments).expect(0).json()
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_moment_is_marked_by_key_signal_and_command_and_gone_to_by_name() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let (run, pid) = (dir.path().join("run"), dir.path().join("pid"));
    let command = debian.recording(&recording, "input", &[]);
    let line = shell_line(&command);
    let text = format!("echo $$ >{}\nexec {line}\n", pid.display());
    std::fs::write(&run, text).expect("it can be written");
    let mut script = std::process::Command::new("script")
        .args(["-qec", &format!("sh {}", run.display()), "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script starts");
    let mut keyboard = script.stdin.take().expect("it is piped");
    let mut screen = script.stdout.take().expect("it is piped");
    let mut shown = Vec::new();
    read_until(&mut screen, &mut shown, "input: ready");

    keyboard.write_all(&[MARK]).expect("keys can be pressed");
    read_until(&mut screen, &mut shown, " as mark-1");
    let pid = std::fs::read_to_string(&pid).expect("it was written");
    let killed = std::process::Command::new("kill")
        .args(["-s", "USR2", pid.trim()])
        .status();
    assert!(killed.expect("kill starts").success());
    read_until(&mut screen, &mut shown, " as mark-2");
    let told = json(&debian, &["mark", path(&recording), "ready", "--json"]);
    let taken = debian.run(&["mark", path(&recording), "ready"]).expect(2);
    assert!(taken.stderr.contains("already"), "{}", taken.stderr);
    let busy = ["mark", path(&recording), "--remove", "ready"];
    let busy = debian.run(&busy).expect(2);
    assert!(busy.stderr.contains("is being recorded"), "{}", busy.stderr);
    keyboard.write_all(b"hel").expect("keys can be pressed");
    keyboard.write_all(&[MARK]).expect("keys can be pressed");
    keyboard
        .write_all(b"lo\rquit\r")
        .expect("keys can be pressed");
    read_until(&mut screen, &mut shown, "recorded in");
    script.wait().expect("script ends");
    let shown = String::from_utf8_lossy(&shown);
    assert!(shown.contains("1 HELLO"), "the guest has the rest: {shown}");

    let marks = json(&debian, &["marks", path(&recording), "--json"]);
    let column = |name: &str| -> Vec<Value> {
        let marks = marks.as_array().expect("a list");
        marks.iter().map(|mark| mark[name].clone()).collect()
    };
    assert_eq!(column("name"), ["mark-1", "mark-2", "ready", "mark-4"]);
    assert_eq!(column("by"), ["key", "signal", "command", "key"]);
    assert_eq!(marks[2], told);
    assert_eq!(
        json(&debian, &["inspect", path(&recording), "--json"])["marks"],
        marks
    );

    let again = dir.path().join("again");
    let replay = ["replay", path(&recording), "--quiet", "--json"];
    let straight = json(&debian, &[&replay[..], &["--relog", path(&again)]].concat());
    let ready = json(&debian, &[&replay[..], &["--from", "ready"]].concat());
    for replayed in [&straight, &ready] {
        assert_eq!(replayed["verdict"], "equal", "{replayed}");
        for what in ["digest", "state_digest", "interrupts"] {
            let straight = &straight["summary"][what];
            assert_eq!(&replayed["summary"][what], straight, "{what}");
        }
    }
    assert_eq!(ready["from_exit"], told["exit"]);
    assert_eq!(json(&debian, &["marks", path(&again), "--json"]), marks);

    let later = [
        "mark",
        path(&recording),
        "later",
        "--at",
        "ready+1",
        "--json",
    ];
    let later = json(&debian, &later);
    let exit = told["exit"].as_u64().expect("a number");
    assert_eq!(later["exit"].as_u64(), Some(exit + 1));
    assert_eq!(later["by"], "afterwards");
    let remove = ["mark", path(&recording), "--remove", "later", "--json"];
    assert_eq!(json(&debian, &remove), later);
    for (arguments, said) in [
        (&["mark", path(&recording)][..], "nobody is recording"),
        (
            &["replay", path(&recording), "--from", "later"],
            "mark-1, mark-2, ready, mark-4",
        ),
    ] {
        let refused = debian.run(arguments).expect(2);
        assert!(refused.stderr.contains(said), "{}", refused.stderr);
    }
}
