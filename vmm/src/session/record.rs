//! Makes recordings: one, or one after the other until the guest crashes.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use hindsight_devices::Nanos;
use hindsight_replay::{
    Chaos, Closed, Detail, End, Ending, Header, Live, Machine, Patience, Recorder, RunError,
};
use kvm_ioctls::Kvm;

use super::images::{Images, MachineWish};
use super::make::{host_facts, open_kvm, random_bytes, random_number};
use super::new_recording::NewRecording;
use super::preemption_plan::{CounterWish, PreemptionPlan, PreemptionWish};
use super::{Front, Viewed};
use crate::failure::{Failure, Kind};
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
    drop(raw);
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
        self.recording.begin()?;
        let result = machine.run(&mut cpu, &mut disks, &mut recorder, &mut *view);
        if let Some(complaint) = view.finish().complaint() {
            // What was asked for is there.
            let directory = shown_path(&wish.output);
            self.front.notice(&format!(
                "{complaint}; `hindsight console {directory}` has all of it"
            ));
        }

        let bytes = recorder.journal_bytes();
        let directory = wish.output.display();
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
        if let Err(error) = self.recording.recording().write_index(recorder.index()) {
            let error = shown_lines(error);
            self.front.notice(&no_index(error));
        }
        let world = recorder.into_inner().into_world().rest();
        if let Some(why) = world.failure() {
            let message = format!(
                "{why}\nthe machine was stopped at exit {}; the recording in {directory} is whole up to there",
                machine.at().exits,
            );
            return Err(Failure::new(Kind::HostFailed, message));
        }
        self.world = Some(world);
        Ok(Recorded {
            machine,
            end,
            journal_bytes: bytes,
            chaos_seed: chaos,
            runs: None,
        })
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

/// That there is no index is no failure.
pub(super) fn no_index(error: impl std::fmt::Display) -> String {
    format!("no index was written ({error}); it will be rebuilt when needed")
}
