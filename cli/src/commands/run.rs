//! `hindsight run`: the machine without a recorder, the yardstick of what recording costs.

use std::time::Instant;

use clap::Args;
use hindsight_replay::Machine;
use hindsight_vmm::failure::{Failure, Kind};
use hindsight_vmm::session::{Left, Ran, RunWish, run};
use hindsight_vmm::world::{Operator, Shown};

use crate::options::{MachineOptions, RunPreemptOption, patience};
use crate::outcome::Outcome;
use crate::screen::Terminal;
use crate::summary::Summary;
use crate::tell::notice;

/// Options of `run`.
#[derive(Debug, Args)]
#[command(after_help = "\
The guest's console is standard input and output; at a terminal, Ctrl-] ends the run, elsewhere
SIGINT, SIGTERM and SIGHUP do. SIGPWR presses the guest's power button.")]
pub(crate) struct Options {
    #[command(flatten)]
    machine: MachineOptions,
    /// Where a guest that does not exit is preempted.
    #[arg(long, value_enum, default_value_t)]
    preempt: RunPreemptOption,
    /// How long what is due waits for the guest to exit, in microseconds; without it, 1,000.
    #[arg(long, value_name = "US")]
    patience: Option<u64>,
    /// Print the summary as JSON on standard output, and nothing else.
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    let start = Instant::now();
    // Before there is another thread.
    let operator = Operator::listen(notice)?;
    let wish = RunWish {
        machine: options.machine.wish(true)?,
        anywhere: options.preempt == RunPreemptOption::Anywhere,
        patience: patience(options.patience),
    };
    let mut terminal = Terminal {
        quiet: options.json,
        real_time: false,
    };
    let Ran {
        machine,
        end,
        shown,
        world_failed,
    } = run(&wish, operator, &mut terminal)?;
    let host_ns = start.elapsed().as_nanos() as u64;
    Summary::new(&machine, &end, host_ns, None).print("the guest ended", options.json);
    conclude(shown, world_failed)
}

/// How a run that nobody recorded ended for a script.
pub(crate) fn conclude(shown: Shown, world_failed: Option<Failure>) -> Result<Outcome, Failure> {
    if let Some(failure) = world_failed {
        return Err(failure);
    }
    match (shown.complaint(), shown.failed) {
        // Nothing else has what the guest wrote.
        (Some(complaint), Some(_)) => Err(Failure::new(Kind::HostFailed, complaint)),
        (Some(complaint), None) => {
            notice(&complaint);
            Ok(Outcome::Good)
        }
        (None, _) => Ok(Outcome::Good),
    }
}

/// Runs a machine on whose recording has ended without it, and tells what became of it in a summary of its own.
pub(crate) fn conclude_left(
    left: Left,
    machine: Machine,
    start: Instant,
    json: bool,
) -> Result<Outcome, Failure> {
    let ran = left.run_on(machine)?;
    let host_ns = start.elapsed().as_nanos() as u64;
    Summary::new(&ran.machine, &ran.end, host_ns, None).print("the guest ended", json);
    conclude(ran.shown, ran.world_failed)
}
