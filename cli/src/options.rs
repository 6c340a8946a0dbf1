//! What commands have in common on the command line.

use std::fmt;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use hindsight_devices::Nanos;
use hindsight_replay::{Detail, OperatorConsole, Patience, Unit};
use hindsight_vmm::failure::{Failure, Kind};
use hindsight_vmm::session::{
    CounterWish, DiskWish, MachineWish, PreemptionWish, RecordedPaths, cmdline,
};
use hindsight_vmm::world::net::{Network, Publish, is_tap_name, parse_publish};

use crate::format::parse_size;

/// Files that take the place of a recording's own.
#[derive(Clone, Debug, Args)]
pub(crate) struct InsteadOptions {
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
}

impl InsteadOptions {
    /// The same, for a session.
    pub(crate) fn paths(&self) -> RecordedPaths {
        RecordedPaths {
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            disks: self.disks.clone(),
        }
    }
}

/// The counter with which a replay finds places between exits.
#[derive(Clone, Debug, Args)]
pub(crate) struct CounterOptions {
    /// Force the raw event that is counted between exits; without it, the one known for this CPU.
    #[arg(long, value_name = "EVENT")]
    event: Option<String>,
    /// Force how many branches short of a place the counter is set.
    #[arg(long, value_name = "BRANCHES")]
    margin: Option<u64>,
}

impl CounterOptions {
    /// The same, for a session.
    pub(crate) fn wish(&self) -> CounterWish {
        CounterWish {
            event: self.event.clone(),
            margin: self.margin,
        }
    }
}

/// What a machine is made of.
#[derive(Clone, Debug, Args)]
pub(crate) struct MachineOptions {
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
    #[arg(long, short, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    pub memory: u64,
    /// A disk, from a raw image or a block device, which is never written; may be repeated.
    ///
    /// What the guest writes is forgotten when it ends. The guest sees vda, vdb, ... With `ro` its writes are
    /// refused; `serial` is the serial number that it sees.
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
    /// The whole command line.
    pub(crate) fn words(&self) -> String {
        cmdline(&self.cmdline, self.cmdline_exact, self.console.into())
    }

    /// The machine that they are of, whose time reads are quick if nothing is said of them and `quick`.
    ///
    /// # Errors
    ///
    /// Options that contradict each other.
    pub(crate) fn wish(&self, quick: bool) -> Result<MachineWish, Failure> {
        let disks = self.disks.iter().map(|disk| disk.wish.clone());
        Ok(MachineWish {
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            cmdline: self.words(),
            memory_bytes: self.memory,
            disks: disks.collect(),
            network: network(&self.net, &self.publish)?,
            console: self.console.into(),
            quick_time_reads: match self.time_reads {
                None => quick,
                Some(how) => how == TimeReads::Quick,
            },
        })
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

/// What `record --preempt` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PreemptOption {
    /// A branch counter if this host has one that is exact; else kernel entries.
    #[default]
    Auto,
    /// A branch counter: the guest can be stopped anywhere.
    Branches,
    /// Its own entries into its kernel: system calls and faults.
    Entries,
    /// Nothing: what is due waits for its next exit.
    Never,
}

impl From<PreemptOption> for PreemptionWish {
    fn from(option: PreemptOption) -> PreemptionWish {
        match option {
            PreemptOption::Auto => PreemptionWish::Auto,
            PreemptOption::Branches => PreemptionWish::Exactly(Some(Unit::Branches)),
            PreemptOption::Entries => PreemptionWish::Exactly(Some(Unit::Entries)),
            PreemptOption::Never => PreemptionWish::Exactly(None),
        }
    }
}

/// What `run --preempt` and `bench --run-preempt` say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum RunPreemptOption {
    /// As often as a recorder would do it on this host: anywhere if there is a branch counter, else at
    /// kernel entries.
    #[default]
    AsRecorded,
    /// Anywhere, as nobody will look for the place again.
    Anywhere,
}

/// The patience that is asked for by a number of microseconds, or without one.
pub(crate) fn patience(us: Option<u64>) -> Patience {
    us.map_or(Patience::Fair, |us| {
        Patience::Fixed(us.saturating_mul(1_000))
    })
}

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

/// What to verify: all of memory, at the end or every `every` exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verify {
    /// Exits from one digest to the next; `None`: only at the end.
    pub every: Option<u64>,
}

/// Parses `memory` and `memory=N`.
pub(crate) fn parse_verify(text: &str) -> Result<Verify, String> {
    match text.split_once('=') {
        None if text == "memory" => Ok(Verify { every: None }),
        Some(("memory", number)) => match number.parse() {
            Ok(every) if every > 0 => Ok(Verify { every: Some(every) }),
            _ => Err(format!("{number:?} is not a number of exits above 0")),
        },
        _ => Err(format!("{text:?}: expected memory or memory=N")),
    }
}

/// How the guest's kernel reads the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TimeReads {
    /// From its own memory, where it can, and by an exit at least every 33rd time.
    Quick,
    /// By an exit each time.
    Exit,
}

/// What is asked for as a disk: `IMG[,ro][,serial=S]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskOption {
    /// What it comes to.
    pub wish: DiskWish,
    /// All of that as it was said.
    pub text: String,
}

/// Parses `IMG[,ro][,serial=S]`. A comma in a name is written twice.
pub(crate) fn parse_disk(text: &str) -> Result<DiskOption, String> {
    let words = text.replace(",,", "\0");
    let mut words = words.split(',').map(|word| word.replace('\0', ","));
    let path = words.next().filter(|path| !path.is_empty());
    let mut wish = DiskWish {
        path: path.ok_or("expected IMG[,ro][,serial=S]")?.into(),
        read_only: false,
        serial: String::new(),
    };
    for word in words {
        match word.split_once('=') {
            None if word == "ro" => wish.read_only = true,
            Some(("serial", serial)) if serial.len() <= 20 => wish.serial = serial.into(),
            Some(("serial", serial)) => {
                return Err(format!(
                    "the serial number {serial:?} has more than 20 bytes"
                ));
            }
            _ => return Err(format!("{word:?}: expected ro or serial=S")),
        }
    }
    let text = text.into();
    Ok(DiskOption { wish, text })
}

/// What `--net` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum NetOption {
    /// There is no card.
    #[default]
    None,
    /// Whatever this host's user can reach, by passt.
    User,
    /// An existing tap device.
    Tap(String),
}

/// As it is given.
impl fmt::Display for NetOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NetOption::None => f.write_str("none"),
            NetOption::User => f.write_str("user"),
            NetOption::Tap(name) => write!(f, "tap={name}"),
        }
    }
}

/// The network that `--net` and `--publish` ask for.
///
/// # Errors
///
/// Ports are to be published of a machine that has no network for it.
pub(crate) fn network(net: &NetOption, publish: &[Publish]) -> Result<Option<Network>, Failure> {
    if *net != NetOption::User && !publish.is_empty() {
        let message = "--publish needs --net user";
        return Err(Failure::new(Kind::BadInput, message));
    }
    Ok(match net {
        NetOption::None => None,
        NetOption::User => Some(Network::User(publish.to_vec())),
        NetOption::Tap(name) => Some(Network::Tap(name.clone())),
    })
}

/// Parses a time in seconds, such as `60` or `0.5`, to nanoseconds.
pub(crate) fn parse_seconds(text: &str) -> Result<Nanos, String> {
    let bad = || format!("{text:?}: expected seconds, such as 60 or 0.5");
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(part) || part.len() > 9 {
        return Err(bad());
    }
    let nanos: u64 = format!("{part:0<9}").parse().map_err(|_| bad())?;
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    let whole = whole.checked_mul(1_000_000_000);
    let sum = whole.and_then(|whole| whole.checked_add(nanos));
    sum.ok_or_else(bad)
}

/// Parses the value of `--net`.
pub(crate) fn parse_net(text: &str) -> Result<NetOption, String> {
    match text.split_once('=') {
        None if text == "none" => Ok(NetOption::None),
        None if text == "user" => Ok(NetOption::User),
        Some(("tap", name)) if is_tap_name(name) => Ok(NetOption::Tap(name.into())),
        _ => Err(format!("{text:?}: expected none, user or tap=NAME")),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_network_is_none_user_or_a_tap_device() {
        for (text, net) in [
            ("none", NetOption::None),
            ("user", NetOption::User),
            ("tap=hs0", NetOption::Tap("hs0".into())),
        ] {
            assert_eq!(parse_net(text), Ok(net.clone()));
            assert_eq!(net.to_string(), text);
        }
        for bad in [
            "",
            "tap",
            "tap=",
            "user=1",
            "tap=a/b",
            "tap=0123456789abcdef",
            "tap=..",
        ] {
            assert!(parse_net(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn disks_are_named_with_what_is_to_be_said_of_them() {
        let wish = parse_disk("a,,b.img,ro,serial=xyz").unwrap().wish;
        assert_eq!(wish.path, Path::new("a,b.img"));
        assert!(wish.read_only && wish.serial == "xyz");
        for bad in ["", ",ro", "a,rw", "a,serial=123456789012345678901"] {
            assert!(parse_disk(bad).is_err(), "{bad}");
        }
    }
}
