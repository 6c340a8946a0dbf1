//! Reading ext2, ext3 and ext4 as they are found: in use, with a journal that was not yet brought home.
//!
//! Nobody has unmounted the file system of a machine that is looked at in the middle of its life. What it is then
//! stands partly in its journal ([`journal`]) and partly in what has been committed fast ([`fast_commit`]); both are
//! read here as a layer over the blocks, and nothing is ever written.
//!
//! No crate does this: ext4-view reads no journal of an ext3 or of an ext4 older than 2016, follows none over its
//! end, and refuses six features; rust-fs-ext4 refuses fast commits, and is a driver that writes, with an
//! interface for C. Both trust numbers in the file system for how much they read. Here every number is the
//! guest's word: what is read in all is bounded ([`Budget`]), and what is kept is bounded by what
//! one directory, one file's pieces and one journal can be.

mod directory;
mod fast_commit;
mod inode;
mod journal;
mod mapping;
mod superblock;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use thiserror::Error;

use super::budget::Budget;

use fast_commit::FastCommits;
use superblock::Superblock;

pub(super) use inode::{Inode, Kind};
pub(super) use mapping::Piece;

/// The root directory.
pub(super) const ROOT: u32 = 2;
/// Blocks of metadata that are kept.
const CACHED_BLOCKS: usize = 256;

/// Why something was not read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExtError {
    /// The disk cannot be read.
    #[error("{0}")]
    Source(String),
    /// It is not damaged, but nothing here reads it.
    #[error("{0}")]
    Unsupported(String),
    /// It is not as a file system can be.
    #[error("{0}")]
    Damaged(String),
    /// More had to be read than a file system of its size can have.
    #[error("it leads to more than a file system of its size can have; it is damaged")]
    TooMuch,
}

/// Where a file system's bytes come from.
pub trait Source {
    /// How many there are.
    fn bytes(&self) -> u64;
    /// Fills `into` with what is at `offset`, all of which is there.
    fn read_within(&self, offset: u64, into: &mut [u8]) -> Result<(), ExtError>;

    /// The same; an error if not all of it is there. The guest may have written any numbers to where the file system is
    /// described.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), ExtError> {
        let end = offset.checked_add(into.len() as u64);
        match end.is_some_and(|end| end <= self.bytes()) {
            true => self.read_within(offset, into),
            false => Err(ExtError::Damaged("it reaches beyond its end".into())),
        }
    }
}

/// A block whose newest content stands in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Newer {
    /// Where, in bytes.
    offset: u64,
    /// Its first four bytes, which are the journal's own magic number, are zeroes there.
    escaped: bool,
}

/// A file system, as a kernel would find it when it mounts it.
pub(super) struct FileSystem<S> {
    source: S,
    superblock: Superblock,
    newer: BTreeMap<u64, Newer>,
    fast: FastCommits,
    budget: Rc<Budget>,
    cache: RefCell<BTreeMap<u64, Rc<[u8]>>>,
}

impl<S: Source> FileSystem<S> {
    /// Finds the file system and reads its journal; `None` if there is none.
    pub(super) fn open(source: S, budget: Rc<Budget>) -> Result<Option<FileSystem<S>>, ExtError> {
        let Some(superblock) = Superblock::read(&source)? else {
            return Ok(None);
        };
        let mut system = FileSystem {
            source,
            superblock,
            newer: BTreeMap::new(),
            fast: FastCommits::default(),
            budget,
            cache: RefCell::default(),
        };
        if let Some(inode) = system.superblock.journal()? {
            let recovered = journal::read(&system, inode)
                .map_err(|error| in_the(error, "its journal cannot be read"))?;
            (system.newer, system.cache) = (recovered.newer, RefCell::default());
            // The superblock itself may be in the journal.
            let mut raw = [0; superblock::BYTES];
            system.read(superblock::OFFSET, &mut raw)?;
            let again = Superblock::parse(&raw, system.source.bytes())?;
            system.superblock = again
                .filter(|again| again.block_bytes == system.superblock.block_bytes)
                .ok_or_else(|| ExtError::Damaged("its journal replaces its superblock".into()))?;
            system.fast = FastCommits::read(&system, recovered.fast)
                .map_err(|error| in_the(error, "its fast commits cannot be read"))?;
        }
        Ok(Some(system))
    }

    /// Whether there seems to be one.
    pub(super) fn is_there(source: &S) -> Result<bool, ExtError> {
        Ok(!matches!(Superblock::read(source), Ok(None)))
    }

    /// Whether these bytes stand where they are, and not in the journal.
    pub(super) fn is_in_place(&self, offset: u64, bytes: u64) -> bool {
        let block = self.superblock.block_bytes;
        let blocks = offset / block..offset.saturating_add(bytes).div_ceil(block);
        self.newer.range(blocks).next().is_none()
    }

    /// Fills `into` with what is at `offset`, or is to be there.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), ExtError> {
        if self.is_in_place(offset, into.len() as u64) {
            return self.source.read_at(offset, into);
        }
        let block_bytes = self.superblock.block_bytes;
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let within = at % block_bytes;
            let count = (block_bytes - within).min((into.len() - done) as u64) as usize;
            let part = &mut into[done..done + count];
            match self.newer.get(&(at / block_bytes)) {
                None => self.source.read_at(at, part)?,
                Some(newer) => {
                    self.source.read_at(newer.offset + within, part)?;
                    if newer.escaped {
                        for (to, from) in part
                            .iter_mut()
                            .zip(journal::MAGIC.iter().skip(within as usize))
                        {
                            *to = *from;
                        }
                    }
                }
            }
            done += count;
        }
        Ok(())
    }

    /// Counts bytes of metadata, of which no more are read than a sound file system could ask for.
    fn charge(&self, bytes: u64) -> Result<(), ExtError> {
        if self.budget.metadata(bytes) {
            Ok(())
        } else {
            Err(ExtError::TooMuch)
        }
    }

    /// A block of metadata.
    fn block(&self, block: u64) -> Result<Rc<[u8]>, ExtError> {
        // One that is kept costs time too.
        self.charge(64)?;
        if let Some(found) = self.cache.borrow().get(&block) {
            return Ok(found.clone());
        }
        let offset = self.superblock.offset_of(block)?;
        self.charge(self.superblock.block_bytes)?;
        let mut bytes = vec![0; self.superblock.block_bytes as usize];
        self.read(offset, &mut bytes)?;
        let bytes: Rc<[u8]> = bytes.into();
        let mut cache = self.cache.borrow_mut();
        if cache.len() >= CACHED_BLOCKS {
            cache.clear();
        }
        cache.insert(block, bytes.clone());
        Ok(bytes)
    }

    /// `count` bytes of metadata within a block.
    fn within_block(&self, offset: u64, count: usize) -> Result<Vec<u8>, ExtError> {
        let block = self.block(offset / self.superblock.block_bytes)?;
        let start = (offset % self.superblock.block_bytes) as usize;
        let found = block.get(start..start + count);
        found.map(<[u8]>::to_vec).ok_or_else(|| {
            ExtError::Damaged("something that lies within a block would leave it".into())
        })
    }
}

impl<S> std::fmt::Debug for FileSystem<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileSystem")
            .field("superblock", &self.superblock)
            .field("newer", &self.newer.len())
            .finish_non_exhaustive()
    }
}

/// The same error, with what was being done.
fn in_the(error: ExtError, what: &str) -> ExtError {
    match error {
        ExtError::Damaged(why) => ExtError::Damaged(format!("{what}: {why}")),
        ExtError::Unsupported(why) => ExtError::Unsupported(format!("{what}: {why}")),
        other => other,
    }
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|index| bytes[at + index]))
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(std::array::from_fn(|index| bytes[at + index]))
}
