//! The machine of a timeline: what of its pages has changed, and putting it elsewhere.

use std::collections::BTreeSet;
use std::io::Read;
use std::ops::ControlFlow;
use std::sync::Arc;

use hindsight_devices::{Storage, StorageError};
use thiserror::Error;

use super::changes::{Changes, read_page};
use super::checkpoint::{CheckpointHead, Checkpoints, PageSink};
use super::near::{HeldPages, NearState, NearStates};
use super::notes::Notes;
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
    #[error("it is at another exit or time than it says")]
    Elsewhere,
}

/// A machine, with what is lent to it.
pub(super) struct Parts<C, S> {
    pub(super) machine: Machine,
    pub(super) cpu: C,
    pub(super) disks: S,
    /// What its pages hold at power-on.
    power_on: Pages,
    pub(super) changes: Changes,
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
            changes: Changes::default(),
            in_step: true,
        };
        (parts.power_on)
            .take(&mut parts.cpu, PagePlace::in_memory)
            .map_err(StateError::Cpu)?;
        parts.changes = Changes::from_power_on(&mut parts.cpu, &mut parts.disks)?;
        Ok(parts)
    }

    /// Notes which pages have changed since they were noted last.
    pub(super) fn note_changes(&mut self) -> Result<(), StateError<<C as Cpu>::Error>> {
        self.changes.note(&mut self.cpu, &mut self.disks)
    }

    /// No checkpoint is known that its pages were equal to.
    pub(super) fn forget_base(&mut self) -> Result<(), StateError<<C as Cpu>::Error>> {
        self.changes.forget_base(&mut self.cpu, &mut self.disks)
    }

    /// Makes a checkpoint in `store`.
    pub(super) fn save<K: Checkpoints<C::State, S::State>, R: Read>(
        &mut self,
        store: &mut K,
        door: &Replayer<R>,
        head: CheckpointHead,
        notes: Option<&Notes>,
    ) -> Result<Result<(), K::Error>, StateError<<C as Cpu>::Error>> {
        let machine = (&self.machine, &mut self.cpu, &mut self.disks);
        self.changes.keep(machine, door, store, head, notes)
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
        read_page(&mut self.cpu, &mut self.disks, place, into)
    }

    /// The state here, to be kept in memory; and how many of its pages are in no other.
    pub(super) fn keep<R: Read>(&mut self, door: &Replayer<R>) -> KeptState<C, S> {
        let (cpu, disks) = (&mut self.cpu, &mut self.disks);
        let core = self.machine.save_core(cpu, disks, door)?;
        self.note_changes()?;
        if !NearStates::<C::State, S::State>::is_possible(self.changes.pages.len()) {
            return Ok(None);
        }
        let before = self.changes.held.len();
        for place in self.changes.pages.clone() {
            if !self.changes.held.contains_key(&place) {
                let mut bytes = Arc::new([0; PAGE_BYTES]);
                self.read_page(place, Arc::make_mut(&mut bytes))?;
                self.changes.held.insert(place, bytes);
            }
        }
        let state = NearState {
            head: self.here(),
            core,
            base: self.changes.base,
            pages: self.changes.held.clone(),
        };
        Ok(Some((state, self.changes.held.len() - before)))
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
        let (from, power_on) = (self.changes.base, &self.power_on);
        let Changes {
            pages: changed,
            held,
            ..
        } = &mut self.changes;
        let also = changed.iter().filter(|place| !own.contains_key(place));
        let also: BTreeSet<PagePlace> = also.copied().collect();
        let held = |place| held.get(place).map(Arc::as_ptr);
        let put = |cpu: &mut C, disks: &mut S| {
            let (mut written, mut failed) = (Vec::new(), None);
            let mut put = |place: PagePlace, bytes: &[u8; PAGE_BYTES]| {
                if from.is_none() && !changed.contains(&place) && bytes == power_on.get(place) {
                    // Nobody has touched it: it stays so.
                    return ControlFlow::Continue(());
                }
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
            self.changes.held.clear();
        }
        restored?;
        self.changes = Changes {
            base,
            pages: own.keys().copied().collect(),
            held: own.clone(),
        };
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
        if (core.progress.at().exits, core.board.now()) != (head.exits, head.now) {
            return Err(Unusable::Elsewhere);
        }
        self.restore(store, &core, Some(number), &HeldPages::new())
    }

    /// Where it is.
    pub(super) fn here(&self) -> CheckpointHead {
        CheckpointHead::of(&self.machine)
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
