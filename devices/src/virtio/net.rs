//! virtio network.

use serde::{Deserialize, Serialize};

use super::ring::Ring;
use super::{Device, Stop};
use crate::around::Around;

const QUEUES: [u16; 2] = [256, 256];

/// The device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Net {}

impl Net {
    pub fn new(_spec: &super::NetSpec) -> Net {
        Net {}
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        1
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
