//! Stepping, breakpoints, interrupts, and the dirty log.

use hindsight_guest_images::layout::{DATA, RAM_BYTES};
use hindsight_guest_images::{Ring, micro};
use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP,
};

use super::finding::{Bench, Checked, Miss, Probe, Weight, expect, fails};
use crate::kvm::probe::{Fault, Stop};

const STEP: u32 = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
/// KVM_CAP_SET_GUEST_DEBUG2: its value says which control bits there are.
const CAP_SET_GUEST_DEBUG2: u64 = 195;
/// Windows asked for to see whether STI's shadow is kept.
const WINDOWS: u32 = 1000;

const NO_BREAKPOINTS: &str =
    "no hardware breakpoints: gdb's hbreak, and loops on the way to a moment, take many steps";
const NO_INT3: &str = "no int3 exits: gdb's software breakpoints do not stop the guest";

/// All probes of these groups.
pub(super) const PROBES: &[Probe] = &[
    Probe {
        group: "debugging",
        name: "single-step in ring 0",
        weight: Weight::Gate,
        cost: "a window that opens in STI's shadow cannot be left",
        check: |bench| step(bench, Ring::Kernel),
    },
    Probe {
        group: "debugging",
        name: "single-step in ring 3",
        weight: Weight::Feature,
        cost: "no stepping in ring 3: gdb cannot step programs, and no moment between exits is reached in them",
        check: |bench| step(bench, Ring::User),
    },
    Probe {
        group: "debugging",
        name: "stepping can hold interrupts back",
        weight: Weight::Feature,
        cost: "steps cannot hold interrupts back: one may slip into a step",
        check: block_irq,
    },
    Probe {
        group: "debugging",
        name: "hardware breakpoint in ring 0",
        weight: Weight::Feature,
        cost: NO_BREAKPOINTS,
        check: |bench| breakpoint(bench, Ring::Kernel),
    },
    Probe {
        group: "debugging",
        name: "hardware breakpoint in ring 3",
        weight: Weight::Feature,
        cost: NO_BREAKPOINTS,
        check: |bench| breakpoint(bench, Ring::User),
    },
    Probe {
        group: "debugging",
        name: "int3 in ring 0 reaches us",
        weight: Weight::Feature,
        cost: NO_INT3,
        check: |bench| int3(bench, Ring::Kernel),
    },
    Probe {
        group: "debugging",
        name: "int3 in ring 3 reaches us",
        weight: Weight::Feature,
        cost: NO_INT3,
        check: |bench| int3(bench, Ring::User),
    },
    Probe {
        group: "interrupts",
        name: "an injected interrupt arrives",
        weight: Weight::Gate,
        cost: "no device can interrupt the guest",
        check: interrupt,
    },
    Probe {
        group: "interrupts",
        name: "the window opens after STI",
        weight: Weight::Gate,
        cost: "interrupts land at places that a replay does not find again",
        check: window,
    },
    Probe {
        group: "interrupts",
        name: "STI's shadow is always kept",
        weight: Weight::Fact,
        cost: "a step for each window that opens in it; Hindsight takes the place after",
        check: shadow,
    },
    Probe {
        group: "memory",
        name: "the dirty log names what is written",
        weight: Weight::Feature,
        cost: "no dirty log: every checkpoint looks at all of memory",
        check: dirty_log,
    },
];

fn ring_name(ring: Ring) -> &'static str {
    if ring == Ring::Kernel {
        "ring 0"
    } else {
        "ring 3"
    }
}

fn step(bench: &mut Bench, ring: Ring) -> Checked {
    let guest = micro::straight_line(ring);
    let vm = bench.start(&guest)?;
    vm.debug(STEP, None)?;
    for (i, name) in ["1", "2", "3", "4", "5", "6"].iter().enumerate() {
        let expected = guest.place(name);
        match vm.run()? {
            Stop::Debug(pc, _) if pc == expected => {}
            stop => {
                return fails(format!(
                    "step {} should lead to {expected:#x}: {stop}",
                    i + 1
                ));
            }
        }
    }
    vm.debug(0, None)?;
    expect(vm, &Stop::Done)?;
    Ok("6 steps, each where it should lead".to_string())
}

fn block_irq(bench: &mut Bench) -> Checked {
    // Only an NMI can be pending without an interrupt controller in KVM. It must wait while it is
    // blocked, and must not otherwise, or the probe shows nothing.
    let known = bench.kvm().check_extension_raw(CAP_SET_GUEST_DEBUG2) as u32;
    if known & KVM_GUESTDBG_BLOCKIRQ == 0 {
        return fails("this KVM has no KVM_GUESTDBG_BLOCKIRQ");
    }
    let guest = micro::straight_line(Ring::Kernel);
    let next = guest.place("1");
    let vm = bench.start(&guest)?;
    vm.debug(STEP | KVM_GUESTDBG_BLOCKIRQ, None)?;
    vm.nmi()?;
    match vm.run()? {
        Stop::Debug(pc, _) if pc == next => {}
        stop => return fails(format!("an NMI was pending and blocked: {stop}")),
    }
    vm.debug(STEP, None)?;
    match vm.run()? {
        Stop::Debug(pc, _) if pc == guest.place("2") => Err(Miss::Unknown(
            "the NMI does not come unblocked either".to_string(),
        )),
        Stop::Debug(..)
        | Stop::Fault(Fault {
            vector: micro::NMI_VECTOR,
            ..
        }) => Ok("an NMI waits while blocked, and comes when not".to_string()),
        stop => fails(format!("an NMI was pending: {stop}")),
    }
}

pub(super) fn breakpoint(bench: &mut Bench, ring: Ring) -> Checked {
    let guest = micro::breakpoint(ring);
    let target = guest.place("target");
    let vm = bench.start(&guest)?;
    vm.debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, Some(target))?;
    match vm.run()? {
        Stop::Debug(pc, _) if pc == target => {}
        stop => return fails(format!("it should stop at {target:#x}: {stop}")),
    }
    let rax = vm.registers()?.rax;
    if rax != 1 {
        return fails(format!("it stopped there with {rax:#x} in RAX, not 1"));
    }
    vm.debug(0, None)?;
    expect(vm, &Stop::Done)?;
    Ok(format!(
        "stops before the instruction, in {}",
        ring_name(ring)
    ))
}

fn int3(bench: &mut Bench, ring: Ring) -> Checked {
    let guest = micro::int3(ring);
    let target = guest.place("int3");
    let vm = bench.start(&guest)?;
    vm.debug(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP, None)?;
    match vm.run()? {
        Stop::Debug(pc, 3) if pc == target => Ok("a debug exit at the instruction".to_string()),
        stop => fails(stop),
    }
}

fn interrupt(bench: &mut Bench) -> Checked {
    let guest = micro::interruptible(0x41);
    let vm = bench.start(&guest)?;
    expect(vm, &Stop::Mark)?;
    if !vm.settle()? {
        return fails("KVM does not take one although the guest has turned interrupts on");
    }
    vm.interrupt(0x41)?;
    expect(vm, &Stop::Done)?;
    let [rip, count] = vm.words(DATA);
    if count != 1 || rip != guest.place("next") {
        return fails(format!("it came {count} times, last at {rip:#x}"));
    }
    Ok("once, after the OUT at which it was given".to_string())
}

/// Where `count` windows opened: after the shadow, in it, elsewhere (and where last).
fn windows(bench: &mut Bench, count: u32) -> Result<(u32, u32, Option<u64>), Miss> {
    let guest = micro::window(count);
    let (open, shadow) = (guest.place("open"), guest.place("shadow"));
    let vm = bench.start(&guest)?;
    let (mut right, mut early, mut elsewhere) = (0, 0, None);
    for _ in 0..count {
        expect(vm, &Stop::Mark)?;
        vm.request_window(true);
        expect(vm, &Stop::Window)?;
        vm.request_window(false);
        match vm.registers()?.rip {
            rip if rip == open => right += 1,
            rip if rip == shadow => early += 1,
            rip => elsewhere = Some(rip - guest.place("again")),
        }
    }
    expect(vm, &Stop::Done)?;
    Ok((right, early, elsewhere))
}

fn window(bench: &mut Bench) -> Checked {
    match windows(bench, 8)? {
        (_, _, Some(offset)) => fails(format!("one opened at byte {offset} of the loop")),
        (right, early, None) => Ok(format!(
            "{right} of 8 opened after its shadow, {early} in it"
        )),
    }
}

fn shadow(bench: &mut Bench) -> Checked {
    match windows(bench, WINDOWS)? {
        (WINDOWS, _, _) => Ok(format!("all of {WINDOWS} windows opened after it")),
        (_, early, None) => fails(format!("{early} of {WINDOWS} windows opened in it")),
        (_, _, Some(offset)) => fails(format!("one opened at byte {offset} of the loop")),
    }
}

fn dirty_log(bench: &mut Bench) -> Checked {
    let pages = [0x60, 0x62, 0x71];
    let vm = bench.start(&micro::dirty_pages(&pages))?;
    vm.log_dirty_pages()?;
    expect(vm, &Stop::Done)?;
    let log = vm.dirty_pages()?;
    let dirty: Vec<u64> = (0..RAM_BYTES / 4096)
        .filter(|page| {
            log.get((page / 64) as usize)
                .is_some_and(|word| word >> (page % 64) & 1 != 0)
        })
        .collect();
    // KVM may name pages that were only read, when it maps them for the first time, and AMD's CPUs
    // write to guest page tables as they walk them. A log that names most of memory is no help.
    let others = dirty.iter().filter(|page| !pages.contains(page)).count();
    if dirty.len() != pages.len() + others || others > 64 {
        return fails(format!(
            "the guest wrote pages {pages:x?}, the log names {dirty:x?}"
        ));
    }
    Ok(format!(
        "3 pages of 256 written and named, and {others} others"
    ))
}
