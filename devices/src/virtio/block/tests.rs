use super::*;
use crate::virtio::Kind;
use crate::virtio::testing::{
    Buffer, CONFIG, Descriptor, Driver, F_EVENT_INDEX, F_INDIRECT, INDIRECT, INTERRUPT_ACK, In,
    NEXT, Out, STATUS, Used, WRITE,
};
use crate::{Reply, Width};

const SECTORS: u64 = 1 << 11;

fn spec(read_only: bool) -> DiskSpec {
    DiskSpec {
        bytes: SECTORS * SECTOR_BYTES,
        read_only,
        serial: "a-serial-number-of-some-length".into(),
    }
}

fn disk(read_only: bool) -> Driver {
    let kind = Kind::Block(Block::new(0, &spec(read_only)));
    let mut driver = Driver::start(kind, F_INDIRECT);
    for (index, byte) in driver.disk.0.iter_mut().enumerate() {
        *byte = (index / 512 + index) as u8;
    }
    driver
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn range(sector: u64, sectors: u32) -> [u8; 16] {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&sectors.to_le_bytes());
    range
}

/// Does one request: its status, how many bytes the device says it wrote, and where its buffers are.
fn request(driver: &mut Driver, buffers: &[Buffer<'_>]) -> (u8, u32, Vec<u64>) {
    let buffers = [buffers, &[In(1)]].concat();
    let places = driver.offer(0, &buffers);
    let status = places[buffers.len() - 1];
    driver.put(status, &[0xee]);
    driver.notify(0);
    let used = driver.used(0);
    let [Used { bytes, .. }] = used[..] else {
        panic!("{used:?}")
    };
    (driver.get(status, 1)[0], bytes, places)
}

#[test]
fn a_disk_says_how_large_it_is_and_what_it_can_do() {
    let mut driver = disk(false);
    let features = driver.features();
    assert_eq!(features & (WRITES | READ_ONLY), WRITES);
    let sectors = driver.device.read(CONFIG, Width::Qword);
    assert_eq!(sectors, Reply::Value(SECTORS));
    assert_eq!(driver.read(CONFIG + 20), 512);
    let mut driver = disk(true);
    assert_eq!(driver.features() & (WRITES | READ_ONLY), READ_ONLY);
}

#[test]
fn a_request_is_done_when_its_notification_is_over() {
    let mut driver = disk(false);
    let (status, bytes, places) = request(&mut driver, &[Out(&header(0, 5)), In(512), In(1024)]);
    assert_eq!((status, bytes), (OK, 1537));
    assert_eq!(driver.get(places[1], 512), driver.disk.0[5 * 512..][..512]);
    assert_eq!(
        driver.get(places[2], 1024),
        driver.disk.0[6 * 512..][..1024]
    );
    assert!(driver.interrupted());

    let data: Vec<u8> = (0..1536).map(|i| (i % 251) as u8).collect();
    let buffers = [Out(&header(1, 2040)), Out(&data[..100]), Out(&data[100..])];
    let (status, bytes, _) = request(&mut driver, &buffers);
    assert_eq!((status, bytes), (OK, 1));
    assert_eq!(driver.disk.0[2040 * 512..][..1536], data);

    assert_eq!(request(&mut driver, &[Out(&header(4, 0))]).0, OK, "flush");
    let (status, bytes, places) = request(&mut driver, &[Out(&header(8, 0)), In(20)]);
    assert_eq!((status, bytes), (OK, 21));
    assert_eq!(driver.get(places[1], 20), b"a-serial-number-of-s");
}

/// Makes a request of `segments` of `bytes` each available, in a table of its own. All segments are the same memory,
/// which is returned, with where the status is.
fn large(driver: &mut Driver, kind: u32, segments: u16, bytes: u32) -> (u64, u64) {
    let data = 4 << 20;
    let (table, head, status) = (
        driver.allocate(0x4000),
        driver.allocate(16),
        driver.allocate(1),
    );
    driver.put(head, &header(kind, 0));
    driver.put(status, &[0xee]);
    let describe = |index, gpa, bytes, flags| {
        let next = index + 1;
        let descriptor = Descriptor {
            gpa,
            bytes,
            flags,
            next,
        };
        driver.describe(table, index, descriptor);
    };
    let flags = if kind == 0 { WRITE } else { 0 };
    describe(0, head, 16, NEXT);
    for index in 1..=segments {
        describe(index, data, bytes, flags | NEXT);
    }
    describe(segments + 1, status, 1, WRITE);
    let one = Descriptor {
        gpa: table,
        bytes: 16 * (u32::from(segments) + 2),
        flags: INDIRECT,
        next: 0,
    };
    driver.describe(driver.base(0), 0, one);
    driver.offer_head(0, 0);
    (data, status)
}

/// A disk of 65 MiB.
fn large_disk() -> Driver {
    let bytes = 65 << 20;
    let spec = DiskSpec {
        bytes,
        ..spec(false)
    };
    let mut driver = Driver::start(Kind::Block(Block::new(0, &spec)), F_INDIRECT);
    driver.disk.0 = (0..bytes)
        .map(|at| (at >> 9) as u8 ^ (at >> 18) as u8)
        .collect();
    driver
}

#[test]
fn a_request_as_large_as_the_driver_was_told_is_done_whole() {
    let mut driver = large_disk();
    let (size, segments) = (driver.read(CONFIG + 8), driver.read(CONFIG + 12));
    assert_ne!(driver.features() & SIZE_MAX, 0);
    let whole = size * segments;
    let (data, status) = large(&mut driver, 0, segments as u16, size);
    driver.notify(0);
    assert_eq!(
        driver.used(0)[..],
        [Used {
            head: 0,
            bytes: whole + 1
        }]
    );
    assert_eq!(driver.get(status, 1), [OK]);
    let last = (whole - size) as usize;
    assert!(driver.get(data, size as usize) == driver.disk.0[last..][..size as usize]);
    driver.put(data, &vec![0x77; size as usize]);
    let (_, status) = large(&mut driver, 1, segments as u16, size);
    driver.notify(0);
    assert_eq!(driver.get(status, 1), [OK]);
    assert!(
        driver.disk.0[..whole as usize]
            .iter()
            .all(|byte| *byte == 0x77)
    );
    assert!(driver.disk.0[whole as usize] != 0x77);
}

#[test]
fn a_driver_that_was_told_of_sizes_and_makes_larger_ones_is_served_up_to_64_mib_in_all() {
    for (segments, bytes, expected) in [
        (16, 4 << 20, OK),
        (1, 3 << 20, OK),
        (17, 4 << 20, IO_ERROR),
        (900, 512, OK),
    ] {
        let mut driver = large_disk();
        let (_, status) = large(&mut driver, 0, segments, bytes);
        driver.notify(0);
        assert_eq!(driver.get(status, 1), [expected], "{segments} of {bytes}");
    }
}

#[test]
fn a_discard_of_as_much_as_the_driver_was_told_is_done_whole() {
    let sectors = u64::from(CLEAR_SECTORS_MAX);
    let spec = DiskSpec {
        bytes: sectors * SECTOR_BYTES,
        ..spec(false)
    };
    for kind in [11, 13] {
        let mut driver = Driver::start(Kind::Block(Block::new(0, &spec)), F_INDIRECT);
        driver.disk.0 = vec![1; spec.bytes as usize];
        assert_eq!(driver.read(CONFIG + 36), CLEAR_SECTORS_MAX);
        let ranges = vec![range(0, CLEAR_SECTORS_MAX); CLEAR_SEGMENTS_MAX as usize].concat();
        let (status, ..) = request(&mut driver, &[Out(&header(kind, 0)), Out(&ranges)]);
        assert_eq!(status, OK);
        assert!(driver.disk.0.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn requests_of_one_notification_are_done_in_their_order() {
    let mut driver = disk(false);
    let ones = [1; 512];
    driver.set_up(F_INDIRECT | F_EVENT_INDEX);
    driver.offer(0, &[Out(&header(1, 0)), Out(&ones), In(1)]);
    let read = driver.offer_indirect(0, &[Out(&header(0, 0)), In(512), In(1)]);
    driver.offer(0, &[Out(&header(13, 0)), Out(&range(0, 1)), In(1)]);
    driver.notify(0);
    assert_eq!(driver.used(0).len(), 3);
    assert_eq!(driver.get(read[1], 512), ones);
    assert_eq!(driver.disk.0[..512], [0; 512]);
}

#[test]
fn what_is_discarded_or_zeroed_reads_as_zeroes() {
    for kind in [11, 13] {
        let mut driver = disk(false);
        let ranges = [range(3, 2), range(100, 1)].concat();
        let (status, ..) = request(&mut driver, &[Out(&header(kind, 0)), Out(&ranges)]);
        assert_eq!(status, OK);
        assert_eq!(driver.disk.0[3 * 512..5 * 512], [0; 1024]);
        assert_eq!(driver.disk.0[100 * 512..][..512], [0; 512]);
        assert_ne!(driver.disk.0[5 * 512..][..512], [0; 512]);
    }
}

#[test]
fn what_is_not_on_the_disk_is_an_error_and_does_nothing() {
    let data = [0x55; 1024];
    let many = vec![range(0, 1); CLEAR_SEGMENTS_MAX as usize + 1].concat();
    let mut driver = disk(false);
    let before = driver.disk.0.clone();
    for buffers in [
        [Out(&header(0, SECTORS)), In(512)],
        [Out(&header(0, SECTORS - 1)), In(1024)],
        [Out(&header(0, u64::MAX)), In(512)],
        [Out(&header(0, u64::MAX / 512)), In(512)],
        [Out(&header(0, 1 << 60)), In(512)],
        [Out(&header(0, 0)), In(0)],
        [Out(&header(0, 0)), In(511)],
        [Out(&header(1, SECTORS - 1)), Out(&data)],
        [Out(&header(1, u64::MAX)), Out(&data)],
        [Out(&header(1, 0)), Out(&data[..513])],
        [Out(&header(11, 0)), Out(&range(SECTORS, 1))],
        [Out(&header(11, 0)), Out(&range(u64::MAX, u32::MAX))],
        [Out(&header(13, 0)), Out(&range(0, u32::MAX))],
        [Out(&header(13, 0)), Out(&range(0, 1)[..15])],
        [Out(&header(13, 0)), Out(&many)],
    ] {
        let (status, bytes, _) = request(&mut driver, &buffers);
        assert_eq!((status, bytes), (IO_ERROR, 1), "{buffers:?}");
        assert!(driver.disk.0 == before, "{buffers:?}");
    }
    let (status, ..) = request(&mut driver, &[Out(&header(77, 0))]);
    assert_eq!(status, UNSUPPORTED);
}

#[test]
fn too_much_for_one_exit_goes_on_when_the_interrupt_is_acknowledged() {
    for features in [0, F_EVENT_INDEX] {
        let mut driver = Driver::start(Kind::Block(Block::new(0, &spec(false))), features);
        // The same discard 12 times over, by a driver that wants no interrupt before all are done.
        let (discard, range) = (header(11, 0), range(0, 1));
        driver.offer(0, &[Out(&discard), Out(&range), In(1)]);
        for _ in 1..12 {
            driver.offer_head(0, 0);
        }
        let ring = driver.base(0) + 0x4000;
        driver.put(ring, &1u16.to_le_bytes());
        driver.put(ring + 4 + 2 * 16, &11u16.to_le_bytes());
        driver.notify(0);
        assert_eq!(driver.used(0).len(), 8, "so much and no more");
        assert!(driver.device.line(), "the driver must come back");
        driver.write(INTERRUPT_ACK, 1);
        assert_eq!(driver.used(0).len(), 4, "the rest");
        assert_eq!(
            driver.device.line(),
            features == F_EVENT_INDEX,
            "as it wanted"
        );
        driver.write(INTERRUPT_ACK, 1);
        assert!(!driver.device.line());
        assert!(driver.used(0).is_empty());
    }
}

#[test]
fn a_reset_forgets_what_was_left_for_later() {
    let mut driver = Driver::start(Kind::Block(Block::new(0, &spec(false))), 0);
    let (discard, range) = (header(11, 0), range(0, 1));
    driver.offer(0, &[Out(&discard), Out(&range), In(1)]);
    for _ in 1..12 {
        driver.offer_head(0, 0);
    }
    driver.notify(0);
    driver.set_up(0);
    driver.write(INTERRUPT_ACK, 1);
    assert!(driver.used(0).is_empty() && !driver.device.line());
    let (status, ..) = request(&mut driver, &[Out(&header(0, 0)), In(512)]);
    assert_eq!(status, OK);
}

#[test]
fn a_disk_that_is_read_only_refuses_writes() {
    let mut driver = disk(true);
    let before = driver.disk.0.clone();
    for buffers in [
        [Out(&header(1, 0)), Out(&[1; 512])],
        [Out(&header(11, 0)), Out(&range(0, 1))],
        [Out(&header(13, 0)), Out(&range(0, 1))],
    ] {
        assert_eq!(request(&mut driver, &buffers).0, IO_ERROR);
    }
    assert!(driver.disk.0 == before);
    assert_eq!(request(&mut driver, &[Out(&header(0, 0)), In(512)]).0, OK);
}

#[test]
fn a_request_without_header_or_status_breaks_the_disk() {
    for buffers in [
        &[Out(&header(0, 0)[..15]), In(1)] as &[Buffer<'_>],
        &[Out(&header(0, 0)), Out(&[0; 512])],
        &[In(1)],
        &[In(512), In(1)],
    ] {
        let mut driver = disk(false);
        driver.offer(0, buffers);
        driver.notify(0);
        assert_ne!(driver.read(STATUS) & 0x40, 0, "{buffers:?}");
        driver.expect_broken(0);
    }
}
