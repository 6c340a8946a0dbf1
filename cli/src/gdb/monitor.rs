//! What `monitor` asks for: questions to the replay that gdb has no words for.

use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, outputln};
use hindsight_replay::foreign::{shown, shown_lines};
use hindsight_replay::{Complete, When};
use hindsight_vmm::failure::Failure;
use hindsight_vmm::kvm::StopCounts;
use hindsight_vmm::session::{Marks, Stopped, add_mark, events};

use super::memory::{dump, number};
use super::target::Guest;
use crate::format::{seconds, thousands};
use crate::transcript::{Form, Transcript};

const HELP: &str = "\
monitor when                     tells where the guest is: the last exit, and guest time there
monitor seek MOMENT              goes to a moment: an exit, 12.5s, crash, end, console:TEXT, a mark, crash-100
monitor diversion [end]          tells where the diversion began that something written has begun, or ends it
monitor stops                    tells where the breakpoints are: in debug registers, in memory, or nowhere yet
monitor mark [NAME]              gives the last exit a name
monitor marks                    lists the names that there are
monitor program                  tells which program the processor runs
monitor ps                       lists the processes; monitor tasks, their threads and the kernel's too
monitor events [FROM [TO]]       lists the journal's events between two exits; without them, those before this place
monitor console [LINES]          shows the last lines that the guest has written to its console
monitor physical ADDRESS LENGTH  shows memory by its physical address
monitor physical on|off          whether gdb's own commands (x, print) read by physical addresses
monitor help                     this
After `monitor seek` gdb still shows what it knew: `maintenance flush register-cache`. With the gdb that hindsight \
starts, `seek MOMENT` does both.";

/// How far back events are listed if nobody says from where, in exits.
const EVENTS_EXITS: u64 = 100;
/// More events than this are not listed at once.
const EVENTS_MAX: usize = 200;
/// How many lines of the console are shown if nobody says how many, and at most.
const LINES: usize = 20;
const LINES_MAX: usize = 1000;
/// How many exits back those lines are looked for first, and how many times further each time after.
const LINES_EXITS: u64 = 2000;
const LINES_FACTOR: u64 = 8;

impl Guest {
    /// Goes to a moment.
    fn seek(&mut self, moment: &str, out: &mut ConsoleOutput<'_>) {
        let when: When = match moment.parse() {
            Ok(when) => when,
            Err(error) => return outputln!(out, "{}", shown_lines(error)),
        };
        self.forget_interrupts();
        let mut is_asked = false;
        let stopped = self.watch_diversion(|guest| {
            let mut stop = || {
                is_asked |= guest.interrupted.look();
                is_asked
            };
            guest.debugger.go_to_moment(&when, &mut stop)
        });
        self.end_way();
        if is_asked {
            outputln!(out, "stopped on the way");
        }
        match stopped {
            Ok(Stopped::End(how)) => {
                outputln!(out, "the recording ends before that: {}", shown_lines(&how));
            }
            Ok(_) => self.tell_where(out),
            Err(failure) => outputln!(out, "{}", shown_lines(&failure)),
        }
    }

    pub(super) fn tell_where(&self, out: &mut ConsoleOutput<'_>) {
        let (exit, now) = (self.debugger.exit(), self.debugger.now_ns());
        let place = match (self.debugger.ended(), self.debugger.is_at_exit()) {
            (Some(_), _) => "the end, at",
            (None, true) => "at",
            (None, false) => "after",
        };
        outputln!(
            out,
            "{place} exit {}, {} of guest time",
            thousands(exit),
            seconds(now)
        );
        if let Some(exit) = self.debugger.diversion() {
            outputln!(
                out,
                "this is a diversion, which began after exit {} of the recording",
                thousands(exit)
            );
        }
    }

    /// Tells where the breakpoints are.
    fn tell_stops(&self, out: &mut ConsoleOutput<'_>) {
        let StopCounts {
            in_registers,
            in_memory,
            nowhere,
            written_over,
        } = self.debugger.stop_counts();
        outputln!(
            out,
            "as the guest ran last, with those that steps and places need: {in_registers} in debug registers, \
             {in_memory} in memory, {nowhere} nowhere (not mapped there)"
        );
        if written_over > 0 {
            outputln!(
                out,
                "the guest has written over {written_over} of those in memory"
            );
        }
    }

    /// Gives the last exit a name.
    fn mark(&self, name: Option<&str>, out: &mut ConsoleOutput<'_>) {
        let at = Complete {
            exits: self.debugger.exit(),
            now: self.debugger.now_ns(),
        };
        match add_mark(&self.recording, name, at) {
            Ok(mark) => outputln!(
                out,
                "mark {} is at exit {}",
                mark.name,
                thousands(mark.exit)
            ),
            Err(error) => outputln!(out, "{}", shown_lines(error)),
        }
    }

    fn list_marks(&self, out: &mut ConsoleOutput<'_>) {
        let marks = match Marks::read(&self.recording) {
            Ok(marks) => marks,
            Err(error) => return outputln!(out, "{}", shown_lines(error)),
        };
        for mark in marks.list() {
            let (exit, now) = (thousands(mark.exit), seconds(mark.guest_ns));
            outputln!(out, "{:<24} exit {exit}, {now}", mark.name);
        }
        for complaint in marks.complaints() {
            outputln!(out, "{}", shown_lines(complaint));
        }
    }

    /// Lists what the journal says of some exits.
    fn list_events(&self, words: &[&str], out: &mut ConsoleOutput<'_>) {
        let here = self.debugger.diversion();
        let here = here.unwrap_or_else(|| self.debugger.exit());
        let exit = |text: &&str| text.replace(',', "").parse::<u64>();
        let Ok(words) = words.iter().map(exit).collect::<Result<Vec<u64>, _>>() else {
            return outputln!(out, "an exit is a number: monitor events 1000 1200");
        };
        let (from, to) = match words[..] {
            [from, to] => (from, to),
            [from] => (from, here.max(from.saturating_add(EVENTS_EXITS))),
            _ => (here.saturating_sub(EVENTS_EXITS), here),
        };
        match events(&self.recording, from, to, EVENTS_MAX) {
            Ok(found) => {
                for record in &found.records {
                    outputln!(
                        out,
                        "{:>9} {}",
                        record.exits,
                        shown(&record.event.to_string())
                    );
                }
                if found.more {
                    outputln!(out, "and more up to exit {}", thousands(to));
                }
            }
            Err(failure) => outputln!(out, "{}", shown_lines(&failure)),
        }
    }

    /// Shows the last lines that were on the console by now. What there is of them is found by going back.
    fn show_console(&mut self, count: usize, out: &mut ConsoleOutput<'_>) {
        let here = self.debugger.exit();
        self.forget_interrupts();
        let mut back = LINES_EXITS;
        loop {
            let from = here.saturating_sub(back);
            let mut transcript = Transcript::new(Vec::new(), Form::Lines, self.console);
            let mut stop = || self.interrupted.look();
            let watched = self.debugger.watch_from(from, &mut transcript, &mut stop);
            let text = watched.and_then(|all| Ok((all, transcript.finish()?)));
            self.end_way();
            let (all, text) = match text {
                Ok((all, text)) => (all, text.unwrap_or_default()),
                Err(failure) => return outputln!(out, "{}", shown_lines(&failure)),
            };
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            if !all {
                return outputln!(out, "interrupted");
            }
            // The first of them may have begun before.
            if from == 0 || lines.len() > count {
                for line in &lines[lines.len().saturating_sub(count)..] {
                    outputln!(out, "{line}");
                }
                return;
            }
            back = back.saturating_mul(LINES_FACTOR);
        }
    }

    fn physical(&mut self, words: &[&str], out: &mut ConsoleOutput<'_>) {
        match words {
            ["on" | "off"] => {
                self.physical = words == ["on"];
                let what = if self.physical { "physical" } else { "virtual" };
                outputln!(
                    out,
                    "gdb reads memory by {what} addresses (maintenance flush register-cache)"
                );
            }
            [address, bytes] => match (number(address), number(bytes)) {
                (Some(address), Some(bytes)) => {
                    let text = dump(self.debugger.memory(), address, bytes);
                    out.write_raw(text.as_bytes());
                }
                _ => outputln!(out, "expected two numbers: monitor physical 0x1000 64"),
            },
            _ => outputln!(
                out,
                "expected an address and a length, `on` or `off`: monitor physical 0x1000 64"
            ),
        }
    }
}

impl MonitorCmd for Guest {
    fn handle_monitor_cmd(
        &mut self,
        command: &[u8],
        mut out: ConsoleOutput<'_>,
    ) -> Result<(), Failure> {
        let out = &mut out;
        let command = String::from_utf8_lossy(command);
        // A text to be looked for may have spaces in it.
        if let Some(moment) = command.trim().strip_prefix("seek ") {
            self.seek(moment.trim(), out);
            return Ok(());
        }
        let words: Vec<&str> = command.split_whitespace().collect();
        match &words[..] {
            ["when"] => self.tell_where(out),
            ["stops"] => self.tell_stops(out),
            ["diversion"] => self.diversion(false, out),
            ["diversion", "end"] => self.diversion(true, out),
            ["mark" | "console", ..] if self.is_refused_in_diversion(out) => {}
            ["mark"] => self.mark(None, out),
            ["mark", name] => self.mark(Some(*name), out),
            ["marks"] => self.list_marks(out),
            ["program"] => self.tell_program(out),
            ["ps"] => self.list_tasks(false, out),
            ["tasks"] => self.list_tasks(true, out),
            ["events", words @ ..] if words.len() <= 2 => self.list_events(words, out),
            ["console"] => self.show_console(LINES, out),
            ["console", lines] => match lines.parse() {
                Ok(lines @ 1..=LINES_MAX) => self.show_console(lines, out),
                _ => outputln!(out, "expected a number of lines, at most {LINES_MAX}"),
            },
            ["physical", words @ ..] => self.physical(words, out),
            [] | ["help"] => outputln!(out, "{HELP}"),
            _ => outputln!(out, "there is no such command; monitor help lists them"),
        }
        Ok(())
    }
}
