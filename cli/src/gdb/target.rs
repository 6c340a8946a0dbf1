//! A replay as gdb drives one.
//!
//! What gdb writes goes to a diversion (`writes.rs`). A stop that cannot be had is refused where gdb asks for it, and what
//! else cannot be done is told on standard error, for the protocol has no words.

use std::cell::OnceCell;
use std::path::PathBuf;

use gdbstub::common::Signal;
use gdbstub::stub::SingleThreadStopReason;
use gdbstub::target::ext::auxv::AuxvOps;
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
use gdbstub::target::ext::exec_file::ExecFileOps;
use gdbstub::target::ext::host_io::HostIoOps;
use gdbstub::target::ext::monitor_cmd::MonitorCmdOps;
use gdbstub::target::{Target, TargetError, TargetResult};
use hindsight_replay::OperatorConsole;
use hindsight_replay::foreign::shown_lines;
use hindsight_vmm::failure::Failure;
use hindsight_vmm::kvm::{Hit, Stops, WatchKind, Watchpoint};
use hindsight_vmm::session::{
    DebugWish, Debugger, GuestFiles, Interrupted, KernelView, Recording, Stopped,
};

use super::arch::{Guest64, Registers};
use super::files::OpenFiles;
use super::memory::read_physical;
use super::progress::ProgressLine;
use crate::format::thousands;
use crate::tell::{notice, tell};

/// EFAULT.
pub(super) const BAD_ADDRESS: u8 = 14;
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

/// Whether somebody wants stopped what gdb waits for.
pub(super) struct Interrupt(Box<dyn FnMut() -> bool>);

impl Interrupt {
    pub(super) fn look(&mut self) -> bool {
        (self.0)()
    }
}

impl std::fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Interrupt")
    }
}

/// A replay, and what gdb wants of it.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(super) debugger: Debugger,
    pub(super) recording: Recording,
    pub(super) console: OperatorConsole,
    /// What is known of the kernel to look at it; found out when it is first wanted.
    pub(super) kernel: OnceCell<Result<KernelView, String>>,
    /// Where gdb, if we have started it, looks for what it is to do.
    pub(super) script: Option<PathBuf>,
    pub(super) files: GuestFiles,
    pub(super) open_files: OpenFiles,
    /// Addresses that gdb reads at are physical ones.
    pub(super) physical: bool,
    pub(super) interrupted: Interrupt,
    pub(super) progress: ProgressLine,
    stops: Stops,
    /// Which of the breakpoints gdb calls its own software's.
    software: Vec<u64>,
    wanted: Wanted,
}

impl Guest {
    /// The recorded machine, where `wish` wants it.
    ///
    /// # Errors
    ///
    /// A recording or a host that will not do, or a host that failed on the way.
    pub(crate) fn open(wish: &DebugWish) -> Result<Guest, Failure> {
        let debugger = Debugger::open(wish)?;
        let recording = Recording::at(&wish.recording);
        let console = recording.journal()?.header().host.console;
        let mut guest = Guest {
            debugger,
            kernel: OnceCell::new(),
            script: None,
            files: GuestFiles::of(&recording, &wish.instead)?,
            recording,
            console,
            open_files: OpenFiles::default(),
            physical: false,
            interrupted: Interrupt(Box::new(|| false)),
            progress: ProgressLine::default(),
            stops: Stops::default(),
            software: Vec::new(),
            wanted: Wanted::Resume,
        };
        guest.end_way();
        Ok(guest)
    }

    /// A way has come to its end: the line that told of it ends, and what was wrong on the way is told.
    pub(super) fn end_way(&mut self) {
        self.progress.end();
        for complaint in self.debugger.take_complaints() {
            notice(&complaint);
        }
    }

    /// What cannot be done on this host, if that is anything: a sentence.
    pub(crate) fn lacks(&self) -> Option<&'static str> {
        self.debugger.lacks()
    }

    /// gdb is on the same terminal, and looks for commands in this file.
    pub(crate) fn is_for_our_gdb(&mut self, script: PathBuf) {
        self.script = Some(script);
        self.debugger.on_progress(self.progress.hook());
    }

    /// Asks this while gdb waits for the answer to a question.
    pub(super) fn interrupt_by(&mut self, interrupted: impl FnMut() -> bool + 'static) {
        self.interrupted = Interrupt(Box::new(interrupted));
    }

    /// What was meant for something before is not meant for what comes now.
    pub(super) fn forget_interrupts(&mut self) {
        self.interrupted.look();
    }

    /// Does what was asked for last.
    pub(super) fn go(
        &mut self,
        interrupted: Interrupted<'_>,
    ) -> Result<SingleThreadStopReason<u64>, Failure> {
        let stopped = self.watch_diversion(|guest| {
            let (debugger, stops) = (&mut guest.debugger, &guest.stops);
            match guest.wanted {
                Wanted::Resume => debugger.resume(stops, interrupted),
                Wanted::Step => debugger.step(interrupted),
                Wanted::ReverseResume => debugger.reverse_resume(stops, interrupted),
                Wanted::ReverseStep => debugger.reverse_step(interrupted),
            }
        });
        self.end_way();
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
                let what = match self.debugger.diversion() {
                    None => "the recording ends here",
                    Some(_) => "the guest ends here, in the diversion",
                };
                tell!("hindsight: {what}: {}", shown_lines(&how));
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

    fn support_exec_file(&mut self) -> Option<ExecFileOps<'_, Self>> {
        Some(self)
    }

    fn support_auxv(&mut self) -> Option<AuxvOps<'_, Self>> {
        Some(self)
    }

    fn support_host_io(&mut self) -> Option<HostIoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadBase for Guest {
    fn read_registers(&mut self, registers: &mut Registers) -> TargetResult<(), Self> {
        let guest = self.debugger.registers().map_err(TargetError::Fatal)?;
        *registers = Registers::of(&guest);
        Ok(())
    }

    fn write_registers(&mut self, registers: &Registers) -> TargetResult<(), Self> {
        self.write_to_registers(registers)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8]) -> TargetResult<usize, Self> {
        let read = match self.physical {
            true => read_physical(self.debugger.memory(), start, data),
            false => self.debugger.read(start, data),
        };
        match read {
            0 if !data.is_empty() => Err(TargetError::Errno(BAD_ADDRESS)),
            count => Ok(count),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8]) -> TargetResult<(), Self> {
        self.write_to_memory(start, data)
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
