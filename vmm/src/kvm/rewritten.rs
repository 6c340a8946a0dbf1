//! Notices while the guest runs that a trap is gone (see [`hindsight_kernel::rewrite::rewritten`]): the guest
//! may then see what is recorded nowhere, and this is reported to whoever records it.
//!
//! It is looked for where a counted exit makes it likely, where modules are loaded and where a kernel says where system
//! calls enter it; else once in a fixed number of counted exits, and at the end. All of it is decided by what the guest
//! did at counted exits and by its memory there, so a replay finds the same at the same exits.

use std::collections::BTreeSet;

use hindsight_replay::LeftOpen;
use serde::{Deserialize, Serialize};

use super::cpu::KvmCpu;
use hindsight_kernel::rewrite::rewritten::Changes;

/// Counted exits from one look to the next. A look reads some hundred instructions.
const EVERY: u64 = 1 << 14;

/// What was noticed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Noticed {
    exits: u64,
    /// Look at this exit.
    is_due: bool,
    told: BTreeSet<LeftOpen>,
    untold: Vec<LeftOpen>,
}

impl Noticed {
    /// Something is left open from here on. What was reported once is not reported again.
    pub(super) fn add(&mut self, what: LeftOpen) {
        if self.told.insert(what) {
            self.untold.push(what);
        }
    }

    /// The text is to be looked at as soon as this exit is answered.
    pub(super) fn look_soon(&mut self) {
        self.is_due = true;
    }

    fn add_changes(&mut self, changes: Changes) {
        let Changes {
            replaced,
            module_call,
            module_loader,
            traps,
        } = changes;
        for (found, what) in [
            (replaced, LeftOpen::OtherKernel),
            (module_call, LeftOpen::ModuleCall),
            (module_loader, LeftOpen::ModuleLoader),
            (traps, LeftOpen::Traps),
        ] {
            if found {
                self.add(what);
            }
        }
    }
}

impl KvmCpu {
    /// A kernel says that system calls enter it at `entry`: is it the one that was loaded, and where it was loaded?
    pub(super) fn check_entry(&mut self, entry: u64) {
        let text = &self.vm.text.rewritten;
        if entry == 0 || text.is_empty() {
            return;
        }
        let loaded = text.physical(entry);
        let found = self.view().ok().and_then(|view| view.translate(entry));
        if loaded.is_none() || found != loaded {
            self.vm.noticed.add(LeftOpen::OtherKernel);
        }
        self.vm.noticed.look_soon();
    }

    /// What was noticed since the last call; one call is made at each counted exit, and one at the end.
    pub(super) fn take_noticed(&mut self, at_end: bool) -> Vec<LeftOpen> {
        let noticed = &mut self.vm.noticed;
        noticed.exits += u64::from(!at_end);
        let is_due = std::mem::take(&mut noticed.is_due);
        // Of another kernel's text there is nothing more to say.
        let other = noticed.told.contains(&LeftOpen::OtherKernel);
        if (is_due || at_end || noticed.exits.is_multiple_of(EVERY)) && !other {
            let memory = &self.vm.memory;
            let changes = self
                .vm
                .text
                .rewritten
                .changes(&|gpa, buffer| memory.read(gpa, buffer));
            self.vm.noticed.add_changes(changes);
        }
        std::mem::take(&mut self.vm.noticed.untold)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_open_is_told_once() {
        let mut noticed = Noticed::default();
        let changes = Changes {
            module_call: true,
            traps: true,
            ..Changes::default()
        };
        noticed.add_changes(changes);
        let told = std::mem::take(&mut noticed.untold);
        assert_eq!(told, [LeftOpen::ModuleCall, LeftOpen::Traps]);
        noticed.add_changes(changes);
        noticed.add(LeftOpen::Copied);
        assert_eq!(noticed.untold, [LeftOpen::Copied]);
    }
}
