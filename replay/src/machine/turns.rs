//! The loop, turn by turn. Each question about the world goes through the door, in a fixed order.

use hindsight_devices::{Access, BusContext, Input, Output, POSTED_PORT, Reply, Storage, Width};

use super::cpu::{Back, Cpu};
use super::ending::{End, Ending};
use super::exit::{Answer, Exit, Mode, TimeInstruction, Turn};
use super::full_digest::{DigestError, FullDigest};
use super::guest::View;
use super::moment::Moment;
use super::observer::Observer;
use super::outside::{Closing, Complete, Outside, Position, TimeQuery};
use super::place::Unit;
use super::{ARRIVALS_MAX, Machine, Panic, RunError};

/// The kernel formats the reason of a panic into a buffer of this size (Linux, kernel/panic.c).
pub(super) const REASON_BYTES_MAX: usize = 1024;

/// A machine with all that is lent to it for a run.
pub(super) struct Turns<'a, C: Cpu, O: Outside + ?Sized> {
    pub machine: &'a mut Machine,
    pub cpu: &'a mut C,
    pub storage: &'a mut dyn Storage,
    pub outside: &'a mut O,
    pub observer: &'a mut dyn Observer,
}

/// Why a run with this vCPU and this door cannot go on.
type Failure<C, O> = RunError<<C as Cpu>::Error, <O as Outside>::Closed>;

/// What one exit leaves to do.
enum Next {
    RunOn,
    Finish(Ending),
}

impl<C: Cpu, O: Outside + ?Sized> Turns<'_, C, O> {
    /// Runs until the run ends or the door closes.
    pub(super) fn run(&mut self) -> Result<End, Failure<C, O>> {
        let ending = self.turns();
        self.machine.at_exit &= ending.is_err();
        let failure = match ending.and_then(|ending| self.finish(ending)) {
            Ok(end) => return Ok(end),
            Err(failure) => failure,
        };
        if !matches!(failure, RunError::Closed(_)) {
            let complete = self.machine.complete;
            self.outside.abandon(complete).map_err(RunError::Closed)?;
        }
        Err(failure)
    }

    fn turns(&mut self) -> Result<Ending, Failure<C, O>> {
        if std::mem::take(&mut self.machine.stopped)
            && let Next::Finish(ending) = self.run_on()?
        {
            return Ok(ending);
        }
        loop {
            let horizon = match self.outside.horizon(&self.position()) {
                Ok(horizon) => horizon,
                Err(closed) => return ended(closed),
            };
            self.machine.at_exit = false;
            let back = if self.machine.halted {
                Back::Exit(Exit::Woken)
            } else {
                let back = self.cpu.run(horizon);
                self.cpu(back)?
            };
            match back {
                Back::Exit(exit) => match self.turn(exit) {
                    Ok(Next::RunOn) => self.machine.at_exit = true,
                    Ok(Next::Finish(ending)) => return Ok(ending),
                    Err(RunError::Closed(closed)) => return ended(closed),
                    Err(failure) => return Err(failure),
                },
                Back::Window => {
                    self.machine.tally.windows += 1;
                    self.deliver()?;
                }
                Back::Kicked => {
                    self.observer.kicked(self.machine.at.exits);
                    if let Err(closed) = self.outside.kicked(&self.position()) {
                        return ended(closed);
                    }
                }
                Back::Stopped => {
                    if let Err(closed) = self.outside.stopped(&self.position()) {
                        return ended(closed);
                    }
                }
            }
        }
    }

    /// One counted exit: time first, then what came from outside, then what the guest wants.
    fn turn(&mut self, exit: Exit) -> Result<Next, Failure<C, O>> {
        let registers = self.cpu.registers();
        // There is one vCPU: whose exit was the last, that one's is this.
        let vcpu = self.machine.at.vcpu;
        self.arrive_at(
            Moment {
                exits: self.machine.at.exits + 1,
                vcpu,
                branches: match exit {
                    Exit::Preempted(place) if place.unit == Unit::Branches => place.number,
                    _ => 0,
                },
                rip: registers.rip(),
                rcx: registers.rcx(),
            },
            &exit,
        );
        let exits = self.machine.at.exits;
        let site = match self.outside.wants_sites() {
            true => self.cpu.site(),
            false => None,
        };
        let posted = self.pass_posted()?;
        self.machine.room = self.machine.board.room(self.cpu.ram());
        self.pass_time(&exit, site)?;
        let stopped = self.pass_arrivals()?;
        let answer = self.answer(&exit)?;
        self.watch_for_panic(&exit);
        if let Some(reads) = self.storage.take_first_reads() {
            self.outside
                .first_reads(exits, &reads)
                .map_err(RunError::Closed)?;
        }
        let turn = Turn {
            vcpu,
            exit,
            answer,
            now: self.machine.now(),
            registers,
        };
        self.complete(&turn, &posted)?;
        if exit.wants_answer() {
            let answered = self.cpu.answer(&exit, &answer);
            self.cpu(answered)?;
        }
        if let Some(quick) = &self.machine.quick_reads {
            // After the answer, which may have moved the time stamp counter, and before anybody
            // looks at memory.
            let clock = quick.shown(self.machine.board.time_stamp());
            self.cpu.show_clock(clock);
        }
        self.pass_left_open(false).map_err(RunError::Closed)?;
        self.pass_output();
        self.pass_state()?;
        if let Some(ending) = self.ending(&exit, stopped) {
            self.settle()?;
            self.machine.stopped = ending == Ending::Stopped;
            return Ok(Next::Finish(ending));
        }
        let delivered = self.machine.tally.interrupts;
        let next = self.run_on()?;
        if let Exit::Preempted(_) = exit {
            self.machine.tally.preempted += self.machine.tally.interrupts - delivered;
        }
        Ok(next)
    }

    /// The last that an exit leaves to do before the guest runs on.
    fn run_on(&mut self) -> Result<Next, Failure<C, O>> {
        self.deliver()?;
        let deaf = !self.cpu.registers().interrupts_enabled();
        if self.machine.halted && deaf {
            return Ok(Next::Finish(Ending::Halted));
        }
        Ok(Next::RunOn)
    }

    fn arrive_at(&mut self, at: Moment, exit: &Exit) {
        self.machine.at = at;
        let tally = &mut self.machine.tally;
        tally.exits[exit.kind()] += 1;
        if let Exit::Module { sites, .. } = exit {
            tally.module_sites += u64::from(*sites);
        }
    }

    /// What the guest has written since the exit before: it was then, so it comes before all that this
    /// exit brings.
    fn pass_posted(&mut self) -> Result<Vec<u8>, Failure<C, O>> {
        let mut bytes = Vec::new();
        loop {
            let posted = self.cpu.posted();
            let Some(byte) = self.cpu(posted)? else {
                break;
            };
            let write = Access::PortWrite {
                port: POSTED_PORT,
                width: Width::Byte,
                value: byte.into(),
            };
            self.machine.digest.absorb_posted(&write);
            self.access(write)?;
            bytes.push(byte);
        }
        self.machine.tally.posted += bytes.len() as u64;
        Ok(bytes)
    }

    fn pass_time(&mut self, exit: &Exit, site: Option<u64>) -> Result<(), Failure<C, O>> {
        let machine = &mut *self.machine;
        let (last, deadline) = (machine.now(), machine.board.deadline());
        // What a running guest may have been shown since the last exit lies below this.
        let earliest = match &machine.quick_reads {
            Some(quick) if !machine.halted => last.saturating_add(quick.span_ns()),
            _ => last,
        };
        let rule = match deadline {
            Some(deadline) if machine.halted => deadline.max(last),
            None if machine.halted => last,
            _ => last.saturating_add(machine.ns_per_exit).max(earliest),
        };
        let query = TimeQuery {
            exits: machine.at.exits,
            vcpu: machine.at.vcpu,
            complete: machine.complete,
            earliest,
            rule,
            deadline,
            halted: machine.halted,
            room: machine.room,
            preempted: match exit {
                Exit::Preempted(place) => Some(*place),
                _ => None,
            },
            site,
            panicked: machine.panic.as_ref().map(|panic| panic.since),
        };
        let now = self.outside.time(&query).map_err(RunError::Closed)?;
        assert!(
            now >= earliest,
            "time ran backwards: {now} after {last}, and what was shown since lies below {earliest}"
        );
        machine.board.count_exit(shows_progress(exit));
        machine.board.advance(now);
        Ok(())
    }

    /// Whether a wish to stop was among what arrived. What more there is waits for the next exit: a journal
    /// has [`ARRIVALS_MAX`] at most.
    fn pass_arrivals(&mut self) -> Result<bool, Failure<C, O>> {
        let exits = self.machine.at.exits;
        let mut stopped = false;
        for _ in 0..ARRIVALS_MAX {
            let arrived = self.outside.arrival(exits, &self.machine.room);
            let Some(input) = arrived.map_err(RunError::Closed)? else {
                break;
            };
            stopped |= input == Input::Stop;
            self.observer.input(exits, self.machine.now(), &input);
            self.machine.board.accept(input, self.cpu.ram());
            self.machine.room = self.machine.board.room(self.cpu.ram());
        }
        Ok(stopped)
    }

    fn answer(&mut self, exit: &Exit) -> Result<Answer, Failure<C, O>> {
        Ok(match *exit {
            Exit::Access(access) => match self.access(access)? {
                Reply::Value(value) => Answer::Value(value),
                Reply::Done => Answer::Done,
                Reply::Fault => Answer::Fault,
            },
            Exit::TimeRead { instruction, .. } => Answer::Time {
                tsc: self.machine.board.time_stamp(),
                aux: match instruction {
                    TimeInstruction::Rdtsc => 0,
                    TimeInstruction::Rdtscp => self.machine.board.tsc_aux(),
                },
            },
            Exit::Cpuid { leaf, subleaf } => {
                Answer::Cpuid(self.machine.cpuid.answer(leaf, subleaf))
            }
            Exit::Halt => {
                self.machine.halted = true;
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

    fn access(&mut self, access: Access) -> Result<Reply, Failure<C, O>> {
        let mut context = BusContext {
            ram: self.cpu.ram(),
            storage: &mut *self.storage,
        };
        let exits = self.machine.at.exits;
        let failed = |source| RunError::Storage { exits, source };
        let reply = self.machine.board.access(access, &mut context);
        reply.map_err(failed)
    }

    /// The first panic counts. Its words on a console do not: any program can print them.
    fn watch_for_panic(&mut self, exit: &Exit) {
        let reason = match *exit {
            _ if self.machine.panic.is_some() => return,
            Exit::Panic { message } => Some(panic_reason(message, self.cpu)),
            // A kernel whose panics are not trapped may have a driver for this.
            _ => (self.machine.board.guest_panicked()).map(|p| format!("{p:?}")),
        };
        let since = self.machine.now();
        self.machine.panic = reason.map(|reason| Panic { since, reason });
    }

    /// The turn goes into the digest and past the door: from here on the exit is complete, whatever fails. An
    /// interrupt may still be taken there.
    fn complete(&mut self, turn: &Turn, posted: &[u8]) -> Result<(), Failure<C, O>> {
        let exits = self.machine.at.exits;
        self.machine.digest.absorb(turn);
        let digest = self.machine.digest;
        let passed = self.outside.posted(exits, posted);
        passed.map_err(RunError::Closed)?;
        let passed = self.outside.turn(exits, turn, digest);
        passed.map_err(RunError::Closed)?;
        self.machine.complete = Complete {
            exits,
            now: turn.now,
        };
        if !posted.is_empty() {
            self.observer.posted(exits, posted);
        }
        self.observer.turn(exits, turn, &mut View(self.cpu));
        Ok(())
    }

    fn pass_left_open(&mut self, at_end: bool) -> Result<(), O::Closed> {
        let exits = self.machine.at.exits;
        for what in self.cpu.left_open(at_end) {
            self.outside.left_open(exits, what)?;
            self.observer.left_open(exits, what);
            self.machine.tally.left_open.push(what);
        }
        Ok(())
    }

    fn pass_output(&mut self) {
        for output in self.machine.board.take_outputs() {
            self.machine.digest.absorb_output(&output);
            if let Output::Frame(frame) = &output {
                self.outside.send(frame);
            }
            let (exits, now) = (self.machine.at.exits, self.machine.now());
            self.observer.output(exits, now, &output);
        }
    }

    fn pass_state(&mut self) -> Result<(), Failure<C, O>> {
        let exits = self.machine.at.exits;
        if !self.outside.wants_state(exits) {
            return Ok(());
        }
        let digest = self.full_digest()?;
        self.observer.state(exits, digest);
        self.outside.state(exits, digest).map_err(RunError::Closed)
    }

    /// The digest of everything that decides what happens next.
    fn full_digest(&mut self) -> Result<FullDigest, Failure<C, O>> {
        let digest = self.machine.full_digest(self.cpu, self.storage);
        digest.map_err(|error| match error {
            DigestError::Cpu(source) => RunError::Cpu {
                at: self.machine.at,
                source,
            },
            DigestError::Storage(source) => RunError::Storage {
                exits: self.machine.at.exits,
                source,
            },
        })
    }

    fn ending(&self, exit: &Exit, stopped: bool) -> Option<Ending> {
        let board = &self.machine.board;
        if let Some(reset) = board.reset_requested() {
            Some(Ending::Reset(reset))
        } else if board.powered_off() {
            Some(Ending::PowerOff)
        } else if *exit == Exit::Shutdown {
            Some(Ending::TripleFault)
        } else if stopped {
            Some(Ending::Stopped)
        } else {
            None
        }
    }

    /// Delivers the pending interrupt if the guest takes one here, else asks for a window.
    fn deliver(&mut self) -> Result<(), Failure<C, O>> {
        // IF alone decides whether settling is worth a round trip: no exit changes it, and where it
        // is clear no interrupt can be taken.
        if self.machine.board.interrupt_pending()
            && self.cpu.registers().interrupts_enabled()
            && self.settle()?
        {
            let machine = &mut *self.machine;
            let vector = machine.board.acknowledge();
            let registers = self.cpu.registers();
            let at = Moment {
                rip: registers.rip(),
                rcx: registers.rcx(),
                ..machine.at
            };
            machine.digest.absorb_interrupt(&at, vector);
            machine.tally.interrupts += 1;
            machine.halted = false;
            let delivered = self.cpu.interrupt(vector);
            self.cpu(delivered)?;
            let passed = self.outside.interrupt(&at, vector);
            passed.map_err(RunError::Closed)?;
            self.observer.interrupt(&at, vector, self.machine.now());
        }
        self.cpu
            .request_window(self.machine.board.interrupt_pending());
        Ok(())
    }

    fn finish(&mut self, ending: Ending) -> Result<End, Failure<C, O>> {
        // A guest that was stopped between exits is at no moment, and neither is its memory.
        let state = match ending {
            Ending::StoppedRunning => None,
            _ => {
                self.pass_left_open(true).map_err(RunError::Closed)?;
                Some(self.full_digest()?)
            }
        };
        let end = End {
            ending,
            panic: self.machine.panic().map(String::from),
            now: self.machine.now(),
            digest: self.machine.digest.value(),
            state,
        };
        let passed = self.outside.end(self.machine.at.exits, &end);
        passed.map_err(RunError::Closed)?;
        Ok(end)
    }

    fn position(&self) -> Position {
        let machine = &*self.machine;
        Position {
            exits: machine.at.exits,
            vcpu: machine.at.vcpu,
            rip: machine.at.rip,
            now: machine.now(),
            deadline: machine.board.deadline(),
            room: machine.room,
            pending: machine.board.interrupt_pending(),
            panicked: machine.panic.as_ref().map(|panic| panic.since),
        }
    }

    fn settle(&mut self) -> Result<bool, Failure<C, O>> {
        let settled = self.cpu.settle();
        self.cpu(settled)
    }

    /// What the vCPU said, or where it failed.
    fn cpu<T>(&self, result: Result<T, C::Error>) -> Result<T, Failure<C, O>> {
        result.map_err(|source| RunError::Cpu {
            at: self.machine.at,
            source,
        })
    }
}

/// Whether an exit shows that the guest has got on with its programs, or has none to get on with. A timer in the kernel
/// would not show that: it may be all that there is time for.
fn shows_progress(exit: &Exit) -> bool {
    match exit {
        Exit::Preempted(_) | Exit::Halt | Exit::Woken => true,
        Exit::TimeRead { mode, .. } => *mode == Mode::User,
        _ => false,
    }
}

/// The string at `message`: its first line, as far as it is there.
fn panic_reason<C: Cpu>(message: u64, cpu: &mut C) -> String {
    let mut bytes = [0; REASON_BYTES_MAX];
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
