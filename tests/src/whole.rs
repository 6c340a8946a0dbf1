//! A whole Debian under the recorder: from power-on to `poweroff`, by what is typed at its console, or by
//! the workload that its command line names.
//!
//! Where the images are is said by `HINDSIGHT_IMAGES`; `guest-images/build-debian` builds them.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::debian::{Debian, Ran};

/// How long one request may take on a slow host.
const REQUEST_PATIENCE: Duration = Duration::from_secs(30);
/// How long an operator takes to see that somebody asks.
const BEFORE_TYPING: Duration = Duration::from_secs(1);
/// Tries of one request before it is given up.
const TRIES: u32 = 20;

/// What is typed, and behind which text.
pub const SESSION: [(&str, &str); 5] = [
    ("login: ", "root\n"),
    ("~# ", "uname -r; ls /; df /; date\n"),
    (
        "~# ",
        "for i in 1 2 3; do echo $i $RANDOM; sleep 0.3; done\n",
    ),
    ("~# ", "head -c 16 /dev/urandom | od -x; ip -br address\n"),
    ("~# ", "poweroff\n"),
];

/// One image of a whole Debian.
#[derive(Clone, Debug)]
pub struct Whole<'a> {
    debian: &'a Debian,
    stem: PathBuf,
}

impl<'a> Whole<'a> {
    /// The image `name`, which must be there.
    pub fn new(debian: &'a Debian, name: &str) -> Whole<'a> {
        let stem = debian.image(name).with_extension("");
        Whole { debian, stem }
    }

    /// The disk's file.
    pub fn disk(&self) -> PathBuf {
        self.stem.with_extension("img")
    }

    /// `record` or `run` of this machine, streams piped; `words` are added to the kernel's command line.
    pub fn command(&self, arguments: &[&str], words: &str) -> Command {
        let mut command = self.debian.command(arguments);
        command
            .arg("--kernel")
            .arg(self.stem.with_extension("vmlinuz"))
            .arg("--initrd")
            .arg(self.stem.with_extension("initrd"))
            .arg("--disk")
            .arg(self.disk())
            .arg(format!("--cmdline=root=/dev/vda rw {words}"));
        command
    }

    /// Records a session: types each line behind its text.
    pub fn record_session(&self, directory: &Path, more: &[&str]) -> Ran {
        let mut child = self
            .command(&["record", "--memory", "512M"], "")
            .arg("--output")
            .arg(directory)
            .args(more)
            .stdin(Stdio::piped())
            .spawn()
            .expect("hindsight starts");
        let mut input = child.stdin.take().expect("it is piped");
        let steps = SESSION.map(|(behind, line)| (behind.to_string(), line.to_string()));
        finish(child, move |shown, next| {
            let (behind, line) = steps.get(*next)?;
            if shown.ends_with(behind.as_bytes()) {
                *next += 1;
                // A login throws away what was typed before it asked, and asks a little after it says so.
                std::thread::sleep(BEFORE_TYPING);
                // A guest that is gone is the test's business.
                let _ = input.write_all(line.as_bytes());
                return Some(());
            }
            None
        })
    }

    /// Records a workload; answers come from `requests` to `port` of this host once it serves.
    pub fn record_workload(
        &self,
        directory: &Path,
        workload: &str,
        more: &[&str],
        requests: Option<(u16, u32)>,
    ) -> Ran {
        let memory = if workload.starts_with("swap") {
            "256M"
        } else {
            "512M"
        };
        let words = format!("workload={workload}");
        let child = self
            .command(&["record", "--memory", memory], &words)
            .arg("--output")
            .arg(directory)
            .args(more)
            .stdin(Stdio::null())
            .spawn()
            .expect("hindsight starts");
        let mut client: Option<JoinHandle<u32>> = None;
        let ran = finish(child, |shown, _| {
            let (port, count) = requests?;
            let serves = shown.ends_with(b"workload nginx: serving");
            if serves && client.is_none() {
                client = Some(std::thread::spawn(move || ask(port, count)));
                return Some(());
            }
            None
        });
        if let (Some(client), Some((_, count))) = (client, requests) {
            let answered = client.join().expect("the client does not panic");
            assert_eq!(answered, count, "requests were answered");
        }
        ran
    }
}

/// Reads the console to its end, byte by byte past `step`, which is told how far it has come.
fn finish(mut child: Child, mut step: impl FnMut(&[u8], &mut usize) -> Option<()>) -> Ran {
    let mut stdout = child.stdout.take().expect("it is piped");
    let mut stderr = child.stderr.take().expect("it is piped");
    // Read beside, or a full pipe would stop the recorder.
    let said = std::thread::spawn(move || {
        let mut said = Vec::new();
        stderr.read_to_end(&mut said).map(|_| said)
    });
    let (mut shown, mut next) = (Vec::new(), 0);
    let mut buffer = [0; 4096];
    loop {
        let count = stdout.read(&mut buffer).expect("a console can be read");
        if count == 0 {
            break;
        }
        for byte in &buffer[..count] {
            shown.push(*byte);
            step(&shown, &mut next);
        }
    }
    let status = child.wait().expect("hindsight ends");
    let stderr = said
        .join()
        .expect("reading does not panic")
        .expect("it can be read");
    Ran::new(std::process::Output {
        status,
        stdout: shown,
        stderr,
    })
}

/// Asks for `count` pages, one after the other; returns how many came.
fn ask(port: u16, count: u32) -> u32 {
    (0..count)
        .filter(|_| (0..TRIES).any(|_| get(port).is_ok()))
        .count() as u32
}

/// One request. A server that has just begun may not listen yet.
fn get(port: u16) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(REQUEST_PATIENCE))?;
    stream.set_write_timeout(Some(REQUEST_PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: guest\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    if answer.starts_with(b"HTTP/1.1 200") && answer.ends_with(b"hello from nginx\n") {
        return Ok(());
    }
    std::thread::sleep(Duration::from_millis(200));
    Err(std::io::Error::other("no page"))
}
