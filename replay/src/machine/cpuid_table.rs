//! The CPUID table: which CPU the guest believes in. It is recorded, and replay answers from it.

use serde::{Deserialize, Serialize};

/// One leaf, or one subleaf of a leaf that has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input; `None` where the leaf does not look at it.
    pub subleaf: Option<u32>,
    /// EAX, EBX, ECX, EDX on output.
    pub values: [u32; 4],
}

/// All leaves, ordered by leaf and subleaf.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidTable {
    /// The entries.
    pub entries: Vec<CpuidEntry>,
}

impl CpuidTable {
    /// What CPUID answers for this leaf and subleaf; leaves the table lacks read as zeroes, as
    /// they do on AMD (APM vol. 3, CPUID). A user program on Intel, whose CPUID KVM answers, reads
    /// the highest basic leaf instead (SDM vol. 2, CPUID): the same in every replay.
    pub fn answer(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.entries
            .iter()
            .find(|entry| entry.leaf == leaf && entry.subleaf.is_none_or(|s| s == subleaf))
            .map_or([0; 4], |entry| entry.values)
    }

    /// The vendor string of leaf 0, as `AuthenticAMD`.
    pub fn vendor(&self) -> String {
        let [_, b, c, d] = self.answer(0, 0);
        [b, d, c]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .map(char::from)
            .collect()
    }
}
