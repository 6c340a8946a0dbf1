//! A recording to move about in, with its checkpoints; and making those.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hindsight_replay::{
    Arrival, CheckpointHead, Closed, Header, JournalReader, Machine, PAGE_BYTES, Pace, Pause,
    Replayer, RunError, StateError, Target, Timeline, TravelError,
};

use super::checkpoints::{CheckpointError, CheckpointFile, PageLimit};
use super::open::{RecordedImages, RecordedPaths};
use super::preemption_plan::CounterWish;
use super::recording::{CHECKPOINTS, Recording};
use super::replay::{Verdict, last_exit};
use super::{Front, Viewed};
use crate::boot::layout::{LOW_RAM_END, RAM_ABOVE_HOLE};
use crate::disk::Disks;
use crate::failure::{Failure, Kind};
use crate::kvm::{KvmCpu, KvmError};

/// What makes a machine at power-on.
pub type Make = Box<dyn FnMut() -> Result<(Machine, KvmCpu, Disks), Failure>>;

/// A recording to move about in.
pub type RecordingTimeline = Timeline<KvmCpu, Disks, BufReader<File>, CheckpointFile, Make>;

/// From one checkpoint to the next, in time that a replay takes.
pub const SPACING: Duration = Duration::from_millis(800);
/// Exits from one look at the clock to the next.
const LOOK_EXITS: u64 = 32;
/// So many of the last checkpoints tell how much room those to come will take.
const RECENT: usize = 3;

/// Divides the way by what it costs on this host.
#[derive(Debug)]
pub struct HostPace {
    spacing: Duration,
    /// The last checkpoint, or the first look.
    since: Option<Instant>,
    stops: bool,
    made: bool,
}

impl HostPace {
    /// A checkpoint after each `spacing`.
    pub fn new(spacing: Duration) -> HostPace {
        HostPace {
            spacing,
            since: None,
            stops: false,
            made: false,
        }
    }

    /// The same, which stops after each.
    fn stopping(self) -> HostPace {
        HostPace {
            stops: true,
            ..self
        }
    }
}

impl Pace for HostPace {
    fn exits(&self) -> u64 {
        LOOK_EXITS
    }

    fn look(&mut self, _here: CheckpointHead) -> Pause {
        if self.stops && std::mem::take(&mut self.made) {
            Pause::Stop
        } else if self.since.get_or_insert_with(Instant::now).elapsed() >= self.spacing {
            let cost = self.since.map_or(0, |since| since.elapsed().as_millis());
            let cost = u32::try_from(cost).unwrap_or(u32::MAX);
            Pause::Checkpoint { cost }
        } else {
            Pause::GoOn
        }
    }

    fn made(&mut self, _here: CheckpointHead) {
        self.made = true;
        self.since = Some(Instant::now());
    }
}

/// Opens a recording to move about in.
///
/// # Errors
///
/// Files that are not the recorded ones, or no room for checkpoints.
pub fn open_timeline(
    recording: &Recording,
    journal: JournalReader<BufReader<File>>,
    instead: &RecordedPaths,
    counter: &CounterWish,
) -> Result<RecordingTimeline, Failure> {
    open_prepared(recording, journal, instead, counter, |_| {})
}

/// The same, with something to be done to each vCPU before it runs.
pub(super) fn open_prepared(
    recording: &Recording,
    journal: JournalReader<BufReader<File>>,
    instead: &RecordedPaths,
    counter: &CounterWish,
    prepare: impl Fn(&mut KvmCpu) + 'static,
) -> Result<RecordingTimeline, Failure> {
    let header = journal.header().clone();
    let images = RecordedImages::open(recording, &header, instead)?;
    let counter = counter.clone();
    let make = move || {
        let (mut cpu, machine) = images.machine(&header, &counter)?;
        prepare(&mut cpu);
        Ok((machine, cpu, images.fresh_disks()?))
    };
    timeline_of(recording, journal, Box::new(make))
}

/// The same of a recording whose machine somebody makes.
pub(super) fn timeline_of(
    recording: &Recording,
    journal: JournalReader<BufReader<File>>,
    make: Make,
) -> Result<RecordingTimeline, Failure> {
    let store = open_checkpoints(recording, journal.header(), journal.start().check)?;
    Ok(Timeline::new(journal, store, make))
}

/// The checkpoints of a recording whose journal has this head, with this check.
pub(super) fn open_checkpoints(
    recording: &Recording,
    header: &Header,
    check: u64,
) -> Result<CheckpointFile, Failure> {
    let file = CheckpointFile::open(&recording.path(CHECKPOINTS), check, page_limit(header));
    file.map_err(|error| no_room(&error))
}

/// What goes on from where a recording has come to, with nobody who notes what it writes any more. `None`: nothing does.
pub(super) fn leave(timeline: RecordingTimeline) -> Result<Option<OnTheWay>, Failure> {
    let Some((machine, mut cpu, disks, door)) = timeline.into_parts() else {
        return Ok(None);
    };
    cpu.forget_changed_pages()?;
    Ok(Some((machine, cpu, disks, door)))
}

/// A machine with its vCPU, its disks, and the door that it is replayed through.
pub(super) type OnTheWay = (Machine, KvmCpu, Disks, Replayer<BufReader<File>>);

fn no_room(error: &CheckpointError) -> Failure {
    let message = format!("there is no room for checkpoints: {error}");
    Failure::new(Kind::HostFailed, message)
}

/// The pages that the recorded machine has.
fn page_limit(header: &Header) -> PageLimit {
    let bytes = header.machine.memory_bytes;
    let end = match bytes.checked_sub(LOW_RAM_END) {
        None | Some(0) => bytes,
        Some(above) => RAM_ABOVE_HOLE + above,
    };
    let images = header.machine.images.iter();
    let disks = images.map(|image| image.bytes.div_ceil(PAGE_BYTES as u64));
    PageLimit {
        memory: end / PAGE_BYTES as u64,
        // The number and the lengths of disks are bounded where a head is read.
        disks: disks.sum(),
    }
}

impl From<TravelError<KvmError, Failure>> for Failure {
    fn from(error: TravelError<KvmError, Failure>) -> Failure {
        match error {
            TravelError::Make(failure) => failure,
            TravelError::Run(RunError::Closed(Closed::Diverged(divergence))) => {
                Failure::new(Kind::Different, divergence)
            }
            TravelError::Run(error) => error.into(),
            TravelError::State(error) => StateError::into(error),
            TravelError::Journal(error) => Failure::new(Kind::BadInput, error),
        }
    }
}

/// What is to be indexed, and how.
#[derive(Clone, Debug)]
pub struct IndexWish {
    /// The recording.
    pub recording: PathBuf,
    /// Files that take the place of its own.
    pub instead: RecordedPaths,
    /// How many bytes the checkpoints may have.
    pub budget_bytes: u64,
    /// From one checkpoint to the next, in time that a replay takes.
    pub spacing: Duration,
}

/// The checkpoints of a recording.
#[derive(Debug)]
pub struct Indexed {
    /// How the replay compares that made them.
    pub verdict: Verdict,
    /// How many there are.
    pub checkpoints: usize,
    /// How many there were before.
    pub before: usize,
    /// How many bytes they have.
    pub bytes: u64,
    /// The machine's last exit.
    pub exits: u64,
}

/// Makes the checkpoints of a recording, or goes on with those that are there.
///
/// # Errors
///
/// It cannot be replayed, or there is no room.
pub fn index_recording(wish: &IndexWish, front: &mut dyn Front) -> Result<Indexed, Failure> {
    let recording = Recording::at(&wish.recording);
    let journal = recording.journal()?;
    let header = journal.header().clone();
    let path = recording.path(CHECKPOINTS);
    let mut timeline = open_timeline(&recording, journal, &wish.instead, &CounterWish::default())?;
    let kept = timeline.store().check_kept();
    kept.map_err(|error| Failure::new(Kind::BadInput, error))?;
    let before = timeline.store().heads().len();
    let last = last_exit(&recording);
    let mut view = front.view(Viewed {
        console: header.host.console,
        preemption: None,
        hold: None,
        last_exit: last,
    })?;
    let mut spacing = wish.spacing;
    let verdict = loop {
        while timeline.store().bytes() > wish.budget_bytes && timeline.store().heads().len() > 1 {
            // Every second one goes, and from here on there are half as many.
            let thin = timeline.store().thinned(&path, |number| number % 2 == 0);
            let thin = thin.map_err(|error| no_room(&error))?;
            timeline.replace_store(thin)?;
            spacing *= 2;
        }
        let mut pace = HostPace::new(spacing).stopping();
        timeline.come_near(Target::End)?;
        match timeline.run_to(Target::End, &mut pace, &mut *view) {
            Ok(Arrival::Stopped) => {
                spacing = paced(timeline.store(), wish, last, spacing);
            }
            Ok(Arrival::Ended(end)) => break Verdict::Equal(end),
            Ok(Arrival::CutShort(tail)) => break Verdict::CutShort(tail),
            Ok(Arrival::Reached | Arrival::AtStop) => {
                unreachable!("an end is not reached but ended, and nobody debugs it")
            }
            Err(TravelError::Run(error)) => break Verdict::of(Err(error))?,
            Err(error) => return Err(error.into()),
        }
    };
    timeline.settle()?;
    if let Some(complaint) = view.finish().complaint() {
        front.notice(&complaint);
    }
    for complaint in timeline.take_complaints() {
        front.notice(&complaint);
    }
    let (machine, _, _) = timeline.parts().expect("it has come to the end");
    let exits = machine.at().exits;
    Ok(Indexed {
        verdict,
        checkpoints: timeline.store().heads().len(),
        before,
        bytes: timeline.store().bytes(),
        exits,
    })
}

/// How far apart the next ones are to be, so that all of them have room.
fn paced(
    store: &CheckpointFile,
    wish: &IndexWish,
    last: Option<u64>,
    spacing: Duration,
) -> Duration {
    let (here, used) = (store.heads().last(), store.bytes());
    let (Some(last), Some(here), Some((exits, bytes))) = (last, here, store.recent(RECENT)) else {
        return spacing;
    };
    // What the boot of a kernel takes says nothing of what comes after it.
    if used < wish.budget_bytes / 4 {
        return spacing;
    }
    // Exits are no measure of time, but there is no better one of what is to come.
    let left = last.saturating_sub(here.exits);
    let to_come = u128::from(bytes) * u128::from(left) / u128::from(exits.max(1));
    let room = u128::from(wish.budget_bytes.saturating_sub(used)).max(1);
    let spacing = match to_come > room {
        true => spacing + spacing / 4,
        false if 2 * to_come > room => spacing - spacing / 5,
        false => spacing / 2,
    };
    spacing.max(wish.spacing)
}
