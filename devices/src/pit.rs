//! The 8254 timer and the system control port that gates its third counter.
//!
//! Counter 0 drives IRQ0, counter 1 once refreshed the memory, counter 2 drives the speaker
//! and is how Linux measures other clocks. Beside the timer's own ports, the system control port
//! holds the third counter's gate and shows OUT2. The oscillator runs at 1.193182 MHz (a third of
//! the NTSC colour carrier); nanoseconds become ticks and back by exact integer arithmetic, rounded so that
//! at a deadline the event has happened.

mod channel;

use serde::{Deserialize, Serialize};

use crate::Nanos;
use crate::restore::{RestoreError, ensure};
use crate::wiring::{PIT, SYSTEM_CONTROL};
use channel::{Bytes, Channel};

const COUNTER_0: u16 = PIT.first;
const COUNTER_2: u16 = PIT.first + 2;
const COMMAND: u16 = PIT.last();
const CONTROL: u16 = SYSTEM_CONTROL.first;

/// Ticks of the oscillator per second.
const TICKS_PER_SECOND: u128 = 1_193_182;
const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// Half a period of the refresh toggle in the system control port: 18 ticks, 15.085 us.
const REFRESH_NS: Nanos = 15_085;

/// The last tick at or before `now`.
fn tick_at(now: Nanos) -> u64 {
    // Below 2^64 * 1.2e6 / 1e9, so it fits.
    (u128::from(now) * TICKS_PER_SECOND / NANOS_PER_SECOND) as u64
}

/// The first nanosecond at which `tick` has come, if guest time reaches that far.
fn time_of(tick: u64) -> Option<Nanos> {
    Nanos::try_from((u128::from(tick) * NANOS_PER_SECOND).div_ceil(TICKS_PER_SECOND)).ok()
}

/// What the guest or time did to the line from OUT0 to IRQ0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Irq0 {
    Unchanged,
    /// OUT0 rose, however often: the line is high, with a new edge.
    Rose,
    /// The guest reprogrammed counter 0 and OUT0 is low.
    Fell,
}

/// The timer and the system control port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pit {
    channels: [Channel; 3],
    /// The system control port, the bits a guest can set: 0 gate 2, 1 speaker, 2 and 3 NMI enables.
    control: u8,
    /// When OUT0 rises next. Derived from the channel; kept because it is asked at every exit.
    next_rise: Option<Nanos>,
}

impl Pit {
    pub(crate) fn new() -> Pit {
        Pit {
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            control: 0,
            next_rise: None,
        }
    }

    /// When OUT0 rises next: always later than the time of the last call.
    pub(crate) fn next_rise(&self) -> Option<Nanos> {
        self.next_rise
    }

    /// Lets time pass until `now`.
    ///
    /// OUT0 falling on its own does not withdraw IRQ0. Guest time moves in jumps, and a rise
    /// and a fall may lie in the same jump: the request stands until it is acknowledged or
    /// the guest reprograms the counter.
    pub(crate) fn advance(&mut self, now: Nanos) -> Irq0 {
        if self.next_rise.is_none_or(|rise| rise > now) {
            return Irq0::Unchanged;
        }
        self.find_next_rise(now);
        Irq0::Rose
    }

    /// Reads a port; `None` if it is not the timer's.
    pub(crate) fn read(&mut self, port: u16, now: Nanos) -> Option<u8> {
        let tick = tick_at(now);
        match port {
            COUNTER_0..=COUNTER_2 => Some(self.channels[usize::from(port - COUNTER_0)].read(tick)),
            CONTROL => {
                let refresh = ((now / REFRESH_NS) & 1) as u8;
                let out2 = u8::from(self.channels[2].out_at(tick));
                Some(self.control | refresh << 4 | out2 << 5)
            }
            _ => None, // the command port cannot be read
        }
    }

    /// Writes a port; others than the timer's are ignored.
    pub(crate) fn write(&mut self, port: u16, value: u8, now: Nanos) -> Irq0 {
        let tick = tick_at(now);
        let out0_before = self.channels[0].out_at(tick);
        let touched = match port {
            COUNTER_0..=COUNTER_2 => {
                self.channels[usize::from(port - COUNTER_0)].write(value, tick);
                port == COUNTER_0
            }
            COMMAND => self.command(value, tick),
            CONTROL => {
                self.control = value & 0x0f;
                self.channels[2].set_gate(value & 1 != 0, tick);
                false
            }
            _ => false,
        };
        if !touched {
            return Irq0::Unchanged;
        }
        self.find_next_rise(now);
        match (out0_before, self.channels[0].out_at(tick)) {
            (_, false) => Irq0::Fell,
            (false, true) => Irq0::Rose,
            (true, true) => Irq0::Unchanged,
        }
    }

    /// Refuses a saved state that no sequence of accesses could have reached by `now`.
    pub(crate) fn check(&self, now: Nanos) -> Result<(), RestoreError> {
        let tick = tick_at(now);
        for (index, channel) in self.channels.iter().enumerate() {
            channel.check(tick, index == 2)?;
        }
        ensure("port 0x61", self.control & 0xf0 == 0)?;
        let mut settled = self.clone();
        settled.find_next_rise(now);
        ensure("8254 next edge", settled.next_rise == self.next_rise)
    }

    /// Port 0x43: a control word, a counter latch or a read-back. Says whether counter 0 has a
    /// new mode.
    fn command(&mut self, value: u8, tick: u64) -> bool {
        let select = usize::from(value >> 6);
        let bytes = match value >> 4 & 3 {
            _ if select == 3 => {
                self.read_back(value, tick);
                return false;
            }
            0 => {
                self.channels[select].latch_count(tick);
                return false;
            }
            1 => Bytes::Low,
            2 => Bytes::High,
            _ => Bytes::LowThenHigh,
        };
        self.channels[select].control(bytes, value >> 1 & 7, value & 1 != 0);
        select == 0
    }

    /// The read-back command: bits 5 and 4 are active low.
    fn read_back(&mut self, value: u8, tick: u64) {
        for (index, channel) in self.channels.iter_mut().enumerate() {
            if value >> (index + 1) & 1 == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                channel.latch_count(tick);
            }
            if value & 0x10 == 0 {
                channel.latch_status(tick);
            }
        }
    }

    fn find_next_rise(&mut self, now: Nanos) {
        self.next_rise = self.channels[0].rise_after(tick_at(now)).and_then(time_of);
        assert!(
            self.next_rise.is_none_or(|rise| rise > now),
            "a rise of OUT0 lies in the past"
        );
    }
}

#[cfg(test)]
mod tests;
