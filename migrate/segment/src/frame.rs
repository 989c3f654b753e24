//! Frames: a page table and the data of its pages, decompressed and checked.
//!
//! ```text
//! | run count u32 | per run: kind u8, gap varint, pages varint | checks of changes | data, back to back |
//! ```
//!
//! A gap counts the pages since the end of the run before (since the frame's first page for the first run). Kind 1
//! is data, 2 is zero, 3 is "the same as another page" (and how far that one is before, a varint), 4 is data that is
//! a change of the parent's page. Varints are LEB128, in their shortest form. A page in no run is not in the segment.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use zstd::bulk::Decompressor;

use crate::error::at_most;
use crate::index::{Codec, FrameEntry, PageIndex};
use crate::{Cipher, Digest, FormatError, ReadAt, SpaceId, digest, limits};

/// The kind of a run with data.
pub(crate) const KIND_DATA: u8 = 1;
/// The kind of a run of zero pages.
pub(crate) const KIND_ZERO: u8 = 2;
/// The kind of a run of pages that are all the same as one before.
pub(crate) const KIND_SAME: u8 = 3;
/// The kind of a run of pages that are changes of the parent's.
pub(crate) const KIND_CHANGE: u8 = 4;

/// The first bytes of the digest of a page's content: what a change has to come to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PageCheck(pub [u8; limits::CHECK_BYTES]);

impl PageCheck {
    /// The check of a page with this content.
    #[must_use]
    pub fn of(content: &[u8]) -> Self {
        let mut check = [0; limits::CHECK_BYTES];
        check.copy_from_slice(&digest::page(content).0[..limits::CHECK_BYTES]);
        Self(check)
    }
}

impl fmt::Debug for PageCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageCheck({:016x})", u64::from_be_bytes(self.0))
    }
}

/// What a frame says of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page<'a> {
    /// It is zero.
    Zero,
    /// Its bytes.
    Data(&'a [u8]),
    /// It is a change of what it is in the parent.
    Change {
        /// Its content XOR the content in the parent.
        xor: &'a [u8],
        /// What the check of its content is.
        check: PageCheck,
    },
}

/// What a run of pages holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunData<'a> {
    /// All are zero.
    Zero,
    /// The bytes of all of them, back to back.
    Data(&'a [u8]),
    /// Changes of what they are in the parent.
    Changes {
        /// Content XOR the content in the parent, of all of them back to back.
        xor: &'a [u8],
        /// The checks of their contents, of 8 bytes each.
        checks: &'a [[u8; limits::CHECK_BYTES]],
    },
}

/// Pages next to each other, of one kind.
#[derive(Debug, Clone, Copy)]
struct Run {
    first: u64,
    pages: u64,
    content: Content,
}

/// Where the content of a run's pages is.
#[derive(Debug, Clone, Copy)]
enum Content {
    Zero,
    /// Where in the frame its data begins.
    Data(usize),
    /// Where in the frame its changes and their checks begin.
    Change {
        at: usize,
        checks: usize,
    },
    /// The page they all are the same as: not resolved yet.
    Same(u64),
    /// The same, as copies behind the frame's own data.
    Copies(usize),
}

/// What of a segment its frames are read with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading<'a> {
    pub(crate) body_offset: u64,
    /// Of the frame's space.
    pub(crate) page_bytes: u32,
    pub(crate) full: bool,
    pub(crate) cipher: Option<&'a Cipher>,
}

/// Scratch memory for reading frames: use one for many frames, one per thread. It grows to the largest frame, at
/// most twice [`limits::MAX_FRAME_RAW_BYTES`] (twice that where pages are the same as others), and stays.
#[derive(Default)]
pub struct FrameBuf {
    stored: Vec<u8>,
    raw: Vec<u8>,
    runs: Vec<Run>,
    page_bytes: usize,
    decompressor: Option<Decompressor<'static>>,
    /// Pages that others were the same as.
    sources: Option<Box<Sources>>,
}

/// Pages that others are the same as, kept as long as frames of one segment are read: many are the same as few.
struct Sources {
    segment: Digest,
    pages: HashMap<(SpaceId, u64), Box<[u8]>>,
    bytes: usize,
    buf: FrameBuf,
}

impl Sources {
    fn of(segment: Digest) -> Box<Self> {
        Box::new(Self {
            segment,
            pages: HashMap::new(),
            bytes: 0,
            buf: FrameBuf::new(),
        })
    }

    fn keep(&mut self, space: SpaceId, page: u64, content: &[u8]) {
        if self.bytes + content.len() > limits::MAX_FRAME_DATA_BYTES as usize {
            self.pages.clear();
            self.bytes = 0;
        }
        self.bytes += content.len();
        self.pages.insert((space, page), content.into());
    }
}

impl std::fmt::Debug for FrameBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameBuf")
            .field("runs", &self.runs.len())
            .finish_non_exhaustive()
    }
}

impl FrameBuf {
    /// Empty scratch memory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads frame `i`: digest, then decryption, then decompression, then the page table. `entry` has passed the index's
    /// checks, so its sizes are within the limits. After an error the buffer holds no pages.
    pub(crate) fn load(
        &mut self,
        source: &(impl ReadAt + ?Sized),
        i: usize,
        entry: &FrameEntry,
        reading: Reading<'_>,
    ) -> Result<(), FormatError> {
        let Reading {
            body_offset,
            page_bytes,
            full,
            cipher,
        } = reading;
        self.page_bytes = page_bytes as usize;
        let what = || format!("frame {i}").into();
        let raw_bytes = entry.raw_bytes as usize;
        let stored = self.load_stored(source, i, entry, body_offset)?;
        let mut content_bytes = stored.len();
        if let Some(cipher) = cipher {
            cipher.open_frame(i, entry, stored)?;
            // The index's checks hold it above the tag.
            content_bytes -= limits::TAG_BYTES;
        }
        if entry.codec == Codec::Zstd {
            let raw = grown(&mut self.raw, raw_bytes);
            let length =
                decompress(&mut self.decompressor, &self.stored[..content_bytes], raw).map_err(|source| {
                    FormatError::Zstd {
                        action: "decompress",
                        what: what(),
                        source,
                    }
                })?;
            if length != raw_bytes {
                let why = format!("it decompresses to {length} bytes, the index says {raw_bytes}");
                return Err(FormatError::invalid(what(), why));
            }
        }
        let raw = &self.raw[..raw_bytes];
        parse(i, entry, page_bytes as usize, full, raw, &mut self.runs).inspect_err(|_| self.runs.clear())
    }

    /// Reads frame `i` as it is stored, and checks its digest. The buffer holds no pages then.
    pub(crate) fn load_stored(
        &mut self,
        source: &(impl ReadAt + ?Sized),
        i: usize,
        entry: &FrameEntry,
        body_offset: u64,
    ) -> Result<&mut [u8], FormatError> {
        self.runs.clear();
        let what = || format!("frame {i}").into();
        // A frame stored as it is lands where a compressed one is decompressed to.
        let landing = match entry.codec {
            Codec::Stored => &mut self.raw,
            Codec::Zstd => &mut self.stored,
        };
        let stored = grown(landing, entry.stored_bytes as usize);
        source
            .read_exact_at(body_offset.saturating_add(entry.offset), stored)
            .map_err(|source| FormatError::Io { what: what(), source })?;
        if digest::of_frame(stored) != entry.digest {
            return Err(FormatError::Digest { what: what() });
        }
        Ok(stored)
    }

    /// Gives pages of frame `i` that are the same as others the content of those. `locate` says which frame has a page
    /// in its range, and `load` reads one.
    pub(crate) fn resolve(
        &mut self,
        segment: Digest,
        i: usize,
        entry: &FrameEntry,
        locate: impl Fn(PageIndex) -> Option<usize>,
        load: impl Fn(usize, &mut Self) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        let resolved = self.try_resolve(segment, i, entry, locate, load);
        if resolved.is_err() {
            self.runs.clear();
        }
        resolved
    }

    fn try_resolve(
        &mut self,
        segment: Digest,
        i: usize,
        entry: &FrameEntry,
        locate: impl Fn(PageIndex) -> Option<usize>,
        load: impl Fn(usize, &mut Self) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        let mut sources = match self.sources.take() {
            Some(sources) if sources.segment == segment => sources,
            Some(_) | None => Sources::of(segment),
        };
        // Behind the frame's own bytes, so that one does not write over the other.
        let mut end = entry.raw_bytes as usize;
        let copies = usize::from(entry.same_pages) * self.page_bytes;
        grown(&mut self.raw, end + copies);
        let mut frames: Vec<usize> = Vec::new();
        for r in 0..self.runs.len() {
            let Run { pages, content, .. } = self.runs[r];
            let Content::Same(source) = content else { continue };
            let bad = |why: String| FormatError::invalid(format!("frame {i} run {r}"), why);
            let nothing = || {
                bad(format!(
                    "page {source}, which its pages are the same as, has no data of its own"
                ))
            };
            let start = end;
            // `parse` has counted the pages against the index, which `copies` is of.
            end += pages as usize * self.page_bytes;
            if source >= entry.first_page.0 {
                let at = self.own(source).ok_or_else(nothing)?;
                self.raw.copy_within(at..at + self.page_bytes, start);
            } else {
                let frame = locate(PageIndex(source)).ok_or_else(nothing)?;
                if !frames.contains(&frame) {
                    frames.push(frame);
                    at_most(
                        || format!("frame {i}: frames its pages are the same as pages of"),
                        frames.len() as u64,
                        limits::MAX_SAME_FRAMES as u64,
                    )?;
                }
                let key = (entry.space, source);
                if !sources.pages.contains_key(&key) {
                    let mut buf = std::mem::take(&mut sources.buf);
                    load(frame, &mut buf)?;
                    let at = buf.own(source).ok_or_else(nothing)?;
                    sources.keep(entry.space, source, &buf.raw[at..at + buf.page_bytes]);
                    sources.buf = buf;
                }
                let Some(page) = sources.pages.get(&key) else {
                    return Err(nothing());
                };
                self.raw[start..start + self.page_bytes].copy_from_slice(page);
            }
            for k in 1..pages as usize {
                self.raw
                    .copy_within(start..start + self.page_bytes, start + k * self.page_bytes);
            }
            self.runs[r].content = Content::Copies(start);
        }
        self.sources = Some(sources);
        Ok(())
    }

    /// Where the data of a page begins that is stored whole in this frame.
    fn own(&self, page: u64) -> Option<usize> {
        let r = self.runs.partition_point(|run| run.first + run.pages <= page);
        let run = self.runs.get(r).filter(|run| run.first <= page)?;
        match run.content {
            Content::Data(at) => Some(at + (page - run.first) as usize * self.page_bytes),
            Content::Zero | Content::Change { .. } | Content::Same(_) | Content::Copies(_) => None,
        }
    }

    /// The pages in the buffer.
    pub(crate) fn frame(&self) -> Frame<'_> {
        Frame {
            page_bytes: self.page_bytes,
            runs: &self.runs,
            raw: &self.raw,
        }
    }
}

/// Decompresses into `raw` and never beyond it, with a context that is made once.
fn decompress(
    context: &mut Option<Decompressor<'static>>,
    stored: &[u8],
    raw: &mut [u8],
) -> std::io::Result<usize> {
    let decompressor = match context {
        Some(decompressor) => decompressor,
        none => none.insert(Decompressor::new()?),
    };
    decompressor.decompress_to_buffer(stored, raw)
}

/// The first `length` bytes of `buf`, which grows when it has to.
fn grown(buf: &mut Vec<u8>, length: usize) -> &mut [u8] {
    if buf.len() < length {
        buf.resize(length, 0);
    }
    &mut buf[..length]
}

/// The pages of one frame, in ascending order.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    page_bytes: usize,
    runs: &'a [Run],
    raw: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Each page in it.
    pub fn pages(&self) -> impl Iterator<Item = (PageIndex, Page<'a>)> + use<'a> {
        let this = *self;
        (0..this.runs.len()).flat_map(move |r| {
            let pages = this.runs[r].pages;
            (0..pages).filter_map(move |k| this.page(r, k))
        })
    }

    /// Its pages as runs: the range, and what the pages of the whole range hold. For copying many pages at once.
    pub fn runs(&self) -> impl Iterator<Item = (Range<u64>, RunData<'a>)> + use<'a> {
        let this = *self;
        this.runs.iter().map(move |run| {
            let bytes = |at: usize| &this.raw[at..at + run.pages as usize * this.page_bytes];
            let data = match run.content {
                // `resolve` has left no page unresolved.
                Content::Zero | Content::Same(_) => RunData::Zero,
                Content::Data(at) | Content::Copies(at) => RunData::Data(bytes(at)),
                Content::Change { at, checks } => RunData::Changes {
                    xor: bytes(at),
                    checks: this.raw[checks..].as_chunks().0.split_at(run.pages as usize).0,
                },
            };
            (run.first..run.first + run.pages, data)
        })
    }

    /// What it says of `page`, if it is in it.
    #[must_use]
    pub fn get(&self, page: PageIndex) -> Option<Page<'a>> {
        let r = self.runs.partition_point(|run| run.first + run.pages <= page.0);
        let k = page.0.checked_sub(self.runs.get(r)?.first)?;
        self.page(r, k).map(|(_, page)| page)
    }

    /// The `k`th page of run `r`.
    pub(crate) fn page(&self, r: usize, k: u64) -> Option<(PageIndex, Page<'a>)> {
        let run = self.runs.get(r).filter(|run| k < run.pages)?;
        // Inside: `parse` has checked that the runs' pages are the data there is.
        let bytes = |at: usize| &self.raw[at + k as usize * self.page_bytes..][..self.page_bytes];
        let page = match run.content {
            // `resolve` has left no page unresolved.
            Content::Zero | Content::Same(_) => Page::Zero,
            Content::Data(at) | Content::Copies(at) => Page::Data(bytes(at)),
            Content::Change { at, checks } => Page::Change {
                xor: bytes(at),
                check: PageCheck(self.raw[checks..].as_chunks().0[k as usize]),
            },
        };
        Some((PageIndex(run.first + k), page))
    }
}

/// Reads and checks the page table of a frame into `runs`.
fn parse(
    i: usize,
    entry: &FrameEntry,
    page_bytes: usize,
    full: bool,
    raw: &[u8],
    runs: &mut Vec<Run>,
) -> Result<(), FormatError> {
    // The index's checks hold raw above what is behind the table.
    let table_bytes = raw
        .len()
        .saturating_sub(entry.payload_bytes(page_bytes as u32) as usize);
    let mut table = Table {
        frame: i,
        bytes: &raw[..table_bytes],
        at: 0,
    };
    let mut checks_at = table_bytes;
    let mut data_at = table_bytes + usize::from(entry.change_pages) * limits::CHECK_BYTES;
    let count = u32::from_le_bytes(table.take()?);
    at_most(
        || format!("frame {i}: runs"),
        count.into(),
        limits::MAX_FRAME_PAGES.into(),
    )?;
    let mut page = entry.first_page.0;
    let (mut data_pages, mut zero_pages, mut same_pages, mut change_pages) = (0, 0, 0, 0);
    for r in 0..count {
        let bad = |why: &'static str| Err(FormatError::invalid(format!("frame {i} run {r}"), why));
        let [kind] = table.take()?;
        let (gap, pages) = (table.varint()?, table.varint()?);
        if r == 0 && gap != 0 {
            return bad("the first run does not begin at the frame's first page");
        }
        if pages == 0 {
            return bad("it has no pages");
        }
        let first = page.saturating_add(gap);
        let end = first.saturating_add(pages);
        if end > entry.end_page.0 {
            return bad("it goes beyond the frame's last page");
        }
        // Below the end page, so neither sum overflows.
        let content = match kind {
            KIND_DATA | KIND_CHANGE => {
                data_pages += pages;
                if data_pages > entry.data_pages.into() {
                    return bad("the table has more data pages than the index says");
                }
                let at = data_at;
                data_at += pages as usize * page_bytes;
                if kind == KIND_DATA {
                    Content::Data(at)
                } else {
                    change_pages += pages;
                    if change_pages > entry.change_pages.into() {
                        return bad("the table has more changes than the index says");
                    }
                    let checks = checks_at;
                    checks_at += pages as usize * limits::CHECK_BYTES;
                    Content::Change { at, checks }
                }
            }
            KIND_ZERO if full => return bad("a full segment holds no zero pages"),
            KIND_ZERO => {
                zero_pages += pages;
                Content::Zero
            }
            KIND_SAME => {
                same_pages += pages;
                if same_pages > entry.same_pages.into() {
                    return bad("the table has more pages that are the same as others than the index says");
                }
                let back = table.varint()?;
                match first.checked_sub(back) {
                    Some(source) if back > 0 => Content::Same(source),
                    _ => return bad("the page its pages are the same as is not before it"),
                }
            }
            _ => return bad("its kind is not known"),
        };
        runs.push(Run {
            first,
            pages,
            content,
        });
        page = end;
    }
    let bad = |why: String| Err(FormatError::invalid(format!("frame {i}"), why));
    if table.at != table.bytes.len() {
        return bad(format!(
            "its table ends at byte {}, its data begins at {}",
            table.at,
            table.bytes.len()
        ));
    }
    if page != entry.end_page.0 {
        return bad(format!(
            "its last run ends at page {page}, the index says {}",
            entry.end_page
        ));
    }
    let counted = [data_pages, zero_pages, same_pages, change_pages];
    let expected = [
        entry.data_pages.into(),
        entry.zero_pages.into(),
        entry.same_pages.into(),
        entry.change_pages.into(),
    ];
    if counted[..2] != expected[..2] {
        return bad(format!(
            "its table has {data_pages} data and {zero_pages} zero pages, the index says {} and {}",
            entry.data_pages, entry.zero_pages
        ));
    }
    if counted != expected {
        return bad(format!(
            "its table has {same_pages} pages that are the same as others and {change_pages} changes, the index says \
             {} and {}",
            entry.same_pages, entry.change_pages
        ));
    }
    Ok(())
}

/// Reads a page table.
struct Table<'a> {
    frame: usize,
    bytes: &'a [u8],
    at: usize,
}

impl Table<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some(field) = rest.first_chunk::<N>() else {
            let what = format!("page table of frame {}", self.frame).into();
            let (need, have) = ((self.at + N) as u64, self.bytes.len() as u64);
            return Err(FormatError::Truncated { what, need, have });
        };
        self.at += N;
        Ok(*field)
    }

    fn varint(&mut self) -> Result<u64, FormatError> {
        let start = self.at;
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.take()?;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte has room for one bit.
            if bits << shift >> shift != bits {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    break;
                }
                return Ok(value);
            }
        }
        let why = format!("the number at byte {start} is too large or not in its shortest form");
        Err(FormatError::invalid(
            format!("page table of frame {}", self.frame),
            why,
        ))
    }
}

/// Appends `value` as a varint.
pub(crate) fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_come_back() {
        for value in (0..64)
            .flat_map(|bit| [(1u64 << bit) - 1, 1 << bit])
            .chain([u64::MAX])
        {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            let mut table = Table {
                frame: 0,
                bytes: &bytes,
                at: 0,
            };
            assert_eq!(table.varint().unwrap(), value);
            assert_eq!(table.at, bytes.len());
            table = Table {
                frame: 0,
                bytes: &bytes[..bytes.len() - 1],
                at: 0,
            };
            assert!(table.varint().is_err());
        }
    }

    #[test]
    fn varints_have_one_form() {
        let refuse = |bytes: &[u8]| {
            Table {
                frame: 0,
                bytes,
                at: 0,
            }
            .varint()
            .unwrap_err()
        };
        refuse(&[0x80, 0x00]);
        refuse(&[0xff; 10]);
        refuse(&[0xff; 11]);
        refuse(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02]);
    }
}
