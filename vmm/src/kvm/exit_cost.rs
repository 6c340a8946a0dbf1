//! What one exit costs on this host.
//!
//! Between corrections guest time advances by this much at each exit: it is the least that can
//! have passed, so that guest time hardly ever runs ahead of the host's, and a guest that waits by
//! reading the time over and over (`udelay`) waits about as often as it should.

use std::time::Instant;

use hindsight_replay::{Back, Cpu, CpuidTable, Horizon};
use kvm_ioctls::Kvm;

use super::error::{KvmError, Named};
use super::memory::GuestMemory;
use super::vcpu::KvmCpu;
use crate::boot::GuestRam;

/// `out %al,$0x80; jmp .-2`, in real mode.
const LOOP: [u8; 4] = [0xe6, 0x80, 0xeb, 0xfc];
/// Where the loop stands.
const LOOP_AT: u64 = 0x1000;
/// Exits measured at a time; the first batch only warms up.
const BATCH: u32 = 64;
/// Batches; the fastest counts, for everything that disturbs one makes it slower.
const BATCHES: u32 = 5;

/// Measures the cost of an exit in nanoseconds.
pub fn measure(kvm: &Kvm) -> Result<u64, KvmError> {
    let mut memory = GuestMemory::new(1 << 16)?;
    memory
        .write(LOOP_AT, &LOOP)
        .expect("the loop fits into 64 KiB");
    let mut cpu = KvmCpu::new(kvm, memory, &CpuidTable::default())?;
    let mut sregs = cpu.sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    cpu.fd().set_sregs(&sregs).named("KVM_SET_SREGS")?;
    let mut registers = cpu.fd().get_regs().named("KVM_GET_REGS")?;
    registers.rip = LOOP_AT;
    cpu.fd().set_regs(&registers).named("KVM_SET_REGS")?;
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
