//! What the pair of 8259As promises, as claims.

use super::Pic;

/// Initialised as Linux does it: vectors from 0x30, everything unmasked.
fn linux_pic() -> Pic {
    let mut pic = Pic::new();
    for (port, base, wiring) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
        pic.write(port, 0x11);
        pic.write(port + 1, base);
        pic.write(port + 1, wiring);
        pic.write(port + 1, 0x01);
        pic.write(port + 1, 0x00);
    }
    pic
}

fn in_service(pic: &mut Pic) -> (u8, u8) {
    pic.write(0x20, 0x0b);
    pic.write(0xa0, 0x0b);
    let both = (pic.read(0x20).unwrap(), pic.read(0xa0).unwrap());
    pic.write(0x20, 0x0a);
    pic.write(0xa0, 0x0a);
    both
}

#[test]
fn nothing_is_delivered_before_the_guest_initialises_the_controllers() {
    let mut pic = Pic::new();
    for irq in [0, 1, 4, 8, 15] {
        pic.pulse(irq);
    }
    assert!(!pic.interrupt_pending());
}

#[test]
fn an_edge_is_delivered_once_with_its_vector() {
    let mut pic = linux_pic();
    pic.set_line(4, true);
    assert!(pic.interrupt_pending());
    assert_eq!(pic.acknowledge(), 0x34);
    pic.write(0x20, 0x20);
    assert!(
        !pic.interrupt_pending(),
        "the line is still high, but the edge is spent"
    );
    pic.pulse(4);
    assert!(pic.interrupt_pending());
}

#[test]
fn an_edge_that_goes_away_before_the_acknowledge_is_a_spurious_irq_7() {
    let mut pic = linux_pic();
    pic.set_line(4, true);
    pic.set_line(4, false);
    assert!(!pic.interrupt_pending());
    assert_eq!(pic.acknowledge(), 0x37);
    assert_eq!(in_service(&mut pic), (0, 0));
}

#[test]
fn the_second_chip_interrupts_through_the_first() {
    let mut pic = linux_pic();
    pic.set_line(8, true);
    assert_eq!(pic.acknowledge(), 0x38);
    assert_eq!(in_service(&mut pic), (0x04, 0x01));
    pic.write(0xa0, 0x60);
    pic.write(0x20, 0x62);
    assert_eq!(in_service(&mut pic), (0, 0));
}

#[test]
fn two_requests_of_the_second_chip_are_both_delivered_even_with_auto_eoi() {
    let mut pic = linux_pic();
    for (port, base, wiring) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
        pic.write(port, 0x11);
        pic.write(port + 1, base);
        pic.write(port + 1, wiring);
        pic.write(port + 1, 0x03);
    }
    pic.set_line(12, true);
    pic.set_line(8, true);
    assert_eq!(pic.acknowledge(), 0x38);
    assert!(pic.interrupt_pending());
    assert_eq!(pic.acknowledge(), 0x3c);
    assert!(!pic.interrupt_pending());
}

#[test]
fn a_more_urgent_request_nests_and_a_less_urgent_one_waits_for_eoi() {
    let mut pic = linux_pic();
    pic.set_line(3, true);
    assert_eq!(pic.acknowledge(), 0x33);
    pic.set_line(5, true);
    assert!(!pic.interrupt_pending());
    pic.set_line(1, true);
    assert_eq!(pic.acknowledge(), 0x31);
    pic.write(0x20, 0x20); // ends IRQ1, the most urgent
    assert_eq!(in_service(&mut pic).0, 0x08);
    assert!(!pic.interrupt_pending());
    pic.write(0x20, 0x20);
    assert_eq!(pic.acknowledge(), 0x35);
}

#[test]
fn a_masked_request_waits_for_its_mask_to_open() {
    let mut pic = linux_pic();
    pic.write(0x21, 0x01);
    pic.set_line(0, true);
    assert!(!pic.interrupt_pending());
    assert_eq!(pic.read(0x20), Some(0x01), "IRR shows it all the same");
    pic.write(0x21, 0x00);
    assert!(pic.interrupt_pending());
}

#[test]
fn a_level_keeps_asking_until_the_line_falls() {
    let mut pic = linux_pic();
    pic.write(0x4d0, 0xff);
    assert_eq!(
        pic.read(0x4d0),
        Some(0xf8),
        "the timer, keyboard and cascade stay edges"
    );
    pic.set_line(5, true);
    assert_eq!(pic.acknowledge(), 0x35);
    pic.write(0x20, 0x20);
    assert!(pic.interrupt_pending());
    pic.set_line(5, false);
    assert!(!pic.interrupt_pending());
}

#[test]
fn rotation_makes_the_one_just_served_the_least_urgent() {
    let mut pic = linux_pic();
    pic.pulse(3);
    assert_eq!(pic.acknowledge(), 0x33);
    pic.write(0x20, 0xa0); // rotate on non-specific EOI
    pic.pulse(3);
    pic.pulse(7);
    assert_eq!(pic.acknowledge(), 0x37);
    pic.write(0x20, 0xe7); // rotate on specific EOI: IR7 lowest again
    pic.write(0x20, 0xc2); // set priority: IR2 lowest, IR3 highest
    pic.pulse(0);
    assert_eq!(pic.acknowledge(), 0x33);
}

#[test]
fn special_mask_mode_lets_the_others_through_a_masked_level_in_service() {
    let mut pic = linux_pic();
    pic.pulse(1);
    assert_eq!(pic.acknowledge(), 0x31);
    pic.pulse(6);
    pic.write(0x21, 0x02);
    assert!(!pic.interrupt_pending());
    pic.write(0x20, 0x68);
    assert_eq!(pic.acknowledge(), 0x36);
    pic.write(0x20, 0x20);
    assert_eq!(
        in_service(&mut pic).0,
        0x02,
        "a non-specific EOI passes over the masked level"
    );
}

#[test]
fn special_nesting_lets_a_more_urgent_request_of_the_same_slave_through() {
    let mut pic = linux_pic();
    pic.write(0x20, 0x11);
    pic.write(0x21, 0x30);
    pic.write(0x21, 0x04);
    pic.write(0x21, 0x11);
    pic.pulse(12);
    assert_eq!(pic.acknowledge(), 0x3c);
    pic.pulse(9);
    assert_eq!(pic.acknowledge(), 0x39);
}

#[test]
fn a_poll_names_the_request_and_acknowledges_it() {
    let mut pic = linux_pic();
    pic.pulse(4);
    pic.write(0x20, 0x0c);
    assert_eq!(pic.read(0x20), Some(0x84));
    assert!(!pic.interrupt_pending());
    assert_eq!(in_service(&mut pic).0, 0x10);
    pic.write(0x20, 0x0c);
    assert_eq!(pic.read(0x20).unwrap() & 0x80, 0);
}

#[test]
fn linux_finds_the_controller_by_its_mask_register() {
    let mut pic = Pic::new();
    pic.write(0x21, 0xfb);
    assert_eq!(pic.read(0x21), Some(0xfb));
}

#[test]
fn initialising_again_forgets_edges_and_opens_the_mask() {
    let mut pic = linux_pic();
    pic.write(0x21, 0xff);
    pic.set_line(4, true);
    pic.write(0x20, 0x11);
    assert!(
        !pic.interrupt_pending(),
        "not before the sequence is complete"
    );
    pic.write(0x21, 0x40);
    pic.write(0x21, 0x04);
    pic.write(0x21, 0x01);
    assert_eq!(pic.read(0x21), Some(0));
    assert!(!pic.interrupt_pending());
}
