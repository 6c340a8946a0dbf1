//! `hindsight verify`: checks a recording, in stretches and side by side.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clap::Args;
use hindsight_replay::Stretch;
use hindsight_replay::foreign::{shown, shown_path};
use hindsight_vmm::failure::{Failure, Kind};
use hindsight_vmm::session::{
    CounterWish, RecordedPaths, Recording, Share, Verified, VerifyWish, verify,
};
use serde_json::json;

use crate::children;
use crate::format::seconds;
use crate::outcome::Outcome;
use crate::screen::Terminal;
use crate::stretches::{self, STRETCHES_MAX, StretchVerdict};
use crate::tell::{out, tell};

/// Options of `verify`.
#[derive(Debug, Args)]
#[command(after_help = "\
A recording is right if each of its stretches is: begun at the checkpoint where the one before ends, it replays equal,
and comes to the state that the checkpoint at its end has. The first one begins at power-on. So a recording that was
indexed (`hindsight index`) is checked by as many processes, or machines, as there are; without checkpoints it is
one stretch.

With --stretch the exit code says what to do: 0, it is right; 1, it is not; 2, it cannot be checked as it is (index the
recording again); 3, the journal is damaged or cut short there; 4 and 5, this host cannot do it, or failed: try again,
perhaps elsewhere. With --collect it is that of the stretch which says most: 1 before 5, 4, 3 and 2; one that no file
tells of counts as 5.")]
pub(crate) struct Options {
    /// The recording.
    recording: PathBuf,
    /// How many stretches are checked at the same time, each by a process of its own; without it, one for each CPU.
    #[arg(long, short, value_name = "N", conflicts_with = "stretch", value_parser = clap::value_parser!(u64).range(1..=1024))]
    jobs: Option<u64>,
    /// Check stretch I of N, and nothing else.
    #[arg(long, value_name = "I/N", value_parser = parse_share)]
    stretch: Option<Share>,
    /// Check nothing, but put together what --stretch --json printed on other machines; each FILE has one or several.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["jobs", "stretch", "disks"])]
    collect: Vec<PathBuf>,
    /// Take the image of a disk from here instead of from where it was; it must be the same.
    ///
    /// Once for each disk, in their order.
    #[arg(long = "disk", value_name = "FILE")]
    disks: Vec<PathBuf>,
    /// Print JSON on standard output, and nothing else.
    #[arg(long)]
    json: bool,
}

fn parse_share(text: &str) -> Result<Share, String> {
    let bad = || format!("{text:?}: expected I/N, such as 3/8: the third of eight");
    let (number, of) = text.split_once('/').ok_or_else(bad)?;
    let (number, of) = (number.parse(), of.parse());
    match (number, of) {
        (Ok(number), Ok(of)) if (1..=of).contains(&number) && of <= STRETCHES_MAX => {
            Ok(Share { number, of })
        }
        _ => Err(bad()),
    }
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    if !options.collect.is_empty() {
        return collect(options);
    }
    if let Some(share) = options.stretch {
        return check_one(options, share);
    }
    // What there is to be refused is refused once.
    Recording::at(&options.recording).journal()?;
    let jobs = options.jobs.unwrap_or_else(children::usual_jobs);
    match jobs {
        1 => check_one(options, Share::WHOLE),
        _ => check_all(options, jobs),
    }
}

/// Checks a stretch in this process.
fn check_one(options: &Options, share: Share) -> Result<Outcome, Failure> {
    let start = Instant::now();
    let wish = VerifyWish {
        recording: options.recording.clone(),
        instead: RecordedPaths {
            disks: options.disks.clone(),
            ..RecordedPaths::default()
        },
        counter: CounterWish::default(),
        share,
    };
    let mut terminal = Terminal {
        quiet: true,
        real_time: false,
    };
    let verified = match verify(&wish, &mut terminal) {
        Ok(verified) => verified,
        Err(failure) => {
            if options.json {
                let (why, outcome) = (failure.to_string(), Outcome::from(failure.kind()));
                let verdict = StretchVerdict::without(share, "failed", why, outcome);
                out!("{}", json!(verdict));
            }
            return Err(failure);
        }
    };
    let judged = judge(&verified);
    let outcome = judged.2;
    let exits = (verified.from, verified.to.unwrap_or(verified.exits));
    let host_ns = start.elapsed().as_nanos() as u64;
    let verdict = StretchVerdict::new(share, verified.place, exits, judged, host_ns);
    match options.json {
        true => out!("{}", json!(verdict)),
        false => tell!("{}", verdict.line()),
    }
    Ok(outcome)
}

fn judge(verified: &Verified) -> (&'static str, String, Outcome) {
    if let Some(divergence) = &verified.divergence {
        return ("diverged", divergence.clone(), Outcome::Different);
    }
    match &verified.stretch {
        None => ("empty", String::new(), Outcome::Good),
        Some(Stretch::Equal) => ("equal", String::new(), Outcome::Good),
        Some(Stretch::Ended(end)) => ("equal", end.to_string(), Outcome::Good),
        Some(Stretch::CutShort(tail)) => ("cut short", tail.to_string(), Outcome::CutShort),
        Some(Stretch::Elsewhere(parts)) => {
            let what = format!(
                "it comes to another state than its last checkpoint has, in {}",
                parts.join(", ")
            );
            ("another state", what, Outcome::Different)
        }
        Some(Stretch::Unusable(why)) => {
            let what = format!("a checkpoint is of no use: {why}; index the recording again");
            ("not checked", what, Outcome::BadInput)
        }
    }
}

/// Checks all stretches, each in a process.
fn check_all(options: &Options, jobs: u64) -> Result<Outcome, Failure> {
    let start = Instant::now();
    let all = children::share_out(jobs, jobs, |number| {
        let share = Share {
            number: number + 1,
            of: jobs,
        };
        let one = StretchVerdict::of_process(share, &command(options, share)?.output()?);
        if !options.json {
            tell!("{}", one.line());
        }
        Ok(one)
    })?;
    let host_ns = start.elapsed().as_nanos() as u64;
    Ok(tell_of_all(&all, host_ns, options.json))
}

/// Puts together what others found.
fn collect(options: &Options) -> Result<Outcome, Failure> {
    let journal = Recording::at(&options.recording).journal()?;
    let recording = stretches::check_text(journal.start().check);
    let mut verdicts = Vec::new();
    for file in &options.collect {
        match stretches::read(file) {
            Ok(more) => verdicts.extend(more),
            // Its stretch is missing, unless another file has it.
            Err(why) => tell!("{}: {}", shown_path(file), shown(&why)),
        }
    }
    let all = stretches::put_together(verdicts, &recording)
        .map_err(|why| Failure::new(Kind::BadInput, why))?;
    if all.is_empty() {
        let why = "none of these files has a verdict on a stretch; check the stretches again";
        return Err(Failure::new(Kind::HostFailed, why));
    }
    if !options.json {
        for one in all.iter().filter(|one| one.outcome() != Outcome::Good) {
            tell!("{}", one.line());
        }
    }
    let host_ns = all.iter().map(StretchVerdict::host_ns);
    let host_ns = host_ns.fold(0, u64::saturating_add);
    Ok(tell_of_all(&all, host_ns, options.json))
}

/// Says what the stretches of a recording, which are all there are, come to.
fn tell_of_all(all: &[StretchVerdict], host_ns: u64, as_json: bool) -> Outcome {
    let gap = stretches::check_joined(all).err();
    let joined = gap.as_ref().map_or(Outcome::Good, |_| Outcome::BadInput);
    let outcomes = all.iter().map(StretchVerdict::outcome);
    let wrong = outcomes.clone().filter(|one| *one != Outcome::Good).count();
    let outcome = Outcome::weightiest(outcomes.chain([joined]));
    let equal = outcome == Outcome::Good;
    if as_json {
        out!(
            "{}",
            json!({"equal": equal, "stretches": all, "gap": gap, "host_ns": host_ns})
        );
        return outcome;
    }
    if let Some(gap) = &gap {
        tell!("{gap}");
    }
    if equal {
        tell!("all {} stretches equal, in {}", all.len(), seconds(host_ns));
    } else if wrong > 0 {
        let of = all.len();
        tell!("{wrong} of {of} stretches are not equal, or were not checked");
    }
    outcome
}

fn command(options: &Options, share: Share) -> std::io::Result<Command> {
    let mut command = children::this_program("verify")?;
    let Share { number, of } = share;
    command.args(["--json", "--stretch", &format!("{number}/{of}")]);
    for disk in &options.disks {
        command.arg("--disk").arg::<&Path>(disk);
    }
    command.arg("--").arg(&options.recording);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stretch_is_one_of_a_number() {
        assert_eq!(parse_share("3/8"), Ok(Share { number: 3, of: 8 }));
        for bad in [
            "",
            "3",
            "0/8",
            "9/8",
            "/8",
            "3/",
            "-1/8",
            "1/0",
            "1/9999999999",
        ] {
            assert!(parse_share(bad).is_err(), "{bad}");
        }
    }
}
