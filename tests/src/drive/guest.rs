//! The guest's side: drivers that know how to do it properly, and lie in one place.

use arbitrary::{Result, Unstructured};
use hindsight_devices::{Access, Slot, Width};

use super::Target;
use super::steps::{self, Step};
use super::world::{GUARDS, RAM_BYTES};

/// Where a queue's parts stand. Queues of the tests are small; lies about their size are not.
const QUEUE_BYTES: u64 = 0x800;
const FIRST_QUEUE: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x600;
/// Where indirect tables stand: up to 768 descriptors, with guards on neither side.
const TABLE: u64 = 0x9000;
const TABLE_DESCRIPTORS_MAX: u16 = 768;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What a driver remembers of a queue.
#[derive(Clone, Debug, Default)]
struct Queue {
    size: u16,
    available: u16,
    next: u16,
}

/// The guest.
#[derive(Debug)]
pub struct Guest {
    target: Target,
    slots: Vec<Slot>,
    queues: Vec<[Queue; 2]>,
}

impl Guest {
    /// A guest that has set nothing up.
    pub fn new(target: Target) -> Guest {
        let slots = target.devices().slots();
        Guest {
            target,
            queues: vec![Default::default(); slots.len()],
            slots,
        }
    }

    /// What it does next: one thing, in one or more steps.
    pub fn next(&mut self, bytes: &mut Unstructured<'_>) -> Result<Vec<Step>> {
        if self.slots.is_empty() {
            return Ok(vec![steps::plain(self.target, bytes)?]);
        }
        let slot = bytes.choose_index(self.slots.len())?;
        let queue = usize::from(bytes.arbitrary::<bool>()?);
        match bytes.int_in_range(0..=15u8)? {
            0 => self.set_up(slot, bytes),
            1..=5 => self.offer(slot, queue, bytes),
            6 => self.offer_much(slot, queue, bytes),
            7 | 8 => Ok(vec![self.store(slot, 0x050, queue as u64)]),
            9 => Ok(vec![
                self.store(slot, 0x030, queue as u64),
                self.store(slot, 0x044, bytes.int_in_range(0..=1)?),
            ]),
            10 => Ok(vec![self.store(
                slot,
                0x070,
                bytes.arbitrary::<u8>()?.into(),
            )]),
            11 => Ok(vec![self.store(slot, 0x064, 3)]),
            12 => Ok(vec![self.raw_access(slot, bytes)?]),
            13 => {
                let gpa = bytes.int_in_range(0..=RAM_BYTES as u64 - 1)?;
                let count = bytes.int_in_range(1..=32usize)?;
                Ok(put(gpa, bytes.bytes(count)?))
            }
            _ => Ok(vec![steps::plain(self.target, bytes)?]),
        }
    }

    fn store(&self, slot: usize, register: u64, value: u64) -> Step {
        Step::Access(Access::MemoryWrite {
            gpa: self.slots[slot].gpa + register,
            width: Width::Dword,
            value,
        })
    }

    /// Any access to the device's registers.
    fn raw_access(&self, slot: usize, bytes: &mut Unstructured<'_>) -> Result<Step> {
        let register = match bytes.arbitrary()? {
            true => bytes.int_in_range(0..=0x2fu64)? * 4,
            false => bytes.int_in_range(0..=0xfffu64)?,
        };
        let gpa = self.slots[slot].gpa + register;
        let width = steps::width(bytes)?;
        Ok(Step::Access(match bytes.arbitrary()? {
            true => Access::MemoryRead { gpa, width },
            false => Access::MemoryWrite {
                gpa,
                width,
                value: steps::value(bytes)?,
            },
        }))
    }

    /// Sets a device up from the start (virtio 1.3, 3.1.1), perhaps with one step left out or one value changed.
    fn set_up(&mut self, slot: usize, bytes: &mut Unstructured<'_>) -> Result<Vec<Step>> {
        // Any of those that are offered, or something else.
        let low = match bytes.arbitrary()? {
            true => 0x3000_0000 | 0x7264 & bytes.arbitrary::<u32>()?,
            false => bytes.arbitrary::<u32>()? & 0x3001_8020,
        };
        let mut plan = vec![(0x070, 0), (0x070, 3)];
        plan.extend([(0x024, 0), (0x020, low.into()), (0x024, 1), (0x020, 1)]);
        plan.push((0x070, 11));
        for queue in 0..2 {
            let size = 1 << bytes.int_in_range(0..=4u16)?;
            let base = self.base(slot, queue);
            self.queues[slot][queue] = Queue {
                size,
                ..Queue::default()
            };
            plan.extend([(0x030, queue as u64), (0x038, size.into())]);
            plan.extend([(0x080, base), (0x084, 0)]);
            plan.extend([(0x090, base + AVAILABLE), (0x094, 0)]);
            plan.extend([(0x0a0, base + USED), (0x0a4, 0), (0x044, 1)]);
        }
        plan.push((0x070, 15));
        match bytes.int_in_range(0..=7u8)? {
            0 => {
                plan.remove(bytes.choose_index(plan.len())?);
            }
            1 => {
                let at = bytes.choose_index(plan.len())?;
                plan[at].1 = steps::value(bytes)?;
            }
            2 => {
                let at = bytes.choose_index(plan.len())?;
                let twice = plan[at];
                plan.push(twice);
            }
            _ => {}
        }
        let base = self.base(slot, 0);
        let mut steps = put(base, &[0; 2 * QUEUE_BYTES as usize]);
        let stores = plan
            .into_iter()
            .map(|(register, value)| self.store(slot, register, value));
        steps.extend(stores);
        Ok(steps)
    }

    fn base(&self, slot: usize, queue: usize) -> u64 {
        FIRST_QUEUE + (2 * slot + queue) as u64 * QUEUE_BYTES
    }

    /// Makes a chain of a few buffers available, perhaps with a lie, and perhaps tells the device.
    fn offer(
        &mut self,
        slot: usize,
        queue: usize,
        bytes: &mut Unstructured<'_>,
    ) -> Result<Vec<Step>> {
        let base = self.base(slot, queue);
        let size = self.queues[slot][queue].size.max(1);
        let head = self.queues[slot][queue].next % size;
        let outs = bytes.int_in_range(0..=2u16)?;
        let ins = bytes.int_in_range(0..=3u16)?;
        let count = (outs + ins).clamp(1, size);
        let lie_at = bytes.int_in_range(0..=2 * count)?;
        let indirect = bytes.ratio(1, 4)?;
        let mut steps = Vec::new();
        let mut table = Vec::new();
        for index in 0..count {
            let first = if indirect { 0 } else { head };
            let mut descriptor = Descriptor::draw(bytes)?;
            descriptor.flags = if index < outs { 0 } else { WRITE };
            if index + 1 < count {
                descriptor.flags |= NEXT;
            }
            descriptor.next = (first + index + 1) % size;
            if index == 0 && outs > 0 && self.target == Target::Block {
                descriptor.bytes = 16;
                steps.extend(put(descriptor.gpa, &request(bytes)?));
            }
            if index == lie_at {
                descriptor.lie(bytes)?;
            }
            if indirect {
                table.extend(descriptor.bytes());
            } else {
                let at = base + 16 * u64::from((head + index) % size);
                steps.extend(put(at, &descriptor.bytes()));
            }
        }
        let used = if indirect { 1 } else { count };
        if indirect {
            steps.extend(put(TABLE, &table));
            let mut descriptor = Descriptor::table(count);
            if lie_at == count {
                descriptor.lie(bytes)?;
            }
            steps.extend(put(base + 16 * u64::from(head), &descriptor.bytes()));
        }
        self.queues[slot][queue].next = (head + used) % size;
        steps.extend(self.announce(slot, queue, head, bytes)?);
        Ok(steps)
    }

    /// Makes the same long chain available several times over.
    fn offer_much(
        &mut self,
        slot: usize,
        queue: usize,
        bytes: &mut Unstructured<'_>,
    ) -> Result<Vec<Step>> {
        let count = bytes.int_in_range(1..=TABLE_DESCRIPTORS_MAX)?;
        let writes = bytes.arbitrary::<bool>()?;
        let length = bytes.int_in_range(1..=0x4000u32)? & !0x1ff | 0x200;
        let mut table = Vec::new();
        let mut steps = put(0x4000, &request(bytes)?);
        for index in 0..count {
            let last = index + 1 == count;
            let header = index == 0;
            let writable = last || writes && !header;
            let descriptor = Descriptor {
                gpa: 0x4000,
                bytes: match (header, last) {
                    (true, _) => 16,
                    (_, true) => 1,
                    _ => length,
                },
                flags: if writable { WRITE } else { 0 } | if last { 0 } else { NEXT },
                next: index + 1,
            };
            table.extend(descriptor.bytes());
        }
        steps.extend(put(TABLE, &table));
        let base = self.base(slot, queue);
        steps.extend(put(base, &Descriptor::table(count).bytes()));
        for _ in 0..bytes.int_in_range(1..=16u8)? {
            let available = &mut self.queues[slot][queue].available;
            let entry = base + AVAILABLE + 4 + 2 * u64::from(*available % 16);
            *available = available.wrapping_add(1);
            let index = *available;
            steps.extend(put(entry, &[0, 0]));
            steps.extend(put(base + AVAILABLE + 2, &index.to_le_bytes()));
        }
        steps.push(self.store(slot, 0x050, queue as u64));
        Ok(steps)
    }

    /// Puts a chain's head into the available ring.
    fn announce(
        &mut self,
        slot: usize,
        queue: usize,
        mut head: u16,
        bytes: &mut Unstructured<'_>,
    ) -> Result<Vec<Step>> {
        let ring = self.base(slot, queue) + AVAILABLE;
        let state = &mut self.queues[slot][queue];
        let entry = ring + 4 + 2 * u64::from(state.available % state.size.max(1));
        state.available = state.available.wrapping_add(1);
        let mut available = state.available;
        let mut flags = 0;
        match bytes.int_in_range(0..=31u8)? {
            0 => head = bytes.arbitrary()?,
            1 => available = bytes.arbitrary()?,
            2 => available = available.wrapping_add(1),
            3..=6 => flags = 1,
            _ => {}
        }
        let mut steps = put(entry, &head.to_le_bytes());
        steps.extend(put(ring, &u16::to_le_bytes(flags)));
        steps.extend(put(ring + 2, &available.to_le_bytes()));
        if bytes.ratio(3, 4)? {
            steps.push(self.store(slot, 0x050, queue as u64));
        }
        Ok(steps)
    }
}

/// The header of a request to a disk (virtio 1.3, 5.2.6), or of 12 bytes and a bit to a network card.
fn request(bytes: &mut Unstructured<'_>) -> Result<[u8; 16]> {
    let kind = match bytes.int_in_range(0..=8u8)? {
        at @ 0..=6 => [0, 1, 4, 8, 11, 13, 0][usize::from(at)],
        _ => bytes.arbitrary::<u32>()?,
    };
    let sector = match bytes.int_in_range(0..=7u8)? {
        0 => bytes.arbitrary()?,
        1 => (1 << 31) - bytes.int_in_range(0..=4u64)?,
        _ => bytes.int_in_range(0..=255u64)?,
    };
    let mut request = [0; 16];
    request[..4].copy_from_slice(&kind.to_le_bytes());
    request[8..].copy_from_slice(&sector.to_le_bytes());
    Ok(request)
}

/// A descriptor (virtio 1.3, 2.7.5).
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    gpa: u64,
    bytes: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// A buffer that touches no guard.
    fn draw(bytes: &mut Unstructured<'_>) -> Result<Descriptor> {
        let most: u32 = match bytes.int_in_range(0..=3u8)? {
            0 => 0x3000,
            1 => 64,
            _ => 0x600,
        };
        let mut length = bytes.int_in_range(0..=most)?;
        if most > 64 && bytes.ratio(3, 4)? {
            length &= !0x1ff;
        }
        let gpa = bytes.int_in_range(0..=GUARDS[1].start - 1)?;
        let inside = GUARDS[0].contains(&gpa);
        let gpa = if inside { GUARDS[0].end } else { gpa };
        let stop = if gpa < GUARDS[0].start {
            GUARDS[0].start
        } else {
            GUARDS[1].start
        };
        Ok(Descriptor {
            gpa,
            bytes: u64::from(length).min(stop - gpa) as u32,
            flags: 0,
            next: 0,
        })
    }

    /// The descriptor that stands for the table of `count` others.
    fn table(count: u16) -> Descriptor {
        Descriptor {
            gpa: TABLE,
            bytes: 16 * u32::from(count),
            flags: INDIRECT,
            next: 0,
        }
    }

    /// Changes one of its fields.
    fn lie(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        match bytes.int_in_range(0..=7u8)? {
            0 => self.gpa = bytes.arbitrary()?,
            1 => self.gpa = RAM_BYTES as u64 - u64::from(bytes.arbitrary::<u8>()?),
            2 => self.gpa = u64::MAX - u64::from(bytes.arbitrary::<u8>()?),
            3 => self.bytes = bytes.arbitrary()?,
            4 => self.bytes = u32::MAX - u32::from(bytes.arbitrary::<u8>()?),
            5 => self.flags = bytes.arbitrary()?,
            6 => (self.flags, self.next) = (self.flags | NEXT, bytes.arbitrary()?),
            _ => {
                self.flags |= NEXT;
                self.next = bytes.int_in_range(0..=16)?;
            }
        }
        Ok(())
    }

    fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// The guest writes to its memory; never to a guard.
fn put(gpa: u64, bytes: &[u8]) -> Vec<Step> {
    let guarded = |gpa: u64| GUARDS.iter().any(|guard| guard.contains(&gpa));
    let count = (gpa..)
        .zip(bytes)
        .take_while(|(gpa, _)| !guarded(*gpa))
        .count();
    let bytes = bytes[..count].to_vec();
    vec![Step::Put { gpa, bytes }]
}
