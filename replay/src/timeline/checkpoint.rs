//! Checkpoints, and what they are kept in.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use hindsight_devices::Nanos;

use super::notes::Notes;
use crate::machine::{CoreState, Machine, PAGE_BYTES, PagePlace};

/// Where a checkpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointHead {
    /// The exit at which it was taken.
    pub exits: u64,
    /// Guest time there.
    pub now: Nanos,
    /// What it took to come there from the one before, by whoever set the pace; 0 if that is not known.
    pub cost: u32,
}

impl CheckpointHead {
    /// Of a checkpoint of the machine as it is; nothing is known of its cost.
    pub fn of(machine: &Machine) -> CheckpointHead {
        CheckpointHead {
            exits: machine.at().exits,
            now: machine.now(),
            cost: 0,
        }
    }
}

/// Pages of a machine as they are, one after the other: reads the next one, and says where it is. An error ends them.
pub type PageSource<'a, E> = dyn FnMut(&mut [u8; PAGE_BYTES]) -> Option<Result<PagePlace, E>> + 'a;

/// Takes pages, for as long as it wants them. `None`: the page holds what it holds at power-on.
pub type PageSink<'a> = dyn FnMut(PagePlace, Option<&[u8; PAGE_BYTES]>) -> ControlFlow<()> + 'a;

/// A store of checkpoints of one recording, whose vCPUs have states `C` and whose disks `S`. What a page is called in it is
/// its own affair. Whatever it cannot give back is only slower to come by.
pub trait Checkpoints<C, S> {
    /// Why it cannot keep something, or give it back.
    type Error: std::error::Error;

    /// Where those are that it has, by ascending exit.
    fn heads(&self) -> &[CheckpointHead];

    /// Whether it takes more of them.
    fn is_open(&self) -> bool;

    /// What happened after the checkpoint before, or power-on, and up to one of them; `None` if it does not know.
    fn notes(&mut self, number: usize) -> Option<Notes>;

    /// Keeps a checkpoint, which is after all others: its number. `changed` are the pages that may not be what they were
    /// at checkpoint `base`; without one, those that may not be what they were at power-on. It may go on keeping when this
    /// returns. `notes` are of what happened since the one before, where that is known.
    ///
    /// The first error is of the pages, the other its own. After that one it takes no more.
    fn append<E>(
        &mut self,
        head: CheckpointHead,
        core: &CoreState<C, S>,
        base: Option<usize>,
        changed: &mut PageSource<'_, E>,
        notes: Option<&Notes>,
    ) -> Result<Result<usize, Self::Error>, E>;

    /// Waits until all of them are kept. After an error those that are not have gone.
    fn settle(&mut self) -> Result<(), Self::Error>;

    /// All of one of them will be wanted soon.
    fn expect(&mut self, _number: usize) {}

    /// The state at one of them but for its pages.
    fn load(&mut self, number: usize) -> Result<CoreState<C, S>, Self::Error>;

    /// Gives what pages hold at one of them, for as long as that is wanted: those that do not hold that at checkpoint
    /// `base`, or without one at power-on; and those at `also`. In an order that suits it, each once.
    fn pages(
        &mut self,
        number: usize,
        base: Option<usize>,
        also: &BTreeSet<PagePlace>,
        put: &mut PageSink<'_>,
    ) -> Result<(), Self::Error>;
}
