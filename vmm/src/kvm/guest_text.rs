//! Guest memory as the guest addresses it, and the instructions in it.

use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::memory::GuestMemory;
use super::page_walk::Paging;

/// Guest page size in bytes.
const PAGE: u64 = 4096;
/// No instruction is longer (Intel SDM vol. 2, 2.3.11).
pub(super) const INSTRUCTION_MAX: usize = 15;

/// Guest-virtual memory of the present address space. Looking at it changes nothing.
#[derive(Clone, Copy, Debug)]
pub struct GuestView<'a> {
    /// Which page tables.
    pub paging: Paging,
    /// What they point to.
    pub memory: &'a GuestMemory,
}

impl GuestView<'_> {
    /// Guest-physical address of a virtual one; `None` where nothing is mapped.
    pub fn translate(&self, gva: u64) -> Option<u64> {
        self.paging
            .translate(gva, &|gpa, buffer| self.memory.read(gpa, buffer))
    }

    /// The entries of page tables that forbid to execute what is at an address: where they are in guest-physical memory, and
    /// what they would be without that.
    pub fn forbid(&self, gva: u64) -> Vec<(u64, u64)> {
        let read = |gpa: u64, buffer: &mut [u8]| self.memory.read(gpa, buffer);
        self.paging.forbid(gva, &read)
    }

    /// Guest-physical addresses and lengths of `bytes` bytes, one piece a page; `None` if they are not all mapped to RAM.
    pub fn pieces(&self, gva: u64, bytes: usize) -> Option<Vec<(u64, usize)>> {
        let (mut pieces, mut done) = (Vec::new(), 0);
        while done < bytes {
            let at = gva.wrapping_add(done as u64);
            let count = ((PAGE - at % PAGE) as usize).min(bytes - done);
            let gpa = self.translate(at)?;
            self.memory.is_ram(gpa, count).then_some(())?;
            pieces.push((gpa, count));
            done += count;
        }
        Some(pieces)
    }

    /// Reads up to `buffer.len()` bytes; fewer where mapped RAM ends.
    pub fn read(&self, gva: u64, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        while done < buffer.len() {
            let at = gva.wrapping_add(done as u64);
            let on_page = (PAGE - at % PAGE) as usize;
            let count = on_page.min(buffer.len() - done);
            match self.translate(at) {
                Some(gpa) if self.memory.read(gpa, &mut buffer[done..done + count]) => {}
                _ => break,
            }
            done += count;
        }
        done
    }

    /// Reads `N` words of 64 bits; `None` if they are not all there.
    pub fn words<const N: usize>(&self, gva: u64) -> Option<[u64; N]> {
        let mut bytes = [[0; 8]; N];
        let flat = bytes.as_flattened_mut();
        if self.read(gva, flat) < flat.len() {
            return None;
        }
        Some(bytes.map(u64::from_le_bytes))
    }

    /// The bytes at an address, as many as an instruction may have.
    pub fn instruction_bytes(&self, gva: u64) -> Vec<u8> {
        let mut bytes = vec![0; INSTRUCTION_MAX];
        let got = self.read(gva, &mut bytes);
        bytes.truncate(got);
        bytes
    }

    /// The instruction at an address, in code of `bitness` bits.
    pub fn instruction(&self, gva: u64, bitness: u32) -> Option<Instruction> {
        let bytes = self.instruction_bytes(gva);
        let instruction = Decoder::with_ip(bitness, &bytes, gva, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    }
}
