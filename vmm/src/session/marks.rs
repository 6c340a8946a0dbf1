//! Marks: moments of a recording that have a name.
//!
//! They are in the file `marks` beside the journal, a line of JSON for each. Nothing that a guest does depends on it,
//! and nothing that is compared: it may be edited or deleted at any time. A mark is at an exit that is complete, so
//! that going there is exactly that. A file that somebody else has made may say anything: a line that cannot be of
//! ours is skipped, and whoever reads the file is told.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hindsight_devices::Nanos;
use hindsight_replay::foreign::shown_path;
use hindsight_replay::{Anchor, Complete, When, is_mark_name};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::recording::{MARKS, Recording};
use crate::failure::{Classified, Failure, Kind};
use crate::output_file::Unfinished;
use crate::regular_file::{self, Links, ReadError};

/// A recording has no more.
const MARKS_MAX: usize = 10_000;
/// The longest file that is read, in bytes.
const BYTES_MAX: u64 = 2 << 20;
/// So many damaged lines are told of one by one, and so many names listed.
const TOLD_MAX: usize = 20;
/// Somebody else who writes the file is waited for so long.
const LOCK_WAIT: Duration = Duration::from_millis(500);

/// What made a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MadeBy {
    /// The operator's key.
    Key,
    /// SIGUSR2.
    Signal,
    /// `hindsight mark`, while the recording was made.
    Command,
    /// Somebody who looked at the recording later.
    Afterwards,
}

impl MadeBy {
    /// For people.
    pub fn words(self) -> &'static str {
        match self {
            MadeBy::Key => "by key",
            MadeBy::Signal => "by SIGUSR2",
            MadeBy::Command => "by command",
            MadeBy::Afterwards => "afterwards",
        }
    }
}

/// A moment that has a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Its name (see [`hindsight_replay::is_mark_name`]).
    pub name: String,
    /// The exit that it is at.
    pub exit: u64,
    /// Guest time there, for people: nothing is looked for by it.
    pub guest_ns: Nanos,
    /// What made it.
    pub by: MadeBy,
}

/// Why a mark was not made or removed.
#[derive(Debug, Error)]
pub enum MarkError {
    /// The file cannot be read, or is not one of ours.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The name is none.
    #[error(
        "{0:?} cannot be the name of a mark: expected a letter or _ first, then letters, digits, and any of -_. , 64 at \
         most"
    )]
    Name(String),
    /// There is one of that name.
    #[error(
        "there is a mark {name} already, at exit {exit}; give another name, or remove that one first"
    )]
    Taken {
        /// The name.
        name: String,
        /// Where that one is.
        exit: u64,
    },
    /// There is none of that name.
    #[error("no mark is called {name}; {known}")]
    Missing {
        /// The name.
        name: String,
        /// Those that exist.
        known: String,
    },
    /// There are too many.
    #[error(
        "{0} is full: a recording has {MARKS_MAX} marks and {BYTES_MAX} bytes of them at most; remove some first"
    )]
    Full(PathBuf),
    /// Somebody is recording there.
    #[error(
        "{0} is being recorded: `hindsight mark` without --at and --remove marks the present moment; what else is to be \
         done to its marks waits for its end"
    )]
    Recorded(PathBuf),
    /// It has no directory that they could be in.
    #[error(
        "{0} is a journal without a directory, and has no place for marks; put it into a directory as `journal`"
    )]
    NoDirectory(PathBuf),
}

impl Classified for MarkError {
    fn kind(&self) -> Kind {
        match self {
            MarkError::Write { .. } => Kind::HostFailed,
            _ => Kind::BadInput,
        }
    }
}

/// The marks of a recording.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    /// By exit; those of one exit in the order in which they were made.
    list: Vec<Mark>,
    complaints: Vec<String>,
    /// The file as it is.
    text: String,
}

impl Marks {
    /// Those of `recording`.
    ///
    /// # Errors
    ///
    /// What is in the place of the file is none, or too long for one.
    pub fn read(recording: &Recording) -> Result<Marks, ReadError> {
        let path = recording.path(MARKS);
        let bytes = match regular_file::open(&path, Links::Refuse) {
            Ok(opened) => regular_file::read_whole(&path, opened, BYTES_MAX)?,
            Err(ReadError::File { source, .. })
                if matches!(
                    source.kind(),
                    ErrorKind::NotFound | ErrorKind::NotADirectory
                ) =>
            {
                return Ok(Marks::default());
            }
            Err(error) => return Err(error),
        };
        Ok(Marks::parse(String::from_utf8_lossy(&bytes).into_owned()))
    }

    fn parse(text: String) -> Marks {
        let (mut list, mut names, mut damaged) = (Vec::new(), BTreeSet::new(), Vec::new());
        for (number, line) in (1..).zip(text.lines()) {
            let wrong = match mark_of(line) {
                _ if line.trim().is_empty() => continue,
                Err(why) => why,
                Ok(_) if list.len() == MARKS_MAX => format!("there are {MARKS_MAX} before it"),
                Ok(mark) if !names.insert(mark.name.clone()) => {
                    format!("there is a mark {} before it", mark.name)
                }
                Ok(mark) => {
                    list.push(mark);
                    continue;
                }
            };
            damaged.push(format!("line {number} of {MARKS} is skipped: {wrong}"));
        }
        if damaged.len() > TOLD_MAX {
            let more = damaged.len() - TOLD_MAX;
            damaged.truncate(TOLD_MAX);
            damaged.push(format!("and {more} more lines of {MARKS} are skipped"));
        }
        // Stable: those of one exit stay in their order.
        list.sort_by_key(|mark| mark.exit);
        Marks {
            list,
            complaints: damaged,
            text,
        }
    }

    /// The marks, by exit.
    pub fn list(&self) -> &[Mark] {
        &self.list
    }

    /// What of the file was skipped: sentences.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// The mark of this name.
    pub fn find(&self, name: &str) -> Option<&Mark> {
        self.list.iter().find(|mark| mark.name == name)
    }

    /// A name that no mark has.
    fn free_name(&self) -> String {
        let names: BTreeSet<&str> = self.list.iter().map(|mark| mark.name.as_str()).collect();
        let first = self.list.len() + 1;
        let mut all = (first..).map(|number| format!("mark-{number}"));
        all.find(|name| !names.contains(name.as_str()))
            .expect("there are more numbers than marks")
    }

    /// A sentence that tells their names.
    fn known(&self) -> String {
        let names: Vec<&str> = self.list.iter().map(|mark| mark.name.as_str()).collect();
        match names.len() {
            0 => "there are none".into(),
            count if count > TOLD_MAX => format!(
                "there are {}, and {} more",
                names[..TOLD_MAX].join(", "),
                count - TOLD_MAX
            ),
            _ => format!("there are {}", names.join(", ")),
        }
    }

    fn missing(&self, name: &str) -> MarkError {
        MarkError::Missing {
            name: name.into(),
            known: self.known(),
        }
    }
}

fn line_of(mark: &Mark) -> String {
    serde_json::to_string(mark).expect("plain values serialise") + "\n"
}

fn mark_of(line: &str) -> Result<Mark, String> {
    let mark: Mark = serde_json::from_str(line).map_err(|error| error.to_string())?;
    match is_mark_name(&mark.name) {
        true => Ok(mark),
        false => Err("its name cannot be one".into()),
    }
}

/// Marks the exit `at` of a recording that nobody else writes to; without a `name`, by one that is free.
pub(super) fn append(
    recording: &Recording,
    name: Option<&str>,
    at: Complete,
    by: MadeBy,
) -> Result<Mark, MarkError> {
    let marks = Marks::read(recording)?;
    let name = name.map_or_else(|| marks.free_name(), String::from);
    if !is_mark_name(&name) {
        return Err(MarkError::Name(name));
    }
    if let Some(taken) = marks.find(&name) {
        let exit = taken.exit;
        return Err(MarkError::Taken { name, exit });
    }
    let Complete { exits, now } = at;
    let mark = Mark {
        name,
        exit: exits,
        guest_ns: now,
        by,
    };
    let mut line = line_of(&mark);
    // The last line may be cut short.
    if !marks.text.is_empty() && !marks.text.ends_with('\n') {
        line.insert(0, '\n');
    }
    let path = recording.path(MARKS);
    let bytes = marks.text.len() + line.len();
    if marks.list.len() >= MARKS_MAX || bytes as u64 > BYTES_MAX {
        return Err(MarkError::Full(path));
    }
    let file = File::options()
        .append(true)
        .create(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(&path);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    match written {
        Ok(()) => Ok(mark),
        Err(source) => Err(MarkError::Write { path, source }),
    }
}

/// Marks the exit `at` of a finished recording; without a `name`, by one that is free.
///
/// # Errors
///
/// The name is taken or none, somebody records there, or the file cannot be written.
pub fn add_mark(
    recording: &Recording,
    name: Option<&str>,
    at: Complete,
) -> Result<Mark, MarkError> {
    let _lock = lock(recording)?;
    append(recording, name, at, MadeBy::Afterwards)
}

/// Removes a mark of a finished recording.
///
/// # Errors
///
/// There is none of that name, somebody records there, or the file cannot be written.
pub fn remove_mark(recording: &Recording, name: &str) -> Result<Mark, MarkError> {
    let _lock = lock(recording)?;
    let marks = Marks::read(recording)?;
    let removed = marks.find(name).ok_or_else(|| marks.missing(name))?.clone();
    let is_other = |line: &&str| mark_of(line).map_or(true, |mark| mark.name != name);
    // Lines that are not ours stay: somebody may want to repair them.
    let kept = marks.text.lines().filter(is_other);
    let kept: String = kept.flat_map(|line| [line, "\n"]).collect();
    let path = recording.path(MARKS);
    let write = || -> std::io::Result<()> {
        let unfinished = Unfinished::beside(&path, 0o666)?;
        unfinished.file().write_all(kept.as_bytes())?;
        unfinished.put(&path, true)
    };
    match write() {
        Ok(()) => Ok(removed),
        Err(source) => Err(MarkError::Write { path, source }),
    }
}

/// Keeps recorders and others who write marks away while it is held: the lock that a recorder has.
fn lock(recording: &Recording) -> Result<File, MarkError> {
    let path = recording.directory();
    if !path.is_dir() {
        return Err(MarkError::NoDirectory(path.into()));
    }
    let failed = |source| MarkError::Write {
        path: path.into(),
        source,
    };
    let directory = File::open(path).map_err(failed)?;
    let end = Instant::now() + LOCK_WAIT;
    // Any other error: some network file systems lock no directories.
    while flock(&directory, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK) {
        if end <= Instant::now() {
            return Err(MarkError::Recorded(path.into()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(directory)
}

/// Gives a new recording that says the same as another through exit `through` the marks of that one up to there.
pub(super) fn carry_over(from: &Recording, to: &Recording, through: u64) -> Result<(), MarkError> {
    let marks = Marks::read(from)?;
    let marks = marks.list.iter().filter(|mark| mark.exit <= through);
    let text: String = marks.map(line_of).collect();
    if text.is_empty() {
        return Ok(());
    }
    let path = to.path(MARKS);
    let written = File::create_new(&path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|source| MarkError::Write { path, source })
}

/// That they were not carried over is no failure.
pub(super) fn no_marks(error: &MarkError) -> String {
    format!("not all marks of the old recording are in the new one: {error}")
}

/// The same moment, without a mark: as the exit that it is at.
pub(super) fn unmarked(recording: &Recording, when: &When) -> Result<When, Failure> {
    let Anchor::Mark(_) = when.anchor else {
        return Ok(when.clone());
    };
    let marks = Marks::read(recording)?;
    let missing = |why: &str| {
        let recording = shown_path(recording.directory());
        Failure::new(
            Kind::BadInput,
            format!("{recording} has no moment {when}: {why}"),
        )
    };
    for (name, offset) in when.marks() {
        if let Some(mark) = marks.find(name) {
            let exit = mark.exit.checked_add_signed(offset);
            let exit = exit.ok_or_else(|| missing("it would be before power-on"))?;
            return Ok(Anchor::Exit(exit).into());
        }
    }
    let why = format!(
        "that is no exit, no guest time, not `end`, `crash` or `console:TEXT`, and no mark; of marks, {}",
        marks.known()
    );
    Err(missing(&why))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recording() -> (tempfile::TempDir, Recording) {
        let dir = tempfile::tempdir().unwrap();
        let recording = Recording::at(dir.path());
        (dir, recording)
    }

    fn at(exits: u64) -> Complete {
        let now = exits * 1_000;
        Complete { exits, now }
    }

    fn names(recording: &Recording) -> Vec<String> {
        let marks = Marks::read(recording).unwrap();
        marks.list.into_iter().map(|mark| mark.name).collect()
    }

    #[test]
    fn marks_are_listed_by_exit_and_names_that_are_not_given_are_made() {
        let (_dir, recording) = recording();
        assert!(Marks::read(&recording).unwrap().list().is_empty());
        for (name, exit, becomes) in [
            (None, 70, "mark-1"),
            (Some("login"), 30, "login"),
            (Some("mark-4"), 90, "mark-4"),
            (None, 10, "mark-5"),
        ] {
            assert_eq!(add_mark(&recording, name, at(exit)).unwrap().name, becomes);
        }
        assert_eq!(names(&recording), ["mark-5", "login", "mark-1", "mark-4"]);
        let taken = add_mark(&recording, Some("login"), at(31)).unwrap_err();
        assert!(
            matches!(taken, MarkError::Taken { exit: 30, .. }),
            "{taken}"
        );
        assert!(add_mark(&recording, Some("a b"), at(1)).is_err());

        let removed = remove_mark(&recording, "login").unwrap();
        assert_eq!((removed.exit, removed.guest_ns), (30, 30_000));
        let missing = remove_mark(&recording, "login").unwrap_err().to_string();
        assert!(missing.contains("mark-5, mark-1, mark-4"), "{missing}");
        assert_eq!(add_mark(&recording, Some("login"), at(5)).unwrap().exit, 5);
        assert_eq!(names(&recording)[0], "login");
    }

    #[test]
    fn a_damaged_line_is_skipped_and_said_and_the_others_are_there() {
        let (_dir, recording) = recording();
        add_mark(&recording, Some("a"), at(1)).unwrap();
        let good = std::fs::read_to_string(recording.path(MARKS)).unwrap();
        let hostile = good.replace("\"a\"", "\"\\u001b[2Jx\"");
        let text = format!("{good}\nnonsense\n{hostile}{good}\u{1}{{\"name\":\"cut");
        std::fs::write(recording.path(MARKS), &text).unwrap();
        // What comes after a line that was cut short is whole.
        add_mark(&recording, Some("b"), at(2)).unwrap();
        let marks = Marks::read(&recording).unwrap();
        assert_eq!(names(&recording), ["a", "b"]);
        let lines: Vec<_> = marks.complaints().iter().map(|c| &c[..6]).collect();
        assert_eq!(lines, ["line 3", "line 4", "line 5", "line 6"]);
        assert!(!marks.complaints().concat().contains('\x1b'));
        // They stay for whoever can repair them.
        remove_mark(&recording, "b").unwrap();
        assert_eq!(Marks::read(&recording).unwrap().complaints().len(), 4);

        std::fs::write(recording.path(MARKS), "x\n".repeat(100_000)).unwrap();
        assert_eq!(
            Marks::read(&recording).unwrap().complaints().len(),
            TOLD_MAX + 1
        );
        std::fs::write(recording.path(MARKS), [0xff, b'\n', 0xfe]).unwrap();
        assert_eq!(Marks::read(&recording).unwrap().complaints().len(), 2);
    }

    #[test]
    fn a_file_is_bounded_and_nothing_else_is_read_or_written_in_its_place() {
        let (dir, recording) = recording();
        let path = recording.path(MARKS);
        let line = |number: usize| {
            let name = format!("mark-{number}");
            let (exit, guest_ns, by) = (7, u64::MAX, MadeBy::Key);
            let mark = Mark {
                name,
                exit,
                guest_ns,
                by,
            };
            line_of(&mark)
        };
        let all: String = (0..MARKS_MAX + 2).map(line).collect();
        std::fs::write(&path, &all).unwrap();
        let marks = Marks::read(&recording).unwrap();
        assert_eq!(
            (marks.list().len(), marks.complaints().len()),
            (MARKS_MAX, 2)
        );
        let full = add_mark(&recording, None, at(1)).unwrap_err();
        assert!(matches!(full, MarkError::Full(_)), "{full}");
        File::create(&path).unwrap().set_len(1 << 43).unwrap();
        assert!(matches!(
            Marks::read(&recording),
            Err(ReadError::TooLarge { .. })
        ));

        std::fs::remove_file(&path).unwrap();
        let precious = dir.path().join("precious");
        for _ in 0..2 {
            std::os::unix::fs::symlink(&precious, &path).unwrap();
            add_mark(&recording, None, at(1)).unwrap_err();
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&precious, "mine").unwrap();
        }
        assert_eq!(std::fs::read(&precious).unwrap(), b"mine");
        let lone = add_mark(&Recording::at(&precious), None, at(1)).unwrap_err();
        assert!(matches!(lone, MarkError::NoDirectory(_)), "{lone}");
        assert!(
            Marks::read(&Recording::at(&precious))
                .unwrap()
                .list()
                .is_empty()
        );
    }

    #[test]
    fn whoever_records_there_is_alone_with_its_marks() {
        let (dir, recording) = recording();
        let recorder = File::open(dir.path()).unwrap();
        flock(&recorder, FlockOperation::LockExclusive).unwrap();
        let refused = add_mark(&recording, None, at(1)).unwrap_err();
        assert!(matches!(refused, MarkError::Recorded(_)), "{refused}");
        append(&recording, None, at(1), MadeBy::Signal).unwrap();
        drop(recorder);
        add_mark(&recording, None, at(2)).unwrap();
        assert_eq!(names(&recording), ["mark-1", "mark-2"]);
    }

    #[test]
    fn a_moment_by_a_marks_name_is_the_exit_that_the_mark_is_at() {
        let (_dir, recording) = recording();
        let exit = |text: &str| -> Result<u64, String> {
            match unmarked(&recording, &text.parse().unwrap()) {
                Ok(When {
                    anchor: Anchor::Exit(exit),
                    offset: 0,
                }) => Ok(exit),
                Ok(other) => panic!("{other}"),
                Err(failure) => Err(failure.to_string()),
            }
        };
        assert!(exit("login").unwrap_err().contains("there are none"));
        append(&recording, Some("login"), at(100), MadeBy::Key).unwrap();
        append(&recording, Some("end"), at(7), MadeBy::Key).unwrap();
        for (text, expected) in [
            ("login", 100),
            ("login+5", 105),
            ("mark:login-1", 99),
            ("login-1+3", 102),
            ("mark:end", 7),
        ] {
            assert_eq!(exit(text), Ok(expected), "{text}");
        }
        append(&recording, Some("login-1"), at(200), MadeBy::Key).unwrap();
        assert_eq!(exit("login-1"), Ok(200));
        assert_eq!(exit("login-1-1"), Ok(199));
        assert!(exit("login-101").unwrap_err().contains("before power-on"));
        let missing = exit("logout").unwrap_err();
        assert!(
            missing.contains("there are end, login, login-1"),
            "{missing}"
        );
        let end: When = "end".parse().unwrap();
        assert_eq!(unmarked(&recording, &end).unwrap(), end);
    }

    #[test]
    fn a_recording_that_goes_on_from_another_has_its_marks_up_to_there() {
        let ((_dir, old), (_dir_too, new)) = (recording(), recording());
        for exit in [10, 30, 20] {
            append(&old, None, at(exit), MadeBy::Key).unwrap();
        }
        carry_over(&old, &new, 20).unwrap();
        let marks = Marks::read(&new).unwrap();
        assert_eq!(names(&new), ["mark-1", "mark-3"]);
        assert_eq!(
            marks.find("mark-3"),
            Marks::read(&old).unwrap().find("mark-3")
        );
    }
}
