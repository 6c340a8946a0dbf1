use super::*;
use crate::virtio::Kind;
use crate::virtio::testing::{Driver, In, Out, Used};

fn source() -> Driver {
    Driver::start(Kind::Entropy(Entropy::new()), 0)
}

#[test]
fn a_request_waits_for_bytes_and_gets_as_many_as_it_has_room_for() {
    let mut driver = source();
    assert_eq!(driver.room().entropy, 0);
    let place = driver.offer(0, &[In(24), In(24)]);
    driver.notify(0);
    assert!(
        driver.used(0).is_empty(),
        "nothing is random here by itself"
    );
    assert_eq!(driver.room().entropy, BYTES_MAX);
    let bytes: Vec<u8> = (1..=64).collect();
    driver.accept(Input::Entropy(bytes.clone()));
    assert!(driver.interrupted());
    assert_eq!(driver.used(0), [Used { head: 0, bytes: 48 }]);
    assert_eq!(driver.get(place[0], 24), bytes[..24]);
    assert_eq!(driver.get(place[1], 24), bytes[24..48]);
    assert_eq!(driver.room().entropy, 0);
}

#[test]
fn bytes_that_nobody_asked_for_are_lost() {
    let mut driver = source();
    driver.accept(Input::Entropy(vec![9; 64]));
    let place = driver.offer(0, &[In(16)]);
    driver.notify(0);
    assert!(driver.used(0).is_empty());
    driver.accept(Input::Entropy(vec![3; 5]));
    assert_eq!(driver.used(0), [Used { head: 0, bytes: 5 }]);
    assert_eq!(driver.get(place[0], 16)[..6], [3, 3, 3, 3, 3, 0]);
}

#[test]
fn a_request_without_room_comes_back_with_nothing() {
    let mut driver = source();
    driver.offer(0, &[Out(b"what is this?")]);
    driver.notify(0);
    driver.accept(Input::Entropy(vec![3; 64]));
    assert_eq!(driver.used(0), [Used { head: 0, bytes: 0 }]);
}
