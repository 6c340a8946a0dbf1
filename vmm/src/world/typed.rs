//! Standard input, on its way to the guest.
//!
//! A thread reads it into a buffer with an end. A pipe or a file is read no further than the guest reads it: what
//! does not fit waits with whoever writes. A terminal is read on, because Ctrl-] must be seen while the guest
//! reads nothing; what is typed into a full buffer is dropped, and the operator is told. The keys that are the
//! operator's own never reach the guest.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Read};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use rustix::event::{PollFd, PollFlags, poll};

use super::bell::Bell;
use super::marks::MarkAsker;
use super::operator::Operator;
use super::terminal;

/// Ctrl-], as in telnet and virsh: leaves the guest's console.
const ESCAPE: u8 = 0x1d;

/// Ctrl-^ (Ctrl-6 on many keyboards): marks the present moment of a recording.
const MARK: u8 = 0x1e;

/// So much waits for the guest where the writer can wait for it.
const WAITING_MAX: usize = 4096;
/// And where it cannot: what somebody pastes.
const PASTED_MAX: usize = 1 << 20;

/// How often a recording in the background looks whether it has the terminal again.
const BACKGROUND_LOOK: Duration = Duration::from_millis(200);

/// What has been typed and is not the guest's yet.
#[derive(Debug)]
pub(super) struct Typed {
    bytes: Mutex<Bytes>,
    taken: Condvar,
    /// How many wait, for a look that costs nothing.
    count: AtomicUsize,
    open: AtomicBool,
    bell: Bell,
    overflow: Overflow,
}

#[derive(Debug, Default)]
struct Bytes {
    waiting: VecDeque<u8>,
    /// How often some have been taken.
    takes: u64,
}

/// What becomes of bytes that do not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overflow {
    /// They wait for the guest.
    Wait,
    /// They are dropped.
    Drop,
}

impl Typed {
    /// Reads standard input from now on, by a thread of its own.
    pub(super) fn read_stdin(bell: Bell, operator: Arc<Operator>) -> std::io::Result<Arc<Typed>> {
        let terminal = std::io::stdin().is_terminal();
        let overflow = match terminal {
            true => Overflow::Drop,
            false => Overflow::Wait,
        };
        let typed = Arc::new(Typed::new(bell, overflow));
        let theirs = Arc::clone(&typed);
        let thread = std::thread::Builder::new().name("input".into());
        thread.spawn(move || {
            // Reading in the background fails then, instead of stopping the whole recording.
            let _ = SigSet::from(Signal::SIGTTIN).thread_block();
            // A descriptor of our own: std's lock, held through a blocking read, would keep whoever wants to
            // set the terminal back waiting for a key.
            if let Ok(input) = std::io::stdin().as_fd().try_clone_to_owned() {
                theirs.read(File::from(input), terminal, &operator);
            }
            theirs.close();
        })?;
        Ok(typed)
    }

    fn new(bell: Bell, overflow: Overflow) -> Typed {
        Typed {
            bytes: Mutex::default(),
            taken: Condvar::new(),
            count: AtomicUsize::new(0),
            open: AtomicBool::new(true),
            bell,
            overflow,
        }
    }

    /// How many bytes wait.
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// Whether more may come.
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    /// The next bytes, `most` of them at most.
    pub(super) fn take(&self, most: usize) -> Vec<u8> {
        let mut bytes = self.bytes();
        let count = bytes.waiting.len().min(most);
        let taken = bytes.waiting.drain(..count).collect();
        bytes.takes += 1;
        self.count.store(bytes.waiting.len(), Ordering::SeqCst);
        self.taken.notify_all();
        taken
    }

    fn bytes(&self) -> MutexGuard<'_, Bytes> {
        self.bytes.lock().expect("nobody panics with input in hand")
    }

    fn close(&self) {
        self.open.store(false, Ordering::SeqCst);
        self.bell.ring();
    }

    fn read(&self, mut input: impl Read + AsFd, terminal: bool, operator: &Operator) {
        let mut buffer = [0; 4096];
        let mut told = false;
        loop {
            let mut typed = match input.read(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // Somebody else has made it so; it is the same file to them.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let _ = poll(&mut [PollFd::new(&input, PollFlags::IN)], None);
                    continue;
                }
                // In the background the keys are another program's; a terminal that is gone says the same.
                Err(error) if error.raw_os_error() == Some(libc::EIO) && !terminal::is_ours() => {
                    std::thread::sleep(BACKGROUND_LOOK);
                    continue;
                }
                Ok(0) | Err(_) => return,
                Ok(count) => &buffer[..count],
            };
            let escape = typed.iter().position(|byte| terminal && *byte == ESCAPE);
            if let Some(escape) = escape {
                typed = &typed[..escape];
            }
            // Of what comes before the first key that marks, and after each, only the bytes are the guest's.
            let mut dropped = 0;
            for (at, bytes) in typed.split(|byte| terminal && *byte == MARK).enumerate() {
                if at > 0 {
                    operator.mark_here(MarkAsker::Key);
                }
                dropped += self.add(bytes);
            }
            if dropped > 0 && !told {
                told = true;
                operator.notice(
                    "the guest does not read its input; what is typed now is dropped until it does. Ctrl-] ends \
                     the machine",
                );
            }
            if escape.is_some() {
                operator.stop();
                return;
            }
        }
    }

    /// Adds bytes, and waits where they do not fit. Returns how many were dropped instead.
    fn add(&self, mut bytes: &[u8]) -> usize {
        let most = match self.overflow {
            Overflow::Wait => WAITING_MAX,
            Overflow::Drop => PASTED_MAX,
        };
        while !bytes.is_empty() {
            let mut waiting = self.bytes();
            let room = most - waiting.waiting.len();
            if room == 0 && self.overflow == Overflow::Drop {
                return bytes.len();
            }
            if room == 0 {
                let takes = waiting.takes;
                let taken = self.taken.wait_while(waiting, |now| now.takes == takes);
                drop(taken.expect("nobody panics with input in hand"));
                continue;
            }
            let is_first = waiting.waiting.is_empty();
            let (fits, rest) = bytes.split_at(room.min(bytes.len()));
            waiting.waiting.extend(fits);
            self.count.store(waiting.waiting.len(), Ordering::SeqCst);
            drop(waiting);
            bytes = rest;
            if is_first {
                self.bell.ring();
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::time::Instant;

    /// Reads a pipe whose writing end is returned.
    fn piped(terminal: bool) -> (Arc<Typed>, Arc<Operator>, std::io::PipeWriter) {
        let (input, writer) = std::io::pipe().unwrap();
        let overflow = match terminal {
            true => Overflow::Drop,
            false => Overflow::Wait,
        };
        let bell = Bell::default();
        let operator = Arc::new(Operator::new(bell.clone()));
        let typed = Arc::new(Typed::new(bell, overflow));
        let (theirs, theirs_too) = (Arc::clone(&typed), Arc::clone(&operator));
        std::thread::spawn(move || {
            theirs.read(input, terminal, &theirs_too);
            theirs.close();
        });
        (typed, operator, writer)
    }

    fn eventually(what: impl Fn() -> bool) {
        let start = Instant::now();
        while !what() {
            assert!(start.elapsed() < Duration::from_secs(20), "it never came");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_guest_that_reads_nothing_holds_the_writer_of_a_pipe_back() {
        let (typed, _operator, mut writer) = piped(false);
        let all: Vec<u8> = (0..100_000u32).map(|n| (n % 251) as u8).collect();
        let sent = all.clone();
        let writes = std::thread::spawn(move || writer.write_all(&sent).unwrap());
        eventually(|| typed.count() == WAITING_MAX);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(typed.count(), WAITING_MAX);
        assert!(!writes.is_finished(), "a pipe takes 64 KiB, not 100 KB");
        let mut got = Vec::new();
        while typed.is_open() || typed.count() > 0 {
            got.extend(typed.take(16));
            assert!(typed.count() <= WAITING_MAX);
        }
        assert!(got == all, "each byte, in its order");
        writes.join().unwrap();
    }

    #[test]
    fn the_escape_is_seen_at_a_terminal_whose_guest_reads_nothing() {
        let (typed, operator, mut writer) = piped(true);
        writer.write_all(&vec![b'x'; PASTED_MAX + 5_000]).unwrap();
        assert!(operator.stop_asked().is_none());
        writer.write_all(&[b'y', ESCAPE, b'z']).unwrap();
        eventually(|| operator.stop_asked().is_some() && !typed.is_open());
        assert_eq!(typed.count(), PASTED_MAX);
        assert!(typed.take(usize::MAX).iter().all(|byte| *byte == b'x'));
    }

    #[test]
    fn a_key_that_marks_is_not_the_guests() {
        let (typed, operator, mut writer) = piped(true);
        let (give, take) = std::sync::mpsc::channel();
        operator.begin_marks(give);
        writer
            .write_all(&[MARK, b'a', MARK, MARK, b'b', MARK, ESCAPE])
            .unwrap();
        eventually(|| !typed.is_open());
        operator.end_marks(hindsight_replay::Complete::default());
        assert_eq!(typed.take(10), b"ab");
        assert_eq!(take.iter().count(), 4);
        let (typed, _operator, mut writer) = piped(false);
        writer.write_all(&[MARK]).unwrap();
        drop(writer);
        eventually(|| !typed.is_open());
        assert_eq!(typed.take(10), [MARK]);
    }

    #[test]
    fn an_escape_in_a_pipe_is_a_byte_like_any_other() {
        let (typed, operator, mut writer) = piped(false);
        writer.write_all(&[ESCAPE, b'z']).unwrap();
        drop(writer);
        eventually(|| !typed.is_open());
        assert_eq!(typed.take(10), [ESCAPE, b'z']);
        assert!(operator.stop_asked().is_none());
    }

    #[test]
    fn a_machine_that_sleeps_is_woken_by_the_first_byte_and_by_the_end() {
        let (typed, _operator, mut writer) = piped(false);
        writer.write_all(b"a").unwrap();
        assert!(typed.bell.wait(Some(Duration::from_secs(20))));
        eventually(|| typed.count() == 1);
        typed.take(1);
        drop(writer);
        while typed.is_open() {
            typed.bell.wait(Some(Duration::from_secs(20)));
        }
    }
}
