//! `hindsight maps`: what a process had mapped at some moment.

use std::io::BufWriter;

use clap::Args;
use hindsight_replay::foreign::shown;
use hindsight_vmm::failure::{Failure, Kind};
use serde_json::json;

use super::look::{Look, may_be_more, nothing};
use crate::outcome::Outcome;
use crate::output::Output;

/// Options of `maps`.
#[derive(Debug, Args)]
#[command(after_help = "\
The lines are those of /proc/PID/maps, without device and inode: addresses, permissions, offset in the file,
and the file.

Example:
  hindsight maps crash 1 --at crash-100")]
pub(crate) struct Options {
    #[command(flatten)]
    look: Look,
    /// The process, by its number, or one of its threads.
    pid: i32,
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    let mut at = options.look.go()?;
    let pid = options.pid;
    let found = at.look(|view, memory| {
        let tasks = view.tasks(memory);
        match tasks.items.iter().find(|task| task.pid == pid) {
            Some(task) => view.maps(memory, task).map_err(Some),
            None => Err(tasks.broken),
        }
    });
    let found = match found {
        Ok(found) => found,
        Err(Some(why)) => return Err(nothing("such processes", &at, &why)),
        Err(None) => {
            let message = format!("there is no process {pid} at exit {}", at.exits);
            return Err(Failure::new(Kind::BadInput, message));
        }
    };
    let mut out = Output::new(BufWriter::new(std::io::stdout()));
    if options.look.json {
        let maps = found.items.iter().map(|mapping| {
            json!({
                "start": mapping.start,
                "end": mapping.end,
                "permissions": mapping.permissions(),
                "offset": mapping.offset,
                "name": mapping.name,
            })
        });
        let value = json!({
            "exits": at.exits,
            "guest_ns": at.now,
            "maps": maps.collect::<Vec<_>>(),
            "broken": found.broken.as_ref().map(ToString::to_string),
        });
        out.write(format!("{value}\n").as_bytes());
    } else {
        for mapping in &found.items {
            let line = format!(
                "{:08x}-{:08x} {} {:08x} {}",
                mapping.start,
                mapping.end,
                mapping.permissions(),
                mapping.offset,
                shown(&mapping.name)
            );
            out.write(format!("{}\n", line.trim_end()).as_bytes());
        }
        found.broken.iter().for_each(may_be_more);
    }
    out.finish()?;
    Ok(Outcome::Good)
}
