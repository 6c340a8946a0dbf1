//! Looks at a part of a journal.

use hindsight_replay::Record;

use super::recording::Recording;
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
