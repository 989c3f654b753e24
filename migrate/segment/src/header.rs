//! The header: 128 bytes that say how long everything else is.
//!
//! ```text
//!   0   8  magic "UNDRSTDY"          36   4  records stored bytes
//!   8   2  major version             40   4  records raw bytes
//!  10   2  minor version             44   4  frame count
//!  12   4  header bytes              48   8  body bytes
//!  16   8  features to know          56   8  index bytes
//!  24   8  features to ignore        64  32  root digest
//!  32   4  manifest bytes            96  32  header digest
//! ```
//!
//! All numbers little-endian. The magic and the major version never move: whatever else a later version changes, a
//! reader can tell that it is later.

use crate::digest;
use crate::error::at_most;
use crate::limits::{self, HEADER_BYTES};
use crate::{Digest, Features, FormatError};

/// The first bytes of every segment.
pub(crate) const MAGIC: [u8; 8] = *b"UNDRSTDY";
/// The major version this crate reads and writes.
pub(crate) const MAJOR: u16 = 1;
/// How much of the header the root digest covers.
pub(crate) const ROOT_COVERS: usize = 64;
/// How much of the header the header digest covers.
const HEADER_COVERS: usize = 96;

/// The header of a segment, checked against the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The major version: 1.
    pub major: u16,
    /// The minor version. A later one adds only what an earlier reader may skip.
    pub minor: u16,
    /// Feature bits a reader has to know.
    pub features_required: Features,
    /// Feature bits a reader may ignore.
    pub features_optional: u64,
    /// The length of the manifest.
    pub manifest_bytes: u32,
    /// The length of the records as stored.
    pub records_stored_bytes: u32,
    /// The length of the records once decompressed.
    pub records_raw_bytes: u32,
    /// How many frames there are.
    pub frames: u32,
    /// The length of all frames as stored.
    pub body_bytes: u64,
    /// The length of the index.
    pub index_bytes: u64,
    /// The root digest: the digest of the segment.
    pub digest: Digest,
}

impl Header {
    /// Where the manifest begins.
    #[must_use]
    pub fn manifest_offset(&self) -> u64 {
        HEADER_BYTES as u64
    }

    /// Where the records begin.
    #[must_use]
    pub fn records_offset(&self) -> u64 {
        self.manifest_offset().saturating_add(self.manifest_bytes.into())
    }

    /// Where the frames begin.
    #[must_use]
    pub fn body_offset(&self) -> u64 {
        self.records_offset()
            .saturating_add(self.records_stored_bytes.into())
    }

    /// Where the index begins.
    #[must_use]
    pub fn index_offset(&self) -> u64 {
        self.body_offset().saturating_add(self.body_bytes)
    }

    /// The exact length of the whole file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.index_offset().saturating_add(self.index_bytes)
    }

    /// The bytes, with the header's own digest.
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(8, &self.major.to_le_bytes());
        put(10, &self.minor.to_le_bytes());
        put(12, &(HEADER_BYTES as u32).to_le_bytes());
        put(16, &self.features_required.0.to_le_bytes());
        put(24, &self.features_optional.to_le_bytes());
        put(32, &self.manifest_bytes.to_le_bytes());
        put(36, &self.records_stored_bytes.to_le_bytes());
        put(40, &self.records_raw_bytes.to_le_bytes());
        put(44, &self.frames.to_le_bytes());
        put(48, &self.body_bytes.to_le_bytes());
        put(56, &self.index_bytes.to_le_bytes());
        put(64, &self.digest.0);
        let own = digest::of_header(&bytes[..HEADER_COVERS]);
        bytes[HEADER_COVERS..].copy_from_slice(&own.0);
        bytes
    }

    fn check(&self, header_bytes: u32) -> Result<(), FormatError> {
        if header_bytes as usize != HEADER_BYTES {
            let why = format!("it says it is {header_bytes} bytes long, not {HEADER_BYTES}");
            return Err(FormatError::invalid("header length (offset 12)", why));
        }
        let unknown = self.features_required.unknown();
        if unknown != Features::NONE {
            return Err(FormatError::UnknownFeatures { features: unknown });
        }
        let limit = |what: &'static str, bytes: u64, max: u64| at_most(|| what, bytes, max);
        limit(
            "manifest (header offset 32)",
            self.manifest_bytes.into(),
            limits::MAX_MANIFEST_BYTES.into(),
        )?;
        limit(
            "stored records (header offset 36)",
            self.records_stored_bytes.into(),
            limits::MAX_RECORDS_STORED_BYTES.into(),
        )?;
        limit(
            "decompressed records (header offset 40)",
            self.records_raw_bytes.into(),
            limits::MAX_RECORDS_RAW_BYTES.into(),
        )?;
        limit(
            "frame count (header offset 44)",
            self.frames.into(),
            limits::MAX_FRAMES.into(),
        )?;
        limit("body (header offset 48)", self.body_bytes, limits::MAX_BODY_BYTES)?;
        // Nothing that is hostile makes this more than 2^22 entries and a tag.
        let tag_bytes = match self.features_required.has(Features::ENCRYPTED) {
            true => limits::INDEX_TAG_BYTES as u64,
            false => 0,
        };
        let index_bytes = u64::from(self.frames) * limits::ENTRY_BYTES as u64 + tag_bytes;
        if self.index_bytes != index_bytes {
            let why = format!(
                "{} bytes, but {} frames take {index_bytes}",
                self.index_bytes, self.frames
            );
            return Err(FormatError::invalid("index length (header offset 56)", why));
        }
        Ok(())
    }
}

/// Reads the header alone, from the first [`HEADER_BYTES`] of a segment (more may follow): a receiver learns how
/// long the file is, within the limits, before it takes anything else.
///
/// # Errors
/// When the bytes are fewer or are not a header, when the header is damaged, when the version or a feature is not
/// known, and when a length is above its limit.
pub fn read_prefix(bytes: &[u8]) -> Result<Header, FormatError> {
    let Some((bytes, _)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        let (need, have) = (HEADER_BYTES as u64, bytes.len() as u64);
        return Err(FormatError::Truncated {
            what: "header".into(),
            need,
            have,
        });
    };
    if bytes[..8] != MAGIC {
        return Err(FormatError::invalid(
            "magic (offset 0)",
            "this is not a segment file",
        ));
    }
    let u16_at = |at: usize| u16::from_le_bytes(le(bytes, at));
    let u32_at = |at: usize| u32::from_le_bytes(le(bytes, at));
    let u64_at = |at: usize| u64::from_le_bytes(le(bytes, at));
    let (major, minor) = (u16_at(8), u16_at(10));
    // Before the digest: a later version may keep its digest elsewhere, and should be called later, not damaged.
    if major > MAJOR {
        return Err(FormatError::newer(major, minor));
    }
    if digest::of_header(&bytes[..HEADER_COVERS]).0 != le::<32>(bytes, HEADER_COVERS) {
        return Err(FormatError::Digest {
            what: "header".into(),
        });
    }
    if major != MAJOR {
        return Err(FormatError::invalid(
            "major version (offset 8)",
            "there is no version 0",
        ));
    }
    let header = Header {
        major,
        minor,
        features_required: Features(u64_at(16)),
        features_optional: u64_at(24),
        manifest_bytes: u32_at(32),
        records_stored_bytes: u32_at(36),
        records_raw_bytes: u32_at(40),
        frames: u32_at(44),
        body_bytes: u64_at(48),
        index_bytes: u64_at(56),
        digest: Digest(le(bytes, ROOT_COVERS)),
    };
    header.check(u32_at(12))?;
    Ok(header)
}

/// `N` bytes at `at` of a fixed array.
///
/// # Panics
/// When they are not all inside: the layouts are constants of this crate, not the file's.
pub(crate) fn le<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}
