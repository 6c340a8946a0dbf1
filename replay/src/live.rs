//! The live world behind the door: when guest time follows the host, and when it follows the rule.

use hindsight_devices::{Input, Nanos};

use crate::digest::Digest;
use crate::event::{End, Ending};
use crate::exit::Turn;
use crate::moment::Moment;
use crate::outside::{Closed, Outside, TimeQuery, World};

/// Guest time may be this far from the host's before it is corrected. A smaller tolerance buys a
/// finer clock with a larger journal.
pub const TOLERANCE_NS: Nanos = 1_000_000;

/// The door to a live world. Alone it is what `run` uses; under a recorder, what `record` does.
#[derive(Debug)]
pub struct Live<W: World> {
    world: W,
    memory_every: Option<u64>,
}

impl<W: World> Live<W> {
    /// A door to `world`, which asks for a memory digest every `memory_every` exits, if given.
    pub fn new(world: W, memory_every: Option<u64>) -> Live<W> {
        Live {
            world,
            memory_every,
        }
    }

    /// The world.
    pub fn world(&mut self) -> &mut W {
        &mut self.world
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
        if halted && !self.world.sleep(deadline, room) {
            return Err(Closed::End(Ending::Halted));
        }
        let host = self.world.now();
        let due = deadline.is_some_and(|due| rule < due && due <= host);
        let follows_rule = if halted {
            deadline.is_some_and(|due| due <= host && host - due <= TOLERANCE_NS)
        } else {
            !due && host.abs_diff(rule) <= TOLERANCE_NS
        };
        Ok(if follows_rule { rule } else { host.max(last) })
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

    fn goes_on(&mut self, _exits: u64, _pending: bool) -> Result<(), Closed> {
        Ok(())
    }

    fn kicked(&mut self, _exits: u64) -> Result<(), Closed> {
        if self.world.gives_up() {
            Err(Closed::End(Ending::StoppedRunning))
        } else {
            Ok(())
        }
    }

    fn end(&mut self, _exits: u64, _end: &End) -> Result<(), Closed> {
        Ok(())
    }

    fn abandon(&mut self, _exits: u64, _now: Nanos) -> Result<(), Closed> {
        Ok(())
    }
}
