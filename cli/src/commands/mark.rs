//! `hindsight mark`: gives a moment of a recording a name, or takes it back.

use std::path::PathBuf;

use clap::Args;
use hindsight_replay::When;
use hindsight_vmm::failure::Failure;
use hindsight_vmm::session::{Mark, Recording, add_mark, complete_at, remove_mark};
use serde_json::json;

use crate::format::{seconds, thousands};
use crate::options::InsteadOptions;
use crate::outcome::Outcome;
use crate::tell::{out, tell};

/// Options of `mark`.
#[derive(Debug, Args)]
#[command(after_help = "\
A mark is at the last exit that was complete when it was made. Marks are in the file `marks` in the recording's
directory. Nothing else depends on that file: it may be edited or deleted. `hindsight marks` lists them.")]
pub(crate) struct Options {
    /// The recording.
    recording: PathBuf,
    /// The name: a letter or _, then letters, digits, and any of -_. ; without it, mark-1 and so on.
    name: Option<String>,
    /// The moment of a finished recording.
    #[arg(long, value_name = "MOMENT", required_unless_present = "remove")]
    at: Option<When>,
    /// Remove the mark of this name instead.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["name", "at"])]
    remove: Option<String>,
    #[command(flatten)]
    instead: InsteadOptions,
    /// Print the mark as JSON on standard output, and nothing else.
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    let recording = Recording::at(&options.recording);
    let (mark, what) = match (&options.remove, &options.at) {
        (Some(name), _) => (remove_mark(&recording, name)?, "removed"),
        (None, at) => {
            let at = at.as_ref().expect("clap asks for it");
            let at = complete_at(&recording, &options.instead.paths(), at)?;
            (add_mark(&recording, options.name.as_deref(), at)?, "is")
        }
    };
    if options.json {
        out!("{}", json!(mark));
    } else {
        tell_mark(&mark, what);
    }
    Ok(Outcome::Good)
}

fn tell_mark(mark: &Mark, what: &str) {
    tell!(
        "mark {} {what} at exit {}, {} of guest time",
        mark.name,
        thousands(mark.exit),
        seconds(mark.guest_ns)
    );
}
