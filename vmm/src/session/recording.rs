//! A recording on disk: a directory that can be copied.
//!
//! `journal`, the `kernel` and the `initrd` it ran, an `index` and `checkpoints` that can be made again, and the
//! `marks` that somebody has made. The images of its disks
//! are not copied, for they are large: `disk0`, `disk1`, ... are links to them, and may be replaced by
//! the images themselves. The other files are regular files, and nothing else is opened in their place.
//! How a recording is made is in [`super::new_recording`].

use std::fs::File;
use std::io::{BufReader, ErrorKind, Write};
use std::path::{Path, PathBuf};

use hindsight_devices::Devices;
use hindsight_replay::{
    Content, Header, IndexEntry, JournalError, JournalReader, KERNEL_BYTES_MAX,
};
use thiserror::Error;

use crate::failure::{Classified, Kind};

use super::index;
use crate::disk::{DiskError, OpenImage};
use crate::output_file::{Kept, Unfinished};
use crate::regular_file::{self, Links, ReadError};

/// Why a recording cannot be made or used.
#[derive(Debug, Error)]
pub enum RecordingError {
    /// A file cannot be written: a full disk, most often.
    #[error("cannot write {path}: {source}")]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A file cannot be read, or is not a regular one.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// There is no journal.
    #[error("{0} holds no recording: there is no journal in it")]
    None(PathBuf),
    /// What is to be recorded to is no directory, or cannot be made.
    #[error("cannot record to {path}: {source}; give another directory")]
    Directory {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Somebody else is recording there.
    #[error(
        "{0} is being recorded to by another process; wait for its end, or give another directory"
    )]
    InUse(PathBuf),
    /// The journal cannot be opened.
    #[error("{path}: {source}")]
    Journal {
        path: PathBuf,
        #[source]
        source: JournalError,
    },
    /// There is a recording already.
    #[error("{0} is not empty; give another directory, or --force to replace the recording in it")]
    Exists(PathBuf),
    /// What stands in the place of a link to an image may be the image.
    #[error(
        "{0} is no link but an image of a disk, which is never deleted; move it away, or give another \
         directory"
    )]
    Image(PathBuf),
    /// A directory is where a file should be.
    #[error(
        "{0} is a directory, where a recording has a file; move it away, or give another directory"
    )]
    NotAFile(PathBuf),
    /// Not as long as the recorded kernel or initrd.
    #[error("{path} is not the recorded {what}: it has {found} bytes, recorded were {expected}")]
    Length {
        /// The file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// Its length.
        found: u64,
        /// The recorded length.
        expected: u64,
    },
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

/// The longest file that is read as an initrd, in bytes: Linux is given one below 2 GiB.
pub(super) const INITRD_BYTES_MAX: u64 = 2 << 30;

/// Names bytes by their content.
pub fn content(bytes: &[u8]) -> Content {
    Content {
        bytes: bytes.len() as u64,
        blake3: *blake3::hash(bytes).as_bytes(),
    }
}

/// The file that has its checkpoints.
pub(super) const CHECKPOINTS: &str = "checkpoints";
/// The file that has its marks.
pub(super) const MARKS: &str = "marks";

/// The files of a recording.
pub(crate) const FILES: [&str; 11] = [
    "journal",
    "kernel",
    "initrd",
    "index",
    CHECKPOINTS,
    MARKS,
    "disk0",
    "disk1",
    "disk2",
    "disk3",
    "disk4",
];
/// The first of its disks among them.
pub(crate) const FIRST_DISK: usize = 6;
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

    /// Path of one of its files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
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

    /// Its files, which nothing that is made of it may replace or be written to: those that are there, what
    /// their links lead to, and the places of those that are not there.
    pub fn kept(&self) -> Kept {
        let mut kept = Kept::default();
        if self.is_lone_journal() {
            kept.keep(&self.directory, "the journal itself");
        }
        for (at, name) in FILES.into_iter().enumerate() {
            let what = match at.checked_sub(FIRST_DISK) {
                None => format!("the {name} of this recording"),
                Some(disk) => {
                    format!("the image of disk {disk} of this recording, or the link to it")
                }
            };
            kept.keep(&self.path(name), &what);
        }
        kept
    }

    /// A file instead of a directory is taken as the journal itself.
    fn is_lone_journal(&self) -> bool {
        self.directory.is_file()
    }

    fn journal_path(&self) -> (PathBuf, Links) {
        match self.is_lone_journal() {
            true => (self.directory.clone(), Links::Follow),
            false => (self.path("journal"), Links::Refuse),
        }
    }

    /// Opens the journal for reading.
    pub fn journal(&self) -> Result<JournalReader<BufReader<File>>, RecordingError> {
        let (path, links) = self.journal_path();
        let (file, _) = regular_file::open(&path, links).map_err(|error| match error {
            ReadError::File { source, .. }
                if source.kind() == ErrorKind::NotFound && self.directory.is_dir() =>
            {
                RecordingError::None(self.directory.clone())
            }
            error => error.into(),
        })?;
        JournalReader::open(BufReader::new(file))
            .map_err(|source| RecordingError::Journal { path, source })
    }

    /// Length of the journal in bytes.
    fn journal_bytes(&self) -> Option<u64> {
        let (path, links) = self.journal_path();
        Some(regular_file::open(&path, links).ok()?.1)
    }

    /// One of its files, or `instead` of it, refused if it differs from what was recorded; its length is
    /// compared before it is read.
    fn recorded(
        &self,
        name: &'static str,
        instead: Option<&Path>,
        expected: &Content,
        limit: u64,
    ) -> Result<Vec<u8>, RecordingError> {
        let (path, links) = match instead {
            Some(path) => (path.to_path_buf(), Links::Follow),
            None => (self.path(name), Links::Refuse),
        };
        let opened = regular_file::open(&path, links)?;
        if opened.1 != expected.bytes {
            return Err(RecordingError::Length {
                path,
                what: name,
                found: opened.1,
                expected: expected.bytes,
            });
        }
        let bytes = regular_file::read_whole(&path, opened, limit)?;
        check(&path, name, &content(&bytes), expected)?;
        Ok(bytes)
    }

    /// The kernel's file: the recorded one, or `instead`, which must be the same.
    pub fn kernel(
        &self,
        header: &Header,
        instead: Option<&Path>,
    ) -> Result<Vec<u8>, RecordingError> {
        self.recorded("kernel", instead, &header.machine.kernel, KERNEL_BYTES_MAX)
    }

    /// The initrd's bytes: the recorded one, or `instead`, which must be the same. Empty if there was none.
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
        let limit = INITRD_BYTES_MAX.min(header.machine.memory_bytes);
        self.recorded("initrd", instead, &expected, limit)
    }

    /// Writes the index, in the place of whatever stands there. It can always be rebuilt, so a failure is
    /// no loss.
    pub fn write_index(&self, entries: &[IndexEntry]) -> Result<(), RecordingError> {
        let bytes = index::to_bytes(entries);
        let path = self.path("index");
        let write = || -> std::io::Result<()> {
            let unfinished = Unfinished::beside(&path, 0o666)?;
            unfinished.file().write_all(&bytes)?;
            unfinished.put(&path, true)
        };
        write().map_err(|source| RecordingError::Write {
            path: path.clone(),
            source,
        })
    }

    /// The index, if there is one, it is whole, and it describes this journal's length.
    pub fn read_index(&self) -> Option<Vec<IndexEntry>> {
        let path = self.path("index");
        let journal_bytes = self.journal_bytes()?;
        let opened = regular_file::open(&path, Links::Refuse).ok()?;
        // What it says of a frame is shorter than the frame.
        let bytes = regular_file::read_whole(&path, opened, journal_bytes).ok()?;
        index::from_bytes(&bytes, journal_bytes)
    }
}

/// Refuses a file that is not the recorded one.
pub(super) fn check(
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

impl Classified for RecordingError {
    fn kind(&self) -> Kind {
        match self {
            RecordingError::Write { .. } => Kind::HostFailed,
            _ => Kind::BadInput,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn pipe(path: &Path) {
        let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
        rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, 0).unwrap();
    }

    fn refusal<T>(result: Result<T, RecordingError>) -> String {
        result.map(drop).unwrap_err().to_string()
    }

    #[test]
    fn a_recordings_files_are_regular_files_and_nothing_else_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let recording = Recording::at(dir.path());
        assert!(refusal(recording.journal()).contains("holds no recording"));
        let expected = content(b"kernel");
        for name in ["journal", "kernel", "initrd", "index"] {
            let read = || match name {
                "journal" => refusal(recording.journal()),
                "index" => recording
                    .read_index()
                    .map_or(String::new(), |_| panic!("an index")),
                _ => refusal(recording.recorded(name, None, &expected, 1 << 30)),
            };
            let path = recording.path(name);
            pipe(&path);
            let told = read();
            assert!(name == "index" || told.contains("is a pipe"), "{told}");
            for target in ["/dev/zero", "/etc/passwd"] {
                std::fs::remove_file(&path).unwrap();
                symlink(target, &path).unwrap();
                let told = read();
                assert!(name == "index" || told.contains("is a link"), "{told}");
            }
            std::fs::remove_file(&path).unwrap();
            std::fs::create_dir(&path).unwrap();
            let told = read();
            assert!(name == "index" || told.contains("is a directory"), "{told}");
            std::fs::remove_dir(&path).unwrap();
        }
    }

    #[test]
    fn a_file_of_another_length_or_content_is_not_the_recorded_one() {
        let dir = tempfile::tempdir().unwrap();
        let recording = Recording::at(dir.path());
        let expected = content(b"kernel");
        let read =
            |instead: Option<&Path>| recording.recorded("kernel", instead, &expected, 1 << 30);
        let path = recording.path("kernel");
        // Longer than any memory: its length is compared before it is read.
        File::create(&path).unwrap().set_len(1 << 43).unwrap();
        assert!(matches!(read(None), Err(RecordingError::Length { .. })));
        std::fs::write(&path, b"another").unwrap();
        assert!(matches!(
            read(None),
            Err(RecordingError::Length { found: 7, .. })
        ));
        std::fs::write(&path, b"kernal").unwrap();
        assert!(matches!(read(None), Err(RecordingError::Content { .. })));
        std::fs::write(&path, b"kernel").unwrap();
        assert_eq!(read(None).unwrap(), b"kernel");
        // What the user names may be a link.
        let link = dir.path().join("link");
        symlink(&path, &link).unwrap();
        assert_eq!(read(Some(&link)).unwrap(), b"kernel");
        // A length that no kernel has is not believed either.
        File::create(&path).unwrap().set_len(1 << 43).unwrap();
        let claimed = Content {
            bytes: 1 << 43,
            ..expected.clone()
        };
        let refused = recording.recorded("kernel", None, &claimed, KERNEL_BYTES_MAX);
        assert!(refusal(refused).contains("at most"));
    }

    #[test]
    fn an_index_is_written_in_its_place_and_through_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("r");
        std::fs::create_dir(&at).unwrap();
        let recording = Recording::at(&at);
        let precious = dir.path().join("precious");
        std::fs::write(&precious, "mine").unwrap();
        symlink(&precious, at.join("index")).unwrap();
        std::fs::write(at.join("journal"), [0; 4096]).unwrap();
        let entry = IndexEntry {
            offset: 100,
            first: 0,
            through: 7,
            now: 1,
        };
        recording.write_index(&[entry]).unwrap();
        assert_eq!(std::fs::read(&precious).unwrap(), b"mine");
        assert_eq!(recording.read_index().unwrap().len(), 1);
        // One that is longer than its journal is not read.
        let index = File::options().append(true).open(at.join("index")).unwrap();
        index.set_len(1 << 43).unwrap();
        assert!(recording.read_index().is_none());
        // Nothing unfinished is left, whether it can be written or not.
        std::fs::remove_file(at.join("index")).unwrap();
        std::fs::create_dir(at.join("index")).unwrap();
        recording.write_index(&[entry]).unwrap_err();
        assert_eq!(std::fs::read_dir(&at).unwrap().count(), 2);
    }

    #[test]
    fn its_own_files_and_what_its_links_lead_to_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("r");
        std::fs::create_dir(&at).unwrap();
        std::fs::write(at.join("journal"), "").unwrap();
        std::fs::write(dir.path().join("image"), "").unwrap();
        symlink(dir.path().join("image"), at.join("disk1")).unwrap();
        let refused = |recording: &Recording, path: &str| {
            let plan =
                crate::output_file::Plan::new(&dir.path().join(path), true, recording.kept());
            plan.is_err()
        };
        let recording = Recording::at(&at);
        for path in ["r/journal", "r/../r/disk1", "r/index", "r/disk4", "image"] {
            assert!(refused(&recording, path), "{path}");
        }
        for path in ["r/my.pcapng", "journal", "disk1"] {
            assert!(!refused(&recording, path), "{path}");
        }
        let lone = Recording::at(&at.join("journal"));
        assert!(refused(&lone, "r/journal"));
    }
}
