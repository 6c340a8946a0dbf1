//! SpecLockMap, which spoils the branch count of AMD's Zen.
//!
//! With it the CPU goes on after a locked instruction before the lock is certain, and counts the
//! branches there twice if it has to come back. Bit 54 of MSR 0xc0011020 switches it off; its own
//! event, 0x25 with unit mask 8, counts the locked instructions that made use of it (rr, issue
//! 2034 and src/PerfCounters_x86.h).

use std::fs::File;
use std::os::unix::fs::FileExt;

use hindsight_guest_images::{Ring, micro};

use crate::kvm::kick_signal;
use crate::kvm::probe::{ProbeVm, Stop};
use crate::perf::BranchCounter;
use crate::perf::CounterError;
use crate::perf::CounterEvent;
use crate::perf::CpuList;
use crate::perf::Processor;

/// LS_CFG, and its bit that switches SpecLockMap off.
const LS_CFG: u64 = 0xc001_1020;
const OFF: u64 = 1 << 54;
/// Retired locked instructions: those that used SpecLockMap, and all.
const COMMITTED: u64 = 0x0825;
const LOCKED: u64 = 0x0f25;
/// Locked instructions to try. It takes some until the CPU speculates.
const TRIES: u32 = 100_000;

/// Whether it is off, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SpecLockMap {
    Off(String),
    /// On: counts may be too high.
    On(String),
    /// There is no telling.
    Unknown(String),
}

impl SpecLockMap {
    /// By the MSR of each CPU that this thread may run on. `None` where there is no SpecLockMap.
    pub(super) fn by_msr() -> Option<SpecLockMap> {
        let cpu = Processor::of_host().filter(Processor::is_zen)?;
        if cpu.is_emulated() {
            let why = "an emulated CPU does not speculate";
            return Some(SpecLockMap::Off(why.to_string()));
        }
        Some(match CpuList::of_this_thread() {
            Ok(cpus) => of_msrs(&cpus, |cpu| {
                let mut value = [0; 8];
                let file = File::open(format!("/dev/cpu/{cpu}/msr"))?;
                file.read_exact_at(&mut value, LS_CFG)?;
                Ok(u64::from_le_bytes(value))
            }),
            Err(error) => SpecLockMap::Unknown(error.to_string()),
        })
    }

    /// By the MSR, and where that cannot be read by counting in a guest of `vm`.
    pub(super) fn find(vm: &mut ProbeVm) -> Result<Option<SpecLockMap>, CounterError> {
        let Some(SpecLockMap::Unknown(why)) = SpecLockMap::by_msr() else {
            return Ok(SpecLockMap::by_msr());
        };
        let mut committed = BranchCounter::open(&CounterEvent::raw(COMMITTED), kick_signal())?;
        let mut locked = BranchCounter::open(&CounterEvent::raw(LOCKED), kick_signal())?;
        vm.load(&micro::locked(Ring::Kernel, TRIES), 0)?;
        match vm.run()? {
            Stop::Done => {}
            stop => return Err(CounterError::Guest(stop.to_string())),
        }
        Ok(Some(of_counts(committed.read()?, locked.read()?, &why)))
    }
}

fn of_msrs(cpus: &CpuList, read: impl Fn(usize) -> std::io::Result<u64>) -> SpecLockMap {
    for cpu in cpus.iter() {
        match read(cpu) {
            Ok(value) if value & OFF == 0 => {
                return SpecLockMap::On(format!(
                    "MSR {LS_CFG:#x} of CPU {cpu} is {value:#x}, without bit 54"
                ));
            }
            Ok(_) => {}
            Err(error) => {
                return SpecLockMap::Unknown(format!(
                    "/dev/cpu/{cpu}/msr: {error} (modprobe msr, as root)"
                ));
            }
        }
    }
    SpecLockMap::Off(format!("bit 54 of MSR {LS_CFG:#x} is set on CPUs {cpus}"))
}

fn of_counts(committed: u64, locked: u64, no_msr: &str) -> SpecLockMap {
    let seen = format!("{committed} of {TRIES} locked instructions used it");
    if committed > 0 {
        SpecLockMap::On(seen)
    } else if locked >= u64::from(TRIES) {
        SpecLockMap::Off(seen)
    } else {
        SpecLockMap::Unknown(format!(
            "{no_msr}; and the PMU counts {locked} of {TRIES} locked instructions"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_off_only_if_every_cpu_says_so() {
        let cpus = CpuList::parse("0-1").unwrap();
        let all = |cpu_1: u64| of_msrs(&cpus, |cpu| Ok(if cpu == 1 { cpu_1 } else { OFF | 1 }));
        assert!(matches!(all(OFF), SpecLockMap::Off(_)));
        assert!(matches!(all(1), SpecLockMap::On(why) if why.contains("CPU 1")));
        let unread = of_msrs(&cpus, |_| Err(std::io::ErrorKind::NotFound.into()));
        assert!(matches!(unread, SpecLockMap::Unknown(_)));
    }

    #[test]
    fn a_count_of_zero_says_nothing_on_a_pmu_that_does_not_count_locked_instructions() {
        let of = |committed, locked| of_counts(committed, locked, "no MSR");
        assert!(matches!(of(0, 0), SpecLockMap::Unknown(_)));
        assert!(matches!(of(0, u64::from(TRIES)), SpecLockMap::Off(_)));
        assert!(matches!(of(3, u64::from(TRIES)), SpecLockMap::On(_)));
    }
}
