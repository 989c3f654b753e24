//! The index: one entry of 80 bytes for each frame, so that a page is found without reading the body.
//!
//! ```text
//!   0  2  space            24  8  offset in the body      40  4  data pages
//!   2  2  codec            32  4  stored bytes            44  4  zero pages
//!   4  2  same pages         36  4  raw bytes               48 32  digest of the stored bytes
//!   6  2  change pages
//!   8  8  first page
//!  16  8  end page
//! ```
//!
//! Entries are in ascending order of space and page, their ranges do not overlap, and in that order the frames
//! fill the body without a gap.

use std::fmt;
use std::ops::Range;

use crate::error::at_most;
use crate::header::le;
use crate::limits::{self, ENTRY_BYTES};
use crate::{Digest, Features, FormatError, Manifest, SpaceId};

/// The number of a page in its address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageIndex(pub u64);

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How a frame is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Codec {
    /// As it is: compression did not make it shorter.
    Stored = 0,
    /// One zstd frame.
    Zstd = 1,
}

/// What the index says about one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameEntry {
    /// The address space.
    pub space: SpaceId,
    /// How it is stored.
    pub codec: Codec,
    /// The first page in it.
    pub first_page: PageIndex,
    /// The page after the last one in it.
    pub end_page: PageIndex,
    /// Where in the body it begins.
    pub offset: u64,
    /// Its length in the body.
    pub stored_bytes: u32,
    /// Its length once decompressed: page table and data.
    pub raw_bytes: u32,
    /// How many pages it has with data, those stored as changes included.
    pub data_pages: u32,
    /// How many pages it has that are zero.
    pub zero_pages: u32,
    /// How many pages it has that are the same as others of the segment.
    pub same_pages: u16,
    /// How many of the pages with data are changes of the parent's.
    pub change_pages: u16,
    /// The digest of its stored bytes.
    pub digest: Digest,
}

impl FrameEntry {
    /// The range its pages are in; not every page of it need be in the frame.
    #[must_use]
    pub fn pages(&self) -> Range<PageIndex> {
        self.first_page..self.end_page
    }

    /// The bytes behind the page table: the checks of changes, and the data.
    pub(crate) fn payload_bytes(&self, page_bytes: u32) -> u64 {
        u64::from(self.data_pages) * u64::from(page_bytes)
            + u64::from(self.change_pages) * limits::CHECK_BYTES as u64
    }

    pub(crate) fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &self.space.0.to_le_bytes());
        put(2, &(self.codec as u16).to_le_bytes());
        put(4, &self.same_pages.to_le_bytes());
        put(6, &self.change_pages.to_le_bytes());
        put(8, &self.first_page.0.to_le_bytes());
        put(16, &self.end_page.0.to_le_bytes());
        put(24, &self.offset.to_le_bytes());
        put(32, &self.stored_bytes.to_le_bytes());
        put(36, &self.raw_bytes.to_le_bytes());
        put(40, &self.data_pages.to_le_bytes());
        put(44, &self.zero_pages.to_le_bytes());
        put(48, &self.digest.0);
        bytes
    }

    fn decode(i: usize, bytes: &[u8; ENTRY_BYTES]) -> Result<Self, FormatError> {
        let codec = match u16::from_le_bytes(le(bytes, 2)) {
            0 => Codec::Stored,
            1 => Codec::Zstd,
            other => {
                return Err(FormatError::invalid(
                    place(i),
                    format!("codec {other} is not known"),
                ));
            }
        };
        Ok(Self {
            space: SpaceId(u16::from_le_bytes(le(bytes, 0))),
            codec,
            first_page: PageIndex(u64::from_le_bytes(le(bytes, 8))),
            end_page: PageIndex(u64::from_le_bytes(le(bytes, 16))),
            offset: u64::from_le_bytes(le(bytes, 24)),
            stored_bytes: u32::from_le_bytes(le(bytes, 32)),
            raw_bytes: u32::from_le_bytes(le(bytes, 36)),
            data_pages: u32::from_le_bytes(le(bytes, 40)),
            zero_pages: u32::from_le_bytes(le(bytes, 44)),
            same_pages: u16::from_le_bytes(le(bytes, 4)),
            change_pages: u16::from_le_bytes(le(bytes, 6)),
            digest: Digest(le(bytes, 48)),
        })
    }
}

fn place(i: usize) -> String {
    format!("index entry {i}")
}

/// Checks entries one after the other against the manifest and each other; reader and writer share it.
#[derive(Debug)]
pub(crate) struct IndexCheck {
    /// The features the header names; a writer's are those that come to be used.
    features: Features,
    entries: usize,
    /// The space and end page of the last entry.
    last: Option<(SpaceId, PageIndex)>,
    /// Where the next frame has to begin.
    pub(crate) body_bytes: u64,
}

impl IndexCheck {
    pub(crate) fn new(features: Features) -> Self {
        Self {
            features,
            entries: 0,
            last: None,
            body_bytes: 0,
        }
    }

    pub(crate) fn take(&mut self, manifest: &Manifest, entry: &FrameEntry) -> Result<(), FormatError> {
        let i = self.entries;
        let bad = |why: String| FormatError::invalid(place(i), why);
        at_most(|| "number of frames", i as u64 + 1, limits::MAX_FRAMES.into())?;
        let space = manifest
            .space(entry.space)
            .ok_or_else(|| bad(format!("space {} is not in the manifest", entry.space)))?;
        let (first, end) = (entry.first_page, entry.end_page);
        if first >= end || end.0 > space.pages {
            let why = format!("pages {first} to {end} of a space with {} pages", space.pages);
            return Err(bad(why));
        }
        if let Some((last_space, last_end)) = self.last
            && (entry.space < last_space || entry.space == last_space && first < last_end)
        {
            return Err(bad(format!(
                "page {first} of space {} comes after page {last_end} of space {last_space}: \
                 out of order or overlapping",
                entry.space
            )));
        }
        check_features(i, entry, self.features)?;
        check_sizes(i, entry, space.page_bytes, manifest.encryption.is_some())?;
        if manifest.kind.is_full() && entry.change_pages != 0 {
            return Err(bad(
                "a full segment has nothing that a page could be a change of".into()
            ));
        }
        if manifest.kind.is_full() && entry.zero_pages != 0 {
            return Err(bad("a full segment holds no zero pages".into()));
        }
        if entry.offset != self.body_bytes {
            return Err(bad(format!(
                "it begins at {} of the body, the last one ended at {}",
                entry.offset, self.body_bytes
            )));
        }
        // At most MAX_FRAMES frames of at most MAX_FRAME_RAW_BYTES.
        let body_bytes = self.body_bytes + u64::from(entry.stored_bytes);
        at_most(|| "body", body_bytes, limits::MAX_BODY_BYTES)?;
        self.body_bytes = body_bytes;
        self.entries += 1;
        self.last = Some((entry.space, end));
        Ok(())
    }
}

/// What an entry uses, the header has to name.
fn check_features(i: usize, entry: &FrameEntry, features: Features) -> Result<(), FormatError> {
    for (pages, feature) in [
        (entry.same_pages, Features::SAME_PAGES),
        (entry.change_pages, Features::PAGE_CHANGES),
    ] {
        if pages != 0 && !features.has(feature) {
            let why =
                format!("{pages} pages that need the feature {feature}, which the header does not name");
            return Err(FormatError::invalid(place(i), why));
        }
    }
    Ok(())
}

fn check_sizes(i: usize, entry: &FrameEntry, page_bytes: u32, encrypted: bool) -> Result<(), FormatError> {
    let bad = |why: String| FormatError::invalid(place(i), why);
    let same = u64::from(entry.same_pages);
    let pages = u64::from(entry.data_pages) + u64::from(entry.zero_pages) + same;
    at_most(
        || format!("{}: pages", place(i)),
        pages,
        limits::MAX_FRAME_PAGES.into(),
    )?;
    if pages == 0 || pages > entry.end_page.0 - entry.first_page.0 {
        return Err(bad(format!(
            "{pages} pages in the range {} to {}",
            entry.first_page, entry.end_page
        )));
    }
    // Pages that are the same as others count too: a reader makes room for them.
    at_most(
        || format!("{}: page data", place(i)),
        (u64::from(entry.data_pages) + same) * u64::from(page_bytes),
        limits::MAX_FRAME_DATA_BYTES.into(),
    )?;
    if u32::from(entry.change_pages) > entry.data_pages {
        return Err(bad(format!(
            "{} changes among {} pages with data",
            entry.change_pages, entry.data_pages
        )));
    }
    let data = entry.payload_bytes(page_bytes);
    let raw = u64::from(entry.raw_bytes);
    at_most(
        || format!("{}: decompressed frame", place(i)),
        raw,
        data + u64::from(limits::MAX_TABLE_BYTES),
    )?;
    if raw <= data {
        return Err(bad(format!(
            "{raw} bytes do not hold {} pages and their table",
            entry.data_pages
        )));
    }
    let tag_bytes = if encrypted { limits::TAG_BYTES as u32 } else { 0 };
    let fits = entry
        .stored_bytes
        .checked_sub(tag_bytes)
        .is_some_and(|bytes| match entry.codec {
            Codec::Stored => bytes == entry.raw_bytes,
            Codec::Zstd => (1..entry.raw_bytes).contains(&bytes),
        });
    if !fits {
        return Err(bad(format!(
            "{} stored bytes for {raw} as {:?}",
            entry.stored_bytes, entry.codec
        )));
    }
    Ok(())
}

/// Reads and checks all entries; what is left behind them is not theirs.
pub(crate) fn decode(
    manifest: &Manifest,
    features: Features,
    bytes: &[u8],
    body_bytes: u64,
) -> Result<Vec<FrameEntry>, FormatError> {
    let (chunks, _) = bytes.as_chunks::<ENTRY_BYTES>();
    let mut check = IndexCheck::new(features);
    let mut entries = Vec::with_capacity(chunks.len());
    for (i, chunk) in chunks.iter().enumerate() {
        let entry = FrameEntry::decode(i, chunk)?;
        check.take(manifest, &entry)?;
        entries.push(entry);
    }
    if check.body_bytes != body_bytes {
        let why = format!(
            "its frames take {} bytes, the body has {body_bytes}",
            check.body_bytes
        );
        return Err(FormatError::invalid("index", why));
    }
    Ok(entries)
}
