//! How events become bytes.
//!
//! Events are written with postcard. Positions and registers are written as differences to what
//! came before within the same frame, which keeps them short; a frame starts afresh, so that it
//! can be read without the frames before it.

use hindsight_devices::{Input, Nanos};
use serde::{Deserialize, Serialize};

use super::event::{Event, Record};
use super::limits::EVENT_RAW_MAX;
use crate::machine::{
    Answer, End, Exit, FullDigest, LeftOpen, Moment, Place, Registers, Turn, Unit,
};

/// An event as it is written.
#[derive(Debug, Serialize, Deserialize)]
enum Wire {
    Turn {
        exit: Exit,
        answer: Answer,
        later_ns: u64,
        changed: u32,
        deltas: Vec<i64>,
    },
    Time {
        ahead_ns: i64,
    },
    Input(Input),
    /// At the exit itself or in a window that opened after it; `rip` against the RIP of the
    /// interrupt or preemption before.
    Interrupt {
        vector: u8,
        rip_delta: i64,
        branches: u64,
        rcx: u64,
    },
    Witness {
        check: [u8; 2],
    },
    State {
        digest: FullDigest,
    },
    End(Box<End>),
    /// `rip` against the RIP of the interrupt or preemption before.
    Preempted {
        unit: Unit,
        number: u64,
        rip_delta: i64,
    },
    FirstReads {
        check: [u8; 8],
    },
    Posted(Vec<u8>),
    LeftOpen(LeftOpen),
}

/// What the differences of a frame refer to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Codec {
    exits: u64,
    now: Nanos,
    rip: u64,
    registers: Registers,
}

impl Codec {
    /// A codec for a frame whose first event lies at or after `exits`.
    pub(crate) fn new(exits: u64) -> Codec {
        Codec {
            exits,
            ..Codec::default()
        }
    }

    /// Appends an event to `frame`.
    pub(crate) fn encode(&mut self, frame: Vec<u8>, record: &Record) -> Vec<u8> {
        let delta = record
            .exits
            .checked_sub(self.exits)
            .expect("events come in the order of exits");
        self.exits = record.exits;
        let wire = match &record.event {
            Event::Turn(turn) => self.wire_turn(turn),
            Event::Time { ahead_ns } => Wire::Time {
                ahead_ns: *ahead_ns,
            },
            Event::Input(input) => Wire::Input(input.clone()),
            Event::Interrupt { vector, at } => Wire::Interrupt {
                vector: *vector,
                rip_delta: self.rip_delta(at.rip),
                branches: at.branches,
                rcx: at.rcx,
            },
            Event::Witness { check } => Wire::Witness { check: *check },
            Event::State { digest } => Wire::State { digest: *digest },
            Event::End(end) => Wire::End(end.clone()),
            Event::Preempted(place) => Wire::Preempted {
                unit: place.unit,
                number: place.number,
                rip_delta: self.rip_delta(place.rip),
            },
            Event::FirstReads { check } => Wire::FirstReads {
                check: check.to_le_bytes(),
            },
            Event::Posted(bytes) => Wire::Posted(bytes.clone()),
            Event::LeftOpen(what) => Wire::LeftOpen(*what),
        };
        postcard::to_extend(&(delta, wire), frame).expect("a Vec takes everything")
    }

    /// Takes the next event off `frame`.
    pub(crate) fn decode(&mut self, frame: &mut &[u8]) -> Result<Record, postcard::Error> {
        // A length inside it that leads further than an event can be is refused before anything is
        // reserved for it.
        let event = &frame[..frame.len().min(EVENT_RAW_MAX)];
        let ((delta, wire), rest) = postcard::take_from_bytes::<(u64, Wire)>(event)?;
        *frame = &frame[event.len() - rest.len()..];
        let bad = || postcard::Error::DeserializeBadEncoding;
        self.exits = self.exits.checked_add(delta).ok_or_else(bad)?;
        let event = match wire {
            Wire::Turn {
                exit,
                answer,
                later_ns,
                changed,
                deltas,
            } => {
                self.now = self.now.checked_add(later_ns).ok_or_else(bad)?;
                if changed >> Registers::COUNT != 0 || deltas.len() != changed.count_ones() as usize
                {
                    return Err(bad());
                }
                let mut deltas = deltas.into_iter();
                for (i, register) in self.registers.0.iter_mut().enumerate() {
                    if changed & 1 << i != 0 {
                        *register = register.wrapping_add_signed(deltas.next().ok_or_else(bad)?);
                    }
                }
                let registers = self.registers;
                Event::Turn(Box::new(Turn {
                    exit,
                    answer,
                    now: self.now,
                    registers,
                }))
            }
            Wire::Time { ahead_ns } => Event::Time { ahead_ns },
            Wire::Input(input) => Event::Input(input),
            Wire::Interrupt {
                vector,
                rip_delta,
                branches,
                rcx,
            } => {
                self.rip = self.rip.wrapping_add_signed(rip_delta);
                let at = Moment {
                    exits: self.exits,
                    branches,
                    rip: self.rip,
                    rcx,
                };
                Event::Interrupt { vector, at }
            }
            Wire::Witness { check } => Event::Witness { check },
            Wire::State { digest } => Event::State { digest },
            Wire::End(end) => Event::End(end),
            Wire::FirstReads { check } => Event::FirstReads {
                check: u64::from_le_bytes(check),
            },
            Wire::Posted(bytes) => Event::Posted(bytes),
            Wire::LeftOpen(what) => Event::LeftOpen(what),
            Wire::Preempted {
                unit,
                number,
                rip_delta,
            } => {
                self.rip = self.rip.wrapping_add_signed(rip_delta);
                Event::Preempted(Place {
                    unit,
                    number,
                    rip: self.rip,
                })
            }
        };
        Ok(Record {
            exits: self.exits,
            event,
        })
    }

    fn rip_delta(&mut self, rip: u64) -> i64 {
        let delta = rip.wrapping_sub(self.rip).cast_signed();
        self.rip = rip;
        delta
    }

    fn wire_turn(&mut self, turn: &Turn) -> Wire {
        let mut changed = 0;
        let mut deltas = Vec::new();
        for (i, (new, old)) in turn.registers.0.iter().zip(&self.registers.0).enumerate() {
            if new != old {
                changed |= 1 << i;
                deltas.push(new.wrapping_sub(*old).cast_signed());
            }
        }
        let later_ns = turn.now - self.now;
        self.now = turn.now;
        self.registers = turn.registers;
        Wire::Turn {
            exit: turn.exit,
            answer: turn.answer,
            later_ns,
            changed,
            deltas,
        }
    }
}
