//! `hindsight ps`: which processes a machine had at some moment.

use std::io::BufWriter;

use clap::Args;
use hindsight_vmm::failure::Failure;
use serde_json::json;

use super::look::{Look, may_be_more, nothing};
use crate::outcome::Outcome;
use crate::output::Output;
use crate::tasks::{lines, object, tasks};

/// Options of `ps`.
#[derive(Debug, Args)]
#[command(after_help = "\
The recording is replayed, and checked as it runs, up to the moment; then its kernel's own lists are read
in its memory. Nothing runs in the guest for that, and nothing of it changes.

START is in seconds since the guest's kernel began. A name in brackets has no arguments in memory: a thread
of the kernel's, or what has ended.

Examples:
  hindsight ps crash --at crash
  hindsight ps boot --at 12.5s --threads
  hindsight ps boot --at console:login --json")]
pub(crate) struct Options {
    #[command(flatten)]
    look: Look,
    /// List threads too.
    #[arg(long, short = 'L')]
    threads: bool,
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    let mut at = options.look.go()?;
    let (current, found) = at.look(|view, memory| {
        let current = view.current(memory).ok().map(|task| task.pid);
        (current, tasks(view, memory, options.threads))
    });
    if let (true, Some(why)) = (found.items.is_empty(), &found.broken) {
        return Err(nothing("processes", &at, why));
    }
    let mut out = Output::new(BufWriter::new(std::io::stdout()));
    if options.look.json {
        let value = json!({
            "exits": at.exits,
            "guest_ns": at.now,
            "current": current,
            "tasks": found.items.iter().map(object).collect::<Vec<_>>(),
            "broken": found.broken.as_ref().map(ToString::to_string),
        });
        out.write(format!("{value}\n").as_bytes());
    } else {
        out.write(lines(&found.items, options.threads).as_bytes());
        if let Some(why) = &found.broken {
            may_be_more(why);
        }
    }
    out.finish()?;
    Ok(Outcome::Good)
}
