//! The live world behind the door: when guest time follows the host and when it follows the rule,
//! and how long what is due may wait for the guest to exit.

use hindsight_devices::{Input, Nanos};

use crate::chaos::Chaos;
use crate::digest::Digest;
use crate::event::{End, Ending};
use crate::exit::Turn;
use crate::landing::Horizon;
use crate::moment::Moment;
use crate::outside::{Closed, Outside, Standing, TimeQuery, World};

/// Guest time may be this far from the host's before it is corrected. A smaller tolerance buys a
/// finer clock with a larger journal.
pub const TOLERANCE_NS: Nanos = 1_000_000;

/// A timer that is due, or an input, waits this long for the guest to exit by itself, unless the
/// operator says otherwise. Most guests do, and an exit costs less than a preemption.
pub const PATIENCE_NS: Nanos = 1_000_000;

/// The door to a live world. Alone it is what `run` uses; under a recorder, what `record` does.
#[derive(Debug)]
pub struct Live<W: World> {
    world: W,
    memory_every: Option<u64>,
    patience_ns: Option<Nanos>,
    /// Something has waited for longer than that.
    overdue: bool,
    chaos: Option<Chaos>,
}

impl<W: World> Live<W> {
    /// A door to `world`, which asks for a memory digest every `memory_every` exits, if given.
    pub fn new(world: W, memory_every: Option<u64>) -> Live<W> {
        Live {
            world,
            memory_every,
            patience_ns: Some(PATIENCE_NS),
            overdue: false,
            chaos: None,
        }
    }

    /// The same door, which lets `chaos` meddle with the time.
    pub fn with_chaos(self, chaos: Option<Chaos>) -> Live<W> {
        Live { chaos, ..self }
    }

    /// The world, which another machine may be switched on in.
    pub fn into_world(self) -> W {
        self.world
    }

    /// The host's time, as the guest is to see it.
    fn now(&mut self) -> Nanos {
        let now = self.world.now();
        self.chaos.as_ref().map_or(now, |chaos| chaos.seen(now))
    }

    /// The same door, which lets what is due wait for `patience_ns` before it preempts the guest;
    /// `None`: for ever.
    pub fn with_patience(self, patience_ns: Option<Nanos>) -> Live<W> {
        Live {
            patience_ns,
            ..self
        }
    }

    /// The world.
    pub fn world(&mut self) -> &mut W {
        &mut self.world
    }
}

impl<W: World> Live<W> {
    /// The host's time at which the guest sees `at`.
    fn unseen(&self, at: Nanos) -> Nanos {
        self.chaos.as_ref().map_or(at, |chaos| chaos.unseen(at))
    }

    /// When the patience with a guest that does not exit is at an end. A guest that has an interrupt
    /// pending and does not take it is not helped by another one.
    fn alarm_at(&self, standing: &Standing) -> Option<Nanos> {
        let due = standing.deadline.filter(|_| !standing.pending)?;
        Some(due.saturating_add(self.patience_ns?))
    }
}

impl<W: World> Outside for Live<W> {
    fn time(&mut self, query: &TimeQuery) -> Result<Nanos, Closed> {
        let TimeQuery {
            last,
            rule,
            deadline,
            halted,
            room,
            ..
        } = *query;
        self.overdue = false;
        if let Some(chaos) = &mut self.chaos {
            chaos.meddle(query, self.world.now());
        }
        let until = deadline.map(|due| self.unseen(due));
        if halted && !self.world.sleep(until, room) {
            return Err(Closed::End(Ending::Halted));
        }
        let host = self.now();
        let due = deadline.is_some_and(|due| rule < due && due <= host);
        let follows_rule = if halted {
            deadline.is_some_and(|due| due <= host && host - due <= TOLERANCE_NS)
        } else {
            !due && host.abs_diff(rule) <= TOLERANCE_NS
        };
        Ok(if follows_rule { rule } else { host.max(last) })
    }

    fn wants_sites(&self) -> bool {
        self.chaos.is_some()
    }

    fn arrival(&mut self, _exits: u64, room: usize) -> Result<Option<Input>, Closed> {
        Ok(self.world.poll(room))
    }

    fn turn(&mut self, _exits: u64, _turn: &Turn, _digest: Digest) -> Result<(), Closed> {
        Ok(())
    }

    fn interrupt(&mut self, _at: &Moment, _vector: u8) -> Result<(), Closed> {
        Ok(())
    }

    fn wants_memory(&mut self, exits: u64) -> bool {
        self.memory_every
            .is_some_and(|every| exits.is_multiple_of(every))
    }

    fn memory(&mut self, _exits: u64, _digest: u64) -> Result<(), Closed> {
        Ok(())
    }

    fn horizon(&mut self, standing: &Standing) -> Result<Horizon, Closed> {
        if self.overdue {
            return Ok(Horizon::From(0));
        }
        let alarm = self.alarm_at(standing).map(|at| self.unseen(at));
        self.world.alarm(alarm);
        Ok(match &mut self.chaos {
            Some(chaos) => chaos.horizon(standing),
            None => Horizon::Exit,
        })
    }

    fn kicked(&mut self, standing: &Standing) -> Result<(), Closed> {
        if self.world.gives_up() {
            return Err(Closed::End(Ending::StoppedRunning));
        }
        let late = self.alarm_at(standing).is_some_and(|at| at <= self.now());
        let preempts = self.patience_ns.is_some();
        self.overdue |= late || (preempts && self.world.input_waits(standing.room));
        Ok(())
    }

    fn end(&mut self, _exits: u64, _end: &End) -> Result<(), Closed> {
        Ok(())
    }

    fn abandon(&mut self, _exits: u64, _now: Nanos) -> Result<(), Closed> {
        Ok(())
    }
}
