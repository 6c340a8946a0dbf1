//! Digest of everything that decides what happens next: memory, the vCPU in all its parts, the devices, the disks.
//!
//! The running digest (see [`super::digest`]) covers what passes between the guest and the machine at exits. What
//! the guest has in a segment register, an MSR or an SSE register may take long to show there, so all of it is digested
//! wherever memory is. Each part has a number of its own, so that a difference can be named.

use std::fmt;

use hindsight_devices::{Storage, StorageError};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use xxhash_rust::xxh64::xxh64;

use super::Machine;
use super::cpu::Cpu;
use super::digest::{Likeness, MemoryDigest};

/// Why there is no digest.
#[derive(Debug, Error)]
pub enum DigestError<E: std::error::Error> {
    /// The vCPU failed.
    #[error("the vCPU: {0}")]
    Cpu(#[source] E),
    /// A disk failed.
    #[error(transparent)]
    Storage(StorageError),
}

impl Machine {
    /// The digest of everything that decides what happens next, where the machine is. The vCPU's instruction is finished
    /// for it.
    pub fn full_digest<C: Cpu>(
        &self,
        cpu: &mut C,
        storage: &mut dyn Storage,
    ) -> Result<FullDigest, DigestError<C::Error>> {
        cpu.settle().map_err(DigestError::Cpu)?;
        let memory = cpu.memory_digest().map_err(DigestError::Cpu)?;
        let state = cpu.state_digest().map_err(DigestError::Cpu)?;
        let board = postcard::to_stdvec(&self.board.save());
        let board = board.expect("plain values serialise");
        let disks = storage.digest().map_err(DigestError::Storage)?;
        Ok(FullDigest::new(memory, state, &board, disks))
    }
}

/// The digest of a vCPU, part by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuDigest([[u8; 4]; CpuDigest::PARTS.len()]);

impl CpuDigest {
    /// The parts. The last one is what the monitor has found out of the guest's kernel: where its traps and entries are.
    pub const PARTS: [&'static str; 7] = [
        "general registers",
        "segment and control registers",
        "MSRs",
        "x87 and SSE registers",
        "debug registers",
        "pending events",
        "what is known of the kernel",
    ];

    /// Of the bytes that each part consists of.
    pub fn of(parts: [&[u8]; CpuDigest::PARTS.len()]) -> CpuDigest {
        CpuDigest(parts.map(short))
    }
}

/// The digest of a whole machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FullDigest {
    /// All of memory.
    pub memory: MemoryDigest,
    cpu: CpuDigest,
    board: [u8; 4],
    disks: [u8; 4],
}

impl FullDigest {
    /// Of a memory, a vCPU, the devices as they would be saved, and the number that represents the disks.
    pub(super) fn new(
        memory: MemoryDigest,
        cpu: CpuDigest,
        board: &[u8],
        disks: u64,
    ) -> FullDigest {
        FullDigest {
            memory,
            cpu,
            board: short(board),
            disks: short(&disks.to_le_bytes()),
        }
    }

    /// Of a memory alone: the rest of the machine has no state.
    pub fn of_memory(memory: MemoryDigest) -> FullDigest {
        FullDigest {
            memory,
            ..FullDigest::default()
        }
    }

    /// One number for all of it.
    pub fn value(&self) -> u64 {
        let parts = self.cpu.0.as_flattened();
        let rest = [self.board, self.disks];
        xxh64(parts, xxh64(rest.as_flattened(), self.memory.value()))
    }

    /// How this machine compares with another: in nothing but Accessed bits, or in more.
    pub fn likeness(&self, other: &FullDigest) -> Likeness {
        let memory = self.memory.likeness(other.memory);
        let rest = FullDigest {
            memory: other.memory,
            ..*self
        };
        if rest == *other {
            memory
        } else {
            Likeness::Different
        }
    }

    /// The parts in which two machines differ.
    pub fn differences(&self, other: &FullDigest) -> Vec<&'static str> {
        let memory = match self.memory.likeness(other.memory) {
            Likeness::Equal => None,
            Likeness::ButAccessed => Some("memory, in Accessed bits of page tables alone"),
            Likeness::Different => Some("memory"),
        };
        let cpu = CpuDigest::PARTS
            .into_iter()
            .zip(self.cpu.0.iter().zip(&other.cpu.0));
        let rest = [
            ("devices", (&self.board, &other.board)),
            ("disks", (&self.disks, &other.disks)),
        ];
        let parts = cpu.chain(rest).filter(|(_, (a, b))| a != b);
        memory
            .into_iter()
            .chain(parts.map(|(part, _)| part))
            .collect()
    }
}

impl fmt::Display for FullDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.value())
    }
}

/// XXH64 rather than XXH3: it needs no vector unit, and emulated hosts have a slow one.
fn short(bytes: &[u8]) -> [u8; 4] {
    let digest = xxh64(bytes, 0);
    ((digest ^ digest >> 32) as u32).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(changed: Option<usize>) -> FullDigest {
        let mut memory = MemoryDigest::default();
        let byte = |part| u8::from(changed == Some(part));
        memory.absorb_page(0, &[1 + byte(0); super::super::digest::PAGE_BYTES]);
        let parts: [[u8; 2]; CpuDigest::PARTS.len()] = std::array::from_fn(|i| [7, byte(i + 1)]);
        let cpu = CpuDigest::of(std::array::from_fn(|i| &parts[i][..]));
        FullDigest::new(memory, cpu, &[byte(8)], byte(9).into())
    }

    #[test]
    fn each_part_that_differs_is_told_by_its_name_and_makes_another_number() {
        let expected = digest(None);
        assert_eq!(expected.likeness(&digest(None)), Likeness::Equal);
        let mut names = Vec::new();
        for part in 0..10 {
            let other = digest(Some(part));
            assert_eq!(expected.likeness(&other), Likeness::Different);
            assert_ne!(expected.value(), other.value());
            let differences = expected.differences(&other);
            assert_eq!(differences.len(), 1, "{differences:?}");
            names.extend(differences);
        }
        let mut expected = vec!["memory"];
        expected.extend(CpuDigest::PARTS);
        expected.extend(["devices", "disks"]);
        assert_eq!(names, expected);
    }
}
