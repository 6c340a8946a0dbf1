//! What a command, a debugger and a page share: making a machine, recording it, opening a recording, replaying it and
//! watching it.
//!
//! Nothing here prints, ends the process or reads options. What is worth saying while a session runs goes to its
//! [`Front`], what ends it is a [`Failure`].

mod checkpointing;
mod checkpoints;
mod debug;
mod glance;
mod guest_files;
mod images;
pub mod index;
mod kernel_cache;
mod live;
mod make;
mod marking;
mod marks;
mod moments;
mod new_recording;
mod open;
mod preemption_plan;
mod record;
mod recording;
mod replay;
mod run;
mod state_file;
mod timeline;
mod verify;
mod view;

use hindsight_replay::{Observer, OperatorConsole, Unit};

use crate::failure::Failure;
use crate::world::{Hold, Shown};

pub use checkpoints::{CheckpointError, CheckpointFile, PageLimit};
pub use debug::{DebugWish, Debugger, Interrupted, Progress, ProgressHook, Stopped};
pub use glance::{Events, events};
pub use guest_files::{GuestFiles, kernel_symbols};
pub use images::{DiskWish, MachineWish};
pub use live::{LiveRecordingWish, LiveWish, Lived, keep_moment, live};
pub use make::{
    LoadedKernel, MACHINE_CMDLINE, MachineError, build, cmdline, describe, host_facts, open_kvm,
};
pub use marking::mark_now;
pub use marks::{MadeBy, Mark, MarkError, Marks, add_mark, remove_mark};
pub use moments::{complete_at, travel, until_moment};
pub use open::{RecordedImages, RecordedPaths};
pub use preemption_plan::{CounterWish, PreemptionError, PreemptionPlan, PreemptionWish};
pub use record::{Left, RecordWish, Recorded, record};
pub use recording::{Recording, RecordingError, content};
pub use replay::{
    Beginning, RelogWish, ReplayWish, Replayed, SaveWish, Saved, Until, Verdict, Watch, Watched,
    replay,
};
pub use run::{Ran, RunWish, run};
pub use timeline::{
    HostPace, IndexWish, Indexed, Make, RecordingTimeline, SPACING, index_recording, open_timeline,
};

pub use verify::{Share, StretchPlace, Verified, VerifyWish, verify};
pub use view::{KernelAt, KernelMemory, KernelView};

/// Whoever is in front of a session: hears what is worth saying, and shows the guest's console.
pub trait Front {
    /// A message that the operator should see: whole lines.
    fn notice(&mut self, what: &str);

    /// Shows what a machine writes, from its start on. A machine that is recorded can be held back.
    ///
    /// # Errors
    ///
    /// The host cannot show it.
    fn view(&mut self, viewed: Viewed) -> Result<Box<dyn View>, Failure>;
}

/// A machine that is about to be shown.
#[derive(Clone, Debug)]
pub struct Viewed {
    /// Which of its consoles is the operator's.
    pub console: OperatorConsole,
    /// By what its guest is preempted, if by anything.
    pub preemption: Option<Unit>,
    /// What holds it back; a replay is not held.
    pub hold: Option<Hold>,
    /// How many exits there will be, if that is known.
    pub last_exit: Option<u64>,
}

/// Shows what a machine does.
pub trait View: Observer {
    /// Shows what is left. Tells what became of all of it.
    fn finish(self: Box<Self>) -> Shown;
}
