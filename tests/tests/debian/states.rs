//! The whole state in a file: saved by one process, gone on from by another.

use super::*;

/// Exits at which each recording is saved.
const STATES: u64 = 3;

fn json(debian: &Debian, recording: &Path, more: &[&str]) -> serde_json::Value {
    let options = [&["--quiet", "--json"], more].concat();
    debian.replay(recording, &options).expect(0).json()
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_state_saved_by_one_process_goes_on_in_another_to_the_same_end() {
    let (debian, dir) = (Debian::from_env(), scratch());
    for (image, more) in [
        ("hello", &[][..]),
        // Time by other rules, and places between exits.
        ("entries", &["--chaos=3"][..]),
    ] {
        let recording = dir.path().join(image);
        debian.record(&recording, image, more, b"").expect(0);
        let straight = json(&debian, &recording, &[]);
        let exits = straight["exits"].as_u64().expect("a number");
        let (mut here, mut there) = (dir.path().join("here"), dir.path().join("there"));
        for number in 0..STATES {
            let exit = exits * (number + 1) / (STATES + 1);
            let until = exit.to_string();
            let mut save = vec!["--until", &until, "--save", path(&there), "--force"];
            if number > 0 {
                save.extend(["--from", path(&here)]);
            }
            let saved = json(&debian, &recording, &save);
            assert_eq!(saved["verdict"], "equal so far");
            std::mem::swap(&mut here, &mut there);
            let bytes = here.metadata().expect("it was saved").len();
            assert_eq!(saved["saved_bytes"], bytes);
            let went_on = json(&debian, &recording, &["--from", path(&here)]);
            assert_eq!(went_on["verdict"], "equal", "{went_on}");
            assert_eq!(went_on["from_exit"], exit);
            for what in ["exits", "witnesses_equal", "memories_equal"] {
                assert_eq!(went_on[what], straight[what], "{what} of {image} at {exit}");
            }
            for what in ["digest", "memory_digest", "state_digest", "interrupts"] {
                assert_eq!(
                    went_on["summary"][what], straight["summary"][what],
                    "{what}"
                );
            }
        }
    }
    what_is_no_state_of_a_recording_is_refused(&debian, dir.path());
}

/// With a recording and a state in `dir`.
fn what_is_no_state_of_a_recording_is_refused(debian: &Debian, dir: &Path) {
    let recording = dir.join("hello");
    let state = dir.join("state");
    let save = ["--until", "100", "--save", path(&state)];
    debian.replay(&recording, &save).expect(0);
    let good = std::fs::read(&state).expect("a state");

    let refused = |recording: &Path, more: &[&str], said: &str| {
        let ran = debian
            .replay(recording, &[&["--quiet"], more].concat())
            .expect(2);
        assert!(ran.stderr.contains(said), "{more:?}: {}", ran.stderr);
    };
    refused(&recording, &save, "--force");
    refused(
        &dir.join("entries"),
        &["--from", path(&state)],
        "another machine",
    );
    let late = ["--from", path(&state), "--until", "99"];
    refused(&recording, &late, "begin earlier");
    let journal = recording.join("journal");
    let over = ["--until", "9", "--save", path(&journal), "--force"];
    refused(&recording, &over, "the journal of this recording");
    refused(
        &recording,
        &["--until", "99999999", "--save", path(&dir.join("none"))],
        "before it comes to",
    );
    assert!(!dir.join("none").exists());

    let other = dir.join("other");
    let refused_bytes = |bytes: &[u8], said: &str| {
        std::fs::write(&other, bytes).expect("it can be written");
        refused(&recording, &["--from", path(&other)], said);
    };
    refused_bytes(b"", "no state");
    refused_bytes(b"no state at all", "no state of a machine");
    refused_bytes(&good[..good.len() / 2], "no state of a machine");
    for at in (40..good.len()).step_by(good.len() / 7) {
        let mut damaged = good.clone();
        damaged[at] ^= 4;
        refused_bytes(&damaged, "no state");
    }
    // A few kilobytes that unpack to more than there is memory.
    let zeroes = std::io::repeat(0).take(2 << 30);
    let bomb = zstd::stream::encode_all(zeroes, 1).expect("a Vec takes everything");
    refused_bytes(&bomb, "unpacks to more than");
}
