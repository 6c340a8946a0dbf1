//! Rings that break the rules, behind a card that sends: each breaks its device and nothing else.

use crate::virtio::net::Net;
use crate::virtio::testing::{
    Descriptor, Driver, F_EVENT_INDEX, F_INDIRECT, INDIRECT, LIVE, NEXT, Out, QUEUE, QUEUE_READY,
    QUEUE_SIZE, RAM_BYTES, SIZE, STATUS, USED, WRITE, lone_ring,
};
use crate::virtio::{Kind, NetSpec};

const SEND: usize = 1;

fn driver(features: u64) -> Driver {
    Driver::start(Kind::Net(Net::new(&NetSpec::default())), features)
}

fn descriptor(gpa: u64, bytes: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        gpa,
        bytes,
        flags,
        next,
    }
}

/// A chain made of these descriptors, from the first on, in a ring of its own.
#[track_caller]
fn breaks(why: &str, descriptors: &[Descriptor]) {
    let mut driver = driver(F_INDIRECT | F_EVENT_INDEX);
    for (index, descriptor) in (0..).zip(descriptors) {
        driver.describe(driver.base(SEND), index, *descriptor);
    }
    driver.offer_head(SEND, 0);
    driver.notify(SEND);
    assert!(driver.outputs().is_empty(), "{why}");
    assert!(driver.used(SEND).is_empty(), "{why}");
    driver.expect_broken(SEND);
    driver.offer(SEND, &[Out(&[0; 72])]);
    driver.notify(SEND);
    assert_eq!(driver.outputs().len(), 1, "{why}: a reset mends it");
}

#[test]
fn a_chain_that_breaks_the_rules_breaks_its_device_until_a_reset() {
    let at = 0x20_0000;
    breaks("a loop of one", &[descriptor(at, 40, NEXT, 0)]);
    let two = [descriptor(at, 40, NEXT, 1), descriptor(at, 40, NEXT, 0)];
    breaks("a loop of two", &two);
    breaks("a next that is none", &[descriptor(at, 40, NEXT, SIZE)]);
    breaks("a buffer outside", &[descriptor(RAM_BYTES, 40, 0, 0)]);
    breaks(
        "a buffer's end outside",
        &[descriptor(RAM_BYTES - 8, 40, 0, 0)],
    );
    breaks(
        "an address that wraps",
        &[descriptor(u64::MAX - 8, 40, 0, 0)],
    );
    breaks(
        "a length beyond all memory",
        &[descriptor(at, u32::MAX, 0, 0)],
    );
    let long = [
        descriptor(at, u32::MAX, NEXT, 1),
        descriptor(at, u32::MAX, 0, 0),
    ];
    breaks("more than 4 GiB", &long);
    let write = descriptor(RAM_BYTES, 40, WRITE, 0);
    breaks("room outside", &[descriptor(at, 40, NEXT, 1), write]);
}

#[test]
fn a_table_that_breaks_the_rules_breaks_its_device_until_a_reset() {
    let table = 0x30_0000;
    let broken = |why: &str, bytes: u32, entries: &[Descriptor]| {
        let mut driver = driver(F_INDIRECT);
        for (index, entry) in (0..).zip(entries) {
            driver.describe(table, index, *entry);
        }
        let head = descriptor(table, bytes, INDIRECT, 0);
        driver.describe(driver.base(SEND), 0, head);
        driver.offer_head(SEND, 0);
        driver.notify(SEND);
        assert!(driver.outputs().is_empty(), "{why}");
        driver.expect_broken(SEND);
    };
    let at = 0x20_0000;
    broken("an empty table", 0, &[]);
    broken("half a descriptor", 24, &[descriptor(at, 72, NEXT, 1)]);
    broken("a next after it", 16, &[descriptor(at, 72, NEXT, 1)]);
    broken(
        "a table in a table",
        16,
        &[descriptor(table, 16, INDIRECT, 0)],
    );
    broken("a loop", 16, &[descriptor(at, 72, NEXT, 0)]);
    let endless: Vec<_> = (0..2000).map(|i| descriptor(at, 1, NEXT, i + 1)).collect();
    broken("one that is too long", 16 * 2000, &endless);
}

#[test]
fn a_table_outside_memory_breaks_its_device() {
    let mut driver = driver(F_INDIRECT);
    let head = descriptor(RAM_BYTES - 16, 32, INDIRECT, 0);
    driver.describe(RAM_BYTES - 16, 0, descriptor(0x20_0000, 72, NEXT, 1));
    driver.describe(driver.base(SEND), 0, head);
    driver.offer_head(SEND, 0);
    driver.notify(SEND);
    driver.expect_broken(SEND);
}

#[test]
fn a_head_that_is_no_descriptor_breaks_its_device() {
    let mut driver = driver(0);
    driver.offer_head(SEND, SIZE);
    driver.notify(SEND);
    driver.expect_broken(SEND);
}

#[test]
fn an_available_ring_that_ran_too_far_breaks_its_device() {
    let mut driver = driver(0);
    for _ in 0..=SIZE {
        driver.offer(SEND, &[Out(&[0; 72])]);
    }
    driver.notify(SEND);
    assert!(driver.outputs().is_empty());
    driver.expect_broken(SEND);
}

#[test]
fn a_ring_of_no_size_or_outside_memory_breaks_its_device_when_it_is_used() {
    let base = 0x1_0000;
    let good = [base, base + 0x4000, base + 0x8000];
    for (size, parts) in [
        (0, good),
        (3, good),
        (512, good),
        (1 << 16 | 16, good),
        (16, [RAM_BYTES, good[1], good[2]]),
        (16, [RAM_BYTES - 16, good[1], good[2]]),
        (16, [good[0], RAM_BYTES - 8, good[2]]),
        (16, [good[0], good[1], RAM_BYTES - 8]),
        (16, [good[0], good[1], u64::MAX - 3]),
        (16, [good[0] + 8, good[1], good[2]]),
        (16, [good[0], good[1] + 1, good[2]]),
        (16, [good[0], good[1], good[2] + 2]),
    ] {
        let mut driver = driver(0);
        driver.write(QUEUE, SEND as u32);
        driver.write(QUEUE_READY, 0);
        driver.place_queue(SEND, size, parts);
        driver.notify(SEND);
        assert_ne!(driver.read(STATUS), LIVE, "{size} {parts:x?}");
        driver.expect_broken(SEND);
    }
}

#[test]
fn what_is_written_to_a_queue_in_use_changes_nothing() {
    let mut driver = driver(0);
    driver.write(QUEUE, SEND as u32);
    driver.write(QUEUE_SIZE, 3);
    driver.write(USED, 1);
    driver.offer(SEND, &[Out(&[0; 72])]);
    driver.notify(SEND);
    assert_eq!(driver.used(SEND).len(), 1);
    // A queue that is not there takes anything.
    driver.write(QUEUE, 2);
    driver.write(QUEUE_SIZE, 3);
    driver.write(QUEUE_READY, 1);
    driver.write(QUEUE, u32::MAX);
    assert_eq!(driver.read(QUEUE_READY), 0);
}

#[test]
fn a_queue_taken_back_in_flight_is_served_no_more() {
    let mut driver = driver(0);
    driver.offer(SEND, &[Out(&[0; 72])]);
    driver.write(QUEUE, SEND as u32);
    driver.write(QUEUE_READY, 0);
    driver.notify(SEND);
    assert!(driver.outputs().is_empty() && driver.used(SEND).is_empty());
    assert_eq!(driver.read(STATUS), LIVE);
}

#[test]
fn the_driver_says_which_buffer_it_wants_to_hear_of() {
    let mut driver = driver(F_EVENT_INDEX);
    let wants = driver.base(SEND) + 0x4000 + 4 + 2 * u64::from(SIZE);
    driver.put(wants, &1u16.to_le_bytes());
    driver.offer(SEND, &[Out(&[0; 72])]);
    driver.notify(SEND);
    assert!(!driver.interrupted(), "it wants the second");
    driver.offer(SEND, &[Out(&[0; 72])]);
    driver.notify(SEND);
    assert!(driver.interrupted());
    driver.offer(SEND, &[Out(&[0; 72])]);
    driver.notify(SEND);
    assert!(!driver.interrupted(), "and no other");
}

#[test]
fn without_event_indexes_a_flag_says_whether_the_driver_wants_to_hear() {
    let mut driver = driver(0);
    let flags = driver.base(SEND) + 0x4000;
    driver.put(flags, &1u16.to_le_bytes());
    driver.offer(SEND, &[Out(&[0; 72])]);
    driver.notify(SEND);
    assert!(!driver.interrupted());
    driver.put(flags, &0u16.to_le_bytes());
    driver.notify(SEND);
    assert!(!driver.interrupted(), "nothing came back");
    driver.offer(SEND, &[Out(&[0; 72])]);
    driver.notify(SEND);
    assert!(driver.interrupted());
}

#[test]
fn indexes_run_on_past_65535() {
    let mut driver = driver(F_EVENT_INDEX);
    let wants = driver.base(SEND) + 0x4000 + 4 + 2 * u64::from(SIZE);
    for index in 0..70_000u32 {
        driver.put(wants, &(index as u16).to_le_bytes());
        let frame = [index as u8; 40];
        driver.put(0x20_0000, &frame);
        driver.describe(driver.base(SEND), 0, descriptor(0x20_0000, 40, 0, 0));
        driver.offer_head(SEND, 0);
        driver.notify(SEND);
        assert_eq!(driver.used(SEND).len(), 1, "{index}");
        assert!(driver.interrupted(), "{index}");
        assert_eq!(driver.outputs().len(), 1, "{index}");
    }
}

#[test]
fn a_saved_ring_that_no_driver_could_have_made_is_refused() {
    let mut ring = lone_ring(64);
    assert!(ring.is_possible(64) && !ring.is_possible(128));
    ring.size = 128;
    assert!(!ring.is_possible(64));
}
