//! Makes recordings: one, or one after the other until the guest crashes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use hindsight_devices::Nanos;
use hindsight_replay::{
    Chaos, Closed, Detail, End, Ending, Header, Live, Machine, Patience, Recorder, RunError,
};
use kvm_ioctls::Kvm;

use super::checkpointing::Checkpointing;
use super::images::{Images, MachineWish};
use super::make::{host_facts, open_kvm, random_bytes, random_number};
use super::marking::Marking;
use super::new_recording::NewRecording;
use super::preemption_plan::{CounterWish, PreemptionPlan, PreemptionWish};
use super::recording::Recording;
use super::run::Ran;
use super::timeline::open_checkpoints;
use super::{Front, View, Viewed};
use crate::disk::Disks;
use crate::failure::{Failure, Kind};
use crate::kvm::{KvmCpu, KvmError};
use crate::world::net::Link;
use crate::world::{HostWorld, Operator, RawTerminal};
use hindsight_replay::foreign::{shown_lines, shown_path};

/// What is to be recorded, and how.
#[derive(Clone, Debug)]
pub struct RecordWish {
    /// The directory that the recording goes to.
    pub output: PathBuf,
    /// Whether it replaces the recording that is there.
    pub force: bool,
    /// The machine.
    pub machine: MachineWish,
    /// How much the journal says.
    pub detail: Detail,
    /// Exits from one digest of all of memory to the next.
    pub memory_every: Option<u64>,
    /// What is to stop a guest that does not exit.
    pub preemption: PreemptionWish,
    /// The counter that does.
    pub counter: CounterWish,
    /// How long what is due waits for the guest to exit.
    pub patience: Patience,
    /// Whether timers are moved about: from this seed, or from a random one.
    pub chaos: Option<Option<u64>>,
    /// How long a guest that has panicked may run on.
    pub panic_grace_ns: Nanos,
    /// How much guest time there is from one checkpoint to the next, if they are made while it is recorded.
    pub checkpoint_every_ns: Option<Nanos>,
    /// Whether to go on until the guest crashes: for at most this number of runs, or without a limit.
    pub hunt: Option<Option<u64>>,
}

/// What was recorded.
#[derive(Debug)]
pub struct Recorded {
    /// The machine at its end.
    pub machine: Machine,
    /// How it ended.
    pub end: End,
    /// Length of the journal.
    pub journal_bytes: u64,
    /// The seed of the chaos that was made.
    pub chaos_seed: Option<u64>,
    /// How many runs a hunt took.
    pub runs: Option<u64>,
    /// The machine's surroundings, if it is to run on without being recorded.
    pub left: Option<Left>,
}

/// Records what `wish` says. `None`: a hunt that found no crash, and nothing was kept.
///
/// # Errors
///
/// It could not be made, or could not go on: what there is of it is kept then, and the failure says so.
pub fn record(
    wish: &RecordWish,
    operator: Arc<Operator>,
    front: &mut dyn Front,
) -> Result<Option<Recorded>, Failure> {
    // First of all that can be refused: what is in the way of it is there from the start.
    let recording = NewRecording::create(&wish.output, wish.force)?;
    let images = Images::read(&wish.machine, &operator)?;
    let (kvm, mut holes) = open_kvm()?;
    holes.extend(images.kernel.holes());
    let plan = PreemptionPlan::choose(&kvm, wish.preemption, &wish.counter)?;
    for warning in plan.warnings() {
        front.notice(warning);
    }
    let mut machine = images.describe(&kvm, &wish.machine)?;
    machine.preemption = plan.unit();
    let chaos = match wish.chaos {
        None => None,
        Some(Some(seed)) => Some(seed),
        // Short enough to type again.
        Some(None) => Some(random_number()? % 1_000_000),
    };
    let header = Header {
        detail: wish.detail,
        machine,
        host: host_facts(holes),
    };
    // What no reader would take is refused before anything is made.
    header
        .check()
        .map_err(|what| Failure::new(Kind::BadInput, format!("cannot be recorded: {what}")))?;
    let mut session = Session {
        wish,
        front,
        kvm,
        header,
        plan,
        // Before anything is written: most that can be wrong with a network is wrong from the start.
        link: wish.machine.network.clone().map(Link::open).transpose()?,
        operator,
        world: None,
        recording,
    };
    session.recording.write("kernel", &images.image)?;
    if !images.initrd.is_empty() {
        session.recording.write("initrd", &images.initrd)?;
    }
    session.recording.link_disks(&images.disks)?;
    let images = Rc::new(images);
    let raw = RawTerminal::enter();
    let result = match wish.hunt {
        None => session.record(images, chaos).map(Some),
        Some(most) => session.hunt(&images, chaos, most),
    };
    let result = result.map(|recorded| recorded.map(|recorded| recorded.keep(raw)));
    if result.is_err()
        && let Some(replaced) = session.recording.replaced()
    {
        let replaced = shown_path(replaced);
        session.front.notice(&format!(
            "the recording that was there before is in {replaced}"
        ));
    }
    let Some(recorded) = result? else {
        let before = match session.recording.replaced() {
            Some(_) => "; what was there before is there again",
            None => "",
        };
        session.recording.withdraw()?;
        session.front.notice(&format!("nothing was kept{before}"));
        return Ok(None);
    };
    session.recording.finish()?;
    if recorded.left.is_some() {
        notice_left(&wish.output, &recorded.machine, session.front);
    }
    Ok(Some(recorded))
}

/// Everything that one recording after the other is made with.
struct Session<'a> {
    wish: &'a RecordWish,
    front: &'a mut dyn Front,
    kvm: Kvm,
    header: Header,
    plan: PreemptionPlan,
    /// For the first recording.
    link: Option<Link>,
    operator: Arc<Operator>,
    /// From the first recording on, and out on loan while a guest runs.
    world: Option<HostWorld>,
    recording: NewRecording,
}

impl Session<'_> {
    /// Makes one recording. The images go before the guest runs, unless another recording wants them.
    fn record(&mut self, images: Rc<Images>, chaos: Option<u64>) -> Result<Recorded, Failure> {
        let wish = self.wish;
        self.header.host.chaos = chaos;
        self.header.host.counter = self.plan.facts();
        let console = wish.machine.console;
        self.header.host.console = console;
        if wish.hunt.is_none() {
            self.operator.may_leave();
        }
        let (mut cpu, mut machine) = images.build(&self.kvm, &self.header.machine)?;
        let mut disks = images.fresh_disks()?;
        drop(images);
        self.plan.apply(&mut cpu)?;

        let unit = self.header.machine.preemption;
        let patience = match unit {
            None => Patience::Endless,
            Some(_) => wish.patience,
        };
        // Only now: nothing that was prepared is time to the guest, and its kicks would disturb KVM at
        // making a machine.
        let world = match self.world.take() {
            Some(world) => world.restart()?,
            None => HostWorld::start(Arc::clone(&self.operator), self.link.take(), console)?,
        };
        let mut view = self.front.view(Viewed {
            console,
            preemption: unit,
            hold: Some(world.hold()),
            last_exit: None,
        })?;
        let live = Live::new(world, wish.memory_every)
            .with_patience(patience)
            .with_panic_grace(Some(wish.panic_grace_ns))
            .with_chaos(chaos.map(|seed| Chaos::new(seed, unit)));
        let journal = self.recording.create_journal()?;
        let mut recorder = Recorder::create(live, journal, &self.header)
            .map_err(|error| Failure::new(Kind::HostFailed, error))?;
        let checkpointing = match wish.checkpoint_every_ns {
            None => None,
            Some(every_ns) => {
                recorder.tell_places();
                let check = recorder.head_check();
                let store = open_checkpoints(self.recording.place(), &self.header, check)?;
                store
                    .check_kept()
                    .map_err(|error| Failure::new(Kind::HostFailed, error))?;
                Some(Checkpointing::begin(every_ns, store, &mut cpu, &mut disks)?)
            }
        };
        self.recording.begin()?;
        let marking = Marking::begin(self.recording.recording(), &self.operator)?;
        let result = match checkpointing {
            None => machine.run(&mut cpu, &mut disks, &mut recorder, &mut *view),
            Some(checkpointing) => {
                let parts = (&mut machine, &mut cpu, &mut disks);
                checkpointing.run(parts, &mut recorder, &mut *view, self.front)?
            }
        };
        marking.end(machine.complete());
        let exits = machine.at().exits;
        let recording = self.recording.recording();
        let ran = close(recorder, result, recording, exits, view, self.front)?;
        let mut recorded = Recorded {
            machine,
            end: ran.end,
            journal_bytes: ran.journal_bytes,
            chaos_seed: chaos,
            runs: None,
            left: None,
        };
        match ran.view {
            Some(view) => {
                let left = Left::new(cpu, disks, ran.door, view, None);
                recorded.left = Some(left);
            }
            None => self.world = Some(ran.door.into_world().rest()),
        }
        Ok(recorded)
    }

    /// Records until the guest crashes; `None` if it does not in `most` runs, or the operator stops
    /// the hunt.
    fn hunt(
        &mut self,
        images: &Rc<Images>,
        chaos: Option<u64>,
        most: Option<u64>,
    ) -> Result<Option<Recorded>, Failure> {
        if !images.kernel.shows_panics() {
            self.front.notice(
                "this kernel's panics are not known to the machine; the hunt ends at a triple fault, or where a \
                 pvpanic driver tells of a panic",
            );
        }
        for run in 1.. {
            let seed = chaos.map(|seed| seed.wrapping_add(run - 1));
            self.front.notice(&match seed {
                Some(seed) => format!("run {run}, chaos seed {seed}"),
                None => format!("run {run}"),
            });
            let recorded = self.record(images.clone(), seed)?;
            let end = &recorded.end;
            if end.panic.is_some() || end.ending == Ending::TripleFault {
                let runs = Some(run);
                return Ok(Some(Recorded { runs, ..recorded }));
            }
            let stopped = matches!(end.ending, Ending::Stopped | Ending::StoppedRunning);
            if stopped || most.is_some_and(|most| run >= most) {
                self.front.notice(&format!("no crash in {run} runs"));
                return Ok(None);
            }
            self.header.machine.seed = random_bytes()?;
        }
        unreachable!("there are more numbers than runs")
    }
}

impl Recorded {
    /// The terminal stays raw as long as the machine runs.
    fn keep(mut self, raw: Option<RawTerminal>) -> Recorded {
        if let Some(left) = &mut self.left {
            left.raw = raw;
        }
        self
    }
}

/// A recording that is closed.
pub(super) struct ClosedRecording {
    /// How it ended.
    pub end: End,
    /// Length of its journal.
    pub journal_bytes: u64,
    /// The door that it was recorded through.
    pub door: Live<HostWorld>,
    /// What showed the machine, if it is to run on.
    pub view: Option<Box<dyn View>>,
}

/// Closes `recording`, whose run has come to `result` at exit `exits`.
pub(super) fn close(
    recorder: Recorder<Live<HostWorld>, File>,
    result: Result<End, RunError<KvmError>>,
    recording: &Recording,
    exits: u64,
    view: Box<dyn View>,
    front: &mut dyn Front,
) -> Result<ClosedRecording, Failure> {
    let bytes = recorder.journal_bytes();
    let shown_directory = shown_path(recording.directory());
    let directory = recording.directory().display();
    let index = recorder.index().to_vec();
    let mut door = recorder.into_inner();
    let is_left = matches!(&result, Ok(end) if end.ending == Ending::Stopped)
        && door.world().is_left()
        && door.world().failure().is_none();
    let view = match is_left {
        true => Some(view),
        false => {
            if let Some(complaint) = view.finish().complaint() {
                // What was asked for is there.
                front.notice(&format!(
                    "{complaint}; `hindsight console {shown_directory}` has all of it"
                ));
            }
            None
        }
    };
    let end = match result {
        Ok(end) => end,
        Err(RunError::Closed(Closed::Journal(error))) => {
            let message = format!(
                "{error}\nthe recording in {directory} is whole up to byte {bytes} of its journal"
            );
            return Err(Failure::new(Kind::HostFailed, message));
        }
        Err(error) => return Err(error.into()),
    };
    if let Err(error) = recording.write_index(&index) {
        front.notice(&no_index(shown_lines(error)));
    }
    if let Some(why) = door.world().failure() {
        let message = format!(
            "{why}\nthe machine was stopped at exit {exits}; the recording in {directory} is whole up to there"
        );
        return Err(Failure::new(Kind::HostFailed, message));
    }
    Ok(ClosedRecording {
        end,
        journal_bytes: bytes,
        door,
        view,
    })
}

/// What a machine is run on with whose recording has ended without it.
pub struct Left {
    cpu: KvmCpu,
    disks: Disks,
    door: Live<HostWorld>,
    view: Box<dyn View>,
    /// Set back when all has ended.
    raw: Option<RawTerminal>,
}

impl std::fmt::Debug for Left {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Left").finish_non_exhaustive()
    }
}

impl Left {
    pub(super) fn new(
        cpu: KvmCpu,
        disks: Disks,
        door: Live<HostWorld>,
        view: Box<dyn View>,
        raw: Option<RawTerminal>,
    ) -> Left {
        Left {
            cpu,
            disks,
            door,
            view,
            raw,
        }
    }

    /// Runs `machine`, whose these are, to its end.
    ///
    /// # Errors
    ///
    /// It could not go on.
    pub fn run_on(mut self, mut machine: Machine) -> Result<Ran, Failure> {
        self.door.world().run_on();
        let result = machine.run(
            &mut self.cpu,
            &mut self.disks,
            &mut self.door,
            &mut *self.view,
        );
        let shown = self.view.finish();
        drop(self.raw);
        Ran::of(machine, result, shown, self.door)
    }
}

/// Says that the recording in `directory` has ended without its machine.
pub(super) fn notice_left(directory: &Path, machine: &Machine, front: &mut dyn Front) {
    let exits = machine.at().exits;
    front.notice(&format!(
        "the recording in {} is closed at exit {exits}; its guest runs on, and is no longer recorded",
        shown_path(directory)
    ));
}

/// That there is no index is no failure.
pub(super) fn no_index(error: impl std::fmt::Display) -> String {
    format!("no index was written ({error}); it will be rebuilt when needed")
}
