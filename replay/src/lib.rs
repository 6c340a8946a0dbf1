//! What a recording is.
//!
//! [`Machine`] is the one loop. [`Outside`] is the one door through which a host fact may reach the guest:
//! [`Live`] asks the world, [`Recorder`] writes the answers to a journal, [`Replayer`] reads them back and
//! stops at the first [`Divergence`]. [`Moment`] names a point in the guest's execution.
//!
//! [`Timeline`] brings a machine to any moment of its recording.
//!
//! `machine` knows neither journals nor what is on the other side of the door; `journal` does not know the
//! door.
#![forbid(unsafe_code)]
#![warn(unreachable_pub)]

mod door;
pub mod foreign;
mod journal;
mod machine;
pub mod rng;
mod timeline;

pub use door::{
    Chaos, Closed, Difference, Divergence, Live, Nobody, Patience, Recorder, Replayer,
    TOLERANCE_NS, Visits, WITNESS_EVERY, World, first_difference,
};
pub use journal::{
    Content, CounterFacts, DISK_BYTES_MAX, Detail, EVENT_RAW_MAX, Event, FRAME_HEAD_BYTES,
    FRAME_MAGIC, FRAME_PAYLOAD_MAX, FRAME_RAW_MAX, Frame, FrameHead, HEADER_MAX, Header, Host,
    Image, IndexEntry, JournalError, JournalReader, JournalWriter, KERNEL_BYTES_MAX, MAGIC,
    MEMORY_BYTES_MAX, MachineDescription, OperatorConsole, Record, RecordPlace, Records, Tail,
    TailReason, TrapCounts, VERSION,
};
pub use machine::{
    ARRIVALS_MAX, Ahead, Answer, Back, Closing, Complete, CoreOf, CoreState, Counter, Cpu,
    CpuDigest, CpuidEntry, CpuidTable, Digest, DigestError, End, Ending, Exit, ExitNumber,
    FullDigest, Guest, Horizon, JournalPlace, Lander, LeftOpen, Likeness, Machine, MachineState,
    MemoryDigest, Mode, Moment, Observer, Outside, Overshoot, PAGE_BYTES, PageBytes, PagePlace,
    Pages, Place, Position, Progress, QuickReads, Registers, ShownClock, StateDigest, StateError,
    StateOf, Stateful, Tally, TimeInstruction, TimeQuery, Turn, Unit, UnreadableState, VCPUS,
    VcpuNumber, Walk, WalkEnd, is_zero, memory, set_bits,
};

pub use timeline::{
    Anchor, Arrival, Changes, CheckpointHead, Checkpoints, Debuggable, HitKind, Mark,
    NOTES_BYTES_MAX, NoMoment, NoteTaker, Notes, Pace, PageSink, PageSource, Pause, Reverse,
    ReverseError, Stopped, Stretch, Target, Timeline, TravelError, When, is_mark_name,
};

/// Why a machine came to its end other than by the run's own ending.
pub type RunError<E> = machine::RunError<E, Closed>;
