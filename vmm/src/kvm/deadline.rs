//! Whether a guest's TSC deadline reaches the board.
//!
//! The MSR filter denies IA32_TSC_DEADLINE, so that a write of it comes to us. But some KVMs look at
//! that one register before they look at the filter, on the short way back into the guest
//! (`handle_fastpath_set_tscdeadline`: `kvm_intel` since Linux 5.8 by their source; the box's
//! `kvm_amd` of 6.1 does not). With no local APIC of theirs to set they drop the value, and the guest
//! would wait for a timer that nobody has heard of. There CPUID does not show the deadline, and Linux
//! counts the bus clock instead.

use hindsight_devices::Access;
use hindsight_replay::{Back, Cpu, Exit, Horizon};
use kvm_ioctls::Kvm;

use super::error::KvmError;
use super::real_mode;

/// `mov $0x6e0,%ecx; wrmsr; hlt`, in real mode.
const WRITE: [u8; 9] = [0x66, 0xb9, 0xe0, 0x06, 0x00, 0x00, 0x0f, 0x30, 0xf4];

/// Asks KVM, with a guest that writes the register.
pub(super) fn reaches_us(kvm: &Kvm) -> Result<bool, KvmError> {
    let mut cpu = real_mode::guest(kvm, &WRITE)?;
    loop {
        match cpu.run(Horizon::Exit)? {
            Back::Exit(exit) => {
                let wrote = matches!(exit, Exit::Access(Access::MsrWrite { index: 0x6e0, .. }));
                return Ok(wrote);
            }
            Back::Window | Back::Kicked | Back::Stopped => {}
        }
    }
}
