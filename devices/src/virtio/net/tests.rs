use super::*;
use crate::virtio::Kind;
use crate::virtio::testing::{
    CONFIG, Driver, F_EVENT_INDEX, F_INDIRECT, In, NOTIFY, Out, SIZE, STATUS as STATUS_REGISTER,
    Used,
};
use crate::{Reply, Width};

const HEADER: [u8; HEADER_BYTES] = [0; HEADER_BYTES];

fn card() -> Kind {
    Kind::Net(Net::new(&NetSpec::default()))
}

fn frame(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i * 7 + bytes) as u8).collect()
}

fn sent(driver: &mut Driver) -> Vec<Vec<u8>> {
    let frame = |output| match output {
        Output::Frame(frame) => frame,
        other => panic!("a card gave {other:?}"),
    };
    driver.outputs().into_iter().map(frame).collect()
}

#[test]
fn a_card_says_its_address_and_that_the_link_is_up() {
    let mut driver = Driver::find(card());
    assert_eq!(
        driver.features() & 0xff_ffff,
        MAC | MERGE | STATUS,
        "no offloads"
    );
    let byte = |at| driver.device.read(CONFIG + at, Width::Byte);
    let mac: Vec<Reply> = (0..6).map(byte).collect();
    let expected = NetSpec::default().mac.map(|byte| Reply::Value(byte.into()));
    assert_eq!(mac, expected);
    let status = driver.device.read(CONFIG + 6, Width::Word);
    assert_eq!(status, Reply::Value(1));
}

#[test]
fn each_chain_of_a_notification_is_a_frame_that_leaves() {
    let mut driver = Driver::start(card(), F_EVENT_INDEX);
    let frames = [frame(60), frame(1514), frame(FRAME_BYTES_MAX)];
    driver.offer(SEND, &[Out(&HEADER), Out(&frames[0])]);
    let whole = [&HEADER[..], &frames[1]].concat();
    driver.offer(SEND, &[Out(&whole)]);
    let (first, rest) = frames[2].split_at(5);
    driver.offer(
        SEND,
        &[Out(&HEADER[..7]), Out(&HEADER[7..]), Out(first), Out(rest)],
    );
    assert!(sent(&mut driver).is_empty(), "nobody was told yet");
    driver.notify(SEND);
    assert!(driver.interrupted());
    assert_eq!(sent(&mut driver), frames);
    assert!(sent(&mut driver).is_empty(), "each leaves once");
    let used = driver.used(SEND);
    assert_eq!(used.len(), 3);
    assert!(used.iter().all(|used| used.bytes == 0), "{used:?}");
}

#[test]
fn what_is_no_frame_goes_nowhere_and_comes_back() {
    let mut driver = Driver::start(card(), F_INDIRECT);
    driver.offer(SEND, &[Out(&HEADER), Out(&frame(FRAME_BYTES_MIN - 1))]);
    driver.offer(SEND, &[Out(&HEADER[..3])]);
    driver.offer(SEND, &[In(2000)]);
    driver.offer(SEND, &[Out(&HEADER), Out(&frame(FRAME_BYTES_MAX + 1))]);
    driver.offer(SEND, &[Out(&HEADER), Out(&frame(FRAME_BYTES_MIN))]);
    driver.notify(SEND);
    assert_eq!(sent(&mut driver), [frame(FRAME_BYTES_MIN)]);
    assert_eq!(driver.used(SEND).len(), 5);
}

#[test]
fn one_notification_sends_a_ring_of_the_longest_frames_at_most() {
    let mut driver = Driver::start(card(), F_INDIRECT);
    let longest = frame(FRAME_BYTES_MAX);
    driver.offer(SEND, &[Out(&HEADER), Out(&longest)]);
    // The same chain as often as the ring's index can say.
    for _ in 1..SIZE {
        driver.offer_head(SEND, 0);
    }
    driver.notify(SEND);
    assert_eq!(sent(&mut driver).len(), usize::from(SIZE));
}

#[test]
fn a_frame_that_comes_fills_the_next_buffer() {
    for features in [0, F_EVENT_INDEX, F_INDIRECT | F_EVENT_INDEX] {
        let mut driver = Driver::start(card(), features);
        assert_eq!(driver.room().frames, 0);
        let first = driver.offer(RECEIVE, &[In(1526)]);
        let second = if features & F_INDIRECT == 0 {
            driver.offer(RECEIVE, &[In(12), In(70), In(1444)])
        } else {
            driver.offer_indirect(RECEIVE, &[In(12), In(70), In(1444)])
        };
        driver.notify(RECEIVE);
        assert_eq!(driver.room().frames, 2);
        driver.accept(Input::Frame(frame(60)));
        assert_eq!(driver.room().frames, 1);
        assert!(driver.interrupted());
        driver.accept(Input::Frame(frame(1514)));
        assert_eq!(driver.room().frames, 0);
        let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        let expected = [&header[..], &frame(60)].concat();
        assert_eq!(driver.get(first[0], 72), expected);
        assert_eq!(driver.get(second[0], 12), header);
        assert_eq!(driver.get(second[1], 70), frame(1514)[..70]);
        assert_eq!(driver.get(second[2], 1444), frame(1514)[70..]);
        let lengths: Vec<u32> = driver.used(RECEIVE).iter().map(|used| used.bytes).collect();
        assert_eq!(lengths, [72, 1526]);
    }
}

#[test]
fn a_frame_without_a_buffer_that_it_fits_is_lost_and_the_buffer_is_not() {
    let mut driver = Driver::start(card(), F_EVENT_INDEX);
    driver.accept(Input::Frame(frame(60)));
    assert!(driver.used(RECEIVE).is_empty() && !driver.interrupted());
    let place = driver.offer(RECEIVE, &[In(100)]);
    driver.accept(Input::Frame(frame(89)));
    assert!(driver.used(RECEIVE).is_empty() && !driver.interrupted());
    assert_eq!(driver.get(place[0], 100), [0; 100], "nothing was begun");
    assert_eq!(driver.room().frames, 1);
    driver.accept(Input::Frame(frame(88)));
    assert_eq!(
        driver.used(RECEIVE),
        [Used {
            head: 0,
            bytes: 100
        }]
    );
    assert_eq!(driver.get(place[0] + 12, 88), frame(88));
}

#[test]
fn a_frame_longer_than_a_buffer_takes_several_if_the_driver_merges_them() {
    let mut driver = Driver::start(card(), MERGE | F_EVENT_INDEX);
    for _ in 0..3 {
        driver.offer(RECEIVE, &[In(1000)]);
    }
    driver.accept(Input::Frame(frame(3000)));
    assert!(driver.used(RECEIVE).is_empty() && !driver.interrupted());
    assert_eq!(driver.room().frames, 3, "what does not fit takes nothing");
    let first = driver.offer(RECEIVE, &[In(1000)]);
    driver.accept(Input::Frame(frame(2500)));
    assert!(driver.interrupted());
    let used: Vec<u32> = driver.used(RECEIVE).iter().map(|used| used.bytes).collect();
    assert_eq!(used, [1000, 1000, 512]);
    // Buffers stand one after the other in this memory, at multiples of 16.
    let base = first[0] - 3 * 1008;
    assert_eq!(driver.get(base, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
    let parts = [(base + 12, 988), (base + 1008, 1000), (base + 2016, 512)];
    let read: Vec<u8> = parts
        .into_iter()
        .flat_map(|(at, bytes)| driver.get(at, bytes))
        .collect();
    assert!(read == frame(2500));
    driver.accept(Input::Frame(frame(60)));
    assert_eq!(driver.get(first[0] + 10, 2), [1, 0]);
    // A driver that starts afresh may want none of it.
    driver.set_up(0);
    driver.offer(RECEIVE, &[In(1000)]);
    driver.offer(RECEIVE, &[In(1000)]);
    driver.accept(Input::Frame(frame(1200)));
    assert!(driver.used(RECEIVE).is_empty());
}

#[test]
fn a_driver_says_that_there_are_buffers_only_where_there_were_none() {
    // The exit that it costs is what this is about (virtio 1.3, 2.7.10).
    let mut driver = Driver::start(card(), F_EVENT_INDEX);
    let event = driver.base(RECEIVE) + 0x8000 + 4 + 8 * u64::from(SIZE);
    for _ in 0..3 {
        driver.offer(RECEIVE, &[In(1526)]);
    }
    driver.accept(Input::Frame(frame(60)));
    driver.accept(Input::Frame(frame(60)));
    assert_eq!(driver.get_u16(event), 0, "two of three are left: be quiet");
    driver.accept(Input::Frame(frame(60)));
    assert_eq!(driver.get_u16(event), 3, "tell of the fourth");
}

#[test]
fn what_a_driver_does_to_its_card_stays_there() {
    let mut driver = Driver::start(card(), 0);
    driver.write(NOTIFY, 2);
    driver.write(NOTIFY, u32::MAX);
    driver.write(CONFIG, 0x1234_5678);
    assert_eq!(
        driver.device.read(CONFIG, Width::Word),
        Reply::Value(0x5452)
    );
    assert!(driver.outputs().is_empty());
}

#[test]
fn a_card_that_was_reset_forgets_its_buffers() {
    let mut driver = Driver::start(card(), 0);
    driver.offer(RECEIVE, &[In(1526)]);
    driver.write(STATUS_REGISTER, 0);
    assert_eq!(driver.room().frames, 0);
    driver.accept(Input::Frame(frame(60)));
    assert!(driver.used(RECEIVE).is_empty());
    driver.set_up(0);
    assert_eq!(driver.room().frames, 0);
    driver.offer(RECEIVE, &[In(1526)]);
    driver.accept(Input::Frame(frame(60)));
    assert_eq!(driver.used(RECEIVE).len(), 1);
}
