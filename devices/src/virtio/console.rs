//! virtio console (virtio 1.3, 5.3): hvc0, one port, with the size of its terminal.
//!
//! What the guest writes leaves in the exit that announces it. What is typed waits here for buffers
//! of the driver's, up to a limit that whoever types is told.

use std::collections::VecDeque;
use std::io::{Read, Write};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::ring::Ring;
use super::{Device, Stop};
use crate::Input;
use crate::access::{Output, Room};
use crate::storage::{BusContext, Ram};

const QUEUES: [u16; 2] = [64, 64];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Typed bytes that are sensible to hold for a guest that does not read them.
const BACKLOG_BYTES: usize = 4096;
/// Of one chain that the guest writes, no more is looked at: Linux writes pages.
const CHAIN_BYTES_MAX: usize = 64 << 10;

/// VIRTIO_CONSOLE_F_SIZE (5.3.3), which virtio-bindings does not have.
const SIZE: u64 = 1 << 0;

/// The device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Console {
    columns: u16,
    rows: u16,
    /// Typed, and not yet the guest's.
    backlog: VecDeque<u8>,
    /// Written, and not yet taken from here.
    written: Vec<u8>,
}

impl Console {
    /// A console whose terminal has the usual size.
    pub(crate) fn new() -> Console {
        Console {
            columns: 80,
            rows: 25,
            backlog: VecDeque::new(),
            written: Vec::new(),
        }
    }

    /// Moves what was typed into buffers that wait.
    fn feed(&mut self, ring: &mut Ring, ram: &Ram) -> Result<bool, Stop> {
        let mut wanted = false;
        for _ in 0..ring.waiting(ram) {
            let backlog = &mut self.backlog;
            if backlog.is_empty() {
                break;
            }
            wanted |= ring.serve(ram, 1, |_, mut writer| {
                let count = writer.available_bytes().min(backlog.len());
                let bytes: Vec<u8> = backlog.drain(..count).collect();
                writer.write_all(&bytes)?;
                Ok(count as u32)
            })?;
        }
        Ok(wanted)
    }
}

impl Device for Console {
    fn id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        SIZE
    }

    fn queues(&self) -> &'static [u16] {
        &QUEUES
    }

    /// `struct virtio_console_config` (5.3.4): columns, rows, ports, emergency write.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 12];
        config[..2].copy_from_slice(&self.columns.to_le_bytes());
        config[2..4].copy_from_slice(&self.rows.to_le_bytes());
        config[4..8].copy_from_slice(&1u32.to_le_bytes());
        config
    }

    /// Linux (drivers/char/virtio_console.c) asks for the size at each change, and not before.
    fn tells_of_config(&self) -> bool {
        true
    }

    fn notified(
        &mut self,
        queue: usize,
        rings: &mut [Ring],
        context: &mut BusContext<'_>,
    ) -> Result<bool, Stop> {
        if queue == RECEIVE {
            return self.feed(&mut rings[RECEIVE], context.ram);
        }
        let written = &mut self.written;
        rings[TRANSMIT].serve(
            context.ram,
            usize::from(QUEUES[TRANSMIT]),
            |mut reader, _| {
                let start = written.len();
                written.resize(start + reader.available_bytes().min(CHAIN_BYTES_MAX), 0);
                reader.read_exact(&mut written[start..])?;
                Ok(0)
            },
        )
    }

    fn reset(&mut self) {
        self.backlog.clear();
    }

    fn accept(
        &mut self,
        input: &Input,
        rings: &mut [Ring],
        ram: &Ram,
    ) -> Option<Result<bool, Stop>> {
        match input {
            Input::VirtioConsole(bytes) => {
                self.backlog.extend(bytes);
                Some(self.feed(&mut rings[RECEIVE], ram))
            }
            Input::Resize { columns, rows } => {
                (self.columns, self.rows) = (*columns, *rows);
                Some(Ok(false))
            }
            _ => None,
        }
    }

    fn room(&self, _rings: &[Ring], _ram: &Ram, room: &mut Room) {
        room.virtio_console = BACKLOG_BYTES.saturating_sub(self.backlog.len());
    }

    fn take_output(&mut self, outputs: &mut Vec<Output>) {
        if !self.written.is_empty() {
            outputs.push(Output::VirtioConsole(std::mem::take(&mut self.written)));
        }
    }
}

#[cfg(test)]
mod tests;
