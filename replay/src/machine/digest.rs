//! One number that represents everything the machine did so far.
//!
//! The digest is a chain: each turn and each interrupt is hashed with the digest before it as
//! seed, so that two machines with equal digests took the same exits, with the same values and
//! registers, in the same order.

use hindsight_devices::{Access, Output, Width};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;
use xxhash_rust::xxh64::xxh64;

use super::exit::{Answer, Exit, Turn};
use super::moment::{Moment, VcpuNumber};

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

    /// The digest that is this number.
    pub(super) fn of(value: u64) -> Digest {
        Digest(value)
    }

    /// The 16 bits of it that a witness carries.
    pub fn check(self) -> [u8; 2] {
        let [low, high, ..] = self.0.to_le_bytes();
        [low, high]
    }

    /// Chains one turn.
    pub fn absorb(&mut self, turn: &Turn) {
        let mut words = [0u64; TURN_BYTES / 8];
        let kind = turn.exit.kind() as u64 | on_vcpu(turn.vcpu);
        let (a, b) = exit_words(&turn.exit);
        let (c, d, e) = answer_words(&turn.answer);
        words[..7].copy_from_slice(&[kind, a, b, c, d, e, turn.now]);
        words[7..].copy_from_slice(&turn.registers.0);
        self.chain(&words);
    }

    /// Chains one delivered interrupt.
    pub fn absorb_interrupt(&mut self, at: &Moment, vector: u8) {
        self.chain(&[
            u64::from(vector) | on_vcpu(at.vcpu) | 1 << 32,
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

    /// Chains what has left the machine: frames, and bytes of the virtio console. What leaves by the serial port was
    /// chained before, for each byte of it was an exit or was posted.
    pub fn absorb_output(&mut self, output: &Output) {
        let (what, bytes) = match output {
            Output::Frame(frame) => (1, frame),
            Output::VirtioConsole(bytes) => (2, bytes),
            Output::Console(_) => return,
        };
        // A single word comes before nothing else, so no bytes can be taken for others, nor for a turn.
        self.chain(&[(bytes.len() as u64) << 8 | what]);
        self.0 = xxh3_64_with_seed(bytes, self.0);
    }

    fn chain(&mut self, words: &[u64]) {
        let mut bytes = [0u8; TURN_BYTES];
        for (slot, word) in bytes.chunks_exact_mut(8).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        self.0 = xxh3_64_with_seed(&bytes[..8 * words.len()], self.0);
    }
}

/// A vCPU as part of a word whose lowest eight bits are a vector or the kind of an exit.
fn on_vcpu(vcpu: VcpuNumber) -> u64 {
    const { assert!(Exit::KINDS <= 1 << 8) };
    u64::from(vcpu.0) << 8
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
///
/// The Accessed bits, which the CPU sets in page-table entries as it walks them, are digested apart, so that a memory
/// that differs in those alone is recognized. No list of page tables is needed for it: what could be an entry is
/// masked wherever it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryDigest {
    masked: [u8; 8],
    accessed: [u8; 4],
}

impl std::fmt::Display for MemoryDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.value())
    }
}

/// How two memories compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Likeness {
    /// They are the same.
    Equal,
    /// They are the same but for Accessed bits of what could be page-table entries.
    ButAccessed,
    /// They differ.
    Different,
}

/// The Accessed bit of a page-table entry (Intel SDM vol. 3, 4.5).
const ACCESSED: u64 = 1 << 5;

/// Whether a word could be a page-table entry that was walked: present, accessed, and for a frame below 1 TiB that is
/// not the first. Small numbers and Linux's pointers could not.
fn is_accessed(word: u64) -> bool {
    const PRESENT: u64 = 1;
    const FRAME: u64 = 0x0000_00ff_ffff_f000;
    const ABOVE: u64 = 0x000f_ff00_0000_0000;
    const BOTH: u64 = PRESENT | ACCESSED;
    word & BOTH == BOTH && word & FRAME != 0 && word & ABOVE == 0
}

/// Guest page size in bytes.
pub const PAGE_BYTES: usize = 4096;

impl MemoryDigest {
    /// Chains one page. Pages must come in ascending order of `gpa`.
    pub fn absorb_page(&mut self, gpa: u64, page: &[u8; PAGE_BYTES]) {
        // Loops that may end early, and XXH64 rather than XXH3: they need no vector unit, and emulated hosts have a slow
        // one.
        let mut words = page.as_chunks::<8>().0.iter();
        if words.clone().all(|word| u64::from_le_bytes(*word) == 0) {
            return;
        }
        let has_accessed = words.any(|word| is_accessed(u64::from_le_bytes(*word)));
        let split = has_accessed.then(|| split(page));
        let masked = xxh64(split.as_ref().map_or(page, |(masked, _)| masked), gpa);
        self.masked = xxh64(&masked.to_le_bytes(), u64::from_le_bytes(self.masked)).to_le_bytes();
        if let Some((_, accessed)) = split {
            let before = u32::from_le_bytes(self.accessed);
            let bytes = accessed.map(u64::to_le_bytes);
            let digest = xxh64(bytes.as_flattened(), gpa ^ u64::from(before) << 32);
            self.accessed = ((digest ^ digest >> 32) as u32).to_le_bytes();
        }
    }

    /// The digest of all of it, as a number.
    pub fn value(self) -> u64 {
        xxh64(&self.accessed, u64::from_le_bytes(self.masked))
    }

    /// How this memory compares with another.
    pub fn likeness(self, other: MemoryDigest) -> Likeness {
        if self == other {
            Likeness::Equal
        } else if self.masked == other.masked {
            Likeness::ButAccessed
        } else {
            Likeness::Different
        }
    }

    /// The digest of the same memory with other Accessed bits.
    pub fn otherwise_accessed(self) -> MemoryDigest {
        let accessed = self.accessed.map(|byte| !byte);
        MemoryDigest { accessed, ..self }
    }

    /// The digest with these two numbers: of memory without its Accessed bits, and of those.
    pub fn of_parts(masked: u64, accessed: u32) -> MemoryDigest {
        MemoryDigest {
            masked: masked.to_le_bytes(),
            accessed: accessed.to_le_bytes(),
        }
    }
}

/// Words of one bit for each word of a page.
const ACCESSED_WORDS: usize = PAGE_BYTES / 8 / 64;

/// The page without Accessed bits, and where they were.
fn split(page: &[u8; PAGE_BYTES]) -> ([u8; PAGE_BYTES], [u64; ACCESSED_WORDS]) {
    let (mut masked, mut accessed) = (*page, [0; ACCESSED_WORDS]);
    for (bits, bytes) in accessed.iter_mut().zip(masked.chunks_exact_mut(8 * 64)) {
        for (place, bytes) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let word = u64::from_le_bytes(*bytes);
            if is_accessed(word) {
                *bits |= 1 << place;
                *bytes = (word & !ACCESSED).to_le_bytes();
            }
        }
    }
    (masked, accessed)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::exit::Registers;
    use super::*;

    fn digest(words: &[(usize, u64)]) -> MemoryDigest {
        let mut page = [0; PAGE_BYTES];
        for (index, word) in words {
            page[8 * index..][..8].copy_from_slice(&word.to_le_bytes());
        }
        let mut digest = MemoryDigest::default();
        digest.absorb_page(0x3000, &page);
        digest.absorb_page(0x9000, &[7; PAGE_BYTES]);
        digest
    }

    /// How a page with one word compares with one in which that word has these bits the other way.
    fn flipped(word: u64, bits: u64) -> Likeness {
        digest(&[(0, 5), (77, word)]).likeness(digest(&[(0, 5), (77, word ^ bits)]))
    }

    #[test]
    fn memories_that_differ_in_accessed_bits_alone_are_told_from_others() {
        // A user's page, a table, a huge page that may not be executed, a page of the kernel's.
        for entry in [0x1234_5067, 0x3f_ffff_f067, 1 << 63 | 0x20_00e7, 0x1063] {
            assert_eq!(flipped(entry, ACCESSED), Likeness::ButAccessed, "{entry:x}");
            assert_eq!(flipped(entry, 0), Likeness::Equal);
            for bit in (0..64).filter(|bit| 1 << bit != ACCESSED) {
                let both = 1 << bit | ACCESSED;
                assert_eq!(flipped(entry, 1 << bit), Likeness::Different, "{bit}");
                assert_eq!(flipped(entry, both), Likeness::Different, "{bit}");
            }
        }
    }

    #[test]
    fn what_is_no_entry_is_compared_whole() {
        // Not present, small numbers, pointers of the kernel's and of a program's.
        for word in [
            0x1234_5066,
            1,
            0x21,
            0xffd,
            0xffff_8880_0123_4567,
            0xffff_ffff_8100_0001,
            0x7fff_1234_5679,
            0x5555_5555_5555,
        ] {
            assert_eq!(flipped(word, ACCESSED), Likeness::Different, "{word:x}");
        }
    }

    #[test]
    fn turns_and_interrupts_of_another_vcpu_are_others() {
        let turn = |vcpu| {
            let mut digest = Digest::default();
            digest.absorb(&Turn {
                vcpu: VcpuNumber(vcpu),
                exit: Exit::Halt,
                answer: Answer::Done,
                now: 1,
                registers: Registers::default(),
            });
            digest.value()
        };
        let interrupt = |vcpu| {
            let mut digest = Digest::default();
            let at = Moment {
                vcpu: VcpuNumber(vcpu),
                ..Moment::START
            };
            digest.absorb_interrupt(&at, 0x30);
            digest.value()
        };
        for absorbed in [turn, interrupt] as [fn(u8) -> u64; 2] {
            let values: BTreeSet<u64> = (0..=u8::MAX).map(absorbed).collect();
            assert_eq!(values.len(), 256);
        }
    }

    #[test]
    fn what_left_the_machine_is_not_taken_for_something_else() {
        let absorbed = |outputs: &[Output]| {
            let mut digest = Digest::default();
            for output in outputs {
                digest.absorb_output(output);
            }
            digest
        };
        let (frame, console) = (Output::Frame, Output::VirtioConsole);
        let bytes = || b"hindsight".to_vec();
        let byte = Access::PortWrite {
            port: 0x3f8,
            width: Width::Byte,
            value: 0x41,
        };
        let mut posted = Digest::default();
        posted.absorb_posted(&byte);
        let (what, value) = access_words(&byte);
        let mut like_posted = what.to_le_bytes().to_vec();
        like_posted.extend(value.to_le_bytes());
        let word = (9_u64 << 8 | 2).to_le_bytes();
        let mut like_console = word.to_vec();
        like_console.extend(bytes());
        let all = [
            Digest::default(),
            posted,
            absorbed(&[frame(bytes())]),
            absorbed(&[console(bytes())]),
            absorbed(&[console(b"hind".to_vec()), console(b"sight".to_vec())]),
            absorbed(&[frame(like_posted.clone())]),
            absorbed(&[console(like_posted)]),
            absorbed(&[frame(like_console.clone())]),
            absorbed(&[console(like_console)]),
            absorbed(&[frame(word.to_vec()), frame(bytes())]),
        ];
        let different: BTreeSet<u64> = all.iter().map(|digest| digest.value()).collect();
        assert_eq!(different.len(), all.len());
        let serial = Output::Console(bytes());
        assert_eq!(
            absorbed(&[serial]),
            Digest::default(),
            "it was chained before"
        );
    }

    #[test]
    fn a_page_of_zeroes_is_no_page_and_its_place_counts() {
        let mut zeroes = MemoryDigest::default();
        zeroes.absorb_page(0x1000, &[0; PAGE_BYTES]);
        assert_eq!(zeroes, MemoryDigest::default());
        let mut at = [MemoryDigest::default(); 2];
        at[0].absorb_page(0x1000, &[1; PAGE_BYTES]);
        at[1].absorb_page(0x2000, &[1; PAGE_BYTES]);
        assert_eq!(at[0].likeness(at[1]), Likeness::Different);
    }
}
