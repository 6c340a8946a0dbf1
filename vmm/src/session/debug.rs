//! A replay under a debugger: it goes to any place of the recording, forwards and backwards, and the recording is what it
//! was.
//!
//! How it goes along its recording is [`Reverse`]; what is the host's is here: which machine, how often the operator is
//! asked whether to go on, and what cannot be done without debug registers. What is written to the machine begins a
//! diversion, which is thrown away.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::time::Duration;

use hindsight_replay::{
    Anchor, Arrival, CheckpointHead, Cpu, Observer, Pace, Pause, Reverse, ReverseError, Target,
    When,
};

use super::checkpoints::CheckpointFile;
use super::make::open_kvm;
use super::moments::{find_moment, no_moment};
use super::open::RecordedPaths;
use super::preemption_plan::CounterWish;
use super::recording::Recording;
use super::timeline::{HostPace, Make, SPACING, open_prepared};
use crate::disk::Disks;
use crate::doctor;
use crate::failure::{Failure, Kind};
use crate::kvm::{
    Alarm, GuestMemory, GuestRegisters, Hit, Kicker, KvmCpu, KvmError, StopCounts, Stops,
};

/// Why a debugger has the guest back.
pub type Stopped = hindsight_replay::Stopped<Hit>;

/// So many exits pass from one look at whether somebody wants it stopped to the next.
const LOOK_EXITS: u64 = 16;
/// In a diversion a guest may run for ever without an exit, so after this long there is a look in any case.
const LOOK_AFTER: Duration = Duration::from_millis(100);

/// What is to be debugged.
#[derive(Clone, Debug)]
pub struct DebugWish {
    /// The recording.
    pub recording: PathBuf,
    /// Files that take the place of its own.
    pub instead: RecordedPaths,
    /// The counter that finds the places between exits at which the guest was preempted.
    pub counter: CounterWish,
    /// The moment to begin at; `None`: power-on.
    pub at: Option<When>,
}

/// Tells whether somebody wants a run stopped.
pub type Interrupted<'a> = &'a mut dyn FnMut() -> bool;

/// How far a way has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The exit that it began at.
    pub from_exit: u64,
    /// The exit that it is at.
    pub at_exit: u64,
    /// The exit that it leads to; `None`: to a stop, or to the end.
    pub to_exit: Option<u64>,
}

/// Hears how far long ways have come, some times a second.
pub type ProgressHook = Box<dyn FnMut(Progress)>;

/// A replay under a debugger.
pub struct Debugger {
    recording: Recording,
    replay: Reverse<KvmCpu, Disks, BufReader<File>, CheckpointFile, Make>,
    /// Whether debug registers stop guests here, in each ring.
    has_registers: bool,
    progress: Option<ProgressHook>,
}

impl std::fmt::Debug for Debugger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Debugger")
            .field("replay", &self.replay)
            .finish_non_exhaustive()
    }
}

/// Makes checkpoints, asks whether to go on, and tells how far it has come.
struct DebugPace<'a> {
    host: HostPace,
    interrupted: Interrupted<'a>,
    hook: Option<&'a mut ProgressHook>,
    from: u64,
    to: Option<u64>,
    /// Brings the guest back for the next look.
    alarm: Option<Alarm>,
}

impl<'a> DebugPace<'a> {
    fn new(interrupted: Interrupted<'a>, hook: &'a mut Option<ProgressHook>) -> DebugPace<'a> {
        DebugPace {
            host: HostPace::new(SPACING),
            interrupted,
            hook: hook.as_mut(),
            from: 0,
            to: None,
            alarm: None,
        }
    }

    fn set_alarm(&self) {
        if let Some(alarm) = &self.alarm {
            alarm.set(LOOK_AFTER);
        }
    }
}

/// What kicks this thread's vCPU.
fn alarm() -> Result<Alarm, Failure> {
    let alarm = Kicker::for_this_thread().and_then(|_| Alarm::for_this_thread());
    alarm.map_err(|error| Failure::new(Kind::HostFailed, format!("no timer: {error}")))
}

impl Pace for DebugPace<'_> {
    fn exits(&self) -> u64 {
        LOOK_EXITS
    }

    fn look(&mut self, here: CheckpointHead) -> Pause {
        if let Some(hook) = &mut self.hook {
            hook(Progress {
                from_exit: self.from,
                at_exit: here.exits,
                to_exit: self.to,
            });
        }
        self.set_alarm();
        match (self.interrupted)() {
            true => Pause::Stop,
            false => self.host.look(here),
        }
    }

    fn made(&mut self, here: CheckpointHead) {
        self.host.made(here);
    }

    fn begin(&mut self, from: u64, to: Option<u64>) {
        (self.from, self.to) = (from, to);
        self.set_alarm();
    }
}

impl From<ReverseError<KvmError, Hit, Failure>> for Failure {
    fn from(error: ReverseError<KvmError, Hit, Failure>) -> Failure {
        match error {
            ReverseError::Travel(error) => error.into(),
            ReverseError::NoRoom(Hit::NoRoom { wanted, free }) => Failure::new(
                Kind::BadInput,
                format!(
                    "{wanted} debug registers are needed to go there, and {free} are free; delete breakpoints or \
                     watchpoints"
                ),
            ),
            lost @ ReverseError::Lost { .. } => Failure::new(Kind::HostFailed, lost),
            other => Failure::new(Kind::BadInput, other),
        }
    }
}

impl Debugger {
    /// The recorded machine, where `wish` wants it.
    ///
    /// # Errors
    ///
    /// A recording or a host that will not do, or a host that failed on the way.
    pub fn open(wish: &DebugWish) -> Result<Debugger, Failure> {
        let (kvm, _) = open_kvm()?;
        let has_registers = doctor::check_breakpoints(&kvm) == [true; 2];
        let recording = Recording::at(&wish.recording);
        let journal = recording.journal()?;
        let prepare = move |cpu: &mut KvmCpu| {
            if !has_registers {
                cpu.use_no_debug_registers();
            }
        };
        let (instead, counter) = (&wish.instead, &wish.counter);
        let timeline = open_prepared(&recording, journal, instead, counter, prepare)?;
        let mut debugger = Debugger {
            recording,
            replay: Reverse::new(timeline)?,
            has_registers,
            progress: None,
        };
        if let Some(when) = &wish.at {
            let stopped = debugger.go_to_moment(when, &mut || false)?;
            if matches!(stopped, Stopped::End(_)) && when.anchor != Anchor::End {
                let why = format!("its last exit is {}", debugger.exit());
                return Err(no_moment(&debugger.recording, when, &why));
            }
        }
        Ok(debugger)
    }

    /// Has somebody hear how far long ways have come.
    pub fn on_progress(&mut self, hook: Option<ProgressHook>) {
        self.progress = hook;
    }

    /// What cannot be done here for want of debug registers, if that is anything: a sentence.
    pub fn lacks(&self) -> Option<&'static str> {
        match self.has_registers {
            true => None,
            false => Some(
                "guests of this host have no debug registers: there are breakpoints and steps, by bytes in guest memory, \
                 and no watchpoints",
            ),
        }
    }

    /// What was wrong with the recording's checkpoints since this was asked last: it has cost time and nothing else.
    pub fn take_complaints(&mut self) -> Vec<String> {
        self.replay.take_complaints()
    }

    /// The last exit.
    pub fn exit(&self) -> u64 {
        self.replay.exit()
    }

    /// Guest time there, in nanoseconds.
    pub fn now_ns(&self) -> u64 {
        self.replay.now()
    }

    /// Whether the guest is at that exit, and has not run since.
    pub fn is_at_exit(&self) -> bool {
        self.replay.is_at_exit()
    }

    /// How the recording ends, if the guest is at its end.
    pub fn ended(&self) -> Option<&str> {
        self.replay.ended()
    }

    /// How many debug registers there are here: for watchpoints, and for breakpoints what is left of them.
    pub fn free_debug_registers(&self) -> usize {
        let machine = self.replay.machine();
        machine.map_or(0, |(_, cpu)| cpu.free_debug_registers())
    }

    /// Where the breakpoints were as the guest ran on last.
    pub fn stop_counts(&self) -> StopCounts {
        let machine = self.replay.machine();
        machine.map_or(StopCounts::default(), |(_, cpu)| cpu.stop_counts())
    }

    /// Whether it is known where the guest is. After an error it may not be: then [`Debugger::seek`] an exit.
    pub fn is_found(&self) -> bool {
        self.replay.is_found()
    }

    /// All registers.
    ///
    /// # Errors
    ///
    /// KVM failed.
    pub fn registers(&mut self) -> Result<GuestRegisters, Failure> {
        let cpu = self.replay.cpu()?;
        cpu.settle()?;
        Ok(cpu.guest_registers()?)
    }

    /// Reads memory of the present address space, as far as it is mapped; returns how many bytes.
    pub fn read(&mut self, gva: u64, buffer: &mut [u8]) -> usize {
        self.replay.cpu().map_or(0, |cpu| cpu.read(gva, buffer))
    }

    /// The guest's memory.
    pub fn memory(&self) -> Option<&GuestMemory> {
        self.replay.machine().map(|(_, cpu)| cpu.memory())
    }

    /// The guest's disks, as they are now.
    pub fn disks(&self) -> Option<&Disks> {
        self.replay.disks()
    }

    /// The digest of the whole state, where it is at an exit.
    ///
    /// # Errors
    ///
    /// It is not at an exit, or the host failed.
    pub fn state_digest(&mut self) -> Result<u64, Failure> {
        Ok(self.replay.save()?.digest().value())
    }

    /// The last exit before the diversion that there is: the machine is off its recording since something was written.
    pub fn diversion(&self) -> Option<u64> {
        self.replay.diversion()
    }

    /// Ends the diversion: everything is what it was where it began.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn end_diversion(&mut self) -> Result<(), Failure> {
        Ok(self.replay.end_diversion()?)
    }

    /// Makes the registers `wanted`, in a diversion that begins here if there is none.
    ///
    /// # Errors
    ///
    /// They cannot be written here, or the host failed.
    pub fn write_registers(&mut self, wanted: &GuestRegisters) -> Result<(), Failure> {
        let present = self.registers()?;
        if present == *wanted {
            return Ok(());
        }
        let refused = |why: &str| Err(Failure::new(Kind::BadInput, why));
        if let Some(why) = present.refuses(wanted) {
            return refused(why);
        }
        if self.replay.cpu()?.is_in_instruction() {
            return refused(
                "the processor is in the middle of an instruction that makes several accesses: step once before writing",
            );
        }
        let goes_elsewhere = present.general.rip() != wanted.general.rip();
        let cpu = self.replay.divert(goes_elsewhere)?;
        Ok(cpu.write_registers(wanted)?)
    }

    /// Writes memory of the present address space, in a diversion that begins here if there is none. `false`, and nothing is
    /// changed, if it is not all mapped to RAM.
    ///
    /// # Errors
    ///
    /// It is the end of the recording, or the host failed.
    pub fn write(&mut self, gva: u64, bytes: &[u8]) -> Result<bool, Failure> {
        let mut present = vec![0; bytes.len()];
        if self.read(gva, &mut present) < bytes.len() {
            return Ok(false);
        }
        Ok(present == bytes || self.replay.divert(false)?.write(gva, bytes)?)
    }

    /// The same at a guest-physical address.
    ///
    /// # Errors
    ///
    /// It is the end of the recording, or the host failed.
    pub fn write_physical(&mut self, gpa: u64, bytes: &[u8]) -> Result<bool, Failure> {
        let memory = self.memory();
        if !memory.is_some_and(|memory| memory.is_ram(gpa, bytes.len())) {
            return Ok(false);
        }
        Ok(self.replay.divert(false)?.write_physical(gpa, bytes)?)
    }

    /// What has to be seen to in a diversion before the guest runs on to these stops.
    fn begin_to_run(&mut self, stops: &Stops) -> Result<Option<Alarm>, Failure> {
        if self.diversion().is_none() {
            return Ok(None);
        }
        self.replay.cpu()?.let_execute(&stops.execution)?;
        alarm().map(Some)
    }

    /// Goes to an exit, or to the end of the recording if that comes before.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn seek(&mut self, exit: u64, interrupted: Interrupted<'_>) -> Result<Stopped, Failure> {
        let pace = &mut DebugPace::new(interrupted, &mut self.progress);
        Ok(self.replay.go_to(Target::Exit(exit), pace)?)
    }

    /// Goes to a moment, or to the end of the recording if that comes before. If it is interrupted it is at an exit on
    /// the way, and where it was if there is no such moment.
    ///
    /// # Errors
    ///
    /// There is no such moment; the replay diverged, or the host failed.
    pub fn go_to_moment(
        &mut self,
        when: &When,
        interrupted: Interrupted<'_>,
    ) -> Result<Stopped, Failure> {
        let here = self.replay.mark()?;
        let pace = &mut DebugPace::new(interrupted, &mut self.progress);
        match find_moment(self.replay.timeline()?, when, &self.recording, pace) {
            Ok(Some(target)) => Ok(self.replay.go_to(target, pace)?),
            Ok(None) => Ok(Stopped::Interrupted),
            Err(failure) => {
                self.replay.go_to_mark(here)?;
                Err(failure)
            }
        }
    }

    /// Shows an observer what happens from an exit on up to the last one, and is where it was afterwards. Whether all of
    /// that was seen, and nobody interrupted it.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn watch_from(
        &mut self,
        exit: u64,
        observer: &mut dyn Observer,
        interrupted: Interrupted<'_>,
    ) -> Result<bool, Failure> {
        let here = self.replay.mark()?;
        let last = self.exit();
        let pace = &mut DebugPace::new(interrupted, &mut self.progress);
        let mut watch = || -> Result<bool, Failure> {
            let timeline = self.replay.timeline()?;
            if let Arrival::Stopped = timeline.go_to(Target::Exit(exit), pace)? {
                return Ok(false);
            }
            let arrival = timeline.run_to(Target::Exit(last), pace, observer)?;
            Ok(!matches!(arrival, Arrival::Stopped))
        };
        let watched = watch();
        self.replay.go_to_mark(here)?;
        watched
    }

    /// Runs on to the next stop.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn resume(
        &mut self,
        stops: &Stops,
        interrupted: Interrupted<'_>,
    ) -> Result<Stopped, Failure> {
        let alarm = self.begin_to_run(stops)?;
        let pace = &mut DebugPace::new(interrupted, &mut self.progress);
        pace.alarm = alarm;
        Ok(self.replay.resume(stops, pace)?)
    }

    /// Takes one step. Where an instruction is an exit, the exit belongs to it; where an interrupt comes first, the step
    /// leads to its handler.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn step(&mut self, interrupted: Interrupted<'_>) -> Result<Stopped, Failure> {
        let alarm = self.begin_to_run(&Stops::default())?;
        let pace = &mut DebugPace::new(interrupted, &mut self.progress);
        pace.alarm = alarm;
        Ok(self.replay.step(pace)?)
    }

    /// Runs back to the last stop before the present place. One that is of data is gone to before the access.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed.
    pub fn reverse_resume(
        &mut self,
        stops: &Stops,
        interrupted: Interrupted<'_>,
    ) -> Result<Stopped, Failure> {
        let pace = &mut DebugPace::new(interrupted, &mut self.progress);
        Ok(self.replay.reverse_resume(stops, pace)?)
    }

    /// Takes one step back: to before the instruction that was executed last.
    ///
    /// # Errors
    ///
    /// The replay diverged, or the host failed; the instruction was not found.
    pub fn reverse_step(&mut self, interrupted: Interrupted<'_>) -> Result<Stopped, Failure> {
        let pace = &mut DebugPace::new(interrupted, &mut self.progress);
        Ok(self.replay.reverse_step(pace)?)
    }
}
