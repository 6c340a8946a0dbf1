//! Stopping the vCPU between two exits: where it can be found again, or anywhere.
//!
//! The breakpoints are debug registers that KVM sets for us while the guest runs
//! (`KVM_GUESTDBG_USE_HW_BP`), beside those that the guest has enabled (see [`super::debug`]); the guest
//! never sees a trap flag of ours. Those for which there is no register are in memory (see [`super::inserted`]).

use std::collections::BTreeSet;

use hindsight_replay::{Ahead, Back, Exit, Horizon, Lander, Place, Registers, Unit, Walk, WalkEnd};
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};
use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_IO, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug_arch,
};

use super::cpu::KvmCpu;
use super::debug::DebugExit;
use super::entries::EntryStop;
use super::error::{KvmError, Named};
use super::guest_text::INSTRUCTION_MAX;
use super::inserted::Entered;
use crate::perf::HostCounter;

/// RFLAGS.RF: the next instruction runs past its breakpoint (Intel SDM vol. 3, 17.3.1.1).
pub(super) const RFLAGS_RF: u64 = 1 << 16;
/// How many instructions are looked at for the next conditional branch.
const LOOK_AHEAD: usize = 64;

/// The mechanism that stops a guest that does not exit.
#[derive(Debug, Default)]
pub enum Preemption {
    /// Nothing: what is due waits for its next exit.
    #[default]
    Never,
    /// A kick, wherever it finds the guest. Nobody will ever find the place again.
    Anywhere,
    /// A count of its entries into its kernel, which it keeps itself.
    Entries,
    /// A count of its conditional branches.
    Branches(Box<Lander<HostCounter>>),
}

impl KvmCpu {
    /// From now on the guest can be stopped like this.
    pub fn preempt_by(&mut self, preemption: Preemption) {
        self.preemption = preemption;
    }

    /// Runs the guest to its horizon at the latest.
    pub(super) fn run_to(&mut self, horizon: Horizon) -> Result<Back, KvmError> {
        self.debugger.begin();
        let back = self.run_preempted(horizon)?;
        // Whatever stops it: the word that counts entries is in memory, which must not tell.
        if let Back::Exit(exit) = back {
            self.entries().turn();
            self.debugger.exited(is_between_exits(&exit));
        }
        Ok(back)
    }

    fn run_preempted(&mut self, horizon: Horizon) -> Result<Back, KvmError> {
        if self.debugger.is_on() && self.vcpu.unfinished {
            // RIP is the guest's only after the instruction that exited.
            hindsight_replay::Cpu::settle(self)?;
            if let Some(exit) = self.next_part() {
                return Ok(Back::Exit(exit));
            }
        }
        match std::mem::take(&mut self.preemption) {
            Preemption::Branches(mut lander) => {
                let back = self.land(&mut lander, horizon);
                self.preemption = Preemption::Branches(lander);
                back
            }
            Preemption::Anywhere => {
                self.preemption = Preemption::Anywhere;
                match horizon {
                    Horizon::From(_) => {
                        self.vcpu.unfinished = false;
                        Ok(Back::Exit(Exit::Preempted(Place {
                            unit: Unit::Branches,
                            number: 0,
                            rip: self.rip(),
                        })))
                    }
                    _ => self.plain(),
                }
            }
            Preemption::Entries => {
                self.preemption = Preemption::Entries;
                self.set_entry_target(horizon);
                self.plain()
            }
            Preemption::Never => self.plain(),
        }
    }

    /// Has the guest stop at the kernel entry that the horizon asks for, if it counts them.
    fn set_entry_target(&mut self, horizon: Horizon) {
        let mut entries = self.entries();
        // The word is in the guest's memory, and may be anything.
        let Some(next) = entries.done().checked_add(1) else {
            return;
        };
        let wanted = match horizon {
            Horizon::From(least) => next.max(least),
            // A place that has been cannot be reached: the next exit will be the wrong one.
            Horizon::At(place) if place.unit == Unit::Entries && place.number >= next => {
                place.number
            }
            Horizon::Exit | Horizon::At(_) => return,
        };
        if entries.available() && !entries.is_waited_for() {
            entries.set_target(wanted);
        }
    }

    fn plain(&mut self) -> Result<Back, KvmError> {
        match self.go(&[])? {
            WalkEnd::Back(back) => Ok(back),
            WalkEnd::AtStop => unreachable!("no stop was set"),
        }
    }

    fn land(
        &mut self,
        lander: &mut Lander<HostCounter>,
        horizon: Horizon,
    ) -> Result<Back, KvmError> {
        self.watch_debug_registers()?;
        if horizon != Horizon::Exit && self.vcpu.unfinished {
            // RIP is the guest's only after the instruction that exited.
            hindsight_replay::Cpu::settle(self)?;
            if let Some(exit) = self.next_part() {
                return Ok(Back::Exit(exit));
            }
        }
        match horizon {
            // Not ours to count: the next exit will be the wrong one.
            Horizon::At(place) if place.unit != Unit::Branches => lander.run(self, Horizon::Exit),
            horizon => lander.run(self, horizon),
        }
    }

    /// Has the vCPU stop before the instructions at these addresses, and after what a debugger watches, and nowhere else.
    fn set_stops(&mut self, stops: &[u64]) -> Result<(), KvmError> {
        let watched = self.debugger.watchpoints().to_vec();
        let none = stops.is_empty() && watched.is_empty();
        if none && self.vcpu.stops.is_empty() && !self.vcpu.watches {
            return Ok(());
        }
        let (control, arch) = match none {
            true => (0, kvm_guest_debug_arch::default()),
            false => {
                let arch = self.vcpu.breakpoints.with_stops(stops, &watched);
                (KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, arch)
            }
        };
        self.debug(control, arch)?;
        self.vcpu.stops = stops.to_vec();
        self.vcpu.watches = !watched.is_empty();
        if none {
            self.keep_own_breakpoints()?;
        }
        Ok(())
    }

    /// KVM has none of our breakpoints any more.
    pub(super) fn forget_stops(&mut self) {
        self.vcpu.stops.clear();
        self.vcpu.watches = false;
    }

    /// Whether KVM has breakpoints of ours.
    pub(super) fn has_stops(&self) -> bool {
        self.vcpu.watches || !self.vcpu.stops.is_empty()
    }

    /// Where it stops for the way to a place and for a debugger; `None` if there are too few registers.
    fn all_stops(&mut self, stops: &[u64]) -> Option<Vec<u64>> {
        let all = each_once(stops.iter().copied().chain(self.debugger.addresses()));
        self.has_room(all.len()).then_some(all)
    }

    /// Lets the present instruction run past a breakpoint on it. Returns whether it had to.
    fn pass_stop(&mut self) -> Result<bool, KvmError> {
        // What is under way comes first, and the instruction's turn after that: RF would end up in
        // the frame that is pushed, and new registers would make KVM forget an exception.
        let alone = !self.event_is_under_way()?;
        let passes = alone && self.page().registers().rflags() & RFLAGS_RF == 0;
        if passes && self.raise_own_breakpoint()? {
            // RF would hide the guest's breakpoint as well as ours.
            return Ok(false);
        }
        if passes {
            self.page()
                .change_registers(|registers| registers.rflags |= RFLAGS_RF);
        }
        Ok(passes)
    }

    /// Takes back what [`Self::pass_stop`] did, if the instruction at `passed` has not been executed. Returns whether it
    /// did.
    fn unpass_stop(&mut self, passed: u64) -> Result<bool, KvmError> {
        let registers = self.page().registers();
        let is_at_stop = registers.rip() == passed && registers.rflags() & RFLAGS_RF != 0;
        let unpasses = is_at_stop && !self.event_is_under_way()?;
        if unpasses {
            self.page()
                .change_registers(|registers| registers.rflags &= !RFLAGS_RF);
        }
        Ok(unpasses)
    }

    /// Whether the instruction that was to be passed has not been executed, although the flag said so: a KVM that enters its
    /// guests by SYSRET drops it.
    fn is_where_it_was(&mut self, start: &Registers) -> bool {
        let registers = self.page().registers();
        let flags = |registers: &Registers| registers.rflags() & !RFLAGS_RF;
        registers.0[..17] == start.0[..17] && flags(&registers) == flags(start)
    }

    /// How an instruction with a breakpoint is passed for a debugger: by stops where it leads, and none on it. RF would be
    /// seen in the registers of an exit, if it makes one.
    fn hop(&mut self, way: &[u64], all: &[u64]) -> Result<Pass, KvmError> {
        let start = self.rip();
        let targets = self.step_targets()?;
        if targets.is_empty() {
            return Ok(Pass::Blindly);
        }
        if targets.contains(&start) {
            return Ok(Pass::ToItself);
        }
        let sure = way.iter().chain(&targets).copied();
        let mut hop = each_once(sure.filter(|stop| *stop != start));
        let sure = hop.len();
        hop = each_once(hop.into_iter().chain(all.iter().copied()));
        hop.retain(|stop| *stop != start);
        if self.debugger.in_registers() {
            let room = self.free_debug_registers();
            let room = room.saturating_sub(self.debugger.watchpoints().len());
            hop.truncate(sure.max(room));
        }
        Ok(Pass::Hop(hop))
    }

    /// Passes an instruction that leads to itself and has a stop in memory: by a step of KVM's, for the stop would have to
    /// be back as it comes to it again. It is a branch, which does nothing with the flag that the step sets. Returns KVM's
    /// reason if that is another.
    fn step_over(&mut self) -> Result<Option<u32>, KvmError> {
        let wants_window = self.page().wants_window();
        let reason = self.step()?;
        self.page().request_window(wants_window);
        if reason != KVM_EXIT_DEBUG {
            return Ok(Some(reason));
        }
        self.vcpu.unfinished = false;
        self.sort_step()?;
        Ok(None)
    }

    /// The same, of an instruction that was passed and is an exit: it leaves the flag clear, whoever finishes it.
    fn finish_pass(&mut self, passed: u64) {
        let registers = self.page().registers();
        let length = registers.rip().wrapping_sub(passed);
        if length <= INSTRUCTION_MAX as u64 && registers.rflags() & RFLAGS_RF != 0 {
            self.page()
                .change_registers(|registers| registers.rflags &= !RFLAGS_RF);
        }
    }

    /// Whether KVM has an exception or an interrupt to deliver before the next instruction.
    pub(super) fn event_is_under_way(&self) -> Result<bool, KvmError> {
        let events = self.fd().get_vcpu_events().named("KVM_GET_VCPU_EVENTS")?;
        let exception = events.exception.injected | events.exception.pending;
        Ok(exception | events.interrupt.injected | events.nmi.injected != 0)
    }

    /// Whether the guest at `rip` runs 64-bit code, and if not, of how many bits.
    pub(super) fn bitness(&self, rip: u64) -> Result<u32, KvmError> {
        if rip > u32::MAX.into() {
            // Only 64-bit code has such addresses.
            return Ok(64);
        }
        let cs = self.sregs()?.cs;
        Ok(match (cs.l, cs.db) {
            (1, _) => 64,
            (_, 1) => 32,
            _ => 16,
        })
    }

    /// Where a return or an indirect jump at the present RIP leads.
    fn target(&mut self, instruction: &Instruction) -> Option<u64> {
        match instruction.code() {
            Code::Retnq => {
                let rsp = self.page().registers().0[6];
                self.view().ok()?.words::<1>(rsp).map(|[target]| target)
            }
            _ => None,
        }
    }
}

impl KvmCpu {
    /// Runs as [`Walk::go`] does; `None` if it was only brought back to be given an exception of its own.
    fn go_on(&mut self, stops: &[u64]) -> Result<Option<WalkEnd>, KvmError> {
        let debugged = self.debugger.is_on();
        if debugged && self.is_at_debug_stop()? {
            return Ok(Some(WalkEnd::Back(Back::Stopped)));
        }
        let Some(all) = self.all_stops(stops) else {
            return Ok(Some(WalkEnd::Back(Back::Stopped)));
        };
        let start = self.page().registers();
        let (mut registers, memory) = self.divide(&all);
        let mut memory = self.in_memory(&memory)?;
        let in_memory = memory.are_here();
        let passes = in_memory || registers.contains(&start.rip());
        let pass = match passes && debugged {
            true => self.hop(stops, &all)?,
            false => Pass::Blindly,
        };
        let hops = matches!(pass, Pass::Hop(_));
        if let Pass::Hop(hop) = &pass {
            let others;
            (registers, others) = self.divide(hop);
            memory = self.in_memory(&others)?;
        }
        memory.leave_out_here();
        self.set_stops(&registers)?;
        let passed = passes && !hops && self.pass_stop()?;
        let entered = match pass {
            Pass::ToItself if in_memory => match self.step_over()? {
                None => Entered::AtStop,
                reason => Entered::Exit(reason),
            },
            _ => self.enter_with(&memory)?,
        };
        let Entered::Exit(reason) = entered else {
            self.debugger.got_on();
            let is_ours = stops.contains(&KvmCpu::rip(self));
            return Ok(is_ours.then_some(WalkEnd::AtStop));
        };
        let stays = match reason {
            None | Some(KVM_EXIT_IRQ_WINDOW_OPEN) if hops => self.rip() == start.rip(),
            None | Some(KVM_EXIT_IRQ_WINDOW_OPEN) => passed && self.unpass_stop(start.rip())?,
            Some(KVM_EXIT_DEBUG) if debugged && passes && !hops => {
                if self.is_where_it_was(&start) && (passed || self.event_is_under_way()?) {
                    return Err(KvmError::Stopped {
                        rip: start.rip(),
                        bytes: self.view()?.instruction_bytes(start.rip()),
                        what: "it does not get past a breakpoint there".into(),
                    });
                }
                false
            }
            Some(KVM_EXIT_DEBUG) => false,
            Some(_) if passed && debugged => {
                self.finish_pass(start.rip());
                false
            }
            Some(_) => false,
        };
        if !stays {
            self.debugger.got_on();
        }
        let Some(mut reason) = reason else {
            self.counts.kicks += 1;
            // KVM finishes what was unfinished before it looks for signals.
            self.vcpu.unfinished = false;
            return Ok(Some(WalkEnd::Back(Back::Kicked)));
        };
        if reason == KVM_EXIT_IRQ_WINDOW_OPEN {
            self.vcpu.unfinished = false;
            let Some(left) = self.leave_shadow()? else {
                return Ok(None);
            };
            reason = left;
        }
        if reason == KVM_EXIT_IO
            && let Some(EntryStop { number, rip }) = self.entry_stop()
        {
            self.vcpu.unfinished = true;
            let unit = Unit::Entries;
            let place = Place { unit, number, rip };
            return Ok(Some(WalkEnd::Back(Back::Exit(Exit::Preempted(place)))));
        }
        Ok(match reason {
            KVM_EXIT_IRQ_WINDOW_OPEN => Some(WalkEnd::Back(Back::Window)),
            KVM_EXIT_DEBUG => {
                self.vcpu.unfinished = false;
                match self.sort_debug_exit()? {
                    DebugExit::Stop if stops.contains(&KvmCpu::rip(self)) => Some(WalkEnd::AtStop),
                    // A debugger's is looked at as the vCPU goes on.
                    DebugExit::Stop | DebugExit::Guest | DebugExit::Seen => None,
                }
            }
            reason => Some(WalkEnd::Back(Back::Exit(self.decode(reason)?))),
        })
    }
}

/// The same, each but once, in their order.
fn each_once(addresses: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut seen = BTreeSet::new();
    addresses.filter(|address| seen.insert(*address)).collect()
}

impl Walk for KvmCpu {
    type Error = KvmError;

    fn rip(&mut self) -> u64 {
        KvmCpu::rip(self)
    }

    fn stops_max(&mut self) -> Result<usize, KvmError> {
        Ok(self.free_debug_registers())
    }

    fn is_there(&mut self) -> Result<bool, KvmError> {
        Ok(!self.event_is_under_way()?)
    }

    fn go(&mut self, stops: &[u64]) -> Result<WalkEnd, KvmError> {
        loop {
            if let Some(went) = self.go_on(stops)? {
                return Ok(went);
            }
        }
    }

    fn ahead(&mut self) -> Result<Ahead, KvmError> {
        let start = KvmCpu::rip(self);
        let bitness = self.bitness(start)?;
        let mut code = Code128::default();
        let mut at = start;
        let mut still = true;
        for distance in 0..LOOK_AHEAD {
            let Some(instruction) = code.instruction(self, at, bitness) else {
                return Ok(Ahead::Unclear);
            };
            still &= is_idle(&instruction);
            at = match instruction.flow_control() {
                FlowControl::Next => instruction.next_ip(),
                FlowControl::ConditionalBranch => {
                    return Ok(Ahead::Branch([
                        instruction.near_branch_target(),
                        instruction.next_ip(),
                    ]));
                }
                FlowControl::UnconditionalBranch | FlowControl::Call
                    if instruction.near_branch_target() != 0 =>
                {
                    instruction.near_branch_target()
                }
                _ if distance > 0 => return Ok(Ahead::Look(at)),
                _ => {
                    let target = self.target(&instruction);
                    return Ok(target.map_or(Ahead::Unclear, Ahead::Look));
                }
            };
            if still && at == start {
                return Ok(Ahead::Still);
            }
        }
        Ok(Ahead::Unclear)
    }
}

/// How an instruction with a breakpoint is passed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Pass {
    /// By stops at these addresses.
    Hop(Vec<u64>),
    /// It leads to itself.
    ToItself,
    /// It is not known where it leads.
    Blindly,
}

/// Whether an exit is only a place at which the vCPU was stopped, before an instruction.
fn is_between_exits(exit: &Exit) -> bool {
    matches!(exit, Exit::Preempted(place) if place.unit == Unit::Branches)
}

/// Whether an instruction changes nothing but RIP.
fn is_idle(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Nop | Mnemonic::Pause | Mnemonic::Jmp | Mnemonic::Lfence | Mnemonic::Mfence
    )
}

/// A window onto the guest's code, read once for many instructions.
#[derive(Debug, Default)]
struct Code128 {
    start: u64,
    bytes: Vec<u8>,
}

impl Code128 {
    const BYTES: usize = 128;

    fn instruction(&mut self, cpu: &KvmCpu, at: u64, bitness: u32) -> Option<Instruction> {
        let inside = |code: &Code128| {
            let offset = at.checked_sub(code.start)? as usize;
            let rest = code.bytes.get(offset..)?;
            let decoded = Decoder::with_ip(bitness, rest, at, DecoderOptions::NONE).decode();
            (!decoded.is_invalid()).then_some(decoded)
        };
        inside(self).or_else(|| {
            let mut bytes = vec![0; Code128::BYTES];
            let got = cpu.view().ok()?.read(at, &mut bytes);
            bytes.truncate(got);
            *self = Code128 { start: at, bytes };
            inside(self)
        })
    }
}
