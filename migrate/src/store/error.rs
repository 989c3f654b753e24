//! What can go wrong in a store, in the words a user needs.

use std::io;
use std::path::{Path, PathBuf};

use segment::{CheckpointId, Generation, SegmentName, VmId};

use super::Stored;
use crate::crashsafe::DiskError;

/// Why a store could not do what was asked. Nothing that was stored before is lost by any of them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has the store open.
    #[error(
        "the store {} is in use by another process{}: stop that one, or give this one a directory of its own",
        dir.display(), pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
    )]
    Locked {
        /// The store's directory.
        dir: PathBuf,
        /// The process that has it, when it left its number.
        pid: Option<u32>,
    },
    /// The directory does not exist and may not be made (only when reading).
    #[error("there is no store in {}", dir.display())]
    NoStore {
        /// The directory that was named.
        dir: PathBuf,
    },
    /// A change was asked of a store opened for reading.
    #[error("the store {} was opened for reading only", dir.display())]
    ReadOnly {
        /// The store's directory.
        dir: PathBuf,
    },
    /// The budget does not have room.
    #[error(
        "the store {} is full: {need} bytes are needed and {used} of {budget} are used; raise its bound, keep less \
         (`standby keep`), or remove what is no longer needed",
        dir.display()
    )]
    Full {
        /// The store's directory.
        dir: PathBuf,
        /// Bytes that were asked for.
        need: u64,
        /// Bytes stored and reserved.
        used: u64,
        /// The bound.
        budget: u64,
    },
    /// The disk under the store does not have room.
    #[error(
        "the disk under {} is full{}: free some space there; what was stored before is untouched",
        dir.display(), .free.map(|free| format!(" ({free} bytes are free)")).unwrap_or_default()
    )]
    DiskFull {
        /// The store's directory.
        dir: PathBuf,
        /// What the disk said was free, when that is how it was found out.
        free: Option<u64>,
        /// What the system said, when that is how it was found out.
        #[source]
        source: Option<io::Error>,
    },
    /// This very checkpoint is held already. Not a failure: it can be acknowledged.
    #[error("{} is held already", stored.entry().name)]
    AlreadyHeld {
        /// Proof that it is stored; its entry says which checkpoint it is.
        stored: Box<Stored>,
    },
    /// The name is taken by another checkpoint.
    #[error(
        "{name} is stored here as checkpoint {held}, and what was offered is checkpoint {offered}: two owners used \
         one name"
    )]
    DuplicateName {
        /// The name.
        name: SegmentName,
        /// The checkpoint that is held.
        held: CheckpointId,
        /// The checkpoint that was refused.
        offered: CheckpointId,
    },
    /// A newer owner has been promised.
    #[error("{vm} belongs to generation {current} now: generation {asked} is refused")]
    Fenced {
        /// The VM.
        vm: VmId,
        /// The generation that was asked for.
        asked: Generation,
        /// The generation that is promised.
        current: Generation,
    },
    /// Longer than any segment may be.
    #[error("a segment of {bytes} bytes is refused: the most is {max}")]
    TooLong {
        /// The length that was announced.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// More was written than was announced.
    #[error("{name} is longer than the {announced} bytes it was announced with")]
    Overrun {
        /// The name.
        name: SegmentName,
        /// The length that was announced.
        announced: u64,
    },
    /// The content says another name than the one it was sent under.
    #[error("what was sent as {expected} says it is {found}")]
    OtherName {
        /// The name it was begun with.
        expected: SegmentName,
        /// The name in its manifest.
        found: SegmentName,
    },
    /// It is not held here.
    #[error("{name} is not in the store {}", dir.display())]
    NotHeld {
        /// The name.
        name: SegmentName,
        /// The store's directory.
        dir: PathBuf,
    },
    /// What the file holds is not a whole, undamaged segment.
    #[error("the segment {name} is damaged or incomplete")]
    Damaged {
        /// The name.
        name: SegmentName,
        /// Where and how.
        #[source]
        source: segment::FormatError,
    },
    /// A promise cannot be read. What has been promised is then unknown, so nothing may be accepted.
    #[error(
        "the promise in {} is damaged ({why}): it must not be guessed. Restore the file, or give this node an empty \
         store and let it be filled again",
        path.display()
    )]
    DamagedPromise {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// What a segment stands on is not all here.
    #[error("the chain of {tip} is not whole here")]
    Chain {
        /// The segment.
        tip: SegmentName,
        /// What is missing.
        #[source]
        source: Box<ChainError>,
    },
    /// A merge of nothing.
    #[error("no segments were named to be merged")]
    NothingToMerge,
    /// What is to be merged is encrypted, and the key is not here.
    #[error(
        "{name} cannot be merged: it is encrypted with key {key}, which is not among the keys here. Name the file that has \
         it (--key-file)"
    )]
    NoKey {
        /// The segment.
        name: SegmentName,
        /// The key.
        key: segment::KeyId,
    },
    /// The segments given are not one run of links.
    #[error("cannot merge {first} to {last}: {why}")]
    NotARun {
        /// The oldest given.
        first: SegmentName,
        /// The newest given.
        last: SegmentName,
        /// What does not fit.
        why: String,
    },
    /// The merge itself failed. The segments are as they were.
    #[error("merge {first} to {last}")]
    Merge {
        /// The oldest.
        first: SegmentName,
        /// The newest.
        last: SegmentName,
        /// Why.
        #[source]
        source: Box<segment::MergeError>,
    },
    /// The system refused something on a path.
    #[error("{what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl StoreError {
    /// A refusal of the disk, where "no room" is what a user has to hear first.
    pub(crate) fn from_disk(dir: &Path, error: DiskError) -> Self {
        if error.is_full() {
            return Self::DiskFull {
                dir: dir.to_owned(),
                free: None,
                source: Some(error.source),
            };
        }
        let DiskError { what, path, source } = error;
        Self::Io { what, path, source }
    }

    /// Whether there is no room: in the budget or on the disk.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::DiskFull { .. })
    }
}

/// Why a chain of segments is not whole.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// A link is not here.
    #[error("{link} is missing{}", if link == wanted_by { String::new() } else { format!(": {wanted_by} builds on it") })]
    Missing {
        /// The segment that is not here.
        link: SegmentName,
        /// The segment that names it as its parent (itself when it is the tip that is missing).
        wanted_by: SegmentName,
    },
    /// A link has the right name and is another checkpoint.
    #[error("{link} is checkpoint {held}, and {wanted_by} builds on checkpoint {wanted}")]
    WrongCheckpoint {
        /// The segment with the right name.
        link: SegmentName,
        /// The segment that names it as its parent.
        wanted_by: SegmentName,
        /// The checkpoint it should be.
        wanted: CheckpointId,
        /// The checkpoint it is.
        held: CheckpointId,
    },
    /// More links than any chain may have.
    #[error("the chain of {tip} has more than {max} links: fold it")]
    TooLong {
        /// Where it begins.
        tip: SegmentName,
        /// The limit.
        max: usize,
    },
    /// It comes back to itself.
    #[error("the chain of {tip} comes back to {link}")]
    Cycle {
        /// Where it begins.
        tip: SegmentName,
        /// Where it comes back to.
        link: SegmentName,
    },
}
