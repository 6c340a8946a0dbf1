//! Bringing home what a journal holds, as a kernel does when it mounts (Linux,
//! Documentation/filesystems/ext4/journal.rst; the checks and their order are those of jbd2).
//!
//! The log is a ring of blocks. A transaction in it is made of descriptors, each followed by the blocks that it
//! names, of revocations, and of a commit; it counts only if that is there. The log ends at the first block that
//! does not carry the number of the transaction that must come next. Nothing is copied: what comes out is a map from
//! blocks to their newest content in the log.

use std::collections::BTreeMap;

use crc::{CRC_32_ISCSI, CRC_32_MPEG_2, Crc, Table};

use super::mapping::Piece;
use super::{ExtError, FileSystem, Newer, Source, be32};

/// What begins each block of the log that is not a copy of one of the file system's.
pub(super) const MAGIC: [u8; 4] = [0xc0, 0x3b, 0x39, 0x98];
const HEADER_BYTES: usize = 12;
const UUID_BYTES: usize = 16;

const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK_1: u32 = 3;
const SUPERBLOCK_2: u32 = 4;
const REVOCATION: u32 = 5;

/// Features of a journal (`JBD2_FEATURE_*`).
const COMPAT_CHECKSUM: u32 = 0x1;
const BITS_64: u32 = 0x2;
const ASYNC_COMMIT: u32 = 0x4;
const CHECKSUM_2: u32 = 0x8;
const CHECKSUM_3: u32 = 0x10;
const FAST_COMMIT: u32 = 0x20;
const KNOWN: u32 = 0x1 | BITS_64 | ASYNC_COMMIT | CHECKSUM_2 | CHECKSUM_3 | FAST_COMMIT;

/// Flags of a block's name in a descriptor.
const ESCAPED: u32 = 1;
const SAME_UUID: u32 = 2;
const LAST: u32 = 8;

/// What of a log is gone through at most: a log is a small part of its file system.
const LOG_BYTES_MAX: u64 = 4 << 30;
const LOG_BLOCKS_MAX: u64 = 4 << 20;
/// Blocks for fast commits, if the superblock of the journal has no number.
const FAST_BLOCKS: u64 = 256;
const FAST_BYTES_MAX: u64 = 16 << 20;
/// A shorter log is not used.
const LOG_BLOCKS_MIN: u64 = 1024;

static CRC32C: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);
static CRC32_BE: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_MPEG_2);

/// CRC32C as Linux has it: going on from `seed`, and not inverted at the end.
pub(super) fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    let mut digest = CRC32C.digest_with_initial(seed.reverse_bits());
    digest.update(bytes);
    !digest.finalize()
}

/// CRC32 from its highest bit on, the same way.
fn crc32_be(seed: u32, bytes: &[u8]) -> u32 {
    let mut digest = CRC32_BE.digest_with_initial(seed);
    digest.update(bytes);
    digest.finalize()
}

/// What a journal holds.
#[derive(Debug, Default)]
pub(super) struct Recovered {
    /// Blocks whose newest content is in it.
    pub newer: BTreeMap<u64, Newer>,
    /// The blocks for fast commits that may hold some.
    pub fast: Option<FastArea>,
}

/// Where fast commits are.
#[derive(Debug)]
pub(super) struct FastArea {
    /// The blocks, by where they are in bytes.
    pub blocks: Vec<u64>,
    /// The transaction that they belong to.
    pub transaction: u32,
}

/// Reads the journal in an inode.
pub(super) fn read<S: Source>(system: &FileSystem<S>, inode: u32) -> Result<Recovered, ExtError> {
    let inode = system.inode(inode)?;
    let mut log = Log::new(system, system.pieces(&inode)?, inode.size)?;
    if log.next == 0 {
        return Ok(Recovered::default());
    }
    while log.step()? {}
    Ok(Recovered {
        fast: log.fast_area(),
        newer: log.newer,
    })
}

/// A log that is being gone through.
struct Log<'a, S> {
    system: &'a FileSystem<S>,
    pieces: Vec<Piece>,
    features: u32,
    /// `COMPAT_CHECKSUM`: each commit has a checksum over what comes before it.
    commit_checksums: bool,
    seed: u32,
    /// The ring: blocks `first` to `last`, this one not.
    first: u64,
    last: u64,
    /// Where the blocks for fast commits end.
    fast_last: u64,
    /// The block that comes next, and the transaction that must.
    next: u64,
    transaction: u32,
    /// Blocks that may still be gone through.
    left: u64,
    newer: BTreeMap<u64, Newer>,
    /// The transaction that has not ended: what it writes, revokes, and its checksum so far.
    written: BTreeMap<u64, Newer>,
    revoked: Vec<u64>,
    checksum: u32,
}

impl<'a, S: Source> Log<'a, S> {
    fn new(
        system: &'a FileSystem<S>,
        pieces: Vec<Piece>,
        size: u64,
    ) -> Result<Log<'a, S>, ExtError> {
        let block_bytes = system.superblock.block_bytes;
        let mut log = Log {
            system,
            pieces,
            features: 0,
            commit_checksums: false,
            seed: 0,
            first: 0,
            last: size / block_bytes,
            fast_last: 0,
            next: 0,
            transaction: 0,
            left: 0,
            newer: BTreeMap::new(),
            written: BTreeMap::new(),
            revoked: Vec::new(),
            checksum: !0,
        };
        let head = log.block(log.offset(0)?)?;
        let version = be32(&head, 4);
        if head[..4] != MAGIC || ![SUPERBLOCK_1, SUPERBLOCK_2].contains(&version) {
            return Err(damaged("it does not begin with a journal's superblock"));
        }
        if version == SUPERBLOCK_2 {
            log.commit_checksums = be32(&head, 0x24) & COMPAT_CHECKSUM != 0;
            log.features = be32(&head, 0x28);
            log.seed = crc32c(!0, &head[0x30..0x40]);
        }
        if log.features & !KNOWN != 0 {
            let what = format!(
                "it has features that are not known here: {:#x}",
                log.features
            );
            return Err(ExtError::Unsupported(what));
        }
        let blocks = u64::from(be32(&head, 0x10));
        if u64::from(be32(&head, 0xc)) != block_bytes || blocks > log.last {
            return Err(damaged(
                "its blocks, or their number, are not those of its inode",
            ));
        }
        (log.first, log.last, log.fast_last) = (be32(&head, 0x14).into(), blocks, blocks);
        if log.has(FAST_COMMIT) {
            let fast = match be32(&head, 0x54) {
                0 => FAST_BLOCKS,
                fast => fast.into(),
            };
            if blocks
                .checked_sub(fast)
                .is_some_and(|rest| rest >= LOG_BLOCKS_MIN)
            {
                log.last = blocks - fast;
            }
        }
        (log.transaction, log.next) = (be32(&head, 0x18), be32(&head, 0x1c).into());
        // One that is empty says 0 of the next, and nothing else is looked at then; what it begins with counts all
        // the same.
        let is_empty = log.next == 0 && log.first < log.last;
        if log.first == 0 || !(is_empty || (log.first..log.last).contains(&log.next)) {
            return Err(damaged("its first block is not one of its own"));
        }
        log.left = (log.last - log.first)
            .min(LOG_BLOCKS_MAX)
            .min(LOG_BYTES_MAX / block_bytes);
        Ok(log)
    }

    fn has(&self, feature: u32) -> bool {
        self.features & feature != 0
    }

    fn has_checksums(&self) -> bool {
        self.has(CHECKSUM_2 | CHECKSUM_3)
    }

    /// Where a block of the log stands, in bytes.
    fn offset(&self, block: u64) -> Result<u64, ExtError> {
        let start = block * self.system.superblock.block_bytes;
        let index = self.pieces.partition_point(|piece| piece.start <= start);
        index
            .checked_sub(1)
            .map(|index| self.pieces[index])
            .filter(|piece| start < piece.start + piece.bytes)
            .map(|piece| piece.offset + (start - piece.start))
            .ok_or_else(|| damaged("a part of it is nowhere"))
    }

    fn block(&self, offset: u64) -> Result<Vec<u8>, ExtError> {
        let mut block = vec![0; self.system.superblock.block_bytes as usize];
        self.system.source.read_at(offset, &mut block)?;
        Ok(block)
    }

    /// Where the next block of the ring stands; `None` after the last that there can be.
    fn advance(&mut self) -> Result<Option<u64>, ExtError> {
        let whole = self.last - self.first;
        if self.left == 0 {
            let blocks = LOG_BLOCKS_MAX.min(LOG_BYTES_MAX / self.system.superblock.block_bytes);
            if whole > blocks {
                let what = format!("more than {blocks} of its blocks are in use");
                return Err(ExtError::Unsupported(what));
            }
            return Ok(None);
        }
        self.left -= 1;
        let offset = self.offset(self.next)?;
        self.next += 1;
        if self.next == self.last {
            self.next = self.first;
        }
        Ok(Some(offset))
    }

    /// Goes through the next block and what belongs to it; whether the log goes on.
    fn step(&mut self) -> Result<bool, ExtError> {
        let Some(offset) = self.advance()? else {
            return Ok(false);
        };
        let block = self.block(offset)?;
        if block[..4] != MAGIC || be32(&block, 8) != self.transaction {
            return Ok(false);
        }
        match be32(&block, 4) {
            DESCRIPTOR => self.descriptor(&block),
            REVOCATION => self.revocation(&block),
            COMMIT => self.commit(block),
            _ => Ok(false),
        }
    }

    /// Whether the last four bytes of a block are its checksum.
    fn is_sound(&self, block: &[u8]) -> bool {
        let (rest, found) = block.split_at(block.len() - 4);
        let expected = crc32c(crc32c(self.seed, rest), &[0; 4]);
        !self.has_checksums() || be32(found, 0) == expected
    }

    /// A descriptor names blocks of the file system, whose content comes after it.
    fn descriptor(&mut self, block: &[u8]) -> Result<bool, ExtError> {
        if !self.is_sound(block) {
            return Ok(false);
        }
        if self.commit_checksums {
            self.checksum = crc32_be(self.checksum, block);
        }
        let tail = if self.has_checksums() { 4 } else { 0 };
        let mut rest = &block[HEADER_BYTES..block.len() - tail];
        let tag_bytes = match (
            self.has(CHECKSUM_3),
            self.has(CHECKSUM_2),
            self.has(BITS_64),
        ) {
            (true, ..) => 16,
            (_, second, wide) => 8 + if second { 2 } else { 0 } + if wide { 4 } else { 0 },
        };
        while rest.len() >= tag_bytes {
            let (tag, after) = rest.split_at(tag_bytes);
            rest = after;
            let half = |at: usize| u32::from(u16::from_be_bytes([tag[at], tag[at + 1]]));
            let (flags, checksum, mask) = if self.has(CHECKSUM_3) {
                (be32(tag, 4), be32(tag, 12), u32::MAX)
            } else {
                (half(6), half(4), 0xffff)
            };
            let high = if self.has(BITS_64) { be32(tag, 8) } else { 0 };
            let number = u64::from(be32(tag, 0)) | u64::from(high) << 32;
            let Some(offset) = self.advance()? else {
                return Ok(false);
            };
            if self.has_checksums() || self.commit_checksums {
                let data = self.block(offset)?;
                if self.commit_checksums {
                    self.checksum = crc32_be(self.checksum, &data);
                }
                let found = crc32c(self.seed, &self.transaction.to_be_bytes());
                let found = crc32c(found, &data) & mask;
                if self.has_checksums() && found != checksum & mask {
                    // Such a commit may be there before what it commits.
                    if self.has(ASYNC_COMMIT) {
                        return Ok(false);
                    }
                    let what = format!("the new block {number} does not have its checksum");
                    return Err(ExtError::Damaged(what));
                }
            }
            self.system.superblock.offset_of(number)?;
            let escaped = flags & ESCAPED != 0;
            self.written.insert(number, Newer { offset, escaped });
            if flags & SAME_UUID == 0 {
                rest = rest.get(UUID_BYTES..).unwrap_or_default();
            }
            if flags & LAST != 0 {
                break;
            }
        }
        Ok(true)
    }

    /// A revocation names blocks that must not be brought home from this transaction or an earlier one.
    fn revocation(&mut self, block: &[u8]) -> Result<bool, ExtError> {
        if !self.is_sound(block) {
            return Ok(false);
        }
        let used = be32(block, HEADER_BYTES) as usize;
        let tail = if self.has_checksums() { 4 } else { 0 };
        let bytes = if self.has(BITS_64) { 8 } else { 4 };
        let used = used.clamp(HEADER_BYTES + 4, block.len() - tail);
        for number in block[HEADER_BYTES + 4..used].chunks_exact(bytes) {
            self.revoked.push(if bytes == 8 {
                u64::from(be32(number, 0)) << 32 | u64::from(be32(number, 4))
            } else {
                be32(number, 0).into()
            });
        }
        // They are taken away from what there is; the list need not grow with the log.
        if self.revoked.len() as u64 > LOG_BLOCKS_MAX {
            return Err(ExtError::Unsupported(
                "it revokes more blocks than it can have".into(),
            ));
        }
        Ok(true)
    }

    fn commit(&mut self, mut block: Vec<u8>) -> Result<bool, ExtError> {
        const CHECKSUM: std::ops::Range<usize> = 16..20;
        let found = be32(&block, CHECKSUM.start);
        if self.has_checksums() {
            block[CHECKSUM].fill(0);
            if crc32c(self.seed, &block) != found {
                return Ok(false);
            }
        } else if self.commit_checksums {
            // Kind 1 is this one, and its length; none at all is a commit without.
            let (kind, bytes) = (block[12], block[13]);
            let is_without = (kind, bytes, found) == (0, 0, 0);
            if !is_without && ((kind, bytes) != (1, 4) || found != self.checksum) {
                return Ok(false);
            }
        }
        self.newer.append(&mut self.written);
        for number in self.revoked.drain(..) {
            self.newer.remove(&number);
        }
        self.checksum = !0;
        self.transaction = self.transaction.wrapping_add(1);
        Ok(true)
    }

    /// The blocks after the log that fast commits are in.
    fn fast_area(&self) -> Option<FastArea> {
        if !self.has(FAST_COMMIT) || self.last == self.fast_last {
            return None;
        }
        let most = FAST_BYTES_MAX / self.system.superblock.block_bytes;
        let blocks = (self.last + 1..self.fast_last).take(most as usize);
        Some(FastArea {
            // One that is nowhere ends them.
            blocks: blocks.map_while(|block| self.offset(block).ok()).collect(),
            transaction: self.transaction,
        })
    }
}

fn damaged(what: &str) -> ExtError {
    ExtError::Damaged(what.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksums_are_those_that_linux_computes() {
        // Known answers: the inverted CRC-32C of "123456789" is 0xe3069283, CRC-32/MPEG-2 0x0376e6e7.
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
        assert_eq!(
            crc32c(crc32c(!0, b"1234"), b"56789"),
            crc32c(!0, b"123456789")
        );
        assert_eq!(crc32_be(!0, b"123456789"), 0x0376_e6e7);
    }
}
