//! A running kernel, or a dead one, as its own memory tells of it: which tasks there are, and what they run.
//!
//! Where things are comes from the kernel's own types and symbols, never from offsets that somebody has written down: one
//! that lacks something says what it lacks. What is read is whatever the guest has there. A list may lead in a circle, a
//! length may be any number and a pointer lead nowhere: each walk has a limit, and says where it broke off.
//!
//! Nothing here knows how memory is got at; that is what [`Memory`] is for.

mod error;
mod memory;
mod paths;
mod programs;
mod tasks;
mod types;

pub use error::{Listing, ViewError};
pub use memory::Memory;
pub use tasks::{State, Task};

use crate::image::Elf;
use crate::symbols::Symbols;
use crate::symbols::btf::Btf;
use paths::Paths;
use programs::Programs;
use tasks::Tasks;
use types::Types;

/// Where a kernel has what, as far as it is known.
#[derive(Clone, Debug)]
pub struct View {
    page_table: u64,
    tasks: Tasks,
    programs: Result<Programs, ViewError>,
    paths: Result<Paths, ViewError>,
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
        let types = Types(btf);
        let page_table = symbols.lookup("init_top_pgt");
        Ok(View {
            page_table: page_table.ok_or_else(|| ViewError::Lacks {
                what: "init_top_pgt".into(),
            })?,
            tasks: Tasks::find(&types, &symbols)?,
            programs: Programs::find(&types),
            paths: Paths::find(&types),
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
        self.programs()?.page_table(memory, task)
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
        match self.programs()?.file(memory, task)? {
            0 => Ok(None),
            file => self.paths()?.of_file(memory, file).map(Some),
        }
    }

    /// What the kernel told a program as it began: the bytes of `/proc/PID/auxv`. Empty for a thread of the kernel's.
    ///
    /// # Errors
    ///
    /// This kernel does not say so, or its memory is broken.
    pub fn auxv(&self, memory: &mut dyn Memory, task: &Task) -> Result<Vec<u8>, ViewError> {
        self.programs()?.auxv(memory, task)
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
        self.programs()?.arguments(memory, task)
    }

    fn programs(&self) -> Result<&Programs, ViewError> {
        self.programs.as_ref().map_err(Clone::clone)
    }

    fn paths(&self) -> Result<&Paths, ViewError> {
        self.paths.as_ref().map_err(Clone::clone)
    }
}
