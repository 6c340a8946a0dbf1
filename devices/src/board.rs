//! The board: which device answers which address, and how their lines are wired.
//!
//! A port access wider than a byte is what it is on an ISA bus, one access per byte at
//! neighbouring ports, low byte first. Where nobody answers the bus floats: reads are all
//! ones, writes go nowhere. That holds for the PCI configuration ports too, which is how a guest
//! learns that there is no PCI bus.
//!
//! What is where, and which line is whose, is in `wiring`. The guest masks what it does not use. The
//! 8259s interrupt the CPU by way of the local APIC's LINT0.

use serde::{Deserialize, Serialize};

use crate::acpi::Acpi;
use crate::chipset::{Chipset, PvPanic};
use crate::ioapic::IoApic;
use crate::lapic::{IA32_APIC_BASE, IA32_TSC_DEADLINE, Lapic, Time, X2APIC_FIRST, X2APIC_LAST};
use crate::msr::Msrs;
use crate::pic::Pic;
use crate::pit::{Irq0, Pit};
use crate::restore::RestoreError;
use crate::rtc::Rtc;
use crate::uart::Uart;
use crate::virtio::{Bus, Devices};
use crate::wiring::{
    self, CLOCK, CONSOLE, IO_APIC, IO_APIC_PINS, ISA_LINES, POWER, PortDevice, TIMER_GSI, TIMER_IRQ,
};
use crate::{
    Access, BusContext, Input, Nanos, Output, Ram, Reply, Reset, Room, StorageError, Width,
};

/// Byte writes to this port, the serial console's data, are posted: they take effect at the next exit, in their
/// order, so that a console costs no exit a byte. They bring nothing back, and what they bring about (the
/// transmitter is empty again) is asked for at another port.
pub const POSTED_PORT: u16 = CONSOLE.ports.first;
/// How many of them may wait; the next one exits.
pub const POSTED_MAX: usize = 1024;

/// The version of [`BoardState`] that this program writes and reads.
const VERSION: u32 = 5;

/// The machine the guest sees, apart from its CPU and memory.
#[derive(Clone, Debug)]
pub struct Board {
    now: Nanos,
    /// The earliest time at which a timer has something to do; the common
    /// [`advance`](Board::advance) only compares with it.
    due: Nanos,
    pic: Pic,
    ioapic: IoApic,
    lapic: Lapic,
    pit: Pit,
    rtc: Rtc,
    acpi: Acpi,
    uart: Uart,
    chipset: Chipset,
    msrs: Msrs,
    virtio: Bus,
}

/// Everything a [`Board`] is, as one value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardState {
    /// Which layout this is; [`Board::restore`] refuses all but its own.
    pub version: u32,
    now: Nanos,
    pic: Pic,
    ioapic: IoApic,
    lapic: Lapic,
    pit: Pit,
    rtc: Rtc,
    acpi: Acpi,
    uart: Uart,
    chipset: Chipset,
    msrs: Msrs,
    virtio: Bus,
}

impl BoardState {
    /// Guest time.
    pub fn now(&self) -> Nanos {
        self.now
    }

    /// Whether it is the state of a machine with these devices. What a device is must come from the machine's
    /// description alone: a disk that a state has made longer reaches past its image.
    pub fn is_of(&self, devices: &Devices) -> bool {
        self.virtio.is_of(devices)
    }
}

impl Board {
    /// The board at power-on, at guest time 0, with these virtio devices. Its clock shows 1970 until
    /// [`Input::WallClock`] arrives.
    pub fn new(devices: &Devices) -> Board {
        Board {
            now: 0,
            due: Nanos::MAX,
            pic: Pic::new(),
            ioapic: IoApic::new(),
            lapic: Lapic::new(),
            pit: Pit::new(),
            rtc: Rtc::new(),
            acpi: Acpi::new(),
            uart: Uart::new(),
            chipset: Chipset::new(),
            msrs: Msrs::new(),
            virtio: Bus::new(devices),
        }
    }

    /// Answers one access of the guest, at the time last told by
    /// [`advance`](Board::advance).
    ///
    /// # Errors
    ///
    /// The host failed a disk. The access is half done: the run cannot go on.
    pub fn access(
        &mut self,
        access: Access,
        context: &mut BusContext<'_>,
    ) -> Result<Reply, StorageError> {
        Ok(match access {
            Access::PortRead { port, width } => Reply::Value(self.read_ports(port, width)),
            Access::PortWrite { port, width, value } => {
                self.write_ports(port, width, value);
                Reply::Done
            }
            Access::MemoryRead { gpa, width } => self
                .virtio
                .read(gpa, width)
                .unwrap_or_else(|| Reply::Value(self.read_memory(gpa, width))),
            Access::MemoryWrite { gpa, width, value } => {
                if self.virtio.write(gpa, width, value, context)? {
                    self.wire_virtio();
                } else {
                    self.write_memory(gpa, width, value);
                }
                Reply::Done
            }
            Access::MsrRead { index } => match index {
                IA32_APIC_BASE | IA32_TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST => {
                    self.lapic.read_msr(index, self.now)
                }
                _ => self.msrs.read(index, self.now),
            },
            Access::MsrWrite { index, value } => self.write_msr(index, value),
        })
    }

    /// Something reaches the machine from outside. [`Input::Stop`] concerns whoever runs the
    /// board, not the board.
    pub fn accept(&mut self, input: Input, ram: &Ram) {
        match input {
            Input::WallClock { unix_seconds } => {
                self.rtc.set_wall_clock(unix_seconds, self.now);
                self.wire_clock();
            }
            Input::Console(bytes) => {
                self.uart.type_in(&bytes);
                self.wire_console();
            }
            Input::PowerButton => {
                self.acpi.press_power_button();
                self.wire_acpi();
            }
            Input::Stop => {}
            Input::VirtioConsole(_)
            | Input::Resize { .. }
            | Input::Frame(_)
            | Input::Entropy(_) => {
                self.virtio.accept(&input, ram);
                self.wire_virtio();
            }
        }
    }

    /// An exit has happened, at which the guest is known to have `got_on` with its programs, or not: timers that
    /// come faster than their handlers wait for that. Called at every exit, before [`Board::advance`].
    pub fn count_exit(&mut self, got_on: bool) {
        self.lapic.count_exit(got_on);
    }

    /// Guest time is now `now`: timers due by then have fired. Called at every exit.
    pub fn advance(&mut self, now: Nanos) {
        assert!(
            now >= self.now,
            "time ran backwards: {now} after {}",
            self.now
        );
        self.now = now;
        if now < self.due {
            return;
        }
        let irq0 = self.pit.advance(now);
        self.wire_timer(irq0);
        self.rtc.advance(now);
        self.wire_clock();
        self.acpi.advance(now);
        self.wire_acpi();
        self.lapic.advance(self.time());
        self.find_due();
    }

    /// Guest time.
    pub fn now(&self) -> Nanos {
        self.now
    }

    /// The earliest future time at which [`advance`](Board::advance) could raise an interrupt
    /// that the interrupt controllers' masks let through. Always later than
    /// [`now`](Board::now); any access can change it.
    pub fn deadline(&self) -> Option<Nanos> {
        let through_8259s = |irq| self.lapic.passes_extint() && self.pic.unmasked(irq);
        let through_apic = |gsi| self.ioapic.unmasked(gsi, &self.lapic);
        let reaches = |irq, gsi| through_8259s(irq) || through_apic(gsi);
        let timer = self.pit.next_rise();
        let timer = timer.filter(|_| reaches(TIMER_IRQ, TIMER_GSI));
        let clock = self.rtc.next_interrupt();
        let clock = clock.filter(|_| reaches(CLOCK.gsi, CLOCK.gsi));
        let acpi = self
            .acpi
            .next_interrupt()
            .filter(|_| reaches(POWER.gsi, POWER.gsi));
        // One that is due already and waits for exits may fire at the next.
        let own = self.lapic.next_interrupt();
        let own = own.and_then(|due| Some(due.max(self.now.checked_add(1)?)));
        [timer, clock, acpi, own].into_iter().flatten().min()
    }

    /// Whether an interrupt waits for the CPU.
    pub fn interrupt_pending(&self) -> bool {
        self.interrupt_of_8259s() || self.lapic.interrupt_pending()
    }

    /// The CPU's interrupt acknowledge cycle: the vector to deliver. Without a request, the
    /// spurious one of the local APIC, or of the 8259s if that is turned off.
    pub fn acknowledge(&mut self) -> u8 {
        // The 8259s' requests pass the local APIC without regard to its priorities, and first.
        if self.interrupt_of_8259s() || self.lapic.is_off() {
            self.pic.acknowledge()
        } else {
            self.lapic.acknowledge()
        }
    }

    /// What has left the machine since the last call.
    pub fn take_outputs(&mut self) -> Vec<Output> {
        let mut outputs = Vec::new();
        let serial = self.uart.take_output();
        if !serial.is_empty() {
            outputs.push(Output::Console(serial));
        }
        self.virtio.take_outputs(&mut outputs);
        outputs
    }

    /// What it is sensible to send in now.
    pub fn room(&self, ram: &Ram) -> Room {
        let mut room = Room {
            console: self.uart.room(),
            ..Room::default()
        };
        self.virtio.room(ram, &mut room);
        room
    }

    /// The first reset the guest asked for. The board itself goes on.
    pub fn reset_requested(&self) -> Option<Reset> {
        self.chipset.reset()
    }

    /// Whether the guest turned the machine off. The board itself goes on.
    pub fn powered_off(&self) -> bool {
        self.acpi.is_off()
    }

    /// What the guest wrote to the pvpanic port.
    pub fn guest_panicked(&self) -> Option<PvPanic> {
        self.chipset.panic()
    }

    /// What RDTSC reads now.
    pub fn time_stamp(&self) -> u64 {
        self.msrs.time_stamp(self.now)
    }

    /// What RDTSCP puts in ECX.
    pub fn tsc_aux(&self) -> u32 {
        self.msrs.tsc_aux()
    }

    /// The whole board as one value, output not yet taken included.
    pub fn save(&self) -> BoardState {
        BoardState {
            version: VERSION,
            now: self.now,
            pic: self.pic.clone(),
            ioapic: self.ioapic.clone(),
            lapic: self.lapic.clone(),
            pit: self.pit.clone(),
            rtc: self.rtc.clone(),
            acpi: self.acpi.clone(),
            uart: self.uart.clone(),
            chipset: self.chipset.clone(),
            msrs: self.msrs.clone(),
            virtio: self.virtio.clone(),
        }
    }

    /// The board that was saved.
    ///
    /// # Errors
    ///
    /// Another version's state, or one that no board could have been in.
    pub fn restore(state: BoardState) -> Result<Board, RestoreError> {
        if state.version != VERSION {
            return Err(RestoreError::Version {
                expected: VERSION,
                found: state.version,
            });
        }
        state.pic.check()?;
        state.ioapic.check()?;
        state.pit.check(state.now)?;
        state.rtc.check(state.now)?;
        state.acpi.check(state.now)?;
        state.lapic.check(Time {
            now: state.now,
            tsc: state.msrs.time_stamp(state.now),
        })?;
        state.uart.check()?;
        state.chipset.check()?;
        state.virtio.check()?;
        let mut board = Board {
            now: state.now,
            due: Nanos::MAX,
            pic: state.pic,
            ioapic: state.ioapic,
            lapic: state.lapic,
            pit: state.pit,
            rtc: state.rtc,
            acpi: state.acpi,
            uart: state.uart,
            chipset: state.chipset,
            msrs: state.msrs,
            virtio: state.virtio,
        };
        board.find_due();
        Ok(board)
    }

    /// Drives the line of a device's interrupt. The one way by which devices interrupt, apart from
    /// the timer.
    fn set_gsi(&mut self, gsi: u8, high: bool) {
        assert!(
            gsi < IO_APIC_PINS && gsi != TIMER_IRQ && gsi != TIMER_GSI,
            "no device is wired to GSI {gsi}"
        );
        if gsi < ISA_LINES {
            self.pic.set_line(gsi, high);
        }
        self.ioapic.set_line(gsi, high, &mut self.lapic);
    }

    fn interrupt_of_8259s(&self) -> bool {
        self.pic.interrupt_pending() && self.lapic.passes_extint()
    }

    fn time(&self) -> Time {
        Time {
            now: self.now,
            tsc: self.time_stamp(),
        }
    }

    fn read_memory(&mut self, gpa: u64, width: Width) -> u64 {
        if self.lapic.answers(gpa) && width == Width::Dword {
            u64::from(self.lapic.read_memory(gpa as u16 & 0xfff, self.now))
        } else if IO_APIC.contains(gpa) {
            self.ioapic.read(gpa, width)
        } else {
            width.ones()
        }
    }

    fn write_memory(&mut self, gpa: u64, width: Width, value: u64) {
        if self.lapic.answers(gpa) && width == Width::Dword {
            let time = self.time();
            let ended = self
                .lapic
                .write_memory(gpa as u16 & 0xfff, value as u32, time);
            self.wire_lapic(ended);
        } else if IO_APIC.contains(gpa) {
            self.ioapic.write(gpa, width, value, &mut self.lapic);
        }
    }

    fn write_msr(&mut self, index: u32, value: u64) -> Reply {
        match index {
            IA32_APIC_BASE | IA32_TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST => {
                let time = self.time();
                let (reply, ended) = self.lapic.write_msr(index, value, time);
                self.wire_lapic(ended);
                reply
            }
            _ => {
                let before = self.time_stamp();
                let reply = self.msrs.write(index, value, self.now);
                if self.time_stamp() != before {
                    let time = self.time();
                    self.lapic.move_tsc(time);
                    self.find_due();
                }
                reply
            }
        }
    }

    fn read_ports(&mut self, port: u16, width: Width) -> u64 {
        if floats(port, width) {
            return width.ones();
        }
        let bytes = 0..width.bytes() as u16;
        bytes.rev().fold(0, |value, byte| {
            value << 8 | u64::from(self.read_port(port.wrapping_add(byte)))
        })
    }

    fn write_ports(&mut self, port: u16, width: Width, value: u32) {
        if floats(port, width) {
            return;
        }
        for (byte, value) in value
            .to_le_bytes()
            .into_iter()
            .take(width.bytes())
            .enumerate()
        {
            self.write_port(port.wrapping_add(byte as u16), value);
        }
    }

    fn read_port(&mut self, port: u16) -> u8 {
        let value = wiring::port_device(port).and_then(|device| match device {
            PortDevice::Pic => self.pic.read(port),
            PortDevice::Pit => self.pit.read(port, self.now),
            PortDevice::Clock => {
                let value = self.rtc.read(port, self.now);
                self.wire_clock(); // reading register C lowers its line
                value
            }
            PortDevice::Console => {
                let value = self.uart.read((port - CONSOLE.ports.first) as u8);
                self.wire_console();
                Some(value)
            }
            PortDevice::Power => self.acpi.read(port, self.now),
            PortDevice::Chipset => self.chipset.read(port),
        });
        value.unwrap_or(0xff)
    }

    fn write_port(&mut self, port: u16, value: u8) {
        match wiring::port_device(port) {
            Some(PortDevice::Pic) => self.pic.write(port, value),
            Some(PortDevice::Pit) => {
                let irq0 = self.pit.write(port, value, self.now);
                self.wire_timer(irq0);
            }
            Some(PortDevice::Clock) => {
                self.rtc.write(port, value, self.now);
                self.wire_clock();
            }
            Some(PortDevice::Console) => {
                self.uart.write((port - CONSOLE.ports.first) as u8, value);
                self.wire_console();
            }
            Some(PortDevice::Power) => {
                self.acpi.write(port, value, self.now);
                self.wire_acpi();
            }
            Some(PortDevice::Chipset) => self.chipset.write(port, value),
            None => {}
        }
    }

    fn wire_timer(&mut self, irq0: Irq0) {
        match irq0 {
            Irq0::Unchanged => {}
            Irq0::Rose => {
                self.pic.pulse(TIMER_IRQ);
                self.ioapic.set_line(TIMER_GSI, false, &mut self.lapic);
                self.ioapic.set_line(TIMER_GSI, true, &mut self.lapic);
            }
            Irq0::Fell => {
                self.pic.set_line(TIMER_IRQ, false);
                self.ioapic.set_line(TIMER_GSI, false, &mut self.lapic);
            }
        }
        self.find_due();
    }

    fn wire_clock(&mut self) {
        self.set_gsi(CLOCK.gsi, self.rtc.interrupt_line());
        self.find_due();
    }

    fn wire_console(&mut self) {
        self.set_gsi(CONSOLE.gsi, self.uart.interrupt_line());
    }

    fn wire_acpi(&mut self) {
        self.set_gsi(POWER.gsi, self.acpi.interrupt_line());
        self.find_due();
    }

    /// The guest has written to the local APIC, which may have ended an interrupt, or may now accept
    /// what it did not.
    fn wire_lapic(&mut self, ended: Option<u8>) {
        match ended {
            Some(vector) => self.ioapic.end_of_interrupt(vector, &mut self.lapic),
            None => self.ioapic.send_levels(&mut self.lapic),
        }
        self.find_due();
    }

    fn wire_virtio(&mut self) {
        for slot in 0..self.virtio.count() {
            let (gsi, high) = self.virtio.line(slot);
            self.set_gsi(gsi, high);
        }
    }

    fn find_due(&mut self) {
        let timers = [
            self.pit.next_rise(),
            self.rtc.next_interrupt(),
            self.acpi.next_interrupt(),
            self.lapic.next_event(),
        ];
        self.due = timers.into_iter().flatten().min().unwrap_or(Nanos::MAX);
    }
}

/// Whether nobody answers this access as a whole.
///
/// The doublewords at 0xcf8 and 0xcfc belong to a PCI host bridge that is not there; only a
/// byte access reaches the reset control register, which lies under them at 0xcf9.
fn floats(port: u16, width: Width) -> bool {
    matches!(port, 0xcf5..=0xcff) && width != Width::Byte
}
