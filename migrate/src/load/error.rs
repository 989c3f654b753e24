//! Why a VM cannot be loaded, in the words a user needs.

use std::error::Error;
use std::fmt;
use std::path::PathBuf;

use segment::{FormatError, PageIndex, SegmentName, SpaceId};

use crate::store::{ChainError, StoreError};

/// Why a target did not take pages.
#[derive(Debug)]
pub struct TargetError(Box<dyn Error + Send + Sync>);

impl TargetError {
    /// Wraps the monitor's error (or a text).
    pub fn new(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(source.into())
    }
}

impl fmt::Display for TargetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl Error for TargetError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

/// Why a VM cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// No file was named.
    #[error("no segment was named")]
    Nothing,
    /// The chain is not whole.
    #[error("the chain of {tip} is not whole")]
    Chain {
        /// What was to be loaded.
        tip: SegmentName,
        /// Which link, and who wants it.
        #[source]
        source: Box<ChainError>,
    },
    /// A segment could not be opened.
    #[error("open a segment of the chain")]
    Store(#[source] StoreError),
    /// The global store does not give it.
    #[error(transparent)]
    Global(Box<crate::global::GlobalError>),
    /// A file could not be opened.
    #[error("open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file is not a segment.
    #[error("{} is not a usable segment", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: FormatError,
    },
    /// Two files hold one name.
    #[error("{} and {} both hold {name}: name one of them", first.display(), second.display())]
    SameName {
        /// The name.
        name: SegmentName,
        /// The one file.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// A file was named that has no part in the chain.
    #[error("{} is {name}, which {tip} does not build on: leave it out", path.display())]
    NotInChain {
        /// The file.
        path: PathBuf,
        /// What it holds.
        name: SegmentName,
        /// The newest segment named.
        tip: SegmentName,
    },
    /// Two links are of differently shaped machines.
    #[error("{link} has other address spaces than {tip}, which builds on it: they are not of one machine")]
    SpacesDiffer {
        /// The older link.
        link: SegmentName,
        /// The newest.
        tip: SegmentName,
    },
    /// The machine is too large.
    #[error("{tip} has {pages} pages: the most is {max}")]
    TooLarge {
        /// What was to be loaded.
        tip: SegmentName,
        /// Pages of all spaces.
        pages: u64,
        /// The limit.
        max: u64,
    },
    /// A link is damaged, or could not be read.
    #[error("read {name}")]
    Segment {
        /// The link.
        name: SegmentName,
        /// Which part, and why.
        #[source]
        source: FormatError,
    },
    /// A page is a change of one that no link has.
    #[error(
        "page {page} of space {space} in {name} is a change of a page that no older link has: the segment is damaged, \
         load the chain from another holder"
    )]
    NoBase {
        /// The link with the change.
        name: SegmentName,
        /// The space.
        space: SpaceId,
        /// The page.
        page: PageIndex,
    },
    /// A link was merged or replaced while the chain was being loaded.
    #[error("{name} was rewritten meanwhile: load again")]
    Changed {
        /// The link.
        name: SegmentName,
    },
    /// The target did not take a page.
    #[error("write page {page} of space {space}, from {name}")]
    Target {
        /// The link it came from.
        name: SegmentName,
        /// The space.
        space: SpaceId,
        /// The first page of the run.
        page: PageIndex,
        /// Why.
        #[source]
        source: TargetError,
    },
}
