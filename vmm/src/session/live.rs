//! Goes on from a moment of a recording as a running machine, which may be recorded in its turn.
//!
//! The machine comes to the moment as to any: from power-on, from a checkpoint, or from a state in a file. There its door
//! is exchanged, of a replay for that of a live world: the loop is the same, and so is the machine. What a new
//! recording says of the time before is copied from the old one.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use hindsight_devices::Nanos;
use hindsight_replay::foreign::shown_path;
use hindsight_replay::{
    Anchor, Arrival, Chaos, CheckpointHead, Complete, Detail, End, Ending, Header, Host, Live,
    Machine, Observer, Outside, Pace, Patience, Pause, Recorder, Target, Unit, Visits, When,
};

use super::make::random_number;
use super::marking::Marking;
use super::marks::{carry_over, no_marks};
use super::moments::{go_to_moment, here, stopped};
use super::new_recording::NewRecording;
use super::open::{Here, RecordedImages, RecordedPaths};
use super::preemption_plan::CounterWish;
use super::record::{Left, close, notice_left};
use super::recording::Recording;
use super::replay::refuse_same_place;
use super::run::Ran;
use super::state_file;
use super::timeline::{
    HostPace, OnTheWay, RecordingTimeline, SPACING, leave, open_timeline, timeline_of,
};
use super::{Front, View, Viewed};
use crate::failure::{Failure, Kind};
use crate::world::net::{Link, Network};
use crate::world::{HostWorld, Operator, RawTerminal, Shown};

/// Chaos that begins at a moment is told at which places the guest's programs were in so many exits before: many times
/// what makes a place a common one, and replayed in about a second where an exit costs most.
const LOOK_BACK_EXITS: u64 = 2_000;

/// From where a machine is to go on, and how.
#[derive(Clone, Debug)]
pub struct LiveWish {
    /// The recording.
    pub recording: PathBuf,
    /// Files that take the place of its own.
    pub instead: RecordedPaths,
    /// The moment from which the machine is live.
    pub at: When,
    /// The file with a state at or before that moment, from which to replay instead of from a checkpoint.
    pub from: Option<PathBuf>,
    /// Where it is recorded.
    pub record: Option<LiveRecordingWish>,
    /// The network that its card is on from there on, if on any.
    pub network: Option<Network>,
    /// The counter that finds the places between exits.
    pub counter: CounterWish,
    /// How long what is due waits for the guest to exit.
    pub patience: Patience,
    /// Whether timers are moved about: from this seed, or from a random one.
    pub chaos: Option<Option<u64>>,
    /// How long a guest that has panicked may run on; `None`: until it resets.
    pub panic_grace_ns: Option<Nanos>,
    /// How much guest time from the moment on the machine has.
    pub for_ns: Option<Nanos>,
}

/// A recording that is to be made of a machine that is live again.
#[derive(Clone, Debug)]
pub struct LiveRecordingWish {
    /// The directory that it goes to.
    pub output: PathBuf,
    /// Whether it replaces the recording that is there.
    pub force: bool,
    /// How much its journal says; `None`: as much as that of the recording that it goes on from.
    pub detail: Option<Detail>,
    /// Exits from one digest of all of memory to the next, from the moment on.
    pub memory_every: Option<u64>,
}

/// What became of a machine that was live again.
#[derive(Debug)]
pub struct Lived {
    /// The machine at its end.
    pub machine: Machine,
    /// How it ended.
    pub end: End,
    /// The exit from which it was live, and guest time there.
    pub from: Complete,
    /// Length of its journal, if it was recorded.
    pub journal_bytes: Option<u64>,
    /// The seed of the chaos that was made.
    pub chaos_seed: Option<u64>,
    /// What became of what it showed; of one that is recorded, the recording has all of it.
    pub shown: Option<Shown>,
    /// Why the world could not go on, if it could not.
    pub world_failed: Option<Failure>,
    /// The machine's surroundings, if it is to run on without being recorded any longer.
    pub left: Option<Left>,
}

/// Lives what `wish` says.
///
/// # Errors
///
/// A recording or a host that will not do, or a recording that does not come to the moment: nothing is written then.
/// Or the machine could not go on.
pub fn live(
    wish: &LiveWish,
    operator: Arc<Operator>,
    front: &mut dyn Front,
) -> Result<Lived, Failure> {
    let recording = Recording::at(&wish.recording);
    let journal = recording.journal()?;
    let header = journal.header().clone();
    refuse(wish, &header)?;
    let target = match &wish.record {
        None => None,
        Some(record) => {
            refuse_same_place(&wish.recording, &record.output, "--record")?;
            let target = NewRecording::create(&record.output, record.force)?;
            Some((record, target))
        }
    };
    let chaos = match wish.chaos {
        Some(None) => Some(random_number()? % 1_000_000),
        given => given.flatten(),
    };
    let images = Rc::new(RecordedImages::open(&recording, &header, &wish.instead)?);
    let host = Rc::new(RefCell::new(None));
    let make = {
        let (images, host) = (Rc::clone(&images), Rc::clone(&host));
        let (header, counter) = (header.clone(), wish.counter.clone());
        move || {
            let here = images.machine_here(&header, &counter)?;
            let Here { cpu, machine, .. } = here;
            *host.borrow_mut() = Some((here.host, here.warnings));
            Ok((machine, cpu, images.fresh_disks()?))
        }
    };
    let mut timeline = timeline_of(&recording, journal, Box::new(make))?;
    match &wish.from {
        None => timeline.come_near(Target::Exit(0))?,
        Some(path) => begin_at_state(&mut timeline, path, &header, &wish.at)?,
    }
    let made = host.take();
    let (host, warnings) = made.expect("the timeline has made a machine");
    for warning in warnings.iter().filter(|_| target.is_some()) {
        front.notice(warning);
    }

    let raw = RawTerminal::enter();
    let console = header.host.console;
    // From here on it reads what is typed and hears the operator; it rests until the machine is there. What comes over
    // the network meanwhile waits at the other end of the link.
    let link = wish.network.clone().map(Link::open).transpose()?;
    let world = HostWorld::start(Arc::clone(&operator), None, console)?.rest();
    let mut view = front.view(Viewed {
        console,
        preemption: header.machine.preemption,
        hold: Some(world.hold()),
        last_exit: None,
    })?;
    let mut pace = Interruptible {
        pace: HostPace::new(SPACING),
        operator: &operator,
    };
    let came = come_to(&mut timeline, &wish.at, &recording, &mut pace, &mut *view);
    came.map_err(|failure| match &target {
        None => failure,
        Some(_) => Failure::new(failure.kind(), format!("{failure}; nothing was written")),
    })?;
    let visits = match (chaos, &wish.from) {
        (Some(_), None) => look_back(&mut timeline, &mut pace)?,
        _ => Visits::default(),
    };
    timeline.settle()?;
    for complaint in timeline.take_complaints() {
        front.notice(&complaint);
    }
    let stage = leave(timeline)?.expect("it has come to where it can go on");
    let session = Session {
        wish,
        operator,
        world,
        link,
        chaos,
        visits,
        stage,
        view,
        unit: header.machine.preemption,
        raw,
    };
    let Some((record, target)) = target else {
        drop(images);
        return session.live(front);
    };
    target.write_machine(&images)?;
    drop(images);
    let header = Header {
        detail: record.detail.unwrap_or(header.detail),
        host: facts(host, &header.host, chaos),
        ..header
    };
    session.live_recorded(&recording, &header, record, target, front)
}

/// Brings the machine of a recording to a moment, with the checkpoints that there are, and one there: whoever comes to it
/// next has no way to go. Says at which exit that is, from which the recording can be gone on from.
///
/// # Errors
///
/// As for [`live`].
pub fn keep_moment(recording: &Recording, when: &When) -> Result<u64, Failure> {
    let (instead, counter) = (RecordedPaths::default(), CounterWish::default());
    let mut timeline = open_timeline(recording, recording.journal()?, &instead, &counter)?;
    let mut pace = HostPace::new(SPACING);
    come_to(&mut timeline, when, recording, &mut pace, &mut ())?;
    timeline.keep_here()?;
    Ok(here(&mut timeline))
}

/// What can be refused before anything is made.
fn refuse(wish: &LiveWish, header: &Header) -> Result<(), Failure> {
    if wish.network.is_some() && header.machine.devices.net.is_none() {
        let message = "the recorded machine has no network card; --net none is all there is for it";
        return Err(Failure::new(Kind::BadInput, message));
    }
    let detail = wish.record.as_ref().and_then(|record| record.detail);
    if detail == Some(Detail::Full) && header.detail != Detail::Full {
        let message = "the recording does not have every exit up to the moment, so a new one cannot; make one that does: \
                       hindsight replay --detail full --relog";
        return Err(Failure::new(Kind::BadInput, message));
    }
    Ok(())
}

/// Begins at the state in the file at `path`.
fn begin_at_state(
    timeline: &mut RecordingTimeline,
    path: &std::path::Path,
    header: &Header,
    at: &When,
) -> Result<(), Failure> {
    timeline.put(&state_file::read(path, header)?)?;
    let (machine, _, _) = timeline.parts().expect("it was put there");
    let (exits, now) = (machine.at().exits, machine.now());
    let is_late = match (&at.anchor, at.offset) {
        (Anchor::Exit(exit), offset) => exit
            .checked_add_signed(offset)
            .is_some_and(|exit| exit < exits),
        (Anchor::Time(time), 0) => *time < now,
        _ => false,
    };
    if is_late {
        let message = format!(
            "the machine is to be live from {at} on, and the state is of exit {exits}, {now} ns of guest time; take an \
             earlier state"
        );
        return Err(Failure::new(Kind::BadInput, message));
    }
    Ok(())
}

/// Brings the machine to a moment that it can go on from. At the end of a recording whose guest had not ended, that is the
/// last exit before it was closed, or cut short.
fn come_to(
    timeline: &mut RecordingTimeline,
    when: &When,
    recording: &Recording,
    pace: &mut dyn Pace,
    observer: &mut dyn Observer,
) -> Result<(), Failure> {
    let end = match go_to_moment(timeline, when, recording, pace, observer)? {
        Arrival::Ended(end) => Some(end),
        Arrival::CutShort(_) => None,
        Arrival::Reached | Arrival::Stopped | Arrival::AtStop => return Ok(()),
    };
    let exits = here(timeline);
    let before = exits.saturating_sub(1);
    if let Some(end) = &end
        && !matches!(end.ending, Ending::Stopped | Ending::StoppedRunning)
    {
        let message = format!(
            "the guest itself ended there, at exit {exits}: {end}; exit {before} is the last that it can go on from"
        );
        return Err(Failure::new(Kind::BadInput, message));
    }
    // The wish to stop came with the last exit; what was cut short may lack a part of its last one.
    for exit in [exits, before] {
        if let Arrival::Reached = timeline.go_to(Target::Exit(exit), pace)? {
            return Ok(());
        }
    }
    let message = format!("nothing can go on from exit {before}, the last one of the recording");
    Err(Failure::new(Kind::BadInput, message))
}

/// At which places the guest's programs were before where the machine is, to which it comes back.
fn look_back(timeline: &mut RecordingTimeline, pace: &mut dyn Pace) -> Result<Visits, Failure> {
    let (mut visits, exits) = (Visits::default(), here(timeline));
    let begin = exits.saturating_sub(LOOK_BACK_EXITS);
    timeline.come_near(Target::Exit(begin))?;
    for (to, observer) in [(begin, &mut () as &mut dyn Observer), (exits, &mut visits)] {
        match timeline.run_to(Target::Exit(to), pace, observer)? {
            Arrival::Reached => {}
            _ => return Err(stopped(timeline)),
        }
    }
    Ok(visits)
}

/// Makes checkpoints on the way, and stops when the operator wants that.
struct Interruptible<'a> {
    pace: HostPace,
    operator: &'a Operator,
}

impl Pace for Interruptible<'_> {
    fn exits(&self) -> u64 {
        self.pace.exits()
    }

    fn look(&mut self, here: CheckpointHead) -> Pause {
        match self.operator.stop_asked() {
            Some(_) => Pause::Stop,
            None => self.pace.look(here),
        }
    }

    fn made(&mut self, here: CheckpointHead) {
        self.pace.made(here);
    }
}

/// What a recording says of the host that goes on with one of another host: its own facts, and what either of them
/// could not keep from the guest. Chaos of the old one is in it too, unless there is new chaos to tell of.
fn facts(here: Host, recorded: &Host, chaos: Option<u64>) -> Host {
    let mut holes = recorded.holes.clone();
    holes.extend(here.holes);
    let mut seen = std::collections::BTreeSet::new();
    holes.retain(|hole| seen.insert(hole.clone()));
    Host {
        holes,
        chaos: chaos.or(recorded.chaos),
        console: recorded.console,
        ..here
    }
}

/// A machine that has come to its moment, and the world that waits for it there.
struct Session<'a> {
    wish: &'a LiveWish,
    operator: Arc<Operator>,
    world: HostWorld,
    link: Option<Link>,
    chaos: Option<u64>,
    /// What chaos is to know of the time before.
    visits: Visits,
    stage: OnTheWay,
    view: Box<dyn View>,
    unit: Option<Unit>,
    raw: Option<RawTerminal>,
}

impl Session<'_> {
    /// What the machine has come to is live from here on: the door to the world that waits for it.
    fn door(
        wish: &LiveWish,
        (world, link): (HostWorld, Option<Link>),
        from: Complete,
        unit: Option<Unit>,
        chaos: Option<Chaos>,
    ) -> Result<Live<HostWorld>, Failure> {
        let patience = match unit {
            None => Patience::Endless,
            Some(_) => wish.patience,
        };
        let memory_every = wish.record.as_ref().and_then(|record| record.memory_every);
        let stops_at = wish.for_ns.map(|ns| from.now.saturating_add(ns));
        let live = Live::new(world.go_on(from, link)?, memory_every)
            .with_patience(patience)
            .with_panic_grace(wish.panic_grace_ns)
            .with_stop(stops_at)
            .with_chaos(chaos);
        Ok(live)
    }

    /// Without a recording.
    fn live(self, front: &mut dyn Front) -> Result<Lived, Failure> {
        let Session {
            wish,
            world,
            link,
            chaos,
            visits,
            stage: (mut machine, mut cpu, mut disks, _),
            mut view,
            unit,
            raw,
            ..
        } = self;
        let from = machine.complete();
        notice_live(from, front);
        let meddler = chaos.map(|seed| Chaos::new(seed, unit).after(visits));
        let mut door = Session::door(wish, (world, link), from, unit, meddler)?;
        let result = machine.run(&mut cpu, &mut disks, &mut door, &mut *view);
        let shown = view.finish();
        drop(raw);
        let ran = Ran::of(machine, result, shown, door)?;
        Ok(Lived {
            machine: ran.machine,
            end: ran.end,
            from,
            journal_bytes: None,
            chaos_seed: chaos,
            shown: Some(ran.shown),
            world_failed: ran.world_failed,
            left: None,
        })
    }

    /// Into `target`, after what `recording` says up to there.
    fn live_recorded(
        self,
        recording: &Recording,
        header: &Header,
        record: &LiveRecordingWish,
        mut target: NewRecording,
        front: &mut dyn Front,
    ) -> Result<Lived, Failure> {
        let Session {
            wish,
            operator,
            world,
            link,
            chaos,
            visits,
            stage: (mut machine, mut cpu, mut disks, replayer),
            mut view,
            unit,
            raw,
        } = self;
        let from = machine.complete();
        let place = replayer.place().expect("a replay has a place");
        let mut recorder = Recorder::create(replayer, target.create_journal()?, header)
            .map_err(|error| Failure::new(Kind::HostFailed, error))?;
        recorder.copy(&mut recording.journal()?, &place, from)?;
        target.begin()?;
        if let Err(error) = carry_over(recording, target.recording(), from.exits) {
            front.notice(&no_marks(&error));
        }
        notice_live(from, front);
        operator.may_leave();
        // Last of all: guest time goes on from here.
        let meddler = chaos.map(|seed| Chaos::new(seed, unit).after(visits));
        let door = Session::door(wish, (world, link), from, unit, meddler)?;
        let mut recorder = recorder.map_inner(|_| door);
        let marking = Marking::begin(target.recording(), &operator)?;
        let result = machine.run(&mut cpu, &mut disks, &mut recorder, &mut *view);
        marking.end(machine.complete());
        let exits = machine.at().exits;
        let closed = close(recorder, result, target.recording(), exits, view, front);
        let closed = match closed {
            Ok(closed) => closed,
            Err(failure) => {
                if let Some(replaced) = target.replaced() {
                    let replaced = shown_path(replaced);
                    front.notice(&format!(
                        "the recording that was there before is in {replaced}"
                    ));
                }
                return Err(failure);
            }
        };
        target.finish()?;
        let left = closed.view.map(|view| {
            notice_left(&record.output, &machine, front);
            Left::new(cpu, disks, closed.door, view, raw)
        });
        Ok(Lived {
            machine,
            end: closed.end,
            from,
            journal_bytes: Some(closed.journal_bytes),
            chaos_seed: chaos,
            shown: None,
            world_failed: None,
            left,
        })
    }
}

fn notice_live(from: Complete, front: &mut dyn Front) {
    front.notice(&format!(
        "live from exit {} on, {:.3} s of guest time",
        from.exits,
        from.now as f64 / 1e9
    ));
}
