//! COM1: a 16550 (vm-superio's) whose output goes to the VM's outbox and whose interrupt is line 4.

use std::io;

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use vmm_sys_util::eventfd::EventFd;

use super::DeviceStateError;
use crate::outbox::ConsoleWriter;

/// An eventfd that KVM turns into an interrupt.
#[derive(Debug)]
pub struct Interrupt(EventFd);

impl Interrupt {
    /// Wraps an eventfd registered with `KVM_IRQFD`.
    #[must_use]
    pub fn new(fd: EventFd) -> Self {
        Self(fd)
    }
}

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The device.
#[derive(Debug)]
pub struct SerialPort(Serial<Interrupt, NoEvents, ConsoleWriter>);

impl SerialPort {
    /// Its first port.
    pub const FIRST: u16 = 0x3f8;
    /// Its last port.
    pub const LAST: u16 = 0x3ff;

    /// A port after reset.
    #[must_use]
    pub fn new(interrupt: Interrupt, out: ConsoleWriter) -> Self {
        Self(Serial::new(interrupt, out))
    }

    /// A port with a saved state. If it had an interrupt pending, the interrupt is raised again (trap 13: a guest
    /// that waits for "transmitter empty" would wait for ever).
    ///
    /// # Errors
    /// When the saved input is longer than the FIFO, or the interrupt cannot be raised.
    pub fn from_state(
        state: &SerialState,
        interrupt: Interrupt,
        out: ConsoleWriter,
    ) -> Result<Self, DeviceStateError> {
        Serial::from_state(state, interrupt, NoEvents, out)
            .map(Self)
            .map_err(|e| DeviceStateError {
                device: "serial",
                why: e.to_string(),
            })
    }

    /// The state to save.
    #[must_use]
    pub fn state(&self) -> SerialState {
        self.0.state()
    }

    /// A register write by the guest.
    pub fn write(&mut self, register: u8, value: u8) {
        if let Err(error) = self.0.write(register, value) {
            tracing::debug!(%error, "serial port");
        }
    }

    /// A register read by the guest.
    pub fn read(&mut self, register: u8) -> u8 {
        self.0.read(register)
    }

    /// Gives the guest input; returns how many bytes the FIFO took.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let room = self.0.fifo_capacity().min(bytes.len());
        self.0.enqueue_raw_bytes(&bytes[..room]).unwrap_or_default()
    }
}
