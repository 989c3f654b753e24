//! The clock that leases are counted by.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The time since this host booted, including all time in which it was suspended. Nobody can set it.
#[must_use]
pub fn boottime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    // Since the boot, so neither part is negative.
    Duration::new(
        now.tv_sec.unsigned_abs(),
        now.tv_nsec.clamp(0, 999_999_999).unsigned_abs() as u32,
    )
}
