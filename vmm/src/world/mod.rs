//! The live world: the host's clock, its standard input, the network, and the operator.
//!
//! Each source of input has a place of its own, so that none waits behind another: `typed` bytes, the
//! network's frames, the `operator`'s wishes. All wake the machine by one `bell`.

mod bell;
mod clock;
mod marks;
pub mod net;
mod operator;
mod standard_output;
mod terminal;
mod typed;

use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hindsight_devices::{Input, Nanos, Room};
use hindsight_replay::{Complete, OperatorConsole, World};

use crate::kvm::{Alarm, Kicker};
use bell::Bell;
use clock::HostClock;
pub use marks::{HeardWish, MarkAsker, MarkWish};
use net::{Attached, Link, NetError};
pub use operator::Operator;
pub use standard_output::{Hold, Shown, StandardOutput};
pub(crate) use terminal::RawTerminal;
use typed::Typed;

/// How often at least somebody looks at the clock, and the vCPU is brought back to see whether it has waited for
/// something for too long.
const TICK: Duration = Duration::from_millis(100);
/// A guest that has not exited for this long after a stop was asked for is stopped where it is.
const STOP_WAIT: Duration = Duration::from_millis(500);

/// The host, as the machine's world.
#[derive(Debug)]
pub struct HostWorld {
    clock: Arc<HostClock>,
    operator: Arc<Operator>,
    typed: Arc<Typed>,
    /// Which of the guest's consoles is the operator's.
    console: OperatorConsole,
    wall_clock: Option<u64>,
    /// When this machine was switched on.
    begun: Instant,
    stop_given: bool,
    /// The machine was stopped for its recording to end, and is to run on.
    left: bool,
    /// Where random bytes come from.
    random: File,
    /// Why the world cannot go on, if it cannot: the machine is stopped then.
    failure: Option<String>,
    network: Option<Attached>,
    alarm: Alarm,
    /// When the alarm goes off, unless it has; and how much of the host's time the clock had left out when
    /// it was set, which it goes off too early by since.
    alarm_at: Option<(Nanos, Nanos)>,
    /// The last exit of which all is done.
    complete: Complete,
}

impl HostWorld {
    /// The world from now on, for a vCPU on this thread, which must be the main one. Reads standard
    /// input, which goes to `console`. The machine's network is at the end of `link`.
    pub fn start(
        operator: Arc<Operator>,
        link: Option<Link>,
        console: OperatorConsole,
    ) -> Result<HostWorld, NetError> {
        let bell = operator.bell().clone();
        bell.kicks(Kicker::for_this_thread()?);
        let clock = Arc::new(HostClock::new());
        let (ticks, rings) = (Arc::clone(&clock), bell.clone());
        let thread = std::thread::Builder::new().name("tick".into());
        thread.spawn(move || tick(&ticks, &rings))?;
        let typed = Typed::read_stdin(bell, Arc::clone(&operator))?;
        let mut world = HostWorld {
            clock,
            operator,
            typed,
            console,
            wall_clock: None,
            begun: Instant::now(),
            stop_given: false,
            left: false,
            random: File::open("/dev/urandom")?,
            failure: None,
            network: None,
            alarm: Alarm::for_this_thread()?,
            alarm_at: None,
            complete: Complete::default(),
        };
        let bell = world.operator.bell().clone();
        world.network = link.map(|link| Attached::new(link, bell)).transpose()?;
        world.begin();
        Ok(world)
    }

    /// The same world without kicks and network, until there is another machine.
    pub fn rest(mut self) -> HostWorld {
        self.operator.bell().set_runs(false);
        if let Some(network) = &mut self.network {
            network.take_down();
        }
        self
    }

    /// The world from now on again, for another machine, which is at power-on.
    pub fn restart(mut self) -> Result<HostWorld, NetError> {
        if let Some(network) = &mut self.network {
            network.put_up()?;
        }
        self.begin_at(Complete::default());
        Ok(self)
    }

    /// The world from now on again, for another machine, which has come to `complete` and is at the end of `link`:
    /// guest time goes on from there.
    pub fn go_on(mut self, complete: Complete, link: Option<Link>) -> Result<HostWorld, NetError> {
        let bell = self.operator.bell().clone();
        self.network = link.map(|link| Attached::new(link, bell)).transpose()?;
        self.begin_at(complete);
        Ok(self)
    }

    /// What a machine begins with that has come to `complete`. One that was switched on before has been told the
    /// wall-clock time, and counts on from that.
    fn begin_at(&mut self, complete: Complete) {
        self.begin();
        if complete.exits > 0 {
            self.wall_clock = None;
        }
        // Last of all: what goes before is no time to the guest.
        self.clock.restart(complete.now);
    }

    /// What a new machine begins with.
    fn begin(&mut self) {
        self.begun = Instant::now();
        self.wall_clock = Some(wall_clock());
        self.operator.begin(self.console == OperatorConsole::Virtio);
        self.alarm_at = None;
        self.operator.bell().set_runs(true);
    }

    /// What lets a console hold the machine back.
    pub fn hold(&self) -> Hold {
        Hold::new(Arc::clone(&self.clock), Arc::clone(&self.operator))
    }

    /// The world cannot go on: the machine is to be stopped as if the operator had asked for it.
    fn fail(&mut self, why: String) {
        self.failure = self.failure.take().or(Some(why));
        self.operator.stop();
    }

    /// Whether the machine was stopped for its recording to end, and for nothing else, so that it is to run on.
    pub fn is_left(&self) -> bool {
        self.left && !self.stop_given
    }

    /// The machine runs on unrecorded.
    pub(crate) fn run_on(&self) {
        self.clock.go_on();
    }

    /// Why the world could not go on.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// A network that is lost ends the world.
    fn look_at_link(&mut self) {
        if self.failure.is_none()
            && let Some(why) = self.network.as_mut().and_then(Attached::post_mortem)
        {
            self.fail(why);
        }
    }

    fn sleep_until(&mut self, until: Option<Nanos>, room: &Room) -> bool {
        loop {
            // Whoever wants a mark wakes the thread, and not the machine.
            self.operator.pass(self.complete);
            self.look_at_link();
            if self.has_input(room) {
                return true;
            }
            let most = match until {
                Some(until) => match until.saturating_sub(self.clock.now()) {
                    0 => return true,
                    left_ns => Some(Duration::from_nanos(left_ns)),
                },
                None if !self.typed.is_open()
                    && self.network.is_none()
                    && (self.room_to_type(room) == 0 || self.typed.count() == 0) =>
                {
                    return false;
                }
                None => None,
            };
            self.operator.bell().wait(most);
        }
    }

    /// An alarm that went off while nobody was there to be kicked.
    fn forget_past_alarm(&mut self) {
        let now = self.clock.now();
        self.alarm_at = self.alarm_at.filter(|(at, _)| *at > now);
    }

    /// The next input that the machine has room for.
    fn next_input(&mut self, room: &Room) -> Option<Input> {
        if let Some(unix_seconds) = self.wall_clock.take() {
            return Some(Input::WallClock { unix_seconds });
        }
        self.look_at_link();
        if self.operator.stop_asked().is_some() && !self.stop_given {
            self.stop_given = true;
            return Some(Input::Stop);
        }
        if self.operator.take_leave() {
            // What it takes to close the recording is no time to the guest.
            self.clock.hold();
            self.left = true;
            return Some(Input::Stop);
        }
        if self.operator.take_press() {
            return Some(Input::PowerButton);
        }
        if let Some((columns, rows)) = self.operator.take_size() {
            return Some(Input::Resize { columns, rows });
        }
        let most = self.room_to_type(room);
        if most > 0 && self.typed.count() > 0 {
            let bytes = self.typed.take(most);
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

    fn has_input(&self, room: &Room) -> bool {
        let stops = self.operator.stop_asked().is_some() && !self.stop_given;
        let types = self.room_to_type(room) > 0 && self.typed.count() > 0;
        let network = self.network.as_ref().filter(|_| room.frames > 0);
        let receives = network.is_some_and(Attached::waits);
        stops || self.operator.wants() || types || receives || room.entropy > 0
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
        self.clock.now()
    }

    fn poll(&mut self, room: &Room) -> Option<Input> {
        // The common case is a look at some flags.
        self.operator.bell().looks();
        let input = self.next_input(room)?;
        // More may be there than the loop takes at this exit.
        self.operator.bell().ring();
        Some(input)
    }

    fn sleep(&mut self, until: Option<Nanos>, room: &Room) -> bool {
        self.operator.bell().set_runs(false);
        let woken = self.sleep_until(until, room);
        self.operator.bell().set_runs(true);
        self.forget_past_alarm();
        woken
    }

    fn pass(&mut self, complete: Complete) {
        self.complete = complete;
        self.operator.pass(complete);
    }

    fn send(&mut self, frame: &[u8]) {
        if let Some(network) = &mut self.network {
            network.send(frame);
        }
    }

    fn alarm(&mut self, at: Option<Nanos>) {
        // An alarm that goes off too early costs a kick; to set it back at each exit would cost more.
        let Some(at) = at else {
            return;
        };
        let left_out_ns = self.clock.left_out();
        if self
            .alarm_at
            .is_some_and(|(set, then_ns)| set <= at && then_ns == left_out_ns)
        {
            return;
        }
        let left_ns = at.saturating_sub(self.clock.now()).max(1);
        self.alarm.set(Duration::from_nanos(left_ns));
        self.alarm_at = Some((at, left_out_ns));
    }

    fn input_waits(&mut self, room: &Room) -> bool {
        self.look_at_link();
        self.has_input(room)
    }

    fn gives_up(&mut self) -> bool {
        self.forget_past_alarm();
        // A wish that is older than the machine gives it a chance to exit, too.
        let asked = self.operator.stop_asked();
        asked.is_some_and(|asked| asked.max(self.begun).elapsed() > STOP_WAIT)
    }
}

/// The host's wall clock, in seconds since 1970.
fn wall_clock() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Brings the vCPU back for whatever is overdue, and now and then in any case.
fn tick(clock: &HostClock, bell: &Bell) {
    loop {
        bell.wait_until_overdue(TICK);
        clock.now();
        bell.kick();
    }
}
