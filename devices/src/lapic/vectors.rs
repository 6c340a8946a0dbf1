//! A set of interrupt vectors, as the APIC's 256-bit registers hold one.

use serde::{Deserialize, Serialize};

/// 256 bits in eight doublewords, vector 0 in the lowest bit of the first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Vectors([u32; 8]);

impl Vectors {
    /// The empty set.
    pub(super) const NONE: Vectors = Vectors([0; 8]);

    pub(super) fn set(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] |= 1 << (vector & 31);
    }

    pub(super) fn clear(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] &= !(1 << (vector & 31));
    }

    pub(super) fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] >> (vector & 31) & 1 == 1
    }

    /// Vectors `32 * word` to `32 * word + 31`.
    pub(super) fn word(&self, word: u8) -> u32 {
        self.0[usize::from(word)]
    }

    pub(super) fn lowest_word(&self) -> u32 {
        self.0[0]
    }

    /// The most urgent vector.
    pub(super) fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|word| *word != 0)?;
        Some((32 * word as u32 + self.0[word].ilog2()) as u8)
    }
}
