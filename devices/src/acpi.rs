//! The fixed hardware of ACPI: power button, soft-off, and the power-management timer (ACPI 6.5,
//! 4.8.3).
//!
//! The machine is always in ACPI mode: there is no firmware with another one, so SCI_EN is wired to
//! 1 and the tables name no SMI command port. Of the sleeping states only soft-off exists.

use serde::{Deserialize, Serialize};

use crate::Nanos;
use crate::restore::{RestoreError, ensure};
use crate::wiring::POWER;

/// PM1a status, and enable two ports after it.
const PM1_EVENT: u16 = POWER.event.first;
const PM1_EVENT_LAST: u16 = POWER.event.last();
const PM1_CONTROL: u16 = POWER.control.first;
const PM1_CONTROL_LAST: u16 = POWER.control.last();
const PM_TIMER: u16 = POWER.timer.first;
const PM_TIMER_LAST: u16 = POWER.timer.last();

/// The sleep type that, with sleep enable, turns the machine off.
pub const SLEEP_TYPE_OFF: u8 = 5;

const TIMER_STATUS: u16 = 1 << 0;
const POWER_BUTTON: u16 = 1 << 8;
/// Events that can be enabled: the timer, the global lock, the button, the clock. The lock, which
/// nobody else takes, and the clock, which has no sleep to end, never happen; but Linux enables both.
const EVENTS: u16 = TIMER_STATUS | 1 << 5 | POWER_BUTTON | 1 << 10;

const SCI_ENABLE: u16 = 1 << 0;
const SLEEP_TYPE: u16 = 7 << 10;
const SLEEP_ENABLE: u16 = 1 << 13;

/// The timer's frequency in Hz.
const TICKS_PER_SECOND: u128 = 3_579_545;
const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// The fixed hardware.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Acpi {
    status: u16,
    enabled: u16,
    /// PM1 control: only the sleep type is kept.
    control: u16,
    /// How often the timer's highest bit had changed when that was last looked at.
    turns: u64,
    off: bool,
}

impl Acpi {
    pub(crate) fn new() -> Acpi {
        Acpi {
            status: 0,
            enabled: 0,
            control: 0,
            turns: 0,
            off: false,
        }
    }

    /// The system control interrupt.
    pub(crate) fn interrupt_line(&self) -> bool {
        self.status & self.enabled != 0
    }

    /// Whether the guest turned the machine off.
    pub(crate) fn is_off(&self) -> bool {
        self.off
    }

    /// Somebody presses the power button.
    pub(crate) fn press_power_button(&mut self) {
        self.status |= POWER_BUTTON;
    }

    /// Lets time pass until `now`.
    pub(crate) fn advance(&mut self, now: Nanos) {
        let turns = ticks(now) >> 31;
        if turns != self.turns {
            self.turns = turns;
            self.status |= TIMER_STATUS;
        }
    }

    /// When the timer makes an interrupt of its own: later than the time of the last `advance`.
    pub(crate) fn next_interrupt(&self) -> Option<Nanos> {
        let waits = self.enabled & TIMER_STATUS != 0 && self.status & TIMER_STATUS == 0;
        waits.then(|| time_of((self.turns + 1) << 31)).flatten()
    }

    /// Reads a port; `None` if it is not one of these.
    pub(crate) fn read(&mut self, port: u16, now: Nanos) -> Option<u8> {
        self.advance(now);
        let (register, byte) = match port {
            PM1_EVENT..=PM1_EVENT_LAST if port & 2 == 0 => (self.status.into(), port & 1),
            PM1_EVENT..=PM1_EVENT_LAST => (self.enabled.into(), port & 1),
            PM1_CONTROL..=PM1_CONTROL_LAST => ((self.control | SCI_ENABLE).into(), port & 1),
            PM_TIMER..=PM_TIMER_LAST => (ticks(now) as u32, port & 3),
            _ => return None,
        };
        Some((register >> (8 * byte)) as u8)
    }

    /// Writes a port; others are ignored.
    pub(crate) fn write(&mut self, port: u16, value: u8, now: Nanos) {
        self.advance(now);
        let shift = 8 * (port & 1);
        let value = u16::from(value) << shift;
        let others = !(0xff << shift);
        match port {
            PM1_EVENT..=PM1_EVENT_LAST if port & 2 == 0 => self.status &= !value,
            PM1_EVENT..=PM1_EVENT_LAST => {
                self.enabled = self.enabled & others | value & EVENTS;
            }
            PM1_CONTROL..=PM1_CONTROL_LAST => {
                self.control = (self.control & others | value) & SLEEP_TYPE;
                let kind = (self.control >> 10) as u8;
                self.off |= value & SLEEP_ENABLE != 0 && kind == SLEEP_TYPE_OFF;
            }
            _ => {}
        }
    }

    /// Refuses a saved state that no sequence of accesses could have reached by `now`.
    pub(crate) fn check(&self, now: Nanos) -> Result<(), RestoreError> {
        ensure(
            "PM1 status",
            self.status & !(TIMER_STATUS | POWER_BUTTON) == 0,
        )?;
        ensure("PM1 enable", self.enabled & !EVENTS == 0)?;
        ensure("PM1 control", self.control & !SLEEP_TYPE == 0)?;
        ensure("PM timer", self.turns <= ticks(now) >> 31)?;
        let future = self.next_interrupt().is_none_or(|next| next > now);
        ensure("PM timer interrupt", future)
    }
}

/// Ticks of the timer since power-on.
fn ticks(now: Nanos) -> u64 {
    // Below 2^64 * 3.6e6 / 1e9, so it fits.
    (u128::from(now) * TICKS_PER_SECOND / NANOS_PER_SECOND) as u64
}

/// The first nanosecond at which `tick` has come, if guest time reaches that far.
fn time_of(tick: u64) -> Option<Nanos> {
    Nanos::try_from((u128::from(tick) * NANOS_PER_SECOND).div_ceil(TICKS_PER_SECOND)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRESSED: u8 = (POWER_BUTTON >> 8) as u8;

    #[test]
    fn the_timer_counts_3_579545_mhz_of_guest_time() {
        let mut acpi = Acpi::new();
        for (now, expected) in [(0, 0), (279, 0), (280, 1), (1_000_000_000, 3_579_545)] {
            let bytes = [0, 1, 2, 3].map(|byte| acpi.read(PM_TIMER + byte, now).unwrap());
            assert_eq!(u32::from_le_bytes(bytes), expected, "at {now} ns");
        }
    }

    #[test]
    fn the_timer_says_when_its_highest_bit_has_changed() {
        let mut acpi = Acpi::new();
        acpi.write(PM1_EVENT + 2, 1, 0);
        let first = acpi.next_interrupt().expect("it is enabled");
        assert_eq!(first / 1_000_000_000, 599);
        acpi.advance(first - 1);
        assert!(!acpi.interrupt_line());
        acpi.advance(first);
        assert!(acpi.interrupt_line() && acpi.next_interrupt().is_none());
        acpi.write(PM1_EVENT, 1, first);
        assert!(!acpi.interrupt_line());
        assert!(acpi.next_interrupt().unwrap() > first + 599_000_000_000);
    }

    #[test]
    fn a_pressed_button_interrupts_who_listens_until_it_is_taken_note_of() {
        let mut acpi = Acpi::new();
        acpi.press_power_button();
        assert!(!acpi.interrupt_line(), "nobody listens yet");
        acpi.write(PM1_EVENT + 3, PRESSED, 0);
        assert!(acpi.interrupt_line());
        assert_eq!(acpi.read(PM1_EVENT + 1, 0), Some(PRESSED));
        acpi.write(PM1_EVENT, 0xff, 0);
        assert!(acpi.interrupt_line(), "that was the other byte");
        acpi.write(PM1_EVENT + 1, PRESSED, 0);
        assert!(!acpi.interrupt_line());
    }

    #[test]
    fn only_soft_off_turns_the_machine_off() {
        let mut acpi = Acpi::new();
        for kind in (0..8).filter(|kind| *kind != SLEEP_TYPE_OFF) {
            acpi.write(PM1_CONTROL + 1, kind << 2 | 0x20, 0);
            assert!(!acpi.is_off(), "sleep type {kind}");
        }
        acpi.write(PM1_CONTROL + 1, SLEEP_TYPE_OFF << 2, 0);
        assert!(!acpi.is_off(), "Linux writes the type first");
        acpi.write(PM1_CONTROL, 0xff, 0);
        assert!(!acpi.is_off(), "the other byte enables nothing");
        acpi.write(PM1_CONTROL + 1, SLEEP_TYPE_OFF << 2 | 0x20, 0);
        assert!(acpi.is_off());
        assert_eq!(acpi.read(PM1_CONTROL, 0), Some(1), "SCI_EN");
        assert_eq!(acpi.read(PM1_CONTROL + 1, 0), Some(SLEEP_TYPE_OFF << 2));
    }
}
