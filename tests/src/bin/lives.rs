//! Goes on from random moments of a recording as a running machine, which must answer on a port and on its console, end by
//! itself, and leave a recording that replays equal.
//!
//! `lives [LIVES [SEED]]`, with the environment of [`hindsight_tests::debian`]. Records the guest `net`, indexes it, and
//! lives on from LIVES (10) moments of it: of before it listens, or after it has answered, for a connection of the past is
//! lost, and whoever was told to end does so. Prints a line for each and a summary; exit code 1 if one was not right.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hindsight_replay::rng::Rng;
use hindsight_tests::debian::Debian;
use hindsight_tests::requests::free_port;
use hindsight_tests::session::Watched;

/// No recording takes so long, not even in an emulated machine that has to share.
const RUN_LIMIT: Duration = Duration::from_secs(240);
const ANSWER_WAIT: Duration = Duration::from_secs(20);
/// One moment in so many is after the guest has answered.
const ONE_AFTER_IN: u64 = 5;
/// What that moment is called.
const ANSWERED: &str = "answered";

fn main() -> ExitCode {
    let arguments: Vec<u64> = std::env::args()
        .skip(1)
        .map(|text| text.parse().expect("lives [LIVES [SEED]]"))
        .collect();
    let lives = arguments.first().copied().unwrap_or(10);
    let seed = arguments.get(1).copied().unwrap_or(1);
    let (debian, scratch) = (Debian::from_env(), tempfile::tempdir());
    let scratch = scratch.expect("a temporary directory can be made");
    let recording = scratch.path().join("net");
    let port = free_port();
    let publish = ["--json", "--net", "user", "--publish", &format!("{port}:7")];
    // The guest is idle from its answer until it is told to end.
    let answers = || {
        debian
            .run(&["mark", path(&recording), ANSWERED, "--json"])
            .expect(0);
    };
    let recorded = run(debian.recording(&recording, "net", &publish), port, answers);
    let exits = recorded.unwrap_or_else(|why| panic!("it is not recorded: {why}"));
    let start = Instant::now();
    debian.run(&["index", path(&recording)]).expect(0);
    println!(
        "{exits} exits, indexed in {:.0} s",
        start.elapsed().as_secs_f64()
    );
    let (listens, answered) = (
        moment(&debian, &recording, "console:net: address"),
        moment(&debian, &recording, ANSWERED),
    );
    let mut rng = Rng::new(seed, 50);
    let mut right = 0;
    for number in 1..=lives {
        let exit = match rng.one_in(ONE_AFTER_IN) {
            true => answered,
            false => rng.below(listens),
        };
        let start = Instant::now();
        let lived = live(&debian, &recording, exit, &scratch.path().join("new"));
        let seconds = start.elapsed().as_secs_f64();
        right += u64::from(lived.is_ok());
        match lived {
            Ok(exits) => println!("{number}: from exit {exit} to {exits}: equal, {seconds:.0} s"),
            Err(why) => println!("{number}: from exit {exit}: {why}, {seconds:.0} s"),
        }
    }
    println!(
        "SUMMARY seed {seed}: {right} of {lives} live again from a random moment and replayed equal"
    );
    ExitCode::from(u8::from(right != lives))
}

/// The exit that a moment is.
fn moment(debian: &Debian, recording: &Path, moment: &str) -> u64 {
    let arguments = ["mark", path(recording), "--at", moment, "--json"];
    let mark = debian.run(&arguments).expect(0).json();
    mark["exit"].as_u64().expect("a mark has an exit")
}

/// A life of its own from `exit` on, recorded in `new`: its last exit.
fn live(debian: &Debian, recording: &Path, exit: u64, new: &Path) -> Result<u64, String> {
    let port = free_port();
    let (exit, publish) = (exit.to_string(), format!("{port}:7"));
    let arguments = [
        &["live", path(recording), "--at", &exit, "--json"][..],
        &["--force", "--record", path(new)],
        &["--net", "user", "--publish", &publish],
    ];
    let exits = run(debian.command(&arguments.concat()), port, || {})?;
    let replayed = debian.replay(new, &["--verify", "memory"]);
    match replayed.code {
        0 if replayed.text().contains(" lines, 0 datagrams") => Ok(exits),
        0 => Err(format!(
            "its console does not say what it was asked:\n{}",
            replayed.text()
        )),
        code => Err(format!("its replay ends with {code}: {}", replayed.stderr)),
    }
}

/// Runs a guest that answers on `port`, and has it answer and end, and `answers` called between: its last exit.
fn run(command: std::process::Command, port: u16, answers: impl FnOnce()) -> Result<u64, String> {
    let watched = Watched::start(command, RUN_LIMIT);
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let answered = loop {
        // Before the guest listens, whoever is in front of it hangs up.
        let answer = ask(address, "hello").unwrap_or_default();
        if answer.contains(" HELLO at ") || watched.left().is_zero() {
            break !answer.is_empty();
        }
        std::thread::sleep(Duration::from_millis(300));
    };
    if answered {
        answers();
    }
    let quit = answered && ask(address, "quit").is_ok();
    let bounded = watched.finish();
    let said = &bounded.ran.stderr;
    if !quit || bounded.stopped || bounded.ran.code != 0 {
        let code = bounded.ran.code;
        return Err(format!(
            "it answered: {answered}; it ended with {code}: {said}"
        ));
    }
    let summary = bounded.ran.json();
    let exits = summary["exits"].as_u64();
    exits.ok_or_else(|| format!("it does not say its exits: {summary}"))
}

fn ask(address: SocketAddr, line: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_WAIT)?;
    stream.set_read_timeout(Some(ANSWER_WAIT))?;
    stream.write_all(format!("{line}\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}
