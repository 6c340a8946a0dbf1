//! What a journal may hold at most: the writer makes no more, and the reader believes no more.
//!
//! A journal may come from anybody. Each figure here is the most that a recorder of ours can come to, so
//! that a reader needs memory for one frame and one event, whatever a file claims.

use hindsight_devices::{FRAME_BYTES_MAX, Nanos};

use super::event::{Event, Record};
use crate::machine::{ARRIVALS_MAX, LeftOpen, VcpuNumber};

/// The longest event: an input that is the longest Ethernet frame, and what precedes its bytes.
pub const EVENT_RAW_MAX: usize = FRAME_BYTES_MAX + 64;
/// A frame with this many raw bytes is closed as soon as it can be.
pub(super) const FRAME_RAW_GOAL: usize = 256 << 10;
/// No frame holds more raw bytes than this; a larger claim is damage.
pub const FRAME_RAW_MAX: usize = 5 << 20;
/// What the raw bytes of the largest frame can become where they cannot be compressed: zstd's own bound
/// (`ZSTD_COMPRESSBOUND`).
pub const FRAME_PAYLOAD_MAX: usize = FRAME_RAW_MAX + (FRAME_RAW_MAX >> 8);
/// The head of a journal is no longer than this.
pub const HEADER_MAX: usize = 64 << 10;

/// The longest that a machine runs, in nanoseconds of guest time: 292 years.
pub(crate) const TIME_MAX: Nanos = Nanos::MAX / 2;

/// Events that there is at most one of between two places where a frame can be closed: `Preempted`, `Time`,
/// `FirstReads`, `Posted`, `Turn`, `Witness`, `Memory`, an `Interrupt`, `End`.
const SINGLE_EVENTS: usize = 9;
/// What is found to be left open is recorded once each, in a few bytes.
const LEFT_OPEN_BYTES: usize = LeftOpen::ALL.len() * 64;
// A frame below its goal takes one more exit, with all that can belong to one.
const _: () = assert!(
    FRAME_RAW_GOAL + (ARRIVALS_MAX + SINGLE_EVENTS) * EVENT_RAW_MAX + LEFT_OPEN_BYTES
        <= FRAME_RAW_MAX
);

/// Follows the events of a journal and refuses what no recorder says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// How many vCPUs the machine has.
    vcpus: u8,
    /// The exit of the last event.
    exits: u64,
    /// Inputs at that exit so far.
    arrivals: usize,
    /// The last event was the end.
    ended: bool,
}

impl Rules {
    /// Takes the next event, which is `raw_bytes` long as it is written.
    pub(super) fn admit(&mut self, record: &Record, raw_bytes: usize) -> Result<(), String> {
        let exits = record.exits;
        if self.ended {
            return Err("it has an event after the end".into());
        }
        if raw_bytes > EVENT_RAW_MAX {
            return Err(format!(
                "it has an event of {raw_bytes} bytes at exit {exits}, at most {EVENT_RAW_MAX} are possible"
            ));
        }
        if let Some(VcpuNumber(number)) = record.event.vcpu()
            && !VcpuNumber(number).is_among(self.vcpus)
        {
            return Err(format!(
                "it has an event of vCPU {number} at exit {exits}, and the machine has {}, counted from 0",
                self.vcpus
            ));
        }
        if exits != self.exits {
            self.arrivals = 0;
        }
        self.exits = exits;
        if let Event::Input(_) = record.event {
            self.arrivals += 1;
            if self.arrivals > ARRIVALS_MAX {
                return Err(format!(
                    "it has more than {ARRIVALS_MAX} inputs at exit {exits}, at most {ARRIVALS_MAX} reach a machine at one"
                ));
            }
        }
        if matches!(&record.event, Event::Posted(bytes) if bytes.is_empty()) {
            return Err(format!("it has posted writes of no bytes at exit {exits}"));
        }
        self.ended = matches!(record.event, Event::End(_));
        Ok(())
    }

    /// As they are where a frame begins after exit `exits`, of a machine with `vcpus` vCPUs: all inputs of an exit
    /// are in one frame.
    pub(super) fn at(exits: u64, vcpus: u8) -> Rules {
        Rules {
            vcpus,
            exits,
            arrivals: 0,
            ended: false,
        }
    }

    /// Whether the last event was the end.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }
}
