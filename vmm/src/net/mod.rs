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

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use thiserror::Error;

pub use attached::{Attached, Waker};
pub use publish::{Publish, parse_publish};

use passt::Passt;
use receiver::{Bell, Receiver, Source};
use stream::StreamWire;

/// What `--net` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NetOption {
    /// There is no card.
    #[default]
    None,
    /// Whatever this host's user can reach, by passt.
    User,
    /// An existing tap device.
    Tap(String),
}

/// As it is given.
impl fmt::Display for NetOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NetOption::None => f.write_str("none"),
            NetOption::User => f.write_str("user"),
            NetOption::Tap(name) => write!(f, "tap={name}"),
        }
    }
}

/// Parses the value of `--net`.
///
/// # Errors
///
/// What was expected.
pub fn parse_net(text: &str) -> Result<NetOption, String> {
    match text.split_once('=') {
        None if text == "none" => Ok(NetOption::None),
        None if text == "user" => Ok(NetOption::User),
        Some(("tap", name)) if tap::is_name(name) => Ok(NetOption::Tap(name.into())),
        _ => Err(format!("{text:?}: expected none, user or tap=NAME")),
    }
}

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
        /// Why.
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

impl Network {
    /// What the options name, if anything.
    pub fn from_options(net: &NetOption, publish: &[Publish]) -> Option<Network> {
        match net {
            NetOption::None => None,
            NetOption::User => Some(Network::User(publish.to_vec())),
            NetOption::Tap(name) => Some(Network::Tap(name.clone())),
        }
    }
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

    /// Lets frames come in, and `bell` tell of them, until what is returned is dropped.
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

    /// The link is gone: what is known of why, in words, where `seen` is what was seen of it.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_none_user_or_a_tap_device() {
        for (text, net) in [
            ("none", NetOption::None),
            ("user", NetOption::User),
            ("tap=hs0", NetOption::Tap("hs0".into())),
        ] {
            assert_eq!(parse_net(text), Ok(net.clone()));
            assert_eq!(net.to_string(), text);
        }
        for bad in [
            "",
            "tap",
            "tap=",
            "user=1",
            "tap=a/b",
            "tap=0123456789abcdef",
            "tap=..",
        ] {
            assert!(parse_net(bad).is_err(), "{bad}");
        }
    }
}
