//! The vCPU as whoever goes along a recording by instructions knows one, and guesses of where its last instruction was.

use hindsight_replay::{Cpu, Debuggable, HitKind};
use iced_x86::{Decoder, DecoderOptions, FlowControl};

use super::cpu::KvmCpu;
use super::debugger::{Hit, Stops};
use super::error::KvmError;
use super::guest_text::INSTRUCTION_MAX;

/// So far away jumps to here are looked for, in bytes.
const NEAR: u64 = 256;
/// So many addresses are guessed.
const GUESSES_MAX: usize = 36;

impl Debuggable for KvmCpu {
    type Stops = Stops;
    type Hit = Hit;

    fn before(addresses: &[u64]) -> Stops {
        Stops {
            execution: addresses.to_vec(),
            ..Stops::default()
        }
    }

    fn or_arrival(stops: &Stops, address: u64, number: u64) -> Stops {
        Stops {
            arrival: Some((address, number)),
            ..stops.clone()
        }
    }

    fn after_one(&mut self) -> Result<Stops, KvmError> {
        Ok(Stops {
            step: Some(self.begin_step()?),
            ..Stops::default()
        })
    }

    fn stop_at(&mut self, stops: &Stops) -> Result<(), KvmError> {
        KvmCpu::stop_at(self, stops.clone())
    }

    fn stops_at_exit(&self) -> Stops {
        KvmCpu::stops_at_exit(self).clone()
    }

    fn hit(&self) -> Hit {
        KvmCpu::hit(self).expect("a vCPU that is stopped says why")
    }

    fn stepped() -> Hit {
        Hit::Step
    }

    fn kind(hit: &Hit) -> HitKind {
        match hit {
            Hit::Execution(_) | Hit::Arrival(_) | Hit::Step => HitKind::Instruction,
            Hit::Data(_) => HitKind::Data,
            Hit::NoRoom { .. } => HitKind::NoRoom,
        }
    }

    fn count_arrivals(&mut self, address: Option<u64>) -> Result<(), KvmError> {
        KvmCpu::count_arrivals(self, address)
    }

    fn arrivals(&self) -> u64 {
        KvmCpu::arrivals(self)
    }

    fn is_interrupted(&self) -> Result<bool, KvmError> {
        KvmCpu::is_interrupted(self)
    }

    fn addresses_max(&self) -> usize {
        // One register is for the present place, another may be for the way to where the guest was preempted.
        self.free_debug_registers().saturating_sub(2).max(1)
    }

    fn guesses(&mut self) -> Result<Vec<u64>, KvmError> {
        self.settle()?;
        let registers = Cpu::registers(self);
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
}

impl KvmCpu {
    /// Where an instruction may begin that ends at `end`.
    fn ending_at(&mut self, end: u64) -> Vec<u64> {
        let mut found = Vec::new();
        for length in 1..=INSTRUCTION_MAX as u64 {
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
