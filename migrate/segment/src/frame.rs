//! Frames: a page table and the data of its pages, decompressed and checked.
//!
//! ```text
//! | run count u32 | per run: kind u8, gap varint, pages varint | data of the data runs, back to back |
//! ```
//!
//! A gap counts the pages since the end of the run before (since the frame's first page for the first run). Kind 1
//! is data, 2 is zero. Varints are LEB128, in their shortest form. A page in no run is not in the segment.

use std::ops::Range;

use zstd::bulk::Decompressor;

use crate::error::at_most;
use crate::index::{Codec, FrameEntry, PageIndex};
use crate::{FormatError, ReadAt, digest, limits};

/// The kind of a run with data.
pub(crate) const KIND_DATA: u8 = 1;
/// The kind of a run of zero pages.
pub(crate) const KIND_ZERO: u8 = 2;

/// What a frame says of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page<'a> {
    /// It is zero.
    Zero,
    /// Its bytes.
    Data(&'a [u8]),
}

/// Pages next to each other, of one kind.
#[derive(Debug, Clone, Copy)]
struct Run {
    first: u64,
    pages: u64,
    /// Where in the frame its data begins; none when it is zero.
    data: Option<usize>,
}

/// Scratch memory for reading frames: use one for many frames, one per thread. It grows to the largest frame, at
/// most twice [`limits::MAX_FRAME_RAW_BYTES`], and stays.
#[derive(Default)]
pub struct FrameBuf {
    stored: Vec<u8>,
    raw: Vec<u8>,
    runs: Vec<Run>,
    page_bytes: usize,
    decompressor: Option<Decompressor<'static>>,
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

    /// Reads frame `i` of the body at `body_offset`: digest, then decompression, then the page table. `entry` has
    /// passed the index's checks, so its sizes are within the limits. After an error the buffer holds no pages.
    pub(crate) fn load(
        &mut self,
        source: &(impl ReadAt + ?Sized),
        body_offset: u64,
        i: usize,
        entry: &FrameEntry,
        page_bytes: u32,
        full: bool,
    ) -> Result<(), FormatError> {
        self.runs.clear();
        self.page_bytes = page_bytes as usize;
        let what = || format!("frame {i}").into();
        let raw_bytes = entry.raw_bytes as usize;
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
        if entry.codec == Codec::Zstd {
            let raw = grown(&mut self.raw, raw_bytes);
            let length = decompress(
                &mut self.decompressor,
                &self.stored[..entry.stored_bytes as usize],
                raw,
            )
            .map_err(|source| FormatError::Zstd {
                action: "decompress",
                what: what(),
                source,
            })?;
            if length != raw_bytes {
                let why = format!("it decompresses to {length} bytes, the index says {raw_bytes}");
                return Err(FormatError::invalid(what(), why));
            }
        }
        let raw = &self.raw[..raw_bytes];
        parse(i, entry, page_bytes as usize, full, raw, &mut self.runs).inspect_err(|_| self.runs.clear())
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

    /// Its pages as runs: the range, and the data of the whole range back to back (none: all zero). For copying
    /// many pages at once.
    pub fn runs(&self) -> impl Iterator<Item = (Range<u64>, Option<&'a [u8]>)> + use<'a> {
        let this = *self;
        this.runs.iter().map(move |run| {
            let data = run
                .data
                .map(|at| &this.raw[at..at + run.pages as usize * this.page_bytes]);
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
        let page = match run.data {
            // Inside: `parse` has checked that the runs' pages are the data there is.
            Some(at) => Page::Data(&self.raw[at + k as usize * self.page_bytes..][..self.page_bytes]),
            None => Page::Zero,
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
    let data_bytes = entry.data_pages as usize * page_bytes;
    // The index's checks hold raw above data.
    let mut data_at = raw.len().saturating_sub(data_bytes);
    let mut table = Table {
        frame: i,
        bytes: &raw[..data_at],
        at: 0,
    };
    let count = u32::from_le_bytes(table.take()?);
    at_most(
        || format!("frame {i}: runs"),
        count.into(),
        limits::MAX_FRAME_PAGES.into(),
    )?;
    let (mut page, mut data_pages, mut zero_pages) = (entry.first_page.0, 0, 0);
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
        let data = match kind {
            KIND_DATA => {
                data_pages += pages;
                if data_pages > entry.data_pages.into() {
                    return bad("the table has more data pages than the index says");
                }
                let at = data_at;
                data_at += pages as usize * page_bytes;
                Some(at)
            }
            KIND_ZERO if full => return bad("a full segment holds no zero pages"),
            KIND_ZERO => {
                zero_pages += pages;
                None
            }
            _ => return bad("its kind is not known"),
        };
        runs.push(Run { first, pages, data });
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
    if data_pages != u64::from(entry.data_pages) || zero_pages != u64::from(entry.zero_pages) {
        return bad(format!(
            "its table has {data_pages} data and {zero_pages} zero pages, the index says {} and {}",
            entry.data_pages, entry.zero_pages
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
