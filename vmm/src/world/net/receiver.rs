//! The thread that takes what comes over a link.
//!
//! A frame waits for the guest to exit by itself; only if nobody has taken it for a while is the vCPU
//! kicked, once for all frames that wait by then.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, read};

use super::inbox::Inbox;
use super::stream::{Deframer, Nonsense};
use crate::world::PATIENCE;

/// What whoever waits for frames wants to be told.
pub struct Bell {
    /// Frames are there that were not.
    pub frames: Box<dyn Fn() + Send>,
    /// They have waited for long enough.
    pub overdue: Box<dyn Fn() + Send>,
    /// None will come any more, for this reason.
    pub lost: Box<dyn Fn(String) + Send>,
}

impl std::fmt::Debug for Bell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bell")
    }
}

/// Where frames come from.
pub struct Source {
    fd: OwnedFd,
    /// `None` if each read is a frame.
    deframer: Option<Deframer>,
    buffer: Vec<u8>,
}

/// Reads until there is nothing, or this often, before it looks at the clock again.
const READS: usize = 64;

impl Source {
    /// A socket that carries frames after their lengths.
    pub fn stream(fd: OwnedFd) -> Source {
        Source {
            fd,
            deframer: Some(Deframer::default()),
            buffer: vec![0; 256 << 10],
        }
    }

    /// A device that gives a frame with each read, and does not block.
    pub fn tap(fd: OwnedFd) -> Source {
        Source {
            fd,
            deframer: None,
            buffer: vec![0; hindsight_devices::FRAME_BYTES_MAX + 1],
        }
    }

    /// Waits for so long, or for ever, for something to read; or for `stop` to be closed.
    fn wait(&self, most: Option<Duration>, stop: &PipeReader) -> Waited {
        let most = most.map(|most| most.try_into().expect("a short time"));
        let mut fds = [
            PollFd::new(&self.fd, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        match poll(&mut fds, most.as_ref()) {
            Ok(1..) if !fds[1].revents().is_empty() => Waited::Stopped,
            Ok(1..) => Waited::Readable,
            Ok(0) | Err(_) => Waited::InVain,
        }
    }

    /// Reads once, and hands out the frames; whether there may be more. The error says why there will
    /// be none.
    fn read(&mut self, mut frame: impl FnMut(&[u8])) -> Result<bool, String> {
        match (read(&self.fd, &mut self.buffer), &mut self.deframer) {
            (Ok(0), _) => Err("the connection was closed".into()),
            (Ok(count), Some(deframer)) => {
                let taken = deframer.take(&self.buffer[..count], frame);
                let nonsense = |Nonsense { length }| format!("it sent a frame of {length} bytes");
                taken.map_err(nonsense)?;
                // A read that was not filled has emptied the socket.
                Ok(count == self.buffer.len())
            }
            (Ok(count), None) => {
                frame(&self.buffer[..count]);
                Ok(true)
            }
            (Err(Errno::INTR), _) => Ok(true),
            (Err(Errno::AGAIN), _) => Ok(false),
            // A device that was removed.
            (Err(Errno::BADFD), None) => Err("it was removed".into()),
            (Err(error), _) => Err(io::Error::from(error).to_string()),
        }
    }
}

/// How a wait ended.
enum Waited {
    Readable,
    InVain,
    Stopped,
}

/// The thread, and what it has taken. Dropped, it ends, and its descriptor is closed.
#[derive(Debug)]
pub struct Receiver {
    inbox: Arc<Inbox>,
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Receiver {
    /// Starts the thread.
    pub(super) fn start(source: Source, bell: Bell) -> io::Result<Receiver> {
        let inbox = Arc::new(Inbox::default());
        let (stopped, stop) = io::pipe()?;
        let theirs = Arc::clone(&inbox);
        let thread = std::thread::Builder::new().name("network".into());
        let thread = thread.spawn(move || receive(source, &theirs, &bell, &stopped))?;
        Ok(Receiver {
            inbox,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// The frames that have come.
    pub fn inbox(&self) -> &Inbox {
        &self.inbox
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.inbox.close();
        drop(self.stop.take());
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(
            !matches!(ended, Some(Err(_))),
            "the network's thread panicked"
        );
    }
}

fn receive(mut source: Source, inbox: &Inbox, bell: &Bell, stop: &PipeReader) {
    let mut overdue_at: Option<Instant> = None;
    loop {
        let most = overdue_at.map(|at| at.saturating_duration_since(Instant::now()));
        let waited = source.wait(most, stop);
        if overdue_at.is_some_and(|at| at <= Instant::now()) {
            overdue_at = None;
            if !inbox.is_empty() {
                (bell.overdue)();
            }
        }
        match waited {
            Waited::Readable => {}
            Waited::InVain => continue,
            Waited::Stopped => return,
        }
        let mut open = true;
        for _ in 0..READS {
            let more = source.read(|frame| match inbox.push(frame.to_vec()) {
                None => open = false,
                Some(false) => {}
                Some(true) => {
                    (bell.frames)();
                    overdue_at = overdue_at.or(Some(Instant::now() + PATIENCE));
                }
            });
            match more {
                _ if !open => return,
                Ok(true) => {}
                Ok(false) => break,
                Err(why) => return (bell.lost)(why),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::{Receiver as Hearer, channel};

    #[derive(Debug, PartialEq)]
    enum Said {
        Frames,
        Overdue,
        Lost(String),
    }

    fn listen(socket: UnixStream) -> (Receiver, Hearer<Said>) {
        let (sender, said) = channel();
        let say = |what: fn() -> Said| {
            let sender = sender.clone();
            Box::new(move || drop(sender.send(what()))) as Box<dyn Fn() + Send>
        };
        let bell = Bell {
            frames: say(|| Said::Frames),
            overdue: say(|| Said::Overdue),
            lost: Box::new(move |why| drop(sender.send(Said::Lost(why)))),
        };
        let receiver = Receiver::start(Source::stream(socket.into()), bell).unwrap();
        (receiver, said)
    }

    fn frame(bytes: u8) -> Vec<u8> {
        [
            &u32::from(bytes).to_be_bytes()[..],
            &vec![bytes; bytes.into()],
        ]
        .concat()
    }

    #[test]
    fn frames_that_come_are_told_once_and_are_overdue_once() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (receiver, said) = listen(ours);
        let inbox = receiver.inbox();
        theirs.write_all(&[frame(60), frame(61)].concat()).unwrap();
        assert_eq!(said.recv(), Ok(Said::Frames));
        assert_eq!(said.recv(), Ok(Said::Overdue));
        assert_eq!(inbox.pop(), Some(vec![60; 60]));
        assert_eq!(inbox.pop(), Some(vec![61; 61]));
        theirs.write_all(&frame(62)).unwrap();
        assert_eq!(said.recv(), Ok(Said::Frames));
        inbox.pop();
        drop(theirs);
        let last = said.iter().last();
        assert_eq!(last, Some(Said::Lost("the connection was closed".into())));
    }

    #[test]
    fn an_end_that_sends_nonsense_is_lost() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (_receiver, said) = listen(ours);
        theirs.write_all(&[0xff; 8]).unwrap();
        let Ok(Said::Lost(why)) = said.recv() else {
            panic!("nothing was lost")
        };
        assert!(why.contains("4294967295 bytes"), "{why}");
    }

    #[test]
    fn a_receiver_that_is_dropped_ends_its_thread_and_says_nothing() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (receiver, said) = listen(ours);
        drop(receiver);
        // A process that another test has just forked may have it open until it runs its program.
        let closed = (0..500).any(|_| {
            let closed = theirs.write_all(&frame(60)).is_err();
            if !closed {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            closed
        });
        assert!(closed, "nobody has it open");
        assert!(said.recv().is_err(), "it dropped its bell and said nothing");
    }
}
