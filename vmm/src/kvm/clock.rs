//! The clock in guest memory that the kernel reads without an exit (see [`hindsight_kernel::QuickPlan`]).

use hindsight_replay::ShownClock;

use super::cpu::KvmCpu;
use crate::boot::GuestRam;
use hindsight_kernel::QuickClock;

impl KvmCpu {
    /// Sets the clock, if there is one and it is still the recorded kernel's: another one may have taken
    /// its place (kexec). Whether it has is a matter of guest memory at a counted exit, and so the same in a replay.
    pub(super) fn write_clock(&mut self, clock: ShownClock) {
        let Some(QuickClock {
            words,
            stub,
            stub_bytes,
        }) = &self.vm.text.clock
        else {
            return;
        };
        let mut found = stub_bytes.map(|_| 0);
        if self.vm.memory.read(*stub, &mut found) && found == *stub_bytes {
            self.vm
                .memory
                .write(*words, &clock.to_bytes())
                .expect("the loader wrote after it");
        }
    }
}
