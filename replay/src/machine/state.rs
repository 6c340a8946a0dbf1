//! The whole state: everything that decides what happens next, as one value.
//!
//! If a field is not in it, the machine must run on equally without it. The law that finds the forgotten one is
//! in `tests/tests/states.rs`: save anywhere, restore elsewhere, and nothing that can be seen of the run from there
//! on, nor any later state, is different.
//!
//! A state is taken at a counted exit, when all that belongs to the exit is done and nothing of the guest has run
//! since: where a door closes by [`Outside::horizon`]. It may come from a file, and a file from anybody: what could not
//! have been is refused, and what could have been and was not is a divergence later.

use std::fmt::Debug;

use hindsight_devices::{Board, BoardState, Nanos, RestoreError, Room, Storage, StorageError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::cpu::Cpu;
use super::digest::{Digest, PAGE_BYTES};
use super::left_open::LeftOpen;
use super::moment::{Moment, VCPUS};
use super::outside::{Complete, JournalPlace, Outside};
use super::pages::{PagePlace, Pages};
use super::turns::REASON_BYTES_MAX;
use super::{Machine, Panic, Tally};

/// The version of [`MachineState`] that this program writes and reads.
const VERSION: u32 = 3;
/// First bytes of a state.
const MAGIC: [u8; 4] = *b"HSst";
/// What precedes the state proper: magic, version, check.
const HEAD_BYTES: usize = 16;
/// No count of anything comes this far: a machine would have to run for a century.
const COUNT_MAX: u64 = 1 << 62;

/// Something that is lent to the loop, whose state can be taken as a value and put into another of its kind: a
/// vCPU, or the disks.
pub trait Stateful {
    /// Everything about it that decides what the machine does next, as far as it is not in guest memory and not
    /// the same in each machine of one description. Nothing of the host: no file, no address, no count of kicks.
    type State: Serialize + DeserializeOwned + Clone + Debug + PartialEq;
    /// Why it cannot be done: the host failed, or what is to be restored could not have been.
    type Error: std::error::Error;

    /// Takes the state, and changes nothing that the guest or a digest can see.
    ///
    /// By then, of a vCPU: the last exit was answered and its instruction finished ([`Cpu::settle`]), so nothing is
    /// half done but an access of several elements whose next one is the next exit; what was posted was taken; no
    /// instruction has run since. An interrupt delivered at this exit may still be on its way in, and a window may be
    /// wanted: both belong to the state. Of disks: the door has been given what was read for the first time.
    fn save(&mut self) -> Result<Self::State, Self::Error>;

    /// Becomes what was saved, whatever it was before: nothing stays of that, no interrupt on its way, no window,
    /// no breakpoint, no block.
    ///
    /// By then it belongs to a machine of the same description, fresh or one that has run; guest memory is as it
    /// was saved. What is counted since the last exit is counted from here. After an error it is not to be used.
    fn restore(&mut self, state: &Self::State) -> Result<(), Self::Error>;

    /// What it keeps in pages, and is not in its state: the numbers of those that may hold anything but zeroes, ascending.
    fn pages(&mut self) -> Result<Vec<u64>, Self::Error>;

    /// Whether it has a page of this number, whatever that holds.
    fn has_page(&self, number: u64) -> bool;

    /// Reads a page that it has.
    fn read_page(&mut self, number: u64, into: &mut [u8; PAGE_BYTES]) -> Result<(), Self::Error>;

    /// Writes a page that it has.
    fn write_page(&mut self, number: u64, from: &[u8; PAGE_BYTES]) -> Result<(), Self::Error>;

    /// The numbers of the pages that may have changed since this was asked last, whoever changed them; in any order, and
    /// a page may be there twice. The first time it is those that may have changed since it was made or
    /// [`Stateful::pages`] was asked: it may begin to take notes only then.
    fn take_changed_pages(&mut self) -> Result<Vec<u64>, Self::Error>;
}

/// Everything that decides what happens next, of a machine whose vCPU has states `C` and whose disks `S`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineState<C, S> {
    /// All of it but the pages.
    pub core: CoreState<C, S>,
    /// Guest memory, and what was written to the disks.
    pub pages: Pages,
}

/// A machine's state without its pages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CoreState<C, S> {
    /// What the loop keeps.
    pub progress: Progress,
    /// The devices, guest time among them.
    pub board: BoardState,
    /// The vCPU.
    pub cpu: C,
    /// Which blocks of the disks the guest has written, and which of them it has read.
    pub disks: S,
    /// Where the door is in its journal, if it has one to read.
    pub journal: Option<JournalPlace>,
}

/// The state of a machine with such a vCPU and such disks.
pub type StateOf<C, S> = MachineState<<C as Stateful>::State, <S as Stateful>::State>;
/// The same without its pages.
pub type CoreOf<C, S> = CoreState<<C as Stateful>::State, <S as Stateful>::State>;

/// What the loop keeps from one exit to the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Names the description of the machine: devices, CPUID, rules of time.
    description: u64,
    at: Moment,
    digest: u64,
    halted: bool,
    room: Room,
    panic: Option<Panic>,
    /// Decides nothing: it is reported at the end.
    tally: Tally,
}

impl Progress {
    /// The exit at which the state was taken.
    pub fn at(&self) -> Moment {
        self.at
    }

    /// Refuses what no loop could have come to by guest time `now`.
    fn check(&self, now: Nanos) -> Result<(), String> {
        let Tally {
            exits,
            interrupts,
            windows,
            preempted,
            module_sites,
            posted,
            left_open,
        } = &self.tally;
        let counted = (exits.iter()).try_fold(0u64, |sum, count| sum.checked_add(*count));
        let counts = [*interrupts, *windows, *preempted, *module_sites, *posted];
        let panic_is_possible = self.panic.as_ref().is_none_or(|panic| {
            // Each byte that is no text has become a character of three.
            panic.since <= now && panic.reason.len() <= 3 * REASON_BYTES_MAX
        });
        let what = if self.at.exits > COUNT_MAX || counted != Some(self.at.exits) {
            "the number of its exits"
        } else if !self.at.vcpu.is_among(VCPUS) {
            "the number of its vCPU"
        } else if counts.iter().any(|count| *count > COUNT_MAX) || preempted > interrupts {
            "a count"
        } else if left_open.len() > LeftOpen::ALL.len() {
            "what was left open"
        } else if !panic_is_possible {
            "the panic"
        } else {
            return Ok(());
        };
        Err(format!("{what} could not have been"))
    }
}

/// Why a state cannot be taken, read or put in place.
#[derive(Debug, Error)]
pub enum StateError<E: std::error::Error> {
    /// The guest has run since its last exit, or its run is over.
    #[error("the machine is not at an exit: there is no state to save")]
    NotAtAnExit,
    /// It is no state of any machine.
    #[error("the machine's state is damaged: {0}; take an earlier one, or replay from the start")]
    Damaged(String),
    /// It is the state of another machine.
    #[error(
        "this is the state of another machine; take one of this recording, or replay from the start"
    )]
    OtherMachine,
    /// The board refuses it.
    #[error(transparent)]
    Board(#[from] RestoreError),
    /// The vCPU failed, or refuses it.
    #[error("the vCPU: {0}")]
    Cpu(#[source] E),
    /// A disk failed, or refuses it.
    #[error(transparent)]
    Storage(StorageError),
}

/// Bytes that are no state that this program reads.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "this is no state of a machine that can be used: {0}; take another one, or replay from the start"
)]
pub struct UnreadableState(String);

impl<C: Serialize + DeserializeOwned, S: Serialize + DeserializeOwned> MachineState<C, S> {
    /// The state as it is kept: equal states are equal bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 8]);
        let mut bytes = postcard::to_extend(self, bytes).expect("a Vec takes everything");
        let check = xxh3_64_with_seed(&bytes[HEAD_BYTES..], VERSION.into());
        bytes[8..HEAD_BYTES].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// The state that was kept. Takes no more memory than a small multiple of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Result<MachineState<C, S>, UnreadableState> {
        let refused = |what: String| Err(UnreadableState(what));
        let Some((head, body)) = bytes.split_first_chunk::<HEAD_BYTES>() else {
            return refused(format!(
                "it has {} bytes, expected at least {HEAD_BYTES}",
                bytes.len()
            ));
        };
        let [a, b, c, d] = head.as_chunks::<4>().0 else {
            unreachable!("a head has four words")
        };
        if *a != MAGIC {
            return refused(format!("it begins with {a:02x?}, expected {MAGIC:02x?}"));
        }
        let version = u32::from_le_bytes(*b);
        if version != VERSION {
            return refused(format!(
                "it has version {version}, this program reads {VERSION}"
            ));
        }
        let check = u64::from(u32::from_le_bytes(*d)) << 32 | u64::from(u32::from_le_bytes(*c));
        let found = xxh3_64_with_seed(body, VERSION.into());
        if found != check {
            return refused(format!(
                "its checksum is {found:016x}, expected {check:016x}"
            ));
        }
        match postcard::take_from_bytes(body) {
            Ok((state, [])) => Ok(state),
            Ok((_, rest)) => refused(format!("{} bytes of it say nothing", rest.len())),
            Err(error) => refused(error.to_string()),
        }
    }

    /// A number for each part, to see in which of them two states differ.
    pub fn digest(&self) -> StateDigest {
        let CoreState {
            progress,
            board,
            cpu,
            disks,
            journal,
        } = &self.core;
        StateDigest([
            of(progress),
            of(board),
            of(cpu),
            of(disks),
            self.pages.digest(),
            of(journal),
        ])
    }
}

fn of(part: &impl Serialize) -> u64 {
    xxh3_64(&postcard::to_stdvec(part).expect("plain values serialise"))
}

/// The digest of a state, part by part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateDigest([u64; StateDigest::PARTS.len()]);

impl StateDigest {
    /// The parts.
    pub const PARTS: [&'static str; 6] = ["loop", "board", "vCPU", "disks", "pages", "journal"];

    /// One number for all of it.
    pub fn value(&self) -> u64 {
        xxh3_64(self.0.map(u64::to_le_bytes).as_flattened())
    }

    /// The parts in which two states differ.
    pub fn differences(&self, other: &StateDigest) -> Vec<&'static str> {
        let pairs = self.0.iter().zip(&other.0);
        let parts = StateDigest::PARTS.iter().zip(pairs);
        let differ = parts.filter(|(_, (a, b))| a != b);
        differ.map(|(part, _)| *part).collect()
    }
}

impl Machine {
    /// The whole state, where nothing of the guest has run since its last exit: at power-on, and where a run ended
    /// because [`Outside::horizon`] closed at an exit. The vCPU's instruction is finished for it, as it is where
    /// memory is digested, so the run goes on as if nothing had been saved.
    pub fn save<C, S, O>(
        &self,
        cpu: &mut C,
        storage: &mut S,
        outside: &O,
    ) -> Result<StateOf<C, S>, StateError<<C as Cpu>::Error>>
    where
        C: Cpu + Stateful<Error = <C as Cpu>::Error>,
        S: Storage + Stateful<Error = StorageError>,
        O: Outside + ?Sized,
    {
        let core = self.save_core(cpu, storage, outside)?;
        let mut pages = Pages::default();
        (pages.take(cpu, PagePlace::in_memory)).map_err(StateError::Cpu)?;
        (pages.take(storage, PagePlace::on_disks)).map_err(StateError::Storage)?;
        Ok(MachineState { core, pages })
    }

    /// The same without the pages, which are those of that moment until the run goes on.
    pub fn save_core<C, S, O>(
        &self,
        cpu: &mut C,
        storage: &mut S,
        outside: &O,
    ) -> Result<CoreOf<C, S>, StateError<<C as Cpu>::Error>>
    where
        C: Cpu + Stateful<Error = <C as Cpu>::Error>,
        S: Storage + Stateful<Error = StorageError>,
        O: Outside + ?Sized,
    {
        if !self.at_exit {
            return Err(StateError::NotAtAnExit);
        }
        cpu.settle().map_err(StateError::Cpu)?;
        let progress = Progress {
            description: self.description(),
            at: self.at,
            digest: self.digest.value(),
            halted: self.halted,
            room: self.room,
            panic: self.panic.clone(),
            tally: self.tally.clone(),
        };
        Ok(CoreState {
            progress,
            board: self.board.save(),
            cpu: cpu.save().map_err(StateError::Cpu)?,
            disks: storage.save().map_err(StateError::Storage)?,
            journal: outside.place(),
        })
    }

    /// Puts the machine, its vCPU with guest memory, and its disks where `state` was taken. Where the door has to
    /// be then is in its core's `journal`. Everything is looked at before anything is changed, but for what only vCPU and
    /// disks can judge; after an error, none of the three is to be used.
    pub fn restore<C, S>(
        &mut self,
        state: &StateOf<C, S>,
        cpu: &mut C,
        storage: &mut S,
    ) -> Result<(), StateError<<C as Cpu>::Error>>
    where
        C: Cpu + Stateful<Error = <C as Cpu>::Error>,
        S: Storage + Stateful<Error = StorageError>,
    {
        let MachineState { core, pages } = state;
        let missing = pages.iter().find(|(place, _)| match place.number() {
            Ok(number) => !cpu.has_page(number),
            Err(number) => !storage.has_page(number),
        });
        if let Some((place, _)) = missing {
            return Err(StateError::Damaged(format!(
                "it has a page where there is none: {place:?}"
            )));
        }
        self.restore_core(core, cpu, storage, |cpu, storage| {
            pages
                .put(cpu, PagePlace::in_memory)
                .map_err(StateError::Cpu)?;
            pages
                .put(storage, PagePlace::on_disks)
                .map_err(StateError::Storage)
        })
    }

    /// The same of a state whose pages are elsewhere: `put_pages` puts them in their places, when the core was found to be
    /// one of this machine, and before vCPU and disks are given theirs.
    pub fn restore_core<C, S, E>(
        &mut self,
        core: &CoreOf<C, S>,
        cpu: &mut C,
        storage: &mut S,
        put_pages: impl FnOnce(&mut C, &mut S) -> Result<(), E>,
    ) -> Result<(), E>
    where
        C: Cpu + Stateful<Error = <C as Cpu>::Error>,
        S: Storage + Stateful<Error = StorageError>,
        E: From<StateError<<C as Cpu>::Error>>,
    {
        let progress = &core.progress;
        if progress.description != self.description() || !core.board.is_of(&self.devices) {
            return Err(StateError::OtherMachine.into());
        }
        let board = Board::restore(core.board.clone()).map_err(StateError::from)?;
        progress.check(board.now()).map_err(StateError::Damaged)?;
        self.at_exit = false;
        put_pages(cpu, storage)?;
        storage.restore(&core.disks).map_err(StateError::Storage)?;
        cpu.restore(&core.cpu).map_err(StateError::Cpu)?;
        self.complete = Complete {
            exits: progress.at.exits,
            now: board.now(),
        };
        self.board = board;
        self.at = progress.at;
        self.digest = Digest::of(progress.digest);
        self.halted = progress.halted;
        self.room = progress.room;
        self.panic = progress.panic.clone();
        self.tally = progress.tally.clone();
        self.at_exit = true;
        self.stopped = false;
        Ok(())
    }

    /// A name for what the machine is made of.
    fn description(&self) -> u64 {
        of(&(
            &self.devices,
            &self.cpuid,
            self.ns_per_exit,
            self.quick_reads,
        ))
    }
}

/// There is nothing to keep.
impl Stateful for hindsight_devices::NoDisks {
    type State = ();
    type Error = StorageError;

    fn save(&mut self) -> Result<(), StorageError> {
        Ok(())
    }

    fn restore(&mut self, (): &()) -> Result<(), StorageError> {
        Ok(())
    }

    fn pages(&mut self) -> Result<Vec<u64>, StorageError> {
        Ok(Vec::new())
    }

    fn has_page(&self, _number: u64) -> bool {
        false
    }

    fn read_page(
        &mut self,
        _number: u64,
        _into: &mut [u8; PAGE_BYTES],
    ) -> Result<(), StorageError> {
        unreachable!("there is no page")
    }

    fn write_page(&mut self, _number: u64, _from: &[u8; PAGE_BYTES]) -> Result<(), StorageError> {
        unreachable!("there is no page")
    }

    fn take_changed_pages(&mut self) -> Result<Vec<u64>, StorageError> {
        Ok(Vec::new())
    }
}
