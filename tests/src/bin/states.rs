//! Saves a replay at exits spread over a recording, restores each state in a process of its own, and replays to the end.
//!
//! `states [--image NAME | --whole NAME] [EXITS [-- OPTION...]]`, with the environment of
//! [`hindsight_tests::debian`]. Records a guest image (`hello`) with the OPTIONs of `hindsight record`, or the first 20 s
//! of a whole Debian. Half of the states are made by a process that went on from the one before, so that what a restored
//! machine saves is looked at too. Prints a line for each of EXITS (50) and a summary; exit code 1 if anything differed.

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use hindsight_tests::debian::Debian;
use hindsight_tests::measure::{median, stop};
use hindsight_tests::whole::Whole;
use serde_json::Value;

/// How much of a whole Debian is recorded.
const BEGINNING: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (mut image, mut whole, mut count) = ("hello".to_string(), None, 50);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--image" => image = arguments.next().expect("--image wants a NAME"),
            "--whole" => whole = Some(arguments.next().expect("--whole wants a NAME")),
            "--" => break,
            number => {
                count = number
                    .parse()
                    .unwrap_or_else(|error| panic!("{number}: {error}"))
            }
        }
    }
    let options: Vec<String> = arguments.collect();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let debian = Debian::from_env();
    let scratch = tempfile::tempdir_in(".cache").expect("the checkout can be written");
    let recording = scratch.path().join("recording");
    match whole {
        None => {
            let recorded = debian.record(&recording, &image, &options, b"");
            println!(
                "recorded {image}: {}",
                recorded.stderr.lines().last().unwrap_or_default()
            );
        }
        Some(name) => record_beginning(&debian, &name, &recording, &options),
    }
    let law = Law { debian, recording };
    ExitCode::from(u8::from(!law.holds(count, scratch.path())))
}

/// Records a whole Debian for the time of its boot.
fn record_beginning(debian: &Debian, name: &str, recording: &Path, options: &[&str]) {
    let output = recording.to_str().expect("a plain name");
    let arguments = [&["record", "--output", output, "--memory", "512M"], options].concat();
    let mut command = Whole::new(debian, name).command(&arguments, "");
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("hindsight starts");
    // A kernel that was not seen before is prepared first.
    let journal = recording.join("journal");
    while !journal.exists() && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(Duration::from_millis(100));
    }
    std::thread::sleep(BEGINNING);
    stop(&mut child);
}

struct Law {
    debian: Debian,
    recording: PathBuf,
}

impl Law {
    fn replay(&self, options: &[&str], state: Option<&Path>) -> Value {
        let mut more = vec!["--quiet", "--json"];
        more.extend(options);
        if let Some(state) = state {
            more.extend(["--from", state.to_str().expect("a plain name")]);
        }
        self.debian.replay(&self.recording, &more).json()
    }

    fn holds(&self, count: u64, scratch: &Path) -> bool {
        let straight = self.replay(&[], None);
        assert_eq!(straight["verdict"], "equal", "{straight}");
        let exits = straight["exits"].as_u64().expect("a replay has exits");
        let (mut equal, mut sizes, mut saving) = (0, Vec::new(), Vec::new());
        let (mut here, mut there) = (scratch.join("a"), scratch.join("b"));
        for number in 0..count {
            let exit = 1 + (exits - 2) * number / count.max(2).saturating_sub(1);
            let from = (number % 2 == 1).then_some(here.as_path());
            let until = exit.to_string();
            let save = there.to_str().expect("a plain name");
            let start = Instant::now();
            let saved = self.replay(&["--until", &until, "--save", save, "--force"], from);
            assert_eq!(saved["verdict"], "equal so far", "exit {exit}: {saved}");
            let took = start.elapsed();
            std::mem::swap(&mut here, &mut there);
            let start = Instant::now();
            let restored = self.replay(&[], Some(&here));
            let is_equal = restored["verdict"] == straight["verdict"]
                && restored["from_exit"] == exit
                && restored["summary"]["digest"] == straight["summary"]["digest"]
                && restored["summary"]["state_digest"] == straight["summary"]["state_digest"];
            println!(
                "exit {exit}: saved in {:.1} s, restored and run to the end in {:.1} s: {}",
                took.as_secs_f64(),
                start.elapsed().as_secs_f64(),
                if is_equal { "equal" } else { "NOT EQUAL" }
            );
            if !is_equal {
                println!("{restored}");
            }
            equal += u64::from(is_equal);
            let number = |name: &str| saved[name].as_u64().expect("it was saved") as f64;
            sizes.push(number("saved_bytes"));
            saving.push(number("saved_host_ns"));
        }
        println!(
            "SUMMARY {equal} of {count} states, at exits spread over {exits}, restored in fresh processes and equal to the \
             end; median of a state {:.1} MB, taken and written in {:.2} s",
            median(&sizes).unwrap_or_default() / 1e6,
            median(&saving).unwrap_or_default() / 1e9
        );
        equal == count
    }
}
