//! Two boards that live through the same steps, each with its own memory and disks, and what must hold
//! after each step.

use std::ops::Range;

use hindsight_devices::{
    Access, Board, BoardState, BusContext, Devices, FRAME_BYTES_MAX, Nanos, Output, Ram, Reply,
    Room, Width,
};
use vm_memory::{Bytes, GuestAddress};

use super::disk::{Disks, Work};
use super::steps::Step;

/// Guest memory in bytes.
pub const RAM_BYTES: usize = 0x1_0000;
/// Memory that no driver names; a device that writes there does so by its own mistake.
pub const GUARDS: [Range<u64>; 2] = [0x8000..0x9000, 0xf000..0x1_0000];
const GUARD_BYTE: u8 = 0xa5;

/// What one access may ask of the disks: a bound on how long it can take.
const MOVED_BYTES_MAX: u64 = 128 << 20;
const CLEARED_BYTES_MAX: u64 = 16 << 30;
const CALLS_MAX: u64 = 20_000;
/// What one step may send: a queue full of the longest frames.
const SENT_MAX: usize = 257;
const SENT_BYTES_MAX: usize = 257 * FRAME_BYTES_MAX;

const STATUS: u64 = 0x070;
const NEEDS_RESET: u64 = 0x40;

thread_local! {
    /// Memory of both boards. Mapping it anew would take most of the time; each input finds it fresh.
    static MEMORIES: [Ram; 2] = [(); 2].map(|()| {
        Ram::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).expect("64 KiB can be mapped")
    });
}

/// A board and what is lent to it.
#[derive(Debug)]
struct Side {
    board: Board,
    ram: Ram,
    disks: Disks,
}

/// All that can be seen of a side after a step.
#[derive(Debug, PartialEq)]
struct Seen {
    reply: Option<Reply>,
    vector: Option<u8>,
    outputs: Vec<Output>,
    pending: bool,
    deadline: Option<Nanos>,
    room: Room,
    work: Work,
    /// Status of each virtio device.
    status: Vec<u64>,
}

impl Side {
    fn new(devices: &Devices, ram: Ram) -> Side {
        let mut bytes = vec![0; RAM_BYTES];
        for guard in GUARDS {
            bytes[guard.start as usize..guard.end as usize].fill(GUARD_BYTE);
        }
        ram.write_slice(&bytes, GuestAddress(0)).expect("it is RAM");
        Side {
            board: Board::new(devices),
            ram,
            disks: Disks::new(devices.disks.iter().map(|disk| disk.bytes).collect()),
        }
    }

    fn access(&mut self, access: Access) -> Reply {
        let mut context = BusContext {
            ram: &self.ram,
            storage: &mut self.disks,
        };
        let reply = self.board.access(access, &mut context);
        reply.expect("these disks do not fail")
    }

    fn status(&mut self, slots: &[u64]) -> Vec<u64> {
        let read = |gpa: &u64| {
            let reply = self.access(Access::MemoryRead {
                gpa: gpa + STATUS,
                width: Width::Dword,
            });
            match reply {
                Reply::Value(value) => value,
                other => panic!("a load got {other:?}"),
            }
        };
        slots.iter().map(read).collect()
    }

    fn take(&mut self, step: &Step, slots: &[u64]) -> Seen {
        let (mut reply, mut vector) = (None, None);
        self.disks.work = Work::default();
        let waits = matches!(step, Step::Wait(_) | Step::ToDeadline);
        self.board.count_exit(waits);
        match step {
            Step::Access(access) => reply = Some(self.access(*access)),
            Step::Put { gpa, bytes } => {
                // What would be outside is cut off.
                let room = (RAM_BYTES as u64).saturating_sub(*gpa) as usize;
                self.ram
                    .write_slice(&bytes[..bytes.len().min(room)], GuestAddress(*gpa))
                    .expect("it is RAM");
            }
            Step::Input(input) => self.board.accept(input.clone(), &self.ram),
            Step::Wait(ns) => self.board.advance(self.board.now().saturating_add(*ns)),
            Step::ToDeadline => {
                let deadline = self.board.deadline().unwrap_or(self.board.now());
                self.board.advance(deadline);
            }
            Step::Acknowledge => vector = Some(self.board.acknowledge()),
            Step::Restore => {}
        }
        let work = self.disks.work;
        Seen {
            reply,
            vector,
            outputs: self.board.take_outputs(),
            pending: self.board.interrupt_pending(),
            deadline: self.board.deadline(),
            room: self.board.room(&self.ram),
            work,
            status: self.status(slots),
        }
    }

    /// Reads all of its memory; nothing of it where nothing is to go.
    fn read_memory(&self, into: &mut [u8]) {
        self.ram
            .read_slice(into, GuestAddress(0))
            .expect("it is RAM");
    }
}

/// Both sides.
#[derive(Debug)]
pub struct World {
    one: Side,
    other: Side,
    slots: Vec<u64>,
    /// Memory before steps, after them, and that of the other side; empty on a board whose devices do not
    /// reach it.
    before: Vec<u8>,
    after: Vec<u8>,
    other_after: Vec<u8>,
    /// A driver put a used ring where a guard is, or near it.
    ring_at_guard: bool,
    guards_are_whole: bool,
}

impl World {
    /// Both boards at power-on.
    pub fn new(devices: &Devices) -> World {
        let [one, other] = MEMORIES.with(Clone::clone);
        let bytes = if devices.slots().is_empty() {
            0
        } else {
            RAM_BYTES
        };
        World {
            before: vec![0; bytes],
            after: vec![0; bytes],
            other_after: vec![0; bytes],
            one: Side::new(devices, one),
            other: Side::new(devices, other),
            slots: devices.slots().iter().map(|slot| slot.gpa).collect(),
            ring_at_guard: false,
            guards_are_whole: true,
        }
    }

    /// Takes steps that belong together.
    pub fn take(&mut self, steps: &[Step]) {
        let mut before = std::mem::take(&mut self.before);
        self.one.read_memory(&mut before);
        let dead_before = self.dead();
        let mut resets = false;
        for step in steps {
            self.watch(step, &mut before, &mut resets);
            let dead = self.dead();
            let seen = self.one.take(step, &self.slots);
            let other = self.other.take(step, &self.slots);
            assert_eq!(seen, other, "the copy does the same at {step:?}");
            self.check(step, &seen, &dead);
            if matches!(step, Step::Restore) {
                self.restore();
            }
        }
        let mut after = std::mem::take(&mut self.after);
        self.one.read_memory(&mut after);
        self.other.read_memory(&mut self.other_after);
        assert!(after == self.other_after, "the copy's memory is the same");
        if !dead_before.is_empty() && dead_before.iter().all(|dead| *dead) && !resets {
            assert!(after == before, "a dead device writes nothing");
        }
        if !self.slots.is_empty() {
            self.check_guards(&before, &after);
        }
        (self.before, self.after) = (before, after);
        let state = self.one.board.save();
        assert!(
            state == self.other.board.save(),
            "the copy's board is the same"
        );
        let restored = Board::restore(state.clone()).expect("a board that was can be restored");
        assert!(restored.save() == state, "a restored board is the same");
    }

    /// What a step of the guest itself does to memory, and whether it changes what may happen to it.
    fn watch(&mut self, step: &Step, before: &mut [u8], resets: &mut bool) {
        match step {
            Step::Put { gpa, bytes } => {
                for (at, byte) in (*gpa as usize..RAM_BYTES).zip(bytes) {
                    before[at] = *byte;
                }
            }
            Step::Access(Access::MemoryWrite { gpa, value, .. }) => {
                match gpa.checked_sub(0xd000_0000).map(|gpa| gpa % 0x1000) {
                    Some(0x0a0..=0x0a7) => {
                        let low = value & 0xffff_ffff;
                        let near =
                            |guard: &Range<u64>| low + 0x1000 > guard.start && low < guard.end;
                        self.ring_at_guard |= GUARDS.iter().any(near);
                    }
                    Some(STATUS) => *resets |= *value as u32 == 0,
                    _ => {}
                }
            }
            _ => {}
        }
    }

    fn dead(&mut self) -> Vec<bool> {
        let status = self.one.status(&self.slots);
        status.iter().map(|s| s & NEEDS_RESET != 0).collect()
    }

    fn check(&mut self, step: &Step, seen: &Seen, dead: &[bool]) {
        let now = self.one.board.now();
        assert!(
            seen.deadline.is_none_or(|deadline| deadline > now),
            "a deadline has passed"
        );
        let Work {
            calls,
            moved_bytes,
            cleared_bytes,
        } = seen.work;
        assert!(
            calls <= CALLS_MAX
                && moved_bytes <= MOVED_BYTES_MAX
                && cleared_bytes <= CLEARED_BYTES_MAX,
            "one access asks for too much: {:?}",
            seen.work
        );
        let bytes = |output: &Output| match output {
            Output::Console(bytes) | Output::VirtioConsole(bytes) | Output::Frame(bytes) => {
                bytes.len()
            }
        };
        assert!(
            seen.outputs.len() <= SENT_MAX
                && seen.outputs.iter().map(bytes).sum::<usize>() <= SENT_BYTES_MAX,
            "one step sends too much"
        );
        for (slot, (dead, status)) in dead.iter().zip(&seen.status).enumerate() {
            let reset = matches!(
                step,
                Step::Access(Access::MemoryWrite { gpa, value, .. })
                    if *gpa == self.slots[slot] + STATUS && *value as u32 == 0
            );
            assert!(
                !dead || reset || status & NEEDS_RESET != 0,
                "only a reset revives device {slot}"
            );
        }
        if !dead.is_empty() && dead.iter().all(|dead| *dead) {
            let serial = |output: &Output| matches!(output, Output::Console(_));
            assert_eq!(seen.work, Work::default(), "a dead device uses no disk");
            assert!(
                seen.outputs.iter().all(serial),
                "a dead device sends nothing"
            );
        }
    }

    /// No byte of a guard has changed, if nothing in memory named it as a buffer to write to.
    fn check_guards(&mut self, before: &[u8], after: &[u8]) {
        let whole = |guard: &Range<u64>| {
            let guard = guard.start as usize..guard.end as usize;
            before[guard.clone()] == after[guard]
        };
        if !self.guards_are_whole || GUARDS.iter().all(whole) {
            return;
        }
        assert!(
            self.ring_at_guard || names_guard(before) || names_guard(after),
            "a device wrote to memory that nobody gave it"
        );
        self.guards_are_whole = false;
    }

    /// The other board is saved as bytes, and goes on as one that was restored.
    fn restore(&mut self) {
        let state = self.other.board.save();
        let bytes = postcard::to_stdvec(&state).expect("a board can be written");
        let read: BoardState = postcard::from_bytes(&bytes).expect("and read");
        assert!(read == state, "a board reads as it was written");
        self.other.board = Board::restore(read).expect("a board that was can be restored");
    }
}

/// Whether something that could be a descriptor of a buffer to write to names a guard.
fn names_guard(memory: &[u8]) -> bool {
    memory.windows(16).any(|window| {
        let gpa = u64::from_le_bytes(window[..8].try_into().expect("8 bytes"));
        let bytes = u32::from_le_bytes(window[8..12].try_into().expect("4 bytes"));
        let end = gpa.saturating_add(bytes.into());
        window[12] & 2 != 0
            && GUARDS
                .iter()
                .any(|guard| gpa < guard.end && end > guard.start)
    })
}
