//! Finds the moments that a recording's user names.

use hindsight_devices::{Nanos, Output};
use hindsight_replay::{
    Anchor, Arrival, Complete, Exit, Guest, Observer, Pace, Target, Turn, When,
};

use super::marks::unmarked;
use super::open::RecordedPaths;
use super::preemption_plan::CounterWish;
use super::recording::Recording;
use super::replay::Until;
use super::timeline::{HostPace, RecordingTimeline, SPACING, open_timeline};
use crate::failure::{Failure, Kind};
use hindsight_replay::foreign::shown_path;

/// What is said where there is no such moment.
pub(super) fn no_moment(recording: &Recording, when: &When, why: &str) -> Failure {
    let recording = shown_path(recording.directory());
    let message = format!("{recording} has no moment {when}: {why}");
    Failure::new(Kind::BadInput, message)
}

/// Where a moment is. Moves about where it has to be looked for, and makes the checkpoints on the way that there are none
/// of. `None`: `pace` wanted it stopped there.
///
/// # Errors
///
/// There is no such moment in it, it diverges before, or the host failed.
pub(super) fn find_moment(
    timeline: &mut RecordingTimeline,
    when: &When,
    recording: &Recording,
    pace: &mut dyn Pace,
) -> Result<Option<Target>, Failure> {
    let when = &unmarked(recording, when)?;
    let missing = |why: &str| no_moment(recording, when, why);
    let base = match &when.anchor {
        Anchor::Exit(exit) => *exit,
        Anchor::Time(time) if when.offset == 0 => return Ok(Some(Target::Time(*time))),
        Anchor::End if when.offset == 0 => return Ok(Some(Target::End)),
        Anchor::Time(time) => {
            match timeline.go_to(Target::Time(*time), pace)? {
                Arrival::Reached => {}
                Arrival::Stopped => return Ok(None),
                _ => return Err(missing("it ends before")),
            }
            here(timeline)
        }
        Anchor::End => {
            if let Arrival::Stopped = timeline.go_to(Target::End, pace)? {
                return Ok(None);
            }
            here(timeline)
        }
        Anchor::Mark(_) => unreachable!("it is an exit by now"),
        Anchor::Crash | Anchor::Console(_) => {
            let (search, why) = match &when.anchor {
                Anchor::Console(text) => (Search::console(text), "no console says that"),
                _ => (Search::default(), "its guest does not panic"),
            };
            match find(timeline, pace, search)? {
                Found::At(exit) => exit,
                Found::Nowhere => return Err(missing(why)),
                Found::Stopped => return Ok(None),
            }
        }
    };
    let exit = base.checked_add_signed(when.offset);
    let exit = exit.ok_or_else(|| missing("it would be before power-on"))?;
    Ok(Some(Target::Exit(exit)))
}

/// Brings a recording to a moment. `observer` sees what happens on the last way there, from the checkpoint that it begins
/// at.
///
/// # Errors
///
/// There is no such moment in it, it diverges before, `pace` wants to stop, or the host failed.
pub(super) fn go_to_moment(
    timeline: &mut RecordingTimeline,
    when: &When,
    recording: &Recording,
    pace: &mut dyn Pace,
    observer: &mut dyn Observer,
) -> Result<Arrival, Failure> {
    let Some(target) = find_moment(timeline, when, recording, pace)? else {
        return Err(stopped(timeline));
    };
    timeline.come_near(target)?;
    let arrival = timeline.run_to(target, pace, observer)?;
    let missing = |why: &str| Err(no_moment(recording, when, why));
    match (&arrival, target) {
        (Arrival::Stopped, _) => Err(stopped(timeline)),
        (Arrival::Reached, _) | (_, Target::End) => Ok(arrival),
        (_, Target::Exit(exit)) if here(timeline) == exit => Ok(arrival),
        (_, Target::Exit(_)) => missing(&format!("its last exit is {}", here(timeline))),
        (_, Target::Time(_)) => missing("it ends before"),
    }
}

/// It was to stop before it came there.
pub(super) fn stopped(timeline: &mut RecordingTimeline) -> Failure {
    let exits = here(timeline);
    let message = format!("stopped at exit {exits}, on the way to the moment");
    Failure::new(Kind::Different, message)
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
    let mut pace = HostPace::new(SPACING);
    go_to_moment(&mut timeline, when, recording, &mut pace, &mut ())?;
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
pub(super) fn here(timeline: &mut RecordingTimeline) -> u64 {
    let parts = timeline.parts();
    parts.map_or(0, |(machine, _, _)| machine.at().exits)
}

/// What came of looking for something.
enum Found {
    At(u64),
    Nowhere,
    /// It was not looked for to the end.
    Stopped,
}

/// The first exit at which something happens that is looked for. What happened before a checkpoint may be noted beside it;
/// what is found there is looked at, for a note is not compared with the recording.
fn find(
    timeline: &mut RecordingTimeline,
    pace: &mut dyn Pace,
    search: Search,
) -> Result<Found, Failure> {
    let (mut noted, mut from) = (search.clone(), 0);
    for number in 0..timeline.store().heads().len() {
        let before = noted.clone();
        let Some(notes) = timeline.notes(number) else {
            break;
        };
        let panic = notes.tell(from, &mut noted);
        noted.panicked(panic);
        if let Some(exit) = noted.found {
            let seen = look_through(timeline, pace, from, Target::Exit(exit), before)?;
            return match seen {
                Found::At(at) if at == exit => Ok(seen),
                Found::Stopped => Ok(seen),
                _ => look_through(timeline, pace, 0, Target::End, search),
            };
        }
        from = timeline.store().heads()[number].exits;
    }
    look_through(timeline, pace, from, Target::End, noted)
}

/// Goes to an exit and from there on, looking.
fn look_through(
    timeline: &mut RecordingTimeline,
    pace: &mut dyn Pace,
    from: u64,
    to: Target,
    mut search: Search,
) -> Result<Found, Failure> {
    if let Arrival::Stopped = timeline.go_to(Target::Exit(from), pace)? {
        return Ok(Found::Stopped);
    }
    Ok(
        match (timeline.run_to(to, pace, &mut search)?, search.found) {
            (Arrival::Stopped, _) => Found::Stopped,
            (_, Some(exit)) => Found::At(exit),
            (_, None) => Found::Nowhere,
        },
    )
}

/// Looks for the first exit at which something happens.
#[derive(Clone, Debug, Default)]
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

    /// The kernel panicked at an exit.
    fn panicked(&mut self, exits: Option<u64>) {
        if self.text.is_none() && self.found.is_none() {
            self.found = exits;
        }
    }
}

impl Observer for Search {
    fn turn(&mut self, exits: u64, turn: &Turn, _guest: &mut dyn Guest) {
        if matches!(turn.exit, Exit::Panic { .. }) {
            self.panicked(Some(exits));
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
