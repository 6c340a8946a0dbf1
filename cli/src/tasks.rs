//! The processes of a guest as they are shown.

use hindsight_kernel::view::{Listing, Memory, State, Task, View, ViewError};
use hindsight_replay::foreign::shown;
use serde_json::{Value, json};

/// When there are more bytes of arguments than this, those of the tasks that follow are not shown.
const ARGUMENTS_BYTES: usize = 32 << 20;

/// A task with what it runs.
pub(crate) struct Shown {
    task: Task,
    executable: Option<String>,
    arguments: Vec<String>,
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

/// A table as `ps` has one.
pub(crate) fn lines(tasks: &[Shown], threads: bool) -> String {
    let tid = if threads { "    TID " } else { "" };
    let header = format!("    PID {tid}   PPID   UID STAT      START COMMAND\n");
    let rows = tasks.iter().map(|shown| line(shown, threads));
    std::iter::once(header).chain(rows).collect()
}

/// The processes with what they run, or all threads.
pub(crate) fn tasks(view: &View, memory: &mut dyn Memory, threads: bool) -> Listing<Shown> {
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

/// One of them for a program.
pub(crate) fn object(of: &Shown) -> Value {
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
