//! virtio block (virtio 1.3, 5.2): a disk.
//!
//! A request is done when the notification that announced it is over, by way of [`Storage`]; the disk's
//! bytes are not here. If there is too much to do for one exit, the rest is done when the driver acknowledges
//! the interrupt that it gets for the first part. What is discarded reads as zeroes, so that it reads the same every time.
//!
//! [`Storage`]: crate::Storage

use std::io::{Read, Write};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::ring::Ring;
use super::{Device, DiskSpec, Stop};
use crate::storage::{BusContext, Reader, Storage, Writer};

const QUEUES: [u16; 1] = [256];
const SECTOR_BYTES: u64 = 512;
/// Data of one request. What the driver is told of segments keeps it below that.
const REQUEST_BYTES_MAX: usize = 64 << 20;
const _: () = assert!(SEGMENTS_MAX as usize * SEGMENT_BYTES_MAX as usize <= REQUEST_BYTES_MAX);
/// Moved at once.
const PIECE_BYTES: usize = 128 << 10;
/// Segments of one request; the ring has room for them and for header and status.
const SEGMENTS_MAX: u32 = 254;
/// Length of one segment. A driver that is told nothing makes segments of any length, and Linux does where memory is
/// in huge pages and `max_sectors_kb` is set for it.
const SEGMENT_BYTES_MAX: u32 = 256 << 10;
/// Sectors of one range of a discard: 64 MiB. The host may have to write that many zeroes.
const CLEAR_SECTORS_MAX: u32 = 128 << 10;
/// Ranges of one discard.
const CLEAR_SEGMENTS_MAX: u32 = 8;
/// What is moved in one exit before the rest has to wait, in bytes; the request that comes to it is still
/// done. Without it a ring full of large requests would keep the machine for seconds.
const EXIT_BYTES_MAX: usize = 64 << 20;
/// A discard counts as this number of bytes moved.
const CLEAR_COUNTS_BYTES: usize = EXIT_BYTES_MAX / 8;
/// The size that writes are best a multiple of: that of a guest's page.
const BLOCK_SECTORS: u32 = 8;

/// Features of disks (5.2.3): those that can be written, and those that cannot.
const WRITES: u64 =
    1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
const READ_ONLY: u64 = 1 << VIRTIO_BLK_F_RO;
const SIZE_MAX: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX;

/// The status of a request (5.2.6).
const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IO_ERROR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPPORTED: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// `struct virtio_blk_req` up to its data, and `struct virtio_blk_discard_write_zeroes`, are both 16 bytes.
type Words = [u8; 16];

fn word(words: &Words, at: usize) -> u32 {
    let [a, b, c, d] = [0, 1, 2, 3].map(|i| words[at + i]);
    u32::from_le_bytes([a, b, c, d])
}

fn long(words: &Words, at: usize) -> u64 {
    u64::from(word(words, at)) | u64::from(word(words, at + 4)) << 32
}

/// A request that has been done.
struct Done {
    status: u8,
    /// How many were written for the guest, the status apart.
    bytes: u32,
    /// It was a discard, or wrote zeroes.
    cleared: bool,
}

/// The device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Block {
    number: usize,
    sectors: u64,
    read_only: bool,
    serial: [u8; 20],
    /// Requests were left for the moment at which the driver acknowledges the interrupt.
    unfinished: bool,
}

impl Block {
    /// Disk number `number` of the machine.
    pub(crate) fn new(number: usize, spec: &DiskSpec) -> Block {
        let mut serial = [0; 20];
        for (to, from) in serial.iter_mut().zip(spec.serial.bytes()) {
            *to = from;
        }
        Block {
            number,
            sectors: spec.bytes / SECTOR_BYTES,
            read_only: spec.read_only,
            serial,
            unfinished: false,
        }
    }

    /// Whether both are one disk.
    pub(crate) fn is_same_device(&self, other: &Block) -> bool {
        let of = |disk: &Block| (disk.number, disk.sectors, disk.read_only, disk.serial);
        of(self) == of(other)
    }

    /// Does one request.
    fn request(
        &self,
        reader: &mut Reader<'_>,
        writer: &mut Writer<'_>,
        storage: &mut dyn Storage,
    ) -> Result<Done, Stop> {
        let mut header = Words::default();
        reader
            .read_exact(&mut header)
            .map_err(|_| Stop::Broken("a request without a header"))?;
        let sector = long(&header, 8);
        let kind = word(&header, 0);
        let (status, bytes) = match kind {
            VIRTIO_BLK_T_IN => self.read(sector, writer, storage)?,
            VIRTIO_BLK_T_OUT => (self.write(sector, reader, storage)?, 0),
            // What was written is as durable as a recording is: there is nothing to wait for.
            VIRTIO_BLK_T_FLUSH => (OK, 0),
            VIRTIO_BLK_T_GET_ID => {
                let count = writer.available_bytes().min(self.serial.len());
                writer.write_all(&self.serial[..count])?;
                (OK, count as u32)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => (self.clear(reader, storage)?, 0),
            _ => (UNSUPPORTED, 0),
        };
        Ok(Done {
            status,
            bytes,
            cleared: matches!(kind, VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES),
        })
    }

    /// Byte offset of a range, if it is all on the disk.
    fn place(&self, sector: u64, bytes: usize) -> Option<u64> {
        let whole =
            bytes > 0 && bytes <= REQUEST_BYTES_MAX && (bytes as u64).is_multiple_of(SECTOR_BYTES);
        let end = sector.checked_add(bytes as u64 / SECTOR_BYTES)?;
        // The product fits if the sector is one of the disk's, and only then.
        (whole && end <= self.sectors).then(|| sector * SECTOR_BYTES)
    }

    fn read(
        &self,
        sector: u64,
        writer: &mut Writer<'_>,
        storage: &mut dyn Storage,
    ) -> Result<(u8, u32), Stop> {
        let bytes = writer.available_bytes();
        let Some(start) = self.place(sector, bytes) else {
            return Ok((IO_ERROR, 0));
        };
        let mut piece = vec![0; bytes.min(PIECE_BYTES)];
        for done in (0..bytes).step_by(PIECE_BYTES) {
            let piece = &mut piece[..(bytes - done).min(PIECE_BYTES)];
            storage.read(self.number, start + done as u64, piece)?;
            writer.write_all(piece)?;
        }
        Ok((OK, bytes as u32))
    }

    fn write(
        &self,
        sector: u64,
        reader: &mut Reader<'_>,
        storage: &mut dyn Storage,
    ) -> Result<u8, Stop> {
        let bytes = reader.available_bytes();
        let place = self.place(sector, bytes).filter(|_| !self.read_only);
        let Some(start) = place else {
            return Ok(IO_ERROR);
        };
        let mut piece = vec![0; bytes.min(PIECE_BYTES)];
        for done in (0..bytes).step_by(PIECE_BYTES) {
            let piece = &mut piece[..(bytes - done).min(PIECE_BYTES)];
            reader.read_exact(piece)?;
            storage.write(self.number, start + done as u64, piece)?;
        }
        Ok(OK)
    }

    /// Discards, or writes zeroes: the same here.
    fn clear(&self, reader: &mut Reader<'_>, storage: &mut dyn Storage) -> Result<u8, Stop> {
        let bytes = reader.available_bytes();
        let each = size_of::<Words>();
        if self.read_only
            || !bytes.is_multiple_of(each)
            || bytes / each > CLEAR_SEGMENTS_MAX as usize
        {
            return Ok(IO_ERROR);
        }
        for _ in 0..bytes / each {
            let mut range = Words::default();
            reader.read_exact(&mut range)?;
            let (sector, sectors) = (long(&range, 0), word(&range, 8));
            let end = sector.checked_add(sectors.into());
            if sectors > CLEAR_SECTORS_MAX || end.is_none_or(|end| end > self.sectors) {
                return Ok(IO_ERROR);
            }
            let (start, bytes) = (sector * SECTOR_BYTES, u64::from(sectors) * SECTOR_BYTES);
            storage.clear(self.number, start, bytes)?;
        }
        Ok(OK)
    }
}

impl Device for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let write = if self.read_only { READ_ONLY } else { WRITES };
        SIZE_MAX | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | write
    }

    fn queues(&self) -> &'static [u16] {
        &QUEUES
    }

    /// `struct virtio_blk_config` (5.2.4).
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(8, &SEGMENT_BYTES_MAX.to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &(SECTOR_BYTES as u32).to_le_bytes());
        put(36, &CLEAR_SECTORS_MAX.to_le_bytes());
        put(40, &CLEAR_SEGMENTS_MAX.to_le_bytes());
        put(44, &BLOCK_SECTORS.to_le_bytes());
        put(48, &CLEAR_SECTORS_MAX.to_le_bytes());
        put(52, &CLEAR_SEGMENTS_MAX.to_le_bytes());
        put(56, &[1]);
        config
    }

    fn notified(
        &mut self,
        queue: usize,
        rings: &mut [Ring],
        context: &mut BusContext<'_>,
    ) -> Result<bool, Stop> {
        let storage = &mut *context.storage;
        let (mut wanted, mut moved) = (false, 0);
        self.unfinished = false;
        for _ in 0..QUEUES[0] {
            wanted |= rings[queue].serve(context.ram, 1, |mut reader, mut writer| {
                let room = writer.available_bytes();
                moved += reader.available_bytes() + room;
                let last = room
                    .checked_sub(1)
                    .ok_or(Stop::Broken("a request without room for its status"))?;
                let mut status_writer = writer
                    .split_at(last)
                    .map_err(|_| Stop::Broken("a request without room for its status"))?;
                let done = self.request(&mut reader, &mut writer, storage)?;
                moved += if done.cleared { CLEAR_COUNTS_BYTES } else { 0 };
                status_writer.write_all(&[done.status])?;
                Ok(done.bytes + 1)
            })?;
            if rings[queue].waiting(context.ram) == 0 {
                return Ok(wanted);
            }
            if moved >= EXIT_BYTES_MAX {
                break;
            }
        }
        // The driver may not want an interrupt yet. It gets one, for that is how it comes back.
        self.unfinished = true;
        Ok(true)
    }

    fn acknowledged(
        &mut self,
        rings: &mut [Ring],
        context: &mut BusContext<'_>,
    ) -> Result<bool, Stop> {
        if self.unfinished {
            self.notified(0, rings, context)
        } else {
            Ok(false)
        }
    }

    fn reset(&mut self) {
        self.unfinished = false;
    }
}

#[cfg(test)]
mod tests;
