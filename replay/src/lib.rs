//! What a recording is.
//!
//! [`Moment`] names a point in the guest's execution. [`Outside`] is the one door through which a
//! host fact may reach the guest: [`Live`] asks the world, [`Recorder`] writes the answers to a
//! journal, [`Replayer`] reads them back and stops at the first [`Divergence`]. [`Machine`] is the
//! one loop over them all.
#![forbid(unsafe_code)]

mod chaos;
mod cpuid;
mod digest;
mod divergence;
mod event;
mod exit;
mod frame;
mod header;
mod journal;
mod landing;
mod limits;
mod live;
mod machine;
mod moment;
mod outside;
mod quick;
mod recorder;
mod replayer;
pub mod rng;

pub use chaos::Chaos;
pub use cpuid::{CpuidEntry, CpuidTable};
pub use digest::{Digest, Likeness, MemoryDigest, PAGE_BYTES};
pub use divergence::{Difference, Divergence, first_difference};
pub use event::{End, Ending, Entry, Event, LeftOpen};
pub use exit::{Answer, Exit, Mode, Registers, TimeInstruction, Turn};
pub use frame::{Entries, FRAME_HEAD_BYTES, FRAME_MAGIC, Frame, FrameHead, IndexEntry};
pub use header::{
    Content, CounterFacts, DISK_BYTES_MAX, Detail, Header, Host, Image, KERNEL_BYTES_MAX,
    MEMORY_BYTES_MAX, Machine as MachineDescription, OperatorConsole, TrapCounts,
};
pub use journal::{JournalError, JournalReader, JournalWriter, MAGIC, Tail, TailReason, VERSION};
pub use landing::{Ahead, Counter, Horizon, Lander, Overshoot, Place, Unit, Walk, Went};
pub use limits::{ARRIVALS_MAX, EVENT_RAW_MAX, FRAME_PAYLOAD_MAX, FRAME_RAW_MAX, HEADER_MAX};
pub use live::{Live, Patience, TOLERANCE_NS};
pub use machine::{Back, Cpu, Machine, Observer, RunError, Tally};
pub use moment::{ExitNumber, Moment};
pub use outside::{Closed, Outside, Standing, TimeQuery, World};
pub use quick::{QuickReads, ShownClock};
pub use recorder::{Recorder, WITNESS_EVERY};
pub use replayer::Replayer;
