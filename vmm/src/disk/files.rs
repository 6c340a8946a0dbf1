//! The files of a disk that are not as they were when the machine was switched on.
//!
//! An ext2, ext3 or ext4 file system, on the whole disk or on a partition, is read twice, from the image and
//! as the guest has left it, its journal included, and the two trees are compared name by name. What a running
//! guest still has in its memory alone is not there yet.

use std::collections::BTreeMap;

use ext4_view::{Ext4, Ext4Error, Ext4Read, File, Metadata};
use serde::Serialize;

use super::partitions::{Partition, partitions};
use super::{OpenImage, SharedDisks};

/// How deep directories may nest, and how many names there may be: a damaged file system can have a directory
/// in itself.
const DEPTH_MAX: usize = 512;
const NAMES_MAX: u64 = 50_000_000;
/// Where ext4 has its magic number, and what it is (Linux, Documentation/filesystems/ext4/super.rst).
const MAGIC_OFFSET: u64 = 1024 + 0x38;
const MAGIC: [u8; 2] = [0x53, 0xef];
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
    fn add(&mut self, partition: Option<u32>, found: Result<Vec<FileChange>, String>) {
        match (found, partition) {
            (Ok(changes), _) => {
                let changes = changes.into_iter().map(|change| FileChange {
                    partition,
                    ..change
                });
                self.changed.get_or_insert_default().extend(changes);
            }
            (Err(why), None) => self.unknown.push(why),
            (Err(why), Some(number)) => self.unknown.push(format!("partition {number}: {why}")),
        }
    }
}

/// Compares the files that are on the disk with those on its image: on the disk itself, or else on each of its
/// partitions.
pub fn changed_files(disks: &SharedDisks, disk: usize) -> Files {
    let mut files = Files::default();
    if let Err(why) = compare_disk(disks, disk, &mut files) {
        files.add(None, Err(why));
    }
    files
}

fn compare_disk(disks: &SharedDisks, disk: usize, files: &mut Files) -> Result<(), String> {
    let (image, bytes) = {
        let disks = disks.look();
        let image = disks.image(disk).ok_or("there is no such disk")?.clone();
        (image, disks.bytes(disk).unwrap_or(0))
    };
    let whole = |source| Reader {
        source,
        offset: 0,
        bytes,
    };
    let before = whole(Source::Image(image));
    let now = whole(Source::Present(disks.clone(), disk));
    if before.is_ext()? || now.is_ext()? {
        files.add(None, compare(Some(before), Some(now)));
        return Ok(());
    }
    let both = both_tables(&before, &now)?;
    if both.is_empty() {
        return Err(NO_FILE_SYSTEM.into());
    }
    for pair in both {
        let old = pair.old.map(|partition| before.of(partition));
        let new = pair.new.map(|partition| now.of(partition));
        files.add(pair.number(), compare(old, new));
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
fn both_tables(before: &Reader, now: &Reader) -> Result<Vec<Pair>, String> {
    let mut both: BTreeMap<u64, Pair> = BTreeMap::new();
    for partition in before.partitions()? {
        both.entry(partition.offset).or_default().old = Some(partition);
    }
    for partition in now.partitions()? {
        both.entry(partition.offset).or_default().new = Some(partition);
    }
    let mut both: Vec<Pair> = both.into_values().collect();
    both.sort_by_key(Pair::number);
    Ok(both)
}

/// Compares a file system that was there, is there, or both.
fn compare(before: Option<Reader>, now: Option<Reader>) -> Result<Vec<FileChange>, String> {
    let load = |reader: Option<Reader>, what| match reader {
        Some(reader) => reader.load(what),
        None => Ok(None),
    };
    let before = load(before, "the file system on its image")?;
    let now = load(now, "the file system that the guest has left")?;
    if before.is_none() && now.is_none() {
        return Err(NO_FILE_SYSTEM.into());
    }
    let mut comparison = Comparison {
        before,
        now,
        changes: Vec::new(),
        names: 0,
    };
    let both = (comparison.before.is_some(), comparison.now.is_some());
    comparison
        .directory(b"/", both, 0)
        .map_err(|error| format!("the file system cannot be read: {error}"))?;
    Ok(comparison.changes)
}

/// A disk at one of two times, or a partition of it.
#[derive(Clone)]
struct Reader {
    source: Source,
    /// Where it begins on the disk.
    offset: u64,
    bytes: u64,
}

#[derive(Clone)]
enum Source {
    /// When the machine was switched on.
    Image(OpenImage),
    /// Now.
    Present(SharedDisks, usize),
}

impl Reader {
    /// One of the disk's partitions.
    fn of(&self, partition: Partition) -> Reader {
        Reader {
            source: self.source.clone(),
            offset: partition.offset,
            bytes: partition.bytes,
        }
    }

    fn partitions(&self) -> Result<Vec<Partition>, String> {
        partitions(self.bytes, |offset, into| self.read_at(offset, into))
            .map_err(|error| error.to_string())
    }

    /// Whether it says that there is a file system.
    fn is_ext(&self) -> Result<bool, String> {
        let mut found = [0; MAGIC.len()];
        if MAGIC_OFFSET + MAGIC.len() as u64 > self.bytes {
            return Ok(false);
        }
        self.read_at(MAGIC_OFFSET, &mut found)
            .map_err(|error| error.to_string())?;
        Ok(found == MAGIC)
    }

    fn read_at(
        &self,
        start: u64,
        into: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        // The guest may have written any numbers to where the file system is described.
        let end = start.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.bytes) {
            return Err("it reaches beyond its end".into());
        }
        let offset = self.offset + start;
        match &self.source {
            Source::Image(image) => image.read_at(offset, into)?,
            Source::Present(disks, disk) => disks.look().peek(*disk, offset, into)?,
        }
        Ok(())
    }

    /// The file system, if there is one.
    fn load(self, what: &str) -> Result<Option<Ext4>, String> {
        if !self.is_ext()? {
            return Ok(None);
        }
        Ext4::load(Box::new(self))
            .map(Some)
            .map_err(|error| format!("{what} cannot be read: {error}"))
    }
}

impl Ext4Read for Reader {
    fn read(
        &mut self,
        start: u64,
        into: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.read_at(start, into)
    }
}

struct Comparison {
    before: Option<Ext4>,
    now: Option<Ext4>,
    changes: Vec<FileChange>,
    names: u64,
}

type Names = BTreeMap<Vec<u8>, Metadata>;

impl Comparison {
    /// Compares a directory that is there before, now, or both.
    fn directory(
        &mut self,
        path: &[u8],
        (before, now): (bool, bool),
        depth: usize,
    ) -> Result<(), Ext4Error> {
        if depth > DEPTH_MAX || self.names > NAMES_MAX {
            return Err(Ext4Error::PathTooLong);
        }
        let list = |there: bool, system: &Option<Ext4>| match system {
            Some(system) if there => names(system, path),
            _ => Ok(Names::new()),
        };
        let mut old = list(before, &self.before)?;
        let new = list(now, &self.now)?;
        self.names += (old.len() + new.len()) as u64;
        let mut all: BTreeMap<Vec<u8>, (Option<Metadata>, Option<Metadata>)> = BTreeMap::new();
        for (name, metadata) in new {
            let before = old.remove(&name);
            all.insert(name, (before, Some(metadata)));
        }
        all.extend(old.into_iter().map(|(name, old)| (name, (Some(old), None))));
        for (name, (old, new)) in all {
            let path = [path.strip_suffix(b"/").unwrap_or(path), b"/", &name].concat();
            self.name(&path, old, new, depth)?;
        }
        Ok(())
    }

    fn name(
        &mut self,
        path: &[u8],
        old: Option<Metadata>,
        new: Option<Metadata>,
        depth: usize,
    ) -> Result<(), Ext4Error> {
        let is_dir = |metadata: &Option<Metadata>| metadata.as_ref().is_some_and(Metadata::is_dir);
        let directories = (is_dir(&old), is_dir(&new));
        match (old, new) {
            (Some(old), Some(new)) if old.file_type() == new.file_type() => {
                let what = self.differences(path, &old, &new)?;
                if !what.is_empty() {
                    self.tell(Change::Modified, path, what);
                }
            }
            (old, new) => {
                if old.is_some() {
                    self.tell(Change::Removed, path, Vec::new());
                }
                if new.is_some() {
                    self.tell(Change::Added, path, Vec::new());
                }
            }
        }
        if directories == (false, false) {
            return Ok(());
        }
        self.directory(path, directories, depth + 1)
    }

    fn tell(&mut self, change: Change, path: &[u8], what: Vec<&'static str>) {
        self.changes.push(FileChange {
            change,
            partition: None,
            path: printable(path),
            what,
        });
    }

    /// What two files of one kind and name do not have in common. A directory's size and time say only that
    /// something in it has changed, which is told by itself.
    fn differences(
        &self,
        path: &[u8],
        old: &Metadata,
        new: &Metadata,
    ) -> Result<Vec<&'static str>, Ext4Error> {
        let time = |of: &Metadata| (of.modified().seconds(), of.modified().nanoseconds());
        let is_dir = old.is_dir();
        let same_size = old.len() == new.len();
        let mut what = Vec::new();
        if !is_dir && (!same_size || !self.same_content(path, old)?) {
            what.push("content");
        }
        for (name, differs) in [
            ("size", !is_dir && !same_size),
            ("mode", old.mode() != new.mode()),
            ("owner", (old.uid(), old.gid()) != (new.uid(), new.gid())),
            ("time", !is_dir && time(old) != time(new)),
        ] {
            if differs {
                what.push(name);
            }
        }
        Ok(what)
    }

    /// Whether two files of one kind, name and size have the same in them. All of both is read: a change
    /// need not show in the times, and blocks that were never written can have come from another file.
    fn same_content(&self, path: &[u8], metadata: &Metadata) -> Result<bool, Ext4Error> {
        let (Some(before), Some(now)) = (&self.before, &self.now) else {
            return Ok(false);
        };
        if metadata.is_symlink() {
            return Ok(before.read_link(path)? == now.read_link(path)?);
        }
        if !metadata.file_type().is_regular_file() {
            return Ok(true);
        }
        let mut files = (before.open(path)?, now.open(path)?);
        let mut buffers = (vec![0; 1 << 16], vec![0; 1 << 16]);
        loop {
            let old = fill(&mut files.0, &mut buffers.0)?;
            let new = fill(&mut files.1, &mut buffers.1)?;
            if buffers.0[..old] != buffers.1[..new] {
                return Ok(false);
            }
            if old == 0 {
                return Ok(true);
            }
        }
    }
}

/// Reads on until `into` is full or the file at its end.
fn fill(file: &mut File, into: &mut [u8]) -> Result<usize, Ext4Error> {
    let mut done = 0;
    while done < into.len() {
        match file.read_bytes(&mut into[done..])? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

fn names(system: &Ext4, path: &[u8]) -> Result<Names, Ext4Error> {
    let mut names = Names::new();
    for entry in system.read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let name: &[u8] = name.as_ref();
        if name != b"." && name != b".." {
            names.insert(name.to_vec(), entry.metadata()?);
        }
    }
    Ok(names)
}

/// A name that can be shown to a person: guests may choose any bytes.
fn printable(path: &[u8]) -> String {
    match std::str::from_utf8(path) {
        Ok(text) if !text.contains(char::is_control) => text.into(),
        _ => path.escape_ascii().to_string(),
    }
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
