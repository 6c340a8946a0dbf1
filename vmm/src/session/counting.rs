//! How the guest of a recording is stopped between two exits, and what must be there for it.

use hindsight_replay::{CounterFacts, Lander, Unit};
use kvm_ioctls::Kvm;
use thiserror::Error;

use crate::failure::{Classified, Kind};

use crate::doctor::{Effort, calibrate};
use crate::kvm::{KvmCpu, Preemption, kick_signal};
use crate::perf::{BranchCounter, CounterError, CounterEvent, HostCounter, REMEDY, Throttling};

/// What stops a guest that does not exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

/// What the operator forces of the branch counter.
#[derive(Clone, Debug, Default)]
pub struct CounterWish {
    /// The raw event that is counted; without it, the one known for this CPU.
    pub event: Option<String>,
    /// How many branches short of a place the counter is set; without it, what was measured.
    pub margin: Option<u64>,
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
        /// What the operator should know of it, in words.
        warnings: Vec<String>,
    },
}

impl Counting {
    /// What `wanted` comes to on this host.
    pub fn choose(
        kvm: &Kvm,
        wanted: Preempt,
        counter: &CounterWish,
    ) -> Result<Counting, CountingError> {
        match wanted {
            Preempt::Never => Ok(Counting::Never),
            Preempt::Entries => Ok(Counting::Entries),
            Preempt::Branches => Counting::branches(kvm, counter),
            // Who names an event wants it.
            Preempt::Auto if counter.event.is_some() => Counting::branches(kvm, counter),
            Preempt::Auto => Counting::branches(kvm, counter).or(Ok(Counting::Entries)),
        }
    }

    /// What a recording needs to be replayed.
    pub fn for_unit(
        kvm: &Kvm,
        unit: Option<Unit>,
        counter: &CounterWish,
    ) -> Result<Counting, CountingError> {
        let wanted = match unit {
            None => Preempt::Never,
            Some(Unit::Entries) => Preempt::Entries,
            Some(Unit::Branches) => Preempt::Branches,
        };
        Counting::choose(kvm, wanted, counter)
    }

    fn branches(kvm: &Kvm, wish: &CounterWish) -> Result<Counting, CountingError> {
        let event: CounterEvent = match &wish.event {
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
            margin: wish.margin.unwrap_or(found.margin),
        };
        let mut warnings = Vec::new();
        if facts.margin <= facts.worst_skid {
            warnings.push(format!(
                "a margin of {} branches is forced, but of {} kicks here the latest came {} \
                 branches late; a replay may run past its places, and will say so",
                facts.margin, facts.kicks, facts.worst_skid
            ));
        }
        let throttling = Throttling::of_host();
        if throttling.rate_is_fixed() == Some(false) {
            warnings.push(format!(
                "perf may throttle the counter here, and lose counts ({throttling}); if it does, \
                 the recording ends there. To rule it out: {REMEDY}"
            ));
        }
        Ok(Counting::Branches {
            event,
            facts,
            warnings,
        })
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

    /// What the operator should know of it, in words.
    pub fn warnings(&self) -> &[String] {
        match self {
            Counting::Branches { warnings, .. } => warnings,
            _ => &[],
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
            Counting::Branches { event, facts, .. } => {
                let counter = BranchCounter::open(event, kick_signal())?;
                Preemption::Branches(Box::new(Lander::new(HostCounter::new(
                    counter,
                    facts.margin,
                ))))
            }
        });
        Ok(())
    }
}

impl Classified for CountingError {
    fn kind(&self) -> Kind {
        Kind::Unfit
    }
}
