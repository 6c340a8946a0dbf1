//! Records workloads of a whole Debian again and again, and replays each recording: is it equal?
//!
//! `soak_debian RECORDINGS REPLAYS [WORKLOAD...]`; see `scripts/soak-debian`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use hindsight_tests::debian::{Debian, Ran};
use hindsight_tests::whole::Whole;

/// How many requests nginx answers.
const REQUESTS: u32 = 2_000;
/// The port of this host that leads to it.
const PORT: u16 = 8_081;

const ALL: [&str; 9] = [
    "session", "compile", "pgbench", "nginx", "stress", "swap", "sysrq", "oops", "tsc",
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u32| {
        arguments.get(at).map_or(default, |text| {
            text.parse()
                .unwrap_or_else(|_| panic!("{text:?} is no number"))
        })
    };
    let (recordings, replays) = (number(0, 1), number(1, 1));
    let named: Vec<&str> = arguments.iter().skip(2).map(String::as_str).collect();
    let workloads = if named.is_empty() {
        ALL.to_vec()
    } else {
        named
    };
    let debian = Debian::from_env();
    let scratch = tempfile::tempdir_in(".cache").expect("the checkout can be written");
    let mut failures = 0;
    for workload in workloads {
        for round in 1..=recordings {
            let directory = scratch.path().join("recording");
            let started = Instant::now();
            let recorded = record(&debian, workload, &directory);
            let record_s = started.elapsed().as_secs_f64();
            let summary = recorded
                .stderr
                .lines()
                .find(|line| line.contains("exits"))
                .unwrap_or("");
            let journal = recorded
                .stderr
                .lines()
                .find(|line| line.contains("journal"))
                .unwrap_or("");
            println!(
                "{workload} {round}: recorded in {record_s:.1} s, {} {}",
                summary.trim(),
                journal.trim()
            );
            if let Err(why) = went_well(workload, &recorded) {
                failures += 1;
                println!("{workload} {round}: FAILED: {why}");
                continue;
            }
            for replay in 1..=replays {
                let started = Instant::now();
                let replayed = debian.replay(&directory, &[]);
                let replay_s = started.elapsed().as_secs_f64();
                let equal = replayed.code == 0 && replayed.stdout == recorded.stdout;
                failures += u32::from(!equal);
                let verdict = if equal {
                    "equal, console too"
                } else {
                    "NOT EQUAL"
                };
                println!("{workload} {round}: replay {replay} in {replay_s:.1} s: {verdict}");
                if !equal {
                    println!("{}", replayed.stderr);
                }
            }
            std::fs::remove_dir_all(&directory).expect("a recording can be removed");
        }
    }
    println!("{failures} failures");
    ExitCode::from(u8::from(failures > 0))
}

fn record(debian: &Debian, workload: &str, directory: &Path) -> Ran {
    if workload == "session" {
        return Whole::new(debian, "debian").record_session(directory, &[]);
    }
    let whole = Whole::new(debian, "debian-work");
    if workload.starts_with("nginx") {
        let publish = format!("{PORT}:80");
        let network = ["--net", "user", "--publish", &publish];
        return whole.record_workload(directory, workload, &network, Some((PORT, REQUESTS)));
    }
    whole.record_workload(directory, workload, &[], None)
}

/// Whether the guest did what it was to do.
fn went_well(workload: &str, recorded: &Ran) -> Result<(), String> {
    let console = recorded.text();
    let name = workload.split(':').next().unwrap_or(workload);
    let ok = format!("workload {name}: ok");
    let (wanted, ending) = match name {
        "session" => ("reboot: Power down", "powered off"),
        "sysrq" => ("sysrq triggered crash", "kernel panic"),
        _ => (&*ok, "powered off"),
    };
    if recorded.code != 0 {
        return Err(format!("exit code {}:\n{}", recorded.code, recorded.stderr));
    }
    if !console.to_lowercase().contains(&wanted.to_lowercase()) || !recorded.stderr.contains(ending)
    {
        let tail: String = console
            .chars()
            .rev()
            .take(1_500)
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .collect();
        return Err(format!(
            "no {wanted:?} or no {ending:?}\n{tail}\n{}",
            recorded.stderr
        ));
    }
    Ok(())
}
