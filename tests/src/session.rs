//! Runs of the program that are watched as they go: what the guest's console says is read as it comes,
//! and answered. A session is a file of such questions and answers, `guest-images/session` for one.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::debian::Ran;
use crate::measure::{Bounded, stop};

/// How long an operator takes to see that somebody asks. A login throws away what was typed before it asked,
/// and asks a little after it says so.
const BEFORE_TYPING: Duration = Duration::from_secs(3);

/// A step of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Wait until the console has said this, after what the step before waited for.
    Wait(String),
    /// Type this and a newline.
    Type(String),
}

/// Reads a session: lines `< TEXT` and `> TEXT`; empty ones and those with `#` in front say nothing.
///
/// # Panics
///
/// On any other line.
pub fn parse(text: &str) -> Vec<Step> {
    let lines = text.lines().enumerate();
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|(at, line)| match line.split_at_checked(2) {
            Some(("< ", text)) => Step::Wait(text.into()),
            Some(("> ", text)) => Step::Type(text.into()),
            _ => panic!("line {} of a session is no step: {line}", at + 1),
        })
        .collect()
}

/// A run under way.
#[derive(Debug)]
pub struct Watched {
    child: Child,
    start: Instant,
    limit: Duration,
    chunks: Receiver<Vec<u8>>,
    console: Vec<u8>,
    /// Up to where the console has been waited for.
    seen: usize,
    errors: JoinHandle<Vec<u8>>,
}

impl Watched {
    /// Starts `command`, which may take so long.
    pub fn start(mut command: Command, limit: Duration) -> Watched {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("hindsight starts");
        let mut stdout = child.stdout.take().expect("standard output is piped");
        let mut stderr = child.stderr.take().expect("standard error is piped");
        let (sender, chunks) = channel();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 0x1_0000];
            while let Ok(count @ 1..) = stdout.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        let errors = std::thread::spawn(move || {
            let mut all = Vec::new();
            let _ = stderr.read_to_end(&mut all);
            all
        });
        Watched {
            child,
            start: Instant::now(),
            limit,
            chunks,
            console: Vec::new(),
            seen: 0,
            errors,
        }
    }

    /// How long it may still take.
    pub fn left(&self) -> Duration {
        self.limit.saturating_sub(self.start.elapsed())
    }

    /// Takes the next piece of the console. False at its end, or when time is up.
    fn take(&mut self) -> Result<(), RecvTimeoutError> {
        let chunk = self.chunks.recv_timeout(self.left())?;
        self.console.extend_from_slice(&chunk);
        Ok(())
    }

    /// Waits until the console has said `text` after what was waited for before. False if the run ended
    /// first, or took too long.
    pub fn wait_for(&mut self, text: &str) -> bool {
        let text = text.as_bytes();
        assert!(!text.is_empty(), "nothing is always there");
        loop {
            let rest = &self.console[self.seen..];
            if let Some(at) = rest.windows(text.len()).position(|part| part == text) {
                self.seen += at + text.len();
                return true;
            }
            if self.take().is_err() {
                return false;
            }
        }
    }

    /// Types a line.
    pub fn type_line(&mut self, line: &str) {
        let stdin = self.child.stdin.as_mut().expect("standard input is piped");
        // A guest that has ended reads nothing; what it said shows that.
        let _ = stdin.write_all(format!("{line}\n").as_bytes());
        let _ = stdin.flush();
    }

    /// Plays a session. False if the console did not say what it waits for.
    pub fn play(&mut self, steps: &[Step]) -> bool {
        steps.iter().all(|step| match step {
            Step::Wait(text) => self.wait_for(text),
            Step::Type(line) => {
                std::thread::sleep(BEFORE_TYPING);
                self.type_line(line);
                true
            }
        })
    }

    /// Waits for its end; stops it when time is up.
    pub fn finish(mut self) -> Bounded {
        let stopped = loop {
            match self.take() {
                Ok(()) => {}
                Err(RecvTimeoutError::Disconnected) => break false,
                Err(RecvTimeoutError::Timeout) => break true,
            }
        };
        if stopped {
            stop(&mut self.child);
            while self.chunks.recv().is_ok_and(|chunk| {
                self.console.extend_from_slice(&chunk);
                true
            }) {}
        }
        let mut output = self.child.wait_with_output().expect("hindsight ends");
        output.stdout = self.console;
        output.stderr = self.errors.join().expect("the reader of errors ends");
        Bounded {
            ran: Ran::new(output),
            seconds: self.start.elapsed().as_secs_f64(),
            stopped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn shell(script: &str, limit: Duration) -> Watched {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Watched::start(command, limit)
    }

    #[test]
    fn a_session_is_read_line_by_line() {
        let steps = parse("# A comment\n\n< login: \n> root\n");
        let expected = [Step::Wait("login: ".into()), Step::Type("root".into())];
        assert_eq!(steps, expected);
    }

    #[test]
    fn the_session_of_the_debian_image_is_one() {
        let steps = parse(include_str!("../../guest-images/session"));
        assert!(steps.contains(&Step::Type("poweroff".into())));
    }

    #[test]
    fn what_the_console_asks_is_answered() {
        let mut watched = shell(
            r#"printf 'name? '; read a; printf "$a. age? "; read b; echo "$a $b""#,
            LIMIT,
        );
        let steps = parse("< ? \n> Ada\n< ? \n> 36\n< Ada 36\n");
        assert!(watched.play(&steps));
        let end = watched.finish();
        assert_eq!(end.ran.expect(0).text(), "name? Ada. age? Ada 36\n");
        assert!(!end.stopped);
    }

    #[test]
    fn what_is_waited_for_is_not_found_twice() {
        let mut watched = shell("echo once", LIMIT);
        assert!(watched.wait_for("once"));
        assert!(!watched.wait_for("once"));
    }

    #[test]
    fn a_run_that_takes_too_long_is_stopped() {
        let mut watched = shell("echo begun; exec sleep 600", Duration::from_millis(300));
        assert!(watched.wait_for("begun"));
        assert!(!watched.wait_for("never"));
        assert!(watched.finish().stopped);
    }
}
