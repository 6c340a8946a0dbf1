//! Looks at parts of a recording beside whatever else is done with it.

use hindsight_replay::{Observer, Record, Target};

use super::open::RecordedPaths;
use super::preemption_plan::CounterWish;
use super::recording::Recording;
use super::timeline::{HostPace, SPACING, open_timeline};
use crate::failure::Failure;

/// What a journal says of some exits.
#[derive(Clone, Debug)]
pub struct Events {
    /// The first of them, in their order.
    pub records: Vec<Record>,
    /// There are more.
    pub more: bool,
}

/// What a recording's journal says of the exits from `from` to `to`; no more than `most` of it.
///
/// # Errors
///
/// The journal cannot be read.
pub fn events(recording: &Recording, from: u64, to: u64, most: usize) -> Result<Events, Failure> {
    let mut journal = recording.journal()?;
    let mut events = Events {
        records: Vec::new(),
        more: false,
    };
    while let Some(frame) = journal.next_frame()? {
        if frame.place.through < from {
            continue;
        }
        for record in frame.records() {
            if record.exits > to {
                return Ok(events);
            }
            if record.exits < from {
                continue;
            }
            if events.records.len() >= most {
                events.more = true;
                return Ok(events);
            }
            events.records.push(record);
        }
    }
    Ok(events)
}

/// Replays the exits from `from` to `to` for an observer, with a machine of its own.
///
/// # Errors
///
/// The recording cannot be replayed there.
pub fn watch_stretch<O: Observer>(
    (recording, instead, counter): (&Recording, &RecordedPaths, &CounterWish),
    from: u64,
    to: u64,
    mut observer: O,
) -> Result<O, Failure> {
    let mut timeline = open_timeline(recording, recording.journal()?, instead, counter)?;
    let mut pace = HostPace::new(SPACING);
    timeline.go_to(Target::Exit(from), &mut pace)?;
    timeline.run_to(Target::Exit(to), &mut pace, &mut observer)?;
    Ok(observer)
}
