//! The I/O APIC: 24 request lines in, interrupt messages to the local APIC out.
//!
//! Written from the 82093AA data sheet (Intel 290566). Each pin has an entry of 64 bits in the
//! redirection table, which says what message it becomes. An edge is sent once, or lost on a masked
//! pin. A level is sent once it is accepted, which sets the entry's remote IRR; when the local APIC
//! tells the end of that vector, remote IRR falls, and a line that is still asserted is sent again.
//!
//! A line here is asserted or not; it has no voltage, so an entry's polarity is only kept. Carried
//! are fixed and lowest-priority interrupts. SMI, NMI, INIT and ExtINT entries send nothing: the
//! 8259s are wired to the local APIC itself.

use serde::{Deserialize, Serialize};

use crate::Width;
use crate::lapic::{Delivery, Lapic, Message};
use crate::restore::{RestoreError, ensure};
use crate::wiring::{IO_APIC, IO_APIC_PINS as PINS};

/// IOREGSEL, and IOWIN after it.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

/// 24 entries, version 0x11, without an EOI register.
const VERSION: u32 = 0x0017_0011;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Vector, delivery mode, destination mode, polarity, trigger mode, mask; the destination.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// The I/O APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IoApic {
    select: u8,
    /// Bits 27:24 of the ID register.
    id: u8,
    /// Which lines are asserted.
    lines: u32,
    pins: [u64; PINS as usize],
}

impl IoApic {
    /// At power-on: everything masked.
    pub(crate) fn new() -> IoApic {
        IoApic {
            select: 0,
            id: 0,
            lines: 0,
            pins: [MASKED; PINS as usize],
        }
    }

    /// Asserts or releases the line of `pin`.
    pub(crate) fn set_line(&mut self, pin: u8, asserted: bool, lapic: &mut Lapic) {
        assert!(pin < PINS, "the I/O APIC has no pin {pin}");
        let bit = 1 << pin;
        if asserted == (self.lines & bit != 0) {
            return;
        }
        self.lines ^= bit;
        if asserted {
            let entry = &mut self.pins[usize::from(pin)];
            if is_level(*entry) {
                send_level(entry, lapic);
            } else if *entry & MASKED == 0 {
                lapic.receive(message(*entry));
            }
        }
    }

    /// The local APIC has ended a level-triggered interrupt.
    pub(crate) fn end_of_interrupt(&mut self, vector: u8, lapic: &mut Lapic) {
        for entry in &mut self.pins {
            if is_level(*entry) && *entry as u8 == vector {
                *entry &= !REMOTE_IRR;
            }
        }
        self.send_levels(lapic);
    }

    /// Offers what is asserted and not yet accepted to a local APIC that may have changed its mind.
    pub(crate) fn send_levels(&mut self, lapic: &mut Lapic) {
        let mut lines = self.lines;
        while lines != 0 {
            let entry = &mut self.pins[lines.trailing_zeros() as usize];
            if is_level(*entry) {
                send_level(entry, lapic);
            }
            lines &= lines - 1;
        }
    }

    /// Whether an assertion of `pin` could become an interrupt of the CPU.
    pub(crate) fn unmasked(&self, pin: u8, lapic: &Lapic) -> bool {
        let entry = self.pins[usize::from(pin)];
        let sends = entry & MASKED == 0 && message(entry).delivery == Delivery::Fixed;
        sends && lapic.can_take(entry as u8)
    }

    /// Reads at `gpa`, which is one of its registers'. They are doublewords.
    pub(crate) fn read(&self, gpa: u64, width: Width) -> u64 {
        match (gpa - IO_APIC.gpa, width) {
            (SELECT, Width::Byte | Width::Dword) => self.select.into(),
            (WINDOW, Width::Dword) => self.read_register().into(),
            _ => width.ones(),
        }
    }

    /// Writes at `gpa`, which is one of its registers'.
    pub(crate) fn write(&mut self, gpa: u64, width: Width, value: u64, lapic: &mut Lapic) {
        match (gpa - IO_APIC.gpa, width) {
            (SELECT, Width::Byte | Width::Dword) => self.select = value as u8,
            (WINDOW, Width::Dword) => self.write_register(value as u32, lapic),
            _ => {}
        }
    }

    /// Refuses a saved state that no sequence of accesses could have reached.
    pub(crate) fn check(&self) -> Result<(), RestoreError> {
        ensure("I/O APIC ID", self.id <= 0xf)?;
        ensure("I/O APIC lines", self.lines >> PINS == 0)?;
        for entry in self.pins {
            ensure("I/O APIC entry", entry & !(WRITABLE | REMOTE_IRR) == 0)?;
            let expects_end = entry & REMOTE_IRR != 0;
            ensure("I/O APIC remote IRR", is_level(entry) || !expects_end)?;
        }
        Ok(())
    }

    fn read_register(&self) -> u32 {
        match self.select {
            0 | 2 => u32::from(self.id) << 24, // ID, and what it won the arbitration with
            1 => VERSION,
            _ => match self.half() {
                Some((pin, false)) => self.pins[pin] as u32,
                Some((pin, true)) => (self.pins[pin] >> 32) as u32,
                None => 0,
            },
        }
    }

    fn write_register(&mut self, value: u32, lapic: &mut Lapic) {
        if self.select == 0 {
            self.id = (value >> 24 & 0xf) as u8;
        }
        let Some((pin, high)) = self.half() else {
            return;
        };
        let entry = &mut self.pins[pin];
        let written = if high {
            *entry & 0xffff_ffff | u64::from(value) << 32
        } else {
            *entry & !0xffff_ffff | u64::from(value)
        };
        *entry = written & WRITABLE | *entry & REMOTE_IRR;
        if !is_level(*entry) {
            // Linux makes a pin an edge for a moment to end what its local APIC does not tell.
            *entry &= !REMOTE_IRR;
        } else if self.lines >> pin & 1 != 0 {
            send_level(entry, lapic);
        }
    }

    /// Which entry the selected register belongs to, and whether it is the high half.
    fn half(&self) -> Option<(usize, bool)> {
        let index = self.select.checked_sub(0x10)?;
        (index < 2 * PINS).then_some((usize::from(index / 2), index & 1 != 0))
    }
}

fn is_level(entry: u64) -> bool {
    entry & LEVEL != 0
}

/// Sends what an asserted, level-sensed pin asks for, unless it is masked or in service.
fn send_level(entry: &mut u64, lapic: &mut Lapic) {
    if *entry & (MASKED | REMOTE_IRR) == 0 && lapic.receive(message(*entry)) {
        *entry |= REMOTE_IRR;
    }
}

fn message(entry: u64) -> Message {
    Message {
        vector: entry as u8,
        delivery: Delivery::from_bits((entry >> 8) as u32),
        logical: entry & 1 << 11 != 0,
        destination: (entry >> 56) as u32,
        level: is_level(entry),
    }
}

#[cfg(test)]
mod tests;
