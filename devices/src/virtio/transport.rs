//! virtio over MMIO: the registers by which a driver finds and sets up a device (virtio 1.3, 4.2.2).
//!
//! The device behind them is a [`Device`]; all of them share this file's rules of status, features, queues and
//! interrupts. Only version 2 of the registers is offered, and only drivers of virtio 1 are accepted.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK as STATUS_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK as STATUS_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET as STATUS_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INT_CONFIG as CONFIGURATION, VIRTIO_MMIO_INT_VRING as USED_BUFFER, *,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::ring::Ring;
use super::{Kind, Stop};
use crate::access::{Output, Room};
use crate::storage::{BusContext, Ram, StorageError};
use crate::{Input, Reply, Width};

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Nobody in particular.
const VENDOR: u32 = 0x4453_4e48;

/// Features of every device (virtio 1.3, 6).
const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
const EVENT_INDEX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// The device's own registers begin here.
const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;

/// One device behind its registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Transport {
    kind: Kind,
    rings: Vec<Ring>,
    status: u32,
    device_features_page: u32,
    driver_features_page: u32,
    driver_features: u64,
    queue: u32,
    interrupts: u32,
    generation: u32,
}

impl Transport {
    /// A device that no driver has found yet.
    pub(super) fn new(kind: Kind) -> Transport {
        let rings = fresh_rings(&kind);
        Transport {
            kind,
            rings,
            status: 0,
            device_features_page: 0,
            driver_features_page: 0,
            driver_features: 0,
            queue: 0,
            interrupts: 0,
            generation: 0,
        }
    }

    /// The interrupt line.
    pub(super) fn line(&self) -> bool {
        self.interrupts != 0
    }

    /// Whether the driver uses the device now.
    fn is_live(&self) -> bool {
        const LIVE: u32 = STATUS_FEATURES_OK | STATUS_DRIVER_OK;
        self.status & (LIVE | STATUS_NEEDS_RESET) == LIVE
    }

    /// Whether both are one device, in whatever state.
    pub(super) fn is_same_device(&self, other: &Transport) -> bool {
        self.kind.is_same_device(&other.kind)
    }

    /// Whether a saved device is one that could have been.
    pub(super) fn is_possible(&self) -> bool {
        let sizes = self.kind.device().queues();
        sizes.len() == self.rings.len()
            && self
                .rings
                .iter()
                .zip(sizes)
                .all(|(ring, size)| ring.is_possible(*size))
    }

    /// A load from `offset`. The registers are 32 bits wide and want loads of that width; the
    /// device's own take any.
    pub(super) fn read(&self, offset: u64, width: Width) -> Reply {
        if offset >= CONFIG {
            let config = self.kind.device().config();
            let byte = |at: u64| {
                let at = usize::try_from(at - CONFIG).ok();
                at.and_then(|at| config.get(at)).copied().unwrap_or(0)
            };
            let bytes = (0..width.bytes() as u64).rev();
            return Reply::Value(
                bytes.fold(0, |value, i| value << 8 | u64::from(byte(offset + i))),
            );
        }
        if width != Width::Dword {
            return Reply::Value(0);
        }
        Reply::Value(u64::from(self.register(offset)))
    }

    fn register(&self, offset: u64) -> u32 {
        let ring = self.rings.get(self.queue as usize);
        // What is below the device's own registers fits.
        match offset as u32 {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.kind.device().id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_page {
                0 => self.offered() as u32,
                1 => (self.offered() >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => ring.map_or(0, |ring| ring.max_size().into()),
            VIRTIO_MMIO_QUEUE_READY => ring.map_or(0, |ring| ring.ready.into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupts,
            VIRTIO_MMIO_STATUS => self.status,
            VIRTIO_MMIO_CONFIG_GENERATION => self.generation,
            // There is no shared memory: its length reads as all ones (4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// A store to `offset`.
    ///
    /// # Errors
    ///
    /// The host failed a disk.
    pub(super) fn write(
        &mut self,
        offset: u64,
        width: Width,
        value: u64,
        context: &mut BusContext<'_>,
    ) -> Result<(), StorageError> {
        if offset >= CONFIG {
            let bytes = value.to_le_bytes();
            self.kind
                .device_mut()
                .write_config(offset - CONFIG, &bytes[..width.bytes()]);
            return Ok(());
        }
        if width != Width::Dword {
            return Ok(());
        }
        self.write_register(offset, value as u32, context)
    }

    fn write_register(
        &mut self,
        offset: u64,
        value: u32,
        context: &mut BusContext<'_>,
    ) -> Result<(), StorageError> {
        match offset as u32 {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_page = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_page = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.status & STATUS_FEATURES_OK == 0 => {
                match self.driver_features_page {
                    0 => set_low(&mut self.driver_features, value),
                    1 => set_high(&mut self.driver_features, value),
                    _ => {}
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => return self.notify(value, context),
            VIRTIO_MMIO_INTERRUPT_ACK => return self.acknowledge(value, context),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            _ => self.set_up_ring(offset, value),
        }
        Ok(())
    }

    /// Registers of the queue that is selected. They may be written until it is ready.
    fn set_up_ring(&mut self, offset: u64, value: u32) {
        let event_index = self.driver_features & EVENT_INDEX != 0;
        let may = self.status & STATUS_FEATURES_OK != 0;
        let Some(ring) = self.rings.get_mut(self.queue as usize) else {
            return;
        };
        let offset = offset as u32;
        if offset == VIRTIO_MMIO_QUEUE_READY {
            ring.set_ready(value & 1 != 0 && may, event_index);
            return;
        }
        if ring.ready {
            return;
        }
        match offset {
            // What is no size of a ring is found out when the ring is used; none is larger than
            // what was offered.
            VIRTIO_MMIO_QUEUE_NUM => {
                let size = u16::try_from(value).ok();
                ring.size = size.filter(|size| *size <= ring.max_size()).unwrap_or(0);
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut ring.descriptors, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut ring.descriptors, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut ring.available, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut ring.available, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut ring.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut ring.used, value),
            _ => {}
        }
    }

    fn offered(&self) -> u64 {
        self.kind.device().features() | INDIRECT | EVENT_INDEX | VERSION_1
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.kind.device_mut().reset();
            let generation = self.generation;
            *self = Transport::new(self.kind.clone());
            self.generation = generation;
            return;
        }
        let mut value = value & !STATUS_NEEDS_RESET | self.status & STATUS_NEEDS_RESET;
        let features_ok = value & !self.status & STATUS_FEATURES_OK != 0;
        let accepted =
            self.driver_features & !self.offered() == 0 && self.driver_features & VERSION_1 != 0;
        if features_ok && !accepted {
            // The driver reads it back and gives up (3.1.1).
            value &= !STATUS_FEATURES_OK;
        } else if features_ok {
            self.kind.device_mut().accepted(self.driver_features);
        }
        let was_live = self.is_live();
        self.status = value;
        if !was_live && self.is_live() && self.kind.device().tells_of_config() {
            self.interrupts |= CONFIGURATION;
        }
    }

    fn notify(&mut self, queue: u32, context: &mut BusContext<'_>) -> Result<(), StorageError> {
        let queue = queue as usize;
        if queue >= self.rings.len() || !self.is_live() {
            return Ok(());
        }
        let result = self
            .kind
            .device_mut()
            .notified(queue, &mut self.rings, context);
        self.done(result)
    }

    fn acknowledge(
        &mut self,
        causes: u32,
        context: &mut BusContext<'_>,
    ) -> Result<(), StorageError> {
        self.interrupts &= !causes;
        if !self.is_live() {
            return Ok(());
        }
        let result = self
            .kind
            .device_mut()
            .acknowledged(&mut self.rings, context);
        self.done(result)
    }

    /// Something comes from outside. A device that no driver uses has no rings for it.
    pub(super) fn accept(&mut self, input: &Input, ram: &Ram) {
        let mut none;
        let rings = if self.is_live() {
            &mut self.rings
        } else {
            none = fresh_rings(&self.kind);
            &mut none
        };
        let before = self.kind.device().config();
        let Some(done) = self.kind.device_mut().accept(input, rings, ram) else {
            return;
        };
        let wanted = self.done(done).is_ok();
        assert!(wanted, "no disk takes anything from outside");
        if self.kind.device().config() != before {
            self.generation = self.generation.wrapping_add(1);
            if self.is_live() {
                self.interrupts |= CONFIGURATION;
            }
        }
    }

    /// Adds what the device can take from outside now to `room`.
    pub(super) fn room(&self, ram: &Ram, room: &mut Room) {
        if self.is_live() {
            self.kind.device().room(&self.rings, ram, room);
        }
    }

    /// Moves what the device has for the outside to `outputs`.
    pub(super) fn take_output(&mut self, outputs: &mut Vec<Output>) {
        self.kind.device_mut().take_output(outputs);
    }

    /// The device's work is done, or it could not be.
    fn done(&mut self, result: Result<bool, Stop>) -> Result<(), StorageError> {
        match result {
            Ok(true) => self.interrupts |= USED_BUFFER,
            Ok(false) => {}
            Err(Stop::Broken(_)) => {
                self.status |= STATUS_NEEDS_RESET;
                self.interrupts |= CONFIGURATION;
            }
            Err(Stop::Storage(error)) => return Err(error),
        }
        Ok(())
    }
}

fn fresh_rings(kind: &Kind) -> Vec<Ring> {
    kind.device()
        .queues()
        .iter()
        .map(|size| Ring::new(*size))
        .collect()
}

fn set_low(word: &mut u64, value: u32) {
    *word = *word & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(word: &mut u64, value: u32) {
    *word = *word & u64::from(u32::MAX) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests;
