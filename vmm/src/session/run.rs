//! Runs a machine without recording it.

use std::sync::Arc;

use hindsight_replay::{End, Live, Machine, Patience, Unit};

use super::counting::Counting;
use super::images::{Images, MachineWish};
use super::make::open_kvm;
use super::{Front, Viewed};
use crate::failure::{Failure, Kind};
use crate::kvm::Preemption;
use crate::world::net::Link;
use crate::world::{HostWorld, Operator, RawTerminal, Shown};

/// Where a bare machine is preempted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RunPreempt {
    /// As often as a recorder would do it on this host: anywhere if there is a branch counter, else at
    /// kernel entries.
    #[default]
    AsRecorded,
    /// Anywhere, as nobody will look for the place again.
    Anywhere,
}

/// How a machine is to be run.
#[derive(Clone, Debug)]
pub struct RunWish {
    /// The machine.
    pub machine: MachineWish,
    /// Where it is preempted.
    pub preempt: RunPreempt,
    /// How long what is due waits for the guest to exit.
    pub patience: Patience,
}

/// What a run came to.
#[derive(Debug)]
pub struct Ran {
    /// The machine at its end.
    pub machine: Machine,
    /// How it ended.
    pub end: End,
    /// What became of what it showed.
    pub shown: Shown,
    /// Why the world could not go on, if it could not.
    pub world_failed: Option<Failure>,
}

/// Runs a machine to its end.
///
/// # Errors
///
/// It could not be made, or could not go on.
pub fn run(wish: &RunWish, operator: Arc<Operator>, front: &mut dyn Front) -> Result<Ran, Failure> {
    let images = Images::read(&wish.machine, &operator)?;
    let (kvm, _) = open_kvm()?;
    let unit = Counting::likely_unit();
    let mut description = images.describe(&kvm, &wish.machine)?;
    description.preemption = Some(unit);
    let (mut cpu, mut machine) = images.build(&kvm, &description)?;
    cpu.preempt_by(match (wish.preempt, unit) {
        (RunPreempt::AsRecorded, Unit::Entries) => Preemption::Entries,
        _ => Preemption::Anywhere,
    });
    let mut disks = images.fresh_disks()?;
    drop(images);

    let link = wish.machine.network.clone().map(Link::open).transpose()?;
    let raw = RawTerminal::enter();
    let console = wish.machine.console;
    let world = HostWorld::start(operator, link, console)?;
    let mut view = front.view(Viewed {
        console,
        preemption: None,
        hold: Some(world.hold()),
        last_exit: None,
    })?;
    let mut door = Live::new(world, None).with_patience(wish.patience);
    let result = machine.run(&mut cpu, &mut disks, &mut door, &mut *view);
    let shown = view.finish();
    drop(raw);
    let end = result?;
    let failed = door.into_world().failure().map(String::from);
    Ok(Ran {
        machine,
        end,
        shown,
        world_failed: failed.map(|why| Failure::new(Kind::HostFailed, why)),
    })
}
