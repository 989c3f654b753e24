//! Pages in, a compressed frame out.

use std::sync::Arc;

use zstd::bulk::Compressor;

use crate::error::at_most;
use crate::frame::{KIND_CHANGE, KIND_DATA, KIND_SAME, KIND_ZERO, PageCheck, put_varint};
use crate::index::{Codec, FrameEntry, PageIndex};
use crate::{Cipher, Digest, Encryption, FormatError, Space, digest, limits};

/// A page that differs from its base in more than one in so many words is stored whole: what is left of it would
/// not compress better as a change.
const MOST_CHANGED: usize = 2;

/// A frame, ready to be pushed to a [`SegmentWriter`](crate::SegmentWriter).
#[derive(Debug, Clone)]
pub struct EncodedFrame {
    /// What the index will say; its offset is set by the writer.
    pub entry: FrameEntry,
    /// The frame as it will be stored.
    pub bytes: Vec<u8>,
    /// How it is encrypted: the writer takes it into a segment that is encrypted so, and no other.
    pub(crate) encryption: Option<Encryption>,
}

/// A page on its way into a frame.
#[derive(Debug, Clone, Copy)]
pub struct PageIn<'a> {
    /// Which.
    pub page: PageIndex,
    /// What is known of it.
    pub form: Form<'a>,
}

/// What is known of a page that is to be stored. Bytes are always those of one whole page.
#[derive(Debug, Clone, Copy)]
pub enum Form<'a> {
    /// Its content. Whether it is zero is found out by the encoder.
    Data(&'a [u8]),
    /// Its content, and the one it has in the parent: stored as a change where that is shorter, and left out when
    /// they are the same. Only in a delta.
    Changed {
        /// What it is now.
        now: &'a [u8],
        /// What it is in the parent.
        base: &'a [u8],
    },
    /// A change that was made before, as read from another segment. Only in a delta.
    Change {
        /// Content XOR the content in the parent.
        xor: &'a [u8],
        /// Of the content.
        check: PageCheck,
    },
    /// It has the content of an earlier page of the segment, one that is stored whole.
    Same(PageIndex),
}

/// Makes frames. Use one per thread and for many frames: it keeps its zstd context and its scratch memory.
pub struct FrameEncoder {
    level: i32,
    /// And the level it was set to.
    compressor: Option<(Compressor<'static>, i32)>,
    runs: Vec<Run>,
    raw: Vec<u8>,
    compressed: Vec<u8>,
    cipher: Option<Arc<Cipher>>,
}

/// Pages next to each other, of one kind.
#[derive(Debug, Clone, Copy)]
struct Run {
    kind: u8,
    first: u64,
    pages: u64,
    /// Which of the input is its first.
    input: usize,
    /// The page they are all the same as.
    source: u64,
}

/// How many pages there are of each kind.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    data: u32,
    zero: u32,
    same: u16,
    change: u16,
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
            cipher: None,
        }
    }

    /// Compresses what comes from now on at this level.
    pub fn set_level(&mut self, level: i32) {
        self.level = level;
    }

    /// Encrypts what comes from now on with `cipher`, or no longer.
    pub fn set_cipher(&mut self, cipher: Option<Arc<Cipher>>) {
        self.cipher = cipher;
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
        space.validate()?;
        let page_bytes = space.page_bytes as usize;
        let limit = |what: &'static str, is: usize, max: u32| at_most(|| what, is as u64, max.into());
        limit("pages of a frame", pages.len(), limits::MAX_FRAME_PAGES)?;
        limit("page data of a frame", data.len(), limits::MAX_FRAME_DATA_BYTES)?;
        if data.len() != pages.len() * page_bytes {
            let why = format!("{} bytes for {} pages of {page_bytes}", data.len(), pages.len());
            return Err(FormatError::invalid("page data of a frame", why));
        }
        let forms = data.chunks_exact(page_bytes).map(Form::Data);
        let pages: Vec<PageIn<'_>> = pages
            .iter()
            .zip(forms)
            .map(|(&page, form)| PageIn { page, form })
            .collect();
        self.encode_pages(space, full, &pages)
    }

    /// The same of pages that are known in different forms.
    ///
    /// # Errors
    /// As [`Self::encode`]; and when a page's bytes are not as long as a page, when one is said to be the same as
    /// one that does not come before it, and when a change is to go into a full segment.
    pub fn encode_pages(
        &mut self,
        space: &Space,
        full: bool,
        pages: &[PageIn<'_>],
    ) -> Result<Option<EncodedFrame>, FormatError> {
        check(space, full, pages)?;
        self.find_runs(full, pages);
        let (Some(first), Some(last)) = (self.runs.first(), self.runs.last()) else {
            return Ok(None);
        };
        let (first_page, end_page) = (PageIndex(first.first), PageIndex(last.first + last.pages));
        let counts = self.fill_raw(pages);
        let (codec, mut bytes) = self.compress()?;
        let tag_bytes = self.cipher.as_ref().map_or(0, |_| limits::TAG_BYTES);
        let mut entry = FrameEntry {
            space: space.id,
            codec,
            first_page,
            end_page,
            offset: 0,
            // `check` keeps a frame within MAX_FRAME_RAW_BYTES, far below 4 GiB.
            stored_bytes: (bytes.len() + tag_bytes) as u32,
            raw_bytes: self.raw.len() as u32,
            data_pages: counts.data,
            zero_pages: counts.zero,
            same_pages: counts.same,
            change_pages: counts.change,
            digest: Digest([0; 32]),
        };
        if let Some(cipher) = &self.cipher {
            cipher.seal_frame(&entry, &mut bytes)?;
        }
        entry.digest = digest::of_frame(&bytes);
        Ok(Some(EncodedFrame {
            entry,
            bytes,
            encryption: self.cipher.as_ref().map(|cipher| cipher.encryption()),
        }))
    }

    fn find_runs(&mut self, full: bool, pages: &[PageIn<'_>]) {
        self.runs.clear();
        for (input, PageIn { page, form }) in pages.iter().enumerate() {
            let mut source = 0;
            let kind = match form {
                Form::Data(bytes) if is_zero(bytes) => KIND_ZERO,
                Form::Data(_) => KIND_DATA,
                Form::Changed { now, .. } if is_zero(now) => KIND_ZERO,
                Form::Changed { now, base } => match changed_words(now, base) {
                    0 => continue,
                    words if words <= now.len() / 8 / MOST_CHANGED => KIND_CHANGE,
                    _ => KIND_DATA,
                },
                Form::Change { .. } => KIND_CHANGE,
                Form::Same(of) => {
                    source = of.0;
                    KIND_SAME
                }
            };
            if full && kind == KIND_ZERO {
                continue;
            }
            match self.runs.last_mut() {
                Some(run)
                    if run.kind == kind
                        && run.first + run.pages == page.0
                        && run.source == source
                        // The data of a run is that of as many pages of the input.
                        && run.input + run.pages as usize == input =>
                {
                    run.pages += 1;
                }
                _ => self.runs.push(Run {
                    kind,
                    first: page.0,
                    pages: 1,
                    input,
                    source,
                }),
            }
        }
    }

    /// Writes the page table, the checks of changes, and the data.
    fn fill_raw(&mut self, pages: &[PageIn<'_>]) -> Counts {
        let raw = &mut self.raw;
        raw.clear();
        // At most MAX_FRAME_PAGES.
        raw.extend_from_slice(&(self.runs.len() as u32).to_le_bytes());
        let mut page = self.runs.first().map_or(0, |run| run.first);
        let mut counts = Counts::default();
        for run in &self.runs {
            raw.push(run.kind);
            put_varint(raw, run.first - page);
            put_varint(raw, run.pages);
            page = run.first + run.pages;
            let pages = run.pages as u32;
            match run.kind {
                KIND_ZERO => counts.zero += pages,
                KIND_SAME => {
                    // `check` has seen that the source comes before.
                    put_varint(raw, run.first - run.source);
                    counts.same += pages as u16;
                }
                KIND_CHANGE => {
                    counts.data += pages;
                    counts.change += pages as u16;
                }
                _ => counts.data += pages,
            }
        }
        let inputs = |run: &Run| &pages[run.input..run.input + run.pages as usize];
        for input in self
            .runs
            .iter()
            .filter(|run| run.kind == KIND_CHANGE)
            .flat_map(inputs)
        {
            match input.form {
                Form::Changed { now, .. } => raw.extend_from_slice(&PageCheck::of(now).0),
                Form::Change { check, .. } => raw.extend_from_slice(&check.0),
                Form::Data(_) | Form::Same(_) => {}
            }
        }
        for run in &self.runs {
            for input in inputs(run) {
                match (run.kind, input.form) {
                    (KIND_CHANGE, Form::Changed { now, base }) => put_xor(raw, now, base),
                    (KIND_CHANGE, Form::Change { xor, .. }) => raw.extend_from_slice(xor),
                    (KIND_DATA, Form::Data(now) | Form::Changed { now, .. }) => raw.extend_from_slice(now),
                    (_, Form::Data(_) | Form::Changed { .. } | Form::Change { .. } | Form::Same(_)) => {}
                }
            }
        }
        counts
    }

    fn compress(&mut self) -> Result<(Codec, Vec<u8>), FormatError> {
        let room = zstd::zstd_safe::compress_bound(self.raw.len());
        if self.compressed.len() < room {
            self.compressed.resize(room, 0);
        }
        let (compressor, level) = match &mut self.compressor {
            Some(made) => made,
            none => none.insert((Compressor::new(self.level).map_err(compress_failed)?, self.level)),
        };
        if *level != self.level {
            compressor
                .set_compression_level(self.level)
                .map_err(compress_failed)?;
            *level = self.level;
        }
        let length = compressor
            .compress_to_buffer(&self.raw, self.compressed.as_mut_slice())
            .map_err(compress_failed)?;
        if length < self.raw.len() {
            Ok((Codec::Zstd, self.compressed[..length].to_vec()))
        } else {
            Ok((Codec::Stored, self.raw.clone()))
        }
    }
}

fn compress_failed(source: std::io::Error) -> FormatError {
    FormatError::Zstd {
        action: "compress",
        what: "a frame".into(),
        source,
    }
}

fn check(space: &Space, full: bool, pages: &[PageIn<'_>]) -> Result<(), FormatError> {
    space.validate()?;
    at_most(
        || "pages of a frame",
        pages.len() as u64,
        limits::MAX_FRAME_PAGES.into(),
    )?;
    at_most(
        || "page data of a frame",
        pages.len() as u64 * u64::from(space.page_bytes),
        limits::MAX_FRAME_DATA_BYTES.into(),
    )?;
    if !pages.is_sorted_by(|a, b| a.page < b.page) {
        return Err(FormatError::invalid(
            "pages of a frame",
            "they have to ascend, each once",
        ));
    }
    if let Some(last) = pages.last().filter(|last| last.page.0 >= space.pages) {
        let why = format!(
            "page {} of space {}, which has {}",
            last.page, space.id, space.pages
        );
        return Err(FormatError::invalid("pages of a frame", why));
    }
    for PageIn { page, form } in pages {
        let bad = |why: &'static str| Err(FormatError::invalid(format!("page {page}"), why));
        let page_bytes = space.page_bytes as usize;
        let whole = match form {
            Form::Data(bytes) => bytes.len() == page_bytes,
            Form::Changed { now, base } => now.len() == page_bytes && base.len() == page_bytes,
            Form::Change { xor, .. } => xor.len() == page_bytes,
            Form::Same(source) if source >= page => return bad("it is the same as one that comes after it"),
            Form::Same(_) => true,
        };
        if !whole {
            return bad("its bytes are not as long as a page");
        }
        if full && matches!(form, Form::Changed { .. } | Form::Change { .. }) {
            return bad("a full segment has nothing that a page could be a change of");
        }
    }
    Ok(())
}

/// How many words of 8 bytes differ.
fn changed_words(a: &[u8], b: &[u8]) -> usize {
    let (a, _) = a.as_chunks::<8>();
    let (b, _) = b.as_chunks::<8>();
    a.iter().zip(b).map(|(a, b)| usize::from(a != b)).sum()
}

/// Appends `a` XOR `b`.
fn put_xor(out: &mut Vec<u8>, a: &[u8], b: &[u8]) {
    let start = out.len();
    out.extend_from_slice(a);
    xor_into(&mut out[start..], b);
}

/// `to ^= from`, for as many bytes as both have.
pub fn xor_into(to: &mut [u8], from: &[u8]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to ^= from);
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
