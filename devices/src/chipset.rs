//! The small ports: keyboard controller, resets, and the guest's word that it panicked.
//!
//! None of them knows the time or interrupts. The ways to reset a PC are all here: pulsing
//! the reset line through the 8042 (command 0xfe), the reset control register (Intel
//! 82371SB data sheet, 2.5.5), and the bit of the fast reset.

use serde::{Deserialize, Serialize};

use crate::Reset;
use crate::restore::{RestoreError, ensure};
use crate::wiring;

const KEYBOARD: u16 = wiring::KEYBOARD.first;
const FAST_RESET: u16 = wiring::FAST_RESET.first;
const RESET_CONTROL: u16 = wiring::RESET_CONTROL.first;
const PANIC: u16 = wiring::PANIC.first;

/// What the guest wrote to the pvpanic port (QEMU docs/specs/pvpanic.rst).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PvPanic {
    /// Bit 0: the kernel panicked.
    Panicked,
    /// Bit 1: the kernel panicked and goes on into its crash kernel.
    CrashLoaded,
}

/// What the status port of the 8042 reads: output buffer full (bit 0), input buffer empty
/// (bit 1).
///
/// There is no keyboard controller, and this is the quickest way to say so. Linux's probe
/// empties the output buffer, gives up after 16 bytes and reports "No controller found"; with
/// a status of 0 it would send a self-test and wait half a second for the answer, ten
/// thousand exits. Bit 1 must be clear: before a reset Linux waits for that.
const KEYBOARD_STATUS: u8 = 0x01;
const KEYBOARD_PULSE_RESET: u8 = 0xfe;
/// Port 0x92 at power-on: the A20 gate (bit 1) is open, as firmware leaves it.
const A20_OPEN: u8 = 0x02;
/// Reset control register: a hard or soft reset on a rising bit 2; bits 1 and 3 say how.
const RESET_CPU: u8 = 0x04;
const RESET_HOW: u8 = 0x0a;
/// Both pvpanic events are supported.
const PVPANIC_EVENTS: u8 = 0x03;

/// The small ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Chipset {
    port_92: u8,
    reset_control: u8,
    reset: Option<Reset>,
    panic: Option<PvPanic>,
}

impl Chipset {
    pub(crate) fn new() -> Chipset {
        Chipset {
            port_92: A20_OPEN,
            reset_control: 0,
            reset: None,
            panic: None,
        }
    }

    /// The first reset the guest asked for.
    pub(crate) fn reset(&self) -> Option<Reset> {
        self.reset
    }

    /// What the guest said about its health; once it has panicked, that stands.
    pub(crate) fn panic(&self) -> Option<PvPanic> {
        self.panic
    }

    /// Reads a port; `None` if it is not one of these.
    pub(crate) fn read(&self, port: u16) -> Option<u8> {
        match port {
            KEYBOARD => Some(KEYBOARD_STATUS),
            FAST_RESET => Some(self.port_92),
            RESET_CONTROL => Some(self.reset_control),
            PANIC => Some(PVPANIC_EVENTS),
            _ => None, // the keyboard's data, 0x60, floats
        }
    }

    /// Writes a port; others are ignored.
    pub(crate) fn write(&mut self, port: u16, value: u8) {
        match port {
            KEYBOARD if value == KEYBOARD_PULSE_RESET => self.ask_for(Reset::Keyboard),
            FAST_RESET => {
                self.port_92 = value & !1;
                if value & 1 != 0 {
                    self.ask_for(Reset::FastReset);
                }
            }
            RESET_CONTROL => {
                self.reset_control = value & RESET_HOW;
                if value & RESET_CPU != 0 {
                    self.ask_for(Reset::ControlRegister);
                }
            }
            PANIC if value & 1 != 0 => self.panic = Some(PvPanic::Panicked),
            PANIC if value & 2 != 0 => {
                self.panic.get_or_insert(PvPanic::CrashLoaded);
            }
            _ => {}
        }
    }

    /// Refuses a saved state that no sequence of accesses could have reached.
    pub(crate) fn check(&self) -> Result<(), RestoreError> {
        ensure("port 0x92", self.port_92 & 1 == 0)?;
        ensure(
            "reset control register",
            self.reset_control & !RESET_HOW == 0,
        )
    }

    fn ask_for(&mut self, reset: Reset) {
        self.reset.get_or_insert(reset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(port: u16, values: &[u8]) -> Chipset {
        let mut chipset = Chipset::new();
        for &value in values {
            chipset.write(port, value);
        }
        chipset
    }

    #[test]
    fn every_way_to_reset_a_pc_is_told_apart() {
        assert_eq!(after(0x64, &[0xd1, 0xfe]).reset(), Some(Reset::Keyboard));
        assert_eq!(
            after(0xcf9, &[0x02, 0x06]).reset(),
            Some(Reset::ControlRegister)
        );
        assert_eq!(after(0x92, &[0x03]).reset(), Some(Reset::FastReset));
        assert_eq!(after(0xcf9, &[0x02]).reset(), None);
        assert_eq!(after(0x92, &[0x02]).reset(), None);
    }

    #[test]
    fn linux_gives_up_on_the_keyboard_and_can_still_reset_through_it() {
        let status = Chipset::new().read(0x64).unwrap();
        assert_eq!(
            status & 1,
            1,
            "i8042_flush() finds data sixteen times and gives up"
        );
        assert_eq!(status & 2, 0, "kb_wait() returns at once");
    }

    #[test]
    fn a_panic_is_not_taken_back() {
        assert_eq!(after(0x505, &[2]).panic(), Some(PvPanic::CrashLoaded));
        assert_eq!(after(0x505, &[2, 1, 2]).panic(), Some(PvPanic::Panicked));
        assert_eq!(after(0x505, &[0xfc]).panic(), None);
    }
}
