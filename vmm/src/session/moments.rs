//! Finds the moments that a recording's user names.

use hindsight_devices::{Nanos, Output};
use hindsight_replay::{Anchor, Arrival, Complete, Exit, Guest, Observer, Target, Turn, When};

use super::marks::unmarked;
use super::open::RecordedPaths;
use super::preemption_plan::CounterWish;
use super::recording::Recording;
use super::replay::Until;
use super::timeline::{HostPace, RecordingTimeline, SPACING, open_timeline};
use crate::failure::{Failure, Kind};
use hindsight_replay::foreign::shown_path;

/// Brings a recording to a moment.
fn go_to_moment(
    timeline: &mut RecordingTimeline,
    when: &When,
    recording: &Recording,
) -> Result<(), Failure> {
    let when = &unmarked(recording, when)?;
    let missing = |why: &str| {
        let recording = shown_path(recording.directory());
        Failure::new(
            Kind::BadInput,
            format!("{recording} has no moment {when}: {why}"),
        )
    };
    let base =
        match &when.anchor {
            Anchor::Exit(exit) => *exit,
            Anchor::Time(time) => {
                match go_on(timeline, Target::Time(*time))? {
                    Arrival::Reached => {}
                    _ => return Err(missing("it ends before")),
                }
                here(timeline)
            }
            Anchor::End => {
                go_on(timeline, Target::End)?;
                if when.offset == 0 {
                    return Ok(());
                }
                here(timeline)
            }
            Anchor::Crash => find(timeline, Search::default())?
                .ok_or_else(|| missing("its guest does not panic"))?,
            Anchor::Console(text) => find(timeline, Search::console(text))?
                .ok_or_else(|| missing("no console says that"))?,
            Anchor::Mark(_) => unreachable!("it is an exit by now"),
        };
    let exit = base.checked_add_signed(when.offset);
    let exit = exit.ok_or_else(|| missing("it would be before power-on"))?;
    match go_on(timeline, Target::Exit(exit))? {
        Arrival::Reached => Ok(()),
        _ if here(timeline) == exit => Ok(()),
        _ => Err(missing(&format!("its last exit is {}", here(timeline)))),
    }
}

/// Brings a recording to a moment. Says at which exit that is.
///
/// # Errors
///
/// There is no such moment in it, it diverges before, or the host failed.
pub fn travel(
    recording: &Recording,
    instead: &RecordedPaths,
    counter: &CounterWish,
    when: &When,
) -> Result<(RecordingTimeline, u64), Failure> {
    let mut timeline = open_timeline(recording, recording.journal()?, instead, counter)?;
    go_to_moment(&mut timeline, when, recording)?;
    let exits = here(&mut timeline);
    Ok((timeline, exits))
}

/// The exit that a moment is, with guest time there.
///
/// # Errors
///
/// As of [`travel`].
pub fn complete_at(
    recording: &Recording,
    instead: &RecordedPaths,
    when: &When,
) -> Result<Complete, Failure> {
    let (mut timeline, _) = travel(recording, instead, &CounterWish::default(), when)?;
    let parts = timeline.parts();
    Ok(parts.map_or_else(Complete::default, |(machine, _, _)| machine.complete()))
}

/// Up to where a recording is to be replayed that is replayed from its start.
///
/// # Errors
///
/// There is no such moment, or it cannot be found.
pub fn until_moment(
    recording: &Recording,
    instead: &RecordedPaths,
    when: &When,
) -> Result<Until, Failure> {
    let when = unmarked(recording, when)?;
    match (&when.anchor, when.offset) {
        (Anchor::Exit(exit), 0) => Ok(Until::Exit(*exit)),
        (Anchor::Time(time), 0) => Ok(Until::Time(*time)),
        (Anchor::End, 0) => Ok(Until::End),
        _ => {
            let counter = CounterWish::default();
            travel(recording, instead, &counter, &when).map(|(_, exits)| Until::Exit(exits))
        }
    }
}

/// Where it has come to.
fn here(timeline: &mut RecordingTimeline) -> u64 {
    let parts = timeline.parts();
    parts.map_or(0, |(machine, _, _)| machine.at().exits)
}

/// Goes there, and makes the checkpoints on the way that there are none of.
fn go_on(timeline: &mut RecordingTimeline, target: Target) -> Result<Arrival, Failure> {
    Ok(timeline.go_to(target, &mut HostPace::new(SPACING))?)
}

/// The first exit at which something happens that is looked for from the start on.
fn find(timeline: &mut RecordingTimeline, mut search: Search) -> Result<Option<u64>, Failure> {
    go_on(timeline, Target::Exit(0))?;
    timeline.run_to(Target::End, &mut HostPace::new(SPACING), &mut search)?;
    Ok(search.found)
}

/// Looks for the first exit at which something happens.
#[derive(Debug, Default)]
struct Search {
    /// A text on a console; else a panic.
    text: Option<Vec<u8>>,
    /// The ends of what was written to the serial console and to the other one.
    written: [Vec<u8>; 2],
    found: Option<u64>,
}

impl Search {
    fn console(text: &str) -> Search {
        Search {
            text: Some(text.as_bytes().to_vec()),
            ..Search::default()
        }
    }
}

impl Observer for Search {
    fn turn(&mut self, exits: u64, turn: &Turn, _guest: &mut dyn Guest) {
        if self.text.is_none() && self.found.is_none() && matches!(turn.exit, Exit::Panic { .. }) {
            self.found = Some(exits);
        }
    }

    fn output(&mut self, exits: u64, _now: Nanos, output: &Output) {
        let Some(text) = self.text.as_ref().filter(|_| self.found.is_none()) else {
            return;
        };
        let (written, bytes) = match output {
            Output::Console(bytes) => (&mut self.written[0], bytes),
            Output::VirtioConsole(bytes) => (&mut self.written[1], bytes),
            Output::Frame(_) => return,
        };
        written.extend(bytes);
        if written.windows(text.len()).any(|window| window == text) {
            self.found = Some(exits);
        }
        // As much as may be the beginning of it.
        let surplus = written.len().saturating_sub(text.len() - 1);
        written.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_found_where_it_is_complete_on_one_of_the_consoles() {
        let mut search = Search::console("login:");
        let mut say = |exits, output| search.output(exits, 0, &output);
        say(1, Output::Console(b"Debian log".to_vec()));
        say(2, Output::VirtioConsole(b"in:".to_vec()));
        say(3, Output::Console(b"login".to_vec()));
        say(4, Output::Frame(b":".to_vec()));
        say(5, Output::Console(b": root".to_vec()));
        say(6, Output::Console(b"login:".to_vec()));
        assert_eq!(search.found, Some(5));
    }
}
