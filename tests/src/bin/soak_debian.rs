//! Records what a whole Debian does many times, replays each recording, and compares everything.
//!
//! `soak_debian [--image NAME] [--paired] RECORDINGS REPLAYS WORKLOAD... [-- OPTION...]`, with the environment of
//! [`hindsight_tests::debian`]. A WORKLOAD is one of the image's (see `guest-images/README.md`),
//! `NAME:ARGUMENT` for one with an argument, or `session`, which is typed at the console. With `--paired`
//! each recording has a run beside it that is not recorded, by turns before and after it. Prints a line per
//! recording and a table to paste; exit code 1 if a workload failed or a replay was not equal.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use hindsight_tests::debian::{Debian, Ran};
use hindsight_tests::measure::median;
use hindsight_tests::requests::captured;
use hindsight_tests::whole::{Whole, requests};

struct Plan {
    debian: Debian,
    image: String,
    paired: bool,
    recordings: u64,
    replays: u64,
    workloads: Vec<String>,
    options: Vec<String>,
}

impl Plan {
    fn from_arguments() -> Plan {
        let (mut image, mut paired, mut words) = (String::from("debian-work"), false, Vec::new());
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--image" => image = arguments.next().expect("--image wants a NAME"),
                "--paired" => paired = true,
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
            debian: Debian::from_env(),
            image,
            paired,
            recordings: number("recordings"),
            replays: number("replays"),
            workloads: words.collect(),
            options: arguments.collect(),
        }
    }
}

fn main() -> ExitCode {
    let plan = Plan::from_arguments();
    let scratch = tempfile::tempdir_in(".cache").expect("the checkout can be written");
    let directory = scratch.path().join("recording");
    let mut soaks = Vec::new();
    for workload in &plan.workloads {
        let mut soak = Soak {
            workload: workload.clone(),
            ..Soak::default()
        };
        for number in 1..=plan.recordings {
            soak.once(&plan, &directory, number);
        }
        soaks.push(soak);
    }
    println!("\nmedians of {} recordings:\n", plan.recordings);
    println!(
        "| workload | exits | record s | record/run | replay/record | journal bytes | done | replays equal | verdict |"
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
    record_seconds: Vec<f64>,
    /// By pairs.
    record_over_run: Vec<f64>,
    replay_over_record: Vec<f64>,
}

impl Soak {
    fn good(&self, plan: &Plan) -> bool {
        self.done == plan.recordings && self.equal == plan.recordings * plan.replays
    }

    fn row(&self, plan: &Plan) -> String {
        let seconds =
            |values| median(values).map_or("-".into(), |value: f64| format!("{value:.1}"));
        let ratio = |values| median(values).map_or("-".into(), |value: f64| format!("{value:.3}"));
        let number = |values| median(values).map_or("-".into(), |value: u64| value.to_string());
        format!(
            "| {} | {} | {} | {} | {} | {} | {} of {} | {} of {} | {} |",
            self.workload,
            number(&self.exits),
            seconds(&self.record_seconds),
            ratio(&self.record_over_run),
            ratio(&self.replay_over_record),
            number(&self.journals),
            self.done,
            plan.recordings,
            self.equal,
            plan.recordings * plan.replays,
            if self.good(plan) { "equal" } else { "FAILED" },
        )
    }

    fn once(&mut self, plan: &Plan, directory: &Path, number: u64) {
        let name = format!("{} {number}", self.workload);
        let options: Vec<&str> = plan.options.iter().map(String::as_str).collect();
        let whole = Whole::new(&plan.debian, &plan.image);
        let run = || {
            let worked = whole.run(&self.workload);
            println!("{name}: run in {:.1} s", worked.end.seconds);
            worked.end.seconds
        };
        let before = (plan.paired && number % 2 == 1).then(run);
        let worked = whole.record(directory, &self.workload, &options);
        let run_seconds = before.or_else(|| plan.paired.then(run));
        let (recorded, seconds) = (worked.end.ran, worked.end.seconds);
        println!("{name}: recorded in {seconds:.1} s; {}", worked.said);
        let mut done = worked.failure.is_none();
        if let Some(failure) = &worked.failure {
            println!("{name}: FAILED: {failure}");
            println!("{}\n{}", tail(&recorded.text()), recorded.stderr);
        }
        // A guest that failed is worth a replay, too; a recorder that did has nothing to replay.
        if recorded.code == 0 {
            self.record_seconds.push(seconds);
            self.record_over_run
                .extend(run_seconds.map(|run| seconds / run));
            let journal = std::fs::metadata(directory.join("journal")).map_or(0, |meta| meta.len());
            self.journals.push(journal);
            self.exits.extend(exits(&recorded.stderr));
            for _ in 0..plan.replays {
                let replay_seconds = self.replay(plan, &name, directory, &recorded);
                self.replay_over_record.push(replay_seconds / seconds);
            }
            let wanted = requests(&self.workload);
            if wanted > 0 {
                let capture = directory.with_extension("pcapng");
                let path = capture.display().to_string();
                let directory = directory.display().to_string();
                plan.debian
                    .run(&["pcap", &directory, "-o", &path])
                    .expect(0);
                let bytes = std::fs::read(&capture).expect("pcap has written it");
                let seen = captured(&bytes, wanted);
                println!("{name}: {seen} of {wanted} requests are in the capture");
                done &= seen == wanted;
                std::fs::remove_file(&capture).expect("a capture can be removed");
            }
        }
        self.done += u64::from(done);
        if directory.exists() {
            std::fs::remove_dir_all(directory).expect("a recording can be removed");
        }
    }

    fn replay(&mut self, plan: &Plan, name: &str, directory: &Path, recorded: &Ran) -> f64 {
        let start = Instant::now();
        let replayed = plan.debian.replay(directory, &["--verify", "memory"]);
        let seconds = start.elapsed().as_secs_f64();
        let same = replayed.stdout == recorded.stdout;
        if replayed.code == 0 && same {
            self.equal += 1;
            println!("{name}: replayed in {seconds:.1} s: equal, console too");
        } else {
            let code = replayed.code;
            println!("{name}: NOT EQUAL: code {code}, console equal: {same}");
            println!("{}", replayed.stderr);
        }
        seconds
    }
}

/// The number of exits, from the recorder's `...in 59.010 s, 103,761 exits (1758/s), ...`.
fn exits(summary: &str) -> Option<u64> {
    let before = summary.split(" exits (").next()?;
    let number = before.rsplit(' ').next()?.replace(',', "");
    number.parse().ok()
}

/// The last lines of a console.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
