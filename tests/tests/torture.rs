//! The landing torture itself: it comes to its end with the same checksum every time, and an
//! interrupt one instruction off changes that. Rings 0 and 3, where the host's KVM has both;
//! else the test says so and passes.

use hindsight_tests::skip::skip;
use std::time::Duration;

use hindsight_guest_images::layout::DATA;
use hindsight_guest_images::micro::{self, Reach, TORTURE_VECTOR, Torture, Tortured};
use hindsight_guest_images::{MicroGuest, Ring};
use hindsight_vmm::kvm::probe::{Fault, Late, ProbeVm, Stop, bounded};
use hindsight_vmm::kvm::{KvmError, cpuid};
use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP};
use kvm_ioctls::Kvm;

/// Emulated ring 0 in an emulated machine needs a tenth of this.
const LIMIT: Duration = Duration::from_secs(60);

fn torture(seed: u64, reach: Reach) -> Torture {
    Torture {
        seed,
        rounds: 6,
        reach,
        timer_ticks: None,
    }
}

/// A VM; nothing where there is no KVM.
fn fresh(late: Late) -> Option<ProbeVm> {
    let kvm = Kvm::new().ok()?;
    let table = cpuid::for_host(&kvm).expect("KVM tells of its CPU");
    Some(ProbeVm::new(&kvm, &table, late).expect("KVM makes a VM"))
}

/// Runs the guest until it stops. LSTAR, which the VM's filter hands to us, is loaded as it asks.
fn go(vm: &mut ProbeVm) -> Result<Stop, KvmError> {
    loop {
        match vm.run()? {
            Stop::MsrWrite(index, value) => vm.load_msr(index, value)?,
            stop => return Ok(stop),
        }
    }
}

/// How `guest` stops at first and then; nothing if KVM fails.
fn stops(guest: MicroGuest) -> Option<[Stop; 2]> {
    let ran = bounded(Duration::from_secs(5), move |late| {
        let mut vm = fresh(late)?;
        vm.load(&guest, 0).ok()?;
        Some([go(&mut vm).ok()?, go(&mut vm).ok()?])
    });
    ran.ok().flatten()
}

/// Whether this host's KVM goes so far.
fn reaches(reach: Reach) -> bool {
    let int = || {
        let stops = stops(micro::int3(Ring::Kernel));
        matches!(stops, Some([Stop::Fault(Fault { vector: 3, .. }), _]))
    };
    let ring_3 = |guest: MicroGuest| stops(guest) == Some([Stop::Mark, Stop::Done]);
    match reach {
        Reach::Emulated => Kvm::new().is_ok(),
        Reach::Kernel => int(),
        Reach::Both => int() && ring_3(micro::syscall()) && ring_3(micro::gate()),
    }
}

/// Does `work` with a VM, where the host's KVM reaches so far.
fn with_vm(reach: Reach, work: impl FnOnce(&mut ProbeVm) + Send + 'static) {
    if !reaches(reach) {
        skip(&format!("there is no KVM here that does {reach:?}"));
        return;
    }
    let result = bounded(LIMIT, |late| {
        work(&mut fresh(late).expect("it opened before"))
    });
    result.unwrap_or_else(|stuck| panic!("the guest gave no result: {stuck:?}"));
}

/// Runs the torture to its end, and calls `at_mark` at each mark.
fn run(vm: &mut ProbeVm, how: Torture, mut at_mark: impl FnMut(&mut ProbeVm, u32)) -> Tortured {
    vm.load(&micro::torture(how), 0).expect("KVM loads a guest");
    let mut marks = 0;
    loop {
        match go(vm).expect("KVM runs a guest") {
            Stop::Mark => {
                marks += 1;
                at_mark(vm, marks);
            }
            Stop::Window => {
                vm.request_window(false);
                vm.interrupt(TORTURE_VECTOR)
                    .expect("KVM takes an interrupt");
            }
            Stop::Done => return Tortured::read(&vm.bytes(DATA, Tortured::BYTES)),
            stop => {
                let rip = vm.registers().expect("KVM tells of registers").rip;
                let code = vm.bytes(rip, 12);
                panic!("{how:?}, after {marks} marks, at {rip:#x} ({code:02x?}): {stop}");
            }
        }
    }
}

/// An interrupt, here or as soon as the guest takes one.
fn interrupt(vm: &mut ProbeVm) {
    if vm.settle().expect("KVM finishes an exit") {
        vm.interrupt(TORTURE_VECTOR)
            .expect("KVM takes an interrupt");
    } else {
        vm.request_window(true);
    }
}

/// Undisturbed, and interrupted at every mark: each equal in a VM of its own and in a used one.
fn same_every_time(vm: &mut ProbeVm, how: Torture) -> Tortured {
    let calm = run(vm, how, |_, _| {});
    assert_eq!(run(vm, how, |_, _| {}), calm, "{how:?}");
    assert!(calm.interrupts == 0 && calm.faults > 50, "{calm:?}");
    let disturbed = run(vm, how, |vm, _| interrupt(vm));
    assert_eq!(run(vm, how, |vm, _| interrupt(vm)), disturbed, "{how:?}");
    assert!(disturbed.interrupts > 5, "{disturbed:?}");
    assert_eq!(disturbed.faults, calm.faults, "no interrupt touches a page");
    assert_ne!(disturbed.checksum, calm.checksum);
    calm
}

#[test]
fn the_torture_has_the_checksum_that_it_has_on_every_cpu() {
    for (reach, checksum) in [
        (Reach::Emulated, 0xe025_2c43_e10c_e41e),
        (Reach::Kernel, 0x40c3_e939_1243_2652),
        (Reach::Both, 0x06d9_6924_1615_34d3),
    ] {
        with_vm(reach, move |vm| {
            let calm = same_every_time(vm, torture(1, reach));
            assert_eq!(calm.checksum, checksum, "{reach:?}: {calm:x?}");
            same_every_time(vm, torture(2, reach));
        });
    }
}

/// The checksum with one interrupt, `steps` instructions after the second mark; nothing if the
/// guest takes none there.
fn interrupted_behind(vm: &mut ProbeVm, steps: u32) -> Option<u64> {
    let mut taken = false;
    let tortured = run(vm, torture(1, Reach::Emulated), |vm, mark| {
        if mark != 2 {
            return;
        }
        vm.settle().expect("KVM finishes an exit");
        vm.debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP, None)
            .expect("KVM steps");
        for _ in 0..steps {
            let stop = vm.run().expect("KVM runs a guest");
            assert!(matches!(stop, Stop::Debug(..)), "{stop}");
        }
        vm.debug(0, None).expect("KVM steps no more");
        taken = vm.settle().expect("nothing is unfinished");
        if taken {
            vm.interrupt(TORTURE_VECTOR)
                .expect("KVM takes an interrupt");
        }
    });
    assert_eq!(tortured.interrupts, u64::from(taken));
    taken.then_some(tortured.checksum)
}

#[test]
fn an_interrupt_one_instruction_off_changes_the_checksum() {
    with_vm(Reach::Emulated, |vm| {
        let sums: Vec<u64> = (0..24)
            .filter_map(|steps| {
                let sum = interrupted_behind(vm, steps);
                assert_eq!(interrupted_behind(vm, steps), sum, "after {steps} steps");
                sum
            })
            .collect();
        assert!(sums.len() > 16, "only {} were taken", sums.len());
        for (i, sum) in sums.iter().enumerate() {
            assert!(!sums[..i].contains(sum), "two places, one checksum: {i}");
        }
    });
}
