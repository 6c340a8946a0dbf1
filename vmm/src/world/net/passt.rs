//! passt: a network for one machine, without privileges.
//!
//! It is started with one end of a pair of sockets and ends when the other is closed, however this
//! program ends. It answers DHCP and DNS, opens connections of this host's for those of the guest, and
//! takes connections to published ports. The guest always gets the same addresses, which are those that
//! QEMU gives: a recording tells nothing of the host's. IPv6 is off, for whether there is any
//! depends on the host.
//!
//! **Routes** are left to this host's kernel. Each connection of the guest's is a socket of passt's that is
//! bound to no interface, so it goes where the kernel routes its destination: by tables, metrics and rules, a
//! VPN's two halves of a default route, or nowhere. What passt itself looks for at its start is an interface to
//! take addresses and a router from, and it gives up where its own idea of a default route finds none.
//! All of these are given to it, so the interface decides nothing, and it is the one that every host has: `lo`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};

use super::publish::Protocol;
use super::{NetError, Publish};

/// The guest's address.
const GUEST: [u8; 4] = [10, 0, 2, 15];
/// passt's: router, and DHCP server. Connections to it reach this host's own loopback, and connections
/// from there come from it.
const ROUTER: [u8; 4] = [10, 0, 2, 2];
const ROUTER_MAC: &str = "52:55:0a:00:02:02";
/// How long it may take to answer, which it does once it has started.
const ANSWER_WAIT: Duration = Duration::from_secs(20);
/// Of what it says, so much is repeated.
const WORDS_MAX: usize = 2048;

/// The program, running.
#[derive(Debug)]
pub(super) struct Passt {
    child: Child,
    /// A file without a name that it complains to.
    complaints: File,
}

impl Passt {
    /// Starts it and waits until it works.
    pub(super) fn start(publish: &[Publish]) -> Result<(Passt, UnixStream), NetError> {
        for publish in publish {
            publish.try_port().map_err(|source| NetError::Port {
                publish: *publish,
                source,
            })?;
        }
        let (ours, theirs) = UnixStream::pair()?;
        // Inherited. Nobody else starts programs here, who would inherit it too.
        fcntl_setfd(&theirs, FdFlags::empty()).map_err(io::Error::from)?;
        let complaints = tempfile::tempfile()?;
        let mut command = Command::new("passt");
        command
            .args(["--foreground", "--quiet", "--stderr"])
            .args(["--fd", &theirs.as_raw_fd().to_string()])
            .args(options(publish))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(complaints.try_clone()?)
            // A Ctrl-C is for us; it ends when we are done.
            .process_group(0);
        let child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => NetError::NoPasst,
            _ => NetError::Passt(error.to_string()),
        })?;
        drop(theirs);
        let mut passt = Passt { child, complaints };
        match wait_for_answer(&ours) {
            Ok(()) => Ok((passt, ours)),
            Err(error) => Err(NetError::Passt(passt.last_words(&error.to_string()))),
        }
    }

    /// It has stopped answering: how it ended and what it said, where `seen` is what was seen of that.
    pub(super) fn last_words(&mut self, seen: &str) -> String {
        let end = Instant::now() + Duration::from_secs(1);
        let status = loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                Ok(status) => break status,
                Err(_) => break None,
            }
        };
        let how = match status {
            Some(status) => format!("passt ended ({status})"),
            None => format!("passt: {seen}"),
        };
        match self.complaints() {
            words if words.is_empty() => how,
            words => format!("{how}: {words}"),
        }
    }

    fn complaints(&self) -> String {
        let mut bytes = [0; WORDS_MAX];
        let count = self.complaints.read_at(&mut bytes, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(&bytes[..count]);
        let mut lines: Vec<&str> = text.lines().map(str::trim).collect();
        // What it says always when root starts it, or where there is no system log.
        let usual = ["", "Don't run as root.", "Failed to send"];
        lines.retain(|line| {
            !usual.iter().any(|usual| {
                if usual.is_empty() {
                    line.is_empty()
                } else {
                    line.starts_with(usual)
                }
            })
        });
        lines.join("; ")
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Its options, apart from how it is started.
fn options(publish: &[Publish]) -> Vec<String> {
    let dotted = |address: [u8; 4]| address.map(|byte| byte.to_string()).join(".");
    let mut options: Vec<String> = ["--ipv4-only", "--netmask", "24", "--mac-addr", ROUTER_MAC]
        .map(String::from)
        .into();
    options.extend(["--address".into(), dotted(GUEST)]);
    options.extend(["--gateway".into(), dotted(ROUTER)]);
    options.extend(["--interface", "lo"].map(String::from));
    for publish in publish {
        let (option, value) = publish.passt_option();
        options.extend([option.into(), value]);
    }
    // Without this it would publish ports of UDP that have the numbers of those of TCP.
    let udp = |publish: &Publish| publish.protocol() == Protocol::Udp;
    if !publish.iter().any(udp) {
        options.extend(["--udp-ports", "none"].map(String::from));
    }
    options
}

/// Asks for the router's hardware address (ARP, RFC 826), as the guest will, and waits until it answers.
fn wait_for_answer(mut socket: &UnixStream) -> io::Result<()> {
    let mac = hindsight_devices::NetSpec::default().mac;
    let parts: [&[u8]; 9] = [
        &42u32.to_be_bytes(),
        &[0xff; 6],
        &mac,
        &[8, 6],
        &[0, 1, 8, 0, 6, 4, 0, 1],
        &mac,
        &GUEST,
        &[0; 6],
        &ROUTER,
    ];
    socket.write_all(&parts.concat())?;
    socket.set_read_timeout(Some(ANSWER_WAIT))?;
    let mut length = [0; 4];
    socket.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > hindsight_devices::FRAME_BYTES_MAX {
        return Err(io::Error::other(format!("a frame of {length} bytes")));
    }
    socket.read_exact(&mut vec![0; length])?;
    socket.set_read_timeout(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    use crate::world::net::parse_publish;

    #[test]
    fn only_what_is_published_is_reachable() {
        let tcp = parse_publish("8080:80").unwrap();
        let udp = parse_publish("5353:53/udp").unwrap();
        let of = |publish: &[Publish]| options(publish).join(" ");
        assert!(of(&[]).ends_with("--udp-ports none"));
        assert!(of(&[tcp]).ends_with("--tcp-ports 127.0.0.1/8080:80 --udp-ports none"));
        assert!(of(&[tcp, udp]).ends_with("80:80 --udp-ports 127.0.0.1/5353:53"));
    }

    /// Only where there is a passt, as `scripts/test` sees to.
    fn is_installed() -> bool {
        Command::new("passt").arg("--version").output().is_ok()
    }

    #[test]
    fn passt_starts_and_ends_with_its_link_and_says_how_it_ended() {
        if !is_installed() {
            return;
        }
        let (mut passt, socket) = Passt::start(&[]).unwrap();
        assert!(passt.child.try_wait().unwrap().is_none());
        drop(socket);
        let words = passt.last_words("the connection was closed");
        assert_eq!(words, "passt ended (exit status: 0)");

        let (mut passt, _socket) = Passt::start(&[]).unwrap();
        passt.child.kill().unwrap();
        let words = passt.last_words("the connection was closed");
        assert!(words.starts_with("passt ended (signal: 9"), "{words}");
    }

    /// Set in a process of the test below that has a network of its own.
    const INSIDE: &str = "HINDSIGHT_TEST_ROUTES";

    /// Routes with which passt's own look for a default route finds none, or one that leads nowhere.
    const ROUTES: [&str; 4] = [
        "true",
        "ip route add unreachable default",
        "ip route add 0.0.0.0/1 dev lo && ip route add 128.0.0.0/1 dev lo",
        "ip route add default dev lo metric 50 && ip route add blackhole default metric 5",
    ];

    #[test]
    fn passt_starts_whatever_the_routes_of_this_host_are() {
        if !is_installed() {
            return;
        }
        if std::env::var_os(INSIDE).is_some() {
            Passt::start(&[]).unwrap();
            return;
        }
        let root = std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
        let namespaces: &[&str] = if root {
            &["--net"]
        } else {
            &["--net", "--user", "--map-root-user"]
        };
        let unshare = |command: &[&str]| {
            let mut unshare = Command::new("unshare");
            unshare.args(namespaces).args(command).env(INSIDE, "1");
            unshare.output()
        };
        if !unshare(&["ip", "link"]).is_ok_and(|output| output.status.success()) {
            eprintln!("no network of its own can be made here: nothing was tested");
            return;
        }
        let test = std::env::current_exe().unwrap();
        let test = test.to_str().unwrap();
        for routes in ROUTES {
            let (_, module) = module_path!()
                .split_once("::")
                .expect("a module of a crate");
            let name = format!("{module}::passt_starts_whatever_the_routes_of_this_host_are");
            let script = format!("ip link set lo up && {routes} && exec \"$0\" --exact {name}");
            let output = unshare(&["sh", "-c", &script, test]).unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{routes}: {said}");
            assert!(said.contains("1 passed"), "{routes}: {said}");
        }
    }

    #[test]
    fn a_port_that_is_taken_is_named() {
        if !is_installed() {
            return;
        }
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let publish = parse_publish(&format!("{port}:80")).unwrap();
        let error = Passt::start(&[publish]).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("cannot publish 127.0.0.1:{port}:80/tcp: ")),
            "{error}"
        );
    }
}
