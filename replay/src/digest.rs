//! One number that stands for everything the machine did so far.
//!
//! The digest is a chain: each turn and each interrupt is hashed with the digest before it as
//! seed, so that two machines with equal digests took the same exits, with the same values and
//! registers, in the same order.

use hindsight_devices::{Access, Width};
use xxhash_rust::xxh3::xxh3_64_with_seed;
use xxhash_rust::xxh64::xxh64;

use crate::exit::{Answer, Exit, Turn};
use crate::moment::Moment;

/// The chain's present value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest(u64);

/// Room for one turn: kind, four words of exit, four of answer, time, registers. XXH3 is at its
/// best up to 240 bytes, and needs no vector unit there.
const TURN_BYTES: usize = 8 * (1 + 2 + 3 + 1 + 18);

impl Digest {
    /// The digest as a number.
    pub fn value(self) -> u64 {
        self.0
    }

    /// The 16 bits of it that a witness carries.
    pub fn check(self) -> [u8; 2] {
        let [low, high, ..] = self.0.to_le_bytes();
        [low, high]
    }

    /// Chains one turn.
    pub fn absorb(&mut self, turn: &Turn) {
        let mut words = [0u64; TURN_BYTES / 8];
        let (a, b) = exit_words(&turn.exit);
        let (c, d, e) = answer_words(&turn.answer);
        words[..7].copy_from_slice(&[turn.exit.kind() as u64, a, b, c, d, e, turn.now]);
        words[7..].copy_from_slice(&turn.registers.0);
        self.chain(&words);
    }

    /// Chains one delivered interrupt.
    pub fn absorb_interrupt(&mut self, at: &Moment, vector: u8) {
        self.chain(&[
            u64::from(vector) | 1 << 32,
            at.exits,
            at.branches,
            at.rip,
            at.rcx,
        ]);
    }

    /// Chains a write that was posted.
    pub fn absorb_posted(&mut self, write: &Access) {
        let (what, value) = access_words(write);
        self.chain(&[what, value]);
    }

    /// Chains a frame that the machine has sent.
    pub fn absorb_frame(&mut self, frame: &[u8]) {
        self.0 = xxh3_64_with_seed(frame, self.0);
    }

    fn chain(&mut self, words: &[u64]) {
        let mut bytes = [0u8; TURN_BYTES];
        for (slot, word) in bytes.chunks_exact_mut(8).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        self.0 = xxh3_64_with_seed(&bytes[..8 * words.len()], self.0);
    }
}

fn access_words(access: &Access) -> (u64, u64) {
    let tag = |tag: u64, width: Width| tag << 8 | width.bytes() as u64;
    match *access {
        Access::PortRead { port, width } => (u64::from(port) << 16 | tag(1, width), 0),
        Access::PortWrite { port, width, value } => {
            (u64::from(port) << 16 | tag(2, width), u64::from(value))
        }
        Access::MemoryRead { gpa, width } => (gpa, tag(3, width)),
        Access::MemoryWrite { gpa, width, value } => (gpa ^ tag(4, width) << 48, value),
        Access::MsrRead { index } => (u64::from(index) << 16 | 5, 0),
        Access::MsrWrite { index, value } => (u64::from(index) << 16 | 6, value),
    }
}

fn exit_words(exit: &Exit) -> (u64, u64) {
    match *exit {
        Exit::Access(access) => access_words(&access),
        Exit::TimeRead { instruction, mode } => (instruction as u64, mode as u64),
        Exit::Cpuid { leaf, subleaf } => (u64::from(leaf), u64::from(subleaf)),
        Exit::WriteCr4 { value } => (value, 0),
        Exit::Preempted(place) => (place.number, place.rip),
        Exit::Module { module, sites } => (module, u64::from(sites)),
        Exit::WriteDr { number, value } => (number.into(), value),
        Exit::Panic { message } => (message, 0),
        Exit::ReadCr4
        | Exit::ProtectionFault
        | Exit::Halt
        | Exit::Woken
        | Exit::Shutdown
        | Exit::Pause => (0, 0),
    }
}

fn answer_words(answer: &Answer) -> (u64, u64, u64) {
    match *answer {
        Answer::Done => (0, 0, 0),
        Answer::Value(value) => (1, value, 0),
        Answer::Fault => (2, 0, 0),
        Answer::Time { tsc, aux } => (3, tsc, u64::from(aux)),
        Answer::Cpuid([a, b, c, d]) => (
            4,
            u64::from(a) << 32 | u64::from(b),
            u64::from(c) << 32 | u64::from(d),
        ),
    }
}

/// Digest of a whole memory, built page by page in ascending order.
///
/// Pages that hold only zeroes do not count, so that a page never touched and a page cleared by
/// the guest are the same, as they are to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryDigest(u64);

/// Guest page size in bytes.
pub const PAGE_BYTES: usize = 4096;

impl MemoryDigest {
    /// Chains one page. Pages must come in ascending order of `gpa`.
    pub fn absorb_page(&mut self, gpa: u64, page: &[u8]) {
        assert_eq!(page.len(), PAGE_BYTES, "a page has {PAGE_BYTES} bytes");
        if page
            .as_chunks::<8>()
            .0
            .iter()
            .any(|word| u64::from_ne_bytes(*word) != 0)
        {
            // XXH64 rather than XXH3: it needs no vector unit, and emulated hosts have a slow one.
            self.0 = xxh64(page, self.0 ^ gpa);
        }
    }

    /// The digest as a number.
    pub fn value(self) -> u64 {
        self.0
    }
}
