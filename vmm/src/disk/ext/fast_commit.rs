//! What has been committed fast: changes told as such, and not as blocks (Linux,
//! Documentation/filesystems/ext4/journal.rst, "Fast Commits").
//!
//! Between two commits a file system with the feature `fast_commit` writes what an `fsync` needs to a few blocks at
//! the end of its journal: that an inode is now this, that a part of a file is now there, that a name was added or
//! removed. A kernel that mounts does these again; here they are kept beside the blocks and asked when an inode,
//! a file's pieces or a directory are read.

use std::collections::{BTreeMap, BTreeSet};

use super::inode::{MAP_BYTES, MAP_OFFSET};
use super::journal::{FastArea, crc32c};
use super::mapping::Remap;
use super::{ExtError, FileSystem, Source, le16, le32};

/// Kind and length of what follows, in bytes.
const HEAD_BYTES: usize = 4;
/// Kinds (`EXT4_FC_TAG_*`).
const ADD_RANGE: u16 = 1;
const DELETE_RANGE: u16 = 2;
const CREATE: u16 = 3;
const LINK: u16 = 4;
const UNLINK: u16 = 5;
const INODE: u16 = 6;
const PADDING: u16 = 7;
const TAIL: u16 = 8;
const HEAD: u16 = 9;

const EXTENTS_FLAG: u32 = 0x8_0000;
const EXTENT_BLOCKS_MAX: u16 = 32768;
const GENERATION_OFFSET: usize = 0x64;
const DIRECTORY: u16 = 0x4;

/// A name that was added to a directory, or removed from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NameChange {
    pub added: bool,
    pub name: Vec<u8>,
    pub inode: u32,
}

/// All that was committed fast.
#[derive(Debug, Default)]
pub(super) struct FastCommits {
    inodes: BTreeMap<u32, Vec<u8>>,
    remaps: BTreeMap<u32, Vec<Remap>>,
    names: BTreeMap<u32, Vec<NameChange>>,
    fresh: BTreeSet<u32>,
}

impl FastCommits {
    /// Reads those that a journal has, and does them in their order.
    pub(super) fn read<S: Source>(
        system: &FileSystem<S>,
        area: Option<FastArea>,
    ) -> Result<FastCommits, ExtError> {
        let mut commits = FastCommits::default();
        let Some(area) = area else {
            return Ok(commits);
        };
        let mut bytes = Vec::new();
        for offset in area.blocks {
            let start = bytes.len();
            bytes.resize(start + system.superblock.block_bytes as usize, 0);
            system.source.read_at(offset, &mut bytes[start..])?;
            // Most of the blocks have never been used.
            if bytes[start..].iter().all(|byte| *byte == 0) {
                bytes.truncate(start);
                break;
            }
        }
        let block_bytes = system.superblock.block_bytes as usize;
        for (kind, value) in committed(&bytes, block_bytes, area.transaction) {
            commits.apply(system, kind, value)?;
        }
        Ok(commits)
    }

    /// An inode that was committed.
    pub(super) fn inode(&self, number: u32) -> Option<&[u8]> {
        self.inodes.get(&number).map(Vec::as_slice)
    }

    /// What has become of the parts of a file, in order.
    pub(super) fn remaps(&self, inode: u32) -> &[Remap] {
        self.remaps.get(&inode).map_or(&[], Vec::as_slice)
    }

    /// What has become of the names in a directory, in order.
    pub(super) fn names(&self, directory: u32) -> &[NameChange] {
        self.names.get(&directory).map_or(&[], Vec::as_slice)
    }

    /// Whether a directory has only what was committed.
    pub(super) fn is_fresh(&self, directory: u32) -> bool {
        self.fresh.contains(&directory)
    }

    fn apply<S: Source>(
        &mut self,
        system: &FileSystem<S>,
        kind: u16,
        value: &[u8],
    ) -> Result<(), ExtError> {
        let part = |at: usize, bytes: usize| {
            let found = value.get(at..at + bytes);
            found.ok_or_else(|| ExtError::Damaged("one of them is too short".into()))
        };
        let word = |at: usize| part(at, 4).map(|bytes| le32(bytes, 0));
        match kind {
            ADD_RANGE => {
                let extent = part(4, 12)?;
                let (length, to) = match le16(extent, 4) {
                    length @ ..=EXTENT_BLOCKS_MAX => {
                        let high = u64::from(le16(extent, 6)) << 32;
                        (length, Some(u64::from(le32(extent, 8)) | high))
                    }
                    length => (length - EXTENT_BLOCKS_MAX, None),
                };
                self.remap(word(0)?, le32(extent, 0), length.into(), to);
            }
            DELETE_RANGE => self.remap(word(0)?, word(4)?, word(8)?, None),
            CREATE | LINK | UNLINK => {
                let (directory, inode) = (word(0)?, word(4)?);
                let change = NameChange {
                    added: kind != UNLINK,
                    name: value[8..].to_vec(),
                    inode,
                };
                if kind == CREATE && is_directory(&system.inode_with(self, inode)?) {
                    self.fresh.insert(inode);
                    self.names.remove(&inode);
                }
                self.names.entry(directory).or_default().push(change);
            }
            INODE => {
                let number = word(0)?;
                let mut raw = system.inode_with(self, number)?;
                merge(&mut raw, &value[4..])?;
                self.inodes.insert(number, raw);
            }
            _ => {}
        }
        Ok(())
    }

    fn remap(&mut self, inode: u32, first: u32, blocks: u32, to: Option<u64>) {
        if blocks > 0 {
            self.remaps.entry(inode).or_default().push(Remap {
                first: first.into(),
                blocks: blocks.into(),
                to,
            });
        }
    }
}

impl<S: Source> FileSystem<S> {
    /// An inode as it is after what has been read so far.
    fn inode_with(&self, commits: &FastCommits, number: u32) -> Result<Vec<u8>, ExtError> {
        match commits.inodes.get(&number) {
            Some(raw) => Ok(raw.clone()),
            None => self.raw_inode(number),
        }
    }
}

fn is_directory(raw: &[u8]) -> bool {
    le16(raw, 0) >> 12 == DIRECTORY
}

/// Puts a committed inode over what there was. Its tree of extents stays: what has changed in that is told by
/// itself, and the tree in the commit may lead to blocks that were never written.
fn merge(raw: &mut [u8], committed: &[u8]) -> Result<(), ExtError> {
    if committed.len() > raw.len() || committed.len() < GENERATION_OFFSET + 4 {
        return Err(ExtError::Damaged(
            "one of the inodes has another length".into(),
        ));
    }
    let map = MAP_OFFSET..MAP_OFFSET + MAP_BYTES;
    let old: Vec<u8> = raw[map.clone()].to_vec();
    raw[..committed.len()].copy_from_slice(committed);
    if le32(raw, 0x20) & EXTENTS_FLAG != 0 {
        // An inode that was not in use may have anything there; an empty tree is what it begins with.
        let is_tree = old[..2] == [0x0a, 0xf3];
        let mut empty = [0; MAP_BYTES];
        empty[..8].copy_from_slice(&[0x0a, 0xf3, 0, 0, 4, 0, 0, 0]);
        raw[map].copy_from_slice(if is_tree { &old } else { &empty });
    }
    Ok(())
}

/// Those of one transaction that are whole: each ends with a checksum over all of it.
fn committed(bytes: &[u8], block_bytes: usize, transaction: u32) -> Vec<(u16, &[u8])> {
    let (mut sound, mut open) = (Vec::new(), Vec::new());
    let mut checksum = 0;
    for block in bytes.chunks(block_bytes) {
        let mut at = 0;
        while let Some(head) = block.get(at..at + HEAD_BYTES) {
            let (kind, length) = (le16(head, 0), usize::from(le16(head, 2)));
            let start = at + HEAD_BYTES;
            let Some(value) = block.get(start..start + length) else {
                return sound;
            };
            at = start + length;
            match kind {
                HEAD if length >= 8 => {
                    if le32(value, 0) != 0 || le32(value, 4) != transaction {
                        return sound;
                    }
                }
                TAIL if length >= 8 => {
                    // The checksum does not cover itself, nor what fills the block after it.
                    checksum = crc32c(crc32c(checksum, head), &value[..4]);
                    if le32(value, 0) != transaction || le32(value, 4) != checksum {
                        return sound;
                    }
                    sound.append(&mut open);
                    checksum = 0;
                    continue;
                }
                PADDING => {}
                ADD_RANGE..=INODE => open.push((kind, value)),
                _ => return sound,
            }
            checksum = crc32c(crc32c(checksum, head), value);
        }
    }
    sound
}
