//! What one exit costs on this host.
//!
//! Between corrections guest time advances by this much at each exit: it is the least that can
//! have passed, so that guest time hardly ever runs ahead of the host's, and a guest that waits by
//! reading the time over and over (`udelay`) waits about as often as it should.

use std::time::Instant;

use hindsight_replay::{Back, Cpu, Horizon};
use kvm_ioctls::Kvm;

use super::error::KvmError;
use super::real_mode;

/// `out %al,$0x80; jmp .-2`, in real mode.
const LOOP: [u8; 4] = [0xe6, 0x80, 0xeb, 0xfc];
/// Exits measured at a time; the first batch only warms up.
const BATCH: u32 = 64;
/// Batches; the fastest counts, for everything that disturbs one makes it slower.
const BATCHES: u32 = 5;

/// Measures the cost of an exit in nanoseconds.
pub(crate) fn measure(kvm: &Kvm) -> Result<u64, KvmError> {
    let mut cpu = real_mode::guest(kvm, &LOOP)?;
    let mut best_ns = u64::MAX;
    for _ in 0..=BATCHES {
        let start = Instant::now();
        let mut exits = 0;
        while exits < BATCH {
            exits += u32::from(matches!(cpu.run(Horizon::Exit)?, Back::Exit(_)));
            // Nobody reads the port: the answer to an OUT is nothing.
            cpu.forget_exit();
        }
        best_ns = best_ns.min(start.elapsed().as_nanos() as u64 / u64::from(BATCH));
    }
    Ok(best_ns.max(1))
}
