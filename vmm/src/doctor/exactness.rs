//! Is the count right? Known guests, run undisturbed and disturbed.

use std::ops::AddAssign;
use std::time::{Duration, Instant};

use hindsight_guest_images::layout::{DATA, MMIO};
use hindsight_guest_images::{Ring, micro};
use serde::{Deserialize, Serialize};

use crate::kvm::probe::{ProbeVm, Stop};
use crate::perf::BranchCounter;
use crate::perf::CounterError;
use crate::perf::{Throttling, USUAL_RATE};

/// Rounds of the guest in one run: [`ROUNDS`] and up to as many more.
const ROUNDS: u32 = 4;
const MORE_ROUNDS: u64 = 16;
/// Kicks are armed at most this number of branches apart: a few a run.
const KICK_WITHIN: u64 = 150;

/// What came between the branches of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Disturbances {
    /// Exits to us.
    pub exits: u64,
    /// Page faults in the guest.
    pub faults: u64,
    /// Interrupts injected.
    pub interrupts: u64,
    /// Signals that brought the vCPU back.
    pub kicks: u64,
}

impl AddAssign for Disturbances {
    fn add_assign(&mut self, more: Disturbances) {
        self.exits += more.exits;
        self.faults += more.faults;
        self.interrupts += more.interrupts;
        self.kicks += more.kicks;
    }
}

/// In which way a count is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Flaw {
    /// An undisturbed guest's count is not its conditional branches.
    Miscounts,
    /// The count depends on what comes between.
    Drifts,
}

/// A count that was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Inexact {
    /// In which way.
    pub flaw: Flaw,
    /// The ring that the guest was in.
    pub ring: u8,
    /// What the guest retired, or what the same guest counted undisturbed.
    pub expected: u64,
    /// What was counted.
    pub counted: u64,
    /// What came between.
    pub disturbances: Disturbances,
}

/// Small pseudo-random numbers, the same in every run (xorshift, G. Marsaglia 2003).
#[derive(Debug)]
pub(super) struct Dice(u64);

impl Dice {
    /// Dice that fall as all with this seed do.
    pub(super) fn new(seed: u64) -> Dice {
        Dice(seed | 1)
    }

    /// A number from 0 to below `bound`.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Keeps overflows at half the rate at which perf would throttle.
#[derive(Debug)]
pub(super) struct Pace {
    each: Duration,
    last: Instant,
}

impl Pace {
    /// The pace for this host's settings.
    pub(super) fn of_host() -> Pace {
        let rate = Throttling::of_host().rate.unwrap_or(USUAL_RATE).max(1);
        Pace {
            each: Duration::from_secs(2) / u32::try_from(rate).unwrap_or(u32::MAX),
            last: Instant::now(),
        }
    }

    /// Waits until the next overflow may come.
    pub(super) fn wait(&mut self) {
        while self.last.elapsed() < self.each {
            std::hint::spin_loop();
        }
        self.last = Instant::now();
    }
}

/// One run of a known guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub counted: u64,
    pub disturbances: Disturbances,
}

/// Runs the known guest and counts. With `kicks` it is brought back now and then, and with
/// `inject` it is interrupted then.
fn run(
    vm: &mut ProbeVm,
    counter: &mut BranchCounter,
    (ring, rounds): (Ring, u32),
    mut kicks: Option<(&mut Dice, &mut Pace)>,
    inject: bool,
) -> Result<Run, CounterError> {
    vm.load(&micro::counted(ring, rounds), 0)?;
    let mut seen = Disturbances::default();
    counter.arm(None)?;
    let before = counter.read()?;
    let mut arm = true;
    loop {
        if let Some((dice, pace)) = &mut kicks
            && arm
        {
            pace.wait();
            let at = counter.read()? + 1 + dice.below(KICK_WITHIN);
            counter.arm(Some(at))?;
            arm = false;
        }
        match vm.run_or_kick()? {
            None => {
                seen.kicks += 1;
                arm = true;
                if inject && vm.settle()? {
                    vm.interrupt(micro::COUNTED_VECTOR)?;
                    seen.interrupts += 1;
                }
            }
            Some(Stop::MemoryWrite(MMIO, _)) => seen.exits += 1,
            Some(Stop::Done) => break,
            Some(stop) => return Err(CounterError::Guest(stop.to_string())),
        }
    }
    counter.arm(None)?;
    let counted = counter.read()? - before;
    let [faults, interrupts] = vm.words(DATA);
    seen.faults = faults;
    if (faults, interrupts) != (rounds.into(), seen.interrupts) {
        return Err(CounterError::Guest(format!(
            "the guest saw {faults} page faults and {interrupts} interrupts, \
             where {rounds} and {} were expected",
            seen.interrupts
        )));
    }
    Ok(Run {
        counted,
        disturbances: seen,
    })
}

/// How often and how disturbed a count was right.
#[derive(Clone, Debug, Default)]
pub(super) struct Exactness {
    pub runs: u32,
    pub disturbances: Disturbances,
    pub inexact: Option<Inexact>,
}

fn number(ring: Ring) -> u8 {
    if ring == Ring::User { 3 } else { 0 }
}

/// Whether an undisturbed guest's count is its conditional branches.
pub(super) fn undisturbed(
    vm: &mut ProbeVm,
    counter: &mut BranchCounter,
    ring: Ring,
) -> Result<Exactness, CounterError> {
    let mut exactness = Exactness::default();
    for rounds in [ROUNDS, 3 * ROUNDS] {
        let run = run(vm, counter, (ring, rounds), None, false)?;
        exactness.runs += 1;
        exactness.disturbances += run.disturbances;
        let expected = micro::counted_branches(rounds, 0);
        if run.counted != expected {
            counter.check()?;
            exactness.inexact.get_or_insert(Inexact {
                flaw: Flaw::Miscounts,
                ring: number(ring),
                expected,
                counted: run.counted,
                disturbances: run.disturbances,
            });
        }
    }
    Ok(exactness)
}

/// Whether the count stays the same when kicks, exits, page faults and interrupts come between:
/// `runs` runs, or as many as there is time for. Stops at the first that is wrong. An event that
/// does not count branches is compared with itself, and gets no interrupts: what their handler
/// adds to it is unknown.
pub(super) fn disturbed(
    vm: &mut ProbeVm,
    counter: &mut BranchCounter,
    counts_branches: bool,
    runs: u32,
    until: Instant,
) -> Result<Exactness, CounterError> {
    let mut exactness = Exactness::default();
    let (mut dice, mut pace) = (Dice::new(0x5eed), Pace::of_host());
    while exactness.runs < runs && (exactness.runs < 2 || Instant::now() < until) {
        let ring = [Ring::Kernel, Ring::User][exactness.runs as usize % 2];
        let guest = (ring, ROUNDS + dice.below(MORE_ROUNDS) as u32);
        let alone = if counts_branches {
            None
        } else {
            Some(run(vm, counter, guest, None, false)?.counted)
        };
        let kicks = Some((&mut dice, &mut pace));
        let Run {
            counted,
            disturbances,
        } = run(vm, counter, guest, kicks, counts_branches)?;
        exactness.runs += 1;
        exactness.disturbances += disturbances;
        let branches = micro::counted_branches(guest.1, disturbances.interrupts);
        let expected = alone.unwrap_or(branches);
        if counted != expected {
            counter.check()?;
            exactness.inexact = Some(Inexact {
                flaw: Flaw::Drifts,
                ring: number(ring),
                expected,
                counted,
                disturbances,
            });
            break;
        }
    }
    Ok(exactness)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dice_fall_the_same_every_time_and_stay_in_bounds() {
        let throw = || {
            let mut dice = Dice::new(7);
            let throws: Vec<u64> = (0..1000).map(|_| dice.below(6)).collect();
            throws
        };
        assert_eq!(throw(), throw());
        assert!((0..6).all(|face| throw().contains(&face)));
    }
}
