//! Calibration: does this host count exactly, and how late are its signals?
//!
//! Micro-guests with a known number of branches are run and counted, undisturbed at first, then
//! with exits, page faults, interrupts and kicks between. Then a guest of hardly anything but
//! branches is stopped at random counts, to see how far it gets beyond. It takes a fraction of a
//! second, so that `record` can afford it each time; `hindsight doctor` takes longer.

use std::time::{Duration, Instant};

use hindsight_guest_images::{Ring, micro};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use super::exactness::{self, Dice, Disturbances, Inexact, Pace};
use super::skid::{Skid, margin};
use crate::kvm::probe::{ProbeVm, Stop, Stuck, bounded, share};
use crate::kvm::{cpuid, kick_signal};
use crate::perf::BranchCounter;
use crate::perf::CounterError;
use crate::perf::CounterEvent;

/// Signals are armed at least this number of branches ahead, and less than twice as many.
const AHEAD: u64 = 500;
const MORE_AHEAD: u64 = 8000;
/// Signals without which skid is not known.
const FEW_SIGNALS: u64 = 16;

/// How much to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Effort {
    /// Disturbed runs.
    pub runs: u32,
    /// Signals.
    pub signals: u64,
    /// What is begun after this is only the least: a few runs, a few signals.
    pub time: Duration,
}

impl Effort {
    /// What `record` can afford.
    pub(crate) const QUICK: Effort = Effort {
        runs: 16,
        signals: 300,
        time: Duration::from_millis(180),
    };
    /// What `doctor` takes.
    pub(crate) const THOROUGH: Effort = Effort {
        runs: 2000,
        signals: 5000,
        time: Duration::from_secs(20),
    };
    /// What is tried in any case may take so much longer.
    const GRACE: Duration = Duration::from_secs(4);
}

/// What was found about an event on a host. Part of a recording.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Calibration {
    /// What was counted.
    pub event: CounterEvent,
    /// Runs of guests with a known count.
    pub runs: u32,
    /// What came between their branches.
    pub disturbances: Disturbances,
    /// The first count that was wrong, if one was: then no moment between exits can be told.
    pub inexact: Option<Inexact>,
    /// How late signals were.
    pub skid: Skid,
    /// How far short of a target to arm, in branches; see [`margin`].
    pub margin: u64,
}

/// Calibrates `event` on a thread and a VM of its own.
pub(crate) fn calibrate(
    kvm: &Kvm,
    event: &CounterEvent,
    effort: Effort,
) -> Result<Calibration, CounterError> {
    let table = cpuid::without_deadline(kvm)?;
    let kvm = share(kvm).map_err(|source| CounterError::Call {
        call: "F_DUPFD of /dev/kvm",
        source,
    })?;
    let event = event.clone();
    let work = move |late| {
        let mut vm = ProbeVm::new(&kvm, &table, late)?;
        let mut counter = BranchCounter::open(&event, kick_signal())?;
        measure(&mut vm, &mut counter, event, effort)
    };
    bounded(effort.time + Effort::GRACE, work).unwrap_or_else(|stuck| {
        Err(CounterError::Guest(
            match stuck {
                Stuck::InKvm => "KVM did not come back, not even when it was signalled",
                Stuck::Panicked => "it failed itself, see above",
            }
            .to_string(),
        ))
    })
}

fn measure(
    vm: &mut ProbeVm,
    counter: &mut BranchCounter,
    event: CounterEvent,
    effort: Effort,
) -> Result<Calibration, CounterError> {
    let start = Instant::now();
    let (mut runs, mut disturbances) = (0, Disturbances::default());
    let mut miscount = None;
    for ring in [Ring::Kernel, Ring::User] {
        let plain = exactness::undisturbed(vm, counter, ring)?;
        runs += plain.runs;
        disturbances += plain.disturbances;
        miscount = miscount.or(plain.inexact);
    }
    let until = start + effort.time / 2;
    let disturbed = exactness::disturbed(vm, counter, miscount.is_none(), effort.runs, until)?;
    runs += disturbed.runs;
    disturbances += disturbed.disturbances;
    let skid = Skid::of(lateness(vm, counter, effort.signals, start + effort.time)?);
    counter.check()?;
    Ok(Calibration {
        runs,
        disturbances,
        // To drift is worse than to count something else: say that, if there is both.
        inexact: disturbed.inexact.or(miscount),
        margin: margin(skid.worst, event.worst_known),
        skid,
        event,
    })
}

/// How late signals find the guest, in branches: `signals` of them, or as many as there is time for.
fn lateness(
    vm: &mut ProbeVm,
    counter: &mut BranchCounter,
    signals: u64,
    until: Instant,
) -> Result<Vec<u64>, CounterError> {
    let (mut dice, mut pace) = (Dice::new(0xb1a5), Pace::of_host());
    let mut late = Vec::new();
    for (ring, share) in [(Ring::Kernel, signals / 2), (Ring::User, signals)] {
        vm.load(&micro::dense_branches(ring), 0)?;
        while (late.len() as u64) < share
            && ((late.len() as u64) < FEW_SIGNALS * share / signals || Instant::now() < until)
        {
            pace.wait();
            let at = counter.read()? + AHEAD + dice.below(MORE_AHEAD);
            counter.arm(Some(at))?;
            late.push(run_to(vm, counter, at)? - at);
        }
    }
    counter.arm(None)?;
    Ok(late)
}

/// Runs until a signal comes at `at` or after, and returns where.
fn run_to(vm: &mut ProbeVm, counter: &mut BranchCounter, at: u64) -> Result<u64, CounterError> {
    loop {
        let stop = vm.run_or_kick()?;
        let count = counter.read()?;
        match stop {
            None if count >= at => return Ok(count),
            // An old signal, or somebody else's.
            None => {}
            Some(Stop::Late) if count >= at => {
                counter.check()?;
                return Err(CounterError::NoSignal {
                    event: counter.name().to_string(),
                    at,
                    count,
                });
            }
            Some(stop) => return Err(CounterError::Guest(stop.to_string())),
        }
    }
}

/// What reading the count costs, in nanoseconds: by RDPMC, if that can be done, and by a call.
pub(super) fn reading_costs(
    counter: &mut BranchCounter,
) -> Result<(Option<u64>, u64), CounterError> {
    const READS: u32 = 2000;
    let each = |start: Instant| start.elapsed().as_nanos() as u64 / u64::from(READS);
    let start = Instant::now();
    let mut by_rdpmc = true;
    for _ in 0..READS {
        by_rdpmc &= counter.read_by_rdpmc().is_some();
    }
    let rdpmc_ns = each(start);
    let start = Instant::now();
    for _ in 0..READS {
        counter.read_by_call()?;
    }
    Ok((by_rdpmc.then_some(rdpmc_ns), each(start)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_calibration_is_the_same_after_it_was_written_and_read() {
        let skid = Skid::of(vec![0, 3, 200]);
        let calibration = Calibration {
            event: CounterEvent::raw(0xd1),
            runs: 3,
            disturbances: Disturbances::default(),
            inexact: None,
            margin: margin(skid.worst, 0),
            skid,
        };
        let bytes = postcard::to_allocvec(&calibration).unwrap();
        assert_eq!(
            postcard::from_bytes::<Calibration>(&bytes).unwrap(),
            calibration
        );
        assert!(
            bytes.len() < 200,
            "{} bytes in every recording",
            bytes.len()
        );
    }
}
