//! Files that are read whole: regular ones, of a length that is known before they are read.
//!
//! A recording may come from anybody, and a name on the command line may lead anywhere. A pipe would be waited
//! for, `/dev/zero` read until memory ends, and some devices do something when they are opened. So each
//! file is looked at before it is opened, is opened without waiting, and is looked at again.

use std::fs::{File, FileType};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::failure::{Classified, Kind};

/// Why a file was not read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// It cannot be opened or read.
    #[error("{path}: {source}")]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// It is something else than a file.
    #[error("{path} is {found}, expected a regular file{hint}")]
    NotRegular {
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What to do, or nothing.
        hint: &'static str,
    },
    /// It is longer than it can be.
    #[error("{path} has {found} bytes, expected {limit} at most; is it the right file?")]
    TooLarge {
        path: PathBuf,
        /// Its length.
        found: u64,
        /// The most that is read.
        limit: u64,
    },
}

/// What is done about a symbolic link in the place of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Links {
    /// It is followed: the user gave that name.
    Follow,
    /// It is refused: somebody else may have made it.
    Refuse,
}

/// Opens a regular file, and says how many bytes it has.
pub(crate) fn open(path: &Path, links: Links) -> Result<(File, u64), ReadError> {
    let failed = |source| ReadError::File {
        path: path.into(),
        source,
    };
    let (found, flag) = match links {
        Links::Follow => (path.metadata(), 0),
        Links::Refuse => (path.symlink_metadata(), libc::O_NOFOLLOW),
    };
    refuse_others(path, found.map_err(failed)?.file_type())?;
    let file = File::options()
        .read(true)
        .custom_flags(flag | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    refuse_others(path, found.file_type())?;
    Ok((file, found.len()))
}

fn refuse_others(path: &Path, kind: FileType) -> Result<(), ReadError> {
    let (found, hint) = match kind {
        _ if kind.is_file() => return Ok(()),
        _ if kind.is_symlink() => (
            "a link, as a recording's files never are but for the images of its disks",
            "; put the file itself in its place",
        ),
        _ if kind.is_dir() => ("a directory", ""),
        _ if kind.is_fifo() => ("a pipe", "; write what comes out of it to a file first"),
        _ if kind.is_socket() => ("a socket", ""),
        _ => ("a device", ""),
    };
    Err(ReadError::NotRegular {
        path: path.into(),
        found,
        hint,
    })
}

/// Reads what [`open`] opened, if it has at most `limit` bytes.
pub(crate) fn read_whole(
    path: &Path,
    (file, bytes): (File, u64),
    limit: u64,
) -> Result<Vec<u8>, ReadError> {
    if bytes > limit {
        return Err(ReadError::TooLarge {
            path: path.into(),
            found: bytes,
            limit,
        });
    }
    let mut content = Vec::new();
    let read = content
        .try_reserve_exact(bytes as usize)
        .map_err(|_| ErrorKind::OutOfMemory.into())
        // Somebody may be writing to it.
        .and_then(|()| file.take(bytes).read_to_end(&mut content));
    match read {
        Ok(_) => Ok(content),
        Err(source) => Err(ReadError::File {
            path: path.into(),
            source,
        }),
    }
}

/// Opens a regular file that the user named, and reads it if it has at most `limit` bytes.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, ReadError> {
    read_whole(path, open(path, Links::Follow)?, limit)
}

impl Classified for ReadError {
    fn kind(&self) -> Kind {
        Kind::BadInput
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_is_no_regular_file_is_named_and_neither_waited_for_nor_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), kind, mode, 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        symlink("/dev/zero", at("link")).unwrap();
        for (path, what) in [
            (at("pipe"), "a pipe"),
            (at("socket"), "a socket"),
            (at("link"), "a device"),
            ("/dev/zero".into(), "a device"),
            (dir.path().into(), "a directory"),
        ] {
            let refused = read(&path, u64::MAX).unwrap_err();
            assert!(
                matches!(refused, ReadError::NotRegular { found, .. } if found == what),
                "{refused}"
            );
        }
    }

    #[test]
    fn links_are_followed_for_the_user_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        std::fs::write(&file, "content").unwrap();
        symlink(&file, &link).unwrap();
        assert_eq!(read(&link, 7).unwrap(), b"content");
        let refused = open(&link, Links::Refuse).unwrap_err();
        assert!(matches!(refused, ReadError::NotRegular { .. }), "{refused}");
        open(&file, Links::Refuse).unwrap();
    }

    #[test]
    fn a_file_that_is_too_long_is_not_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // Longer than any memory, and without a byte on the disk.
        file.as_file().set_len(1 << 43).unwrap();
        let refused = read(file.path(), 1 << 30).unwrap_err();
        assert!(matches!(refused, ReadError::TooLarge { found, .. } if found == 1 << 43));
        file.as_file().set_len(0).unwrap();
        assert_eq!(read(file.path(), 0).unwrap(), b"");
    }
}
