use super::*;
use crate::virtio::NetSpec;
use crate::virtio::entropy::Entropy;
use crate::virtio::net::Net;
use crate::virtio::testing::{
    ACKNOWLEDGE, DRIVER, DRIVER_FEATURES, DRIVER_FEATURES_PAGE, DRIVER_OK, Driver, F_EVENT_INDEX,
    F_INDIRECT, F_VERSION_1, FEATURES_OK, In, LIVE, NEEDS_RESET, NOTIFY, Out, QUEUE, QUEUE_MAX,
    QUEUE_READY, QUEUE_SIZE, STATUS,
};

fn source() -> Kind {
    Kind::Entropy(Entropy::new())
}

fn card() -> Kind {
    Kind::Net(Net::new(&NetSpec::default()))
}

#[test]
fn a_device_says_what_it_is() {
    let mut driver = Driver::find(card());
    assert_eq!(driver.read(0x000).to_le_bytes(), *b"virt");
    assert_eq!((driver.read(0x004), driver.read(0x008)), (2, 1));
    let common = F_INDIRECT | F_EVENT_INDEX | F_VERSION_1;
    assert_eq!(driver.features() & common, common);
    driver.write(0x014, 2);
    assert_eq!(driver.read(0x010), 0, "there are 64 features");
    assert_eq!(driver.read(QUEUE_MAX), 256);
    driver.write(QUEUE, 2);
    assert_eq!(driver.read(QUEUE_MAX), 0, "no third queue");
    assert_eq!(driver.read(0x0b0), u32::MAX, "no shared memory");
}

#[test]
fn registers_want_accesses_of_32_bits() {
    let mut driver = Driver::find(source());
    assert_eq!(driver.device.read(0, Width::Byte), Reply::Value(0));
    assert_eq!(driver.device.read(0, Width::Qword), Reply::Value(0));
    let mut disk = crate::NoDisks;
    let mut context = BusContext {
        ram: &driver.ram,
        storage: &mut disk,
    };
    let written = driver
        .device
        .write(STATUS, Width::Byte, 1, &mut context)
        .is_ok();
    assert!(written);
    assert_eq!(driver.read(STATUS), 0);
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    for (features, accepted) in [
        (F_VERSION_1, true),
        (F_VERSION_1 | F_INDIRECT, true),
        (F_INDIRECT, false),
        (0, false),
        (F_VERSION_1 | 1 << 40, false),
        (F_VERSION_1 | 1, false),
    ] {
        let mut driver = Driver::find(source());
        driver.write(STATUS, ACKNOWLEDGE | DRIVER);
        driver.accept_features(features);
        driver.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        let status = driver.read(STATUS);
        assert_eq!(status & FEATURES_OK != 0, accepted, "{features:#x}");
    }
}

#[test]
fn features_stand_once_they_were_accepted() {
    let mut driver = Driver::start(source(), 0);
    driver.write(DRIVER_FEATURES_PAGE, 0);
    driver.write(DRIVER_FEATURES, 1);
    driver.write(STATUS, LIVE);
    assert_eq!(driver.read(STATUS), LIVE);
    assert_eq!(driver.device.driver_features, F_VERSION_1);
}

#[test]
fn queues_are_ready_only_after_the_features() {
    let mut driver = Driver::find(source());
    driver.write(STATUS, ACKNOWLEDGE | DRIVER);
    driver.place_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    assert_eq!(driver.read(QUEUE_READY), 0);
}

#[test]
fn a_ring_larger_than_was_offered_can_be_saved_and_breaks_the_device_when_it_is_used() {
    for size in [257, 512, 0x8000, 0xffff, 0x1_0000, u32::MAX] {
        let mut driver = Driver::start(card(), 0);
        driver.write(QUEUE, 1);
        driver.write(QUEUE_READY, 0);
        driver.place_queue(1, size, [0x1_0000, 0x2_0000, 0x3_0000]);
        assert!(driver.device.is_possible(), "{size}");
        driver.notify(1);
        driver.expect_broken(1);
    }
}

#[test]
fn nothing_is_served_without_the_features_agreed() {
    let mut driver = Driver::start(card(), 0);
    driver.write(STATUS, LIVE & !FEATURES_OK);
    driver.offer(1, &[Out(&[0; 72])]);
    driver.notify(1);
    assert!(driver.outputs().is_empty() && driver.used(1).is_empty());
}

#[test]
fn nothing_is_served_before_the_driver_says_that_it_is_ready() {
    let mut driver = Driver::start(card(), 0);
    driver.write(STATUS, LIVE & !DRIVER_OK);
    driver.offer(0, &[In(1526)]);
    driver.offer(1, &[Out(&[0; 72])]);
    driver.notify(1);
    driver.accept(Input::Frame(vec![1; 60]));
    assert!(driver.outputs().is_empty());
    assert!(driver.used(0).is_empty() && driver.used(1).is_empty());
    assert_eq!(driver.room(), Room::default());
    assert_eq!(driver.read(STATUS) & NEEDS_RESET, 0, "nor is it broken");
    driver.write(STATUS, LIVE);
    driver.notify(1);
    assert_eq!(driver.outputs().len(), 1);
    assert_eq!(driver.room().frames, 1);
}

#[test]
fn a_reset_in_flight_leaves_a_device_as_at_power_on() {
    let mut driver = Driver::start(card(), F_EVENT_INDEX);
    driver.offer(0, &[In(1526)]);
    driver.offer(1, &[Out(&[0; 72])]);
    driver.notify(1);
    driver.outputs();
    driver.offer(1, &[Out(&[0; 72])]);
    assert!(driver.device.line());
    driver.write(STATUS, 0);
    assert_eq!(driver.device, Transport::new(card()));
    driver.notify(1);
    assert!(!driver.device.line() && driver.outputs().is_empty());
    driver.set_up(F_EVENT_INDEX);
    driver.offer(1, &[Out(&[0; 72])]);
    driver.notify(1);
    assert_eq!((driver.used(1).len(), driver.outputs().len()), (1, 1));
}

#[test]
fn registers_that_are_not_there_take_anything_and_read_as_zero() {
    let mut driver = Driver::find(card());
    for register in (0..0x1000).step_by(4) {
        let known = matches!(register, 0..=0x10 | 0x34 | 0x60 | 0x70 | 0xb0..=0xbc | 0xfc)
            || register >= 0x100;
        assert!(known || driver.read(register) == 0, "{register:#x}");
    }
    for register in (0..0x1000).step_by(4).filter(|at| *at != STATUS) {
        driver.write(register, u32::MAX);
    }
    driver.write(NOTIFY, 1);
    driver.write(QUEUE_SIZE, u32::MAX);
    assert!(!driver.device.line() && driver.outputs().is_empty());
}

#[test]
fn a_saved_device_of_another_shape_is_refused() {
    let mut device = Transport::new(card());
    assert!(device.is_possible());
    device.rings.pop();
    assert!(!device.is_possible());
}
