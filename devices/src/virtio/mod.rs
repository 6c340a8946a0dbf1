//! The machine's virtio devices, each behind registers in memory (virtio 1.3, 4.2).
//!
//! A device works in the exit by which the driver notifies it, or when something reaches it from
//! outside, and is done when that exit is over: nothing goes on by itself. Which devices there are and
//! where they stand follows from [`Devices`], by one rule ([`Devices::slots`]).

mod block;
mod console;
mod entropy;
mod net;
mod ring;
#[cfg(test)]
mod testing;
mod transport;

use serde::{Deserialize, Serialize};

use crate::access::{Output, Room};
use crate::restore::{RestoreError, ensure};
use crate::storage::{BusContext, Ram, StorageError};
use crate::wiring::{self, SLOTS_MAX, Slot};
use crate::{Input, Reply, Width};
use block::Block;
use console::Console;
use entropy::Entropy;
use net::Net;
pub use net::{FRAME_BYTES_MAX, FRAME_BYTES_MIN};
use ring::Ring;
use transport::Transport;

/// Which virtio devices a machine has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devices {
    /// A console (hvc0).
    pub console: bool,
    /// A source of random bytes.
    pub entropy: bool,
    /// A network card.
    pub net: Option<NetSpec>,
    /// Disks, in order: vda, vdb, ...
    pub disks: Vec<DiskSpec>,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSpec {
    /// Its address.
    pub mac: [u8; 6],
}

/// The card that a machine has if nothing more is said: always the same, so that the guest can be told
/// what it is called. The address is a locally administered one (IEEE 802, bit 1 of the first byte).
impl Default for NetSpec {
    fn default() -> NetSpec {
        NetSpec {
            mac: [0x52, 0x54, 0x00, 0x68, 0x73, 0x01],
        }
    }
}

/// A disk, as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Length in bytes: a multiple of 512.
    pub bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What it says when asked for its serial number; at most 20 bytes count.
    pub serial: String,
}

impl Devices {
    /// How many disks there may be beside the other devices.
    pub const DISKS_MAX: usize = SLOTS_MAX - 3;

    /// Where the devices stand: console, entropy, network card and disks, as many as there are.
    pub fn slots(&self) -> Vec<Slot> {
        (0..self.count()).map(wiring::slot).collect()
    }

    /// Whether a machine can have these.
    pub fn are_possible(&self) -> bool {
        let whole = |disk: &DiskSpec| disk.bytes > 0 && disk.bytes.is_multiple_of(512);
        self.count() <= SLOTS_MAX && self.disks.iter().all(whole)
    }

    fn count(&self) -> usize {
        usize::from(self.console)
            + usize::from(self.entropy)
            + usize::from(self.net.is_some())
            + self.disks.len()
    }
}

/// What a device does behind its registers.
pub(crate) trait Device {
    /// Its type (virtio 1.3, 5).
    fn id(&self) -> u32;
    /// The features of its type that it offers.
    fn features(&self) -> u64;
    /// The driver uses these of the features that were offered.
    fn accepted(&mut self, _features: u64) {}
    /// The greatest size of each of its queues.
    fn queues(&self) -> &'static [u16];
    /// Its own registers.
    fn config(&self) -> Vec<u8>;
    /// Whether drivers read them only where they are told of a change. Such a device tells of one when its driver is ready.
    fn tells_of_config(&self) -> bool {
        false
    }
    /// The driver writes to them.
    fn write_config(&mut self, _offset: u64, _bytes: &[u8]) {}
    /// The driver has made chains available in `queue`. Returns whether it wants an interrupt for
    /// what was given back.
    fn notified(
        &mut self,
        queue: usize,
        rings: &mut [Ring],
        context: &mut BusContext<'_>,
    ) -> Result<bool, Stop>;
    /// The driver has acknowledged an interrupt: a device that had more to do than one exit allows goes
    /// on. Returns as [`Device::notified`] does.
    fn acknowledged(
        &mut self,
        _rings: &mut [Ring],
        _context: &mut BusContext<'_>,
    ) -> Result<bool, Stop> {
        Ok(false)
    }
    /// The driver starts afresh.
    fn reset(&mut self);
    /// Takes what comes from outside, if it is for this device; then tells whether the driver wants an
    /// interrupt. A ring that is not set up serves nothing.
    fn accept(
        &mut self,
        _input: &Input,
        _rings: &mut [Ring],
        _ram: &Ram,
    ) -> Option<Result<bool, Stop>> {
        None
    }
    /// Adds what it can take from outside now to `room`.
    fn room(&self, _rings: &[Ring], _ram: &Ram, _room: &mut Room) {}
    /// Moves what it has for the outside to `outputs`.
    fn take_output(&mut self, _outputs: &mut Vec<Output>) {}
}

/// Why a device stops working.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The guest broke the rules in the way that is named: the device needs a reset.
    Broken(&'static str),
    /// The host failed.
    Storage(StorageError),
}

impl From<StorageError> for Stop {
    fn from(error: StorageError) -> Stop {
        Stop::Storage(error)
    }
}

/// Guest memory that the chain was checked against cannot be copied: the guest lied about it.
impl From<std::io::Error> for Stop {
    fn from(_: std::io::Error) -> Stop {
        Stop::Broken("a buffer that is not what it was said to be")
    }
}

/// One device of any type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    Console(Console),
    Entropy(Entropy),
    Net(Net),
    Block(Block),
}

impl Kind {
    /// Whether both were made of one description.
    fn is_same_device(&self, other: &Kind) -> bool {
        match (self, other) {
            (Kind::Console(_), Kind::Console(_)) | (Kind::Entropy(_), Kind::Entropy(_)) => true,
            (Kind::Net(a), Kind::Net(b)) => a.is_same_device(b),
            (Kind::Block(a), Kind::Block(b)) => a.is_same_device(b),
            _ => false,
        }
    }

    fn device(&self) -> &dyn Device {
        match self {
            Kind::Console(device) => device,
            Kind::Entropy(device) => device,
            Kind::Net(device) => device,
            Kind::Block(device) => device,
        }
    }

    fn device_mut(&mut self) -> &mut dyn Device {
        match self {
            Kind::Console(device) => device,
            Kind::Entropy(device) => device,
            Kind::Net(device) => device,
            Kind::Block(device) => device,
        }
    }
}

/// All of a machine's virtio devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bus {
    slots: Vec<Transport>,
}

impl Bus {
    /// The devices at power-on.
    pub(crate) fn new(devices: &Devices) -> Bus {
        assert!(
            devices.are_possible(),
            "a machine has no room for {devices:?}"
        );
        let console = devices.console.then(|| Kind::Console(Console::new()));
        let entropy = devices.entropy.then(|| Kind::Entropy(Entropy::new()));
        let net = devices.net.as_ref().map(|spec| Kind::Net(Net::new(spec)));
        let disks = devices.disks.iter().enumerate();
        let disks = disks.map(|(number, spec)| Kind::Block(Block::new(number, spec)));
        let kinds = console.into_iter().chain(entropy).chain(net).chain(disks);
        Bus {
            slots: kinds.map(Transport::new).collect(),
        }
    }

    /// The device that answers at `gpa`, and where in its registers that is.
    fn find(&self, gpa: u64) -> Option<(usize, u64)> {
        wiring::slot_at(gpa).filter(|(slot, _)| *slot < self.slots.len())
    }

    /// A load; `None` if no device is there.
    pub(crate) fn read(&self, gpa: u64, width: Width) -> Option<Reply> {
        let (slot, offset) = self.find(gpa)?;
        Some(self.slots[slot].read(offset, width))
    }

    /// A store; whether a device is there.
    pub(crate) fn write(
        &mut self,
        gpa: u64,
        width: Width,
        value: u64,
        context: &mut BusContext<'_>,
    ) -> Result<bool, StorageError> {
        let Some((slot, offset)) = self.find(gpa) else {
            return Ok(false);
        };
        self.slots[slot].write(offset, width, value, context)?;
        Ok(true)
    }

    /// How many devices there are.
    pub(crate) fn count(&self) -> usize {
        self.slots.len()
    }

    /// The interrupt of device `slot`, and its line.
    pub(crate) fn line(&self, slot: usize) -> (u8, bool) {
        (wiring::slot(slot).gsi, self.slots[slot].line())
    }

    /// Something comes from outside. Nobody has a use for it: then it is lost.
    pub(crate) fn accept(&mut self, input: &Input, ram: &Ram) {
        for slot in &mut self.slots {
            slot.accept(input, ram);
        }
    }

    /// Adds what the devices can take from outside now to `room`.
    pub(crate) fn room(&self, ram: &Ram, room: &mut Room) {
        for slot in &self.slots {
            slot.room(ram, room);
        }
    }

    /// Moves what the devices have for the outside to `outputs`.
    pub(crate) fn take_outputs(&mut self, outputs: &mut Vec<Output>) {
        for slot in &mut self.slots {
            slot.take_output(outputs);
        }
    }

    /// Whether the devices are these, whatever they do.
    pub(crate) fn is_of(&self, devices: &Devices) -> bool {
        let expected = Bus::new(devices);
        let mut pairs = self.slots.iter().zip(&expected.slots);
        self.slots.len() == expected.slots.len() && pairs.all(|(a, b)| a.is_same_device(b))
    }

    /// Refuses a saved state that could not have been.
    pub(crate) fn check(&self) -> Result<(), RestoreError> {
        let possible =
            self.slots.len() <= SLOTS_MAX && self.slots.iter().all(Transport::is_possible);
        ensure("a virtio device", possible)
    }
}
