//! What a journal says: events, each at its exit.

use hindsight_devices::Input;

use crate::machine::{End, FullDigest, LeftOpen, Moment, Place, Turn, VcpuNumber};

/// One thing a journal says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Full detail only: the whole turn.
    Turn(Box<Turn>),
    /// Guest time differs from what the rule gives: the difference in nanoseconds.
    Time {
        /// Guest time less the rule's.
        ahead_ns: i64,
    },
    /// Something came from outside.
    Input(Input),
    /// An interrupt was delivered.
    Interrupt {
        /// Its vector.
        vector: u8,
        /// Where exactly.
        at: Moment,
    },
    /// The lowest 16 bits of the digest after this turn.
    Witness {
        /// Those bits, little-endian.
        check: [u8; 2],
    },
    /// The digest of the whole state at this turn.
    State {
        /// The digest.
        digest: FullDigest,
    },
    /// The recording is complete.
    End(Box<End>),
    /// A vCPU was preempted after the exit before, which made it an exit.
    Preempted { vcpu: VcpuNumber, place: Place },
    /// The guest read blocks of a disk's image for the first time.
    FirstReads {
        /// XXH3-64 over them.
        check: u64,
    },
    /// Full detail only: the bytes whose writes were posted between the exit before and this one.
    Posted(Vec<u8>),
    /// From this exit on something reaches the guest unrecorded, or may.
    LeftOpen(LeftOpen),
}

impl Event {
    /// Number of kinds that [`Event::kind`] tells apart.
    pub const KINDS: usize = 11;
    /// Their names, in order.
    pub const KIND_NAMES: [&'static str; Event::KINDS] = [
        "turns",
        "time corrections",
        "inputs",
        "interrupts",
        "witnesses",
        "memory digests",
        "end",
        "preemptions",
        "first reads",
        "posted writes",
        "left open",
    ];

    /// The vCPU that it is of; `None`: it is of the whole machine.
    pub fn vcpu(&self) -> Option<VcpuNumber> {
        match self {
            Event::Turn(turn) => Some(turn.vcpu),
            Event::Interrupt { at, .. } => Some(at.vcpu),
            Event::Preempted { vcpu, .. } => Some(*vcpu),
            Event::Time { .. }
            | Event::Input(_)
            | Event::Witness { .. }
            | Event::State { .. }
            | Event::End(_)
            | Event::FirstReads { .. }
            | Event::Posted(_)
            | Event::LeftOpen(_) => None,
        }
    }

    /// Index into [`Event::KIND_NAMES`].
    pub fn kind(&self) -> usize {
        match self {
            Event::Turn(_) => 0,
            Event::Time { .. } => 1,
            Event::Input(_) => 2,
            Event::Interrupt { .. } => 3,
            Event::Witness { .. } => 4,
            Event::State { .. } => 5,
            Event::End(_) => 6,
            Event::Preempted { .. } => 7,
            Event::FirstReads { .. } => 8,
            Event::Posted(_) => 9,
            Event::LeftOpen(_) => 10,
        }
    }
}

/// An event and the exit it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The number of that exit.
    pub exits: u64,
    /// The event.
    pub event: Event,
}
