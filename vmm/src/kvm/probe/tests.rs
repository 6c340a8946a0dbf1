//! Guests that hang, fault and come to their end.

use super::*;

#[test]
fn work_that_ends_gives_its_result_and_a_panic_is_told() {
    assert_eq!(bounded(Duration::from_secs(5), |_| 7), Ok(7));
    let panicked = bounded(Duration::from_secs(5), |_| -> u8 {
        panic!("as the test wants")
    });
    assert_eq!(panicked, Err(Stuck::Panicked));
}

#[test]
fn work_that_waits_for_ever_is_called_off_or_left_behind() {
    let called_off = bounded(Duration::from_millis(20), |late| {
        while !late.is_up() {
            std::thread::sleep(Duration::from_secs(60));
        }
        // std's sleep goes on after a signal, so only its thread's end is bounded.
    });
    assert_eq!(called_off, Err(Stuck::InKvm));
    let polite = bounded(Duration::from_millis(20), |late| {
        while !late.is_up() {
            std::thread::sleep(Duration::from_millis(1));
        }
        1
    });
    assert_eq!(polite, Ok(1));
}

#[test]
fn a_kick_before_the_guest_is_entered_brings_it_back_at_once() {
    let Ok(kvm) = Kvm::new() else { return };
    let table = cpuid::for_host(&kvm).unwrap();
    let stops = bounded(Duration::from_secs(5), move |late| {
        let mut vm = ProbeVm::new(&kvm, &table, late).unwrap();
        vm.load(
            &hindsight_guest_images::micro::dense_branches(Ring::Kernel),
            0,
        )
        .unwrap();
        // Left alone, this guest runs for minutes.
        let mut stops = Vec::new();
        for _ in 0..100 {
            signals::Kicker::for_this_thread().unwrap().kick();
            stops.push(vm.run_or_kick().unwrap());
        }
        stops
    });
    assert_eq!(stops, Ok(vec![None; 100]));
}
