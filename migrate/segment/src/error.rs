//! What can be wrong with a segment, in words an operator can act on.

use std::borrow::Cow;
use std::io;

use crate::{Features, KeyId, SegmentName, limits};

/// Where in a segment something is wrong: a field, a frame, a record.
pub type Place = Cow<'static, str>;

/// Why bytes are not a segment this version reads, or why a segment would not be one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The major version is newer than this reader's.
    #[error(
        "segment format {major}.{minor} is newer than this program's ({known}): \
         read it with the version that wrote it, or a later one"
    )]
    NewerVersion {
        /// The file's major version.
        major: u16,
        /// The file's minor version.
        minor: u16,
        /// The newest major version this program reads.
        known: u16,
    },
    /// The segment uses features a reader has to know, and this one does not.
    #[error(
        "the segment needs features this program does not have ({features}): \
         read it with the version that wrote it, or a later one"
    )]
    UnknownFeatures {
        /// Those it does not know.
        features: Features,
    },
    /// There are fewer bytes than there have to be.
    #[error("{what} is cut short: {need} bytes needed, {have} there; copy the segment again")]
    Truncated {
        /// What is cut short.
        what: Place,
        /// How many bytes it takes.
        need: u64,
        /// How many there are.
        have: u64,
    },
    /// The bytes are not those that were written.
    #[error("{what} is damaged: its digest does not match; fetch the segment from another holder")]
    Digest {
        /// What is damaged.
        what: Place,
    },
    /// What is asked for is encrypted, and the key is not there.
    #[error(
        "segment {segment} is encrypted with key {key}, which is not among the keys given: \
         name the file that has it (--key-file)"
    )]
    NoKey {
        /// The segment.
        segment: SegmentName,
        /// The key.
        key: KeyId,
    },
    /// What is encrypted does not fit its key and the rest of the segment.
    #[error(
        "{what} of segment {segment} was not written with key {key}, or was changed: \
         fetch the segment from another holder"
    )]
    Forged {
        /// What does not fit.
        what: Place,
        /// The segment.
        segment: SegmentName,
        /// The key that it says it is encrypted with.
        key: KeyId,
    },
    /// A length is above its limit.
    #[error("{what} is too large: {bytes}, at most {max} allowed")]
    TooLarge {
        /// What is too large.
        what: Place,
        /// How large it says it is.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// Something breaks a rule of the format.
    #[error("{what} is not valid: {why}")]
    Invalid {
        /// The field or frame.
        what: Place,
        /// The rule it breaks.
        why: Cow<'static, str>,
    },
    /// The CBOR is well-formed but not what belongs there.
    #[error("decode {what}")]
    Cbor {
        /// What was decoded.
        what: Place,
        /// What the decoder said.
        #[source]
        source: Box<minicbor::decode::Error>,
    },
    /// Compressing or decompressing failed.
    #[error("{action} {what}")]
    Zstd {
        /// "compress" or "decompress".
        action: &'static str,
        /// What was being compressed or decompressed.
        what: Place,
        /// What zstd said.
        #[source]
        source: io::Error,
    },
    /// The source could not be read.
    #[error("read {what}")]
    Io {
        /// What was being read.
        what: Place,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl FormatError {
    pub(crate) fn invalid(what: impl Into<Place>, why: impl Into<Cow<'static, str>>) -> Self {
        Self::Invalid {
            what: what.into(),
            why: why.into(),
        }
    }

    pub(crate) fn newer(major: u16, minor: u16) -> Self {
        Self::NewerVersion {
            major,
            minor,
            known: crate::header::MAJOR,
        }
    }
}

/// Refuses `bytes` of `what` above `max`.
pub(crate) fn at_most<P: Into<Place>>(
    what: impl FnOnce() -> P,
    bytes: u64,
    max: u64,
) -> Result<(), FormatError> {
    if bytes > max {
        Err(FormatError::TooLarge {
            what: what().into(),
            bytes,
            max,
        })
    } else {
        Ok(())
    }
}

/// Refuses a text that is empty, longer than a manifest's texts may be, or has control characters (it will be
/// shown on terminals).
pub(crate) fn plain_text(what: &'static str, text: &str) -> Result<(), FormatError> {
    at_most(|| what, text.len() as u64, limits::MAX_TEXT_BYTES as u64)?;
    if text.is_empty() {
        return Err(FormatError::invalid(what, "it is empty"));
    }
    if text.chars().any(char::is_control) {
        return Err(FormatError::invalid(what, "it has a control character"));
    }
    Ok(())
}

/// Why a segment could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The content breaks a rule of the format: no reader would take it.
    #[error("refuse to write a segment that is not valid")]
    Format(
        #[from]
        #[source]
        FormatError,
    ),
    /// The output could not be written.
    #[error("write the segment's {what}")]
    Io {
        /// What was being written.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Why segments could not be merged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// There was nothing to merge.
    #[error("no segments to merge")]
    Empty,
    /// Two neighbours are not parent and child.
    #[error("{child} does not follow {parent}: {why}")]
    Broken {
        /// The older one.
        parent: SegmentName,
        /// The newer one.
        child: SegmentName,
        /// What does not fit.
        why: String,
    },
    /// An input could not be read.
    #[error("read segment {name}")]
    Read {
        /// The input.
        name: SegmentName,
        /// Why not.
        #[source]
        source: FormatError,
    },
    /// A page is a change of one that none of the segments before has, down to a full one.
    #[error(
        "page {page} of space {space} in segment {name} is a change of a page that no earlier segment has: \
         fetch the chain from another holder"
    )]
    NoBase {
        /// Where the change is.
        name: SegmentName,
        /// The space.
        space: crate::SpaceId,
        /// The page.
        page: crate::PageIndex,
    },
    /// An input is encrypted, and the result would not be.
    #[error("segment {name} is encrypted with key {key}, and what it is merged into would not be")]
    Plain {
        /// The input.
        name: SegmentName,
        /// Its key.
        key: KeyId,
    },
    /// The result could not be written.
    #[error("write the merged segment {name}")]
    Write {
        /// The result.
        name: SegmentName,
        /// Why not.
        #[source]
        source: WriteError,
    },
}
