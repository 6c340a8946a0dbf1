//! What the whole board promises, told from the guest's side.

use hindsight_devices::{
    Access, Board, BusContext, Devices, Input, Nanos, NoDisks, Output, PvPanic, Ram, Reply, Reset,
    RestoreError, Width,
};

/// One access to a board without disks and without memory.
fn access(board: &mut Board, access: Access) -> Reply {
    let mut context = BusContext {
        ram: &Ram::new(),
        storage: &mut NoDisks,
    };
    board
        .access(access, &mut context)
        .expect("there is no disk to fail")
}

const MILLISECOND: Nanos = 1_000_000;

fn outb(board: &mut Board, port: u16, value: u8) {
    let reply = access(
        board,
        Access::PortWrite {
            port,
            width: Width::Byte,
            value: u32::from(value),
        },
    );
    assert_eq!(reply, Reply::Done);
}

fn inb(board: &mut Board, port: u16) -> u8 {
    match access(
        board,
        Access::PortRead {
            port,
            width: Width::Byte,
        },
    ) {
        Reply::Value(value) => u8::try_from(value).expect("a byte was read"),
        other => panic!("IN answered {other:?}"),
    }
}

/// A board whose interrupt controllers are set up as Linux does, with everything unmasked.
fn booted() -> Board {
    let mut board = Board::new(&Devices::default());
    for (port, base, wiring) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
        for (port, value) in [
            (port, 0x11),
            (port + 1, base),
            (port + 1, wiring),
            (port + 1, 1),
            (port + 1, 0),
        ] {
            outb(&mut board, port, value);
        }
    }
    board
}

fn store(board: &mut Board, gpa: u64, value: u32) {
    let reply = access(
        board,
        Access::MemoryWrite {
            gpa,
            width: Width::Dword,
            value: value.into(),
        },
    );
    assert_eq!(reply, Reply::Done);
}

const LOCAL_APIC: u64 = 0xfee0_0000;
const END_OF_INTERRUPT: u64 = LOCAL_APIC + 0xb0;

/// Sets the low half of a pin's entry in the I/O APIC.
fn set_pin(board: &mut Board, pin: u8, entry: u32) {
    store(board, 0xfec0_0000, 0x10 + 2 * u32::from(pin));
    store(board, 0xfec0_0010, entry);
}

/// A board as Linux leaves it in symmetric I/O mode: the 8259s masked, LINT0 too.
fn symmetric() -> Board {
    let mut board = booted();
    outb(&mut board, 0x21, 0xff);
    outb(&mut board, 0xa1, 0xff);
    store(&mut board, LOCAL_APIC + 0x350, 0x1_0700);
    board
}

/// Programs counter 0 for `count` ticks in `mode`.
fn start_timer(board: &mut Board, mode: u8, count: u16) {
    outb(board, 0x43, 0x30 | mode << 1);
    outb(board, 0x40, count as u8);
    outb(board, 0x40, (count >> 8) as u8);
}

#[test]
fn a_fresh_board_wants_nothing() {
    let board = Board::new(&Devices::default());
    assert_eq!(board.deadline(), None);
    assert!(!board.interrupt_pending());
    assert_eq!(board.reset_requested(), None);
    assert_eq!(board.guest_panicked(), None);
    assert_eq!(board.time_stamp(), 0);
}

#[test]
fn a_timer_programmed_for_one_millisecond_interrupts_at_one_millisecond() {
    let mut board = booted();
    start_timer(&mut board, 0, 1193);
    let deadline = board.deadline().expect("the timer is armed");
    // 1193 ticks of the oscillator and the one on which the count is loaded.
    assert!(deadline.abs_diff(MILLISECOND) < 1_000, "{deadline}");
    board.advance(deadline - 1);
    assert!(!board.interrupt_pending());
    board.advance(deadline);
    assert!(board.interrupt_pending());
    assert_eq!(board.acknowledge(), 0x30);
    assert_eq!(board.deadline(), None, "one shot");
}

#[test]
fn a_periodic_timer_keeps_its_pace_without_drifting() {
    let mut board = booted();
    start_timer(&mut board, 2, 4772); // HZ=250
    for period in 1..=2_500u64 {
        let deadline = board.deadline().expect("the timer goes on");
        board.advance(deadline);
        assert!(board.interrupt_pending());
        assert_eq!(board.acknowledge(), 0x30);
        outb(&mut board, 0x20, 0x20);
        let exact = (1 + 4772 * period) * 1_000_000_000 / 1_193_182;
        assert!(board.now().abs_diff(exact) <= 1);
    }
}

#[test]
fn a_guest_that_did_not_run_for_a_second_gets_one_timer_interrupt() {
    let mut board = booted();
    start_timer(&mut board, 3, 1193);
    board.advance(1_000_500_000);
    assert_eq!(board.acknowledge(), 0x30);
    outb(&mut board, 0x20, 0x20);
    assert!(!board.interrupt_pending());
    assert!(board.deadline().expect("the timer goes on") > board.now());
}

#[test]
fn a_timer_interrupt_waits_for_a_guest_that_has_interrupts_off() {
    let mut board = booted();
    start_timer(&mut board, 3, 1193);
    // Longer than the high half of the square wave, exit by exit.
    for now in (MILLISECOND..3 * MILLISECOND).step_by(10_000) {
        board.advance(now);
    }
    assert!(board.interrupt_pending());
}

#[test]
fn a_masked_timer_is_no_deadline() {
    let mut board = booted();
    start_timer(&mut board, 2, 1193);
    assert!(board.deadline().is_some());
    outb(&mut board, 0x21, 0x01);
    assert_eq!(board.deadline(), None);
    board.advance(5 * MILLISECOND);
    assert!(!board.interrupt_pending());
    outb(&mut board, 0x21, 0x00);
    assert!(board.interrupt_pending(), "the edge was remembered");
}

#[test]
fn linux_measures_the_time_stamp_counter_against_counter_2() {
    // quick_pit_calibrate(): gate on, mode 0, count 0xffff, watch the high byte fall.
    let mut board = booted();
    let control = inb(&mut board, 0x61) & !0x02 | 0x01;
    outb(&mut board, 0x61, control);
    for (port, value) in [(0x43, 0xb0), (0x42, 0xff), (0x42, 0xff)] {
        outb(&mut board, port, value);
    }
    let mut high = || {
        board.advance(board.now() + 1_000);
        inb(&mut board, 0x42);
        (inb(&mut board, 0x42), board.time_stamp())
    };
    let (first, mut start) = high();
    assert_eq!(first, 0xff);
    let mut end = start;
    for expected in (0xf0..=0xfe).rev() {
        let mut seen = high();
        while seen.0 != expected {
            assert_eq!(seen.0, expected + 1, "the count falls one by one");
            seen = high();
        }
        if expected == 0xfe {
            start = seen.1;
        }
        end = seen.1;
    }
    let khz = (end - start) * 1_193_182 / (14 * 256 * 1000);
    assert!(khz.abs_diff(1_000_000) < 1_000, "{khz} kHz");
}

#[test]
fn the_clock_interrupts_through_the_second_controller() {
    let mut board = booted();
    board.accept(
        Input::WallClock {
            unix_seconds: 1_700_000_000,
        },
        &Ram::new(),
    );
    outb(&mut board, 0x70, 0x0b);
    outb(&mut board, 0x71, 0x12); // update interrupts
    assert_eq!(board.deadline(), Some(1_000_000_000));
    board.advance(1_000_000_000);
    assert_eq!(board.acknowledge(), 0x38);
    outb(&mut board, 0x70, 0x0c);
    assert_eq!(
        inb(&mut board, 0x71),
        0xd0,
        "the periodic flag rises too, though not enabled"
    );
    outb(&mut board, 0xa0, 0x20);
    outb(&mut board, 0x20, 0x20);
    assert!(!board.interrupt_pending());
    assert_eq!(board.deadline(), Some(2_000_000_000));
    outb(&mut board, 0x70, 0x00);
    assert_eq!(inb(&mut board, 0x71), 0x21, "22:13:20 and one second");
}

#[test]
fn a_typed_byte_interrupts_a_driver_that_listens() {
    let mut board = booted();
    outb(&mut board, 0x3fc, 0x0b);
    outb(&mut board, 0x3f9, 0x01);
    board.accept(Input::Console(b"a".to_vec()), &Ram::new());
    assert_eq!(board.acknowledge(), 0x34);
    assert_eq!(inb(&mut board, 0x3fa), 0xc4);
    assert_eq!(inb(&mut board, 0x3f8), b'a');
    outb(&mut board, 0x20, 0x20);
    assert!(!board.interrupt_pending());
}

#[test]
fn bytes_typed_too_early_wait_for_the_driver() {
    let mut board = booted();
    board.accept(Input::Console(b"early".to_vec()), &Ram::new());
    assert_eq!(board.room(&Ram::new()).console, 4096 - 5);
    outb(&mut board, 0x3f9, 0x01);
    assert!(!board.interrupt_pending());
    outb(&mut board, 0x3fc, 0x0b);
    assert!(board.interrupt_pending());
    assert_eq!(board.room(&Ram::new()).console, 4096);
}

#[test]
fn a_typed_byte_interrupts_through_the_io_apic() {
    let mut board = symmetric();
    set_pin(&mut board, 4, 0x34);
    outb(&mut board, 0x3fc, 0x0b);
    outb(&mut board, 0x3f9, 0x01);
    for byte in [b"a", b"b"] {
        board.accept(Input::Console(byte.to_vec()), &Ram::new());
        assert_eq!(board.acknowledge(), 0x34);
        assert_eq!(inb(&mut board, 0x3fa), 0xc4);
        assert_eq!(inb(&mut board, 0x3f8), byte[0]);
        store(&mut board, END_OF_INTERRUPT, 0);
        assert!(!board.interrupt_pending());
    }
}

#[test]
fn the_8254_is_pin_2_of_the_io_apic() {
    let mut board = symmetric();
    start_timer(&mut board, 2, 1193);
    assert_eq!(board.deadline(), None, "masked at both");
    set_pin(&mut board, 2, 0x30);
    for _ in 0..3 {
        let deadline = board.deadline().expect("the timer goes on");
        board.advance(deadline);
        assert_eq!(board.acknowledge(), 0x30);
        store(&mut board, END_OF_INTERRUPT, 0);
        assert!(!board.interrupt_pending());
    }
}

#[test]
fn the_clock_is_pin_8_of_the_io_apic() {
    let mut board = symmetric();
    set_pin(&mut board, 8, 0x38);
    outb(&mut board, 0x70, 0x0b);
    outb(&mut board, 0x71, 0x12);
    assert_eq!(board.deadline(), Some(1_000_000_000));
    board.advance(1_000_000_000);
    assert_eq!(board.acknowledge(), 0x38);
}

#[test]
fn the_8259s_interrupt_through_lint0_until_it_is_masked() {
    let mut board = booted();
    start_timer(&mut board, 0, 1193);
    let deadline = board.deadline().expect("the timer is armed");
    store(&mut board, LOCAL_APIC + 0x350, 0x1_0700);
    assert_eq!(board.deadline(), None);
    board.advance(deadline);
    assert!(!board.interrupt_pending());
    store(&mut board, LOCAL_APIC + 0x350, 0x0_0700);
    // The task priority and what is in service hold back the APIC's own interrupts, not these.
    store(&mut board, LOCAL_APIC + 0x80, 0xff);
    assert!(board.interrupt_pending());
    assert_eq!(board.acknowledge(), 0x30);
}

#[test]
fn a_tsc_deadline_is_the_boards_deadline_and_follows_the_tsc() {
    let mut board = symmetric();
    store(&mut board, LOCAL_APIC + 0x320, 2 << 17 | 0xec);
    let arm = |board: &mut Board, value| {
        let reply = access(
            board,
            Access::MsrWrite {
                index: 0x6e0,
                value,
            },
        );
        assert_eq!(reply, Reply::Done);
    };
    arm(&mut board, 5 * MILLISECOND);
    assert_eq!(board.deadline(), Some(5 * MILLISECOND));
    access(
        &mut board,
        Access::MsrWrite {
            index: 0x3b,
            value: 2 * MILLISECOND,
        },
    );
    assert_eq!(board.deadline(), Some(3 * MILLISECOND));
    board.advance(3 * MILLISECOND - 1);
    assert!(!board.interrupt_pending());
    board.advance(3 * MILLISECOND);
    assert!(!board.interrupt_pending(), "the guest has not got on yet");
    assert_eq!(board.deadline(), Some(3 * MILLISECOND + 1));
    board.count_exit(true);
    board.advance(3 * MILLISECOND);
    assert_eq!(board.acknowledge(), 0xec);
    store(&mut board, END_OF_INTERRUPT, 0);
    assert_eq!(board.deadline(), None);
    arm(&mut board, 4 * MILLISECOND);
    board.count_exit(true);
    board.advance(3 * MILLISECOND);
    assert_eq!(
        board.acknowledge(),
        0xec,
        "that has passed by the guest's TSC"
    );
}

#[test]
fn the_power_button_interrupts_until_it_is_taken_note_of() {
    let mut board = symmetric();
    set_pin(&mut board, 9, 0x8039);
    outb(&mut board, 0x603, 0x01);
    board.accept(Input::PowerButton, &Ram::new());
    assert_eq!(board.acknowledge(), 0x39);
    assert_eq!(inb(&mut board, 0x601), 0x01);
    store(&mut board, END_OF_INTERRUPT, 0);
    assert_eq!(board.acknowledge(), 0x39, "a level comes again");
    outb(&mut board, 0x601, 0x01);
    store(&mut board, END_OF_INTERRUPT, 0);
    assert!(!board.interrupt_pending());
}

#[test]
fn a_guest_turns_the_machine_off() {
    let mut board = booted();
    for (value, off) in [(5 << 10, false), (5 << 10 | 1 << 13, true)] {
        access(
            &mut board,
            Access::PortWrite {
                port: 0x604,
                width: Width::Word,
                value,
            },
        );
        assert_eq!(board.powered_off(), off);
    }
    assert_eq!(board.reset_requested(), None);
}

#[test]
fn a_guest_that_turns_the_apic_off_has_the_8259s() {
    let mut board = booted();
    store(&mut board, LOCAL_APIC + 0x350, 0x1_0700);
    let reply = access(
        &mut board,
        Access::MsrWrite {
            index: 0x1b,
            value: 0xfee0_0100,
        },
    );
    assert_eq!(reply, Reply::Done);
    start_timer(&mut board, 0, 1193);
    board.advance(board.deadline().expect("the timer is armed"));
    assert_eq!(board.acknowledge(), 0x30);
    let reply = access(
        &mut board,
        Access::MemoryRead {
            gpa: LOCAL_APIC,
            width: Width::Dword,
        },
    );
    assert_eq!(reply, Reply::Value(Width::Dword.ones()));
}

#[test]
fn what_the_guest_prints_is_taken_once() {
    let mut board = booted();
    for &byte in b"Linux version" {
        outb(&mut board, 0x3f8, byte);
    }
    assert_eq!(
        board.take_outputs(),
        [Output::Console(b"Linux version".to_vec())]
    );
    assert_eq!(board.take_outputs(), []);
}

#[test]
fn a_guest_can_reset_and_can_say_that_it_panicked() {
    let mut board = booted();
    assert_eq!(inb(&mut board, 0x505), 3);
    outb(&mut board, 0x505, 1);
    outb(&mut board, 0x64, 0xfe);
    assert_eq!(board.guest_panicked(), Some(PvPanic::Panicked));
    assert_eq!(board.reset_requested(), Some(Reset::Keyboard));
}

#[test]
fn linux_finds_no_pci_bus_and_does_not_reset_looking_for_it() {
    let mut board = booted();
    outb(&mut board, 0xcfb, 0x01);
    let value = 0x8000_0600;
    access(
        &mut board,
        Access::PortWrite {
            port: 0xcf8,
            width: Width::Dword,
            value,
        },
    );
    let reply = access(
        &mut board,
        Access::PortRead {
            port: 0xcf8,
            width: Width::Dword,
        },
    );
    assert_eq!(reply, Reply::Value(0xffff_ffff));
    assert_eq!(board.reset_requested(), None);
}

#[test]
fn where_nobody_answers_the_bus_floats() {
    let mut board = booted();
    for width in [Width::Byte, Width::Word, Width::Dword] {
        let reply = access(
            &mut board,
            Access::PortRead {
                port: 0x1234,
                width,
            },
        );
        assert_eq!(reply, Reply::Value(width.ones()));
        access(
            &mut board,
            Access::PortWrite {
                port: 0x80,
                width: Width::Byte,
                value: 0x55,
            },
        );
    }
    let reply = access(
        &mut board,
        Access::MemoryRead {
            gpa: 0xfed0_0000,
            width: Width::Qword,
        },
    );
    assert_eq!(reply, Reply::Value(u64::MAX));
    assert_eq!(
        access(&mut board, Access::MsrRead { index: 0x6e1 }),
        Reply::Fault
    );
}

#[test]
fn a_wide_access_reaches_neighbouring_ports_low_byte_first() {
    let mut board = booted();
    access(
        &mut board,
        Access::PortWrite {
            port: 0x70,
            width: Width::Word,
            value: 0x5a40,
        },
    );
    assert_eq!(inb(&mut board, 0x71), 0x5a);
    let reply = access(
        &mut board,
        Access::PortRead {
            port: 0x70,
            width: Width::Word,
        },
    );
    assert_eq!(reply, Reply::Value(0x5a40));
}

#[test]
#[should_panic(expected = "time ran backwards")]
fn time_does_not_run_backwards() {
    let mut board = Board::new(&Devices::default());
    board.advance(10);
    board.advance(9);
}

#[test]
fn a_save_of_another_version_is_refused() {
    let mut state = Board::new(&Devices::default()).save();
    state.version += 1;
    let found = state.version;
    let error = Board::restore(state).expect_err("an unknown version");
    assert_eq!(
        error,
        RestoreError::Version {
            expected: found - 1,
            found
        }
    );
}
