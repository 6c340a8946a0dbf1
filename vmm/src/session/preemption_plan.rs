//! What stops a guest that does not exit: from what the operator asks for to what this host can do.
//!
//! [`PreemptionWish`] is what is asked for, [`PreemptionPlan`] what it comes to on this host. A recording's header
//! has the plan's [`Unit`]; a vCPU gets a [`Preemption`], the mechanism.

use hindsight_replay::{CounterFacts, Lander, Unit};
use kvm_ioctls::Kvm;
use thiserror::Error;

use crate::failure::{Classified, Kind};

use crate::doctor::{Effort, calibrate};
use crate::kvm::{KvmCpu, Preemption, kick_signal};
use crate::perf::{BranchCounter, CounterError, CounterEvent, HostCounter, REMEDY, Throttling};

/// What is to stop a guest that does not exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PreemptionWish {
    /// A branch counter if this host has one that is exact; else kernel entries.
    #[default]
    Auto,
    /// What counts this; `None`: nothing does, and what is due waits for the guest's next exit.
    Exactly(Option<Unit>),
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
pub enum PreemptionError {
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
        ring: u8,
    },
}

/// What will stop it on this host.
#[derive(Clone, Debug)]
pub struct PreemptionPlan {
    unit: Option<Unit>,
    /// The branch counter, if that is what counts, and what is known of it.
    counter: Option<(CounterEvent, CounterFacts)>,
    warnings: Vec<String>,
}

impl PreemptionPlan {
    /// What `wish` comes to on this host.
    ///
    /// # Errors
    ///
    /// A branch counter is asked for, and this host does not have an exact one.
    pub fn choose(
        kvm: &Kvm,
        wish: PreemptionWish,
        counter: &CounterWish,
    ) -> Result<PreemptionPlan, PreemptionError> {
        match wish {
            PreemptionWish::Exactly(Some(Unit::Branches)) => PreemptionPlan::branches(kvm, counter),
            PreemptionWish::Exactly(unit) => Ok(PreemptionPlan::uncounted(unit)),
            // Who names an event wants it.
            PreemptionWish::Auto if counter.event.is_some() => {
                PreemptionPlan::branches(kvm, counter)
            }
            PreemptionWish::Auto => Ok(PreemptionPlan::branches(kvm, counter)
                .unwrap_or_else(|_| PreemptionPlan::uncounted(Some(Unit::Entries)))),
        }
    }

    /// Without a counter of this host's.
    fn uncounted(unit: Option<Unit>) -> PreemptionPlan {
        PreemptionPlan {
            unit,
            counter: None,
            warnings: Vec::new(),
        }
    }

    fn branches(kvm: &Kvm, wish: &CounterWish) -> Result<PreemptionPlan, PreemptionError> {
        let event: CounterEvent = match &wish.event {
            Some(event) => event.parse()?,
            None => CounterEvent::of_host()?,
        };
        let found = calibrate(kvm, &event, Effort::QUICK)?;
        if let Some(wrong) = found.inexact {
            return Err(PreemptionError::Inexact {
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
        Ok(PreemptionPlan {
            unit: Some(Unit::Branches),
            counter: Some((event, facts)),
            warnings,
        })
    }

    /// What is counted.
    pub fn unit(&self) -> Option<Unit> {
        self.unit
    }

    /// What is known of the branch counter, if it is used.
    pub fn facts(&self) -> Option<CounterFacts> {
        self.counter.as_ref().map(|(_, facts)| facts.clone())
    }

    /// What the operator should know of it: sentences.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
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
    ///
    /// # Errors
    ///
    /// The counter cannot be opened any more.
    pub fn apply(&self, cpu: &mut KvmCpu) -> Result<(), PreemptionError> {
        cpu.preempt_by(match (&self.counter, self.unit) {
            (Some((event, facts)), _) => {
                let counter = BranchCounter::open(event, kick_signal())?;
                let counter = HostCounter::new(counter, facts.margin);
                Preemption::Branches(Box::new(Lander::new(counter)))
            }
            (None, Some(_)) => Preemption::Entries,
            (None, None) => Preemption::Never,
        });
        Ok(())
    }
}

impl Classified for PreemptionError {
    fn kind(&self) -> Kind {
        Kind::Unfit
    }
}
