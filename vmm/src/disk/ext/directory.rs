//! The names in a directory (Linux, Documentation/filesystems/ext4/directory.rst).
//!
//! A directory is read from its first byte to its last. The index that a large one has looks like unused room to
//! that, and so do the checksums: that is how ext4 stays readable for who does not know them.

use std::collections::BTreeMap;

use super::inode::Inode;
use super::superblock::incompat;
use super::{ExtError, FileSystem, Source, le16, le32};

/// Names of one directory that are kept at once.
const NAMES_MAX: usize = 1 << 20;
/// What begins a directory that is in its inode: the inode of the one above.
const INLINE_PARENT_BYTES: usize = 4;

type Names = BTreeMap<Vec<u8>, u32>;

impl<S: Source> FileSystem<S> {
    pub(super) fn listed(&self, inode: &Inode) -> Result<Names, ExtError> {
        let mut names = Names::new();
        // A directory made by a fast commit is not on the disk yet, whatever stands in its place there.
        if self.fast.is_fresh(inode.number) {
        } else if inode.is_inline() {
            let (first, second) = inode.inline_parts()?;
            self.charge((first.len() + second.len()) as u64)?;
            self.entries(inode, &first[INLINE_PARENT_BYTES..], &mut names)?;
            self.entries(inode, second, &mut names)?;
        } else {
            self.blocks(inode, &mut names)?;
        }
        for entry in self.fast.names(inode.number) {
            self.charge(64)?;
            let name = shown(inode, &entry.name)?;
            if entry.added {
                names.entry(name).or_insert(entry.inode);
            } else if names.get(&name) == Some(&entry.inode) {
                names.remove(&name);
            }
        }
        Ok(names)
    }

    fn blocks(&self, inode: &Inode, names: &mut Names) -> Result<(), ExtError> {
        let block_bytes = self.superblock.block_bytes;
        for piece in self.pieces(inode)? {
            for start in (0..piece.bytes).step_by(block_bytes as usize) {
                if piece.start + start >= inode.size {
                    return Ok(());
                }
                let block = self.block((piece.offset + start) / block_bytes)?;
                self.charge(block_bytes)?;
                self.entries(inode, &block, names)?;
            }
        }
        Ok(())
    }

    /// Reads the entries of one block: inode, length, length of the name, kind, name.
    fn entries(&self, of: &Inode, block: &[u8], names: &mut Names) -> Result<(), ExtError> {
        let bad = |what: &str| ExtError::Damaged(what.into());
        let mut at = 0;
        while at < block.len() {
            let entry = &block[at..];
            if entry.len() < 8 {
                return Err(bad("an entry does not fit"));
            }
            let bytes = entry_bytes(le16(entry, 4), block.len());
            if bytes < 8 || !bytes.is_multiple_of(4) || bytes > entry.len() {
                // What is left of a directory in its inode may be no entry at all.
                if at > 0 && entry.iter().all(|byte| *byte == 0) {
                    return Ok(());
                }
                return Err(bad("an entry has a length that none can have"));
            }
            let (entry, inode) = (&entry[..bytes], le32(entry, 0));
            at += bytes;
            let name_bytes = if self.superblock.has(incompat::FILE_TYPE) {
                entry[6].into()
            } else {
                usize::from(le16(entry, 6))
            };
            if inode == 0 {
                continue;
            }
            let name = entry.get(8..8 + name_bytes);
            let name = name.ok_or_else(|| bad("a name is longer than its entry"))?;
            if name == b"." || name == b".." {
                continue;
            }
            names.insert(shown(of, name)?, inode);
            if names.len() > NAMES_MAX {
                let what = format!("it has more than {NAMES_MAX} names");
                return Err(ExtError::Unsupported(what));
            }
        }
        Ok(())
    }
}

/// A name of a directory as a path has it. What is encrypted can be any bytes, and is given in hexadecimal.
pub(super) fn shown(directory: &Inode, name: &[u8]) -> Result<Vec<u8>, ExtError> {
    if directory.is_encrypted() && !name.is_empty() {
        return Ok(name
            .iter()
            .flat_map(|byte| format!("{byte:02x}").into_bytes())
            .collect());
    }
    if name.is_empty() || name.contains(&0) || name.contains(&b'/') {
        let what = "a name is empty, or has a zero or a slash in it";
        return Err(ExtError::Damaged(what.into()));
    }
    Ok(name.to_vec())
}

/// The length of an entry: 64 KiB do not fit into the field, and are told by what cannot be.
fn entry_bytes(field: u16, block_bytes: usize) -> usize {
    match field {
        0 | 0xffff if block_bytes == 1 << 16 => 1 << 16,
        field if block_bytes == 1 << 16 => usize::from(field & !3) | usize::from(field & 3) << 16,
        field => field.into(),
    }
}
