//! How the guest of a recording is stopped between two exits, and what must be there for it.

use clap::ValueEnum;
use hindsight_replay::{Counter, CounterFacts, Lander, Unit};
use kvm_ioctls::Kvm;
use thiserror::Error;

use crate::kvm::{KvmCpu, Preemption, kick_signal};
use crate::perf::{
    BranchCounter, CounterError, CounterEvent, Effort, REMEDY, Throttling, calibrate,
};
use crate::tell::tell;

/// What stops a guest that does not exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Preempt {
    /// A branch counter if this host has one that is exact; else kernel entries.
    #[default]
    Auto,
    /// A branch counter: the guest can be stopped anywhere.
    Branches,
    /// Its own entries into its kernel: system calls and faults.
    Entries,
    /// Nothing: what is due waits for its next exit.
    Never,
}

/// Why a guest cannot be stopped as it should.
#[derive(Debug, Error)]
pub enum CountingError {
    /// The counter is missing or cannot be relied on.
    #[error(
        "this host cannot stop a guest at a counted branch: {0}. `hindsight doctor` tells more; to \
         record without, use --preempt entries"
    )]
    Counter(#[from] CounterError),
    /// The counter is there, and wrong.
    #[error(
        "{event} does not count exactly here (expected {expected}, counted {counted}, in ring {ring}): \
         a replay would not find its places again. `hindsight doctor` tells more; to record without, use \
         --preempt entries"
    )]
    Inexact {
        /// What was counted.
        event: String,
        /// What there was.
        expected: u64,
        /// What it gave.
        counted: u64,
        /// Where.
        ring: u8,
    },
}

/// How the guest is stopped.
#[derive(Debug)]
pub enum Counting {
    /// Not at all.
    Never,
    /// At counted kernel entries.
    Entries,
    /// At counted branches.
    Branches {
        /// What counts them.
        event: CounterEvent,
        /// What is known of it.
        facts: CounterFacts,
    },
}

impl Counting {
    /// What `wanted` comes to on this host. The operator may force an event and a margin.
    pub fn choose(
        kvm: &Kvm,
        wanted: Preempt,
        event: Option<&str>,
        margin: Option<u64>,
    ) -> Result<Counting, CountingError> {
        match wanted {
            Preempt::Never => Ok(Counting::Never),
            Preempt::Entries => Ok(Counting::Entries),
            Preempt::Branches => Counting::branches(kvm, event, margin),
            // Who names an event wants it.
            Preempt::Auto if event.is_some() => Counting::branches(kvm, event, margin),
            Preempt::Auto => Counting::branches(kvm, None, margin).or(Ok(Counting::Entries)),
        }
    }

    /// What a recording needs to be replayed.
    pub fn for_unit(
        kvm: &Kvm,
        unit: Option<Unit>,
        event: Option<&str>,
        margin: Option<u64>,
    ) -> Result<Counting, CountingError> {
        let wanted = match unit {
            None => Preempt::Never,
            Some(Unit::Entries) => Preempt::Entries,
            Some(Unit::Branches) => Preempt::Branches,
        };
        Counting::choose(kvm, wanted, event, margin)
    }

    fn branches(
        kvm: &Kvm,
        event: Option<&str>,
        margin: Option<u64>,
    ) -> Result<Counting, CountingError> {
        let event: CounterEvent = match event {
            Some(event) => event.parse()?,
            None => CounterEvent::of_host()?,
        };
        let found = calibrate(kvm, &event, Effort::QUICK)?;
        if let Some(wrong) = found.inexact {
            return Err(CountingError::Inexact {
                event: event.to_string(),
                expected: wrong.expected,
                counted: wrong.counted,
                ring: wrong.ring,
            });
        }
        let facts = CounterFacts {
            event: event.event,
            kicks: found.skid.signals,
            worst_skid: found.skid.worst,
            margin: margin.unwrap_or(found.margin),
        };
        if facts.margin <= facts.worst_skid {
            tell!(
                "hindsight: a margin of {} branches is forced, but of {} kicks here the latest came {} \
                 branches late; a replay may run past its places, and will say so",
                facts.margin,
                facts.kicks,
                facts.worst_skid
            );
        }
        let throttling = Throttling::of_host();
        if throttling.rate_is_fixed() == Some(false) {
            tell!(
                "hindsight: perf may throttle the counter here, and lose counts ({throttling}); if it does, \
                 the recording ends there. To rule it out: {REMEDY}"
            );
        }
        Ok(Counting::Branches { event, facts })
    }

    /// What is counted.
    pub fn unit(&self) -> Option<Unit> {
        match self {
            Counting::Never => None,
            Counting::Entries => Some(Unit::Entries),
            Counting::Branches { .. } => Some(Unit::Branches),
        }
    }

    /// What is known of the branch counter, if it is used.
    pub fn facts(&self) -> Option<CounterFacts> {
        match self {
            Counting::Branches { facts, .. } => Some(facts.clone()),
            _ => None,
        }
    }

    /// What a recording on this host would count, as far as can be told without measuring.
    pub fn likely_unit() -> Unit {
        let counter =
            CounterEvent::of_host().and_then(|event| BranchCounter::open(&event, kick_signal()));
        match counter {
            Ok(_) => Unit::Branches,
            Err(_) => Unit::Entries,
        }
    }

    /// Has `cpu`, which runs on this thread, be stopped so.
    pub fn give_to(&self, cpu: &mut KvmCpu) -> Result<(), CountingError> {
        cpu.preempt_by(match self {
            Counting::Never => Preemption::Never,
            Counting::Entries => Preemption::Entries,
            Counting::Branches { event, facts } => {
                Preemption::Branches(Box::new(Lander::new(HostCounter {
                    counter: BranchCounter::open(event, kick_signal())?,
                    margin: facts.margin,
                })))
            }
        });
        Ok(())
    }
}

/// The host's branch counter, with the margin that it needs.
#[derive(Debug)]
pub struct HostCounter {
    counter: BranchCounter,
    margin: u64,
}

impl Counter for HostCounter {
    type Error = CounterError;

    fn read(&mut self) -> Result<u64, CounterError> {
        self.counter.read()
    }

    fn arm(&mut self, at: Option<u64>) -> Result<(), CounterError> {
        self.counter.arm(at)
    }

    fn margin(&self) -> u64 {
        self.margin
    }

    fn check(&mut self) -> Result<(), CounterError> {
        self.counter.check()
    }
}
