//! The CMOS clock (MC146818): the time of day in UTC, read only, and its memory.
//!
//! The time is the host's, so a guest that reads it after a restore reads the right one. Alarms and periodic
//! interrupts are not offered: their enable bits read as zero.

use super::DeviceStateError;

const REGISTERS: usize = 128;
const STATUS_B_24_HOURS: u8 = 1 << 1;
const STATUS_D_VALID: u8 = 1 << 7;

/// What a guest can set in the clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RtcState {
    /// The register that port 0x71 shows.
    pub index: u8,
    /// The memory, 128 bytes; the clock's own registers in it are not used.
    pub memory: Vec<u8>,
}

/// The device.
#[derive(Debug)]
pub struct Rtc {
    index: u8,
    memory: [u8; REGISTERS],
    now: fn() -> jiff::Timestamp,
}

impl Default for Rtc {
    fn default() -> Self {
        Self {
            index: 0,
            memory: [0; REGISTERS],
            now: jiff::Timestamp::now,
        }
    }
}

impl Rtc {
    /// A write to port 0x70 or 0x71.
    pub fn write(&mut self, port: u16, value: u8) {
        match (port, self.index) {
            // The top bit masks NMIs on a PC; there are none to mask.
            (0x70, _) => self.index = value & 0x7f,
            // The clock follows the host's.
            (_, 0..=0xd) => {}
            (_, index) => self.memory[usize::from(index)] = value,
        }
    }

    /// A read from port 0x70 or 0x71.
    pub fn read(&mut self, port: u16) -> u8 {
        if port == 0x70 {
            return 0xff;
        }
        let time = (self.now)().to_zoned(jiff::tz::TimeZone::UTC);
        // Every field is below 100, so it has two decimal digits.
        let bcd = |value: i64| (((value / 10 % 10) << 4) | (value % 10)) as u8;
        match self.index {
            0x0 => bcd(time.second().into()),
            0x2 => bcd(time.minute().into()),
            0x4 => bcd(time.hour().into()),
            0x6 => bcd(i64::from(time.weekday().to_sunday_one_offset())),
            0x7 => bcd(time.day().into()),
            0x8 => bcd(time.month().into()),
            0x9 => bcd(i64::from(time.year()) % 100),
            0x32 => bcd(i64::from(time.year()) / 100),
            0xb => STATUS_B_24_HOURS,
            0xd => STATUS_D_VALID,
            0x1 | 0x3 | 0x5 | 0xa | 0xc => 0,
            index => self.memory[usize::from(index)],
        }
    }

    /// The state to save.
    #[must_use]
    pub fn state(&self) -> RtcState {
        RtcState {
            index: self.index,
            memory: self.memory.to_vec(),
        }
    }

    /// A device with a saved state.
    ///
    /// # Errors
    /// When the memory has another size or the index is beyond it.
    pub fn from_state(state: &RtcState) -> Result<Self, DeviceStateError> {
        let refuse = |why| DeviceStateError { device: "rtc", why };
        let memory = <[u8; REGISTERS]>::try_from(state.memory.as_slice()).map_err(|_| {
            refuse(format!(
                "its memory has {} bytes, not {REGISTERS}",
                state.memory.len()
            ))
        })?;
        if usize::from(state.index) >= REGISTERS {
            return Err(refuse(format!(
                "register {} is beyond its {REGISTERS}",
                state.index
            )));
        }
        Ok(Self {
            index: state.index,
            memory,
            ..Self::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_binary_coded_decimal() {
        let mut rtc = Rtc {
            now: || "2026-11-22T17:05:09Z".parse().unwrap(),
            ..Rtc::default()
        };
        let mut read = |register| {
            rtc.write(0x70, register);
            rtc.read(0x71)
        };
        assert_eq!(
            [0x32, 9, 8, 7, 6, 4, 2, 0].map(&mut read),
            [0x20, 0x26, 0x11, 0x22, 1, 0x17, 5, 9]
        );
        assert_eq!(read(0xa) & 0x80, 0, "no update in progress");
    }

    #[test]
    fn a_bad_state_is_refused() {
        let mut rtc = Rtc::default();
        rtc.write(0x70, 0x40);
        rtc.write(0x71, 7);
        let state = rtc.state();
        assert_eq!(Rtc::from_state(&state).unwrap().read(0x71), 7);
        assert!(
            Rtc::from_state(&RtcState {
                index: 200,
                ..state.clone()
            })
            .is_err()
        );
        assert!(
            Rtc::from_state(&RtcState {
                memory: vec![0; 3],
                ..state
            })
            .is_err()
        );
    }
}
