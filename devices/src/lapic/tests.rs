use super::*;

const TPR: u16 = 0x80;
const PPR: u16 = 0xa0;
const EOI: u16 = 0xb0;
const LDR: u16 = 0xd0;
const DFR: u16 = 0xe0;
const SVR: u16 = 0xf0;
const ISR: u16 = 0x100;
const IRR: u16 = 0x200;
const ESR: u16 = 0x280;
const ICR: u16 = 0x300;
const ICR_HIGH: u16 = 0x310;
const LVT_TIMER: u16 = 0x320;
const LVT0: u16 = 0x350;
const LVT_ERROR: u16 = 0x370;
const INITIAL: u16 = 0x380;
const CURRENT: u16 = 0x390;
const DIVIDE: u16 = 0x3e0;

const PERIODIC: u32 = 1 << 17;
const DEADLINE: u32 = 2 << 17;

/// An APIC, the time, and a TSC that is `ahead` of it.
struct Bench {
    lapic: Lapic,
    now: Nanos,
    ahead: u64,
}

impl Bench {
    fn new() -> Bench {
        Bench {
            lapic: Lapic::new(),
            now: 1_000,
            ahead: 0,
        }
    }

    fn time(&self) -> Time {
        Time {
            now: self.now,
            tsc: self.now.wrapping_add(self.ahead),
        }
    }

    fn write(&mut self, offset: u16, value: u32) -> Option<u8> {
        self.lapic.write_memory(offset, value, self.time())
    }

    fn read(&mut self, offset: u16) -> u32 {
        self.lapic.read_memory(offset, self.now)
    }

    fn wrmsr(&mut self, index: u32, value: u64) -> Reply {
        self.lapic.write_msr(index, value, self.time()).0
    }

    fn rdmsr(&mut self, index: u32) -> Reply {
        self.lapic.read_msr(index, self.now)
    }

    /// So long after, at an exit of a guest that has got on.
    fn wait(&mut self, ns: Nanos) {
        self.lapic.count_exit(true);
        self.now += ns;
        self.lapic.advance(self.time());
    }

    /// So long after, at an exit that shows nothing.
    fn exit(&mut self, ns: Nanos) {
        self.lapic.count_exit(false);
        self.now += ns;
        self.lapic.advance(self.time());
    }

    fn receive(&mut self, vector: u8) -> bool {
        self.lapic.receive(fixed(vector))
    }

    fn turn_x2apic_on(&mut self) {
        assert_eq!(self.wrmsr(0x1b, 0xfee0_0d00), Reply::Done);
    }
}

fn fixed(vector: u8) -> Message {
    Message {
        vector,
        delivery: Delivery::Fixed,
        logical: false,
        destination: 0,
        level: false,
    }
}

#[test]
fn firmware_leaves_it_in_virtual_wire_mode() {
    let mut bench = Bench::new();
    assert!(bench.lapic.passes_extint() && bench.lapic.accepts());
    assert_eq!(bench.read(0x20), 0, "the boot processor's ID");
    assert_eq!(bench.read(0x30), 0x0005_0014);
    assert_eq!(bench.rdmsr(0x1b), Reply::Value(0xfee0_0900));
    assert!(bench.lapic.answers(0xfee0_0fff) && !bench.lapic.answers(0xfee0_1000));
    bench.write(LVT0, 0x1_0700);
    assert!(!bench.lapic.passes_extint(), "masked");
    bench.write(LVT0, 0x0_0030);
    assert!(!bench.lapic.passes_extint(), "not ExtINT");
}

#[test]
fn the_highest_vector_is_taken_first_and_holds_back_its_class() {
    let mut bench = Bench::new();
    for vector in [0x31, 0x52, 0x51] {
        assert!(bench.receive(vector));
    }
    assert_eq!(bench.lapic.acknowledge(), 0x52);
    assert!(
        !bench.lapic.interrupt_pending(),
        "0x51 is of the same class"
    );
    assert_eq!(bench.read(PPR), 0x50);
    assert_eq!(
        (bench.read(ISR + 0x20), bench.read(IRR + 0x20)),
        (1 << 18, 1 << 17)
    );
    bench.receive(0x61);
    assert_eq!(bench.lapic.acknowledge(), 0x61, "a higher class nests");
    for (expected, left) in [(None, 0x50), (None, 0x00)] {
        assert_eq!(bench.write(EOI, 0), expected);
        assert_eq!(bench.read(PPR), left);
    }
    assert_eq!(bench.lapic.acknowledge(), 0x51);
    assert_eq!(
        bench.lapic.acknowledge(),
        0xff,
        "0x31 waits: the spurious vector"
    );
    bench.write(EOI, 0);
    assert_eq!(bench.lapic.acknowledge(), 0x31);
}

#[test]
fn the_task_priority_holds_back_its_class_and_those_below() {
    let mut bench = Bench::new();
    bench.receive(0x45);
    bench.write(TPR, 0x40);
    assert!(!bench.lapic.interrupt_pending());
    assert_eq!(bench.read(PPR), 0x40);
    bench.write(TPR, 0x3f);
    assert!(bench.lapic.interrupt_pending());
}

#[test]
fn only_a_level_wants_its_end_told() {
    let mut bench = Bench::new();
    let level = Message {
        level: true,
        ..fixed(0x40)
    };
    assert!(bench.lapic.receive(level));
    bench.lapic.acknowledge();
    assert_eq!(bench.write(EOI, 0), Some(0x40));
    bench.receive(0x40);
    bench.lapic.acknowledge();
    assert_eq!(bench.write(EOI, 0), None, "this time it was an edge");
    assert_eq!(bench.write(EOI, 0), None, "nothing is in service");
}

#[test]
fn a_message_reaches_whom_it_addresses() {
    let mut bench = Bench::new();
    let mut reaches = |logical, destination| {
        bench.lapic.receive(Message {
            logical,
            destination,
            ..fixed(0x40)
        })
    };
    assert!(reaches(false, 0) && reaches(false, 0xff) && !reaches(false, 1));
    assert!(!reaches(true, 1), "no logical ID yet");
    bench.write(LDR, 0x0100_0000);
    let mut reaches = |destination| {
        bench.lapic.receive(Message {
            logical: true,
            destination,
            ..fixed(0x40)
        })
    };
    assert!(reaches(0x01) && reaches(0x81) && !reaches(0x02));
    // The cluster model: cluster 2, members 1 and 2.
    bench.write(DFR, 0);
    bench.write(LDR, 0x2300_0000);
    let mut reaches = |destination| {
        bench.lapic.receive(Message {
            logical: true,
            destination,
            ..fixed(0x40)
        })
    };
    assert!(reaches(0x21) && reaches(0xf2) && !reaches(0x11) && !reaches(0x24));
}

#[test]
fn an_ipi_to_oneself_arrives_by_any_name_and_others_go_nowhere() {
    for (high, low, arrives) in [
        (0x0000_0000, 0x0000_00f6, true),
        (0xff00_0000, 0x0000_00f6, true),
        (0x0100_0000, 0x0000_00f6, false),
        (0x0100_0000, 0x0004_00f6, true),  // self
        (0x0000_0000, 0x0008_00f6, true),  // all
        (0x0000_0000, 0x000c_00f6, false), // all but oneself
        (0x0000_0000, 0x0000_04f6, false), // NMI
        (0x0000_0000, 0x0000_4500, false), // INIT
    ] {
        let mut bench = Bench::new();
        bench.write(ICR_HIGH, high);
        bench.write(ICR, low);
        assert_eq!(
            bench.lapic.interrupt_pending(),
            arrives,
            "{high:#x} {low:#x}"
        );
        assert_eq!(bench.read(ICR), low, "and is not busy");
    }
}

#[test]
fn vectors_below_16_are_errors_that_interrupt_once() {
    let mut bench = Bench::new();
    bench.write(LVT_ERROR, 0xfe);
    assert!(!bench.receive(15));
    assert_eq!(bench.lapic.acknowledge(), 0xfe);
    bench.write(ICR, 0x4_0003);
    assert_eq!(bench.read(ESR), 0, "not before it is written");
    bench.write(ESR, 0);
    assert_eq!(bench.read(ESR), 0x60);
    bench.write(ESR, 0);
    assert_eq!(bench.read(ESR), 0);
    bench.read(0x40);
    bench.write(ESR, 0);
    assert_eq!(bench.read(ESR), 0x80, "no such register");
}

#[test]
fn turned_off_by_software_it_accepts_nothing_and_masks_its_own() {
    let mut bench = Bench::new();
    bench.receive(0x40);
    bench.write(LVT_TIMER, 0x30);
    bench.write(SVR, 0xff);
    assert_eq!(bench.read(LVT_TIMER), 0x1_0030);
    bench.write(LVT_TIMER, 0x31);
    assert_eq!(
        bench.read(LVT_TIMER),
        0x1_0031,
        "the mask cannot be cleared"
    );
    assert!(!bench.receive(0x41) && !bench.lapic.passes_extint());
    assert_eq!(bench.lapic.acknowledge(), 0x40, "what was accepted stands");
}

#[test]
fn turned_off_by_its_base_it_is_not_there_and_comes_back_reset() {
    let mut bench = Bench::new();
    bench.receive(0x40);
    assert_eq!(bench.wrmsr(0x1b, 0xfee0_0100), Reply::Done);
    assert!(!bench.lapic.answers(0xfee0_0000) && !bench.receive(0x41));
    assert!(bench.lapic.passes_extint(), "LINT0 is INTR again");
    assert_eq!(bench.wrmsr(0x1b, 0xfed0_0900), Reply::Done);
    assert!(bench.lapic.answers(0xfed0_0000), "at another place");
    assert_eq!(bench.read(SVR), 0xff);
    assert!(!bench.lapic.interrupt_pending());
}

#[test]
fn a_one_shot_fires_once_after_its_count() {
    let mut bench = Bench::new();
    bench.write(LVT_TIMER, 0x30);
    bench.write(DIVIDE, 0x3); // by 16
    bench.write(INITIAL, 1_000);
    assert_eq!(bench.lapic.next_interrupt(), Some(641_000));
    bench.wait(320_000);
    assert_eq!((bench.read(CURRENT), bench.read(INITIAL)), (500, 1_000));
    bench.wait(319_999);
    assert!(!bench.lapic.interrupt_pending());
    bench.wait(1);
    assert_eq!(bench.lapic.acknowledge(), 0x30);
    assert_eq!(bench.read(CURRENT), 0);
    assert_eq!(bench.lapic.next_event(), None);
}

#[test]
fn a_periodic_timer_keeps_its_pace_over_a_long_absence() {
    let mut bench = Bench::new();
    bench.write(LVT_TIMER, PERIODIC | 0x30);
    bench.write(DIVIDE, 0xb); // by 1
    bench.write(INITIAL, 100_000); // 4 ms
    bench.wait(4_000_000);
    assert_eq!(bench.lapic.acknowledge(), 0x30);
    bench.write(EOI, 0);
    bench.wait(10_000_000);
    assert_eq!(bench.lapic.acknowledge(), 0x30, "once for two periods");
    bench.write(EOI, 0);
    assert!(!bench.lapic.interrupt_pending());
    assert_eq!(bench.lapic.next_interrupt(), Some(16_001_000));
    assert_eq!(bench.read(CURRENT), 50_000);
    bench.write(INITIAL, 0);
    assert_eq!(bench.lapic.next_event(), None);
}

#[test]
fn every_divider_divides_by_what_the_manual_says() {
    let dividers = [
        (0, 2),
        (1, 4),
        (2, 8),
        (3, 16),
        (8, 32),
        (9, 64),
        (10, 128),
        (11, 1),
    ];
    for (value, divider) in dividers {
        let mut bench = Bench::new();
        bench.write(DIVIDE, value);
        bench.write(INITIAL, 100);
        assert_eq!(bench.lapic.next_event(), Some(1_000 + 100 * 40 * divider));
    }
}

#[test]
fn the_deadline_fires_when_the_time_stamp_has_come_to_it() {
    let mut bench = Bench::new();
    bench.ahead = 500;
    assert_eq!(bench.wrmsr(0x6e0, 5_000), Reply::Done);
    assert_eq!(bench.rdmsr(0x6e0), Reply::Value(0), "not in this mode");
    bench.write(LVT_TIMER, DEADLINE | 0x30);
    bench.wrmsr(0x6e0, 5_000);
    assert_eq!(bench.rdmsr(0x6e0), Reply::Value(5_000));
    assert_eq!(bench.lapic.next_interrupt(), Some(4_500));
    bench.write(INITIAL, 7);
    assert_eq!(
        (bench.read(INITIAL), bench.read(CURRENT)),
        (0, 0),
        "no counting"
    );
    bench.wait(3_500);
    assert_eq!(bench.lapic.acknowledge(), 0x30);
    assert_eq!(bench.rdmsr(0x6e0), Reply::Value(0), "disarmed");
    bench.wrmsr(0x6e0, 1);
    bench.write(EOI, 0);
    bench.wait(0);
    assert_eq!(
        bench.lapic.acknowledge(),
        0x30,
        "one that has passed fires at the next exit of a guest that gets on"
    );
}

#[test]
fn a_deadline_in_300_years_never_comes() {
    let mut bench = Bench::new();
    bench.write(LVT_TIMER, DEADLINE | 0x30);
    bench.wrmsr(0x6e0, 9_460_800_000_000_000_000);
    assert_eq!(bench.lapic.next_interrupt(), None);
    assert_eq!(bench.rdmsr(0x6e0), Reply::Value(9_460_800_000_000_000_000));
}

#[test]
fn a_moved_time_stamp_moves_the_deadline() {
    let mut bench = Bench::new();
    bench.write(LVT_TIMER, DEADLINE | 0x30);
    bench.wrmsr(0x6e0, 9_000);
    bench.ahead = 2_000;
    bench.lapic.move_tsc(bench.time());
    assert_eq!(bench.lapic.next_event(), Some(7_000));
    bench.ahead = 20_000;
    bench.lapic.move_tsc(bench.time());
    assert_eq!(bench.lapic.check(bench.time()), Ok(()));
    bench.wait(0);
    assert!(bench.lapic.interrupt_pending());
}

#[test]
fn a_change_between_counting_and_deadline_disarms() {
    let mut bench = Bench::new();
    bench.write(INITIAL, 100);
    bench.write(LVT_TIMER, PERIODIC | 0x30);
    assert!(bench.lapic.next_event().is_some(), "a count goes on");
    bench.write(LVT_TIMER, DEADLINE | 0x30);
    assert_eq!(bench.lapic.next_event(), None);
    bench.wrmsr(0x6e0, 100_000);
    bench.write(LVT_TIMER, 0x30);
    assert_eq!(bench.lapic.next_event(), None);
}

#[test]
fn a_masked_timer_fires_unheard() {
    let mut bench = Bench::new();
    bench.write(LVT_TIMER, 0x1_0030);
    bench.write(INITIAL, 100);
    assert_eq!(bench.lapic.next_interrupt(), None);
    bench.wait(100_000);
    bench.write(LVT_TIMER, 0x30);
    assert!(!bench.lapic.interrupt_pending());
}

#[test]
fn an_x2apic_has_the_same_registers_by_msr_and_forgives_nothing() {
    let mut bench = Bench::new();
    assert_eq!(bench.rdmsr(0x802), Reply::Fault, "not yet");
    bench.receive(0x40);
    bench.turn_x2apic_on();
    assert!(!bench.lapic.answers(0xfee0_0000));
    assert_eq!(bench.rdmsr(0x802), Reply::Value(0));
    assert_eq!(
        bench.rdmsr(0x80d),
        Reply::Value(1),
        "the logical ID follows from the ID"
    );
    assert_eq!(
        bench.rdmsr(0x822),
        Reply::Value(1),
        "what was requested stands"
    );
    assert_eq!(bench.lapic.acknowledge(), 0x40);
    for (index, value, reply) in [
        (0x808, 0x100, Reply::Fault), // reserved bits
        (0x808, 0x20, Reply::Done),
        (0x80b, 1, Reply::Fault), // EOI takes 0 only
        (0x80b, 0, Reply::Done),
        (0x802, 0, Reply::Fault), // read-only
        (0x80d, 1, Reply::Fault),
        (0x80e, 0, Reply::Fault), // no destination format
        (0x831, 0, Reply::Fault), // no second half
        (0x830, 0x0000_0000_0004_0051, Reply::Done),
        (0x83f, 0x52, Reply::Done), // self IPI
        (0x840, 0, Reply::Fault),
    ] {
        assert_eq!(bench.wrmsr(index, value), reply, "{index:#x} = {value:#x}");
    }
    for index in [0x80b, 0x83f, 0x80e, 0x831, 0x809, 0x8ff] {
        assert_eq!(bench.rdmsr(index), Reply::Fault, "{index:#x}");
    }
    assert_eq!(bench.lapic.acknowledge(), 0x52);
}

#[test]
fn illegal_transitions_of_the_base_fault() {
    let mut bench = Bench::new();
    for value in [0xfee0_0901, 0xfee0_0500, 1 << 52 | 0x900] {
        assert_eq!(bench.wrmsr(0x1b, value), Reply::Fault, "{value:#x}");
    }
    bench.turn_x2apic_on();
    assert_eq!(
        bench.wrmsr(0x1b, 0xfee0_0900),
        Reply::Fault,
        "x2APIC to xAPIC"
    );
    assert_eq!(bench.wrmsr(0x1b, 0xfee0_0100), Reply::Done);
    assert_eq!(
        bench.wrmsr(0x1b, 0xfee0_0d00),
        Reply::Fault,
        "off to x2APIC"
    );
    assert_eq!(bench.wrmsr(0x1b, 0xfee0_0900), Reply::Done);
}

#[test]
fn a_timer_that_is_due_waits_for_the_guest_to_get_on_or_for_exits() {
    let mut bench = Bench::new();
    bench.write(LVT_TIMER, DEADLINE | 0x30);
    for (deadline, gets_on) in [(1, false), (1_000, true), (1_001, false), (1_010, true)] {
        bench.now = 1_000;
        bench.wrmsr(0x6e0, deadline);
        for exit in 1..16 {
            bench.exit(100);
            assert!(!bench.lapic.interrupt_pending(), "{deadline}: {exit}");
            assert_eq!(bench.lapic.check(bench.time()), Ok(()));
            if gets_on && exit == 3 {
                break;
            }
        }
        match gets_on {
            true => bench.wait(0),
            false => bench.exit(0),
        }
        assert_eq!(bench.lapic.acknowledge(), 0x30);
        bench.write(EOI, 0);
    }
    bench.wrmsr(0x6e0, 90_000);
    bench.wait(80_000);
    assert!(!bench.lapic.interrupt_pending(), "it is not due");
    assert_eq!(bench.lapic.next_interrupt(), Some(90_000));
}

#[test]
fn a_period_shorter_than_its_handler_fires_once_in_sixteen_exits_and_keeps_its_pace() {
    let mut bench = Bench::new();
    bench.write(LVT_TIMER, PERIODIC | 0x30);
    bench.write(DIVIDE, 0xb); // by 1
    bench.write(INITIAL, 10); // 400 ns
    let mut fired = Vec::new();
    for _ in 0..64 {
        bench.exit(100);
        assert_eq!(bench.lapic.check(bench.time()), Ok(()));
        if bench.lapic.interrupt_pending() {
            assert_eq!(bench.lapic.acknowledge(), 0x30);
            bench.write(EOI, 0);
            fired.push(bench.now);
        }
    }
    assert_eq!(fired, [2_600, 4_200, 5_800, 7_400]);
    let next = bench.lapic.next_interrupt();
    assert_eq!(next, Some(7_800), "a multiple of the period");
}

#[test]
fn a_count_that_waits_for_exits_still_fires_once_the_divider_has_changed() {
    let mut bench = Bench::new();
    bench.write(LVT_TIMER, 0x30);
    bench.write(INITIAL, 1);
    bench.exit(5_000);
    assert_eq!(bench.read(CURRENT), 0);
    bench.write(DIVIDE, 0x3);
    assert_eq!(bench.lapic.check(bench.time()), Ok(()));
    bench.wait(10_000);
    assert!(bench.lapic.interrupt_pending());
}
