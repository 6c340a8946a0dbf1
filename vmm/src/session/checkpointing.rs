//! Checkpoints that are made while a machine is recorded, at equal times of the guest's.
//!
//! The recorder's door closes at an exit when one is due. It stands where a replay stands that has come as far: in the
//! journal, whose frame is closed there, so that a checkpoint is never of what the journal does not have yet.

use std::fs::File;

use hindsight_devices::Nanos;
use hindsight_replay::{
    Changes, CheckpointHead, Closed, End, JournalError, Live, Machine, NoteTaker, Observer,
    Recorder, RunError,
};

use super::Front;
use super::checkpoints::CheckpointFile;
use crate::disk::Disks;
use crate::failure::{Failure, Kind};
use crate::kvm::{KvmCpu, KvmError};
use crate::world::HostWorld;

/// Makes checkpoints of a machine that is recorded.
pub(super) struct Checkpointing {
    every_ns: Nanos,
    store: CheckpointFile,
    changes: Changes,
}

impl Checkpointing {
    /// For a machine at power-on.
    pub(super) fn begin(
        every_ns: Nanos,
        store: CheckpointFile,
        cpu: &mut KvmCpu,
        disks: &mut Disks,
    ) -> Result<Checkpointing, Failure> {
        Ok(Checkpointing {
            every_ns,
            store,
            changes: Changes::from_power_on(cpu, disks)?,
        })
    }

    /// Records the machine to its end, as it is recorded without checkpoints. Where they cannot be kept, the recording goes
    /// on without them.
    pub(super) fn run(
        mut self,
        (machine, cpu, disks): (&mut Machine, &mut KvmCpu, &mut Disks),
        recorder: &mut Recorder<Live<HostWorld>, File>,
        observer: &mut dyn Observer,
        front: &mut dyn Front,
    ) -> Result<Result<End, RunError<KvmError>>, Failure> {
        let (mut failed, mut notes) = (Ok(()), NoteTaker::default());
        let result = loop {
            let next = machine.now().saturating_add(self.every_ns);
            recorder.close_at_time(failed.is_ok().then_some(next));
            let from = machine.at().exits;
            notes.begin(from);
            match machine.run(cpu, disks, recorder, &mut (&mut notes, &mut *observer)) {
                Err(RunError::Closed(Closed::Reached(_))) => {}
                result => break result,
            }
            recorder.close_frame().map_err(broken)?;
            // What its cost is to a replay, only a replay knows.
            let head = CheckpointHead::of(machine);
            let here = (&*machine, &mut *cpu, &mut *disks);
            let (store, notes) = (&mut self.store, notes.since(from));
            failed = (self.changes).keep(here, recorder, store, head, notes.as_ref())?;
            if failed.is_err() {
                cpu.forget_changed_pages()?;
            }
        };
        cpu.forget_changed_pages()?;
        if let Err(error) = failed.and_then(|()| self.store.settle()) {
            front.notice(&format!(
                "the recording is whole, but not all of its checkpoints could be kept: {error}; `hindsight index` makes them"
            ));
        }
        Ok(result)
    }
}

fn broken(error: JournalError) -> Failure {
    Failure::new(Kind::HostFailed, error)
}
