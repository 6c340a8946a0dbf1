//! A recording to move about in.
//!
//! A *checkpoint* is a machine's state with those of its pages that have changed since the one before: it costs room, and
//! saves the way there. A *mark* is a place that somebody has named, and costs nothing. [`Timeline`] holds one machine and
//! brings it to any moment: from where it is, or from the last checkpoint before, by the one loop over the one
//! [`Replayer`](crate::Replayer). So it is checked against the recording wherever it goes.
//!
//! What checkpoints are kept in is somebody else's ([`Checkpoints`]); that may be damaged or gone, which costs time.

mod changes;
mod checkpoint;
mod near;
mod notes;
mod parts;
mod reverse;
mod stretch;
mod travel;
mod when;

pub use changes::Changes;
pub use checkpoint::{CheckpointHead, Checkpoints, PageSink, PageSource};
pub use notes::{NOTES_BYTES_MAX, NoteTaker, Notes};
pub use reverse::{Debuggable, HitKind, Mark, Reverse, ReverseError, Stopped};
pub use stretch::Stretch;
pub use travel::{Arrival, Pace, Pause, Target, Timeline, TravelError};
pub use when::{Anchor, NoMoment, When, is_mark_name};
