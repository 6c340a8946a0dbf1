//! The checkpoints of a recording, in one file of its directory: written by whoever replays it, and of no consequence but
//! for time. `docs/journal-format.md` has the format.
//!
//! The file grows at its end, a checkpoint at a time, whose head is written last: what a kill leaves is a checkpoint less.
//! Each head has a check that covers the heads before it, so that nothing of another file is taken for a part of
//! this one; what is large has checks of its own, which are looked at as it is read. One process writes at a time, any number
//! read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use hindsight_devices::Nanos;
use hindsight_replay::{
    CheckpointHead, Checkpoints, CoreState, PAGE_BYTES, PageName, PagePlace, PageTable,
};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed, xxh3_128_with_seed};

use super::make::random_number;
use super::unpacked::Unpacked;
use crate::output_file::Unfinished;
use crate::regular_file::{self, Links, ReadError};

/// First bytes of the file.
const MAGIC: [u8; 8] = *b"HSchkpts";
/// The version that this program writes and reads.
const VERSION: u32 = 1;
/// Magic, version, reserved, check of the journal's head, check.
const FILE_HEAD_BYTES: usize = 32;
/// First bytes of a checkpoint.
const CHECKPOINT_MAGIC: u32 = u32::from_le_bytes(*b"HSck");
const CHECKPOINT_HEAD_BYTES: usize = 64;
/// How many pages are compressed together: alone, a third more time and a tenth more room.
const GROUP_PAGES: u64 = 16;
const GROUP_BYTES: usize = GROUP_PAGES as usize * PAGE_BYTES;
/// zstd's fastest level but one.
const LEVEL: i32 = 1;
/// The state but for its pages, unpacked: devices and a journal's history.
const CORE_BYTES_MAX: usize = 64 << 20;
/// What the pages of a checkpoint are called, unpacked: enough for a terabyte of memory.
const DIRECTORY_BYTES_MAX: usize = 1 << 30;
/// Neither is longer in the file.
const PACKED_BYTES_MAX: u32 = 128 << 20;

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
    #[error("another process makes checkpoints of this recording")]
    InUse,
}

/// Which pages there can be of a machine: how many of memory, up to the highest; of disks, the file does not say.
#[derive(Clone, Copy, Debug)]
pub struct PageLimit {
    /// One more than the highest number of a page of memory.
    pub memory: u64,
}

/// What stands in the head of a checkpoint, in the order of the file; each little-endian.
#[derive(Clone, Copy, Debug, Default)]
struct Head {
    exits: u64,
    now: Nanos,
    /// Length of the groups of pages, of the directory and of the core, in this order behind the head.
    groups_bytes: u64,
    directory_bytes: u32,
    core_bytes: u32,
    directory_check: u64,
    core_check: u64,
}

impl Head {
    fn to_bytes(self, before: u64) -> ([u8; CHECKPOINT_HEAD_BYTES], u64) {
        let mut bytes = [0; CHECKPOINT_HEAD_BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&CHECKPOINT_MAGIC.to_le_bytes());
        put(&self.directory_bytes.to_le_bytes());
        put(&self.exits.to_le_bytes());
        put(&self.now.to_le_bytes());
        put(&self.groups_bytes.to_le_bytes());
        put(&self.directory_check.to_le_bytes());
        put(&self.core_check.to_le_bytes());
        put(&self.core_bytes.to_le_bytes());
        let check = xxh3_64_with_seed(&bytes[..CHECKPOINT_HEAD_BYTES - 8], before);
        bytes[CHECKPOINT_HEAD_BYTES - 8..].copy_from_slice(&check.to_le_bytes());
        (bytes, check)
    }

    /// The head, and its check; `None` if it is none, or does not follow `before`.
    fn from_bytes(bytes: &[u8; CHECKPOINT_HEAD_BYTES], before: u64) -> Option<(Head, u64)> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let head = Head {
            directory_bytes: word(4),
            exits: long(8),
            now: long(16),
            groups_bytes: long(24),
            directory_check: long(32),
            core_check: long(40),
            core_bytes: word(48),
        };
        let (expected, check) = head.to_bytes(before);
        (word(0) == CHECKPOINT_MAGIC && expected == *bytes).then_some((head, check))
    }

    fn body_bytes(&self) -> Option<u64> {
        let rest = u64::from(self.directory_bytes) + u64::from(self.core_bytes);
        self.groups_bytes.checked_add(rest)
    }
}

/// What a checkpoint adds: groups of pages, and which of a machine's pages are called otherwise than at the one before.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Directory {
    /// Of each group its length in bytes, and its check.
    groups: Vec<(u32, u64)>,
    /// By ascending place, which is relative to the one before.
    changes: Vec<(u64, u64)>,
}

/// A group of pages in the file.
#[derive(Clone, Copy, Debug)]
struct Group {
    at: u64,
    bytes: u32,
    check: u64,
}

/// A checkpoint in the file.
#[derive(Clone, Debug)]
struct Kept {
    changes: Vec<(PagePlace, PageName)>,
    core_at: u64,
    core_bytes: u32,
    core_check: u64,
}

/// The checkpoints of a recording.
#[derive(Debug)]
pub struct CheckpointFile {
    file: File,
    limit: PageLimit,
    journal: u64,
    /// Whether more may be written.
    open: bool,
    /// Where the next checkpoint comes.
    end: u64,
    /// The check of the last head.
    check: u64,
    heads: Vec<CheckpointHead>,
    kept: Vec<Kept>,
    groups: Vec<Group>,
    unpacked: Unpacked,
    draft: Draft,
    /// The pages at the last checkpoint.
    last: PageTable,
    names: BTreeMap<u128, PageName>,
    /// Drawn, so that no guest can know which two pages would be taken for one.
    seed: u64,
}

/// What is written of the checkpoint to come.
struct Draft {
    /// Pages of the group that is not full.
    pages: Vec<u8>,
    /// Where the next group comes.
    at: u64,
    groups: Vec<(u32, u64)>,
    compressor: zstd::bulk::Compressor<'static>,
}

impl std::fmt::Debug for Draft {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Draft")
            .field("at", &self.at)
            .finish_non_exhaustive()
    }
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
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let mode = Mode::from_raw_mode(0o666);
        let writable = rustix::fs::open(path, flags, mode).map(File::from).ok();
        let writable = writable.filter(|file| file.metadata().is_ok_and(|data| data.is_file()));
        if let Some(file) = writable
            && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            return CheckpointFile::read(file, journal, limit, true);
        }
        match regular_file::open(path, Links::Refuse) {
            Ok((file, _)) => CheckpointFile::read(file, journal, limit, false),
            Err(_) => CheckpointFile::unnamed(journal, limit),
        }
    }

    /// Opens what is there to be read, if there is anything.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn open_to_read(
        path: &Path,
        journal: u64,
        limit: PageLimit,
    ) -> Result<CheckpointFile, CheckpointError> {
        match regular_file::open(path, Links::Refuse) {
            Ok((file, _)) => CheckpointFile::read(file, journal, limit, false),
            Err(ReadError::File { source, .. }) => Err(source.into()),
            Err(_) => Err(CheckpointError::Damaged("it is no regular file")),
        }
    }

    /// A file that is gone with the program.
    ///
    /// # Errors
    ///
    /// There is no room for one.
    pub fn unnamed(journal: u64, limit: PageLimit) -> Result<CheckpointFile, CheckpointError> {
        CheckpointFile::read(tempfile::tempfile()?, journal, limit, true)
    }

    fn read(
        file: File,
        journal: u64,
        limit: PageLimit,
        open: bool,
    ) -> Result<CheckpointFile, CheckpointError> {
        let seed = random_number().map_err(io::Error::other)?;
        let mut found = CheckpointFile {
            file,
            limit,
            journal,
            open,
            end: FILE_HEAD_BYTES as u64,
            check: 0,
            heads: Vec::new(),
            kept: Vec::new(),
            groups: Vec::new(),
            unpacked: Unpacked::new(),
            draft: Draft {
                pages: Vec::with_capacity(GROUP_BYTES),
                at: 0,
                groups: Vec::new(),
                compressor: zstd::bulk::Compressor::new(LEVEL)?,
            },
            last: PageTable::default(),
            names: BTreeMap::new(),
            seed,
        };
        let head = found.file_head();
        found.check = xxh3_64(&head);
        let mut there = [0; FILE_HEAD_BYTES];
        let whole = found.file.read_exact_at(&mut there, 0).is_ok() && there == head;
        if whole {
            while found.read_checkpoint().is_some() {}
        } else if open {
            found.file.set_len(0)?;
            found.file.write_all_at(&head, 0)?;
        }
        if open {
            found.file.set_len(found.end)?;
        }
        found.begin_draft();
        Ok(found)
    }

    fn file_head(&self) -> [u8; FILE_HEAD_BYTES] {
        let mut head = [0; FILE_HEAD_BYTES];
        head[..8].copy_from_slice(&MAGIC);
        head[8..12].copy_from_slice(&VERSION.to_le_bytes());
        head[16..24].copy_from_slice(&self.journal.to_le_bytes());
        let check = xxh3_64(&head[..24]);
        head[24..].copy_from_slice(&check.to_le_bytes());
        head
    }

    /// Reads the checkpoint at the end of what was read; `None` if there is none that is whole.
    fn read_checkpoint(&mut self) -> Option<()> {
        let mut bytes = [0; CHECKPOINT_HEAD_BYTES];
        self.file.read_exact_at(&mut bytes, self.end).ok()?;
        let (head, check) = Head::from_bytes(&bytes, self.check)?;
        let groups_at = self.end + CHECKPOINT_HEAD_BYTES as u64;
        let end = groups_at.checked_add(head.body_bytes()?)?;
        if end > self.file.metadata().ok()?.len() {
            return None;
        }
        let is_late = self
            .heads
            .last()
            .is_some_and(|last| last.exits >= head.exits);
        if is_late || head.directory_bytes.max(head.core_bytes) > PACKED_BYTES_MAX {
            return None;
        }
        let directory_at = groups_at + head.groups_bytes;
        let mut packed = vec![0; head.directory_bytes as usize];
        self.file.read_exact_at(&mut packed, directory_at).ok()?;
        if xxh3_64(&packed) != head.directory_check {
            return None;
        }
        let directory = self.unpack_directory(&packed)?;
        let mut at = groups_at;
        for (bytes, check) in &directory.groups {
            let (bytes, check) = (*bytes, *check);
            self.groups.push(Group { at, bytes, check });
            at += u64::from(bytes);
        }
        let changes = self.places(&directory.changes);
        let core_at = directory_at + u64::from(head.directory_bytes);
        let Some(changes) = changes.filter(|_| at == directory_at) else {
            self.groups
                .truncate(self.groups.len() - directory.groups.len());
            return None;
        };
        for (place, name) in &changes {
            self.last.set(*place, *name);
        }
        self.kept.push(Kept {
            changes,
            core_at,
            core_bytes: head.core_bytes,
            core_check: head.core_check,
        });
        self.heads.push(CheckpointHead {
            exits: head.exits,
            now: head.now,
        });
        (self.end, self.check) = (end, check);
        Some(())
    }

    fn unpack_directory(&self, packed: &[u8]) -> Option<Directory> {
        let bytes = zstd::bulk::decompress(packed, DIRECTORY_BYTES_MAX).ok()?;
        postcard::from_bytes(&bytes).ok()
    }

    /// The changes of a directory; `None` if there is a place that the machine cannot have, or a name of nothing.
    fn places(&self, changes: &[(u64, u64)]) -> Option<Vec<(PagePlace, PageName)>> {
        let names = self.groups.len() as u64 * GROUP_PAGES;
        let mut next = 0u64;
        let place = |(skipped, name): &(u64, u64)| {
            let number = next.checked_add(*skipped)?;
            next = number.checked_add(1)?;
            let place = match number.checked_sub(DISKS_FROM) {
                None => (number < self.limit.memory).then(|| PagePlace::in_memory(number))?,
                Some(number) => PagePlace::on_disks(number),
            };
            (*name <= names).then_some((place, PageName(*name)))
        };
        changes.iter().map(place).collect()
    }

    fn begin_draft(&mut self) {
        self.draft.pages.clear();
        self.draft.groups.clear();
        self.draft.at = self.end + CHECKPOINT_HEAD_BYTES as u64;
    }

    /// Where its checkpoints are, by ascending exit.
    pub fn heads(&self) -> &[CheckpointHead] {
        &self.heads
    }

    /// Whether more may be written to it.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Length of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.end
    }

    /// How many bytes a checkpoint has that is not the first one, on average; 0 if there is none.
    pub fn bytes_each(&self) -> u64 {
        let first = self.kept.first().map_or(0, |kept| kept.core_at);
        self.end.saturating_sub(first) / (self.kept.len() as u64).saturating_sub(1).max(1)
    }

    /// The pages at one of the checkpoints.
    fn table(&self, number: usize) -> PageTable {
        let mut table = PageTable::default();
        for (place, name) in self.kept[..=number].iter().flat_map(|kept| &kept.changes) {
            table.set(*place, *name);
        }
        table
    }

    fn core_bytes(&self, number: usize) -> Result<Vec<u8>, CheckpointError> {
        let kept = &self.kept[number];
        let mut packed = vec![0; kept.core_bytes as usize];
        self.file.read_exact_at(&mut packed, kept.core_at)?;
        match xxh3_64(&packed) == kept.core_check {
            true => Ok(packed),
            false => Err(CheckpointError::Damaged("a state has another check")),
        }
    }

    /// Compresses and writes the pages that wait.
    fn write_group(&mut self) -> Result<(), CheckpointError> {
        let packed = self.draft.compressor.compress(&self.draft.pages)?;
        self.file.write_all_at(&packed, self.draft.at)?;
        let check = xxh3_64(&packed);
        let group = Group {
            at: self.draft.at,
            bytes: packed.len() as u32,
            check,
        };
        let number = self.groups.len() as u64;
        self.groups.push(group);
        self.draft.groups.push((group.bytes, check));
        self.draft.at += packed.len() as u64;
        let pages = std::mem::replace(&mut self.draft.pages, Vec::with_capacity(GROUP_BYTES));
        self.unpacked.keep(number, pages);
        Ok(())
    }

    fn append_packed(
        &mut self,
        at: CheckpointHead,
        core: &[u8],
        pages: &PageTable,
    ) -> Result<(), CheckpointError> {
        if !self.draft.pages.is_empty() {
            self.write_group()?;
        }
        let changes = self.last.changes_to(pages);
        let mut next = 0;
        let relative = changes.iter().map(|(place, name)| {
            let number = match place.number() {
                Ok(number) => number,
                Err(number) => DISKS_FROM + number,
            };
            let skipped = number - next;
            next = number + 1;
            (skipped, name.0)
        });
        let directory = Directory {
            changes: relative.collect(),
            groups: std::mem::take(&mut self.draft.groups),
        };
        let directory = postcard::to_stdvec(&directory).expect("plain values serialise");
        let directory = self.draft.compressor.compress(&directory)?;
        let groups_at = self.end + CHECKPOINT_HEAD_BYTES as u64;
        let directory_at = self.draft.at;
        self.file.write_all_at(&directory, directory_at)?;
        let core_at = directory_at + directory.len() as u64;
        self.file.write_all_at(core, core_at)?;
        let head = Head {
            exits: at.exits,
            now: at.now,
            groups_bytes: directory_at - groups_at,
            directory_bytes: directory.len() as u32,
            core_bytes: core.len() as u32,
            directory_check: xxh3_64(&directory),
            core_check: xxh3_64(core),
        };
        let (bytes, check) = head.to_bytes(self.check);
        self.file.write_all_at(&bytes, self.end)?;
        self.kept.push(Kept {
            changes,
            core_at,
            core_bytes: head.core_bytes,
            core_check: head.core_check,
        });
        self.heads.push(at);
        self.last = pages.clone();
        (self.end, self.check) = (core_at + core.len() as u64, check);
        self.begin_draft();
        Ok(())
    }

    /// A failure may have left a group without a checkpoint, whose names are then those of others.
    fn closed_after<T>(
        &mut self,
        result: Result<T, CheckpointError>,
    ) -> Result<T, CheckpointError> {
        if result.is_err() {
            self.open = false;
        }
        result
    }

    /// The same recording's checkpoints of which `keep` says that they stay, in a file that takes the place of the one at
    /// `path`. The one before is as it was until then, and for whoever has it open.
    ///
    /// # Errors
    ///
    /// It cannot be read, or there is no room for the other.
    pub fn thinned(
        &mut self,
        path: &Path,
        keep: impl Fn(usize) -> bool,
    ) -> Result<CheckpointFile, CheckpointError> {
        let unfinished = Unfinished::beside(path, 0o666)?;
        let file = unfinished.file().try_clone()?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(CheckpointError::InUse);
        }
        let mut thin = CheckpointFile::read(file, self.journal, self.limit, true)?;
        let mut renamed: BTreeMap<PageName, PageName> = BTreeMap::new();
        let (mut before, mut pages) = (PageTable::default(), PageTable::default());
        let mut bytes = [0; PAGE_BYTES];
        for number in (0..self.heads.len()).filter(|number| keep(*number)) {
            let table = self.table(number);
            let mut changes = before.changes_to(&table);
            changes.sort_unstable_by_key(|(place, name)| (*name, *place));
            for (place, name) in changes {
                let new = match renamed.get(&name) {
                    _ if name == PageName::ZEROES => name,
                    Some(new) => *new,
                    None => {
                        self.page(name, &mut bytes)?;
                        let new = thin.name(&bytes)?;
                        renamed.insert(name, new);
                        new
                    }
                };
                pages.set(place, new);
            }
            before = table;
            thin.append_packed(self.heads[number], &self.core_bytes(number)?, &pages)?;
        }
        unfinished.put(path, true)?;
        Ok(thin)
    }

    fn page(&mut self, name: PageName, into: &mut [u8; PAGE_BYTES]) -> Result<(), CheckpointError> {
        let Some(number) = name.0.checked_sub(1) else {
            into.fill(0);
            return Ok(());
        };
        let (group, page) = (number / GROUP_PAGES, number % GROUP_PAGES);
        if !self.unpacked.has(group) {
            let place = self.groups.get(group as usize);
            let place = *place
                .filter(|place| {
                    place.bytes as usize <= zstd::zstd_safe::compress_bound(GROUP_BYTES)
                })
                .ok_or(CheckpointError::Damaged("there is no such page"))?;
            let mut packed = vec![0; place.bytes as usize];
            self.file.read_exact_at(&mut packed, place.at)?;
            if xxh3_64(&packed) != place.check {
                return Err(CheckpointError::Damaged("pages have another check"));
            }
            let pages = zstd::bulk::decompress(&packed, GROUP_BYTES)?;
            self.unpacked.keep(group, pages);
        }
        let pages = self.unpacked.get(group).expect("it was kept");
        let bytes = pages.as_chunks::<PAGE_BYTES>().0.get(page as usize);
        *into = *bytes.ok_or(CheckpointError::Damaged("there is no such page"))?;
        Ok(())
    }

    fn name(&mut self, bytes: &[u8; PAGE_BYTES]) -> Result<PageName, CheckpointError> {
        let hash = xxh3_128_with_seed(bytes, self.seed);
        if let Some(name) = self.names.get(&hash) {
            return Ok(*name);
        }
        let page = (self.draft.pages.len() / PAGE_BYTES) as u64;
        let name = PageName(1 + self.groups.len() as u64 * GROUP_PAGES + page);
        self.draft.pages.extend(bytes);
        if self.draft.pages.len() == GROUP_BYTES {
            self.write_group()?;
        }
        self.names.insert(hash, name);
        Ok(name)
    }
}

/// In a directory pages on disks are numbered from here on.
const DISKS_FROM: u64 = 1 << 52;

impl<C, S> Checkpoints<C, S> for CheckpointFile
where
    C: Serialize + DeserializeOwned,
    S: Serialize + DeserializeOwned,
{
    type Error = CheckpointError;

    fn heads(&self) -> &[CheckpointHead] {
        CheckpointFile::heads(self)
    }

    fn load(&mut self, number: usize) -> Result<(CoreState<C, S>, PageTable), CheckpointError> {
        let packed = self.core_bytes(number)?;
        let bytes = zstd::bulk::decompress(&packed, CORE_BYTES_MAX)?;
        let core = postcard::from_bytes(&bytes);
        let core = core.map_err(|_| CheckpointError::Damaged("a state does not decode"))?;
        Ok((core, self.table(number)))
    }

    fn read_page(
        &mut self,
        name: PageName,
        into: &mut [u8; PAGE_BYTES],
    ) -> Result<(), CheckpointError> {
        self.page(name, into)
    }

    fn put_page(&mut self, bytes: &[u8; PAGE_BYTES]) -> Result<PageName, CheckpointError> {
        let named = self.name(bytes);
        self.closed_after(named)
    }

    fn append(
        &mut self,
        at: CheckpointHead,
        core: &CoreState<C, S>,
        pages: &PageTable,
    ) -> Result<(), CheckpointError> {
        let bytes = postcard::to_stdvec(core).expect("plain values serialise");
        let packed = self.draft.compressor.compress(&bytes);
        let appended = match packed {
            Ok(packed) => self.append_packed(at, &packed, pages),
            Err(error) => Err(error.into()),
        };
        self.closed_after(appended)
    }

    fn is_open(&self) -> bool {
        CheckpointFile::is_open(self)
    }
}
