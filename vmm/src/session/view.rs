//! A recording's kernel, looked at in the memory of the machine that runs it.
//!
//! No register is needed for that. The kernel's own page table is a variable of its own, and the machine enters the
//! kernel where its file says, so it is known where in memory that is. It maps the kernel also while a program runs with a
//! table that does not (page table isolation), and after the machine has ended.

use hindsight_devices::Nanos;
use hindsight_kernel::view::{Memory, View, ViewError};
use hindsight_replay::When;

use super::make::LoadedKernel;
use super::moments::travel;
use super::open::RecordedPaths;
use super::preemption_plan::CounterWish;
use super::recording::Recording;
use super::timeline::RecordingTimeline;
use crate::failure::{Classified, Failure, Kind};
use crate::kvm::{GuestMemory, GuestView, Paging};

/// A kernel that can be looked at.
#[derive(Clone, Debug)]
pub struct KernelView {
    view: View,
    /// Its page table has four levels: five are switched to before the kernel's own entry, which is where ours begins.
    paging: Paging,
}

impl KernelView {
    /// What is to be known of `kernel` to look at it.
    ///
    /// # Errors
    ///
    /// A kernel that does not describe itself.
    pub fn of(kernel: &LoadedKernel) -> Result<KernelView, Failure> {
        let elf = (kernel.elf()).map_err(|error| Failure::new(Kind::BadInput, error))?;
        let view = View::new(&elf)?;
        let table = elf.physical(view.page_table());
        let table = table.ok_or_else(|| {
            let message = "the kernel's page table (init_top_pgt) is no part of its image";
            Failure::new(Kind::BadInput, message)
        })?;
        Ok(KernelView {
            view,
            paging: Paging::long(table),
        })
    }

    /// The same for the kernel of a recording.
    ///
    /// # Errors
    ///
    /// A kernel that cannot be read, or does not describe itself.
    pub fn of_recording(recording: &Recording) -> Result<KernelView, Failure> {
        let header = recording.journal()?.header().clone();
        let image = recording.kernel(&header, None)?;
        let kernel = LoadedKernel::open_as(&image, header.machine.kernel)?;
        KernelView::of(&kernel)
    }

    /// What is known of it.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// The memory of a machine that runs it, as its kernel addresses it.
    pub fn memory<'a>(&self, memory: &'a GuestMemory) -> KernelMemory<'a> {
        let paging = self.paging;
        KernelMemory(GuestView { paging, memory })
    }
}

/// A machine's memory, as its kernel addresses it.
#[derive(Clone, Copy, Debug)]
pub struct KernelMemory<'a>(GuestView<'a>);

impl Memory for KernelMemory<'_> {
    fn read(&mut self, address: u64, into: &mut [u8]) -> usize {
        self.0.read(address, into)
    }

    fn read_user(&mut self, page_table: u64, address: u64, into: &mut [u8]) -> usize {
        let memory = self.0.memory;
        self.0.translate(page_table).map_or(0, |table| {
            let paging = Paging::long(table);
            GuestView { paging, memory }.read(address, into)
        })
    }
}

/// A kernel that lacks something, or whose memory is broken, is what was given.
impl Classified for ViewError {
    fn kind(&self) -> Kind {
        Kind::BadInput
    }
}

/// A recorded machine at a moment, whose kernel can be looked at.
#[derive(Debug)]
pub struct KernelAt {
    timeline: RecordingTimeline,
    kernel: KernelView,
    /// The last exit.
    pub exits: u64,
    /// Guest time, in nanoseconds.
    pub now: Nanos,
}

impl KernelAt {
    /// Brings a recording to a moment.
    ///
    /// # Errors
    ///
    /// There is no such moment, the replay diverges before, or the kernel does not describe itself.
    pub fn open(
        recording: &Recording,
        instead: &RecordedPaths,
        when: &When,
    ) -> Result<KernelAt, Failure> {
        // What cannot be looked at need not be gone to.
        let kernel = KernelView::of_recording(recording)?;
        let (mut timeline, exits) = travel(recording, instead, &CounterWish::default(), when)?;
        let now = timeline.parts().map_or(0, |(machine, _, _)| machine.now());
        Ok(KernelAt {
            timeline,
            kernel,
            exits,
            now,
        })
    }

    /// Looks at the kernel.
    pub fn look<T>(&mut self, look: impl FnOnce(&View, &mut dyn Memory) -> T) -> T {
        let parts = self.timeline.parts();
        let (_, cpu, _) = parts.expect("a machine that has been brought somewhere is there");
        look(self.kernel.view(), &mut self.kernel.memory(cpu.memory()))
    }
}
