//! The PMU: does counting the guest's conditional branches give an exact position?

use std::path::Path;

use hindsight_guest_images::{Ring, micro};

use super::finding::{Bench, Checked, Miss, Probe, Weight, expect, fails};
use super::host::Processor;
use crate::kvm::probe::{GuestCounter, Stop};

const COST: &str = "no branch counter: interrupts and input land only at exits";
/// Where Linux shows the PMUs of ordinary and of hybrid CPUs.
const PMUS: [&str; 3] = ["cpu", "cpu_core", "cpu_atom"];
/// Branches in the shorter and the longer loop.
const LOOPS: [u32; 2] = [10_000, 30_000];

/// All probes of this group.
pub const PROBES: &[Probe] = &[
    Probe {
        group: "counters",
        name: "branches of ring 0 are counted",
        weight: Weight::Feature,
        cost: COST,
        check: |bench| exact(bench, Ring::Kernel),
    },
    Probe {
        group: "counters",
        name: "branches of ring 3 are counted",
        weight: Weight::Feature,
        cost: COST,
        check: |bench| exact(bench, Ring::User),
    },
];

/// The raw event of retired conditional branches: unit mask in bits 8 to 15, event in 0 to 7.
/// Only models whose event is known to count exactly (rr, src/PerfCounters_x86.h).
fn branch_event(vendor: &str, family: u32, model: u32) -> Option<u64> {
    match (vendor, family) {
        // Zen and later; exact only with SpecLockMap off (MSR 0xc0011020 bit 54 set).
        ("AuthenticAMD", 0x17 | 0x19 | 0x1a) | ("HygonGenuine", 0x18) => Some(0xd1),
        ("GenuineIntel", 6) => match model {
            // Nehalem and Westmere; Sandy and Ivy Bridge; Haswell; Broadwell.
            0x1a | 0x1e | 0x1f | 0x2e | 0x25 | 0x2c | 0x2f | 0x2a | 0x2d | 0x3a | 0x3e | 0x3c
            | 0x3f | 0x45 | 0x46 | 0x3d | 0x47 | 0x4f | 0x56
            // Skylake and Cascade Lake; Kaby and Coffee Lake; Cannon Lake; Comet Lake.
            | 0x4e | 0x5e | 0x55 | 0x8e | 0x9e | 0x66 | 0xa5 | 0xa6 => Some(0x01c4),
            // Ice Lake; Tiger and Rocket Lake; Alder and Raptor Lake (P); Sapphire, Emerald and
            // Granite Rapids; Meteor Lake (P).
            0x6a | 0x6c | 0x7d | 0x7e | 0x8c | 0x8d | 0xa7 | 0x97 | 0x9a | 0xb7 | 0xba | 0xbf
            | 0x8f | 0xcf | 0xad | 0xae | 0xaa | 0xac => Some(0x11c4),
            // E-cores alone: Silvermont to Gracemont.
            0x37 | 0x4c | 0x4d | 0x5a | 0x5c | 0x5f | 0x7a | 0x86 | 0x96 | 0x9c | 0xbe => {
                Some(0x7ec4)
            }
            _ => None,
        },
        _ => None,
    }
}

fn exact(bench: &mut Bench, ring: Ring) -> Checked {
    let cpu = Processor::of_host()
        .ok_or_else(|| Miss::Unknown("/proc/cpuinfo does not say which CPU this is".to_string()))?;
    let devices = Path::new("/sys/bus/event_source/devices");
    if devices.exists() && !PMUS.iter().any(|name| devices.join(name).exists()) {
        return fails("the host's kernel shows no PMU");
    }
    let event = branch_event(&cpu.vendor, cpu.family, cpu.model).ok_or_else(|| {
        Miss::Unknown(format!(
            "no event known for {} {}/{}",
            cpu.vendor, cpu.family, cpu.model
        ))
    })?;
    let mut counter = match GuestCounter::start(event) {
        Ok(counter) => counter,
        Err(error) => return fails(format!("perf_event_open of event {event:#x}: {error}")),
    };
    let mut counts = [0; 2];
    for (count, branches) in counts.iter_mut().zip(LOOPS) {
        let vm = bench.start(&micro::branch_loop(ring, branches))?;
        let read = |counter: &mut GuestCounter| {
            counter.read().map_err(|error| {
                Miss::Fails(format!(
                    "event {event:#x} could not stay on the CPU: {error}"
                ))
            })
        };
        let before = read(&mut counter)?;
        expect(vm, &Stop::Done)?;
        *count = read(&mut counter)? - before;
    }
    // What entering and leaving adds is in both.
    let difference = counts[1].wrapping_sub(counts[0]);
    let expected = u64::from(LOOPS[1] - LOOPS[0]);
    let detail = format!(
        "event {event:#x}: {} and {} for loops of {} and {}",
        counts[0], counts[1], LOOPS[0], LOOPS[1]
    );
    if difference == expected {
        Ok(detail)
    } else {
        fails(detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_event_follows_the_model_and_is_not_guessed() {
        assert_eq!(branch_event("GenuineIntel", 6, 0x55), Some(0x01c4));
        assert_eq!(branch_event("GenuineIntel", 6, 0x6a), Some(0x11c4));
        assert_eq!(branch_event("GenuineIntel", 6, 0xbe), Some(0x7ec4));
        assert_eq!(branch_event("AuthenticAMD", 0x19, 0x11), Some(0xd1));
        assert_eq!(branch_event("AuthenticAMD", 0xf, 0x6b), None);
        assert_eq!(branch_event("GenuineIntel", 6, 0), None);
    }
}
