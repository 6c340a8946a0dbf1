//! What the commands share that look at a machine's kernel at some moment.

use std::path::PathBuf;

use clap::Args;
use hindsight_replay::When;
use hindsight_vmm::failure::Failure;
use hindsight_vmm::session::{KernelAt, RecordedPaths, Recording};

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
