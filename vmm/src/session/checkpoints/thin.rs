//! Fewer of a recording's checkpoints, in a file that takes the place of theirs.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;

use hindsight_replay::Notes;
use rustix::fs::{FlockOperation, flock};

use super::writer::{Background, Rest};
use super::{CheckpointError, CheckpointFile};
use crate::output_file::Unfinished;

impl CheckpointFile {
    /// What happened before a checkpoint and after another one, or since power-on.
    fn notes_between(&self, before: Option<usize>, number: usize) -> Option<Notes> {
        let exits = |number: Option<usize>| number.map_or(0, |number| self.heads[number].exits);
        let first = before.map_or(0, |before| before + 1);
        let all = (first..=number).map(|number| {
            let begin = exits(number.checked_sub(1)) - exits(before);
            self.notes_at(number).map(|notes| (begin, notes))
        });
        let all = all.collect::<Option<Vec<_>>>()?;
        Some(
            (all.into_iter()).fold(Notes::default(), |before, (begin, notes)| {
                before.followed_by(begin, notes)
            }),
        )
    }

    /// The same recording's checkpoints of which `keep` says that they stay, in a file that takes the place of the one at
    /// `path`. This one is as it was, for whoever has it open.
    ///
    /// # Errors
    ///
    /// It cannot be read, or there is no room for the other.
    pub fn thinned(
        &mut self,
        path: &Path,
        keep: impl Fn(usize) -> bool,
    ) -> Result<CheckpointFile, CheckpointError> {
        self.settle()?;
        let unfinished = Unfinished::beside(path, 0o666)?;
        let file = unfinished.file().try_clone()?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(CheckpointError::InUse);
        }
        let mut thin = CheckpointFile::new(file, self.place, self.journal, self.limit);
        let mut writer = thin.writer()?;
        let mut before = None;
        for number in (0..self.heads.len()).filter(|number| keep(*number)) {
            writer.begin(None);
            let mut failed = Ok(());
            self.give(number, before, &BTreeSet::new(), &mut |place, bytes| {
                failed = match bytes {
                    Some(bytes) => writer.page(place, bytes),
                    None => {
                        writer.as_at_power_on(place);
                        Ok(())
                    }
                };
                match failed {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                }
            })?;
            failed?;
            let core = self.packed_core(number)?;
            let notes = self.notes_between(before, number);
            let rest = Rest {
                head: self.heads[number],
                core,
                notes: notes.as_ref().map(Notes::to_bytes).unwrap_or_default(),
            };
            thin.heads.push(rest.head);
            thin.keep(writer.finish_packed(rest)?);
            before = Some(number);
        }
        unfinished.put(path, true)?;
        thin.end = writer.end();
        thin.writer = Some(Background::start(writer)?);
        Ok(thin)
    }
}
