//! What a hunt takes for a crash.

use hindsight_tests::debian::{Debian, Ran};

use super::{path, scratch};

/// Hunts for a crash of `words` in at most `runs` runs.
fn hunt(recording: &std::path::Path, runs: u32, more: &[&str]) -> Ran {
    let hunt = format!("--until-crash={runs}");
    let all = [&[&hunt[..]], more].concat();
    Debian::from_env().record(recording, "words", &all, b"")
}

fn replays_equal(recording: &std::path::Path) {
    let replayed = Debian::from_env().replay(recording, &["--json"]).expect(0);
    assert_eq!(replayed.json()["verdict"], "equal");
    let inspected = Debian::from_env().inspect(recording, &[]).expect(0).text();
    assert!(inspected.contains("1 panics"), "{inspected}");
}

const REASON: &str = "kernel panic (Attempted to kill init! exitcode=0x00000100)";

#[test]
#[ignore = "needs a KVM that can record"]
fn a_program_that_prints_the_words_of_a_panic_ends_no_hunt() {
    let dir = scratch();
    let recording = dir.path().join("r");
    let hunted = hunt(&recording, 2, &[]).expect(1);
    assert!(hunted.text().contains("Kernel panic - not syncing: "));
    assert!(
        hunted.stderr.contains("no crash in 2 runs"),
        "{}",
        hunted.stderr
    );
    assert!(!recording.exists(), "{}", path(&recording));
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_panic_of_a_kernel_that_shows_nothing_is_found() {
    let dir = scratch();
    let recording = dir.path().join("r");
    let hunted = hunt(&recording, 1, &["--cmdline", "loglevel=0 -- panic"]).expect(0);
    let shown = hunted.text();
    assert!(!shown.contains("Kernel panic"), "{shown}");
    assert!(hunted.stderr.contains(REASON), "{}", hunted.stderr);
    assert!(hunted.stderr.contains("then reset"), "{}", hunted.stderr);
    replays_equal(&recording);
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_kernel_that_stays_after_its_panic_does_not_keep_a_hunt_waiting() {
    let dir = scratch();
    let recording = dir.path().join("r");
    let options = ["--panic-grace", "1", "--cmdline", "panic=0 -- panic"];
    let hunted = hunt(&recording, 1, &options).expect(0);
    assert!(hunted.stderr.contains(REASON), "{}", hunted.stderr);
    assert!(
        hunted
            .stderr
            .contains("then stopped, for it had not reset itself"),
        "{}",
        hunted.stderr
    );
    replays_equal(&recording);
}
