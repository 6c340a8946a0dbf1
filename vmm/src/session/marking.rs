//! Marks of a recording while it is made: who asks for them, and who keeps them.
//!
//! The operator's key and SIGUSR2 ask by way of the operator, other programs by a socket in the recording's
//! directory. So nobody has to know the recorder's number as a process, nobody else can be meant, and where no recorder
//! listens, nobody answers. The vCPU's thread says which exit it is; a thread of its own writes the mark down and tells
//! whoever asked.

use std::fs::{File, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use hindsight_replay::Complete;
use hindsight_replay::foreign::{shown, shown_path};

use super::marks::{MadeBy, Mark, append, line_of, mark_of};
use super::recording::Recording;
use crate::failure::{Failure, Kind};
use crate::world::{HeardWish, MarkAsker, MarkWish, Operator};

/// The socket of a recording that is being made.
const SOCKET: &str = "control";
/// A request is no longer than this, nor is an answer.
const LINE_BYTES_MAX: usize = 4096;
/// Whoever has connected says what it wants for so long.
const ASK_WAIT: Duration = Duration::from_secs(1);
/// And is told what became of it after so long at most. A guest comes back at once, unless its recorder is stopped.
const HEAR_WAIT: Duration = Duration::from_secs(10);
/// Begins an answer that is no mark.
const SORRY: &str = "error ";

impl From<MarkAsker> for MadeBy {
    fn from(asker: MarkAsker) -> MadeBy {
        match asker {
            MarkAsker::Key => MadeBy::Key,
            MarkAsker::Signal => MadeBy::Signal,
            MarkAsker::Command => MadeBy::Command,
        }
    }
}

/// Keeps the marks of a recording that is being made.
#[derive(Debug)]
pub(super) struct Marking {
    operator: Arc<Operator>,
    keeper: JoinHandle<()>,
    socket: Option<Socket>,
}

impl Marking {
    /// Takes wishes for marks of `recording`, which has begun, from now on.
    pub(super) fn begin(
        recording: &Recording,
        operator: &Arc<Operator>,
    ) -> Result<Marking, Failure> {
        let (give, take) = channel();
        let (theirs, shows) = (recording.clone(), Arc::clone(operator));
        let keeper = std::thread::Builder::new().name("marks".into());
        let keeper = keeper.spawn(move || keep(&take, &theirs, &shows))?;
        operator.begin_marks(give);
        // Some file systems have no sockets. The key and the signal do without.
        let socket = Socket::listen(recording.directory(), operator).ok();
        let operator = Arc::clone(operator);
        Ok(Marking {
            operator,
            keeper,
            socket,
        })
    }

    /// The recording has come to its last complete exit. All its marks are written down when this comes back.
    pub(super) fn end(self, last: Complete) {
        self.operator.end_marks(last);
        if let Err(panic) = self.keeper.join() {
            std::panic::resume_unwind(panic);
        }
        if let Some(socket) = self.socket {
            socket.close();
        }
    }
}

/// Writes down each mark that is heard of, until there will be no more.
fn keep(heard: &Receiver<HeardWish>, recording: &Recording, operator: &Operator) {
    for (MarkWish { by, name, reply }, at) in heard {
        let marked = append(recording, name.as_deref(), at, by.into());
        match reply {
            Some(reply) => {
                // Whoever has gone does not want to know.
                let _ = reply.send(match &marked {
                    Ok(mark) => line_of(mark),
                    Err(error) => format!("{SORRY}{error}\n"),
                });
            }
            None => operator.notice(&match marked {
                Ok(mark) => format!("marked exit {} as {}", mark.exit, mark.name),
                Err(error) => format!("nothing was marked: {error}"),
            }),
        }
    }
}

/// Where other programs ask.
#[derive(Debug)]
struct Socket {
    path: PathBuf,
    listener: UnixListener,
    closed: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// The socket in a directory, by a path that is short enough for one however long that of the directory is.
fn short_path(directory: &File) -> PathBuf {
    Path::new("/proc/self/fd")
        .join(directory.as_raw_fd().to_string())
        .join(SOCKET)
}

impl Socket {
    fn listen(directory: &Path, operator: &Arc<Operator>) -> std::io::Result<Socket> {
        let path = directory.join(SOCKET);
        // One that a recorder has left that was killed. The directory is locked: no other records there.
        if path
            .symlink_metadata()
            .is_ok_and(|found| found.file_type().is_socket())
        {
            std::fs::remove_file(&path)?;
        }
        let directory = File::open(directory)?;
        let short = short_path(&directory);
        let listener = UnixListener::bind(&short)?;
        std::fs::set_permissions(&short, Permissions::from_mode(0o600))?;
        let closed = Arc::new(AtomicBool::new(false));
        let (theirs, ended, operator) = (
            listener.try_clone()?,
            Arc::clone(&closed),
            Arc::clone(operator),
        );
        let thread = std::thread::Builder::new().name("control".into());
        let thread = thread.spawn(move || {
            while !ended.load(Ordering::SeqCst) {
                match theirs.accept() {
                    Ok((stream, _)) => {
                        // Whoever does not wait for its answer gets none.
                        let _ = answer(stream, &operator);
                    }
                    // Too many open files, say: that may pass.
                    Err(_) => std::thread::sleep(Duration::from_millis(20)),
                }
            }
        })?;
        Ok(Socket {
            path,
            listener,
            closed,
            thread,
        })
    }

    fn close(self) {
        // First, so that nobody finds a socket where nobody listens.
        let _ = std::fs::remove_file(&self.path);
        self.closed.store(true, Ordering::SeqCst);
        // Wakes the thread that waits for somebody.
        let listener = UnixStream::from(OwnedFd::from(self.listener));
        if listener.shutdown(std::net::Shutdown::Both).is_ok() {
            let _ = self.thread.join();
        }
    }
}

/// Does what one program asks for, and tells it what became of that.
fn answer(mut stream: UnixStream, operator: &Operator) -> std::io::Result<()> {
    stream.set_read_timeout(Some(ASK_WAIT))?;
    stream.set_write_timeout(Some(ASK_WAIT))?;
    let mut bytes = [0; LINE_BYTES_MAX];
    // A request is written at once, and comes at once.
    let count = stream.read(&mut bytes)?;
    let line = std::str::from_utf8(&bytes[..count]).ok();
    let words = line.and_then(|line| line.strip_suffix('\n')?.strip_prefix("mark"));
    let name = match words {
        Some("") => None,
        Some(name) if name.starts_with(' ') => Some(name[1..].to_string()),
        _ => return stream.write_all(format!("{SORRY}this is no request\n").as_bytes()),
    };
    let (give, take) = channel();
    let wished = operator.mark(MarkWish {
        by: MarkAsker::Command,
        name,
        reply: Some(give),
    });
    let sorry = |why: &str| format!("{SORRY}{why}\n");
    let told = match wished {
        false => sorry("the recording has ended, or its machine does not come back"),
        true => take
            .recv_timeout(HEAR_WAIT)
            .unwrap_or_else(|error| match error {
                RecvTimeoutError::Timeout => {
                    sorry("the machine has not come back for 10 s; it may be marked later")
                }
                RecvTimeoutError::Disconnected => sorry("the recording has ended"),
            }),
    };
    stream.write_all(told.as_bytes())
}

/// Has the recorder of `recording` mark the present moment.
///
/// # Errors
///
/// Nobody records there, the name is taken or none, or the recorder does not answer.
pub fn mark_now(recording: &Recording, name: Option<&str>) -> Result<Mark, Failure> {
    let shown_directory = shown_path(recording.directory());
    let nobody = || {
        let message = format!(
            "nobody is recording in {shown_directory}; --at MOMENT marks a moment of a finished recording"
        );
        Failure::new(Kind::BadInput, message)
    };
    let failed = |error: std::io::Error| {
        let message = format!("the recorder of {shown_directory} does not answer: {error}");
        Failure::new(Kind::HostFailed, message)
    };
    let found = recording.path(SOCKET).symlink_metadata();
    if !found.is_ok_and(|found| found.file_type().is_socket()) {
        return Err(nobody());
    }
    let directory = File::open(recording.directory()).map_err(failed)?;
    let mut stream = match UnixStream::connect(short_path(&directory)) {
        Ok(stream) => stream,
        // It was killed, and has left its socket; or it has just ended.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::ConnectionRefused | ErrorKind::NotFound
            ) =>
        {
            return Err(nobody());
        }
        Err(error) => return Err(failed(error)),
    };
    let wait = Some(HEAR_WAIT + ASK_WAIT);
    stream.set_read_timeout(wait).map_err(failed)?;
    stream.set_write_timeout(wait).map_err(failed)?;
    let request = name.map_or("mark\n".into(), |name| format!("mark {name}\n"));
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut told = String::new();
    let read = stream.take(LINE_BYTES_MAX as u64).read_to_string(&mut told);
    read.map_err(failed)?;
    let told = told.trim_end();
    if let Some(why) = told.strip_prefix(SORRY) {
        return Err(Failure::new(Kind::BadInput, shown(why)));
    }
    mark_of(told).map_err(|_| failed(ErrorKind::InvalidData.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::marks::Marks;
    use hindsight_replay::foreign::shown_lines;

    /// A machine that comes by an exit now and then: what it passes, and when it is to end.
    fn machine(operator: &Arc<Operator>) -> (Arc<AtomicBool>, JoinHandle<Complete>) {
        let ends = Arc::new(AtomicBool::new(false));
        let (operator, over) = (Arc::clone(operator), Arc::clone(&ends));
        let thread = std::thread::spawn(move || {
            let mut at = Complete::default();
            while !over.load(Ordering::SeqCst) {
                operator.bell().wait(Some(Duration::from_millis(1)));
                (at.exits, at.now) = (at.exits + 1, at.now + 1_000);
                operator.pass(at);
            }
            at
        });
        (ends, thread)
    }

    #[test]
    fn whoever_asks_is_told_which_exit_it_became_and_the_mark_is_in_the_recording() {
        let dir = tempfile::tempdir().unwrap();
        // Longer than the path of a socket may be.
        let at = dir.path().join("x".repeat(200));
        std::fs::create_dir(&at).unwrap();
        let recording = Recording::at(&at);
        let nobody = mark_now(&recording, None).unwrap_err().to_string();
        assert!(nobody.contains("nobody is recording"), "{nobody}");
        // What a recorder leaves that is killed.
        let directory = File::open(&at).unwrap();
        drop(UnixListener::bind(short_path(&directory)).unwrap());
        let nobody = mark_now(&recording, None).unwrap_err().to_string();
        assert!(nobody.contains("nobody is recording"), "{nobody}");

        let operator = Arc::new(Operator::new(Default::default()));
        let marking = Marking::begin(&recording, &operator).unwrap();
        assert!(marking.socket.is_some());
        let (ends, machine) = machine(&operator);
        let first = mark_now(&recording, None).unwrap();
        let second = mark_now(&recording, Some("login")).unwrap();
        assert_eq!((first.by, &*first.name), (MadeBy::Command, "mark-1"));
        assert!(first.exit > 0 && second.exit > first.exit);
        assert_eq!(second.guest_ns, second.exit * 1_000);
        for (name, why) in [
            ("login", "already"),
            ("a b", "cannot be"),
            ("\x1b[2J\n", "cannot be"),
        ] {
            let refused = mark_now(&recording, Some(name)).unwrap_err();
            assert!(refused.to_string().contains(why), "{refused}");
            assert!(!refused.to_string().contains('\x1b'));
        }
        operator.mark_here(MarkAsker::Key);
        ends.store(true, Ordering::SeqCst);
        let last = machine.join().unwrap();
        operator.mark_here(MarkAsker::Signal);
        marking.end(last);
        let marks = Marks::read(&recording).unwrap();
        let made: Vec<_> = marks.list().iter().map(|mark| mark.by).collect();
        assert_eq!(
            made,
            [
                MadeBy::Command,
                MadeBy::Command,
                MadeBy::Key,
                MadeBy::Signal
            ]
        );
        assert_eq!(marks.list()[..2], [first, second]);
        assert_eq!(marks.list()[3].exit, last.exits);
        assert_eq!(shown_lines(marks.complaints().concat()).to_string(), "");
        let nobody = mark_now(&recording, None).unwrap_err().to_string();
        assert!(nobody.contains("nobody is recording"), "{nobody}");
        assert_eq!(
            std::fs::read_dir(&at).unwrap().count(),
            1,
            "the marks alone"
        );
    }

    #[test]
    fn whoever_asks_for_nonsense_or_says_nothing_keeps_nobody_from_asking() {
        let dir = tempfile::tempdir().unwrap();
        let recording = Recording::at(dir.path());
        let operator = Arc::new(Operator::new(Default::default()));
        let marking = Marking::begin(&recording, &operator).unwrap();
        let (ends, machine) = machine(&operator);
        let connect = || UnixStream::connect(recording.path(SOCKET)).unwrap();
        let silent = connect();
        let mut speaks = connect();
        speaks.write_all(&[b'x'; 100]).unwrap();
        let mut told = String::new();
        speaks.read_to_string(&mut told).unwrap();
        assert_eq!(told, "error this is no request\n");
        mark_now(&recording, Some("a")).unwrap();
        drop(silent);
        ends.store(true, Ordering::SeqCst);
        marking.end(machine.join().unwrap());
        assert_eq!(Marks::read(&recording).unwrap().list().len(), 1);
    }
}
