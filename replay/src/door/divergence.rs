//! Drift, named: what the recording says, what the replay did, and what led up to it.

use std::fmt;

use crate::machine::{FullDigest, Moment, Registers, Turn};

/// One thing that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// A turn differs in one field (full-detail recordings).
    Turn {
        /// Which field.
        field: &'static str,
        /// What the recording says.
        expected: String,
        /// What the replay did.
        found: String,
    },
    /// The digest differs; the first difference lies after `equal_through`.
    Witness {
        /// The last exit at which the digests were seen to be equal.
        equal_through: u64,
        /// The recording's 16 bits.
        expected: [u8; 2],
        /// The replay's.
        found: [u8; 2],
    },
    /// An interrupt came that the recording does not have here, or not this one.
    Interrupt {
        /// What the recording says comes next.
        expected: String,
        /// What came.
        found: String,
    },
    /// The guest was preempted where the recording has it exit, the other way round, or elsewhere.
    Preemption {
        /// What the recording says.
        expected: String,
        /// What the replay did.
        found: String,
    },
    /// The recording has something at this exit or before that the replay passed by.
    Missed {
        /// What the recording says.
        expected: String,
    },
    /// The state differs: memory, the vCPU, the devices or the disks.
    State {
        /// The recording's digest.
        expected: Option<FullDigest>,
        /// The replay's.
        found: Option<FullDigest>,
    },
    /// The run ended differently.
    End {
        /// Which part of the ending.
        field: &'static str,
        /// What the recording says.
        expected: String,
        /// What the replay came to.
        found: String,
    },
    /// The image of a disk is not the one that was recorded.
    Image {
        /// Number of the disk.
        disk: usize,
        /// Where the blocks begin that were read here for the first time, in bytes.
        offset: u64,
        /// How many bytes they are; not all need lie in one piece.
        bytes: u64,
        /// What the recording says of them.
        expected: String,
        /// What was found.
        found: String,
    },
    /// The journal says something that no machine can do.
    Impossible { what: String },
}

/// The first point at which a replay is not the recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Divergence {
    pub at: Moment,
    /// What differs.
    pub difference: Difference,
    /// The last turns before it, oldest first, with the numbers of their exits.
    pub history: Vec<(u64, Turn)>,
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the replay left the recording at {}: ", self.at)?;
        match &self.difference {
            Difference::Turn {
                field,
                expected,
                found,
            }
            | Difference::End {
                field,
                expected,
                found,
            } => {
                write!(
                    f,
                    "{field} differs\n  recorded: {expected}\n  replayed: {found}"
                )?;
            }
            Difference::Witness {
                equal_through,
                expected,
                found,
            } => write!(
                f,
                "the digest differs, and was last equal at exit {equal_through}\n  recorded: \
                 ..{:02x}{:02x}\n  replayed: ..{:02x}{:02x}\n  to see which exit it was, record \
                 with --detail full",
                expected[1], expected[0], found[1], found[0]
            )?,
            Difference::Image {
                disk,
                offset,
                bytes,
                expected,
                found,
            } => write!(
                f,
                "the image of disk {disk} differs in what the guest reads here for the first time: \
                 {bytes} bytes, the first at {offset}\n  recorded: {expected}\n  replayed: {found}"
            )?,
            Difference::Interrupt { expected, found } => {
                write!(
                    f,
                    "interrupts differ\n  recorded: {expected}\n  replayed: {found}"
                )?;
            }
            Difference::Preemption { expected, found } => {
                write!(
                    f,
                    "preemption differs\n  recorded: {expected}\n  replayed: {found}"
                )?;
            }
            Difference::Missed { expected } => {
                write!(
                    f,
                    "the replay passed by what was recorded\n  recorded: {expected}"
                )?;
            }
            Difference::State { expected, found } => write!(
                f,
                "the state differs, in {}\n  recorded: {}\n  replayed: {}",
                parts(expected.as_ref(), found.as_ref()),
                hex(*expected),
                hex(*found)
            )?,
            Difference::Impossible { what } => write!(f, "the journal is impossible: {what}")?,
        }
        if !self.history.is_empty() {
            write!(f, "\n  what led up to it, as replayed:")?;
            for (exits, turn) in &self.history {
                write!(f, "\n    exit {exits}: {turn}")?;
            }
        }
        Ok(())
    }
}

fn hex(digest: Option<FullDigest>) -> String {
    digest.map_or_else(|| "none".to_string(), |digest| digest.to_string())
}

/// The parts of a state in which two of them differ.
fn parts(expected: Option<&FullDigest>, found: Option<&FullDigest>) -> String {
    match (expected, found) {
        (Some(expected), Some(found)) => expected.differences(found).join("; "),
        _ => "that there is none".into(),
    }
}

/// The first field in which two turns differ, with both sides.
pub fn first_difference(expected: &Turn, found: &Turn) -> Option<(&'static str, String, String)> {
    if expected.vcpu != found.vcpu {
        return Some((
            "the vCPU",
            expected.vcpu.0.to_string(),
            found.vcpu.0.to_string(),
        ));
    }
    if expected.exit != found.exit {
        return Some((
            "the exit",
            expected.exit.to_string(),
            found.exit.to_string(),
        ));
    }
    if expected.answer != found.answer {
        return Some(("the answer", expected.to_string(), found.to_string()));
    }
    if expected.now != found.now {
        return Some((
            "guest time",
            format!("{} ns", expected.now),
            format!("{} ns", found.now),
        ));
    }
    let pairs = expected.registers.0.iter().zip(&found.registers.0);
    Registers::NAMES
        .iter()
        .zip(pairs)
        .find_map(|(name, (e, f))| {
            (e != f).then(|| {
                (
                    *name,
                    format!("{e:#x} at {expected}"),
                    format!("{f:#x} at {found}"),
                )
            })
        })
}
