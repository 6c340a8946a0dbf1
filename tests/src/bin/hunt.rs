//! Measures how many runs it takes to find a crash that happens by chance, with `--chaos` and
//! without.
//!
//! `hunt HUNTS [RUNS [IMAGE]]`, with the environment of [`hindsight_tests::debian`]. A hunt records
//! IMAGE (race) until it crashes, RUNS (100) times at most, and replays the crash once. Prints a
//! line per hunt and a summary; exit code 1 if a replay was not equal or a recording failed.
//!
//! `record --until-crash` does the repeating where there is one. Otherwise each run is a `record`
//! of its own, with the seed of the hunt and the run.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use hindsight_tests::debian::Debian;
use hindsight_tests::measure::{bounded, median};
use serde_json::Value;

/// No run takes so long, not even in an emulated machine that has to share.
const RUN_LIMIT: Duration = Duration::from_secs(180);
/// From one hunt's first seed to the next one's.
const SEEDS_APART: u64 = 1000;

/// What a hunt came to.
enum Found {
    /// A crash, in this run; and how long the hunt was, in seconds.
    Crash(u64, f64),
    /// None, in so many seconds.
    Nothing(f64),
}

struct Hunter<'a> {
    debian: &'a Debian,
    image: String,
    runs_most: u64,
    /// What `record --help` says.
    help: String,
    directory: &'a Path,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| {
        arguments.get(at).map_or(default, |text| {
            text.parse()
                .unwrap_or_else(|error| panic!("{text}: {error}"))
        })
    };
    let debian = Debian::from_env();
    let scratch = tempfile::tempdir().expect("a temporary directory can be made");
    let hunter = Hunter {
        debian: &debian,
        image: arguments.get(2).cloned().unwrap_or("race".into()),
        runs_most: number(1, 100),
        help: debian.run(&["record", "--help"]).expect(0).text(),
        directory: &scratch.path().join("crash"),
    };
    let hunts = number(0, 5);
    let good = hunter.season(hunts, false);
    if !hunter.help.contains("--chaos") {
        println!("this hindsight has no record --chaos: hunted without it only");
        return ExitCode::from(u8::from(!good));
    }
    ExitCode::from(u8::from(!(hunter.season(hunts, true) && good)))
}

impl Hunter<'_> {
    /// All hunts of one way. True if nothing failed.
    fn season(&self, hunts: u64, chaos: bool) -> bool {
        let way = if chaos {
            "with --chaos"
        } else {
            "without --chaos"
        };
        let (mut runs, mut seconds, mut nothing, mut failed) = (Vec::new(), Vec::new(), 0, 0);
        for number in 1..=hunts {
            let first_seed = chaos.then_some(number * SEEDS_APART);
            match self.hunt(first_seed) {
                Ok(Found::Crash(run, took)) => {
                    let equal = self.debian.replay(self.directory, &["--quiet"]).code == 0;
                    failed += u64::from(!equal);
                    let replay = if equal {
                        "replays equal"
                    } else {
                        "replay FAILED"
                    };
                    println!("hunt {number} {way}: crash in run {run}, {took:.1} s; {replay}");
                    runs.push(run);
                    seconds.push(took);
                }
                Ok(Found::Nothing(took)) => {
                    println!("hunt {number} {way}: no crash, {took:.1} s");
                    nothing += 1;
                    // Later than any that was found, which is all that a median wants to know.
                    runs.push(self.runs_most + 1);
                    seconds.push(took);
                }
                Err(why) => {
                    println!("hunt {number} {way}: FAILED: {why}");
                    failed += 1;
                }
            }
        }
        println!(
            "SUMMARY {} {way}: a crash in {} of {hunts} hunts, median {} runs (least {}, most {}; \
             {nothing} found none in {}), median {:.1} s; {failed} failed",
            self.image,
            runs.len() as u64 - nothing,
            median(&runs).unwrap_or(0),
            runs.iter().min().unwrap_or(&0),
            runs.iter().max().unwrap_or(&0),
            self.runs_most,
            median(&seconds).unwrap_or(f64::NAN),
        );
        failed == 0
    }

    fn hunt(&self, first_seed: Option<u64>) -> Result<Found, String> {
        if self.help.contains("--until-crash") {
            let (summary, seconds) = self.record(first_seed, true)?;
            let run = summary["runs"].as_u64();
            return match run {
                _ if !crashed(&summary) => Ok(Found::Nothing(seconds)),
                None => Err("the summary of --until-crash has no field runs".into()),
                Some(run) => Ok(Found::Crash(run, seconds)),
            };
        }
        let mut seconds = 0.0;
        for run in 1..=self.runs_most {
            let seed = first_seed.map(|first| first + run - 1);
            let (summary, took) = self.record(seed, false)?;
            seconds += took;
            if crashed(&summary) {
                return Ok(Found::Crash(run, seconds));
            }
        }
        Ok(Found::Nothing(seconds))
    }

    /// Records once, or until a crash; the summary, and how long it took.
    fn record(&self, seed: Option<u64>, until_crash: bool) -> Result<(Value, f64), String> {
        let mut command =
            self.debian
                .recording(self.directory, &self.image, &["--force", "--json"]);
        command.args(seed.map(|seed| format!("--chaos={seed}")));
        let mut limit = RUN_LIMIT;
        if until_crash {
            command.arg("--until-crash");
            limit *= self.runs_most as u32;
        }
        let bounded = bounded(command, limit);
        if bounded.stopped && !until_crash {
            return Err(format!("a run did not end in {} s", limit.as_secs()));
        }
        if bounded.ran.code != 0 && !bounded.stopped {
            return Err(bounded.ran.stderr);
        }
        // Whoever was stopped may have nothing to say.
        let summary = serde_json::from_slice(&bounded.ran.stdout).unwrap_or(Value::Null);
        Ok((summary, bounded.seconds))
    }
}

fn crashed(summary: &Value) -> bool {
    summary["panicked"].as_bool() == Some(true)
}
