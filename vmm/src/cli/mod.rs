//! The command line: one file per command.

mod bench;
mod console;
pub mod diff;
mod disk;
mod format;
pub mod inspect;
mod output;
pub mod pcap;
mod record;
mod replay;
mod run;
mod summary;
pub mod transcript;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use hindsight_replay::OperatorConsole;

use crate::counting::CountingError;
use crate::disk::{DiskError, DiskOption, parse_disk};
use crate::foreign::shown_lines;
use crate::kvm::KvmError;
use crate::machine::{MachineError, cmdline};
use crate::net::{NetError, NetOption, Network, Publish, parse_net, parse_publish};
use crate::output_file::OutputError;
use crate::recording::RecordingError;
use crate::tell::{out, tell};
pub use summary::Summary;

/// What a script can tell from the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All went well; for a replay: equal, to the end.
    Good = 0,
    /// A replay diverged, or two recordings differ.
    Different = 1,
    /// The input is no good: arguments, files, a damaged head.
    BadInput = 2,
    /// The recording was cut short or damaged; equal up to there.
    CutShort = 3,
    /// This host cannot do it.
    Unfit = 4,
    /// The host failed on the way: disk full, KVM error, network lost.
    HostFailed = 5,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  it worked; a replay was equal to the end
  1  a replay diverged, two recordings differ, a hunt found no crash, or it was stopped before the guest ran
  2  bad arguments, a file that cannot be used, a recording that does not fit
  3  the recording was cut short or is damaged; what there is replays equal
  4  this host cannot record (see `hindsight doctor`)
  5  the host failed on the way (disk full, KVM error, network lost)";

/// Records a whole Linux machine under stock KVM, and replays it bit for bit.
#[derive(Debug, Parser)]
#[command(name = "hindsight", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a machine without recording it.
    Run(run::Options),
    /// Boot a machine and record everything it could not have computed for itself.
    Record(record::Options),
    /// Run a recorded machine again, and check every step against the recording.
    Replay(replay::Options),
    /// Tell what a recording is and what is in it.
    Inspect(inspect::Options),
    /// Print what the guest wrote to its console, with times; or make an asciicast of it.
    Console(transcript::Options),
    /// Write the frames that a machine sent and received as a pcapng, for Wireshark and the like.
    Pcap(pcap::Options),
    /// Write a machine's disk as it was at some moment, or list what the guest had changed on it.
    Disk(disk::Options),
    /// Show the first difference between two recordings, and what led up to it.
    Diff(diff::Options),
    /// Probe this host's KVM with tiny guests: can it record, and what would be left open?
    Doctor(crate::doctor::Options),
    /// Measure what recording and replaying cost, as ratios in one run.
    Bench(bench::Options),
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page (roff).
    Man,
}

/// What a machine is made of.
#[derive(Clone, Debug, Args)]
pub struct MachineOptions {
    /// The kernel: a distribution's vmlinuz (bzImage), or an ELF vmlinux.
    ///
    /// A regular file of at most 1 GiB.
    #[arg(long, short, value_name = "FILE")]
    pub kernel: PathBuf,
    /// The initial RAM disk.
    ///
    /// A regular file of at most 2 GiB, which must fit into RAM beside the kernel.
    #[arg(long, short, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Words to add to the kernel's command line.
    ///
    /// What the machine itself needs is always there.
    #[arg(
        long,
        short,
        value_name = "WORDS",
        default_value = "",
        allow_hyphen_values = true
    )]
    pub cmdline: String,
    /// Take --cmdline as the whole command line.
    #[arg(long)]
    pub cmdline_exact: bool,
    /// RAM, with K, M or G: 512M, 3.5G.
    ///
    /// Whole pages of 4 KiB. How much is needed depends on the kernel and the initrd: too little to load them is
    /// refused with the number that it takes. Debian's 6.1 cloud kernel with a small initrd boots from 72M on.
    #[arg(long, short, value_name = "SIZE", default_value = "256M", value_parser = format::parse_size)]
    pub memory: u64,
    /// A disk, from a raw image or a block device, which is never written; may be repeated.
    ///
    /// What the guest writes is forgotten when it ends. The guest sees vda, vdb, ... With `ro` its writes are
    /// refused; `serial` is what it is told as the disk's serial number.
    #[arg(long = "disk", value_name = "IMG[,ro][,serial=S]", value_parser = parse_disk)]
    pub disks: Vec<DiskOption>,
    /// A network card, and what it is on.
    ///
    /// This host's network by way of passt, unprivileged (user); an existing tap device (tap=NAME); or no
    /// card (none).
    #[arg(long, value_name = "none|user|tap=NAME", default_value = "none", value_parser = parse_net)]
    pub net: NetOption,
    /// With --net user: lets a port of this host lead to one of the guest's; may be repeated.
    ///
    /// Without ADDRESS only this host can reach it.
    #[arg(long, value_name = "[ADDRESS:]PORT:PORT[/udp]", value_parser = parse_publish)]
    pub publish: Vec<Publish>,
    /// Which console of the guest's standard input and output are.
    ///
    /// The serial one speaks from the first line of the kernel's on. virtio's (hvc0) is faster, follows the
    /// size of the terminal, and says nothing until the guest has loaded its driver; then the kernel
    /// repeats there what it has said.
    #[arg(long, value_enum, default_value_t)]
    pub console: ConsoleOption,
    /// How the guest's kernel reads the time.
    ///
    /// Without it: quick, but exit with --chaos, which meddles with the time at exits.
    #[arg(long, value_enum)]
    pub time_reads: Option<TimeReads>,
}

impl MachineOptions {
    /// The network that the machine is to be on.
    pub fn network(&self) -> Result<Option<Network>, Failure> {
        if self.net != NetOption::User && !self.publish.is_empty() {
            let message = "--publish needs --net user";
            return Err(Failure::new(Outcome::BadInput, message));
        }
        Ok(Network::from_options(&self.net, &self.publish))
    }
}

impl MachineOptions {
    /// The whole command line.
    pub fn words(&self) -> String {
        cmdline(&self.cmdline, self.cmdline_exact, self.console.into())
    }
}

/// Which of the guest's consoles is the operator's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ConsoleOption {
    /// The serial one (ttyS0).
    #[default]
    Serial,
    /// virtio's (hvc0).
    Virtio,
}

impl From<ConsoleOption> for OperatorConsole {
    fn from(option: ConsoleOption) -> OperatorConsole {
        match option {
            ConsoleOption::Serial => OperatorConsole::Serial,
            ConsoleOption::Virtio => OperatorConsole::Virtio,
        }
    }
}

/// How the guest's kernel reads the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TimeReads {
    /// From its own memory, where it can, and by an exit at least every 33rd time.
    Quick,
    /// By an exit each time.
    Exit,
}

/// Parses the arguments and does what they say.
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    let is_doctor = matches!(command, Command::Doctor(_));
    let result = match command {
        Command::Run(options) => run::main(&options),
        Command::Record(options) => record::main(&options),
        Command::Replay(options) => replay::main(&options),
        Command::Inspect(options) => inspect::main(&options),
        Command::Console(options) => transcript::main(&options),
        Command::Pcap(options) => pcap::main(&options),
        Command::Disk(options) => disk::main(&options),
        Command::Diff(options) => diff::main(&options),
        Command::Doctor(options) => crate::doctor::main(&options),
        Command::Bench(options) => bench::main(&options),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "hindsight", &mut script);
            out!("{}", String::from_utf8_lossy(&script).trim_end());
            Ok(Outcome::Good)
        }
        Command::Man => print_manual(),
    };
    match result {
        Ok(outcome) => ExitCode::from(outcome as u8),
        Err(error) => {
            let (outcome, mut text) = (outcome_of(&error), with_causes(&error));
            if outcome == Outcome::Unfit && !is_doctor && !text.contains("hindsight doctor") {
                text.push_str("; `hindsight doctor` tells more");
            }
            tell!("hindsight: {}", shown_lines(text));
            ExitCode::from(outcome as u8)
        }
    }
}

/// Errors that carry an outcome of their own; all others are bad input.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    outcome: Outcome,
    message: String,
}

impl Failure {
    /// An error that ends the program with `outcome`.
    pub fn new(outcome: Outcome, message: impl ToString) -> Failure {
        Failure {
            outcome,
            message: message.to_string(),
        }
    }
}

/// Input is bad unless the error says that the host is.
fn outcome_of(error: &anyhow::Error) -> Outcome {
    if let Some(failure) = error.downcast_ref::<Failure>() {
        return failure.outcome;
    }
    // What cannot be read says of which file; what says nothing but this is of threads and descriptors.
    if error.is::<std::io::Error>() {
        return Outcome::HostFailed;
    }
    if let Some(RecordingError::Write { .. }) = error.downcast_ref() {
        return Outcome::HostFailed;
    }
    if let Some(OutputError::Write { .. }) = error.downcast_ref() {
        return Outcome::HostFailed;
    }
    if let Some(CountingError::Counter(_) | CountingError::Inexact { .. }) = error.downcast_ref() {
        return Outcome::Unfit;
    }
    if let Some(NetError::NoPasst) = error.downcast_ref() {
        return Outcome::Unfit;
    }
    if let Some(NetError::Passt(_) | NetError::Host(_)) = error.downcast_ref() {
        return Outcome::HostFailed;
    }
    if let Some(DiskError::Overlay { .. }) = error.downcast_ref() {
        return Outcome::HostFailed;
    }
    let kvm = match error.downcast_ref::<MachineError>() {
        Some(MachineError::Unfit(_)) => return Outcome::Unfit,
        Some(MachineError::Random(_)) => return Outcome::HostFailed,
        Some(MachineError::Kvm(error)) => Some(error),
        Some(
            MachineError::Boot(_) | MachineError::Traps { .. } | MachineError::QuickReads { .. },
        ) => None,
        None => error.downcast_ref::<KvmError>(),
    };
    match kvm {
        Some(KvmError::Open(_) | KvmError::Lacks(_)) => Outcome::Unfit,
        Some(KvmError::Cpu(_)) | None => Outcome::BadInput,
        Some(_) => Outcome::HostFailed,
    }
}

/// An error with its causes, each said once: many of our errors quote theirs.
pub fn with_causes(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// The main page, and each command's behind it.
fn print_manual() -> anyhow::Result<Outcome> {
    let mut command = Cli::command();
    command.build();
    let mut pages = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut pages)?;
    for sub in command
        .get_subcommands()
        .filter(|sub| sub.get_name() != "help")
    {
        let name: &'static str = format!("hindsight-{}", sub.get_name()).leak();
        clap_mangen::Man::new(sub.clone().name(name)).render(&mut pages)?;
    }
    out!("{}", String::from_utf8_lossy(&pages).trim_end());
    Ok(Outcome::Good)
}
