//! Which pages the guest has written, as KVM tells it.
//!
//! KVM protects a page against writes and notes the fault of the first one, which costs the guest some microseconds. A page
//! that is written all the time (a stack, what belongs to a CPU, a clock) is not protected again each time, but taken for
//! written for a while: whoever asks looks at a page too many, and the guest has a fault less.

use hindsight_replay::{PAGE_BYTES, set_bits};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVMIO,
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::error::{KvmError, Named};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Written so many times in a row, a page is hot.
const HOT: u8 = 2;
/// A hot page is taken for written for so many times.
const TAKEN: u8 = 12;

/// KVM's dirty log of a VM.
#[derive(Debug)]
pub(super) struct DirtyLog {
    /// Pages are protected again when we say so, rather than as they are told.
    manual: bool,
    /// Of each slot and page: below [`HOT`] how many times in a row it was written, above it how many times more it is
    /// taken for written.
    heat: Vec<Vec<u8>>,
}

impl DirtyLog {
    /// The log of `vm`, which has no memory yet.
    pub(super) fn new(kvm: &Kvm, vm: &VmFd) -> Result<DirtyLog, KvmError> {
        let flag = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
        let known = kvm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let manual = known as u32 & flag != 0;
        if manual {
            let mut cap = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                ..Default::default()
            };
            cap.args[0] = flag.into();
            vm.enable_cap(&cap)
                .named("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")?;
        }
        Ok(DirtyLog {
            manual,
            heat: Vec::new(),
        })
    }

    /// The pages of a slot of `bytes` bytes that may have been written since this was asked last, as numbers within it.
    pub(super) fn take(&mut self, vm: &VmFd, slot: u32, bytes: u64) -> Result<Vec<u64>, KvmError> {
        let log = vm.get_dirty_log(slot, bytes as usize);
        let mut log = log.named("KVM_GET_DIRTY_LOG")?;
        let written = set_bits(&log).collect();
        if !self.manual {
            return Ok(written);
        }
        let (number, pages) = (slot as usize, bytes / PAGE_BYTES as u64);
        if self.heat.len() <= number {
            self.heat.resize(number + 1, Vec::new());
        }
        self.heat[number].resize(pages as usize, 0);
        keep_hot(&mut self.heat[number], &mut log);
        clear(vm, slot, pages, &mut log)?;
        Ok(written)
    }
}

/// Of the pages that `log` says were written, leaves those that are to be protected again.
fn keep_hot(heat: &mut [u8], log: &mut [u64]) {
    for (heat, word) in heat.chunks_mut(64).zip(log) {
        for (bit, heat) in (0..).zip(heat) {
            let protect = match (*word >> bit & 1 != 0, *heat) {
                (false, _) => {
                    *heat = 0;
                    continue;
                }
                (true, HOT) => {
                    // If it is written the next time, it is hot again.
                    *heat = HOT - 1;
                    true
                }
                (true, left @ HOT..) => {
                    *heat = left - 1;
                    false
                }
                (true, times) if times + 1 == HOT => {
                    *heat = HOT + TAKEN;
                    false
                }
                (true, times) => {
                    *heat = times + 1;
                    true
                }
            };
            if !protect {
                *word &= !(1 << bit);
            }
        }
    }
}

/// Protects pages of a slot of `pages` pages again, those whose bits are set.
fn clear(vm: &VmFd, slot: u32, pages: u64, log: &mut [u64]) -> Result<(), KvmError> {
    // What is not a multiple of 64 must be all of the slot (Linux, Documentation/virt/kvm/api.rst, 4.117).
    let count = u32::try_from(pages).map_err(|_| KvmError::State("a slot is too large".into()))?;
    assert!(log.len() as u64 * 64 >= pages, "a bit for each page");
    let pages = kvm_clear_dirty_log {
        slot,
        num_pages: count,
        first_page: 0,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: log.as_mut_ptr().cast(),
        },
    };
    // SAFETY: the file is a VM's, the structure is the one that the call takes, and its bitmap has a bit for each of the
    // pages, as was looked at; KVM reads it until the call returns.
    match unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &pages) } {
        0 => Ok(()),
        _ => Err(errno::Error::last()).named("KVM_CLEAR_DIRTY_LOG"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_written_each_time_is_protected_now_and_then() {
        let mut heat = vec![0; 130];
        let mut ask = |written: &[u64; 3]| {
            let mut log = *written;
            keep_hot(&mut heat, &mut log);
            log
        };
        let (hot, once) = ([1 << 63, 0, 2], [1 << 63, 5, 2]);
        assert_eq!(ask(&hot), hot, "all are protected at first");
        assert_eq!(
            ask(&once),
            [0, 5, 0],
            "those that were written before are not"
        );
        for _ in 0..TAKEN {
            // KVM tells of them without a write.
            assert_eq!(ask(&hot), [0; 3]);
        }
        assert_eq!(ask(&hot), hot, "whether they still are must be found out");
        assert_eq!(ask(&hot), [0; 3]);
        for _ in 0..TAKEN {
            ask(&hot);
        }
        assert_eq!(ask(&hot), hot);
        assert_eq!(ask(&[0; 3]), [0; 3]);
        assert_eq!(ask(&hot), hot, "one that was not written is as any other");
    }
}
