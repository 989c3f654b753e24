//! Whether what is stored is still what was stored: every byte is read again, and what is damaged is set aside.
//!
//! A segment whose bytes are wrong twice in a row is moved to `damaged/` and is no longer held: what stands on it is
//! then not complete, is neither offered to a takeover nor shipped on, and can be fetched again from another holder. A
//! file that cannot be *read* stays where it is, and is reported: the disk may be able to again.

use segment::{FormatError, SegmentName, SegmentReader, Summary};

use super::scan::explain;
use super::{FsStore, Pace, StoreError};

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Every byte is right.
    Sound,
    /// It was removed or replaced meanwhile.
    Gone,
    /// The disk could not read it, for now; it is still there.
    Unreadable(String),
    /// It is damaged, and was set aside.
    Damaged(String),
}

/// One checked segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentCheck {
    /// Which.
    pub name: SegmentName,
    /// Its length.
    pub bytes: u64,
    /// What was found.
    pub health: Health,
}

impl FsStore {
    /// Reads a segment from beginning to end at a pace, checks every byte, and sets it aside when it is damaged.
    ///
    /// # Errors
    /// What the disk says when it is moved, and when the pace was stopped.
    pub fn check(&self, name: &SegmentName, pace: &Pace) -> Result<SegmentCheck, StoreError> {
        let checked = |bytes, health| {
            Ok(SegmentCheck {
                name: name.clone(),
                bytes,
                health,
            })
        };
        let Some(before) = self.get(name) else {
            return checked(0, Health::Gone);
        };
        let mut last = match self.read_whole(name, pace) {
            Ok(_) => return checked(before.bytes, Health::Sound),
            Err(error) => error,
        };
        // Again: what was read wrongly once may have been a fault of the way here, or another process' merge.
        if !pace.is_stopped() {
            match self.read_whole(name, pace) {
                Ok(_) => return checked(before.bytes, Health::Sound),
                Err(error) => last = error,
            }
        }
        let why = explain(&last);
        match last {
            StoreError::NotHeld { .. } => checked(before.bytes, Health::Gone),
            error if pace.is_stopped() => Err(error),
            StoreError::Damaged {
                source: FormatError::Io { .. },
                ..
            } => checked(before.bytes, Health::Unreadable(why)),
            StoreError::Damaged { .. } => {
                let health = match self.quarantine(name, before.digest, &why)? {
                    true => Health::Damaged(why),
                    false => Health::Gone,
                };
                checked(before.bytes, health)
            }
            _ => checked(before.bytes, Health::Unreadable(why)),
        }
    }

    fn read_whole(&self, name: &SegmentName, pace: &Pace) -> Result<Summary, StoreError> {
        let damaged = |source| StoreError::Damaged {
            name: name.clone(),
            source,
        };
        let (file, entry) = self.open_raw(name)?;
        let reader = SegmentReader::open_with(pace.of(file), &self.keys()).map_err(damaged)?;
        if reader.digest() != entry.digest {
            // A whole segment, and not the one that was put here.
            return Err(damaged(FormatError::Digest { what: "file".into() }));
        }
        reader.verify().map_err(damaged)
    }

    /// Sets a damaged segment aside; false when it is another one by now.
    fn quarantine(&self, name: &SegmentName, digest: segment::Digest, why: &str) -> Result<bool, StoreError> {
        if self.lock.is_none() {
            // Another process' store: it is told, and changes nothing.
            return Ok(true);
        }
        let Some(moved_to) = self.set_aside_if(name, |entry| entry.digest == digest, why)? else {
            return Ok(false);
        };
        tracing::error!(segment = %name, moved_to = %moved_to.display(), %why, "a stored segment is damaged: set aside");
        Ok(true)
    }
}
