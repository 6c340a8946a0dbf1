//! A guest that is nothing but virtio drivers: it sets up every device, then moves data through their rings.
//!
//! What it does next depends on everything it has read so far, registers, rings and buffers alike, and
//! its registers are that too. So a replay whose devices, disks or inputs differ in one byte parts from its
//! recording. It takes no interrupts: it looks.

use std::collections::VecDeque;

use hindsight_devices::{Access, Devices, Ram, Slot, Width};
use hindsight_replay::rng::mix;
use hindsight_replay::{
    Answer, Back, Cpu, CpuDigest, Exit, Horizon, MemoryDigest, Registers, ShownClock, Stateful,
};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

/// Guest memory in bytes.
pub const RAM_BYTES: usize = 1 << 20;
/// Operations of one run; each makes a few exits.
const OPERATIONS: u64 = 60;
/// Descriptors of each ring.
const SIZE: u16 = 8;
/// Memory of one ring and its buffers: a page for the ring, and one for each descriptor.
const RING_BYTES: u64 = 9 * 4096;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const WRITE: u16 = 2;
const NEXT: u16 = 1;

/// One ring, from the driver's side.
#[derive(Clone, Debug)]
struct Ring {
    base: u64,
    available: u16,
    used: u16,
}

/// What the driver was to become is nothing that it can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("no toy driver can be in this state")
    }
}

impl std::error::Error for Refused {}

/// All that a [`ToyDriver`] has of its own, and another for the same devices has not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DriverState {
    /// Of each ring, how many chains were made available, and how many came back.
    rings: Vec<[(u16, u16); 2]>,
    seen: u64,
    operations: u64,
    plan: VecDeque<Access>,
}

/// The guest.
#[derive(Debug)]
pub struct ToyDriver {
    ram: Ram,
    slots: Vec<Slot>,
    rings: Vec<[Ring; 2]>,
    seen: u64,
    operations: u64,
    plan: VecDeque<Access>,
}

impl ToyDriver {
    /// Drivers for `devices`, with their whims from `seed`.
    pub fn new(devices: &Devices, seed: u64) -> ToyDriver {
        let ram = Ram::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).expect("a MiB can be mapped");
        let slots = devices.slots();
        let ring = |index: u64| Ring {
            base: 0x1000 + index * RING_BYTES,
            available: 0,
            used: 0,
        };
        let rings = (0..slots.len() as u64).map(|slot| [ring(2 * slot), ring(2 * slot + 1)]);
        let rings = rings.collect();
        let mut driver = ToyDriver {
            ram,
            slots,
            rings,
            seen: mix(seed),
            operations: 0,
            plan: VecDeque::new(),
        };
        for slot in 0..driver.slots.len() {
            driver.plan_set_up(slot);
        }
        driver
    }

    fn store(&mut self, slot: usize, offset: u64, value: u64) {
        self.plan.push_back(Access::MemoryWrite {
            gpa: self.slots[slot].gpa + offset,
            width: Width::Dword,
            value,
        });
    }

    fn load(&mut self, slot: usize, offset: u64) {
        self.plan.push_back(Access::MemoryRead {
            gpa: self.slots[slot].gpa + offset,
            width: Width::Dword,
        });
    }

    /// virtio 1.3, 3.1.1 and 4.2.3.2, accepting every feature that fits 32 bits but indirect
    /// descriptors' absence, which is no feature.
    fn plan_set_up(&mut self, slot: usize) {
        self.load(slot, 0x008);
        for (register, value) in [(0x070, 0), (0x070, 1), (0x070, 3), (0x024, 1), (0x020, 1)] {
            self.store(slot, register, value);
        }
        let event_index = mix(self.seen ^ slot as u64) & 1 << 29;
        for (register, value) in [(0x024, 0), (0x020, event_index), (0x070, 0xb)] {
            self.store(slot, register, value);
        }
        self.load(slot, 0x070);
        for queue in 0..2 {
            let base = self.rings[slot][queue].base;
            for (register, value) in [
                (0x030, queue as u64),
                (0x038, SIZE.into()),
                (0x080, base),
                (0x090, base + AVAILABLE),
                (0x0a0, base + USED),
                (0x044, 1),
            ] {
                self.store(slot, register, value);
            }
        }
        self.store(slot, 0x070, 0xf);
    }

    fn see(&mut self, value: u64) {
        self.seen = mix(self.seen.rotate_left(7) ^ value);
    }

    fn see_memory(&mut self, gpa: u64, bytes: usize) {
        let mut buffer = vec![0; bytes];
        self.ram
            .read_slice(&mut buffer, GuestAddress(gpa))
            .expect("it is RAM");
        for word in buffer.chunks(8) {
            let word = word
                .iter()
                .fold(0, |word, byte| word << 8 | u64::from(*byte));
            self.see(word);
        }
    }

    fn draw(&mut self, bound: u64) -> u64 {
        self.see(0x5eed);
        self.seen % bound
    }

    /// Makes a chain available: buffers of these lengths, readable or writable, the first with `header` in
    /// it and every readable one full of something. Tells the device.
    fn plan_chain(&mut self, slot: usize, queue: usize, header: &[u8], buffers: &[(u32, bool)]) {
        let ring = self.rings[slot][queue].clone();
        if ring.available.wrapping_sub(ring.used) as usize + buffers.len() > usize::from(SIZE) {
            return;
        }
        let put = |gpa: u64, bytes: &[u8]| {
            self.ram
                .write_slice(bytes, GuestAddress(gpa))
                .expect("it is RAM");
        };
        for (index, (bytes, writable)) in buffers.iter().enumerate() {
            let buffer = ring.base + 4096 * (1 + index as u64);
            if !writable {
                let fill = (self.seen >> index) as u8;
                put(buffer, &vec![fill; *bytes as usize]);
                if index == 0 {
                    put(buffer, header);
                }
            }
            let last = index + 1 == buffers.len();
            let flags = if *writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let descriptor = ring.base + 16 * index as u64;
            put(descriptor, &buffer.to_le_bytes());
            put(descriptor + 8, &bytes.to_le_bytes());
            put(descriptor + 12, &flags.to_le_bytes());
            put(descriptor + 14, &(index as u16 + 1).to_le_bytes());
        }
        // One chain at a time: it always begins at descriptor 0.
        let entry = ring.base + AVAILABLE + 4 + 2 * u64::from(ring.available % SIZE);
        put(entry, &0u16.to_le_bytes());
        let available = ring.available.wrapping_add(1);
        put(ring.base + AVAILABLE + 2, &available.to_le_bytes());
        self.rings[slot][queue].available = available;
        self.store(slot, 0x050, queue as u64);
    }

    /// Looks at what came back.
    fn collect(&mut self, slot: usize, queue: usize) {
        let ring = self.rings[slot][queue].clone();
        self.see_memory(ring.base + USED, 4 + 8 * usize::from(SIZE));
        let used: u16 = self
            .ram
            .read_obj(GuestAddress(ring.base + USED + 2))
            .expect("it is RAM");
        if used != ring.used {
            self.rings[slot][queue].used = used;
            for buffer in 1..=u64::from(SIZE) {
                self.see_memory(ring.base + 4096 * buffer, 2048);
            }
        }
    }

    fn plan_operation(&mut self) {
        self.operations += 1;
        if self.operations > OPERATIONS {
            // The reset control register ends it.
            self.plan.push_back(Access::PortWrite {
                port: 0xcf9,
                width: Width::Byte,
                value: 6,
            });
            return;
        }
        let slot = self.draw(self.slots.len() as u64) as usize;
        for queue in 0..2 {
            self.collect(slot, queue);
        }
        self.load(slot, 0x060);
        self.store(slot, 0x064, 3);
        let id: u64 = match slot {
            0 => 3,
            1 => 4,
            2 => 1,
            _ => 2,
        };
        match (id, self.draw(4)) {
            // Receive, or ask for random bytes.
            (1 | 3, 0 | 1) | (4, _) => self.plan_chain(slot, 0, &[], &[(1600, true)]),
            // Send.
            (1 | 3, _) => {
                let bytes = 26 + self.draw(1000) as u32;
                self.plan_chain(slot, 1, &[0; 12], &[(bytes, false)]);
            }
            (_, kind) => {
                let sector = self.draw(64);
                let data = 512 * (1 + self.draw(4) as u32);
                let kind = [0u32, 1, 0, 4][kind as usize];
                let mut header = [0; 16];
                header[..4].copy_from_slice(&kind.to_le_bytes());
                header[8..].copy_from_slice(&sector.to_le_bytes());
                let status = (1, true);
                match kind {
                    4 => self.plan_chain(slot, 0, &header, &[(16, false), status]),
                    _ => {
                        let buffers = [(16, false), (data, kind == 0), status];
                        self.plan_chain(slot, 0, &header, &buffers);
                    }
                }
            }
        }
    }
}

impl Cpu for ToyDriver {
    type Error = Refused;

    fn run(&mut self, _: Horizon) -> Result<Back, Refused> {
        while self.plan.is_empty() {
            self.plan_operation();
        }
        let access = self.plan.pop_front().expect("something is planned");
        Ok(Back::Exit(Exit::Access(access)))
    }

    fn registers(&mut self) -> Registers {
        let mut registers = Registers([self.seen; Registers::COUNT]);
        // RFLAGS without IF.
        registers.0[17] = 2;
        registers
    }

    fn answer(&mut self, _: &Exit, answer: &Answer) -> Result<(), Refused> {
        match answer {
            Answer::Value(value) => self.see(*value),
            _ => self.see(1),
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<bool, Refused> {
        Ok(false)
    }

    fn interrupt(&mut self, _: u8) -> Result<(), Refused> {
        unreachable!("it takes none")
    }

    fn request_window(&mut self, _: bool) {}

    fn show_clock(&mut self, _: ShownClock) {}

    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn memory_digest(&mut self) -> Result<MemoryDigest, Refused> {
        let mut bytes = vec![0; RAM_BYTES];
        self.ram
            .read_slice(&mut bytes, GuestAddress(0))
            .expect("it is RAM");
        let mut digest = MemoryDigest::default();
        for (page, bytes) in (0..)
            .step_by(hindsight_replay::PAGE_BYTES)
            .zip(bytes.as_chunks::<{ hindsight_replay::PAGE_BYTES }>().0)
        {
            digest.absorb_page(page, bytes);
        }
        Ok(digest)
    }

    fn state_digest(&mut self) -> Result<CpuDigest, Refused> {
        Ok(CpuDigest::default())
    }
}

impl Stateful for ToyDriver {
    type State = DriverState;
    type Error = Refused;

    fn save(&mut self) -> Result<DriverState, Refused> {
        let counts = |ring: &Ring| (ring.available, ring.used);
        Ok(DriverState {
            rings: self
                .rings
                .iter()
                .map(|[a, b]| [counts(a), counts(b)])
                .collect(),
            seen: self.seen,
            operations: self.operations,
            plan: self.plan.clone(),
        })
    }

    fn restore(&mut self, state: &DriverState) -> Result<(), Refused> {
        if state.rings.len() != self.rings.len() || state.operations > OPERATIONS + 1 {
            return Err(Refused);
        }
        let rings = self.rings.iter_mut().flatten();
        for (ring, counts) in rings.zip(state.rings.iter().flatten()) {
            (ring.available, ring.used) = *counts;
        }
        self.seen = state.seen;
        self.operations = state.operations;
        self.plan = state.plan.clone();
        Ok(())
    }

    crate::pages_of_ram!(Refused);
}
