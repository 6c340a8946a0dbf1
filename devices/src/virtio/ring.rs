//! One virtqueue: a split ring in guest memory, read by the crate virtio-queue.
//!
//! A ring is plain values here, so that it can be saved; virtio-queue's own `Queue` exists only
//! while the ring is served. A guest that breaks the rules of rings breaks its device until it resets it
//! (virtio 1.3, 2.1.2), and nothing else.

use std::io::Write;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::Stop;
use crate::storage::{Ram, Reader, Writer};

/// More descriptors than this in one chain are a guest's mistake: none of our devices has a use for
/// them (virtio 1.3, 2.7.5.3.1 lets a device set such a limit by its queue's size).
const CHAIN_MAX: usize = 1024;

/// A virtqueue's registers and how far it has been served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ring {
    max_size: u16,
    pub size: u16,
    pub ready: bool,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    next_available: u16,
    next_used: u16,
    event_index: bool,
}

impl Ring {
    /// A ring that the driver has not set up, of at most `max_size` descriptors.
    pub(crate) fn new(max_size: u16) -> Ring {
        assert!(
            max_size.is_power_of_two(),
            "a ring's size is a power of two, not {max_size}"
        );
        Ring {
            max_size,
            size: max_size,
            ready: false,
            descriptors: 0,
            available: 0,
            used: 0,
            next_available: 0,
            next_used: 0,
            event_index: false,
        }
    }

    /// How many descriptors it may have.
    pub(crate) fn max_size(&self) -> u16 {
        self.max_size
    }

    /// The driver has set it up (`ready`), or takes it away.
    pub(crate) fn set_ready(&mut self, ready: bool, event_index: bool) {
        if !ready {
            *self = Ring::new(self.max_size);
            return;
        }
        (self.ready, self.event_index) = (true, event_index);
    }

    /// How many chains the driver has made available and nobody has taken; 0 for a ring that is broken.
    pub(crate) fn waiting(&self, ram: &Ram) -> u16 {
        if !self.ready {
            return 0;
        }
        let index = self.available.checked_add(2).map(GuestAddress);
        let index: Option<u16> = index.and_then(|index| ram.read_obj(index).ok());
        let waiting = index.map(|index| u16::from_le(index).wrapping_sub(self.next_available));
        waiting.filter(|waiting| *waiting <= self.size).unwrap_or(0)
    }

    /// Hands each available chain to `serve`, at most `most`, and gives it back with so many bytes written
    /// to it as that returns. Returns whether the driver wants an interrupt for that.
    pub(crate) fn serve(
        &mut self,
        ram: &Ram,
        most: usize,
        mut serve: impl FnMut(Reader<'_>, Writer<'_>) -> Result<u32, Stop>,
    ) -> Result<bool, Stop> {
        let Some(mut queue) = self.open(ram)? else {
            return Ok(false);
        };
        let mut given_back = false;
        for _ in 0..most {
            let Some(chain) = Chain::next(&mut queue, ram)? else {
                break;
            };
            let bytes = serve(chain.reader, chain.writer)?;
            give_back(&mut queue, ram, chain.head, bytes)?;
            given_back = true;
        }
        self.close(queue, ram, given_back)
    }

    /// Takes as many chains as hold `bytes`, at most `most`, and gives them back one after the other full
    /// of what `content` is for that many. Returns whether the driver wants an interrupt for that; `None` if
    /// there are not enough, and then nothing has happened.
    pub(crate) fn fill(
        &mut self,
        ram: &Ram,
        bytes: usize,
        most: usize,
        content: impl FnOnce(u16) -> Vec<u8>,
    ) -> Result<Option<bool>, Stop> {
        let Some(mut queue) = self.open(ram)? else {
            return Ok(None);
        };
        let (mut chains, mut room) = (Vec::new(), 0);
        while room < bytes {
            let next = if chains.len() < most {
                Chain::next(&mut queue, ram)?
            } else {
                None
            };
            let Some(chain) = next else {
                return Ok(None);
            };
            room += chain.writer.available_bytes();
            chains.push(chain);
        }
        let content = content(chains.len() as u16);
        assert_eq!(content.len(), bytes, "content is as long as was said");
        let mut rest = &content[..];
        for mut chain in chains {
            let (now, later) = rest.split_at(rest.len().min(chain.writer.available_bytes()));
            chain.writer.write_all(now)?;
            give_back(&mut queue, ram, chain.head, now.len() as u32)?;
            rest = later;
        }
        self.close(queue, ram, true).map(Some)
    }

    /// Keeps how far `queue` has come. Returns whether the driver wants an interrupt, if something was
    /// given back.
    fn close(&mut self, mut queue: Queue, ram: &Ram, given_back: bool) -> Result<bool, Stop> {
        let lost = |_| Stop::Broken("a ring outside memory");
        // A driver that has given more than was wanted need not say that it gives even more.
        let left = queue.avail_idx(ram, Ordering::Acquire).map_err(lost)?.0 != queue.next_avail();
        if left {
            queue.disable_notification(ram).map_err(lost)?;
        } else {
            queue.enable_notification(ram).map_err(lost)?;
        }
        let wanted = given_back && self.wants_interrupt(&mut queue, ram)?;
        (self.next_available, self.next_used) = (queue.next_avail(), queue.next_used());
        Ok(wanted)
    }

    /// Whether the driver wants to hear of what was given back (virtio 1.3, 2.7.7.2). Without event
    /// indexes the driver says so in a flag, which virtio-queue does not look at.
    fn wants_interrupt(&self, queue: &mut Queue, ram: &Ram) -> Result<bool, Stop> {
        const NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;
        let lost = |_| Stop::Broken("a ring outside memory");
        if self.event_index {
            return queue.needs_notification(ram).map_err(lost);
        }
        let flags: u16 = ram
            .read_obj(GuestAddress(self.available))
            .map_err(|_| Stop::Broken("a ring outside memory"))?;
        Ok(u16::from_le(flags) & NO_INTERRUPT == 0)
    }

    /// The ring as virtio-queue wants it; `None` if the driver has not set it up.
    fn open(&self, ram: &Ram) -> Result<Option<Queue>, Stop> {
        if !self.ready {
            return Ok(None);
        }
        let state = QueueState {
            max_size: self.max_size,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: self.event_index,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        };
        match Queue::try_from(state) {
            Ok(queue) if queue.is_valid(ram) => Ok(Some(queue)),
            _ => Err(Stop::Broken(
                "a ring outside memory, or of no size that is allowed",
            )),
        }
    }

    /// Whether a saved ring is one that a driver could have made.
    pub(crate) fn is_possible(&self, max_size: u16) -> bool {
        self.max_size == max_size && self.size <= max_size
    }
}

/// A chain that keeps to the rules.
struct Chain<'a> {
    head: u16,
    reader: Reader<'a>,
    writer: Writer<'a>,
}

impl<'a> Chain<'a> {
    /// The next one that is available.
    fn next(queue: &mut Queue, ram: &'a Ram) -> Result<Option<Chain<'a>>, Stop> {
        let next = queue
            .iter(ram)
            .map_err(|_| Stop::Broken("an available ring that ran too far"))?
            .next();
        let Some(chain) = next else {
            return Ok(None);
        };
        let walk = chain.clone().take(CHAIN_MAX + 1).enumerate();
        // virtio-queue ends a chain that breaks the rules where it breaks them.
        let whole = walk
            .last()
            .is_some_and(|(index, last)| index < CHAIN_MAX && !last.has_next());
        if !whole {
            return Err(Stop::Broken(
                "a chain without end, or with a descriptor that does not exist",
            ));
        }
        let outside = |_| Stop::Broken("a chain that leads out of memory");
        Ok(Some(Chain {
            head: chain.head_index(),
            reader: chain.clone().reader(ram).map_err(outside)?,
            writer: chain.writer(ram).map_err(outside)?,
        }))
    }
}

/// Puts a chain into the used ring, with how many bytes were written to it.
fn give_back(queue: &mut Queue, ram: &Ram, head: u16, bytes: u32) -> Result<(), Stop> {
    queue
        .add_used(ram, head, bytes)
        .map_err(|_| Stop::Broken("a descriptor that does not exist"))
}

#[cfg(test)]
mod tests;
