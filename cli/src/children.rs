//! Work that is shared out among processes of this program.

use std::io;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// This program again, for one of its commands: it reads nothing, and what it says is ours to hear.
pub(crate) fn this_program(command: &str) -> io::Result<Command> {
    let mut program = Command::new(std::env::current_exe()?);
    program
        .arg(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Ok(program)
}

/// How many processes there are room for, if nobody says: one for each CPU.
pub(crate) fn usual_jobs() -> u64 {
    std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64)
}

/// Does `work` for each number below `count`, `jobs` at a time: what it gives, in their order.
pub(crate) fn share_out<T: Send>(
    jobs: u64,
    count: u64,
    work: impl Fn(u64) -> io::Result<T> + Sync,
) -> io::Result<Vec<T>> {
    let next = AtomicU64::new(0);
    let done = Mutex::new(Vec::new());
    let worker = || -> io::Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::SeqCst);
            if number >= count {
                return Ok(());
            }
            let given = work(number)?;
            let mut done = done.lock().expect("nobody panics with it in hand");
            done.push((number, given));
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.min(count)).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| {
            let worked = worker.join();
            worked.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })?;
    let mut done = done.into_inner().expect("nobody panics with it in hand");
    done.sort_by_key(|(number, _)| *number);
    Ok(done.into_iter().map(|(_, given)| given).collect())
}

/// What a process said that failed, but for lines that begin with `but`. Its words, not made harmless.
pub(crate) fn said(ran: &Output, but: Option<&str>) -> String {
    let said = String::from_utf8_lossy(&ran.stderr);
    let is_said = |line: &&str| but.is_none_or(|but| !line.starts_with(but));
    let said: Vec<&str> = said.lines().filter(is_said).collect();
    let said = said.join("\n");
    match said
        .trim()
        .strip_prefix("hindsight: ")
        .unwrap_or(said.trim())
    {
        "" => format!("its process ended by {}", ran.status),
        said => said.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shared_out_comes_back_in_order_and_a_failure_with_it() {
        for jobs in [1, 3, 100] {
            let given = share_out(jobs, 20, |number| Ok(number * number)).unwrap();
            assert_eq!(
                given,
                (0..20).map(|number| number * number).collect::<Vec<_>>()
            );
        }
        let fails = |number| match number {
            7 => Err(io::Error::other("seven")),
            number => Ok(number),
        };
        assert!(share_out(3, 20, fails).is_err());
        assert_eq!(share_out(3, 7, fails).unwrap().len(), 7);
    }
}
