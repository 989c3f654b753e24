//! Which device answers which port and which address.
//!
//! ```text
//! ports                                              addresses
//! 0x060, 0x064   i8042 (reset line)                  0xd000_0000.. virtio-mmio windows, by slot
//! 0x070, 0x071   CMOS clock                          all others    nobody
//! 0x3f8..0x400   COM1, interrupt 4
//! 0x600..0x603   ACPI sleep control, status, reset
//! 0xd80          idle port
//! ```
//! The PIT, the PICs, the IOAPIC and the local APICs are KVM's own. What nobody answers reads as ones and takes
//! writes, as on a PC.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::devices::i8042::I8042;
use crate::devices::rtc::Rtc;
use crate::devices::serial::SerialPort;
use crate::devices::virtio::Transport;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::disk::Disk;
use crate::layout::{
    RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_S5, SLEEP_STATUS_PORT, VIRTIO_MMIO_BYTES, VirtioSlot,
};
use crate::vcpu::{GuestEnd, Sleeper};

/// The idle port: a 32-bit write of a number of microseconds lets the vCPU sleep that long, at most
/// [`IDLE_MAX`]. For bare-metal guests that work at privilege level 3, where `hlt` is not allowed.
pub const IDLE_PORT: u16 = 0xd80;
/// The longest sleep one write gets.
pub const IDLE_MAX: Duration = Duration::from_millis(100);

/// A device behind a range of guest physical addresses. Called on vCPU threads, several at once: it does its own
/// locking and never blocks on I/O.
pub trait MmioDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset` from the range's start. `offset + data.len()` may pass its end.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data`.
    fn write(&self, offset: u64, data: &[u8]);
    /// The machine was reset: back to the state of a new device, with no I/O in flight when this returns. The vCPUs
    /// stand still.
    fn reset(&self);
}

/// A virtio device and its place.
#[derive(Debug, Clone)]
pub struct Attached {
    /// Its window and interrupt line.
    pub slot: VirtioSlot,
    /// What answers in the window, raises the line, and is kicked.
    pub device: Arc<Transport>,
    /// The disk behind it, when it is one: its content is an address space.
    pub disk: Option<Arc<Disk>>,
    /// The balloon, when it is one.
    pub balloon: Option<Balloon>,
}

/// Two devices in one place.
#[derive(Debug, thiserror::Error)]
#[error("the addresses {:#x}..{:#x} already belong to another device", .0.start, .0.end)]
pub struct Occupied(Range<u64>);

/// The devices of a machine. Those on ports have a lock each, held for one access: any vCPU may touch any device, and
/// the owner reads their state only when all vCPUs are parked.
pub struct Bus {
    serial: Mutex<SerialPort>,
    i8042: Mutex<I8042>,
    rtc: Mutex<Rtc>,
    /// By address, ascending, without overlap. Complete before the vCPUs start.
    mmio: Vec<(Range<u64>, Arc<dyn MmioDevice>)>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ranges: Vec<_> = self.mmio.iter().map(|(range, _)| range).collect();
        f.debug_struct("Bus")
            .field("mmio", &ranges)
            .finish_non_exhaustive()
    }
}

impl Bus {
    /// A bus with these devices on its ports.
    #[must_use]
    pub fn new(serial: SerialPort, i8042: I8042, rtc: Rtc) -> Self {
        Self {
            serial: Mutex::new(serial),
            i8042: Mutex::new(i8042),
            rtc: Mutex::new(rtc),
            mmio: Vec::new(),
        }
    }

    /// Adds a device in a virtio slot.
    ///
    /// # Errors
    /// [`Occupied`].
    pub fn attach(&mut self, slot: VirtioSlot, device: Arc<dyn MmioDevice>) -> Result<(), Occupied> {
        self.add(slot.address()..slot.address() + VIRTIO_MMIO_BYTES, device)
    }

    fn add(&mut self, range: Range<u64>, device: Arc<dyn MmioDevice>) -> Result<(), Occupied> {
        let at = self.mmio.partition_point(|(other, _)| other.end <= range.start);
        if self
            .mmio
            .get(at)
            .is_some_and(|(other, _)| other.start < range.end)
        {
            return Err(Occupied(range));
        }
        self.mmio.insert(at, (range, device));
        Ok(())
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

    /// A write of `data` to `port`; what it ends, if it asks for a reset or for power off.
    pub fn write(&self, port: u16, data: &[u8], sleeper: &Sleeper<'_>) -> Option<GuestEnd> {
        match port {
            SerialPort::FIRST..=SerialPort::LAST => {
                let mut serial = self.serial();
                // A string instruction hands over several bytes for one register.
                for &byte in data {
                    serial.write((port - SerialPort::FIRST) as u8, byte);
                }
            }
            0x60 | 0x64 if data.iter().any(|&byte| self.i8042().write(port, byte)) => {
                return Some(GuestEnd::Reset);
            }
            0x70 | 0x71 => data.iter().for_each(|&byte| self.rtc().write(port, byte)),
            SLEEP_CONTROL_PORT if data.contains(&SLEEP_S5) => return Some(GuestEnd::PowerOff),
            RESET_PORT if data.contains(&RESET_VALUE) => return Some(GuestEnd::Reset),
            IDLE_PORT => {
                if let Ok(bytes) = <[u8; 4]>::try_from(data) {
                    let time = Duration::from_micros(u64::from(u32::from_le_bytes(bytes)));
                    sleeper.sleep(time.min(IDLE_MAX));
                }
            }
            _ => {}
        }
        None
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
            SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// A read from `address` into `data`, which no RAM answers.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write of `data` to `address`, which no RAM takes.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &dyn MmioDevice)> {
        let at = self.mmio.partition_point(|(range, _)| range.end <= address);
        let (range, device) = self.mmio.get(at)?;
        range
            .contains(&address)
            .then(|| (address - range.start, device.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::serial::Interrupt;
    use crate::outbox::Outbox;

    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);

    impl MmioDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
        fn reset(&self) {
            self.0.lock().unwrap().clear();
        }
    }

    #[test]
    fn each_address_has_one_device_or_none() {
        let interrupt = Interrupt::new(vmm_sys_util::eventfd::EventFd::new(0).unwrap());
        let serial = SerialPort::new(interrupt, Outbox::default().writer());
        let mut bus = Bus::new(serial, I8042::default(), Rtc::default());
        let echoes: Vec<_> = (0..3).map(|_| Arc::new(Echo(Mutex::default()))).collect();
        let slot = |number| VirtioSlot::new(number).unwrap();
        for number in [2, 0] {
            bus.attach(slot(number), echoes[usize::from(number)].clone())
                .unwrap();
        }
        assert!(bus.attach(slot(2), echoes[1].clone()).is_err(), "taken");
        let read = |address| {
            let mut data = [0; 4];
            bus.mmio_read(address, &mut data);
            data
        };
        assert_eq!(read(slot(0).address() + 0x70), [0x70; 4]);
        assert_eq!(read(slot(2).address()), [0; 4]);
        assert_eq!(read(slot(1).address()), [0xff; 4], "an empty slot");
        assert_eq!(read(slot(2).address() + 0x1000), [0xff; 4], "behind the last");
        bus.mmio_write(slot(2).address() + 0x50, &[1, 0, 0, 0]);
        bus.mmio_write(slot(1).address(), &[1]);
        assert_eq!(*echoes[2].0.lock().unwrap(), [(0x50, vec![1, 0, 0, 0])]);
        assert!(echoes[0].0.lock().unwrap().is_empty());
    }
}
