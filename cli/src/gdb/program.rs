//! Which program the processor runs, for gdb to load its symbols by itself.
//!
//! The guest's kernel is asked by its own structures in its memory. To gdb the target is one process; which one it is
//! changes as the guest runs on.

use gdbstub::common::Pid;
use gdbstub::target::ext::auxv::Auxv;
use gdbstub::target::ext::exec_file::ExecFile;
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, outputln};
use gdbstub::target::{TargetError, TargetResult};
use hindsight_kernel::view::{Memory, Task, View};
use hindsight_replay::foreign::{shown, shown_lines};
use hindsight_vmm::session::KernelView;

use super::target::Guest;
use crate::tasks::table;

/// ESRCH.
const NO_PROCESS: u8 = 3;

impl Guest {
    /// Asks the guest's kernel something.
    fn ask<T>(&self, ask: impl FnOnce(&View, &mut dyn Memory) -> T) -> Result<T, String> {
        let known = self.kernel.get_or_init(|| {
            KernelView::of_recording(&self.recording).map_err(|failure| failure.to_string())
        });
        let kernel = known.as_ref().map_err(Clone::clone)?;
        let memory = self.debugger.memory().ok_or("there is no machine")?;
        let mut memory = kernel.memory(memory);
        Ok(ask(kernel.view(), &mut memory))
    }

    /// The task that the processor runs, and the path of what it executes; no path for one of the kernel's own.
    fn program(&self) -> Result<(Task, Option<String>), String> {
        let found = self.ask(|view, memory| {
            let task = view.current(memory)?;
            let path = view.executable(memory, &task)?;
            Ok((task, path))
        })?;
        found.map_err(|error: hindsight_kernel::view::ViewError| error.to_string())
    }

    /// Says which program it is. gdb gets the commands that load it in a file, if it was started with one for that.
    pub(super) fn tell_program(&self, out: &mut ConsoleOutput<'_>) {
        let commands = match self.program() {
            Ok((task, None)) => {
                let name = shown(&task.name);
                outputln!(
                    out,
                    "the processor runs {name} ({}), a thread of the kernel's",
                    task.pid
                );
                String::new()
            }
            Ok((task, Some(path))) => {
                outputln!(
                    out,
                    "the processor runs {} in process {}",
                    shown(&path),
                    task.tgid
                );
                load_command(&path).unwrap_or_else(|| {
                    outputln!(out, "gdb cannot be told a path like that");
                    String::new()
                })
            }
            Err(why) => {
                outputln!(out, "{}", shown_lines(why));
                String::new()
            }
        };
        match &self.script {
            Some(script) => {
                if let Err(error) = std::fs::write(script, commands) {
                    outputln!(out, "{}: {error}", script.display());
                }
            }
            None if commands.is_empty() => {}
            None => outputln!(out, "its symbols: {}", commands.trim_end()),
        }
    }

    /// Lists processes.
    pub(super) fn list_tasks(&self, threads: bool, out: &mut ConsoleOutput<'_>) {
        match self.ask(|view, memory| table(view, memory, threads)) {
            Ok((table, broken)) => {
                out.write_raw(table.as_bytes());
                if let Some(why) = broken {
                    outputln!(out, "there may be more: {}", shown_lines(why));
                }
            }
            Err(why) => outputln!(out, "{}", shown_lines(why)),
        }
    }
}

/// What gdb is told to load a program of the guest's. The guest chooses the path, and gdb runs what it is told: so one with
/// characters that mean something to gdb is not told.
fn load_command(path: &str) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@,=%~".contains(c);
    let is_plain = path.starts_with('/') && path.chars().all(plain);
    is_plain.then(|| format!("file target:{path}\n"))
}

/// Part of an answer.
fn part(answer: &[u8], offset: u64, length: usize, into: &mut [u8]) -> usize {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = answer.get(start..).unwrap_or_default();
    let count = rest.len().min(length).min(into.len());
    into[..count].copy_from_slice(&rest[..count]);
    count
}

impl ExecFile for Guest {
    fn get_exec_file(
        &self,
        _: Option<Pid>,
        offset: u64,
        length: usize,
        buffer: &mut [u8],
    ) -> TargetResult<usize, Self> {
        match self.program() {
            Ok((_, Some(path))) => Ok(part(path.as_bytes(), offset, length, buffer)),
            _ => Err(TargetError::Errno(NO_PROCESS)),
        }
    }
}

impl Auxv for Guest {
    fn get_auxv(&self, offset: u64, length: usize, buffer: &mut [u8]) -> TargetResult<usize, Self> {
        let auxv = self.ask(|view, memory| {
            let task = view.current(memory)?;
            view.auxv(memory, &task)
        });
        match auxv {
            Ok(Ok(auxv)) if !auxv.is_empty() => Ok(part(&auxv, offset, length, buffer)),
            _ => Err(TargetError::Errno(NO_PROCESS)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_gdb_could_take_for_a_command_is_not_told() {
        assert_eq!(
            load_command("/usr/lib/x86_64-linux-gnu/a.out-1.2").as_deref(),
            Some("file target:/usr/lib/x86_64-linux-gnu/a.out-1.2\n")
        );
        for path in [
            "/a\nshell id",
            "/a b",
            "/a'",
            "/$x",
            "/a\\",
            "relative",
            "",
            "/a|b",
            "/ä",
        ] {
            assert_eq!(load_command(path), None, "{path}");
        }
    }

    #[test]
    fn an_answer_is_read_in_parts_and_ends() {
        let mut buffer = [0; 4];
        assert_eq!(part(b"/init", 0, 3, &mut buffer), 3);
        assert_eq!(part(b"/init", 3, 9, &mut buffer), 2);
        assert_eq!(&buffer[..2], b"it");
        assert_eq!(part(b"/init", 5, 9, &mut buffer), 0);
        assert_eq!(part(b"/init", u64::MAX, 9, &mut buffer), 0);
    }
}
