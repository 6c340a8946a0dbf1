//! How events become bytes.
//!
//! Events are written with postcard. Positions and registers are written as differences to what
//! came before within the same frame, which keeps them short; a frame starts afresh, so that it
//! can be read without the frames before it. Which vCPU an event is of is written where it is another
//! than that of the one before, so a machine with one vCPU pays nothing for it.

use hindsight_devices::{Input, Nanos};
use serde::{Deserialize, Serialize};

use super::event::{Event, Record};
use super::limits::EVENT_RAW_MAX;
use crate::machine::{
    Answer, End, Exit, FullDigest, LeftOpen, Moment, Place, Registers, Turn, Unit, VcpuNumber,
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
    /// No event by itself: the next one, and those of a vCPU after it, are of this vCPU.
    Vcpu(VcpuNumber),
}

impl Wire {
    fn is_of_a_vcpu(&self) -> bool {
        matches!(
            self,
            Wire::Turn { .. } | Wire::Interrupt { .. } | Wire::Preempted { .. }
        )
    }
}

fn append(frame: Vec<u8>, delta: u64, wire: &Wire) -> Vec<u8> {
    postcard::to_extend(&(delta, wire), frame).expect("a Vec takes everything")
}

/// What the differences of a frame refer to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Codec {
    exits: u64,
    vcpu: VcpuNumber,
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
    pub(crate) fn encode(&mut self, mut frame: Vec<u8>, record: &Record) -> Vec<u8> {
        let mut delta = record
            .exits
            .checked_sub(self.exits)
            .expect("events come in the order of exits");
        self.exits = record.exits;
        if let Some(vcpu) = record.event.vcpu()
            && vcpu != self.vcpu
        {
            self.vcpu = vcpu;
            frame = append(frame, delta, &Wire::Vcpu(vcpu));
            delta = 0;
        }
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
            Event::Preempted { place, .. } => Wire::Preempted {
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
        append(frame, delta, &wire)
    }

    /// Takes the next event off `frame`.
    pub(crate) fn decode(&mut self, frame: &mut &[u8]) -> Result<Record, postcard::Error> {
        // A length inside it that leads further than an event can be is refused before anything is
        // reserved for it.
        let event = &frame[..frame.len().min(EVENT_RAW_MAX)];
        let bad = || postcard::Error::DeserializeBadEncoding;
        let ((delta, mut wire), mut rest) = postcard::take_from_bytes::<(u64, Wire)>(event)?;
        self.exits = self.exits.checked_add(delta).ok_or_else(bad)?;
        if let Wire::Vcpu(vcpu) = wire {
            let ((delta, of_vcpu), after) = postcard::take_from_bytes::<(u64, Wire)>(rest)?;
            // Said as our writer says it: before an event of a vCPU, at its exit, and of no vCPU twice.
            if delta != 0 || vcpu == self.vcpu || !of_vcpu.is_of_a_vcpu() {
                return Err(bad());
            }
            self.vcpu = vcpu;
            (wire, rest) = (of_vcpu, after);
        }
        *frame = &frame[event.len() - rest.len()..];
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
                    vcpu: self.vcpu,
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
                    vcpu: self.vcpu,
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
                Event::Preempted {
                    vcpu: self.vcpu,
                    place: Place {
                        unit,
                        number,
                        rip: self.rip,
                    },
                }
            }
            Wire::Vcpu(_) => return Err(bad()),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn interrupt(exits: u64, vcpu: u8) -> Record {
        let at = Moment {
            exits,
            vcpu: VcpuNumber(vcpu),
            ..Moment::START
        };
        let event = Event::Interrupt { vector: 0x30, at };
        Record { exits, event }
    }

    fn time(exits: u64) -> Record {
        let event = Event::Time { ahead_ns: 1 };
        Record { exits, event }
    }

    fn encoded(records: &[Record]) -> Vec<u8> {
        let mut codec = Codec::default();
        let encode = |frame, record| codec.encode(frame, record);
        records.iter().fold(Vec::new(), encode)
    }

    fn decoded(mut frame: &[u8]) -> Result<Vec<Record>, postcard::Error> {
        let mut codec = Codec::default();
        let mut records = Vec::new();
        while !frame.is_empty() {
            records.push(codec.decode(&mut frame)?);
        }
        Ok(records)
    }

    #[test]
    fn a_vcpu_is_written_where_it_is_another_and_the_boot_vcpu_takes_no_byte() {
        let one = [time(1), interrupt(1, 0), interrupt(3, 0)];
        assert_eq!(
            encoded(&one),
            [1, 1, 2, 0, 3, 0x30, 0, 0, 0, 2, 3, 0x30, 0, 0, 0]
        );
        let several = [
            interrupt(1, 0),
            interrupt(2, 7),
            time(4),
            interrupt(4, 7),
            interrupt(4, 255),
            interrupt(5, 0),
        ];
        let frame = encoded(&several);
        let switch = |delta, vcpu| [delta, 11, vcpu, 0, 3, 0x30, 0, 0, 0];
        let expected = [
            &[1, 3, 0x30, 0, 0, 0][..],
            &switch(1, 7),
            &[2, 1, 2],
            &[0, 3, 0x30, 0, 0, 0],
            &switch(0, 255),
            &switch(1, 0),
        ];
        assert_eq!(frame, expected.concat());
        assert_eq!(decoded(&frame).unwrap(), several);
    }

    #[test]
    fn a_vcpu_that_is_said_otherwise_than_we_say_it_does_not_decode() {
        let interrupt = [0, 3, 0x30, 0, 0, 0];
        let wrong: [&[u8]; 6] = [
            // Nothing after it; the same as before; two of them; before what is of no vCPU; not at its exit.
            &[1, 11, 2],
            &[&[1, 11, 0], &interrupt[..]].concat(),
            &[&[1, 11, 2, 0, 11, 3], &interrupt[..]].concat(),
            &[1, 11, 2, 0, 1, 2],
            &[1, 11, 2, 1, 3, 0x30, 0, 0, 0],
            &[&[1, 11, 2], &interrupt[..], &[1, 11, 2], &interrupt[..]].concat(),
        ];
        for frame in wrong {
            assert!(decoded(frame).is_err(), "{frame:?}");
        }
    }
}
