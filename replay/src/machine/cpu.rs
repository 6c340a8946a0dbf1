//! A vCPU, as the loop knows one.

use hindsight_devices::Ram;

use super::digest::MemoryDigest;
use super::exit::{Answer, Exit, Registers};
use super::full_digest::CpuDigest;
use super::left_open::LeftOpen;
use super::place::Horizon;
use super::quick_clock::ShownClock;

/// What brings a vCPU back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Back {
    /// Something the guest did, or the place at which it was stopped. It counts.
    Exit(Exit),
    /// The interrupt window that was asked for is open. Does not count: the place is the guest's,
    /// but whether KVM needs an exit to reach it is not.
    Window,
    /// The host interrupted it. Does not count.
    Kicked,
    /// It has come to where whoever debugs it wants it stopped. Does not count: the guest knows nothing of it, and goes on
    /// from there as if it had not been stopped.
    Stopped,
}

/// A vCPU and the memory it works on.
pub trait Cpu {
    /// What can go wrong on the host.
    type Error: std::error::Error;

    /// Runs until something brings it back, at the latest at the horizon. A vCPU that cannot count
    /// what a horizon between exits asks for runs to its next exit.
    fn run(&mut self, horizon: Horizon) -> Result<Back, Self::Error>;
    /// The next write that the guest has made since the exit before this one without an exit of its own, in
    /// the order in which they were made: of bytes to [`hindsight_devices::POSTED_PORT`], of which at most
    /// [`hindsight_devices::POSTED_MAX`] wait. Asked for at each counted exit until there is none.
    fn posted(&mut self) -> Result<Option<u8>, Self::Error> {
        Ok(None)
    }
    /// The registers as the guest left them when it came back.
    fn registers(&mut self) -> Registers;
    /// Hands the answer to the exit; the instruction may stay unfinished until it runs again. HLT
    /// may not: the registers after it are read at each wake-up, before anything runs.
    fn answer(&mut self, exit: &Exit, answer: &Answer) -> Result<(), Self::Error>;
    /// Finishes the instruction of the last exit. Tells whether an interrupt can be taken there.
    fn settle(&mut self) -> Result<bool, Self::Error>;
    /// Delivers an interrupt; [`Cpu::settle`] has just said that it can be taken.
    fn interrupt(&mut self, vector: u8) -> Result<(), Self::Error>;
    /// Asks for [`Back::Window`] as soon as the guest takes interrupts, or no more.
    fn request_window(&mut self, wanted: bool);
    /// Sets the clock that the guest reads without an exit. Asked for at each counted exit, after its
    /// answer, of a machine with [`super::QuickReads`].
    fn show_clock(&mut self, clock: ShownClock);
    /// A number for the place in its programs that the guest is at, or that its kernel works for, as
    /// far as that is known. A hint: nothing that a replay does may depend on it.
    fn site(&mut self) -> Option<u64> {
        None
    }
    /// Reads guest memory at a guest-virtual address, as far as it is mapped; returns how many bytes. Asked
    /// for at counted exits only.
    fn read(&mut self, _gva: u64, _buffer: &mut [u8]) -> usize {
        0
    }
    /// What was found to be left open since it was asked last: asked at each counted exit, after its answer, and once
    /// more, `at_end`, where the machine has ended. A function of what the guest did at counted exits and of its memory
    /// there.
    fn left_open(&mut self, _at_end: bool) -> Vec<LeftOpen> {
        Vec::new()
    }
    /// Guest memory, for devices that move data by themselves.
    fn ram(&self) -> &Ram;
    /// The digest of all of memory.
    fn memory_digest(&mut self) -> Result<MemoryDigest, Self::Error>;
    /// The digest of all else that decides what the vCPU does next. By then its last instruction is settled.
    fn state_digest(&mut self) -> Result<CpuDigest, Self::Error>;
}
