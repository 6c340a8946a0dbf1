//! Debian's kernel, stopped at kernel entries that nobody could have foreseen, and replayed.
//!
//! The machine, the recorder and the replayer are those of the product; the vCPU is too, but for a
//! wrapper that stops it at counted entries, drawn at random while recording, and while replaying
//! at those that were drawn then. A stop counts as an exit, so an interrupt may land behind it, and
//! registers and memory are compared there.
//!
//! Needs a KVM that can record, and what the environment says (see [`hindsight_tests::debian`]);
//! `HINDSIGHT_GUEST` names another image than `entries`.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use hindsight::kvm::{Kicker, KvmCpu, KvmError};
use hindsight::machine::{LoadedKernel, build, cmdline, describe, host_facts, open_kvm};
use hindsight_devices::{Input, Nanos};
use hindsight_replay::{
    Answer, Back, Cpu, Detail, End, Exit, Header, JournalReader, Live, Observer, Recorder,
    Registers, Replayer, World,
};
use hindsight_tests::debian::Debian;
use hindsight_tests::rng::Rng;

const MEMORY_BYTES: u64 = 256 << 20;
/// How often all of memory is compared, in exits.
const MEMORY_EVERY: u64 = 5_000;
/// How many system calls the guest makes, three times over.
const GUEST_WORDS: &str = "-- 3000";

/// A stop: how many exits the vCPU had made, and which entry behind them it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stop {
    exits: u64,
    number: u64,
    rip: u64,
}

/// Where to stop.
#[derive(Debug)]
enum Plan {
    /// At entries of our choice.
    Choose(Rng),
    /// Where it was done before.
    Follow(VecDeque<Stop>),
}

/// A vCPU that stops at kernel entries. A stop looks like PAUSE, which changes nothing either.
#[derive(Debug)]
struct Stopping {
    cpu: KvmCpu,
    plan: Plan,
    stops: Vec<Stop>,
    exits: u64,
    armed: bool,
    entries: u64,
    kicks: u64,
}

impl Stopping {
    fn new(cpu: KvmCpu, plan: Plan) -> Stopping {
        Stopping {
            cpu,
            plan,
            stops: Vec::new(),
            exits: 0,
            armed: false,
            entries: 0,
            kicks: 0,
        }
    }

    fn arm(&mut self) {
        let mut entries = self.cpu.entries();
        if self.armed || !entries.available() {
            return;
        }
        let target = match &mut self.plan {
            Plan::Choose(rng) => {
                let far = if rng.one_in(3) { 100 } else { 4 };
                rng.one_in(2).then(|| entries.done() + 1 + rng.below(far))
            }
            Plan::Follow(stops) => stops
                .front()
                .filter(|stop| stop.exits == self.exits)
                .map(|stop| stop.number),
        };
        if let Some(target) = target {
            entries.set_target(target);
            self.armed = true;
        }
    }

    fn turn(&mut self) {
        self.exits += 1;
        self.armed = false;
        let mut entries = self.cpu.entries();
        self.entries += entries.done();
        entries.turn();
        assert_eq!(entries.done(), 0);
    }
}

impl Cpu for Stopping {
    type Error = KvmError;

    fn run(&mut self) -> Result<Back, KvmError> {
        self.arm();
        let back = self.cpu.run()?;
        match back {
            Back::Exit(_) => self.turn(),
            Back::Window => {}
            Back::Kicked => {
                let Some(stop) = self.cpu.entries().take_stop() else {
                    self.kicks += 1;
                    return Ok(Back::Kicked);
                };
                let stop = Stop {
                    exits: self.exits,
                    number: stop.number,
                    rip: stop.rip,
                };
                if let Plan::Follow(stops) = &mut self.plan {
                    assert_eq!(
                        stops.pop_front(),
                        Some(stop),
                        "after {:?}",
                        self.stops.last()
                    );
                }
                self.stops.push(stop);
                self.turn();
                return Ok(Back::Exit(Exit::Pause));
            }
        }
        Ok(back)
    }

    fn registers(&mut self) -> Registers {
        self.cpu.registers()
    }

    fn answer(&mut self, exit: &Exit, answer: &Answer) -> Result<(), KvmError> {
        self.cpu.answer(exit, answer)
    }

    fn settle(&mut self) -> Result<bool, KvmError> {
        self.cpu.settle()
    }

    fn interrupt(&mut self, vector: u8) -> Result<(), KvmError> {
        self.cpu.interrupt(vector)
    }

    fn request_window(&mut self, wanted: bool) {
        self.cpu.request_window(wanted);
    }

    fn memory_digest(&mut self) -> Result<u64, KvmError> {
        self.cpu.memory_digest()
    }
}

/// The host's clock, and nobody at the console.
#[derive(Debug)]
struct Clock {
    start: Instant,
    set: bool,
}

impl World for Clock {
    fn now(&mut self) -> Nanos {
        self.start.elapsed().as_nanos() as Nanos
    }

    fn poll(&mut self, _room: usize) -> Option<Input> {
        let unix_seconds = 1_700_000_000;
        (!std::mem::replace(&mut self.set, true)).then_some(Input::WallClock { unix_seconds })
    }

    fn sleep(&mut self, until: Option<Nanos>, _room: usize) -> bool {
        let now = self.now();
        until.is_some_and(|until| {
            std::thread::sleep(Duration::from_nanos(until.saturating_sub(now)));
            true
        })
    }

    fn gives_up(&mut self) -> bool {
        false
    }
}

/// Keeps what the guest prints.
#[derive(Debug, Default)]
struct Console(Vec<u8>);

impl Observer for Console {
    fn output(&mut self, _exits: u64, _now: Nanos, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
}

#[test]
#[ignore = "needs a KVM that can record"]
fn debian_is_stopped_at_any_kernel_entry_and_replays() {
    let debian = Debian::from_env();
    let guest = std::env::var("HINDSIGHT_GUEST").unwrap_or_else(|_| "entries".into());
    let image = std::fs::read(debian.kernel()).expect("the kernel is there");
    let initrd = std::fs::read(debian.image(&guest)).expect("the guest is built");
    let kernel = LoadedKernel::open(&image).expect("a kernel");
    let (kvm, holes) = open_kvm().expect("a KVM that can record");
    let machine = describe(
        &kvm,
        &kernel,
        &initrd,
        cmdline(GUEST_WORDS, false),
        MEMORY_BYTES,
    );
    let header = Header {
        detail: Detail::Full,
        machine: machine.expect("a machine"),
        host: host_facts(holes),
    };

    let mut journal = Vec::new();
    let clock = Clock {
        start: Instant::now(),
        set: false,
    };
    let live = Live::new(clock, Some(MEMORY_EVERY));
    let mut recorder = Recorder::create(live, &mut journal, &header).expect("a journal");
    let built = || build(&kvm, &header.machine, &kernel, &initrd).expect("a machine");
    let ((cpu, mut machine), again) = (built(), built());
    // Only now: a kick would interrupt the making of a VM.
    let kicker = Kicker::for_this_thread().expect("signals");
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(2));
            kicker.kick();
        }
    });
    let mut recorded = Stopping::new(cpu, Plan::Choose(Rng::new(1, 7)));
    let mut console = Console::default();
    let end: End = machine
        .run(&mut recorded, &mut recorder, &mut console)
        .expect("the guest ends");
    drop(recorder);
    let text = String::from_utf8_lossy(&console.0);
    let hooked = recorded.cpu.counts().entry_points;
    eprintln!(
        "{text}{end:?}\n{hooked} entry points, {} exits, {} stops, {} entries, {} kicks, {:?}",
        recorded.exits,
        recorded.stops.len(),
        recorded.entries,
        recorded.kicks,
        machine.tally(),
    );
    assert!(text.contains("Run /init"), "{text}");
    assert_eq!(end.panic, None);
    assert!(hooked >= 10 && recorded.stops.len() > 100 && recorded.entries > 1_000);

    let reader = JournalReader::open(&journal[..]).expect("a whole journal opens");
    let (cpu, mut machine) = again;
    let mut replayed = Stopping::new(cpu, Plan::Follow(recorded.stops.iter().copied().collect()));
    let mut replayer = Replayer::new(reader, None, None);
    let again = machine
        .run(&mut replayed, &mut replayer, &mut ())
        .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(again, end);
    assert_eq!(replayed.stops, recorded.stops);
    assert_eq!(replayed.entries, recorded.entries);
    assert!(replayer.memories_checked() > 0);
}
