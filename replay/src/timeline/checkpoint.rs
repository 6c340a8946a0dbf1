//! Checkpoints, and what they are kept in.

use hindsight_devices::Nanos;

use super::table::{PageName, PageTable};
use crate::machine::{CoreState, PAGE_BYTES};

/// Where a checkpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointHead {
    /// The exit at which it was taken.
    pub exits: u64,
    /// Guest time there.
    pub now: Nanos,
}

/// A store of checkpoints of one recording, whose vCPUs have states `C` and whose disks `S`. Whatever it cannot give back is
/// only slower to come by.
pub trait Checkpoints<C, S> {
    /// Why it cannot keep something, or give it back.
    type Error: std::error::Error;

    /// Where those are that it has, by ascending exit.
    fn heads(&self) -> &[CheckpointHead];

    /// The state at one of them but for its pages, and what those are called.
    fn load(&mut self, number: usize) -> Result<(CoreState<C, S>, PageTable), Self::Error>;

    /// What a page of that name holds.
    fn read_page(&mut self, name: PageName, into: &mut [u8; PAGE_BYTES])
    -> Result<(), Self::Error>;

    /// Keeps what a page holds that is not all zeroes, for the checkpoint that is appended next.
    fn put_page(&mut self, bytes: &[u8; PAGE_BYTES]) -> Result<PageName, Self::Error>;

    /// Keeps a checkpoint, which is after all others. What the pages are called is from [`Checkpoints::put_page`], or from
    /// [`Checkpoints::load`]. After an error it takes no more of them.
    fn append(
        &mut self,
        head: CheckpointHead,
        core: &CoreState<C, S>,
        pages: &PageTable,
    ) -> Result<(), Self::Error>;

    /// Whether it takes any.
    fn is_open(&self) -> bool;
}
