//! A hostile guest made of bytes: what the fuzz targets in `tests/fuzz` and the tests of their corpus run.
//!
//! The bytes are decoded to steps against a board with one kind of device: accesses of any kind, drivers'
//! work done properly but for one lie, input from outside, time, a save in the middle. Whatever the
//! steps are, what `world` asserts after each of them holds. The target [`Target::Journal`] reads a journal
//! instead, and [`Target::Kernel`] loads a kernel.
//!
//! This folder needs nothing of the rest of this crate: `tests/fuzz` builds it alone, with a sanitizer.

mod disk;
mod guest;
mod journal;
mod kernel;
mod steps;
mod world;

use arbitrary::Unstructured;
use hindsight_devices::{Devices, DiskSpec, NetSpec};

pub use journal::seal;
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
    /// The reader of journals.
    Journal,
    /// What takes a kernel apart, finds what is to be rewritten in it, and loads it.
    Kernel,
}

impl Target {
    /// All of them.
    pub const ALL: [Target; 8] = [
        Target::Block,
        Target::Net,
        Target::Console,
        Target::Entropy,
        Target::Legacy,
        Target::Apic,
        Target::Journal,
        Target::Kernel,
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
            Target::Kernel => "kernel",
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
        Target::Kernel => {
            load_kernel(data);
            return;
        }
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
