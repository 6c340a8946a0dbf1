//! The files of an initrd: archives of cpio, one after another, packed or not (Linux,
//! Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! They are read as the kernel unpacks them: a later file takes the place of an earlier one of the same name, and of the
//! names of one inode the last one has the content. What follows a packed archive is not looked at: there is none
//! that has anything there.

use std::collections::BTreeMap;
use std::ops::Range;

use super::payload;
use crate::error::KernelError;

/// What all archives may unpack to. Debian's have some 100 MiB.
const UNPACKED_BYTES_MAX: u64 = 1 << 30;
/// Names that are kept.
const NAMES_MAX: usize = 1 << 20;
const HEAD_BYTES: usize = 110;
const MAGICS: [&[u8]; 2] = [b"070701", b"070702"];
/// The name that ends an archive.
const TRAILER: &[u8] = b"TRAILER!!!";
const NAME_BYTES_MAX: usize = 4096;

/// A file of an initrd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its kind and permissions, as in `st_mode`.
    pub mode: u32,
    /// When it was last written, in seconds since 1970.
    pub modified: u32,
    archive: usize,
    content: Range<usize>,
}

impl Entry {
    /// Whether it is a symbolic link.
    pub fn is_link(&self) -> bool {
        self.mode & 0o170_000 == 0o120_000
    }
}

/// The files of an initrd.
#[derive(Debug, Default)]
pub struct Initramfs {
    archives: Vec<Vec<u8>>,
    entries: BTreeMap<Vec<u8>, Entry>,
}

impl Initramfs {
    /// Reads an initrd. What cannot be read ends it: there is what was found before, and why it ends.
    pub fn read(initrd: &[u8]) -> (Initramfs, Option<KernelError>) {
        let mut files = Initramfs::default();
        let mut left = UNPACKED_BYTES_MAX;
        let why = files.add_all(initrd, &mut left);
        (files, why.err())
    }

    /// A file, by its path from the root without a slash before it; the root itself has no name.
    pub fn entry(&self, path: &[u8]) -> Option<&Entry> {
        self.entries.get(path)
    }

    /// What is in a file, or where a symbolic link leads.
    pub fn content(&self, entry: &Entry) -> &[u8] {
        &self.archives[entry.archive][entry.content.clone()]
    }

    /// How many names there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn add_all(&mut self, initrd: &[u8], left: &mut u64) -> Result<(), KernelError> {
        let mut at = 0;
        while let Some(zeroes) = initrd[at..].iter().position(|byte| *byte != 0) {
            at += zeroes;
            let rest = &initrd[at..];
            if !MAGICS.iter().any(|magic| rest.starts_with(magic)) {
                let (unpacked, _) = payload::unpack_up_to(rest, *left)?;
                return self.add(unpacked).map(drop);
            }
            let bytes = archive_bytes(rest);
            *left = left.saturating_sub(bytes as u64);
            self.add(rest[..bytes].to_vec())?;
            at += bytes;
        }
        Ok(())
    }

    /// Adds the files of an archive, or of several with nothing but zeroes between them.
    fn add(&mut self, archive: Vec<u8>) -> Result<(), KernelError> {
        let number = self.archives.len();
        let damaged = |reason: &str| KernelError::Damaged {
            compression: "cpio",
            reason: reason.into(),
        };
        // Of the names of one inode that were seen without its content.
        let mut linked: BTreeMap<[u32; 3], Vec<Vec<u8>>> = BTreeMap::new();
        let mut at = 0;
        let result = loop {
            match archive[at..].iter().position(|byte| *byte != 0) {
                None => break Ok(()),
                Some(zeroes) => at += zeroes,
            }
            let Some(member) = Member::at(&archive, at) else {
                break Err(damaged("a file in it has no head, or does not fit"));
            };
            at = member.end;
            if member.name == TRAILER {
                linked.clear();
                continue;
            }
            if self.entries.len() >= NAMES_MAX {
                break Err(damaged("it has more than a million names"));
            }
            let entry = Entry {
                mode: member.mode,
                modified: member.modified,
                archive: number,
                content: member.content,
            };
            let name = plain(member.name);
            if member.links > 1 && entry.mode & 0o170_000 == 0o100_000 {
                let names = linked.entry(member.inode).or_default();
                names.push(name.clone());
                if !entry.content.is_empty() {
                    for name in std::mem::take(names) {
                        self.entries.insert(name, entry.clone());
                    }
                }
            }
            self.entries.insert(name, entry);
        };
        self.archives.push(archive);
        result
    }
}

/// A file as it stands in an archive.
struct Member<'a> {
    name: &'a [u8],
    mode: u32,
    modified: u32,
    links: u32,
    inode: [u32; 3],
    content: Range<usize>,
    end: usize,
}

impl<'a> Member<'a> {
    fn at(archive: &'a [u8], at: usize) -> Option<Member<'a>> {
        let head = archive.get(at..)?.get(..HEAD_BYTES)?;
        MAGICS.iter().find(|magic| head.starts_with(magic))?;
        let field = |number: usize| {
            let digits = std::str::from_utf8(&head[6 + 8 * number..][..8]).ok()?;
            u32::from_str_radix(digits, 16).ok()
        };
        let (bytes, name_bytes) = (field(6)? as usize, field(11)? as usize);
        let name = archive.get(at + HEAD_BYTES..)?.get(..name_bytes)?;
        if name_bytes == 0 || name_bytes > NAME_BYTES_MAX {
            return None;
        }
        // Both are padded to four bytes from the beginning of the archive.
        let start = (at + HEAD_BYTES + name_bytes).next_multiple_of(4);
        let end = start.checked_add(bytes)?;
        archive.get(start..end)?;
        let zero = name.iter().position(|byte| *byte == 0);
        Some(Member {
            name: &name[..zero.unwrap_or(name.len())],
            mode: field(1)?,
            modified: field(5)?,
            links: field(4)?,
            inode: [field(0)?, field(7)?, field(8)?],
            content: start..end,
            end: end.next_multiple_of(4).min(archive.len()),
        })
    }
}

/// How long the archive is that `bytes` begin with: up to after its trailer, or up to what is none of it.
fn archive_bytes(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(member) = Member::at(bytes, at) {
        at = member.end;
        if member.name == TRAILER {
            return at;
        }
    }
    bytes.len()
}

/// A name without what does not change where it leads.
fn plain(name: &[u8]) -> Vec<u8> {
    let parts = name.split(|byte| *byte == b'/');
    let parts: Vec<&[u8]> = parts.filter(|part| !matches!(*part, b"" | b".")).collect();
    parts.join(&b'/')
}

#[cfg(test)]
mod tests;
