//! A world made of a seed: host time, typed bytes, the wall clock, and an operator who stops it.

use hindsight_devices::{Input, Nanos, Room};
use hindsight_replay::{Complete, World};

use hindsight_replay::rng::Rng;

/// No simulated run has more exits than this: the operator comes at the latest then.
pub const EXITS_MAX: u64 = 600;

/// The world. It sees the machine only through the calls of [`World`].
#[derive(Clone, Debug)]
pub struct SimWorld {
    rng: Rng,
    now: Nanos,
    /// How much host time passes between two looks at the clock, on average.
    pace_ns: Nanos,
    wall_clock: Option<u64>,
    /// Bytes that wait for room.
    typed: Vec<u8>,
    /// Bytes that will still be typed; then the input is at its end.
    to_type: u64,
    exits: u64,
    stop_at: u64,
    stopped: bool,
    kicks: u64,
    patience: u64,
    /// The exits that it has heard of.
    passed: Vec<Complete>,
}

impl SimWorld {
    /// The world of a seed, in which exits take about `pace_ns`.
    pub fn new(seed: u64, pace_ns: Nanos) -> SimWorld {
        let mut rng = Rng::new(seed, 2);
        let stop_at = if rng.one_in(2) {
            EXITS_MAX
        } else {
            1 + rng.below(EXITS_MAX)
        };
        let to_type = if rng.one_in(3) { 0 } else { rng.below(60) };
        let wall_clock = (!rng.one_in(4)).then(|| 1_600_000_000 + rng.below(1 << 29));
        let patience = 6 + rng.below(30);
        let now = rng.below(5_000_000);
        SimWorld {
            rng,
            now,
            pace_ns,
            wall_clock,
            typed: Vec::new(),
            to_type,
            exits: 0,
            stop_at,
            stopped: false,
            kicks: 0,
            patience,
            passed: Vec::new(),
        }
    }

    /// The exits of which it has heard that all of them is done, each as often as it has.
    pub fn into_passed(self) -> Vec<Complete> {
        self.passed
    }

    /// The same world, for a machine that was switched on `now` ns ago, and was told the wall-clock time then.
    pub fn going_on(self, now: Nanos) -> SimWorld {
        SimWorld {
            now,
            wall_clock: None,
            ..self
        }
    }

    fn types_something(&mut self) {
        let count = (1 + self.rng.below(24)).min(self.to_type);
        self.to_type -= count;
        for _ in 0..count {
            let byte = self.rng.number() as u8;
            self.typed.push(byte);
        }
    }
}

impl World for SimWorld {
    fn now(&mut self) -> Nanos {
        let step = match self.rng.below(512) {
            0 => self.rng.below(4_000_000_000),
            1..8 => self.rng.below(5_000_000),
            8..128 => 0,
            _ => self.rng.below(2 * self.pace_ns),
        };
        self.now += step;
        self.now
    }

    fn poll(&mut self, room: &Room) -> Option<Input> {
        self.kicks = 0;
        if let Some(unix_seconds) = self.wall_clock.take() {
            return Some(Input::WallClock { unix_seconds });
        }
        if self.exits >= self.stop_at && !self.stopped {
            self.stopped = true;
            return Some(Input::Stop);
        }
        if self.rng.one_in(400) {
            return Some(Input::PowerButton);
        }
        if self.to_type > 0 && self.rng.one_in(12) {
            self.types_something();
        }
        if room.console > 0 && !self.typed.is_empty() {
            let count = self.typed.len().min(room.console);
            return Some(Input::Console(self.typed.drain(..count).collect()));
        }
        // The loop asks until there is nothing more, once at each exit.
        self.exits += 1;
        None
    }

    fn sleep(&mut self, until: Option<Nanos>, room: &Room) -> bool {
        let early = self.rng.one_in(8);
        let left_ns = until.map(|until| until.saturating_sub(self.now));
        if early && left_ns != Some(0) {
            // Something else than the deadline: a typed byte if there is room, or just a signal.
            self.now += self
                .rng
                .below(left_ns.unwrap_or(50_000_000).clamp(1, 50_000_000));
            if self.to_type > 0 && room.console > 0 {
                self.types_something();
            }
            return true;
        }
        match left_ns {
            Some(left_ns) => {
                self.now += left_ns;
                true
            }
            None if self.to_type > 0 && room.console > 0 => {
                self.types_something();
                true
            }
            None if self.stopped || self.rng.one_in(2) => false,
            None => {
                self.stop_at = 0;
                true
            }
        }
    }

    fn pass(&mut self, complete: Complete) {
        self.passed.push(complete);
    }

    fn alarm(&mut self, _at: Option<Nanos>) {}

    fn input_waits(&mut self, room: &Room) -> bool {
        room.console > 0 && !self.typed.is_empty()
    }

    fn gives_up(&mut self) -> bool {
        self.kicks += 1;
        self.kicks > self.patience
    }
}
