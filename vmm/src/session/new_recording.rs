//! Making a recording in a directory, without losing the one that was there before.
//!
//! What is written before the guest runs (kernel, initrd, the links to images, the head of the journal) stands in
//! `.new-…` inside the directory. If anything fails until then, that goes, and the directory is as it was.
//! When the guest is about to run, the files of the old recording are moved to `replaced-…` inside the
//! directory, a recording like any other, and the new ones take their places: from then on the journal grows
//! where it can be watched. The old recording is deleted when the new one is closed. If the new one
//! fails before that, both are kept.
//!
//! Everything happens inside the directory because it may be a mount point, and because its parent may not be
//! writable. The directory is locked meanwhile, so that two recorders never share one.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::open::RecordedImages;
use super::recording::{CHECKPOINTS, FILES, FIRST_DISK, MARKS, Recording, RecordingError};
use crate::disk::OpenImage;

/// How the directory is called in which a recording stands that has not begun.
const NEW: &str = ".new-";
/// How the directory is called to which the recording goes that is being replaced.
const REPLACED: &str = "replaced-";

/// A recording that is being made.
#[derive(Debug)]
pub(super) struct NewRecording {
    recording: Recording,
    /// Where it stands until it has begun.
    draft: Option<Recording>,
    /// Whether it stands in its place.
    begun: bool,
    /// Whether the directory was not there before.
    made_directory: bool,
    /// The recording that was there before, once its place is taken.
    replaced: Option<Recording>,
    /// The directory, locked.
    lock: File,
}

impl NewRecording {
    /// Makes an empty recording in `directory`; with `force` also where something is. Nothing that is there is
    /// touched yet.
    pub(super) fn create(directory: &Path, force: bool) -> Result<NewRecording, RecordingError> {
        let failed = |source| RecordingError::Directory {
            path: directory.into(),
            source,
        };
        let made_directory = make(directory).map_err(failed)?;
        let lock = File::open(directory).map_err(failed)?;
        // Any other error: some network file systems lock no directories.
        let locked = flock(&lock, FlockOperation::NonBlockingLockExclusive);
        if locked == Err(Errno::WOULDBLOCK) {
            return Err(RecordingError::InUse(directory.into()));
        }
        let mut new = NewRecording {
            recording: Recording::at(directory),
            draft: None,
            begun: false,
            made_directory,
            replaced: None,
            lock,
        };
        let empty = new.remove_old_drafts().map_err(failed)?;
        if !empty && !force {
            return Err(RecordingError::Exists(directory.into()));
        }
        refuse_others(&new.recording)?;
        new.draft = Some(new.inner_directory(NEW)?);
        Ok(new)
    }

    /// Removes what recorders have left that were killed before they began. Says whether nothing else is there.
    fn remove_old_drafts(&self) -> std::io::Result<bool> {
        let mut empty = true;
        for entry in std::fs::read_dir(self.recording.directory())? {
            let entry = entry?;
            let is_draft = entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(NEW.as_bytes());
            let is_draft = is_draft && entry.file_type()?.is_dir();
            let removed = is_draft && remove(&Recording::at(&entry.path())).is_ok();
            empty &= removed;
        }
        Ok(empty)
    }

    fn inner_directory(&self, prefix: &str) -> Result<Recording, RecordingError> {
        let directory = self.recording.directory();
        let made = tempfile::Builder::new()
            .prefix(prefix)
            .tempdir_in(directory);
        let made = made.map_err(|source| match source.kind() {
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                RecordingError::Directory {
                    path: directory.into(),
                    source,
                }
            }
            _ => RecordingError::Write {
                path: directory.into(),
                source,
            },
        })?;
        Ok(Recording::at(&made.keep()))
    }

    /// Where it is written to now.
    fn place(&self) -> &Recording {
        self.draft.as_ref().unwrap_or(&self.recording)
    }

    /// The recording.
    pub(super) fn recording(&self) -> &Recording {
        &self.recording
    }

    /// Writes one of its files.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), RecordingError> {
        let path = self.place().path(name);
        let file = File::create_new(&path);
        let written = file.and_then(|mut file| file.write_all(bytes));
        written.map_err(|source| RecordingError::Write {
            path: self.recording.path(name),
            source,
        })
    }

    /// Writes what the machine of another recording is made of.
    pub(super) fn write_machine(&self, images: &RecordedImages) -> Result<(), RecordingError> {
        self.write("kernel", &images.image)?;
        if !images.initrd.is_empty() {
            self.write("initrd", &images.initrd)?;
        }
        self.link_disks(&images.disks)
    }

    /// Links to the images of its disks, by their absolute paths without links.
    pub(super) fn link_disks(&self, images: &[OpenImage]) -> Result<(), RecordingError> {
        for (image, name) in images.iter().zip(&FILES[FIRST_DISK..]) {
            let path = self.place().path(name);
            symlink(image.target(), &path)
                .map_err(|source| RecordingError::Write { path, source })?;
        }
        Ok(())
    }

    /// Opens a journal for writing: the first, or another for another run of the same machine, for which
    /// what the last run has left is removed.
    pub(super) fn create_journal(&self) -> Result<File, RecordingError> {
        let place = self.place();
        for path in ["journal", "index", CHECKPOINTS, MARKS].map(|name| place.path(name)) {
            remove_file(&path)?;
        }
        let path = place.path("journal");
        File::create_new(&path).map_err(|source| RecordingError::Write { path, source })
    }

    /// All is ready, and the guest is about to run: takes the place of the recording that was there. If that
    /// fails, all is as it was.
    pub(super) fn begin(&mut self) -> Result<(), RecordingError> {
        let Some(draft) = self.draft.clone() else {
            return Ok(());
        };
        // An image may have been moved here since.
        refuse_others(&self.recording)?;
        if present(&self.recording).next().is_some() {
            self.replaced = Some(self.inner_directory(REPLACED)?);
        }
        let mut moved = match &self.replaced {
            Some(replaced) => move_files(&self.recording, replaced),
            None => Ok(()),
        };
        if moved.is_ok() {
            moved = move_files(&draft, &self.recording);
            if moved.is_err() {
                let _ = move_files(&self.recording, &draft);
            }
        }
        if let Err(source) = moved {
            self.put_back();
            return Err(RecordingError::Write {
                path: self.recording.directory().into(),
                source,
            });
        }
        self.draft = None;
        self.begun = true;
        let _ = std::fs::remove_dir(draft.directory());
        Ok(())
    }

    /// Puts the recording that was replaced back.
    fn put_back(&mut self) {
        if let Some(replaced) = self.replaced.take() {
            // What cannot be moved stays where it is.
            let _ = move_files(&replaced, &self.recording);
            let _ = std::fs::remove_dir(replaced.directory());
        }
    }

    /// Where the recording is that was there before, if it has been replaced and not deleted.
    pub(super) fn replaced(&self) -> Option<&Path> {
        self.replaced.as_ref().map(Recording::directory)
    }

    /// The recording is closed and good: deletes the one that was there before, when this one is safe on the
    /// disk.
    pub(super) fn finish(mut self) -> Result<(), RecordingError> {
        let Some(replaced) = self.replaced.take() else {
            return Ok(());
        };
        let sync = |path: &Path| File::open(path).and_then(|file| file.sync_all());
        for path in present(&self.recording).map(|name| self.recording.path(name)) {
            // An image is the operator's, and stays as it is.
            if !path.is_symlink() {
                sync(&path).map_err(|source| RecordingError::Write { path, source })?;
            }
        }
        // Some file systems sync no directories.
        let _ = sync(self.recording.directory());
        remove(&replaced)
    }

    /// The recording is not wanted: removes it, and puts back what was there before.
    pub(super) fn withdraw(mut self) -> Result<(), RecordingError> {
        if self.begun {
            refuse_others(&self.recording)?;
            for path in FILES.map(|name| self.recording.path(name)) {
                remove_file(&path)?;
            }
            self.put_back();
            self.begun = false;
        }
        Ok(())
    }
}

impl Drop for NewRecording {
    /// One that has not begun leaves nothing.
    fn drop(&mut self) {
        if let Some(draft) = &self.draft {
            let _ = remove(draft);
        }
        if !self.begun && self.made_directory {
            // What somebody else put there stays, and so does it.
            let _ = std::fs::remove_dir(self.recording.directory());
        }
        // A process that was forked meanwhile has the file, too, and the lock with it, until it runs another program.
        let _ = flock(&self.lock, FlockOperation::Unlock);
    }
}

/// Makes a directory; says whether it was not there.
fn make(directory: &Path) -> std::io::Result<bool> {
    match std::fs::create_dir(directory) {
        Ok(()) => return Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            return match directory.is_dir() {
                true => Ok(false),
                false => Err(ErrorKind::NotADirectory.into()),
            };
        }
        Err(error) => return Err(error),
    }
    std::fs::create_dir_all(directory).map(|()| true)
}

/// Refuses to touch what may be the only copy of an image, and what is no file.
fn refuse_others(recording: &Recording) -> Result<(), RecordingError> {
    for (at, name) in FILES.into_iter().enumerate() {
        let path = recording.path(name);
        let Ok(found) = path.symlink_metadata() else {
            continue;
        };
        if at >= FIRST_DISK && !found.is_symlink() {
            return Err(RecordingError::Image(path));
        }
        if found.is_dir() {
            return Err(RecordingError::NotAFile(path));
        }
    }
    Ok(())
}

/// Which files of a recording are there.
fn present(recording: &Recording) -> impl Iterator<Item = &'static str> {
    let there = |name: &&str| recording.path(name).symlink_metadata().is_ok();
    FILES.into_iter().filter(there)
}

/// Moves the files of a recording, the journal last: where that is, all is.
fn move_files(from: &Recording, to: &Recording) -> std::io::Result<()> {
    for name in present(from).collect::<Vec<_>>().into_iter().rev() {
        std::fs::rename(from.path(name), to.path(name))?;
    }
    Ok(())
}

/// Removes a recording with its directory. Of an image, its link alone.
fn remove(recording: &Recording) -> Result<(), RecordingError> {
    refuse_others(recording)?;
    for name in FILES {
        remove_file(&recording.path(name))?;
    }
    let path = recording.directory();
    std::fs::remove_dir(path).map_err(|source| RecordingError::Write {
        path: path.into(),
        source,
    })
}

/// Removes a file that may not be there.
fn remove_file(path: &Path) -> Result<(), RecordingError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(RecordingError::Write {
            path: path.into(),
            source,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
