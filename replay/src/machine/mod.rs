//! The one loop: a vCPU, a board, and the door.
//!
//! Recording, replaying and running bare are this loop over different doors. Nothing in it asks
//! which.

mod cpu;
mod cpuid_table;
mod digest;
mod ending;
mod exit;
mod landing;
mod left_open;
mod moment;
mod observer;
mod outside;
mod place;
mod quick_clock;

use hindsight_devices::{
    Access, Board, BusContext, Devices, Input, Nanos, Output, POSTED_PORT, Ram, Reply, Room,
    Storage, StorageError, Width,
};
use thiserror::Error;

pub use cpu::{Back, Cpu};
pub use cpuid_table::{CpuidEntry, CpuidTable};
pub use digest::{Digest, Likeness, MemoryDigest, PAGE_BYTES};
pub use ending::{End, Ending};
pub use exit::{Answer, Exit, Mode, Registers, TimeInstruction, Turn};
pub use landing::{Ahead, Counter, Lander, Overshoot, Walk, WalkEnd};
pub use left_open::LeftOpen;
pub use moment::{ExitNumber, Moment};
pub use observer::Observer;
pub use outside::{Closing, Outside, Position, TimeQuery};
pub use place::{Horizon, Place, Unit};
pub use quick_clock::{QuickReads, ShownClock};

/// How many inputs reach a machine at one exit; what more there is waits for the next one. Linux takes as
/// many frames at a time from a network card.
pub const ARRIVALS_MAX: usize = 64;

/// A timer takes as long to fire as so many exits take by the rule of guest time, at least. Linux programs its next
/// timer, sets up a signal's frame and is back in the program in fewer, so the program gets on even where
/// a timer's period is shorter than an exit.
const TIMER_LATENCY_EXITS: u64 = 4;

/// Why the loop came to its end other than by the run's own ending.
#[derive(Debug, Error)]
pub enum RunError<E: std::error::Error, D: Closing> {
    /// The host's virtual CPU failed.
    #[error("at {at}: {source}")]
    Cpu {
        /// The last counted exit.
        at: Moment,
        /// What happened.
        #[source]
        source: E,
    },
    /// The host failed a disk.
    #[error("at exit {exits}: {source}")]
    Storage {
        /// The exit that wanted something of it.
        exits: u64,
        /// What happened.
        #[source]
        source: StorageError,
    },
    /// The door closed.
    #[error("{0}")]
    Closed(D),
}

/// What was counted during a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Exits by [`Exit::kind`].
    pub exits: [u64; Exit::KINDS],
    /// Interrupts delivered.
    pub interrupts: u64,
    /// Of those, how many waited for the guest to open its window.
    pub windows: u64,
    /// How many were delivered where the guest had been preempted for them.
    pub preempted: u64,
    /// Instructions rewritten in loaded modules.
    pub module_sites: u64,
    /// Writes that were posted.
    pub posted: u64,
    /// What was found to be left open.
    pub left_open: Vec<LeftOpen>,
}

/// The kernel formats the reason of a panic into a buffer of so many bytes (Linux, kernel/panic.c).
const REASON_MAX: usize = 1024;

/// The guest has panicked.
#[derive(Clone, Debug)]
struct Panic {
    /// Guest time.
    since: Nanos,
    /// What it said of it.
    reason: String,
}

/// The machine: everything that decides what happens next, except the guest's own memory and CPU.
#[derive(Debug)]
pub struct Machine {
    board: Board,
    storage: Box<dyn Storage>,
    cpuid: CpuidTable,
    ns_per_exit: u64,
    quick_reads: Option<QuickReads>,
    now: Nanos,
    /// Guest time at the exit before.
    last: Nanos,
    at: Moment,
    digest: Digest,
    halted: bool,
    /// What the board had room for at this exit, before it was answered.
    room: Room,
    panic: Option<Panic>,
    tally: Tally,
}

/// What one exit leaves to do.
enum Next {
    RunOn,
    Finish(Ending),
}

impl Machine {
    /// A machine at power-on, with these devices; `storage` has the bytes of its disks.
    pub fn new(
        devices: &Devices,
        storage: Box<dyn Storage>,
        cpuid: CpuidTable,
        ns_per_exit: u64,
    ) -> Machine {
        Machine {
            board: Board::new(devices)
                .with_timer_latency(TIMER_LATENCY_EXITS.saturating_mul(ns_per_exit)),
            storage,
            cpuid,
            ns_per_exit,
            quick_reads: None,
            now: 0,
            last: 0,
            at: Moment::START,
            digest: Digest::default(),
            halted: false,
            room: Room::default(),
            panic: None,
            tally: Tally::default(),
        }
    }

    /// The same machine, whose kernel reads the time without exits if this says how.
    pub fn with_quick_reads(self, quick_reads: Option<QuickReads>) -> Machine {
        Machine {
            quick_reads,
            ..self
        }
    }

    /// Where the machine is.
    pub fn at(&self) -> Moment {
        self.at
    }

    /// Guest time in nanoseconds.
    pub fn now(&self) -> Nanos {
        self.now
    }

    /// The digest of everything so far.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// What was counted so far.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// The reason that the guest gave if it panicked.
    pub fn panic(&self) -> Option<&str> {
        self.panic.as_ref().map(|panic| &panic.reason[..])
    }

    /// Runs until the run ends or the door closes.
    pub fn run<C: Cpu, O: Outside + ?Sized>(
        &mut self,
        cpu: &mut C,
        outside: &mut O,
        observer: &mut dyn Observer,
    ) -> Result<End, RunError<C::Error, O::Closed>> {
        let failure = match self.turns(cpu, outside, observer) {
            Ok(ending) => match self.finish(ending, cpu, outside, observer) {
                Ok(end) => return Ok(end),
                Err(failure) => failure,
            },
            Err(failure) => failure,
        };
        let complete = match failure {
            RunError::Cpu { .. } => Some((self.at.exits, self.now)),
            RunError::Storage { exits, .. } => Some((exits - 1, self.last)),
            RunError::Closed(_) => None,
        };
        if let Some((exits, now)) = complete {
            outside.abandon(exits, now).map_err(RunError::Closed)?;
        }
        Err(failure)
    }

    fn turns<C: Cpu, O: Outside + ?Sized>(
        &mut self,
        cpu: &mut C,
        outside: &mut O,
        observer: &mut dyn Observer,
    ) -> Result<Ending, RunError<C::Error, O::Closed>> {
        loop {
            let horizon = match outside.horizon(&self.position()) {
                Ok(horizon) => horizon,
                Err(closed) => return ended(closed),
            };
            let back = if self.halted {
                Back::Exit(Exit::Woken)
            } else {
                self.cpu(cpu.run(horizon))?
            };
            match back {
                Back::Exit(exit) => match self.turn(exit, cpu, outside, observer) {
                    Ok(Next::RunOn) => {}
                    Ok(Next::Finish(ending)) => return Ok(ending),
                    Err(RunError::Closed(closed)) => return ended(closed),
                    Err(failure) => return Err(failure),
                },
                Back::Window => {
                    self.tally.windows += 1;
                    self.deliver(cpu, outside, observer)?;
                }
                Back::Kicked => {
                    observer.kicked(self.at.exits);
                    if let Err(closed) = outside.kicked(&self.position()) {
                        return ended(closed);
                    }
                }
            }
        }
    }

    /// One counted exit: time first, then what came from outside, then what the guest wants.
    fn turn<C: Cpu, O: Outside + ?Sized>(
        &mut self,
        exit: Exit,
        cpu: &mut C,
        outside: &mut O,
        observer: &mut dyn Observer,
    ) -> Result<Next, RunError<C::Error, O::Closed>> {
        let registers = cpu.registers();
        self.at = Moment {
            exits: self.at.exits + 1,
            branches: match exit {
                Exit::Preempted(place) if place.unit == Unit::Branches => place.number,
                _ => 0,
            },
            rip: registers.rip(),
            rcx: registers.rcx(),
        };
        let exits = self.at.exits;
        self.tally.exits[exit.kind()] += 1;
        if let Exit::Module { sites, .. } = exit {
            self.tally.module_sites += u64::from(sites);
        }

        let site = if outside.wants_sites() {
            cpu.site()
        } else {
            None
        };
        let posted = self.pass_posted(cpu)?;
        self.room = self.board.room(cpu.ram());
        self.pass_time(&exit, site, outside)?;
        let mut stopped = false;
        // What more there is waits for the next exit: a journal has so many at most.
        for _ in 0..ARRIVALS_MAX {
            let arrived = outside.arrival(exits, &self.room);
            let Some(input) = arrived.map_err(RunError::Closed)? else {
                break;
            };
            stopped |= input == Input::Stop;
            observer.input(exits, self.now, &input);
            self.board.accept(input, cpu.ram());
            self.room = self.board.room(cpu.ram());
        }
        let answer = self.answer(&exit, cpu.ram())?;
        self.watch_for_panic(&exit, cpu);
        if let Some(reads) = self.storage.take_first_reads() {
            outside
                .first_reads(exits, &reads)
                .map_err(RunError::Closed)?;
        }
        let turn = Turn {
            exit,
            answer,
            now: self.now,
            registers,
        };
        self.digest.absorb(&turn);
        outside.posted(exits, &posted).map_err(RunError::Closed)?;
        outside
            .turn(exits, &turn, self.digest)
            .map_err(RunError::Closed)?;
        if !posted.is_empty() {
            observer.posted(exits, &posted);
        }
        observer.turn(exits, &turn);
        if exit.wants_answer() {
            self.cpu(cpu.answer(&exit, &answer))?;
        }
        if let Some(quick) = &self.quick_reads {
            // Behind the answer, which may have moved the time stamp counter, and before anybody
            // looks at memory.
            cpu.show_clock(quick.shown(self.board.time_stamp()));
        }
        self.pass_left_open(cpu.left_open(false), outside, observer)
            .map_err(RunError::Closed)?;
        self.pass_output(outside, observer);
        if outside.wants_memory(exits) {
            self.cpu(cpu.settle())?;
            let digest = self.cpu(cpu.memory_digest())?;
            observer.memory(exits, digest);
            outside.memory(exits, digest).map_err(RunError::Closed)?;
        }
        if let Some(ending) = self.ending(&exit, stopped) {
            self.cpu(cpu.settle())?;
            return Ok(Next::Finish(ending));
        }
        let delivered = self.tally.interrupts;
        self.deliver(cpu, outside, observer)?;
        if let Exit::Preempted(_) = exit {
            self.tally.preempted += self.tally.interrupts - delivered;
        }
        if self.halted && !registers.interrupts_enabled() {
            return Ok(Next::Finish(Ending::Halted));
        }
        Ok(Next::RunOn)
    }

    /// What the guest has written since the exit before: it was then, so it comes before all that this
    /// exit brings.
    fn pass_posted<C: Cpu, D: Closing>(
        &mut self,
        cpu: &mut C,
    ) -> Result<Vec<u8>, RunError<C::Error, D>> {
        let mut bytes = Vec::new();
        while let Some(byte) = self.cpu(cpu.posted())? {
            let write = Access::PortWrite {
                port: POSTED_PORT,
                width: Width::Byte,
                value: byte.into(),
            };
            self.digest.absorb_posted(&write);
            self.access(write, cpu.ram())?;
            bytes.push(byte);
        }
        self.tally.posted += bytes.len() as u64;
        Ok(bytes)
    }

    /// The first panic counts. Its words on a console do not: any program can print them.
    fn watch_for_panic<C: Cpu>(&mut self, exit: &Exit, cpu: &mut C) {
        let reason = match *exit {
            _ if self.panic.is_some() => return,
            Exit::Panic { message } => Some(panic_reason(message, cpu)),
            // A kernel whose panics are not trapped may have a driver for this.
            _ => self.board.guest_panicked().map(|p| format!("{p:?}")),
        };
        let since = self.now;
        self.panic = reason.map(|reason| Panic { since, reason });
    }

    fn pass_left_open<O: Outside + ?Sized>(
        &mut self,
        found: Vec<LeftOpen>,
        outside: &mut O,
        observer: &mut dyn Observer,
    ) -> Result<(), O::Closed> {
        for what in found {
            outside.left_open(self.at.exits, what)?;
            observer.left_open(self.at.exits, what);
            self.tally.left_open.push(what);
        }
        Ok(())
    }

    fn position(&self) -> Position {
        Position {
            exits: self.at.exits,
            rip: self.at.rip,
            now: self.now,
            deadline: self.board.deadline(),
            room: self.room,
            pending: self.board.interrupt_pending(),
            panicked: self.panic.as_ref().map(|panic| panic.since),
        }
    }

    fn pass_time<E: std::error::Error, O: Outside + ?Sized>(
        &mut self,
        exit: &Exit,
        site: Option<u64>,
        outside: &mut O,
    ) -> Result<(), RunError<E, O::Closed>> {
        let deadline = self.board.deadline();
        // What a running guest may have been shown since the last exit lies below this.
        let earliest = match &self.quick_reads {
            Some(quick) if !self.halted => self.now.saturating_add(quick.span_ns()),
            _ => self.now,
        };
        let rule = match deadline {
            Some(deadline) if self.halted => deadline.max(self.now),
            None if self.halted => self.now,
            _ => self.now.saturating_add(self.ns_per_exit).max(earliest),
        };
        let query = TimeQuery {
            exits: self.at.exits,
            last: self.now,
            earliest,
            rule,
            deadline,
            halted: self.halted,
            room: self.room,
            preempted: match exit {
                Exit::Preempted(place) => Some(*place),
                _ => None,
            },
            site,
            panicked: self.panic.as_ref().map(|panic| panic.since),
        };
        let now = outside.time(&query).map_err(RunError::Closed)?;
        assert!(
            now >= earliest,
            "time ran backwards: {now} after {}, and what was shown since lies below {earliest}",
            self.now
        );
        self.last = self.now;
        self.now = now;
        self.board.advance(now);
        Ok(())
    }

    fn answer<E: std::error::Error, D: Closing>(
        &mut self,
        exit: &Exit,
        ram: &Ram,
    ) -> Result<Answer, RunError<E, D>> {
        Ok(match *exit {
            Exit::Access(access) => match self.access(access, ram)? {
                Reply::Value(value) => Answer::Value(value),
                Reply::Done => Answer::Done,
                Reply::Fault => Answer::Fault,
            },
            Exit::TimeRead { instruction, .. } => Answer::Time {
                tsc: self.board.time_stamp(),
                aux: match instruction {
                    TimeInstruction::Rdtsc => 0,
                    TimeInstruction::Rdtscp => self.board.tsc_aux(),
                },
            },
            Exit::Cpuid { leaf, subleaf } => Answer::Cpuid(self.cpuid.answer(leaf, subleaf)),
            Exit::Halt => {
                self.halted = true;
                Answer::Done
            }
            Exit::WriteCr4 { .. }
            | Exit::ReadCr4
            | Exit::ProtectionFault
            | Exit::Woken
            | Exit::Shutdown
            | Exit::Pause
            | Exit::Preempted(_)
            | Exit::WriteDr { .. }
            | Exit::Module { .. }
            | Exit::Panic { .. } => Answer::Done,
        })
    }

    fn access<E: std::error::Error, D: Closing>(
        &mut self,
        access: Access,
        ram: &Ram,
    ) -> Result<Reply, RunError<E, D>> {
        let mut context = BusContext {
            ram,
            storage: &mut *self.storage,
        };
        let exits = self.at.exits;
        let failed = |source| RunError::Storage { exits, source };
        self.board.access(access, &mut context).map_err(failed)
    }

    fn ending(&self, exit: &Exit, stopped: bool) -> Option<Ending> {
        if let Some(reset) = self.board.reset_requested() {
            Some(Ending::Reset(reset))
        } else if self.board.powered_off() {
            Some(Ending::PowerOff)
        } else if *exit == Exit::Shutdown {
            Some(Ending::TripleFault)
        } else if stopped {
            Some(Ending::Stopped)
        } else {
            None
        }
    }

    fn pass_output<O: Outside + ?Sized>(&mut self, outside: &mut O, observer: &mut dyn Observer) {
        for output in self.board.take_outputs() {
            if let Output::Frame(frame) = &output {
                self.digest.absorb_frame(frame);
                outside.send(frame);
            }
            observer.output(self.at.exits, self.now, &output);
        }
    }

    /// Delivers the pending interrupt if the guest takes one here, else asks for a window.
    fn deliver<C: Cpu, O: Outside + ?Sized>(
        &mut self,
        cpu: &mut C,
        outside: &mut O,
        observer: &mut dyn Observer,
    ) -> Result<(), RunError<C::Error, O::Closed>> {
        // IF alone decides whether settling is worth a round trip: no exit changes it, and where it
        // is clear no interrupt can be taken.
        if self.board.interrupt_pending()
            && cpu.registers().interrupts_enabled()
            && self.cpu(cpu.settle())?
        {
            let vector = self.board.acknowledge();
            let registers = cpu.registers();
            let at = Moment {
                rip: registers.rip(),
                rcx: registers.rcx(),
                ..self.at
            };
            self.digest.absorb_interrupt(&at, vector);
            self.tally.interrupts += 1;
            self.halted = false;
            self.cpu(cpu.interrupt(vector))?;
            outside.interrupt(&at, vector).map_err(RunError::Closed)?;
            observer.interrupt(&at, vector, self.now);
        }
        cpu.request_window(self.board.interrupt_pending());
        Ok(())
    }

    fn finish<C: Cpu, O: Outside + ?Sized>(
        &mut self,
        ending: Ending,
        cpu: &mut C,
        outside: &mut O,
        observer: &mut dyn Observer,
    ) -> Result<End, RunError<C::Error, O::Closed>> {
        // A guest that was stopped between exits stands at no moment, and neither does its memory.
        let memory = match ending {
            Ending::StoppedRunning => None,
            _ => {
                self.pass_left_open(cpu.left_open(true), outside, observer)
                    .map_err(RunError::Closed)?;
                Some(self.cpu(cpu.memory_digest())?)
            }
        };
        let end = End {
            ending,
            panic: self.panic().map(String::from),
            now: self.now,
            digest: self.digest.value(),
            memory,
        };
        outside.end(self.at.exits, &end).map_err(RunError::Closed)?;
        Ok(end)
    }

    fn cpu<T, E: std::error::Error, D: Closing>(
        &self,
        result: Result<T, E>,
    ) -> Result<T, RunError<E, D>> {
        result.map_err(|source| RunError::Cpu {
            at: self.at,
            source,
        })
    }
}

/// The string at `message`: its first line, as far as it is there.
fn panic_reason<C: Cpu>(message: u64, cpu: &mut C) -> String {
    let mut bytes = [0; REASON_MAX];
    let count = cpu.read(message, &mut bytes);
    let line = bytes[..count]
        .split(|byte| matches!(byte, 0 | b'\n'))
        .next();
    String::from_utf8_lossy(line.unwrap_or_default()).into_owned()
}

/// How the run is over, if that is why the door closed.
fn ended<E: std::error::Error, D: Closing>(closed: D) -> Result<Ending, RunError<E, D>> {
    match closed.ending() {
        Some(ending) => Ok(ending.clone()),
        None => Err(RunError::Closed(closed)),
    }
}
