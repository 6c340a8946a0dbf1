//! Which event counts retired conditional branches on which CPU.
//!
//! Conditional branches, because nothing else stays exact: instruction counts drift by one when an
//! interrupt or exit returns, counts of all branches with far ones, and cycles are not the guest's.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::affinity::CpuList;
use super::error::CounterError;
use super::processor::Processor;

/// Where Linux shows its PMUs.
const DEVICES: &str = "/sys/bus/event_source/devices";
/// The PMU of ordinary CPUs, and that of each kind of core of hybrid ones, in order of preference.
const PMUS: [&str; 3] = ["cpu", CORE, ATOM];
const CORE: &str = "cpu_core";
const ATOM: &str = "cpu_atom";
/// PERF_TYPE_RAW, for kernels that hide their PMUs.
const RAW: u32 = 4;

/// A raw event of a PMU: what perf shall count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterEvent {
    /// Unit mask in bits 8 to 15, event in 0 to 7 and 32 to 35.
    pub event: u64,
    /// As the vendor calls it.
    pub name: String,
    /// `GenuineIntel`.
    pub vendor: String,
    /// The PMU, a name under `/sys/bus/event_source/devices`.
    pub pmu: String,
    /// The latest overflow known of CPUs of this kind, in branches; 0 if none is.
    pub worst_known: u64,
    /// Why this event, and what must hold for it to be exact.
    pub explanation: String,
}

/// A PMU that was found: its name, perf's number for it, its CPUs if it is one of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pmu {
    pub name: &'static str,
    pub kind: u32,
    pub cpus: Option<CpuList>,
}

impl CounterEvent {
    /// The event to count on this host.
    pub fn of_host() -> Result<CounterEvent, CounterError> {
        let pmu = Pmu::of_host()?;
        let unknown = |found: String| CounterError::UnknownCpu { found };
        let cpu = Processor::of_host()
            .ok_or_else(|| unknown("a CPU that /proc/cpuinfo does not name".to_string()))?;
        let found = format!("{} family {} model {}", cpu.vendor, cpu.family, cpu.model);
        let mut event = known(&cpu, pmu.name).ok_or_else(|| unknown(found))?;
        if cpu.is_emulated() {
            event.worst_known = 0;
            event.explanation = "an emulated PMU: exact by construction".to_string();
        }
        Ok(event)
    }

    /// An event that the operator answers for.
    pub fn raw(event: u64) -> CounterEvent {
        CounterEvent {
            event,
            name: "raw event".to_string(),
            vendor: Processor::of_host().map_or_else(String::new, |cpu| cpu.vendor),
            pmu: Pmu::of_host().map_or(PMUS[0], |pmu| pmu.name).to_string(),
            worst_known: 0,
            explanation: "named by the operator".to_string(),
        }
    }
}

impl FromStr for CounterEvent {
    type Err = CounterError;

    /// Reads `r01c4`, as perf writes it, or `0x1c4`.
    fn from_str(given: &str) -> Result<CounterEvent, CounterError> {
        let digits = given.strip_prefix("0x").or(given.strip_prefix('r'));
        // `from_str_radix` would take a sign.
        let digits = digits.filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let event = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        let event = event.ok_or_else(|| CounterError::BadEvent {
            given: given.to_string(),
        })?;
        Ok(CounterEvent::raw(event))
    }
}

impl fmt::Display for CounterEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CounterEvent {
            event, name, pmu, ..
        } = self;
        write!(f, "r{event:04x} of {pmu} ({name})")
    }
}

impl Pmu {
    /// The PMU to count with in this thread.
    pub(super) fn of_host() -> Result<Pmu, CounterError> {
        Pmu::find(Path::new(DEVICES), &CpuList::of_this_thread()?, &PMUS)
    }

    /// The PMU of this name.
    pub(super) fn named(name: &str) -> Result<Pmu, CounterError> {
        let wanted = PMUS.into_iter().filter(|pmu| *pmu == name);
        let wanted: Vec<&'static str> = wanted.collect();
        Pmu::find(Path::new(DEVICES), &CpuList::of_this_thread()?, &wanted)
    }

    /// The first of `wanted` under `devices` that has a CPU among `allowed`.
    fn find(
        devices: &Path,
        allowed: &CpuList,
        wanted: &[&'static str],
    ) -> Result<Pmu, CounterError> {
        let Ok(entries) = std::fs::read_dir(devices) else {
            // No sysfs: the kernel may have a PMU all the same.
            return Ok(Pmu {
                name: PMUS[0],
                kind: RAW,
                cpus: None,
            });
        };
        let mut found: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        found.sort();
        let mut elsewhere = None;
        for name in wanted
            .iter()
            .filter(|name| found.iter().any(|f| f == *name))
        {
            let kind = read(devices, name, "type", "a number", |text| text.parse().ok())?;
            let cpus = if *name == PMUS[0] {
                None
            } else {
                Some(read(devices, name, "cpus", "CPUs", CpuList::parse)?)
            };
            match &cpus {
                Some(cpus) if cpus.and(allowed).is_empty() => {
                    elsewhere.get_or_insert(CounterError::WrongCpus {
                        pmu: (*name).to_string(),
                        cpus: cpus.to_string(),
                        allowed: allowed.to_string(),
                    });
                }
                _ => return Ok(Pmu { name, kind, cpus }),
            }
        }
        Err(elsewhere.unwrap_or_else(|| CounterError::NoPmu {
            expected: "cpu, cpu_core or cpu_atom",
            devices: devices.display().to_string(),
            found: found.join(", "),
        }))
    }
}

fn read<T>(
    devices: &Path,
    pmu: &str,
    file: &str,
    expected: &'static str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<T, CounterError> {
    let path = devices.join(pmu).join(file);
    let text = std::fs::read_to_string(&path);
    let value = text.as_ref().ok().and_then(|text| parse(text.trim()));
    value.ok_or_else(|| CounterError::Sysfs {
        path: path.display().to_string(),
        expected,
        found: text.unwrap_or_else(|error| error.to_string()),
    })
}

/// Families of CPUs with the same event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nehalem to Comet Lake.
    OldCore,
    /// Ice Lake and later.
    Core,
    /// Silvermont to Crestmont.
    Atom,
    /// All Zens.
    Zen,
}

/// Only models whose event is known to count exactly (rr, src/PerfCounters_x86.h).
fn kind(cpu: &Processor, pmu: &str) -> Option<Kind> {
    if cpu.is_zen() {
        return Some(Kind::Zen);
    }
    if (cpu.vendor.as_str(), cpu.family) != ("GenuineIntel", 6) {
        return None;
    }
    let kind = match cpu.model {
        // Nehalem and Westmere; Sandy and Ivy Bridge; Haswell; Broadwell.
        0x1a | 0x1e | 0x1f | 0x2e | 0x25 | 0x2c | 0x2f | 0x2a | 0x2d | 0x3a | 0x3e | 0x3c
        | 0x3f | 0x45 | 0x46 | 0x3d | 0x47 | 0x4f | 0x56
        // Skylake and Cascade Lake; Kaby and Coffee Lake; Cannon Lake; Comet Lake.
        | 0x4e | 0x5e | 0x55 | 0x8e | 0x9e | 0x66 | 0xa5 | 0xa6 => Kind::OldCore,
        // Ice Lake; Tiger and Rocket Lake; Alder and Raptor Lake (P); Sapphire, Emerald and
        // Granite Rapids; Meteor Lake (P).
        0x6a | 0x6c | 0x7d | 0x7e | 0x8c | 0x8d | 0xa7 | 0x97 | 0x9a | 0xb7 | 0xba | 0xbf
        | 0x8f | 0xcf | 0xad | 0xae | 0xaa | 0xac => Kind::Core,
        // E-cores alone: Silvermont to Gracemont.
        0x37 | 0x4c | 0x4d | 0x5a | 0x5c | 0x5f | 0x7a | 0x86 | 0x96 | 0x9c | 0xbe => Kind::Atom,
        _ => return None,
    };
    // The model is that of the package; which cores are meant, the PMU says.
    Some(if pmu == ATOM { Kind::Atom } else { kind })
}

fn known(cpu: &Processor, pmu: &str) -> Option<CounterEvent> {
    // The last figure is the worst skid that was reported of such CPUs.
    let (event, name, worst_known, explanation) = match kind(cpu, pmu)? {
        Kind::OldCore => (
            0x01c4,
            "BR_INST_RETIRED.CONDITIONAL",
            100,
            "Intel, Nehalem to Comet Lake",
        ),
        Kind::Core => (
            0x11c4,
            "BR_INST_RETIRED.COND",
            100,
            "Intel, Ice Lake and later; on hybrid CPUs the P-cores",
        ),
        Kind::Atom => (
            0x7ec4,
            "BR_INST_RETIRED.COND",
            100,
            "Intel's E-cores, Silvermont and later",
        ),
        Kind::Zen => (
            0xd1,
            "ex_ret_cond",
            1609,
            "AMD Zen and later; exact only with SpecLockMap off (MSR 0xc0011020 bit 54 set)",
        ),
    };
    Some(CounterEvent {
        event,
        name: name.to_string(),
        vendor: cpu.vendor.clone(),
        pmu: pmu.to_string(),
        worst_known,
        explanation: explanation.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(vendor: &str, family: u32, model: u32, pmu: &str) -> Option<u64> {
        let cpu = Processor {
            vendor: vendor.to_string(),
            family,
            model,
            ..Processor::default()
        };
        known(&cpu, pmu).map(|known| known.event)
    }

    #[test]
    fn the_event_follows_the_model_and_is_not_guessed() {
        assert_eq!(event("GenuineIntel", 6, 0x55, "cpu"), Some(0x01c4));
        assert_eq!(event("GenuineIntel", 6, 0x6a, "cpu"), Some(0x11c4));
        assert_eq!(event("GenuineIntel", 6, 0xbe, "cpu"), Some(0x7ec4));
        assert_eq!(event("AuthenticAMD", 0x19, 0x11, "cpu"), Some(0xd1));
        assert_eq!(event("AuthenticAMD", 0xf, 0x6b, "cpu"), None);
        assert_eq!(event("GenuineIntel", 6, 0, "cpu"), None);
    }

    #[test]
    fn a_hybrid_cpus_event_follows_the_kind_of_core() {
        assert_eq!(event("GenuineIntel", 6, 0x97, "cpu_core"), Some(0x11c4));
        assert_eq!(event("GenuineIntel", 6, 0x97, "cpu_atom"), Some(0x7ec4));
        assert_eq!(event("GenuineIntel", 6, 0, "cpu_atom"), None);
    }

    #[test]
    fn an_operators_event_is_read_in_both_spellings() {
        for (text, event) in [
            ("r00c0", 0xc0),
            ("0xd1", 0xd1),
            ("r1000000d1", 0x1_0000_00d1),
        ] {
            assert_eq!(text.parse::<CounterEvent>().unwrap().event, event, "{text}");
        }
        for text in [
            "",
            "r",
            "c0",
            "0x",
            "rxyz",
            "r-1",
            "r+c0",
            "r123456789abcdef01",
        ] {
            assert!(text.parse::<CounterEvent>().is_err(), "{text:?}");
        }
    }

    /// A directory like Linux's, with these PMUs: name and CPUs.
    fn devices(pmus: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (i, (name, cpus)) in pmus.iter().enumerate() {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("type"), format!("{}\n", i + 4)).unwrap();
            std::fs::write(dir.path().join(name).join("cpus"), format!("{cpus}\n")).unwrap();
        }
        dir
    }

    fn find(pmus: &[(&str, &str)], allowed: &str) -> Result<Pmu, CounterError> {
        let allowed = CpuList::parse(allowed).unwrap();
        Pmu::find(devices(pmus).path(), &allowed, &PMUS)
    }

    #[test]
    fn of_a_hybrid_cpus_pmus_the_one_with_a_cpu_for_us_is_taken_p_cores_first() {
        let hybrid = [("cpu_core", "0-7"), ("cpu_atom", "8-15"), ("msr", "")];
        let found = |allowed| find(&hybrid, allowed).unwrap();
        assert_eq!((found("0-15").name, found("0-15").kind), ("cpu_core", 4));
        assert_eq!((found("9").name, found("9").kind), ("cpu_atom", 5));
        assert_eq!(found("3,9").cpus, CpuList::parse("0-7"));
        let error = find(&hybrid, "16").unwrap_err().to_string();
        assert!(
            error.contains("cpu_core counts on CPUs 0-7 only") && error.contains("16"),
            "{error}"
        );
    }

    #[test]
    fn a_host_without_a_pmu_is_told_what_it_has_instead() {
        assert_eq!(find(&[("cpu", "")], "0").unwrap().cpus, None);
        let error = find(&[("msr", ""), ("breakpoint", "")], "0").unwrap_err();
        assert!(
            error.to_string().contains("found breakpoint, msr"),
            "{error}"
        );
    }

    #[test]
    fn a_pmu_without_a_number_is_named_with_its_file() {
        let dir = devices(&[("cpu", "")]);
        std::fs::write(dir.path().join("cpu/type"), "none").unwrap();
        let error = Pmu::find(dir.path(), &CpuList::default(), &PMUS).unwrap_err();
        assert!(error.to_string().contains("cpu/type") && error.to_string().contains("none"));
    }
}
