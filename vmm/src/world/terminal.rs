//! The operator's terminal: raw while a machine runs, and afterwards exactly as it was.
//!
//! However this program ends or is stopped: by its end, an error, a panic, a signal to stop or to suspend, or a
//! crash. Only SIGKILL and SIGSTOP leave no time for it.

use std::io::IsTerminal;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetpgrp,
    tcgetwinsize, tcsetattr,
};

use crate::kvm;

/// As it was when it was first made raw.
static ORIGINAL: OnceLock<Termios> = OnceLock::new();
/// It is raw, by us.
static RAW: AtomicBool = AtomicBool::new(false);
/// A machine runs, and wants it raw.
static WANTED: AtomicBool = AtomicBool::new(false);

/// Columns and rows of the terminal on standard output. None if there is no terminal, or one that does not know
/// its size and says 0: the guest keeps its own idea then.
pub(super) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(std::io::stdout()).ok()?;
    known_size(size.ws_col, size.ws_row)
}

fn known_size(columns: u16, rows: u16) -> Option<(u16, u16)> {
    (columns > 0 && rows > 0).then_some((columns, rows))
}

/// A terminal on standard input that is raw until this is dropped.
#[derive(Debug)]
pub(crate) struct RawTerminal(());

impl RawTerminal {
    /// `None` if standard input is no terminal.
    pub(crate) fn enter() -> Option<RawTerminal> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let original = tcgetattr(&stdin).ok()?;
        ORIGINAL.get_or_init(|| original);
        // A terminal that cannot be restored after a crash is raw nevertheless.
        let _ = kvm::before_crash(restore);
        WANTED.store(true, Ordering::SeqCst);
        enter_again();
        Some(RawTerminal(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        WANTED.store(false, Ordering::SeqCst);
        restore();
    }
}

/// Sets the terminal back to what it was, if it is raw by us. May be called by a handler of signals.
pub(super) fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some(original) = ORIGINAL.get()
        && is_ours()
    {
        // At once: a terminal that is stopped would keep whoever waits for its output waiting for good. And
        // nothing better can be done about one that is gone.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, original);
    }
}

/// Makes it raw, again, if a machine wants that and no other program has it now.
pub(super) fn enter_again() {
    if WANTED.load(Ordering::SeqCst)
        && let Some(original) = ORIGINAL.get()
        && is_ours()
        && tcsetattr(std::io::stdin(), OptionalActions::Now, &raw(original)).is_ok()
    {
        RAW.store(true, Ordering::SeqCst);
    }
}

/// Whether no other program has the terminal: one in the background would be stopped if it touched it.
pub(super) fn is_ours() -> bool {
    match tcgetpgrp(std::io::stdin()) {
        Ok(group) => group == rustix::process::getpgrp(),
        // Whose session has another terminal, or none, is in nobody's background.
        Err(_) => true,
    }
}

/// Each key as it is typed goes to the guest, whose own terminal makes of it what it likes: Ctrl-C, Ctrl-S
/// and Enter too. What is shown keeps its treatment, as lines of our own are shown too.
fn raw(original: &Termios) -> Termios {
    let mut raw = original.clone();
    raw.input_modes -= InputModes::IGNBRK
        | InputModes::BRKINT
        | InputModes::PARMRK
        | InputModes::ISTRIP
        | InputModes::INLCR
        | InputModes::IGNCR
        | InputModes::ICRNL
        | InputModes::IXON;
    raw.local_modes -=
        LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG | LocalModes::IEXTEN;
    raw.special_codes[SpecialCodeIndex::VMIN] = 1;
    raw.special_codes[SpecialCodeIndex::VTIME] = 0;
    raw
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_of_size_0_does_not_know_its_size() {
        assert_eq!(known_size(80, 24), Some((80, 24)));
        for (columns, rows) in [(0, 0), (80, 0), (0, 24)] {
            assert_eq!(known_size(columns, rows), None);
        }
    }
}
