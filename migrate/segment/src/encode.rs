//! Pages in, a compressed frame out.

use zstd::bulk::Compressor;

use crate::error::at_most;
use crate::frame::{KIND_DATA, KIND_ZERO, put_varint};
use crate::index::{Codec, FrameEntry, PageIndex};
use crate::{FormatError, Space, digest, limits};

/// A frame, ready to be pushed to a [`SegmentWriter`](crate::SegmentWriter).
#[derive(Debug, Clone)]
pub struct EncodedFrame {
    /// What the index will say; its offset is set by the writer.
    pub entry: FrameEntry,
    /// The frame as it will be stored.
    pub bytes: Vec<u8>,
}

/// Makes frames. Use one per thread and for many frames: it keeps its zstd context and its scratch memory.
pub struct FrameEncoder {
    level: i32,
    compressor: Option<Compressor<'static>>,
    runs: Vec<Run>,
    raw: Vec<u8>,
    compressed: Vec<u8>,
}

/// Pages next to each other, of one kind.
#[derive(Debug, Clone, Copy)]
struct Run {
    kind: u8,
    first: u64,
    pages: u64,
    /// Which page of the input is its first.
    input: usize,
}

impl std::fmt::Debug for FrameEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameEncoder")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

impl FrameEncoder {
    /// An encoder at a zstd level (1 is fastest; levels zstd does not have are taken as the nearest it has).
    #[must_use]
    pub fn new(level: i32) -> Self {
        Self {
            level,
            compressor: None,
            runs: Vec::new(),
            raw: Vec::new(),
            compressed: Vec::new(),
        }
    }

    /// Makes a frame of `pages` of `space`, ascending and each once, whose bytes are back to back in `data`: at
    /// best [`pages_per_frame`](crate::pages_per_frame) of them. Zero pages are found here: left out of a `full`
    /// segment, noted in a delta. `None` when nothing is left to store.
    ///
    /// # Errors
    /// When the pages are out of order or beyond the space, when `data` is not exactly theirs, when there are
    /// more than a frame may hold, or when zstd fails.
    pub fn encode(
        &mut self,
        space: &Space,
        full: bool,
        pages: &[PageIndex],
        data: &[u8],
    ) -> Result<Option<EncodedFrame>, FormatError> {
        check(space, pages, data)?;
        let page_bytes = space.page_bytes as usize;
        self.find_runs(full, pages, data, page_bytes);
        let (Some(first), Some(last)) = (self.runs.first(), self.runs.last()) else {
            return Ok(None);
        };
        let (first_page, end_page) = (PageIndex(first.first), PageIndex(last.first + last.pages));
        let (data_pages, zero_pages) = self.fill_raw(data, page_bytes);
        let (codec, bytes) = self.compress()?;
        let entry = FrameEntry {
            space: space.id,
            codec,
            first_page,
            end_page,
            offset: 0,
            // `check` keeps a frame within MAX_FRAME_RAW_BYTES, far below 4 GiB.
            stored_bytes: bytes.len() as u32,
            raw_bytes: self.raw.len() as u32,
            data_pages,
            zero_pages,
            digest: digest::of_frame(&bytes),
        };
        Ok(Some(EncodedFrame { entry, bytes }))
    }

    fn find_runs(&mut self, full: bool, pages: &[PageIndex], data: &[u8], page_bytes: usize) {
        self.runs.clear();
        for (input, (page, bytes)) in pages.iter().zip(data.chunks_exact(page_bytes)).enumerate() {
            let kind = if is_zero(bytes) { KIND_ZERO } else { KIND_DATA };
            if full && kind == KIND_ZERO {
                continue;
            }
            match self.runs.last_mut() {
                Some(run) if run.kind == kind && run.first + run.pages == page.0 => run.pages += 1,
                _ => self.runs.push(Run {
                    kind,
                    first: page.0,
                    pages: 1,
                    input,
                }),
            }
        }
    }

    /// Writes the page table and the data of the runs; returns how many pages have data and how many are zero.
    fn fill_raw(&mut self, data: &[u8], page_bytes: usize) -> (u32, u32) {
        self.raw.clear();
        // At most MAX_FRAME_PAGES.
        self.raw
            .extend_from_slice(&(self.runs.len() as u32).to_le_bytes());
        let mut page = self.runs.first().map_or(0, |run| run.first);
        let (mut data_pages, mut zero_pages) = (0, 0);
        for run in &self.runs {
            self.raw.push(run.kind);
            put_varint(&mut self.raw, run.first - page);
            put_varint(&mut self.raw, run.pages);
            page = run.first + run.pages;
            *(if run.kind == KIND_DATA {
                &mut data_pages
            } else {
                &mut zero_pages
            }) += run.pages as u32;
        }
        for run in self.runs.iter().filter(|run| run.kind == KIND_DATA) {
            let bytes = run.pages as usize * page_bytes;
            self.raw
                .extend_from_slice(&data[run.input * page_bytes..][..bytes]);
        }
        (data_pages, zero_pages)
    }

    fn compress(&mut self) -> Result<(Codec, Vec<u8>), FormatError> {
        let failed = |source| FormatError::Zstd {
            action: "compress",
            what: "a frame".into(),
            source,
        };
        let room = zstd::zstd_safe::compress_bound(self.raw.len());
        if self.compressed.len() < room {
            self.compressed.resize(room, 0);
        }
        let compressor = match &mut self.compressor {
            Some(compressor) => compressor,
            none => none.insert(Compressor::new(self.level).map_err(failed)?),
        };
        let length = compressor
            .compress_to_buffer(&self.raw, self.compressed.as_mut_slice())
            .map_err(failed)?;
        if length < self.raw.len() {
            Ok((Codec::Zstd, self.compressed[..length].to_vec()))
        } else {
            Ok((Codec::Stored, self.raw.clone()))
        }
    }
}

fn check(space: &Space, pages: &[PageIndex], data: &[u8]) -> Result<(), FormatError> {
    space.validate()?;
    at_most(
        || "pages of a frame",
        pages.len() as u64,
        limits::MAX_FRAME_PAGES.into(),
    )?;
    at_most(
        || "page data of a frame",
        data.len() as u64,
        limits::MAX_FRAME_DATA_BYTES.into(),
    )?;
    if data.len() != pages.len() * space.page_bytes as usize {
        let why = format!(
            "{} bytes for {} pages of {}",
            data.len(),
            pages.len(),
            space.page_bytes
        );
        return Err(FormatError::invalid("page data of a frame", why));
    }
    if !pages.is_sorted_by(|a, b| a < b) {
        return Err(FormatError::invalid(
            "pages of a frame",
            "they have to ascend, each once",
        ));
    }
    match pages.last() {
        Some(last) if last.0 >= space.pages => {
            let why = format!("page {last} of space {}, which has {}", space.id, space.pages);
            Err(FormatError::invalid("pages of a frame", why))
        }
        _ => Ok(()),
    }
}

/// Whether every byte is zero. Reads 64 bytes at a time and stops at the first that has something: a page with
/// data is usually known by its first line.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let (lines, rest) = bytes.as_chunks::<64>();
    lines.iter().all(|line| {
        let (words, _) = line.as_chunks::<16>();
        words.iter().fold(0, |all, word| all | u128::from_ne_bytes(*word)) == 0
    }) && rest.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        for length in [0, 1, 63, 64, 65, 512] {
            let mut bytes = vec![0u8; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "byte {at} of {length} was not seen");
                bytes[at] = 0;
            }
        }
    }
}
