//! Guests of a few bytes in real mode, for questions that need no more.

use hindsight_replay::CpuidTable;
use kvm_ioctls::Kvm;

use super::cpu::KvmCpu;
use super::error::{KvmError, Named};
use super::memory::GuestMemory;
use crate::boot::GuestRam;

/// Where the code is.
const CODE_AT: u64 = 0x1000;
/// RAM in bytes.
const RAM_BYTES: u64 = 1 << 16;

/// A vCPU at the first byte of `code`.
pub(super) fn guest(kvm: &Kvm, code: &[u8]) -> Result<KvmCpu, KvmError> {
    let mut memory = GuestMemory::new(RAM_BYTES)?;
    memory
        .write(CODE_AT, code)
        .expect("a few bytes fit into 64 KiB");
    let cpu = KvmCpu::new(kvm, memory, &CpuidTable::default())?;
    let mut sregs = cpu.sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    cpu.fd().set_sregs(&sregs).named("KVM_SET_SREGS")?;
    let mut registers = cpu.fd().get_regs().named("KVM_GET_REGS")?;
    registers.rip = CODE_AT;
    cpu.fd().set_regs(&registers).named("KVM_SET_REGS")?;
    Ok(cpu)
}
