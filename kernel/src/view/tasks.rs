//! The tasks of a kernel: its processes, their threads, and threads of its own.

use super::error::{Listing, ViewError};
use super::memory::{Left, Memory, text};
use super::types::{Field, Lookup, Types, variable};

/// More tasks than this are not shown.
const TASKS: usize = 1 << 14;
/// A name is no longer (TASK_COMM_LEN).
const NAME_BYTES: u32 = 16;
/// Niceness 0, as `static_prio` counts (DEFAULT_PRIO, include/linux/sched/prio.h).
const NICE_ZERO: i64 = 120;

/// PF_KTHREAD of include/linux/sched.h, which is in no kernel's types; the same since 2.6.27.
const KERNEL_THREAD: u64 = 0x0020_0000;
/// TASK_UNINTERRUPTIBLE, TASK_NOLOAD and TASK_RTLOCK_WAIT of the same file, as they are since 4.14.
const UNINTERRUPTIBLE: u64 = 0x2;
const NO_LOAD: u64 = 0x400;
const RT_LOCK_WAIT: u64 = 0x1000;

/// A process, one of its threads, or a thread of the kernel's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Its `struct task_struct`, a virtual address of the kernel's.
    pub address: u64,
    /// Its own number; 0 is the processor's idle task.
    pub pid: i32,
    /// The number of its process: that of the process's first thread.
    pub tgid: i32,
    /// The number of the process that made it, or that has inherited it; 0 is none.
    pub parent: i32,
    /// Its name, of at most 15 bytes.
    pub name: String,
    /// What it does.
    pub state: State,
    /// Whether it is a thread of the kernel's own.
    pub is_kernel: bool,
    /// When it began, in nanoseconds since the kernel's clock did.
    pub start_ns: u64,
    /// The user that it acts as.
    pub uid: u32,
    /// Its niceness.
    pub nice: i64,
    /// How many threads its process has.
    pub threads: u32,
    /// Whether its process leads a session.
    pub leads_session: bool,
    /// Its `struct mm_struct`, a virtual address of the kernel's; 0 if it has no memory of its own, as a thread of the
    /// kernel's or one that has ended.
    pub mm: u64,
}

impl Task {
    /// Whether it is the first thread of its process.
    pub fn is_process(&self) -> bool {
        self.pid == self.tgid
    }
}

/// What a task does, as `/proc/PID/stat` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It runs, or would if a processor were free.
    Running,
    /// It waits, and can be interrupted.
    Sleeping,
    /// It waits, and cannot be interrupted.
    DiskSleep,
    /// It is stopped by a signal.
    Stopped,
    /// It is stopped by a debugger.
    Traced,
    /// It has ended, and nobody has asked how.
    Zombie,
    /// It has ended.
    Dead,
    /// A thread of the kernel's that is parked.
    Parked,
    /// A thread of the kernel's that waits for work.
    Idle,
    /// A state that no kernel has.
    Unknown,
}

impl State {
    /// The letter of `ps`.
    pub fn letter(self) -> char {
        match self {
            State::Running => 'R',
            State::Sleeping => 'S',
            State::DiskSleep => 'D',
            State::Stopped => 'T',
            State::Traced => 't',
            State::Zombie => 'Z',
            State::Dead => 'X',
            State::Parked => 'P',
            State::Idle => 'I',
            State::Unknown => '?',
        }
    }

    /// By the two words that a task has: `task_state_index` of include/linux/sched.h.
    pub(super) fn of(state: u64, exit_state: u64) -> State {
        let both = state | exit_state;
        if state == UNINTERRUPTIBLE | NO_LOAD {
            return State::Idle;
        }
        // The highest of the bits that are told of decides.
        match (both & 0x7f).checked_ilog2() {
            None if both & RT_LOCK_WAIT != 0 => State::DiskSleep,
            None => State::Running,
            Some(0) => State::Sleeping,
            Some(1) => State::DiskSleep,
            Some(2) => State::Stopped,
            Some(3) => State::Traced,
            Some(4) => State::Dead,
            Some(5) => State::Zombie,
            Some(6) => State::Parked,
            Some(_) => State::Unknown,
        }
    }
}

/// Where the tasks are, and what is in one.
#[derive(Clone, Debug)]
pub(super) struct Tasks {
    /// The first one, `init_task`.
    first: u64,
    /// The address of the pointer to the running task on a processor whose per-CPU data are not moved.
    current: u64,
    /// How far each processor's are moved: `__per_cpu_offset`; without it, there is one, and they are not.
    per_cpu_offset: Option<u64>,
    state: Field,
    exit_state: Field,
    flags: Field,
    pid: Field,
    tgid: Field,
    parent: Field,
    name: Field,
    next: Field,
    next_thread: Field,
    signal: Field,
    threads: Field,
    thread_count: Field,
    leader: Field,
    mm: Field,
    start: Field,
    cred: Field,
    uid: Field,
    priority: Field,
}

impl Tasks {
    pub(super) fn find(types: &Types<'_>, lookup: Lookup<'_>) -> Result<Tasks, ViewError> {
        let field = |name| types.field(name);
        // From 6.2 to 6.14 it is one of several variables in a structure.
        let current = match lookup("current_task") {
            Some(address) => address,
            None => field("pcpu_hot.current_task")?.of(variable(lookup, "pcpu_hot")?),
        };
        Ok(Tasks {
            first: variable(lookup, "init_task")?,
            current,
            per_cpu_offset: lookup("__per_cpu_offset"),
            // Before 5.14 it has 64 bits.
            state: types.either(&["task_struct.__state", "task_struct.state"])?,
            exit_state: field("task_struct.exit_state")?,
            flags: field("task_struct.flags")?,
            pid: field("task_struct.pid")?,
            tgid: field("task_struct.tgid")?,
            parent: field("task_struct.real_parent")?,
            name: field("task_struct.comm")?,
            next: field("task_struct.tasks")?,
            next_thread: field("task_struct.thread_node")?,
            signal: field("task_struct.signal")?,
            threads: field("signal_struct.thread_head")?,
            thread_count: field("signal_struct.nr_threads")?,
            leader: field("signal_struct.leader")?,
            mm: field("task_struct.mm")?,
            // Before 5.5 the clock that stands still while the machine sleeps is the only one.
            start: types.either(&["task_struct.start_boottime", "task_struct.start_time"])?,
            cred: field("task_struct.cred")?,
            uid: field("cred.euid.val")?,
            priority: field("task_struct.static_prio")?,
        })
    }

    /// The task that the first processor runs.
    pub(super) fn current(&self, memory: &mut dyn Memory) -> Result<Task, ViewError> {
        let moved = match self.per_cpu_offset {
            Some(table) => memory.word(table, "__per_cpu_offset")?,
            None => 0,
        };
        let current = memory.word(self.current.wrapping_add(moved), "current_task")?;
        self.task(memory, current)
    }

    /// All processes, each followed by its other threads. The idle task is not among them.
    pub(super) fn all(&self, memory: &mut dyn Memory) -> Listing<Task> {
        let mut found = Listing::default();
        let mut left = Left::new("tasks", TASKS);
        let processes = memory.list(self.next.of(self.first), "tasks", &mut left);
        for node in processes.items {
            let leader = match self.task(memory, self.next.container(node)) {
                Ok(leader) => leader,
                Err(error) => {
                    found.note(error);
                    continue;
                }
            };
            let address = leader.address;
            found.items.push(leader);
            // A process whose threads have all ended has no list of them.
            let signal = memory.field(address, self.signal).unwrap_or(0);
            if signal == 0 {
                continue;
            }
            let threads = memory.list(self.threads.of(signal), "threads", &mut left);
            let threads_broken = threads.broken;
            for node in threads.items {
                let thread = self.next_thread.container(node);
                if thread == address {
                    continue;
                }
                match self.task(memory, thread) {
                    Ok(thread) => found.items.push(thread),
                    Err(error) => found.note(error),
                }
            }
            threads_broken
                .into_iter()
                .for_each(|error| found.note(error));
        }
        if let Some(error) = processes.broken {
            found.note(error);
        }
        found
    }

    fn task(&self, memory: &mut dyn Memory, at: u64) -> Result<Task, ViewError> {
        let mut name = [0; NAME_BYTES as usize];
        let name = &mut name[..self.name.bytes.min(NAME_BYTES) as usize];
        memory.fill(self.name.of(at), self.name.name, name)?;
        let state = memory.field(at, self.state)?;
        let exit_state = memory.field(at, self.exit_state)?;
        let parent = match memory.field(at, self.parent)? {
            0 => 0,
            parent => memory.field(parent, self.tgid)?,
        };
        let cred = memory.field(at, self.cred)?;
        let (mut threads, mut leader) = (0, 0);
        if let signal @ 1.. = memory.field(at, self.signal)? {
            threads = memory.field(signal, self.thread_count)?;
            leader = memory.field(signal, self.leader)?;
        }
        let priority = (memory.field(at, self.priority)? as u32).cast_signed();
        Ok(Task {
            address: at,
            pid: (memory.field(at, self.pid)? as u32).cast_signed(),
            tgid: (memory.field(at, self.tgid)? as u32).cast_signed(),
            parent: (parent as u32).cast_signed(),
            name: text(name),
            state: State::of(state, exit_state),
            is_kernel: memory.field(at, self.flags)? & KERNEL_THREAD != 0,
            start_ns: memory.field(at, self.start)?,
            uid: memory.field(cred, self.uid)? as u32,
            nice: i64::from(priority) - NICE_ZERO,
            threads: threads as u32,
            leads_session: leader != 0,
            mm: memory.field(at, self.mm)?,
        })
    }
}
