//! The devices the monitor emulates. Each has a plain `*State`, made by `state()` and taken by `from_state()`,
//! which checks it: a saved state is untrusted and builds a new device (rule 1).

pub mod i8042;
pub mod rtc;
pub mod serial;
pub mod virtio;

/// Why a saved device state cannot be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{device}: {why}")]
pub struct DeviceStateError {
    /// The device.
    pub device: &'static str,
    /// What is wrong with its state.
    pub why: String,
}
