//! Going to moments of a recording in this process, and what a straight replay is there.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use hindsight_replay::{Arrival, FullDigest, Target};
use hindsight_vmm::session::{
    CounterWish, HostPace, RecordedPaths, Recording, RecordingTimeline, SPACING, open_timeline,
};

/// So far apart that none is made.
pub const NEVER: Duration = SPACING.saturating_mul(1000);

/// Opens a recording, with the checkpoints that it has.
///
/// # Panics
///
/// If it cannot be opened.
pub fn open(recording: &Path) -> RecordingTimeline {
    let recording = Recording::at(recording);
    let journal = recording.journal().expect("it can be read");
    let (instead, counter) = (RecordedPaths::default(), CounterWish::default());
    open_timeline(&recording, journal, &instead, &counter).expect("it can be opened")
}

/// Goes to an exit, with checkpoints so far apart on the way.
///
/// # Panics
///
/// If it does not come there.
pub fn go_to(timeline: &mut RecordingTimeline, exit: u64, spacing: Duration) {
    let arrival = timeline.go_to(Target::Exit(exit), &mut HostPace::new(spacing));
    let arrival = arrival.unwrap_or_else(|error| panic!("to exit {exit}: {error}"));
    assert!(
        matches!(arrival, Arrival::Reached),
        "to exit {exit}: {arrival:?}"
    );
}

/// The whole state where it is.
///
/// # Panics
///
/// If it cannot be looked at.
pub fn digest(timeline: &mut RecordingTimeline) -> FullDigest {
    timeline.digest().expect("it can be digested")
}

/// What a recording without checkpoints is at some exits.
///
/// # Panics
///
/// If it has checkpoints, or does not come there.
pub fn straight(
    recording: &Path,
    exits: impl IntoIterator<Item = u64>,
) -> BTreeMap<u64, FullDigest> {
    let mut timeline = open(recording);
    assert!(timeline.store().heads().is_empty(), "it has checkpoints");
    let mut exits: Vec<u64> = exits.into_iter().collect();
    exits.sort_unstable();
    exits.dedup();
    let digests = exits.into_iter();
    let digests = digests.map(|exit| {
        go_to(&mut timeline, exit, NEVER);
        (exit, digest(&mut timeline))
    });
    digests.collect()
}
