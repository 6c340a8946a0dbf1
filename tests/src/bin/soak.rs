//! Records guests many times, replays each recording, and compares everything.
//!
//! `soak [--loaded] [--image NAME]... RECORDINGS [REPLAYS [KERNEL...]] [-- OPTION...]`, with the environment of
//! [`hindsight_tests::debian`]. Without an image it boots the test guest and types a line. With
//! images, each is recorded with the OPTIONs (`{n}` in one is the number of the recording, as in
//! `--chaos={n}`), and may end as it likes, but must end. With `--loaded` there are as many replays more, while
//! other threads compute. Prints one line per recording and a
//! summary for each image and kernel; exit code 1 if any replay was not equal.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hindsight_tests::debian::Debian;
use hindsight_tests::measure::{Bounded, Load, add_landings, bounded, median};
use serde_json::Value;

/// A recording that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(180);

struct Plan {
    images: Vec<String>,
    recordings: u64,
    replays: u64,
    kernels: Vec<PathBuf>,
    options: Vec<String>,
    loaded: bool,
}

impl Plan {
    fn from_arguments() -> Plan {
        let mut arguments = std::env::args().skip(1);
        let (mut images, mut words, mut loaded) = (Vec::new(), Vec::new(), false);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--image" => images.push(arguments.next().expect("--image wants a NAME")),
                "--loaded" => loaded = true,
                "--" => break,
                _ => words.push(argument),
            }
        }
        let number = |at: usize, default: u64| {
            words.get(at).map_or(default, |text: &String| {
                text.parse()
                    .unwrap_or_else(|error| panic!("{text}: {error}"))
            })
        };
        Plan {
            images,
            recordings: number(0, 5),
            replays: number(1, 2),
            kernels: words.iter().skip(2).map(PathBuf::from).collect(),
            options: arguments.collect(),
            loaded,
        }
    }
}

fn main() -> ExitCode {
    let mut plan = Plan::from_arguments();
    let debian = Debian::from_env();
    if plan.kernels.is_empty() {
        plan.kernels.push(debian.kernel().into());
    }
    let scratch = tempfile::tempdir().expect("a temporary directory can be made");
    let mut good = true;
    for kernel in &plan.kernels {
        let debian = debian.with_kernel(kernel);
        if plan.images.is_empty() {
            good &= soak(&debian, plan.recordings, plan.replays, scratch.path());
        }
        for image in &plan.images {
            let soak = ImageSoak::new(&debian, image, &plan);
            good &= soak.run(scratch.path());
        }
    }
    ExitCode::from(u8::from(!good))
}

/// One image on one kernel.
struct ImageSoak<'a> {
    debian: &'a Debian,
    image: &'a str,
    plan: &'a Plan,
    equal: u64,
    endings: BTreeMap<String, u64>,
    landings: BTreeMap<String, u64>,
    exits: Vec<u64>,
    interrupts: Vec<u64>,
    journals: Vec<u64>,
    seconds: Vec<f64>,
}

impl<'a> ImageSoak<'a> {
    /// How many replays each recording gets.
    fn replays(&self) -> u64 {
        self.plan.replays << u32::from(self.plan.loaded)
    }

    fn new(debian: &'a Debian, image: &'a str, plan: &'a Plan) -> ImageSoak<'a> {
        ImageSoak {
            debian,
            image,
            plan,
            equal: 0,
            endings: BTreeMap::new(),
            landings: BTreeMap::new(),
            exits: Vec::new(),
            interrupts: Vec::new(),
            journals: Vec::new(),
            seconds: Vec::new(),
        }
    }

    /// True if every recording ended and every replay was equal.
    fn run(mut self, scratch: &Path) -> bool {
        let directory = scratch.join(self.image);
        for number in 1..=self.plan.recordings {
            self.record(&directory, number);
        }
        let Plan {
            recordings,
            options,
            ..
        } = self.plan;
        let replays = self.replays();
        let list = |counts: &BTreeMap<String, u64>| {
            let parts: Vec<String> = counts.iter().map(|(k, v)| format!("{k} {v}")).collect();
            parts.join(", ")
        };
        println!(
            "SUMMARY {} {} {}: {} of {} replays equal (console, digest chain, all of memory); \
             {recordings} recordings, median {:.1} s, {} exits, {} interrupts, journal {} bytes; \
             endings: {}; landings: {}",
            self.image,
            self.debian.kernel().display(),
            options.join(" "),
            self.equal,
            recordings * replays,
            median(&self.seconds).unwrap_or(f64::NAN),
            median(&self.exits).unwrap_or(0),
            median(&self.interrupts).unwrap_or(0),
            median(&self.journals).unwrap_or(0),
            list(&self.endings),
            if self.landings.is_empty() {
                "the summary names none".to_string()
            } else {
                list(&self.landings)
            },
        );
        self.equal == recordings * replays
    }

    fn record(&mut self, directory: &Path, number: u64) {
        let options = self.plan.options.iter();
        let options: Vec<String> = options
            .map(|option| option.replace("{n}", &number.to_string()))
            .collect();
        let mut command = self
            .debian
            .recording(directory, self.image, &["--force", "--json"]);
        command.args(&options);
        let Bounded {
            ran,
            seconds,
            stopped,
        } = bounded(command, LIMIT);
        let name = format!("{} {number}", self.image);
        if ran.code != 0 || stopped {
            let what = if stopped { "did not end" } else { "FAILED" };
            println!("{name}: {what}, code {}, {seconds:.1} s", ran.code);
            println!("{}{}", ran.text(), ran.stderr);
            *self.endings.entry(what.to_string()).or_default() += 1;
            return;
        }
        let summary = ran.json();
        let ending = summary["ending"].as_str().unwrap_or("unknown").to_string();
        let (good, replay_seconds) = self.replay(&name, directory, &summary);
        let journal = summary["journal_bytes"].as_u64().unwrap_or(0);
        let interrupts = summary["interrupts"].as_u64().unwrap_or(0);
        let exits = summary["exits"].as_u64().unwrap_or(0);
        println!(
            "{name}: {seconds:.1} s, {exits} exits, {interrupts} interrupts, journal {journal} bytes; \
             {ending}; {good} of {} replays equal, {replay_seconds:.1} s each",
            self.replays()
        );
        // Of a kernel that boots and reboots nothing is; and a recording that does not say so may be of anything.
        if summary["left_open"] != serde_json::json!([]) {
            println!("{name}: FAILED, left open: {}", summary["left_open"]);
            *self.endings.entry("left open".into()).or_default() += 1;
            return;
        }
        self.equal += good;
        add_landings(&mut self.landings, &summary);
        *self.endings.entry(ending).or_default() += 1;
        self.journals.push(journal);
        self.exits.push(exits);
        self.interrupts.push(interrupts);
        self.seconds.push(seconds);
    }

    /// How many replays were equal, and how long one took, in seconds. With `--json` there is no
    /// console of the recording; the digest covers each byte of it, and the replays' are compared.
    fn replay(&self, name: &str, directory: &Path, summary: &Value) -> (u64, f64) {
        let digest = summary["digest"].as_str().unwrap_or("no digest");
        let (mut good, mut seconds, mut console) = (0, 0.0, None);
        for number in 0..self.replays() {
            let start = Instant::now();
            let load = (number >= self.plan.replays).then(Load::start);
            let replayed = self.debian.replay(directory, &["--verify", "memory"]);
            drop(load);
            seconds += start.elapsed().as_secs_f64() / self.replays() as f64;
            let first = console.get_or_insert_with(|| replayed.stdout.clone());
            if replayed.code == 0 && replayed.stdout == *first && replayed.stderr.contains(digest) {
                good += 1;
            } else {
                println!("{name}: a replay FAILED:\n{}", replayed.stderr);
                println!("console equal: {}", replayed.stdout == *first);
            }
        }
        (good, seconds)
    }
}

/// True if every replay of every recording was equal.
fn soak(debian: &Debian, recordings: u64, replays: u64, scratch: &Path) -> bool {
    let kernel = debian.kernel().display().to_string();
    let (mut equal, mut journals, mut boots) = (0, Vec::new(), Vec::new());
    for number in 1..=recordings {
        let directory = scratch.join(format!("r{number}"));
        let typed = format!("line {number} typed in time\n");
        let start = Instant::now();
        let recorded = debian.record(&directory, "boot", &["--force"], typed.as_bytes());
        let seconds = start.elapsed().as_secs_f64();
        let console = recorded.text();
        let whole = recorded.code == 0
            && console.contains(&format!("typed LINE {number} TYPED IN TIME"))
            && console.contains("Restarting system");
        if !whole {
            println!(
                "recording {number}: FAILED, code {}\n{}",
                recorded.code, recorded.stderr
            );
            println!("{console}");
            continue;
        }
        let journal = std::fs::metadata(directory.join("journal")).map_or(0, |meta| meta.len());
        let (mut good, mut replay_seconds) = (0, 0.0);
        for _ in 0..replays {
            let start = Instant::now();
            let replayed = debian.replay(&directory, &["--verify", "memory"]);
            replay_seconds += start.elapsed().as_secs_f64() / replays as f64;
            if replayed.code == 0 && replayed.stdout == recorded.stdout {
                good += 1;
            } else {
                println!("recording {number}: a replay FAILED:\n{}", replayed.stderr);
                println!("console equal: {}", replayed.stdout == recorded.stdout);
            }
        }
        println!(
            "recording {number}: {seconds:.1} s, journal {journal} bytes; {good} of {replays} \
             replays equal, {replay_seconds:.1} s each"
        );
        equal += good;
        journals.push(journal);
        boots.push(seconds);
        std::fs::remove_dir_all(&directory).expect("the recording can be removed");
    }
    println!(
        "SUMMARY {kernel}: {equal} of {} replays equal (console, digest chain, all of memory); \
         {recordings} recordings, median {:.1} s, journal median {} and largest {} bytes",
        recordings * replays,
        median(&boots).unwrap_or(f64::NAN),
        median(&journals).unwrap_or(0),
        journals.iter().max().unwrap_or(&0),
    );
    equal == recordings * replays
}
