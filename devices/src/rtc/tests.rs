//! What the clock promises, as claims.

use super::*;

const SECOND: Nanos = 1_000_000_000;
/// 2024-02-29 23:59:58 UTC, a Thursday.
const LEAP_NIGHT: u64 = 1_709_251_198;

fn clock() -> Rtc {
    let mut rtc = Rtc::new();
    rtc.set_wall_clock(LEAP_NIGHT, 0);
    rtc
}

fn get(rtc: &mut Rtc, register: u8, now: Nanos) -> u8 {
    rtc.write(0x70, register, now);
    rtc.read(0x71, now).unwrap()
}

fn set(rtc: &mut Rtc, register: u8, value: u8, now: Nanos) {
    rtc.write(0x70, register, now);
    rtc.write(0x71, value, now);
}

fn time(rtc: &mut Rtc, now: Nanos) -> [u8; 8] {
    [0x32, 9, 8, 7, 6, 4, 2, 0].map(|register| get(rtc, register, now))
}

#[test]
fn it_shows_the_wall_clock_and_crosses_a_leap_day() {
    let mut rtc = clock();
    assert_eq!(
        time(&mut rtc, 0),
        [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]
    );
    assert_eq!(
        time(&mut rtc, SECOND),
        [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x59]
    );
    assert_eq!(
        time(&mut rtc, 2 * SECOND),
        [0x20, 0x24, 0x03, 0x01, 6, 0, 0, 0]
    );
}

#[test]
fn register_b_chooses_binary_and_twelve_hours() {
    let mut rtc = clock();
    set(&mut rtc, 0x0b, 0x04, 0);
    assert_eq!(get(&mut rtc, 4, 0), 0x80 | 11);
    assert_eq!(get(&mut rtc, 4, 2 * SECOND), 12, "midnight is 12 AM");
    set(&mut rtc, 0x0b, 0x06, 0);
    assert_eq!(get(&mut rtc, 4, 0), 23);
    assert_eq!(get(&mut rtc, 2, 0), 59);
}

#[test]
fn update_in_progress_is_seen_only_just_before_the_second() {
    let mut rtc = clock();
    assert_eq!(get(&mut rtc, 0x0a, SECOND - 244_001) & 0x80, 0);
    assert_eq!(get(&mut rtc, 0x0a, SECOND - 244_000) & 0x80, 0x80);
    assert_eq!(get(&mut rtc, 0x0a, SECOND) & 0x80, 0);
}

#[test]
fn the_time_that_linux_sets_is_the_time_it_reads() {
    let mut rtc = clock();
    let now = 10 * SECOND + 300_000_000;
    set(&mut rtc, 0x0b, 0x82, now);
    set(&mut rtc, 0x0a, 0x76, now);
    for (register, value) in [
        (9, 0x31),
        (8, 0x12),
        (7, 0x31),
        (4, 0x23),
        (2, 0x59),
        (0, 0x59),
        (6, 4),
        (0x32, 0x20),
    ] {
        set(&mut rtc, register, value, now);
    }
    assert_eq!(get(&mut rtc, 0, now + 5 * SECOND), 0x59, "frozen");
    set(&mut rtc, 0x0b, 0x02, now);
    set(&mut rtc, 0x0a, 0x26, now);
    // Half a second after the divider is let go, the first update.
    assert_eq!(get(&mut rtc, 0, now + SECOND / 2 - 1), 0x59);
    let new_year = time(&mut rtc, now + SECOND / 2);
    assert_eq!(new_year, [0x20, 0x32, 0x01, 0x01, 5, 0, 0, 0]);
}

#[test]
fn a_periodic_interrupt_comes_every_period_until_register_c_is_read() {
    let mut rtc = clock();
    set(&mut rtc, 0x0b, 0x42, 0);
    let due = rtc.next_interrupt().unwrap();
    assert_eq!(due, 976_563, "1024 Hz, rounded up");
    rtc.advance(due - 1);
    assert!(!rtc.interrupt_line());
    rtc.advance(due);
    assert!(rtc.interrupt_line());
    assert_eq!(rtc.next_interrupt(), None, "nothing more until it is read");
    assert_eq!(get(&mut rtc, 0x0c, due), 0xc0);
    assert!(!rtc.interrupt_line());
    assert_eq!(get(&mut rtc, 0x0c, due), 0);
    assert_eq!(rtc.next_interrupt(), Some(1_953_125));
}

#[test]
fn the_update_interrupt_comes_with_the_second() {
    let mut rtc = clock();
    set(&mut rtc, 0x0b, 0x12, SECOND / 4);
    assert_eq!(rtc.next_interrupt(), Some(SECOND));
    rtc.advance(SECOND);
    assert_eq!(get(&mut rtc, 0x0c, SECOND) & 0x90, 0x90);
}

#[test]
fn the_alarm_rings_at_its_time_and_not_before() {
    let mut rtc = clock();
    set(&mut rtc, 5, 0x00, 0);
    set(&mut rtc, 3, 0x01, 0);
    set(&mut rtc, 1, 0xc0, 0); // any second
    set(&mut rtc, 0x0b, 0x22, 0);
    assert_eq!(rtc.next_interrupt(), Some(62 * SECOND));
    rtc.advance(62 * SECOND);
    assert_eq!(get(&mut rtc, 0x0c, 62 * SECOND) & 0xa0, 0xa0);
    assert_eq!(rtc.next_interrupt(), Some(63 * SECOND));
}

#[test]
fn flags_are_raised_whether_or_not_anyone_is_interrupted() {
    let mut rtc = clock();
    assert_eq!(get(&mut rtc, 0x0c, SECOND), 0x50);
    assert!(!rtc.interrupt_line());
}

#[test]
fn ram_keeps_what_is_written_and_the_battery_is_good() {
    let mut rtc = clock();
    set(&mut rtc, 0x40, 0xa5, 0);
    assert_eq!(get(&mut rtc, 0x40, SECOND), 0xa5);
    set(&mut rtc, 0x0d, 0, 0);
    assert_eq!(get(&mut rtc, 0x0d, 0), 0x80);
    rtc.write(0x70, 0x8d, 0);
    assert_eq!(rtc.read(0x70, 0), Some(0x8d));
}

#[test]
fn no_wall_clock_is_too_far_away() {
    let mut rtc = Rtc::new();
    rtc.set_wall_clock(u64::MAX, u64::MAX);
    assert_eq!(time(&mut rtc, u64::MAX)[..2], [0x99, 0x99]);
}
