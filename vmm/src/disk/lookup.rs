//! Files of a guest by their paths, as they are on its disks at the present moment.
//!
//! Which file system the guest has mounted where is for its kernel to know. A path is looked for in each file system of
//! the disks as if it were the root, and the first that has it is believed.

use std::rc::Rc;

use super::Disks;
use super::budget::Budget;
use super::ext::{ExtError, FileSystem, Inode, Kind, ROOT, Source};
use super::partitions::partitions;
use super::path::{Tree, TreeFile, resolve};

/// The bytes of a disk as the guest would read them now, or of a part of it.
#[derive(Clone, Copy, Debug)]
struct Present<'a> {
    disks: &'a Disks,
    disk: usize,
    offset: u64,
    bytes: u64,
}

impl Source for Present<'_> {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_within(&self, offset: u64, into: &mut [u8]) -> Result<(), ExtError> {
        let read = self.disks.peek(self.disk, self.offset + offset, into);
        read.map_err(|error| ExtError::Source(error.to_string()))
    }
}

/// Finds a file on the disks of a machine; with `follow` what a symbolic link leads to. `None`: no file system has it.
///
/// # Errors
///
/// A file system that might have it cannot be read, in words.
pub fn find_on_disks(disks: &Disks, path: &[u8], follow: bool) -> Result<Option<TreeFile>, String> {
    let mut problem = None;
    for disk in 0.. {
        let Some(bytes) = disks.bytes(disk) else {
            break;
        };
        let whole = Present {
            disks,
            disk,
            offset: 0,
            bytes,
        };
        let mut found = || -> Result<Option<TreeFile>, ExtError> {
            let budget = Rc::new(Budget::new(bytes));
            if let Some(file) = find(whole, &budget, path, follow)? {
                return Ok(Some(file));
            }
            for partition in partitions(bytes, |offset, into| whole.read_at(offset, into))? {
                let part = Present {
                    offset: partition.offset,
                    bytes: partition.bytes,
                    ..whole
                };
                match find(part, &budget, path, follow) {
                    Ok(None) => {}
                    Ok(file) => return Ok(file),
                    Err(error) => {
                        problem.get_or_insert_with(|| {
                            format!("disk {disk}, partition {}: {error}", partition.number)
                        });
                    }
                }
            }
            Ok(None)
        };
        match found() {
            Ok(None) => {}
            Ok(file) => return Ok(file),
            Err(error) => {
                problem.get_or_insert_with(|| format!("disk {disk}: {error}"));
            }
        }
    }
    problem.map_or(Ok(None), Err)
}

fn find<S: Source>(
    source: S,
    budget: &Rc<Budget>,
    path: &[u8],
    follow: bool,
) -> Result<Option<TreeFile>, ExtError> {
    let Some(system) = FileSystem::open(source, budget.clone())? else {
        return Ok(None);
    };
    match resolve(&system, path, follow)? {
        Some(inode) => system.file(&inode).map(Some),
        None => Ok(None),
    }
}

impl<S: Source> Tree for FileSystem<S> {
    type Node = Inode;
    type Error = ExtError;

    fn root(&self) -> Result<Inode, ExtError> {
        self.inode(ROOT)
    }

    fn child(&self, directory: &Inode, name: &[u8]) -> Result<Option<Inode>, ExtError> {
        if directory.kind() != Kind::Directory {
            return Ok(None);
        }
        let number = self.names(directory)?.get(name).copied();
        number.map(|number| self.inode(number)).transpose()
    }

    fn link(&self, node: &Inode) -> Result<Option<Vec<u8>>, ExtError> {
        match node.kind() {
            Kind::Link if node.is_encrypted() => Err(encrypted()),
            Kind::Link => self.link_target(node).map(Some),
            _ => Ok(None),
        }
    }
}

fn encrypted() -> ExtError {
    ExtError::Unsupported("it is encrypted".into())
}

impl<S: Source> FileSystem<S> {
    /// A file with all that is in it.
    fn file(&self, inode: &Inode) -> Result<TreeFile, ExtError> {
        let content = match inode.kind() {
            Kind::File => self.content(inode)?,
            Kind::Link => self.link_target(inode)?,
            _ => Vec::new(),
        };
        Ok(TreeFile {
            mode: inode.kind_and_mode().into(),
            owner: inode.owner(),
            modified: u32::try_from(inode.modified().0).unwrap_or(0),
            content,
        })
    }

    /// What is in a file. What was never written reads as zeroes.
    fn content(&self, inode: &Inode) -> Result<Vec<u8>, ExtError> {
        if inode.is_encrypted() {
            return Err(encrypted());
        }
        if inode.is_inline() {
            return self.inline_content(inode);
        }
        if inode.size > TreeFile::BYTES_MAX {
            return Err(ExtError::Unsupported(format!(
                "a file of {} bytes is too long to be looked at",
                inode.size
            )));
        }
        let mut content = vec![0; inode.size as usize];
        for piece in self.pieces(inode)? {
            let end = (piece.start + piece.bytes).min(inode.size);
            if piece.start < end {
                let into = &mut content[piece.start as usize..end as usize];
                self.read(piece.offset, into)?;
            }
        }
        Ok(content)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
    use std::process::{Command, Stdio};

    use super::*;
    use crate::disk::OpenImage;
    use crate::disk::partitions::testing::divide;

    #[test]
    fn a_file_of_a_partition_is_found_by_its_path_and_read_as_it_is_now() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, system) = (dir.path().join("tree"), dir.path().join("ext4"));
        let libraries = tree.join("usr/lib/deep");
        std::fs::create_dir_all(&libraries).unwrap();
        let text: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(libraries.join("libc.so.6"), &text).unwrap();
        let mode = std::fs::Permissions::from_mode(0o751);
        std::fs::set_permissions(libraries.join("libc.so.6"), mode).unwrap();
        symlink("usr/lib", tree.join("lib")).unwrap();
        symlink("/lib/deep/libc.so.6", tree.join("libc")).unwrap();
        let mut command = Command::new("/sbin/mke2fs");
        command
            .args(["-q", "-F", "-t", "ext4", "-d"])
            .args([&tree, &system]);
        let made = command.arg("8M").stdout(Stdio::null()).status();
        if let Err(error) = made {
            eprintln!("SKIPPED: mke2fs cannot be started: {error}");
            return;
        }
        let disk = dir.path().join("disk");
        let file = std::fs::File::create(&disk).unwrap();
        file.set_len(16 << 20).unwrap();
        let blocks = std::fs::read(&system).unwrap();
        file.write_all_at(&blocks, 1 << 20).unwrap();
        if !divide(&disk, "label: gpt\nstart=1MiB, size=8MiB, type=L\n") {
            return;
        }
        // Nothing is on the first of the two disks.
        let empty = dir.path().join("empty");
        std::fs::write(&empty, vec![0; 1 << 20]).unwrap();
        let images = [&empty, &disk].map(|path| OpenImage::open(path).unwrap());
        let disks = Disks::new(images.to_vec()).unwrap();
        let find = |path: &str, follow| find_on_disks(&disks, path.as_bytes(), follow).unwrap();
        for path in [
            "/usr/lib/deep/libc.so.6",
            "/lib/deep/../deep/libc.so.6",
            "/libc",
        ] {
            let found = find(path, true).unwrap_or_else(|| panic!("{path}"));
            assert!(found.is_regular() && found.content == text, "{path}");
            assert_eq!(found.mode & 0o777, 0o751, "{path}");
        }
        let link = find("/libc", false).expect("it is there");
        assert!(link.is_link() && link.content == b"/lib/deep/libc.so.6");
        assert!(find("/usr", true).is_some_and(|found| !found.is_regular()));
        assert_eq!(find("/usr/lib/deep/libm.so.6", true), None);
        assert_eq!(find("/usr/lib/deep/libc.so.6/x", true), None);

        // A file system that cannot be read says so, and does not stand in the way of another.
        let mut blocks = blocks;
        blocks[1024 + 0x60] = 0xff;
        let damaged = dir.path().join("damaged");
        std::fs::write(&damaged, &blocks).unwrap();
        let both = [&damaged, &disk].map(|path| OpenImage::open(path).unwrap());
        let disks = Disks::new(both.to_vec()).unwrap();
        assert!(find_on_disks(&disks, b"/libc", true).unwrap().is_some());
        let error = find_on_disks(&disks, b"/none", true).unwrap_err();
        assert!(error.starts_with("disk 0: "), "{error}");
    }
}
