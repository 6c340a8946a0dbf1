//! Lists of CPUs as Linux writes them, and the thread's own.

use std::collections::BTreeSet;
use std::fmt;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::error::CounterError;

/// Some CPUs, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct CpuList(BTreeSet<usize>);

impl CpuList {
    /// Reads `0-3,8` (Linux, Documentation/admin-guide/cputopology.rst).
    pub(crate) fn parse(text: &str) -> Option<CpuList> {
        let mut cpus = BTreeSet::new();
        for part in text.trim().split(',').filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
            if last < first || last >= CpuSet::MAX_CPU {
                return None;
            }
            cpus.extend(first..=last);
        }
        Some(CpuList(cpus))
    }

    /// Those the calling thread may run on.
    pub(crate) fn of_this_thread() -> Result<CpuList, CounterError> {
        let set = sched_getaffinity(None).map_err(|error| CounterError::Call {
            call: "sched_getaffinity",
            source: error.into(),
        })?;
        let cpus = 0..CpuSet::MAX_CPU;
        Ok(CpuList(cpus.filter(|cpu| set.is_set(*cpu)).collect()))
    }

    /// Keeps the calling thread to these.
    pub(crate) fn keep_this_thread(&self) -> Result<(), CounterError> {
        let mut set = CpuSet::new();
        for cpu in self.iter() {
            set.set(cpu);
        }
        sched_setaffinity(None, &set).map_err(|error| CounterError::Call {
            call: "sched_setaffinity",
            source: error.into(),
        })
    }

    /// Those that are in both.
    pub(crate) fn and(&self, other: &CpuList) -> CpuList {
        CpuList(self.0.intersection(&other.0).copied().collect())
    }

    /// Whether it is empty.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// In ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> {
        self.0.iter().copied()
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.0.iter().copied().peekable();
        let mut comma = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while let Some(next) = cpus.next_if(|next| *next == last + 1) {
                last = next;
            }
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
            comma = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_and_written_as_linux_does() {
        for text in ["0", "0-3", "0-3,8", "1,3,5-6", ""] {
            assert_eq!(CpuList::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(CpuList::parse("0-1,2\n").unwrap().to_string(), "0-2");
        for text in ["a", "3-1", "1-", "99999999999999999999", "0-4294967295"] {
            assert_eq!(CpuList::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_thread_can_be_kept_to_cpus_it_has() {
        let work = || {
            let allowed = CpuList::of_this_thread().unwrap();
            let first = CpuList(allowed.iter().take(1).collect());
            first.keep_this_thread().unwrap();
            assert_eq!(CpuList::of_this_thread().unwrap(), first);
            assert_eq!(allowed.and(&first), first);
            assert!(CpuList::default().is_empty() && !first.is_empty());
        };
        std::thread::spawn(work).join().unwrap();
    }
}
