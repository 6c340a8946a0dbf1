//! The files of a disk that are not as they were when the machine was switched on.
//!
//! An ext2, ext3 or ext4 file system, on the whole disk or on a partition, is read twice, from the image and
//! as the guest has left it, its journal included ([`ext`]), and the two are compared name by name ([`compare`]).
//! What a running guest still has in its memory alone is not there yet.
//!
//! [`ext`]: super::ext
//! [`compare`]: super::compare

use std::collections::BTreeMap;
use std::rc::Rc;

use serde::Serialize;

use super::budget::Budget;
use super::compare::{Compared, Untouched, compare};
use super::ext::{ExtError, FileSystem, Source};
use super::partitions::{Partition, partitions};
use super::{OpenImage, SharedDisks};

const NO_FILE_SYSTEM: &str = "there is no ext2, ext3 or ext4 file system";

/// What has become of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// It was not there.
    Added,
    /// It is not there any more.
    Removed,
    /// It is another.
    Modified,
}

/// A file that has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileChange {
    /// What has become of it.
    pub change: Change,
    /// The partition that it is on: the 1 of `vda1`. `None` if the file system has the whole disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition: Option<u32>,
    /// Where it is in its file system: as it is if that can be printed, else with Rust's escapes.
    pub path: String,
    /// What is not as it was: `content`, `size`, `mode`, `owner`, `time`.
    pub what: Vec<&'static str>,
}

/// What can be said of a disk's files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Files {
    /// These have changed, in the order of partitions and of names; `None` if nothing could be compared.
    pub changed: Option<Vec<FileChange>>,
    /// Why nothing is known of the disk, or of one of its partitions.
    pub unknown: Vec<String>,
}

impl Files {
    /// Adds what was found on the disk, or on one of its partitions.
    fn add(&mut self, partition: Option<u32>, found: Result<Compared, String>) {
        let notes = match found {
            Ok(compared) => {
                let changes = compared.changes.into_iter().map(|change| FileChange {
                    partition,
                    ..change
                });
                self.changed.get_or_insert_default().extend(changes);
                compared.notes
            }
            Err(why) => vec![why],
        };
        self.unknown
            .extend(notes.into_iter().map(|why| match partition {
                None => why,
                Some(number) => format!("partition {number}: {why}"),
            }));
    }
}

/// Compares the files that are on a machine's disk with those on its image.
pub fn changed_files(disks: &SharedDisks, disk: usize) -> Files {
    let (image, bytes) = {
        let disks = disks.look();
        let Some(image) = disks.image(disk) else {
            let mut files = Files::default();
            files.add(None, Err("there is no such disk".into()));
            return files;
        };
        (image.clone(), image.image.bytes)
    };
    let whole = |content| Reader {
        content,
        offset: 0,
        bytes,
    };
    let before = whole(When::Start(image));
    let now = whole(When::Present(disks.clone(), disk));
    let untouched = |was, is, bytes| was == is && !disks.look().has_written(disk, is, bytes);
    changes(&before, &now, &untouched)
}

/// A disk, or a part of one, at one of two times.
pub trait Medium: Source + Clone {
    /// A part of it.
    fn part(&self, offset: u64, bytes: u64) -> Self;
}

/// Compares the files of a disk as it was with those that are on it now: those of a file system that has the whole
/// disk, and those of its partitions. `untouched` knows which bytes of the disk are the same without their being
/// read.
pub fn changes<M: Medium>(before: &M, now: &M, untouched: Untouched<'_>) -> Files {
    let mut files = Files::default();
    if let Err(why) = compare_disk(before, now, untouched, &mut files) {
        files.add(None, Err(why.to_string()));
    }
    files
}

fn compare_disk<M: Medium>(
    before: &M,
    now: &M,
    untouched: Untouched<'_>,
    files: &mut Files,
) -> Result<(), ExtError> {
    let budget = Rc::new(Budget::new(before.bytes().max(now.bytes())));
    let whole = FileSystem::is_there(before)? || FileSystem::is_there(now)?;
    if whole {
        let both = (Some(before.clone()), Some(now.clone()));
        files.add(None, compare_parts(both, untouched, &budget));
    }
    let both = both_tables(before, now)?;
    if both.is_empty() && !whole {
        files.add(None, Err(NO_FILE_SYSTEM.into()));
    }
    for pair in both {
        let part = |medium: &M, partition: Option<Partition>| {
            partition.map(|partition| medium.part(partition.offset, partition.bytes))
        };
        let both = (part(before, pair.old), part(now, pair.new));
        // Both begin in the same place if there are both.
        let start = pair
            .new
            .or(pair.old)
            .map_or(0, |partition| partition.offset);
        let untouched = |was, is, bytes| untouched(start + was, start + is, bytes);
        files.add(pair.number(), compare_parts(both, &untouched, &budget));
    }
    Ok(())
}

/// A partition as it was and as it is; one of the two if it is gone, or new.
#[derive(Default)]
struct Pair {
    old: Option<Partition>,
    new: Option<Partition>,
}

impl Pair {
    fn number(&self) -> Option<u32> {
        self.new.or(self.old).map(|partition| partition.number)
    }
}

/// The partitions that the disk had, beside those that it has, in the order of their numbers. Two that begin
/// in the same place are the same: one may have grown, or have another number.
fn both_tables<M: Medium>(before: &M, now: &M) -> Result<Vec<Pair>, ExtError> {
    let find = |medium: &M| partitions(medium.bytes(), |offset, into| medium.read_at(offset, into));
    let mut both: BTreeMap<u64, Pair> = BTreeMap::new();
    for partition in find(before)? {
        both.entry(partition.offset).or_default().old = Some(partition);
    }
    for partition in find(now)? {
        both.entry(partition.offset).or_default().new = Some(partition);
    }
    let mut both: Vec<Pair> = both.into_values().collect();
    both.sort_by_key(Pair::number);
    Ok(both)
}

/// Compares a file system that was there, is there, or both.
fn compare_parts<M: Medium>(
    (before, now): (Option<M>, Option<M>),
    untouched: Untouched<'_>,
    budget: &Rc<Budget>,
) -> Result<Compared, String> {
    let open = |medium| FileSystem::open(medium, budget.clone());
    let load = |medium: Option<M>, what| match medium.map(open) {
        Some(Ok(system)) => Ok(system),
        Some(Err(error)) => Err(format!("{what} cannot be read: {error}")),
        None => Ok(None),
    };
    let before = load(before, "the file system on its image")?;
    let now = load(now, "the file system that the guest has left")?;
    if before.is_none() && now.is_none() {
        return Err(NO_FILE_SYSTEM.into());
    }
    Ok(compare(before, now, untouched, budget))
}

/// A disk of a machine at one of two times, or a part of it.
#[derive(Clone)]
struct Reader {
    content: When,
    /// Where it begins on the disk.
    offset: u64,
    bytes: u64,
}

#[derive(Clone)]
enum When {
    /// When the machine was switched on.
    Start(OpenImage),
    /// As the machine has it now.
    Present(SharedDisks, usize),
}

impl Source for Reader {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_within(&self, offset: u64, into: &mut [u8]) -> Result<(), ExtError> {
        let offset = self.offset + offset;
        let read = match &self.content {
            When::Start(image) => image
                .read_at(offset, into)
                .map_err(|error| error.to_string()),
            When::Present(disks, disk) => {
                let read = disks.look().peek(*disk, offset, into);
                read.map_err(|error| error.to_string())
            }
        };
        read.map_err(ExtError::Source)
    }
}

impl Medium for Reader {
    fn part(&self, offset: u64, bytes: u64) -> Reader {
        Reader {
            content: self.content.clone(),
            offset: self.offset + offset,
            bytes,
        }
    }
}

#[cfg(test)]
pub(super) mod testing {
    //! A disk in memory.

    use super::*;

    #[derive(Clone)]
    pub(crate) struct Memory {
        data: Rc<Vec<u8>>,
        offset: u64,
        bytes: u64,
    }

    impl Memory {
        pub(crate) fn new(data: Vec<u8>) -> Memory {
            Memory {
                bytes: data.len() as u64,
                data: Rc::new(data),
                offset: 0,
            }
        }
    }

    impl Source for Memory {
        fn bytes(&self) -> u64 {
            self.bytes
        }

        fn read_within(&self, offset: u64, into: &mut [u8]) -> Result<(), ExtError> {
            let start = (self.offset + offset) as usize;
            into.copy_from_slice(&self.data[start..start + into.len()]);
            Ok(())
        }
    }

    impl Medium for Memory {
        fn part(&self, offset: u64, bytes: u64) -> Memory {
            let offset = self.offset + offset;
            Memory {
                data: self.data.clone(),
                offset,
                bytes,
            }
        }
    }
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
