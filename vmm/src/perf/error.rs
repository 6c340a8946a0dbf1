//! What can go wrong between us and the PMU.

use std::io;

use thiserror::Error;

use super::settings::{REMEDY, Throttling};

/// Why there is no exact count.
#[derive(Debug, Error)]
pub enum CounterError {
    /// The table of events does not have this CPU.
    #[error(
        "no event is known that counts conditional branches exactly on {found}; \
         whoever knows one names it: --event r…"
    )]
    UnknownCpu {
        /// Vendor, family and model.
        found: String,
    },
    /// Linux has no PMU here.
    #[error(
        "the host's kernel shows no PMU: expected {expected} under {devices}, found {found}; \
         a virtual machine must be given one by its hypervisor"
    )]
    NoPmu {
        /// The names looked for.
        expected: &'static str,
        devices: String,
        /// What is there.
        found: String,
    },
    /// The PMU's own files make no sense.
    #[error("{path} should hold {expected}, but holds {found:?}")]
    Sysfs {
        /// Which file.
        path: String,
        /// What belongs there.
        expected: &'static str,
        /// What is there, or why it cannot be read.
        found: String,
    },
    /// What the operator named is no event.
    #[error("{given:?} is no raw event: write it as r01c4 or 0x1c4")]
    BadEvent {
        /// What was named.
        given: String,
    },
    /// The kernel does not give the counter.
    #[error("perf_event_open of {event}: {source}; {remedy}")]
    Open {
        /// Which event.
        event: String,
        /// What can be done.
        remedy: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// A call on an open counter failed.
    #[error("{call} on the branch counter: {source}")]
    Call {
        /// Its name.
        call: &'static str,
        #[source]
        source: io::Error,
    },
    /// This thread may not run on any CPU that has the PMU.
    #[error(
        "{pmu} counts on CPUs {cpus} only, and this thread may run on {allowed} only; \
         start it with another affinity (taskset, cpuset)"
    )]
    WrongCpus {
        /// The PMU's name.
        pmu: String,
        /// Its CPUs.
        cpus: String,
        /// The thread's.
        allowed: String,
    },
    /// The event is not on the CPU.
    #[error(
        "{event} lost its place on the PMU, so branches were missed; too many counters are in use: \
         end other users of perf, or give one back with `sysctl kernel.nmi_watchdog=0`"
    )]
    PinLost {
        /// Which event.
        event: String,
    },
    /// The event was on the CPU only part of the time.
    #[error(
        "{event} counted for {running_ns} ns of the {enabled_ns} ns it should have: it shared its \
         counter; end other users of perf"
    )]
    Multiplexed {
        /// Which event.
        event: String,
        /// How long it was enabled.
        enabled_ns: u64,
        /// And how long it counted.
        running_ns: u64,
    },
    /// perf stopped the counter for a while.
    #[error(
        "perf throttled {event} {times} times, so branches may have been missed ({settings}); \
         `{REMEDY}` keeps it from that"
    )]
    Throttled {
        /// Which event.
        event: String,
        /// How often since it was opened.
        times: u64,
        /// perf's settings now.
        settings: Throttling,
    },
    /// The ring was full.
    #[error(
        "{records} records of perf's did not fit into its ring: whether it throttled is not known; \
         the counter must be armed or checked more often"
    )]
    RecordsLost {
        /// How many.
        records: u64,
    },
    /// The count is less than it was.
    #[error(
        "{event} stood at {before}, and at {now} later; this host's PMU or kernel does not count"
    )]
    Backwards {
        /// Which event.
        event: String,
        before: u64,
        now: u64,
    },
    /// Calibration waited for a signal in vain.
    #[error(
        "{event} was armed for {at} and is at {count}, but no signal came; \
         this host's PMU counts and does not interrupt"
    )]
    NoSignal {
        /// Which event.
        event: String,
        /// Where the signal should have come.
        at: u64,
        /// Where it stands.
        count: u64,
    },
    /// A micro-guest did something else than it is made for.
    #[error("calibration: {0}")]
    Guest(String),
    /// KVM failed.
    #[error("{0}")]
    Kvm(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl CounterError {
    /// The error of perf_event_open, with what helps.
    pub(super) fn open(event: String, source: io::Error) -> CounterError {
        let remedy = match source.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => {
                let level = super::settings::sysctl("perf_event_paranoid");
                format!(
                    "kernel.perf_event_paranoid is {}: set it to 1 or less, or give this program \
                     CAP_PERFMON",
                    level.as_deref().unwrap_or("unknown")
                )
            }
            Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP) => {
                "this PMU cannot count that event in guests only; a virtual machine must be given \
                 a PMU by its hypervisor, and a KVM that lends the PMU to its guests (kvm.enable_pmu) \
                 keeps it from us"
                    .to_string()
            }
            Some(libc::EINVAL) => "this PMU or kernel does not know the event".to_string(),
            Some(libc::EBUSY) => "another user of the PMU has it for itself".to_string(),
            _ => "see perf_event_open(2)".to_string(),
        };
        CounterError::Open {
            event,
            remedy,
            source,
        }
    }
}
