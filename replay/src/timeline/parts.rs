//! The machine of a timeline: what of its pages has changed, and putting it elsewhere.

use std::collections::BTreeSet;
use std::io::Read;
use std::ops::ControlFlow;
use std::sync::Arc;

use hindsight_devices::{Storage, StorageError};
use thiserror::Error;

use super::checkpoint::{CheckpointHead, Checkpoints, PageSink};
use super::near::{HeldPages, NearState, NearStates};
use crate::door::Replayer;
use crate::journal::JournalError;
use crate::machine::{
    CoreOf, Cpu, JournalPlace, Machine, PAGE_BYTES, PagePlace, Pages, StateError, Stateful,
};

/// Why a checkpoint does not serve.
#[derive(Debug, Error)]
pub(super) enum Unusable<E: std::error::Error, K: std::error::Error> {
    #[error("{0}")]
    Store(K),
    #[error("{0}")]
    State(#[from] StateError<E>),
    #[error("{0}")]
    Journal(JournalError),
    #[error("it says nothing of where it is in the recording")]
    NoPlace,
    #[error("it is at another exit than it says")]
    Elsewhere,
}

/// A machine, with what is lent to it.
pub(super) struct Parts<C, S> {
    pub(super) machine: Machine,
    pub(super) cpu: C,
    pub(super) disks: S,
    /// What its pages hold at power-on.
    power_on: Pages,
    /// The checkpoint that its pages were last all equal to; without one they were what they are at power-on.
    pub(super) base: Option<usize>,
    /// Those that may have changed since.
    pub(super) changed: BTreeSet<PagePlace>,
    /// What some of these hold.
    held: HeldPages,
    /// Whether the door is where it is. Else it can only be put somewhere.
    pub(super) in_step: bool,
}

impl<C, S> Parts<C, S>
where
    C: Cpu + Stateful<Error = <C as Cpu>::Error>,
    S: Storage + Stateful<Error = StorageError>,
{
    /// A machine that is at power-on.
    pub(super) fn new(
        machine: Machine,
        cpu: C,
        disks: S,
    ) -> Result<Parts<C, S>, StateError<<C as Cpu>::Error>> {
        let mut parts = Parts {
            machine,
            cpu,
            disks,
            power_on: Pages::default(),
            base: None,
            changed: BTreeSet::new(),
            held: HeldPages::new(),
            in_step: true,
        };
        (parts.power_on)
            .take(&mut parts.cpu, PagePlace::in_memory)
            .map_err(StateError::Cpu)?;
        // From here on.
        parts.note_changes()?;
        parts.changed.clear();
        Ok(parts)
    }

    /// Notes which pages have changed since they were noted last.
    pub(super) fn note_changes(&mut self) -> Result<(), StateError<<C as Cpu>::Error>> {
        let memory = self.cpu.take_changed_pages().map_err(StateError::Cpu)?;
        let disks = (self.disks.take_changed_pages()).map_err(StateError::Storage)?;
        self.may_have_changed(memory, disks);
        Ok(())
    }

    /// No checkpoint is known that its pages were equal to: each that may hold anything but zeroes may have changed.
    pub(super) fn forget_base(&mut self) -> Result<(), StateError<<C as Cpu>::Error>> {
        self.base = None;
        let memory = self.cpu.pages().map_err(StateError::Cpu)?;
        let disks = self.disks.pages().map_err(StateError::Storage)?;
        self.may_have_changed(memory, disks);
        Ok(())
    }

    fn may_have_changed(&mut self, memory: Vec<u64>, disks: Vec<u64>) {
        let memory = memory.into_iter().map(PagePlace::in_memory);
        let disks = disks.into_iter().map(PagePlace::on_disks);
        for place in memory.chain(disks) {
            self.held.remove(&place);
            self.changed.insert(place);
        }
    }

    /// Makes a checkpoint in `store`.
    pub(super) fn save<K: Checkpoints<C::State, S::State>, R: Read>(
        &mut self,
        store: &mut K,
        door: &Replayer<R>,
    ) -> Result<Result<(), K::Error>, StateError<<C as Cpu>::Error>> {
        let (cpu, disks) = (&mut self.cpu, &mut self.disks);
        let core = self.machine.save_core(cpu, disks, door)?;
        self.note_changes()?;
        let head = self.here();
        let (base, changed) = (self.base, std::mem::take(&mut self.changed));
        let mut pages = changed.iter().map(|place| {
            let mut bytes = [0; PAGE_BYTES];
            self.read_page(*place, &mut bytes).map(|()| (*place, bytes))
        });
        let appended = store.append(head, &core, base, &mut pages);
        match &appended {
            Ok(Ok(number)) => {
                self.base = Some(*number);
                self.held.clear();
            }
            _ => self.changed = changed,
        }
        Ok(appended?.map(drop))
    }

    /// What a page holds at power-on.
    pub(super) fn at_power_on(&self, place: PagePlace) -> &[u8; PAGE_BYTES] {
        self.power_on.get(place)
    }

    pub(super) fn read_page(
        &mut self,
        place: PagePlace,
        into: &mut [u8; PAGE_BYTES],
    ) -> Result<(), StateError<<C as Cpu>::Error>> {
        match place.number() {
            Ok(number) => self.cpu.read_page(number, into).map_err(StateError::Cpu),
            Err(number) => (self.disks.read_page(number, into)).map_err(StateError::Storage),
        }
    }

    /// The state here, to be kept in memory; and how many of its pages are in no other.
    pub(super) fn keep<R: Read>(&mut self, door: &Replayer<R>) -> KeptState<C, S> {
        let (cpu, disks) = (&mut self.cpu, &mut self.disks);
        let core = self.machine.save_core(cpu, disks, door)?;
        self.note_changes()?;
        if !NearStates::<C::State, S::State>::is_possible(self.changed.len()) {
            return Ok(None);
        }
        let before = self.held.len();
        for place in self.changed.clone() {
            if !self.held.contains_key(&place) {
                let mut bytes = Arc::new([0; PAGE_BYTES]);
                self.read_page(place, Arc::make_mut(&mut bytes))?;
                self.held.insert(place, bytes);
            }
        }
        let state = NearState {
            head: self.here(),
            core,
            base: self.base,
            pages: self.held.clone(),
        };
        Ok(Some((state, self.held.len() - before)))
    }

    /// Makes the machine what it was at checkpoint `base` of `store`, or without one at power-on, but for `own` pages; and
    /// all else what `core` says.
    pub(super) fn restore<K: Checkpoints<C::State, S::State>>(
        &mut self,
        store: &mut K,
        core: &CoreOf<C, S>,
        base: Option<usize>,
        own: &HeldPages,
    ) -> Result<JournalPlace, Unusable<<C as Cpu>::Error, K::Error>> {
        let place = core.journal.clone().ok_or(Unusable::NoPlace)?;
        self.note_changes()?;
        let (from, changed, power_on) = (self.base, &mut self.changed, &self.power_on);
        let also = changed.iter().filter(|place| !own.contains_key(place));
        let also: BTreeSet<PagePlace> = also.copied().collect();
        let held = |place| self.held.get(place).map(Arc::as_ptr);
        let put = |cpu: &mut C, disks: &mut S| {
            let (mut written, mut failed) = (Vec::new(), None);
            let mut put = |place: PagePlace, bytes: &[u8; PAGE_BYTES]| {
                written.push(place);
                write_page(cpu, disks, place, bytes).map_or_else(
                    |error| {
                        failed = Some(error);
                        ControlFlow::Break(())
                    },
                    ControlFlow::Continue,
                )
            };
            let mut given = Ok(());
            if from != base || !also.is_empty() {
                given = give(store, base, from, &also, &mut |place, bytes| match own
                    .contains_key(&place)
                {
                    true => ControlFlow::Continue(()),
                    false => put(place, bytes.unwrap_or_else(|| power_on.get(place))),
                });
            }
            let others = own.iter().filter(|(place, bytes)| {
                // What it holds already it need not be given.
                held(place) != Some(Arc::as_ptr(bytes))
            });
            for (place, bytes) in others {
                if given.is_err() || put(*place, bytes).is_break() {
                    break;
                }
            }
            let done = match failed {
                Some(error) => Err(Unusable::State(error)),
                None => given.map_err(Unusable::Store),
            };
            if let Err(error) = done {
                // Neither what they were nor what they were to be.
                changed.extend(written);
                return Err(error);
            }
            // These were our own, and what they hold is known.
            cpu.take_changed_pages().map_err(StateError::Cpu)?;
            disks.take_changed_pages().map_err(StateError::Storage)?;
            Ok(())
        };
        self.in_step = false;
        let (cpu, disks) = (&mut self.cpu, &mut self.disks);
        let restored = self.machine.restore_core(core, cpu, disks, put);
        if restored.is_err() {
            self.held.clear();
        }
        restored?;
        self.base = base;
        self.changed = own.keys().copied().collect();
        self.held = own.clone();
        Ok(place)
    }

    /// Makes the machine what it was at a checkpoint of `store`.
    pub(super) fn restore_checkpoint<K: Checkpoints<C::State, S::State>>(
        &mut self,
        store: &mut K,
        number: usize,
    ) -> Result<JournalPlace, Unusable<<C as Cpu>::Error, K::Error>> {
        let head = store.heads()[number];
        let core = store.load(number).map_err(Unusable::Store)?;
        if core.progress.at().exits != head.exits {
            return Err(Unusable::Elsewhere);
        }
        self.restore(store, &core, Some(number), &HeldPages::new())
    }

    /// Where it is.
    pub(super) fn here(&self) -> CheckpointHead {
        CheckpointHead {
            exits: self.machine.at().exits,
            now: self.machine.now(),
        }
    }
}

/// A state to be kept in memory, if there is room for it, and how many of its pages are in no other.
type KeptState<C, S> = Result<
    Option<(
        NearState<<C as Stateful>::State, <S as Stateful>::State>,
        usize,
    )>,
    StateError<<C as Cpu>::Error>,
>;

/// Writes a page of a machine.
fn write_page<C, S>(
    cpu: &mut C,
    disks: &mut S,
    place: PagePlace,
    bytes: &[u8; PAGE_BYTES],
) -> Result<(), StateError<<C as Cpu>::Error>>
where
    C: Cpu + Stateful<Error = <C as Cpu>::Error>,
    S: Stateful<Error = StorageError>,
{
    match place.number() {
        Ok(number) if cpu.has_page(number) => {
            cpu.write_page(number, bytes).map_err(StateError::Cpu)
        }
        Err(number) if disks.has_page(number) => {
            (disks.write_page(number, bytes)).map_err(StateError::Storage)
        }
        _ => Err(StateError::Damaged(format!(
            "it has a page where there is none: {place:?}"
        ))),
    }
}

/// [`Checkpoints::pages`], where what is wanted may be those at power-on.
fn give<C, S, K: Checkpoints<C, S>>(
    store: &mut K,
    to: Option<usize>,
    from: Option<usize>,
    also: &BTreeSet<PagePlace>,
    put: &mut PageSink<'_>,
) -> Result<(), K::Error> {
    if let Some(to) = to {
        return store.pages(to, from, also, put);
    }
    let mut all = also.clone();
    if let Some(from) = from {
        store.pages(from, None, &BTreeSet::new(), &mut |place, _| {
            all.insert(place);
            ControlFlow::Continue(())
        })?;
    }
    let _ = all.iter().try_for_each(|place| put(*place, None));
    Ok(())
}
