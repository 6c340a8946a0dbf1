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
