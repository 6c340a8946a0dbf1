//! `hindsight live`: a recording goes on from a moment as a running machine.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use hindsight_devices::Nanos;
use hindsight_replay::When;
use hindsight_replay::foreign::shown_path;
use hindsight_vmm::failure::Failure;
use hindsight_vmm::session::{LiveRecordingWish, LiveWish, Lived, live};
use hindsight_vmm::world::Operator;
use hindsight_vmm::world::net::{Publish, parse_publish};

use crate::commands::run;
use crate::options::{
    CounterOptions, DetailOption, InsteadOptions, NetOption, Verify, network, parse_net,
    parse_seconds, parse_verify, patience,
};
use crate::outcome::Outcome;
use crate::screen::Terminal;
use crate::summary::Summary;
use crate::tell::notice;

/// Options of `live`.
#[derive(Debug, Args)]
#[command(after_help = "\
The recording is replayed, and checked as it runs, from the last checkpoint before the moment, or from power-on if
there is none (see `index`). Of the past the console shows what is replayed; what comes after that is new. From the
moment on the machine has live devices: the console is standard input and output as for `record`, with the same keys
and signals, and guest time goes on from what it was. The guest's own clock goes on from then too: it is not told
today's date.

With --record NEW, NEW is a whole recording, from power-on on: what the old one says up to the moment, and from there
on what happened here. It needs nothing of the old one's directory, and has its marks up to the moment.
SIGUSR1 ends it and leaves its guest running.

If the moment is not in the recording, or the replay differs before it, nothing is written.

Examples:
  hindsight live boot --at 12.5s
  hindsight live crash --at 31000 --record other --chaos --for 60")]
pub(crate) struct Options {
    /// The recording.
    recording: PathBuf,
    /// The moment: an exit number, a guest time such as 12.5s, `crash`, `end`, `console:TEXT`, or a mark.
    ///
    /// `end` is the last exit of a recording that was closed or cut short before its guest ended.
    #[arg(long, value_name = "MOMENT")]
    at: When,
    /// Replay from a saved state at or before the moment instead of from a checkpoint.
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Record the machine to this directory; it is made if it is not there.
    #[arg(long, value_name = "NEW")]
    record: Option<PathBuf>,
    /// How much the new journal says; without it, as much as the old one.
    ///
    /// It can be no more than that.
    #[arg(long, value_enum, requires = "record")]
    detail: Option<DetailOption>,
    /// From the moment on, also record a digest of memory and of all else that the machine has, every N exits: memory=N.
    #[arg(long, value_name = "memory=N", value_parser = parse_verify, requires = "record")]
    verify: Option<Verify>,
    /// Replace the recording that is in NEW, once the new one is closed.
    #[arg(long, requires = "record")]
    force: bool,
    /// What the machine's network card is on, if it was recorded with one: user, tap=NAME, or nothing (none).
    #[arg(long, value_name = "none|user|tap=NAME", default_value = "none", value_parser = parse_net)]
    net: NetOption,
    /// With --net user: lets a port of this host lead to one of the guest's; may be repeated.
    ///
    /// Without ADDRESS only this host can reach it.
    #[arg(long, short, value_name = "[ADDRESS:]PORT:PORT[/udp]", value_parser = parse_publish)]
    publish: Vec<Publish>,
    /// How long what is due waits for the guest to exit, in microseconds; see `record`.
    #[arg(long, value_name = "US")]
    patience: Option<u64>,
    /// Perturb when timers land and how long time slices are, from SEED or a random one.
    #[arg(long, value_name = "SEED", num_args = 0..=1, require_equals = true)]
    chaos: Option<Option<u64>>,
    /// Stop a guest that has not reset itself SECONDS of its time after a kernel panic.
    ///
    /// Without it, 60 with --record, else never.
    #[arg(long, value_name = "SECONDS")]
    panic_grace: Option<u64>,
    /// Stop the guest after this much of its time from the moment on, in seconds.
    #[arg(long = "for", value_name = "SECONDS", value_parser = parse_seconds)]
    for_ns: Option<Nanos>,
    #[command(flatten)]
    instead: InsteadOptions,
    #[command(flatten)]
    counter: CounterOptions,
    /// Do not show the guest's console.
    #[arg(long, short)]
    quiet: bool,
    /// Print the summary as JSON on standard output, and nothing else.
    #[arg(long)]
    json: bool,
}

/// Without it, how long a guest that is recorded may run on after a panic, in seconds.
const PANIC_GRACE_SECONDS: u64 = 60;

impl Options {
    fn wish(&self) -> Result<LiveWish, Failure> {
        let default = self.record.as_ref().map(|_| PANIC_GRACE_SECONDS);
        let panic_grace = self.panic_grace.or(default);
        Ok(LiveWish {
            recording: self.recording.clone(),
            instead: self.instead.paths(),
            at: self.at.clone(),
            from: self.from.clone(),
            record: self.record.as_ref().map(|output| LiveRecordingWish {
                output: output.clone(),
                force: self.force,
                detail: self.detail.map(Into::into),
                memory_every: self.verify.and_then(|verify| verify.every),
            }),
            network: network(&self.net, &self.publish)?,
            counter: self.counter.wish(),
            patience: patience(self.patience),
            chaos: self.chaos,
            panic_grace_ns: panic_grace.map(|seconds| seconds.saturating_mul(1_000_000_000)),
            for_ns: self.for_ns,
        })
    }
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    let start = Instant::now();
    // Before there is another thread.
    let operator = Operator::listen(notice)?;
    let wish = options.wish()?;
    let mut terminal = Terminal {
        quiet: options.quiet || options.json,
        real_time: false,
    };
    let Lived {
        machine,
        end,
        from,
        journal_bytes,
        chaos_seed,
        shown,
        world_failed,
        left,
    } = live(&wish, operator, &mut terminal)?;
    let host_ns = start.elapsed().as_nanos() as u64;
    let mut summary = Summary::new(&machine, &end, host_ns, journal_bytes);
    summary.chaos_seed = chaos_seed;
    summary.live_from = Some(from.exits);
    let headline = match &options.record {
        Some(output) => format!("recorded in {}", shown_path(output)),
        None => "the guest ended".into(),
    };
    summary.print(&headline, options.json);
    match (shown, left) {
        (_, Some(left)) => run::conclude_left(left, machine, start, options.json),
        (Some(shown), None) => run::conclude(shown, world_failed),
        (None, None) => Ok(Outcome::Good),
    }
}
