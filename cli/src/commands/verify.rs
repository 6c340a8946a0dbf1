//! `hindsight verify`: checks a recording, in stretches and side by side.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

use clap::Args;
use hindsight_replay::Stretch;
use hindsight_replay::foreign::shown_lines;
use hindsight_vmm::failure::Failure;
use hindsight_vmm::session::{
    CounterWish, RecordedPaths, Recording, Share, Verified, VerifyWish, verify,
};
use serde_json::{Value, json};

use crate::children;
use crate::format::{seconds, thousands};
use crate::front::Terminal;
use crate::outcome::Outcome;
use crate::tell::{out, tell};

/// Options of `verify`.
#[derive(Debug, Args)]
#[command(after_help = "\
A recording is right if each of its stretches is: begun at the checkpoint where the one before ends, it replays equal,
and comes to the state that the checkpoint at its end has. The first one begins at power-on. So a recording that was
indexed (`hindsight index`) is checked by as many processes, or machines, as there are; without checkpoints it is
one stretch.

With --stretch the exit code says what to do: 0, it is right; 1, it is not; 2, it cannot be checked as it is (index the
recording again); 4 and 5, this host cannot do it, or failed: try again, perhaps elsewhere.")]
pub(crate) struct Options {
    /// The recording.
    recording: PathBuf,
    /// How many stretches are checked at the same time, each by a process of its own; without it, one for each CPU.
    #[arg(long, short, value_name = "N", conflicts_with = "stretch", value_parser = clap::value_parser!(u64).range(1..=1024))]
    jobs: Option<u64>,
    /// Check stretch I of N, and nothing else.
    #[arg(long, value_name = "I/N", value_parser = parse_share)]
    stretch: Option<Share>,
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
        (Ok(number), Ok(of)) if (1..=of).contains(&number) && of <= 1 << 20 => {
            Ok(Share { number, of })
        }
        _ => Err(bad()),
    }
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
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
    let verified = verify(&wish, &mut terminal)?;
    let (verdict, detail, outcome) = judge(&verified);
    let host_ns = start.elapsed().as_nanos() as u64;
    let found = Found {
        share,
        verdict: verdict.into(),
        detail,
        from: verified.from,
        to: verified.to.unwrap_or(verified.exits),
        outcome,
        host_ns,
    };
    match options.json {
        true => out!("{}", found.json()),
        false => tell!("{}", found.line()),
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

/// What came of a stretch.
#[derive(Clone, Debug)]
struct Found {
    share: Share,
    verdict: String,
    detail: String,
    from: u64,
    to: u64,
    outcome: Outcome,
    host_ns: u64,
}

impl Found {
    fn json(&self) -> Value {
        json!({
            "stretch": self.share.number,
            "of": self.share.of,
            "verdict": self.verdict,
            "detail": self.detail,
            "from_exit": self.from,
            "to_exit": self.to,
            "exit_code": self.outcome as i32,
            "host_ns": self.host_ns,
        })
    }

    fn line(&self) -> String {
        let detail = match &*self.detail {
            "" => String::new(),
            detail => format!(": {}", shown_lines(detail)),
        };
        format!(
            "stretch {} of {}, exits {} to {}: {} in {}{detail}",
            self.share.number,
            self.share.of,
            thousands(self.from),
            thousands(self.to),
            self.verdict,
            seconds(self.host_ns)
        )
    }

    /// What a process says of its stretch, or why it does not.
    fn of(share: Share, ran: &Output) -> Found {
        let text = String::from_utf8_lossy(&ran.stdout);
        let said: Value = serde_json::from_str(text.trim()).unwrap_or_default();
        let number = |name: &str| said[name].as_u64().unwrap_or_default();
        Found {
            share,
            verdict: said["verdict"].as_str().unwrap_or("failed").into(),
            detail: said["detail"]
                .as_str()
                .map_or_else(|| children::said(ran, None), String::from),
            from: number("from_exit"),
            to: number("to_exit"),
            outcome: Outcome::of(ran.status),
            host_ns: number("host_ns"),
        }
    }
}

/// Checks all stretches, each in a process.
fn check_all(options: &Options, jobs: u64) -> Result<Outcome, Failure> {
    let start = Instant::now();
    let found = children::share_out(jobs, jobs, |number| {
        let share = Share {
            number: number + 1,
            of: jobs,
        };
        let one = Found::of(share, &command(options, share)?.output()?);
        if !options.json {
            tell!("{}", one.line());
        }
        Ok(one)
    })?;
    let outcome = Outcome::weightiest(found.iter().map(|one| one.outcome));
    let wrong = found
        .iter()
        .filter(|one| one.outcome != Outcome::Good)
        .count();
    let host_ns = start.elapsed().as_nanos() as u64;
    if options.json {
        let stretches: Vec<Value> = found.iter().map(Found::json).collect();
        let equal = outcome == Outcome::Good;
        out!(
            "{}",
            json!({"equal": equal, "stretches": stretches, "host_ns": host_ns})
        );
    } else if wrong == 0 {
        tell!(
            "all {} stretches equal, in {}",
            found.len(),
            seconds(host_ns)
        );
    } else {
        tell!(
            "{wrong} of {} stretches are not equal, or were not checked",
            found.len()
        );
    }
    Ok(outcome)
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
