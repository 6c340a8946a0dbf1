//! A hostile guest made of bytes: what the fuzz targets in `tests/fuzz` and the tests of their corpus run.
//!
//! The bytes are decoded to steps against a board with one kind of device: accesses of any kind, drivers'
//! work done properly but for one lie, input from outside, time, a save in the middle. Whatever the
//! steps are, what `world` asserts after each of them holds. The target [`Target::Journal`] gives a journal to
//! all that reads one instead, [`Target::Checkpoints`] a file of checkpoints, [`Target::Kernel`] loads a kernel,
//! [`Target::Walk`] walks page tables, and [`Target::Files`] compares the files of a disk.
//!
//! This folder needs nothing of the rest of this crate: `tests/fuzz` builds it alone with a sanitizer, and the
//! libraries that it drives.

mod checkpoints;
mod disk;
mod files;
mod guest;
mod journal;
mod kernel;
mod steps;
mod walk;
mod world;

use arbitrary::Unstructured;
use hindsight_devices::{Devices, DiskSpec, NetSpec};

pub use checkpoints::{
    CHECKPOINT_MEMORY_MAX, PAGE_LIMIT, Sealed, WALK_EXITS, Walker, checkpoint_contents, journal,
    packed, read_checkpoints, seal_checkpoints, sealed_checkpoints, walk, walked,
};
pub use journal::{MEMORY_BYTES_MAX, read_file, seal_journal, sealed};
pub use kernel::{Loaded, limit_allocations_by, load_kernel, seal_kernel};

/// Decoded steps of one input; more bytes than that make are ignored.
const STEPS_MAX: usize = 100;

/// What is driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Two virtio disks, one of them read-only.
    Block,
    /// The virtio network card.
    Net,
    /// The virtio console.
    Console,
    /// The virtio entropy source.
    Entropy,
    /// The devices behind ports: UART, 8259s, 8254, MC146818, chipset.
    Legacy,
    /// The APICs, ACPI and the model-specific registers.
    Apic,
    /// Journals, as every command reads them: head, events, tail.
    Journal,
    /// The checkpoints of a recording: heads, notes, states, pages, and a machine that is put at them.
    Checkpoints,
    /// What takes a kernel apart, finds what is to be rewritten in it, and loads it.
    Kernel,
    /// The walk of a guest's page tables.
    Walk,
    /// Whatever finds partitions and file systems on a disk, and compares their files.
    Files,
}

impl Target {
    /// All of them.
    pub const ALL: [Target; 11] = [
        Target::Block,
        Target::Net,
        Target::Console,
        Target::Entropy,
        Target::Legacy,
        Target::Apic,
        Target::Journal,
        Target::Checkpoints,
        Target::Kernel,
        Target::Walk,
        Target::Files,
    ];

    /// Its name: that of the fuzz target and of its folder in the corpus.
    pub fn name(self) -> &'static str {
        match self {
            Target::Block => "block",
            Target::Net => "net",
            Target::Console => "console",
            Target::Entropy => "entropy",
            Target::Legacy => "legacy",
            Target::Apic => "apic",
            Target::Journal => "journal",
            Target::Checkpoints => "checkpoints",
            Target::Kernel => "kernel",
            Target::Walk => "walk",
            Target::Files => "files",
        }
    }

    /// The virtio devices of its board.
    fn devices(self) -> Devices {
        let disk = |read_only| DiskSpec {
            bytes: 1 << 40,
            read_only,
            serial: "fuzz".into(),
        };
        Devices {
            console: self == Target::Console,
            entropy: self == Target::Entropy,
            net: (self == Target::Net).then(NetSpec::default),
            disks: if self == Target::Block {
                vec![disk(false), disk(true)]
            } else {
                Vec::new()
            },
        }
    }
}

/// Runs one input.
///
/// # Panics
///
/// If a device does what it must not: that is what is looked for.
pub fn drive(target: Target, data: &[u8]) {
    match target {
        Target::Journal => return journal::read(data),
        Target::Checkpoints => return checkpoints::read(data),
        Target::Kernel => {
            load_kernel(data);
            return;
        }
        Target::Walk => return walk::walk(data),
        Target::Files => return files::compare(data),
        _ => {}
    }
    let mut bytes = Unstructured::new(data);
    let mut guest = guest::Guest::new(target);
    let mut world = world::World::new(&target.devices());
    for _ in 0..STEPS_MAX {
        if bytes.is_empty() {
            return;
        }
        // Bytes that end within a step end the input.
        let Ok(steps) = guest.next(&mut bytes) else {
            return;
        };
        world.take(&steps);
    }
}
