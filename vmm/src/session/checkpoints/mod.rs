//! The checkpoints of a recording, in one file of its directory: written by whoever replays it, and of no consequence but
//! for time.
//!
//! The file grows at its end, a checkpoint at a time, whose head is written last: what a kill leaves is a checkpoint less.
//! Each head has a check that covers the heads before it, so that nothing of another file is taken for a part of
//! this one; what is large has checks of its own, which are looked at as it is read. One process writes at a time,
//! any number read.

mod format;
mod groups;
mod table;
mod thin;
mod unpacked;
mod writer;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::Receiver;

use hindsight_replay::{
    CheckpointHead, Checkpoints, CoreState, Notes, PAGE_BYTES, PagePlace, PageSink, PageSource,
};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::make::random_number;
use crate::regular_file::{self, Links};
use format::{
    Directory, DirectoryLimit, FILE_HEAD_BYTES, GROUP_PAGES, HEAD_BYTES, Head, check_of, file_head,
    unpack_core,
};
use groups::group_of;
use table::{PageName, PageTable};
use unpacked::Unpacked;
use writer::{Appended, Background, Group, Kept, Rest, Writer};

/// Why checkpoints cannot be kept, or given back.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The host failed.
    #[error("{0}")]
    Host(#[from] io::Error),
    /// It is not what was written.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// Somebody else writes there.
    #[error("another process makes checkpoints of this recording; wait for it, or stop it")]
    InUse,
    /// The recording's directory, or the file in it, cannot be written.
    #[error("the recording cannot be written to; copy it to where it can")]
    NotWritable,
    /// There was an error before.
    #[error("no more are kept after an error")]
    Closed,
}

/// Which pages there can be of a machine. What is in its file is bounded by that.
#[derive(Clone, Copy, Debug)]
pub struct PageLimit {
    /// One more than the highest number of a page of memory.
    pub memory: u64,
    /// How many pages all disks have.
    pub disks: u64,
}

/// What is kept in memory of all directories has no more than this: a hundred times what a recording of an hour has.
const KEPT_BYTES_MAX: usize = 1 << 30;
/// How many groups of pages are unpacked before their pages are given.
const GROUPS_AT_ONCE: usize = 128;

/// Whether what is written stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the recording.
    Kept,
    /// Nothing is written, for somebody else does.
    InUse,
    /// It is gone with the program, or nothing is written: the recording's directory does not take it.
    NotWritable,
}

/// The checkpoints of a recording.
#[derive(Debug)]
pub struct CheckpointFile {
    file: File,
    place: Place,
    limit: PageLimit,
    journal: u64,
    /// Where those end that are kept, and the check of the last head.
    end: u64,
    check: u64,
    /// Those that are kept, and those that are being kept.
    heads: Vec<CheckpointHead>,
    kept: Vec<Kept>,
    groups: Vec<Group>,
    /// How much more may be read to be kept.
    room_bytes: usize,
    unpacked: Unpacked,
    /// From whoever unpacks what will be wanted, if anybody does.
    ahead: Option<Receiver<Unpacked>>,
    /// Who writes more of them, if anybody does.
    writer: Option<Background>,
}

impl CheckpointFile {
    /// Opens the file at `path` of the recording whose journal's head has the check `journal`, or makes one. What is there
    /// and cannot be used is written over. Where it cannot be written at all it is read; where there is none to be read,
    /// there is a file without a name that is gone with the program.
    ///
    /// # Errors
    ///
    /// The host has no file for it.
    pub fn open(
        path: &Path,
        journal: u64,
        limit: PageLimit,
    ) -> Result<CheckpointFile, CheckpointError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        // Neither through a link nor waiting for whoever reads a pipe.
        let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o666)).map(File::from);
        let is_file = |file: &File| file.metadata().is_ok_and(|data| data.is_file());
        let mut place = Place::NotWritable;
        if let Some(file) = file.ok().filter(is_file) {
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                return CheckpointFile::new(file, Place::Kept, journal, limit)
                    .read()
                    .open_writer();
            }
            place = Place::InUse;
        }
        match regular_file::open(path, Links::Refuse) {
            Ok((file, _)) => Ok(CheckpointFile::new(file, place, journal, limit).read()),
            Err(_) => {
                CheckpointFile::new(tempfile::tempfile()?, place, journal, limit).open_writer()
            }
        }
    }

    /// Whether what is written to it stays in the recording.
    ///
    /// # Errors
    ///
    /// It does not, or nothing is: why.
    pub fn check_kept(&self) -> Result<(), CheckpointError> {
        match self.place {
            Place::Kept => Ok(()),
            Place::InUse => Err(CheckpointError::InUse),
            Place::NotWritable => Err(CheckpointError::NotWritable),
        }
    }

    /// Reads the checkpoints in `file`, and writes none.
    pub fn of(file: File, journal: u64, limit: PageLimit) -> CheckpointFile {
        CheckpointFile::new(file, Place::NotWritable, journal, limit).read()
    }

    /// The file, of which nothing was read.
    fn new(file: File, place: Place, journal: u64, limit: PageLimit) -> CheckpointFile {
        CheckpointFile {
            file,
            place,
            limit,
            journal,
            end: FILE_HEAD_BYTES as u64,
            check: check_of(&file_head(journal)),
            heads: Vec::new(),
            kept: Vec::new(),
            groups: Vec::new(),
            room_bytes: KEPT_BYTES_MAX,
            unpacked: Unpacked::new(),
            ahead: None,
            writer: None,
        }
    }

    fn read(mut self) -> CheckpointFile {
        let mut head = [0; FILE_HEAD_BYTES];
        let is_there = self.file.read_exact_at(&mut head, 0).is_ok();
        if is_there && head == file_head(self.journal) {
            while self.read_checkpoint().is_some() {}
        }
        self
    }

    fn open_writer(mut self) -> Result<CheckpointFile, CheckpointError> {
        self.writer = Some(Background::start(self.writer()?)?);
        Ok(self)
    }

    /// A writer of what comes after what was read; what else is there goes.
    fn writer(&self) -> Result<Writer, CheckpointError> {
        let file = self.file.try_clone()?;
        file.set_len(self.end)?;
        file.write_all_at(&file_head(self.journal), 0)?;
        let last = match self.kept.len().checked_sub(1) {
            Some(last) => self.table(last),
            None => PageTable::default(),
        };
        let random = || random_number().map_err(io::Error::other);
        let seeds = (random()?, random()?);
        Writer::new(
            file,
            self.end,
            self.check,
            last,
            self.groups.len() as u64,
            seeds,
        )
    }

    /// Reads the checkpoint at the end of what was read; `None` if there is none that is whole.
    fn read_checkpoint(&mut self) -> Option<()> {
        let mut bytes = [0; HEAD_BYTES];
        self.file.read_exact_at(&mut bytes, self.end).ok()?;
        let (head, check) = Head::from_bytes(&bytes, self.check)?;
        let groups_at = self.end + HEAD_BYTES as u64;
        let end = groups_at.checked_add(head.body_bytes()?)?;
        let is_late = self.heads.last().is_none_or(|last| last.exits < head.exits);
        if !is_late || end > self.file.metadata().ok()?.len() {
            return None;
        }
        let directory_at = groups_at + head.groups_bytes;
        let mut packed = vec![0; head.directory_bytes as usize];
        self.file.read_exact_at(&mut packed, directory_at).ok()?;
        if check_of(&packed) != head.directory_check {
            return None;
        }
        let most = |item: usize| (self.room_bytes / item) as u64;
        let limit = DirectoryLimit {
            groups: head.groups_bytes.min(most(size_of::<Group>())),
            changes: (self.limit.memory + self.limit.disks)
                .min(most(size_of::<(PagePlace, PageName)>())),
        };
        let directory = Directory::unpack(&packed, limit)?;
        let mut at = groups_at;
        let groups = directory.groups.iter().map(|(bytes, check)| {
            let (bytes, check) = (*bytes, *check);
            let group = Group { at, bytes, check };
            at += u64::from(bytes);
            group
        });
        let groups: Vec<_> = groups.collect();
        let pages = (self.groups.len() + groups.len()) as u64 * GROUP_PAGES;
        let names = PageName::FIRST.0 + pages - 1;
        let changes = directory.changes(self.limit, names)?;
        if at != directory_at {
            return None;
        }
        let kept_bytes =
            size_of_val(&groups[..]) + size_of_val(&changes[..]) + directory.notes.len();
        self.room_bytes = self.room_bytes.checked_sub(kept_bytes)?;
        let kept = Kept {
            changes,
            core_at: directory_at + u64::from(head.directory_bytes),
            core_bytes: head.core_bytes,
            core_check: head.core_check,
            notes: directory.notes,
            check,
        };
        let head = CheckpointHead {
            exits: head.exits,
            now: head.now,
            cost: head.cost,
        };
        self.heads.push(head);
        self.keep((kept, groups));
        (self.end, self.check) = (end, check);
        Some(())
    }

    fn keep(&mut self, (kept, groups): Appended) {
        self.kept.push(kept);
        self.groups.extend(groups);
    }

    /// Where its checkpoints are, by ascending exit.
    pub fn heads(&self) -> &[CheckpointHead] {
        &self.heads
    }

    /// A number that stands for the recording: the check of its journal's head.
    pub fn recording(&self) -> u64 {
        self.journal
    }

    /// A number that stands for one of the checkpoints that are kept, those before it, and the recording: the check of its
    /// head.
    pub fn check_at(&self, number: usize) -> u64 {
        self.kept[number].check
    }

    /// Whether more may be written to it.
    pub fn is_open(&self) -> bool {
        self.writer.is_some()
    }

    /// Length of the file in bytes by now.
    pub fn bytes(&self) -> u64 {
        self.writer.as_ref().map_or(self.end, Background::end)
    }

    /// Over how many exits the last `count` are spread that are kept by now, or as many as there are, and how many bytes
    /// they have; `None` if there are too few.
    pub fn recent(&self, count: usize) -> Option<(u64, u64)> {
        let last = self.kept.len().checked_sub(1)?;
        let before = last.saturating_sub(count);
        let end = |number: usize| {
            let kept = &self.kept[number];
            kept.core_at + u64::from(kept.core_bytes)
        };
        let exits = self.heads[last].exits - self.heads[before].exits;
        (before < last).then(|| (exits, end(last) - end(before)))
    }

    /// Takes note of what was written by now.
    fn catch_up(&mut self) -> Result<(), CheckpointError> {
        let Some(writer) = &self.writer else {
            return Ok(());
        };
        let done: Vec<_> = writer.done().collect();
        let end = writer.end();
        for done in done {
            match done {
                Ok(appended) => self.keep(appended),
                Err(error) => return Err(self.close(error)),
            }
        }
        self.end = end;
        Ok(())
    }

    /// Takes no more of them; those that were not kept are gone.
    fn close(&mut self, error: CheckpointError) -> CheckpointError {
        self.writer = None;
        self.heads.truncate(self.kept.len());
        error
    }

    /// Waits until all that was handed over is written.
    ///
    /// # Errors
    ///
    /// Something could not be, and is gone.
    pub fn settle(&mut self) -> Result<(), CheckpointError> {
        let settled = self.writer.as_ref().map_or(Ok(()), Background::settle);
        self.catch_up()?;
        settled.map_err(|error| self.close(error))
    }

    /// The pages at one of the checkpoints.
    fn table(&self, number: usize) -> PageTable {
        let mut table = PageTable::default();
        for (place, name) in self.kept[..=number].iter().flat_map(|kept| &kept.changes) {
            table.set(*place, *name);
        }
        table
    }

    fn table_at(&self, number: Option<usize>) -> PageTable {
        number.map_or_else(PageTable::default, |number| self.table(number))
    }

    /// What happened since the checkpoint before this one, if that is known.
    fn notes_at(&self, number: usize) -> Option<Notes> {
        Notes::from_bytes(&self.kept.get(number)?.notes)
    }

    /// The state of a checkpoint as it is in the file.
    fn packed_core(&self, number: usize) -> Result<Vec<u8>, CheckpointError> {
        let kept = &self.kept[number];
        let mut packed = vec![0; kept.core_bytes as usize];
        self.file.read_exact_at(&mut packed, kept.core_at)?;
        match check_of(&packed) == kept.core_check {
            true => Ok(packed),
            false => Err(CheckpointError::Damaged("a state has another check")),
        }
    }

    /// See [`Checkpoints::pages`].
    fn give(
        &mut self,
        number: usize,
        base: Option<usize>,
        also: &BTreeSet<PagePlace>,
        put: &mut PageSink<'_>,
    ) -> Result<(), CheckpointError> {
        let given = self.give_wanted(number, base, also, put);
        // What is still unpacked ahead is wanted no more, and would keep the next to be given waiting.
        self.ahead = None;
        given
    }

    fn give_wanted(
        &mut self,
        number: usize,
        base: Option<usize>,
        also: &BTreeSet<PagePlace>,
        put: &mut PageSink<'_>,
    ) -> Result<(), CheckpointError> {
        let table = self.table(number);
        let mut wanted = self.table_at(base).changes_to(&table);
        wanted.extend(also.iter().map(|place| (*place, table.get(*place))));
        // As they are in the file; those that are in none first.
        wanted.sort_unstable_by_key(|(place, name)| (*name, *place));
        wanted.dedup();
        let elsewhere = wanted.partition_point(|(_, name)| *name < PageName::FIRST);
        let (elsewhere, others) = wanted.split_at(elsewhere);
        for (place, name) in elsewhere {
            let zeroes = (*name == PageName::ZEROES).then_some(&[0; PAGE_BYTES]);
            if put(*place, zeroes).is_break() {
                return Ok(());
            }
        }
        self.unpack_ahead(others.iter().map(|(_, name)| *name));
        let mut rest = others;
        while !rest.is_empty() {
            // The next pages, of some groups.
            let (mut groups, mut count) = (Vec::new(), 0);
            for (_, name) in rest {
                let (group, _) = group_of(*name);
                if groups.last() != Some(&group) {
                    if groups.len() == GROUPS_AT_ONCE {
                        break;
                    }
                    groups.push(group);
                }
                count += 1;
            }
            let (now, later) = rest.split_at(count);
            self.unpack(&groups)?;
            for (place, name) in now {
                let (group, page) = group_of(*name);
                let pages = self.unpacked.get(group).unwrap_or_default();
                let bytes = pages.as_chunks::<PAGE_BYTES>().0.get(page);
                let bytes = bytes.ok_or(CheckpointError::Damaged("there is no such page"))?;
                if put(*place, Some(bytes)).is_break() {
                    return Ok(());
                }
            }
            rest = later;
        }
        Ok(())
    }
}

impl<C, S> Checkpoints<C, S> for CheckpointFile
where
    C: Serialize + DeserializeOwned,
    S: Serialize + DeserializeOwned,
{
    type Error = CheckpointError;

    fn heads(&self) -> &[CheckpointHead] {
        CheckpointFile::heads(self)
    }

    fn is_open(&self) -> bool {
        CheckpointFile::is_open(self)
    }

    fn append<E>(
        &mut self,
        head: CheckpointHead,
        core: &CoreState<C, S>,
        base: Option<usize>,
        changed: &mut PageSource<'_, E>,
        notes: Option<&Notes>,
    ) -> Result<Result<usize, CheckpointError>, E> {
        // Those of the last checkpoint are known to whoever writes.
        let table = match self.heads.len().checked_sub(1) == base {
            true => None,
            false => match self.settle() {
                Ok(()) => Some(self.table_at(base)),
                Err(error) => return Ok(Err(error)),
            },
        };
        let Some(writer) = &self.writer else {
            return Ok(Err(CheckpointError::Closed));
        };
        let mut sent = writer.begin(table);
        let mut more = true;
        while more && sent.is_ok() {
            let mut batch = writer.empty();
            more = batch.fill(changed)?;
            sent = writer.pages(batch);
        }
        let core = postcard::to_stdvec(core).expect("plain values serialise");
        let notes = notes.map(Notes::to_bytes).unwrap_or_default();
        let sent = sent.and_then(|()| writer.finish(Rest { head, core, notes }));
        self.heads.push(head);
        if let Err(error) = sent.and_then(|()| self.catch_up()) {
            return Ok(Err(self.close(error)));
        }
        Ok(Ok(self.heads.len() - 1))
    }

    fn settle(&mut self) -> Result<(), CheckpointError> {
        CheckpointFile::settle(self)
    }

    fn notes(&mut self, number: usize) -> Option<Notes> {
        self.notes_at(number)
    }

    fn expect(&mut self, number: usize) {
        self.expect_all(number);
    }

    fn load(&mut self, number: usize) -> Result<CoreState<C, S>, CheckpointError> {
        let packed = self.packed_core(number)?;
        let damaged = CheckpointError::Damaged;
        let bytes = unpack_core(&packed, self.limit);
        let bytes = bytes.map_err(|_| damaged("a state does not unpack"))?;
        match postcard::take_from_bytes(&bytes) {
            Ok((core, [])) => Ok(core),
            _ => Err(damaged("a state does not decode")),
        }
    }

    fn pages(
        &mut self,
        number: usize,
        base: Option<usize>,
        also: &BTreeSet<PagePlace>,
        put: &mut PageSink<'_>,
    ) -> Result<(), CheckpointError> {
        self.give(number, base, also, put)
    }
}

#[cfg(test)]
mod tests;
