//! `hindsight doctor`.

use std::io::{IsTerminal, Write};

use clap::Args;
use hindsight_vmm::doctor::{Wishes, examine};
use hindsight_vmm::failure::Failure;
use hindsight_vmm::perf::CounterEvent;

use crate::outcome::Outcome;
use crate::tell::out;

/// Options of `doctor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each line is a claim, whether it holds on this host, what was seen, and what it costs if it does
not hold. The exit code is 0 if this host can record and 4 if it cannot.")]
pub(crate) struct Options {
    /// Print the findings as JSON.
    #[arg(long)]
    json: bool,
    /// Count this raw event, as r00c0 or 0xc0, instead of the one that is known for this CPU.
    #[arg(long, value_name = "EVENT")]
    event: Option<CounterEvent>,
    /// Say whether this margin, in branches, covers the skid of overflow signals.
    #[arg(long, value_name = "BRANCHES")]
    margin: Option<u64>,
}

/// Says what is being done in the last line of a terminal, in place of what it said before.
fn show_progress(what: &str) {
    let mut terminal = std::io::stderr();
    if terminal.is_terminal() {
        // Nobody misses it where it cannot be shown.
        let _ = write!(terminal, "\r\x1b[K{what}");
    }
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    let wishes = Wishes {
        event: options.event.clone(),
        margin: options.margin,
    };
    let report = examine(&wishes, &mut show_progress);
    show_progress("");
    if options.json {
        let json = serde_json::to_string_pretty(&report).expect("plain values serialise");
        out!("{json}");
    } else {
        out!("{}", report.text().trim_end());
    }
    Ok(match report.can_record {
        true => Outcome::Good,
        false => Outcome::Unfit,
    })
}
