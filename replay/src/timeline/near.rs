//! States kept in memory near to where somebody goes back and forth, and gone with the program.
//!
//! A checkpoint may be a second of replaying away. Going back by single instructions wants a state close by, which
//! costs what has changed since the one before: pages are shared among them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::checkpoint::CheckpointHead;
use crate::machine::{CoreState, PAGE_BYTES, PagePlace};

/// What some pages hold.
pub(super) type HeldPages = BTreeMap<PagePlace, Arc<[u8; PAGE_BYTES]>>;

/// So many states are kept.
const STATES_MAX: usize = 32;
/// So many pages are kept for all of them together: 256 MiB.
const PAGES_MAX: usize = (256 << 20) / PAGE_BYTES;

/// A state in memory.
pub(super) struct NearState<C, S> {
    pub(super) head: CheckpointHead,
    pub(super) core: CoreState<C, S>,
    /// The checkpoint that it rests on; without one it rests on power-on.
    pub(super) base: Option<usize>,
    /// What those pages hold that may not hold what they do at `base`.
    pub(super) pages: HeldPages,
}

/// States in memory, the one used last at the end.
pub(super) struct NearStates<C, S> {
    states: Vec<NearState<C, S>>,
    /// How many pages they hold together.
    pages: usize,
}

impl<C, S> Default for NearStates<C, S> {
    fn default() -> Self {
        NearStates {
            states: Vec::new(),
            pages: 0,
        }
    }
}

impl<C, S> NearStates<C, S> {
    /// Whether a state may have this many pages.
    pub(super) fn is_possible(pages: usize) -> bool {
        pages <= PAGES_MAX
    }

    pub(super) fn heads(&self) -> impl Iterator<Item = CheckpointHead> {
        self.states.iter().map(|state| state.head)
    }

    /// Keeps one, of whose pages `new` are in no other, and gives up those that were not used for the longest time.
    pub(super) fn keep(&mut self, state: NearState<C, S>, new: usize) {
        self.states.push(state);
        self.pages += new;
        while self.states.len() > STATES_MAX || self.pages > PAGES_MAX {
            self.give_up(0);
        }
    }

    fn give_up(&mut self, index: usize) {
        let state = self.states.remove(index);
        let last = |page: &&Arc<_>| Arc::strong_count(page) == 1;
        self.pages -= state.pages.values().filter(last).count();
    }

    /// The last one for which `is_wanted` holds. It is used now.
    pub(super) fn last(
        &mut self,
        is_wanted: impl Fn(&CheckpointHead) -> bool,
    ) -> Option<&NearState<C, S>> {
        let numbered = self.states.iter().enumerate();
        let wanted = numbered.filter(|(_, state)| is_wanted(&state.head));
        let (index, _) = wanted.max_by_key(|(_, state)| state.head.exits)?;
        let state = self.states.remove(index);
        self.states.push(state);
        self.states.last()
    }

    /// The one used last was of no use.
    pub(super) fn give_up_last(&mut self) {
        self.give_up(self.states.len() - 1);
    }

    pub(super) fn clear(&mut self) {
        *self = NearStates::default();
    }
}
