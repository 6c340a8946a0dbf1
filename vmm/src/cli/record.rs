//! `hindsight record`.

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use hindsight_replay::{Closed, Detail, Header, Live, Recorder, RunError};

use super::console::Console;
use super::replay::{Verify, parse_verify};
use super::run::{Images, host_failure};
use super::summary::Summary;
use super::{Failure, MachineOptions, Outcome};
use crate::host::{HostWorld, RawTerminal};
use crate::machine::{build, cmdline, describe, host_facts, open_kvm};
use crate::recording::Recording;

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
Ctrl-C elsewhere (SIGINT, SIGTERM) closes it cleanly too. The summary goes to standard error.

Example:
  hindsight record -o crash --kernel /boot/vmlinuz-6.1.0-cloud-amd64 --initrd initrd.cpio")]
pub struct Options {
    /// The directory to write the recording to.
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
    /// Replace a recording that is there.
    #[arg(long)]
    force: bool,
    /// Do not show the guest's console.
    #[arg(long, short)]
    quiet: bool,
    /// Print the summary as JSON on standard output, and nothing else.
    #[arg(long)]
    json: bool,
}

pub fn main(options: &Options) -> anyhow::Result<Outcome> {
    let start = Instant::now();
    let Images {
        kernel,
        image,
        initrd,
    } = Images::read(&options.machine)?;
    let (kvm, holes) = open_kvm()?;
    let words = cmdline(&options.machine.cmdline, options.machine.cmdline_exact);
    let description = describe(&kvm, &kernel, &initrd, words, options.machine.memory)?;
    let (mut cpu, mut machine) = build(&kvm, &description, &kernel, &initrd)?;

    let recording = Recording::create(&options.output, options.force)?;
    recording.write("kernel", &image)?;
    if !initrd.is_empty() {
        recording.write("initrd", &initrd)?;
    }
    drop((image, kernel, initrd));
    let header = Header {
        detail: options.detail.into(),
        machine: description,
        host: host_facts(holes),
    };
    let raw = RawTerminal::enter();
    let memory_every = options.verify.and_then(|verify| verify.every);
    let world = Live::new(HostWorld::start()?, memory_every);
    let journal = recording.create_journal()?;
    let mut recorder = Recorder::create(world, journal, &header)
        .map_err(|error| Failure::new(Outcome::HostFailed, error))?;
    let mut console = Console::new(options.quiet || options.json);
    let result = machine.run(&mut cpu, &mut recorder, &mut console);
    drop((console, raw));

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
    if let Err(error) = recording.write_index(recorder.index()) {
        eprintln!("hindsight: no index was written ({error}); it will be rebuilt when needed");
    }
    let host_ns = start.elapsed().as_nanos() as u64;
    let headline = format!("recorded in {}", options.output.display());
    Summary::new(&machine, &end, host_ns, Some(bytes)).print(&headline, options.json);
    Ok(Outcome::Good)
}
