//! What gdb writes: it begins a diversion, which is thrown away.

use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, outputln};
use gdbstub::target::{TargetError, TargetResult};
use hindsight_replay::foreign::shown_lines;
use hindsight_vmm::failure::Failure;

use super::arch::Registers;
use super::target::{BAD_ADDRESS, Guest};
use crate::format::thousands;
use crate::tell::tell;

/// EPERM.
const NOT_PERMITTED: u8 = 1;

impl Guest {
    /// Does something that may begin a diversion or end one, and tells of it.
    pub(super) fn watch_diversion<T>(&mut self, act: impl FnOnce(&mut Guest) -> T) -> T {
        let before = self.debugger.diversion();
        let done = act(self);
        match (before, self.debugger.diversion()) {
            (None, Some(exit)) => tell!(
                "hindsight: what gdb writes begins a diversion, after exit {}: from here on the machine runs by itself, off \
                 the recording, until anything goes back or to a moment (reverse-stepi, seek), or `monitor diversion end`",
                thousands(exit)
            ),
            (Some(exit), None) => tell!(
                "hindsight: the diversion has ended: the machine is what it was after exit {}",
                thousands(exit)
            ),
            _ => {}
        }
        done
    }

    fn written(&mut self, written: Result<bool, Failure>) -> TargetResult<(), Guest> {
        match written {
            Ok(true) => Ok(()),
            Ok(false) => Err(TargetError::Errno(BAD_ADDRESS)),
            Err(failure) => {
                tell!("hindsight: nothing is written: {}", shown_lines(&failure));
                Err(TargetError::Errno(NOT_PERMITTED))
            }
        }
    }

    pub(super) fn write_to_registers(&mut self, wanted: &Registers) -> TargetResult<(), Guest> {
        let present = self.debugger.registers().map_err(TargetError::Fatal)?;
        let Some(wanted) = wanted.written_to(&present) else {
            return Err(TargetError::Errno(NOT_PERMITTED));
        };
        let written = self.watch_diversion(|guest| guest.debugger.write_registers(&wanted));
        self.written(written.map(|()| true))
    }

    pub(super) fn write_to_memory(&mut self, start: u64, data: &[u8]) -> TargetResult<(), Guest> {
        let written = self.watch_diversion(|guest| match guest.physical {
            _ if data.is_empty() => Ok(true),
            true => guest.debugger.write_physical(start, data),
            false => guest.debugger.write(start, data),
        });
        self.written(written)
    }

    /// `monitor diversion`, and `monitor diversion end`.
    pub(super) fn diversion(&mut self, ends: bool, out: &mut ConsoleOutput<'_>) {
        match self.debugger.diversion() {
            None => outputln!(out, "there is no diversion: nothing has been written"),
            Some(_) if ends => {
                let ended = self.watch_diversion(|guest| guest.debugger.end_diversion());
                match ended {
                    Ok(()) => self.tell_where(out),
                    Err(failure) => outputln!(out, "{}", shown_lines(&failure)),
                }
            }
            Some(_) => self.tell_where(out),
        }
    }

    /// Whether there is a diversion, in which what is asked for means nothing. It is told.
    pub(super) fn is_refused_in_diversion(&self, out: &mut ConsoleOutput<'_>) -> bool {
        let is_diverted = self.debugger.diversion().is_some();
        if is_diverted {
            outputln!(
                out,
                "this is a diversion, off the recording; `monitor diversion end` ends it"
            );
        }
        is_diverted
    }
}
