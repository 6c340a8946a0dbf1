//! `hindsight index`: makes the checkpoints of a recording.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use hindsight_replay::foreign::shown_lines;
use hindsight_vmm::failure::Failure;
use hindsight_vmm::session::{IndexWish, RecordedPaths, SPACING, Verdict, index_recording};
use serde_json::json;

use crate::format::{bytes, parse_size, seconds, thousands};
use crate::outcome::Outcome;
use crate::screen::Terminal;
use crate::tell::{out, tell};

/// Options of `index`.
#[derive(Debug, Args)]
#[command(after_help = "\
The recording is replayed once, and checked as it runs. Its checkpoints are in the file `checkpoints` in its
directory, and make any moment of it quick to reach. They may be deleted at any time: whatever needs a moment
then replays its way there. They hold what the guest's memory and disks held, and are as secret as those.

If this is interrupted, the next time goes on where it was.")]
pub(crate) struct Options {
    /// The recording.
    recording: PathBuf,
    /// How much room the checkpoints may take.
    ///
    /// If all of them would take more, they are further apart: then a moment takes longer to reach.
    #[arg(long, value_name = "SIZE", default_value = "150M", value_parser = parse_size)]
    budget: u64,
    /// Take the image of a disk from here instead of from where it was; it must be the same.
    ///
    /// Once for each disk, in their order.
    #[arg(long = "disk", value_name = "FILE")]
    disks: Vec<PathBuf>,
    /// Print JSON on standard output, and nothing else.
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    let start = Instant::now();
    let wish = IndexWish {
        recording: options.recording.clone(),
        instead: RecordedPaths {
            disks: options.disks.clone(),
            ..RecordedPaths::default()
        },
        budget_bytes: options.budget,
        spacing: SPACING,
    };
    let mut terminal = Terminal {
        quiet: true,
        real_time: false,
    };
    let indexed = index_recording(&wish, &mut terminal)?;
    let host_ns = start.elapsed().as_nanos() as u64;
    let (verdict, outcome) = match &indexed.verdict {
        Verdict::Equal(_) | Verdict::Reached => ("equal", Outcome::Good),
        Verdict::CutShort(_) => ("cut short", Outcome::CutShort),
        Verdict::Diverged(_) => ("diverged", Outcome::Different),
    };
    if options.json {
        let report = json!({
            "verdict": verdict,
            "exits": indexed.exits,
            "checkpoints": indexed.checkpoints,
            "checkpoints_before": indexed.before,
            "bytes": indexed.bytes,
            "host_ns": host_ns,
        });
        out!("{report}");
        return Ok(outcome);
    }
    match &indexed.verdict {
        Verdict::Diverged(divergence) => tell!("replay diverged: {}", shown_lines(divergence)),
        Verdict::CutShort(tail) => tell!("{}", shown_lines(tail)),
        Verdict::Equal(_) | Verdict::Reached => {}
    }
    let before = match indexed.before {
        0 => String::new(),
        before => format!(", {} of them from before", thousands(before as u64)),
    };
    tell!(
        "{} checkpoints{before}, {}, over {} exits, in {}",
        thousands(indexed.checkpoints as u64),
        bytes(indexed.bytes),
        thousands(indexed.exits),
        seconds(host_ns)
    );
    Ok(outcome)
}
