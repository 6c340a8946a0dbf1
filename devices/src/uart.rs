//! The serial console: a 16550A at COM1 (0x3f8, IRQ4), vm-superio's with a level for a line.
//!
//! vm-superio keeps the registers and the FIFO. Around it stand three things that a 16550A
//! has and a driver may rely on. The interrupt line is a level, high as long as an enabled
//! cause stands, and IIR names the most urgent cause without hiding the other (16550D data
//! sheet, 8.4, table IV); vm-superio's own trigger is therefore never listened to, and a
//! restore cannot fire it. FCR can empty the receive FIFO. And typed bytes wait outside until
//! the guest asserts RTS, as a terminal with RTS/CTS flow control would have it: Linux throws
//! away what it finds in the FIFO when it starts the port, and raises RTS only after that.

use std::collections::VecDeque;
use std::convert::Infallible;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use crate::restore::{RestoreError, ensure};

/// Typed bytes that are sensible to hold for a guest that does not read them.
const BACKLOG_BYTES: usize = 4096;
/// vm-superio's receive FIFO.
const FIFO_BYTES: usize = 64;

const IIR_FCR: u8 = 2;

const IER_RECEIVED: u8 = 0x01;
const IER_TRANSMIT_EMPTY: u8 = 0x02;
const IIR_FIFOS_ON: u8 = 0xc0;
const IIR_NOTHING: u8 = 0x01;
const IIR_TRANSMIT_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const FCR_CLEAR_RECEIVER: u8 = 0x02;
const MCR_RTS: u8 = 0x02;
const MCR_LOOP: u8 = 0x10;
const LSR_READY: u8 = 0x01;
const LSR_IDLE: u8 = 0x60;

/// Nobody listens: the line is worked out from the registers.
#[derive(Clone, Copy, Debug)]
struct Muted;

impl Trigger for Muted {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// The UART and the bytes on both ends of its wire.
#[derive(Debug)]
pub(crate) struct Uart {
    serial: Serial<Muted, NoEvents, Vec<u8>>,
    /// Typed and not yet in the FIFO.
    backlog: VecDeque<u8>,
}

/// What a [`Uart`] is saved as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UartState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    received: Vec<u8>,
    transmitted: Vec<u8>,
    backlog: VecDeque<u8>,
}

impl Clone for Uart {
    fn clone(&self) -> Uart {
        let serial = rebuild(&self.serial.state(), self.serial.writer().clone());
        Uart {
            serial,
            backlog: self.backlog.clone(),
        }
    }
}

/// A UART with these registers and these bytes not yet taken from its wire.
fn rebuild(state: &SerialState, transmitted: Vec<u8>) -> Serial<Muted, NoEvents, Vec<u8>> {
    Serial::from_state(state, Muted, NoEvents, transmitted)
        .unwrap_or_else(|error| unreachable!("the UART's own state does not fit it: {error}"))
}

impl Uart {
    pub fn new() -> Uart {
        Uart {
            serial: Serial::new(Muted, Vec::new()),
            backlog: VecDeque::new(),
        }
    }

    /// The line to IRQ4.
    pub fn interrupt_line(&self) -> bool {
        self.cause() != IIR_NOTHING
    }

    /// Reads register `offset`, 0 to 7.
    pub fn read(&mut self, offset: u8) -> u8 {
        assert!(offset < 8, "a 16550A has no register {offset}");
        if offset != IIR_FCR {
            let value = self.serial.read(offset);
            self.feed();
            return value;
        }
        let cause = self.cause();
        if cause == IIR_TRANSMIT_EMPTY {
            // Reading IIR acknowledges this cause only; received data stays until it is read.
            self.serial.read(IIR_FCR);
        }
        IIR_FIFOS_ON | cause
    }

    /// Writes register `offset`, 0 to 7.
    pub fn write(&mut self, offset: u8, value: u8) {
        assert!(offset < 8, "a 16550A has no register {offset}");
        if offset == IIR_FCR && value & FCR_CLEAR_RECEIVER != 0 {
            let mut state = self.serial.state();
            state.in_buffer.clear();
            state.line_status &= !LSR_READY;
            let transmitted = std::mem::take(self.serial.writer_mut());
            self.serial = rebuild(&state, transmitted);
        }
        self.serial
            .write(offset, value)
            .unwrap_or_else(|error| unreachable!("a Vec takes every byte: {error}"));
        self.feed();
    }

    /// Bytes arrive on the wire.
    pub fn type_in(&mut self, bytes: &[u8]) {
        self.backlog.extend(bytes);
        self.feed();
    }

    /// How many more typed bytes are sensible to accept.
    pub fn room(&self) -> usize {
        BACKLOG_BYTES.saturating_sub(self.backlog.len())
    }

    /// What the guest has transmitted since the last call.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(self.serial.writer_mut())
    }

    pub fn save(&self) -> UartState {
        let state = self.serial.state();
        UartState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
            transmitted: self.serial.writer().clone(),
            backlog: self.backlog.clone(),
        }
    }

    pub fn restore(saved: UartState) -> Result<Uart, RestoreError> {
        let ready = if saved.received.is_empty() {
            0
        } else {
            LSR_READY
        };
        ensure("16550A receive FIFO", saved.received.len() <= FIFO_BYTES)?;
        ensure("16550A line status", saved.line_status == LSR_IDLE | ready)?;
        ensure("16550A interrupt enable", saved.interrupt_enable <= 0x0f)?;
        let causes = saved.interrupt_identification;
        ensure(
            "16550A interrupt identification",
            matches!(causes, 1 | 2 | 4 | 6),
        )?;
        ensure(
            "16550A modem status",
            saved.modem_status == SerialState::default().modem_status,
        )?;
        let state = SerialState {
            baud_divisor_low: saved.divisor[0],
            baud_divisor_high: saved.divisor[1],
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.received,
        };
        let uart = Uart {
            serial: rebuild(&state, saved.transmitted),
            backlog: saved.backlog,
        };
        ensure("16550A backlog", !uart.can_feed())?;
        Ok(uart)
    }

    /// The most urgent enabled cause, as IIR codes it.
    fn cause(&self) -> u8 {
        let state = self.serial.state();
        let transmit_empty = state.interrupt_identification & IIR_TRANSMIT_EMPTY != 0;
        if state.interrupt_enable & IER_RECEIVED != 0 && state.line_status & LSR_READY != 0 {
            IIR_RECEIVED
        } else if state.interrupt_enable & IER_TRANSMIT_EMPTY != 0 && transmit_empty {
            IIR_TRANSMIT_EMPTY
        } else {
            IIR_NOTHING
        }
    }

    fn can_feed(&self) -> bool {
        if self.backlog.is_empty() || self.serial.fifo_capacity() == 0 {
            return false;
        }
        self.serial.state().modem_control & (MCR_RTS | MCR_LOOP) == MCR_RTS
    }

    /// Moves typed bytes into the FIFO while it has room and the guest wants them.
    fn feed(&mut self) {
        if !self.can_feed() {
            return;
        }
        let bytes = self.serial.fifo_capacity().min(self.backlog.len());
        let arriving: Vec<u8> = self.backlog.drain(..bytes).collect();
        let taken = self.serial.enqueue_raw_bytes(&arriving);
        assert!(
            matches!(taken, Ok(n) if n == bytes),
            "the FIFO had room and did not take it"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u8 = 0;
    const IER: u8 = 1;
    const LCR: u8 = 3;
    const MCR: u8 = 4;
    const LSR: u8 = 5;
    const MSR: u8 = 6;

    fn listening() -> Uart {
        let mut uart = Uart::new();
        uart.write(MCR, 0x0b);
        uart
    }

    #[test]
    fn linux_takes_it_for_a_16550a() {
        let mut uart = Uart::new();
        // autoconfig(): IER holds its four bits, loopback shows RTS and OUT2 in MSR ...
        uart.write(IER, 0);
        assert_eq!(uart.read(IER), 0);
        uart.write(IER, 0x0f);
        assert_eq!(uart.read(IER), 0x0f);
        uart.write(IER, 0);
        uart.write(MCR, 0x1a);
        assert_eq!(uart.read(MSR) & 0xf0, 0x90);
        uart.write(MCR, 0x08);
        // ... and FCR turns the FIFOs on.
        uart.write(IIR_FCR, 0x01);
        assert_eq!(uart.read(IIR_FCR) >> 6, 3);
        // Not an XScale: IER bit 6 does not hold.
        uart.write(IER, 0x40);
        assert_eq!(uart.read(IER), 0);
    }

    #[test]
    fn the_transmitter_interrupt_comes_back_each_time_it_is_enabled() {
        // serial8250_do_startup()'s test for UART_BUG_THRE.
        let mut uart = Uart::new();
        for _ in 0..2 {
            uart.write(IER, 0x02);
            assert!(uart.interrupt_line());
            assert_eq!(uart.read(IIR_FCR), 0xc2);
            assert!(!uart.interrupt_line(), "reading IIR acknowledges it");
            assert_eq!(uart.read(IIR_FCR), 0xc1);
            uart.write(IER, 0);
        }
    }

    #[test]
    fn disabling_a_cause_lowers_the_line() {
        let mut uart = Uart::new();
        uart.write(IER, 0x0f);
        assert!(uart.interrupt_line());
        uart.write(IER, 0);
        assert!(!uart.interrupt_line());
        assert_eq!(uart.read(IIR_FCR), 0xc1);
    }

    #[test]
    fn bytes_typed_before_the_driver_listens_interrupt_it_when_it_does() {
        let mut uart = listening();
        uart.type_in(b"ls\n");
        assert!(!uart.interrupt_line());
        uart.write(IER, 0x05);
        assert!(uart.interrupt_line());
        assert_eq!(uart.read(IIR_FCR), 0xc4);
        assert_eq!(uart.read(IIR_FCR), 0xc4, "until it is read");
        for &byte in b"ls\n" {
            assert_eq!(uart.read(LSR) & 1, 1);
            assert_eq!(uart.read(DATA), byte);
        }
        assert_eq!(uart.read(LSR), 0x60);
        assert!(!uart.interrupt_line());
    }

    #[test]
    fn a_received_byte_does_not_hide_the_empty_transmitter() {
        let mut uart = listening();
        uart.write(IER, 0x03);
        uart.type_in(b"x");
        assert_eq!(uart.read(IIR_FCR), 0xc4);
        assert_eq!(uart.read(DATA), b'x');
        assert_eq!(uart.read(IIR_FCR), 0xc2);
        assert_eq!(uart.read(IIR_FCR), 0xc1);
    }

    #[test]
    fn starting_the_port_loses_no_typed_byte() {
        let mut uart = Uart::new();
        uart.type_in(b"root\n");
        uart.write(IIR_FCR, 0x07);
        assert_eq!(uart.read(DATA), 0);
        uart.write(IIR_FCR, 0x01);
        uart.write(IER, 0x05);
        uart.write(MCR, 0x0b);
        assert!(uart.interrupt_line());
        let line: Vec<u8> = (0..5).map(|_| uart.read(DATA)).collect();
        assert_eq!(line, b"root\n");
    }

    #[test]
    fn a_long_paste_flows_in_as_the_guest_reads() {
        let mut uart = listening();
        let paste: Vec<u8> = (0..1000).map(|n| n as u8).collect();
        uart.type_in(&paste);
        assert_eq!(uart.room(), 4096 - (1000 - FIFO_BYTES));
        let read: Vec<u8> = (0..1000).map(|_| uart.read(DATA)).collect();
        assert_eq!(read, paste);
        assert_eq!(uart.room(), 4096);
    }

    #[test]
    fn the_divisor_is_neither_transmitted_nor_received() {
        let mut uart = listening();
        uart.type_in(b"a");
        uart.write(LCR, 0x83);
        uart.write(DATA, 0x01);
        assert_eq!(uart.read(DATA), 0x01);
        uart.write(LCR, 0x03);
        assert_eq!(uart.read(DATA), b'a');
        assert_eq!(uart.take_output(), b"");
    }

    #[test]
    fn what_is_transmitted_comes_out_once() {
        let mut uart = Uart::new();
        for &byte in b"hello" {
            uart.write(DATA, byte);
        }
        assert_eq!(uart.take_output(), b"hello");
        assert_eq!(uart.take_output(), b"");
    }

    #[test]
    fn loopback_sends_nothing_out_and_returns_it() {
        let mut uart = Uart::new();
        uart.write(MCR, 0x10);
        uart.write(DATA, 0x5a);
        assert_eq!(uart.take_output(), b"");
        assert_eq!(uart.read(DATA), 0x5a);
    }
}
