//! Files that a command writes for its user: whole or not at all, and never in the place of what must stay.
//!
//! What is written has no name, or one of its own beside its place, until it is complete, and then takes its place.
//! So a command that fails leaves nothing, and nobody finds half a file. Nothing is written through a
//! link, nothing that is there is replaced unless the user says `--force`, and the files that a command works from
//! ([`Kept`]) are not replaced even then, by whatever name they are called. All of this is asked before the
//! command begins its work ([`Plan::new`]), and once more when the file takes its place.
//!
//! A pipe, a terminal and `/dev/null` cannot lose anything: what goes there is written as it comes. Standard
//! output is called `-`.

use std::fs::{File, Metadata, Permissions};
use std::io::{ErrorKind, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, openat};
use tempfile::{Builder, NamedTempFile};
use thiserror::Error;

use crate::failure::{Classified, Kind};

/// How a file that is not complete is called: this, and letters by chance.
pub const UNFINISHED: &str = ".hindsight-";
/// The name of standard output.
const STDOUT: &str = "-";

/// Why a file was not written.
#[derive(Debug, Error)]
pub enum OutputError {
    /// It must not be written, or cannot be from the start. Nothing was touched.
    #[error("{path} {why}")]
    Refused {
        /// What was named.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The host failed on the way: a full disk, most often. Nothing is left.
    #[error("cannot write {path}: {source}")]
    Write {
        /// What was to be written.
        path: PathBuf,
        /// Why it was not.
        #[source]
        source: std::io::Error,
    },
}

impl OutputError {
    fn refused(path: &Path, why: impl Into<String>) -> OutputError {
        let (path, why) = (path.into(), why.into());
        OutputError::Refused { path, why }
    }

    /// What went wrong at `path`: with the name that was given, or with the host.
    pub fn at(path: &Path, source: std::io::Error) -> OutputError {
        let path = path.into();
        match source.kind() {
            ErrorKind::NotFound
            | ErrorKind::NotADirectory
            | ErrorKind::IsADirectory
            | ErrorKind::PermissionDenied
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::InvalidFilename
            | ErrorKind::InvalidInput => {
                let why = format!("cannot be written: {source}");
                OutputError::Refused { path, why }
            }
            _ => OutputError::Write { path, source },
        }
    }
}

/// A file whatever it is called.
type FileId = (u64, u64);

fn id(found: &Metadata) -> FileId {
    (found.dev(), found.ino())
}

/// Files that no output may replace or go to, by whatever path, link or hard link they are named.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    files: Vec<(FileId, String)>,
    /// Where one of them belongs, whether it is there or not: its directory, and its name there.
    places: Vec<(FileId, std::ffi::OsString, String)>,
}

impl Kept {
    /// Keeps the file at `path`, that which a link there leads to, and the place itself.
    pub fn keep(&mut self, path: &Path, what: &str) {
        for found in [path.symlink_metadata(), path.metadata()] {
            self.files.extend(found.ok().map(|f| (id(&f), what.into())));
        }
        if let (Some(name), Ok(directory)) = (path.file_name(), parent(path).metadata()) {
            self.places.push((id(&directory), name.into(), what.into()));
        }
    }

    fn file(&self, found: &Metadata) -> Option<&str> {
        let known = self.files.iter().find(|(file, _)| *file == id(found));
        known.map(|(_, what)| what.as_str())
    }

    fn place(&self, path: &Path) -> Option<&str> {
        let directory = id(&parent(path).metadata().ok()?);
        let known = self.places.iter();
        let mut known = known
            .filter(|(at, name, _)| *at == directory && path.file_name() == Some(name.as_os_str()));
        known.next().map(|(_, _, what)| what.as_str())
    }
}

/// The directory of `path`.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Stdout,
    /// A pipe or a device of characters: written as it comes.
    Stream,
    /// A file, and the permissions of that which it replaces.
    File(Option<u32>),
}

/// An output that may be written, of which nothing is written yet.
#[derive(Debug)]
pub struct Plan {
    path: PathBuf,
    force: bool,
    kept: Kept,
    way: Way,
}

impl Plan {
    /// Looks at where `path` leads and touches nothing.
    ///
    /// # Errors
    ///
    /// It is one of the files `kept`, a link, a directory, a device, or there already without `force`.
    pub fn new(path: &Path, force: bool, kept: Kept) -> Result<Plan, OutputError> {
        let way = judge(path, force, &kept)?;
        let path = path.into();
        Ok(Plan {
            path,
            force,
            kept,
            way,
        })
    }

    /// Whether a person reads it as it comes.
    pub fn is_terminal(&self) -> bool {
        match self.way {
            Way::Stdout => std::io::stdout().is_terminal(),
            // Neither waits for a pipe's reader nor becomes its terminal.
            Way::Stream => {
                let mut options = File::options();
                options.write(true);
                options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
                options
                    .open(&self.path)
                    .is_ok_and(|file| file.is_terminal())
            }
            Way::File(_) => false,
        }
    }

    /// Whether it goes to standard output, by whatever name.
    pub fn is_stdout(&self) -> bool {
        self.way == Way::Stdout
    }

    /// Whether it is a file, which has a length and can have holes.
    pub fn is_file(&self) -> bool {
        matches!(self.way, Way::File(_))
    }

    /// Begins to write. A pipe waits here for its reader.
    pub fn begin(self) -> Result<OutputFile, OutputError> {
        let failed = |source| OutputError::at(&self.path, source);
        let sink = match self.way {
            Way::Stdout => Sink::Stdout(std::io::stdout()),
            Way::Stream => {
                let file = File::options().write(true).open(&self.path);
                let file = file.map_err(failed)?;
                let kind = file.metadata().map_err(failed)?.file_type();
                if !kind.is_fifo() && !kind.is_char_device() {
                    return Err(OutputError::refused(&self.path, "is no longer a pipe"));
                }
                Sink::Stream(file)
            }
            Way::File(mode) => {
                let unfinished = Unfinished::beside(&self.path, mode.unwrap_or(0o666));
                Sink::File(unfinished.map_err(failed)?)
            }
        };
        Ok(OutputFile { plan: self, sink })
    }
}

/// What `path` is to a command that would write there.
fn judge(path: &Path, force: bool, kept: &Kept) -> Result<Way, OutputError> {
    let refused = |why: &str| Err(OutputError::refused(path, why));
    let must_stay =
        |what: &str| OutputError::refused(path, format!("is {what}, which must stay as it is"));
    let stdout = std::io::stdout().as_fd().try_clone_to_owned();
    let stdout = stdout.map(File::from).and_then(|file| file.metadata());
    if path == Path::new(STDOUT) {
        return match stdout.ok().as_ref().and_then(|found| kept.file(found)) {
            Some(what) => Err(must_stay(what)),
            None => Ok(Way::Stdout),
        };
    }
    if path.as_os_str().as_bytes().ends_with(b"/") || path.file_name().is_none() {
        return refused("is the name of a directory; give that of a file");
    }
    let own = match path.symlink_metadata() {
        Ok(own) => own,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return match (parent(path).metadata(), kept.place(path)) {
                (Err(_), _) => refused("is in a directory that does not exist; make it first"),
                (Ok(_), Some(what)) => Err(OutputError::refused(
                    path,
                    format!("would become {what}; give another name"),
                )),
                (Ok(_), None) => Ok(Way::File(None)),
            };
        }
        Err(error) => return Err(OutputError::at(path, error)),
    };
    let target = path.metadata();
    for found in [Some(&own), target.as_ref().ok()].into_iter().flatten() {
        if let Some(what) = kept.file(found) {
            return Err(must_stay(what));
        }
    }
    let Ok(target) = target else {
        return refused("is a link that leads nowhere; remove it, or give another name");
    };
    let kind = target.file_type();
    // /dev/stdout is a link to whatever that is, and the caller has made or emptied it.
    if own.is_symlink() && stdout.is_ok_and(|stdout| id(&stdout) == id(&target)) {
        return Ok(Way::Stdout);
    }
    if kind.is_fifo() || kind.is_char_device() {
        return Ok(Way::Stream);
    }
    if kind.is_dir() {
        return refused("is a directory; give the name of a file");
    }
    if !kind.is_file() {
        return refused("is a device or a socket; give the name of a file");
    }
    if own.is_symlink() {
        return refused("is a link; name the file that it leads to, or remove the link");
    }
    if let Some(what) = kept.place(path) {
        return Err(must_stay(what));
    }
    if !force {
        return refused("exists; give another name, or --force to replace it");
    }
    Ok(Way::File(Some(target.mode() & 0o777)))
}

#[derive(Debug)]
enum Sink {
    Stdout(std::io::Stdout),
    Stream(File),
    File(Unfinished),
}

/// An output that is being written. Dropped, it leaves nothing where it would have been.
#[derive(Debug)]
pub struct OutputFile {
    plan: Plan,
    sink: Sink,
}

impl OutputFile {
    /// The file, if it is one.
    pub fn file(&self) -> Option<&File> {
        match &self.sink {
            Sink::File(unfinished) => Some(unfinished.file()),
            _ => None,
        }
    }

    /// Where it goes.
    pub fn path(&self) -> &Path {
        &self.plan.path
    }

    /// Whether nothing of it is to be seen unless it is finished.
    pub fn is_withheld(&self) -> bool {
        self.plan.is_file()
    }

    /// It is complete: puts it in its place, safe on the disk.
    pub fn finish(mut self) -> Result<(), OutputError> {
        let Plan { path, force, .. } = &self.plan;
        let unfinished = match self.sink {
            Sink::Stdout(ref mut to) => {
                return to.flush().map_err(|source| OutputError::at(path, source));
            }
            Sink::Stream(_) => return Ok(()),
            Sink::File(unfinished) => unfinished,
        };
        // The replay may have taken hours.
        judge(path, *force, &self.plan.kept)?;
        let placed = unfinished
            .sync()
            .and_then(|()| unfinished.put(path, *force));
        placed.map_err(|source| match source.kind() {
            ErrorKind::AlreadyExists => {
                let why = "was made by somebody else meanwhile; give another name, or --force";
                OutputError::refused(path, why)
            }
            _ => OutputError::at(path, source),
        })?;
        // The name is safe too, where the file system can say so.
        let _ = File::open(parent(path)).and_then(|directory| directory.sync_all());
        Ok(())
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match &mut self.sink {
            Sink::Stdout(to) => to.write(bytes),
            Sink::Stream(to) => to.write(bytes),
            Sink::File(to) => to.file().write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match &mut self.sink {
            Sink::Stdout(to) => to.flush(),
            Sink::Stream(to) => to.flush(),
            Sink::File(to) => to.file().flush(),
        }
    }
}

/// A new file for a place in a directory, made anew and not through any link; gone when dropped.
#[derive(Debug)]
pub struct Unfinished(Draft);

#[derive(Debug)]
enum Draft {
    /// It has no name, so that even a kill leaves nothing.
    Unnamed(File),
    /// Not all file systems have files without names.
    Named(NamedTempFile),
}

impl Unfinished {
    /// Makes a file for `place`, with `mode` less the umask.
    pub fn beside(place: &Path, mode: u32) -> std::io::Result<Unfinished> {
        let directory = parent(place);
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let unnamed = openat(CWD, directory, flags, Mode::from_raw_mode(mode)).map(File::from);
        if let Ok(file) = unnamed
            && by_descriptor(&file).exists()
        {
            return Ok(Unfinished(Draft::Unnamed(file)));
        }
        let file = Builder::new()
            .prefix(UNFINISHED)
            .permissions(Permissions::from_mode(mode))
            .tempfile_in(directory)?;
        Ok(Unfinished(Draft::Named(file)))
    }

    /// The file.
    pub fn file(&self) -> &File {
        match &self.0 {
            Draft::Unnamed(file) => file,
            Draft::Named(file) => file.as_file(),
        }
    }

    /// Waits until it is safe on the disk. Some file systems find out only now that they have no room.
    pub fn sync(&self) -> std::io::Result<()> {
        self.file().sync_all()
    }

    /// Puts it in its place; if it may `replace`, over a file or a link that is there.
    pub fn put(self, place: &Path, replace: bool) -> std::io::Result<()> {
        match self.0 {
            Draft::Unnamed(file) if replace => {
                // A name can be given only where there is none yet; renaming then replaces.
                let named = Builder::new()
                    .prefix(UNFINISHED)
                    .make_in(parent(place), |path| name(&file, path))?;
                named.persist(place).map(drop).map_err(|error| error.error)
            }
            Draft::Unnamed(file) => name(&file, place),
            Draft::Named(file) if replace => {
                file.persist(place).map(drop).map_err(|error| error.error)
            }
            Draft::Named(file) => {
                let placed = file.persist_noclobber(place);
                placed.map(drop).map_err(|error| error.error)
            }
        }
    }
}

/// Gives a file without a name one that nothing has.
fn name(file: &File, path: &Path) -> std::io::Result<()> {
    let flags = AtFlags::SYMLINK_FOLLOW;
    Ok(linkat(CWD, by_descriptor(file), CWD, path, flags)?)
}

fn by_descriptor(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

impl Classified for OutputError {
    fn kind(&self) -> Kind {
        match self {
            OutputError::Refused { .. } => Kind::BadInput,
            OutputError::Write { .. } => Kind::HostFailed,
        }
    }
}

#[cfg(test)]
mod tests;
