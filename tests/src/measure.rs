//! What the measuring programs share: runs that cannot hang, and numbers to paste.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::debian::Ran;

/// How long a program that was asked to stop may take to close its recording.
const GRACE: Duration = Duration::from_secs(20);
/// How often a running program is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A run, and whether it had to be stopped.
#[derive(Debug)]
pub struct Bounded {
    /// What it came to.
    pub ran: Ran,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// It did not end by itself.
    pub stopped: bool,
}

/// Threads that compute on much memory, twice as many as there are CPUs, until it is dropped: whoever else runs is
/// put off its CPU at every turn, and finds little of what it had in caches and TLB.
#[derive(Debug)]
pub struct Load {
    done: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u64>>,
}

impl Load {
    /// Bytes that each thread walks over.
    const BYTES: usize = 16 << 20;

    /// Starts them.
    pub fn start() -> Load {
        let done = Arc::new(AtomicBool::new(false));
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let walk = |done: Arc<AtomicBool>| {
            move || {
                let mut bytes = vec![1u8; Load::BYTES];
                let mut sum = 0;
                while !done.load(Ordering::Relaxed) {
                    for page in bytes.chunks_mut(4096) {
                        sum += u64::from(page[0]);
                        page[0] = sum as u8;
                    }
                }
                sum
            }
        };
        let threads = (0..2 * cpus).map(|_| std::thread::spawn(walk(done.clone())));
        Load {
            threads: threads.collect(),
            done,
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Runs `command`; after `limit` asks it to stop, as Ctrl-C does, and then makes it. For runs that
/// print little: nobody reads their output before they end.
pub fn bounded(mut command: Command, limit: Duration) -> Bounded {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .spawn()
        .expect("hindsight starts");
    let stopped = !ends_within(&mut child, limit);
    if stopped {
        stop(&mut child);
    }
    let output = child.wait_with_output().expect("hindsight ends");
    Bounded {
        ran: Ran::new(output),
        seconds: start.elapsed().as_secs_f64(),
        stopped,
    }
}

/// Asks a running program to stop, as Ctrl-C does, and makes it if it does not.
pub fn stop(child: &mut Child) {
    let pid = child.id().to_string();
    let asked = Command::new("kill").args(["-INT", &pid]).status();
    assert!(asked.is_ok_and(|status| status.success()), "kill works");
    if !ends_within(child, GRACE) {
        child.kill().expect("a child can be killed");
    }
}

fn ends_within(child: &mut Child, limit: Duration) -> bool {
    let start = Instant::now();
    while start.elapsed() < limit {
        if child
            .try_wait()
            .expect("a child can be waited for")
            .is_some()
        {
            return true;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    false
}

/// The one in the middle, the lower of two; nothing of nothing.
pub fn median<T: PartialOrd + Copy>(values: &[T]) -> Option<T> {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| a.partial_cmp(b).expect("numbers have an order"));
    sorted.get(sorted.len().saturating_sub(1) / 2).copied()
}

/// Adds to `sums` what a summary says of preemptions and where they landed: its numbers, and those
/// of its objects, whose name begins so.
pub fn add_landings(sums: &mut BTreeMap<String, u64>, summary: &Value) {
    let fields = summary.as_object().into_iter().flatten();
    for (name, value) in fields.filter(|(name, _)| {
        ["preempt", "land"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
    }) {
        let single = value.as_u64().map(|count| (name.clone(), count));
        let parts = value.as_object().into_iter().flatten();
        let parts =
            parts.filter_map(|(part, count)| Some((format!("{name}.{part}"), count.as_u64()?)));
        for (name, count) in single.into_iter().chain(parts) {
            *sums.entry(name).or_default() += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_lower_of_the_two_in_the_middle() {
        assert_eq!(median::<u64>(&[]), None);
        assert_eq!(median(&[3, 1, 2]), Some(2));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.0));
    }

    #[test]
    fn what_a_summary_says_of_landings_is_added_up() {
        let text = r#"{"preemptions": 3, "landed": {"user": 2, "kernel": 1}, "exits": 9}"#;
        let summary = serde_json::from_str(text).expect("it is JSON");
        let mut sums = BTreeMap::new();
        add_landings(&mut sums, &summary);
        add_landings(&mut sums, &summary);
        let expected = [("landed.kernel", 2), ("landed.user", 4), ("preemptions", 6)];
        assert_eq!(sums, expected.map(|(k, v)| (k.to_string(), v)).into());
    }

    #[test]
    fn a_run_that_does_not_end_is_stopped() {
        let mut command = Command::new("sleep");
        command.arg("600").stdout(Stdio::piped());
        command.stderr(Stdio::piped());
        let bounded = bounded(command, Duration::from_millis(50));
        assert!(bounded.stopped && bounded.ran.code == -1);
    }
}
