//! One 8259A interrupt controller: eight request lines in, one INT line out.
//!
//! The chip is written from its data sheet (Intel 231468, "8259A Programmable Interrupt
//! Controller"). An edge-sensed request counts only while its line stays high: if the line
//! falls before the CPU acknowledges, the acknowledge cycle finds nobody and the chip answers
//! with its lowest vector slot, IR7, without marking anything in service (8259A data sheet,
//! "Edge and level triggered modes").

use serde::{Deserialize, Serialize};

use crate::restore::{RestoreError, ensure};

/// Where the chip stands in its initialisation sequence, ICW1 to ICW4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Step {
    /// Initialised (or never touched): writes to the odd port are the mask, OCW1.
    Ready,
    /// The vector base comes next.
    Icw2,
    /// The cascade wiring comes next.
    Icw3,
    /// The mode of the CPU and of EOI comes next.
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Chip {
    /// Levels of IR0..IR7 now.
    lines: u8,
    /// Rising edges seen and not yet acknowledged; each falls with its line.
    latched: u8,
    in_service: u8,
    mask: u8,
    /// T7..T3 of the vector, ICW2.
    vector_base: u8,
    /// The input with the lowest priority; the next one (cyclically) has the highest.
    lowest: u8,
    step: Step,
    wants_icw4: bool,
    single: bool,
    /// LTIM: every input is level-sensed.
    all_level: bool,
    /// ICW3: on the master, which inputs carry a slave.
    slaves: u8,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    /// SFNM: a slave in service may still interrupt with something more urgent.
    special_nesting: bool,
    special_mask: bool,
    /// OCW3 P: the next read is an acknowledge.
    poll: bool,
    reads_in_service: bool,
    /// Edge/level control register: a set bit makes that input level-sensed.
    level: u8,
    /// Which bits of `level` the chipset lets the guest set.
    level_writable: u8,
}

impl Chip {
    /// A chip at power-on, everything masked until the guest initialises it.
    ///
    /// The data sheet leaves the power-on mask undefined; all ones is the one choice that
    /// cannot deliver vector 0 to a guest that is not ready.
    pub(super) fn new(level_writable: u8) -> Chip {
        Chip {
            lines: 0,
            latched: 0,
            in_service: 0,
            mask: 0xff,
            vector_base: 0,
            lowest: 7,
            step: Step::Ready,
            wants_icw4: false,
            single: false,
            all_level: false,
            slaves: 0,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_nesting: false,
            special_mask: false,
            poll: false,
            reads_in_service: false,
            level: 0,
            level_writable,
        }
    }

    /// Drives input `irq` to `high`.
    pub(super) fn set_line(&mut self, irq: u8, high: bool) {
        assert!(irq < 8, "the 8259A has no input {irq}");
        let bit = 1 << irq;
        if high {
            self.latched |= bit & !self.lines;
            self.lines |= bit;
        } else {
            self.latched &= !bit;
            self.lines &= !bit;
        }
    }

    /// Whether the mask lets input `irq` through.
    pub(super) fn unmasked(&self, irq: u8) -> bool {
        self.step == Step::Ready && self.mask >> irq & 1 == 0
    }

    /// Whether input `irq` carries a slave, as ICW1 and ICW3 say.
    pub(super) fn has_slave(&self, irq: u8) -> bool {
        !self.single && self.slaves >> irq & 1 == 1
    }

    /// The input the chip would have served now: the INT line is high iff this is `Some`.
    pub(super) fn request(&self) -> Option<u8> {
        let asking = self.requests() & !self.mask;
        if asking == 0 || self.step != Step::Ready {
            return None;
        }
        let irq = self.most_urgent(asking)?;
        let asking_rank = self.rank(asking);
        // In special mask mode, a masked level in service holds nobody back.
        let blocking = if self.special_mask {
            self.in_service & !self.mask
        } else {
            self.in_service
        };
        let blocking_rank = self.rank(blocking);
        let nests = self.special_nesting && self.has_slave(irq) && asking_rank == blocking_rank;
        (asking_rank < blocking_rank || nests).then_some(irq)
    }

    /// The two INTA pulses: the input served, or `None` if the request went away (the chip
    /// then answers as if IR7 had asked, with nothing in service).
    pub(super) fn acknowledge(&mut self) -> Option<u8> {
        let irq = self.request()?;
        let bit = 1 << irq;
        self.latched &= !bit;
        if !self.auto_eoi {
            self.in_service |= bit;
        } else if self.rotate_on_auto_eoi {
            self.lowest = irq;
        }
        Some(irq)
    }

    /// The vector this chip puts on the bus for input `irq`.
    pub(super) fn vector(&self, irq: u8) -> u8 {
        self.vector_base | irq
    }

    /// Reads the even (`odd == false`) or the odd port.
    pub(super) fn read(&mut self, odd: bool) -> u8 {
        if self.poll {
            self.poll = false;
            // Poll word: bit 7 says whether anyone asked, bits 2-0 who.
            return self.acknowledge().map_or(0x07, |irq| 0x80 | irq);
        }
        match (odd, self.reads_in_service) {
            (true, _) => self.mask,
            (false, true) => self.in_service,
            (false, false) => self.requests(),
        }
    }

    /// Writes the even or the odd port.
    pub(super) fn write(&mut self, odd: bool, value: u8) {
        match (odd, value >> 3 & 3) {
            (true, _) => self.write_odd(value),
            (false, 0) => self.operate(value),
            (false, 1) => self.select(value),
            (false, _) => self.initialise(value),
        }
    }

    /// Reads the edge/level control register.
    pub(super) fn read_level(&self) -> u8 {
        self.level
    }

    /// Writes the edge/level control register.
    pub(super) fn write_level(&mut self, value: u8) {
        self.level = value & self.level_writable;
    }

    /// Refuses a saved state that no sequence of accesses could have reached.
    pub(super) fn check(&self, level_writable: u8) -> Result<(), RestoreError> {
        ensure("8259A edge latch", self.latched & !self.lines == 0)?;
        ensure("8259A vector base", self.vector_base & 7 == 0)?;
        ensure("8259A priority", self.lowest < 8)?;
        ensure("8259A level register", self.level & !level_writable == 0)?;
        ensure("8259A level wiring", self.level_writable == level_writable)
    }

    /// The interrupt request register.
    fn requests(&self) -> u8 {
        let level = if self.all_level { 0xff } else { self.level };
        (self.latched & !level) | (self.lines & level)
    }

    /// `bits`, turned so that the input with the highest priority is bit 0.
    fn by_priority(&self, bits: u8) -> u8 {
        bits.rotate_right(u32::from(self.lowest) + 1)
    }

    /// How far from the top the most urgent of `bits` is; 8 if there is none.
    fn rank(&self, bits: u8) -> u32 {
        self.by_priority(bits).trailing_zeros()
    }

    /// The most urgent input of `bits`.
    fn most_urgent(&self, bits: u8) -> Option<u8> {
        let rank = self.rank(bits) as u8;
        (rank < 8).then_some((self.lowest + 1 + rank) & 7)
    }

    /// ICW1: start again. The mask opens, the edge detectors forget, IR7 becomes the lowest.
    fn initialise(&mut self, icw1: u8) {
        let fresh = Chip::new(self.level_writable);
        *self = Chip {
            lines: self.lines,
            level: self.level,
            mask: 0,
            step: Step::Icw2,
            wants_icw4: icw1 & 0x01 != 0,
            single: icw1 & 0x02 != 0,
            all_level: icw1 & 0x08 != 0,
            vector_base: self.vector_base,
            ..fresh
        };
    }

    fn write_odd(&mut self, value: u8) {
        let after_icw3 = if self.wants_icw4 {
            Step::Icw4
        } else {
            Step::Ready
        };
        match self.step {
            Step::Ready => self.mask = value,
            Step::Icw2 => {
                self.vector_base = value & 0xf8;
                self.step = if self.single { after_icw3 } else { Step::Icw3 };
            }
            Step::Icw3 => {
                self.slaves = value;
                self.step = after_icw3;
            }
            Step::Icw4 => {
                self.auto_eoi = value & 0x02 != 0;
                self.special_nesting = value & 0x10 != 0;
                self.step = Step::Ready;
            }
        }
    }

    /// OCW2: end of interrupt and rotation (8259A data sheet, "Operation command words").
    fn operate(&mut self, ocw2: u8) {
        let level = ocw2 & 7;
        match ocw2 >> 5 {
            0b000 => self.rotate_on_auto_eoi = false,
            0b100 => self.rotate_on_auto_eoi = true,
            0b001 => {
                self.end_most_urgent();
            }
            0b101 => {
                if let Some(irq) = self.end_most_urgent() {
                    self.lowest = irq;
                }
            }
            0b011 => self.in_service &= !(1 << level),
            0b111 => {
                self.in_service &= !(1 << level);
                self.lowest = level;
            }
            0b110 => self.lowest = level,
            _ => {} // 010 is "no operation"
        }
    }

    /// Non-specific EOI. It passes over levels that special mask mode has masked.
    fn end_most_urgent(&mut self) -> Option<u8> {
        let candidates = if self.special_mask {
            self.in_service & !self.mask
        } else {
            self.in_service
        };
        let irq = self.most_urgent(candidates)?;
        self.in_service &= !(1 << irq);
        Some(irq)
    }

    /// OCW3: special mask mode, poll, and which register the even port reads.
    fn select(&mut self, ocw3: u8) {
        if ocw3 & 0x40 != 0 {
            self.special_mask = ocw3 & 0x20 != 0;
        }
        if ocw3 & 0x04 != 0 {
            self.poll = true;
        } else if ocw3 & 0x02 != 0 {
            self.reads_in_service = ocw3 & 0x01 != 0;
        }
    }
}
