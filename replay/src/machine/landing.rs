//! Landing: stopping a vCPU at an exact place between two exits.
//!
//! A place is the first time that RIP has a certain value with a certain number of conditional
//! branches retired since the last counted exit. The number comes from a [`Counter`] that can also
//! call the vCPU back, though some branches late; the last stretch is the work of a breakpoint at
//! RIP, which is let through until the number is right. Nothing is ever single-stepped: a guest's
//! trap flag is its own, and faults, system calls and string instructions on the way run as they
//! always do.
//!
//! A recorder may land wherever the guest happens to be. But where it happens to be is no place
//! yet: the guest may have been there before, with as many branches. So breakpoints are set where
//! its next conditional branch may lead, and it runs on to them. Where a breakpoint stops it with a
//! higher number than when it was set, RIP has not been before with that number: it would have
//! stopped there. That holds however the guest came there, so what the decoder believes to lie
//! ahead is only a guess at where to wait for it.

use thiserror::Error;

use super::cpu::Back;
use super::exit::Exit;
use super::place::{Horizon, Place, Unit};

/// Counts the conditional branches that a vCPU retires.
pub trait Counter {
    /// What can go wrong: the counter was taken away, or it lost counts.
    type Error;
    /// How many there were. Never runs backwards.
    fn read(&mut self) -> Result<u64, Self::Error>;
    /// Has the vCPU kicked when there have been `at` of them, or later by less than
    /// [`Counter::margin`], and perhaps again and again from then on; `None`: no more.
    fn arm(&mut self, at: Option<u64>) -> Result<(), Self::Error>;
    /// How late a kick may come, in branches.
    fn margin(&self) -> u64;
    /// Refuses if counts may have been lost since the last look.
    fn check(&mut self) -> Result<(), Self::Error>;
}

/// How a stretch with breakpoints came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkEnd {
    /// It is about to execute an instruction at one of the stops.
    AtStop,
    /// Something else.
    Back(Back),
}

/// What lies before a vCPU on a way that leaves no choice. A wrong answer costs time and no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ahead {
    /// A branch, which leads to one of these.
    Branch([u64; 2]),
    /// Straight on to here, from where more can be seen.
    Look(u64),
    /// A loop in which nothing changes but RIP: each time round is the same place.
    Still,
    /// That depends on what the guest computes; or there is no branch for a long way.
    Unclear,
}

/// A vCPU that can be led to a place.
pub trait Walk {
    /// What can go wrong on the host.
    type Error;
    /// The instruction pointer. Nothing of the last exit may be unfinished.
    fn rip(&mut self) -> u64;
    /// How many stops it can have before its next counted exit: those breakpoints that the guest does not use.
    fn stops_max(&mut self) -> Result<usize, Self::Error> {
        Ok(2)
    }
    /// Whether it goes on with the instruction at its instruction pointer, and has no interrupt or exception to take
    /// first. One that has is not there yet.
    fn is_there(&mut self) -> Result<bool, Self::Error> {
        Ok(true)
    }
    /// Runs until something brings it back, or it is about to execute one of `stops`, of which
    /// there are at most two, and no more than [`Walk::stops_max`]. The present instruction is executed even if it is
    /// one of them.
    fn go(&mut self, stops: &[u64]) -> Result<WalkEnd, Self::Error>;
    /// What lies before it.
    fn ahead(&mut self) -> Result<Ahead, Self::Error>;
}

/// The vCPU ran past its place. It cannot be taken back: the run is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "the vCPU was to stop {expected}, and was found {found} branches on, at rip {rip:#x}. Either the \
     counter's kicks come later than the margin of {margin} branches allows, or it miscounts, or \
     the guest took another way; `hindsight doctor` measures the first two"
)]
pub struct Overshoot {
    /// Where it should have stopped.
    pub expected: Place,
    /// Branches counted when it was found.
    pub found: u64,
    /// Where it was found.
    pub rip: u64,
    /// The margin in use.
    pub margin: u64,
}

/// How often a recorder tries to lead the guest after a branch before it lets it run on.
const TRIES: usize = 32;

/// Leads a vCPU to places, with a counter.
#[derive(Debug)]
pub struct Lander<K> {
    counter: K,
    /// The count at the last exit.
    base: u64,
    /// The breakpoint was set before the guest could come to its place, so the first hit is the first.
    near: bool,
}

impl<K: Counter> Lander<K> {
    /// A lander that relies on `counter`.
    pub fn new(counter: K) -> Lander<K> {
        Lander {
            counter,
            base: 0,
            near: false,
        }
    }

    /// The vCPU is at a counted exit that it did not run to: places are counted from here.
    pub fn begin_at_exit(&mut self) -> Result<(), K::Error> {
        self.counter.arm(None)?;
        self.turn()
    }

    /// Runs `cpu` to its horizon at the latest. Where it lands is an exit like any other.
    pub fn run<W: Walk>(&mut self, cpu: &mut W, horizon: Horizon) -> Result<Back, W::Error>
    where
        W::Error: From<K::Error> + From<Overshoot>,
    {
        let back = match horizon {
            Horizon::Exit => to_exit(cpu)?,
            Horizon::From(least) => self.from(cpu, least)?,
            Horizon::At(place) => self.at(cpu, &place)?,
        };
        if horizon != Horizon::Exit {
            // Else it would kick again and again.
            self.counter.arm(None)?;
        }
        if let Back::Exit(exit) = back {
            if let Exit::Preempted(_) = exit {
                self.counter.check()?;
            }
            self.turn()?;
        }
        Ok(back)
    }

    /// A counted exit has happened: places are counted from here.
    fn turn(&mut self) -> Result<(), K::Error> {
        self.base = self.counter.read()?;
        self.near = false;
        Ok(())
    }

    fn count(&mut self) -> Result<u64, K::Error> {
        Ok(self.counter.read()?.wrapping_sub(self.base))
    }

    fn arm(&mut self, number: Option<u64>) -> Result<(), K::Error> {
        self.counter
            .arm(number.map(|number| self.base.saturating_add(number)))
    }

    /// Runs `cpu` to a place at least `least` branches on, or to what comes before it. A kick that
    /// comes back is somebody else's, or there is no place near; the caller asks again. A fault on
    /// the way may lead elsewhere for good: the caller sees to it that a kick comes in the end.
    fn from<W: Walk>(&mut self, cpu: &mut W, least: u64) -> Result<Back, W::Error>
    where
        W::Error: From<K::Error>,
    {
        if self.count()? < least {
            self.arm(Some(least))?;
            match to_exit(cpu)? {
                Back::Kicked if self.count()? >= least => {}
                back => return Ok(back),
            }
        }
        let most = cpu.stops_max()?;
        if most == 0 {
            // The guest needs all of its breakpoints: it runs on to an exit.
            return to_exit(cpu);
        }
        for attempt in 0..TRIES {
            let count = self.count()?;
            let ahead = cpu.ahead()?;
            let mut stops = match &ahead {
                Ahead::Still => return Ok(landed(count, cpu.rip())),
                Ahead::Branch(next) => &next[..],
                Ahead::Look(at) => std::slice::from_ref(at),
                Ahead::Unclear => {
                    self.arm(Some(count + 1))?;
                    &[]
                }
            };
            if stops.len() > most {
                // The guest needs the others. If it goes the other way, a kick brings it back, and that is tried next.
                stops = std::slice::from_ref(&stops[attempt % stops.len()]);
                self.arm(Some(count + 1))?;
            }
            let went = cpu.go(stops)?;
            // A kick may come where a stop would have.
            if matches!(went, WalkEnd::AtStop | WalkEnd::Back(Back::Kicked)) {
                let (number, rip) = (self.count()?, cpu.rip());
                if number > count && stops.contains(&rip) && cpu.is_there()? {
                    return Ok(landed(number, rip));
                }
            }
            if let WalkEnd::Back(back) = went {
                return Ok(back);
            }
        }
        Ok(Back::Kicked)
    }

    /// Runs `cpu` to exactly `place`, or to what comes before it.
    fn at<W: Walk>(&mut self, cpu: &mut W, place: &Place) -> Result<Back, W::Error>
    where
        W::Error: From<K::Error> + From<Overshoot>,
    {
        let margin = self.counter.margin();
        if cpu.stops_max()? == 0 {
            // Nobody could have landed here: the next exit will be the wrong one.
            return to_exit(cpu);
        }
        // A debugger may have stopped it right there.
        let waits = self.near && self.count()? == place.number && cpu.rip() == place.rip;
        if waits && cpu.is_there()? {
            return Ok(landed(place.number, place.rip));
        }
        if !self.near {
            let short = place.number.saturating_sub(margin);
            if self.count()? < short {
                self.arm(Some(short))?;
                match to_exit(cpu)? {
                    Back::Kicked if self.count()? >= short => {}
                    // The kick may be so late that the guest exits before it.
                    Back::Exit(_) if self.count()? >= place.number => {}
                    back => return Ok(back),
                }
            }
            let count = self.count()?;
            // With the right number it may have been here before.
            if count > place.number || (count == place.number && short > 0) {
                return Err(self.overshoot(cpu, place, count).into());
            }
            self.near = true;
        }
        // If it does not stop, this tells at once.
        self.arm(Some(place.number.saturating_add(1)))?;
        loop {
            let went = cpu.go(&[place.rip])?;
            let count = self.count()?;
            if count > place.number {
                return Err(self.overshoot(cpu, place, count).into());
            }
            let stopped = matches!(went, WalkEnd::AtStop | WalkEnd::Back(Back::Kicked));
            if stopped && count == place.number && cpu.rip() == place.rip && cpu.is_there()? {
                return Ok(landed(count, place.rip));
            }
            if let WalkEnd::Back(back) = went {
                return Ok(back);
            }
        }
    }

    fn overshoot<W: Walk>(&self, cpu: &mut W, place: &Place, found: u64) -> Overshoot {
        Overshoot {
            expected: *place,
            found,
            rip: cpu.rip(),
            margin: self.counter.margin(),
        }
    }
}

/// Runs to an exit, or to what comes before it.
fn to_exit<W: Walk>(cpu: &mut W) -> Result<Back, W::Error> {
    match cpu.go(&[])? {
        WalkEnd::Back(back) => Ok(back),
        WalkEnd::AtStop => unreachable!("no stop was set"),
    }
}

/// The vCPU is at a place.
fn landed(number: u64, rip: u64) -> Back {
    Back::Exit(Exit::Preempted(Place {
        unit: Unit::Branches,
        number,
        rip,
    }))
}
