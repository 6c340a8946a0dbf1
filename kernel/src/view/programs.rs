//! What a program was begun with: its file, its arguments, and what the kernel told it (`auxv`).

use super::error::ViewError;
use super::memory::Memory;
use super::tasks::Task;
use super::types::{Field, Types};

/// No more of a program's arguments is read than this.
const ARGUMENTS_BYTES: u64 = 128 << 10;
/// The kernel's auxiliary vector is no longer: in 7.2 it has 448 bytes.
const AUXV_BYTES: u32 = 4096;
/// A pair of words of the vector, of which the last has a zero first (AT_NULL).
const PAIR_BYTES: usize = 16;

/// Where a `struct mm_struct` tells of its program.
#[derive(Clone, Debug)]
pub(super) struct Programs {
    page_table: Field,
    file: Field,
    auxv: Field,
    arguments: [Field; 2],
}

impl Programs {
    pub(super) fn find(types: &Types<'_>) -> Result<Programs, ViewError> {
        Ok(Programs {
            page_table: types.field("mm_struct.pgd")?,
            file: types.field("mm_struct.exe_file")?,
            auxv: types.field("mm_struct.saved_auxv")?,
            arguments: [
                types.field("mm_struct.arg_start")?,
                types.field("mm_struct.arg_end")?,
            ],
        })
    }

    /// The `struct file` of a task's executable; 0 if it has none.
    pub(super) fn file(&self, memory: &mut dyn Memory, task: &Task) -> Result<u64, ViewError> {
        match task.mm {
            0 => Ok(0),
            mm => memory.field(mm, self.file),
        }
    }

    /// Where the kernel has a task's top-level page table; 0 if it has no memory of its own.
    pub(super) fn page_table(
        &self,
        memory: &mut dyn Memory,
        task: &Task,
    ) -> Result<u64, ViewError> {
        match task.mm {
            0 => Ok(0),
            mm => memory.field(mm, self.page_table),
        }
    }

    /// What `/proc/PID/auxv` has.
    pub(super) fn auxv(&self, memory: &mut dyn Memory, task: &Task) -> Result<Vec<u8>, ViewError> {
        if task.mm == 0 {
            return Ok(Vec::new());
        }
        let mut vector = vec![0; self.auxv.bytes.min(AUXV_BYTES) as usize];
        memory.fill(self.auxv.of(task.mm), self.auxv.name, &mut vector)?;
        let (pairs, _) = vector.as_chunks::<PAIR_BYTES>();
        let last = pairs.iter().position(|pair| pair[..8] == [0; 8]);
        let pairs = last.map_or(pairs.len(), |last| last + 1);
        vector.truncate(pairs * PAIR_BYTES);
        Ok(vector)
    }

    /// The arguments, as far as they are in memory: a program may write over them.
    pub(super) fn arguments(
        &self,
        memory: &mut dyn Memory,
        task: &Task,
    ) -> Result<Vec<String>, ViewError> {
        if task.mm == 0 {
            return Ok(Vec::new());
        }
        let table = memory.field(task.mm, self.page_table)?;
        let [start, end] = self.arguments;
        let (start, end) = (memory.field(task.mm, start)?, memory.field(task.mm, end)?);
        let bytes = end.saturating_sub(start).min(ARGUMENTS_BYTES);
        let mut block = vec![0; bytes as usize];
        let read = memory.read_user(table, start, &mut block);
        block.truncate(read);
        // Each has a zero after it; who writes a title over them may leave more.
        while block.last() == Some(&0) {
            block.pop();
        }
        if block.is_empty() {
            return Ok(Vec::new());
        }
        let arguments = block.split(|&byte| byte == 0);
        Ok(arguments
            .map(|argument| String::from_utf8_lossy(argument).into_owned())
            .collect())
    }
}
