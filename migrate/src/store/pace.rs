//! Background work that leaves the disk to others: so many bytes a second, and stopped at once when asked.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use segment::ReadAt;

use super::lock;

/// The longest sleep before looking whether to stop.
const NAP: Duration = Duration::from_millis(50);
/// What may be read at once after a rest.
const BURST: Duration = Duration::from_millis(200);

/// A bound on the bytes that are read in a second, shared by whoever has a clone.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    bytes_per_second: Option<u64>,
    /// When the bytes that were read so far are paid for. Shared by readers; held for moments.
    paid_at: Arc<Mutex<Option<Instant>>>,
    stop: Arc<AtomicBool>,
    hurries: Arc<AtomicU32>,
}

/// Somebody waits for what is read at a pace.
#[derive(Debug)]
pub struct Hurry(Arc<AtomicU32>);

impl Drop for Hurry {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pace {
    /// As fast as it goes.
    #[must_use]
    pub fn unlimited() -> Self {
        Self::default()
    }

    /// At most so many bytes a second, at least 1.
    #[must_use]
    pub fn bytes_per_second(rate: u64) -> Self {
        Self {
            bytes_per_second: Some(rate.max(1)),
            ..Self::default()
        }
    }

    /// Lifts the bound for all who share this pace, for as long as the result lives: somebody waits.
    #[must_use]
    pub fn hurry(&self) -> Hurry {
        self.hurries.fetch_add(1, Ordering::Relaxed);
        Hurry(self.hurries.clone())
    }

    /// Ends every read under this pace, now and later, with [`io::ErrorKind::Interrupted`]'s meaning as an error.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether it was stopped.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Waits until `bytes` more may be read.
    ///
    /// # Errors
    /// When it is stopped.
    pub fn spend(&self, bytes: u64) -> io::Result<()> {
        if let Some(rate) = self.bytes_per_second {
            let until = {
                let mut paid_at = lock(&self.paid_at);
                let now = Instant::now();
                let from = paid_at.map_or(now, |at| at.max(now.checked_sub(BURST).unwrap_or(now)));
                let until = from + Duration::from_secs_f64(bytes as f64 / rate as f64);
                *paid_at = Some(until);
                until
            };
            while let Some(left) = until.checked_duration_since(Instant::now())
                && !self.is_stopped()
                && self.hurries.load(Ordering::Relaxed) == 0
            {
                std::thread::sleep(left.min(NAP));
            }
        }
        if self.is_stopped() {
            return Err(io::Error::other("stopped: the agent ends"));
        }
        Ok(())
    }

    /// `source`, read at this pace.
    pub fn of<R: ReadAt>(&self, source: R) -> Paced<R> {
        Paced {
            source,
            pace: self.clone(),
        }
    }
}

/// A source that is read at a pace.
#[derive(Debug)]
pub struct Paced<R> {
    source: R,
    pace: Pace,
}

impl<R: ReadAt> ReadAt for Paced<R> {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.pace.spend(buf.len() as u64)?;
        self.source.read_exact_at(offset, buf)
    }

    fn len(&self) -> io::Result<u64> {
        self.source.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_and_a_stop_ends_it() {
        let pace = Pace::bytes_per_second(1_000_000);
        let begun = Instant::now();
        for _ in 0..4 {
            pace.spend(100_000).unwrap();
        }
        assert!(begun.elapsed() >= Duration::from_millis(400) - BURST);
        {
            // An hour's worth: it would not return.
            let _hurry = pace.hurry();
            pace.spend(3_600_000_000).unwrap();
        }
        pace.stop();
        assert!(pace.spend(1 << 40).is_err());
        assert!(pace.of(vec![0; 8]).read_exact_at(0, &mut [0; 4]).is_err());
        Pace::unlimited().spend(u64::MAX).unwrap();
    }
}
