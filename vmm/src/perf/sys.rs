//! perf_event_open, the page and ring it shares, and RDPMC.
//!
//! The two structures are written out here. The crate that has them, perf-event-open-sys, generates some
//! thousand lines for them, with flags and unions that take more unsafe code to set and to read than
//! these take to write; where their fields are is asserted.

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

/// `struct perf_event_attr` up to PERF_ATTR_SIZE_VER1 (Linux, include/uapi/linux/perf_event.h).
#[repr(C)]
struct PerfEventAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    config1: u64,
    config2: u64,
}

const _: () = assert!(offset_of!(PerfEventAttr, flags) == 40);
const _: () = assert!(size_of::<PerfEventAttr>() == 72);

/// Flags: pinned, exclude_hv, exclude_host.
const PINNED_GUEST_ONLY: u64 = 1 << 2 | 1 << 6 | 1 << 19;
/// PERF_FORMAT_TOTAL_TIME_ENABLED and PERF_FORMAT_TOTAL_TIME_RUNNING.
const TIMES: u64 = 1 | 2;
/// `_IOW('$', 4, __u64)`.
const PERF_EVENT_IOC_PERIOD: libc::c_ulong = 0x4008_2404;
const F_SETSIG: libc::c_int = 10;
const F_SETOWN_EX: libc::c_int = 15;
const F_OWNER_TID: libc::c_int = 0;

/// `struct f_owner_ex` (fcntl(2)).
#[repr(C)]
struct OwnerEx {
    kind: libc::c_int,
    pid: libc::pid_t,
}

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Opens and starts an event of the PMU `kind` on the calling thread, in guests only, which
/// overflows every `period`.
pub(super) fn open(kind: u32, config: u64, period: u64) -> io::Result<File> {
    let attr = PerfEventAttr {
        kind,
        size: size_of::<PerfEventAttr>() as u32,
        config,
        sample_period: period,
        sample_type: 0,
        read_format: TIMES,
        flags: PINNED_GUEST_ONLY,
        wakeup_events: 0,
        breakpoint_type: 0,
        config1: 0,
        config2: 0,
    };
    let (this_thread, any_cpu, no_group, close_on_exec) = (0, -1, -1, 8u64);
    // SAFETY: the call reads `size` bytes of the struct, which is its size, and returns an fd
    // or -1.
    let fd = checked(unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attr,
            this_thread,
            any_cpu,
            no_group,
            close_on_exec,
        )
    })?;
    // SAFETY: the fd is new, so nobody else closes it.
    Ok(unsafe { File::from_raw_fd(fd as i32) })
}

/// Has each overflow of `event` sent to the calling thread as `signal`.
pub(super) fn signal_this_thread(event: &File, signal: libc::c_int) -> io::Result<()> {
    let fd = event.as_raw_fd();
    let owner = OwnerEx {
        kind: F_OWNER_TID,
        // SAFETY: gettid has no preconditions.
        pid: unsafe { libc::gettid() },
    };
    // SAFETY: F_SETOWN_EX reads an `f_owner_ex`, the others take numbers.
    unsafe {
        checked(libc::fcntl(fd, F_SETOWN_EX, &raw const owner).into())?;
        checked(libc::fcntl(fd, F_SETSIG, signal).into())?;
        let flags = checked(libc::fcntl(fd, libc::F_GETFL).into())? as libc::c_int;
        checked(libc::fcntl(fd, libc::F_SETFL, flags | libc::O_ASYNC).into())?;
    }
    Ok(())
}

/// Sends `signal` to the calling thread.
pub(super) fn signal_myself(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: raise takes a number; what the signal does is its handler's affair.
    checked(unsafe { libc::raise(signal) }.into()).map(drop)
}

/// Has `event` overflow after `period` more, and every `period` from then on.
pub(super) fn set_period(event: &File, period: u64) -> io::Result<()> {
    // SAFETY: the ioctl reads one u64.
    let result =
        unsafe { libc::ioctl(event.as_raw_fd(), PERF_EVENT_IOC_PERIOD, &raw const period) };
    checked(result.into()).map(drop)
}

/// `struct perf_event_mmap_page` (Linux, include/uapi/linux/perf_event.h).
#[repr(C)]
struct MmapPage {
    version: u32,
    compat_version: u32,
    lock: u32,
    index: u32,
    offset: i64,
    time_enabled: u64,
    time_running: u64,
    capabilities: u64,
    pmc_width: u16,
    time_shift: u16,
    time_mult: u32,
    time_offset: u64,
    time_zero: u64,
    size: u32,
    reserved: [u8; 948],
    data_head: u64,
    data_tail: AtomicU64,
    data_offset: u64,
    data_size: u64,
}

const _: () = assert!(offset_of!(MmapPage, pmc_width) == 48);
const _: () = assert!(offset_of!(MmapPage, data_head) == 1024);

/// `cap_user_rdpmc` of the capabilities.
const CAP_USER_RDPMC: u64 = 1 << 2;
const PAGE: usize = 4096;
/// Pages of the ring after the shared page. A record is 8 bytes, and the ring is emptied at each
/// arming.
const RING_PAGES: usize = 1;

/// Records of perf's since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Records {
    /// Times the counter was stopped.
    pub throttles: u64,
    /// Records for which there was no room.
    pub lost: u64,
}

impl Records {
    /// Takes in one record: its kind and what follows the header.
    fn take(&mut self, kind: u32, body: &[u64]) {
        match kind {
            // PERF_RECORD_LOST: an id and how many.
            2 => self.lost += body.get(1).copied().unwrap_or(1),
            // PERF_RECORD_THROTTLE.
            5 => self.throttles += 1,
            _ => {}
        }
    }

    /// Takes in all records of `words`, which begins with one. A record is a header (kind in 32
    /// bits, flags in 16, length in bytes in 16) and a body, in whole words.
    fn take_all(&mut self, mut words: &[u64]) {
        while let [header, rest @ ..] = words {
            let length = (header >> 48) as usize / 8;
            let body = length.saturating_sub(1).min(rest.len());
            self.take(*header as u32, &rest[..body]);
            words = &rest[body..];
        }
    }
}

/// A count, and for how many nanoseconds it was wanted and made. The two times may be from a little
/// before the count, but both from the same moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Count {
    /// The count.
    pub count: u64,
    /// How long the event was enabled.
    pub enabled_ns: u64,
    /// For how much of that it had a counter.
    pub running_ns: u64,
}

/// The page that perf shares for an event, and the ring after it. It belongs to the thread that
/// opened the event: RDPMC elsewhere would read another thread's counter.
#[derive(Debug)]
pub(super) struct Page(NonNull<MmapPage>);

impl Page {
    /// Maps what `event` shares.
    pub(super) fn of(event: &File) -> io::Result<Page> {
        // SAFETY: a new mapping at an address of the kernel's choice takes nothing from anybody.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                (1 + RING_PAGES) * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                event.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Page(
            NonNull::new(address.cast()).expect("mmap does not give address 0"),
        ))
    }

    /// The count and its times, read without a system call; `None` if the page says that this
    /// cannot be done, or not now: the counter does not run.
    pub(super) fn count(&self) -> Option<Count> {
        let page = self.0.as_ptr();
        loop {
            // SAFETY: the mapping lives as long as `self`. The kernel changes these fields, hence
            // volatile reads, and it does so on this very thread's CPU while this thread does not
            // run: the order that the compiler keeps is order enough (the seqlock in
            // include/uapi/linux/perf_event.h, above perf_event_mmap_page).
            let (before, index, offset, enabled_ns, running_ns, capabilities, width) = unsafe {
                let before = (&raw const (*page).lock).read_volatile();
                compiler_fence(Ordering::SeqCst);
                (
                    before,
                    (&raw const (*page).index).read_volatile(),
                    (&raw const (*page).offset).read_volatile(),
                    (&raw const (*page).time_enabled).read_volatile(),
                    (&raw const (*page).time_running).read_volatile(),
                    (&raw const (*page).capabilities).read_volatile(),
                    (&raw const (*page).pmc_width).read_volatile(),
                )
            };
            if index == 0 || capabilities & CAP_USER_RDPMC == 0 || !(1..=64).contains(&width) {
                return None;
            }
            // SAFETY: the capability says that user mode may read counters in this process, and
            // the index, if it is still right, that this counter exists. If the thread was moved
            // in between, the index may be stale, but it was a counter's; `lock` has changed then
            // and the value is not used.
            let low_bits = unsafe { rdpmc(index - 1) };
            compiler_fence(Ordering::SeqCst);
            // SAFETY: as above.
            let after = unsafe { (&raw const (*page).lock).read_volatile() };
            if before == after {
                // The counter holds `width` bits, and counts up to zero from below.
                let shift = 64 - u32::from(width);
                let counter = ((low_bits << shift) as i64) >> shift;
                return Some(Count {
                    count: offset.wrapping_add(counter) as u64,
                    enabled_ns,
                    running_ns,
                });
            }
        }
    }

    /// Takes the records out of the ring.
    pub(super) fn take_records(&mut self) -> Records {
        let page = self.0.as_ptr();
        let mut records = Records::default();
        // SAFETY: the mapping lives as long as `self`; the kernel alone writes `data_head`, and
        // has written all records before it (the acquire fence is the barrier that
        // include/uapi/linux/perf_event.h asks for).
        let (head, tail) = unsafe {
            let head = (&raw const (*page).data_head).read_volatile();
            std::sync::atomic::fence(Ordering::Acquire);
            (head, (*page).data_tail.load(Ordering::Relaxed))
        };
        if head == tail {
            return records;
        }
        let ring_bytes = (RING_PAGES * PAGE) as u64;
        let words: Vec<u64> = (tail..head)
            .step_by(8)
            .map(|at| {
                let offset = PAGE + (at % ring_bytes) as usize;
                // SAFETY: the ring is mapped after the page, and `offset` is in it and a
                // multiple of 8, as all records' lengths are. The kernel does not write between
                // tail and head.
                unsafe { page.cast::<u8>().add(offset).cast::<u64>().read_volatile() }
            })
            .collect();
        records.take_all(&words);
        // SAFETY: as above; only we write the tail, and the kernel reads it.
        unsafe { (*page).data_tail.store(head, Ordering::Release) };
        records
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: `of` mapped just this, and nobody refers to it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), (1 + RING_PAGES) * PAGE) };
    }
}

/// Reads counter `index`.
///
/// # Safety
///
/// User mode may execute RDPMC (CR4.PCE), and the CPU has this counter.
unsafe fn rdpmc(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's obligation; it touches no memory.
    unsafe {
        std::arch::asm!("rdpmc", in("ecx") index, out("eax") low, out("edx") high,
            options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u32, bytes: u64) -> u64 {
        u64::from(kind) | bytes << 48
    }

    #[test]
    fn records_are_told_apart_and_unknown_ones_skipped() {
        let words = [
            header(9, 8),
            header(5, 32),
            0,
            9,
            9,
            header(2, 24),
            7,
            3,
            header(77, 16),
            9,
            header(9, 8),
        ];
        let mut records = Records::default();
        records.take_all(&words);
        let expected = Records {
            throttles: 1,
            lost: 3,
        };
        assert_eq!(records, expected);
    }

    #[test]
    fn a_record_without_a_length_or_a_body_is_survived() {
        let mut records = Records::default();
        records.take_all(&[header(9, 0), header(2, 24)]);
        assert_eq!((records.throttles, records.lost), (0, 1));
    }
}
