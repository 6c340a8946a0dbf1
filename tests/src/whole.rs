//! A whole Debian under the recorder: from power-on to `poweroff`, by what is typed at its console, or by
//! the workload that its command line names.
//!
//! Where the images are is said by `HINDSIGHT_IMAGES`; `guest-images/build-debian` builds them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::debian::Debian;
use crate::measure::Bounded;
use crate::requests::{free_port, request};
use crate::session::{Watched, parse};

/// A recording that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(900);
/// What is typed, and after which text.
const SESSION: &str = include_str!("../../guest-images/session");
/// How many requests nginx answers, if the workload's argument does not say.
const REQUESTS: u64 = 2_000;

/// One image of a whole Debian.
#[derive(Clone, Debug)]
pub struct Whole<'a> {
    debian: &'a Debian,
    stem: PathBuf,
}

/// What a workload came to.
#[derive(Debug)]
pub struct Worked {
    /// The run.
    pub end: Bounded,
    /// Why the workload did not do what it should.
    pub failure: Option<String>,
    /// The last that was said of a workload on the console.
    pub said: String,
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

    /// Records `workload` into `directory`: one of the image's, or `session`, which is typed at its
    /// console. nginx gets a network, and the requests that it waits for.
    pub fn record(&self, directory: &Path, workload: &str, more: &[&str]) -> Worked {
        let directory = directory.display().to_string();
        let arguments = [&["record", "--output", &directory], more].concat();
        self.work(&arguments, workload)
    }

    /// The same without recording it.
    pub fn run(&self, workload: &str) -> Worked {
        self.work(&["run"], workload)
    }

    fn work(&self, arguments: &[&str], workload: &str) -> Worked {
        let name = name(workload);
        let session = name == "session";
        let requests = requests(workload);
        let words = if session {
            String::new()
        } else {
            format!("workload={workload}")
        };
        // The less memory, the sooner there is too little.
        let memory = if name == "swap" { "256M" } else { "512M" };
        let mut command = self.command(arguments, &words);
        command.args(["--memory", memory]);
        let port = free_port();
        if requests > 0 {
            command.args(["--net", "user", "--publish", &format!("{port}:80")]);
        }

        let mut watched = Watched::start(command, LIMIT);
        let mut failure = None;
        if session && !watched.play(&parse(SESSION)) {
            failure = Some("the console did not ask what the session answers".to_string());
        }
        if requests > 0 {
            let serves = watched.wait_for("workload nginx: serving");
            let left = watched.left();
            let answered = if serves {
                request(port, requests, "hello from nginx", left)
            } else {
                0
            };
            if answered < requests {
                failure = Some(format!("{answered} of {requests} requests were answered"));
            }
        }
        let end = watched.finish();
        let console = end.ran.text();
        let said = console.lines().rev();
        let said = said.map(str::trim_end);
        let said = said.clone().find(|line| line.starts_with("workload "));
        Worked {
            failure: failure.or_else(|| judge(name, &end)),
            said: said.unwrap_or_default().to_string(),
            end,
        }
    }
}

/// Why the guest did not do what it should, if it did not.
fn judge(name: &str, end: &Bounded) -> Option<String> {
    let console = end.ran.text();
    let ok = format!("workload {name}: ok, ");
    let (wanted, ending) = match name {
        "session" => ("~# poweroff", "powered off"),
        "sysrq" => ("panic - not syncing: sysrq triggered crash", "kernel panic"),
        _ => (&*ok, "powered off"),
    };
    if end.stopped {
        return Some(format!("not over after {} s", LIMIT.as_secs()));
    }
    if end.ran.code != 0 {
        return Some(format!("exit code {}", end.ran.code));
    }
    if !console.contains(wanted) || console.contains(": FAILED with status") {
        return Some(format!("the console does not say {wanted:?}"));
    }
    (!end.ran.stderr.contains(ending)).then(|| format!("the recorder does not say {ending:?}"))
}

/// The name of a workload without its argument.
fn name(workload: &str) -> &str {
    workload.split(':').next().unwrap_or(workload)
}

/// How many requests a workload waits for.
pub fn requests(workload: &str) -> u64 {
    let (name, argument) = workload.split_once(':').unwrap_or((workload, ""));
    match name {
        "nginx" => argument.parse().unwrap_or(REQUESTS),
        _ => 0,
    }
}
