//! The outbox: the one place through which a VM speaks to the world. Today that is the console.
//!
//! ```text
//! serial port --> Outbox (ring, newest 256 KiB) --> readers, each at its own pace: stdout, a log file, `vmm console`
//! ```
//!
//! The guest is never made to wait for a reader: one that falls more than the ring behind loses the oldest output
//! and is told how much. Because everything passes here, output can later be held until the checkpoint that
//! produced it is committed; and it is held as long as the VM has no lease: then another host may have taken it over.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::leash::Leash;

/// How much console output is kept for readers.
pub const RING_BYTES: usize = 256 << 10;

#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// The position (bytes since the VM was made here) of the first byte in the ring.
    start: u64,
    closed: bool,
    leash: Leash,
}

/// A VM's outbox. Cloning gives another handle to the same one; the lock is held for the time of a copy.
#[derive(Debug, Clone, Default)]
pub struct Outbox(Arc<(Mutex<Ring>, Condvar)>);

/// What a reader gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Bytes that were lost before them because the reader was too slow.
    pub lost: u64,
    /// The position after them.
    pub next: u64,
    /// Nothing will follow.
    pub closed: bool,
}

impl Outbox {
    /// An empty one of a VM that is heard only as long as this lets it.
    #[must_use]
    pub fn under(leash: Leash) -> Self {
        let ring = Ring {
            leash,
            ..Ring::default()
        };
        Self(Arc::new((Mutex::new(ring), Condvar::new())))
    }

    /// As long as what the VM is heard.
    #[must_use]
    pub fn leash(&self) -> Leash {
        self.lock().leash.clone()
    }

    /// Looks again whether the VM may be heard.
    pub fn wake(&self) {
        self.0.1.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The writing end, for the serial port.
    #[must_use]
    pub fn writer(&self) -> ConsoleWriter {
        ConsoleWriter(self.clone())
    }

    /// The position of the oldest byte still kept.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.lock().start
    }

    /// The position after the newest byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        let ring = self.lock();
        ring.start + ring.bytes.len() as u64
    }

    /// What follows `position`, waiting up to `wait` for something to.
    #[must_use]
    pub fn read(&self, position: u64, wait: Duration) -> Output {
        let ring = self.lock();
        let (ring, _) = self
            .0
            .1
            .wait_timeout_while(ring, wait, |ring| {
                !ring.closed && (position >= ring.start + ring.bytes.len() as u64 || !ring.leash.allows())
            })
            .unwrap_or_else(PoisonError::into_inner);
        if !ring.leash.allows() {
            // Kept until it may be heard again, which may be never.
            return Output {
                bytes: Vec::new(),
                lost: 0,
                next: position,
                closed: ring.closed,
            };
        }
        let end = ring.start + ring.bytes.len() as u64;
        let from = position.clamp(ring.start, end);
        let skip = (from - ring.start) as usize;
        Output {
            bytes: ring.bytes.iter().skip(skip).copied().collect(),
            lost: from.saturating_sub(position),
            next: end,
            closed: ring.closed,
        }
    }

    /// Says that nothing will follow.
    pub fn close(&self) {
        self.lock().closed = true;
        self.0.1.notify_all();
    }
}

/// The guest's end of the console.
#[derive(Debug)]
pub struct ConsoleWriter(Outbox);

impl io::Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut ring = self.0.lock();
        ring.bytes.extend(bytes);
        let excess = ring.bytes.len().saturating_sub(RING_BYTES);
        ring.bytes.drain(..excess);
        ring.start += excess as u64;
        drop(ring);
        self.0.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn without_a_lease_nothing_leaves_and_nothing_is_lost() {
        let leash = Leash::default();
        let outbox = Outbox::under(leash.clone());
        outbox.writer().write_all(b"before").unwrap();
        leash.hold();
        let held = outbox.read(0, Duration::ZERO);
        assert_eq!((held.bytes.len(), held.lost, held.next), (0, 0, 0));
        leash.free();
        assert_eq!(outbox.read(held.next, Duration::ZERO).bytes, b"before");
        leash.cut();
        outbox.close();
        let last = outbox.read(0, Duration::from_secs(60));
        assert!(
            last.closed && last.bytes.is_empty(),
            "another host may be heard now"
        );
    }

    #[test]
    fn a_slow_reader_is_told_what_it_lost() {
        let outbox = Outbox::default();
        let mut writer = outbox.writer();
        writer.write_all(b"hello").unwrap();
        let first = outbox.read(0, Duration::ZERO);
        assert_eq!(
            (first.bytes.as_slice(), first.lost, first.next),
            (b"hello".as_slice(), 0, 5)
        );
        writer.write_all(&vec![b'x'; RING_BYTES + 10]).unwrap();
        let second = outbox.read(first.next, Duration::ZERO);
        assert_eq!((second.bytes.len(), second.lost), (RING_BYTES, 10));
        assert!(outbox.read(second.next, Duration::ZERO).bytes.is_empty());
        outbox.close();
        assert!(outbox.read(second.next, Duration::from_secs(60)).closed);
    }
}
