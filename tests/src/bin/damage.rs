//! Damages the checkpoints of a recording, and kills whoever makes them; then goes about in it, and compares the whole
//! state with that of a straight replay.
//!
//! `damage [WAYS [KILLS [FIRST [GUEST]]]]`, with the environment of [`hindsight_tests::debian`]. Does WAYS (50) kinds of
//! damage from number FIRST (0) on, and KILLS (10) kills of `index`, to a recording of the guest image GUEST (boot). Where
//! GUEST is a recording it is that one, whose checkpoints are then not what they were: take a copy. Prints a line for each;
//! panics if anything differed.

use std::path::Path;
use std::time::{Duration, Instant};

use hindsight_replay::rng::Rng;
use hindsight_tests::debian::Debian;
use hindsight_tests::index_damage::{KINDS, Victim};

/// How many moments there are to go to.
const MOMENTS: u64 = 24;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| {
        let text = arguments.get(at);
        text.map_or(default, |text| text.parse().expect("a number"))
    };
    let (ways, kills, first) = (number(0, 50), number(1, 10), number(2, 0));
    let (debian, scratch) = (Debian::from_env(), tempfile::tempdir());
    let scratch = scratch.expect("a temporary directory can be made");
    let guest = arguments.get(3).map_or("boot", String::as_str);
    let recording = match Path::new(guest) {
        recording if recording.is_dir() => recording.to_path_buf(),
        _ => {
            let recording = scratch.path().join("recording");
            debian
                .record(&recording, guest, &["--quiet"], b"")
                .expect(0);
            recording
        }
    };
    let start = Instant::now();
    let index = |recording: &Path| {
        let indexed = debian.run(&["index", path(recording), "--json"]).expect(0);
        let indexed = indexed.json();
        assert_eq!(indexed["verdict"], "equal", "{indexed}");
        indexed
    };
    let indexed = index(&recording);
    let exits = indexed["exits"].as_u64().expect("a number");
    println!(
        "{exits} exits, {} checkpoints; {KINDS} kinds of damage",
        indexed["checkpoints"]
    );
    let victim = Victim::new(&recording, MOMENTS, exits, first);
    println!("made in {:.0} s", start.elapsed().as_secs_f64());
    for number in first..first + ways {
        let start = Instant::now();
        let what = victim.survives(number);
        println!(
            "{number}: {what}: equal in {:.1} s",
            start.elapsed().as_secs_f64()
        );
    }
    let mut rng = Rng::new(first, 62);
    victim.mend();
    std::fs::remove_file(recording.join("checkpoints")).expect("it is there");
    let whole = is_killed(&debian, &recording, Duration::from_secs(3600));
    for kill in 1..=kills {
        if rng.one_in(2) {
            std::fs::remove_file(recording.join("checkpoints")).expect("it is there");
        }
        let after = whole.mul_f64(rng.below(1000) as f64 / 1000.0);
        is_killed(&debian, &recording, after);
        let complaints = victim.is_the_same("killed", &mut rng, |_| {});
        assert_eq!(complaints, 0, "what a kill leaves is a checkpoint less");
        println!("kill {kill}, after {:.1} s: equal", after.as_secs_f64());
    }
    let again = index(&recording);
    victim.is_the_same("indexed again", &mut rng, |_| {});
    println!(
        "SUMMARY {ways} kinds of damage from {first} on and {kills} kills: the same states; {} checkpoints in the end",
        again["checkpoints"]
    );
}

/// Kills `index` after so long, if it has not ended. How long it took.
fn is_killed(debian: &Debian, recording: &Path, after: Duration) -> Duration {
    let start = Instant::now();
    let mut child = debian.command(&["index", path(recording)]);
    let mut child = child.spawn().expect("hindsight starts");
    while start.elapsed() < after && child.try_wait().expect("it is ours").is_none() {
        std::thread::sleep(Duration::from_millis(10));
    }
    // It may have ended.
    let _ = child.kill();
    child.wait().expect("it has ended");
    start.elapsed()
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}
