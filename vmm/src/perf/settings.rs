//! The settings by which perf stops counters that interrupt too often.
//!
//! perf allows `perf_event_max_sample_rate` divided by HZ overflows per tick of the kernel's clock; with more, it stops
//! the counter until the next tick. Worse, it lowers that rate
//! by itself when handling an overflow seems to take more than `perf_cpu_time_max_percent` of the
//! time (Linux, Documentation/admin-guide/sysctl/kernel.rst). Either loses counts.

use std::fmt;

/// The rate that perf starts with, in overflows per second.
pub(crate) const USUAL_RATE: u64 = 100_000;

/// Sets the rate and keeps perf from lowering it. In this order: at 0 percent the kernel refuses to
/// change the rate.
pub(crate) const REMEDY: &str = "sysctl kernel.perf_cpu_time_max_percent=25 \
                          kernel.perf_event_max_sample_rate=100000 \
                          kernel.perf_cpu_time_max_percent=0";

/// A setting of the kernel's, if it can be read.
pub(super) fn sysctl(name: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/sys/kernel/{name}")).ok()?;
    Some(text.trim().to_string())
}

/// perf's settings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Throttling {
    /// `kernel.perf_cpu_time_max_percent`.
    pub percent: Option<u64>,
    /// `kernel.perf_event_max_sample_rate`.
    pub rate: Option<u64>,
}

impl Throttling {
    /// This host's, now.
    pub fn of_host() -> Throttling {
        let number = |name| sysctl(name)?.parse().ok();
        Throttling {
            percent: number("perf_cpu_time_max_percent"),
            rate: number("perf_event_max_sample_rate"),
        }
    }

    /// Whether perf leaves the rate alone: at 0 and at 100 it does not look at the time it takes.
    pub fn rate_is_fixed(&self) -> Option<bool> {
        self.percent.map(|percent| matches!(percent, 0 | 100))
    }

    /// Whether the rate is at least what perf starts with.
    pub fn rate_is_usual(&self) -> Option<bool> {
        self.rate.map(|rate| rate >= USUAL_RATE)
    }
}

impl fmt::Display for Throttling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |value: Option<u64>| value.map_or("unknown".to_string(), |v| v.to_string());
        write!(
            f,
            "kernel.perf_cpu_time_max_percent is {}, kernel.perf_event_max_sample_rate is {}",
            text(self.percent),
            text(self.rate)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perf_leaves_the_rate_alone_at_0_and_at_100_percent() {
        let at = |percent| Throttling {
            percent,
            rate: Some(USUAL_RATE),
        };
        assert_eq!(at(Some(0)).rate_is_fixed(), Some(true));
        assert_eq!(at(Some(100)).rate_is_fixed(), Some(true));
        assert_eq!(at(Some(25)).rate_is_fixed(), Some(false));
        assert_eq!(at(None).rate_is_fixed(), None);
        assert_eq!(at(None).rate_is_usual(), Some(true));
    }
}
