//! Records what a whole Debian does many times, replays each recording, and compares everything.
//!
//! `soak_debian [--image NAME] [--net] RECORDINGS REPLAYS WORKLOAD... [-- OPTION...]`, with `HINDSIGHT_BIN` and
//! `HINDSIGHT_IMAGES` as in [`hindsight_tests::debian`]. A WORKLOAD is one of the image's (see
//! `guest-images/README.md`), `NAME:ARGUMENT` for one with an argument, or `session`, which is typed at the
//! console. Prints a line per recording and a table to paste; exit code 1 if a workload failed or a
//! replay was not equal.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use hindsight_tests::debian::Ran;
use hindsight_tests::measure::median;
use hindsight_tests::requests::{captured, free_port, request};
use hindsight_tests::session::{Watched, parse};
use serde_json::Value;

/// A recording that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(900);
/// How many requests nginx answers, if the workload's argument does not say.
const REQUESTS: u64 = 2_000;
const SESSION: &str = include_str!("../../../guest-images/debian/session");

struct Plan {
    binary: PathBuf,
    /// An image, without the ending of its files.
    image: PathBuf,
    net: bool,
    recordings: u64,
    replays: u64,
    workloads: Vec<String>,
    options: Vec<String>,
}

impl Plan {
    fn from_arguments() -> Plan {
        let path = |name: &str| {
            let value = std::env::var_os(name);
            PathBuf::from(
                value.unwrap_or_else(|| panic!("{name} is not set; use scripts/soak-debian")),
            )
        };
        let (mut image, mut net, mut words) = (String::from("debian-work"), false, Vec::new());
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--image" => image = arguments.next().expect("--image wants a NAME"),
                "--net" => net = true,
                "--" => break,
                _ => words.push(argument),
            }
        }
        let mut words = words.into_iter();
        let mut number = |what: &str| {
            let word = words.next().unwrap_or_else(|| panic!("how many {what}?"));
            word.parse()
                .unwrap_or_else(|error| panic!("{word}: {error}"))
        };
        Plan {
            binary: path("HINDSIGHT_BIN"),
            image: path("HINDSIGHT_IMAGES").join(image),
            net,
            recordings: number("recordings"),
            replays: number("replays"),
            workloads: words.collect(),
            options: arguments.collect(),
        }
    }

    fn file(&self, ending: &str) -> PathBuf {
        self.image.with_extension(ending)
    }
}

fn main() -> ExitCode {
    let plan = Plan::from_arguments();
    let scratch = tempfile::tempdir().expect("a temporary directory can be made");
    let directory = scratch.path().join("recording");
    let soaks: Vec<Soak> = plan
        .workloads
        .iter()
        .map(|workload| Soak::of(&plan, workload, &directory))
        .collect();
    println!(
        "\n| workload | recordings | exits | guest s | record s | replay s | journal bytes | replays equal | verdict |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for soak in &soaks {
        println!("{}", soak.row(&plan));
    }
    ExitCode::from(u8::from(!soaks.iter().all(|soak| soak.good(&plan))))
}

/// One workload: what its recordings came to.
#[derive(Default)]
struct Soak {
    workload: String,
    /// Recordings whose workload did what it should.
    done: u64,
    /// Replays that were equal.
    equal: u64,
    exits: Vec<u64>,
    journals: Vec<u64>,
    guest_seconds: Vec<f64>,
    record_seconds: Vec<f64>,
    replay_seconds: Vec<f64>,
}

impl Soak {
    fn of(plan: &Plan, workload: &str, directory: &Path) -> Soak {
        let mut soak = Soak {
            workload: workload.into(),
            ..Soak::default()
        };
        for number in 1..=plan.recordings {
            soak.once(plan, directory, number);
        }
        soak
    }

    fn good(&self, plan: &Plan) -> bool {
        self.done == plan.recordings && self.equal == plan.recordings * plan.replays
    }

    fn row(&self, plan: &Plan) -> String {
        let seconds =
            |values| median(values).map_or("-".into(), |value: f64| format!("{value:.1}"));
        let number = |values| median(values).map_or("-".into(), |value: u64| value.to_string());
        format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} of {} | {} |",
            self.workload,
            plan.recordings,
            number(&self.exits),
            seconds(&self.guest_seconds),
            seconds(&self.record_seconds),
            seconds(&self.replay_seconds),
            number(&self.journals),
            self.equal,
            plan.recordings * plan.replays,
            if self.good(plan) {
                "equal"
            } else {
                "NOT EQUAL"
            },
        )
    }

    fn once(&mut self, plan: &Plan, directory: &Path, number: u64) {
        let name = format!("{} {number}", self.workload);
        let recorded = record(plan, &self.workload, directory);
        println!("{name}: {}", recorded.verdict);
        if !recorded.done {
            println!("{}\n{}", tail(&recorded.ran.text()), recorded.ran.stderr);
        }
        if recorded.ran.code != 0 {
            return;
        }
        self.done += u64::from(recorded.done);
        self.record_seconds.push(recorded.seconds);
        let journal = std::fs::metadata(directory.join("journal")).map_or(0, |meta| meta.len());
        self.journals.push(journal);
        for _ in 0..plan.replays {
            let start = Instant::now();
            let replayed = run(plan, &["replay", "--verify", "memory"], directory);
            self.replay_seconds.push(start.elapsed().as_secs_f64());
            let same = replayed.stdout == recorded.ran.stdout;
            if replayed.code == 0 && same {
                self.equal += 1;
            } else {
                println!(
                    "{name}: a replay FAILED (console equal: {same})\n{}",
                    replayed.stderr
                );
            }
        }
        let overview = run(plan, &["inspect", "--json"], directory);
        if let Ok(overview) = serde_json::from_slice::<Value>(&overview.stdout) {
            self.exits.extend(find_number(&overview, "exits"));
            let guest_ns = find_number(&overview, "guest_ns");
            self.guest_seconds
                .extend(guest_ns.map(|ns| ns as f64 / 1e9));
        }
        let requests = requests_of(&self.workload);
        if requests > 0 {
            let seen = captured(&run(plan, &["pcap"], directory).stdout, requests);
            println!("{name}: {seen} of {requests} requests are in the capture");
            self.done -= u64::from(recorded.done && seen != requests);
        }
        std::fs::remove_dir_all(directory).expect("the recording can be removed");
    }
}

/// A recording that was made.
struct Recorded {
    ran: Ran,
    seconds: f64,
    /// The workload did what it should.
    done: bool,
    verdict: String,
}

fn record(plan: &Plan, workload: &str, directory: &Path) -> Recorded {
    let name = workload
        .split(':')
        .next()
        .expect("a first part is always there");
    let requests = requests_of(workload);
    let mut words = String::from("root=/dev/vda rw");
    if name != "session" {
        words += &format!(" workload={workload}");
    }
    let mut command = Command::new(&plan.binary);
    command.args(["record", "--force", "--memory", "512M", "--output"]);
    command.arg(directory).args(["--cmdline", &words]);
    command.arg("--kernel").arg(plan.file("vmlinuz"));
    command.arg("--initrd").arg(plan.file("initrd"));
    command.arg("--disk").arg(plan.file("img"));
    let port = free_port();
    if requests > 0 {
        command.args(["--net", "user", "--publish", &format!("{port}:80")]);
    } else if plan.net {
        command.args(["--net", "user"]);
    }
    command.args(&plan.options);

    let mut watched = Watched::start(command, LIMIT);
    let mut done = true;
    let mut answered = String::new();
    if name == "session" {
        done = watched.play(&parse(SESSION));
    } else if requests > 0 {
        done = watched.wait_for("workload nginx: serving");
        if done {
            let count = request(port, requests, "hello from nginx", watched.left());
            answered = format!("{count} of {requests} requests answered; ");
            done = count == requests;
        }
    }
    let end = watched.finish();
    let console = end.ran.text();
    let said = console
        .lines()
        .rev()
        .find(|line| line.starts_with("workload "));
    done &= !end.stopped && end.ran.code == 0 && !console.contains(": FAILED with status");
    done &= match name {
        "sysrq" => console.contains("Kernel panic - not syncing: sysrq triggered crash"),
        "session" => console.contains("reboot: Power down"),
        _ => {
            console.contains("reboot: Power down")
                && said.is_some_and(|line| line.starts_with(&format!("workload {name}: ok")))
        }
    };
    let verdict = format!(
        "{}, code {}, {:.1} s; {answered}{}",
        if done { "done" } else { "NOT DONE" },
        end.ran.code,
        end.seconds,
        said.unwrap_or("it said nothing of a workload"),
    );
    Recorded {
        ran: end.ran,
        seconds: end.seconds,
        done,
        verdict,
    }
}

/// How many requests a workload waits for.
fn requests_of(workload: &str) -> u64 {
    let (name, argument) = workload.split_once(':').unwrap_or((workload, ""));
    match name {
        "nginx" => argument.parse().unwrap_or(REQUESTS),
        _ => 0,
    }
}

fn run(plan: &Plan, words: &[&str], directory: &Path) -> Ran {
    let mut command = Command::new(&plan.binary);
    command.args(words).arg(directory).stdin(Stdio::null());
    Ran::new(command.output().expect("hindsight starts"))
}

/// The first number of that name, in whichever part of `value` it is.
fn find_number(value: &Value, name: &str) -> Option<u64> {
    match value {
        Value::Object(fields) => fields
            .get(name)
            .and_then(Value::as_u64)
            .or_else(|| fields.values().find_map(|field| find_number(field, name))),
        _ => None,
    }
}

/// The last lines of a console.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
