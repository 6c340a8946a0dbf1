//! The instruction that was executed last, which no debug register tells.
//!
//! If its address is known, its place is: where that was come to last before the present place. So addresses are
//! guessed (what decodes to end here, what may have jumped, called or returned here) and tried: from there one step has
//! to lead to the present place. Where no guess is right, the stretch since the exit before is stepped through, which is
//! as right, and slow.

use iced_x86::{Decoder, DecoderOptions, FlowControl};

use super::place::{Name, Place, lost, no_room};
use super::{Debugger, Interrupted, Passed, Stopped};
use crate::failure::{Failure, Kind};
use crate::kvm::{Hit, Stops};
use crate::session::debug::replaying::Ran;

/// No instruction is longer, in bytes (Intel SDM vol. 2, 2.3.11).
const INSTRUCTION_MAX: u64 = 15;
/// So far away jumps to here are looked for, in bytes.
const NEAR: u64 = 256;
/// So many addresses are guessed.
const GUESSES_MAX: usize = 36;
/// So many steps are taken on a stretch.
const STEPS_MAX: u64 = 1_000_000;

impl Debugger {
    /// Goes to before the instruction that was executed last before `name`, the present place.
    pub(super) fn go_before(
        &mut self,
        name: Name,
        interrupted: Interrupted<'_>,
    ) -> Result<Stopped, Failure> {
        let (start, bound) = match name {
            Name::Exit(0) => return Ok(Stopped::Begin),
            Name::Exit(exit) => (exit - 1, name),
            Name::Arrival { exit, .. } => (exit, name),
            Name::End => (self.exit().saturating_sub(1), name),
        };
        // A guess that is wrong may be in the middle of an instruction, which nothing in memory may change.
        let guesses = match self.free_debug_registers() {
            0 => Vec::new(),
            _ => self.guesses()?,
        };
        // One register is for the present place, another may be for the way to where the guest was preempted.
        let room = self.free_debug_registers().saturating_sub(2).max(1);
        for some in guesses.chunks(room) {
            match self.last_before(start, bound, some, interrupted)? {
                Passed::Last(Some(place)) => {
                    self.go_to(&place)?;
                    if self.step_leads_to(bound, interrupted)? {
                        self.go_to(&place)?;
                        return Ok(Stopped::Hit(Hit::Step));
                    }
                }
                Passed::Last(None) | Passed::NoRoom(_) => {}
                Passed::Interrupted => {
                    self.go_to_name(name)?;
                    return Ok(Stopped::Interrupted);
                }
            }
        }
        self.step_through(start, bound, interrupted)
    }

    fn last_before(
        &mut self,
        start: u64,
        bound: Name,
        addresses: &[u64],
        interrupted: Interrupted<'_>,
    ) -> Result<Passed, Failure> {
        let stops = Stops {
            execution: addresses.to_vec(),
            in_registers: true,
            ..Stops::default()
        };
        self.last_stop(start, bound, &stops, interrupted)
    }

    /// Whether one step leads from here to `bound`. Where the vCPU is then, it is anyway.
    fn step_leads_to(
        &mut self,
        bound: Name,
        interrupted: Interrupted<'_>,
    ) -> Result<bool, Failure> {
        let stops = self.one_step()?;
        Ok(match bound {
            Name::Exit(exit) => {
                self.forward(&stops, Some(exit), interrupted)? == Stopped::Interrupted
                    && self.exit() == exit
                    && self.is_at_exit()
            }
            Name::Arrival { exit, address, .. } => {
                let stopped = self.forward(&stops, Some(exit + 1), interrupted)?;
                matches!(stopped, Stopped::Hit(_))
                    && self.exit() == exit
                    && self.replay.registers()?.rip() == address
                    && self.name()? == bound
            }
            Name::End => {
                let stopped = self.forward(&stops, None, interrupted)?;
                matches!(stopped, Stopped::End(_))
            }
        })
    }

    /// Steps from the exit `start` to `bound`, and goes to where the last step began.
    fn step_through(
        &mut self,
        start: u64,
        bound: Name,
        interrupted: Interrupted<'_>,
    ) -> Result<Stopped, Failure> {
        self.go_to_exit(start)?;
        let mut address = self.replay.registers()?.rip();
        let counted = match bound {
            Name::Arrival {
                address, number, ..
            } => {
                self.replay.count_arrivals(address)?;
                Some((address, number))
            }
            _ => None,
        };
        for _ in 0..STEPS_MAX {
            let stops = self.one_step()?;
            self.replay.stop_at(stops)?;
            let until = (bound != Name::End).then_some(start + 1);
            let ran = self.replay.run(until)?;
            let rip = self.replay.registers()?.rip();
            let is_there = match (counted, ran) {
                (_, Ran::Stopped(Hit::NoRoom { wanted, free })) => {
                    return Err(no_room(wanted, free));
                }
                (None, Ran::Reached | Ran::Ended) => true,
                (Some((at, number)), Ran::Stopped(_)) => {
                    rip == at && self.replay.arrivals() == number
                }
                (None, Ran::Stopped(_)) => false,
                (_, ran) => return Err(lost(start, &format!("a step came to {ran:?}"))),
            };
            if is_there {
                let passed = self.last_before(start, bound, &[address], interrupted)?;
                let place = match passed {
                    Passed::Last(Some(place)) => place,
                    // It was the first instruction after the exit, of which nothing had run.
                    Passed::Last(None) => Place {
                        exit: start,
                        legs: Vec::new(),
                    },
                    _ => return Err(lost(start, "the step before was not seen")),
                };
                self.go_to(&place)?;
                return Ok(Stopped::Hit(Hit::Step));
            }
            if interrupted() {
                self.go_to_name(bound)?;
                return Ok(Stopped::Interrupted);
            }
            address = rip;
        }
        self.go_to_name(bound)?;
        Err(Failure::new(
            Kind::BadInput,
            format!(
                "the instruction before this one is more than {STEPS_MAX} steps after exit {start}: go back by a breakpoint"
            ),
        ))
    }

    /// Addresses at which the instruction may be that was executed last, the likeliest first.
    fn guesses(&mut self) -> Result<Vec<u64>, Failure> {
        let registers = self.replay.registers()?;
        let rip = registers.rip();
        let mut words = [0; 24];
        let got = self.read(registers.0[6], &mut words);
        let words = words[..got].as_chunks::<8>().0.iter();
        // A return address, or what an exception has pushed, with an error code or without.
        let pushed: Vec<u64> = words.map(|word| u64::from_le_bytes(*word)).collect();
        let mut guesses = self.ending_at(rip);
        guesses.extend(self.jumping_to(rip));
        for address in pushed.iter().take(2).chain([&registers.rcx()]) {
            guesses.push(*address);
            guesses.extend(self.ending_at(*address));
        }
        let mut seen = Vec::new();
        guesses.retain(|guess| {
            let is_new = !seen.contains(guess);
            seen.push(*guess);
            is_new
        });
        guesses.truncate(GUESSES_MAX);
        Ok(guesses)
    }

    /// Where an instruction may begin that ends at `end`.
    fn ending_at(&mut self, end: u64) -> Vec<u64> {
        let mut found = Vec::new();
        for length in 1..=INSTRUCTION_MAX {
            let start = end.wrapping_sub(length);
            let mut bytes = vec![0; length as usize];
            if self.read(start, &mut bytes) < bytes.len() {
                continue;
            }
            let mut decoder = Decoder::with_ip(64, &bytes, start, DecoderOptions::NONE);
            let decoded = decoder.decode();
            if !decoded.is_invalid() && decoded.len() as u64 == length {
                found.push(start);
            }
        }
        found
    }

    /// Where near jumps are that lead to `target`.
    fn jumping_to(&mut self, target: u64) -> Vec<u64> {
        let start = target.wrapping_sub(NEAR);
        let mut bytes = vec![0; 2 * NEAR as usize];
        let got = self.read(start, &mut bytes);
        let mut found = Vec::new();
        for offset in 0..got {
            let at = start.wrapping_add(offset as u64);
            let mut decoder = Decoder::with_ip(64, &bytes[offset..got], at, DecoderOptions::NONE);
            let decoded = decoder.decode();
            let jumps = matches!(
                decoded.flow_control(),
                FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
            );
            if !decoded.is_invalid() && jumps && decoded.near_branch_target() == target {
                found.push(at);
            }
        }
        found
    }
}
