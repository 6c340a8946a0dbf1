//! A driver in the tests: registers over MMIO, rings and buffers in guest memory, and every way to get
//! them wrong.

use vm_memory::{Bytes, GuestAddress};

use super::transport::Transport;
use super::{Kind, Ring};
use crate::access::{Output, Room};
use crate::storage::{BusContext, FirstReads, Ram, Storage, StorageError};
use crate::{Input, Reply, Width};

/// Guest memory in bytes.
pub(super) const RAM_BYTES: u64 = 8 << 20;
/// Descriptors of each ring, if nothing else is said.
pub(super) const SIZE: u16 = 16;

pub(super) const WRITE: u16 = 2;
pub(super) const NEXT: u16 = 1;
pub(super) const INDIRECT: u16 = 4;

/// Feature bits (virtio 1.3, 6).
pub(super) const F_INDIRECT: u64 = 1 << 28;
pub(super) const F_EVENT_INDEX: u64 = 1 << 29;
pub(super) const F_VERSION_1: u64 = 1 << 32;

/// Registers (virtio 1.3, 4.2.2).
pub(super) const FEATURES: u64 = 0x010;
pub(super) const FEATURES_PAGE: u64 = 0x014;
pub(super) const DRIVER_FEATURES: u64 = 0x020;
pub(super) const DRIVER_FEATURES_PAGE: u64 = 0x024;
pub(super) const QUEUE: u64 = 0x030;
pub(super) const QUEUE_MAX: u64 = 0x034;
pub(super) const QUEUE_SIZE: u64 = 0x038;
pub(super) const QUEUE_READY: u64 = 0x044;
pub(super) const NOTIFY: u64 = 0x050;
pub(super) const INTERRUPT: u64 = 0x060;
pub(super) const INTERRUPT_ACK: u64 = 0x064;
pub(super) const STATUS: u64 = 0x070;
pub(super) const DESCRIPTORS: u64 = 0x080;
pub(super) const AVAILABLE: u64 = 0x090;
pub(super) const USED: u64 = 0x0a0;
pub(super) const CONFIG: u64 = 0x100;

/// Status bits (virtio 1.3, 2.1).
pub(super) const ACKNOWLEDGE: u32 = 1;
pub(super) const DRIVER: u32 = 2;
pub(super) const DRIVER_OK: u32 = 4;
pub(super) const FEATURES_OK: u32 = 8;
pub(super) const NEEDS_RESET: u32 = 0x40;
/// All that a driver in use has set.
pub(super) const LIVE: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

/// Where each queue's three parts stand, and where buffers begin.
const QUEUE_BYTES: u64 = 0x1_0000;
const FIRST_QUEUE: u64 = 0x1_0000;
const FIRST_BUFFER: u64 = 0x10_0000;

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(super) enum Buffer<'a> {
    /// The device reads this.
    Out(&'a [u8]),
    /// The device may write this number of bytes.
    In(u32),
}
pub(super) use Buffer::{In, Out};

/// One descriptor as it stands in memory (virtio 1.3, 2.7.5).
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub gpa: u64,
    pub bytes: u32,
    pub flags: u16,
    pub next: u16,
}

/// What came back in a used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Used {
    pub head: u32,
    pub bytes: u32,
}

/// One queue as its driver sees it.
#[derive(Clone, Copy, Debug, Default)]
struct Queue {
    next_descriptor: u16,
    available: u16,
    used: u16,
}

/// A disk of bytes in memory; disk number 0.
#[derive(Debug)]
pub(super) struct TestDisk(pub Vec<u8>);

impl TestDisk {
    fn range(&mut self, offset: u64, bytes: u64) -> &mut [u8] {
        let offset = usize::try_from(offset).expect("a range on the disk");
        &mut self.0[offset..][..usize::try_from(bytes).expect("a range on the disk")]
    }
}

impl Storage for TestDisk {
    fn read(&mut self, disk: usize, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        assert_eq!(disk, 0);
        let bytes = into.len() as u64;
        into.copy_from_slice(self.range(offset, bytes));
        Ok(())
    }
    fn write(&mut self, disk: usize, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        assert_eq!(disk, 0);
        self.range(offset, from.len() as u64).copy_from_slice(from);
        Ok(())
    }
    fn clear(&mut self, disk: usize, offset: u64, bytes: u64) -> Result<(), StorageError> {
        assert_eq!(disk, 0);
        self.range(offset, bytes).fill(0);
        Ok(())
    }
    fn digest(&mut self) -> Result<u64, StorageError> {
        Ok(0)
    }
    fn take_first_reads(&mut self) -> Option<FirstReads> {
        None
    }
}

/// The driver, with the device and the memory it works on.
#[derive(Debug)]
pub(super) struct Driver {
    pub ram: Ram,
    pub device: Transport,
    pub disk: TestDisk,
    queues: Vec<Queue>,
    next_buffer: u64,
    size: u16,
}

impl Driver {
    /// A driver that has found its device and done nothing yet.
    pub(super) fn find(kind: Kind) -> Driver {
        let queues = kind.device().queues().len();
        Driver {
            ram: Ram::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)]).expect("8 MiB"),
            device: Transport::new(kind),
            disk: TestDisk(vec![0; 1 << 20]),
            queues: vec![Queue::default(); queues],
            next_buffer: FIRST_BUFFER,
            size: SIZE,
        }
    }

    /// A driver whose device is in use, with these features beside the version.
    pub(super) fn start(kind: Kind, features: u64) -> Driver {
        let mut driver = Driver::find(kind);
        driver.set_up(features);
        driver
    }

    /// virtio 1.3, 3.1.1 and 4.2.3.2.
    pub(super) fn set_up(&mut self, features: u64) {
        self.write(STATUS, 0);
        self.queues.fill(Queue::default());
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        self.accept_features(features | F_VERSION_1);
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(self.read(STATUS), ACKNOWLEDGE | DRIVER | FEATURES_OK);
        for queue in 0..self.queues.len() {
            let base = self.base(queue);
            self.ram
                .write_slice(&[0; QUEUE_BYTES as usize], GuestAddress(base))
                .expect("it is RAM");
            self.place_queue(
                queue,
                self.size.into(),
                [base, base + 0x4000, base + 0x8000],
            );
        }
        self.write(STATUS, LIVE);
    }

    /// Writes the driver's features.
    pub(super) fn accept_features(&mut self, features: u64) {
        for page in 0..2 {
            self.write(DRIVER_FEATURES_PAGE, page);
            self.write(DRIVER_FEATURES, (features >> (32 * page)) as u32);
        }
    }

    /// The device's features.
    pub(super) fn features(&mut self) -> u64 {
        let mut page = |page| {
            self.write(FEATURES_PAGE, page);
            u64::from(self.read(FEATURES))
        };
        page(0) | page(1) << 32
    }

    /// Sets a queue up: size, and where descriptors, available and used ring are.
    pub(super) fn place_queue(&mut self, queue: usize, size: u32, parts: [u64; 3]) {
        self.write(QUEUE, queue as u32);
        self.write(QUEUE_SIZE, size);
        for (register, gpa) in [DESCRIPTORS, AVAILABLE, USED].into_iter().zip(parts) {
            self.write(register, gpa as u32);
            self.write(register + 4, (gpa >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
    }

    /// Where a queue's descriptors are; its available ring is 0x4000 after that, its used ring 0x8000.
    pub(super) fn base(&self, queue: usize) -> u64 {
        FIRST_QUEUE + queue as u64 * QUEUE_BYTES
    }

    pub(super) fn read(&self, register: u64) -> u32 {
        match self.device.read(register, Width::Dword) {
            Reply::Value(value) => value as u32,
            other => panic!("a register answered {other:?}"),
        }
    }

    pub(super) fn write(&mut self, register: u64, value: u32) {
        let mut context = BusContext {
            ram: &self.ram,
            storage: &mut self.disk,
        };
        self.device
            .write(register, Width::Dword, value.into(), &mut context)
            .expect("the disk does not fail");
    }

    pub(super) fn put(&self, gpa: u64, bytes: &[u8]) {
        self.ram
            .write_slice(bytes, GuestAddress(gpa))
            .expect("it is RAM");
    }

    pub(super) fn get(&self, gpa: u64, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        self.ram
            .read_slice(&mut buffer, GuestAddress(gpa))
            .expect("it is RAM");
        buffer
    }

    pub(super) fn get_u16(&self, gpa: u64) -> u16 {
        u16::from_le_bytes([self.get(gpa, 1)[0], self.get(gpa + 1, 1)[0]])
    }

    /// Memory that nobody else uses.
    pub(super) fn allocate(&mut self, bytes: u32) -> u64 {
        let gpa = self.next_buffer;
        self.next_buffer += u64::from(bytes).next_multiple_of(16);
        assert!(self.next_buffer <= RAM_BYTES, "the tests need more memory");
        gpa
    }

    /// Writes a descriptor.
    pub(super) fn describe(&self, table: u64, index: u16, descriptor: Descriptor) {
        let at = table + 16 * u64::from(index);
        self.put(at, &descriptor.gpa.to_le_bytes());
        self.put(at + 8, &descriptor.bytes.to_le_bytes());
        self.put(at + 12, &descriptor.flags.to_le_bytes());
        self.put(at + 14, &descriptor.next.to_le_bytes());
    }

    fn describe_all(&mut self, table: u64, first: u16, buffers: &[Buffer<'_>]) -> Vec<u64> {
        let mut places = Vec::new();
        for (index, buffer) in (first..).zip(buffers) {
            let (bytes, flag) = match buffer {
                Out(bytes) => (bytes.len() as u32, 0),
                In(bytes) => (*bytes, WRITE),
            };
            let gpa = self.allocate(bytes);
            if let Out(bytes) = buffer {
                self.put(gpa, bytes);
            }
            places.push(gpa);
            let last = places.len() == buffers.len();
            let descriptor = Descriptor {
                gpa,
                bytes,
                flags: flag | if last { 0 } else { NEXT },
                next: index + 1,
            };
            self.describe(table, index, descriptor);
        }
        places
    }

    /// Makes a chain available, without a notification; where its buffers are.
    pub(super) fn offer(&mut self, queue: usize, buffers: &[Buffer<'_>]) -> Vec<u64> {
        let head = self.claim(queue, buffers.len() as u16);
        let places = self.describe_all(self.base(queue), head, buffers);
        self.offer_head(queue, head);
        places
    }

    /// The first of `count` descriptors. Chains of the tests are done before the table begins again.
    fn claim(&mut self, queue: usize, count: u16) -> u16 {
        let next = self.queues[queue].next_descriptor;
        let first = if next + count > self.size { 0 } else { next };
        self.queues[queue].next_descriptor = first + count;
        first
    }

    /// The same by one descriptor that stands for a table of them (virtio 1.3, 2.7.5.3).
    pub(super) fn offer_indirect(&mut self, queue: usize, buffers: &[Buffer<'_>]) -> Vec<u64> {
        let bytes = 16 * buffers.len() as u32;
        let table = self.allocate(bytes);
        let places = self.describe_all(table, 0, buffers);
        let descriptor = Descriptor {
            gpa: table,
            bytes,
            flags: INDIRECT,
            next: 0,
        };
        let head = self.claim(queue, 1);
        self.describe(self.base(queue), head, descriptor);
        self.offer_head(queue, head);
        places
    }

    /// Makes the chain that begins at this descriptor available.
    pub(super) fn offer_head(&mut self, queue: usize, head: u16) {
        let available = self.base(queue) + 0x4000;
        let next = self.queues[queue].available;
        let entry = available + 4 + 2 * u64::from(next % self.size);
        self.put(entry, &head.to_le_bytes());
        let next = next.wrapping_add(1);
        self.put(available + 2, &next.to_le_bytes());
        self.queues[queue].available = next;
    }

    /// Tells the device.
    pub(super) fn notify(&mut self, queue: usize) {
        self.write(NOTIFY, queue as u32);
    }

    /// What has come back since this was last asked.
    pub(super) fn used(&mut self, queue: usize) -> Vec<Used> {
        let ring = self.base(queue) + 0x8000;
        let end = self.get_u16(ring + 2);
        let mut used = Vec::new();
        while self.queues[queue].used != end {
            let at = ring + 4 + 8 * u64::from(self.queues[queue].used % self.size);
            let word = |at| u32::from_le_bytes(self.get(at, 4).try_into().expect("4 bytes"));
            used.push(Used {
                head: word(at),
                bytes: word(at + 4),
            });
            self.queues[queue].used = self.queues[queue].used.wrapping_add(1);
        }
        used
    }

    /// Whether the device has raised its interrupt, which is acknowledged.
    pub(super) fn interrupted(&mut self) -> bool {
        let causes = self.read(INTERRUPT);
        assert_eq!(self.device.line(), causes != 0);
        self.write(INTERRUPT_ACK, causes);
        assert!(!self.device.line());
        causes != 0
    }

    pub(super) fn accept(&mut self, input: Input) {
        self.device.accept(&input, &self.ram);
    }

    pub(super) fn room(&self) -> Room {
        let mut room = Room::default();
        self.device.room(&self.ram, &mut room);
        room
    }

    pub(super) fn outputs(&mut self) -> Vec<Output> {
        let mut outputs = Vec::new();
        self.device.take_output(&mut outputs);
        outputs
    }

    /// Asserts that the device is dead, says so once, does nothing more, and works again after a reset.
    #[track_caller]
    pub(super) fn expect_broken(&mut self, queue: usize) {
        assert_eq!(self.read(STATUS), LIVE | NEEDS_RESET, "it needs a reset");
        assert_eq!(self.read(INTERRUPT) & 2, 2, "the driver is told");
        self.interrupted();
        let before = self.get(0, RAM_BYTES as usize);
        self.notify(queue);
        self.accept(Input::Frame(vec![0; 60]));
        self.accept(Input::Entropy(vec![7; 16]));
        self.write(STATUS, LIVE);
        self.notify(queue);
        assert_eq!(self.read(STATUS), LIVE | NEEDS_RESET, "only a reset helps");
        assert_eq!(self.room(), Room::default());
        assert!(!self.device.line());
        assert!(
            before == self.get(0, RAM_BYTES as usize),
            "a dead device writes nothing"
        );
        self.set_up(0);
        assert_eq!(self.read(STATUS), LIVE);
    }
}

/// For those who look at a ring alone.
pub(super) fn lone_ring(size: u16) -> Ring {
    Ring::new(size)
}
