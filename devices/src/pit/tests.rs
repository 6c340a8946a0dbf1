//! What the 8254 promises, as claims. Time is given in ticks of the oscillator.

use super::*;
use proptest::prelude::*;

/// Programs `channel` in `mode` with `count` at tick 0, so that it is loaded at tick 1.
fn program(pit: &mut Pit, channel: u16, mode: u8, count: u16) -> Irq0 {
    pit.write(0x43, (channel as u8) << 6 | 0x30 | mode << 1, 0);
    pit.write(0x40 + channel, count as u8, 0);
    pit.write(0x40 + channel, (count >> 8) as u8, 0)
}

fn at(tick: u64) -> Nanos {
    time_of(tick).unwrap()
}

fn read_count(pit: &mut Pit, channel: u16, tick: u64) -> u16 {
    pit.write(0x43, (channel as u8) << 6, at(tick));
    let low = pit.read(0x40 + channel, at(tick)).unwrap();
    u16::from_le_bytes([low, pit.read(0x40 + channel, at(tick)).unwrap()])
}

fn out2(pit: &mut Pit, tick: u64) -> bool {
    pit.read(0x61, at(tick)).unwrap() & 0x20 != 0
}

/// OUT of counter 2, one letter per tick from tick 1 on.
fn wave(pit: &mut Pit, ticks: u64) -> String {
    (1..=ticks)
        .map(|tick| if out2(pit, tick) { 'H' } else { 'l' })
        .collect()
}

fn counts(pit: &mut Pit, ticks: u64) -> Vec<u16> {
    (1..=ticks).map(|tick| read_count(pit, 2, tick)).collect()
}

/// A timer whose third counter is gated on and runs `mode` with `count`.
fn counter_2(mode: u8, count: u16) -> Pit {
    let mut pit = Pit::new();
    pit.write(0x61, 1, 0);
    program(&mut pit, 2, mode, count);
    pit
}

#[test]
fn mode_0_goes_high_once_when_the_count_runs_out_and_counts_on() {
    let mut pit = counter_2(0, 4);
    assert_eq!(wave(&mut pit, 8), "llllHHHH");
    let mut pit = counter_2(0, 4);
    assert_eq!(counts(&mut pit, 7), [4, 3, 2, 1, 0, 0xffff, 0xfffe]);
}

#[test]
fn mode_1_starts_with_the_gate_and_restarts_with_it() {
    let mut pit = counter_2(1, 3);
    assert_eq!(wave(&mut pit, 5), "HHHHH", "no trigger yet");
    pit.write(0x61, 0, at(6));
    pit.write(0x61, 1, at(6));
    let after: String = (7..=11)
        .map(|t| if out2(&mut pit, t) { 'H' } else { 'l' })
        .collect();
    assert_eq!(after, "lllHH");
    pit.write(0x61, 0, at(20));
    pit.write(0x61, 1, at(20));
    pit.write(0x61, 0, at(22));
    pit.write(0x61, 1, at(22));
    let after: String = (21..=26)
        .map(|t| if out2(&mut pit, t.max(22)) { 'H' } else { 'l' })
        .collect();
    assert_eq!(after, "lllllH", "retriggered, the pulse is longer");
}

#[test]
fn mode_2_is_low_for_the_last_tick_of_each_period() {
    let mut pit = counter_2(2, 4);
    assert_eq!(wave(&mut pit, 9), "HHHlHHHlH");
    let mut pit = counter_2(2, 4);
    assert_eq!(counts(&mut pit, 6), [4, 3, 2, 1, 4, 3]);
}

#[test]
fn mode_3_is_a_square_wave_with_the_longer_half_high() {
    assert_eq!(wave(&mut counter_2(3, 4), 8), "HHllHHll");
    assert_eq!(wave(&mut counter_2(3, 5), 10), "HHHllHHHll");
    assert_eq!(counts(&mut counter_2(3, 4), 5), [4, 2, 4, 2, 4]);
    assert_eq!(counts(&mut counter_2(3, 5), 6), [4, 2, 0, 4, 2, 4]);
}

#[test]
fn mode_4_is_low_for_one_tick_when_the_count_runs_out() {
    assert_eq!(wave(&mut counter_2(4, 3), 7), "HHHlHHH");
}

#[test]
fn mode_5_is_a_strobe_that_the_gate_starts() {
    let mut pit = counter_2(5, 2);
    assert_eq!(wave(&mut pit, 3), "HHH");
    pit.write(0x61, 0, at(3));
    pit.write(0x61, 1, at(3));
    let after: String = (4..=8)
        .map(|t| if out2(&mut pit, t) { 'H' } else { 'l' })
        .collect();
    assert_eq!(after, "HHlHH");
}

#[test]
fn a_new_count_in_a_periodic_mode_waits_for_the_period_to_end() {
    let mut pit = counter_2(2, 4);
    pit.write(0x42, 3, at(2));
    pit.write(0x42, 0, at(2));
    let after: String = (3..=10)
        .map(|t| if out2(&mut pit, t) { 'H' } else { 'l' })
        .collect();
    assert_eq!(after, "HlHHlHHl");

    let mut pit = counter_2(3, 4);
    pit.write(0x42, 6, at(1));
    pit.write(0x42, 0, at(1));
    let after: String = (2..=11)
        .map(|t| if out2(&mut pit, t) { 'H' } else { 'l' })
        .collect();
    assert_eq!(after, "HlllHHHlll", "in mode 3 for the half period");
}

#[test]
fn the_gate_holds_mode_0_and_restarts_mode_2() {
    let mut pit = counter_2(0, 5);
    pit.write(0x61, 0, at(3));
    assert_eq!(read_count(&mut pit, 2, 50), 3);
    pit.write(0x61, 1, at(50));
    assert_eq!(read_count(&mut pit, 2, 52), 1);
    assert!(out2(&mut pit, 53));

    let mut pit = counter_2(2, 5);
    pit.write(0x61, 0, at(3));
    assert!(out2(&mut pit, 5));
    pit.write(0x61, 1, at(10));
    assert_eq!(read_count(&mut pit, 2, 11), 5);
}

#[test]
fn bcd_counts_in_decimal() {
    let mut pit = Pit::new();
    pit.write(0x61, 1, 0);
    pit.write(0x43, 0xb1, 0);
    pit.write(0x42, 0x00, 0);
    pit.write(0x42, 0x10, 0);
    assert_eq!(read_count(&mut pit, 2, 2), 0x0999);
    assert_eq!(read_count(&mut pit, 2, 1002), 0x9999);
}

#[test]
fn a_count_of_zero_is_the_longest_count() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 0);
    assert_eq!(pit.next_rise(), Some(at(65_537)));
}

#[test]
fn the_status_byte_tells_out_null_count_and_mode() {
    let mut pit = counter_2(2, 4);
    pit.write(0x43, 0xe8, 0);
    assert_eq!(
        pit.read(0x42, 0),
        Some(0xf4),
        "high, not yet loaded, both bytes, mode 2"
    );
    pit.write(0x43, 0xe8, at(1));
    assert_eq!(pit.read(0x42, at(1)), Some(0xb4));
}

#[test]
fn a_latched_count_stands_still_until_it_is_read() {
    let mut pit = counter_2(2, 1000);
    pit.write(0x43, 0x80, at(11));
    pit.write(0x43, 0x80, at(500));
    assert_eq!(pit.read(0x42, at(600)), Some((990 & 0xff) as u8));
    assert_eq!(pit.read(0x42, at(700)), Some((990 >> 8) as u8));
    assert_eq!(read_count(&mut pit, 2, 801), 200);
}

#[test]
fn a_count_of_one_that_takes_over_a_periodic_mode_ends_its_edges() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 2);
    pit.write(0x40, 1, at(1));
    pit.write(0x40, 0, at(1));
    assert_eq!(pit.next_rise(), None);
}

#[test]
fn linux_one_shots_make_one_edge_each() {
    let mut pit = Pit::new();
    pit.write(0x43, 0x38, 0);
    pit.write(0x40, 0xa9, 0);
    assert_eq!(
        pit.write(0x40, 0x04, 0),
        Irq0::Unchanged,
        "programming makes no edge"
    );
    let due = pit.next_rise().unwrap();
    assert_eq!(due, at(1 + 0x4a9 + 1));
    assert_eq!(pit.advance(due - 1), Irq0::Unchanged);
    assert_eq!(pit.advance(due), Irq0::Rose);
    assert_eq!(pit.next_rise(), None);
}

#[test]
fn many_periods_in_one_jump_are_one_edge_and_the_next_is_ahead() {
    let mut pit = Pit::new();
    program(&mut pit, 0, 2, 1193);
    assert_eq!(pit.advance(1_000_000_000), Irq0::Rose);
    let next = pit.next_rise().unwrap();
    assert!(next > 1_000_000_000 && next <= 1_001_000_000);
    assert_eq!(pit.advance(1_000_000_000), Irq0::Unchanged);
}

#[test]
fn the_refresh_bit_toggles_every_15_microseconds() {
    let mut pit = Pit::new();
    let bit = |pit: &mut Pit, now| pit.read(0x61, now).unwrap() & 0x10 != 0;
    assert!(!bit(&mut pit, 15_084));
    assert!(bit(&mut pit, 15_085));
    assert!(!bit(&mut pit, 30_170));
}

proptest! {
    #[test]
    fn at_the_time_of_a_tick_the_tick_has_come_and_not_a_nanosecond_before(tick in 1..=u64::MAX / 1000) {
        let time = at(tick);
        prop_assert_eq!(tick_at(time), tick);
        prop_assert_eq!(tick_at(time - 1), tick - 1);
    }

    /// The closed form of the next rise agrees with looking at OUT tick by tick.
    #[test]
    fn the_next_rise_is_where_out_is_seen_to_rise(
        steps in prop::collection::vec((0..4u8, any::<u8>(), 0..12u64), 1..12),
    ) {
        let mut channel = Channel::new(true);
        let mut tick = 0;
        for (what, value, wait) in steps {
            match what {
                0 => channel.control(Bytes::Low, value % 6, value & 0x80 != 0),
                1 | 2 => channel.write(value % 8, tick),
                _ => channel.set_gate(value & 1 != 0, tick),
            }
            let foretold = channel.clone().rise_after(tick);
            let mut watched = channel.clone();
            let mut out = watched.out_at(tick);
            let mut seen = None;
            for later in tick + 1..tick + 40 {
                let now_out = watched.out_at(later);
                if !out && now_out {
                    seen = Some(later);
                    break;
                }
                out = now_out;
            }
            // Counts are at most 10000 only if zero was written: then the rise is far ahead.
            prop_assert_eq!(foretold.filter(|&rise| rise < tick + 40), seen);
            tick += wait;
        }
    }
}
