//! The MC146818 real-time clock and its CMOS RAM.
//!
//! The clock keeps one number, the civil seconds at a point of guest time, and works its
//! registers out of it. Only while the guest has stopped the updates (SET, register B bit 7)
//! are the time registers bytes that stand still. Interrupt flags come in by comparing the
//! present with when the clock was last looked at (MC146818 data sheet, "Interrupts"; the
//! periods belong to its 32.768 kHz time base).

mod alarm;
mod calendar;

use serde::{Deserialize, Serialize};

use crate::Nanos;
use crate::restore::{RestoreError, ensure};
use crate::wiring::{CLOCK, CLOCK_CENTURY};
use alarm::Alarm;
use calendar::{Civil, DAY_SECONDS, weekday};

/// Which register the other port is.
const INDEX: u16 = CLOCK.ports.first;
const DATA: u16 = CLOCK.ports.last();

const SECOND_NS: u128 = 1_000_000_000;
/// The divider chain's first stage.
const BASE_HZ: u128 = 32_768;
/// UIP rises this long before an update (MC146818 data sheet, "Update cycle": 244 us).
const UIP_NS: u128 = 244_000;
/// The first update after the divider is released comes half a second later.
const RELEASE_PHASE_NS: u64 = 500_000_000;
/// 9999-12-31 23:59:59, the last second four digits can show.
const LAST_SECOND: i64 = 253_402_300_799;

const CMOS_BYTES: usize = 128;
const REG_A: usize = 0x0a;
const REG_B: usize = 0x0b;
const REG_C: usize = 0x0c;
const REG_D: usize = 0x0d;
const CENTURY: usize = CLOCK_CENTURY as usize;

const B_SET: u8 = 0x80;
const B_BINARY: u8 = 0x04;
const B_24H: u8 = 0x02;
/// In both B (enable) and C (flag).
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATE: u8 = 0x10;

/// The chain that divides the crystal down to one pulse per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Divider {
    /// At `anchor` it was `phase` ns into a second.
    Running { anchor: Nanos, phase: u64 },
    /// Held in reset by register A: no updates, no periodic interrupts.
    Held,
}

/// The clock, its RAM and its index register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rtc {
    index: u8,
    /// Bit 7 of the index port. No device of this board raises an NMI; the bit is kept, as on a PC.
    nmi_masked: bool,
    cmos: Vec<u8>,
    /// Register C without IRQF.
    flags: u8,
    divider: Divider,
    /// Civil seconds during the second in which the divider was anchored (or is held).
    seconds: i64,
    /// What the guest's day of the week is ahead of the calendar's, 0 to 6.
    weekday_shift: u8,
    /// Flags are complete up to here.
    looked_at: Nanos,
    /// When IRQ8 rises next. Derived; kept because it is asked at every exit.
    next_interrupt: Option<Nanos>,
}

impl Rtc {
    pub(crate) fn new() -> Rtc {
        let mut cmos = vec![0; CMOS_BYTES];
        cmos[REG_A] = 0x26; // 32.768 kHz, 1024 Hz periodic rate: what PC firmware leaves
        cmos[REG_B] = B_24H;
        cmos[REG_D] = 0x80; // VRT: the battery is good
        Rtc {
            index: 0,
            nmi_masked: false,
            cmos,
            flags: 0,
            divider: Divider::Running {
                anchor: 0,
                phase: 0,
            },
            seconds: 0,
            weekday_shift: 0,
            looked_at: 0,
            next_interrupt: None,
        }
    }

    /// Sets the clock so that it showed `unix_seconds` at guest time 0.
    pub(crate) fn set_wall_clock(&mut self, unix_seconds: u64, now: Nanos) {
        self.catch_up(now);
        let seconds = unix_seconds.saturating_add(now / SECOND_NS as u64);
        self.seconds = i64::try_from(seconds).map_or(LAST_SECOND, |s| s.min(LAST_SECOND));
        if let Divider::Running { anchor, phase } = &mut self.divider {
            (*anchor, *phase) = (now, now % SECOND_NS as u64);
        }
        if self.frozen() {
            self.store_time(self.seconds);
        }
        self.find_next_interrupt(now);
    }

    /// The IRQ8 line: some flag is set whose interrupt is enabled.
    pub(crate) fn interrupt_line(&self) -> bool {
        self.flags & self.cmos[REG_B] & (PERIODIC | ALARM | UPDATE) != 0
    }

    /// When the IRQ8 line rises next; `None` while it is high or nothing is enabled.
    pub(crate) fn next_interrupt(&self) -> Option<Nanos> {
        self.next_interrupt
    }

    /// Lets time pass until `now`, cheap while nothing is due.
    pub(crate) fn advance(&mut self, now: Nanos) {
        if self.next_interrupt.is_some_and(|due| due <= now) {
            self.catch_up(now);
            self.find_next_interrupt(now);
        }
    }

    /// Reads the index or the data port; `None` if the port is not the clock's.
    pub(crate) fn read(&mut self, port: u16, now: Nanos) -> Option<u8> {
        match port {
            INDEX => Some(u8::from(self.nmi_masked) << 7 | self.index),
            DATA => Some(self.read_register(usize::from(self.index), now)),
            _ => None,
        }
    }

    /// Writes the index or the data port; others are ignored.
    pub(crate) fn write(&mut self, port: u16, value: u8, now: Nanos) {
        match port {
            INDEX => {
                self.nmi_masked = value & 0x80 != 0;
                self.index = value & 0x7f;
            }
            DATA => {
                self.catch_up(now);
                self.write_register(usize::from(self.index), value, now);
                self.find_next_interrupt(now);
            }
            _ => {}
        }
    }

    /// Refuses a saved state that no sequence of accesses could have reached by `now`.
    pub(crate) fn check(&self, now: Nanos) -> Result<(), RestoreError> {
        ensure("CMOS RAM size", self.cmos.len() == CMOS_BYTES)?;
        ensure("CMOS index", usize::from(self.index) < CMOS_BYTES)?;
        ensure("RTC register A", self.cmos[REG_A] & 0x80 == 0)?;
        ensure("RTC register D", self.cmos[REG_D] == 0x80)?;
        ensure(
            "RTC register C",
            self.flags & !(PERIODIC | ALARM | UPDATE) == 0,
        )?;
        ensure("RTC weekday", self.weekday_shift < 7)?;
        ensure("RTC seconds", self.seconds.unsigned_abs() < 1 << 42)?;
        ensure("RTC flags' time", self.looked_at <= now)?;
        let held = match self.divider {
            Divider::Held => true,
            Divider::Running { anchor, phase } => {
                let sane = anchor <= self.looked_at && u128::from(phase) < SECOND_NS;
                ensure("RTC divider", sane)?;
                false
            }
        };
        ensure("RTC divider", held == divider_held(self.cmos[REG_A]))?;
        let mut settled = self.clone();
        settled.find_next_interrupt(self.looked_at);
        ensure(
            "RTC next interrupt",
            settled.next_interrupt == self.next_interrupt,
        )
    }

    fn read_register(&mut self, register: usize, now: Nanos) -> u8 {
        match register {
            REG_A => self.cmos[REG_A] | u8::from(self.update_in_progress(now)) << 7,
            REG_C => {
                self.catch_up(now);
                let irqf = u8::from(self.interrupt_line()) << 7;
                let flags = irqf | self.flags;
                self.flags = 0;
                self.find_next_interrupt(now);
                flags
            }
            _ if is_time(register) && !self.frozen() => {
                self.time_register(register, self.seconds_at(now))
            }
            _ => self.cmos[register],
        }
    }

    fn write_register(&mut self, register: usize, value: u8, now: Nanos) {
        match register {
            REG_A => {
                let (was_held, held) = (divider_held(self.cmos[REG_A]), divider_held(value));
                self.cmos[REG_A] = value & 0x7f;
                if held && !was_held {
                    self.seconds = self.seconds_at(now);
                    self.divider = Divider::Held;
                } else if was_held && !held {
                    self.divider = Divider::Running {
                        anchor: now,
                        phase: RELEASE_PHASE_NS,
                    };
                }
            }
            REG_B => {
                let (was_frozen, freezes) = (self.frozen(), value & B_SET != 0);
                if freezes && !was_frozen {
                    self.store_time(self.seconds_at(now));
                }
                // Setting SET clears the update interrupt enable (MC146818 data sheet, "UIE").
                self.cmos[REG_B] = if freezes { value & !UPDATE } else { value };
                if was_frozen && !freezes {
                    self.load_time(now);
                }
            }
            REG_C | REG_D => {} // read-only
            _ if is_time(register) => {
                if !self.frozen() {
                    self.store_time(self.seconds_at(now));
                }
                self.cmos[register] = value;
                if !self.frozen() {
                    self.load_time(now);
                }
            }
            _ => self.cmos[register] = value,
        }
    }

    /// SET: updates are inhibited and the time registers are plain bytes.
    fn frozen(&self) -> bool {
        self.cmos[REG_B] & B_SET != 0
    }

    /// Nanoseconds since the anchored second began, or `None` with the divider held.
    fn position(&self, now: Nanos) -> Option<u128> {
        match self.divider {
            Divider::Running { anchor, phase } => {
                assert!(now >= anchor, "the clock was anchored in the future");
                Some(u128::from(phase) + u128::from(now - anchor))
            }
            Divider::Held => None,
        }
    }

    /// Civil seconds at `now` of a clock that is not frozen.
    fn seconds_at(&self, now: Nanos) -> i64 {
        // At most 584 years of nanoseconds: the quotient fits.
        self.seconds + (self.position(now).unwrap_or(0) / SECOND_NS) as i64
    }

    fn update_in_progress(&self, now: Nanos) -> bool {
        let ending = |position: u128| position % SECOND_NS >= SECOND_NS - UIP_NS;
        !self.frozen() && self.position(now).is_some_and(ending)
    }

    /// How far the periodic tap is from the first stage, or `None` if it is off.
    fn periodic_shift(&self) -> Option<u32> {
        match self.cmos[REG_A] & 0x0f {
            0 => None,
            // The two slowest selections repeat 256 Hz and 128 Hz (MC146818 data sheet, table 5).
            rate @ 1..=2 => Some(u32::from(rate) + 6),
            rate => Some(u32::from(rate) - 1),
        }
    }

    /// Sets the flags of what happened since the clock was last looked at.
    fn catch_up(&mut self, now: Nanos) {
        let since = std::mem::replace(&mut self.looked_at, now);
        assert!(now >= since, "the clock was looked at in the future");
        let (Some(from), Some(to)) = (self.position(since), self.position(now)) else {
            return;
        };
        if let Some(shift) = self.periodic_shift() {
            let periods = |position: u128| (position * BASE_HZ / SECOND_NS) >> shift;
            if periods(to) > periods(from) {
                self.flags |= PERIODIC;
            }
        }
        let seconds = (to / SECOND_NS - from / SECOND_NS) as i64;
        if self.frozen() || seconds == 0 {
            return;
        }
        self.flags |= UPDATE;
        let of_day = self.seconds_at(since).rem_euclid(DAY_SECONDS);
        if self
            .alarm()
            .and_then(|alarm| alarm.next_after(of_day))
            .is_some_and(|n| n <= seconds)
        {
            self.flags |= ALARM;
        }
    }

    /// Works out when IRQ8 rises, the flags being complete up to `now`.
    fn find_next_interrupt(&mut self, now: Nanos) {
        self.next_interrupt = self.next_interrupt_after(now);
        assert!(
            self.next_interrupt.is_none_or(|due| due > now),
            "a clock interrupt is overdue"
        );
    }

    fn next_interrupt_after(&self, now: Nanos) -> Option<Nanos> {
        let enabled = self.cmos[REG_B];
        if enabled & (PERIODIC | ALARM | UPDATE) == 0 || self.interrupt_line() {
            return None;
        }
        let Divider::Running { anchor, phase } = self.divider else {
            return None;
        };
        let position = self.position(now)?;
        let second = position / SECOND_NS;
        let periodic = self
            .periodic_shift()
            .filter(|_| enabled & PERIODIC != 0)
            .map(|shift| {
                let next = ((position * BASE_HZ / SECOND_NS) >> shift) + 1;
                ((next << shift) * SECOND_NS).div_ceil(BASE_HZ)
            });
        let runs = !self.frozen();
        let update = (runs && enabled & UPDATE != 0).then_some((second + 1) * SECOND_NS);
        let of_day = self.seconds_at(now).rem_euclid(DAY_SECONDS);
        let alarm = (runs && enabled & ALARM != 0)
            .then(|| self.alarm()?.next_after(of_day))
            .flatten()
            .map(|ahead| (second + ahead as u128) * SECOND_NS);
        let due = [periodic, update, alarm].into_iter().flatten().min()?;
        Nanos::try_from(u128::from(anchor) + due - u128::from(phase)).ok()
    }

    fn alarm(&self) -> Option<Alarm> {
        // The top two bits set mean "any" (MC146818 data sheet, "Alarm").
        let field = |register: usize, decoded: i64, end: i64| match self.cmos[register] {
            0xc0..=0xff => Some(None),
            _ => (decoded < end).then_some(Some(decoded)),
        };
        Some(Alarm {
            second: field(1, self.decode(self.cmos[1]), 60)?,
            minute: field(3, self.decode(self.cmos[3]), 60)?,
            hour: field(5, self.decode_hour(self.cmos[5]), 24)?,
        })
    }

    /// Writes the time registers' bytes: the moment they stop moving.
    fn store_time(&mut self, seconds: i64) {
        for register in (0..=REG_D)
            .chain([CENTURY])
            .filter(|&register| is_time(register))
        {
            self.cmos[register] = self.time_register(register, seconds);
        }
    }

    /// Starts counting from the time registers' bytes. Values out of range are brought into
    /// it: the data sheet leaves them undefined.
    fn load_time(&mut self, now: Nanos) {
        let byte = |register: usize, low: i64, high: i64| {
            self.decode(self.cmos[register]).clamp(low, high)
        };
        let seconds = Civil {
            year: byte(CENTURY, 0, 99) * 100 + byte(9, 0, 99),
            month: byte(8, 1, 12),
            day: byte(7, 1, 31),
            hour: self.decode_hour(self.cmos[4]).clamp(0, 23),
            minute: byte(2, 0, 59),
            second: byte(0, 0, 59),
        }
        .to_unix();
        let shown = byte(6, 1, 7) as u8 - 1;
        self.seconds = seconds;
        self.weekday_shift = (shown + 7 - weekday(self.seconds)) % 7;
        if let Some(position) = self.position(now) {
            let phase = (position % SECOND_NS) as u64;
            self.divider = Divider::Running { anchor: now, phase };
        }
    }

    /// A time register's byte at civil time `seconds`, in the format of register B.
    fn time_register(&self, register: usize, seconds: i64) -> u8 {
        let civil = Civil::from_unix(seconds);
        match register {
            0 => self.encode(civil.second),
            2 => self.encode(civil.minute),
            4 => self.encode_hour(civil.hour),
            6 => (weekday(seconds) + self.weekday_shift) % 7 + 1,
            7 => self.encode(civil.day),
            8 => self.encode(civil.month),
            9 => self.encode(civil.year.rem_euclid(100)),
            _ => self.encode(civil.year.div_euclid(100).rem_euclid(100)),
        }
    }

    fn encode(&self, value: i64) -> u8 {
        let value = value as u8;
        if self.cmos[REG_B] & B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, byte: u8) -> i64 {
        let byte = i64::from(byte);
        if self.cmos[REG_B] & B_BINARY != 0 {
            byte
        } else {
            (byte >> 4) * 10 + (byte & 0x0f)
        }
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.cmos[REG_B] & B_24H != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { 0x80 } else { 0 };
        pm | self.encode((hour + 11) % 12 + 1)
    }

    fn decode_hour(&self, byte: u8) -> i64 {
        if self.cmos[REG_B] & B_24H != 0 {
            return self.decode(byte);
        }
        let pm = i64::from(byte >> 7) * 12;
        self.decode(byte & 0x7f) % 12 + pm
    }
}

/// Whether `register` shows the time (the alarm's registers do not).
fn is_time(register: usize) -> bool {
    matches!(register, 0 | 2 | 4 | 6..=9 | CENTURY)
}

/// DV = 11x holds the divider in reset (MC146818 data sheet, table 4).
fn divider_held(register_a: u8) -> bool {
    register_a & 0x60 == 0x60
}

#[cfg(test)]
mod tests;
