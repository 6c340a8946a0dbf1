//! Replays recordings: to check them, to write them anew, or to watch them.

use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::time::Instant;

use hindsight_devices::{Nanos, Storage};
use hindsight_replay::{
    Anchor, Closed, Detail, Divergence, End, Header, JournalPlace, JournalReader, Machine,
    Observer, Outside, Recorder, Replayer, RunError, Tail, When,
};

use super::marks::{carry_over, no_marks, unmarked};
use super::moments::travel;
use super::new_recording::NewRecording;
use super::open::{RecordedImages, RecordedPaths};
use super::preemption_plan::CounterWish;
use super::record::no_index;
use super::recording::Recording;
use super::state_file::{self, State};
use super::{Front, Viewed};
use crate::disk::Disks;
use crate::failure::{Failure, Kind};
use crate::kvm::{KvmCpu, KvmError};
use crate::output_file::Plan;
use hindsight_replay::foreign::{shown_lines, shown_path};

/// What is to be replayed, and how.
#[derive(Clone, Debug)]
pub struct ReplayWish {
    /// The recording.
    pub recording: PathBuf,
    /// Files that take the place of its own.
    pub instead: RecordedPaths,
    /// Where to stop.
    pub until: Option<When>,
    /// Exits from one digest of all of memory to the next: those that the journal has are compared, a relog makes them.
    pub memory_every: Option<u64>,
    /// The counter that finds the places between exits.
    pub counter: CounterWish,
    /// Refuse a machine that does not have this much RAM, in bytes.
    pub memory_bytes: Option<u64>,
    /// Where what the replay does is recorded.
    pub relog: Option<RelogWish>,
    /// Where to begin, instead of at the start.
    pub from: Option<Beginning>,
    /// Where the state goes at which the replay stops.
    pub save: Option<SaveWish>,
}

/// Where a replay begins.
#[derive(Clone, Debug)]
pub enum Beginning {
    /// At the state in this file.
    State(PathBuf),
    /// At this moment.
    Moment(When),
}

/// A state to be saved.
#[derive(Clone, Debug)]
pub struct SaveWish {
    /// The file that it goes to.
    pub output: PathBuf,
    /// Whether it replaces a file that is there.
    pub force: bool,
}

/// A state that was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Length of the file in bytes.
    pub bytes: u64,
    /// How long it took to take the state and to write it.
    pub host_ns: u64,
}

/// A recording of a replay.
#[derive(Clone, Debug)]
pub struct RelogWish {
    /// The directory that it goes to.
    pub output: PathBuf,
    /// Whether it replaces the recording that is there.
    pub force: bool,
    /// How much its journal says.
    pub detail: Detail,
}

/// How a replay compares with its recording.
#[derive(Debug)]
pub enum Verdict {
    /// Equal to the end.
    Equal(End),
    /// Equal up to where it was to stop.
    Reached,
    /// Equal as far as the recording goes, which ends before the guest does.
    CutShort(Tail),
    /// It did something else.
    Diverged(Box<Divergence>),
}

impl Verdict {
    /// What the end of a run says of it.
    pub(super) fn of(result: Result<End, RunError<KvmError>>) -> Result<Verdict, Failure> {
        match result {
            Ok(end) => Ok(Verdict::Equal(end)),
            Err(RunError::Closed(Closed::Reached(_))) => Ok(Verdict::Reached),
            Err(RunError::Closed(Closed::CutShort(tail))) => Ok(Verdict::CutShort(tail)),
            Err(RunError::Closed(Closed::Diverged(divergence))) => {
                Ok(Verdict::Diverged(divergence))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether what was seen is right as far as the recording goes.
    pub fn is_right(&self) -> bool {
        !matches!(self, Verdict::Diverged(_))
    }
}

/// What a replay came to.
#[derive(Debug)]
pub struct Replayed {
    /// The machine where it stopped.
    pub machine: Machine,
    /// How it compares.
    pub verdict: Verdict,
    /// How many witnesses were equal.
    pub witnesses: u64,
    /// How many digests of memory were.
    pub states: u64,
    /// How many of them are equal but for Accessed bits of page tables.
    pub states_but_accessed: u64,
    /// The exit from which it went on, if not from the start.
    pub from: Option<u64>,
    /// What was saved.
    pub saved: Option<Saved>,
}

/// Replays what `wish` says.
///
/// # Errors
///
/// A recording or a host that will not do, or a host that failed on the way.
pub fn replay(wish: &ReplayWish, front: &mut dyn Front) -> Result<Replayed, Failure> {
    let recording = Recording::at(&wish.recording);
    let journal = recording.journal()?;
    let header = journal.header().clone();
    if let Some(memory) = wish.memory_bytes
        && memory != header.machine.memory_bytes
    {
        let message = format!(
            "--memory is {memory} bytes, the recorded machine has {} bytes",
            header.machine.memory_bytes
        );
        return Err(Failure::new(Kind::BadInput, message));
    }
    let plan = wish.save.as_ref().map(|save| {
        let mut kept = recording.kept();
        for (path, what) in wish.instead.named() {
            kept.keep(path, what);
        }
        if let Some(Beginning::State(from)) = &wish.from {
            kept.keep(from, "the state that this replay goes on from");
        }
        Plan::new(&save.output, save.force, kept)
    });
    let plan = plan.transpose()?;
    if wish.relog.is_some() && (wish.from.is_some() || plan.is_some()) {
        let message =
            "a relog is a recording of a whole replay: it goes with no state and no moment";
        return Err(Failure::new(Kind::BadInput, message));
    }
    let mut target = match &wish.relog {
        None => None,
        Some(relog) => {
            refuse_same_place(&wish.recording, &relog.output, "--relog")?;
            Some((relog, NewRecording::create(&relog.output, relog.force)?))
        }
    };
    let until = wish.until.as_ref();
    let until = until.map(|when| unmarked(&recording, when)).transpose()?;
    let until = match &until {
        None => None,
        Some(When {
            anchor: Anchor::Exit(exit),
            offset: 0,
        }) => Some(*exit),
        Some(when) => Some(travel(&recording, &wish.instead, &wish.counter, when)?.1),
    };
    // A relog asks for digests of its own; a plain replay only for those that can be compared.
    let own_digests = wish.memory_every.filter(|_| wish.relog.is_some());
    let mut images = None;
    let (mut machine, mut cpu, mut disks, mut replayer) = match &wish.from {
        Some(Beginning::Moment(when)) => {
            let (timeline, exits) = travel(&recording, &wish.instead, &wish.counter, when)?;
            let parts = timeline.into_parts();
            parts.ok_or_else(|| nothing_after(exits))?
        }
        beginning => {
            let opened = RecordedImages::open(&recording, &header, &wish.instead)?;
            let images = images.insert(opened);
            let (mut cpu, mut machine) = images.machine(&header, &wish.counter)?;
            let mut disks = images.fresh_disks()?;
            let replayer = match beginning {
                Some(Beginning::State(path)) => {
                    let state = state_file::read(path, &header)?;
                    machine.restore(&state, &mut cpu, &mut disks)?;
                    begin_at(journal, &place_of(state)?, machine.at().exits, None)?
                }
                _ => Replayer::new(journal, None, own_digests),
            };
            (machine, cpu, disks, replayer)
        }
    };
    let from = wish.from.is_some().then(|| machine.at().exits);
    if let (Some(until), Some(from)) = (until, from)
        && until < from
    {
        let message = format!(
            "the replay is to stop after exit {until}, and begins at exit {from}; begin earlier"
        );
        return Err(Failure::new(Kind::BadInput, message));
    }
    replayer.close_at_time(None);
    replayer.close_after(until);
    let mut view = front.view(Viewed {
        console: header.host.console,
        preemption: None,
        hold: None,
        last_exit: until.or_else(|| last_exit(&recording)),
    })?;
    let (result, replayer) = match &mut target {
        None => {
            let result = machine.run(&mut cpu, &mut disks, &mut replayer, &mut *view);
            (result, replayer)
        }
        Some((relog, target)) => {
            let images = images.as_ref();
            target.write_machine(images.expect("a relog goes with no moment"))?;
            let header = Header {
                detail: relog.detail,
                ..header.clone()
            };
            let mut relog = Recorder::create(replayer, target.create_journal()?, &header)
                .map_err(|error| Failure::new(Kind::HostFailed, error))?;
            target.begin()?;
            if let Err(error) = carry_over(&recording, target.recording(), u64::MAX) {
                front.notice(&no_marks(&error));
            }
            let result = machine.run(&mut cpu, &mut disks, &mut relog, &mut *view);
            if result.is_err() {
                relog
                    .abandon(machine.complete())
                    .map_err(|error| Failure::new(Kind::HostFailed, error))?;
            }
            if let Err(error) = target.recording().write_index(relog.index()) {
                front.notice(&no_index(shown_lines(error)));
            }
            (result, relog.into_inner())
        }
    };
    let saved = match plan {
        Some(plan) => save(&machine, &mut cpu, &mut disks, &replayer, plan, &result)?,
        None => None,
    };
    if let Some(complaint) = view.finish().complaint() {
        front.notice(&complaint);
    }
    let equal = matches!(result, Ok(_) | Err(RunError::Closed(Closed::Reached(_))));
    if let Some((_, target)) = target {
        if equal {
            target.finish()?;
        } else {
            tell_what_is_kept(&target, machine.at().exits, front);
        }
    }
    if let Some(every) = wish.memory_every
        && equal
        && wish.relog.is_none()
        && replayer.states_checked() < 2
        && machine.at().exits >= every
    {
        let message = format!(
            "the recording holds no memory digests on the way; record it with --verify \
             memory={every}, or add them: replay --verify memory={every} --relog DIR"
        );
        return Err(Failure::new(Kind::BadInput, message));
    }
    Ok(Replayed {
        machine,
        verdict: Verdict::of(result)?,
        witnesses: replayer.witnesses_checked(),
        states: replayer.states_checked(),
        states_but_accessed: replayer.states_but_accessed(),
        from,
        saved,
    })
}

fn nothing_after(exits: u64) -> Failure {
    let message =
        format!("nothing comes after exit {exits}: the recording ends there; begin earlier");
    Failure::new(Kind::BadInput, message)
}

/// Where a state is in its recording's journal.
pub(super) fn place_of(state: State) -> Result<JournalPlace, Failure> {
    let message = "this state says nothing of where it is in a recording";
    state
        .core
        .journal
        .ok_or_else(|| Failure::new(Kind::BadInput, message))
}

/// The door to what the journal holds after `place`, which is at exit `exits`.
pub(super) fn begin_at<R: Read + Seek>(
    journal: JournalReader<R>,
    place: &JournalPlace,
    exits: u64,
    until: Option<u64>,
) -> Result<Replayer<R>, Failure> {
    let bad = |message: String| Failure::new(Kind::BadInput, message);
    if let Some(until) = until.filter(|until| *until < exits) {
        return Err(bad(format!(
            "the replay is to stop after exit {until}, and goes on from exit {exits}; take an earlier state"
        )));
    }
    let mut replayer = Replayer::at(journal, place)
        .map_err(|error| bad(format!("this is no state of this recording: {error}")))?;
    replayer.close_after(until);
    Ok(replayer)
}

/// Saves the state of a replay that has come to where it was to stop; nothing of one that has not.
fn save<R: Read>(
    machine: &Machine,
    cpu: &mut KvmCpu,
    disks: &mut Disks,
    replayer: &Replayer<R>,
    plan: Plan,
    result: &Result<End, RunError<KvmError>>,
) -> Result<Option<Saved>, Failure> {
    if !matches!(result, Err(RunError::Closed(Closed::Reached(_)))) {
        return Ok(None);
    }
    let start = Instant::now();
    let mut output = plan.begin()?;
    let state = machine.save(cpu, disks, replayer)?;
    let bytes = state_file::write(&state, &mut output)?;
    output.finish()?;
    Ok(Some(Saved {
        bytes,
        host_ns: start.elapsed().as_nanos() as u64,
    }))
}

/// The last exit of a recording, if its index is there to say so.
pub(super) fn last_exit(recording: &Recording) -> Option<u64> {
    let index = recording.read_index()?;
    index.last().map(|last| last.through)
}

/// Writing a recording over itself would lose it.
pub(super) fn refuse_same_place(
    recording: &Path,
    output: &Path,
    option: &str,
) -> Result<(), Failure> {
    match (recording.canonicalize(), output.canonicalize()) {
        (Ok(a), Ok(b)) if a == b => {
            let message = format!("{option} names the recording itself; give another directory");
            Err(Failure::new(Kind::BadInput, message))
        }
        _ => Ok(()),
    }
}

/// A relog that does not go to the end is kept, for it shows what led up to that.
fn tell_what_is_kept(target: &NewRecording, exits: u64, front: &mut dyn Front) {
    let directory = shown_path(target.recording().directory());
    front.notice(&format!(
        "{directory} has what was replayed, up to exit {exits}"
    ));
    if let Some(replaced) = target.replaced() {
        let replaced = shown_path(replaced);
        front.notice(&format!(
            "the recording that was there before is in {replaced}"
        ));
    }
}

/// Up to where a recording is watched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Until {
    /// Its end.
    #[default]
    End,
    /// This exit.
    Exit(u64),
    /// The first exit at this guest time or later.
    Time(Nanos),
}

/// A recording that is being watched has come to an end, or to where it was to stop.
#[derive(Debug)]
pub struct Watched {
    /// The machine there.
    pub machine: Machine,
    /// How it compares with the recording.
    pub verdict: Verdict,
}

/// A recording, opened to be watched.
#[derive(Debug)]
pub struct Watch<R: Read> {
    recording: Recording,
    journal: JournalReader<R>,
    images: RecordedImages,
}

impl<R: Read> Watch<R> {
    /// Opens the files of `recording`, of which this is the journal.
    ///
    /// # Errors
    ///
    /// Files that are not the recorded ones.
    pub fn open(
        recording: Recording,
        journal: JournalReader<R>,
        instead: &RecordedPaths,
    ) -> Result<Watch<R>, Failure> {
        let images = RecordedImages::open(&recording, journal.header(), instead)?;
        Ok(Watch {
            recording,
            journal,
            images,
        })
    }

    /// The images that its disks are over.
    pub fn images(&self) -> &RecordedImages {
        &self.images
    }

    /// The last exit on the way, if the index is there to say so.
    pub fn last_exit(&self, until: Until) -> Option<u64> {
        match until {
            Until::Exit(exit) => Some(exit),
            Until::End | Until::Time(_) => last_exit(&self.recording),
        }
    }

    /// Replays it for an observer, which is made by `begin` when all is ready.
    ///
    /// # Errors
    ///
    /// A host that will not do, or failed on the way; or what `begin` says.
    pub fn run<O: Observer>(
        self,
        disks: &mut dyn Storage,
        until: Until,
        begin: impl FnOnce() -> Result<O, Failure>,
    ) -> Result<(Watched, O), Failure> {
        let header = self.journal.header().clone();
        let (mut cpu, mut machine) = self.images.machine(&header, &CounterWish::default())?;
        let mut replayer = Replayer::new(self.journal, None, None);
        match until {
            Until::End => {}
            Until::Exit(exit) => replayer.close_after(Some(exit)),
            Until::Time(time) => replayer.close_at_time(Some(time)),
        }
        let mut observer = begin()?;
        let result = machine.run(&mut cpu, disks, &mut replayer, &mut observer);
        let verdict = Verdict::of(result)?;
        Ok((Watched { machine, verdict }, observer))
    }
}
