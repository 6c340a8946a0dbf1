//! Measures how many runs it takes to find a crash that happens by chance, with `--chaos` and
//! without.
//!
//! `hunt HUNTS [RUNS [IMAGE [FIRST]]]`, with the environment of [`hindsight_tests::debian`]. A hunt
//! records IMAGE (race) until it crashes, RUNS (100) times at most, and replays the crash once. There
//! are HUNTS of each way, in turn, with numbers from FIRST (1) on, which their seeds follow. Prints
//! a line per hunt and two summaries; exit code 1 if a replay was not equal or a recording failed.

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

/// What is the same in all hunts.
struct Hunter<'a> {
    debian: &'a Debian,
    image: &'a str,
    runs_most: u64,
    directory: &'a Path,
}

/// All hunts of one way.
struct Season {
    way: &'static str,
    chaos: bool,
    hunts: u64,
    runs: Vec<u64>,
    seconds: Vec<f64>,
    nothing: u64,
    failed: u64,
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
        image: arguments.get(2).map_or("race", String::as_str),
        runs_most: number(1, 100),
        directory: &scratch.path().join("crash"),
    };
    let (hunts, first) = (number(0, 5), number(3, 1));
    let mut seasons = [
        Season::new("with --chaos", true),
        Season::new("without --chaos", false),
    ];
    for number in first..first + hunts {
        for season in &mut seasons {
            season.hunt(&hunter, number);
        }
    }
    for season in &seasons {
        season.sum_up(&hunter);
    }
    let failed = seasons.iter().any(|season| season.failed > 0);
    ExitCode::from(u8::from(failed))
}

impl Season {
    fn new(way: &'static str, chaos: bool) -> Season {
        Season {
            way,
            chaos,
            hunts: 0,
            runs: Vec::new(),
            seconds: Vec::new(),
            nothing: 0,
            failed: 0,
        }
    }

    fn hunt(&mut self, hunter: &Hunter, number: u64) {
        let way = self.way;
        self.hunts += 1;
        match hunter.hunt(self.chaos.then_some(number * SEEDS_APART)) {
            Ok((Some(run), took)) => {
                let equal = hunter.debian.replay(hunter.directory, &["--quiet"]).code == 0;
                self.failed += u64::from(!equal);
                let replay = if equal {
                    "replays equal"
                } else {
                    "replay FAILED"
                };
                println!("hunt {number} {way}: crash in run {run}, {took:.1} s; {replay}");
                self.runs.push(run);
                self.seconds.push(took);
            }
            Ok((None, took)) => {
                println!("hunt {number} {way}: no crash, {took:.1} s");
                self.nothing += 1;
                // Later than any that was found, which is all that a median wants to know.
                self.runs.push(hunter.runs_most + 1);
                self.seconds.push(took);
            }
            Err(why) => {
                println!("hunt {number} {way}: FAILED: {why}");
                self.failed += 1;
            }
        }
    }

    fn sum_up(&self, hunter: &Hunter) {
        println!(
            "SUMMARY {} {}: a crash in {} of {} hunts, median {} runs (least {}, most {}; {} found none in \
             {}), median {:.1} s; {} failed",
            hunter.image,
            self.way,
            self.runs.len() as u64 - self.nothing,
            self.hunts,
            median(&self.runs).unwrap_or(0),
            self.runs.iter().min().unwrap_or(&0),
            self.runs.iter().max().unwrap_or(&0),
            self.nothing,
            hunter.runs_most,
            median(&self.seconds).unwrap_or(f64::NAN),
            self.failed
        );
    }
}

impl Hunter<'_> {
    /// The run that crashed, if one did, and how many seconds the hunt took.
    fn hunt(&self, first_seed: Option<u64>) -> Result<(Option<u64>, f64), String> {
        let options = ["--force", "--json"];
        let mut command = self.debian.recording(self.directory, self.image, &options);
        command.arg(format!("--until-crash={}", self.runs_most));
        command.args(first_seed.map(|seed| format!("--chaos={seed}")));
        let limit = RUN_LIMIT * self.runs_most as u32;
        let bounded = bounded(command, limit);
        // A hunt that finds nothing ends with 1 and has no summary.
        if bounded.stopped || bounded.ran.code == 1 {
            return Ok((None, bounded.seconds));
        }
        let summary: Value = match bounded.ran.code {
            0 => serde_json::from_slice(&bounded.ran.stdout).map_err(|error| error.to_string())?,
            _ => return Err(bounded.ran.stderr),
        };
        match summary["runs"].as_u64() {
            Some(run) if summary["panicked"] == true => Ok((Some(run), bounded.seconds)),
            _ => Err(format!("a summary of no crash: {summary}")),
        }
    }
}
