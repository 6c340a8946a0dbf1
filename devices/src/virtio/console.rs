//! virtio console.

use serde::{Deserialize, Serialize};

use super::ring::Ring;
use super::{Device, Stop};
use crate::around::Around;

const QUEUES: [u16; 2] = [64, 64];

/// The device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Console {}

impl Console {
    pub fn new() -> Console {
        Console {}
    }
}

impl Device for Console {
    fn id(&self) -> u32 {
        3
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
        _around: &mut Around<'_>,
    ) -> Result<bool, Stop> {
        Ok(false)
    }

    fn reset(&mut self) {}
}
