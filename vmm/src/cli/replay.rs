//! `hindsight replay`.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use hindsight_replay::{
    Closed, Detail, End, ExitNumber, Header, JournalReader, Machine, Observer, Outside, Recorder,
    Replayer, RunError,
};
use serde::Serialize;

use super::console::Console;
use super::format::{parse_size, seconds, thousands};
use super::record::DetailOption;
use super::run::host_failure;
use super::summary::{Summary, describe_end, not_compared};
use super::{Failure, Outcome, with_causes};
use crate::counting::Counting;
use crate::disk::{DiskError, Disks, OpenImage};
use crate::foreign::{shown_lines, shown_path};
use crate::kvm::{KvmCpu, KvmError};
use crate::machine::{LoadedKernel, build, check_cpu, open_kvm};
use crate::new_recording::NewRecording;
use crate::recording::Recording;
use crate::tell::{out, tell};

/// What to verify: all of memory, at the end or every so many exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verify {
    /// Exits from one digest to the next; `None`: only at the end.
    pub every: Option<u64>,
}

/// Parses `memory` and `memory=N`.
pub fn parse_verify(text: &str) -> Result<Verify, String> {
    match text.split_once('=') {
        None if text == "memory" => Ok(Verify { every: None }),
        Some(("memory", number)) => match number.parse() {
            Ok(every) if every > 0 => Ok(Verify { every: Some(every) }),
            _ => Err(format!("{number:?} is not a number of exits above 0")),
        },
        _ => Err(format!("{text:?}: expected memory or memory=N")),
    }
}

/// Options of `replay`.
#[derive(Debug, Args)]
#[command(after_help = "\
The guest's console goes to standard output, the verdict to standard error. Memory is always
compared at the end of a whole recording, unless the guest was stopped between two exits: then the
verdict says that it was not.")]
pub struct Options {
    /// The recording.
    recording: PathBuf,
    /// Compare all of memory: at the end (memory), or every N exits too (memory=N).
    ///
    /// The latter where the recording holds digests made with the same option.
    #[arg(long, value_name = "memory[=N]", value_parser = parse_verify)]
    verify: Option<Verify>,
    /// Stop behind this exit.
    #[arg(long, value_name = "EXIT")]
    until: Option<ExitNumber>,
    /// Show the console at the recorded pace instead of as fast as it can be computed.
    #[arg(long)]
    real_time: bool,
    /// Write what the replay does as a recording of full detail.
    ///
    /// If the replay is refused, nothing is written. If it diverges, DIR has what was replayed until then.
    #[arg(long, value_name = "DIR")]
    relog: Option<PathBuf>,
    /// Detail of what --relog writes.
    #[arg(long, value_enum, default_value_t = DetailOption::Full, requires = "relog")]
    detail: DetailOption,
    /// With --relog: replace the recording that is there, once the new one is whole.
    ///
    /// The old one is moved to DIR/replaced-XXXXXX when the replay begins, and deleted when it has ended
    /// equal; else both are kept.
    #[arg(long, requires = "relog")]
    force: bool,
    /// Take the kernel from here instead of from the recording; it must be the same.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Take the initrd from here instead of from the recording; it must be the same.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Take the image of a disk from here instead of from where it was; it must be the same.
    ///
    /// Once for each disk, in their order.
    #[arg(long = "disk", value_name = "FILE")]
    disks: Vec<PathBuf>,
    /// Refuse unless the recorded machine has this much RAM.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// Force the raw event that is counted between exits; without it, the one known for this CPU.
    #[arg(long, value_name = "EVENT")]
    event: Option<String>,
    /// Force how many branches short of a place the counter is set.
    #[arg(long, value_name = "BRANCHES")]
    margin: Option<u64>,
    /// Do not show the guest's console.
    #[arg(long, short)]
    quiet: bool,
    /// Print the verdict as JSON on standard output, and nothing else.
    #[arg(long)]
    json: bool,
}

pub fn main(options: &Options) -> anyhow::Result<Outcome> {
    let start = Instant::now();
    let recording = Recording::at(&options.recording);
    let journal = recording.journal()?;
    let header = journal.header().clone();
    if let Some(memory) = options.memory
        && memory != header.machine.memory_bytes
    {
        let message = format!(
            "--memory is {memory} bytes, the recorded machine has {} bytes",
            header.machine.memory_bytes
        );
        return Err(Failure::new(Outcome::BadInput, message).into());
    }
    let mut target = match &options.relog {
        None => None,
        Some(relog) => {
            refuse_same_place(&options.recording, relog)?;
            Some(NewRecording::create(relog, options.force)?)
        }
    };
    let (kernel, initrd) = (options.kernel.as_deref(), options.initrd.as_deref());
    let images = RecordedImages::open(&recording, &header, kernel, initrd, &options.disks)?;
    let forced = (options.event.as_deref(), options.margin);
    let (mut cpu, mut machine) = images.machine(&header, forced)?;
    let mut disks = images.fresh_disks()?;
    let last_exit = recording
        .read_index()
        .and_then(|index| index.last().map(|last| last.through));

    let quiet = options.quiet || options.json;
    let mut console = Console::new(quiet, header.host.console, None)?;
    if options.real_time {
        console = console.at_recorded_pace();
    }
    if let Some(last) = options.until.map(|until| until.0).or(last_exit) {
        console = console.with_progress(last);
    }
    let every = options.verify.and_then(|verify| verify.every);
    // A relog asks for digests of its own; a plain replay only for those that can be compared.
    let own_digests = every.filter(|_| options.relog.is_some());
    let mut replayer = Replayer::new(journal, options.until.map(|until| until.0), own_digests);
    let (result, replayer) = match &mut target {
        None => {
            let result = machine.run(&mut cpu, &mut disks, &mut replayer, &mut console);
            (result, replayer)
        }
        Some(target) => {
            target.write("kernel", &images.image)?;
            if header.machine.initrd.is_some() {
                target.write("initrd", &images.initrd)?;
            }
            target.link_disks(&images.disks)?;
            let header = Header {
                detail: Detail::from(options.detail),
                ..header.clone()
            };
            let mut relog = Recorder::create(replayer, target.create_journal()?, &header)
                .map_err(|error| Failure::new(Outcome::HostFailed, error))?;
            target.begin()?;
            let result = machine.run(&mut cpu, &mut disks, &mut relog, &mut console);
            if result.is_err() {
                relog
                    .abandon(machine.complete())
                    .map_err(|error| Failure::new(Outcome::HostFailed, error))?;
            }
            if let Err(error) = target.recording().write_index(relog.index()) {
                tell!(
                    "hindsight: no index was written ({}); it will be rebuilt when needed",
                    shown_lines(error)
                );
            }
            (result, relog.into_inner())
        }
    };
    if let Some(complaint) = console.finish().complaint() {
        tell!("hindsight: {complaint}");
    }
    let equal = matches!(result, Ok(_) | Err(RunError::Closed(Closed::Reached(_))));
    if let Some(target) = target {
        if equal {
            target.finish()?;
        } else {
            tell_what_is_kept(&target, machine.at().exits);
        }
    }
    if let Some(every) = every
        && equal
        && options.relog.is_none()
        && replayer.memories_checked() < 2
        && machine.at().exits >= every
    {
        let message = format!(
            "the recording holds no memory digests on the way; record it with --verify \
             memory={every}, or add them: replay --verify memory={every} --relog DIR"
        );
        return Err(Failure::new(Outcome::BadInput, message).into());
    }
    let host_ns = start.elapsed().as_nanos() as u64;
    conclude(result, &machine, &replayer, host_ns, options.json)
}

/// Writing a recording over itself would lose it.
fn refuse_same_place(recording: &Path, relog: &Path) -> Result<(), Failure> {
    match (recording.canonicalize(), relog.canonicalize()) {
        (Ok(a), Ok(b)) if a == b => {
            let message = "--relog names the recording itself; give another directory";
            Err(Failure::new(Outcome::BadInput, message))
        }
        _ => Ok(()),
    }
}

/// A relog that does not go to the end is kept, for it shows what led up to that.
fn tell_what_is_kept(target: &NewRecording, exits: u64) {
    tell!(
        "hindsight: {} has what was replayed, up to exit {}",
        shown_path(target.recording().directory()),
        thousands(exits)
    );
    if let Some(replaced) = target.replaced() {
        tell!(
            "hindsight: the recording that was there before is in {}",
            shown_path(replaced)
        );
    }
}

/// The files a recording is of, found to be the recorded ones.
pub struct RecordedImages {
    image: Vec<u8>,
    kernel: LoadedKernel,
    initrd: Vec<u8>,
    disks: Vec<OpenImage>,
}

impl RecordedImages {
    /// Reads the recording's own files, or those given in their place, and refuses others.
    pub fn open(
        recording: &Recording,
        header: &Header,
        kernel: Option<&Path>,
        initrd: Option<&Path>,
        disks: &[PathBuf],
    ) -> anyhow::Result<RecordedImages> {
        let initrd = recording.initrd(header, initrd)?;
        // Nothing is unpacked, nor taken from the cache, but what is known to be the recorded kernel.
        let image = recording.kernel(header, kernel)?;
        let kernel = LoadedKernel::open_as(&image, header.machine.kernel.clone())?;
        Ok(RecordedImages {
            image,
            kernel,
            initrd,
            disks: recording.disks(header, disks)?,
        })
    }

    /// The machine, ready to run from its beginning. The event that is counted between exits and
    /// the margin may be forced.
    pub fn machine(
        &self,
        header: &Header,
        (event, margin): (Option<&str>, Option<u64>),
    ) -> anyhow::Result<(KvmCpu, Machine)> {
        let (kvm, _) = open_kvm()?;
        check_cpu(&kvm, &header.machine.cpuid)?;
        let counting = Counting::for_unit(&kvm, header.machine.preemption, event, margin)?;
        let (mut cpu, machine) = build(&kvm, &header.machine, &self.kernel, &self.initrd)?;
        counting.give_to(&mut cpu)?;
        Ok((cpu, machine))
    }

    /// Disks over the images, with nothing written to them yet.
    pub fn fresh_disks(&self) -> Result<Disks, DiskError> {
        Disks::new(self.disks.clone())
    }
}

/// Replays `recording` for somebody who only looks. The observer is made by `begin` when all is ready, and is
/// done with `finish` before it is told what went wrong, if anything did: `finish` is told whether what was seen
/// is right as far as the recording goes.
pub fn watch<O: Observer>(
    recording: &Recording,
    journal: JournalReader<impl Read>,
    begin: impl FnOnce() -> anyhow::Result<O>,
    finish: impl FnOnce(O, bool) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let header = journal.header().clone();
    let images = RecordedImages::open(recording, &header, None, None, &[])?;
    let (mut cpu, mut machine) = images.machine(&header, (None, None))?;
    let mut disks = images.fresh_disks()?;
    let mut replayer = Replayer::new(journal, None, None);
    let mut observer = begin()?;
    let result = machine.run(&mut cpu, &mut disks, &mut replayer, &mut observer);
    let right = matches!(result, Ok(_) | Err(RunError::Closed(Closed::CutShort(_))));
    let finished = finish(observer, right);
    match finished {
        // A divergence decides how the program ends.
        Err(error) if !right => tell!("hindsight: {}", shown_lines(with_causes(&error))),
        finished => finished?,
    }
    match result {
        Ok(_) => Ok(Outcome::Good),
        Err(RunError::Closed(Closed::CutShort(tail))) => {
            tell!("hindsight: {}", shown_lines(tail));
            Ok(Outcome::CutShort)
        }
        Err(RunError::Closed(Closed::Diverged(divergence))) => {
            tell!("hindsight: {}", shown_lines(divergence));
            Ok(Outcome::Different)
        }
        Err(error) => Err(host_failure(error).into()),
    }
}

/// The verdict as a program reads it.
#[derive(Serialize)]
struct Verdict<'a> {
    verdict: &'static str,
    detail: String,
    exits: u64,
    guest_ns: u64,
    witnesses_equal: u64,
    memories_equal: u64,
    /// What the verdict does not cover, in words.
    not_compared: Option<&'static str>,
    /// How many of these are equal but for Accessed bits of page tables.
    memories_but_accessed: u64,
    summary: Option<&'a Summary>,
}

fn conclude(
    result: Result<End, RunError<KvmError>>,
    machine: &Machine,
    replayer: &Replayer<impl std::io::Read>,
    host_ns: u64,
    json: bool,
) -> anyhow::Result<Outcome> {
    let exits = machine.at().exits;
    let but_accessed = replayer.memories_but_accessed();
    let (equal, equal_so_far) = match but_accessed {
        0 => ("equal", "equal so far"),
        _ => (
            "equal but for Accessed bits",
            "equal so far but for Accessed bits",
        ),
    };
    let (verdict, outcome, detail, end) = match result {
        Ok(end) => (equal, Outcome::Good, describe_end(&end), Some(end)),
        Err(RunError::Closed(Closed::Reached(_))) => (
            equal_so_far,
            Outcome::Good,
            format!("stopped at {}", machine.at()),
            None,
        ),
        Err(RunError::Closed(Closed::CutShort(tail))) => {
            ("cut short", Outcome::CutShort, tail.to_string(), None)
        }
        Err(RunError::Closed(Closed::Diverged(divergence))) => {
            ("diverged", Outcome::Different, divergence.to_string(), None)
        }
        Err(error) => return Err(host_failure(error).into()),
    };
    let not_compared = end.as_ref().and_then(not_compared);
    let summary = end.map(|end| Summary::new(machine, &end, host_ns, None));
    let (witnesses, memories) = (replayer.witnesses_checked(), replayer.memories_checked());
    if json {
        let verdict = Verdict {
            verdict,
            detail,
            exits,
            guest_ns: machine.now(),
            witnesses_equal: witnesses,
            memories_equal: memories,
            not_compared,
            memories_but_accessed: but_accessed,
            summary: summary.as_ref(),
        };
        out!(
            "{}",
            serde_json::to_string(&verdict).expect("plain values serialise")
        );
        return Ok(outcome);
    }
    let aside = not_compared.map_or(String::new(), |what| format!("; {what}"));
    tell!("replay {verdict}: {}{aside}", shown_lines(&detail));
    tell!(
        "  {} exits, {} of guest time in {}; {} witnesses and {} memory digests equal",
        thousands(exits),
        seconds(machine.now()),
        seconds(host_ns),
        thousands(witnesses),
        thousands(memories)
    );
    if but_accessed > 0 {
        tell!(
            "  memory differs in Accessed bits of page tables alone, in {} of these digests: the CPU sets them as it \
             walks the tables, and nothing that the guest did differs",
            thousands(but_accessed)
        );
    }
    if let Some(summary) = summary {
        let memory = summary.memory_digest.as_deref().unwrap_or("none");
        tell!("  digest {}, memory {memory}", summary.digest);
    }
    Ok(outcome)
}
