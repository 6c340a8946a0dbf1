//! Goes to random moments of a recording that is indexed, in random order, and compares the whole state there with that of a
//! straight replay.
//!
//! `seeks RECORDING [MOMENTS [SEED]]`. Prints a line for each of MOMENTS (200) and a summary; exit code 1 if anything
//! differed.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use hindsight_replay::rng::Rng;
use hindsight_tests::measure::median;
use hindsight_tests::seeking::{NEVER, digest, go_to, open, straight};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let recording = arguments.next().expect("seeks RECORDING [MOMENTS [SEED]]");
    let recording = Path::new(&recording);
    let mut number = |default: u64| {
        let text = arguments.next();
        text.map_or(default, |text| text.parse().expect("a number"))
    };
    let (count, seed) = (number(200), number(1));
    let mut timeline = open(recording);
    let last = timeline
        .store()
        .heads()
        .last()
        .expect("it is indexed")
        .exits;
    let mut rng = Rng::new(seed, 1);
    let moments: Vec<u64> = (0..count).map(|_| 1 + rng.below(last)).collect();
    let (mut found, mut times) = (Vec::new(), Vec::new());
    for exit in &moments {
        let start = Instant::now();
        // What is measured is what there is.
        go_to(&mut timeline, *exit, NEVER);
        let took = start.elapsed().as_secs_f64();
        times.push(took);
        found.push(digest(&mut timeline));
        println!("exit {exit}: {took:.2} s");
    }
    for complaint in timeline.take_complaints() {
        println!("complaint: {complaint}");
    }
    drop(timeline);

    // Without checkpoints, from the start on, each once.
    let copy = tempfile::tempdir_in(".cache").expect("the checkout can be written");
    for entry in std::fs::read_dir(recording).expect("it is a directory") {
        let path = entry.expect("it is there").path();
        let name = path.file_name().expect("it has a name");
        if name != "checkpoints" {
            let target = path.canonicalize().expect("it is there");
            let place = copy.path().join(name);
            if path.is_symlink() {
                std::os::unix::fs::symlink(target, place).expect("it can be linked");
            } else {
                std::fs::copy(target, place).expect("it can be copied");
            }
        }
    }
    let expected = straight(copy.path(), moments.iter().copied());
    let equal = moments.iter().zip(&found);
    let equal = equal
        .filter(|(exit, found)| expected[exit] == **found)
        .count();
    times.sort_by(f64::total_cmp);
    println!(
        "SUMMARY {equal} of {count} equal; seconds: median {:.2}, p90 {:.2}, most {:.2}",
        median(&times).unwrap_or_default(),
        times[times.len() * 9 / 10],
        times.last().copied().unwrap_or_default()
    );
    ExitCode::from(u8::from(equal as u64 != count))
}
