//! The conversation with gdb: its packets in, what the replay does out.

use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use gdbstub::common::Signal;
use gdbstub::conn::{Connection, ConnectionExt};
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{GdbStub, SingleThreadStopReason};
use hindsight_vmm::failure::{Failure, Kind};

use super::target::Guest;

/// A socket.
#[derive(Debug)]
enum Stream {
    /// Of this host's file system.
    Unix(UnixStream),
    /// Of this host's loopback.
    Tcp(TcpStream),
}

/// gdb, by a socket.
#[derive(Debug)]
pub(crate) struct Peer {
    stream: Stream,
    /// How many bytes are to come of the packet that is being read; `None`: nobody knows yet.
    rest: Option<u8>,
}

impl From<UnixStream> for Peer {
    fn from(stream: UnixStream) -> Peer {
        Peer::of(Stream::Unix(stream))
    }
}

impl From<TcpStream> for Peer {
    fn from(stream: TcpStream) -> Peer {
        Peer::of(Stream::Tcp(stream))
    }
}

impl Peer {
    fn of(stream: Stream) -> Peer {
        let rest = Some(0);
        Peer { stream, rest }
    }

    /// The same connection.
    fn try_clone(&self) -> io::Result<Peer> {
        Ok(Peer::of(match &self.stream {
            Stream::Unix(stream) => Stream::Unix(stream.try_clone()?),
            Stream::Tcp(stream) => Stream::Tcp(stream.try_clone()?),
        }))
    }

    fn read_any(&mut self) -> io::Result<u8> {
        match &mut self.stream {
            Stream::Unix(stream) => ConnectionExt::read(stream),
            Stream::Tcp(stream) => ConnectionExt::read(stream),
        }
    }
}

impl Connection for Peer {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.write_all(&[byte])
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        // A look at what waits may have left it so.
        match &mut self.stream {
            Stream::Unix(stream) => {
                stream.set_nonblocking(false)?;
                io::Write::write_all(stream, bytes)
            }
            Stream::Tcp(stream) => {
                stream.set_nonblocking(false)?;
                io::Write::write_all(stream, bytes)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.stream {
            Stream::Unix(stream) => io::Write::flush(stream),
            Stream::Tcp(stream) => io::Write::flush(stream),
        }
    }

    fn on_session_start(&mut self) -> io::Result<()> {
        match &mut self.stream {
            Stream::Unix(_) => Ok(()),
            Stream::Tcp(stream) => stream.set_nodelay(true),
        }
    }
}

impl ConnectionExt for Peer {
    fn read(&mut self) -> io::Result<u8> {
        loop {
            let byte = self.read_any()?;
            match (self.rest, byte) {
                // gdb has waited for longer than it likes to. The answer is on its way.
                (Some(0), b'-') => continue,
                (Some(0), b'$') => self.rest = None,
                (Some(0), _) => {}
                // Two digits of a checksum.
                (None, b'#') => self.rest = Some(2),
                (None, _) => {}
                (Some(rest), _) => self.rest = Some(rest - 1),
            }
            return Ok(byte);
        }
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        match &mut self.stream {
            Stream::Unix(stream) => ConnectionExt::peek(stream),
            Stream::Tcp(stream) => ConnectionExt::peek(stream),
        }
    }
}

/// What is done while the guest runs.
enum Loop {}

impl BlockingEventLoop for Loop {
    type Target = Guest;
    type Connection = Peer;
    type StopReason = SingleThreadStopReason<u64>;

    fn wait_for_stop_reason(
        guest: &mut Guest,
        peer: &mut Peer,
    ) -> Result<Event<Self::StopReason>, WaitForStopReasonError<Failure, io::Error>> {
        // Whatever gdb says meanwhile, and be it nothing more at all, stops the guest.
        let mut speaks = || !matches!(peer.peek(), Ok(None));
        let reason = guest.go(&mut speaks);
        let reason = reason.map_err(WaitForStopReasonError::Target)?;
        if speaks() && matches!(reason, SingleThreadStopReason::Signal(Signal::SIGINT)) {
            let byte = peer.read().map_err(WaitForStopReasonError::Connection)?;
            return Ok(Event::IncomingData(byte));
        }
        Ok(Event::TargetStopped(reason))
    }

    fn on_interrupt(_: &mut Guest) -> Result<Option<Self::StopReason>, Failure> {
        Ok(Some(SingleThreadStopReason::Signal(Signal::SIGINT)))
    }
}

/// What a packet may have. gdb reads files and memory in pieces of about that.
const PACKET_BYTES: usize = 64 << 10;

/// Lets `peer` debug a replay, until it has had enough. `interrupted` tells whether somebody wants stopped what gdb itself
/// does not stop.
///
/// # Errors
///
/// It says what is no packet of gdb's, or the replay cannot go on.
pub(crate) fn serve(
    mut guest: Guest,
    peer: Peer,
    mut interrupted: impl FnMut() -> bool + 'static,
) -> Result<(), Failure> {
    let mut other = peer.try_clone()?;
    guest.interrupt_by(move || {
        // A packet was received, or nobody is there any more.
        let speaks = !matches!(other.peek(), Ok(None | Some(b'+')));
        interrupted() || speaks
    });
    let stub = GdbStub::builder(peer).packet_buffer_size(PACKET_BYTES);
    let stub = stub.build().expect("there is a buffer");
    match stub.run_blocking::<Loop>(&mut guest) {
        Ok(_) => Ok(()),
        // It hung up.
        Err(error) if error.is_connection_error() => Ok(()),
        Err(error) if error.is_target_error() => {
            Err(error.into_target_error().expect("it is one of the guest's"))
        }
        Err(error) => {
            let message = format!("what was debugging said what gdb does not say: {error}");
            Err(Failure::new(Kind::BadInput, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_impatient_peer_is_heard_without_its_complaints() {
        let (mut gdb, ours) = UnixStream::pair().expect("a pair of sockets");
        io::Write::write_all(&mut gdb, b"-$m-1#--+-$?#3f-").expect("it is written");
        drop(gdb);
        let mut peer = Peer::from(ours);
        let mut heard = Vec::new();
        while let Ok(byte) = ConnectionExt::read(&mut peer) {
            heard.push(byte);
        }
        assert_eq!(heard, b"$m-1#--+$?#3f");
    }
}
