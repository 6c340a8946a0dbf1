//! A replay as gdb drives one.
//!
//! What gdb asks for that would change the recorded machine is refused. A stop that cannot be had is refused where gdb asks
//! for it, and what else cannot be done is told on standard error, for the protocol has no words.

use gdbstub::common::Signal;
use gdbstub::stub::SingleThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::reverse_exec::{
    ReplayLogPosition, ReverseCont, ReverseContOps, ReverseStep, ReverseStepOps,
};
use gdbstub::target::ext::base::singlethread::{
    SingleThreadBase, SingleThreadResume, SingleThreadResumeOps, SingleThreadSingleStep,
    SingleThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps,
    SwBreakpoint, SwBreakpointOps, WatchKind as GdbWatchKind,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps, outputln};
use gdbstub::target::{Target, TargetError, TargetResult};
use hindsight_replay::ExitNumber;
use hindsight_replay::foreign::shown_lines;
use hindsight_vmm::failure::Failure;
use hindsight_vmm::kvm::{Hit, StopCounts, Stops, WatchKind, Watchpoint};
use hindsight_vmm::session::{Debugger, Interrupted, Stopped};

use super::arch::{Guest64, Registers};
use crate::format::{seconds, thousands};
use crate::tell::tell;

/// EPERM, EFAULT.
const NOT_PERMITTED: u8 = 1;
const BAD_ADDRESS: u8 = 14;
/// So many breakpoints there may be: each takes time at each exit.
const BREAKPOINTS_MAX: usize = 4096;

/// What gdb wants the guest to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Resume,
    Step,
    ReverseResume,
    ReverseStep,
}

const HELP: &str = "\
monitor when          tells where the guest is: the last exit, and guest time there
monitor stops         tells where the breakpoints are: in debug registers, in memory, or nowhere yet
monitor seek EXIT     goes to an exit of the recording
monitor help          this
After `monitor seek` gdb still shows what it knew: `maintenance flush register-cache`. With the gdb that hindsight \
starts, `seek EXIT` does both.";

/// A replay, and what gdb wants of it.
#[derive(Debug)]
pub(super) struct Guest {
    debugger: Debugger,
    stops: Stops,
    /// Which of the breakpoints gdb calls its own software's.
    software: Vec<u64>,
    wanted: Wanted,
}

impl Guest {
    pub(super) fn new(debugger: Debugger) -> Guest {
        Guest {
            debugger,
            stops: Stops::default(),
            software: Vec::new(),
            wanted: Wanted::Resume,
        }
    }

    /// Does what was asked for last.
    pub(super) fn go(
        &mut self,
        interrupted: Interrupted<'_>,
    ) -> Result<SingleThreadStopReason<u64>, Failure> {
        let debugger = &mut self.debugger;
        let stopped = match self.wanted {
            Wanted::Resume => debugger.resume(&self.stops, interrupted),
            Wanted::Step => debugger.step(interrupted),
            Wanted::ReverseResume => debugger.reverse_resume(&self.stops, interrupted),
            Wanted::ReverseStep => debugger.reverse_step(interrupted),
        };
        match stopped {
            Ok(stopped) => Ok(self.reason(stopped)),
            Err(failure) => {
                tell!("hindsight: {}", shown_lines(&failure));
                self.recover()?;
                Ok(SingleThreadStopReason::Signal(Signal::SIGTRAP))
            }
        }
    }

    /// Something failed on the way, so it is not known where the guest is. The last exit is.
    fn recover(&mut self) -> Result<(), Failure> {
        if self.debugger.is_found() {
            return Ok(());
        }
        let exit = self.debugger.exit();
        self.debugger.seek(exit, &mut || false)?;
        tell!("hindsight: the guest is at exit {}", thousands(exit));
        Ok(())
    }

    fn reason(&self, stopped: Stopped) -> SingleThreadStopReason<u64> {
        use SingleThreadStopReason as Reason;

        let log = |pos| Reason::ReplayLog { tid: None, pos };
        match stopped {
            Stopped::Begin => log(ReplayLogPosition::Begin),
            Stopped::End(how) => {
                tell!("hindsight: the recording ends here: {}", shown_lines(&how));
                log(ReplayLogPosition::End)
            }
            Stopped::Interrupted => Reason::Signal(Signal::SIGINT),
            Stopped::Hit(Hit::Execution(address)) if self.software.contains(&address) => {
                Reason::SwBreak(())
            }
            Stopped::Hit(Hit::Execution(_)) => Reason::HwBreak(()),
            Stopped::Hit(Hit::Step | Hit::Arrival(_)) => Reason::DoneStep,
            Stopped::Hit(Hit::Data(watchpoint)) => Reason::Watch {
                tid: (),
                kind: match watchpoint.kind {
                    WatchKind::Write => GdbWatchKind::Write,
                    WatchKind::Access => GdbWatchKind::ReadWrite,
                },
                addr: watchpoint.address,
            },
            Stopped::Hit(Hit::NoRoom { wanted, free }) => {
                tell!(
                    "hindsight: {wanted} debug registers are needed here, and {free} of the guest's are free: it uses \
                     the others itself. Delete watchpoints"
                );
                Reason::Signal(Signal::SIGTRAP)
            }
        }
    }

    /// Whether one more watchpoint fits.
    fn has_register(&self) -> bool {
        let (wanted, free) = (
            self.stops.data.len() + 1,
            self.debugger.free_debug_registers(),
        );
        if wanted > free {
            tell!(
                "hindsight: there are debug registers for {free} watchpoints here, and not for {wanted}"
            );
        }
        wanted <= free
    }

    fn add(&mut self, address: u64) -> bool {
        if self.stops.execution.contains(&address) {
            return true;
        }
        let fits = self.stops.execution.len() < BREAKPOINTS_MAX;
        if !fits {
            tell!("hindsight: there are {BREAKPOINTS_MAX} breakpoints, and there may be no more");
        } else {
            self.stops.execution.push(address);
        }
        fits
    }

    fn remove(&mut self, address: u64) -> bool {
        let before = self.stops.execution.len();
        self.stops.execution.retain(|at| *at != address);
        self.stops.execution.len() < before
    }

    fn seek(&mut self, exit: u64, out: &mut ConsoleOutput<'_>) {
        match self.debugger.seek(exit, &mut || false) {
            Ok(Stopped::End(how)) => {
                outputln!(out, "the recording ends before that: {}", shown_lines(&how));
            }
            Ok(_) => self.tell_where(out),
            Err(failure) => outputln!(out, "{}", shown_lines(&failure)),
        }
    }

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

    fn tell_where(&self, out: &mut ConsoleOutput<'_>) {
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
    }
}

impl Target for Guest {
    type Arch = Guest64;
    type Error = Failure;

    fn base_ops(&mut self) -> BaseOps<'_, Guest64, Failure> {
        BaseOps::SingleThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadBase for Guest {
    fn read_registers(&mut self, registers: &mut Registers) -> TargetResult<(), Self> {
        let guest = self.debugger.registers().map_err(TargetError::Fatal)?;
        *registers = Registers::of(&guest);
        Ok(())
    }

    fn write_registers(&mut self, _: &Registers) -> TargetResult<(), Self> {
        tell!("hindsight: a replay does what was recorded: its registers cannot be written");
        Err(TargetError::Errno(NOT_PERMITTED))
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8]) -> TargetResult<usize, Self> {
        match self.debugger.read(start, data) {
            0 if !data.is_empty() => Err(TargetError::Errno(BAD_ADDRESS)),
            count => Ok(count),
        }
    }

    fn write_addrs(&mut self, _: u64, _: &[u8]) -> TargetResult<(), Self> {
        tell!("hindsight: a replay does what was recorded: its memory cannot be written");
        Err(TargetError::Errno(NOT_PERMITTED))
    }

    fn support_resume(&mut self) -> Option<SingleThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadResume for Guest {
    fn resume(&mut self, _: Option<Signal>) -> Result<(), Failure> {
        self.wanted = Wanted::Resume;
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<SingleThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_reverse_step(&mut self) -> Option<ReverseStepOps<'_, (), Self>> {
        Some(self)
    }

    fn support_reverse_cont(&mut self) -> Option<ReverseContOps<'_, (), Self>> {
        Some(self)
    }
}

impl SingleThreadSingleStep for Guest {
    fn step(&mut self, _: Option<Signal>) -> Result<(), Failure> {
        self.wanted = Wanted::Step;
        Ok(())
    }
}

impl ReverseCont<()> for Guest {
    fn reverse_cont(&mut self) -> Result<(), Failure> {
        self.wanted = Wanted::ReverseResume;
        Ok(())
    }
}

impl ReverseStep<()> for Guest {
    fn reverse_step(&mut self, (): ()) -> Result<(), Failure> {
        self.wanted = Wanted::ReverseStep;
        Ok(())
    }
}

impl Breakpoints for Guest {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Guest {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        let added = self.add(address);
        if added && !self.software.contains(&address) {
            self.software.push(address);
        }
        Ok(added)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.software.retain(|at| *at != address);
        Ok(self.remove(address))
    }
}

impl HwBreakpoint for Guest {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.add(address))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.remove(address))
    }
}

/// What a debug register holds of it; `None` if none can.
fn watchpoint(address: u64, length: u64, kind: GdbWatchKind) -> Option<Watchpoint> {
    let watchpoint = Watchpoint {
        address,
        bytes: u8::try_from(length).ok()?,
        kind: match kind {
            GdbWatchKind::Write => WatchKind::Write,
            // A debug register does not tell reads alone.
            GdbWatchKind::Read | GdbWatchKind::ReadWrite => WatchKind::Access,
        },
    };
    watchpoint.is_possible().then_some(watchpoint)
}

impl HwWatchpoint for Guest {
    fn add_hw_watchpoint(
        &mut self,
        address: u64,
        length: u64,
        kind: GdbWatchKind,
    ) -> TargetResult<bool, Self> {
        let Some(watchpoint) = watchpoint(address, length, kind) else {
            tell!("hindsight: a watchpoint has 1, 2, 4 or 8 bytes at a multiple of its length");
            return Ok(false);
        };
        if self.stops.data.contains(&watchpoint) {
            return Ok(true);
        }
        let fits = self.has_register();
        if fits {
            self.stops.data.push(watchpoint);
        }
        Ok(fits)
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        length: u64,
        kind: GdbWatchKind,
    ) -> TargetResult<bool, Self> {
        let Some(watchpoint) = watchpoint(address, length, kind) else {
            return Ok(false);
        };
        let before = self.stops.data.len();
        self.stops.data.retain(|other| *other != watchpoint);
        Ok(self.stops.data.len() < before)
    }
}

impl MonitorCmd for Guest {
    fn handle_monitor_cmd(
        &mut self,
        command: &[u8],
        mut out: ConsoleOutput<'_>,
    ) -> Result<(), Failure> {
        let command = String::from_utf8_lossy(command);
        let words: Vec<&str> = command.split_whitespace().collect();
        match words[..] {
            ["when"] => self.tell_where(&mut out),
            ["stops"] => self.tell_stops(&mut out),
            ["seek", exit] => match exit.parse::<ExitNumber>() {
                Ok(exit) => self.seek(exit.0, &mut out),
                Err(_) => outputln!(out, "an exit is a number: monitor seek 1000"),
            },
            [] | ["help"] => outputln!(out, "{HELP}"),
            _ => outputln!(out, "there is no such command; monitor help lists them"),
        }
        Ok(())
    }
}
