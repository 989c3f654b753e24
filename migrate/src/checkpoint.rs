//! A checkpoint: what a monitor hands over when it has stopped its guest, and how that becomes a segment.
//!
//! ```text
//! Source::capture() -> Captured --EncodePool--> frames, in order --SegmentWriter--> a file in a store
//!        ^                                          |
//!        +----- put_back(), when it fails ----------+
//! ```
//!
//! The guest stands still only inside [`Source::capture`]; everything after it works on the copy.

mod cache;
mod encode;
mod level;
mod ordered;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;

use segment::{CheckpointId, PageIndex, Record, Space};

pub(crate) use encode::MAX_THREADS;
pub use encode::{EncodeError, EncodeOptions, EncodePool};
pub use level::{LevelControl, MAX_LEVEL, Seen};

/// What is asked of a [`Source`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CaptureKind {
    /// Every page.
    Full,
    /// The pages written since the capture before.
    Delta,
}

/// Pages that stay where they are until they are encoded: a disk's, which need not fit into memory. The monitor
/// implements it, and sees to it that what is read is of the capture's instant.
pub trait PageReader: Send + Sync {
    /// Reads whole pages, ascending, into `to`. Called from several threads, for each captured page once.
    ///
    /// # Errors
    /// The system's error. The checkpoint then fails, and is put back.
    fn read(&self, pages: &[PageIndex], to: &mut [u8]) -> io::Result<()>;
}

/// The longest page, zero.
static ZEROS: [u8; segment::limits::MAX_PAGE_BYTES as usize] = [0; segment::limits::MAX_PAGE_BYTES as usize];

/// Bytes of pages, in whatever holds them: a reused buffer goes back to its pool when this is dropped.
pub struct PageBytes(Held);

enum Held {
    Packed(Box<dyn AsRef<[u8]> + Send + Sync>),
    Sparse(Box<dyn AsRef<[u8]> + Send + Sync>),
    /// And where each page's are, in pages; none: it is zero.
    Placed(Box<dyn AsRef<[u8]> + Send + Sync>, Vec<Option<u32>>),
    Deferred(Box<dyn PageReader>),
}

impl PageBytes {
    /// Wraps what holds the captured pages back to back.
    pub fn new(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        Self(Held::Packed(Box::new(bytes)))
    }

    /// Wraps what holds the *whole* space, page `n` at `n * page_bytes`: a full capture's copy, of which only the
    /// captured pages are looked at.
    pub fn sparse(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        Self(Held::Sparse(Box::new(bytes)))
    }

    /// Wraps what holds some of the captured pages back to back: `places` says of each captured page which of those it
    /// is, and the others are zero.
    pub fn placed(bytes: impl AsRef<[u8]> + Send + Sync + 'static, places: Vec<Option<u32>>) -> Self {
        Self(Held::Placed(Box::new(bytes), places))
    }

    /// Wraps what reads the captured pages when they are encoded.
    pub fn deferred(reader: impl PageReader + 'static) -> Self {
        Self(Held::Deferred(Box::new(reader)))
    }

    /// Whether the whole space is here, not only the captured pages.
    #[must_use]
    pub fn is_sparse(&self) -> bool {
        matches!(self.0, Held::Sparse(_))
    }

    /// How many pages the bytes are of, of `captured` ones in a space of `space`; `None` when the places are not theirs.
    pub(crate) fn held(&self, captured: usize, space: u64) -> Option<usize> {
        match &self.0 {
            Held::Packed(_) => Some(captured),
            Held::Sparse(_) => usize::try_from(space).ok(),
            Held::Placed(_, places) => {
                let there = places.iter().flatten().copied();
                let in_order = there.clone().eq(0..u32::try_from(there.clone().count()).ok()?);
                (places.len() == captured && in_order).then(|| there.count())
            }
            Held::Deferred(_) => Some(0),
        }
    }

    /// What reads the pages, when they are not here.
    #[must_use]
    pub fn reader(&self) -> Option<&dyn PageReader> {
        match &self.0 {
            Held::Deferred(reader) => Some(&**reader),
            Held::Packed(_) | Held::Sparse(_) | Held::Placed(..) => None,
        }
    }
}

impl AsRef<[u8]> for PageBytes {
    /// The bytes that are here: none of [deferred](Self::deferred) pages.
    fn as_ref(&self) -> &[u8] {
        match &self.0 {
            Held::Packed(bytes) | Held::Sparse(bytes) | Held::Placed(bytes, _) => (**bytes).as_ref(),
            Held::Deferred(_) => &[],
        }
    }
}

impl fmt::Debug for PageBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the content: it is a guest's memory.
        match self.reader() {
            Some(_) => f.write_str("PageBytes(deferred)"),
            None => write!(f, "PageBytes({} bytes)", self.as_ref().len()),
        }
    }
}

/// One address space's captured pages: ascending distinct page indices and their bytes.
#[derive(Debug)]
pub struct CapturedPages {
    /// The space.
    pub space: Space,
    /// Which of its pages, ascending and distinct.
    pub pages: Vec<PageIndex>,
    /// Their bytes in the same order, `pages.len() * space.page_bytes` long; or the whole space, when it is
    /// [sparse](PageBytes::sparse); or what reads them, when they are [deferred](PageBytes::deferred).
    pub data: PageBytes,
}

impl CapturedPages {
    /// The bytes of the `at`th of its pages; none when they are [deferred](PageBytes::deferred).
    ///
    /// # Panics
    /// When there is no such page, or the bytes are not those of the pages: [`EncodePool::encode`] checks that first.
    pub(crate) fn page(&self, at: usize) -> Option<&[u8]> {
        if self.data.reader().is_some() {
            return None;
        }
        let page_bytes = self.space.page_bytes as usize;
        let place = match &self.data.0 {
            // The whole space is in memory, so its page numbers are sizes.
            Held::Sparse(_) => self.pages[at].0 as usize,
            Held::Placed(_, places) => match places[at] {
                Some(place) => place as usize,
                None => return Some(&ZEROS[..page_bytes]),
            },
            Held::Packed(_) | Held::Deferred(_) => at,
        };
        Some(&self.data.as_ref()[place * page_bytes..][..page_bytes])
    }
}

/// A guest at one instant, whole (full) or as what changed (delta).
#[derive(Debug)]
pub struct Captured {
    /// Its identity: 16 random bytes.
    pub checkpoint: CheckpointId,
    /// When the guest was stopped, in nanoseconds since 1970.
    pub created_unix_ns: u64,
    /// Whether every page is here (pages left out are zero).
    pub full: bool,
    /// The state of the processors and devices.
    pub records: Vec<Record>,
    /// Every address space, also one without a changed page.
    pub spaces: Vec<CapturedPages>,
    /// How long the guest stood still.
    pub stopped: Duration,
}

/// Why a monitor could not capture.
#[derive(Debug)]
pub struct SourceError(Box<dyn Error + Send + Sync>);

impl SourceError {
    /// Wraps the monitor's error (or a text).
    pub fn new(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(source.into())
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl Error for SourceError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

/// A VM that checkpoints can be taken of. The monitor implements it.
pub trait Source: Send {
    /// Stops the guest, reads its state and its dirty set, copies the pages, and lets it go on.
    ///
    /// A delta holds every page that may differ from the capture before, where captures that were
    /// [put back](Self::put_back) or failed do not count. A full may be given when a delta was asked for, never the
    /// other way round.
    ///
    /// # Errors
    /// When it cannot. The guest goes on and no dirty page is forgotten.
    fn capture(&mut self, kind: CaptureKind) -> Result<Captured, SourceError>;

    /// Takes a capture back that could not be stored: its pages join the next delta's set.
    fn put_back(&mut self, captured: &Captured);

    /// Pauses the guest for good and says why: another host may run it now.
    fn fence(&mut self, reason: &str);
}
