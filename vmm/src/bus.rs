//! Port I/O: which device answers which port.
//!
//! ```text
//! 0x060, 0x064   i8042 (reset line)      0x3f8..0x400   COM1, interrupt 4
//! 0x070, 0x071   CMOS clock              0xd80          idle port
//! ```
//! The PIT, the PICs and the IOAPIC are KVM's own. A port nobody answers reads as ones and takes writes, as on a
//! PC.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::devices::i8042::I8042;
use crate::devices::rtc::Rtc;
use crate::devices::serial::SerialPort;
use crate::vcpu::Sleeper;

/// The idle port: a 32-bit write of a number of microseconds lets the vCPU sleep that long, at most
/// [`IDLE_MAX`]. For bare-metal guests that work at privilege level 3, where `hlt` is not allowed.
pub const IDLE_PORT: u16 = 0xd80;
/// The longest sleep one write gets.
pub const IDLE_MAX: Duration = Duration::from_millis(100);

/// The devices on ports. Each has its own lock, held for one access: any vCPU may touch any device, and the owner
/// reads their state only when all vCPUs are parked.
#[derive(Debug)]
pub struct Bus {
    serial: Mutex<SerialPort>,
    i8042: Mutex<I8042>,
    rtc: Mutex<Rtc>,
}

impl Bus {
    /// A bus with these devices.
    #[must_use]
    pub fn new(serial: SerialPort, i8042: I8042, rtc: Rtc) -> Self {
        Self {
            serial: Mutex::new(serial),
            i8042: Mutex::new(i8042),
            rtc: Mutex::new(rtc),
        }
    }

    /// The serial port.
    pub fn serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The keyboard controller.
    pub fn i8042(&self) -> MutexGuard<'_, I8042> {
        self.i8042.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The CMOS clock.
    pub fn rtc(&self) -> MutexGuard<'_, Rtc> {
        self.rtc.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write of `data` to `port`; true when it asks for a reset.
    pub fn write(&self, port: u16, data: &[u8], sleeper: &Sleeper<'_>) -> bool {
        match port {
            SerialPort::FIRST..=SerialPort::LAST => {
                let mut serial = self.serial();
                // A string instruction hands over several bytes for one register.
                for &byte in data {
                    serial.write((port - SerialPort::FIRST) as u8, byte);
                }
            }
            0x60 | 0x64 => return data.iter().any(|&byte| self.i8042().write(port, byte)),
            0x70 | 0x71 => data.iter().for_each(|&byte| self.rtc().write(port, byte)),
            IDLE_PORT => {
                if let Ok(bytes) = <[u8; 4]>::try_from(data) {
                    let time = Duration::from_micros(u64::from(u32::from_le_bytes(bytes)));
                    sleeper.sleep(time.min(IDLE_MAX));
                }
            }
            _ => {}
        }
        false
    }

    /// A read from `port` into `data`.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        match port {
            SerialPort::FIRST..=SerialPort::LAST => {
                let mut serial = self.serial();
                data.fill_with(|| serial.read((port - SerialPort::FIRST) as u8));
            }
            0x60 | 0x64 => data.fill_with(|| self.i8042().read(port)),
            0x70 | 0x71 => data.fill_with(|| self.rtc().read(port)),
            _ => data.fill(0xff),
        }
    }
}
