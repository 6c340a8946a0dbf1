//! `--publish`: a port of this host that leads to one of the guest's.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};

/// What goes through the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
}

/// A published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Publish {
    host: SocketAddrV4,
    guest: u16,
    protocol: Protocol,
}

/// Parses `[ADDRESS:]PORT:PORT[/tcp|/udp]`. Without an address only this host can reach the port.
///
/// # Errors
///
/// What was expected.
pub fn parse_publish(text: &str) -> Result<Publish, String> {
    let parse = || {
        let (ports, protocol) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some(_) => return None,
        };
        let (host, guest) = ports.rsplit_once(':')?;
        let (address, port) = match host.rsplit_once(':') {
            None => (Ipv4Addr::LOCALHOST, host),
            Some((address, port)) => (address.parse().ok()?, port),
        };
        let number = |text: &str| text.parse().ok().filter(|port| *port != 0);
        Some(Publish {
            host: SocketAddrV4::new(address, number(port)?),
            guest: number(guest)?,
            protocol,
        })
    };
    parse().ok_or(format!(
        "{text:?}: expected [ADDRESS:]PORT:PORT[/udp], the host's port and the guest's, such as 8080:80"
    ))
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{}:{}/{protocol}", self.host, self.guest)
    }
}

impl Publish {
    /// passt's option for it, and that option's value.
    pub fn passt_option(&self) -> (&'static str, String) {
        let option = match self.protocol {
            Protocol::Tcp => "--tcp-ports",
            Protocol::Udp => "--udp-ports",
        };
        let (address, port) = (self.host.ip(), self.host.port());
        (option, format!("{address}/{port}:{}", self.guest))
    }

    /// What goes through it.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Whether the port can be had now: who says so before passt does can say why not.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn try_port(&self) -> io::Result<()> {
        match self.protocol {
            Protocol::Tcp => TcpListener::bind(self.host).map(drop),
            Protocol::Udp => UdpSocket::bind(self.host).map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_port_is_the_hosts_then_the_guests() {
        let shown = |text| parse_publish(text).map(|publish| publish.to_string());
        assert_eq!(shown("8080:80"), Ok("127.0.0.1:8080:80/tcp".into()));
        assert_eq!(shown("8080:80/tcp"), Ok("127.0.0.1:8080:80/tcp".into()));
        assert_eq!(
            shown("0.0.0.0:53:5353/udp"),
            Ok("0.0.0.0:53:5353/udp".into())
        );
        for bad in [
            "",
            "80",
            "80:",
            ":80",
            "0:80",
            "80:0",
            "80:80/sctp",
            "x:80:80",
            "1:2:3:4",
            "70000:1",
        ] {
            assert!(parse_publish(bad).is_err(), "{bad}");
        }
        let option = parse_publish("1.2.3.4:80:8080/udp").unwrap().passt_option();
        assert_eq!(option, ("--udp-ports", "1.2.3.4/80:8080".into()));
    }

    #[test]
    fn a_port_that_is_taken_cannot_be_published() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let publish = parse_publish(&format!("{port}:80")).unwrap();
        let error = publish.try_port().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
