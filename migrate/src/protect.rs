//! The sequence of one owner's checkpoints.
//!
//! ```text
//! checkpoint():  Sequence::next -> name, kind      pure: what it will be called and build on
//!                Source::capture                   the guest stands still here, and nowhere else
//!                encode, store                     the guest runs
//!                Sequence::stored                  it is what the next one builds on
//!        failed: Source::put_back                  the next one builds on the same parent, under a new number
//! ```
//!
//! Invariants: a delta's parent is the last checkpoint that was *stored*; a number is used once, whatever came of it,
//! so no two states have one name; a capture that was not stored is put back, so no page is missing from the next.
//!
//! What it never does: it does not ship, drop or merge, it does not decide when a checkpoint is due, and it leaves
//! what was stored before alone.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use segment::{CheckpointId, Epoch, Generation, Kind, Manifest, SegmentName, Summary, VmId};

use crate::checkpoint::{
    CaptureKind, Captured, EncodeError, EncodeOptions, EncodePool, LevelControl, Seen, Source, SourceError,
};
use crate::store::{Entry, FsStore, StoreError, Stored};

/// Deltas on one full checkpoint, unless told otherwise.
pub const DEFAULT_MAX_LINKS: u32 = 1000;

/// How a VM is protected.
#[derive(Debug, Clone)]
pub struct ProtectOptions {
    /// The zstd level.
    pub level: i32,
    /// Threads that compress.
    pub threads: usize,
    /// Who writes the segments, for the manifest: program and version.
    pub producer: String,
    /// Deltas on one full checkpoint, after which the next is full.
    pub max_links: u32,
    /// The most bytes of pages kept as they were last stored: one that is written again is stored as a change.
    pub delta_cache: usize,
    /// What the first checkpoint builds on. `None` makes it full; a VM restored from a checkpoint, whose monitor
    /// tracks dirty pages from that state on, gives that one.
    pub first: Option<Parent>,
}

impl Default for ProtectOptions {
    fn default() -> Self {
        let EncodeOptions { level, threads } = EncodeOptions::default();
        let producer = concat!("understudy ", env!("CARGO_PKG_VERSION")).to_owned();
        Self {
            level,
            threads,
            producer,
            max_links: DEFAULT_MAX_LINKS,
            delta_cache: 0,
            first: None,
        }
    }
}

/// What the next delta builds on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    /// The checkpoint's name.
    pub name: SegmentName,
    /// Its identity.
    pub checkpoint: CheckpointId,
    /// Deltas down to its full checkpoint.
    pub links: u32,
}

impl From<&Entry> for Parent {
    fn from(entry: &Entry) -> Self {
        Self {
            name: entry.name.clone(),
            checkpoint: entry.checkpoint,
            links: entry.links,
        }
    }
}

/// One request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckpointRequest {
    /// Every page, though a delta would do.
    pub full: bool,
    /// A name the user gives it.
    pub label: Option<String>,
}

/// A checkpoint that was taken and is in the local store.
#[derive(Debug, Clone)]
pub struct Taken {
    /// The stored segment.
    pub entry: Entry,
    /// How long the guest stood still.
    pub stopped: Duration,
    /// What was written.
    pub summary: Summary,
    /// How long encoding and storing took, after the guest went on.
    pub encode_time: Duration,
}

/// Why a checkpoint was not taken. The guest runs on, and every earlier checkpoint is in place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProtectError {
    /// The monitor could not capture.
    #[error("capture {name}")]
    Capture {
        /// What it was to be.
        name: SegmentName,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// The monitor gave a delta where a full capture was needed.
    #[error("the monitor gave only the changes for {name}, and every page was asked for")]
    NotFull {
        /// What it was to be.
        name: SegmentName,
    },
    /// It could not be written.
    #[error("write {name}")]
    Write {
        /// What it was to be.
        name: SegmentName,
        /// Why.
        #[source]
        source: Box<EncodeError>,
    },
}

impl ProtectError {
    /// The store's refusal, when that is the reason: no room, fenced.
    #[must_use]
    pub fn store_error(&self) -> Option<&StoreError> {
        match self {
            Self::Write { source, .. } => match &**source {
                EncodeError::Store(source) => Some(source),
                EncodeError::Malformed { .. } | EncodeError::Segment { .. } => None,
            },
            Self::Capture { .. } | Self::NotFull { .. } => None,
        }
    }
}

/// Names and parents of the checkpoints of one generation: pure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    vm: VmId,
    generation: Generation,
    /// The last number given out.
    last: Epoch,
    parent: Option<Parent>,
    full_requested: bool,
    max_links: u32,
}

/// What the next checkpoint will be, if it succeeds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// Its name, never given out again.
    pub name: SegmentName,
    /// What it builds on; none makes it full.
    pub parent: Option<Parent>,
}

impl Ticket {
    fn kind(&self) -> CaptureKind {
        match self.parent {
            None => CaptureKind::Full,
            Some(_) => CaptureKind::Delta,
        }
    }

    /// The manifest of what was captured for it. A full capture needs no parent, also where it was to have one.
    fn manifest(&self, captured: &Captured, producer: &str, label: Option<String>) -> Manifest {
        let (kind, links) = match &self.parent {
            Some(Parent {
                name,
                checkpoint,
                links,
            }) if !captured.full => (
                Kind::Delta {
                    parent: name.clone(),
                    parent_checkpoint: *checkpoint,
                },
                links.saturating_add(1),
            ),
            Some(_) | None => (Kind::Full, 0),
        };
        Manifest {
            name: self.name.clone(),
            checkpoint: captured.checkpoint,
            kind,
            links,
            created_unix_ns: captured.created_unix_ns,
            producer: producer.to_owned(),
            spaces: captured.spaces.iter().map(|pages| pages.space.clone()).collect(),
            first_epoch: None,
            label,
            encryption: None,
        }
    }
}

impl Sequence {
    /// A sequence that goes on after `last` (0 when it begins), with a delta on `parent` or with a full one.
    #[must_use]
    pub fn new(
        vm: VmId,
        generation: Generation,
        last: Epoch,
        parent: Option<Parent>,
        max_links: u32,
    ) -> Self {
        Self {
            vm,
            generation,
            last,
            parent,
            full_requested: false,
            max_links,
        }
    }

    /// Gives out the next name. It is used up, whatever comes of it: a checkpoint that failed half-way may have left
    /// its name on a disk.
    pub fn next(&mut self, full: bool) -> Ticket {
        self.last = self.last.next();
        let name = SegmentName::new(self.vm.clone(), self.generation, self.last);
        let full = full || self.full_requested;
        let parent = self
            .parent
            .clone()
            .filter(|parent| !full && parent.links < self.max_links);
        Ticket { name, parent }
    }

    /// The checkpoint is stored: the next one builds on it.
    pub fn stored(&mut self, entry: &Entry) {
        if entry.kind.is_full() {
            self.full_requested = false;
        }
        self.parent = Some(Parent::from(entry));
    }

    /// Makes the next checkpoint that succeeds a full one.
    pub fn request_full(&mut self) {
        self.full_requested = true;
    }

    /// What the next delta builds on.
    #[must_use]
    pub fn parent(&self) -> Option<&Parent> {
        self.parent.as_ref()
    }
}

/// Takes one VM's checkpoints, one after the other.
#[derive(Debug)]
pub struct Protector<S: Source> {
    source: S,
    store: Arc<FsStore>,
    pool: EncodePool,
    level: LevelControl,
    producer: String,
    sequence: Sequence,
}

impl<S: Source> Protector<S> {
    /// Protects `source` as `vm`, in the name of `generation`, into its host's own store. Numbers go on after the
    /// highest of this generation that is there.
    #[must_use]
    pub fn new(
        source: S,
        store: Arc<FsStore>,
        vm: VmId,
        generation: Generation,
        options: ProtectOptions,
    ) -> Self {
        let ProtectOptions {
            level,
            threads,
            producer,
            max_links,
            delta_cache,
            first,
        } = options;
        let of_generation = |entry: &Entry| (entry.name.generation == generation).then_some(entry.name.epoch);
        let last = store
            .entries(&vm)
            .iter()
            .filter_map(of_generation)
            .max()
            .unwrap_or_default();
        let pool = EncodePool::with_delta_cache(EncodeOptions { level, threads }, delta_cache);
        Self {
            source,
            store,
            pool,
            level: LevelControl::new(level),
            producer,
            sequence: Sequence::new(vm, generation, last, first, max_links),
        }
    }

    /// Takes one checkpoint into the local store. Returns when it is there; the guest has been running since its
    /// capture.
    ///
    /// # Errors
    /// When it could not be captured or stored. Then the guest runs on, the pages are put back, and the next one
    /// builds on the same parent.
    pub fn checkpoint(&mut self, request: CheckpointRequest) -> Result<Taken, ProtectError> {
        let ticket = self.sequence.next(request.full);
        let name = ticket.name.clone();
        let captured = match self.source.capture(ticket.kind()) {
            Ok(captured) => captured,
            Err(source) => return Err(ProtectError::Capture { name, source }),
        };
        let begun = Instant::now();
        match self.store(&ticket, &captured, request.label) {
            Ok((stored, summary)) => {
                let entry = stored.entry().clone();
                self.sequence.stored(&entry);
                Ok(Taken {
                    entry,
                    stopped: captured.stopped,
                    summary,
                    encode_time: begun.elapsed(),
                })
            }
            Err(e) => {
                // Reading the dirty log cleared it: without this the next delta would lack these pages.
                self.source.put_back(&captured);
                Err(e)
            }
        }
    }

    fn store(
        &self,
        ticket: &Ticket,
        captured: &Captured,
        label: Option<String>,
    ) -> Result<(Stored, Summary), ProtectError> {
        let name = || ticket.name.clone();
        if ticket.parent.is_none() && !captured.full {
            return Err(ProtectError::NotFull { name: name() });
        }
        let manifest = ticket.manifest(captured, &self.producer, label);
        self.pool
            .encode_to_store(captured, &manifest, &self.store)
            .map_err(|source| ProtectError::Write {
                name: name(),
                source: Box::new(source),
            })
    }

    /// Adapts the compression level to what was seen with the last checkpoint: how long it took, and how much waits
    /// to be shipped.
    pub fn adapt(&mut self, seen: Seen) {
        self.pool.set_level(self.level.after(seen));
    }

    /// Makes the next checkpoint a full one: a holder has nothing the next delta could build on.
    pub fn request_full(&mut self) {
        self.sequence.request_full();
    }

    /// Pauses the guest for good and says why.
    pub fn fence(&mut self, reason: &str) {
        self.source.fence(reason);
    }

    /// What the next delta builds on: the last checkpoint that was stored.
    #[must_use]
    pub fn parent(&self) -> Option<&Parent> {
        self.sequence.parent()
    }

    /// The VM.
    pub fn source_mut(&mut self) -> &mut S {
        &mut self.source
    }

    /// Gives the VM back.
    pub fn into_source(self) -> S {
        self.source
    }
}
