//! A running kernel, or a dead one, as its own memory tells of it: which tasks there are, what they run and have mapped,
//! and what it has said.
//!
//! Where things are comes from the kernel's own types and symbols, never from offsets that somebody has written down: one
//! that lacks something says what it lacks. What is read is whatever the guest has there. A list may lead in a circle, a
//! length may be any number and a pointer lead nowhere: each walk has a limit, and says where it broke off.
//!
//! Nothing here knows how memory is got at; that is what [`Memory`] is for.

mod error;
mod log;
mod maps;
mod memory;
mod paths;
mod programs;
mod tasks;
mod types;

pub use error::{Listing, ViewError};
pub use log::Message;
pub use maps::Mapping;
pub use memory::Memory;
pub use tasks::{State, Task};

use crate::image::Elf;
use crate::symbols::Symbols;
use crate::symbols::btf::Btf;
use log::Log;
use maps::Maps;
use paths::Paths;
use programs::Programs;
use tasks::Tasks;
use types::{Lookup, Types, variable};

/// Where a kernel has what, as far as it is known.
#[derive(Clone, Debug)]
pub struct View {
    page_table: u64,
    tasks: Tasks,
    programs: Result<Programs, ViewError>,
    paths: Result<Paths, ViewError>,
    maps: Result<Maps, ViewError>,
    log: Result<Log, ViewError>,
}

impl View {
    /// That of the kernel in this image.
    ///
    /// # Errors
    ///
    /// It does not say where its variables are, does not describe its types, or has tasks of a form that is not known.
    pub fn new(elf: &Elf<'_>) -> Result<View, ViewError> {
        let symbols = Symbols::find(elf.file()).ok_or(ViewError::NoSymbols)?;
        let btf = Btf::of_kernel(elf, &symbols).ok_or(ViewError::NoTypes)?;
        View::of(&Types(btf), &|name| symbols.lookup(name))
    }

    fn of(types: &Types<'_>, lookup: Lookup<'_>) -> Result<View, ViewError> {
        Ok(View {
            page_table: variable(lookup, "init_top_pgt")?,
            tasks: Tasks::find(types, lookup)?,
            programs: Programs::find(types),
            paths: Paths::find(types),
            maps: Maps::find(types, lookup),
            log: Log::find(types, lookup),
        })
    }

    /// Virtual address of the kernel's own top-level page table, which is part of its image.
    pub fn page_table(&self) -> u64 {
        self.page_table
    }

    /// The task that the processor runs; in the kernel's idle loop that is the idle task, with number 0.
    ///
    /// # Errors
    ///
    /// The kernel has not come so far, or its memory is broken.
    pub fn current(&self, memory: &mut dyn Memory) -> Result<Task, ViewError> {
        self.tasks.current(memory)
    }

    /// All processes, each followed by its other threads, in the order in which the kernel has them; without the idle task.
    pub fn tasks(&self, memory: &mut dyn Memory) -> Listing<Task> {
        self.tasks.all(memory)
    }

    /// Virtual address, of the kernel's, of a task's top-level page table; 0 if the task has no memory of its own.
    ///
    /// # Errors
    ///
    /// This kernel does not say so, or its memory is broken.
    pub fn page_table_of(&self, memory: &mut dyn Memory, task: &Task) -> Result<u64, ViewError> {
        of_kernel(&self.programs)?.page_table(memory, task)
    }

    /// The path of the file that a task executes; `None` for one without, such as a thread of the kernel's.
    ///
    /// # Errors
    ///
    /// This kernel does not say so, or its memory is broken.
    pub fn executable(
        &self,
        memory: &mut dyn Memory,
        task: &Task,
    ) -> Result<Option<String>, ViewError> {
        match of_kernel(&self.programs)?.file(memory, task)? {
            0 => Ok(None),
            file => of_kernel(&self.paths)?.of_file(memory, file).map(Some),
        }
    }

    /// What the kernel told a program as it began: the bytes of `/proc/PID/auxv`. Empty for a thread of the kernel's.
    ///
    /// # Errors
    ///
    /// This kernel does not say so, or its memory is broken.
    pub fn auxv(&self, memory: &mut dyn Memory, task: &Task) -> Result<Vec<u8>, ViewError> {
        of_kernel(&self.programs)?.auxv(memory, task)
    }

    /// A program's arguments, with its own name first, as they are now; those that are not in memory are missing.
    ///
    /// # Errors
    ///
    /// This kernel does not say so, or its memory is broken.
    pub fn arguments(
        &self,
        memory: &mut dyn Memory,
        task: &Task,
    ) -> Result<Vec<String>, ViewError> {
        of_kernel(&self.programs)?.arguments(memory, task)
    }

    /// What a task has mapped, in ascending order; nothing for a thread of the kernel's.
    ///
    /// # Errors
    ///
    /// This kernel does not say so, or its memory is broken.
    pub fn maps(
        &self,
        memory: &mut dyn Memory,
        task: &Task,
    ) -> Result<Listing<Mapping>, ViewError> {
        match task.mm {
            0 => Ok(Listing::default()),
            mm => of_kernel(&self.maps)?.of(memory, mm, of_kernel(&self.paths)?),
        }
    }

    /// What the kernel has said, from the oldest message on that it still has.
    ///
    /// # Errors
    ///
    /// This kernel does not say so (its buffer is another before 5.10), or its memory is broken.
    pub fn log(&self, memory: &mut dyn Memory) -> Result<Listing<Message>, ViewError> {
        of_kernel(&self.log)?.messages(memory)
    }
}

/// What is known of a kernel, or what it lacks.
fn of_kernel<T>(part: &Result<T, ViewError>) -> Result<&T, ViewError> {
    part.as_ref().map_err(Clone::clone)
}

#[cfg(test)]
mod tests;
