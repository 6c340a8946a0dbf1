//! The live world: the host's clock, its standard input, and the operator.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{IsTerminal, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hindsight_devices::{Input, Nanos, Room};
use hindsight_replay::{OperatorConsole, World};
use vmm_sys_util::terminal::Terminal;

use crate::kvm::{Alarm, Kicker, stop_requested, take_power_button_presses};
use crate::net::{Attached, Link, NetError, Waker};

/// Ctrl-], as in telnet and virsh: leaves the guest's console.
pub const ESCAPE: u8 = 0x1d;
/// How often the vCPU is brought back to see whether the operator wants something.
const TICK: Duration = Duration::from_millis(100);
/// A guest that has not exited for this long after a stop was asked for is stopped where it is.
const PATIENCE: Duration = Duration::from_secs(1);

/// What other threads have to say.
enum News {
    Typed(Vec<u8>),
    /// The terminal has this size.
    Resized {
        columns: u16,
        rows: u16,
    },
    EndOfInput,
    Stop,
    PowerButton,
    /// Frames are there.
    Frames,
    LinkLost(String),
}

/// Wakes the world for the network.
#[derive(Clone, Debug)]
struct NetWaker {
    kicker: Kicker,
    /// Whether there is a vCPU to be kicked.
    kicks: Arc<AtomicBool>,
    news: Sender<News>,
}

impl Waker for NetWaker {
    fn frames_came(&self) {
        // A world that is gone needs nothing more.
        let _ = self.news.send(News::Frames);
    }

    fn kick(&self) {
        if self.kicks.load(Ordering::Relaxed) {
            self.kicker.kick();
        }
    }

    fn link_lost(&self, seen: String) {
        let _ = self.news.send(News::LinkLost(seen));
    }
}

/// The host, as the machine's world.
#[derive(Debug)]
pub struct HostWorld {
    start: Instant,
    news: Receiver<News>,
    /// Which of the guest's consoles is the operator's.
    console: OperatorConsole,
    typed: VecDeque<u8>,
    /// The size of the operator's terminal, if the guest has not been told.
    size: Option<(u16, u16)>,
    wall_clock: Option<u64>,
    input_is_open: bool,
    stop_asked: Option<Instant>,
    stop_given: bool,
    /// Where random bytes come from.
    random: File,
    /// Why the world cannot go on, if it cannot: the machine is stopped then.
    failure: Option<String>,
    /// How often the power button was pressed and the guest was not told.
    presses: u32,
    network: Option<Attached>,
    waker: NetWaker,
    alarm: Alarm,
    /// When the alarm goes off, unless it has.
    alarm_at: Option<Nanos>,
}

impl std::fmt::Debug for News {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            News::Typed(_) => "Typed",
            News::Resized { .. } => "Resized",
            News::EndOfInput => "EndOfInput",
            News::Stop => "Stop",
            News::PowerButton => "PowerButton",
            News::Frames => "Frames",
            News::LinkLost(_) => "LinkLost",
        })
    }
}

impl HostWorld {
    /// The world from now on, for a vCPU on this thread, which must be the main one. Reads standard
    /// input, which goes to `console`, and watches for SIGINT, SIGTERM and SIGPWR. The machine's network
    /// is at the end of `link`.
    pub fn start(link: Option<Link>, console: OperatorConsole) -> Result<HostWorld, NetError> {
        let kicker = Kicker::for_this_thread()?;
        let alarm = Alarm::for_this_thread()?;
        let (sender, news) = channel();
        let ticks = sender.clone();
        let kicks = Arc::new(AtomicBool::new(true));
        let waker = NetWaker {
            kicker,
            kicks,
            news: sender.clone(),
        };
        let theirs = Arc::clone(&waker.kicks);
        let watches_size = console == OperatorConsole::Virtio;
        std::thread::spawn(move || tick(kicker, &theirs, &ticks, watches_size));
        std::thread::spawn(move || read_input(&sender));
        let network = link.map(|link| Attached::new(link, &waker)).transpose()?;
        Ok(HostWorld {
            start: Instant::now(),
            news,
            console,
            typed: VecDeque::new(),
            size: terminal_size().filter(|_| watches_size),
            wall_clock: Some(wall_clock()),
            input_is_open: true,
            stop_asked: None,
            stop_given: false,
            random: File::open("/dev/urandom")?,
            failure: None,
            presses: 0,
            network,
            waker,
            alarm,
            alarm_at: None,
        })
    }

    /// The same world without kicks and network, until there is another machine.
    pub fn rest(mut self) -> HostWorld {
        self.waker.kicks.store(false, Ordering::Relaxed);
        if let Some(network) = &mut self.network {
            network.take_down();
        }
        self
    }

    /// The world from now on again, for another machine.
    pub fn restart(mut self) -> Result<HostWorld, NetError> {
        if let Some(network) = &mut self.network {
            network.put_up(&self.waker)?;
        }
        self.start = Instant::now();
        self.wall_clock = Some(wall_clock());
        self.size = terminal_size().filter(|_| self.console == OperatorConsole::Virtio);
        self.alarm_at = None;
        self.presses = 0;
        self.waker.kicks.store(true, Ordering::Relaxed);
        Ok(self)
    }

    /// The world cannot go on: the machine is to be stopped as if the operator had asked for it.
    fn fail(&mut self, why: String) {
        self.failure = self.failure.take().or(Some(why));
        self.stop_asked = self.stop_asked.or(Some(Instant::now()));
    }

    /// Why the world could not go on.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    fn take(&mut self, news: News) {
        match news {
            News::Typed(bytes) => self.typed.extend(bytes),
            News::Resized { columns, rows } => self.size = Some((columns, rows)),
            News::EndOfInput => self.input_is_open = false,
            News::Stop => self.stop_asked = self.stop_asked.or(Some(Instant::now())),
            News::PowerButton => self.presses += 1,
            // They are looked for where they wait.
            News::Frames => {}
            News::LinkLost(seen) => {
                let network = self.network.as_mut();
                let network = network.expect("only a network that there is says this");
                let why = network.post_mortem(&seen);
                self.fail(why);
            }
        }
    }

    fn sleep_until(&mut self, until: Option<Nanos>, room: &Room) -> bool {
        while !self.input_waits(room) {
            let now = self.now();
            let news = match until {
                Some(until) if until <= now => return true,
                Some(until) => self.news.recv_timeout(Duration::from_nanos(until - now)),
                None if !self.input_is_open
                    && self.network.is_none()
                    && (self.room_to_type(room) == 0 || self.typed.is_empty()) =>
                {
                    return false;
                }
                None => self.news.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match news {
                Ok(news) => self.take(news),
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return until.is_some(),
            }
        }
        true
    }

    /// An alarm that went off while nobody was there to be kicked.
    fn forget_past_alarm(&mut self) {
        let now = self.now();
        self.alarm_at = self.alarm_at.filter(|at| *at > now);
    }

    fn input_waits(&self, room: &Room) -> bool {
        let stops = self.stop_asked.is_some() && !self.stop_given;
        let types = self.room_to_type(room) > 0 && !self.typed.is_empty();
        let network = self.network.as_ref().filter(|_| room.frames > 0);
        let receives = network.is_some_and(Attached::waits);
        stops || self.presses > 0 || types || receives || room.entropy > 0
    }

    /// How many typed bytes the operator's console has room for.
    fn room_to_type(&self, room: &Room) -> usize {
        match self.console {
            OperatorConsole::Serial => room.console,
            OperatorConsole::Virtio => room.virtio_console,
        }
    }
}

impl World for HostWorld {
    fn now(&mut self) -> Nanos {
        u64::try_from(self.start.elapsed().as_nanos()).expect("584 years have not passed")
    }

    fn poll(&mut self, room: &Room) -> Option<Input> {
        if let Some(unix_seconds) = self.wall_clock.take() {
            return Some(Input::WallClock { unix_seconds });
        }
        // The common case is one look at an empty channel.
        match self.news.try_recv() {
            Ok(news) => self.take(news),
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => {}
        }
        if self.stop_asked.is_some() && !self.stop_given {
            self.stop_given = true;
            return Some(Input::Stop);
        }
        if self.presses > 0 {
            self.presses -= 1;
            return Some(Input::PowerButton);
        }
        if let Some((columns, rows)) = self.size.take() {
            return Some(Input::Resize { columns, rows });
        }
        let count = self.typed.len().min(self.room_to_type(room));
        if count > 0 {
            let bytes = self.typed.drain(..count).collect();
            return Some(match self.console {
                OperatorConsole::Serial => Input::Console(bytes),
                OperatorConsole::Virtio => Input::VirtioConsole(bytes),
            });
        }
        if let Some(network) = self.network.as_ref().filter(|_| room.frames > 0)
            && let Some(frame) = network.receive()
        {
            return Some(Input::Frame(frame));
        }
        if room.entropy > 0 {
            let mut bytes = vec![0; room.entropy];
            match self.random.read_exact(&mut bytes) {
                Ok(()) => return Some(Input::Entropy(bytes)),
                Err(error) => self.fail(format!("cannot read random bytes: {error}")),
            }
        }
        None
    }

    fn sleep(&mut self, until: Option<Nanos>, room: &Room) -> bool {
        let network = |asleep, network: &Option<Attached>| {
            if let Some(network) = network {
                network.set_asleep(asleep);
            }
        };
        network(true, &self.network);
        let woken = self.sleep_until(until, room);
        network(false, &self.network);
        self.forget_past_alarm();
        woken
    }

    fn send(&mut self, frame: &[u8]) {
        if let Some(network) = &mut self.network {
            network.send(frame);
        }
    }

    fn alarm(&mut self, at: Option<Nanos>) {
        // An alarm that goes off too early costs a kick; to set it back at each exit would cost more.
        let Some(at) = at.filter(|at| self.alarm_at.is_none_or(|set| *at < set)) else {
            return;
        };
        let now = self.now();
        self.alarm
            .set(Duration::from_nanos(at.saturating_sub(now).max(1)));
        self.alarm_at = Some(at);
    }

    fn input_waits(&mut self, room: &Room) -> bool {
        HostWorld::input_waits(self, room)
    }

    fn gives_up(&mut self) -> bool {
        self.forget_past_alarm();
        while let Ok(news) = self.news.try_recv() {
            self.take(news);
        }
        self.stop_asked
            .is_some_and(|asked| asked.elapsed() > PATIENCE)
    }
}

/// The host's wall clock, in seconds since 1970.
fn wall_clock() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Columns and rows of the terminal on standard output, if there is one.
fn terminal_size() -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    Some((size.ws_col, size.ws_row))
}

fn tick(kicker: Kicker, kicks: &AtomicBool, news: &Sender<News>, watches_size: bool) {
    let mut told = false;
    let mut size = terminal_size();
    loop {
        std::thread::sleep(TICK);
        if stop_requested() && !told {
            told = true;
            if news.send(News::Stop).is_err() {
                return;
            }
        }
        if watches_size && terminal_size() != size {
            size = terminal_size();
            if let Some((columns, rows)) = size
                && news.send(News::Resized { columns, rows }).is_err()
            {
                return;
            }
        }
        for _ in 0..take_power_button_presses() {
            if news.send(News::PowerButton).is_err() {
                return;
            }
        }
        if kicks.load(Ordering::Relaxed) {
            kicker.kick();
        }
    }
}

fn read_input(news: &Sender<News>) {
    let terminal = std::io::stdin().is_terminal();
    // A descriptor of our own: std's lock, held through a blocking read, would keep whoever wants to
    // set the terminal back waiting for a key.
    let Ok(mut input) = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map(File::from)
    else {
        let _ = news.send(News::EndOfInput);
        return;
    };
    let mut buffer = [0; 4096];
    loop {
        let mut typed = match input.read(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => {
                let _ = news.send(News::EndOfInput);
                return;
            }
            Ok(count) => &buffer[..count],
        };
        let escape = typed.iter().position(|byte| terminal && *byte == ESCAPE);
        if let Some(escape) = escape {
            typed = &typed[..escape];
        }
        let sent = news.send(News::Typed(typed.to_vec()));
        if sent.is_err() || (escape.is_some() && news.send(News::Stop).is_err()) {
            return;
        }
    }
}

/// Puts a terminal on standard input into raw mode, and back when dropped.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// `None` if standard input is no terminal.
    pub fn enter() -> Option<RawTerminal> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        stdin.lock().set_raw_mode().ok().map(|()| RawTerminal(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing better can be done about a terminal that is gone.
        let _ = std::io::stdin().lock().set_canon_mode();
    }
}
