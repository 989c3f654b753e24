//! The 16550 at 0x3f8, written to and never read.
//!
//! Every byte is one exit to the monitor, tens of microseconds on a slow host, so the line status is asked once
//! per full FIFO and not once per byte, and lines are kept short.

use crate::port::{in8, out8};
use core::fmt;

const BASE: u16 = 0x3f8;
const DATA: u16 = BASE;
const INTERRUPT_ENABLE: u16 = BASE + 1;
const FIFO_CONTROL: u16 = BASE + 2;
const INTERRUPT_ID: u16 = BASE + 2;
const LINE_CONTROL: u16 = BASE + 3;
const MODEM_CONTROL: u16 = BASE + 4;
const LINE_STATUS: u16 = BASE + 5;

const TRANSMITTER_EMPTY: u8 = 1 << 5;
const FIFO_BYTES: u32 = 16;

/// How often the line status is read before the port is taken for one that does not report it.
const MAX_POLLS: u32 = 10_000;

/// The serial line. There may be several of these for the one port (the fault handler makes its own).
pub(crate) struct Serial {
    /// Bytes that may be written before the line status must be read again.
    room: u32,
    fifo_bytes: u32,
    /// False once the line status never became "empty": from then on bytes are written blindly, because a
    /// monitor that keeps only the data port is better served by that than by a guest that hangs.
    reports_status: bool,
}

impl Serial {
    /// Sets the port up: 8 bits, no parity, FIFO on, no interrupts. The baud rate is left alone.
    pub(crate) fn new() -> Self {
        out8(INTERRUPT_ENABLE, 0);
        out8(LINE_CONTROL, 0x03);
        out8(FIFO_CONTROL, 0x07);
        out8(MODEM_CONTROL, 0x03);
        let has_fifo = in8(INTERRUPT_ID) & 0xc0 == 0xc0;
        Self {
            room: 0,
            fifo_bytes: if has_fifo { FIFO_BYTES } else { 1 },
            reports_status: true,
        }
    }

    fn put(&mut self, byte: u8) {
        if self.room == 0 {
            self.wait_until_empty();
            self.room = self.fifo_bytes;
        }
        self.room -= 1;
        out8(DATA, byte);
    }

    fn wait_until_empty(&mut self) {
        if !self.reports_status {
            return;
        }
        for _ in 0..MAX_POLLS {
            if in8(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
                return;
            }
            core::hint::spin_loop();
        }
        self.reports_status = false;
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| self.put(byte));
        Ok(())
    }
}

/// `writeln!` to a [`Serial`], whose writes cannot fail.
macro_rules! say {
    ($serial:expr, $($text:tt)*) => {{
        use core::fmt::Write as _;
        // `Serial::write_str` always returns `Ok`.
        let _ = writeln!($serial, $($text)*);
    }};
}
pub(crate) use say;
