//! What is rewritten in a kernel so that it reads the time, and prints, without an exit.
//!
//! Each [`Span`] becomes a jump to a stub of its own; the stubs stand in the room that
//! [`crate::rewrite::caves`] finds in `.text`, the clock they read in the room it finds in the data. All of it is
//! decided by the kernel's file alone, so a replay rewrites what the recorder rewrote, and says so
//! by a checksum.

use iced_x86::{Decoder, DecoderOptions};
use xxhash_rust::xxh3::Xxh3;

use super::Patch;
use crate::image::Elf;
use crate::rewrite::alternatives;
use crate::rewrite::caves::{Cave, QuickCaves};
use crate::rewrite::quick_stub::{MOVED_OFFSET, SPAN_MIN, STUB_BYTES, jump, relative, stub};
use crate::rewrite::spans::Span;
use crate::rewrite::transmit::READY;

/// `nop`.
const NOP: u8 = 0x90;

/// Everything that is changed for that in guest memory before the guest starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuickPlan {
    patches: Vec<Patch>,
    clock: QuickClock,
    sites: u32,
}

/// Where the clock is, and how to tell that it still is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuickClock {
    /// Guest-physical address of its three words.
    pub words: u64,
    /// Guest-physical address of the first stub.
    pub stub: u64,
    /// The first stub. Where it no longer stands, another kernel has taken this one's place (kexec), and
    /// the words are no longer ours.
    pub stub_bytes: [u8; STUB_BYTES],
}

impl QuickPlan {
    /// The plan for a kernel with these spans, whose console waits for the transmitter in vain with these
    /// calls; `None` if it has no spans, or no room.
    pub fn new(
        elf: &Elf<'_>,
        spans: &[Span],
        transmits: &[u64],
        caves: &QuickCaves,
    ) -> Option<QuickPlan> {
        let clock = caves.clock;
        let alternatives = alternatives::read(elf)?;
        let mut patches = Vec::new();
        let mut first = None;
        let mut at = caves.stubs;
        let mut room = caves.stub_bytes;
        let mut sites = 0;
        for span in spans {
            // Head_64.S runs where it was loaded, before the kernel's own tables stand: distances must be the same there.
            let start = elf.physical(span.address)?;
            let moves = at.address.wrapping_sub(at.physical);
            if span.address.wrapping_sub(start) != moves
                || clock.address.wrapping_sub(clock.physical) != moves
                || room < STUB_BYTES as u64
            {
                continue;
            }
            let Some((jump, stub)) = span_patches(elf, span, at, clock) else {
                continue;
            };
            first.get_or_insert((at.physical, stub));
            patches.push(Patch {
                gpa: start,
                bytes: jump,
            });
            patches.push(Patch {
                gpa: at.physical,
                bytes: stub.to_vec(),
            });
            if span.moved == 0 {
                let here = span.address..span.address + 1;
                for alternative in alternatives.touching(here) {
                    patches.extend(onto_itself(elf, alternative)?);
                }
            }
            at.address += STUB_BYTES as u64;
            at.physical += STUB_BYTES as u64;
            room -= STUB_BYTES as u64;
            sites += 1;
        }
        for call in transmits {
            patches.push(Patch {
                gpa: elf.physical(*call)?,
                bytes: READY.to_vec(),
            });
        }
        let (stub, stub_bytes) = first?;
        Some(QuickPlan {
            patches,
            clock: QuickClock {
                words: clock.physical,
                stub,
                stub_bytes,
            },
            sites,
        })
    }

    /// What is to stand in guest memory, over the kernel and its traps.
    pub fn patches(&self) -> &[Patch] {
        &self.patches
    }

    /// How many time reads need no exit.
    pub fn sites(&self) -> u32 {
        self.sites
    }

    /// Where the clock is.
    pub fn clock(&self) -> &QuickClock {
        &self.clock
    }

    /// XXH3 of what is rewritten, and where.
    pub fn check(&self) -> u64 {
        let mut check = Xxh3::new();
        for patch in &self.patches {
            check.update(&patch.gpa.to_le_bytes());
            check.update(&(patch.bytes.len() as u64).to_le_bytes());
            check.update(&patch.bytes);
        }
        check.update(&self.clock.words.to_le_bytes());
        check.digest()
    }
}

/// The jump that takes a span's place, and its stub at `at`.
fn span_patches(
    elf: &Elf<'_>,
    span: &Span,
    at: Cave,
    clock: Cave,
) -> Option<(Vec<u8>, [u8; STUB_BYTES])> {
    let bytes = usize::from(span.bytes);
    let from = span.address + (bytes - usize::from(span.moved)) as u64;
    let moved = match span.moved {
        0 => Vec::new(),
        length => moved(
            elf.at(from, length.into())?,
            from,
            at.address + MOVED_OFFSET as u64,
        )?,
    };
    let back = span.address + bytes as u64;
    let stub = stub(at.address, clock.address, &moved, back)?;
    let mut jump = jump(span.address, at.address)?.to_vec();
    assert!(bytes >= SPAN_MIN, "a span of {bytes} bytes");
    jump.resize(bytes, NOP);
    Some((jump, stub))
}

/// The instructions at `from`, to do the same at `to`.
fn moved(code: &[u8], from: u64, to: u64) -> Option<Vec<u8>> {
    let mut bytes = code.to_vec();
    let mut decoder = Decoder::with_ip(64, code, from, DecoderOptions::NONE);
    while decoder.can_decode() {
        let start = decoder.position();
        let instruction = decoder.decode();
        if instruction.is_ip_rel_memory_operand() {
            let field = start
                + decoder
                    .get_constant_offsets(&instruction)
                    .displacement_offset();
            let end = to + decoder.position() as u64;
            let distance = relative(end, instruction.ip_rel_memory_address())?;
            bytes.get_mut(field..field + 4)?.copy_from_slice(&distance);
        }
    }
    Some(bytes)
}

/// Makes an alternative patch its own replacement, with itself.
fn onto_itself(elf: &Elf<'_>, alternative: &alternatives::Alternative) -> Option<[Patch; 2]> {
    let distance = relative(alternative.entry, alternative.replacement)?;
    let gpa = elf.physical(alternative.entry)?;
    Some([
        Patch {
            gpa,
            bytes: distance.to_vec(),
        },
        Patch {
            gpa: gpa + alternative.length_offset,
            bytes: vec![alternative.replacement_bytes],
        },
    ])
}

#[cfg(test)]
mod tests;
