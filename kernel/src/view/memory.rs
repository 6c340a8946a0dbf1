//! Reading the memory of a kernel that may lie.

use std::collections::BTreeSet;

use super::error::{Listing, ViewError};
use super::types::Field;

/// The memory of a kernel. Looking at it changes nothing.
pub trait Memory {
    /// Reads at a kernel's virtual address, as far as it is mapped; returns how many bytes.
    fn read(&mut self, address: u64, into: &mut [u8]) -> usize;

    /// Reads at a virtual address of a program, as far as it is mapped; returns how many bytes. The program's top-level page
    /// table is at `page_table`, a virtual address of the kernel's.
    fn read_user(&mut self, page_table: u64, address: u64, into: &mut [u8]) -> usize;
}

impl dyn Memory + '_ {
    /// Fills `into` from where `what` should be.
    pub(super) fn fill(
        &mut self,
        address: u64,
        what: &'static str,
        into: &mut [u8],
    ) -> Result<(), ViewError> {
        let read = self.read(address, into);
        if read < into.len() {
            let address = address.wrapping_add(read as u64);
            return Err(ViewError::Unmapped { what, address });
        }
        Ok(())
    }

    /// A word of 64 bits.
    pub(super) fn word(&mut self, address: u64, what: &'static str) -> Result<u64, ViewError> {
        let mut bytes = [0; 8];
        self.fill(address, what, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The value of a member of the structure at `base`, of at most 64 bits.
    pub(super) fn field(&mut self, base: u64, field: Field) -> Result<u64, ViewError> {
        let mut bytes = [0; 8];
        let count = field.bytes.min(8) as usize;
        self.fill(field.of(base), field.name, &mut bytes[..count])?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Where the members of a list are, whose head (`struct list_head`) is at `head`. `left` is how many may be looked at.
    pub(super) fn list(&mut self, head: u64, what: &'static str, left: &mut Left) -> Listing<u64> {
        let mut found = Listing::default();
        let mut seen = BTreeSet::from([head]);
        let mut at = head;
        loop {
            // The first of its two pointers leads to the next one.
            match self.word(at, what) {
                Ok(next) if next == head => return found,
                Ok(next) if !seen.insert(next) => {
                    found.note(ViewError::Circle {
                        what,
                        address: next,
                    });
                    return found;
                }
                Ok(next) => at = next,
                Err(error) => {
                    found.note(error);
                    return found;
                }
            }
            if let Err(error) = left.take() {
                found.note(error);
                return found;
            }
            found.items.push(at);
        }
    }
}

/// How many things may still be looked at.
#[derive(Debug)]
pub(super) struct Left {
    what: &'static str,
    limit: usize,
    count: usize,
}

impl Left {
    pub(super) fn new(what: &'static str, limit: usize) -> Left {
        Left {
            what,
            limit,
            count: limit,
        }
    }

    /// Takes one.
    pub(super) fn take(&mut self) -> Result<(), ViewError> {
        let (what, limit) = (self.what, self.limit);
        let left = self.count.checked_sub(1);
        self.count = left.ok_or(ViewError::TooMany { what, limit })?;
        Ok(())
    }
}

/// Text up to its zero; what is no UTF-8 is replaced.
pub(super) fn text(bytes: &[u8]) -> String {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or(bytes);
    String::from_utf8_lossy(text).into_owned()
}
