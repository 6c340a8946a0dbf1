//! Going back and forth in a recording of a real kernel, and comparing. Needs a KVM whose guests have debug registers.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use hindsight_replay::rng::Rng;
use hindsight_vmm::kvm::{Hit, Stops, WatchKind, Watchpoint};
use hindsight_vmm::session::{CounterWish, DebugWish, Debugger, RecordedPaths, Stopped};

use crate::measure::median;

/// Where a guest is: the last exit, and the general registers.
type Place = (u64, [u64; 18]);

/// Opens a recording to be debugged, at an exit.
pub fn open(recording: &Path, exit: u64) -> Debugger {
    let wish = DebugWish {
        recording: recording.into(),
        instead: RecordedPaths::default(),
        counter: CounterWish::default(),
        at: None,
    };
    let mut debugger = Debugger::open(&wish).expect("it can be debugged");
    seek(&mut debugger, exit);
    debugger
}

fn seek(debugger: &mut Debugger, exit: u64) {
    debugger.seek(exit, &mut || false).expect("it replays");
    assert!(debugger.is_at_exit(), "there is no exit {exit}");
}

fn place(debugger: &mut Debugger) -> Place {
    let registers = debugger.registers().expect("the host works").general;
    (debugger.exit(), registers.0)
}

/// Takes `steps` steps at random in both directions from an exit, and back to it. A step from a place always leads to the
/// same one, a step back to where a step leads here, and the state at the exit is what it was.
pub fn walk(debugger: &mut Debugger, exit: u64, steps: u64, seed: u64) {
    let mut rng = Rng::new(seed, 60);
    seek(debugger, exit);
    let state = debugger.state_digest().expect("it is at an exit");
    let mut next: BTreeMap<Place, Place> = BTreeMap::new();
    let mut here = place(debugger);
    for number in 0..steps {
        // A stretch in one direction is longer than what can be taken back without a search, now and then.
        let back = rng.one_in(2);
        let stopped = match back {
            true => debugger.reverse_step(&mut || false),
            false => debugger.step(&mut || false),
        };
        let stopped = stopped.unwrap_or_else(|error| panic!("step {number}: {error}"));
        assert!(matches!(stopped, Stopped::Hit(Hit::Step)), "{stopped:?}");
        let there = place(debugger);
        let (from, to) = match back {
            true => (there, here),
            false => (here, there),
        };
        let known = next.insert(from, to);
        assert!(
            known.is_none_or(|known| known == to),
            "step {number}, back: {back}: from {from:x?} to {to:x?}, before to {known:x?}"
        );
        here = there;
        if rng.one_in(16) {
            // What was stepped is forgotten.
            let exit = debugger.exit();
            seek(debugger, exit);
            here = place(debugger);
        }
    }
    seek(debugger, exit);
    assert_eq!(state, debugger.state_digest().expect("it is at an exit"));
}

/// Goes forwards to `count` writes of eight bytes, and back to each of them. Returns the exit before each, and the address
/// of the instruction after it.
pub fn watch(debugger: &mut Debugger, exit: u64, address: u64, count: usize) -> Vec<(u64, u64)> {
    let data = vec![Watchpoint {
        address,
        bytes: 8,
        kind: WatchKind::Write,
    }];
    let stops = Stops {
        data,
        ..Stops::default()
    };
    let value = |debugger: &mut Debugger| {
        let mut bytes = [0; 8];
        assert_eq!(debugger.read(address, &mut bytes), 8, "it is mapped");
        u64::from_le_bytes(bytes)
    };
    seek(debugger, exit);
    let mut writes = Vec::new();
    while writes.len() < count {
        match debugger.resume(&stops, &mut || false).expect("it replays") {
            Stopped::Hit(Hit::Data(_)) => writes.push((place(debugger), value(debugger))),
            other => panic!("{other:?}"),
        }
    }
    for (after, written) in writes.iter().rev() {
        let stopped = debugger.reverse_resume(&stops, &mut || false);
        let stopped = stopped.expect("it replays");
        assert!(matches!(stopped, Stopped::Hit(Hit::Data(_))), "{stopped:?}");
        assert_ne!(value(debugger), *written, "it is before the write");
        // On to after the write, as it was forwards, and back again.
        debugger.step(&mut || false).expect("it replays");
        assert_eq!((&place(debugger), value(debugger)), (after, *written));
        debugger.reverse_step(&mut || false).expect("it replays");
    }
    let places = writes.iter().map(|(place, _)| place);
    places
        .map(|(exit, registers)| (*exit, registers[16]))
        .collect()
}

/// How long things take, in milliseconds: the median, and the longest.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// Half of them took no longer.
    pub median: f64,
    /// None took longer.
    pub most: f64,
}

fn took(mut times: Vec<f64>) -> Took {
    times.sort_by(f64::total_cmp);
    Took {
        median: median(&times).unwrap_or_default(),
        most: times.last().copied().unwrap_or_default(),
    }
}

/// Takes `steps` steps back from an exit, none of which was taken forwards before: how long each takes.
pub fn time_steps_back(debugger: &mut Debugger, exit: u64, steps: u64) -> Took {
    seek(debugger, exit);
    let times = (0..steps).map(|_| {
        let start = Instant::now();
        let stopped = debugger.reverse_step(&mut || false);
        let stopped = stopped.expect("it replays");
        assert!(matches!(stopped, Stopped::Hit(Hit::Step)), "{stopped:?}");
        start.elapsed().as_secs_f64() * 1e3
    });
    took(times.collect())
}

/// Runs back to the instructions at an address, `hits` times: how long each takes.
pub fn time_runs_back(debugger: &mut Debugger, exit: u64, address: u64, hits: u64) -> Took {
    seek(debugger, exit);
    let stops = Stops {
        execution: vec![address],
        ..Stops::default()
    };
    let times = (0..hits).map(|_| {
        let start = Instant::now();
        let stopped = debugger.reverse_resume(&stops, &mut || false);
        let stopped = stopped.expect("it replays");
        let hit = matches!(stopped, Stopped::Hit(Hit::Execution(_)));
        assert!(hit, "{stopped:?}");
        start.elapsed().as_secs_f64() * 1e3
    });
    took(times.collect())
}

/// Where the random writes of [`divert`] go: RAM that every guest has.
const RAM_BYTES: u64 = 64 << 20;
/// So many looks at whether to go on a diversion takes.
const LOOKS: u64 = 4;

/// Writes at random to registers and memory of a guest at an exit and shortly after it, and lets it run on with that,
/// whatever becomes of it. Each time the guest is then where it was, and the state at the exit is what it was. Returns how
/// many of these diversions ran on to an exit.
pub fn divert(debugger: &mut Debugger, exit: u64, rounds: u64, seed: u64) -> u64 {
    let mut rng = Rng::new(seed, 61);
    seek(debugger, exit);
    let state = debugger.state_digest().expect("it is at an exit");
    let mut ran_on = 0;
    for round in 0..rounds {
        for _ in 0..rng.below(4) {
            debugger.step(&mut || false).expect("it replays");
        }
        let here = place(debugger);
        let mut registers = debugger.registers().expect("the host works");
        for _ in 0..rng.below(4) {
            // Not RSP: mostly it is to run on for a while.
            let number = [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15][rng.below(14) as usize];
            registers.general.0[number] ^= rng.number();
        }
        registers.fpu[160] ^= 0xff;
        debugger.write_registers(&registers).expect("it is written");
        for _ in 0..rng.below(8) {
            let gpa = rng.below(RAM_BYTES / 8) * 8;
            let written = debugger.write_physical(gpa, &rng.number().to_le_bytes());
            assert!(written.expect("it is written"), "there is RAM");
        }
        if rng.one_in(2) {
            let written = debugger.write(registers.general.0[6], &rng.number().to_le_bytes());
            assert!(written.expect("it is written"), "there is a stack");
        }
        assert_eq!(debugger.diversion(), Some(here.0));
        assert!(debugger.state_digest().is_err());
        let mut looks = 0;
        let mut stop = || {
            looks += 1;
            looks > LOOKS
        };
        let stopped = match rng.one_in(3) {
            true => debugger.step(&mut stop),
            false => debugger.resume(&Stops::default(), &mut stop),
        };
        // What the host cannot run ends it too.
        ran_on += u64::from(stopped.is_ok() && debugger.exit() > here.0);
        debugger.end_diversion().expect("it is thrown away");
        assert_eq!(debugger.diversion(), None);
        assert_eq!(place(debugger), here, "round {round}: {stopped:?}");
        seek(debugger, exit);
        let after = debugger.state_digest().expect("it is at an exit");
        assert_eq!(state, after, "round {round}: {stopped:?}");
    }
    ran_on
}
