//! Instructions that make several accesses, or one of an odd length: they reach the machine one by one.
//!
//! KVM hands over the elements of a string instruction together, and an access that lies across a page in pieces of
//! any length. What is written is known when KVM comes back, and KVM has then done with the instruction, registers and
//! all: the writes wait here. What is read KVM wants answered first, and until the last answer the instruction has
//! changed nothing: so one that is in the middle is saved as the answers that it has had, and begun again with
//! them where it is restored.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use hindsight_devices::{Access, Width};
use hindsight_replay::Exit;
use kvm_bindings::KVM_EXIT_MMIO;

use super::cpu::KvmCpu;
use super::error::{KvmError, Named};
use super::run_page::{MmioExit, PortExit};
use super::signals::{self, Alarm};

/// An instruction that reads has come back for its value by then, on any host.
const READ_TIME_MAX: Duration = Duration::from_secs(5);
/// Guest page size in bytes.
const PAGE: u64 = 4096;

/// What is left of an instruction after an exit.
#[derive(Debug, Default)]
pub(super) struct Parts {
    /// Writes that the machine has not seen.
    writes: VecDeque<Access>,
    /// A read of several elements.
    read: Option<PartedRead>,
    /// KVM's reason for an exit, a read, that came while the part before it was being finished.
    held: Option<u32>,
    /// What the reads of this instruction have been answered.
    given: Vec<u64>,
    /// There may be another part of the read that was answered last.
    may_go_on: bool,
}

/// A read that is answered element by element.
#[derive(Clone, Copy, Debug)]
struct PartedRead {
    from: ReadFrom,
    next: usize,
    count: usize,
}

#[derive(Clone, Copy, Debug)]
enum ReadFrom {
    Port(PortExit),
    /// Byte by byte from this address on.
    Memory(u64),
}

impl PartedRead {
    /// The present element; `None` after the last.
    fn element(&self) -> Option<Access> {
        (self.next < self.count).then(|| match self.from {
            ReadFrom::Port(io) => Access::PortRead {
                port: io.port,
                width: port_width(&io),
            },
            ReadFrom::Memory(gpa) => Access::MemoryRead {
                gpa: gpa.wrapping_add(self.next as u64),
                width: Width::Byte,
            },
        })
    }
}

impl Parts {
    /// Nothing is left of what was before.
    pub(super) fn begin(&mut self) {
        self.writes.clear();
        (self.read, self.held, self.may_go_on) = (None, None, false);
        self.given.clear();
    }

    /// Writes that wait, as [`Parts::writes`] gave them.
    pub(super) fn put_writes(&mut self, writes: &[Access]) {
        self.writes = writes.iter().copied().collect();
    }

    /// The writes that wait, oldest first.
    pub(super) fn writes(&self) -> Vec<Access> {
        self.writes.iter().copied().collect()
    }

    /// The answers that the instruction has had so far, if it is in the middle of its reads.
    pub(super) fn answers(&self) -> Option<&[u64]> {
        (self.is_reading() || self.held.is_some()).then_some(&self.given[..])
    }

    /// Whether an element is still to be answered before KVM may go on.
    pub(super) fn is_reading(&self) -> bool {
        self.read.is_some_and(|read| read.element().is_some())
    }

    /// Whether the next exit is at hand.
    pub(super) fn are_left(&self) -> bool {
        self.is_reading() || self.held.is_some() || !self.writes.is_empty()
    }

    fn add_memory_write(&mut self, mmio: &MmioExit) {
        let value = u64::from_le_bytes(mmio.data);
        if let Some(width) = Width::from_bytes(mmio.bytes) {
            let (gpa, value) = (mmio.gpa, value & width.ones());
            self.writes
                .push_back(Access::MemoryWrite { gpa, width, value });
            return;
        }
        for (offset, byte) in mmio.data.into_iter().enumerate().take(mmio.bytes.max(1)) {
            self.writes.push_back(Access::MemoryWrite {
                gpa: mmio.gpa.wrapping_add(offset as u64),
                width: Width::Byte,
                value: byte.into(),
            });
        }
    }
}

fn port_width(io: &PortExit) -> Width {
    Width::from_bytes(io.size).expect("ports are 1, 2 or 4 bytes wide")
}

impl KvmCpu {
    /// The next exit, if it is at hand.
    pub(super) fn next_part(&mut self) -> Option<Exit> {
        if let Some(write) = self.vcpu.parts.writes.pop_front() {
            return Some(Exit::Access(write));
        }
        if let Some(read) = self.vcpu.parts.read.and_then(|read| read.element()) {
            return Some(Exit::Access(read));
        }
        self.vcpu.parts.read = None;
        self.vcpu.parts.held.take()?;
        // The part of an access that lies on another page.
        self.vcpu.unfinished = true;
        Some(self.decode_mmio())
    }

    /// The exit of a port access that is no trap.
    pub(super) fn decode_port(&mut self, io: PortExit) -> Exit {
        if io.read {
            self.vcpu.parts.read = Some(PartedRead {
                from: ReadFrom::Port(io),
                next: 0,
                count: io.count,
            });
        } else {
            let width = port_width(&io);
            let page = self.page();
            let values: Vec<u32> = (0..io.count).map(|i| page.port_data(&io, i)).collect();
            let write = |value| Access::PortWrite {
                port: io.port,
                width,
                value,
            };
            self.vcpu.parts.writes.extend(values.into_iter().map(write));
        }
        self.next_part().expect("a port access moves something")
    }

    /// The exit of a memory-mapped access.
    pub(super) fn decode_mmio(&mut self) -> Exit {
        let mmio = self.page().mmio();
        let mmio = mmio.expect("the reason is a memory-mapped access");
        if mmio.write {
            self.vcpu.parts.add_memory_write(&mmio);
            return self.next_part().expect("an access moves something");
        }
        // KVM looks at one page at a time.
        let end = mmio.gpa.wrapping_add(mmio.bytes as u64);
        self.vcpu.parts.may_go_on = end.is_multiple_of(PAGE);
        match Width::from_bytes(mmio.bytes) {
            Some(width) => Exit::Access(Access::MemoryRead {
                gpa: mmio.gpa,
                width,
            }),
            None => {
                self.vcpu.parts.read = Some(PartedRead {
                    from: ReadFrom::Memory(mmio.gpa),
                    next: 0,
                    count: mmio.bytes.max(1),
                });
                self.next_part().expect("an access moves something")
            }
        }
    }

    /// Hands the value of a read to where KVM will take it from.
    pub(super) fn give(&mut self, value: u64) {
        self.vcpu.parts.given.push(value);
        let Some(read) = &mut self.vcpu.parts.read else {
            let mut page = self.page();
            if page.msr().is_some() {
                page.set_msr(Some(value));
            } else {
                page.set_mmio_data(value.to_le_bytes());
            }
            return;
        };
        let PartedRead { from, next, .. } = *read;
        read.next += 1;
        match from {
            ReadFrom::Port(io) => self.page().set_port_data(&io, next, value as u32),
            ReadFrom::Memory(_) => {
                let mut data = self.page().mmio().expect("an MMIO exit is open").data;
                data[next] = value as u8;
                self.page().set_mmio_data(data);
            }
        }
    }

    /// Has KVM finish the instruction of the last exit, if it has not. Its next part may come to light.
    pub(super) fn finish_exit(&mut self) -> Result<(), KvmError> {
        while std::mem::take(&mut self.vcpu.unfinished) {
            self.counts.settles += 1;
            self.vcpu.parts.may_go_on = false;
            match signals::finish(&mut self.vcpu.fd)? {
                None => {}
                Some(KVM_EXIT_MMIO) => {
                    let mmio = self.page().mmio();
                    let mmio = mmio.expect("the reason is a memory-mapped access");
                    if mmio.write {
                        self.vcpu.parts.add_memory_write(&mmio);
                        self.vcpu.unfinished = true;
                    } else {
                        self.vcpu.parts.held = Some(KVM_EXIT_MMIO);
                    }
                }
                Some(reason) => {
                    let rip = self.rip();
                    let what = format!("it came back with reason {reason} instead of at once");
                    return Err(KvmError::Stopped {
                        rip,
                        bytes: Vec::new(),
                        what,
                    });
                }
            }
        }
        Ok(())
    }

    /// Has the next part come to light of a read that may have one, so that the guest's next exit is another
    /// instruction's. The next exit, if it is at hand.
    pub(super) fn finish_parts(&mut self) -> Result<Option<Exit>, KvmError> {
        if self.vcpu.parts.may_go_on && !self.vcpu.parts.is_reading() {
            self.finish_exit()?;
        }
        Ok(self.next_part())
    }

    /// Brings the instruction at RIP to where it had these answers to its reads. `false` if it does
    /// not read.
    pub(super) fn redo_reads(&mut self, answers: &[u64]) -> Result<bool, KvmError> {
        let registers = self.page().registers();
        let mut answers = answers.iter();
        // A state may come from anybody: what is at RIP may run for ever.
        let started = Instant::now();
        let alarm = signals::install_kick().and_then(|()| Alarm::for_this_thread());
        let alarm = alarm
            .map_err(kvm_ioctls::Error::from)
            .named("timer_create")?;
        alarm.set(READ_TIME_MAX);
        let mut exit = loop {
            match self.enter()? {
                Some(reason) => break self.decode(reason)?,
                None if started.elapsed() >= READ_TIME_MAX => return Ok(false),
                // Any other kick has nothing to say here: the loop asks for what is outside anyway.
                None => {}
            }
        };
        loop {
            let reads = matches!(
                exit,
                Exit::Access(Access::PortRead { .. } | Access::MemoryRead { .. })
            );
            let Some(answer) = answers.next().filter(|_| reads) else {
                return Ok(false);
            };
            self.give(*answer);
            if !self.vcpu.parts.is_reading() {
                self.finish_exit()?;
            }
            if answers.len() == 0 {
                let is_there = self.vcpu.parts.answers().is_some();
                return Ok(is_there && self.page().registers() == registers);
            }
            match self.next_part() {
                Some(next) => exit = next,
                None => return Ok(false),
            }
        }
    }
}
