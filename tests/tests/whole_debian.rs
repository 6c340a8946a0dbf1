//! A whole Debian, from power-on over a login to `poweroff`, recorded and replayed. Needs a KVM that can
//! record, and the image that `guest-images/build-debian` makes; `scripts/test` has both.

use hindsight_tests::debian::Debian;
use hindsight_tests::whole::Whole;
use tempfile::TempDir;

/// In the checkout, for what is written anywhere else a box has to hold in its memory.
fn scratch() -> TempDir {
    let here = std::env::current_dir().expect("there is one");
    tempfile::tempdir_in(here).expect("a directory can be made")
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_whole_debian_with_a_session_typed_at_its_console_replays_equal() {
    let (debian, scratch) = (Debian::from_env(), scratch());
    let whole = Whole::new(&debian, "debian");
    let before = std::fs::metadata(whole.disk()).expect("the image is there");
    let recording = scratch.path().join("recording");
    let worked = whole.record(&recording, "session", &["--net", "user"]);
    let recorded = worked.end.ran;
    assert_eq!(worked.failure, None, "{}", recorded.stderr);
    let console = recorded.text();
    for shown in [
        "Debian GNU/Linux 12",
        "/dev/vda",
        "eth0",
        "reboot: Power down",
    ] {
        assert!(
            console.contains(shown),
            "no {shown:?} on the console:\n{console}"
        );
    }
    assert!(
        recorded.stderr.contains("powered off"),
        "{}",
        recorded.stderr
    );
    assert!(
        recorded.stderr.contains("modules loaded"),
        "{}",
        recorded.stderr
    );
    let replayed = debian.replay(&recording, &["--verify", "memory"]).expect(0);
    assert_eq!(replayed.text(), console);
    let after = std::fs::metadata(whole.disk()).expect("the image is there");
    assert_eq!(
        before.modified().expect("files have times"),
        after.modified().expect("files have times"),
        "the image was written to"
    );
}

#[test]
#[ignore = "needs a KVM that can record"]
fn the_same_session_at_the_virtio_console_replays_equal() {
    let (debian, scratch) = (Debian::from_env(), scratch());
    let recording = scratch.path().join("recording");
    let options = ["--console", "virtio"];
    let worked = Whole::new(&debian, "debian").record(&recording, "session", &options);
    let recorded = worked.end.ran;
    assert_eq!(worked.failure, None, "{}", recorded.stderr);
    let console = recorded.text();
    assert!(console.contains("debian hvc0"), "{console}");
    let replayed = debian.replay(&recording, &["--verify", "memory"]).expect(0);
    assert_eq!(replayed.text(), console);
}
