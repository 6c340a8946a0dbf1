//! virtio entropy (virtio 1.3, 5.4): the guest asks for random bytes, and gets what comes from
//! outside.
//!
//! Nothing in this machine is random by itself. A request waits until bytes reach the machine as an
//! input, which a recording keeps.

use std::io::Write;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::ring::Ring;
use super::{Device, Stop};
use crate::Input;
use crate::access::Room;
use crate::storage::{BusContext, Ram};

const QUEUES: [u16; 1] = [64];
/// As many bytes as are handed over at once; Linux asks for no more than 64.
const BYTES_MAX: usize = 64;

/// The device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entropy {}

impl Entropy {
    pub(crate) fn new() -> Entropy {
        Entropy {}
    }
}

impl Device for Entropy {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &'static [u16] {
        &QUEUES
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn notified(
        &mut self,
        _queue: usize,
        _rings: &mut [Ring],
        _context: &mut BusContext<'_>,
    ) -> Result<bool, Stop> {
        // What is waiting now makes room, and is served when bytes come.
        Ok(false)
    }

    fn reset(&mut self) {}

    fn accept(
        &mut self,
        input: &Input,
        rings: &mut [Ring],
        ram: &Ram,
    ) -> Option<Result<bool, Stop>> {
        let Input::Entropy(bytes) = input else {
            return None;
        };
        Some(rings[0].serve(ram, 1, |_, mut writer| {
            let count = writer.available_bytes().min(bytes.len());
            writer.write_all(&bytes[..count])?;
            Ok(count as u32)
        }))
    }

    fn room(&self, rings: &[Ring], ram: &Ram, room: &mut Room) {
        if rings[0].waiting(ram) > 0 {
            room.entropy = BYTES_MAX;
        }
    }
}

#[cfg(test)]
mod tests;
