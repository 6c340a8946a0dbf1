//! What a run, a recording or a replay came to, for people and for programs.

use hindsight_replay::{End, Exit, Machine, Tally};
use serde::Serialize;

use crate::format::{bytes, seconds, thousands};
use crate::tell::{out, tell};

/// The one summary that ends a run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Summary {
    /// How the guest ended.
    pub ending: String,
    /// Whether the guest panicked.
    pub panicked: bool,
    /// Guest time in nanoseconds.
    pub guest_ns: u64,
    /// Host time in nanoseconds.
    pub host_ns: u64,
    /// Counted exits.
    pub exits: u64,
    /// Exits by kind.
    pub exits_by_kind: std::collections::BTreeMap<&'static str, u64>,
    /// Writes that were posted: they waited for the next exit.
    pub posted_writes: u64,
    /// Interrupts delivered.
    pub interrupts: u64,
    /// Of those, how many waited for the guest to open its window.
    pub interrupts_in_windows: u64,
    /// Of those, how many were delivered where the guest was preempted for them.
    pub interrupts_at_preemptions: u64,
    /// How often the guest was preempted between two exits.
    pub preemptions: u64,
    /// How many modules the guest's kernel loaded.
    pub modules: u64,
    /// How many instructions were rewritten in them.
    pub module_sites: u64,
    /// Digest of all turns, in hexadecimal.
    pub digest: String,
    /// Digest of all of memory, in hexadecimal.
    pub memory_digest: Option<String>,
    /// Digest of the whole state: memory, vCPU, devices and disks. In hexadecimal.
    pub state_digest: Option<String>,
    /// Bytes of journal.
    pub journal_bytes: Option<u64>,
    /// What was found to be left open while it ran.
    pub left_open: Vec<String>,
    /// The seed of the chaos that was made.
    pub chaos_seed: Option<u64>,
    /// How many runs it took.
    pub runs: Option<u64>,
    /// The exit of a recording from which it was live.
    pub live_from: Option<u64>,
}

impl Summary {
    /// Of a run that came to `end`.
    pub(crate) fn new(
        machine: &Machine,
        end: &End,
        host_ns: u64,
        journal_bytes: Option<u64>,
    ) -> Summary {
        let Tally {
            exits,
            interrupts,
            windows,
            preempted,
            module_sites,
            posted,
            ref left_open,
        } = *machine.tally();
        let kinds = Exit::KIND_NAMES
            .into_iter()
            .zip(exits)
            .filter(|(_, count)| *count > 0);
        let preemptions = exits[Exit::PREEMPTED];
        Summary {
            ending: end.to_string(),
            panicked: end.panic.is_some(),
            guest_ns: end.now,
            host_ns,
            exits: machine.at().exits,
            exits_by_kind: kinds.collect(),
            posted_writes: posted,
            interrupts,
            interrupts_in_windows: windows,
            interrupts_at_preemptions: preempted,
            preemptions,
            modules: exits[Exit::MODULE],
            module_sites,
            digest: format!("{:016x}", end.digest),
            memory_digest: end.state.map(|state| state.memory.to_string()),
            state_digest: end.state.map(|state| state.to_string()),
            journal_bytes,
            left_open: left_open.iter().map(ToString::to_string).collect(),
            chaos_seed: None,
            runs: None,
            live_from: None,
        }
    }

    /// Prints it to standard error, or as JSON to standard output.
    pub(crate) fn print(&self, headline: &str, json: bool) {
        if json {
            out!(
                "{}",
                serde_json::to_string(self).expect("plain values serialise")
            );
            return;
        }
        let rate = self.exits as f64 / (self.host_ns.max(1) as f64 / 1e9);
        tell!("{headline}: {}", self.ending);
        tell!(
            "  {} of guest time in {}, {} exits ({rate:.0}/s), {} interrupts",
            seconds(self.guest_ns),
            seconds(self.host_ns),
            thousands(self.exits),
            thousands(self.interrupts),
        );
        if self.preemptions > 0 {
            let at_exits =
                self.interrupts - self.interrupts_in_windows - self.interrupts_at_preemptions;
            tell!(
                "  preempted {} times between exits; {} interrupts landed there, {} in windows, {} at exits",
                thousands(self.preemptions),
                thousands(self.interrupts_at_preemptions),
                thousands(self.interrupts_in_windows),
                thousands(at_exits),
            );
        }
        if self.modules > 0 {
            tell!(
                "  {} modules loaded, {} instructions in them trapped",
                thousands(self.modules),
                thousands(self.module_sites)
            );
        }
        if let Some(journal) = self.journal_bytes {
            let per_second = journal as f64 / (self.guest_ns.max(1) as f64 / 1e9);
            tell!(
                "  journal {} ({} a second)",
                bytes(journal),
                bytes(per_second as u64)
            );
        }
        if let Some(exits) = self.live_from {
            tell!("  live from exit {} on", thousands(exits));
        }
        for what in &self.left_open {
            tell!("  left open: {what}");
        }
        if let Some(seed) = self.chaos_seed {
            tell!("  made with chaos seed {seed}");
        }
        let memory = self
            .memory_digest
            .as_deref()
            .unwrap_or("none: the guest was stopped between two exits, and ran on meanwhile");
        tell!("  digest {}, memory {memory}", self.digest);
    }
}

/// What an `equal` does not cover at this end, as a clause; `None`: it covers everything.
pub(crate) fn not_compared(end: &End) -> Option<&'static str> {
    end.state
        .is_none()
        .then_some("memory was not compared: the guest was stopped between two exits")
}

#[cfg(test)]
mod tests {
    use hindsight_replay::{Ending, FullDigest};

    use super::*;

    #[test]
    fn only_a_guest_that_was_stopped_between_two_exits_has_a_memory_that_nobody_compared() {
        let end = |ending, state| End {
            ending,
            panic: None,
            now: 0,
            digest: 0,
            state,
        };
        let said = not_compared(&end(Ending::StoppedRunning, None)).expect("it is said");
        assert!(said.contains("memory was not compared"), "{said}");
        assert_eq!(
            not_compared(&end(Ending::Stopped, Some(FullDigest::default()))),
            None
        );
    }
}
