//! Checks a stretch of a recording by itself: from one checkpoint to another.

use std::io::{Read, Seek};
use std::ops::ControlFlow;

use hindsight_devices::{Storage, StorageError};
use serde::Serialize;

use super::checkpoint::Checkpoints;
use super::travel::{Timeline, TravelError};
use crate::RunError;
use crate::door::Closed;
use crate::journal::Tail;
use crate::machine::{Cpu, End, Machine, Observer, PAGE_BYTES, PagePlace, Stateful};

/// What became of a stretch.
#[derive(Debug)]
pub enum Stretch {
    /// It begins as the one before ends, replays equal, and ends as the next one begins.
    Equal,
    /// The same of the last one: this is how the recording ends.
    Ended(End),
    /// It replays equal as far as the recording goes.
    CutShort(Tail),
    /// It cannot be begun or compared: a checkpoint is of no use.
    Unusable(String),
    /// It replays equal, and comes to another state than the checkpoint at its end has: in these parts.
    Elsewhere(Vec<String>),
}

impl<C, S, R, K, M, F> Timeline<C, S, R, K, M>
where
    C: Cpu + Stateful<Error = <C as Cpu>::Error>,
    S: Storage + Stateful<Error = StorageError>,
    R: Read + Seek,
    K: Checkpoints<C::State, S::State>,
    M: FnMut() -> Result<(Machine, C, S), F>,
{
    /// Replays what is between two checkpoints, and compares the state that it comes to with the second one. Without a
    /// first one it begins at power-on, without a second one it goes to the end.
    pub fn check_stretch(
        &mut self,
        from: Option<usize>,
        to: Option<usize>,
        observer: &mut dyn Observer,
    ) -> Result<Stretch, TravelError<<C as Cpu>::Error, F>> {
        if let Err(why) = self.begin_at(from)? {
            return Ok(Stretch::Unusable(why));
        }
        let until = to.map(|to| self.store().heads()[to].exits);
        let (parts, door) = self.parts_and_door();
        door.close_at_time(None);
        door.close_after(until);
        let result = (parts.machine).run(&mut parts.cpu, &mut parts.disks, door, observer);
        match (result, to) {
            (Err(RunError::Closed(Closed::Reached(_))), Some(to)) => self.compare(to),
            (Ok(end), None) => Ok(Stretch::Ended(end)),
            (Ok(end), Some(_)) => Ok(Stretch::Elsewhere(vec![format!("the guest: {end}")])),
            (Err(RunError::Closed(Closed::CutShort(tail))), _) => Ok(Stretch::CutShort(tail)),
            (Err(error), _) => Err(TravelError::Run(error)),
        }
    }

    /// Compares the machine with a checkpoint.
    fn compare(&mut self, to: usize) -> Result<Stretch, TravelError<<C as Cpu>::Error, F>> {
        let (parts, store, door) = self.parts_store_and_door();
        let (cpu, disks) = (&mut parts.cpu, &mut parts.disks);
        let found = parts.machine.save_core(cpu, disks, door)?;
        let expected = match store.load(to) {
            Ok(expected) => expected,
            Err(error) => return Ok(Stretch::Unusable(error.to_string())),
        };
        let mut differences = Vec::new();
        for (part, same) in [
            ("loop", same(&found.progress, &expected.progress)),
            ("board", same(&found.board, &expected.board)),
            ("vCPU", same(&found.cpu, &expected.cpu)),
            ("disks", same(&found.disks, &expected.disks)),
            ("journal", same(&found.journal, &expected.journal)),
        ] {
            if !same {
                differences.push(part.to_string());
            }
        }
        parts.note_changes()?;
        let (base, changed) = (parts.changes.base, parts.changes.pages.clone());
        let (mut other, mut failed) = (None, None);
        let mut look = |place: PagePlace, bytes: Option<&[u8; PAGE_BYTES]>| {
            let mut here = [0; PAGE_BYTES];
            if let Err(error) = parts.read_page(place, &mut here) {
                failed = Some(error);
            } else if here != *bytes.unwrap_or_else(|| parts.at_power_on(place)) {
                other = Some(place);
            } else {
                return ControlFlow::Continue(());
            }
            ControlFlow::Break(())
        };
        if let Err(error) = store.pages(to, base, &changed, &mut look) {
            return Ok(Stretch::Unusable(error.to_string()));
        }
        if let Some(error) = failed {
            return Err(error.into());
        }
        if let Some(place) = other {
            differences.push(match place.number() {
                Ok(number) => format!("memory at {:#x}", number * PAGE_BYTES as u64),
                Err(number) => format!("block {number:#x} of the disks"),
            });
        }
        Ok(match differences.is_empty() {
            true => Stretch::Equal,
            false => Stretch::Elsewhere(differences),
        })
    }
}

/// Equal values are equal bytes, and other way round.
fn same<T: Serialize>(a: &T, b: &T) -> bool {
    let bytes = |value| postcard::to_stdvec(value).expect("plain values serialise");
    bytes(a) == bytes(b)
}
