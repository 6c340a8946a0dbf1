use super::*;
use crate::virtio::Kind;
use crate::virtio::testing::{Driver, In, Out, Used};

fn console() -> Driver {
    Driver::start(Kind::Console(Console::new()), SIZE)
}

#[test]
fn what_the_guest_writes_leaves_in_the_order_of_its_chains() {
    let mut driver = console();
    driver.offer(TRANSMIT, &[Out(b"Debian "), Out(b"GNU/")]);
    driver.offer(TRANSMIT, &[Out(b"Linux")]);
    driver.notify(TRANSMIT);
    let mut outputs = Vec::new();
    driver.device.take_output(&mut outputs);
    assert_eq!(
        outputs,
        [Output::VirtioConsole(b"Debian GNU/Linux".to_vec())]
    );
    outputs.clear();
    driver.device.take_output(&mut outputs);
    assert_eq!(outputs, []);
    assert_eq!(driver.used(TRANSMIT).len(), 2);
}

#[test]
fn what_is_typed_fills_buffers_and_the_rest_waits_for_more() {
    let mut driver = console();
    let first = driver.offer(RECEIVE, &[In(4)]);
    driver.accept(Input::VirtioConsole(b"poweroff\n".to_vec()));
    assert!(driver.interrupted());
    assert_eq!(driver.used(RECEIVE), [Used { head: 0, bytes: 4 }]);
    assert_eq!(driver.get(first[0], 4), b"powe");
    assert_eq!(driver.room().virtio_console, BACKLOG_BYTES - 5);
    let second = driver.offer(RECEIVE, &[In(64)]);
    driver.notify(RECEIVE);
    assert_eq!(driver.get(second[0], 5), b"roff\n");
    assert_eq!(driver.room().virtio_console, BACKLOG_BYTES);
}

#[test]
fn a_buffer_without_room_comes_back_empty_and_loses_nothing() {
    let mut driver = console();
    driver.offer(RECEIVE, &[Out(b"no room")]);
    let place = driver.offer(RECEIVE, &[In(8)]);
    driver.accept(Input::VirtioConsole(b"hello".to_vec()));
    assert_eq!(driver.get(place[0], 5), b"hello");
}

#[test]
fn a_window_that_changes_interrupts_and_counts_a_generation() {
    let mut driver = console();
    let generation = driver.read(0x0fc);
    driver.accept(Input::Resize {
        columns: 132,
        rows: 43,
    });
    assert_eq!(driver.read(0x100), 43 << 16 | 132);
    assert_eq!(driver.read(0x060), 2, "the configuration has changed");
    assert_ne!(driver.read(0x0fc), generation);
    driver.write(0x064, 2);
    driver.accept(Input::Resize {
        columns: 132,
        rows: 43,
    });
    assert_eq!(driver.read(0x060), 0, "nothing has changed");
}

#[test]
fn a_driver_that_is_ready_is_told_that_there_is_a_size() {
    let mut driver = console();
    assert_eq!(driver.read(0x060), 2, "as if it had changed");
    assert_eq!(driver.read(0x100), 25 << 16 | 80);
    driver.write(0x064, 2);
    driver.write(0x070, driver.read(0x070));
    assert_eq!(driver.read(0x060), 0, "it was ready before");
}

#[test]
fn of_an_endless_chain_a_part_is_shown() {
    let mut driver = console();
    let bytes = vec![b'x'; CHAIN_BYTES_MAX];
    driver.offer(TRANSMIT, &[Out(&bytes), Out(b"and more")]);
    driver.notify(TRANSMIT);
    let mut outputs = Vec::new();
    driver.device.take_output(&mut outputs);
    assert_eq!(outputs, [Output::VirtioConsole(bytes)]);
}
