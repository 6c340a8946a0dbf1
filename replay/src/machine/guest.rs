//! A guest to look at.

use vm_memory::{Bytes, GuestAddress};

use super::cpu::Cpu;
use super::exit::Registers;

/// What may be looked at of a guest that is at a counted exit. Nothing of it changes the guest: who looks gets no
/// [`hindsight_devices::Ram`], which could be written to.
pub trait Guest {
    /// The general registers, as the guest left them.
    fn registers(&mut self) -> Registers;
    /// The place in its programs that it is at: see [`super::TimeQuery::site`].
    fn site(&mut self) -> Option<u64>;
    /// Reads guest memory at a guest-physical address, as far as there is RAM; returns how many bytes.
    fn read_physical(&mut self, gpa: u64, buffer: &mut [u8]) -> usize;
    /// Reads guest memory at a guest-virtual address, as far as it is mapped; returns how many bytes.
    fn read_virtual(&mut self, gva: u64, buffer: &mut [u8]) -> usize;
}

/// A vCPU that is only looked at.
pub(super) struct View<'a, C>(pub &'a mut C);

impl<C: Cpu> Guest for View<'_, C> {
    fn registers(&mut self) -> Registers {
        self.0.registers()
    }

    fn site(&mut self) -> Option<u64> {
        self.0.site()
    }

    fn read_physical(&mut self, gpa: u64, buffer: &mut [u8]) -> usize {
        let ram = self.0.ram();
        ram.read(buffer, GuestAddress(gpa)).unwrap_or(0)
    }

    fn read_virtual(&mut self, gva: u64, buffer: &mut [u8]) -> usize {
        self.0.read(gva, buffer)
    }
}
