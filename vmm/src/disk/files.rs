//! The files of a disk that are not as they were when the machine was switched on.
//!
//! An ext2, ext3 or ext4 file system is read twice, from the image and as the guest has left it, its
//! journal included, and the two trees are compared name by name. What a running guest still has in its
//! memory alone is not there yet.

use std::collections::BTreeMap;

use ext4_view::{Ext4, Ext4Error, Ext4Read, File, Metadata};
use serde::Serialize;

use super::{OpenImage, SharedDisks};

/// How deep directories may nest, and how many names there may be: a damaged file system can have a directory
/// in itself.
const DEPTH_MAX: usize = 512;
const NAMES_MAX: u64 = 50_000_000;
/// Where ext4 has its magic number, and what it is (Linux, Documentation/filesystems/ext4/super.rst).
const MAGIC_OFFSET: u64 = 1024 + 0x38;
const MAGIC: [u8; 2] = [0x53, 0xef];
/// Where a disk in partitions says so: the last two bytes of its first sector (UEFI 2.10, 5.2.1).
const PARTITIONS_OFFSET: u64 = 510;
const PARTITIONS: [u8; 2] = [0x55, 0xaa];

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
    /// Where it is: as it is if that can be printed, else with Rust's escapes.
    pub path: String,
    /// What is not as it was: `content`, `size`, `mode`, `owner`, `time`.
    pub what: Vec<&'static str>,
}

/// What can be said of a disk's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Files {
    /// These have changed, in the order of their names.
    Changed(Vec<FileChange>),
    /// Why nothing is known.
    Unknown(String),
}

/// Compares the files that are on the disk with those on its image.
pub fn changed_files(disks: &SharedDisks, disk: usize) -> Files {
    match compare(disks, disk) {
        Ok(changes) => Files::Changed(changes),
        Err(why) => Files::Unknown(why),
    }
}

fn compare(disks: &SharedDisks, disk: usize) -> Result<Vec<FileChange>, String> {
    let (image, bytes) = {
        let disks = disks.look();
        let image = disks.image(disk).ok_or("there is no such disk")?.clone();
        (image, disks.bytes(disk).unwrap_or(0))
    };
    let image = Reader {
        source: Source::Image(image),
        bytes,
    };
    let present = Reader {
        source: Source::Present(disks.clone(), disk),
        bytes,
    };
    let before = image.load("the file system on its image")?;
    let now = present.load("the file system that the guest has left")?;
    if before.is_none() && now.is_none() {
        let partitions = present.has(PARTITIONS_OFFSET, PARTITIONS)?;
        return Err(if partitions {
            "the disk is divided into partitions, and only file systems on a whole disk are read"
        } else {
            "there is no ext2, ext3 or ext4 file system on the disk"
        }
        .into());
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

/// The disk at one of two times.
struct Reader {
    source: Source,
    bytes: u64,
}

enum Source {
    /// When the machine was switched on.
    Image(OpenImage),
    /// Now.
    Present(SharedDisks, usize),
}

impl Reader {
    /// Whether `wanted` stands at `offset`.
    fn has(&self, offset: u64, wanted: [u8; 2]) -> Result<bool, String> {
        let mut found = [0; 2];
        if offset + 2 > self.bytes {
            return Ok(false);
        }
        self.read_at(offset, &mut found)
            .map_err(|error| error.to_string())?;
        Ok(found == wanted)
    }

    fn read_at(
        &self,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        // The guest may have written any numbers to where the file system is described.
        let end = offset.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.bytes) {
            return Err("it reaches beyond the end of the disk".into());
        }
        match &self.source {
            Source::Image(image) => image.read_at(offset, into)?,
            Source::Present(disks, disk) => disks.look().peek(*disk, offset, into)?,
        }
        Ok(())
    }

    /// The file system, if there is one.
    fn load(&self, what: &str) -> Result<Option<Ext4>, String> {
        if !self.has(MAGIC_OFFSET, MAGIC)? {
            return Ok(None);
        }
        let reader = Reader {
            source: match &self.source {
                Source::Image(image) => Source::Image(image.clone()),
                Source::Present(disks, disk) => Source::Present(disks.clone(), *disk),
            },
            bytes: self.bytes,
        };
        let loaded = Ext4::load(Box::new(reader));
        loaded
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
        let path = printable(path);
        self.changes.push(FileChange { change, path, what });
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
