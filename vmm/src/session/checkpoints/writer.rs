//! Writes checkpoints, beside the replay that makes them: what is compressed there would hold it up.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use hindsight_replay::{CheckpointHead, PAGE_BYTES, PagePlace, PageSource, is_zero};
use xxhash_rust::xxh64::xxh64;

use super::CheckpointError;
use super::format::{Directory, GROUP_BYTES, GROUP_PAGES, HEAD_BYTES, Head, check_of};
use super::table::{PageName, PageTable};

/// zstd's fastest level but one.
const LEVEL: i32 = 1;
/// The file is written in pieces of about this length.
const PIECE_BYTES: usize = 1 << 20;
/// How many pages are handed over at a time.
const HANDED_PAGES: usize = 64;
/// And how many times that may wait, 128 MiB: a kernel that boots writes to many pages in a short time.
const WAITING_MAX: usize = 512;

/// So many batches that were written are kept to be filled again: to get their memory anew costs more than to fill it.
const EMPTIES_MAX: usize = 64;

/// Some pages, and where they are.
#[derive(Default)]
pub(super) struct Batch {
    places: Vec<PagePlace>,
    pages: Vec<[u8; PAGE_BYTES]>,
}

impl Batch {
    /// Takes as many as are handed over at a time, or the rest of them. Whether there may be more.
    pub(super) fn fill<E>(&mut self, source: &mut PageSource<'_, E>) -> Result<bool, E> {
        self.places.clear();
        self.pages.resize(HANDED_PAGES, [0; PAGE_BYTES]);
        // Read to where it stays: whoever replays waits for it.
        for page in &mut self.pages {
            match source(page) {
                Some(place) => self.places.push(place?),
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// A group of pages in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub(super) at: u64,
    pub(super) bytes: u32,
    pub(super) check: u64,
}

/// A checkpoint in the file.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) changes: Vec<(PagePlace, PageName)>,
    pub(super) core_at: u64,
    pub(super) core_bytes: u32,
    pub(super) core_check: u64,
    /// See [`Directory::notes`].
    pub(super) notes: Vec<u8>,
    /// Of its head, which covers all of it and all before it.
    pub(super) check: u64,
}

/// A checkpoint but for its pages.
pub(super) struct Rest {
    pub(super) head: CheckpointHead,
    /// Its state.
    pub(super) core: Vec<u8>,
    pub(super) notes: Vec<u8>,
}

/// What is to be done.
enum Job {
    /// A checkpoint begins, whose pages are those of a table but for what follows; without one, those of the last.
    Begin(Option<PageTable>),
    Pages(Batch),
    /// Its pages are complete, and this is the rest, its state not compressed.
    End(Rest),
    /// Says that all before was done.
    Settle(Sender<()>),
}

/// What a checkpoint has added to the file.
pub(super) type Appended = (Kept, Vec<Group>);

/// Writes checkpoints at the end of a file.
pub(super) struct Writer {
    file: File,
    /// Where the next checkpoint comes.
    end: u64,
    /// The check of the last head.
    check: u64,
    /// The pages at the last checkpoint.
    last: PageTable,
    /// How many groups there are.
    groups: u64,
    compressor: zstd::bulk::Compressor<'static>,
    /// Pages by two hashes whose seeds were drawn: no guest can know which two would be taken for one.
    names: BTreeMap<(u64, u64), PageName>,
    seeds: (u64, u64),
    /// Pages of the group that is not full.
    pages: Vec<u8>,
    /// What was compressed and not written, and where it comes.
    packed: Vec<u8>,
    packed_at: u64,
    added: Vec<Group>,
    /// The pages that are not those of the last checkpoint; or all of them.
    changes: Vec<(PagePlace, PageName)>,
    table: Option<PageTable>,
}

impl Writer {
    /// A writer for `file`, whose last checkpoint ends at `end`, has a head with this check, and these pages; there are so
    /// many groups.
    pub(super) fn new(
        file: File,
        end: u64,
        check: u64,
        last: PageTable,
        groups: u64,
        seeds: (u64, u64),
    ) -> Result<Writer, CheckpointError> {
        Ok(Writer {
            file,
            end,
            check,
            last,
            groups,
            compressor: zstd::bulk::Compressor::new(LEVEL)?,
            names: BTreeMap::new(),
            seeds,
            pages: Vec::with_capacity(GROUP_BYTES),
            packed: Vec::new(),
            packed_at: end + HEAD_BYTES as u64,
            added: Vec::new(),
            changes: Vec::new(),
            table: None,
        })
    }

    /// Where the file ends.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// A checkpoint begins.
    pub(super) fn begin(&mut self, table: Option<PageTable>) {
        self.table = table;
        self.changes.clear();
    }

    /// One of its pages.
    pub(super) fn page(
        &mut self,
        place: PagePlace,
        bytes: &[u8; PAGE_BYTES],
    ) -> Result<(), CheckpointError> {
        let name = match is_zero(bytes) {
            true => PageName::ZEROES,
            false => self.name(bytes)?,
        };
        self.is_called(place, name);
        Ok(())
    }

    /// One of its pages holds what it holds at power-on.
    pub(super) fn as_at_power_on(&mut self, place: PagePlace) {
        self.is_called(place, PageName::POWER_ON);
    }

    fn is_called(&mut self, place: PagePlace, name: PageName) {
        match &mut self.table {
            Some(table) => table.set(place, name),
            None if self.last.get(place) == name => {}
            None => self.changes.push((place, name)),
        }
    }

    fn name(&mut self, bytes: &[u8; PAGE_BYTES]) -> Result<PageName, CheckpointError> {
        let hash = (xxh64(bytes, self.seeds.0), xxh64(bytes, self.seeds.1));
        if let Some(name) = self.names.get(&hash) {
            return Ok(*name);
        }
        let page = (self.pages.len() / PAGE_BYTES) as u64;
        let name = PageName(PageName::FIRST.0 + self.groups * GROUP_PAGES + page);
        self.pages.extend(bytes);
        if self.pages.len() == GROUP_BYTES {
            self.pack()?;
        }
        self.names.insert(hash, name);
        Ok(name)
    }

    /// Compresses the pages that wait.
    fn pack(&mut self) -> Result<(), CheckpointError> {
        let packed = self.compressor.compress(&self.pages)?;
        self.pages.clear();
        self.added.push(Group {
            at: self.packed_at + self.packed.len() as u64,
            bytes: packed.len() as u32,
            check: check_of(&packed),
        });
        self.groups += 1;
        self.packed.extend(packed);
        match self.packed.len() >= PIECE_BYTES {
            true => self.write(),
            false => Ok(()),
        }
    }

    fn write(&mut self) -> Result<(), CheckpointError> {
        self.file.write_all_at(&self.packed, self.packed_at)?;
        self.packed_at += self.packed.len() as u64;
        self.packed.clear();
        Ok(())
    }

    /// The checkpoint is complete. This is the rest of it, its state not compressed.
    pub(super) fn finish(&mut self, rest: Rest) -> Result<Appended, CheckpointError> {
        let core = self.compressor.compress(&rest.core)?;
        self.finish_packed(Rest { core, ..rest })
    }

    /// The same of a state that is compressed.
    pub(super) fn finish_packed(&mut self, rest: Rest) -> Result<Appended, CheckpointError> {
        let Rest {
            head: at,
            core,
            notes,
        } = rest;
        if !self.pages.is_empty() {
            self.pack()?;
        }
        let mut changes = std::mem::take(&mut self.changes);
        match self.table.take() {
            Some(table) => {
                changes = self.last.changes_to(&table);
                self.last = table;
            }
            None => {
                changes.sort_unstable_by_key(|(place, _)| *place);
                for (place, name) in &changes {
                    self.last.set(*place, *name);
                }
            }
        }
        let added = std::mem::take(&mut self.added);
        let groups = added.iter().map(|group| (group.bytes, group.check));
        let directory = Directory::new(groups.collect(), &changes, notes);
        let bytes = directory.to_bytes();
        let notes = directory.notes;
        let directory = self.compressor.compress(&bytes)?;
        let groups_at = self.end + HEAD_BYTES as u64;
        let directory_at = self.packed_at + self.packed.len() as u64;
        let core_at = directory_at + directory.len() as u64;
        self.packed.extend(&directory);
        self.packed.extend(&core);
        self.write()?;
        let head = Head {
            exits: at.exits,
            now: at.now,
            groups_bytes: directory_at - groups_at,
            directory_bytes: directory.len() as u32,
            core_bytes: core.len() as u32,
            cost: at.cost,
            directory_check: check_of(&directory),
            core_check: check_of(&core),
        };
        let (bytes, check) = head.to_bytes(self.check);
        // Last: what a kill leaves before is nothing.
        self.file.write_all_at(&bytes, self.end)?;
        (self.end, self.check) = (self.packed_at, check);
        self.packed_at += HEAD_BYTES as u64;
        let kept = Kept {
            changes,
            core_at,
            core_bytes: head.core_bytes,
            core_check: head.core_check,
            notes,
            check,
        };
        Ok((kept, added))
    }
}

/// A writer in a thread of its own.
#[derive(Debug)]
pub(super) struct Background {
    jobs: Option<SyncSender<Job>>,
    done: Receiver<Result<Appended, CheckpointError>>,
    empties: Receiver<Batch>,
    thread: Option<JoinHandle<()>>,
    end: Arc<AtomicU64>,
}

impl Background {
    pub(super) fn start(writer: Writer) -> Result<Background, CheckpointError> {
        let (jobs, wanted) = sync_channel(WAITING_MAX);
        let (report, done) = channel();
        let (written, empties) = sync_channel(EMPTIES_MAX);
        let end = Arc::new(AtomicU64::new(writer.end()));
        let shared = Arc::clone(&end);
        let thread = std::thread::Builder::new().name("checkpoints".into());
        let thread = thread.spawn(move || work(writer, &wanted, &report, &written, &shared))?;
        Ok(Background {
            jobs: Some(jobs),
            done,
            empties,
            thread: Some(thread),
            end,
        })
    }

    /// Where the file ends by now.
    pub(super) fn end(&self) -> u64 {
        self.end.load(Ordering::Relaxed)
    }

    fn send(&self, job: Job) -> Result<(), CheckpointError> {
        let jobs = self.jobs.as_ref().expect("it has not ended");
        jobs.send(job).map_err(|_| CheckpointError::Closed)
    }

    /// One that can be filled.
    pub(super) fn empty(&self) -> Batch {
        self.empties.try_recv().unwrap_or_default()
    }

    pub(super) fn begin(&self, table: Option<PageTable>) -> Result<(), CheckpointError> {
        self.send(Job::Begin(table))
    }

    pub(super) fn pages(&self, pages: Batch) -> Result<(), CheckpointError> {
        self.send(Job::Pages(pages))
    }

    pub(super) fn finish(&self, rest: Rest) -> Result<(), CheckpointError> {
        self.send(Job::End(rest))
    }

    /// What was done by now.
    pub(super) fn done(&self) -> impl Iterator<Item = Result<Appended, CheckpointError>> + '_ {
        self.done.try_iter()
    }

    /// Waits until all is done.
    pub(super) fn settle(&self) -> Result<(), CheckpointError> {
        let (settled, wait) = channel();
        self.send(Job::Settle(settled))?;
        wait.recv().map_err(|_| CheckpointError::Closed)
    }
}

impl Drop for Background {
    /// What was handed over is written.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was shown there.
            let _ = thread.join();
        }
    }
}

/// Does what is wanted until nobody wants more. After a failure nothing more is done.
fn work(
    mut writer: Writer,
    wanted: &Receiver<Job>,
    report: &Sender<Result<Appended, CheckpointError>>,
    empties: &SyncSender<Batch>,
    end: &AtomicU64,
) {
    let mut failed = false;
    for job in wanted {
        if let Job::Settle(settled) = job {
            let _ = settled.send(());
            continue;
        }
        if failed {
            continue;
        }
        let done = match job {
            Job::Begin(table) => {
                writer.begin(table);
                Ok(None)
            }
            Job::Pages(pages) => {
                let mut each = pages.places.iter().zip(&pages.pages);
                let written = each.try_for_each(|(place, page)| writer.page(*place, page));
                // There may be enough of them.
                let _ = empties.try_send(pages);
                written.map(|()| None)
            }
            Job::End(rest) => writer.finish(rest).map(Some),
            Job::Settle(_) => unreachable!("it was answered"),
        };
        end.store(writer.end(), Ordering::Relaxed);
        failed = done.is_err();
        if let Some(done) = done.transpose() {
            // Nobody may be there to hear it any more.
            let _ = report.send(done);
        }
    }
}
