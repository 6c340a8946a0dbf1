//! The PMU: does counting the guest's conditional branches give an exact position?

use std::time::Instant;

use hindsight_guest_images::{Ring, micro};
use kvm_ioctls::Kvm;

use super::Wishes;
use super::calibration::{Calibration, Effort, calibrate, reading_costs};
use super::exactness::{Disturbances, Flaw, Inexact};
use super::finding::{Checked, Finding, LIMIT, Miss, Probe, Weight, fails, on_a_bench};
use super::spec_lock_map::SpecLockMap;
use crate::kvm::kick_signal;
use crate::perf::{BranchCounter, CounterError, CounterEvent, REMEDY, Throttling};

const COST: &str = "no branch counter: interrupts and input land only at exits";
const LATE: &str = "a target may be overrun: the way back to it leads over a checkpoint";
const THROTTLED: &str = "perf may stop the counter for a while, and branches are missed";

/// All that can be said of counters here.
pub(super) fn findings(kvm: Option<&Kvm>, wishes: &Wishes) -> Vec<Finding> {
    let event = match &wishes.event {
        Some(event) => Ok(event.clone()),
        None => CounterEvent::of_host(),
    };
    let known = match &event {
        Ok(event) => Ok(format!("{event}: {}", event.explanation)),
        Err(error @ CounterError::NoPmu { .. }) => fails(error),
        Err(error) => unknown(error),
    };
    let mut findings = vec![finding(
        "an event counts conditional branches",
        Weight::Feature,
        COST,
        known,
    )];
    let Ok(event) = event else {
        return findings;
    };
    let Some(kvm) = kvm else {
        return findings;
    };
    for (name, ring) in [
        ("branches of ring 0 are counted exactly", Ring::Kernel),
        ("branches of ring 3 are counted exactly", Ring::User),
    ] {
        findings.push(finding(
            name,
            Weight::Feature,
            COST,
            exact(kvm, &event, ring),
        ));
    }
    let reading = reading(kvm, &event);
    findings.push(finding(
        "the count is read without a system call",
        Weight::Fact,
        "each look at the position is a system call",
        reading,
    ));
    let long = calibrate(kvm, &event, Effort::THOROUGH);
    findings.extend(calibrated(&long, wishes));
    findings.push(finding(
        "a short calibration finds the same",
        Weight::Fact,
        "what `record` finds out at its start may be too favourable",
        quick(kvm, &event, &long),
    ));
    findings.push(finding(
        "perf does not throttle",
        Weight::Fact,
        THROTTLED,
        throttling(Throttling::of_host()),
    ));
    let map = on_a_bench(kvm, LIMIT, |bench| {
        let vm = bench.start(&micro::halt())?;
        SpecLockMap::find(vm).map_err(|error| Miss::Unknown(error.to_string()))
    });
    if let Some(checked) = spec_lock_map(map.and_then(|map| map)) {
        findings.push(finding(
            "SpecLockMap is off",
            Weight::Feature,
            "Zen counts some branches after locked instructions twice: set bit 54 of MSR \
             0xc0011020 on every CPU, see docs/counters.md",
            checked,
        ));
    }
    findings
}

fn finding(name: &'static str, weight: Weight, cost: &'static str, checked: Checked) -> Finding {
    // The check is not asked again.
    let probe = Probe {
        group: "counters",
        name,
        weight,
        cost,
        check: |_| unknown("asked already"),
    };
    Finding::new(&probe, checked)
}

fn unknown<T>(what: impl ToString) -> Result<T, Miss> {
    Err(Miss::Unknown(what.to_string()))
}

/// Branches in the shorter and the longer loop.
const LOOPS: [u32; 2] = [10_000, 30_000];

fn exact(kvm: &Kvm, event: &CounterEvent, ring: Ring) -> Checked {
    let event = event.clone();
    let counted = on_a_bench(kvm, LIMIT, move |bench| {
        let miss = |error: CounterError| Miss::Fails(error.to_string());
        let mut counter = BranchCounter::open(&event, kick_signal()).map_err(miss)?;
        let mut counts = [0; 2];
        for (count, branches) in counts.iter_mut().zip(LOOPS) {
            let before = counter.read().map_err(miss)?;
            bench.run(&micro::branch_loop(ring, branches))?;
            *count = counter.read().map_err(miss)? - before;
        }
        counter.check().map_err(miss)?;
        Ok(counts)
    });
    let counts = counted.and_then(|counted| counted)?;
    let detail = format!(
        "{} and {} for loops of {} and {}",
        counts[0], counts[1], LOOPS[0], LOOPS[1]
    );
    if counts == LOOPS.map(u64::from) {
        Ok(detail)
    } else {
        fails(detail)
    }
}

fn reading(kvm: &Kvm, event: &CounterEvent) -> Checked {
    let event = event.clone();
    let costs = on_a_bench(kvm, LIMIT, move |_| {
        let open = BranchCounter::open(&event, kick_signal());
        let costs = open.and_then(|mut counter| reading_costs(&mut counter));
        costs.map_err(|error| Miss::Unknown(error.to_string()))
    });
    match costs.and_then(|costs| costs)? {
        (Some(rdpmc_ns), call_ns) => Ok(format!(
            "RDPMC takes {rdpmc_ns} ns, a system call {call_ns} ns"
        )),
        (None, call_ns) => fails(format!(
            "a system call takes {call_ns} ns; /sys/bus/event_source/devices/cpu/rdpmc should be 1"
        )),
    }
}

/// What a long calibration says.
fn calibrated(found: &Result<Calibration, CounterError>, wishes: &Wishes) -> Vec<Finding> {
    let (between, late, margin) = match found {
        Ok(found) => (between(found), late(found), margin(found, wishes.margin)),
        Err(error) => (fails(error), unknown(error), unknown(error)),
    };
    let exact = "exact with interrupts, page faults and exits between";
    vec![
        finding(exact, Weight::Feature, COST, between),
        finding("overflow signals come", Weight::Feature, COST, late),
        finding("the margin covers the skid", Weight::Feature, LATE, margin),
    ]
}

fn disturbances(seen: &Disturbances) -> String {
    let Disturbances {
        exits,
        faults,
        interrupts,
        kicks,
    } = seen;
    format!("{exits} exits, {faults} page faults, {interrupts} interrupts and {kicks} kicks")
}

fn between(found: &Calibration) -> Checked {
    match &found.inexact {
        None => Ok(format!(
            "{} runs with {}",
            found.runs,
            disturbances(&found.disturbances)
        )),
        Some(Inexact {
            flaw,
            ring,
            expected,
            counted,
            disturbances: seen,
        }) => fails(match flaw {
            Flaw::Miscounts => format!(
                "{counted} counted in ring {ring}, where {expected} conditional branches were \
                 retired: it counts something else"
            ),
            Flaw::Drifts => format!(
                "{counted} counted in ring {ring} instead of {expected}, with {}: it drifts",
                disturbances(seen)
            ),
        }),
    }
}

fn late(found: &Calibration) -> Checked {
    let skid = &found.skid;
    Ok(format!(
        "{} signals, skid median {}, 99 % {}, worst {} branches",
        skid.signals, skid.median, skid.percentile_99, skid.worst
    ))
}

fn margin(found: &Calibration, wish: Option<u64>) -> Checked {
    let worst = found.skid.worst;
    match wish {
        Some(margin) if margin < worst => fails(format!(
            "{margin} branches, but a signal came {worst} late; {} would do",
            found.margin
        )),
        Some(margin) => Ok(format!("{margin} branches, and the worst skid was {worst}")),
        None => Ok(format!("{} branches", found.margin)),
    }
}

/// What `record` does at its start, and whether its margin covers what the `long` one saw.
fn quick(kvm: &Kvm, event: &CounterEvent, long: &Result<Calibration, CounterError>) -> Checked {
    let start = Instant::now();
    let quick = calibrate(kvm, event, Effort::QUICK);
    let took_ms = start.elapsed().as_millis();
    let (quick, long) = match (&quick, long) {
        (Ok(quick), Ok(long)) => (quick, long),
        (Err(error), _) | (_, Err(error)) => return unknown(error),
    };
    let detail = format!(
        "{took_ms} ms, {} runs, {} signals, margin {}",
        quick.runs, quick.skid.signals, quick.margin
    );
    if quick.inexact.is_some() == long.inexact.is_some() && quick.margin >= long.skid.worst {
        Ok(detail)
    } else {
        fails(detail)
    }
}

fn throttling(settings: Throttling) -> Checked {
    match (settings.rate_is_fixed(), settings.rate_is_usual()) {
        (Some(true), Some(true)) => Ok(settings.to_string()),
        (None, _) | (_, None) => unknown(settings),
        _ => fails(format!("{settings}; `{REMEDY}` makes sure")),
    }
}

fn spec_lock_map(found: Result<Option<SpecLockMap>, Miss>) -> Option<Checked> {
    Some(match found {
        Ok(None) => return None,
        Ok(Some(SpecLockMap::Off(how))) => Ok(how),
        Ok(Some(SpecLockMap::On(how))) => fails(how),
        Ok(Some(SpecLockMap::Unknown(why))) => unknown(why),
        Err(miss) => Err(miss),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::skid::Skid;

    fn calibration(late: Vec<u64>, inexact: Option<Inexact>) -> Calibration {
        let skid = Skid::of(late);
        Calibration {
            event: CounterEvent::raw(0xd1),
            runs: 9,
            disturbances: Disturbances::default(),
            inexact,
            margin: crate::doctor::skid::margin(skid.worst, 0),
            skid,
        }
    }

    #[test]
    fn a_margin_below_the_worst_skid_does_not_hold() {
        let found = calibration(vec![3, 200], None);
        assert!(margin(&found, Some(200)).is_ok());
        let Err(Miss::Fails(detail)) = margin(&found, Some(199)) else {
            panic!("199 does not cover 200");
        };
        assert!(detail.contains("200 late; 432 would do"), "{detail}");
        assert_eq!(margin(&found, None), Ok("432 branches".to_string()));
    }

    #[test]
    fn a_drift_is_told_with_what_came_between() {
        let inexact = Inexact {
            flaw: Flaw::Drifts,
            ring: 3,
            expected: 100,
            counted: 103,
            disturbances: Disturbances {
                kicks: 3,
                ..Disturbances::default()
            },
        };
        let Err(Miss::Fails(detail)) = between(&calibration(vec![0], Some(inexact))) else {
            panic!("103 is not 100");
        };
        assert!(detail.starts_with("103 counted in ring 3 instead of 100"));
        assert!(detail.contains("3 kicks: it drifts"), "{detail}");
    }

    #[test]
    fn throttling_is_fine_only_if_the_rate_is_fixed_and_usual() {
        let with = |percent, rate| throttling(Throttling { percent, rate });
        assert!(with(Some(0), Some(100_000)).is_ok());
        assert!(matches!(with(Some(25), Some(100_000)), Err(Miss::Fails(_))));
        assert!(matches!(with(Some(0), Some(1000)), Err(Miss::Fails(_))));
        assert!(matches!(with(None, None), Err(Miss::Unknown(_))));
    }
}
