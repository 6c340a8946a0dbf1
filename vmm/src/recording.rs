//! A recording on disk: a directory that can be copied.
//!
//! `journal`, the `kernel` and the `initrd` it ran, and an `index` that can be rebuilt. The images of its disks
//! are not copied, for they are large: `disk0`, `disk1`, ... are links to them, and may be replaced by
//! the images themselves.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};

use hindsight_devices::Devices;
use hindsight_replay::{Content, Header, IndexEntry, JournalError, JournalReader};
use thiserror::Error;

use crate::disk::{DiskError, OpenImage};
use crate::index;

/// Why a recording cannot be made or used.
#[derive(Debug, Error)]
pub enum RecordingError {
    /// A file cannot be written: a full disk, most often.
    #[error("cannot write {path}: {source}")]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file cannot be read.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The journal cannot be opened.
    #[error("{path}: {source}")]
    Journal {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: JournalError,
    },
    /// There is a recording already.
    #[error("{0} exists; give another directory, or --force to replace it")]
    Exists(PathBuf),
    /// What stands in the place of a link to an image may be the image.
    #[error(
        "{0} is no link but an image of a disk, which is never deleted; move it away, or give another \
         directory"
    )]
    Image(PathBuf),
    /// Not the recorded kernel or initrd.
    #[error(
        "{path} is not the recorded {what}: it has {found_bytes} bytes and BLAKE3 {found}, recorded \
         were {expected_bytes} bytes and {expected}"
    )]
    Content {
        /// The file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// Its length.
        found_bytes: u64,
        /// Its hash.
        found: String,
        /// The recorded length.
        expected_bytes: u64,
        /// The recorded hash.
        expected: String,
    },
}

/// Reads a file whole.
pub fn read(path: &Path) -> Result<Vec<u8>, RecordingError> {
    std::fs::read(path).map_err(|source| RecordingError::File {
        path: path.into(),
        source,
    })
}

/// Names bytes by their content.
pub fn content(bytes: &[u8]) -> Content {
    Content {
        bytes: bytes.len() as u64,
        blake3: *blake3::hash(bytes).as_bytes(),
    }
}

/// The files of a recording.
const FILES: [&str; 9] = [
    "journal", "kernel", "initrd", "index", "disk0", "disk1", "disk2", "disk3", "disk4",
];
/// The first of its disks among them.
const FIRST_DISK: usize = 4;
const _: () = assert!(FIRST_DISK + Devices::DISKS_MAX == FILES.len());

/// A directory that holds a recording.
#[derive(Clone, Debug)]
pub struct Recording {
    directory: PathBuf,
}

impl Recording {
    /// The recording in `directory`.
    pub fn at(directory: &Path) -> Recording {
        Recording {
            directory: directory.into(),
        }
    }

    /// Makes an empty recording; with `force` in place of one that is there.
    pub fn create(directory: &Path, force: bool) -> Result<Recording, RecordingError> {
        let recording = Recording::at(directory);
        let failed = |source| RecordingError::Write {
            path: directory.into(),
            source,
        };
        std::fs::create_dir_all(directory).map_err(failed)?;
        let mut entries = std::fs::read_dir(directory).map_err(failed)?;
        if entries.next().is_some() && !force {
            return Err(RecordingError::Exists(directory.into()));
        }
        recording.clear(&FILES)?;
        Ok(recording)
    }

    /// Removes files. Of an image, its link alone: an image is the operator's, and there may be no other.
    fn clear(&self, names: &[&str]) -> Result<(), RecordingError> {
        let links = names
            .iter()
            .filter(|name| FILES[FIRST_DISK..].contains(name));
        for path in links.map(|name| self.path(name)) {
            let found = std::fs::symlink_metadata(&path);
            if found.is_ok_and(|found| !found.is_symlink()) {
                return Err(RecordingError::Image(path));
            }
        }
        for path in names.iter().map(|name| self.path(name)) {
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(RecordingError::Write { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes what one run has left, for another run of the same machine.
    pub fn clear_journal(&self) -> Result<(), RecordingError> {
        self.clear(&["journal", "index"])
    }

    /// Removes the recording, and its directory if nothing else is in it.
    pub fn remove(&self) -> Result<(), RecordingError> {
        self.clear(&FILES)?;
        // What somebody else put there stays.
        let _ = std::fs::remove_dir(&self.directory);
        Ok(())
    }

    /// Path of one of its files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes one of its files.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), RecordingError> {
        let path = self.path(name);
        std::fs::write(&path, bytes).map_err(|source| RecordingError::Write { path, source })
    }

    /// Links to the images of its disks, by their absolute paths without links.
    pub fn link_disks(&self, images: &[OpenImage]) -> Result<(), RecordingError> {
        for (image, name) in images.iter().zip(&FILES[FIRST_DISK..]) {
            let path = self.path(name);
            std::os::unix::fs::symlink(image.target(), &path)
                .map_err(|source| RecordingError::Write { path, source })?;
        }
        Ok(())
    }

    /// The images of its disks, or `instead` of them; refused if they cannot be the recorded ones.
    pub fn disks(&self, header: &Header, instead: &[PathBuf]) -> Result<Vec<OpenImage>, DiskError> {
        let recorded = &header.machine.images;
        if !instead.is_empty() && instead.len() != recorded.len() {
            return Err(DiskError::Count {
                found: instead.len(),
                expected: recorded.len(),
            });
        }
        let paths = recorded.iter().zip(&FILES[FIRST_DISK..]).enumerate();
        let opened = paths.map(|(disk, (image, name))| {
            let path = instead
                .get(disk)
                .cloned()
                .unwrap_or_else(|| self.path(name));
            let opened = OpenImage::open(&path)?;
            opened.check(disk, image)?;
            Ok(opened)
        });
        opened.collect()
    }

    /// Where the image of a disk stands, or a link to it.
    pub fn disk_path(&self, disk: usize) -> Option<PathBuf> {
        FILES[FIRST_DISK..].get(disk).map(|name| self.path(name))
    }

    /// Whether `path` is, or would be, one of its files.
    pub fn has(&self, path: &Path) -> bool {
        let Some(directory) = path.parent() else {
            return false;
        };
        let directory = if directory.as_os_str().is_empty() {
            Path::new(".")
        } else {
            directory
        };
        let (own, other) = (self.directory.canonicalize(), directory.canonicalize());
        let named = FILES
            .iter()
            .any(|name| path.file_name() == Some(name.as_ref()));
        named && own.is_ok_and(|own| other.is_ok_and(|other| own == other))
    }

    /// Opens the journal for writing.
    pub fn create_journal(&self) -> Result<File, RecordingError> {
        let path = self.path("journal");
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|source| RecordingError::Write { path, source })
    }

    /// Opens the journal for reading. A file instead of a directory is taken as the journal itself.
    pub fn journal(&self) -> Result<JournalReader<BufReader<File>>, RecordingError> {
        let path = if self.directory.is_file() {
            self.directory.clone()
        } else {
            self.path("journal")
        };
        let file = File::open(&path).map_err(|source| RecordingError::File {
            path: path.clone(),
            source,
        })?;
        JournalReader::open(BufReader::new(file))
            .map_err(|source| RecordingError::Journal { path, source })
    }

    /// Length of the journal in bytes.
    pub fn journal_bytes(&self) -> Result<u64, RecordingError> {
        let path = self.path("journal");
        let meta = std::fs::metadata(&path);
        meta.map(|meta| meta.len())
            .map_err(|source| RecordingError::File { path, source })
    }

    /// The kernel's file: the recorded one, or `instead`.
    pub fn kernel(&self, instead: Option<&Path>) -> Result<(PathBuf, Vec<u8>), RecordingError> {
        let path = instead.map_or_else(|| self.path("kernel"), Path::to_path_buf);
        let bytes = read(&path)?;
        Ok((path, bytes))
    }

    /// The initrd's bytes: the recorded one, or `instead`; refused if they differ from what was
    /// recorded. Empty if there was none.
    pub fn initrd(
        &self,
        header: &Header,
        instead: Option<&Path>,
    ) -> Result<Vec<u8>, RecordingError> {
        let expected = match (&header.machine.initrd, instead) {
            (Some(expected), _) => expected.clone(),
            (None, Some(_)) => content(&[]),
            (None, None) => return Ok(Vec::new()),
        };
        let path = instead.map_or_else(|| self.path("initrd"), Path::to_path_buf);
        let bytes = read(&path)?;
        check(&path, "initrd", &content(&bytes), &expected)?;
        Ok(bytes)
    }

    /// Writes the index. It can always be rebuilt, so a failure is no loss.
    pub fn write_index(&self, entries: &[IndexEntry]) -> Result<(), RecordingError> {
        let bytes = index::to_bytes(entries);
        let path = self.path("index");
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&path)?;
            file.write_all(&bytes)
        };
        write().map_err(|source| RecordingError::Write {
            path: path.clone(),
            source,
        })
    }

    /// The index, if there is one, it is whole, and it describes this journal's length.
    pub fn read_index(&self) -> Option<Vec<IndexEntry>> {
        let bytes = std::fs::read(self.path("index")).ok()?;
        index::from_bytes(&bytes, self.journal_bytes().ok()?)
    }
}

/// Refuses a file that is not the recorded one.
pub fn check(
    path: &Path,
    what: &'static str,
    found: &Content,
    expected: &Content,
) -> Result<(), RecordingError> {
    if found == expected {
        return Ok(());
    }
    Err(RecordingError::Content {
        path: path.into(),
        what,
        found_bytes: found.bytes,
        found: found.hex(),
        expected_bytes: expected.bytes,
        expected: expected.hex(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replacing_a_recording_removes_links_to_images_and_never_an_image() {
        let dir = tempfile::tempdir().unwrap();
        let (image, at) = (dir.path().join("image"), dir.path().join("r"));
        std::fs::write(&image, [7; 512]).unwrap();
        let opened = OpenImage::open(&image).unwrap();
        let recording = Recording::create(&at, false).unwrap();
        recording.link_disks(std::slice::from_ref(&opened)).unwrap();
        // By way of the link that is about to go.
        let through_link = OpenImage::open(&at.join("disk0")).unwrap();
        assert!(matches!(
            Recording::create(&at, false),
            Err(RecordingError::Exists(_))
        ));
        let recording = Recording::create(&at, true).unwrap();
        assert!(std::fs::symlink_metadata(at.join("disk0")).is_err());
        recording.link_disks(&[through_link]).unwrap();
        assert_eq!(std::fs::read(at.join("disk0")).unwrap(), [7; 512]);

        // The image itself in the place of the link: refused, before anything is removed.
        recording.write("kernel", b"kernel").unwrap();
        std::fs::remove_file(at.join("disk0")).unwrap();
        std::fs::rename(&image, at.join("disk0")).unwrap();
        for refused in [Recording::create(&at, true).map(drop), recording.remove()] {
            assert!(
                matches!(refused, Err(RecordingError::Image(_))),
                "{refused:?}"
            );
        }
        assert_eq!(std::fs::read(at.join("disk0")).unwrap(), [7; 512]);
        assert_eq!(std::fs::read(at.join("kernel")).unwrap(), b"kernel");
    }

    #[test]
    fn its_own_files_are_known_by_any_path() {
        let dir = tempfile::tempdir().unwrap();
        let recording = Recording::create(&dir.path().join("r"), false).unwrap();
        assert!(recording.has(&dir.path().join("r/../r/disk0")));
        assert!(recording.has(&dir.path().join("r/journal")));
        assert!(!recording.has(&dir.path().join("r/my.img")));
        assert!(!recording.has(&dir.path().join("journal")));
    }
}
