//! Goes on from a moment of a recording as a running machine, which may be recorded in its turn.
//!
//! Up to the moment the machine has the door of a replay, from there on that of a live world: the loop is the same,
//! and so is the machine. A recorder, if there is one, stays where it is while the door in it is exchanged.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::PathBuf;
use std::sync::Arc;

use hindsight_devices::Nanos;
use hindsight_replay::foreign::shown_path;
use hindsight_replay::{
    Chaos, Closed, Complete, Detail, End, Header, Host, JournalPlace, JournalReader, Live, Machine,
    Outside, Patience, Recorder, Replayer, RunError, Unit, When,
};

use super::make::random_number;
use super::marks::{carry_over, no_marks};
use super::moments::until_moment;
use super::new_recording::NewRecording;
use super::open::{RecordedImages, RecordedPaths};
use super::preemption_plan::CounterWish;
use super::record::{Left, close, notice_left};
use super::recording::Recording;
use super::replay::{Until, begin_at, place_of, refuse_same_place};
use super::run::Ran;
use super::state_file;
use super::{Front, View, Viewed};
use crate::disk::Disks;
use crate::failure::{Failure, Kind};
use crate::kvm::{KvmCpu, KvmError};
use crate::world::net::{Link, Network};
use crate::world::{HostWorld, Operator, RawTerminal, Shown};

/// So many exits are replayed at a time on the way to the moment; then whoever wants an end is heard.
const STRETCH_EXITS: u64 = 10_000;

/// From where a machine is to go on, and how.
#[derive(Clone, Debug)]
pub struct LiveWish {
    /// The recording.
    pub recording: PathBuf,
    /// Files that take the place of its own.
    pub instead: RecordedPaths,
    /// The moment from which the machine is live.
    pub at: When,
    /// The file with a state at or before that moment, from which to replay instead of from the start.
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
    /// Exits from one digest of all of memory to the next.
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
    if wish.network.is_some() && header.machine.devices.net.is_none() {
        let message = "the recorded machine has no network card; --net none is all there is for it";
        return Err(Failure::new(Kind::BadInput, message));
    }
    let target = match &wish.record {
        None => None,
        Some(record) => {
            refuse_same_place(&wish.recording, &record.output, "--record")?;
            let target = NewRecording::create(&record.output, record.force)?;
            Some((record, target))
        }
    };
    let at = until_moment(&recording, &wish.instead, &wish.at)?;
    let chaos = match wish.chaos {
        Some(None) => Some(random_number()? % 1_000_000),
        given => given.flatten(),
    };
    let images = RecordedImages::open(&recording, &header, &wish.instead)?;
    let mut here = images.machine_here(&header, &wish.counter)?;
    for warning in here.warnings.iter().filter(|_| target.is_some()) {
        front.notice(warning);
    }
    let mut disks = images.fresh_disks()?;
    let mut state = None;
    if let Some(path) = &wish.from {
        let saved = state_file::read(path, &header)?;
        here.machine.restore(&saved, &mut here.cpu, &mut disks)?;
        state = Some(place_of(saved)?);
    }
    let digests = target.as_ref().and_then(|(record, _)| record.memory_every);
    let replayer = begin(journal, &here.machine, state.as_ref(), at, digests)?;

    let raw = RawTerminal::enter();
    let console = header.host.console;
    // From here on it reads what is typed and hears the operator; it rests until the machine is there. What comes over
    // the network meanwhile waits at the other end of the link.
    let link = wish.network.clone().map(Link::open).transpose()?;
    let world = HostWorld::start(Arc::clone(&operator), None, console)?.rest();
    let view = front.view(Viewed {
        console,
        preemption: header.machine.preemption,
        hold: Some(world.hold()),
        last_exit: None,
    })?;
    let session = Session {
        wish,
        at,
        operator,
        world,
        link,
        chaos,
        stage: Stage {
            machine: here.machine,
            cpu: here.cpu,
            disks,
            view,
        },
        unit: header.machine.preemption,
        raw,
    };
    let Some((record, target)) = target else {
        drop(images);
        return session.live(replayer, front);
    };
    target.write_machine(&images)?;
    drop(images);
    let header = Header {
        detail: record.detail.unwrap_or(header.detail),
        host: facts(here.host, &header.host, chaos),
        ..header
    };
    let mut recorder = Recorder::create(replayer, target.create_journal()?, &header)
        .map_err(|error| Failure::new(Kind::HostFailed, error))?;
    if let Some(place) = state {
        let complete = session.stage.machine.complete();
        recorder.copy(&mut recording.journal()?, &place, complete)?;
    }
    session.live_recorded(recorder, record, target, front)
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

/// The door to the journal from where `machine` is: at power-on, or where a state was taken that is at this place.
fn begin<R: Read + Seek>(
    journal: JournalReader<R>,
    machine: &Machine,
    state: Option<&JournalPlace>,
    at: Until,
    digests: Option<u64>,
) -> Result<Replayer<R>, Failure> {
    let until = match at {
        Until::Exit(exit) => Some(exit),
        Until::End | Until::Time(_) => None,
    };
    let mut replayer = match state {
        None => Replayer::new(journal, until, digests),
        Some(place) => begin_at(journal, place, machine.at().exits, until)?,
    };
    let Until::Time(time) = at else {
        return Ok(replayer);
    };
    if machine.now() > time {
        let message = format!(
            "the machine is to be live from {time} ns of guest time, and the state is of {} ns; take an earlier state",
            machine.now()
        );
        return Err(Failure::new(Kind::BadInput, message));
    }
    replayer.close_at_time(Some(time));
    Ok(replayer)
}

/// A machine with all that it is run on, but for its door.
struct Stage {
    machine: Machine,
    cpu: KvmCpu,
    disks: Disks,
    view: Box<dyn View>,
}

impl Stage {
    fn run<O>(&mut self, door: &mut O) -> Result<End, RunError<KvmError>>
    where
        O: Outside<Closed = Closed>,
    {
        let Stage {
            machine,
            cpu,
            disks,
            view,
        } = self;
        machine.run(cpu, disks, door, &mut **view)
    }

    /// Replays up to the moment `at`, by a door that `close_after` closes after an exit.
    fn reach<O: Outside<Closed = Closed>>(
        &mut self,
        door: &mut O,
        at: Until,
        operator: &Operator,
        close_after: impl Fn(&mut O, u64),
    ) -> Result<(), Failure> {
        loop {
            let exits = self.machine.at().exits;
            let is_there = match at {
                Until::End => false,
                Until::Exit(exit) => exits >= exit,
                Until::Time(time) => self.machine.now() >= time,
            };
            if is_there {
                return Ok(());
            }
            if operator.stop_asked().is_some() {
                let message = format!(
                    "stopped at exit {exits}, on the way to the moment; nothing was written"
                );
                return Err(Failure::new(Kind::Different, message));
            }
            let stretch = exits.saturating_add(STRETCH_EXITS);
            close_after(
                door,
                match at {
                    Until::Exit(exit) => exit.min(stretch),
                    _ => stretch,
                },
            );
            match self.run(door) {
                Err(RunError::Closed(Closed::Reached(_))) => {}
                other => return Err(self.missed(other)),
            }
        }
    }

    /// Why the moment was not reached.
    fn missed(&self, result: Result<End, RunError<KvmError>>) -> Failure {
        let (exits, now) = (self.machine.at().exits, self.machine.now());
        match result {
            Ok(end) => Failure::new(
                Kind::BadInput,
                format!(
                    "the recording ends at exit {exits}, {:.3} s of guest time ({end}), before it comes to that \
                     moment; exit {} is the last that it can go on from. Nothing was written",
                    now as f64 / 1e9,
                    exits.saturating_sub(1)
                ),
            ),
            Err(RunError::Closed(Closed::CutShort(tail))) => Failure::new(
                Kind::BadInput,
                format!("the recording does not come to that moment: {tail}. Nothing was written"),
            ),
            Err(RunError::Closed(Closed::Diverged(divergence))) => Failure::new(
                Kind::Different,
                format!("{divergence}\nso it did not come to that moment, and nothing was written"),
            ),
            Err(error) => error.into(),
        }
    }
}

/// A machine on its way to a moment, and the world that waits for it there.
struct Session<'a> {
    wish: &'a LiveWish,
    at: Until,
    operator: Arc<Operator>,
    world: HostWorld,
    link: Option<Link>,
    chaos: Option<u64>,
    stage: Stage,
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
        chaos: Option<u64>,
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
            .with_chaos(chaos.map(|seed| Chaos::new(seed, unit)));
        Ok(live)
    }

    /// Without a recording.
    fn live<R: Read>(
        self,
        mut replayer: Replayer<R>,
        front: &mut dyn Front,
    ) -> Result<Lived, Failure> {
        let Session {
            wish,
            at,
            operator,
            world,
            link,
            chaos,
            mut stage,
            unit,
            raw,
        } = self;
        let close_after = |door: &mut Replayer<R>, exits| door.close_after(Some(exits));
        stage.reach(&mut replayer, at, &operator, close_after)?;
        let from = stage.machine.complete();
        notice_live(from, front);
        let mut door = Session::door(wish, (world, link), from, unit, chaos)?;
        let result = stage.run(&mut door);
        let shown = stage.view.finish();
        drop(raw);
        let ran = Ran::of(stage.machine, result, shown, door)?;
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

    /// Into `target`.
    fn live_recorded<R: Read>(
        self,
        mut recorder: Recorder<Replayer<R>, File>,
        record: &LiveRecordingWish,
        mut target: NewRecording,
        front: &mut dyn Front,
    ) -> Result<Lived, Failure> {
        let Session {
            wish,
            at,
            operator,
            world,
            link,
            chaos,
            mut stage,
            unit,
            raw,
        } = self;
        let close_after =
            |door: &mut Recorder<Replayer<R>, File>, exits| door.inner().close_after(Some(exits));
        stage.reach(&mut recorder, at, &operator, close_after)?;
        target.begin()?;
        let from = stage.machine.complete();
        if let Err(error) = carry_over(
            &Recording::at(&wish.recording),
            target.recording(),
            from.exits,
        ) {
            front.notice(&no_marks(&error));
        }
        notice_live(from, front);
        operator.may_leave();
        let door = Session::door(wish, (world, link), from, unit, chaos)?;
        let mut recorder = recorder.map_inner(|_| door);
        let result = stage.run(&mut recorder);
        let exits = stage.machine.at().exits;
        let closed = close(
            recorder,
            result,
            target.recording(),
            exits,
            stage.view,
            front,
        );
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
        let machine = stage.machine;
        let left = closed.view.map(|view| {
            notice_left(&record.output, &machine, front);
            Left::new(stage.cpu, stage.disks, closed.door, view, raw)
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
