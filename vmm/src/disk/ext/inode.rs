//! An inode: what a name stands for, and where its content is (Linux, Documentation/filesystems/ext4/inodes.rst).

use std::collections::BTreeMap;

use super::superblock::incompat;
use super::{ExtError, FileSystem, Source, in_the, le16, le32};

/// Where the block map, or the content of something small, begins in an inode, and how long it is, in bytes.
pub(super) const MAP_OFFSET: usize = 0x28;
pub(super) const MAP_BYTES: usize = 60;
/// Where what a kernel of today adds to an inode begins.
const EXTRA_OFFSET: usize = 0x80;
/// What begins the extended attributes of an inode.
const ATTRIBUTES_MAGIC: u32 = 0xea02_0000;
/// The name space and the name of the attribute that has the rest of inline data.
const DATA_NAMESPACE: u8 = 7;
const DATA_NAME: &[u8] = b"data";

const ENCRYPTED_FLAG: u32 = 0x800;
const EXTENTS_FLAG: u32 = 0x8_0000;
const INLINE_DATA_FLAG: u32 = 0x1000_0000;

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Link,
    /// A device, by the number that its inode has.
    Device(bool, u32, u32),
    /// A FIFO, a socket.
    Other(u16),
}

/// An inode.
#[derive(Clone, Debug)]
pub(crate) struct Inode {
    /// Its number.
    pub number: u32,
    raw: Vec<u8>,
    /// Its length in bytes; the guest may have written any number.
    pub size: u64,
}

impl Inode {
    fn new(number: u32, raw: Vec<u8>, features: u32) -> Inode {
        let mut inode = Inode {
            number,
            raw,
            size: 0,
        };
        // What is the upper half of a file's length was something else in a directory.
        let wide = inode.kind() == Kind::File || features & incompat::LARGE_DIR != 0;
        let high = if wide { inode.word(0x6c) } else { 0 };
        inode.size = u64::from(inode.word(0x4)) | u64::from(high) << 32;
        inode
    }

    fn word(&self, at: usize) -> u32 {
        le32(&self.raw, at)
    }

    /// What it is.
    pub(crate) fn kind(&self) -> Kind {
        let mode = le16(&self.raw, 0);
        match mode >> 12 {
            0x8 => Kind::File,
            0x4 => Kind::Directory,
            0xa => Kind::Link,
            kind @ (0x2 | 0x6) => Kind::Device(
                kind == 0x6,
                self.word(MAP_OFFSET),
                self.word(MAP_OFFSET + 4),
            ),
            kind => Kind::Other(kind),
        }
    }

    /// Whether two are of one kind, whatever device they are.
    pub(crate) fn is_like(&self, other: &Inode) -> bool {
        le16(&self.raw, 0) >> 12 == le16(&other.raw, 0) >> 12
    }

    /// Permissions, with the three bits before them.
    pub(crate) fn mode(&self) -> u16 {
        le16(&self.raw, 0) & 0xfff
    }

    /// Both, as in `st_mode`.
    pub(crate) fn kind_and_mode(&self) -> u16 {
        le16(&self.raw, 0)
    }

    /// User and group.
    pub(crate) fn owner(&self) -> (u32, u32) {
        let number =
            |low, high| u32::from(le16(&self.raw, low)) | u32::from(le16(&self.raw, high)) << 16;
        (number(0x2, 0x78), number(0x18, 0x7a))
    }

    /// When the content was last written: seconds since 1970 and nanoseconds.
    pub(crate) fn modified(&self) -> (i64, u32) {
        let seconds = i64::from(self.word(0x10).cast_signed());
        let extra_at = 0x88;
        if self.raw.len() < extra_at + 4 || self.extra_bytes() < extra_at + 4 - EXTRA_OFFSET {
            return (seconds, 0);
        }
        let extra = self.word(extra_at);
        (seconds + (i64::from(extra & 3) << 32), extra >> 2)
    }

    /// How many names it has.
    pub(crate) fn links(&self) -> u16 {
        le16(&self.raw, 0x1a)
    }

    fn extra_bytes(&self) -> usize {
        match self.raw.get(EXTRA_OFFSET..EXTRA_OFFSET + 2) {
            Some(bytes) => le16(bytes, 0).into(),
            None => 0,
        }
    }

    pub(crate) fn is_encrypted(&self) -> bool {
        self.word(0x20) & ENCRYPTED_FLAG != 0
    }

    pub(crate) fn has_extents(&self) -> bool {
        self.word(0x20) & EXTENTS_FLAG != 0
    }

    pub(crate) fn is_inline(&self) -> bool {
        self.word(0x20) & INLINE_DATA_FLAG != 0
    }

    /// The block map.
    pub(crate) fn map(&self) -> &[u8] {
        &self.raw[MAP_OFFSET..MAP_OFFSET + MAP_BYTES]
    }

    /// The two parts of inline data: that in place of a block map, and that among the extended attributes.
    pub(crate) fn inline_parts(&self) -> Result<(&[u8], &[u8]), ExtError> {
        Ok((self.map(), self.inline_attribute()?))
    }

    fn inline_attribute(&self) -> Result<&[u8], ExtError> {
        let bad = || {
            ExtError::Damaged(format!(
                "the attributes of inode {} are damaged",
                self.number
            ))
        };
        let start = EXTRA_OFFSET + self.extra_bytes();
        let attributes = self.raw.get(start..).unwrap_or_default();
        if attributes.len() < 4 || le32(attributes, 0) != ATTRIBUTES_MAGIC {
            return Ok(&[]);
        }
        // Entries of 16 bytes and a name; what they say of places counts from the first of them.
        let attributes = &attributes[4..];
        let mut at = 0;
        while let Some(entry) = attributes.get(at..at + 16) {
            if entry[..4] == [0; 4] {
                break;
            }
            let name_end = at + 16 + usize::from(entry[0]);
            let name = attributes.get(at + 16..name_end).ok_or_else(bad)?;
            if entry[1] == DATA_NAMESPACE && name == DATA_NAME {
                let (start, bytes) = (usize::from(le16(entry, 2)), le32(entry, 8) as usize);
                let end = start.checked_add(bytes).ok_or_else(bad)?;
                return attributes.get(start..end).ok_or_else(bad);
            }
            at = name_end.next_multiple_of(4);
        }
        Ok(&[])
    }
}

impl<S: Source> FileSystem<S> {
    /// An inode of the file system; its fast commits have been applied.
    pub(crate) fn inode(&self, number: u32) -> Result<Inode, ExtError> {
        let raw = match self.fast.inode(number) {
            Some(raw) => {
                self.charge(self.superblock.inode_bytes)?;
                raw.to_vec()
            }
            None => self.raw_inode(number)?,
        };
        Ok(Inode::new(number, raw, self.superblock.incompat))
    }

    /// An inode as it stands in its table.
    pub(crate) fn raw_inode(&self, number: u32) -> Result<Vec<u8>, ExtError> {
        let superblock = &self.superblock;
        if number == 0 || number > superblock.inodes {
            return Err(ExtError::Damaged(format!("there is no inode {number}")));
        }
        let per_group = superblock.inodes_per_group;
        let (group, index) = ((number - 1) / per_group, (number - 1) % per_group);
        let (offset, bytes) = superblock.descriptor(group.into())?;
        let descriptor = self.within_block(offset, bytes)?;
        let high = if bytes >= 64 {
            le32(&descriptor, 0x28)
        } else {
            0
        };
        let table = u64::from(le32(&descriptor, 0x8)) | u64::from(high) << 32;
        let before = u64::from(index) * superblock.inode_bytes;
        let block = table.saturating_add(before / superblock.block_bytes);
        let offset = superblock.offset_of(block)? + before % superblock.block_bytes;
        self.within_block(offset, superblock.inode_bytes as usize)
    }

    /// Where a symbolic link leads.
    pub(crate) fn link_target(&self, inode: &Inode) -> Result<Vec<u8>, ExtError> {
        let bad = || {
            let length = inode.size;
            ExtError::Damaged(format!(
                "a symbolic link would lead to a path of {length} bytes"
            ))
        };
        let length = usize::try_from(inode.size).ok();
        let length = length.filter(|length| *length <= self.superblock.block_bytes as usize);
        let length = length.ok_or_else(bad)?;
        if inode.is_inline() {
            return self.inline_content(inode);
        }
        if !inode.has_extents() && length < MAP_BYTES {
            return Ok(inode.map()[..length].to_vec());
        }
        let mut target = vec![0; length];
        if let Some(piece) = self.pieces(inode)?.first().filter(|piece| piece.start == 0) {
            let count = length.min(piece.bytes as usize);
            self.charge(count as u64)?;
            self.read(piece.offset, &mut target[..count])?;
        }
        Ok(target)
    }

    /// The content of an inode that has it in itself.
    pub(crate) fn inline_content(&self, inode: &Inode) -> Result<Vec<u8>, ExtError> {
        let (first, second) = inode.inline_parts()?;
        let mut content = [first, second].concat();
        let length = usize::try_from(inode.size).unwrap_or(usize::MAX);
        if length > content.len() {
            let number = inode.number;
            return Err(ExtError::Damaged(format!(
                "inode {number} cannot hold what it is to have"
            )));
        }
        content.truncate(length);
        Ok(content)
    }

    /// The names in a directory and their inodes.
    pub(crate) fn names(&self, inode: &Inode) -> Result<BTreeMap<Vec<u8>, u32>, ExtError> {
        self.listed(inode)
            .map_err(|error| in_the(error, "a directory cannot be read"))
    }
}
