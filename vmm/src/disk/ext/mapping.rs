//! Which blocks of the file system a file is in: by extents, or by blocks of block numbers.
//!
//! Trees that the guest wrote may share branches and lead back into themselves. Each branch must therefore keep to
//! the part of the file that the one above gives it, and all that is read is charged.

use std::collections::BTreeMap;

use super::inode::Inode;
use super::{ExtError, FileSystem, Source, le16, le32};

/// Extents of one file that are kept: a file of a terabyte in pieces of a megabyte.
const PIECES_MAX: usize = 1 << 20;
const EXTENT_MAGIC: u16 = 0xf30a;
const EXTENT_DEPTH_MAX: u16 = 5;
const EXTENT_BYTES: usize = 12;
/// An extent longer than this is one that was reserved and not written: it reads as zeroes.
const EXTENT_BLOCKS_MAX: u16 = 32768;
/// Block numbers that stand in the inode, before those of blocks of numbers.
const DIRECT: u64 = 12;
/// No file has more blocks than this.
const BLOCKS_MAX: u64 = 1 << 32;

/// Part of a file that stands in one piece. What lies between two reads as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where in the file it begins, in bytes.
    pub start: u64,
    /// Where in the file system it stands, in bytes.
    pub offset: u64,
    /// Its length, in bytes.
    pub bytes: u64,
}

/// The same in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub block: u64,
    pub blocks: u64,
}

/// Runs by their first block in the file; none lies over another.
pub(super) type Runs = BTreeMap<u64, Run>;

/// What a fast commit says of a part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Remap {
    pub first: u64,
    pub blocks: u64,
    /// Where it is now; `None` if it reads as zeroes.
    pub to: Option<u64>,
}

impl<S: Source> FileSystem<S> {
    /// The pieces of a file, ascending; none of inline data.
    pub(crate) fn pieces(&self, inode: &Inode) -> Result<Vec<Piece>, ExtError> {
        let mut runs = Runs::new();
        if !inode.is_inline() {
            let map = inode.map();
            if inode.has_extents() {
                self.extents(map, None, 0..BLOCKS_MAX, &mut runs)?;
            } else {
                self.numbers(map, &mut runs)?;
            }
        }
        for remap in self.fast.remaps(inode.number) {
            self.charge(16)?;
            apply(&mut runs, *remap);
        }
        let block_bytes = self.superblock.block_bytes;
        let mut pieces: Vec<Piece> = Vec::with_capacity(runs.len());
        for (first, run) in runs {
            self.superblock
                .offset_of(run.block.saturating_add(run.blocks - 1))?;
            let piece = Piece {
                start: first * block_bytes,
                offset: self.superblock.offset_of(run.block)?,
                bytes: run.blocks * block_bytes,
            };
            match pieces.last_mut() {
                Some(last)
                    if last.start + last.bytes == piece.start
                        && last.offset + last.bytes == piece.offset =>
                {
                    last.bytes += piece.bytes;
                }
                _ => pieces.push(piece),
            }
        }
        Ok(pieces)
    }

    fn add(&self, runs: &mut Runs, first: u64, run: Run) -> Result<(), ExtError> {
        self.charge(16)?;
        if runs.len() >= PIECES_MAX {
            return Err(ExtError::Unsupported(format!(
                "a file is in more than {PIECES_MAX} pieces"
            )));
        }
        runs.insert(first, run);
        Ok(())
    }

    /// Reads a node of a tree of extents, which tells of the blocks in `range` of the file.
    fn extents(
        &self,
        node: &[u8],
        depth: Option<u16>,
        range: std::ops::Range<u64>,
        runs: &mut Runs,
    ) -> Result<(), ExtError> {
        let bad = || ExtError::Damaged("a tree of extents is damaged".into());
        let (count, found) = (usize::from(le16(node, 2)), le16(node, 6));
        if le16(node, 0) != EXTENT_MAGIC
            || found > EXTENT_DEPTH_MAX
            || depth.is_some_and(|depth| depth != found)
        {
            return Err(bad());
        }
        let entries = &node[EXTENT_BYTES..];
        let entries = entries.get(..count * EXTENT_BYTES).ok_or_else(bad)?;
        let mut entries = entries.chunks_exact(EXTENT_BYTES).peekable();
        let mut from = range.start;
        while let Some(entry) = entries.next() {
            let first = u64::from(le32(entry, 0));
            let next = entries
                .peek()
                .map_or(range.end, |next| le32(next, 0).into());
            if first < from || first >= next || next > range.end {
                return Err(bad());
            }
            from = next;
            if found > 0 {
                let child = u64::from(le32(entry, 4)) | u64::from(le16(entry, 8)) << 32;
                let child = self.block(child)?;
                self.extents(&child, Some(found - 1), first..next, runs)?;
                continue;
            }
            let (length, unwritten) = match le16(entry, 4) {
                length @ ..=EXTENT_BLOCKS_MAX => (length, false),
                length => (length - EXTENT_BLOCKS_MAX, true),
            };
            if length == 0 || first + u64::from(length) > next {
                return Err(bad());
            }
            if !unwritten {
                let block = u64::from(le32(entry, 8)) | u64::from(le16(entry, 6)) << 32;
                let blocks = length.into();
                self.add(runs, first, Run { block, blocks })?;
            }
        }
        Ok(())
    }

    /// Reads a map of block numbers, as ext2 and ext3 have it: 12 of blocks, and three of blocks of numbers, one,
    /// two and three deep.
    fn numbers(&self, map: &[u8], runs: &mut Runs) -> Result<(), ExtError> {
        let mut walk = Walk {
            system: self,
            runs,
            first: 0,
            last: None,
        };
        for index in 0..DIRECT {
            walk.number(le32(map, index as usize * 4), 0)?;
        }
        for depth in 1..=3 {
            walk.number(le32(map, (DIRECT as usize + depth as usize - 1) * 4), depth)?;
        }
        walk.end()
    }
}

/// A walk over a map of block numbers.
struct Walk<'a, S> {
    system: &'a FileSystem<S>,
    runs: &'a mut Runs,
    /// The block of the file that comes next.
    first: u64,
    /// The run that may still grow, and where in the file it begins.
    last: Option<(u64, Run)>,
}

impl<S: Source> Walk<'_, S> {
    /// A number: of a block of the file, or of a block of numbers so deep.
    fn number(&mut self, number: u32, depth: u32) -> Result<(), ExtError> {
        let per_block = self.system.superblock.block_bytes / 4;
        if self.first >= BLOCKS_MAX {
            return Ok(());
        }
        if number == 0 {
            self.first += per_block.pow(depth);
            return Ok(());
        }
        if depth > 0 {
            let block = self.system.block(number.into())?;
            // It is gone through number by number, although it may be kept.
            self.system.charge(block.len() as u64)?;
            for number in block.chunks_exact(4) {
                self.number(le32(number, 0), depth - 1)?;
            }
            return Ok(());
        }
        let block = u64::from(number);
        let first = self.first;
        self.first += 1;
        match &mut self.last {
            Some((start, run))
                if *start + run.blocks == first && run.block + run.blocks == block =>
            {
                run.blocks += 1;
                return Ok(());
            }
            _ => {}
        }
        let run = Run { block, blocks: 1 };
        match self.last.replace((first, run)) {
            Some((start, run)) => self.system.add(self.runs, start, run),
            None => Ok(()),
        }
    }

    fn end(self) -> Result<(), ExtError> {
        match self.last {
            Some((start, run)) => self.system.add(self.runs, start, run),
            None => Ok(()),
        }
    }
}

/// Puts `remap` in the place of what the runs say of that part of the file.
fn apply(runs: &mut Runs, remap: Remap) {
    let end = remap.first + remap.blocks;
    let before = runs.range(..remap.first).next_back();
    let before = before.map(|(first, run)| (*first, *run));
    if let Some((first, run)) = before.filter(|(first, run)| first + run.blocks > remap.first) {
        let blocks = remap.first - first;
        runs.insert(first, Run { blocks, ..run });
        keep_rest(runs, first, run, end);
    }
    while let Some((first, run)) = runs
        .range(remap.first..end)
        .next()
        .map(|(at, run)| (*at, *run))
    {
        runs.remove(&first);
        keep_rest(runs, first, run, end);
    }
    if let Some(block) = remap.to {
        let blocks = remap.blocks;
        runs.insert(remap.first, Run { block, blocks });
    }
}

/// Keeps what a run has from `end` on.
fn keep_rest(runs: &mut Runs, first: u64, run: Run, end: u64) {
    if first + run.blocks > end {
        let skipped = end - first;
        let rest = Run {
            block: run.block + skipped,
            blocks: run.blocks - skipped,
        };
        runs.insert(end, rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_is_mapped_anew_reads_from_its_new_place_and_the_rest_stays() {
        let mut rng = hindsight_replay::rng::Rng::new(1, 2);
        for _ in 0..500 {
            let (mut runs, mut model) = (Runs::new(), [None; 100]);
            for step in 0..12 {
                let first = rng.below(90);
                let blocks = 1 + rng.below(10);
                let to = (rng.below(3) > 0).then(|| 1000 * (step + 1));
                for block in 0..blocks {
                    model[(first + block) as usize] = to.map(|to| to + block);
                }
                apply(&mut runs, Remap { first, blocks, to });
            }
            let mut found = [None; 100];
            for (first, run) in runs {
                for block in 0..run.blocks {
                    let place = &mut found[(first + block) as usize];
                    assert_eq!(*place, None, "two runs lie over each other");
                    *place = Some(run.block + block);
                }
            }
            assert_eq!(found, model);
        }
    }
}
