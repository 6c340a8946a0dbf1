//! Signals of our own: the kick that brings a vCPU back; and a last act before a crash.
//!
//! A kick interrupts `KVM_RUN`. One that comes just before `KVM_RUN` would interrupt nothing, and
//! the guest would run on for as long as it likes. So the handler sets `immediate_exit` in the page
//! that the thread's vCPU shares with KVM, which KVM looks at after it has blocked signals (Linux,
//! Documentation/virt/kvm/api.rst, section 5). A kick that comes while no entry is under way is
//! kept for the next one. None is lost; two may be reported as one.

use std::cell::Cell;
use std::sync::atomic::{AtomicPtr, Ordering, compiler_fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvm_bindings::{KVM_EXIT_INTR, KVM_EXIT_SET_TPR};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::error::{KvmError, Named};
use super::run_page::RunPage;

// A kick is sent to the vCPU's thread, so its handler runs there, and these need no order but the
// compiler's. Both are constants at first and have no destructor: a handler may touch them.
thread_local! {
    /// The address of the flag that makes the entry under way return; null outside of entries.
    static FLAG: AtomicPtr<u8> = const { AtomicPtr::new(std::ptr::null_mut()) };
    /// Whether a kick has come that no entry has reported.
    static KICKED: Cell<bool> = const { Cell::new(false) };
}

/// The signal that kicks.
pub(crate) fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    KICKED.set(true);
    compiler_fence(Ordering::SeqCst);
    let flag = FLAG.with(|flag| flag.load(Ordering::Relaxed));
    if !flag.is_null() {
        // SAFETY: the pointer is not null only while `with_flag` runs on this very thread, whose
        // caller lends it a flag that is valid for as long.
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the handler of kicks, for all threads.
///
/// SIGIO has it too: the kernel sends that instead when the queue of real-time signals is full
/// (fcntl(2), F_SETSIG), and would end the process.
pub(super) fn install_kick() -> std::io::Result<()> {
    for signal in [kick_signal(), libc::SIGIO] {
        register_signal_handler(signal, on_kick).map_err(std::io::Error::from)?;
    }
    Ok(())
}

/// The handler knows a flag, until this goes: at the end of an entry, or when a panic unwinds through it.
struct Registered;

impl Drop for Registered {
    fn drop(&mut self) {
        FLAG.with(|registered| registered.store(std::ptr::null_mut(), Ordering::Relaxed));
        compiler_fence(Ordering::SeqCst);
    }
}

/// Runs `enter` with the byte at `flag` at the handler's disposal, set at once if a kick is waiting.
/// `enter` returns its result and whether that reports kicks.
///
/// # Safety
///
/// `flag` is valid for writes until this returns, and nobody relies on a reference to it meanwhile.
unsafe fn with_flag<T>(flag: *mut u8, enter: impl FnOnce() -> (T, bool)) -> T {
    FLAG.with(|registered| registered.store(flag, Ordering::Relaxed));
    compiler_fence(Ordering::SeqCst);
    let registered = Registered;
    if KICKED.get() {
        // SAFETY: this function's condition.
        unsafe { flag.write_volatile(1) };
    }
    let (result, reports) = enter();
    drop(registered);
    // SAFETY: this function's condition; and the handler does not know the flag any more.
    unsafe { flag.write_volatile(0) };
    if reports {
        KICKED.set(false);
    }
    result
}

/// `KVM_RUN`. Returns KVM's exit reason, or `None` if it came back without one.
fn run(vcpu: &mut VcpuFd) -> Result<Option<u32>, KvmError> {
    loop {
        match vcpu.run().map(drop) {
            Ok(()) => match RunPage::of(vcpu).exit_reason() {
                KVM_EXIT_INTR => return Ok(None),
                // A guest that has lowered CR8: done, and the board has no use for it.
                KVM_EXIT_SET_TPR => {}
                reason => return Ok(Some(reason)),
            },
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Ok(None),
            Err(error) => return Err(error).named("KVM_RUN"),
        }
    }
}

/// Enters the guest. Returns KVM's exit reason, or `None` if a signal brought it back.
pub(super) fn enter(vcpu: &mut VcpuFd) -> Result<Option<u32>, KvmError> {
    let flag = &raw mut vcpu.get_kvm_run().immediate_exit;
    let enter = || {
        let result = run(vcpu);
        let reports = matches!(result, Ok(None));
        (result, reports)
    };
    // SAFETY: the page stays mapped while `vcpu` lives, which `enter` borrows; of those who look
    // at it meanwhile, KVM and `run`, neither expects this byte to stay as it is.
    unsafe { with_flag(flag, enter) }
}

/// Has KVM finish the exit that it reported last, without running the guest. Returns what it
/// reports instead, if it does. A kick that comes meanwhile is kept.
pub(super) fn finish(vcpu: &mut VcpuFd) -> Result<Option<u32>, KvmError> {
    RunPage::of(vcpu).set_immediate_exit(true);
    let result = run(vcpu);
    RunPage::of(vcpu).set_immediate_exit(false);
    result
}

/// Kicks the thread that made it, later.
#[derive(Debug)]
pub(crate) struct Alarm(libc::timer_t);

// SAFETY: a timer_t is a number that the kernel gave out for the whole process.
unsafe impl Send for Alarm {}

impl Alarm {
    /// An alarm for the calling thread. [`Kicker::for_this_thread`] has installed the handler.
    pub(crate) fn for_this_thread() -> Result<Alarm, std::io::Error> {
        // SAFETY: all zeroes is a sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = kick_signal();
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
    pub(crate) fn set(&self, after: std::time::Duration) {
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

/// The number of a thread while it lives. Held while it is kicked: a thread that is about to end waits for that, so
/// that nobody else has its number yet.
#[derive(Debug)]
struct Alive(Arc<Mutex<Option<libc::pid_t>>>);

impl Alive {
    fn this_thread() -> Alive {
        // SAFETY: gettid has no preconditions.
        let thread = unsafe { libc::gettid() };
        Alive(Arc::new(Mutex::new(Some(thread))))
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

thread_local! {
    /// Goes when the thread does.
    static ALIVE: Alive = Alive::this_thread();
}

/// Kicks a thread out of `KVM_RUN`.
#[derive(Clone, Debug)]
pub struct Kicker {
    process: libc::pid_t,
    thread: Arc<Mutex<Option<libc::pid_t>>>,
}

impl Kicker {
    /// A kicker for the calling thread. Installs the handler.
    pub fn for_this_thread() -> Result<Kicker, std::io::Error> {
        install_kick()?;
        // SAFETY: getpid has no preconditions.
        let process = unsafe { libc::getpid() };
        let thread = ALIVE.with(|alive| Arc::clone(&alive.0));
        Ok(Kicker { process, thread })
    }

    /// Brings the thread's vCPU back, now or as soon as it is entered. If the thread is gone, nobody hears it.
    pub fn kick(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = *thread {
            // SAFETY: tgkill takes numbers alone, the thread lives while the lock is held, and the signal has a
            // handler in each of our threads.
            unsafe { libc::syscall(libc::SYS_tgkill, self.process, thread, kick_signal()) };
        }
    }
}

/// Signals that come of a bug, ours or of a library or of the host's memory.
const CRASHES: [libc::c_int; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
];

/// What is done before a crash.
static LAST_ACT: OnceLock<fn()> = OnceLock::new();
/// What these signals did before that was known, in the order of [`CRASHES`].
static FORMER: OnceLock<[libc::sigaction; CRASHES.len()]> = OnceLock::new();

/// Has `last_act` called before a signal that comes of a bug does what it did so far. It must do nothing but
/// what a handler may: system calls and atomics. Only the first call counts.
pub(crate) fn before_crash(last_act: fn()) -> std::io::Result<()> {
    if LAST_ACT.set(last_act).is_err() {
        return Ok(());
    }
    // SAFETY: all zeroes is a sigaction, with an empty mask and the default action.
    let empty: libc::sigaction = unsafe { std::mem::zeroed() };
    let mut former = [empty; CRASHES.len()];
    for (signal, former) in CRASHES.into_iter().zip(&mut former) {
        // SAFETY: the pointer is to a value of ours that outlives the call.
        if unsafe { libc::sigaction(signal, std::ptr::null(), former) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    FORMER.get_or_init(|| former);
    let mut action = empty;
    action.sa_sigaction = on_crash as *const () as usize;
    // A stack that has overflowed has no room for a handler; std has given each thread another one.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    for signal in CRASHES {
        // SAFETY: `action` is whole and outlives the call; its handler makes system calls and looks at
        // statics that were set before it was installed, and allocates nothing.
        if unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn on_crash(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if let Some(last_act) = LAST_ACT.get() {
        last_act();
    }
    let at = CRASHES.iter().position(|crash| *crash == signal);
    if let (Some(former), Some(at)) = (FORMER.get(), at) {
        // SAFETY: the kernel gave us this action before.
        unsafe { libc::sigaction(signal, &former[at], std::ptr::null_mut()) };
    }
    // SAFETY: the kernel hands its handlers a siginfo.
    let sent = unsafe { (*info).si_code } <= 0;
    if sent {
        // Nothing faults again when this returns.
        // SAFETY: raise has no preconditions.
        unsafe { libc::raise(signal) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kick_myself() {
        Kicker::for_this_thread().unwrap().kick();
    }

    /// Enters with a flag of its own. Returns what the flag was before and after `during`.
    fn entry(during: impl FnOnce(), reports: bool) -> (u8, u8) {
        let mut byte = 0;
        let flag = &raw mut byte;
        // SAFETY: `byte` outlives every look, and only the handler, on this thread, writes it.
        let look = || unsafe { flag.read_volatile() };
        let enter = || {
            let before = look();
            during();
            ((before, look()), reports)
        };
        // SAFETY: as above.
        let seen = unsafe { with_flag(flag, enter) };
        assert_eq!(look(), 0, "the flag is down after the entry");
        seen
    }

    #[test]
    fn a_kick_during_an_entry_raises_the_flag() {
        assert_eq!(entry(kick_myself, true), (0, 1));
        assert_eq!(entry(|| {}, true), (0, 0), "and only in that entry");
    }

    #[test]
    fn a_kick_before_an_entry_ends_it_at_once() {
        kick_myself();
        assert_eq!(entry(|| {}, true), (1, 1));
        assert_eq!(entry(|| {}, true), (0, 0));
    }

    #[test]
    fn a_kick_that_an_exit_outran_is_kept_for_the_next_entry() {
        assert_eq!(entry(kick_myself, false), (0, 1));
        assert_eq!(entry(|| {}, true), (1, 1));
        assert_eq!(entry(|| {}, true), (0, 0));
    }

    #[test]
    fn a_kick_of_a_thread_that_is_gone_reaches_nobody() {
        let gone = std::thread::spawn(|| Kicker::for_this_thread().unwrap());
        let kicker = gone.join().unwrap();
        for _ in 0..100 {
            kicker.kick();
        }
        assert_eq!(entry(|| {}, true), (0, 0));
    }

    #[test]
    fn a_flag_is_forgotten_when_a_panic_unwinds_through_its_entry() {
        let unwound = std::panic::catch_unwind(|| {
            let mut byte = 0;
            // SAFETY: `byte` is there until the closure unwinds, and only the handler writes it.
            unsafe { with_flag(&raw mut byte, || -> ((), bool) { panic!("on purpose") }) };
        });
        assert!(unwound.is_err());
        let left = FLAG.with(|flag| flag.load(Ordering::Relaxed));
        assert!(left.is_null());
        // A kick would write to a stack that is somebody else's now.
        assert_eq!(entry(kick_myself, true), (0, 1));
    }

    #[test]
    fn a_kick_of_one_thread_is_none_of_anothers() {
        std::thread::spawn(kick_myself).join().unwrap();
        assert_eq!(entry(|| {}, true), (0, 0));
    }
}
