//! Frames over a stream socket, each after its length: what QEMU's `stream` network devices speak, and
//! passt.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::share;

/// Bytes of a frame's length, big-endian.
pub(super) const LENGTH_BYTES: usize = 4;
/// How long a full socket is waited for: the other end may only want the processor. Once that has
/// not helped, frames are dropped without waiting, until the socket takes one.
const FULL_SOCKET_WAIT: Duration = Duration::from_millis(20);

/// The sending side.
#[derive(Debug)]
pub(super) struct StreamWire {
    socket: OwnedFd,
    /// A frame with its length. All of it goes, or nothing: what has been begun must be finished before
    /// anything else.
    frame: Vec<u8>,
    sent: usize,
    /// The socket was full the last time.
    full: bool,
}

impl StreamWire {
    /// Sends over `socket`.
    pub(super) fn new(socket: UnixStream) -> StreamWire {
        StreamWire {
            socket: socket.into(),
            frame: Vec::new(),
            sent: 0,
            full: false,
        }
    }

    /// The same socket, to receive from.
    pub(super) fn share(&self) -> io::Result<OwnedFd> {
        share(&self.socket)
    }

    /// Sends a frame, or drops it if the socket is full.
    pub(super) fn send(&mut self, frame: &[u8]) {
        if !self.finish() {
            return;
        }
        let length = u32::try_from(frame.len()).expect("a frame has fewer than 4 GiB");
        self.frame.clear();
        self.frame.extend_from_slice(&length.to_be_bytes());
        self.frame.extend_from_slice(frame);
        self.sent = 0;
        if !self.finish() && self.sent == 0 {
            self.frame.clear();
        }
    }

    /// Sends what has been begun; whether nothing is left.
    fn finish(&mut self) -> bool {
        while self.sent < self.frame.len() {
            let rest = &self.frame[self.sent..];
            match send(
                &self.socket,
                rest,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(count) => {
                    self.sent += count;
                    self.full = false;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if self.full
                        || !wait_until(self.socket.as_fd(), PollFlags::OUT, FULL_SOCKET_WAIT)
                    {
                        self.full = true;
                        return false;
                    }
                }
                // The receiving side notices, and says so.
                Err(_) => self.sent = self.frame.len(),
            }
        }
        true
    }
}

/// Waits for so long until something can be done; whether it can.
fn wait_until(fd: impl AsFd, flags: PollFlags, most: Duration) -> bool {
    let end = Instant::now() + most;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = left.try_into().expect("a short time");
        match poll(&mut [PollFd::new(&fd, flags)], Some(&timeout)) {
            // A kick, most likely.
            Err(Errno::INTR) => {}
            Err(_) | Ok(0) => return false,
            Ok(_) => return true,
        }
    }
}

/// Frames out of a stream of bytes.
#[derive(Debug, Default)]
pub(super) struct Deframer {
    bytes: Vec<u8>,
}

/// The other end does not keep to the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Nonsense {
    /// What it said a frame's length is.
    pub length: u32,
}

impl Deframer {
    /// Adds bytes, and hands out every frame that is whole.
    pub(super) fn take(
        &mut self,
        bytes: &[u8],
        mut frame: impl FnMut(&[u8]),
    ) -> Result<(), Nonsense> {
        self.bytes.extend_from_slice(bytes);
        let mut rest = &self.bytes[..];
        while let Some((length, after)) = rest.split_first_chunk::<LENGTH_BYTES>() {
            let length = u32::from_be_bytes(*length);
            if length as usize > hindsight_devices::FRAME_BYTES_MAX {
                return Err(Nonsense { length });
            }
            let Some((whole, after)) = after.split_at_checked(length as usize) else {
                break;
            };
            frame(whole);
            rest = after;
        }
        let done = self.bytes.len() - rest.len();
        self.bytes.drain(..done);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn frames_of(bytes: &[u8], piece: usize) -> Vec<Vec<u8>> {
        let (mut deframer, mut frames) = (Deframer::default(), Vec::new());
        for bytes in bytes.chunks(piece) {
            let taken = deframer.take(bytes, |frame| frames.push(frame.to_vec()));
            assert_eq!(taken, Ok(()));
        }
        frames
    }

    #[test]
    fn frames_come_out_of_the_stream_whatever_its_pieces() {
        let frames: Vec<Vec<u8>> = (0..20).map(|i| vec![i as u8; i * 101]).collect();
        let stream: Vec<u8> = frames
            .iter()
            .flat_map(|frame| [&(frame.len() as u32).to_be_bytes()[..], frame].concat())
            .collect();
        for piece in [1, 3, 4, 5, 1000, stream.len()] {
            assert_eq!(frames_of(&stream, piece), frames, "{piece}");
        }
    }

    #[test]
    fn a_length_that_no_frame_has_is_an_error_and_no_reservation() {
        let mut deframer = Deframer::default();
        let taken = deframer.take(&u32::MAX.to_be_bytes(), |_| panic!("no frame"));
        assert_eq!(taken, Err(Nonsense { length: u32::MAX }));
    }

    #[test]
    fn a_socket_that_nobody_reads_drops_whole_frames_and_waits_once() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut wire = StreamWire::new(ours);
        let frame = |number: u32| number.to_be_bytes().repeat(250);
        let start = Instant::now();
        for number in 0..5_000 {
            wire.send(&frame(number));
        }
        assert!(
            start.elapsed() < 50 * FULL_SOCKET_WAIT,
            "{:?}",
            start.elapsed()
        );
        theirs.set_nonblocking(true).unwrap();
        let (mut deframer, mut came) = (Deframer::default(), Vec::new());
        let mut take = |theirs: &mut UnixStream| {
            let mut buffer = [0; 65536];
            while let Ok(count) = theirs.read(&mut buffer) {
                let whole = |whole: &[u8]| {
                    let number = u32::from_be_bytes(whole[..4].try_into().unwrap());
                    assert_eq!(whole, frame(number));
                    came.push(number);
                };
                deframer.take(&buffer[..count], whole).unwrap();
            }
        };
        take(&mut theirs);
        wire.send(&frame(9_999));
        take(&mut theirs);
        let first = came.len() - 2;
        assert!(came[..first].iter().copied().eq(0..first as u32));
        assert_eq!(
            came.last(),
            Some(&9_999),
            "what was begun was finished first"
        );
        assert!(came.len() < 5_000);
    }

    #[test]
    fn a_socket_without_another_end_takes_anything() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        StreamWire::new(ours).send(&[0; 60]);
    }
}
