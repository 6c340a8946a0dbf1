//! The local APIC: what stands between all interrupts and the one CPU.
//!
//! Written from Intel SDM vol. 3, chapter 11 ("APIC"; chapter 10 in older editions). It takes
//! messages from the I/O APIC and from itself (the timer, IPIs to oneself), keeps for each of 256
//! vectors whether it is requested (IRR) and in service (ISR), and offers the CPU the highest one
//! above the processor priority. The guest reaches the registers by memory at the address in
//! IA32_APIC_BASE (xAPIC), or, once it has chosen so there, by MSRs 0x800 to 0x83f (x2APIC).
//!
//! There is one CPU, its ID is 0. What does not exist here: NMI, SMI, INIT and start-up messages
//! (taken without effect), inputs of performance and thermal interrupts (their registers only
//! store), LINT0 in another mode than ExtINT, and CR8, which KVM keeps apart from the task priority.

mod messages;
mod registers;
mod timer;
mod vectors;

use serde::{Deserialize, Serialize};

use crate::restore::{RestoreError, ensure};
use crate::wiring::LOCAL_APIC;
use crate::{Nanos, Reply};
pub(crate) use messages::{Delivery, Message};
use registers::{Lvt, Register};
pub(crate) use timer::Time;
use timer::{Mode, Timer};
use vectors::Vectors;

/// IA32_APIC_BASE (SDM vol. 3, 11.4.4).
pub(crate) const IA32_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE (SDM vol. 3, 11.5.4.1).
pub(crate) const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// The first of the x2APIC's registers; each stands where its memory offset, divided by 16, says.
pub(crate) const X2APIC_FIRST: u32 = 0x800;
/// And the last.
pub(crate) const X2APIC_LAST: u32 = 0x8ff;

const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLED: u64 = 1 << 11;
/// The address, of at most 52 bits.
const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// IA32_APIC_BASE as firmware leaves it: the usual address, enabled, the boot processor's.
pub const APIC_BASE_AT_POWER_ON: u64 = LOCAL_APIC.gpa | BASE_ENABLED | BASE_BSP;

/// Version 0x14 (an integrated APIC), six LVT entries, no suppression of EOI broadcasts.
const VERSION: u32 = 0x0005_0014;

const SVR_ENABLED: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;
/// Delivery mode 7: an 8259 supplies the vector.
const LVT_EXTINT: u32 = 7 << 8;
const LVT_NMI: u32 = 4 << 8;
const LVT_DELIVERY: u32 = 7 << 8;

/// ESR: an IPI with a vector below 16.
const ERROR_SEND_VECTOR: u8 = 1 << 5;
/// ESR: an interrupt with a vector below 16.
const ERROR_RECEIVE_VECTOR: u8 = 1 << 6;
/// ESR: an access to a register that does not exist.
const ERROR_REGISTER: u8 = 1 << 7;

/// The first vector that an interrupt may have.
const FIRST_VECTOR: u8 = 16;

/// The local APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lapic {
    base: u64,
    task_priority: u8,
    /// Bits 31:24 of the logical destination register (xAPIC).
    logical_id: u8,
    /// Bits 31:28 of the destination format register: all ones is the flat model.
    format: u8,
    spurious: u32,
    requested: Vectors,
    in_service: Vectors,
    /// TMR: which requests came as levels, and so want their EOI told to the I/O APIC.
    level: Vectors,
    /// Errors since ESR was last written, and what that write made visible.
    errors_since: u8,
    errors: u8,
    command: u64,
    lvt: [u32; Lvt::COUNT],
    timer: Timer,
}

impl Lapic {
    /// The APIC as firmware leaves it on the boot processor: enabled, and a wire from the 8259s to
    /// the CPU (MultiProcessor Specification 1.4, 3.6.2.2, "Virtual Wire Mode").
    pub(crate) fn new() -> Lapic {
        let mut lapic = Lapic::reset(APIC_BASE_AT_POWER_ON);
        lapic.spurious |= SVR_ENABLED;
        lapic.lvt[Lvt::Lint0 as usize] = LVT_EXTINT;
        lapic.lvt[Lvt::Lint1 as usize] = LVT_NMI;
        lapic
    }

    /// The state after a reset (SDM vol. 3, 11.4.7.1).
    fn reset(base: u64) -> Lapic {
        Lapic {
            base,
            task_priority: 0,
            logical_id: 0,
            format: 0xf,
            spurious: 0xff,
            requested: Vectors::NONE,
            in_service: Vectors::NONE,
            level: Vectors::NONE,
            errors_since: 0,
            errors: 0,
            command: 0,
            lvt: [LVT_MASKED; Lvt::COUNT],
            timer: Timer::new(),
        }
    }

    /// Whether the 8259s' INTR reaches the CPU: by LINT0, or around an APIC that is turned off.
    pub(crate) fn passes_extint(&self) -> bool {
        let lint0 = self.lvt[Lvt::Lint0 as usize];
        !self.is_on() || (lint0 & (LVT_MASKED | LVT_DELIVERY) == LVT_EXTINT && self.accepts())
    }

    /// Whether IA32_APIC_BASE turns it off.
    pub(crate) fn is_off(&self) -> bool {
        !self.is_on()
    }

    /// Whether interrupt messages are accepted: on, by IA32_APIC_BASE and by the spurious-interrupt
    /// vector register.
    pub(crate) fn accepts(&self) -> bool {
        self.is_on() && self.spurious & SVR_ENABLED != 0
    }

    /// Whether a requested interrupt is above the processor priority.
    pub(crate) fn interrupt_pending(&self) -> bool {
        self.next().is_some()
    }

    /// The CPU takes the highest interrupt. With none left, the spurious vector, which is not in
    /// service (SDM vol. 3, 11.9).
    pub(crate) fn acknowledge(&mut self) -> u8 {
        let Some(vector) = self.next() else {
            return self.spurious as u8;
        };
        self.requested.clear(vector);
        self.in_service.set(vector);
        vector
    }

    /// A message from the bus; whether it was for this CPU and was accepted.
    pub(crate) fn receive(&mut self, message: Message) -> bool {
        let taken = message.delivery == Delivery::Fixed
            && self.accepts()
            && self.is_addressed(message.logical, message.destination);
        taken && self.request(message.vector, message.level)
    }

    /// Whether a message with this vector could become an interrupt.
    pub(crate) fn can_take(&self, vector: u8) -> bool {
        self.accepts() && vector >= FIRST_VECTOR
    }

    /// Time has come to `time`: the timer has fired if it was due.
    pub(crate) fn advance(&mut self, time: Time) {
        if self.timer.advance(time, self.timer_mode()) {
            self.raise(Lvt::Timer);
        }
    }

    /// An exit has happened, at which the guest is known to have `got_on`, or not.
    pub(crate) fn count_exit(&mut self, got_on: bool) {
        self.timer.count_exit(got_on);
    }

    /// When the timer is due next, whether or not that interrupts. It may have been already, and wait for exits.
    pub(crate) fn next_event(&self) -> Option<Nanos> {
        self.timer.due()
    }

    /// When the timer interrupts next.
    pub(crate) fn next_interrupt(&self) -> Option<Nanos> {
        let able = |entry: Lvt| {
            let lvt = self.lvt[entry as usize];
            lvt & LVT_MASKED == 0 && self.can_take(lvt as u8)
        };
        let timer = self.lvt[Lvt::Timer as usize];
        // A timer with a vector it may not have interrupts by way of the error it makes.
        let interrupts =
            able(Lvt::Timer) || (timer & LVT_MASKED == 0 && self.accepts() && able(Lvt::Error));
        self.timer.due().filter(|_| interrupts)
    }

    /// The guest has moved its TSC, against which the deadline is set.
    pub(crate) fn move_tsc(&mut self, time: Time) {
        if self.timer_mode() == Mode::Deadline {
            self.timer.move_tsc(time);
        }
    }

    /// Whether the registers' page is at this guest-physical address.
    pub(crate) fn answers(&self, gpa: u64) -> bool {
        self.base & (BASE_ENABLED | BASE_X2APIC) == BASE_ENABLED
            && (gpa ^ self.base) & BASE_ADDRESS == 0
            && gpa <= BASE_ADDRESS | 0xfff
    }

    /// Reads the doubleword at `offset` into the page.
    pub(crate) fn read_memory(&mut self, offset: u16, now: Nanos) -> u32 {
        match Register::at(offset) {
            Some(Register::CommandHigh) => (self.command >> 32) as u32,
            Some(register) => self.read(register, now) as u32,
            None => {
                self.error(ERROR_REGISTER);
                0
            }
        }
    }

    /// Writes the doubleword at `offset` into the page. Returns the vector whose end the I/O APIC
    /// must be told.
    pub(crate) fn write_memory(&mut self, offset: u16, value: u32, time: Time) -> Option<u8> {
        match Register::at(offset) {
            Some(Register::CommandHigh) => {
                let destination = u64::from(value & 0xff00_0000) << 32;
                self.command = self.command & 0xffff_ffff | destination;
                None
            }
            // Where the other half was written, it stays.
            Some(Register::Command) => {
                let high = self.command & !0xffff_ffff;
                self.write(Register::Command, high | u64::from(value), time)
            }
            Some(register) if register.is_writable() => {
                self.write(register, u64::from(value), time)
            }
            Some(_) => None,
            None => {
                self.error(ERROR_REGISTER);
                None
            }
        }
    }

    /// RDMSR of one of the APIC's registers.
    pub(crate) fn read_msr(&mut self, index: u32, now: Nanos) -> Reply {
        match index {
            IA32_APIC_BASE => Reply::Value(self.base),
            IA32_TSC_DEADLINE => Reply::Value(match self.timer_mode() {
                Mode::Deadline => self.timer.deadline(),
                _ => 0,
            }),
            _ => match self.x2apic_register(index) {
                Some(Register::LogicalDestination) => Reply::Value(1), // cluster 0, member 0
                Some(register) if register.is_readable() => Reply::Value(self.read(register, now)),
                _ => Reply::Fault,
            },
        }
    }

    /// WRMSR to one of the APIC's registers. Returns the vector whose end the I/O APIC must be told.
    pub(crate) fn write_msr(&mut self, index: u32, value: u64, time: Time) -> (Reply, Option<u8>) {
        match index {
            IA32_APIC_BASE => (self.write_base(value), None),
            IA32_TSC_DEADLINE => {
                if self.timer_mode() == Mode::Deadline {
                    self.timer.set_deadline(value, time);
                }
                (Reply::Done, None)
            }
            _ => match self.x2apic_register(index) {
                // The logical ID is read-only there, and reserved bits are not forgiven.
                Some(register)
                    if register.is_writable()
                        && register != Register::LogicalDestination
                        && value & !register.writable_bits() == 0 =>
                {
                    (Reply::Done, self.write(register, value, time))
                }
                _ => (Reply::Fault, None),
            },
        }
    }

    /// Refuses a saved state that no sequence of accesses could have reached by `time`.
    pub(crate) fn check(&self, time: Time) -> Result<(), RestoreError> {
        ensure("APIC base", is_base(self.base))?;
        ensure("APIC destination format", self.format <= 0xf)?;
        ensure("APIC spurious vector", self.spurious & !0x1ff == 0)?;
        for vectors in [&self.requested, &self.in_service] {
            ensure("APIC vectors", vectors.lowest_word() & 0xffff == 0)?;
        }
        for (entry, value) in Lvt::ALL.into_iter().zip(self.lvt) {
            ensure("APIC LVT", value & !entry.writable_bits() == 0)?;
            let free = self.accepts() || value & LVT_MASKED != 0;
            ensure("APIC LVT mask", free)?;
        }
        self.timer.check(time, self.timer_mode())
    }

    fn is_on(&self) -> bool {
        self.base & BASE_ENABLED != 0
    }

    fn is_x2apic(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }

    fn x2apic_register(&self, index: u32) -> Option<Register> {
        let offset = u16::try_from(index.checked_sub(X2APIC_FIRST)? << 4).ok()?;
        match Register::at(offset) {
            // ICR is one register of 64 bits there, and there is only one destination format.
            Some(Register::CommandHigh | Register::DestinationFormat) => None,
            register => register.filter(|_| self.is_x2apic()),
        }
        .or_else(|| Register::x2apic_only(offset).filter(|_| self.is_x2apic()))
    }

    fn read(&self, register: Register, now: Nanos) -> u64 {
        u64::from(match register {
            Register::Id => 0,
            Register::Version => VERSION,
            Register::TaskPriority => self.task_priority.into(),
            Register::ProcessorPriority => self.processor_priority().into(),
            Register::LogicalDestination => u32::from(self.logical_id) << 24,
            Register::DestinationFormat => u32::from(self.format) << 28 | 0x0fff_ffff,
            Register::Spurious => self.spurious,
            Register::InService(word) => self.in_service.word(word),
            Register::TriggerMode(word) => self.level.word(word),
            Register::Requested(word) => self.requested.word(word),
            Register::Errors => self.errors.into(),
            Register::Command => return self.command,
            Register::Lvt(entry) => self.lvt[entry as usize],
            Register::InitialCount => self.timer.initial(),
            Register::CurrentCount => self.timer.count(now),
            Register::Divide => self.timer.divide().into(),
            Register::Reserved
            | Register::EndOfInterrupt
            | Register::CommandHigh
            | Register::SelfIpi => 0,
        })
    }

    fn write(&mut self, register: Register, value: u64, time: Time) -> Option<u8> {
        let value = value & register.writable_bits();
        let low = value as u32;
        match register {
            Register::TaskPriority => self.task_priority = low as u8,
            Register::LogicalDestination => self.logical_id = (low >> 24) as u8,
            Register::DestinationFormat => self.format = (low >> 28) as u8,
            Register::Spurious => {
                self.spurious = low;
                if low & SVR_ENABLED == 0 {
                    self.lvt.iter_mut().for_each(|lvt| *lvt |= LVT_MASKED);
                }
            }
            Register::Errors => self.errors = std::mem::take(&mut self.errors_since),
            Register::Command => {
                self.command = value;
                self.send(value);
            }
            Register::Lvt(entry) => self.write_lvt(entry, low),
            Register::InitialCount if self.timer_mode().counts() => self.timer.load(low, time.now),
            Register::Divide => self.timer.set_divide(low as u8, time.now),
            Register::SelfIpi => {
                self.send_to_self(low as u8);
            }
            Register::EndOfInterrupt => return self.end_of_interrupt(),
            _ => {}
        }
        None
    }

    fn write_lvt(&mut self, entry: Lvt, value: u32) {
        let before = self.timer_mode();
        let masked = if self.accepts() { 0 } else { LVT_MASKED };
        self.lvt[entry as usize] = value | masked;
        let after = self.timer_mode();
        // A change between counting and the deadline disarms the timer (SDM vol. 3, 11.5.4.1).
        if before.counts() != after.counts() || after == Mode::Reserved {
            self.timer.disarm();
        }
    }

    /// IA32_APIC_BASE; illegal transitions fault (SDM vol. 3, 11.12.5).
    fn write_base(&mut self, value: u64) -> Reply {
        let leaves_x2apic =
            self.is_x2apic() && value & (BASE_X2APIC | BASE_ENABLED) == BASE_ENABLED;
        let jumps = !self.is_on() && value & BASE_X2APIC != 0;
        if !is_base(value) || leaves_x2apic || jumps {
            return Reply::Fault;
        }
        if value & BASE_ENABLED == 0 {
            *self = Lapic::reset(value);
        }
        self.base = value;
        Reply::Done
    }

    /// The mode of the timer, bits 18:17 of its LVT entry.
    fn timer_mode(&self) -> Mode {
        Mode::from_bits(self.lvt[Lvt::Timer as usize] >> 17)
    }

    /// SDM vol. 3, 11.8.3.1: the higher class of the task priority and what is in service.
    fn processor_priority(&self) -> u8 {
        let serving = self.in_service.highest().unwrap_or(0);
        if self.task_priority >> 4 >= serving >> 4 {
            self.task_priority
        } else {
            serving & 0xf0
        }
    }

    /// What the CPU would take now.
    fn next(&self) -> Option<u8> {
        let vector = self.requested.highest()?;
        (self.is_on() && vector >> 4 > self.processor_priority() >> 4).then_some(vector)
    }

    /// Vector of a level-triggered interrupt that has ended.
    fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = self.in_service.highest()?;
        self.in_service.clear(vector);
        self.level.contains(vector).then_some(vector)
    }

    /// Marks a vector as requested; whether it may be.
    fn request(&mut self, vector: u8, level: bool) -> bool {
        if vector < FIRST_VECTOR {
            self.error(ERROR_RECEIVE_VECTOR);
            return false;
        }
        self.requested.set(vector);
        if level {
            self.level.set(vector);
        } else {
            self.level.clear(vector);
        }
        true
    }

    /// One of the APIC's own interrupts.
    fn raise(&mut self, entry: Lvt) {
        let lvt = self.lvt[entry as usize];
        if lvt & LVT_MASKED == 0 && self.accepts() {
            self.request(lvt as u8, false);
        }
    }

    fn error(&mut self, error: u8) {
        self.errors_since |= error;
        let lvt = self.lvt[Lvt::Error as usize];
        // An illegal vector there is one more error, and no second interrupt.
        if lvt & LVT_MASKED == 0 && self.can_take(lvt as u8) {
            self.request(lvt as u8, false);
        }
    }
}

/// Whether IA32_APIC_BASE may hold this value.
fn is_base(value: u64) -> bool {
    let reserved = !(BASE_ADDRESS | BASE_ENABLED | BASE_X2APIC | BASE_BSP);
    value & reserved == 0 && value & (BASE_ENABLED | BASE_X2APIC) != BASE_X2APIC
}

#[cfg(test)]
mod tests;
