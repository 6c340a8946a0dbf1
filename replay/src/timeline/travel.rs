//! Moves a machine about in its recording.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io::{Read, Seek};

use hindsight_devices::{Nanos, Storage, StorageError};
use thiserror::Error;

use super::checkpoint::{CheckpointHead, Checkpoints};
use super::near::NearStates;
use super::notes::{NoteTaker, Notes};
use super::parts::{Parts, Unusable};
use crate::RunError;
use crate::door::{Closed, Nobody, Replayer};
use crate::journal::{JournalError, JournalReader, Tail};
use crate::machine::{
    Cpu, DigestError, End, FullDigest, Machine, Observer, StateError, StateOf, Stateful,
};

/// Where to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Where all that belongs to this exit is done; 0 is power-on.
    Exit(u64),
    /// The first exit at this guest time or later.
    Time(Nanos),
    /// The end of the recording.
    End,
}

/// Where the machine has come to.
#[derive(Debug)]
pub enum Arrival {
    /// Where it was to go.
    Reached,
    /// The end of the recording, which is equal so far.
    Ended(End),
    /// The end of a recording that ends before its guest does.
    CutShort(Tail),
    /// An exit on the way, at which it was to stop.
    Stopped,
    /// Where its vCPU was to stop, between two exits.
    AtStop,
}

/// What is to be done at an exit on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// Nothing.
    GoOn,
    /// Make a checkpoint, if the store has none so late. Its [`CheckpointHead::cost`] is this.
    Checkpoint {
        /// What it took to come here.
        cost: u32,
    },
    /// Keep the state in memory, for whoever comes back soon.
    Keep,
    /// Stop there.
    Stop,
}

/// Says how the way is divided.
pub trait Pace {
    /// How many exits there are to the next look, at least 1.
    fn exits(&self) -> u64;
    /// Looks at where the machine is.
    fn look(&mut self, here: CheckpointHead) -> Pause;
    /// A checkpoint was made there.
    fn made(&mut self, _here: CheckpointHead) {}
    /// A way begins at the exit `from`, which leads to the exit `to`, or to the end.
    fn begin(&mut self, _from: u64, _to: Option<u64>) {}
}

/// Why a machine is not where it was to go.
#[derive(Debug, Error)]
pub enum TravelError<E: std::error::Error, F> {
    /// No machine can be made.
    #[error("no machine could be made")]
    Make(F),
    /// It cannot be run, or diverged.
    #[error(transparent)]
    Run(RunError<E>),
    /// It cannot be looked at.
    #[error(transparent)]
    State(#[from] StateError<E>),
    /// The journal cannot be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// A machine that can be brought to any moment of its recording. `M` makes one, at power-on.
pub struct Timeline<C: Stateful, S: Stateful, R: Read, K, M> {
    make: M,
    parts: Option<Parts<C, S>>,
    door: Replayer<R>,
    store: K,
    /// What has happened since it was put somewhere, or made a checkpoint.
    notes: NoteTaker,
    /// States in memory, for whoever comes back soon.
    near: NearStates<C::State, S::State>,
    /// Checkpoints that did not serve.
    unusable: BTreeSet<usize>,
    complaints: Vec<String>,
}

impl<C: Stateful, S: Stateful, R: Read, K: std::fmt::Debug, M> std::fmt::Debug
    for Timeline<C, S, R, K, M>
{
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = self.parts.as_ref().map(|parts| parts.machine.at());
        f.debug_struct("Timeline")
            .field("at", &at)
            .field("store", &self.store)
            .finish_non_exhaustive()
    }
}

impl<C, S, R, K, M, F> Timeline<C, S, R, K, M>
where
    C: Cpu + Stateful<Error = <C as Cpu>::Error>,
    S: Storage + Stateful<Error = StorageError>,
    R: Read + Seek,
    K: Checkpoints<C::State, S::State>,
    M: FnMut() -> Result<(Machine, C, S), F>,
{
    /// The recording of `journal`, whose checkpoints are in `store`; nothing is made yet.
    pub fn new(journal: JournalReader<R>, store: K, make: M) -> Timeline<C, S, R, K, M> {
        Timeline {
            make,
            parts: None,
            door: Replayer::new(journal, None, None),
            store,
            notes: NoteTaker::default(),
            near: NearStates::default(),
            unusable: BTreeSet::new(),
            complaints: Vec::new(),
        }
    }

    /// The machine, its vCPU and its disks, where they have come to; `None` before the first travel.
    pub fn parts(&mut self) -> Option<(&mut Machine, &mut C, &mut S)> {
        let parts = self.parts.as_mut()?;
        Some((&mut parts.machine, &mut parts.cpu, &mut parts.disks))
    }

    /// The machine and its vCPU, to look at; `None` before the first travel.
    pub fn machine(&self) -> Option<(&Machine, &C)> {
        self.parts
            .as_ref()
            .map(|parts| (&parts.machine, &parts.cpu))
    }

    /// The machine's disks, to look at.
    pub fn disks(&self) -> Option<&S> {
        self.parts.as_ref().map(|parts| &parts.disks)
    }

    /// Whether it is at an exit, nothing of the guest has run since, and it can go on from there.
    pub fn is_at_exit(&self) -> bool {
        let parts = self.parts.as_ref();
        parts.is_some_and(|parts| parts.in_step && parts.machine.is_at_exit())
    }

    /// The whole state where the machine is.
    pub fn save(&mut self) -> Result<StateOf<C, S>, StateError<<C as Cpu>::Error>> {
        let parts = self.parts.as_mut().ok_or(StateError::NotAtAnExit)?;
        let (cpu, disks) = (&mut parts.cpu, &mut parts.disks);
        parts.machine.save(cpu, disks, &self.door)
    }

    /// The digest of all that decides what happens next, where the machine is.
    pub fn digest(&mut self) -> Result<FullDigest, StateError<<C as Cpu>::Error>> {
        let parts = self.parts.as_mut().ok_or(StateError::NotAtAnExit)?;
        let digest = (parts.machine).full_digest(&mut parts.cpu, &mut parts.disks);
        digest.map_err(|error| match error {
            DigestError::Cpu(error) => StateError::Cpu(error),
            DigestError::Storage(error) => StateError::Storage(error),
        })
    }

    /// What happened before a checkpoint and after the one before it, if its store knows.
    pub fn notes(&mut self, number: usize) -> Option<Notes> {
        self.store.notes(number)
    }

    /// Where the checkpoints are kept.
    pub fn store(&mut self) -> &mut K {
        &mut self.store
    }

    /// The machine with its vCPU, its disks and the door, for whoever goes on with them; `None` where nothing goes on:
    /// before the first travel, between two exits, and at the end.
    pub fn into_parts(self) -> Option<(Machine, C, S, Replayer<R>)> {
        let parts = (self.parts).filter(|parts| parts.in_step && parts.machine.is_at_exit())?;
        Some((parts.machine, parts.cpu, parts.disks, self.door))
    }

    /// Where the checkpoints are kept, when there is no more to travel.
    pub fn into_store(self) -> K {
        self.store
    }

    /// Takes another store, of checkpoints of the same recording.
    pub fn replace_store(&mut self, store: K) -> Result<K, StateError<<C as Cpu>::Error>> {
        self.unusable.clear();
        self.near.clear();
        if let Some(parts) = &mut self.parts {
            parts.forget_base()?;
        }
        Ok(std::mem::replace(&mut self.store, store))
    }

    /// What was wrong with checkpoints since this was asked last: it has cost time.
    pub fn take_complaints(&mut self) -> Vec<String> {
        std::mem::take(&mut self.complaints)
    }

    /// Brings the machine to `target`.
    pub fn go_to(
        &mut self,
        target: Target,
        pace: &mut dyn Pace,
    ) -> Result<Arrival, TravelError<<C as Cpu>::Error, F>> {
        self.come_near(target)?;
        self.run_to(target, pace, &mut ())
    }

    /// Brings it to the last place before `target` that can be had at once: a checkpoint, where it is, or power-on.
    pub fn come_near(&mut self, target: Target) -> Result<(), TravelError<<C as Cpu>::Error, F>> {
        let is_before = |head: &CheckpointHead| match target {
            Target::Exit(exit) => head.exits <= exit,
            // The first exit at this time may be before a checkpoint at the same one.
            Target::Time(time) => head.now < time,
            Target::End => true,
        };
        let here = self.parts.as_ref().filter(|parts| parts.in_step);
        // Between two exits it is after the first of them.
        let is_past = |parts: &&Parts<C, S>| {
            !parts.machine.is_at_exit() && target == Target::Exit(parts.here().exits)
        };
        let here = here.filter(|parts| !is_past(parts));
        let here = here.map(Parts::here).filter(is_before);
        let is_nearer = |head: &CheckpointHead| {
            is_before(head) && here.is_none_or(|here| head.exits > here.exits)
        };
        if self.come_near_in_memory(is_nearer)? {
            return Ok(());
        }
        // Whoever only goes on does not wait for what is being kept.
        if self.store.heads().iter().any(is_nearer) {
            self.settle()?;
        }
        for number in (0..self.store.heads().len()).rev() {
            if !is_nearer(&self.store.heads()[number]) || self.unusable.contains(&number) {
                continue;
            }
            match self.put_at(number)? {
                Ok(()) => return Ok(()),
                Err(why) => {
                    let exits = self.store.heads()[number].exits;
                    self.complaints.push(format!(
                        "the checkpoint at exit {exits} is of no use: {why}"
                    ));
                    self.unusable.insert(number);
                }
            }
        }
        let stayed = self.parts.as_ref().is_some_and(|parts| parts.in_step);
        match here.is_some() && stayed {
            true => Ok(()),
            false => self.make(),
        }
    }

    /// Puts it at the last state in memory that is wanted, if there is no later checkpoint that is.
    fn come_near_in_memory(
        &mut self,
        is_wanted: impl Fn(&CheckpointHead) -> bool,
    ) -> Result<bool, TravelError<<C as Cpu>::Error, F>> {
        let in_store = self.store.heads().iter().filter(|head| is_wanted(head));
        let in_store = in_store.map(|head| head.exits).max();
        let is_wanted = |head: &CheckpointHead| {
            is_wanted(head) && in_store.is_none_or(|exits| head.exits >= exits)
        };
        if !self.near.heads().any(|head| is_wanted(&head)) {
            return Ok(false);
        }
        self.settle()?;
        // Those that are in memory may have gone with what could not be kept.
        let (Some(parts), Some(state)) = (&mut self.parts, self.near.last(is_wanted)) else {
            return Ok(false);
        };
        let restored = parts.restore(&mut self.store, &state.core, state.base, &state.pages);
        let put = restored.and_then(|place| self.door.go_to(&place).map_err(Unusable::Journal));
        parts.in_step = put.is_ok();
        self.notes.begin(parts.here().exits);
        if let Err(why) = &put {
            let exits = state.head.exits;
            self.complaints
                .push(format!("the state at exit {exits} is of no use: {why}"));
            self.near.give_up_last();
        }
        Ok(put.is_ok())
    }

    /// The last exit before `exit` that can be had at once; 0 if there is none.
    pub fn last_before(&self, exit: u64) -> u64 {
        let heads = self.store.heads().iter().copied().chain(self.near.heads());
        let before = heads
            .map(|head| head.exits)
            .filter(|exits| *exits < exit)
            .max();
        before.unwrap_or(0)
    }

    /// Keeps the state here in memory, if it is not there already and there is room.
    pub fn keep_near(&mut self) -> Result<(), StateError<<C as Cpu>::Error>> {
        let parts = self.parts.as_mut().ok_or(StateError::NotAtAnExit)?;
        let here = parts.here().exits;
        if !self.near.heads().any(|head| head.exits == here)
            && let Some((state, new)) = parts.keep(&self.door)?
        {
            self.near.keep(state, new);
        }
        Ok(())
    }

    /// Puts it at a checkpoint, or without one at power-on. Why that cannot be done.
    pub(super) fn begin_at(
        &mut self,
        from: Option<usize>,
    ) -> Result<Result<(), String>, TravelError<<C as Cpu>::Error, F>> {
        self.settle()?;
        match from {
            None => self.make().map(Ok),
            Some(number) => self.put_at(number),
        }
    }

    /// Puts it at a checkpoint that is kept. Why that cannot be done.
    fn put_at(
        &mut self,
        number: usize,
    ) -> Result<Result<(), String>, TravelError<<C as Cpu>::Error, F>> {
        if self.parts.is_none() {
            self.store.expect(number);
            self.make()?;
        }
        let parts = self.parts.as_mut().expect("it was made");
        let restored = parts.restore_checkpoint(&mut self.store, number);
        let put = restored.and_then(|place| self.door.go_to(&place).map_err(Unusable::Journal));
        parts.in_step = put.is_ok();
        if parts.in_step {
            self.notes.begin(parts.here().exits);
        }
        Ok(put.map_err(|why| why.to_string()))
    }

    /// The machine, which was made, and the door that it is run with. It is out of step until it is put somewhere.
    pub(super) fn parts_and_door(&mut self) -> (&mut Parts<C, S>, &mut Replayer<R>) {
        let (parts, _, door) = self.parts_store_and_door();
        (parts, door)
    }

    /// The same, and the store.
    pub(super) fn parts_store_and_door(&mut self) -> (&mut Parts<C, S>, &mut K, &mut Replayer<R>) {
        let parts = self.parts.as_mut().expect("it was made");
        parts.in_step = false;
        (parts, &mut self.store, &mut self.door)
    }

    /// Makes a machine at power-on.
    fn make(&mut self) -> Result<(), TravelError<<C as Cpu>::Error, F>> {
        // The one before is gone first: there may be no room for two.
        self.parts = None;
        let (machine, cpu, disks) = (self.make)().map_err(TravelError::Make)?;
        self.door.go_to_start()?;
        let parts = Parts::new(machine, cpu, disks)?;
        self.notes.begin(0);
        self.parts = Some(parts);
        Ok(())
    }

    /// Makes a checkpoint where the machine is, if the store has none so late; then all that were made are kept.
    pub fn keep_here(&mut self) -> Result<(), TravelError<<C as Cpu>::Error, F>> {
        if let Some(parts) = self.parts.as_ref().filter(|parts| parts.in_step) {
            self.make_checkpoint(parts.here())?;
        }
        self.settle()
    }

    /// Puts the machine where `state` was taken, which is of this recording.
    pub fn put(&mut self, state: &StateOf<C, S>) -> Result<(), TravelError<<C as Cpu>::Error, F>> {
        if self.parts.is_none() {
            self.make()?;
        }
        let parts = self.parts.as_mut().expect("it was made");
        parts.in_step = false;
        let place = state.core.journal.as_ref().ok_or_else(|| {
            let what = "this state says nothing of where it is in a recording";
            StateError::Damaged(what.into())
        })?;
        let (cpu, disks) = (&mut parts.cpu, &mut parts.disks);
        parts.machine.restore(state, cpu, disks)?;
        parts.forget_base()?;
        self.door.go_to(place)?;
        parts.in_step = true;
        self.notes.begin(parts.here().exits);
        Ok(())
    }

    /// Runs from where the machine is, or from power-on before the first travel, to `target`, which must not lie before.
    /// No checkpoint on the way is jumped to: the observer sees all that happens.
    pub fn run_to(
        &mut self,
        target: Target,
        pace: &mut dyn Pace,
        observer: &mut dyn Observer,
    ) -> Result<Arrival, TravelError<<C as Cpu>::Error, F>> {
        if self.parts.as_ref().is_none_or(|parts| !parts.in_step) {
            self.come_near(Target::Exit(0))?;
        }
        let last = match target {
            Target::Exit(exit) => Some(exit),
            Target::Time(_) | Target::End => None,
        };
        self.door.close_at_time(match target {
            Target::Time(time) => Some(time),
            _ => None,
        });
        loop {
            let parts = self.parts.as_mut().expect("it was made");
            let look = parts.machine.at().exits.saturating_add(pace.exits().max(1));
            let until = last.map_or(look, |last| last.min(look));
            self.door.close_after(Some(until));
            let mut observers = (&mut self.notes, &mut *observer);
            let (cpu, disks, door) = (&mut parts.cpu, &mut parts.disks, &mut self.door);
            let result = parts.machine.run(cpu, disks, door, &mut observers);
            parts.in_step = matches!(
                result,
                Err(RunError::Closed(Closed::Reached(_) | Closed::Stopped(_)))
            );
            match result {
                Err(RunError::Closed(Closed::Reached(_))) => {}
                Err(RunError::Closed(Closed::Stopped(_))) => return Ok(Arrival::AtStop),
                Ok(end) => return Ok(Arrival::Ended(end)),
                Err(RunError::Closed(Closed::CutShort(tail))) => {
                    return Ok(Arrival::CutShort(tail));
                }
                Err(error) => return Err(TravelError::Run(error)),
            }
            let here = parts.here();
            let arrived = match target {
                Target::Exit(exit) => here.exits >= exit,
                Target::Time(time) => here.now >= time,
                Target::End => false,
            };
            if arrived {
                return Ok(Arrival::Reached);
            }
            match pace.look(here) {
                Pause::GoOn => {}
                Pause::Keep => self.keep_near()?,
                Pause::Stop => return Ok(Arrival::Stopped),
                Pause::Checkpoint { cost } => {
                    let here = CheckpointHead { cost, ..here };
                    self.make_checkpoint(here)?;
                    pace.made(here);
                }
            }
        }
    }

    /// The machine is not what the recording says any more: it can only be put somewhere.
    pub(super) fn leave_recording(&mut self) {
        if let Some(parts) = &mut self.parts {
            parts.in_step = false;
        }
    }

    /// Runs the machine on to its next stop, off its recording, as if nobody were outside.
    pub(super) fn run_off(
        &mut self,
        pace: &mut dyn Pace,
    ) -> Result<Arrival, TravelError<<C as Cpu>::Error, F>> {
        let (parts, _) = self.parts_and_door();
        let mut door = Nobody::default();
        loop {
            let look = parts.machine.at().exits.saturating_add(pace.exits().max(1));
            door.close_after(look);
            let (cpu, disks) = (&mut parts.cpu, &mut parts.disks);
            match parts.machine.run(cpu, disks, &mut door, &mut ()) {
                Ok(end) => return Ok(Arrival::Ended(end)),
                Err(RunError::Closed(Closed::Stopped(_))) => return Ok(Arrival::AtStop),
                Err(RunError::Closed(Closed::Reached(_))) => {}
                Err(error) => return Err(TravelError::Run(error)),
            }
            if pace.look(parts.here()) == Pause::Stop {
                return Ok(Arrival::Stopped);
            }
        }
    }

    /// If the store has none so late, and takes more.
    fn make_checkpoint(
        &mut self,
        here: CheckpointHead,
    ) -> Result<(), TravelError<<C as Cpu>::Error, F>> {
        let last = self.store.heads().last();
        if !self.store.is_open() || last.is_some_and(|last| last.exits >= here.exits) {
            return Ok(());
        }
        let parts = self.parts.as_mut().expect("it was made");
        let before = self.store.heads().last().map_or(0, |last| last.exits);
        let notes = self.notes.since(before);
        if let Err(error) = parts.save(&mut self.store, &self.door, here, notes.as_ref())? {
            self.cannot_keep(&error)?;
            self.complaints
                .push(format!("there is no checkpoint at exit {}", here.exits));
        }
        self.notes.begin(here.exits);
        Ok(())
    }

    /// Waits until all checkpoints that were made are kept; what is not is among the complaints.
    pub fn settle(&mut self) -> Result<(), TravelError<<C as Cpu>::Error, F>> {
        match self.store.settle() {
            Ok(()) => Ok(()),
            Err(error) => self.cannot_keep(&error),
        }
    }

    fn cannot_keep(
        &mut self,
        error: &dyn Display,
    ) -> Result<(), TravelError<<C as Cpu>::Error, F>> {
        self.complaints
            .push(format!("checkpoints cannot be kept: {error}"));
        // They may rest on what was not kept.
        self.near.clear();
        if let Some(parts) = &mut self.parts {
            parts.forget_base()?;
        }
        Ok(())
    }
}
