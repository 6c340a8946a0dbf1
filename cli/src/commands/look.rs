//! What the commands share that look at a machine's kernel at some moment.

use std::path::PathBuf;

use clap::Args;
use hindsight_kernel::view::ViewError;
use hindsight_replay::When;
use hindsight_replay::foreign::shown_lines;
use hindsight_vmm::failure::Failure;
use hindsight_vmm::session::{KernelAt, RecordedPaths, Recording};

use crate::format::{seconds, thousands};
use crate::tell::tell;

/// Which recording, and when.
#[derive(Debug, Args)]
pub(crate) struct Look {
    /// The recording.
    recording: PathBuf,
    /// The moment: an exit number, a guest time such as 12.5s, `crash`, `console:TEXT`, or `end`.
    #[arg(long, value_name = "MOMENT", default_value = "end")]
    at: When,
    /// Take the image of a disk from here instead of from where it was; it must be the same.
    ///
    /// Once for each disk, in their order.
    #[arg(long = "disk", value_name = "FILE")]
    disks: Vec<PathBuf>,
    /// Print JSON: one object.
    #[arg(long)]
    pub json: bool,
}

impl Look {
    /// Brings the recording to the moment.
    pub(crate) fn go(&self) -> Result<KernelAt, Failure> {
        let instead = RecordedPaths {
            disks: self.disks.clone(),
            ..RecordedPaths::default()
        };
        KernelAt::open(&Recording::at(&self.recording), &instead, &self.at)
    }
}

/// The kernel has not come so far, or its memory is broken from the beginning.
pub(crate) fn nothing(what: &str, at: &KernelAt, why: &ViewError) -> Failure {
    let (exit, now) = (thousands(at.exits), seconds(at.now));
    Failure::from(why.clone()).about(format!("there are no {what} at exit {exit}, {now}"))
}

/// Says what keeps the rest from being shown.
pub(crate) fn may_be_more(why: &ViewError) {
    tell!("hindsight: there may be more: {}", shown_lines(why));
}
