//! `hindsight replay`.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{ArgGroup, Args};
use hindsight_replay::foreign::{shown_lines, shown_path};
use hindsight_replay::{Anchor, When};
use hindsight_vmm::failure::{Failure, Kind};
use hindsight_vmm::session::{
    Beginning, RelogWish, ReplayWish, Replayed, SaveWish, Saved, Verdict, replay,
};
use serde::Serialize;

use crate::format::{bytes, parse_size, seconds, thousands};
use crate::options::{CounterOptions, DetailOption, InsteadOptions, Verify, parse_verify};
use crate::outcome::Outcome;
use crate::screen::Terminal;
use crate::summary::{Summary, not_compared};
use crate::tell::{out, tell};

/// Options of `replay`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("written").args(["relog", "save"])))]
#[command(after_help = "\
The guest's console goes to standard output, the verdict to standard error. Memory, registers, devices and disks are always
compared at the end of a whole recording, unless the guest was stopped between two exits: then the
verdict says that it was not.")]
pub(crate) struct Options {
    /// The recording.
    recording: PathBuf,
    /// Compare memory and all else that the machine has: at the end (memory), or every N exits too (memory=N).
    ///
    /// The latter where the recording holds digests made with the same option.
    #[arg(long, value_name = "memory[=N]", value_parser = parse_verify)]
    verify: Option<Verify>,
    /// Stop at this moment: an exit number, a guest time such as 12.5s, `end`, `crash`, `console:TEXT`, or a mark.
    ///
    /// `crash` is the exit at which the guest's kernel panics, `console:TEXT` the one at which TEXT is complete on a
    /// console, a mark is called by its name (`hindsight marks`). +N or -N after it is N exits later or earlier:
    /// crash-100.
    #[arg(long, value_name = "MOMENT")]
    until: Option<When>,
    /// With --until: save the state of the machine there, for --from.
    ///
    /// Nothing is written if the replay is refused, diverges, or ends before. The file holds the guest's memory
    /// and what it has written to its disks: it is as secret as those.
    #[arg(long, value_name = "FILE", requires = "until")]
    save: Option<PathBuf>,
    /// Begin at a moment, or at a state that was saved by --save, instead of at the start.
    ///
    /// What names no moment (see --until) is a file; ./5 is a file named 5. So is a file's name that a mark has, too:
    /// mark:NAME is the mark. The way to a moment is short where
    /// the recording was indexed (`hindsight index`).
    #[arg(long, value_name = "MOMENT|FILE", value_parser = parse_beginning, conflicts_with = "relog")]
    from: Option<Beginning>,
    /// Show the console at the recorded pace instead of as fast as it can be computed.
    #[arg(long)]
    real_time: bool,
    /// Write what the replay does as a recording of full detail.
    ///
    /// If the replay is refused, nothing is written. If it diverges, DIR has what was replayed until then.
    #[arg(long, value_name = "DIR", conflicts_with = "save")]
    relog: Option<PathBuf>,
    /// Detail of what --relog writes.
    #[arg(long, value_enum, default_value_t = DetailOption::Full, requires = "relog")]
    detail: DetailOption,
    /// With --relog or --save: replace the recording, or the file, that is there.
    ///
    /// A recording is replaced once the new one is whole. The old one is moved to DIR/replaced-XXXXXX when
    /// the replay begins, and deleted when it has ended
    /// equal; else both are kept.
    #[arg(long, requires = "written")]
    force: bool,
    #[command(flatten)]
    instead: InsteadOptions,
    /// Refuse unless the recorded machine has this much RAM.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    #[command(flatten)]
    counter: CounterOptions,
    /// Do not show the guest's console.
    #[arg(long, short)]
    quiet: bool,
    /// Print the verdict as JSON on standard output, and nothing else.
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    let start = Instant::now();
    let relog = options.relog.as_ref().map(|output| RelogWish {
        output: output.clone(),
        force: options.force,
        detail: options.detail.into(),
    });
    let wish = ReplayWish {
        recording: options.recording.clone(),
        instead: options.instead.paths(),
        until: options.until.clone(),
        memory_every: options.verify.and_then(|verify| verify.every),
        counter: options.counter.wish(),
        memory_bytes: options.memory,
        relog,
        from: options.from.clone(),
        save: options.save.as_ref().map(|output| SaveWish {
            output: output.clone(),
            force: options.force,
        }),
    };
    let mut terminal = Terminal {
        quiet: options.quiet || options.json,
        real_time: options.real_time,
    };
    let replayed = replay(&wish, &mut terminal)?;
    let host_ns = start.elapsed().as_nanos() as u64;
    let outcome = conclude(&replayed, host_ns, options.json);
    if let (Some(save), None, Outcome::Good) = (&options.save, replayed.saved, outcome) {
        let exits = replayed.machine.at().exits;
        let message = format!(
            "the recording ends at exit {exits}, before it comes to where --until says: {} was not written",
            shown_path(save)
        );
        return Err(Failure::new(Kind::BadInput, message));
    }
    Ok(outcome)
}

fn parse_beginning(text: &str) -> Result<Beginning, Infallible> {
    let is_file = Path::new(text).exists();
    Ok(match text.parse() {
        // A mark may be called as a file is; `mark:` before it says which is meant.
        Ok(When {
            anchor: Anchor::Mark(_),
            ..
        }) if is_file => Beginning::State(text.into()),
        Ok(when) => Beginning::Moment(when),
        Err(_) => Beginning::State(text.into()),
    })
}

/// The verdict as a program reads it.
#[derive(Serialize)]
struct Report<'a> {
    verdict: &'static str,
    detail: String,
    exits: u64,
    guest_ns: u64,
    witnesses_equal: u64,
    memories_equal: u64,
    /// The exit from which it went on, if not from the start.
    from_exit: Option<u64>,
    /// Length in bytes of the state that was saved.
    saved_bytes: Option<u64>,
    /// How long it took to take and to write it, in nanoseconds.
    saved_host_ns: Option<u64>,
    /// What the verdict does not cover, as a clause.
    not_compared: Option<&'static str>,
    /// How many of these are equal but for Accessed bits of page tables.
    memories_but_accessed: u64,
    summary: Option<&'a Summary>,
}

fn conclude(replayed: &Replayed, host_ns: u64, json: bool) -> Outcome {
    let machine = &replayed.machine;
    let exits = machine.at().exits;
    let but_accessed = replayed.states_but_accessed;
    let (equal, equal_so_far) = match but_accessed {
        0 => ("equal", "equal so far"),
        _ => (
            "equal but for Accessed bits",
            "equal so far but for Accessed bits",
        ),
    };
    let (verdict, outcome, detail, end) = match &replayed.verdict {
        Verdict::Equal(end) => (equal, Outcome::Good, end.to_string(), Some(end)),
        Verdict::Reached => (
            equal_so_far,
            Outcome::Good,
            format!("stopped at {}", machine.at()),
            None,
        ),
        Verdict::CutShort(tail) => ("cut short", Outcome::CutShort, tail.to_string(), None),
        Verdict::Diverged(divergence) => {
            ("diverged", Outcome::Different, divergence.to_string(), None)
        }
    };
    let not_compared = end.and_then(not_compared);
    let summary = end.map(|end| Summary::new(machine, end, host_ns, None));
    let (witnesses, memories) = (replayed.witnesses, replayed.states);
    if json {
        let report = Report {
            verdict,
            detail,
            exits,
            guest_ns: machine.now(),
            from_exit: replayed.from,
            saved_bytes: replayed.saved.map(|saved| saved.bytes),
            saved_host_ns: replayed.saved.map(|saved| saved.host_ns),
            witnesses_equal: witnesses,
            memories_equal: memories,
            not_compared,
            memories_but_accessed: but_accessed,
            summary: summary.as_ref(),
        };
        out!(
            "{}",
            serde_json::to_string(&report).expect("plain values serialise")
        );
        return outcome;
    }
    let aside = not_compared.map_or(String::new(), |what| format!("; {what}"));
    tell!("replay {verdict}: {}{aside}", shown_lines(&detail));
    tell!(
        "  {} exits, {} of guest time in {}; {} witnesses and {} memory digests equal",
        thousands(exits),
        seconds(machine.now()),
        seconds(host_ns),
        thousands(witnesses),
        thousands(memories)
    );
    if let Some(from) = replayed.from {
        tell!("  from exit {} on", thousands(from));
    }
    if let Some(Saved {
        bytes: length,
        host_ns,
    }) = replayed.saved
    {
        tell!("  state saved, {} in {}", bytes(length), seconds(host_ns));
    }
    if but_accessed > 0 {
        tell!(
            "  memory differs in Accessed bits of page tables alone, in {} of these digests: the CPU sets them as it \
             walks the tables, and nothing that the guest did differs",
            thousands(but_accessed)
        );
    }
    if let Some(summary) = summary {
        let memory = summary.memory_digest.as_deref().unwrap_or("none");
        tell!("  digest {}, memory {memory}", summary.digest);
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replay_begins_at_a_file_where_one_has_the_name_of_a_mark() {
        let is_state = |text: &str| {
            let Ok(beginning) = parse_beginning(text);
            matches!(beginning, Beginning::State(_))
        };
        // Tests run in the folder of their crate.
        assert!(is_state("Cargo.toml") && is_state("./5") && is_state("no/such/file"));
        for moment in ["mark:Cargo.toml", "login", "5", "crash-1"] {
            assert!(!is_state(moment), "{moment}");
        }
    }
}
