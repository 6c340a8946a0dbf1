//! Moments of a recording, and the checkpoints that make them quick to reach.

use std::time::Duration;

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

    // A budget is kept to; damaged or deleted, it costs time and nothing else.
    let small = index(&debian, &recording, &["--budget", "20M"]);
    assert!(
        small["bytes"].as_u64().expect("a number") <= 20 << 20,
        "{small}"
    );
    let mut bytes = std::fs::read(&file).expect("it is there");
    let middle = bytes.len() / 2;
    bytes[middle..middle + 4096].fill(0x5a);
    std::fs::write(&file, bytes).expect("it can be written");
    same(&(exits / 2).to_string(), Some(exits / 2));
    std::fs::remove_file(&file).expect("it is there");
    same(&(exits / 2).to_string(), Some(exits / 2));

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
