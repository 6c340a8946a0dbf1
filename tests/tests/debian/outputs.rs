//! Where commands write, and what stays whatever they are told.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hindsight_replay::{Answer, Event};
use hindsight_tests::debian::{Debian, copy};

use super::{flip, interrupt, path, rewrite, scratch, wait_for_journal};

/// All files of a directory, with what is in them, and of its directories the names.
fn tree(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(directory).expect("it can be read");
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("it can be read").path())
        .map(|path| (path.clone(), std::fs::read(&path).unwrap_or_default()))
        .collect();
    files.sort();
    files
}

#[test]
#[ignore = "needs a KVM that can record"]
fn outputs_are_whole_and_never_in_the_place_of_what_must_stay() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let at = |name: &str| dir.path().join(name);
    let (recording, image) = (at("r"), at("v.img"));
    std::fs::write(&image, vec![5; 1 << 20]).expect("it can be written");
    let options = ["--detail", "full", "--quiet", "--disk", path(&image)];
    debian.record(&recording, "hello", &options, b"").expect(0);
    std::fs::hard_link(recording.join("journal"), at("hard")).expect("it can be linked");
    std::os::unix::fs::symlink(recording.join("kernel"), at("soft")).expect("it can be linked");
    std::fs::write(at("mine"), "precious").expect("it can be written");

    let before = (tree(&recording), tree(dir.path()));
    let commands = [("pcap", "-o"), ("console", "--cast"), ("disk", "-o")];
    for (command, option) in commands {
        for name in [
            "r/journal",
            "r/kernel",
            "r/initrd",
            "r/index",
            "r/disk0",
            "r/disk4",
            "v.img",
            "hard",
            "soft",
            "r",
        ] {
            let output = at(name);
            let arguments = [command, path(&recording), option, path(&output), "--force"];
            debian.run(&arguments).expect(2);
        }
        let mine = at("mine");
        let refused = debian
            .run(&[command, path(&recording), option, path(&mine)])
            .expect(2);
        assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    }
    assert!(
        (tree(&recording), tree(dir.path())) == before,
        "something was touched"
    );

    for (command, option) in commands {
        let mine = at("mine");
        let arguments = [command, path(&recording), option, path(&mine), "--force"];
        debian.run(&arguments).expect(0);
        assert_ne!(std::fs::read(&mine).expect("it is there"), b"precious");
    }

    // One that diverges leaves nothing, and what was there stays.
    let other = at("other");
    copy(&recording, &other);
    std::fs::write(at("mine"), "precious").expect("it can be written");
    let altered = rewrite(&other, |event| match event {
        Event::Turn(turn) => match &mut turn.answer {
            Answer::Time { tsc, .. } => flip(tsc),
            _ => false,
        },
        _ => false,
    });
    assert!(altered.is_some());
    let before = tree(dir.path());
    for ((command, option), name) in commands.into_iter().zip(["new", "mine", "mine"]) {
        let output = at(name);
        let arguments = [command, path(&other), option, path(&output), "--force"];
        debian.run(&arguments).expect(1);
    }
    assert!(tree(dir.path()) == before, "something was touched");
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_recording_that_fails_or_is_not_wanted_costs_nothing() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    debian
        .record(&recording, "hello", &["--quiet"], b"")
        .expect(0);
    let before = tree(&recording);
    let initrd = debian.image("hello");
    let by_initrd = debian.with_kernel(&initrd);
    for (debian, options, code) in [
        (&by_initrd, &["--quiet"][..], 2),
        (&debian, &["--quiet", "--memory", "32M"], 2),
        (&debian, &["--quiet", "--until-crash=1"], 1),
    ] {
        let options = [&["--force"], options].concat();
        debian
            .record(&recording, "hello", &options, b"")
            .expect(code);
        assert!(tree(&recording) == before, "{options:?}");
    }
    let nowhere = dir.path().join("nowhere");
    by_initrd
        .record(&nowhere, "hello", &["--quiet"], b"")
        .expect(2);
    assert!(!nowhere.exists());

    // While another one is made, the old one replays, and a third is refused.
    let child = debian
        .recording(&recording, "boot", &["--quiet", "--force"])
        .spawn()
        .expect("it starts");
    let old = std::fs::read(recording.join("journal")).expect("it is there");
    while std::fs::read(recording.join("journal")).is_ok_and(|journal| journal == old) {
        std::thread::sleep(Duration::from_millis(20));
    }
    wait_for_journal(&recording, 3_000);
    let third = debian
        .record(&recording, "hello", &["--force"], b"")
        .expect(2);
    assert!(
        third.stderr.contains("is being recorded to"),
        "{}",
        third.stderr
    );
    let replaced = std::fs::read_dir(&recording).expect("it can be read");
    let replaced = replaced
        .map(|entry| entry.expect("it can be read").path())
        .find(|path| path.is_dir())
        .expect("the old one is kept");
    debian.replay(&replaced, &["--quiet"]).expect(0);
    interrupt(&child);
    let ended = child.wait_with_output().expect("it ends");
    assert_eq!(ended.status.code(), Some(0));
    assert!(!replaced.exists(), "the new one is closed");
    debian.replay(&recording, &["--quiet"]).expect(0);
}
