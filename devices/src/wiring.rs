//! The wiring: which ports, addresses and interrupt lines lead to which device.
//!
//! It is told here once. The board decodes accesses and drives lines by it; the ACPI tables, the CPU's
//! IA32_APIC_BASE and the layout of guest memory are made from it.
//!
//! A device's interrupt line has a number, its GSI (ACPI 6.5, 5.2.13). GSIs 0 to 15 lead to the
//! 8259s and to the I/O APIC's pin of that number, except that the timer, IRQ0 of the 8259s, is GSI
//! 2; GSIs 16 to 23 lead to the I/O APIC alone.

/// Neighbouring ports of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// The lowest.
    pub first: u16,
    /// How many.
    pub count: u16,
}

impl Ports {
    const fn new(first: u16, count: u16) -> Ports {
        assert!(count > 0 && first <= u16::MAX - (count - 1));
        Ports { first, count }
    }

    /// The highest.
    pub const fn last(self) -> u16 {
        self.first + (self.count - 1)
    }

    /// Whether `port` is one of them.
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last()
    }
}

/// A device's registers in guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// Where they begin.
    pub gpa: u64,
    /// How many bytes they take.
    pub bytes: u64,
}

impl Registers {
    /// Whether the byte at `gpa` is one of theirs.
    pub const fn contains(self, gpa: u64) -> bool {
        self.gpa <= gpa && gpa - self.gpa < self.bytes
    }
}

/// A device on the ISA bus. Its interrupt is edge-triggered and active high.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IsaDevice {
    /// Its ports.
    pub ports: Ports,
    /// Its interrupt.
    pub gsi: u8,
}

/// The fixed hardware of ACPI (ACPI 6.5, 4.8.3). Its interrupt is level-triggered and active high.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedHardware {
    /// PM1a event block: two ports of status, two of enables.
    pub event: Ports,
    /// PM1a control block.
    pub control: Ports,
    /// The timer, 32 bits wide.
    pub timer: Ports,
    /// The system control interrupt.
    pub gsi: u8,
}

/// Where a virtio device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Guest-physical address of its registers.
    pub gpa: u64,
    /// How many bytes they take.
    pub bytes: u64,
    /// Its interrupt: an input of the I/O APIC, level-triggered, active high.
    pub gsi: u8,
}

/// How many GSIs lead to the 8259s as well.
pub const ISA_LINES: u8 = 16;
/// How many there are: the I/O APIC's pins.
pub const IO_APIC_PINS: u8 = 24;

/// The 8259 that interrupts the CPU.
pub const PIC_FIRST: Ports = Ports::new(0x20, 2);
/// The 8259 behind it.
pub const PIC_SECOND: Ports = Ports::new(0xa0, 2);
/// Which inputs of either sense levels.
pub const PIC_LEVELS: Ports = Ports::new(0x4d0, 2);
/// The 8254: three counters, and their control.
pub const PIT: Ports = Ports::new(0x40, 4);
/// The system control port, which has the gate of the third counter.
pub const SYSTEM_CONTROL: Ports = Ports::new(0x61, 1);
/// The timer's input of the 8259s.
pub const TIMER_IRQ: u8 = 0;
/// The timer's pin of the I/O APIC; the 8259s have their cascade there.
pub const TIMER_GSI: u8 = 2;
/// The MC146818 clock: index and data.
pub const CLOCK: IsaDevice = IsaDevice {
    ports: Ports::new(0x70, 2),
    gsi: 8,
};
/// Which of the clock's registers has the century.
pub const CLOCK_CENTURY: u8 = 0x32;
/// The serial console, COM1.
pub const CONSOLE: IsaDevice = IsaDevice {
    ports: Ports::new(0x3f8, 8),
    gsi: 4,
};
/// Power button, soft-off, and the power-management timer.
pub const POWER: FixedHardware = FixedHardware {
    event: Ports::new(0x600, 4),
    control: Ports::new(0x604, 2),
    timer: Ports::new(0x608, 4),
    gsi: 9,
};
/// Status and commands of a keyboard controller that is not there, but for its way to reset the machine.
pub const KEYBOARD: Ports = Ports::new(0x64, 1);
/// The fast reset.
pub const FAST_RESET: Ports = Ports::new(0x92, 1);
/// The reset control register.
pub const RESET_CONTROL: Ports = Ports::new(0xcf9, 1);
/// Where a guest says that it panicked: pvpanic.
pub const PANIC: Ports = Ports::new(0x505, 1);

/// The local APIC's registers, until the guest moves them (Intel SDM vol. 3, 11.4.4).
pub const LOCAL_APIC: Registers = Registers {
    gpa: 0xfee0_0000,
    bytes: 0x1000,
};
/// The I/O APIC's registers (82093AA data sheet, 3.0).
pub const IO_APIC: Registers = Registers {
    gpa: 0xfec0_0000,
    bytes: 0x1000,
};

/// How many virtio devices there may be: one for each input of the I/O APIC that the ISA bus leaves.
pub const SLOTS_MAX: usize = (IO_APIC_PINS - ISA_LINES) as usize;
/// From one virtio device's registers to the next's: a page.
const SLOT_BYTES: u64 = 0x1000;
/// All virtio devices' registers: above all RAM below 4 GiB.
pub const VIRTIO: Registers = Registers {
    gpa: 0xd000_0000,
    bytes: SLOTS_MAX as u64 * SLOT_BYTES,
};

/// Where the virtio device of this number is.
pub fn slot(index: usize) -> Slot {
    assert!(index < SLOTS_MAX, "there is no slot {index}");
    Slot {
        gpa: VIRTIO.gpa + index as u64 * SLOT_BYTES,
        bytes: SLOT_BYTES,
        gsi: ISA_LINES + index as u8,
    }
}

/// The number of the virtio device whose registers would be at `gpa`, and where in them that is.
pub(crate) fn slot_at(gpa: u64) -> Option<(usize, u64)> {
    let offset = VIRTIO.contains(gpa).then(|| gpa - VIRTIO.gpa)?;
    Some(((offset / SLOT_BYTES) as usize, offset % SLOT_BYTES))
}

/// What a port leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortDevice {
    Pic,
    Pit,
    Clock,
    Console,
    Power,
    Chipset,
}

const PORT_DEVICES: [(Ports, PortDevice); 14] = [
    (PIC_FIRST, PortDevice::Pic),
    (PIC_SECOND, PortDevice::Pic),
    (PIC_LEVELS, PortDevice::Pic),
    (PIT, PortDevice::Pit),
    (SYSTEM_CONTROL, PortDevice::Pit),
    (CLOCK.ports, PortDevice::Clock),
    (CONSOLE.ports, PortDevice::Console),
    (POWER.event, PortDevice::Power),
    (POWER.control, PortDevice::Power),
    (POWER.timer, PortDevice::Power),
    (KEYBOARD, PortDevice::Chipset),
    (FAST_RESET, PortDevice::Chipset),
    (RESET_CONTROL, PortDevice::Chipset),
    (PANIC, PortDevice::Chipset),
];

/// The device at `port`, if there is one.
pub(crate) fn port_device(port: u16) -> Option<PortDevice> {
    let mut devices = PORT_DEVICES.iter();
    let (_, device) = devices.find(|(ports, _)| ports.contains(port))?;
    Some(*device)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_port_leads_to_two_devices() {
        let claimed = |port: &u16| {
            let owners = PORT_DEVICES
                .iter()
                .filter(|(ports, _)| ports.contains(*port));
            owners.count()
        };
        assert_eq!((0..=u16::MAX).map(|port| claimed(&port)).max(), Some(1));
        let ports: u16 = PORT_DEVICES.iter().map(|(ports, _)| ports.count).sum();
        let answered = (0..=u16::MAX).filter(|port| port_device(*port).is_some());
        assert_eq!(answered.count(), usize::from(ports));
    }

    #[test]
    fn each_device_has_a_line_of_its_own() {
        let fixed = [TIMER_GSI, CLOCK.gsi, CONSOLE.gsi, POWER.gsi];
        let lines = fixed
            .into_iter()
            .chain((0..SLOTS_MAX).map(|index| slot(index).gsi));
        let lines: Vec<u8> = lines.collect();
        assert!(
            lines
                .iter()
                .all(|gsi| *gsi < IO_APIC_PINS && *gsi != TIMER_IRQ)
        );
        assert_eq!(BTreeSet::from_iter(&lines).len(), lines.len());
    }

    #[test]
    fn registers_in_memory_lie_apart_and_below_4_gib() {
        let ends = [IO_APIC.gpa, LOCAL_APIC.gpa, 1 << 32];
        for (registers, end) in [VIRTIO, IO_APIC, LOCAL_APIC].into_iter().zip(ends) {
            assert!(registers.gpa + registers.bytes <= end);
        }
    }

    #[test]
    fn a_slots_registers_lead_to_that_slot() {
        for index in 0..SLOTS_MAX {
            let slot = slot(index);
            let last = slot.bytes - 1;
            assert_eq!(slot_at(slot.gpa), Some((index, 0)));
            assert_eq!(slot_at(slot.gpa + last), Some((index, last)));
        }
        assert_eq!(slot_at(VIRTIO.gpa - 1), None);
        assert_eq!(slot_at(VIRTIO.gpa + VIRTIO.bytes), None);
    }
}
