//! `hindsight ps`: which processes a machine had at some moment.

use std::io::BufWriter;

use clap::Args;
use hindsight_kernel::view::{Listing, Memory, State, Task, View, ViewError};
use hindsight_replay::foreign::shown;
use hindsight_vmm::failure::Failure;
use serde_json::{Value, json};

use super::look::{Look, may_be_more, nothing};
use crate::outcome::Outcome;
use crate::output::Output;

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

/// When there are more bytes of arguments than this, those of the tasks that follow are not shown.
const ARGUMENTS_BYTES: usize = 32 << 20;

/// A task with what it runs.
struct Shown {
    task: Task,
    executable: Option<String>,
    arguments: Vec<String>,
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

/// The processes as a person reads them, and why there may be more.
pub(crate) fn table(
    view: &View,
    memory: &mut dyn Memory,
    threads: bool,
) -> (String, Option<ViewError>) {
    let found = tasks(view, memory, threads);
    (lines(&found.items, threads), found.broken)
}

fn lines(tasks: &[Shown], threads: bool) -> String {
    let tid = if threads { "    TID " } else { "" };
    let header = format!("    PID {tid}   PPID   UID STAT      START COMMAND\n");
    let rows = tasks.iter().map(|shown| line(shown, threads));
    std::iter::once(header).chain(rows).collect()
}

fn tasks(view: &View, memory: &mut dyn Memory, threads: bool) -> Listing<Shown> {
    let Listing { items, broken } = view.tasks(memory);
    let wanted = (items.into_iter()).filter(|task| threads || task.is_process());
    let mut room = ARGUMENTS_BYTES;
    let mut shown = |task: Task| {
        let arguments = match room {
            0 => Vec::new(),
            _ => view.arguments(memory, &task).unwrap_or_default(),
        };
        let bytes = arguments.iter().map(|argument| argument.len() + 1);
        room = room.saturating_sub(bytes.sum());
        Shown {
            executable: view.executable(memory, &task).ok().flatten(),
            arguments,
            task,
        }
    };
    Listing {
        items: wanted.map(&mut shown).collect(),
        broken,
    }
}

/// The letters of `ps`, but for those that ask for terminals and locked memory.
fn stat(task: &Task) -> String {
    let nice = match task.nice {
        ..0 => "<",
        0 => "",
        1.. => "N",
    };
    let leads = if task.leads_session { "s" } else { "" };
    let threads = if task.threads > 1 { "l" } else { "" };
    format!("{}{nice}{leads}{threads}", task.state.letter())
}

fn line(of: &Shown, threads: bool) -> String {
    let task = &of.task;
    let command = match &of.arguments[..] {
        [] => format!("[{}]", shown(&task.name)),
        arguments => shown(&arguments.join(" ")).to_string(),
    };
    let ended = match task.state {
        State::Zombie | State::Dead => " <defunct>",
        _ => "",
    };
    let tid = match threads {
        true => format!("{:>7} ", task.pid),
        false => String::new(),
    };
    let start = format!(
        "{}.{:02}",
        task.start_ns / 1_000_000_000,
        task.start_ns / 10_000_000 % 100
    );
    format!(
        "{:>7} {tid}{:>7} {:>5} {:<4} {start:>10} {command}{ended}\n",
        task.tgid,
        task.parent,
        task.uid,
        stat(task),
    )
}

fn object(of: &Shown) -> Value {
    let task = &of.task;
    json!({
        "pid": task.tgid,
        "tid": task.pid,
        "parent": task.parent,
        "uid": task.uid,
        "state": task.state.letter().to_string(),
        "stat": stat(task),
        "start_ns": task.start_ns,
        "nice": task.nice,
        "threads": task.threads,
        "kernel": task.is_kernel,
        "name": task.name,
        "executable": of.executable,
        "arguments": of.arguments,
    })
}
