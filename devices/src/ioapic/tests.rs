use super::*;
use crate::lapic::Time;

const START: Time = Time { now: 0, tsc: 0 };

struct Bench {
    ioapic: IoApic,
    lapic: Lapic,
}

impl Bench {
    fn new() -> Bench {
        Bench {
            ioapic: IoApic::new(),
            lapic: Lapic::new(),
        }
    }

    fn write(&mut self, register: u8, value: u32) {
        let Bench { ioapic, lapic } = self;
        ioapic.write(IO_APIC.gpa, Width::Dword, register.into(), lapic);
        ioapic.write(IO_APIC.gpa + 0x10, Width::Dword, value.into(), lapic);
    }

    fn read(&mut self, register: u8) -> u32 {
        let Bench { ioapic, lapic } = self;
        ioapic.write(IO_APIC.gpa, Width::Dword, register.into(), lapic);
        ioapic.read(IO_APIC.gpa + 0x10, Width::Dword) as u32
    }

    /// Sets the low half of a pin's entry.
    fn set_pin(&mut self, pin: u8, low: u32) {
        self.write(0x10 + 2 * pin, low);
    }

    fn line(&mut self, pin: u8, asserted: bool) {
        self.ioapic.set_line(pin, asserted, &mut self.lapic);
    }

    fn end(&mut self) {
        if let Some(vector) = self.lapic.write_memory(0xb0, 0, START) {
            self.ioapic.end_of_interrupt(vector, &mut self.lapic);
        }
    }

    fn taken(&mut self) -> Option<u8> {
        let pending = self.lapic.interrupt_pending();
        pending.then(|| self.lapic.acknowledge())
    }
}

#[test]
fn it_says_what_it_is_and_keeps_what_may_be_written() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(1), 0x0017_0011);
    bench.write(0, 0xffff_ffff);
    assert_eq!((bench.read(0), bench.read(2)), (0x0f00_0000, 0x0f00_0000));
    for pin in 0..PINS {
        assert_eq!(bench.read(0x10 + 2 * pin), 0x1_0000, "masked at power-on");
        bench.write(0x10 + 2 * pin, 0xffff_ffff);
        bench.write(0x11 + 2 * pin, 0xffff_ffff);
        assert_eq!(bench.read(0x10 + 2 * pin), 0x0001_afff);
        assert_eq!(bench.read(0x11 + 2 * pin), 0xff00_0000);
    }
    assert_eq!(bench.read(0x40), 0, "there is no such register");
}

#[test]
fn an_edge_is_sent_once_and_lost_on_a_masked_pin() {
    let mut bench = Bench::new();
    bench.line(4, true);
    bench.set_pin(4, 0x34);
    assert_eq!(bench.taken(), None, "it came too early");
    bench.line(4, false);
    bench.line(4, true);
    bench.line(4, true);
    assert_eq!(bench.taken(), Some(0x34));
    bench.end();
    assert_eq!(bench.taken(), None);
    bench.line(4, false);
    bench.line(4, true);
    assert_eq!(bench.taken(), Some(0x34));
}

#[test]
fn a_level_comes_again_until_its_line_is_released() {
    let mut bench = Bench::new();
    bench.line(16, true);
    bench.set_pin(16, 0x8040);
    assert_eq!(bench.taken(), Some(0x40), "it waited for its pin");
    assert_eq!(bench.read(0x30), 0xc040, "remote IRR");
    assert_eq!(bench.taken(), None);
    bench.end();
    assert_eq!(bench.taken(), Some(0x40));
    bench.line(16, false);
    bench.end();
    assert_eq!(bench.taken(), None);
    assert_eq!(bench.read(0x30), 0x8040);
}

#[test]
fn a_level_masked_in_service_comes_again_when_unmasked() {
    // Linux's threaded handlers: masked, ended, and unmasked when the work is done.
    let mut bench = Bench::new();
    bench.set_pin(16, 0x8040);
    bench.line(16, true);
    assert_eq!(bench.taken(), Some(0x40));
    bench.set_pin(16, 0x1_8040);
    bench.end();
    assert_eq!(bench.taken(), None);
    bench.set_pin(16, 0x8040);
    assert_eq!(bench.taken(), Some(0x40));
}

#[test]
fn a_pin_made_an_edge_for_a_moment_forgets_that_it_was_in_service() {
    let mut bench = Bench::new();
    bench.set_pin(16, 0x8040);
    bench.line(16, true);
    assert_eq!(bench.taken(), Some(0x40));
    bench.set_pin(16, 0x1_0040);
    bench.set_pin(16, 0x8040);
    bench.lapic.write_memory(0xb0, 0, START);
    assert_eq!(bench.taken(), Some(0x40));
}

#[test]
fn a_level_waits_for_a_local_apic_that_accepts_nothing() {
    let mut bench = Bench::new();
    bench.lapic.write_memory(0xf0, 0xff, START);
    bench.set_pin(16, 0x8040);
    bench.line(16, true);
    assert!(!bench.ioapic.unmasked(16, &bench.lapic));
    bench.lapic.write_memory(0xf0, 0x1ff, START);
    bench.ioapic.send_levels(&mut bench.lapic);
    assert_eq!(bench.taken(), Some(0x40));
}

#[test]
fn what_is_for_another_cpu_or_of_another_kind_sends_nothing() {
    let mut bench = Bench::new();
    bench.write(0x11 + 2 * 5, 0x0100_0000);
    bench.set_pin(5, 0x35);
    for (pin, kind) in (6..).zip([2, 4, 5, 7]) {
        bench.set_pin(pin, 0x36 | kind << 8);
        assert!(!bench.ioapic.unmasked(pin, &bench.lapic));
    }
    (5..10).for_each(|pin| bench.line(pin, true));
    assert_eq!(bench.taken(), None);
    bench.line(5, false);
    bench.write(0x11 + 2 * 5, 0);
    bench.set_pin(5, 0x135); // lowest priority
    bench.line(5, true);
    assert_eq!(bench.taken(), Some(0x35));
}
