//! The serial console: a 16550A (National PC16550D data sheet).
//!
//! A byte takes no time here: what is written has left the transmitter at once. The interrupt line is a
//! level, high as long as an enabled cause stands, and IIR names the most urgent cause without hiding the
//! others (table IV of the data sheet). Typed bytes wait outside until the guest asserts RTS, as a
//! terminal with RTS/CTS flow control would have it: Linux throws away what it finds in the FIFO when it
//! starts the port, and raises RTS only after that.
//!
//! The other end of the wire is always ready and makes no errors, so the modem status never changes but in
//! loopback, and never interrupts. The FIFOs are on whatever FCR says; it can empty the receive FIFO.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::restore::{RestoreError, ensure};

/// Typed bytes that are sensible to hold for a guest that does not read them.
const BACKLOG_BYTES: usize = 4096;
/// The receive FIFO.
const FIFO_BYTES: usize = 16;

/// RBR and THR; the divisor's low byte while the divisor latch is open.
const DATA: u8 = 0;
/// The divisor's high byte while the divisor latch is open.
const IER: u8 = 1;
/// IIR when read, FCR when written.
const IIR_FCR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
const MSR: u8 = 6;
const SCR: u8 = 7;

const IER_RECEIVED: u8 = 0x01;
const IER_TRANSMITTER_EMPTY: u8 = 0x02;
const IER_LINE_STATUS: u8 = 0x04;
/// These, and the modem status.
const IER_BITS: u8 = 0x0f;

const IIR_FIFOS_ON: u8 = 0xc0;
const IIR_NOTHING: u8 = 0x01;
const IIR_TRANSMITTER_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE_STATUS: u8 = 0x06;

const FCR_CLEAR_RECEIVER: u8 = 0x02;

const LCR_8_BITS: u8 = 0x03;
const LCR_DIVISOR_LATCH: u8 = 0x80;

const MCR_DTR: u8 = 0x01;
const MCR_RTS: u8 = 0x02;
const MCR_OUT1: u8 = 0x04;
const MCR_OUT2: u8 = 0x08;
const MCR_LOOP: u8 = 0x10;
/// There is no flow control by hardware, whose bit others have above these.
const MCR_BITS: u8 = 0x1f;

const LSR_READY: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
/// THR and the transmitter after it are empty.
const LSR_IDLE: u8 = 0x60;

const MSR_CTS: u8 = 0x10;
const MSR_DSR: u8 = 0x20;
const MSR_RI: u8 = 0x40;
const MSR_DCD: u8 = 0x80;
/// Which of the guest's own outputs shows as which input in loopback.
const LOOPED: [(u8, u8); 4] = [
    (MCR_DTR, MSR_DSR),
    (MCR_RTS, MSR_CTS),
    (MCR_OUT1, MSR_RI),
    (MCR_OUT2, MSR_DCD),
];

/// The UART and the bytes on both ends of its wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Uart {
    divisor: [u8; 2],
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    /// The transmitter has become empty, and IIR has not told of it.
    emptied: bool,
    /// A byte was lost for want of room in the FIFO, and LSR has not told of it.
    overrun: bool,
    /// The receive FIFO.
    received: VecDeque<u8>,
    /// Sent and not yet taken from the wire.
    transmitted: Vec<u8>,
    /// Typed and not yet in the FIFO.
    backlog: VecDeque<u8>,
}

impl Uart {
    /// At power-on, set up as firmware leaves it: 9600 baud, 8 bits.
    pub(crate) fn new() -> Uart {
        Uart {
            divisor: [12, 0],
            interrupt_enable: 0,
            line_control: LCR_8_BITS,
            modem_control: MCR_OUT2,
            scratch: 0,
            emptied: false,
            overrun: false,
            received: VecDeque::new(),
            transmitted: Vec::new(),
            backlog: VecDeque::new(),
        }
    }

    /// The interrupt line.
    pub(crate) fn interrupt_line(&self) -> bool {
        self.cause() != IIR_NOTHING
    }

    /// Reads register `offset`, 0 to 7.
    pub(crate) fn read(&mut self, offset: u8) -> u8 {
        match offset {
            DATA | IER if self.divisor_latch_is_open() => self.divisor[usize::from(offset)],
            DATA => {
                let byte = self.received.pop_front().unwrap_or(0);
                self.feed();
                byte
            }
            IER => self.interrupt_enable,
            IIR_FCR => {
                let cause = self.cause();
                if cause == IIR_TRANSMITTER_EMPTY {
                    // Reading IIR acknowledges this cause alone; the others stand until they are dealt with.
                    self.emptied = false;
                }
                IIR_FIFOS_ON | cause
            }
            LCR => self.line_control,
            MCR => self.modem_control,
            LSR => {
                let status = self.line_status();
                self.overrun = false;
                status
            }
            MSR => self.modem_status(),
            SCR => self.scratch,
            _ => panic!("a 16550A has no register {offset}"),
        }
    }

    /// Writes register `offset`, 0 to 7.
    pub(crate) fn write(&mut self, offset: u8, value: u8) {
        match offset {
            DATA | IER if self.divisor_latch_is_open() => {
                self.divisor[usize::from(offset)] = value;
            }
            DATA => self.transmit(value),
            IER => {
                self.interrupt_enable = value & IER_BITS;
                // The transmitter is empty, and whoever asks to be told of that is told, each time. Linux looks for
                // this when it starts the port (UART_BUG_THRE), and begins to send by it.
                self.emptied |= value & IER_TRANSMITTER_EMPTY != 0;
            }
            IIR_FCR if value & FCR_CLEAR_RECEIVER != 0 => self.received.clear(),
            LCR => self.line_control = value,
            MCR => self.modem_control = value & MCR_BITS,
            SCR => self.scratch = value,
            IIR_FCR | LSR | MSR => {}
            _ => panic!("a 16550A has no register {offset}"),
        }
        // The FIFO may have been emptied, or RTS raised.
        self.feed();
    }

    /// Bytes arrive on the wire.
    pub(crate) fn type_in(&mut self, bytes: &[u8]) {
        self.backlog.extend(bytes);
        self.feed();
    }

    /// How many more typed bytes are sensible to accept.
    pub(crate) fn room(&self) -> usize {
        BACKLOG_BYTES.saturating_sub(self.backlog.len())
    }

    /// What the guest has transmitted since the last call.
    pub(crate) fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.transmitted)
    }

    /// Refuses a saved state that no sequence of accesses could have reached.
    pub(crate) fn check(&self) -> Result<(), RestoreError> {
        ensure("16550A receive FIFO", self.received.len() <= FIFO_BYTES)?;
        ensure(
            "16550A interrupt enable",
            self.interrupt_enable & !IER_BITS == 0,
        )?;
        ensure("16550A modem control", self.modem_control & !MCR_BITS == 0)?;
        ensure("16550A backlog", !self.can_feed())
    }

    fn divisor_latch_is_open(&self) -> bool {
        self.line_control & LCR_DIVISOR_LATCH != 0
    }

    fn is_looped(&self) -> bool {
        self.modem_control & MCR_LOOP != 0
    }

    /// A byte leaves by the wire, or comes back in loopback. In either case the transmitter is empty after it.
    fn transmit(&mut self, byte: u8) {
        self.emptied = true;
        if !self.is_looped() {
            self.transmitted.push(byte);
        } else if self.received.len() < FIFO_BYTES {
            self.received.push_back(byte);
        } else {
            self.overrun = true;
        }
    }

    /// The most urgent enabled cause, as IIR codes it.
    fn cause(&self) -> u8 {
        let causes = [
            (IER_LINE_STATUS, self.overrun, IIR_LINE_STATUS),
            (IER_RECEIVED, !self.received.is_empty(), IIR_RECEIVED),
            (IER_TRANSMITTER_EMPTY, self.emptied, IIR_TRANSMITTER_EMPTY),
        ];
        let stands = |(enable, is, _): &(u8, bool, u8)| *is && self.interrupt_enable & enable != 0;
        let first = causes.into_iter().find(stands);
        first.map_or(IIR_NOTHING, |(_, _, code)| code)
    }

    fn line_status(&self) -> u8 {
        let ready = if self.received.is_empty() {
            0
        } else {
            LSR_READY
        };
        let overrun = if self.overrun { LSR_OVERRUN } else { 0 };
        LSR_IDLE | ready | overrun
    }

    fn modem_status(&self) -> u8 {
        if !self.is_looped() {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        let shown = LOOPED
            .iter()
            .filter(|(output, _)| self.modem_control & output != 0);
        shown.fold(0, |status, (_, input)| status | input)
    }

    fn can_feed(&self) -> bool {
        !self.backlog.is_empty()
            && self.received.len() < FIFO_BYTES
            && self.modem_control & (MCR_RTS | MCR_LOOP) == MCR_RTS
    }

    /// Moves typed bytes into the FIFO while it has room and the guest wants them.
    fn feed(&mut self) {
        if self.can_feed() {
            let bytes = (FIFO_BYTES - self.received.len()).min(self.backlog.len());
            self.received.extend(self.backlog.drain(..bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn the_fifo_holds_sixteen_bytes_and_loopback_tells_of_the_seventeenth() {
        let mut uart = Uart::new();
        uart.write(IER, 0x05);
        uart.write(MCR, 0x10);
        for byte in 0..16 {
            uart.write(DATA, byte);
        }
        assert_eq!(uart.read(LSR), 0x61);
        uart.write(DATA, 16);
        assert_eq!(
            uart.read(IIR_FCR),
            0xc6,
            "more urgent than what was received"
        );
        assert_eq!(uart.read(LSR), 0x63);
        assert_eq!(uart.read(LSR), 0x61, "it is told once");
        assert_eq!(uart.read(IIR_FCR), 0xc4);
        let looped: Vec<u8> = (0..16).map(|_| uart.read(DATA)).collect();
        assert_eq!(looped, Vec::from_iter(0..16));
        assert_eq!(uart.read(LSR), 0x60, "the seventeenth is lost");
    }

    #[test]
    fn loopback_shows_each_modem_output_as_its_input() {
        let mut uart = Uart::new();
        assert_eq!(uart.read(MSR), 0xb0, "the other end is there and ready");
        for (output, input) in [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80)] {
            uart.write(MCR, 0x10 | output);
            assert_eq!(uart.read(MSR), input);
        }
    }

    #[test]
    fn what_is_looped_back_empties_the_transmitter_too() {
        let mut uart = Uart::new();
        uart.write(MCR, 0x10);
        uart.write(IER, 0x02);
        assert_eq!(uart.read(IIR_FCR), 0xc2);
        uart.write(DATA, 0x5a);
        assert_eq!(uart.read(IIR_FCR), 0xc2);
        assert!(!uart.interrupt_line());
    }

    #[test]
    fn each_byte_that_is_sent_interrupts_who_asked_for_it() {
        let mut uart = Uart::new();
        uart.write(IER, 0x02);
        for &byte in b"ok" {
            assert!(uart.interrupt_line());
            assert_eq!(uart.read(IIR_FCR), 0xc2);
            assert!(!uart.interrupt_line());
            uart.write(DATA, byte);
        }
        assert!(uart.interrupt_line());
    }

    #[test]
    fn typed_bytes_wait_outside_while_rts_is_low_or_the_port_is_looped() {
        for modem_control in [0x08, 0x12] {
            let mut uart = Uart::new();
            uart.write(MCR, modem_control);
            uart.type_in(b"x");
            assert_eq!((uart.read(LSR), uart.read(DATA)), (0x60, 0));
            uart.write(MCR, 0x02);
            assert_eq!((uart.read(LSR), uart.read(DATA)), (0x61, b'x'));
        }
    }

    #[test]
    fn registers_hold_what_was_written_and_no_more() {
        let mut uart = Uart::new();
        for (register, bits) in [(IER, 0x0f), (LCR, 0xff), (MCR, 0x1f), (SCR, 0xff)] {
            for value in [0x55, 0xaa, 0xff, 0x00] {
                uart.write(register, value);
                assert_eq!(uart.read(register), value & bits, "register {register}");
            }
        }
        let status = [LSR, MSR].map(|register| uart.read(register));
        for register in [LSR, MSR] {
            uart.write(register, 0xff);
        }
        assert_eq!([LSR, MSR].map(|register| uart.read(register)), status);
    }

    #[test]
    fn a_state_that_no_guest_could_have_reached_is_refused() {
        let mut looped = Uart::new();
        looped.write(MCR, 0x10);
        assert_eq!(looped.check(), Ok(()));
        let damaged: [fn(&mut Uart); 4] = [
            |uart| uart.received.extend([0; FIFO_BYTES + 1]),
            |uart| uart.interrupt_enable = 0x10,
            |uart| uart.modem_control = 0x20,
            // It would have gone into the FIFO.
            |uart| (uart.modem_control, uart.backlog) = (MCR_RTS, [0].into()),
        ];
        for damage in damaged {
            let mut uart = looped.clone();
            damage(&mut uart);
            assert!(uart.check().is_err(), "{uart:?}");
        }
    }
}
