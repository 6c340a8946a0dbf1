//! The machine, and the one loop over a vCPU, a board and the door.
//!
//! Recording, replaying and running bare are this loop over different doors. Nothing in it asks
//! which. The vCPU and the disks are lent to it, like the door; what else decides what happens next is
//! [`Machine`].

mod cpu;
mod cpuid_table;
mod digest;
mod ending;
mod exit;
mod full_digest;
mod guest;
mod landing;
mod left_open;
mod moment;
mod observer;
mod outside;
mod pages;
mod place;
mod quick_clock;
mod state;
mod turns;

use hindsight_devices::{Board, Devices, Nanos, Room, Storage, StorageError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use cpu::{Back, Cpu};
pub use cpuid_table::{CpuidEntry, CpuidTable};
pub use digest::{Digest, Likeness, MemoryDigest, PAGE_BYTES};
pub use ending::{End, Ending};
pub use exit::{Answer, Exit, Mode, Registers, TimeInstruction, Turn};
pub use full_digest::{CpuDigest, DigestError, FullDigest};
pub use guest::Guest;
pub use landing::{Ahead, Counter, Lander, Overshoot, Walk, WalkEnd};
pub use left_open::LeftOpen;
pub use moment::{ExitNumber, Moment, VCPUS, VcpuNumber};
pub use observer::Observer;
pub use outside::{Closing, Complete, JournalPlace, Outside, Position, TimeQuery};
pub use pages::{PageBytes, PagePlace, Pages, is_zero, memory, set_bits};
pub use place::{Horizon, Place, Unit};
pub use quick_clock::{QuickReads, ShownClock};
pub use state::{
    CoreOf, CoreState, MachineState, Progress, StateDigest, StateError, StateOf, Stateful,
    UnreadableState,
};
use turns::Turns;

/// How many inputs reach a machine at one exit; what more there is waits for the next one. Linux takes as
/// many frames at a time from a network card.
pub const ARRIVALS_MAX: usize = 64;

/// Why the loop came to its end other than by the run's own ending.
#[derive(Debug, Error)]
pub enum RunError<E: std::error::Error, D: Closing> {
    /// The host's virtual CPU failed.
    #[error("at {at}: {source}")]
    Cpu {
        /// The last counted exit.
        at: Moment,
        /// What happened.
        #[source]
        source: E,
    },
    /// The host failed a disk.
    #[error("at exit {exits}: {source}")]
    Storage {
        /// The exit that wanted something of it.
        exits: u64,
        /// What happened.
        #[source]
        source: StorageError,
    },
    /// The door closed.
    #[error("{0}")]
    Closed(D),
}

/// What was counted during a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Exits by [`Exit::kind`].
    pub exits: [u64; Exit::KINDS],
    /// Interrupts delivered.
    pub interrupts: u64,
    /// Of those, how many waited for the guest to open its window.
    pub windows: u64,
    /// How many were delivered where the guest had been preempted for them.
    pub preempted: u64,
    /// Instructions rewritten in loaded modules.
    pub module_sites: u64,
    /// Writes that were posted.
    pub posted: u64,
    /// What was found to be left open.
    pub left_open: Vec<LeftOpen>,
}

/// The guest has panicked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Panic {
    /// Guest time.
    since: Nanos,
    /// What it said of it.
    reason: String,
}

/// The machine: everything that decides what happens next, except the guest's own memory and CPU.
#[derive(Debug)]
pub struct Machine {
    devices: Devices,
    board: Board,
    cpuid: CpuidTable,
    ns_per_exit: u64,
    quick_reads: Option<QuickReads>,
    at: Moment,
    complete: Complete,
    /// Nothing of the guest has run since that exit.
    at_exit: bool,
    /// The last run was stopped at that exit, before an interrupt could be delivered there.
    stopped: bool,
    digest: Digest,
    halted: bool,
    /// What the board had room for at this exit, before it was answered.
    room: Room,
    panic: Option<Panic>,
    tally: Tally,
}

impl Machine {
    /// A machine at power-on, with these devices.
    pub fn new(devices: &Devices, cpuid: CpuidTable, ns_per_exit: u64) -> Machine {
        Machine {
            devices: devices.clone(),
            board: Board::new(devices),
            cpuid,
            ns_per_exit,
            quick_reads: None,
            at: Moment::START,
            complete: Complete::default(),
            at_exit: true,
            stopped: false,
            digest: Digest::default(),
            halted: false,
            room: Room::default(),
            panic: None,
            tally: Tally::default(),
        }
    }

    /// The same machine, whose kernel reads the time without exits if this says how.
    pub fn with_quick_reads(self, quick_reads: Option<QuickReads>) -> Machine {
        Machine {
            quick_reads,
            ..self
        }
    }

    /// Where the machine is.
    pub fn at(&self) -> Moment {
        self.at
    }

    /// Whether nothing of the guest has run since that exit.
    pub fn is_at_exit(&self) -> bool {
        self.at_exit
    }

    /// Guest time in nanoseconds.
    pub fn now(&self) -> Nanos {
        self.board.now()
    }

    /// The last exit that is complete: the one at [`Machine::at`], unless the run could not go on there.
    pub fn complete(&self) -> Complete {
        self.complete
    }

    /// The digest of everything so far.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// What was counted so far.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// The reason that the guest gave if it panicked.
    pub fn panic(&self) -> Option<&str> {
        self.panic.as_ref().map(|panic| &panic.reason[..])
    }

    /// The vCPU was given something else to execute: it is not halted any more.
    pub(crate) fn wake(&mut self) {
        self.halted = false;
    }

    /// Runs on until the run ends or the door closes. `storage` has the bytes of the machine's disks. A machine whose
    /// run was only stopped ([`Ending::Stopped`], [`Ending::StoppedRunning`]) can run on, as if it had not been.
    pub fn run<C: Cpu, O: Outside + ?Sized>(
        &mut self,
        cpu: &mut C,
        storage: &mut dyn Storage,
        outside: &mut O,
        observer: &mut dyn Observer,
    ) -> Result<End, RunError<C::Error, O::Closed>> {
        let mut turns = Turns {
            machine: self,
            cpu,
            storage,
            outside,
            observer,
        };
        turns.run()
    }
}
