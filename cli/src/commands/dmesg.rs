//! `hindsight dmesg`: what a machine's kernel had said by some moment.

use std::io::BufWriter;

use clap::Args;
use hindsight_replay::foreign::shown;
use hindsight_vmm::failure::Failure;
use serde_json::json;

use super::look::{Look, may_be_more};
use crate::outcome::Outcome;
use crate::output::Output;

/// Options of `dmesg`.
#[derive(Debug, Args)]
#[command(after_help = "\
This is the kernel's own buffer of messages, read in its memory: also what it has not written to a console,
and what no program was there to read.

Example:
  hindsight dmesg crash --at crash")]
pub(crate) struct Options {
    #[command(flatten)]
    look: Look,
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    let mut at = options.look.go()?;
    let found = at.look(|view, memory| view.log(memory))?;
    let mut out = Output::new(BufWriter::new(std::io::stdout()));
    if options.look.json {
        let messages = found.items.iter().map(|message| {
            json!({
                "number": message.number,
                "time_ns": message.time_ns,
                "level": message.level,
                "text": message.text,
            })
        });
        let value = json!({
            "exits": at.exits,
            "guest_ns": at.now,
            "messages": messages.collect::<Vec<_>>(),
            "broken": found.broken.as_ref().map(ToString::to_string),
        });
        out.write(format!("{value}\n").as_bytes());
    } else {
        for message in &found.items {
            let micros = message.time_ns / 1000;
            for line in message.text.split('\n') {
                let (s, us) = (micros / 1_000_000, micros % 1_000_000);
                out.write(format!("[{s:5}.{us:06}] {}\n", shown(line)).as_bytes());
            }
        }
        found.broken.iter().for_each(may_be_more);
    }
    out.finish()?;
    Ok(Outcome::Good)
}
