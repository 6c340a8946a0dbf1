//! virtio network (virtio 1.3, 5.1): a card on a wire that is not here.
//!
//! No offload is offered: no checksum is left open and no segment is larger than a frame, so that what goes
//! into the recording, and what the other end gets, is each frame as it is on the wire. A frame is sent in
//! the exit that announces it. One that comes goes into the buffers that the driver has waiting; if they are
//! too few or too small, the frame is lost, as frames are.
//!
//! Merging receive buffers is no offload and is offered: what sends datagrams without regard to the size
//! of an Ethernet frame, as passt does, gets them through.

use std::io::Read;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::ring::Ring;
use super::{Device, NetSpec, Stop};
use crate::Input;
use crate::access::{Output, Room};
use crate::storage::{BusContext, Ram};

const QUEUES: [u16; 2] = [256, 256];
const RECEIVE: usize = 0;
const SEND: usize = 1;

/// Features (5.1.3).
const MAC: u64 = 1 << VIRTIO_NET_F_MAC;
const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const STATUS: u64 = 1 << VIRTIO_NET_F_STATUS;
/// The status that the driver finds (5.1.4).
const LINK_UP: u16 = VIRTIO_NET_S_LINK_UP as u16;

/// `struct virtio_net_hdr` of a device of virtio 1 (5.1.6). Without offloads it is all zeroes, but for the
/// number of buffers that a received frame takes.
const HEADER_BYTES: usize = 12;
/// Where that stands.
const BUFFERS_AT: usize = 10;

/// A frame has two addresses and a type at least.
pub const FRAME_BYTES_MIN: usize = 14;
/// And 64 KiB after them at most (5.1.6.3.1).
pub const FRAME_BYTES_MAX: usize = 65_550;

/// The device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Net {
    mac: [u8; 6],
    /// The driver takes a frame in more than one buffer.
    merges: bool,
    /// Frames that are on their way out: those of one notification at most, for they are taken at the end
    /// of each exit.
    sent: Vec<Vec<u8>>,
}

impl Net {
    /// The card that `spec` describes.
    pub(crate) fn new(spec: &NetSpec) -> Net {
        Net {
            mac: spec.mac,
            merges: false,
            sent: Vec::new(),
        }
    }
}

impl Net {
    /// Whether both are one card.
    pub(crate) fn is_same_device(&self, other: &Net) -> bool {
        self.mac == other.mac
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        MAC | MERGE | STATUS
    }

    fn accepted(&mut self, features: u64) {
        self.merges = features & MERGE != 0;
    }

    fn queues(&self) -> &'static [u16] {
        &QUEUES
    }

    /// `struct virtio_net_config` (5.1.4).
    fn config(&self) -> Vec<u8> {
        [&self.mac[..], &LINK_UP.to_le_bytes()].concat()
    }

    fn notified(
        &mut self,
        queue: usize,
        rings: &mut [Ring],
        context: &mut BusContext<'_>,
    ) -> Result<bool, Stop> {
        if queue != SEND {
            // New buffers make room, and are used when frames come.
            return Ok(false);
        }
        let sent = &mut self.sent;
        rings[SEND].serve(context.ram, usize::from(QUEUES[SEND]), |mut reader, _| {
            let bytes = reader.available_bytes().saturating_sub(HEADER_BYTES);
            // What is no frame goes nowhere. Its length is looked at before memory is reserved for it.
            if (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&bytes) {
                reader.read_exact(&mut [0; HEADER_BYTES])?;
                let mut frame = vec![0; bytes];
                reader.read_exact(&mut frame)?;
                sent.push(frame);
            }
            Ok(0)
        })
    }

    fn reset(&mut self) {
        self.merges = false;
    }

    fn accept(
        &mut self,
        input: &Input,
        rings: &mut [Ring],
        ram: &Ram,
    ) -> Option<Result<bool, Stop>> {
        let Input::Frame(frame) = input else {
            return None;
        };
        let most = if self.merges {
            usize::from(QUEUES[RECEIVE])
        } else {
            1
        };
        let content = |buffers: u16| {
            let mut header = [0; HEADER_BYTES];
            header[BUFFERS_AT..].copy_from_slice(&buffers.to_le_bytes());
            [&header[..], frame].concat()
        };
        let filled = rings[RECEIVE].fill(ram, HEADER_BYTES + frame.len(), most, content);
        Some(filled.map(|wanted| wanted.unwrap_or(false)))
    }

    fn room(&self, rings: &[Ring], ram: &Ram, room: &mut Room) {
        room.frames = rings[RECEIVE].waiting(ram).into();
    }

    fn take_output(&mut self, outputs: &mut Vec<Output>) {
        outputs.extend(self.sent.drain(..).map(Output::Frame));
    }
}

#[cfg(test)]
mod tests;
