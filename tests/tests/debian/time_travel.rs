//! Moments of a recording, and the checkpoints that make them quick to reach.

use std::time::Duration;

use hindsight_tests::index_damage::{KINDS, Victim};

use super::*;

fn json(debian: &Debian, recording: &Path, more: &[&str]) -> serde_json::Value {
    let options = [&["--quiet", "--json"], more].concat();
    debian.replay(recording, &options).expect(0).json()
}

fn index(debian: &Debian, recording: &Path, more: &[&str]) -> serde_json::Value {
    let arguments = [&["index", path(recording), "--json"], more].concat();
    debian.run(&arguments).expect(0).json()
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_recording_is_indexed_and_replays_from_any_moment_to_the_same_end() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("boot");
    debian.record(&recording, "boot", &[], b"").expect(0);
    let straight = json(&debian, &recording, &[]);
    let exits = straight["exits"].as_u64().expect("a number");
    let file = recording.join("checkpoints");

    // Interrupted, it has what it had by then.
    let mut child = debian
        .command(&["index", path(&recording)])
        .spawn()
        .expect("hindsight starts");
    std::thread::sleep(Duration::from_secs(4));
    child.kill().expect("it runs, or has ended");
    child.wait().expect("it has ended");
    let indexed = index(&debian, &recording, &[]);
    assert_eq!(indexed["verdict"], "equal");
    let checkpoints = indexed["checkpoints"].as_u64().expect("a number");
    assert!(checkpoints >= 1, "{indexed}");
    assert_eq!(
        indexed["bytes"],
        file.metadata().expect("it is there").len()
    );
    assert_eq!(
        index(&debian, &recording, &[])["checkpoints_before"],
        checkpoints
    );

    let same = |moment: &str, at: Option<u64>| {
        let went_on = json(&debian, &recording, &["--from", moment]);
        assert_eq!(went_on["verdict"], "equal", "{moment}: {went_on}");
        let from = went_on["from_exit"].as_u64().expect("a number");
        assert!(at.is_none_or(|at| at == from), "{moment}: {went_on}");
        for what in ["digest", "state_digest", "interrupts"] {
            assert_eq!(
                went_on["summary"][what], straight["summary"][what],
                "{moment}: {what}"
            );
        }
        from
    };
    for share in 1..8 {
        let exit = exits * share / 8;
        same(&exit.to_string(), Some(exit));
    }
    same("end-1", Some(exits - 1));
    let text = same("console:boot: alarm", None);
    let until = format!("{text}");
    let shown = debian.replay(&recording, &["--until", &until]).expect(0);
    assert!(shown.text().contains("boot: alarm"));
    let before = (text - 1).to_string();
    let shown = debian.replay(&recording, &["--until", &before]).expect(0);
    assert!(!shown.text().contains("boot: alarm"));

    its_kernel_tells_of_itself(&debian, &recording, text);
    in_stretches(&debian, &recording, dir.path());

    // Damaged, exchanged, or taken away while in use, they cost time and nothing else. `scripts/soak --damage` does more.
    let victim = Victim::new(&recording, 6, exits / 6, 1);
    for number in (0..KINDS).step_by(5) {
        println!("{}", victim.survives(number));
    }
    victim.mend();

    // A budget is kept to.
    let small = index(&debian, &recording, &["--budget", "20M"]);
    assert!(
        small["bytes"].as_u64().expect("a number") <= 20 << 20,
        "{small}"
    );

    for (moment, said) in [
        ("crash", "its guest does not panic"),
        ("console:no such thing", "no console says that"),
        ("1000000s", "it ends before"),
        ("end+1", "its last exit is"),
        ("0-1", "before power-on"),
    ] {
        let ran = debian
            .replay(&recording, &["--quiet", "--from", moment])
            .expect(2);
        assert!(ran.stderr.contains(said), "{moment}: {}", ran.stderr);
    }
}

/// What the recording's kernel says of processes, mappings and itself, at two moments; `alarm` is an exit of process 1's.
fn its_kernel_tells_of_itself(debian: &Debian, recording: &Path, alarm: u64) {
    let look = |command: &str, at: &str, more: &[&str]| {
        let arguments = [&[command, path(recording), "--at", at, "--json"], more].concat();
        debian.run(&arguments).expect(0).json()
    };
    // Process 1 waits for a program that has just written its first line.
    let found = look("ps", "console:tsc: rdtsc", &[]);
    let tasks = found["tasks"].as_array().expect("a list");
    let user = tasks.iter().filter(|task| task["kernel"] == false);
    let user: Vec<_> = user.collect();
    let named = |pid: u64| {
        let mut all = tasks.iter();
        all.find(|task| task["pid"] == pid).expect("it is there")
    };
    assert_eq!(user.len(), 2, "{found}");
    assert_eq!(
        (&user[0]["pid"], &user[0]["parent"]),
        (&1.into(), &0.into())
    );
    assert_eq!(user[0]["executable"], "/init");
    assert_eq!(user[0]["name"], "init");
    assert_eq!(user[0]["state"], "S");
    assert_eq!(user[1]["parent"], 1, "{found}");
    assert_eq!(user[1]["name"], "tsc");
    assert_eq!(user[1]["executable"], "/bin/tsc");
    assert_eq!(user[1]["arguments"], serde_json::json!(["/bin/tsc"]));
    assert_eq!(user[1]["state"], "R");
    assert_eq!(found["current"], user[1]["pid"], "{found}");
    assert_eq!(found["broken"], serde_json::Value::Null);
    assert_eq!(
        (&named(2)["name"], &named(2)["parent"]),
        (&"kthreadd".into(), &0.into())
    );
    let of_kthreadd = |task: &&serde_json::Value| task["parent"] == 2 && task["kernel"] == true;
    assert!(tasks.iter().filter(of_kthreadd).count() > 5, "{found}");

    let at = alarm.to_string();
    let found = look("maps", &at, &["1"]);
    let maps = found["maps"].as_array().expect("a list");
    let has = |name: &str, permissions: &str| {
        let mut maps = maps.iter();
        maps.any(|one| one["name"] == name && one["permissions"] == permissions)
    };
    assert!(has("/init", "r-xp") && has("[stack]", "rw-p"), "{found}");
    let ends = maps.iter().map(|one| one["end"].as_u64());
    assert!(ends.is_sorted(), "{found}");

    let told = debian
        .run(&["dmesg", path(recording), "--at", &at])
        .expect(0)
        .text();
    let first = told.lines().next().expect("a line");
    assert!(first.starts_with("[    0.000000] "), "{told}");
    assert!(told.contains("] Linux version "), "{told}");
    assert!(told.contains("] Run /init as init process"), "{told}");
}

/// Checks an indexed recording by several processes; then a copy whose journal is damaged in one place.
fn in_stretches(debian: &Debian, recording: &Path, dir: &Path) {
    let verify = |recording: &Path, more: &[&str], code: i32| {
        let arguments = [&["verify", path(recording), "--json"], more].concat();
        debian.run(&arguments).expect(code).json()
    };
    let verdicts = |all: &serde_json::Value| -> Vec<String> {
        let stretches = all["stretches"].as_array().expect("there are some");
        let verdicts = stretches.iter().map(|one| one["verdict"].as_str());
        verdicts
            .map(|one| one.expect("a text").to_string())
            .collect()
    };
    let right = verify(recording, &["--jobs", "3"], 0);
    assert_eq!(right["equal"], true);
    assert_eq!(verdicts(&right), ["equal"; 3]);
    let one = verify(recording, &["--stretch", "2/3"], 0);
    assert!(
        one["from_exit"].as_u64() > Some(0) && one["verdict"] == "equal",
        "{one}"
    );
    assert_eq!(one["from_exit"], right["stretches"][1]["from_exit"]);

    // What others found is put together, whatever the order; one that is missing is no verdict.
    let file = dir.join("verdicts");
    let mut lines: Vec<String> = Vec::new();
    for verdict in right["stretches"].as_array().expect("there are some") {
        lines.insert(0, verdict.to_string());
    }
    let collect = |lines: &[String], code: i32| {
        std::fs::write(&file, lines.join("\n")).expect("there is room");
        verify(recording, &["--collect", path(&file)], code)
    };
    assert_eq!(collect(&lines, 0)["stretches"], right["stretches"]);
    assert_eq!(verdicts(&collect(&lines[1..], 5))[2], "missing");
    // Neither are verdicts between other checkpoints.
    let lines = lines.join("\n");
    let check = right["stretches"][1]["from_checkpoint"].as_str();
    let other = lines.replacen(check.expect("a text"), "0123456789abcdef", 1);
    assert!(collect(&[other], 2)["gap"].is_string());

    // A flipped bit ends what can be read of the journal; what comes after its frame can be read again.
    let damaged = dir.join("damaged");
    std::fs::create_dir(&damaged).expect("there is room");
    for name in ["journal", "kernel", "initrd", "checkpoints"] {
        std::fs::copy(recording.join(name), damaged.join(name)).expect("it can be copied");
    }
    let mut journal = std::fs::read(damaged.join("journal")).expect("it is there");
    let middle = journal.len() / 2;
    journal[middle] ^= 0x10;
    std::fs::write(damaged.join("journal"), journal).expect("it can be written");
    let wrong = verify(&damaged, &["--jobs", "3"], 3);
    assert_eq!(wrong["equal"], false);
    let wrong: Vec<_> = verdicts(&wrong);
    let count = |verdict: &str| wrong.iter().filter(|one| *one == verdict).count();
    assert_eq!(count("cut short"), 1, "{wrong:?}");
    // One that begins in the damaged frame cannot begin.
    assert_eq!(count("equal") + count("not checked"), 2, "{wrong:?}");
    assert!(count("equal") > 0, "{wrong:?}");
}
