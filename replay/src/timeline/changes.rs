//! Which pages of a machine are not what they were at a checkpoint: what the next one is made of.

use std::collections::BTreeSet;

use hindsight_devices::{Storage, StorageError};

use super::checkpoint::{CheckpointHead, Checkpoints};
use super::near::HeldPages;
use super::notes::Notes;
use crate::machine::{Cpu, Machine, Outside, PAGE_BYTES, PagePlace, StateError, Stateful};

/// The pages of a machine that may not be what they were at a checkpoint.
#[derive(Debug, Default)]
pub struct Changes {
    /// The checkpoint that its pages were last all equal to; without one they were what they are at power-on.
    pub(super) base: Option<usize>,
    /// Those that may have changed since.
    pub(super) pages: BTreeSet<PagePlace>,
    /// What some of these hold.
    pub(super) held: HeldPages,
}

impl Changes {
    /// Those of a machine at power-on: none. From here on it is noted what is written.
    pub fn from_power_on<C, S>(
        cpu: &mut C,
        disks: &mut S,
    ) -> Result<Changes, StateError<<C as Cpu>::Error>>
    where
        C: Cpu + Stateful<Error = <C as Cpu>::Error>,
        S: Storage + Stateful<Error = StorageError>,
    {
        Changes::default().note(cpu, disks)?;
        Ok(Changes::default())
    }

    /// Notes which pages have changed since they were noted last.
    pub(super) fn note<C, S>(
        &mut self,
        cpu: &mut C,
        disks: &mut S,
    ) -> Result<(), StateError<<C as Cpu>::Error>>
    where
        C: Cpu + Stateful<Error = <C as Cpu>::Error>,
        S: Storage + Stateful<Error = StorageError>,
    {
        let memory = cpu.take_changed_pages().map_err(StateError::Cpu)?;
        let disks = disks.take_changed_pages().map_err(StateError::Storage)?;
        self.add(memory, disks);
        Ok(())
    }

    /// No checkpoint is known that its pages were equal to: each that may hold anything but zeroes may have changed.
    pub(super) fn forget_base<C, S>(
        &mut self,
        cpu: &mut C,
        disks: &mut S,
    ) -> Result<(), StateError<<C as Cpu>::Error>>
    where
        C: Cpu + Stateful<Error = <C as Cpu>::Error>,
        S: Storage + Stateful<Error = StorageError>,
    {
        self.base = None;
        let memory = cpu.pages().map_err(StateError::Cpu)?;
        let disks = disks.pages().map_err(StateError::Storage)?;
        self.add(memory, disks);
        Ok(())
    }

    fn add(&mut self, memory: Vec<u64>, disks: Vec<u64>) {
        let memory = memory.into_iter().map(PagePlace::in_memory);
        let disks = disks.into_iter().map(PagePlace::on_disks);
        for place in memory.chain(disks) {
            self.held.remove(&place);
            self.pages.insert(place);
        }
    }

    /// Keeps a checkpoint of the machine in `store`: its state, as it is at this door, with the pages that have
    /// changed since the one before. `notes` are of what happened since, where that is known.
    pub fn keep<C, S, O, K>(
        &mut self,
        (machine, cpu, disks): (&Machine, &mut C, &mut S),
        door: &O,
        store: &mut K,
        head: CheckpointHead,
        notes: Option<&Notes>,
    ) -> Result<Result<(), K::Error>, StateError<<C as Cpu>::Error>>
    where
        C: Cpu + Stateful<Error = <C as Cpu>::Error>,
        S: Storage + Stateful<Error = StorageError>,
        O: Outside + ?Sized,
        K: Checkpoints<C::State, S::State>,
    {
        let core = machine.save_core(cpu, disks, door)?;
        self.note(cpu, disks)?;
        let pages = std::mem::take(&mut self.pages);
        let mut places = pages.iter();
        let mut changed = |into: &mut [u8; PAGE_BYTES]| {
            let place = *places.next()?;
            Some(read_page(cpu, disks, place, into).map(|()| place))
        };
        let appended = store.append(head, &core, self.base, &mut changed, notes);
        match &appended {
            Ok(Ok(number)) => {
                self.base = Some(*number);
                self.held.clear();
            }
            _ => self.pages = pages,
        }
        Ok(appended?.map(drop))
    }
}

/// Reads a page of a machine.
pub(super) fn read_page<C, S>(
    cpu: &mut C,
    disks: &mut S,
    place: PagePlace,
    into: &mut [u8; PAGE_BYTES],
) -> Result<(), StateError<<C as Cpu>::Error>>
where
    C: Cpu + Stateful<Error = <C as Cpu>::Error>,
    S: Storage + Stateful<Error = StorageError>,
{
    match place.number() {
        Ok(number) => cpu.read_page(number, into).map_err(StateError::Cpu),
        Err(number) => disks.read_page(number, into).map_err(StateError::Storage),
    }
}
