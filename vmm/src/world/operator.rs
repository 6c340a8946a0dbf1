//! The operator: what a terminal's keys and signals ask for, at once and out of any queue's order.
//!
//! The signals are blocked in all threads and taken by one that waits for them. So none interrupts the
//! vCPU's thread at something that it could fail, and each takes effect when it comes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use hindsight_replay::Complete;
use nix::sys::signal::{SigSet, Signal, raise};

use super::bell::Bell;
use super::marks::{HeardWish, MarkAsker, MarkWish, MarkWishes};
use super::terminal;

/// From this long after the first signal to stop on, another one does not wait for the recording to be closed.
const LAST_WARNING: Duration = Duration::from_secs(2);

/// Preparations that take this long are announced.
const WORTH_SAYING: Duration = Duration::from_secs(1);

/// What the guest knows of the terminal.
#[derive(Debug, Default)]
struct Watched {
    /// Whether the guest is to hear of its size.
    wanted: bool,
    /// The size that the guest has heard of last, or is about to.
    last: Option<(u16, u16)>,
}

/// What the operator wants.
#[derive(Debug)]
pub struct Operator {
    bell: Bell,
    /// Shows the operator a message.
    notice: fn(&str),
    stop: OnceLock<Instant>,
    /// There is a recording that can end without its guest.
    recorded: AtomicBool,
    /// It is to end so.
    leave: AtomicBool,
    presses: AtomicU32,
    /// The size that the terminal has now, if the guest has not heard of it: columns above rows; else 0.
    size: AtomicU32,
    watched: Mutex<Watched>,
    marks: MarkWishes,
}

impl Operator {
    /// Listens to signals from now on; `notice` shows the operator a message, from whatever thread.
    /// To be called by the main thread while it is the only one.
    pub fn listen(notice: fn(&str)) -> std::io::Result<Arc<Operator>> {
        let operator = Arc::new(Operator {
            notice,
            ..Operator::new(Bell::default())
        });
        let mut signals = SigSet::empty();
        for signal in [
            Signal::SIGINT,
            Signal::SIGTERM,
            Signal::SIGPWR,
            Signal::SIGUSR1,
            Signal::SIGUSR2,
            Signal::SIGWINCH,
            Signal::SIGTSTP,
            Signal::SIGCONT,
        ] {
            signals.add(signal);
        }
        // nohup has SIGHUP ignored. (So has a script SIGINT for what it starts with &, where those who
        // send it nevertheless mean it.)
        let ignored = ignored_signals(&std::fs::read_to_string("/proc/self/status")?);
        for signal in [Signal::SIGHUP, Signal::SIGQUIT] {
            if ignored & 1 << (signal as u64 - 1) == 0 {
                signals.add(signal);
            }
        }
        signals.thread_block()?;
        let theirs = Arc::clone(&operator);
        let thread = std::thread::Builder::new().name("signals".into());
        thread.spawn(move || {
            loop {
                match signals.wait() {
                    Ok(signal) => theirs.take(signal),
                    Err(error) => panic!("sigwait: {error}"),
                }
            }
        })?;
        Ok(operator)
    }

    /// An operator without signals.
    pub fn new(bell: Bell) -> Operator {
        Operator {
            bell,
            notice: |_| (),
            stop: OnceLock::new(),
            recorded: AtomicBool::new(false),
            leave: AtomicBool::new(false),
            presses: AtomicU32::new(0),
            size: AtomicU32::new(0),
            watched: Mutex::default(),
            marks: MarkWishes::default(),
        }
    }

    /// Shows the operator a message.
    pub fn notice(&self, what: &str) {
        (self.notice)(what);
    }

    /// What wakes the machine.
    pub fn bell(&self) -> &Bell {
        &self.bell
    }

    /// Wants the machine to stop.
    pub fn stop(&self) {
        let _ = self.stop.set(Instant::now());
        self.bell.ring_at_once();
    }

    /// Since when.
    pub fn stop_asked(&self) -> Option<Instant> {
        self.stop.get().copied()
    }

    /// Does what takes seconds before there is a machine: its result, or `None` as soon as the operator wants
    /// to stop. What is left undone ends with the program, so it must not leave anything half written.
    pub fn unless_stopped<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> std::io::Result<Option<T>> {
        let (give, take) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name("preparing".into());
        let thread = thread.spawn(move || give.send(work()))?;
        let mut said_at = Some(Instant::now() + WORTH_SAYING);
        while self.stop_asked().is_none() {
            match take.recv_timeout(Duration::from_millis(20)) {
                Ok(done) => return Ok(Some(done)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    // Our own panic, in the other thread.
                    let panic = thread.join().expect_err("it sends what it has made");
                    std::panic::resume_unwind(panic);
                }
            }
            if said_at.is_some_and(|at| at <= Instant::now()) {
                self.notice(what);
                said_at = None;
            }
        }
        Ok(None)
    }

    /// From now on there is a recording that can end without its guest.
    pub fn may_leave(&self) {
        self.recorded.store(true, Ordering::SeqCst);
    }

    /// Takes the wish that the recording ends and its guest runs on, if there is one.
    pub fn take_leave(&self) -> bool {
        self.leave.load(Ordering::SeqCst) && self.leave.swap(false, Ordering::SeqCst)
    }

    fn leave(&self) {
        if self.recorded.swap(false, Ordering::SeqCst) {
            self.leave.store(true, Ordering::SeqCst);
            self.bell.ring_at_once();
        } else {
            self.notice("SIGUSR1 ends a recording and leaves its guest running; there is no such recording here");
        }
    }

    /// From now on there is a recording, whose marks `keeper` keeps.
    pub fn begin_marks(&self, keeper: Sender<HeardWish>) {
        self.marks.begin(keeper);
    }

    /// There is no recording any more. What is wanted still is at its last complete exit.
    pub fn end_marks(&self, last: Complete) {
        self.marks.end(last);
    }

    /// Wants the present moment of the recording marked; `false` if there is none, or its machine does not come back.
    pub fn mark(&self, wish: MarkWish) -> bool {
        let added = self.marks.add(wish);
        if added {
            self.bell.ring_at_once();
        }
        added
    }

    /// The machine is at this exit, all of which is done.
    pub(crate) fn pass(&self, complete: Complete) {
        self.marks.pass(complete);
    }

    /// Wants a mark without a name, of which nobody but the operator is told.
    pub(crate) fn mark_here(&self, by: MarkAsker) {
        let (name, reply) = (None, None);
        if !self.mark(MarkWish { by, name, reply }) {
            self.notice(match by {
                MarkAsker::Signal => {
                    "SIGUSR2 marks a moment of a recording; there is no such recording here"
                }
                _ => "there is no recording here that could be marked",
            });
        }
    }

    /// Whether the recording is to end, or there is a press of the power button, or a size that the guest has not
    /// heard of.
    pub fn wants(&self) -> bool {
        self.leave.load(Ordering::SeqCst)
            || self.presses.load(Ordering::SeqCst) > 0
            || self.size.load(Ordering::SeqCst) != 0
    }

    /// Takes one press of the power button, if there is one.
    pub fn take_press(&self) -> bool {
        let one_less = |presses: u32| presses.checked_sub(1);
        let taken = self
            .presses
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less);
        taken.is_ok()
    }

    /// Forgets what was meant for the machine before, and whether this one's terminal has a size to tell.
    pub fn begin(&self, watches_size: bool) {
        self.presses.store(0, Ordering::SeqCst);
        self.size.store(0, Ordering::SeqCst);
        *self.watched() = Watched {
            wanted: watches_size,
            last: None,
        };
        self.look_at_size();
    }

    /// The terminal's columns and rows, if the guest has not heard of them.
    pub fn take_size(&self) -> Option<(u16, u16)> {
        if self.size.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let size = self.size.swap(0, Ordering::SeqCst);
        (size != 0).then_some(((size >> 16) as u16, size as u16))
    }

    fn look_at_size(&self) {
        self.has_size(terminal::size());
    }

    fn has_size(&self, size: Option<(u16, u16)>) {
        let mut watched = self.watched();
        if let Some((columns, rows)) = size.filter(|_| watched.wanted && watched.last != size) {
            watched.last = size;
            let size = u32::from(columns) << 16 | u32::from(rows);
            self.size.store(size, Ordering::SeqCst);
            self.bell.ring_at_once();
        }
    }

    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().expect("nobody panics here")
    }

    fn take(&self, signal: Signal) {
        match signal {
            Signal::SIGPWR => {
                self.presses.fetch_add(1, Ordering::SeqCst);
                self.bell.ring_at_once();
            }
            Signal::SIGUSR1 => self.leave(),
            Signal::SIGUSR2 => self.mark_here(MarkAsker::Signal),
            Signal::SIGWINCH => self.look_at_size(),
            Signal::SIGTSTP => {
                terminal::restore();
                take_by_default(signal);
            }
            Signal::SIGCONT => {
                terminal::enter_again();
                // It may have changed while we were in the background, where no signal says so.
                self.look_at_size();
            }
            _ => match self.stop_asked() {
                Some(asked) if asked.elapsed() >= LAST_WARNING => {
                    terminal::restore();
                    self.notice("asked to stop again; what was not written yet is lost");
                    take_by_default(signal);
                }
                _ => self.stop(),
            },
        }
    }
}

/// Lets a signal do to this program what it does to one that knows nothing of it.
fn take_by_default(signal: Signal) {
    let only = SigSet::from(signal);
    // It is blocked in this thread alone when it comes back: a stopped program goes on here.
    let _ = only.thread_unblock();
    let _ = raise(signal);
    let _ = only.thread_block();
}

/// The signals that are ignored by what /proc/self/status says: bit 0 is signal 1.
fn ignored_signals(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wish_is_there_at_once_and_is_taken_once() {
        let operator = Operator::new(Bell::default());
        assert!(!operator.wants() && !operator.take_press());
        operator.take(Signal::SIGPWR);
        operator.take(Signal::SIGPWR);
        assert!(operator.bell().wait(None), "whoever sleeps is woken");
        assert!(operator.take_press() && operator.take_press() && !operator.take_press());
        for signal in [
            Signal::SIGHUP,
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGQUIT,
        ] {
            let operator = Operator::new(Bell::default());
            operator.take(signal);
            assert!(operator.stop_asked().is_some(), "{signal}");
            assert!(operator.bell().wait(None));
            // A second one, at once, as a session that ends sends them.
            operator.take(Signal::SIGHUP);
        }
    }

    #[test]
    fn a_recording_ends_without_its_guest_once_and_only_where_there_is_one() {
        let operator = Operator::new(Bell::default());
        operator.take(Signal::SIGUSR1);
        assert!(!operator.wants() && !operator.take_leave());
        operator.may_leave();
        operator.take(Signal::SIGUSR1);
        operator.take(Signal::SIGUSR1);
        assert!(operator.wants() && operator.bell().wait(None));
        assert!(operator.take_leave() && !operator.take_leave());
        assert!(operator.stop_asked().is_none());
    }

    #[test]
    fn a_signal_to_mark_wakes_the_machine_and_is_no_input() {
        let operator = Operator::new(Bell::default());
        let (give, take) = std::sync::mpsc::channel();
        operator.take(Signal::SIGUSR2);
        operator.begin_marks(give);
        operator.take(Signal::SIGUSR2);
        assert!(!operator.wants() && operator.bell().wait(None));
        let at = Complete { exits: 7, now: 9 };
        operator.pass(at);
        let (wish, heard_at) = take.try_recv().unwrap();
        assert_eq!((wish.by, heard_at), (MarkAsker::Signal, at));
        assert!(take.try_recv().is_err(), "there was nothing to mark before");
    }

    #[test]
    fn what_is_prepared_is_left_undone_as_soon_as_the_operator_wants_to_stop() {
        let operator = Arc::new(Operator::new(Bell::default()));
        let done = operator.unless_stopped("", || 7).unwrap();
        assert_eq!(done, Some(7));
        let (_keep, never) = std::sync::mpsc::channel::<()>();
        let theirs = Arc::clone(&operator);
        let done = operator.unless_stopped("", move || {
            theirs.take(Signal::SIGINT);
            never.recv()
        });
        assert_eq!(done.unwrap(), None);
    }

    #[test]
    fn a_button_pressed_between_two_machines_is_not_the_next_ones() {
        let operator = Operator::new(Bell::default());
        operator.take(Signal::SIGPWR);
        operator.begin(false);
        assert!(!operator.take_press());
        operator.take(Signal::SIGWINCH);
        assert_eq!(operator.take_size(), None, "nobody wants to know");
    }

    #[test]
    fn a_size_is_told_once_and_again_only_when_it_has_changed() {
        let operator = Operator::new(Bell::default());
        operator.has_size(Some((80, 24)));
        assert_eq!(operator.take_size(), None, "nobody wants to know");
        operator.watched().wanted = true;
        for size in [Some((132, 43)), Some((132, 43)), None] {
            operator.has_size(size);
        }
        assert_eq!(operator.take_size(), Some((132, 43)));
        assert_eq!(operator.take_size(), None);
        operator.has_size(Some((132, 43)));
        assert_eq!(operator.take_size(), None, "it is known");
        operator.has_size(Some((80, 24)));
        operator.has_size(Some((100, 30)));
        assert!(operator.wants());
        assert_eq!(operator.take_size(), Some((100, 30)), "the last one");
    }

    #[test]
    fn ignored_signals_are_read_from_the_status() {
        let status = "Name:\thindsight\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\n";
        assert_eq!(
            ignored_signals(status),
            1 << (libc::SIGHUP - 1) | 1 << (libc::SIGPIPE - 1)
        );
        assert_eq!(ignored_signals(""), 0);
    }
}
