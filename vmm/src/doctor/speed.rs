//! What things cost here: exits, and instructions of either ring.

use std::time::Instant;

use hindsight_guest_images::layout::PORT_DEVICE;
use hindsight_guest_images::{Ring, micro};

use super::finding::{Bench, Checked, Miss, Probe, Weight, expect, fails};
use crate::kvm::probe::Stop;

/// Exits timed.
const EXITS: u32 = 2000;
/// Dearer exits than this deserve a word.
const DEAR_EXIT_NS: u64 = 100_000;
/// A CPU that runs the guest's instructions itself, or a fast translator of them, is above this.
const SLOW_MIPS: u64 = 50;
/// Loops of two instructions: the first try, which a slow host manages in its time, and the
/// second where the first was too quick to time.
const LOOPS: [u32; 2] = [50_000, 20_000_000];
const TOO_QUICK_NS: u64 = 5_000_000;

/// All probes of this group.
pub(super) const PROBES: &[Probe] = &[
    Probe {
        group: "speed",
        name: "an exit costs little",
        weight: Weight::Fact,
        cost: "a boot of Linux has some 60,000 exits",
        check: exit_cost,
    },
    Probe {
        group: "speed",
        name: "ring 0 runs at speed",
        weight: Weight::Fact,
        cost: "the guest's kernel crawls: it is emulated",
        check: |bench| speed(bench, Ring::Kernel),
    },
    Probe {
        group: "speed",
        name: "ring 3 runs at speed",
        weight: Weight::Fact,
        cost: "the guest's programs crawl: they are emulated",
        check: |bench| speed(bench, Ring::User),
    },
];

fn nanoseconds_since(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos())
        .expect("584 years have not passed")
        .max(1)
}

fn exit_cost(bench: &mut Bench) -> Checked {
    let vm = bench.start(&micro::many_outs(EXITS))?;
    let out = Stop::PortWrite(PORT_DEVICE, 1, vec![0]);
    expect(vm, &out)?;
    let start = Instant::now();
    for _ in 1..EXITS {
        expect(vm, &out)?;
    }
    let each = nanoseconds_since(start) / u64::from(EXITS - 1);
    let detail = format!(
        "{}.{} us, over {EXITS} OUTs",
        each / 1000,
        each % 1000 / 100
    );
    if each > DEAR_EXIT_NS {
        fails(detail)
    } else {
        Ok(detail)
    }
}

fn speed(bench: &mut Bench, ring: Ring) -> Checked {
    let mut found = None;
    for count in LOOPS {
        let vm = bench.start(&micro::branch_loop(ring, count))?;
        let start = Instant::now();
        let stop = vm.run()?;
        let ns = nanoseconds_since(start);
        match (stop, found) {
            (Stop::Done, _) => found = Some(2 * u64::from(count) * 10_000 / ns),
            // The first loop was quick, the second came up against the limit.
            (Stop::Late, Some(_)) => break,
            (stop, _) => return fails(stop),
        }
        if ns > TOO_QUICK_NS {
            break;
        }
    }
    // In tenths.
    let mips = found.ok_or_else(|| Miss::Unknown("no loop was run".to_string()))?;
    let detail = format!("{}.{} million instructions a second", mips / 10, mips % 10);
    if mips / 10 < SLOW_MIPS {
        fails(detail)
    } else {
        Ok(detail)
    }
}
