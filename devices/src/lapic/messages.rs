//! Interrupt messages on the bus between the APICs: what they say, and whom they reach. There is one
//! CPU, whose ID is 0.

use super::{ERROR_SEND_VECTOR, FIRST_VECTOR, Lapic};

/// How an interrupt message wants to be delivered, as bits 10:8 of an I/O APIC's entry say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// To all that are addressed, or to the one of them with the lowest priority: with one CPU the
    /// same.
    Fixed,
    /// SMI, NMI, INIT, start-up, ExtINT: not carried here.
    Other,
}

impl Delivery {
    /// From the three bits.
    pub(crate) fn from_bits(bits: u32) -> Delivery {
        match bits & 7 {
            0 | 1 => Delivery::Fixed,
            _ => Delivery::Other,
        }
    }
}

/// A message on the bus between the APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub vector: u8,
    pub delivery: Delivery,
    /// Whether `destination` is a set of logical IDs; else it is one ID.
    pub logical: bool,
    pub destination: u32,
    pub level: bool,
}

impl Lapic {
    /// SDM vol. 3, 11.6.2: whether a message is for this CPU, whose ID is 0.
    pub(super) fn is_addressed(&self, logical: bool, destination: u32) -> bool {
        if destination == 0xff || (self.is_x2apic() && destination == u32::MAX) {
            return true; // everybody
        }
        if !logical {
            return destination == 0;
        }
        if self.is_x2apic() {
            return destination >> 16 == 0 && destination & 1 != 0;
        }
        let (ours, theirs) = (u32::from(self.logical_id), destination);
        if self.format == 0xf {
            return ours & theirs != 0;
        }
        let cluster = theirs >> 4 == ours >> 4 || theirs >> 4 == 0xf;
        cluster && ours & theirs & 0xf != 0
    }

    /// Sends an IPI. There is nobody else, so it concerns this CPU or no one (SDM vol. 3, 11.6.1).
    pub(super) fn send(&mut self, command: u64) {
        let low = command as u32;
        if Delivery::from_bits(low >> 8) != Delivery::Fixed {
            return;
        }
        let destination = if self.is_x2apic() {
            (command >> 32) as u32
        } else {
            (command >> 56) as u32
        };
        let ours = match low >> 18 & 3 {
            0 => self.is_addressed(low & 1 << 11 != 0, destination),
            1 | 2 => true,
            _ => false, // all but oneself
        };
        if ours {
            self.send_to_self(low as u8);
        }
    }

    pub(super) fn send_to_self(&mut self, vector: u8) {
        if vector < FIRST_VECTOR {
            self.error(ERROR_SEND_VECTOR);
        } else if self.accepts() {
            self.request(vector, false);
        }
    }
}
