//! Standard output, on its way from the guest's console to whoever reads it.
//!
//! The vCPU's thread never writes: a reader that does not read would stop the machine, and the operator's wish to
//! end it would not be heard. It puts bytes into a queue with an end, from which a thread writes them. Where
//! the queue is full:
//!
//! * a **pipe** or a file gets all that the console says, so the machine waits for it, and guest time stands still
//!   meanwhile. Once the operator wants the machine to stop, it waits no longer.
//! * a **terminal** that takes bytes, however slowly, is waited for in the same way; one that has taken none for a
//!   second is not. The machine goes on, and when the terminal takes bytes again it is shown how many it has missed.
//!   A recording has them all.
//!
//! A replay, which nothing waits for, waits for its reader as any program does.

use std::fs::File;
use std::io::{Error, ErrorKind, IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::clock::HostClock;
use super::operator::Operator;

/// So much waits to be written.
const WAITING_MAX: usize = 256 << 10;
/// A terminal that has taken nothing for this long, with its queue full, has stopped.
const STALLED: Duration = Duration::from_secs(1);
/// At the end, a reader that has taken nothing for this long is not waited for.
const LAST_WAIT: Duration = Duration::from_secs(2);
/// And no reader is waited for longer, once the operator wants an end.
const LAST_WAIT_IN_ALL: Duration = Duration::from_secs(5);
/// How often whoever waits looks whether the operator wants the machine to stop.
const LOOK: Duration = Duration::from_millis(50);

/// What lets a console hold a machine back: its clock, and its operator.
#[derive(Clone, Debug)]
pub struct Hold {
    clock: Arc<HostClock>,
    operator: Arc<Operator>,
}

impl Hold {
    pub(super) fn new(clock: Arc<HostClock>, operator: Arc<Operator>) -> Hold {
        Hold { clock, operator }
    }

    fn stops(&self) -> bool {
        self.operator.stop_asked().is_some()
    }
}

/// How long guest time stands still.
struct Held<'a>(&'a HostClock);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.go_on();
    }
}

/// What became of what the guest wrote.
#[derive(Debug, Default)]
pub struct Shown {
    /// So many bytes were not written because nobody read.
    pub unread: u64,
    /// Why nothing more could be written; a reader that has closed the pipe is no such reason.
    pub failed: Option<Error>,
}

impl Shown {
    /// What there is to say about it.
    pub fn complaint(&self) -> Option<String> {
        match (&self.failed, self.unread) {
            (Some(error), _) => Some(format!(
                "the guest's console could not be written to standard output: {error}"
            )),
            (None, 0) => None,
            (None, bytes) => Some(format!(
                "{bytes} bytes of the guest's console were not shown, for standard output took no more"
            )),
        }
    }
}

/// The queue, and the thread that writes.
#[derive(Debug)]
pub struct StandardOutput {
    queue: Arc<Queue>,
    terminal: bool,
    hold: Option<Hold>,
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// Taken by the thread and not written yet.
    in_hand: usize,
    /// How often some were written.
    writes: u64,
    /// No reader, or the end: nothing more is written.
    over: bool,
    /// Nothing more will come.
    closed: bool,
    failed: Option<Error>,
    /// Not written since the last that was, and in all.
    missed: u64,
    unread: u64,
    /// `writes` when something was missed last.
    stalled_at: u64,
}

impl State {
    fn pending(&self) -> usize {
        self.waiting.len() + self.in_hand
    }

    fn is_full(&self, more: usize) -> bool {
        let pending = self.pending();
        !self.over && pending > 0 && pending + more > WAITING_MAX
    }

    fn miss(&mut self, bytes: usize) {
        self.missed += bytes as u64;
        self.unread += bytes as u64;
    }
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("nobody panics with the queue in hand")
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, LOOK);
        waited.expect("nobody panics with the queue in hand").0
    }
}

impl StandardOutput {
    /// Standard output, for a machine that `hold` can hold back, or for a replay.
    pub fn new(hold: Option<Hold>) -> std::io::Result<StandardOutput> {
        let stdout = std::io::stdout();
        let terminal = stdout.is_terminal();
        // A descriptor of our own: std's lock, held through a write that blocks, would stop all others.
        StandardOutput::over(stdout.as_fd().try_clone_to_owned()?, terminal, hold)
    }

    fn over(to: OwnedFd, terminal: bool, hold: Option<Hold>) -> std::io::Result<StandardOutput> {
        let queue = Arc::new(Queue::default());
        let theirs = Arc::clone(&queue);
        // A write to a terminal returns when all of it is taken, and shows no progress before.
        let most = if terminal { 1 << 10 } else { 64 << 10 };
        let thread = std::thread::Builder::new().name("screen".into());
        thread.spawn(move || write_out(&theirs, File::from(to), most))?;
        Ok(StandardOutput {
            queue,
            terminal,
            hold,
        })
    }

    /// Has `bytes` written, after all that came before.
    pub fn show(&mut self, bytes: &[u8]) {
        let mut state = self.wait_for_room(bytes.len());
        if state.over {
            return;
        }
        if state.is_full(bytes.len()) || self.misses(&state) {
            state.miss(bytes.len());
            return;
        }
        let missed = std::mem::take(&mut state.missed);
        if missed > 0 {
            let note =
                format!("\r\nhindsight: {missed} bytes of the console were not shown here\r\n");
            state.waiting.extend_from_slice(note.as_bytes());
        }
        state.waiting.extend_from_slice(bytes);
        self.queue.changed.notify_all();
    }

    /// Waits until there is room for `bytes` bytes, or until waiting makes no sense.
    fn wait_for_room(&self, bytes: usize) -> MutexGuard<'_, State> {
        let mut state = self.queue.state();
        if !state.is_full(bytes) || self.misses(&state) {
            return state;
        }
        let _held = self.hold.as_ref().map(|hold| {
            hold.clock.hold();
            Held(&hold.clock)
        });
        let (mut writes, mut since) = (state.writes, Instant::now());
        while state.is_full(bytes) {
            state = self.queue.wait(state);
            if state.writes != writes {
                (writes, since) = (state.writes, Instant::now());
            }
            let stalled = self.terminal && self.hold.is_some() && since.elapsed() >= STALLED;
            if state.is_full(bytes) && (stalled || self.stops()) {
                state.stalled_at = state.writes;
                break;
            }
        }
        state
    }

    /// Whether what comes now is missed like what came before: a terminal is shown once what it has
    /// missed, and a pipe has nothing after a gap.
    fn misses(&self, state: &State) -> bool {
        state.missed > 0 && !(self.terminal && state.stalled_at != state.writes)
    }

    fn stops(&self) -> bool {
        self.hold.as_ref().is_some_and(Hold::stops)
    }

    /// Waits until all is written, within reason.
    pub fn finish(&mut self) -> Shown {
        let mut state = self.queue.state();
        state.closed = true;
        self.queue.changed.notify_all();
        let begun = Instant::now();
        let (mut writes, mut since) = (state.writes, begun);
        while state.pending() > 0 && !state.over {
            state = self.queue.wait(state);
            if state.writes != writes {
                (writes, since) = (state.writes, Instant::now());
            }
            let hopeless = since.elapsed() >= LAST_WAIT
                || (self.stops() && begun.elapsed() >= LAST_WAIT_IN_ALL);
            if self.hold.is_some() && hopeless {
                let bytes = state.pending();
                state.miss(bytes);
                break;
            }
        }
        state.over = true;
        Shown {
            unread: state.unread,
            failed: state.failed.take(),
        }
    }
}

/// The thread.
fn write_out(queue: &Queue, mut to: File, most: usize) {
    loop {
        let mut state = queue.state();
        while state.waiting.is_empty() && !state.closed && !state.over {
            let changed = queue.changed.wait(state);
            state = changed.expect("nobody panics with the queue in hand");
        }
        if state.over || state.waiting.is_empty() {
            return;
        }
        let taken = std::mem::take(&mut state.waiting);
        state.in_hand = taken.len();
        drop(state);
        let mut rest = &taken[..];
        while !rest.is_empty() {
            let written = write_some(&mut to, &rest[..rest.len().min(most)]);
            let mut state = queue.state();
            match written {
                Ok(count) => {
                    rest = &rest[count..];
                    state.in_hand -= count;
                    state.writes += 1;
                }
                Err(error) => {
                    state.over = true;
                    // A reader that went away wants no more.
                    state.failed =
                        Some(error).filter(|error| error.kind() != ErrorKind::BrokenPipe);
                }
            }
            queue.changed.notify_all();
            if state.over {
                return;
            }
        }
    }
}

fn write_some(to: &mut File, bytes: &[u8]) -> Result<usize, Error> {
    loop {
        match to.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Somebody else has made it so; it is the same file to them.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let _ = poll(&mut [PollFd::new(to, PollFlags::OUT)], None);
            }
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::bell::Bell;
    use std::io::{PipeReader, Read};

    fn hold() -> Hold {
        let operator = Arc::new(Operator::new(Bell::default()));
        Hold::new(Arc::new(HostClock::new()), operator)
    }

    fn screen(terminal: bool, hold: Option<&Hold>) -> (StandardOutput, PipeReader) {
        let (reader, writer) = std::io::pipe().unwrap();
        let screen = StandardOutput::over(writer.into(), terminal, hold.cloned()).unwrap();
        (screen, reader)
    }

    /// More than a pipe and the queue take together.
    const MUCH: usize = 2 << 20;

    fn numbered(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|n| (n % 251) as u8).collect()
    }

    #[test]
    fn a_slow_pipe_gets_every_byte_and_guest_time_stands_still_while_it_does_not_read() {
        let hold = hold();
        let (mut screen, mut reader) = screen(false, Some(&hold));
        let reads = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(1_500));
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        let (start, before) = (Instant::now(), hold.clock.now());
        for part in numbered(MUCH).chunks(1_000) {
            screen.show(part);
        }
        let passed = Duration::from_nanos(hold.clock.now() - before);
        assert!(
            start.elapsed() >= Duration::from_millis(1_400),
            "it was held back"
        );
        assert!(
            passed + Duration::from_millis(1_000) < start.elapsed(),
            "{passed:?}"
        );
        let shown = screen.finish();
        assert_eq!(shown.complaint(), None);
        assert!(reads.join().unwrap() == numbered(MUCH));
    }

    #[test]
    fn a_pipe_that_nobody_reads_holds_the_machine_back_until_it_is_to_stop_and_the_end_no_longer() {
        let hold = hold();
        let (mut screen, _reader) = screen(false, Some(&hold));
        let operator = Arc::clone(&hold.operator);
        let stops = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(1_200));
            operator.stop();
        });
        let start = Instant::now();
        for part in numbered(MUCH).chunks(1_000) {
            screen.show(part);
        }
        assert!(
            start.elapsed() >= Duration::from_millis(1_100),
            "it was held back"
        );
        stops.join().unwrap();
        let shown = screen.finish();
        assert!(start.elapsed() < Duration::from_secs(10), "it ends in time");
        // A pipe holds 64 KiB.
        assert!(shown.unread > (MUCH - (128 << 10)) as u64, "{shown:?}");
        assert!(shown.complaint().unwrap().contains("not shown"));
    }

    #[test]
    fn a_terminal_that_has_stopped_misses_bytes_and_is_told_how_many_once_it_goes_on() {
        let hold = hold();
        let (mut screen, mut reader) = screen(true, Some(&hold));
        let start = Instant::now();
        for part in numbered(MUCH).chunks(1_000) {
            screen.show(part);
        }
        let waited = start.elapsed();
        assert!(
            waited >= STALLED && waited < Duration::from_secs(10),
            "once: {waited:?}"
        );
        let reads = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        while screen.queue.state().pending() > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        screen.show(b"and on");
        let shown = screen.finish();
        let got = reads.join().unwrap();
        let note = format!(
            "hindsight: {} bytes of the console were not shown here\r\nand on",
            shown.unread
        );
        assert!(got.ends_with(note.as_bytes()));
        let kept = MUCH - shown.unread as usize;
        assert!(kept >= WAITING_MAX && got[..kept] == numbered(MUCH)[..kept]);
    }

    #[test]
    fn a_replay_waits_for_its_reader_however_long_that_takes() {
        let (mut screen, mut reader) = screen(true, None);
        let reads = std::thread::spawn(move || {
            std::thread::sleep(STALLED + LAST_WAIT + Duration::from_millis(500));
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        screen.show(&numbered(MUCH));
        assert_eq!(screen.finish().complaint(), None);
        assert!(reads.join().unwrap() == numbered(MUCH));
    }

    #[test]
    fn a_reader_that_closed_the_pipe_wants_no_more_and_a_full_disk_is_an_error() {
        let hold = hold();
        let (mut closed, reader) = screen(false, Some(&hold));
        drop(reader);
        closed.show(&numbered(MUCH));
        closed.show(&numbered(MUCH));
        assert_eq!(closed.finish().complaint(), None);

        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut full = StandardOutput::over(full.into(), false, Some(hold)).unwrap();
        full.show(&numbered(MUCH));
        let complaint = full.finish().complaint().unwrap();
        assert!(complaint.contains("No space left"), "{complaint}");
    }
}
