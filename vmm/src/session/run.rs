//! Runs a machine without recording it.

use std::sync::Arc;

use hindsight_replay::{End, Live, Machine, Patience, RunError, Unit};

use super::images::{Images, MachineWish};
use super::make::open_kvm;
use super::preemption_plan::PreemptionPlan;
use super::{Front, Viewed};
use crate::failure::{Failure, Kind};
use crate::kvm::{KvmError, Preemption};
use crate::world::net::Link;
use crate::world::{HostWorld, Operator, RawTerminal, Shown};

/// How a machine is to be run.
#[derive(Clone, Debug)]
pub struct RunWish {
    /// The machine.
    pub machine: MachineWish,
    /// Whether a guest that does not exit is preempted wherever it is, as nobody will look for the place again, even
    /// where a recorder on this host would wait for a kernel entry.
    pub anywhere: bool,
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
    let unit = PreemptionPlan::likely_unit();
    let mut description = images.describe(&kvm, &wish.machine)?;
    description.preemption = Some(unit);
    let (mut cpu, mut machine) = images.build(&kvm, &description)?;
    cpu.preempt_by(match unit {
        Unit::Entries if !wish.anywhere => Preemption::Entries,
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
    Ran::of(machine, result, shown, door)
}

impl Ran {
    /// A run of `machine` that has come to `result`.
    pub(super) fn of(
        machine: Machine,
        result: Result<End, RunError<KvmError>>,
        shown: Shown,
        door: Live<HostWorld>,
    ) -> Result<Ran, Failure> {
        let end = result?;
        let failed = door.into_world().failure().map(String::from);
        Ok(Ran {
            machine,
            end,
            shown,
            world_failed: failed.map(|why| Failure::new(Kind::HostFailed, why)),
        })
    }
}
