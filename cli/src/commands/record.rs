//! `hindsight record`.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use hindsight_devices::Nanos;
use hindsight_replay::foreign::shown_path;
use hindsight_vmm::failure::Failure;
use hindsight_vmm::session::{CounterWish, RecordWish, record};
use hindsight_vmm::world::Operator;

use crate::commands::run;
use crate::options::{
    DetailOption, MachineOptions, PreemptOption, Verify, parse_seconds, parse_verify, patience,
};
use crate::outcome::Outcome;
use crate::screen::Terminal;
use crate::summary::Summary;
use crate::tell::notice;

/// Options of `record`.
#[derive(Debug, Args)]
#[command(after_help = "\
The guest's console is standard input and output; at a terminal, Ctrl-] ends the recording, and Ctrl-^ marks the
present moment of it (`hindsight mark --help`). The guest gets neither key.
Ctrl-C elsewhere (SIGINT, SIGTERM, SIGHUP) closes it cleanly too; SIGPWR presses the guest's power button,
and a guest that turns itself off ends its recording. SIGUSR1 ends the recording at the guest's next exit and
leaves the guest running, unrecorded; there is a summary of each then. SIGUSR2 marks the present moment, as does
`hindsight mark DIR` from another shell. Summaries go to standard error.

DIR gets the journal, which grows while the guest runs, a copy of the kernel and of the initrd, and
links to the images of disks. If anything fails before the guest runs, DIR is left as it was. One
recorder at a time uses a DIR.

A timer or an input that is due waits --patience for the guest to exit by itself, then preempts it
at a counted place, which the replay finds again. Chaos moves timers about to bring out races:
what it did is in the recording, and the replay needs no seed.

Examples (guest-images/build makes the initrds):
  hindsight record -o boot -k /boot/vmlinuz-$(uname -r) -i .cache/images/hello.cpio
  hindsight record -o crash --until-crash --chaos -k /boot/vmlinuz-$(uname -r) -i .cache/images/race.cpio")]
pub(crate) struct Options {
    /// The directory to write the recording to; it is made if it is not there.
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    machine: MachineOptions,
    /// How much the journal says; both replay.
    #[arg(long, value_enum, default_value_t)]
    detail: DetailOption,
    /// Also record a digest of memory and of all else that the machine has, every N exits: memory=N.
    #[arg(long, value_name = "memory=N", value_parser = parse_verify)]
    verify: Option<Verify>,
    /// What stops a guest that does not exit.
    #[arg(long, value_enum, default_value_t)]
    preempt: PreemptOption,
    /// How long what is due waits for the guest to exit, in microseconds.
    ///
    /// Without it, 1,000; or more where preemptions are slow, so that they take one part in 10 of the
    /// time, up to 5,000.
    #[arg(long, value_name = "US")]
    patience: Option<u64>,
    /// Force the raw event that is counted, such as 0xd1; without it, the one known for this CPU.
    #[arg(long, value_name = "EVENT")]
    event: Option<String>,
    /// Force how many branches short of a place the counter is set.
    #[arg(long, value_name = "BRANCHES")]
    margin: Option<u64>,
    /// Perturb when timers land and how long time slices are, from SEED or a random one.
    #[arg(long, value_name = "SEED", num_args = 0..=1, require_equals = true)]
    chaos: Option<Option<u64>>,
    /// Make a checkpoint each SECONDS of guest time, while the guest runs.
    ///
    /// So any moment of the recording is quick to reach at once. It costs time while recording, more for a guest that
    /// writes much memory; `index` makes them afterwards.
    #[arg(long, value_name = "SECONDS", value_parser = parse_interval)]
    checkpoint_every: Option<Nanos>,
    /// Record again and again until the guest panics or triple faults, and keep only that.
    ///
    /// It gives up after RUNS, if given; then, as when it is stopped, nothing is kept, and what --force replaced
    /// is there again. With --chaos each run has the next seed.
    #[arg(long, value_name = "RUNS", num_args = 0..=1, require_equals = true)]
    until_crash: Option<Option<u64>>,
    /// End the recording of a guest that has not reset itself SECONDS of its time after a kernel panic.
    ///
    /// Without it, 5 with --until-crash, else 60.
    #[arg(long, value_name = "SECONDS")]
    panic_grace: Option<u64>,
    /// Replace the recording that is there, once the new one is closed.
    ///
    /// The old recording is moved to DIR/replaced-XXXXXX when the guest is about to run, and deleted when
    /// the new one is closed and safe on the disk. If recording fails on the way, both are kept, and a
    /// message says where. Only files of a recording are touched, and never an image of a disk.
    #[arg(long)]
    force: bool,
    /// Do not show the guest's console.
    #[arg(long, short)]
    quiet: bool,
    /// Print the summary as JSON on standard output, and nothing else.
    #[arg(long)]
    json: bool,
}

impl Options {
    /// A kernel that does not reboot loops for good once it has panicked, and its command line or the
    /// guest's settings may want that; one that has loaded a crash kernel has more to do.
    fn panic_grace_ns(&self) -> Nanos {
        let default = if self.until_crash.is_some() { 5 } else { 60 };
        let seconds = self.panic_grace.unwrap_or(default);
        seconds.saturating_mul(1_000_000_000)
    }
}

/// Time that is more than nothing.
fn parse_interval(text: &str) -> Result<Nanos, String> {
    match parse_seconds(text)? {
        0 => Err("it must be more than 0".into()),
        ns => Ok(ns),
    }
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    let start = Instant::now();
    // Before there is another thread.
    let operator = Operator::listen(notice)?;
    let wish = RecordWish {
        output: options.output.clone(),
        force: options.force,
        machine: options.machine.wish(options.chaos.is_none())?,
        detail: options.detail.into(),
        memory_every: options.verify.and_then(|verify| verify.every),
        preemption: options.preempt.into(),
        counter: CounterWish {
            event: options.event.clone(),
            margin: options.margin,
        },
        patience: patience(options.patience),
        chaos: options.chaos,
        panic_grace_ns: options.panic_grace_ns(),
        checkpoint_every_ns: options.checkpoint_every,
        hunt: options.until_crash,
    };
    let mut terminal = Terminal {
        quiet: options.quiet || options.json,
        real_time: false,
    };
    let Some(recorded) = record(&wish, operator, &mut terminal)? else {
        return Ok(Outcome::Different);
    };
    let host_ns = start.elapsed().as_nanos() as u64;
    let journal_bytes = Some(recorded.journal_bytes);
    let mut summary = Summary::new(&recorded.machine, &recorded.end, host_ns, journal_bytes);
    summary.chaos_seed = recorded.chaos_seed;
    summary.runs = recorded.runs;
    let headline = format!("recorded in {}", shown_path(&options.output));
    summary.print(&headline, options.json);
    match recorded.left {
        Some(left) => run::conclude_left(left, recorded.machine, start, options.json),
        None => Ok(Outcome::Good),
    }
}
