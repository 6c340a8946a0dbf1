//! The interrupt controllers of a PC: two 8259As, the second behind input 2 of the first.
//!
//! Sixteen request lines come in, one INTR line goes out to the CPU. Each chip has two ports, and
//! two more say which inputs sense levels (the EISA edge/level control registers; Intel 82371SB
//! data sheet, 2.5.6).

mod chip;

use serde::{Deserialize, Serialize};

use crate::restore::{RestoreError, ensure};
use crate::wiring::{PIC_FIRST, PIC_LEVELS, PIC_SECOND};
use chip::Chip;

const COMMAND_1: u16 = PIC_FIRST.first;
const MASK_1: u16 = PIC_FIRST.last();
const COMMAND_2: u16 = PIC_SECOND.first;
const MASK_2: u16 = PIC_SECOND.last();
const LEVELS_1: u16 = PIC_LEVELS.first;
const LEVELS_2: u16 = PIC_LEVELS.last();

/// The first chip's input that carries the second chip.
const CASCADE: u8 = 2;

/// ELCR bits a guest may set: the timer, the keyboard, the cascade, the RTC and the FPU
/// are edges by wiring (Intel 82371SB data sheet, 2.5.6).
const LEVEL_WRITABLE: [u8; 2] = [0xf8, 0xde];

/// Both 8259As and the wire between them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pic {
    first: Chip,
    second: Chip,
}

impl Pic {
    pub(crate) fn new() -> Pic {
        Pic {
            first: Chip::new(LEVEL_WRITABLE[0]),
            second: Chip::new(LEVEL_WRITABLE[1]),
        }
    }

    /// Drives request line `irq` (0 to 15, not 2) to `high`.
    pub(crate) fn set_line(&mut self, irq: u8, high: bool) {
        assert!(irq < 16 && irq != CASCADE, "no device is wired to IRQ{irq}");
        if irq < 8 {
            self.first.set_line(irq, high);
        } else {
            self.second.set_line(irq - 8, high);
            self.cascade();
        }
    }

    /// A new rising edge on line `irq`, whatever its level was; the line stays high.
    pub(crate) fn pulse(&mut self, irq: u8) {
        self.set_line(irq, false);
        self.set_line(irq, true);
    }

    /// Whether the masks let `irq` reach the CPU.
    pub(crate) fn unmasked(&self, irq: u8) -> bool {
        if irq < 8 {
            self.first.unmasked(irq)
        } else {
            self.second.unmasked(irq - 8) && self.first.unmasked(CASCADE)
        }
    }

    /// The INTR line.
    pub(crate) fn interrupt_pending(&self) -> bool {
        self.first.request().is_some()
    }

    /// An INTA cycle: the vector on the bus. With no request left, the first chip answers as
    /// IR7 and puts nothing in service (8259A data sheet, "Edge and level triggered modes").
    pub(crate) fn acknowledge(&mut self) -> u8 {
        let Some(irq) = self.first.acknowledge() else {
            return self.first.vector(7);
        };
        if irq != CASCADE || !self.first.has_slave(CASCADE) {
            return self.first.vector(irq);
        }
        let vector = match self.second.acknowledge() {
            Some(irq) => self.second.vector(irq),
            None => self.second.vector(7),
        };
        // INT drops during INTA, so that a second request after the first makes a new edge.
        self.first.set_line(CASCADE, false);
        self.cascade();
        vector
    }

    /// Reads one of the six ports; `None` if the port is not the controllers'.
    pub(crate) fn read(&mut self, port: u16) -> Option<u8> {
        let value = match port {
            COMMAND_1 | MASK_1 => self.first.read(port == MASK_1),
            COMMAND_2 | MASK_2 => self.second.read(port == MASK_2),
            LEVELS_1 => self.first.read_level(),
            LEVELS_2 => self.second.read_level(),
            _ => return None,
        };
        self.cascade(); // a poll acknowledges
        Some(value)
    }

    /// Writes one of the six ports; others are ignored.
    pub(crate) fn write(&mut self, port: u16, value: u8) {
        match port {
            COMMAND_1 | MASK_1 => self.first.write(port == MASK_1, value),
            COMMAND_2 | MASK_2 => self.second.write(port == MASK_2, value),
            LEVELS_1 => self.first.write_level(value),
            LEVELS_2 => self.second.write_level(value),
            _ => return,
        }
        self.cascade();
    }

    /// Refuses a saved state that no sequence of accesses could have reached.
    pub(crate) fn check(&self) -> Result<(), RestoreError> {
        self.first.check(LEVEL_WRITABLE[0])?;
        self.second.check(LEVEL_WRITABLE[1])?;
        let mut settled = self.clone();
        settled.cascade();
        ensure("8259A cascade", settled == *self)
    }

    /// The wire: the second chip's INT is the first chip's input 2.
    fn cascade(&mut self) {
        let high = self.second.request().is_some();
        self.first.set_line(CASCADE, high);
    }
}

#[cfg(test)]
mod tests;
