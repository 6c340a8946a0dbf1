//! `hindsight record`.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueEnum};
use hindsight_devices::Nanos;
use hindsight_replay::{
    Chaos, Closed, Detail, End, Ending, Header, Live, Patience, Recorder, RunError,
};
use kvm_ioctls::Kvm;

use super::console::Console;
use super::replay::{Verify, parse_verify};
use super::run::{Images, host_failure, patience};
use super::summary::Summary;
use super::{Failure, MachineOptions, Outcome, TimeReads};
use crate::counting::{Counting, Preempt};
use crate::foreign::{shown_lines, shown_path};
use crate::machine::{host_facts, open_kvm, random_number};
use crate::net::Link;
use crate::new_recording::NewRecording;
use crate::tell::tell;
use crate::world::{HostWorld, Operator, RawTerminal};

/// How much the journal says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DetailOption {
    /// What replay needs, and checks.
    #[default]
    Default,
    /// Every exit with its values and registers too.
    Full,
}

impl From<DetailOption> for Detail {
    fn from(option: DetailOption) -> Detail {
        match option {
            DetailOption::Default => Detail::Default,
            DetailOption::Full => Detail::Full,
        }
    }
}

/// Options of `record`.
#[derive(Debug, Args)]
#[command(after_help = "\
The guest's console is standard input and output; at a terminal, Ctrl-] ends the recording.
Ctrl-C elsewhere (SIGINT, SIGTERM, SIGHUP) closes it cleanly too; SIGPWR presses the guest's power button,
and a guest that turns itself off ends its recording. The summary goes to standard error.

DIR gets the journal, which grows while the guest runs, a copy of the kernel and of the initrd, and
links to the images of disks. If anything fails before the guest runs, DIR is left as it was. One
recorder at a time uses a DIR.

A timer or an input that is due waits --patience for the guest to exit by itself, then preempts it
at a counted place, which the replay finds again. Chaos moves timers about to bring out races:
what it did is in the recording, and the replay needs no seed.

Examples (guest-images/build makes the initrds):
  hindsight record -o boot -k /boot/vmlinuz-$(uname -r) -i .cache/images/hello.cpio
  hindsight record -o crash --until-crash --chaos -k /boot/vmlinuz-$(uname -r) -i .cache/images/race.cpio")]
pub struct Options {
    /// The directory to write the recording to; it is made if it is not there.
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    machine: MachineOptions,
    /// How much the journal says; both replay.
    #[arg(long, value_enum, default_value_t)]
    detail: DetailOption,
    /// Also record a digest of all of memory every N exits: memory=N.
    #[arg(long, value_name = "memory=N", value_parser = parse_verify)]
    verify: Option<Verify>,
    /// What stops a guest that does not exit.
    #[arg(long, value_enum, default_value_t)]
    preempt: Preempt,
    /// How long what is due waits for the guest to exit, in microseconds.
    ///
    /// Without it, 1,000; or more where preemptions are slow, so that they take one part in 10 of the
    /// time, up to 5,000.
    #[arg(long, value_name = "US")]
    patience: Option<u64>,
    /// Force the raw event that is counted, such as 0xd1; without it, the one known for this CPU.
    #[arg(long, value_name = "EVENT")]
    event: Option<String>,
    /// Force how many branches short of a place the counter is set.
    #[arg(long, value_name = "BRANCHES")]
    margin: Option<u64>,
    /// Perturb when timers land and how long time slices are, from SEED or a random one.
    #[arg(long, value_name = "SEED", num_args = 0..=1, require_equals = true)]
    chaos: Option<Option<u64>>,
    /// Record again and again until the guest panics or triple faults, and keep only that.
    ///
    /// It gives up after RUNS, if given; then, as when it is stopped, nothing is kept, and what --force replaced
    /// is there again. With --chaos each run has the next seed.
    #[arg(long, value_name = "RUNS", num_args = 0..=1, require_equals = true)]
    until_crash: Option<Option<u64>>,
    /// End the recording of a guest that has not reset itself SECONDS of its time after a kernel panic.
    ///
    /// Without it, 5 with --until-crash, else 60.
    #[arg(long, value_name = "SECONDS")]
    panic_grace: Option<u64>,
    /// Replace the recording that is there, once the new one is closed.
    ///
    /// The old recording is moved to DIR/replaced-XXXXXX when the guest is about to run, and deleted when
    /// the new one is closed and safe on the disk. If recording fails on the way, both are kept, and a
    /// message says where. Only files of a recording are touched, and never an image of a disk.
    #[arg(long)]
    force: bool,
    /// Do not show the guest's console.
    #[arg(long, short)]
    quiet: bool,
    /// Print the summary as JSON on standard output, and nothing else.
    #[arg(long)]
    json: bool,
}

impl Options {
    /// A kernel that does not reboot loops for good once it has panicked, and its command line or the
    /// guest's settings may want that; one that has loaded a crash kernel has more to do.
    fn panic_grace_ns(&self) -> Nanos {
        let default = if self.until_crash.is_some() { 5 } else { 60 };
        let seconds = self.panic_grace.unwrap_or(default);
        seconds.saturating_mul(1_000_000_000)
    }
}

pub fn main(options: &Options) -> anyhow::Result<Outcome> {
    let start = Instant::now();
    // Before there is another thread.
    let operator = Operator::listen()?;
    // First of all that can be refused: what stands in the way of it stands there from the start.
    let recording = NewRecording::create(&options.output, options.force)?;
    let images = Images::read(&options.machine, &operator)?;
    let (kvm, mut holes) = open_kvm()?;
    holes.extend(images.kernel.holes());
    let words = options.machine.words();
    let counting = Counting::choose(
        &kvm,
        options.preempt,
        options.event.as_deref(),
        options.margin,
    )?;
    let quick = match options.machine.time_reads {
        None => options.chaos.is_none(),
        Some(how) => how == TimeReads::Quick,
    };
    let mut machine = images.describe(&kvm, words, options.machine.memory, quick)?;
    machine.preemption = counting.unit();
    let chaos = match options.chaos {
        None => None,
        Some(Some(seed)) => Some(seed),
        // Short enough to type again.
        Some(None) => Some(random_number()? % 1_000_000),
    };
    let header = Header {
        detail: options.detail.into(),
        machine,
        host: host_facts(holes),
    };
    // What no reader would take is refused before anything is made.
    header
        .check()
        .map_err(|what| Failure::new(Outcome::BadInput, format!("cannot be recorded: {what}")))?;
    let network = options.machine.network()?;
    let mut session = Session {
        options,
        kvm,
        header,
        counting,
        // Before anything is written: most that can be wrong with a network is wrong from the start.
        link: network.map(Link::open).transpose()?,
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
    let result = match options.until_crash {
        None => session
            .record(images, chaos)
            .map(|(summary, _)| Some(summary)),
        Some(most) => session.hunt(&images, chaos, most),
    };
    drop(raw);
    let result = result.inspect_err(|_| {
        if let Some(replaced) = session.recording.replaced() {
            tell!(
                "hindsight: the recording that was there before is in {}",
                shown_path(replaced)
            );
        }
    });
    let Some(mut summary) = result? else {
        let before = match session.recording.replaced() {
            Some(_) => "; what was there before is there again",
            None => "",
        };
        session.recording.withdraw()?;
        tell!("hindsight: nothing was kept{before}");
        return Ok(Outcome::Different);
    };
    session.recording.finish()?;
    summary.host_ns = start.elapsed().as_nanos() as u64;
    let headline = format!("recorded in {}", shown_path(&options.output));
    summary.print(&headline, options.json);
    Ok(Outcome::Good)
}

/// Everything that one recording after the other is made with.
struct Session<'a> {
    options: &'a Options,
    kvm: Kvm,
    header: Header,
    counting: Counting,
    /// For the first recording.
    link: Option<Link>,
    operator: Arc<Operator>,
    /// From the first recording on, and out on loan while a guest runs.
    world: Option<HostWorld>,
    recording: NewRecording,
}

impl Session<'_> {
    /// Makes one recording. The images go before the guest runs, unless another recording wants them.
    fn record(&mut self, images: Rc<Images>, chaos: Option<u64>) -> anyhow::Result<(Summary, End)> {
        let options = self.options;
        self.header.host.chaos = chaos;
        self.header.host.counter = self.counting.facts();
        let console = options.machine.console.into();
        self.header.host.console = console;
        let (mut cpu, mut machine) = images.build(&self.kvm, &self.header.machine)?;
        let mut disks = images.fresh_disks()?;
        drop(images);
        self.counting.give_to(&mut cpu)?;

        let unit = self.header.machine.preemption;
        let patience = match unit {
            None => Patience::Endless,
            Some(_) => patience(options.patience),
        };
        let memory_every = options.verify.and_then(|verify| verify.every);
        // Only now: nothing that was prepared is time to the guest, and its kicks would disturb KVM at
        // making a machine.
        let world = match self.world.take() {
            Some(world) => world.restart()?,
            None => HostWorld::start(Arc::clone(&self.operator), self.link.take(), console)?,
        };
        let quiet = options.quiet || options.json;
        let mut screen = Console::new(quiet, console, Some(world.hold()))?.with_preemption(unit);
        let live = Live::new(world, memory_every)
            .with_patience(patience)
            .with_panic_grace(Some(options.panic_grace_ns()))
            .with_chaos(chaos.map(|seed| Chaos::new(seed, unit)));
        let journal = self.recording.create_journal()?;
        let mut recorder = Recorder::create(live, journal, &self.header)
            .map_err(|error| Failure::new(Outcome::HostFailed, error))?;
        self.recording.begin()?;
        let result = machine.run(&mut cpu, &mut disks, &mut recorder, &mut screen);
        if let Some(complaint) = screen.finish().complaint() {
            // What was asked for is there.
            let directory = shown_path(&options.output);
            tell!("\rhindsight: {complaint}; `hindsight console {directory}` has all of it\r");
        }

        let bytes = recorder.journal_bytes();
        let end = match result {
            Ok(end) => end,
            Err(RunError::Closed(Closed::Journal(error))) => {
                let message = format!(
                    "{error}\nthe recording in {} is whole up to byte {bytes} of its journal",
                    options.output.display()
                );
                return Err(Failure::new(Outcome::HostFailed, message).into());
            }
            Err(error) => return Err(host_failure(error).into()),
        };
        if let Err(error) = self.recording.recording().write_index(recorder.index()) {
            tell!(
                "hindsight: no index was written ({}); it will be rebuilt when needed",
                shown_lines(error)
            );
        }
        let world = recorder.into_inner().into_world().rest();
        if let Some(why) = world.failure() {
            let message = format!(
                "{why}\nthe machine was stopped at exit {}; the recording in {} is whole up to there",
                machine.at().exits,
                options.output.display()
            );
            return Err(Failure::new(Outcome::HostFailed, message).into());
        }
        self.world = Some(world);
        let mut summary = Summary::new(&machine, &end, 0, Some(bytes));
        summary.chaos_seed = chaos;
        Ok((summary, end))
    }

    /// Records until the guest crashes; `None` if it does not in `most` runs, or the operator stops
    /// the hunt.
    fn hunt(
        &mut self,
        images: &Rc<Images>,
        chaos: Option<u64>,
        most: Option<u64>,
    ) -> anyhow::Result<Option<Summary>> {
        if !images.kernel.shows_panics() {
            tell!(
                "\rhindsight: this kernel's panics are not known to the machine; the hunt ends at a triple \
                 fault, or where a pvpanic driver tells of a panic\r"
            );
        }
        for run in 1.. {
            let seed = chaos.map(|seed| seed.wrapping_add(run - 1));
            match seed {
                Some(seed) => tell!("\rhindsight: run {run}, chaos seed {seed}\r"),
                None => tell!("\rhindsight: run {run}\r"),
            }
            let (mut summary, end) = self.record(images.clone(), seed)?;
            summary.runs = Some(run);
            if end.panic.is_some() || end.ending == Ending::TripleFault {
                return Ok(Some(summary));
            }
            let stopped = matches!(end.ending, Ending::Stopped | Ending::StoppedRunning);
            if stopped || most.is_some_and(|most| run >= most) {
                tell!("\rhindsight: no crash in {run} runs\r");
                return Ok(None);
            }
            self.header.machine.seed = crate::machine::random_bytes()?;
        }
        unreachable!("there are more numbers than runs")
    }
}
