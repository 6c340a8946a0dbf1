//! A guest on a network, driven from this host: see `guest-images/programs/net.c` for what it answers.

use hindsight_tests::skip::skip;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use hindsight_tests::debian::{Debian, Ran};
use hindsight_tests::requests::free_port;

use super::{line_time, path, read_until, scratch};

/// How long an answer may take, on a slow host.
const ANSWER_WAIT: Duration = Duration::from_secs(60);

/// A datagram's bytes in one Ethernet frame.
const UNFRAGMENTED: usize = 1472;

/// A recording under way of the guest `net`.
struct Guest {
    child: Child,
    console: ChildStdout,
    shown: Vec<u8>,
    recording: PathBuf,
}

impl Guest {
    /// Starts it and waits until it answers.
    fn start(debian: &Debian, recording: PathBuf, options: &[&str]) -> Guest {
        let command = debian.recording(&recording, "net", options);
        Guest::ready(command, recording)
    }

    /// Starts what records it, and waits until it answers.
    fn ready(mut command: Command, recording: PathBuf) -> Guest {
        let mut child = command
            .stdin(Stdio::null())
            .spawn()
            .expect("hindsight starts");
        let mut console = child.stdout.take().expect("it is piped");
        let mut shown = Vec::new();
        read_until(&mut console, &mut shown, "net: ready");
        Guest {
            child,
            console,
            shown,
            recording,
        }
    }

    /// The recording's end, and the guest's whole console.
    fn end(mut self) -> (Ran, PathBuf) {
        self.console
            .read_to_end(&mut self.shown)
            .expect("a console can be read");
        let output = self.child.wait_with_output().expect("hindsight ends");
        let mut ran = Ran::new(output);
        ran.stdout = self.shown;
        (ran, self.recording)
    }
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Sends a line, and returns the answer.
fn ask(address: SocketAddr, line: &str) -> String {
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_WAIT).expect("the guest listens");
    stream.set_read_timeout(Some(ANSWER_WAIT)).expect("it can");
    stream
        .write_all(format!("{line}\n").as_bytes())
        .expect("the guest reads");
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .unwrap_or_else(|error| panic!("{error} after {answer:?}"));
    answer
}

/// Sends a datagram until it comes back: one may be lost on the way.
fn echo(address: SocketAddr, datagram: &[u8]) {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("there is a port");
    socket.connect(address).expect("there is a way");
    let second = Some(Duration::from_secs(2));
    socket.set_read_timeout(second).expect("it can");
    for _ in 0..10 {
        socket.send(datagram).expect("it can be sent");
        let mut buffer = vec![0; 65536];
        if let Ok(bytes) = socket.recv(&mut buffer) {
            // passt hands on only the first fragment of what the guest sends in several.
            let whole = datagram.len().min(UNFRAGMENTED);
            assert!(bytes >= whole, "{bytes} of {} bytes", datagram.len());
            assert!(buffer[..bytes] == datagram[..bytes], "other bytes");
            return;
        }
    }
    panic!(
        "{address} does not answer a datagram of {} bytes",
        datagram.len()
    );
}

fn replays_equal(debian: &Debian, recording: &Path, recorded: &Ran) {
    let replayed = debian.replay(recording, &["--verify", "memory"]).expect(0);
    let equal = replayed.stdout == recorded.stdout;
    assert!(equal, "the console differs:\n{}", replayed.text());
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_guest_answers_through_published_ports_and_replays_equal() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let (tcp, udp) = (free_port(), free_port());
    let publish = [format!("{tcp}:7"), format!("127.0.0.1:{udp}:7/udp")];
    let options = [
        &["--net", "user", "--publish", &publish[0]][..],
        &["--publish", &publish[1]],
    ];
    let guest = Guest::start(&debian, dir.path().join("r"), &options.concat());
    for number in 1..=20 {
        let answer = ask(local(tcp), &format!("hello {number}"));
        let expected = format!("{number} HELLO {number} at ");
        assert!(answer.starts_with(&expected), "{answer}");
    }
    let long = "x".repeat(300_000);
    let answer = ask(local(tcp), &long);
    assert!(answer.starts_with(&format!("21 {} at ", long.to_uppercase())));
    for bytes in [1, 100, UNFRAGMENTED, 20_000] {
        echo(local(udp), &vec![b'u'; bytes]);
    }
    ask(local(tcp), "quit");
    let (recorded, recording) = guest.end();
    let recorded = recorded.expect(0);
    let text = recorded.text();
    assert!(
        text.contains("net: address 10.0.2.15 router 10.0.2.2"),
        "{text}"
    );
    assert!(text.contains("net: 22 lines"), "{text}");
    for _ in 0..2 {
        replays_equal(&debian, &recording, &recorded);
    }
    a_pcapng_has_every_request(&debian, &recording);
}

/// Only where there is a tshark.
fn a_pcapng_has_every_request(debian: &Debian, recording: &Path) {
    let capture = recording.with_extension("pcapng");
    debian
        .run(&["pcap", path(recording), "-o", path(&capture)])
        .expect(0);
    let piped = debian.run(&["pcap", path(recording)]).expect(0);
    let written = std::fs::read(&capture).expect("it was written");
    assert!(piped.stdout == written, "a pipe gets something else");
    let tshark = |filter: &str| {
        let mut tshark = Command::new("tshark");
        tshark.arg("-r").arg(&capture).args(["-Y", filter]);
        let output = tshark.output().ok()?;
        let ran = Ran::new(output).expect(0);
        Some(ran.text().lines().count())
    };
    let Some(frames) = tshark("frame") else {
        eprintln!("no tshark here: the pcapng was not read");
        return;
    };
    assert!(frames > 200, "{frames} frames");
    let inbound = tshark("frame.packet_flags_direction == 1");
    let outbound = tshark("frame.packet_flags_direction == 2");
    assert_eq!(inbound.zip(outbound).map(|(a, b)| a + b), Some(frames));
    let requests = tshark("tcp.dstport == 7 && tcp.flags.syn == 1 && !tcp.analysis.retransmission");
    assert_eq!(requests, Some(22));
    assert_eq!(tshark("dhcp.option.dhcp == 5"), Some(1), "a lease");
    assert_eq!(tshark("_ws.malformed"), Some(0));
    let longest = tshark("frame.len == 20042 && frame.packet_flags_direction == 1");
    assert!(longest >= Some(1), "a frame in many buffers");
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_guest_that_computes_answers_all_the_same() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let port = free_port();
    let publish = format!("{port}:7");
    let options = ["--net", "user", "--publish", &publish, "--cmdline", "spin"];
    let guest = Guest::start(&debian, dir.path().join("r"), &options);
    for _ in 0..5 {
        ask(local(port), "are you there");
    }
    ask(local(port), "quit");
    let (recorded, recording) = guest.end();
    replays_equal(&debian, &recording, &recorded.expect(0));
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_passt_that_is_killed_leaves_a_recording_that_replays_to_there() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let port = free_port();
    let publish = format!("{port}:7");
    let options = ["--net", "user", "--publish", &publish];
    let guest = Guest::start(&debian, dir.path().join("r"), &options);
    ask(local(port), "hello");
    let id = guest.child.id();
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
    let passt = children.expect("the kernel lists children");
    let killed = Command::new("kill").args(["-KILL", passt.trim()]).status();
    assert!(killed.is_ok_and(|status| status.success()), "{passt}");
    it_ends_with_what_there_is(&debian, guest, "passt ended (signal: 9 (SIGKILL))");
}

/// The network is gone: a clean end, a message that says why, and a recording of all that was.
fn it_ends_with_what_there_is(debian: &Debian, guest: Guest, why: &str) {
    let (recorded, recording) = guest.end();
    let recorded = recorded.expect(5);
    assert!(recorded.stderr.contains(why), "{}", recorded.stderr);
    assert!(
        recorded.stderr.contains("is whole up to there"),
        "{}",
        recorded.stderr
    );
    replays_equal(debian, &recording, &recorded);
}

#[test]
#[ignore = "needs a KVM that can record"]
fn without_passt_or_with_a_port_that_is_taken_nothing_is_written() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let taken = TcpListener::bind("127.0.0.1:0").expect("there is a port");
    let port = taken.local_addr().expect("it has an address").port();
    let publish = format!("{port}:7");
    let options = ["--net", "user", "--publish", &publish];
    let refused = debian.record(&recording, "net", &options, b"").expect(2);
    let why = format!("cannot publish 127.0.0.1:{port}:7/tcp: Address already in use");
    assert!(refused.stderr.contains(&why), "{}", refused.stderr);
    let mut command = debian.recording(&recording, "net", &["--net", "user"]);
    let output = command.env("PATH", dir.path()).output();
    let refused = Ran::new(output.expect("hindsight starts")).expect(4);
    let names = refused.stderr.contains("install the package passt");
    assert!(names, "{}", refused.stderr);
    let options = ["--net", "tap=hs-not-there"];
    let refused = debian.record(&recording, "net", &options, b"").expect(2);
    assert!(
        refused.stderr.contains("ip tuntap add"),
        "{}",
        refused.stderr
    );
    assert!(!recording.exists());
}

/// Runs ip(8) as root, if this is root.
fn ip(arguments: &str) -> bool {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    status.is_ok_and(|status| status.success())
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_tap_device_that_is_removed_leaves_a_recording_that_replays_to_there() {
    let (debian, dir) = (Debian::from_env(), scratch());
    // The box has no such driver until it is asked for.
    let _ = Command::new("modprobe").arg("tun").status();
    if !ip("tuntap add dev hs-test mode tap") {
        skip("only root can make a tap device");
        return;
    }
    assert!(ip("addr add 10.99.7.1/24 dev hs-test") && ip("link set hs-test up"));
    let address = "address=10.99.7.2/24";
    let options = ["--net", "tap=hs-test", "--cmdline", address];
    let guest = Guest::start(&debian, dir.path().join("r"), &options);
    let card = SocketAddr::from(([10, 99, 7, 2], 7));
    let answer = ask(card, &"x".repeat(100_000));
    assert!(answer.starts_with("1 XXX"), "{answer}");
    echo(card, b"hello");
    let options = ["--net", "tap=hs-test"];
    let second = debian.record(&dir.path().join("second"), "net", &options, b"");
    assert!(second.expect(2).stderr.contains("cannot use hs-test"));
    assert!(ip("link del hs-test"));
    it_ends_with_what_there_is(&debian, guest, "tap device hs-test: it was removed");
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_guest_that_is_live_again_answers_on_a_network_of_its_own_and_replays_equal() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let publish = format!("{}:7", free_port());
    let options = ["--net", "user", "--publish", &publish];
    let guest = Guest::start(&debian, dir.path().join("r"), &options);
    let port = |publish: &str| publish.split(':').next().and_then(|port| port.parse().ok());
    let there = local(port(&publish).expect("a port"));
    assert!(ask(there, "hello").starts_with("1 HELLO at "));
    ask(there, "quit");
    let (recorded, recording) = guest.end();
    recorded.expect(0);

    let moment = line_time(&debian, &recording, "net: ready");
    let (new, again) = (dir.path().join("new"), format!("{}:7", free_port()));
    let options = [
        &[
            "live",
            path(&recording),
            "--at",
            &moment,
            "--record",
            path(&new),
        ][..],
        &["--net", "user", "-p", &again],
    ];
    let guest = Guest::ready(debian.command(&options.concat()), new);
    let here = local(port(&again).expect("a port"));
    for number in 1..=3 {
        let answer = ask(here, "hello again");
        let expected = format!("{number} HELLO AGAIN at ");
        assert!(answer.starts_with(&expected), "{answer}");
    }
    ask(here, "quit");
    let (lived, new) = guest.end();
    let lived = lived.expect(0);
    assert!(lived.text().contains("net: 4 lines"), "{}", lived.text());
    replays_equal(&debian, &new, &lived);
}
