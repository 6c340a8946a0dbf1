//! `hindsight fork`: several futures of one moment of a recording.
//!
//! Each is a process of this program that lives on from the moment with chaos of its own (`live`), and records it. What
//! became of each is read from its summary; where it parted from the others, from their journals.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use clap::Args;
use hindsight_devices::Nanos;
use hindsight_replay::When;
use hindsight_replay::foreign::{shown, shown_path};
use hindsight_replay::{JournalError, JournalReader};
use hindsight_vmm::failure::{Failure, Kind};
use hindsight_vmm::session::{Recording, keep_moment};
use serde::Serialize;
use serde_json::Value;

use crate::children;
use crate::format::{seconds, thousands};
use crate::options::parse_seconds;
use crate::outcome::Outcome;
use crate::tell::{out, tell};

/// Options of `fork`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each future is a `hindsight live --chaos=SEED` of its own, from the same moment, without input and without a network.
The way to the moment is replayed once, and there is a checkpoint there then, at which each begins. A future parts
from another where their journals first differ: that is soon, for guest time alone differs from run to run. Each one
is recorded, and its recording replays; those in the directory of --record stay.

Exit code 0: each came to an end, whatever that is.

Example:
  hindsight fork crash --at 9.2s -n 20 --jobs 4 --for 30 --record futures")]
pub(crate) struct Options {
    /// The recording.
    recording: PathBuf,
    /// The moment: an exit number, a guest time such as 12.5s, `crash`, `end`, or `console:TEXT`; see `live`.
    #[arg(long, value_name = "MOMENT")]
    at: When,
    /// How many futures to live.
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=FUTURES_MAX))]
    number: u64,
    /// How many of them to live at a time; without it, one for each CPU of this host.
    ///
    /// Each takes as much memory as the recorded machine.
    #[arg(long, short, value_parser = clap::value_parser!(u64).range(1..))]
    jobs: Option<u64>,
    /// Keep the recordings in this directory, which is made if it is not there: DIR/seed-1, DIR/seed-2, ...
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,
    /// The first one's chaos seed; each other one has the next.
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
    /// Stop each after this much of its time from the moment on, in seconds.
    #[arg(long = "for", value_name = "SECONDS", value_parser = parse_seconds)]
    for_ns: Option<Nanos>,
    /// Stop one that has not reset itself SECONDS of its time after a kernel panic.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    panic_grace: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Each is compared with each.
const FUTURES_MAX: u64 = 1000;

/// What became of one future.
#[derive(Clone, Debug, Serialize)]
struct Future {
    seed: u64,
    /// Where it is recorded, if that is kept.
    recording: Option<PathBuf>,
    /// The exit code of its process.
    exit_code: i32,
    /// What its process said if it failed.
    failure: Option<String>,
    /// How the guest ended, and the reason it gave if it panicked.
    ending: Option<String>,
    panicked: bool,
    exits: Option<u64>,
    guest_ns: Option<u64>,
    digest: Option<String>,
    state_digest: Option<String>,
    /// The exit at which it parted from the last of the others; none if it is like one of them to the end.
    parted_at: Option<u64>,
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    // What there is to be refused is refused once, and so is the way there gone.
    let exit = keep_moment(&Recording::at(&options.recording), &options.at)?;
    let (directory, _temporary) = match &options.record {
        Some(directory) => {
            std::fs::create_dir_all(directory)?;
            (directory.clone(), None)
        }
        None => {
            let temporary = tempfile::Builder::new()
                .prefix("hindsight-fork-")
                .tempdir()?;
            (temporary.path().to_path_buf(), Some(temporary))
        }
    };
    let mut futures = live_all(options, exit, &directory)?;
    let places: Vec<PathBuf> = futures
        .iter()
        .map(|future| place(&directory, future.seed))
        .collect();
    for (at, future) in futures.iter_mut().enumerate() {
        if future.exit_code == 0 {
            future.parted_at = parted_at(&places, at)?;
        }
    }
    tell_all(options, exit, &futures);
    match futures.iter().find(|future| future.exit_code != 0) {
        None => Ok(Outcome::Good),
        Some(failed) => {
            let kind = match failed.exit_code {
                1 => Kind::Different,
                2 | 3 => Kind::BadInput,
                4 => Kind::Unfit,
                _ => Kind::HostFailed,
            };
            let said = failed.failure.clone().unwrap_or_default();
            Err(Failure::new(
                kind,
                format!("the future of seed {} failed: {said}", failed.seed),
            ))
        }
    }
}

/// Where the future of a seed is recorded.
fn place(directory: &Path, seed: u64) -> PathBuf {
    directory.join(format!("seed-{seed}"))
}

/// Lives all of them, so many at a time, in the order of their seeds.
fn live_all(options: &Options, exit: u64, directory: &Path) -> Result<Vec<Future>, Failure> {
    let jobs = options.jobs.unwrap_or_else(children::usual_jobs);
    let lived = children::share_out(jobs, options.number, |number| {
        let seed = options.seed.wrapping_add(number);
        let lived = command(options, exit, directory, seed)?.output()?;
        let future = Future::of(options, seed, &lived);
        if !options.json {
            tell!("hindsight: {}", future.line());
        }
        Ok(future)
    });
    Ok(lived?)
}

/// The process of one.
fn command(options: &Options, exit: u64, directory: &Path, seed: u64) -> std::io::Result<Command> {
    let mut command = children::this_program("live")?;
    command.arg("--at").arg(exit.to_string());
    command.arg(format!("--chaos={seed}"));
    command.args(["--quiet", "--json", "--panic-grace"]);
    command.arg(options.panic_grace.to_string());
    if let Some(ns) = options.for_ns {
        let (whole, part) = (ns / 1_000_000_000, ns % 1_000_000_000);
        command.arg("--for").arg(format!("{whole}.{part:09}"));
    }
    command.arg("--record").arg(place(directory, seed));
    command.arg("--").arg(&options.recording);
    Ok(command)
}

impl Future {
    /// By what its process left.
    fn of(options: &Options, seed: u64, lived: &Output) -> Future {
        // A guest that was left running tells of itself too, after its recording.
        let text = String::from_utf8_lossy(&lived.stdout);
        let first = text.lines().next().unwrap_or_default();
        let summary: Value = serde_json::from_str(first).unwrap_or_default();
        let text = |name: &str| summary[name].as_str().map(String::from);
        let exit_code = lived.status.code().unwrap_or(-1);
        let failure = (exit_code != 0).then(|| children::said(lived, Some("hindsight: live from")));
        Future {
            seed,
            recording: (options.record.as_ref()).map(|directory| place(directory, seed)),
            exit_code,
            failure,
            ending: text("ending"),
            panicked: summary["panicked"].as_bool().unwrap_or(false),
            exits: summary["exits"].as_u64(),
            guest_ns: summary["guest_ns"].as_u64(),
            digest: text("digest"),
            state_digest: text("state_digest"),
            parted_at: None,
        }
    }

    /// For a person, in one line.
    fn line(&self) -> String {
        let ending = match (&self.ending, &self.failure) {
            (_, Some(failure)) => {
                let first = failure.lines().next().unwrap_or_default();
                return format!("seed {}: failed: {}", self.seed, shown(first));
            }
            (Some(ending), None) => ending.clone(),
            (None, None) => "it did not say how it ended".into(),
        };
        format!(
            "seed {}: {}; exit {}, {}, digest {}",
            self.seed,
            shown(&ending),
            thousands(self.exits.unwrap_or_default()),
            seconds(self.guest_ns.unwrap_or_default()),
            self.digest.as_deref().unwrap_or("unknown"),
        )
    }
}

/// The exit at which the journal of one future parts from the last of the others; `None` if there is one from which it
/// does not, or there is no other.
fn parted_at(places: &[PathBuf], one: usize) -> Result<Option<u64>, Failure> {
    let mut last = None;
    for (_, place) in places.iter().enumerate().filter(|(at, _)| *at != one) {
        // One that failed may have left none.
        let Ok(mut theirs) = Recording::at(place).journal() else {
            continue;
        };
        let mut own = Recording::at(&places[one]).journal()?;
        match first_difference(&mut own, &mut theirs)? {
            None => return Ok(None),
            Some(exits) => last = last.max(Some(exits)),
        }
    }
    Ok(last)
}

/// The exit of the first event in which two journals differ.
fn first_difference(
    a: &mut JournalReader<impl Read>,
    b: &mut JournalReader<impl Read>,
) -> Result<Option<u64>, JournalError> {
    loop {
        match (a.next_record()?, b.next_record()?) {
            (None, None) => return Ok(None),
            (Some(x), Some(y)) if x == y => {}
            (x, y) => {
                let exits = x.into_iter().chain(y).map(|record| record.exits);
                return Ok(exits.min());
            }
        }
    }
}

fn tell_all(options: &Options, exit: u64, futures: &[Future]) {
    if options.json {
        let value = serde_json::json!({
            "recording": options.recording,
            "at": exit,
            "futures": futures,
        });
        out!("{value}");
        return;
    }
    for future in futures {
        let parted = match future.parted_at {
            Some(exits) => format!("; parted from the others at exit {}", thousands(exits)),
            None => String::new(),
        };
        out!("{}{parted}", future.line());
    }
    let panicked = futures.iter().filter(|future| future.panicked).count();
    let failed = futures
        .iter()
        .filter(|future| future.exit_code != 0)
        .count();
    let kept = match &options.record {
        Some(directory) => format!("; recorded in {}", shown_path(directory)),
        None => String::new(),
    };
    out!(
        "{} futures of {} from exit {}: {panicked} panicked, {failed} failed{kept}",
        thousands(futures.len() as u64),
        shown_path(&options.recording),
        thousands(exit),
    );
    if let Some(advice) = advice(panicked, futures.len() - failed) {
        out!("{advice}");
    }
}

/// What to try next, if the `ended` futures that came to an end leave no doubt.
fn advice(panicked: usize, ended: usize) -> Option<String> {
    match panicked {
        _ if ended < 2 => None,
        0 => Some(format!(
            "all {ended} ended alike, without a panic; from a later moment, or among more futures, one may"
        )),
        _ if panicked == ended => Some(format!(
            "all {ended} ended alike, in a panic: it was settled by then; an earlier moment leaves more to chance"
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use hindsight_replay::{Event, Header, JournalWriter};

    use super::*;

    fn recorded(directory: &Path, seed: u64, witnesses: &[(u64, u8)]) -> PathBuf {
        let place = place(directory, seed);
        std::fs::create_dir(&place).unwrap();
        let file = std::fs::File::create(place.join("journal")).unwrap();
        let mut writer = JournalWriter::create(file, &Header::smallest()).unwrap();
        for (exits, check) in witnesses {
            let check = [*check, 0];
            writer.append(*exits, Event::Witness { check }).unwrap();
        }
        let last = witnesses.last().map_or(0, |(exits, _)| *exits);
        writer.close_frame(last, 0).unwrap();
        place
    }

    #[test]
    fn futures_that_all_end_alike_call_for_another_moment_and_others_do_not() {
        for undecided in [(0, 0), (0, 1), (1, 1), (1, 8), (7, 8)] {
            assert_eq!(advice(undecided.0, undecided.1), None, "{undecided:?}");
        }
        assert!(advice(8, 8).unwrap().contains("an earlier moment"));
        assert!(advice(0, 8).unwrap().contains("a later moment"));
    }

    #[test]
    fn a_future_parts_from_the_others_where_the_last_of_them_goes_another_way() {
        let dir = tempfile::tempdir().unwrap();
        let places = [
            recorded(dir.path(), 1, &[(16, 1), (32, 2), (48, 3)]),
            recorded(dir.path(), 2, &[(16, 1), (32, 2), (48, 4)]),
            recorded(dir.path(), 3, &[(16, 9), (32, 2), (48, 3)]),
            recorded(dir.path(), 4, &[(16, 1), (32, 2)]),
            dir.path().join("none"),
        ];
        let parted = |one| parted_at(&places, one).unwrap();
        assert_eq!([0, 1, 2, 3].map(parted), [48, 48, 16, 48].map(Some));
        let twin = recorded(dir.path(), 5, &[(16, 1), (32, 2), (48, 3)]);
        let places = [places[0].clone(), places[2].clone(), twin];
        assert_eq!(parted_at(&places, 0).unwrap(), None);
        assert_eq!(parted_at(&places, 1).unwrap(), Some(16));
        assert_eq!(parted_at(&places[..1], 0).unwrap(), None, "no others");
    }
}
