//! Which model-specific registers KVM keeps for the guest. Every other one comes to the board.
//!
//! Closed by default: KVM answers some MSRs with facts about the host (the TSC, APERF and MPERF,
//! thermal and performance counters), and which ones those are changes from release to release.
//! What is listed here is the guest's own state, which KVM only stores. LSTAR and CSTAR are such state too,
//! but the board keeps them: the real ones may point to a stub that counts (see [`super::entries`]). So it does those of
//! SYSENTER: on AMD's CPUs KVM does not give back, nor put back, all of what the guest has written to them.

use std::ops::RangeInclusive;

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN, Msrs, kvm_enable_cap, kvm_msr_entry,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};

use super::error::{KvmError, Named};

/// A run of MSRs that KVM keeps (first, how many), and why it may.
pub(crate) const KEPT: &[(u32, u32, &str)] = &[
    (0x00fe, 1, "MTRRcap: constant"),
    (0x0200, 0x70, "MTRRs: stored, without effect on the guest"),
    (0x0277, 1, "PAT: stored"),
    (0x02ff, 1, "MTRRdefType: stored"),
    (0xc000_0080, 2, "EFER, STAR: stored"),
    (0xc000_0084, 1, "SFMASK: stored"),
    (0xc000_0100, 3, "FS_BASE, GS_BASE, KERNEL_GS_BASE: stored"),
];

/// Where SYSCALL enters the kernel, from 64-bit programs and from 32-bit ones.
pub(crate) const LSTAR: u32 = 0xc000_0082;
/// See [`LSTAR`].
pub(crate) const CSTAR: u32 = 0xc000_0083;
/// Code segment, stack and entry of SYSENTER.
pub(crate) const SYSENTER: RangeInclusive<u32> = 0x174..=0x176;

/// Loads the real register after one that comes to the board.
pub(crate) fn load(fd: &VcpuFd, index: u32, data: u64) -> Result<(), KvmError> {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = Msrs::from_entries(&[entry]).expect("one entry is not too many");
    match fd.set_msrs(&entries).named("KVM_SET_MSRS")? {
        1 => Ok(()),
        _ => Err(KvmError::Lacks("the MSRs of SYSCALL")),
    }
}

/// Installs the filter.
pub(crate) fn install_filter(vm: &VmFd) -> Result<(), KvmError> {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        ..Default::default()
    };
    cap.args[0] = u64::from(
        KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL,
    );
    vm.enable_cap(&cap)
        .map_err(|_| KvmError::Lacks("MSR exits (KVM_CAP_X86_USER_SPACE_MSR)"))?;
    let all_ones = [0xff; 0x70 / 8];
    let ranges: Vec<MsrFilterRange<'_>> = KEPT
        .iter()
        .map(|&(base, msr_count, _)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count,
            bitmap: &all_ones,
        })
        .collect();
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
        .named("KVM_X86_SET_MSR_FILTER")
}
