//! Which zstd level: pure, decided anew after each checkpoint.
//!
//! ```text
//! what waits to be shipped would take longer than PATIENT to drain ----> up, while encoding leaves time
//! encoding takes more than BUSY of the time between checkpoints -------> down
//! nothing waits -------------------------------------------------------> down, to the level asked for
//! ```
//!
//! A higher level makes segments shorter and encoding slower: worth it only where the link is what holds up.

use std::time::Duration;

/// The highest level it goes to: above it zstd takes many times as long for a few per cent.
pub const MAX_LEVEL: i32 = 9;
/// What waits is of no concern when it drains in this many times the checkpoints' pace.
const PATIENT: u32 = 4;
/// The share of the time between checkpoints that encoding may take: one in so many.
const BUSY: u32 = 3;
/// Checkpoints for which a level is kept at least.
const KEEP: u32 = 8;

/// What was seen with one checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// How long encoding and storing it took.
    pub encode: Duration,
    /// The time from one checkpoint to the next.
    pub every: Duration,
    /// Its bytes as stored.
    pub stored_bytes: u64,
    /// Bytes that the slowest holder in reach still lacks.
    pub waiting_bytes: u64,
}

/// The level, as it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LevelControl {
    lowest: i32,
    level: i32,
    /// Checkpoints since it was changed.
    kept: u32,
    /// Bytes that waited the last time.
    waited: u64,
}

impl LevelControl {
    /// Begins at `level` and does not go below it.
    #[must_use]
    pub fn new(level: i32) -> Self {
        Self {
            lowest: level,
            level,
            kept: 0,
            waited: 0,
        }
    }

    /// The level.
    #[must_use]
    pub fn level(&self) -> i32 {
        self.level
    }

    /// Takes one checkpoint into account, and says the level of the next.
    pub fn after(&mut self, seen: Seen) -> i32 {
        self.kept = self.kept.saturating_add(1);
        let growing = seen.waiting_bytes > self.waited;
        self.waited = seen.waiting_bytes;
        let busy = seen.encode > seen.every / BUSY;
        // At the pace of the checkpoints themselves, a queue of PATIENT of them.
        let behind = seen.waiting_bytes > seen.stored_bytes.saturating_mul(PATIENT.into());
        let next = match (busy, behind) {
            // The guest's own pace comes first: at once, whatever waits.
            (true, _) if self.level > self.lowest => Some(self.level - 1),
            (true, _) => None,
            (false, true) if growing && self.kept >= KEEP && self.level < MAX_LEVEL => Some(self.level + 1),
            (false, true) => None,
            (false, false) if self.kept >= KEEP && seen.waiting_bytes == 0 && self.level > self.lowest => {
                Some(self.level - 1)
            }
            (false, false) => None,
        };
        if let Some(next) = next {
            (self.level, self.kept) = (next, 0);
        }
        self.level
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_millis(100);

    /// A guest whose checkpoints have `raw` bytes, encoded at `speed` bytes a second at level 1 (each level takes a
    /// third longer and saves a tenth), behind a link of `link` bytes a second. The levels it goes through.
    fn run(raw: f64, speed: f64, link: f64, checkpoints: usize) -> Vec<i32> {
        let mut control = LevelControl::new(1);
        let mut waiting = 0.0;
        (0..checkpoints)
            .map(|_| {
                let above = f64::from(control.level() - 1);
                let stored = raw / 2.0 * 0.9f64.powf(above);
                waiting = (waiting + stored - link * EVERY.as_secs_f64()).max(0.0);
                control.after(Seen {
                    encode: Duration::from_secs_f64(raw / speed * 1.33f64.powf(above)),
                    every: EVERY,
                    stored_bytes: stored as u64,
                    waiting_bytes: waiting as u64,
                })
            })
            .collect()
    }

    #[test]
    fn a_fast_link_is_left_at_the_lowest_level() {
        assert!(run(1e6, 5e8, 1e9, 500).iter().all(|level| *level == 1));
    }

    #[test]
    fn a_slow_link_gets_shorter_segments_until_it_keeps_up() {
        // 5 MB/s of stored bytes at level 1; the link does 4.
        let levels = run(1e6, 5e8, 4e6, 2000);
        assert!(levels.windows(2).all(|pair| (pair[0] - pair[1]).abs() <= 1));
        let last = &levels[1000..];
        assert!(last.iter().any(|level| *level >= 3), "{last:?}");
        // A link that never keeps up is met by the highest level, and no more.
        assert_eq!(run(1e6, 5e8, 1e5, 500).last(), Some(&MAX_LEVEL));
    }

    #[test]
    fn encoding_never_takes_the_guest_s_time_for_the_link() {
        // Level 3 would take more than a third of the time.
        let levels = run(1e7, 5e8, 1e5, 1000);
        assert!(levels.iter().all(|level| *level <= 3), "{levels:?}");
    }

    #[test]
    fn when_nothing_waits_it_comes_down_again() {
        let mut control = LevelControl::new(1);
        let seen = |waiting_bytes| Seen {
            encode: Duration::from_millis(1),
            every: EVERY,
            stored_bytes: 100,
            waiting_bytes,
        };
        for n in 0..100 {
            control.after(seen(1000 * (n + 1)));
        }
        assert_eq!(control.level(), MAX_LEVEL);
        for _ in 0..100 {
            control.after(seen(0));
        }
        assert_eq!(control.level(), 1);
    }
}
