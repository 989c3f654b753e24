//! Time from the TSC, made fit for a guest that may be stopped, moved to another host and resumed.
//!
//! [`Timeline`] turns TSC readings into microseconds of *running* time: it never goes backwards, a reading that
//! is earlier than the last one only moves the reference, and a gap of more than a second (the guest was
//! stopped or moved) adds nothing. So no schedule built on it can stall or burst.

/// A gap between two readings that is longer than this counts as a stop of the guest.
const MAX_GAP_MS: u64 = 1000;

/// Running time, fed with TSC readings.
pub(crate) struct Timeline {
    khz: u64,
    last: u64,
    cycles: u64,
}

impl Timeline {
    pub(crate) fn new(khz: u64, tsc: u64) -> Self {
        Self {
            khz: khz.max(1),
            last: tsc,
            cycles: 0,
        }
    }

    /// Microseconds of running time up to the reading `tsc`.
    pub(crate) fn observe(&mut self, tsc: u64) -> u64 {
        let gap = tsc.wrapping_sub(self.last);
        self.last = tsc;
        // A backward step is a huge gap in wrapping arithmetic, so one comparison drops both cases.
        if gap <= self.khz * MAX_GAP_MS {
            self.cycles += gap;
        }
        self.cycles / self.khz * 1000 + self.cycles % self.khz * 1000 / self.khz
    }
}

/// The next of a series of equally spaced moments.
pub(crate) struct Every {
    period_us: u64,
    next_us: u64,
}

impl Every {
    /// The first moment is `now_us` itself.
    pub(crate) fn new(period_us: u64, now_us: u64) -> Self {
        Self {
            period_us,
            next_us: now_us,
        }
    }

    /// True once for each moment that has come. Moments missed altogether are dropped, not made up for.
    pub(crate) fn is_due(&mut self, now_us: u64) -> bool {
        if now_us < self.next_us {
            return false;
        }
        self.next_us += self.period_us;
        if self.next_us <= now_us {
            self.next_us = now_us + self.period_us;
        }
        true
    }

    pub(crate) fn next_us(&self) -> u64 {
        self.next_us
    }
}
