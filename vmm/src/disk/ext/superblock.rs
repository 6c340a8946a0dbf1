//! The superblock: how large everything is, checked against what is really there.
//!
//! All of it is the guest's own writing. Whatever a later step divides by, shifts by or reserves memory for is
//! bounded here once (Linux, Documentation/filesystems/ext4/super.rst).

use super::{ExtError, Source, le16, le32};

/// Where the superblock is, and how long, in bytes.
pub(super) const OFFSET: u64 = 1024;
pub(super) const BYTES: usize = 1024;
const MAGIC: u16 = 0xef53;

/// Features of a file system that a reader has to know.
pub(super) mod incompat {
    pub(crate) const COMPRESSION: u32 = 0x1;
    pub(crate) const FILE_TYPE: u32 = 0x2;
    pub(crate) const RECOVER: u32 = 0x4;
    pub(crate) const JOURNAL_DEVICE: u32 = 0x8;
    pub(crate) const META_BG: u32 = 0x10;
    pub(crate) const EXTENTS: u32 = 0x40;
    pub(crate) const BITS_64: u32 = 0x80;
    pub(crate) const MMP: u32 = 0x100;
    pub(crate) const FLEX_BG: u32 = 0x200;
    pub(crate) const EA_INODE: u32 = 0x400;
    pub(crate) const DIR_DATA: u32 = 0x1000;
    pub(crate) const CHECKSUM_SEED: u32 = 0x2000;
    pub(crate) const LARGE_DIR: u32 = 0x4000;
    pub(crate) const INLINE_DATA: u32 = 0x8000;
    pub(crate) const ENCRYPT: u32 = 0x1_0000;
    pub(crate) const CASE_FOLD: u32 = 0x2_0000;

    /// Those that are read, or do not matter to who only reads.
    pub(crate) const KNOWN: u32 = FILE_TYPE
        | RECOVER
        | META_BG
        | EXTENTS
        | BITS_64
        | MMP
        | FLEX_BG
        | EA_INODE
        | DIR_DATA
        | CHECKSUM_SEED
        | LARGE_DIR
        | INLINE_DATA
        | ENCRYPT
        | CASE_FOLD;
}

const COMPAT_HAS_JOURNAL: u32 = 0x4;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;

/// What is needed of it.
#[derive(Clone, Debug)]
pub(super) struct Superblock {
    pub block_bytes: u64,
    pub blocks: u64,
    pub inodes: u32,
    pub inode_bytes: u64,
    pub inodes_per_group: u32,
    pub incompat: u32,
    compat: u32,
    ro_compat: u32,
    first_block: u64,
    blocks_per_group: u64,
    descriptor_bytes: u64,
    first_meta_group: u64,
    backup_groups: [u32; 2],
    journal_inode: u32,
}

impl Superblock {
    /// Reads it; `None` if there is none.
    pub(super) fn read(source: &dyn Source) -> Result<Option<Superblock>, ExtError> {
        if source.bytes() < OFFSET + BYTES as u64 {
            return Ok(None);
        }
        let mut raw = [0; BYTES];
        source.read_at(OFFSET, &mut raw)?;
        Superblock::parse(&raw, source.bytes())
    }

    /// The one that stands in `raw`, of a file system that has `room` bytes.
    pub(super) fn parse(raw: &[u8; BYTES], room: u64) -> Result<Option<Superblock>, ExtError> {
        if le16(raw, 0x38) != MAGIC {
            return Ok(None);
        }
        let dynamic = le32(raw, 0x4c) > 0;
        let feature = |at| if dynamic { le32(raw, at) } else { 0 };
        let incompat = feature(0x60);
        refuse_features(incompat)?;
        let wide = incompat & incompat::BITS_64 != 0;
        let log_block_bytes = le32(raw, 0x18);
        if log_block_bytes > 6 {
            return Err(damaged(format!(
                "its blocks would have 2^{} KiB",
                log_block_bytes
            )));
        }
        let block_bytes = 1024u64 << log_block_bytes;
        let high = if wide { u64::from(le32(raw, 0x150)) } else { 0 };
        let superblock = Superblock {
            block_bytes,
            blocks: u64::from(le32(raw, 0x4)) | high << 32,
            inodes: le32(raw, 0x0),
            inode_bytes: if dynamic { le16(raw, 0x58).into() } else { 128 },
            inodes_per_group: le32(raw, 0x28),
            incompat,
            compat: feature(0x5c),
            ro_compat: feature(0x64),
            first_block: le32(raw, 0x14).into(),
            blocks_per_group: le32(raw, 0x20).into(),
            descriptor_bytes: if wide { le16(raw, 0xfe).into() } else { 32 },
            first_meta_group: le32(raw, 0x104).into(),
            backup_groups: [le32(raw, 0x24c), le32(raw, 0x250)],
            journal_inode: le32(raw, 0xe0),
        };
        superblock.check(room).map(Some)
    }

    fn check(self, room: u64) -> Result<Superblock, ExtError> {
        let block = self.block_bytes;
        if self.blocks == 0 || self.blocks > room / block {
            return Err(damaged(format!(
                "it would have {} blocks of {block} bytes, and there is room for {}",
                self.blocks,
                room / block
            )));
        }
        let wrong = [
            (
                "the number of its first block",
                self.first_block >= self.blocks,
            ),
            ("the size of its groups", self.blocks_per_group == 0),
            (
                "the number of inodes of a group",
                self.inodes_per_group == 0 || u64::from(self.inodes_per_group) > 8 * block,
            ),
            (
                "the size of its inodes",
                !self.inode_bytes.is_power_of_two() || !(128..=block).contains(&self.inode_bytes),
            ),
            (
                "the size of its group descriptors",
                !self.descriptor_bytes.is_power_of_two()
                    || !(32..=block.min(1024)).contains(&self.descriptor_bytes),
            ),
        ];
        if let Some((what, _)) = wrong.iter().find(|(_, wrong)| *wrong) {
            return Err(damaged(format!("{what} is one that none can have")));
        }
        if u64::from(self.inodes) > self.groups().saturating_mul(self.inodes_per_group.into()) {
            return Err(damaged(
                "it would have more inodes than its groups have".into(),
            ));
        }
        Ok(self)
    }

    /// How many groups of blocks there are.
    fn groups(&self) -> u64 {
        (self.blocks - self.first_block).div_ceil(self.blocks_per_group)
    }

    /// Where the descriptor of a group is, and how long, in bytes.
    pub(super) fn descriptor(&self, group: u64) -> Result<(u64, usize), ExtError> {
        if group >= self.groups() {
            return Err(damaged(format!("there is no group {group} of blocks")));
        }
        let per_block = self.block_bytes / self.descriptor_bytes;
        let (table_block, index) = (group / per_block, group % per_block);
        let block = if self.incompat & incompat::META_BG == 0 || table_block < self.first_meta_group
        {
            OFFSET / self.block_bytes + 1 + table_block
        } else {
            // Each meta group has a block of descriptors of its own, after the copy of the superblock if
            // its first group has one.
            let first = table_block * per_block;
            let mut block = self.first_block + first * self.blocks_per_group;
            block += u64::from(self.has_superblock(first));
            // The superblock proper is in the second block where blocks are so small.
            block + u64::from(self.block_bytes == 1024 && first == 0 && self.first_block == 0)
        };
        let offset = self.offset_of(block)?;
        let bytes = self.descriptor_bytes;
        Ok((offset + index * bytes, bytes as usize))
    }

    /// Whether a group begins with the superblock, or a copy of it.
    fn has_superblock(&self, group: u64) -> bool {
        if group == 0 {
            return true;
        }
        if self.compat & COMPAT_SPARSE_SUPER2 != 0 {
            return self
                .backup_groups
                .iter()
                .any(|backup| u64::from(*backup) == group);
        }
        let is_power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        group == 1
            || self.ro_compat & RO_COMPAT_SPARSE_SUPER == 0
            || [3, 5, 7].into_iter().any(is_power_of)
    }

    /// Where a block begins, in bytes, if it is one of the file system's.
    pub(super) fn offset_of(&self, block: u64) -> Result<u64, ExtError> {
        if block >= self.blocks {
            let blocks = self.blocks;
            return Err(damaged(format!("it names block {block}, and has {blocks}")));
        }
        Ok(block * self.block_bytes)
    }

    /// Whether all of a feature's bits are set.
    pub(super) fn has(&self, feature: u32) -> bool {
        self.incompat & feature == feature
    }

    /// The inode of the journal, if what stands in it has to be read; an error if it is not here.
    pub(super) fn journal(&self) -> Result<Option<u32>, ExtError> {
        if !self.has(incompat::RECOVER) || self.compat & COMPAT_HAS_JOURNAL == 0 {
            return Ok(None);
        }
        if self.journal_inode == 0 {
            return Err(ExtError::Unsupported(
                "it was in use, and its journal is on another disk".into(),
            ));
        }
        Ok(Some(self.journal_inode))
    }
}

fn refuse_features(found: u32) -> Result<(), ExtError> {
    let unknown = found & !incompat::KNOWN;
    let what = if unknown & incompat::JOURNAL_DEVICE != 0 {
        "it is the journal of a file system on another disk".into()
    } else if unknown & incompat::COMPRESSION != 0 {
        "its files are compressed, which no kernel's ext4 reads".into()
    } else if unknown != 0 {
        format!("it has features that are not known here: incompat {unknown:#x}")
    } else {
        return Ok(());
    };
    Err(ExtError::Unsupported(what))
}

fn damaged(what: String) -> ExtError {
    ExtError::Damaged(what)
}
