//! Signals: the kick that brings a vCPU back, and the operator's wish to stop.

use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

static STOP: AtomicBool = AtomicBool::new(false);

/// Whether SIGINT or SIGTERM has come.
pub fn stop_requested() -> bool {
    STOP.load(Ordering::Relaxed)
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

extern "C" fn on_stop(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    STOP.store(true, Ordering::Relaxed);
}

/// Kicks the thread that made it, later.
#[derive(Debug)]
pub struct Alarm(libc::timer_t);

// SAFETY: a timer_t is a number that the kernel gave out for the whole process.
unsafe impl Send for Alarm {}

impl Alarm {
    /// An alarm for the calling thread. [`Kicker::for_this_thread`] has installed the handler.
    pub fn for_this_thread() -> Result<Alarm, std::io::Error> {
        // SAFETY: all zeroes is a sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGRTMIN();
        // SAFETY: gettid has no preconditions.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer = std::ptr::null_mut();
        // SAFETY: both pointers are to values of ours that outlive the call.
        let made = unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) };
        if made < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Alarm(timer))
    }

    /// Goes off once, after this long.
    pub fn set(&self, after: std::time::Duration) {
        let time = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: libc::timespec {
                tv_sec: after.as_secs() as libc::time_t,
                tv_nsec: after.subsec_nanos().into(),
            },
        };
        // SAFETY: the timer is ours until it is dropped; `time` outlives the call.
        let set = unsafe { libc::timer_settime(self.0, 0, &time, std::ptr::null_mut()) };
        assert_eq!(set, 0, "a timer of ours takes any time");
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer is ours, and nobody uses it any more.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// Kicks a thread out of `KVM_RUN`.
#[derive(Clone, Copy, Debug)]
pub struct Kicker {
    thread: libc::pthread_t,
}

impl Kicker {
    /// A kicker for the calling thread, which must outlive every kick. Installs the handlers.
    pub fn for_this_thread() -> Result<Kicker, std::io::Error> {
        let failed = |error: vmm_sys_util::errno::Error| std::io::Error::from(error);
        register_signal_handler(SIGRTMIN(), on_kick).map_err(failed)?;
        for signal in [libc::SIGINT, libc::SIGTERM] {
            register_signal_handler(signal, on_stop).map_err(failed)?;
        }
        // SAFETY: pthread_self has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        Ok(Kicker { thread })
    }

    /// Interrupts the thread's present system call, if it is in one.
    pub fn kick(&self) {
        // SAFETY: the thread that made this kicker outlives it; that is `for_this_thread`'s
        // condition, and it is the main thread that meets it.
        unsafe { libc::pthread_kill(self.thread, SIGRTMIN()) };
    }
}
