//! A capture in, a segment out.
//!
//! Pages are cut into frames as the format likes them and compressed by several threads; the frames are written in
//! order by the caller's thread. At most [`WINDOW_PER_THREAD`] frames a thread are in memory, however large the
//! capture is. A capture of a few frames is encoded where the caller is: starting a thread takes as long as a frame.

use std::io::{Seek, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use segment::{
    EncodedFrame, FormatError, FrameEncoder, Manifest, PageIndex, SegmentName, SegmentWriter, Summary,
    WriteError, pages_per_frame,
};

use super::ordered::ordered;
use super::{Captured, CapturedPages};
use crate::store::{FsStore, StoreError, Stored};

/// Frames a thread may be ahead of the writer.
const WINDOW_PER_THREAD: usize = 4;
/// With up to this many frames no thread is started.
const INLINE_FRAMES: usize = 4;
/// The most threads.
pub(crate) const MAX_THREADS: usize = 256;

/// How to encode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// The zstd level.
    pub level: i32,
    /// Threads that compress, 1 to 256.
    pub threads: usize,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self { level: 1, threads: 2 }
    }
}

/// Why a capture did not become a segment.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The capture does not fit the manifest or itself.
    #[error("the capture of {name} is malformed: {why}")]
    Malformed {
        /// What it was to be.
        name: SegmentName,
        /// What does not fit.
        why: String,
    },
    /// The format refused it, or the output did.
    #[error("encode {name}")]
    Segment {
        /// What it was to be.
        name: SegmentName,
        /// Why.
        #[source]
        source: WriteError,
    },
    /// The store refused it.
    #[error("store the checkpoint")]
    Store(#[source] StoreError),
}

/// Compressors, kept from one checkpoint to the next: making one anew costs as much as a small checkpoint.
#[derive(Debug)]
pub struct EncodePool {
    options: EncodeOptions,
    /// Those not at work. A mutex, since several threads take one each at the start and give it back at the end.
    encoders: Mutex<Vec<FrameEncoder>>,
}

/// One frame's share of a capture.
struct Batch<'a> {
    space: &'a CapturedPages,
    pages: Range<usize>,
}

impl Batch<'_> {
    fn encode(&self, encoder: &mut FrameEncoder, full: bool) -> Result<Option<EncodedFrame>, FormatError> {
        let page_bytes = self.space.space.page_bytes as usize;
        let pages = &self.space.pages[self.pages.clone()];
        if let Some(reader) = self.space.data.reader() {
            let mut data = vec![0; pages.len() * page_bytes];
            reader.read(pages, &mut data).map_err(|source| FormatError::Io {
                what: format!("{} from page {} on", self.space.space.name, pages[0].0).into(),
                source,
            })?;
            return encoder.encode(&self.space.space, full, pages, &data);
        }
        let bytes = self.space.data.as_ref();
        if !self.space.data.is_sparse() {
            let data = &bytes[self.pages.start * page_bytes..self.pages.end * page_bytes];
            return encoder.encode(&self.space.space, full, pages, data);
        }
        // Checked in `batches`: the pages are inside the space, and the bytes are the whole space.
        let of_run = |run: &[PageIndex]| {
            let start = run[0].0 as usize * page_bytes;
            &bytes[start..start + run.len() * page_bytes]
        };
        let mut runs = pages.chunk_by(|a, b| a.0 + 1 == b.0);
        match (runs.next(), runs.next()) {
            // Usual in a full capture, and no copy.
            (Some(run), None) => encoder.encode(&self.space.space, full, pages, of_run(run)),
            _ => {
                let data = pages
                    .chunk_by(|a, b| a.0 + 1 == b.0)
                    .map(of_run)
                    .collect::<Vec<_>>()
                    .concat();
                encoder.encode(&self.space.space, full, pages, &data)
            }
        }
    }
}

impl EncodePool {
    /// A pool that makes its compressors when they are first needed.
    #[must_use]
    pub fn new(options: EncodeOptions) -> Self {
        Self {
            options,
            encoders: Mutex::default(),
        }
    }

    /// Writes `captured` as the segment that `manifest` describes, from the start of `out`.
    ///
    /// # Errors
    /// [`EncodeError::Malformed`] when they do not fit each other, [`EncodeError::Segment`] when `out` cannot be
    /// written.
    pub fn encode<W: Write + Seek>(
        &self,
        captured: &Captured,
        manifest: &Manifest,
        out: W,
    ) -> Result<(W, Summary), EncodeError> {
        let batches = batches(captured, manifest).map_err(|why| EncodeError::Malformed {
            name: manifest.name.clone(),
            why,
        })?;
        self.write(captured, manifest, &batches, out)
            .map_err(|source| EncodeError::Segment {
                name: manifest.name.clone(),
                source,
            })
    }

    fn write<W: Write + Seek>(
        &self,
        captured: &Captured,
        manifest: &Manifest,
        batches: &[Batch<'_>],
        out: W,
    ) -> Result<(W, Summary), WriteError> {
        let mut writer = SegmentWriter::new(out, manifest, &captured.records)?;
        let threads = self.options.threads.clamp(1, MAX_THREADS);
        let work = |encoder: &mut Lent<'_>, i: usize| batches[i].encode(encoder.get(), captured.full);
        let mut push = |frame: Result<Option<EncodedFrame>, FormatError>| match frame? {
            Some(frame) => writer.push(frame),
            None => Ok(()),
        };
        if threads == 1 || batches.len() <= INLINE_FRAMES {
            let mut encoder = self.lend();
            for i in 0..batches.len() {
                push(work(&mut encoder, i))?;
            }
        } else {
            ordered(
                batches.len(),
                threads,
                threads * WINDOW_PER_THREAD,
                || self.lend(),
                work,
                push,
            )?;
        }
        writer.finish()
    }

    /// Writes `captured` into `store`. When it fails nothing of it stays there.
    ///
    /// # Errors
    /// As [`Self::encode`], and [`EncodeError::Store`]: no room, fenced, the name taken.
    pub fn encode_to_store(
        &self,
        captured: &Captured,
        manifest: &Manifest,
        store: &Arc<FsStore>,
    ) -> Result<(Stored, Summary), EncodeError> {
        let mut incoming = store.begin_growing(&manifest.name).map_err(EncodeError::Store)?;
        let encoded = self
            .encode(captured, manifest, &mut incoming)
            .map(|(_, summary)| summary);
        match encoded {
            Ok(summary) => Ok((
                incoming.commit_written(&summary).map_err(EncodeError::Store)?,
                summary,
            )),
            // The store's own words, when it was the store that refused a write.
            Err(e) => Err(incoming.take_failure().map_or(e, EncodeError::Store)),
        }
    }

    fn lend(&self) -> Lent<'_> {
        let kept = self.encoders.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let encoder = kept.unwrap_or_else(|| FrameEncoder::new(self.options.level));
        Lent {
            pool: self,
            encoder: Some(encoder),
        }
    }
}

/// An encoder that goes back to its pool.
struct Lent<'a> {
    pool: &'a EncodePool,
    encoder: Option<FrameEncoder>,
}

impl Lent<'_> {
    fn get(&mut self) -> &mut FrameEncoder {
        let level = self.pool.options.level;
        self.encoder.get_or_insert_with(|| FrameEncoder::new(level))
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut kept = self.pool.encoders.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(self.encoder.take());
    }
}

/// Checks that the capture is what the manifest says, and cuts it into frames.
fn batches<'a>(captured: &'a Captured, manifest: &Manifest) -> Result<Vec<Batch<'a>>, String> {
    if captured.full != manifest.kind.is_full() {
        let (is, should) = if captured.full {
            ("full", "a delta")
        } else {
            ("a delta", "full")
        };
        return Err(format!("it is {is}, and {should} was to be written"));
    }
    if captured.checkpoint != manifest.checkpoint {
        return Err("its identity is not the manifest's".to_owned());
    }
    if !captured
        .spaces
        .iter()
        .map(|pages| &pages.space)
        .eq(&manifest.spaces)
    {
        return Err("its address spaces are not the manifest's".to_owned());
    }
    let mut batches = Vec::new();
    for space in &captured.spaces {
        let page_bytes = space.space.page_bytes;
        let (pages, bytes) = (space.pages.len(), space.data.as_ref().len());
        let held = if space.data.is_sparse() {
            usize::try_from(space.space.pages).unwrap_or(usize::MAX)
        } else {
            pages
        };
        if space.data.reader().is_none() && held.checked_mul(page_bytes as usize) != Some(bytes) {
            return Err(format!(
                "space {} has {bytes} bytes for {held} pages of {page_bytes}",
                space.space.id
            ));
        }
        // Inside a frame the encoder checks it, and between frames the writer; said here it names the cause.
        if !space.pages.is_sorted_by(|a, b| a < b) {
            return Err(format!("the pages of space {} do not ascend", space.space.id));
        }
        if space.pages.last().is_some_and(|last| last.0 >= space.space.pages) {
            return Err(format!("a page of space {} is beyond its end", space.space.id));
        }
        let per_frame = pages_per_frame(page_bytes);
        batches.extend((0..pages).step_by(per_frame).map(|start| {
            let pages = start..(start + per_frame).min(pages);
            Batch { space, pages }
        }));
    }
    Ok(batches)
}
