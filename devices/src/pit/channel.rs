//! One counter of the 8254: six modes, binary or BCD, a gate in and OUT out.
//!
//! Nothing ticks here. A counter remembers at which tick of the 1.193182 MHz oscillator it
//! was loaded and works out its count and its OUT for any later tick, so that a machine left
//! alone for an hour costs no more than one left alone for a microsecond. Ticks are numbered
//! from power-on. A count written at tick `t` is loaded at `t + 1`, on the next clock pulse
//! (8254 data sheet, "Mode definitions").

use serde::{Deserialize, Serialize};

use crate::restore::{RestoreError, ensure};

/// Which bytes of the count a guest reads and writes: RW1, RW0 of the control word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Bytes {
    Low,
    High,
    LowThenHigh,
}

/// What the counting element does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Run {
    /// Nothing loaded since the control word.
    Blank,
    /// Stopped by the gate, `position` ticks after the load.
    Held { position: u64 },
    /// Counting: at tick `anchor` it was `position` ticks after the load.
    Going { anchor: u64, position: u64 },
}

/// A transfer of the count register into the counting element, due at a tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Load {
    at: u64,
    /// Mode 3 only: the new count takes over in the low half of the square wave.
    low_half: bool,
}

/// One counter of the 8254.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Channel {
    mode: u8,
    bcd: bool,
    bytes: Bytes,
    gate: bool,
    /// The count register, 1 to 65536; 0 if none was written since the control word.
    register: u32,
    /// The count register holds what the counting element has not yet taken.
    null_count: bool,
    load: Option<Load>,
    /// What the counting element was loaded with.
    count: u32,
    run: Run,
    written_low: Option<u8>,
    reads_high_next: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    pub(super) fn new(gate: bool) -> Channel {
        Channel {
            mode: 0,
            bcd: false,
            bytes: Bytes::LowThenHigh,
            gate,
            register: 0,
            null_count: true,
            load: None,
            count: 0,
            run: Run::Blank,
            written_low: None,
            reads_high_next: false,
            latched_count: None,
            latched_status: None,
        }
    }

    /// The control word: a new mode, and no count until one is written.
    pub(super) fn control(&mut self, bytes: Bytes, mode: u8, bcd: bool) {
        // Modes 2 and 3 ignore the top bit (8254 data sheet, "Control word format").
        let mode = if mode & 2 != 0 { mode & 3 } else { mode };
        assert!(mode < 6, "the 8254 has no mode {mode}");
        *self = Channel {
            mode,
            bcd,
            bytes,
            ..Channel::new(self.gate)
        };
    }

    /// A byte of a new count.
    pub(super) fn write(&mut self, value: u8, tick: u64) {
        self.settle(tick);
        let raw = match (self.bytes, self.written_low.take()) {
            (Bytes::Low, _) => u16::from(value),
            (Bytes::High, _) => u16::from(value) << 8,
            (Bytes::LowThenHigh, Some(low)) => u16::from_le_bytes([low, value]),
            (Bytes::LowThenHigh, None) => {
                self.written_low = Some(value);
                if self.mode == 0 {
                    // Half a count stops mode 0, with OUT low at once.
                    self.run = Run::Blank;
                    self.load = None;
                }
                return;
            }
        };
        self.register = self.decode(raw);
        self.null_count = true;
        let next_pulse = Load {
            at: tick + 1,
            low_half: false,
        };
        match self.mode {
            0 => {
                self.run = Run::Blank;
                self.load = Some(next_pulse);
            }
            4 => self.load = Some(next_pulse),
            2 | 3 if self.load.is_none() => {
                self.load = match self.run {
                    Run::Blank => Some(next_pulse),
                    Run::Held { .. } => None, // the gate's rise will load it
                    Run::Going { anchor, position } => {
                        Some(self.turn_after(position + (tick - anchor), tick))
                    }
                };
            }
            _ => {} // modes 1 and 5 wait for the gate; modes 2 and 3 have a load coming
        }
    }

    /// Reads a byte: the latched status, else the latched count, else the count now.
    pub(super) fn read(&mut self, tick: u64) -> u8 {
        self.settle(tick);
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self
            .latched_count
            .unwrap_or_else(|| self.value(tick))
            .to_le_bytes();
        let reads_high = match self.bytes {
            Bytes::Low => false,
            Bytes::High => true,
            Bytes::LowThenHigh => self.reads_high_next,
        };
        self.reads_high_next = self.bytes == Bytes::LowThenHigh && !reads_high;
        if !self.reads_high_next {
            self.latched_count = None;
        }
        if reads_high { high } else { low }
    }

    /// Latches the count; a count latched earlier and not yet read stays.
    pub(super) fn latch_count(&mut self, tick: u64) {
        self.settle(tick);
        let value = self.value(tick);
        self.latched_count.get_or_insert(value);
    }

    /// Latches the status byte; one latched earlier and not yet read stays.
    pub(super) fn latch_status(&mut self, tick: u64) {
        self.settle(tick);
        let bytes = match self.bytes {
            Bytes::Low => 1,
            Bytes::High => 2,
            Bytes::LowThenHigh => 3,
        };
        let status = u8::from(self.out(tick)) << 7
            | u8::from(self.null_count) << 6
            | bytes << 4
            | self.mode << 1
            | u8::from(self.bcd);
        self.latched_status.get_or_insert(status);
    }

    /// Drives the gate: it starts one-shots and strobes, restarts the periodic modes and
    /// holds the others (8254 data sheet, "Gate pin operations summary").
    pub(super) fn set_gate(&mut self, gate: bool, tick: u64) {
        self.settle(tick);
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        let restarts = !matches!(self.mode, 0 | 4);
        match self.run {
            Run::Held { position } if gate && !restarts => {
                self.run = Run::Going {
                    anchor: tick,
                    position,
                };
            }
            Run::Going { anchor, position } if !gate && !matches!(self.mode, 1 | 5) => {
                self.run = Run::Held {
                    position: position + (tick - anchor),
                };
                if restarts {
                    self.load = None;
                }
            }
            Run::Held { .. } if !gate && restarts => self.load = None,
            _ => {}
        }
        if gate && restarts && self.register != 0 {
            self.load = Some(Load {
                at: tick + 1,
                low_half: false,
            });
        }
    }

    /// OUT at `tick`, with everything due by then done.
    pub(super) fn out_at(&mut self, tick: u64) -> bool {
        self.settle(tick);
        self.out(tick)
    }

    /// The first tick after `tick` at which OUT rises, if nobody touches the counter.
    pub(super) fn rise_after(&mut self, tick: u64) -> Option<u64> {
        self.settle(tick);
        let rise = self.rise_of_run(tick);
        let Some(load) = self.load else { return rise };
        if rise.is_some_and(|rise| rise < load.at) {
            return rise;
        }
        let mut loaded = self.clone();
        loaded.settle(load.at);
        if !self.out(load.at - 1) && loaded.out(load.at) {
            return Some(load.at);
        }
        loaded.rise_of_run(load.at)
    }

    /// Takes a load that is due by `tick`. Everything else is worked out on demand.
    pub(super) fn settle(&mut self, tick: u64) {
        let Some(load) = self.load.filter(|load| load.at <= tick) else {
            return;
        };
        assert!(self.register != 0, "a load is due but no count was written");
        self.load = None;
        self.null_count = false;
        self.count = self.register;
        let position = if load.low_half { self.high_ticks() } else { 0 };
        self.run = if self.gate || matches!(self.mode, 1 | 5) {
            Run::Going {
                anchor: load.at,
                position,
            }
        } else {
            Run::Held { position }
        };
    }

    /// Refuses a saved state that no sequence of accesses could have reached by `tick`.
    pub(super) fn check(&self, tick: u64, gate_wired: bool) -> Result<(), RestoreError> {
        // Far beyond what the ticks of 584 years add up to, far below overflow.
        const POSITION_MAX: u64 = 1 << 60;
        ensure("8254 mode", self.mode < 6)?;
        ensure("8254 gate", gate_wired || self.gate)?;
        ensure("8254 count register", self.register <= self.modulus())?;
        ensure("8254 count", self.count <= self.modulus())?;
        ensure(
            "8254 load",
            self.load
                .is_none_or(|load| self.register != 0 && load.at > 0),
        )?;
        ensure(
            "8254 load",
            self.load.is_none_or(|load| load.at <= tick + 0x2_0000),
        )?;
        ensure("8254 count", self.run == Run::Blank || self.count != 0)?;
        match self.run {
            Run::Blank => Ok(()),
            Run::Held { position } => ensure("8254 position", position < POSITION_MAX),
            Run::Going { anchor, position } => {
                ensure("8254 position", position < POSITION_MAX && anchor <= tick)
            }
        }
    }

    /// How many counts there are: the counter wraps, and a count of 0 means this many.
    fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    fn decode(&self, raw: u16) -> u32 {
        let mut value = u32::from(raw);
        if self.bcd {
            // Digits above 9 are not BCD; any meaning will do as long as it is always the same.
            value = [12, 8, 4, 0]
                .iter()
                .fold(0, |sum, shift| sum * 10 + (value >> shift & 0xf));
        }
        match value % self.modulus() {
            0 => self.modulus(),
            count => count,
        }
    }

    fn encode(&self, value: u32) -> u16 {
        let value = value % self.modulus();
        if !self.bcd {
            return value as u16;
        }
        [1000, 100, 10, 1]
            .iter()
            .fold(0, |word, unit| word << 4 | (value / unit % 10) as u16)
    }

    /// Ticks of the high half of the square wave: the longer half if the count is odd.
    fn high_ticks(&self) -> u64 {
        u64::from(self.count).div_ceil(2)
    }

    /// Ticks since the load.
    fn position(&self, tick: u64) -> Option<u64> {
        match self.run {
            Run::Blank => None,
            Run::Held { position } => Some(position),
            Run::Going { anchor, position } => Some(position + (tick - anchor)),
        }
    }

    /// The end of the current period (mode 2) or half period (mode 3), where a new count
    /// takes over.
    fn turn_after(&self, position: u64, tick: u64) -> Load {
        let count = u64::from(self.count);
        let into = position % count;
        let half = self.high_ticks();
        if self.mode == 3 && into < half && half < count {
            Load {
                at: tick + (half - into),
                low_half: true,
            }
        } else {
            Load {
                at: tick + (count - into),
                low_half: false,
            }
        }
    }

    /// The counting element at `tick`, as the guest reads it.
    fn value(&self, tick: u64) -> u16 {
        let Some(position) = self.position(tick) else {
            return 0;
        };
        let (count, modulus) = (u64::from(self.count), u64::from(self.modulus()));
        let value = match self.mode {
            2 => count - position % count,
            3 => {
                // It counts down by two, once for each half of the wave.
                let into = position % count;
                let half = self.high_ticks();
                let into_half = if into < half { into } else { into - half };
                (count & !1) - 2 * into_half
            }
            _ => (count + modulus - position % modulus) % modulus,
        };
        self.encode(value as u32)
    }

    fn out(&self, tick: u64) -> bool {
        let Some(position) = self.position(tick) else {
            return self.mode != 0;
        };
        let count = u64::from(self.count);
        match self.mode {
            0 | 1 => position >= count,
            2 | 3 if matches!(self.run, Run::Held { .. }) => true,
            2 => position % count != count - 1,
            3 => position % count < self.high_ticks(),
            _ => position != count,
        }
    }

    /// The next rise of OUT after `tick` that counting alone brings.
    fn rise_of_run(&self, tick: u64) -> Option<u64> {
        let Run::Going { anchor, position } = self.run else {
            return None;
        };
        assert!(anchor <= tick, "the counter was loaded in the future");
        let position = position + (tick - anchor);
        let count = u64::from(self.count);
        match self.mode {
            0 | 1 => (position < count).then(|| tick + (count - position)),
            // A count of 1 is not allowed in these modes; OUT then never moves.
            2 | 3 => (count > 1).then(|| tick + (count - position % count)),
            _ => (position <= count).then(|| tick + (count - position) + 1),
        }
    }
}
