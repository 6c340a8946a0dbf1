//! The thread that takes what comes over a link.
//!
//! It puts frames into the inbox and rings the bell for the first of those that wait there.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, read};

use super::inbox::Inbox;
use super::stream::{Deframer, Nonsense};
use crate::world::bell::Bell;

/// Where frames come from.
pub(super) struct Source {
    fd: OwnedFd,
    /// `None` if each read is a frame.
    deframer: Option<Deframer>,
    buffer: Vec<u8>,
}

/// Reads until there is nothing, or this often, before it looks whether it is to stop.
const READS: usize = 64;

impl Source {
    /// A socket that carries frames after their lengths.
    pub(super) fn stream(fd: OwnedFd) -> Source {
        Source {
            fd,
            deframer: Some(Deframer::default()),
            buffer: vec![0; 256 << 10],
        }
    }

    /// A device that gives a frame with each read, and does not block.
    pub(super) fn tap(fd: OwnedFd) -> Source {
        Source {
            fd,
            deframer: None,
            buffer: vec![0; hindsight_devices::FRAME_BYTES_MAX + 1],
        }
    }

    /// Waits for something to read, or for `stop` to be closed.
    fn wait(&self, stop: &PipeReader) -> Waited {
        let mut fds = [
            PollFd::new(&self.fd, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
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
pub(super) struct Receiver {
    inbox: Arc<Inbox>,
    /// What was seen of a link that is lost.
    lost: Arc<OnceLock<String>>,
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Receiver {
    /// Starts the thread.
    pub(super) fn start(source: Source, bell: Bell) -> io::Result<Receiver> {
        let inbox = Arc::new(Inbox::default());
        let (stopped, stop) = io::pipe()?;
        let lost = Arc::new(OnceLock::new());
        let (frames, seen) = (Arc::clone(&inbox), Arc::clone(&lost));
        let thread = std::thread::Builder::new().name("network".into());
        let thread = thread.spawn(move || {
            if let Some(why) = receive(source, &frames, &bell, &stopped) {
                let _ = seen.set(why);
                bell.ring_at_once();
            }
        })?;
        Ok(Receiver {
            inbox,
            lost,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// The frames that have come.
    pub(super) fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    /// What was seen of the link if it is lost: no more frames will come.
    pub(super) fn lost(&self) -> Option<&str> {
        self.lost.get().map(String::as_str)
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

/// Takes what comes until the link is lost, and returns what was seen of it; or until it is stopped.
fn receive(mut source: Source, inbox: &Inbox, bell: &Bell, stop: &PipeReader) -> Option<String> {
    loop {
        match source.wait(stop) {
            Waited::Readable => {}
            Waited::InVain => continue,
            Waited::Stopped => return None,
        }
        let mut open = true;
        for _ in 0..READS {
            let more = source.read(|frame| match inbox.push(frame.to_vec()) {
                None => open = false,
                Some(false) => {}
                Some(true) => bell.ring(),
            });
            match more {
                _ if !open => return None,
                Ok(true) => {}
                Ok(false) => break,
                Err(why) => return Some(why),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    fn listen(socket: UnixStream) -> (Receiver, Bell) {
        let bell = Bell::default();
        let receiver = Receiver::start(Source::stream(socket.into()), bell.clone()).unwrap();
        (receiver, bell)
    }

    /// Waits for a ring.
    fn hear(bell: &Bell) {
        assert!(bell.wait(Some(Duration::from_secs(20))), "it never rang");
    }

    fn frame(bytes: u8) -> Vec<u8> {
        [
            &u32::from(bytes).to_be_bytes()[..],
            &vec![bytes; bytes.into()],
        ]
        .concat()
    }

    #[test]
    fn the_first_frame_rings_and_so_does_the_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (receiver, bell) = listen(ours);
        let inbox = receiver.inbox();
        theirs.write_all(&[frame(60), frame(61)].concat()).unwrap();
        hear(&bell);
        while inbox.count() < 2 {
            std::thread::yield_now();
        }
        assert!(!bell.wait(Some(Duration::ZERO)), "once is enough");
        assert_eq!(inbox.pop(), Some(vec![60; 60]));
        assert_eq!(inbox.pop(), Some(vec![61; 61]));
        theirs.write_all(&frame(62)).unwrap();
        hear(&bell);
        assert_eq!((inbox.pop(), receiver.lost()), (Some(vec![62; 62]), None));
        drop(theirs);
        hear(&bell);
        assert_eq!(receiver.lost(), Some("the connection was closed"));
    }

    #[test]
    fn an_end_that_sends_nonsense_is_lost() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (receiver, bell) = listen(ours);
        theirs.write_all(&[0xff; 8]).unwrap();
        hear(&bell);
        let why = receiver.lost().expect("it is lost");
        assert!(why.contains("4294967295 bytes"), "{why}");
    }

    #[test]
    fn a_receiver_that_is_dropped_ends_its_thread_and_does_not_ring() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (receiver, bell) = listen(ours);
        let lost = Arc::clone(&receiver.lost);
        drop(receiver);
        // A process that another test has just forked may have it open until it runs its program.
        let closed = (0..500).any(|_| {
            let closed = theirs.write_all(&frame(60)).is_err();
            if !closed {
                std::thread::sleep(Duration::from_millis(10));
            }
            closed
        });
        assert!(closed, "nobody has it open");
        assert!(!bell.wait(Some(Duration::ZERO)) && lost.get().is_none());
    }
}
