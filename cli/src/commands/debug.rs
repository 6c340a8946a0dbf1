//! `hindsight debug`.

use std::ffi::OsString;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use hindsight_replay::When;
use hindsight_replay::foreign::shown_path;
use hindsight_vmm::failure::{Failure, Kind};
use hindsight_vmm::output_file::Plan;
use hindsight_vmm::session::{DebugWish, Recording, kernel_symbols};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::gdb::{Guest, Peer, serve};
use crate::options::{CounterOptions, InsteadOptions};
use crate::outcome::Outcome;
use crate::tell::tell;

/// From one look at whether gdb has come to the next.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// What gdb is told before it connects. A recording is no program, so there is nothing to kill.
const INIT: &str = "\
set architecture i386:x86-64
set confirm off
set remotetimeout 100000
set pagination off
set sysroot target:
define seek
  monitor seek $arg0
  maintenance flush register-cache
end
document seek
Go to a moment of the recording: seek EXIT, seek 12.5s, seek crash, seek end, seek console:TEXT, seek crash-100.
end
define guest-program
  monitor program
  source SCRIPT
  maintenance flush register-cache
end
document guest-program
Load the symbols of the program that the guest's processor runs here, from the guest's own files.
end
define end-diversion
  monitor diversion end
  maintenance flush register-cache
end
document end-diversion
Throw away what came of what was written: the guest is again where the diversion began.
end
define when
  monitor when
end
document when
Tell where the guest is.
end
";

/// Options of `debug`.
#[derive(Debug, Args)]
#[command(after_help = "\
Without --listen gdb is started. In it, `seek MOMENT` goes to a moment, and reverse-stepi, reverse-continue and the like go
back; `monitor help` lists what else there is. What is written (set var, print f(1)) begins a diversion off the recording,
which is thrown away by whatever goes back, and by `end-diversion`. Watchpoints are as many as the guest's CPU has debug
registers, four at most.
docs/time-travel.md says what works on which hosts.")]
pub(crate) struct Options {
    /// The recording.
    recording: PathBuf,
    /// Begin at this moment, instead of where the recording begins.
    ///
    /// An exit number, a guest time such as 12.5s, `crash`, `console:TEXT`, or a mark; +N or -N after it is N exits later or
    /// earlier.
    #[arg(long, value_name = "MOMENT")]
    at: Option<When>,
    /// Start no gdb, but wait for one at a socket of this host: unix:PATH, or :PORT of 127.0.0.1.
    #[arg(long, value_name = "unix:PATH|:PORT")]
    listen: Option<Listen>,
    /// Give gdb this file: the guest's kernel with symbols. Without it, gdb gets those that the kernel has of itself.
    #[arg(long, value_name = "FILE", conflicts_with = "listen")]
    vmlinux: Option<PathBuf>,
    /// Write the symbols that the kernel has of itself to an ELF file, for a debugger, and end.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["listen", "at", "vmlinux"])]
    write_symbols: Option<PathBuf>,
    /// Replace the file.
    #[arg(long, requires = "write_symbols")]
    force: bool,
    #[command(flatten)]
    instead: InsteadOptions,
    #[command(flatten)]
    counter: CounterOptions,
    /// More arguments for gdb.
    #[arg(last = true, conflicts_with = "listen")]
    gdb: Vec<OsString>,
}

/// Where a gdb is waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Listen {
    Unix(PathBuf),
    Port(u16),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Listen, String> {
        let port = |port: &str| port.parse().ok().filter(|port| *port != 0);
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Listen::Unix(path.into()));
        }
        let port = text.strip_prefix(':').and_then(port);
        port.map(Listen::Port)
            .ok_or_else(|| "expected unix:PATH, or :PORT with a number".into())
    }
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    let wish = DebugWish {
        recording: options.recording.clone(),
        instead: options.instead.paths(),
        counter: options.counter.wish(),
        at: options.at.clone(),
    };
    if let Some(output) = &options.write_symbols {
        write_symbols(&wish, output, options.force)?;
        return Ok(Outcome::Good);
    }
    let guest = Guest::open(&wish)?;
    if let Some(lacks) = guest.lacks() {
        tell!("hindsight: {lacks}");
    }
    match &options.listen {
        Some(listen) => serve(guest, wait_at(listen)?, || false)?,
        None => with_gdb(guest, &wish, options)?,
    }
    Ok(Outcome::Good)
}

/// Writes the kernel's own symbols to a file.
fn write_symbols(wish: &DebugWish, output: &Path, force: bool) -> Result<(), Failure> {
    let recording = Recording::at(&wish.recording);
    let symbols = kernel_symbols(&recording, &wish.instead)?;
    let symbols = symbols.ok_or_else(|| {
        let message = "the recorded kernel has no symbols of itself (CONFIG_KALLSYMS)";
        Failure::new(Kind::BadInput, message)
    })?;
    let mut kept = recording.kept();
    for (path, what) in wish.instead.named() {
        kept.keep(path, what);
    }
    let mut file = Plan::new(output, force, kept)?.begin()?;
    std::io::Write::write_all(&mut file, &symbols)?;
    Ok(file.finish()?)
}

/// Waits for a gdb.
fn wait_at(listen: &Listen) -> Result<Peer, Failure> {
    let (place, accepted) = match listen {
        Listen::Unix(path) => {
            let place = path.display().to_string();
            let listener = UnixListener::bind(path);
            (place, listener.map(Listening::Unix))
        }
        Listen::Port(port) => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, *port));
            (format!("localhost:{port}"), listener.map(Listening::Tcp))
        }
    };
    let failed = |error: std::io::Error| {
        let message = format!(
            "cannot listen at {}: {error}",
            shown_path(Path::new(&place))
        );
        Failure::new(Kind::BadInput, message)
    };
    let listening = accepted.map_err(failed)?;
    tell!(
        "waiting for gdb: set architecture i386:x86-64, set remotetimeout 100000, target remote {}",
        shown_path(Path::new(&place))
    );
    let peer = listening.accept().map_err(failed)?;
    if let Listen::Unix(path) = listen {
        // Nobody else is waited for.
        let _ = std::fs::remove_file(path);
    }
    Ok(peer)
}

enum Listening {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listening {
    fn accept(&self) -> std::io::Result<Peer> {
        match self {
            Listening::Unix(listener) => listener.accept().map(|(stream, _)| stream.into()),
            Listening::Tcp(listener) => listener.accept().map(|(stream, _)| stream.into()),
        }
    }
}

/// Starts a gdb and serves it.
fn with_gdb(mut guest: Guest, wish: &DebugWish, options: &Options) -> Result<(), Failure> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("gdb");
    let init = directory.path().join("init");
    let script = directory.path().join("program");
    std::fs::write(&init, INIT.replace("SCRIPT", &script.display().to_string()))?;
    guest.is_for_our_gdb(script);
    let listener = UnixListener::bind(&socket)?;
    listener.set_nonblocking(true)?;
    // Ctrl-C at the terminal is for gdb, which says so in its own words. A child has no signal blocked.
    let mut interrupt = SigSet::empty();
    interrupt.add(Signal::SIGINT);
    interrupt
        .thread_block()
        .map_err(|error| Failure::new(Kind::HostFailed, format!("sigprocmask: {error}")))?;
    // gdb waits for the answer to a `monitor`, and tells nobody of a Ctrl-C.
    let interrupts =
        SignalFd::with_flags(&interrupt, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC);
    let interrupts =
        interrupts.map_err(|error| Failure::new(Kind::HostFailed, format!("signalfd: {error}")))?;
    let mut command = Command::new("gdb");
    command.arg("-q").arg("-ix").arg(&init);
    if let Some(symbols) = symbols_for_gdb(wish, options, directory.path())? {
        command.arg("-ex");
        command.arg(format!("add-symbol-file \"{}\"", symbols.display()));
    }
    command.arg("-ex");
    command.arg(format!("target remote {}", socket.display()));
    command.args(&options.gdb);
    let mut gdb = command.spawn().map_err(|error| {
        let message = format!(
            "cannot start gdb: {error}; install it (Debian: apt install gdb), or connect one by --listen"
        );
        Failure::new(Kind::BadInput, message)
    })?;
    let served = match wait_for(&listener, &mut gdb)? {
        Some(peer) => serve(guest, peer, move || {
            matches!(interrupts.read_signal(), Ok(Some(_)))
        }),
        None => Ok(()),
    };
    gdb.wait()?;
    served
}

/// The file that gdb knows the kernel by. It is no program of gdb's: those are the guest's.
fn symbols_for_gdb(
    wish: &DebugWish,
    options: &Options,
    directory: &Path,
) -> Result<Option<PathBuf>, Failure> {
    if options.vmlinux.is_some() {
        return Ok(options.vmlinux.clone());
    }
    let symbols = kernel_symbols(&Recording::at(&wish.recording), &wish.instead)?;
    let Some(symbols) = symbols else {
        tell!(
            "hindsight: the recorded kernel has no symbols of itself; give its file by --vmlinux"
        );
        return Ok(None);
    };
    let path = directory.join("kernel");
    std::fs::write(&path, symbols)?;
    Ok(Some(path))
}

/// Waits until gdb connects; `None` if it ends before.
fn wait_for(listener: &UnixListener, gdb: &mut Child) -> Result<Option<Peer>, Failure> {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(Some(stream.into()));
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if gdb.try_wait()?.is_some() {
            return Ok(None);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_to_listen_at_is_a_socket_of_this_host() {
        assert_eq!(
            "unix:/x y".parse::<Listen>(),
            Ok(Listen::Unix("/x y".into()))
        );
        assert_eq!(":1234".parse::<Listen>(), Ok(Listen::Port(1234)));
        for wrong in ["", "unix:", ":", ":0", ":65536", "0.0.0.0:1234", "1234"] {
            assert!(wrong.parse::<Listen>().is_err(), "{wrong}");
        }
    }
}
