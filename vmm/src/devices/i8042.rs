//! The keyboard controller, as far as a guest needs one: the reset line (command 0xfe) and a status that says there
//! is nothing to read and room to write.

use super::DeviceStateError;

const STATUS_SYSTEM: u8 = 1 << 2;
const COMMAND_READ_CONFIG: u8 = 0x20;
const COMMAND_WRITE_CONFIG: u8 = 0x60;
const COMMAND_RESET: u8 = 0xfe;

/// What a guest can set in the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct I8042State {
    /// The configuration byte.
    pub config: u8,
    /// The next data byte is the configuration byte.
    pub config_expected: bool,
    /// The configuration byte waits to be read.
    pub output_full: bool,
}

/// The device.
#[derive(Debug, Default)]
pub struct I8042(I8042State);

impl I8042 {
    /// A write to port 0x60 or 0x64; true when it pulls the reset line.
    pub fn write(&mut self, port: u16, value: u8) -> bool {
        match (port, value) {
            (0x64, COMMAND_RESET) => return true,
            (0x64, COMMAND_WRITE_CONFIG) => self.0.config_expected = true,
            (0x64, COMMAND_READ_CONFIG) => self.0.output_full = true,
            (0x60, value) if self.0.config_expected => {
                self.0.config = value;
                self.0.config_expected = false;
            }
            _ => {}
        }
        false
    }

    /// A read from port 0x60 or 0x64.
    pub fn read(&mut self, port: u16) -> u8 {
        match port {
            0x64 => STATUS_SYSTEM | u8::from(self.0.output_full),
            _ if self.0.output_full => {
                self.0.output_full = false;
                self.0.config
            }
            _ => 0,
        }
    }

    /// The state to save.
    #[must_use]
    pub fn state(&self) -> I8042State {
        self.0
    }

    /// A device with a saved state; every value is one a guest can set.
    ///
    /// # Errors
    /// None today; a device that can refuse a state has the same signature.
    pub fn from_state(state: &I8042State) -> Result<Self, DeviceStateError> {
        Ok(Self(*state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_line_and_the_configuration_byte() {
        let mut device = I8042::default();
        assert!(!device.write(0x64, 0xff));
        assert!(device.write(0x64, 0xfe));
        device.write(0x64, COMMAND_WRITE_CONFIG);
        device.write(0x60, 0x47);
        device.write(0x64, COMMAND_READ_CONFIG);
        let mut device = I8042::from_state(&device.state()).unwrap();
        assert_eq!(device.read(0x64) & 1, 1);
        assert_eq!(device.read(0x60), 0x47);
        assert_eq!(device.read(0x64) & 1, 0);
    }
}
