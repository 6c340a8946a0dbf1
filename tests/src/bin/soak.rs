//! Records Debian's boot many times, replays each recording, and compares everything.
//!
//! `soak RECORDINGS [REPLAYS [KERNEL...]]`, with the environment of [`hindsight_tests::debian`].
//! Prints one line per recording and a summary; exit code 1 if any replay was not equal.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use hindsight_tests::debian::Debian;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let mut number = |name: &str, default: u64| match arguments.next().map(|text| text.parse()) {
        None => default,
        Some(Ok(number)) => number,
        Some(Err(error)) => panic!("{name}: {error}"),
    };
    let recordings = number("RECORDINGS", 5);
    let replays = number("REPLAYS", 2);
    let debian = Debian::from_env();
    let mut kernels: Vec<PathBuf> = arguments.map(PathBuf::from).collect();
    if kernels.is_empty() {
        kernels.push(debian.kernel().into());
    }
    let scratch = tempfile::tempdir().expect("a temporary directory can be made");
    let mut failed = false;
    for kernel in &kernels {
        failed |= !soak(
            &debian.with_kernel(kernel),
            recordings,
            replays,
            scratch.path(),
        );
    }
    ExitCode::from(u8::from(failed))
}

/// True if every replay of every recording was equal.
fn soak(debian: &Debian, recordings: u64, replays: u64, scratch: &std::path::Path) -> bool {
    let kernel = debian.kernel().display().to_string();
    let (mut equal, mut journals, mut boots) = (0, Vec::new(), Vec::new());
    for number in 1..=recordings {
        let directory = scratch.join(format!("r{number}"));
        let typed = format!("line {number} typed in time\n");
        let start = Instant::now();
        let recorded = debian.record(&directory, "boot", &["--force"], typed.as_bytes());
        let seconds = start.elapsed().as_secs_f64();
        let console = recorded.text();
        let whole = recorded.code == 0
            && console.contains(&format!("typed LINE {number} TYPED IN TIME"))
            && console.contains("Restarting system");
        if !whole {
            println!(
                "recording {number}: FAILED, code {}\n{}",
                recorded.code, recorded.stderr
            );
            println!("{console}");
            continue;
        }
        let journal = std::fs::metadata(directory.join("journal")).map_or(0, |meta| meta.len());
        let (mut good, mut replay_seconds) = (0, 0.0);
        for _ in 0..replays {
            let start = Instant::now();
            let replayed = debian.replay(&directory, &["--verify", "memory"]);
            replay_seconds += start.elapsed().as_secs_f64() / replays as f64;
            if replayed.code == 0 && replayed.stdout == recorded.stdout {
                good += 1;
            } else {
                println!("recording {number}: a replay FAILED:\n{}", replayed.stderr);
                println!("console equal: {}", replayed.stdout == recorded.stdout);
            }
        }
        println!(
            "recording {number}: {seconds:.1} s, journal {journal} bytes; {good} of {replays} \
             replays equal, {replay_seconds:.1} s each"
        );
        equal += good;
        journals.push(journal);
        boots.push(seconds);
        std::fs::remove_dir_all(&directory).expect("the recording can be removed");
    }
    journals.sort_unstable();
    boots.sort_by(f64::total_cmp);
    let middle = journals.len() / 2;
    println!(
        "SUMMARY {kernel}: {equal} of {} replays equal (console, digest chain, all of memory); \
         {recordings} recordings, median {:.1} s, journal median {} and largest {} bytes",
        recordings * replays,
        boots.get(middle).copied().unwrap_or(f64::NAN),
        journals.get(middle).copied().unwrap_or(0),
        journals.last().copied().unwrap_or(0),
    );
    equal == recordings * replays
}
