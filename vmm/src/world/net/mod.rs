//! The other end of the guest's network card: passt, or a tap device.
//!
//! What the guest sends goes out at once, and without waiting for anybody: what the other end does not
//! take is dropped, as a wire does. A thread of its own takes what comes and puts it into an inbox, from
//! which the machine's world hands it to the guest. Only recording and running bare have
//! links: a replay's frames come from the journal, and those it sends go nowhere.

mod attached;
mod inbox;
mod passt;
mod publish;
mod receiver;
mod stream;
mod tap;

use std::io;
use std::os::fd::OwnedFd;

use thiserror::Error;

use super::bell::Bell;
use crate::failure::{Classified, Kind};

pub(super) use attached::Attached;
pub use publish::{Publish, parse_publish};
pub use tap::is_name as is_tap_name;

use passt::Passt;
use receiver::{Receiver, Source};
use stream::StreamWire;

/// Why there is no link.
#[derive(Debug, Error)]
pub enum NetError {
    /// passt is not installed.
    #[error(
        "--net user needs passt, and there is no such program; install the package passt (Debian: apt install passt)"
    )]
    NoPasst,
    /// Somebody has the port that is to be published.
    #[error("cannot publish {publish}: {source}")]
    Port {
        /// What was asked for.
        publish: Publish,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// passt did not start, in its own words.
    #[error("passt did not start: {0}")]
    Passt(String),
    /// There is no such device.
    #[error(
        "there is no tap device {0}; make one: ip tuntap add dev {0} mode tap user $USER && ip link set {0} up"
    )]
    NoTap(String),
    /// It cannot be used.
    #[error("cannot use {name} as a tap device: {source}")]
    Tap {
        /// Its name.
        name: String,
        #[source]
        source: io::Error,
    },
    /// Something else of the host's.
    #[error("cannot make a network: {0}")]
    Host(#[from] io::Error),
}

/// A network that a machine is to be on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// By passt, with ports of the guest's published on this host.
    User(Vec<Publish>),
    /// A tap device.
    Tap(String),
}

/// A link that stands.
#[derive(Debug)]
pub struct Link {
    network: Network,
    end: End,
}

#[derive(Debug)]
enum End {
    Passt { passt: Passt, wire: StreamWire },
    Tap(tap::TapWire),
}

impl Link {
    /// Starts passt, or opens the tap device. Frames can be sent when this returns, and those that come
    /// wait in the socket or the device.
    ///
    /// # Errors
    ///
    /// What is missing, and what to do about it.
    pub fn open(network: Network) -> Result<Link, NetError> {
        let end = match &network {
            Network::User(publish) => {
                let (passt, socket) = Passt::start(publish)?;
                End::Passt {
                    passt,
                    wire: StreamWire::new(socket),
                }
            }
            Network::Tap(name) => End::Tap(tap::open(name)?),
        };
        Ok(Link { network, end })
    }

    /// Lets frames come in, and ring `bell`, until what is returned is dropped.
    fn listen(&self, bell: Bell) -> Result<Receiver, NetError> {
        let source = match &self.end {
            End::Passt { wire, .. } => Source::stream(wire.share()?),
            End::Tap(tap) => Source::tap(tap.share()?),
        };
        Ok(Receiver::start(source, bell)?)
    }

    fn send(&mut self, frame: &[u8]) {
        match &mut self.end {
            End::Passt { wire, .. } => wire.send(frame),
            End::Tap(tap) => tap.send(frame),
        }
    }

    /// The link is gone: what is known of why, where `seen` is what was seen of it.
    fn post_mortem(&mut self, seen: &str) -> String {
        match &mut self.end {
            End::Passt { passt, .. } => format!("the network is gone: {}", passt.last_words(seen)),
            End::Tap(tap) => format!("the network is gone: tap device {}: {seen}", tap.name()),
        }
    }
}

/// Two descriptors of one open file.
fn share(fd: &OwnedFd) -> io::Result<OwnedFd> {
    fd.try_clone()
}

impl Classified for NetError {
    fn kind(&self) -> Kind {
        match self {
            NetError::NoPasst => Kind::Unfit,
            NetError::Passt(_) | NetError::Host(_) => Kind::HostFailed,
            NetError::Port { .. } | NetError::NoTap(_) | NetError::Tap { .. } => Kind::BadInput,
        }
    }
}
