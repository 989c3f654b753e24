//! Until when the guest may run and be heard, as one number that everyone looks at who lets it.
//!
//! ```text
//!   free   no lease is needed
//!   held   not yet, or not any more for now
//!   until  as long as the clock since the boot shows less
//!   cut    never again in this process
//! ```
//!
//! It is looked at before every entry into the guest and before every output, and not only when a timer fires: a
//! process that was stopped for longer than its lease and then continued has its timers late, and must not run on.
//!
//! What it never does: it does not know who grants the time (see `session/lease.rs`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

const FREE: u64 = u64::MAX;
const CUT: u64 = 0;
const HELD: u64 = 1;

/// The number. Cloning gives another handle to the same one.
#[derive(Debug, Clone)]
pub struct Leash(Arc<AtomicU64>);

impl Default for Leash {
    /// One that needs no lease.
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(FREE)))
    }
}

impl Leash {
    /// Whether the guest may run now.
    #[must_use]
    pub fn allows(&self) -> bool {
        match self.0.load(Ordering::SeqCst) {
            FREE => true,
            until => now_ns() < until,
        }
    }

    fn set(&self, value: u64) {
        let cut = |old| (old != CUT).then_some(value);
        // Refused when it is cut: that is final.
        let _ = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, cut);
    }

    /// No lease is needed.
    pub fn free(&self) {
        self.set(FREE);
    }

    /// Not before time is granted.
    pub fn hold(&self) {
        self.set(HELD);
    }

    /// Until the clock since the boot shows this.
    pub fn until(&self, until: Duration) {
        let ns = u64::try_from(until.as_nanos()).unwrap_or(FREE - 1);
        self.set(ns.clamp(HELD, FREE - 1));
    }

    /// Never again.
    pub fn cut(&self) {
        self.0.store(CUT, Ordering::SeqCst);
    }
}

/// Nanoseconds since the boot, including those in which the host was suspended.
fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    // Since the boot, so neither part is negative.
    now.tv_sec.unsigned_abs().saturating_mul(1_000_000_000) + now.tv_nsec.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_runs_out_and_a_cut_is_final() {
        let leash = Leash::default();
        assert!(leash.allows());
        leash.hold();
        assert!(!leash.allows());
        leash.until(Duration::from_nanos(now_ns()) + Duration::from_secs(60));
        assert!(leash.allows());
        leash.until(Duration::from_nanos(now_ns()));
        assert!(!leash.allows());
        leash.free();
        assert!(leash.allows());
        leash.cut();
        leash.free();
        leash.until(Duration::MAX);
        assert!(!leash.allows());
    }
}
