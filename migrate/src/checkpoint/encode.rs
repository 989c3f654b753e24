//! A capture in, a segment out.
//!
//! Pages are cut into frames as the format likes them and compressed by several threads; the frames are written in
//! order by the caller's thread. Which pages are the same as earlier ones is found in the order of the pages, so that
//! one capture always makes one segment. Pages whose last stored content is in the cache go as changes. At most [`WINDOW_PER_THREAD`] frames a thread are in memory, however large the
//! capture is. A capture of a few frames is encoded where the caller is: starting a thread takes as long as a frame.

use std::io::{Seek, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use segment::{
    CheckpointId, Cipher, EncodedFrame, Form, FormatError, FrameEncoder, Kind, Manifest, PageIn, PageIndex,
    SamePages, SegmentName, SegmentWriter, SpaceId, Summary, WriteError, pages_per_frame, sample,
};

use super::cache::DeltaCache;
use super::ordered::ordered;
use super::{Captured, CapturedPages};
use crate::keyfile::random_salt;
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
    threads: usize,
    level: AtomicI32,
    /// Those not at work. A mutex, since several threads take one each at the start and give it back at the end.
    encoders: Mutex<Vec<FrameEncoder>>,
    /// Read while a capture is encoded, by its threads, and written when it is stored.
    cache: RwLock<DeltaCache>,
}

/// One frame's share of a capture.
struct Batch<'a> {
    space: &'a CapturedPages,
    pages: Range<usize>,
}

impl Batch<'_> {
    /// The pages that others of the segment are the same as, in the order of the batch's pages; called for the batches
    /// in their order.
    fn sources(&self, same: &mut SamePages, cache: Option<&DeltaCache>) -> Vec<Option<PageIndex>> {
        same.next_frame();
        let space = self.space;
        let of = |at: usize| {
            // Pages that are still to be read are not compared: they may be more than memory holds.
            let (page, bytes) = (space.pages[at], space.page(at)?);
            let hash = sample(bytes)?;
            // A page that goes as a change has no content of its own that others could be the same as.
            let whole = cache.is_none_or(|cache| cache.base(space.space.id, page).is_none());
            let is_same = |other: PageIndex| {
                let other = space.pages.binary_search(&other);
                other.is_ok_and(|other| space.page(other) == Some(bytes))
            };
            same.find(page, hash, whole, is_same)
        };
        self.pages.clone().map(of).collect()
    }

    fn encode(
        &self,
        encoder: &mut FrameEncoder,
        full: bool,
        sources: &[Option<PageIndex>],
        cache: Option<&DeltaCache>,
    ) -> Result<Option<EncodedFrame>, FormatError> {
        let space = self.space;
        if let Some(reader) = space.data.reader() {
            let pages = &space.pages[self.pages.clone()];
            let mut data = vec![0; pages.len() * space.space.page_bytes as usize];
            reader.read(pages, &mut data).map_err(|source| FormatError::Io {
                what: format!("{} from page {} on", space.space.name, pages[0].0).into(),
                source,
            })?;
            return encoder.encode(&space.space, full, pages, &data);
        }
        let form = |(at, source): (usize, &Option<PageIndex>)| {
            // All are here, as none is still to be read.
            let (page, now) = (space.pages[at], space.page(at).unwrap_or_default());
            let base = || cache.and_then(|cache| cache.base(space.space.id, page));
            let form = match (source, base()) {
                (Some(source), _) => Form::Same(*source),
                (None, Some(base)) => Form::Changed { now, base },
                (None, None) => Form::Data(now),
            };
            PageIn { page, form }
        };
        let pages: Vec<PageIn<'_>> = self.pages.clone().zip(sources).map(form).collect();
        encoder.encode_pages(&space.space, full, &pages)
    }
}

impl EncodePool {
    /// A pool that makes its compressors when they are first needed.
    #[must_use]
    pub fn new(options: EncodeOptions) -> Self {
        Self::with_delta_cache(options, 0)
    }

    /// A pool that keeps up to `cache_bytes` of pages as they were last stored, and stores those that are written again
    /// as changes.
    #[must_use]
    pub fn with_delta_cache(options: EncodeOptions, cache_bytes: usize) -> Self {
        Self {
            threads: options.threads.clamp(1, MAX_THREADS),
            level: AtomicI32::new(options.level),
            encoders: Mutex::default(),
            cache: RwLock::new(DeltaCache::new(cache_bytes)),
        }
    }

    /// Compresses captures from now on at this zstd level.
    pub fn set_level(&self, level: i32) {
        // Nothing else depends on when it is seen.
        self.level.store(level, Ordering::Relaxed);
    }

    /// Writes `captured` as the segment that `manifest` describes, from the start of `out`. It is not encrypted.
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
        self.encode_with(captured, manifest, None, out)
    }

    fn encode_with<W: Write + Seek>(
        &self,
        captured: &Captured,
        manifest: &Manifest,
        cipher: Option<&Arc<Cipher>>,
        out: W,
    ) -> Result<(W, Summary), EncodeError> {
        let batches = batches(captured, manifest).map_err(|why| EncodeError::Malformed {
            name: manifest.name.clone(),
            why,
        })?;
        self.write(captured, manifest, cipher, &batches, out)
            .map_err(|source| EncodeError::Segment {
                name: manifest.name.clone(),
                source,
            })
    }

    fn write<W: Write + Seek>(
        &self,
        captured: &Captured,
        manifest: &Manifest,
        cipher: Option<&Arc<Cipher>>,
        batches: &[Batch<'_>],
        out: W,
    ) -> Result<(W, Summary), WriteError> {
        let mut writer = SegmentWriter::with_cipher(out, manifest, &captured.records, cipher.cloned())?;
        let cache = self.cache.read().unwrap_or_else(PoisonError::into_inner);
        let cache = parent(manifest)
            .filter(|parent| cache.is_at(*parent))
            .map(|_| &*cache);
        let mut planner = Planner { space: None, cache };
        let mut prepare = |i: usize| planner.sources(&batches[i]);
        let work = |encoder: &mut Lent<'_>, i: usize, sources: Vec<_>| {
            batches[i].encode(encoder.get(), captured.full, &sources, cache)
        };
        let mut push = |frame: Result<Option<EncodedFrame>, FormatError>| match frame? {
            Some(frame) => writer.push(frame),
            None => Ok(()),
        };
        if self.threads == 1 || batches.len() <= INLINE_FRAMES {
            let mut encoder = self.lend(cipher);
            for i in 0..batches.len() {
                let sources = prepare(i);
                push(work(&mut encoder, i, sources))?;
            }
        } else {
            ordered(
                batches.len(),
                self.threads,
                self.threads * WINDOW_PER_THREAD,
                || self.lend(cipher),
                prepare,
                work,
                push,
            )?;
        }
        writer.finish()
    }

    /// Writes `captured` into `store`, encrypted with the first of the [store's keys](FsStore::set_keys) if it has any. When it
    /// fails nothing of it stays there.
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
        let mut manifest = manifest.clone();
        let cipher = match store.keys().first() {
            None => None,
            Some(key) => match key.encrypt(&mut manifest, random_salt()) {
                Ok(cipher) => Some(cipher),
                Err(source) => {
                    return Err(EncodeError::Segment {
                        name: manifest.name,
                        source: source.into(),
                    });
                }
            },
        };
        let encoded = self
            .encode_with(captured, &manifest, cipher.as_ref(), &mut incoming)
            .map(|(_, summary)| summary);
        match encoded {
            Ok(summary) => {
                let stored = incoming.commit_written(&summary).map_err(EncodeError::Store)?;
                // Only now: as long as it may fail, the next delta is on the checkpoint before.
                self.stored(captured, &manifest);
                Ok((stored, summary))
            }
            // The store's own words, when it was the store that refused a write.
            Err(e) => Err(incoming.take_failure().map_or(e, EncodeError::Store)),
        }
    }

    /// Says that `captured` was stored as `manifest`: pages that are written again go as changes of it.
    /// [`Self::encode_to_store`] does it by itself.
    pub fn stored(&self, captured: &Captured, manifest: &Manifest) {
        let mut cache = self.cache.write().unwrap_or_else(PoisonError::into_inner);
        cache.stored(captured, parent(manifest));
    }

    fn lend(&self, cipher: Option<&Arc<Cipher>>) -> Lent<'_> {
        let level = self.level.load(Ordering::Relaxed);
        let kept = self.encoders.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut encoder = kept.unwrap_or_else(|| FrameEncoder::new(level));
        encoder.set_level(level);
        encoder.set_cipher(cipher.cloned());
        Lent { pool: self, encoder }
    }
}

/// The checkpoint that a delta is a change of.
fn parent(manifest: &Manifest) -> Option<CheckpointId> {
    match &manifest.kind {
        Kind::Full => None,
        Kind::Delta {
            parent_checkpoint, ..
        } => Some(*parent_checkpoint),
    }
}

/// Finds pages that are the same, batch after batch.
struct Planner<'a> {
    /// The space of the last batch, and what was found in it.
    space: Option<(SpaceId, SamePages)>,
    cache: Option<&'a DeltaCache>,
}

impl Planner<'_> {
    fn sources(&mut self, batch: &Batch<'_>) -> Vec<Option<PageIndex>> {
        let id = batch.space.space.id;
        let same = match &mut self.space {
            Some((space, same)) if *space == id => same,
            other => {
                &mut other
                    .insert((id, SamePages::new(batch.space.pages.len() as u64)))
                    .1
            }
        };
        batch.sources(same, self.cache)
    }
}

/// An encoder that goes back to its pool.
struct Lent<'a> {
    pool: &'a EncodePool,
    encoder: FrameEncoder,
}

impl Lent<'_> {
    fn get(&mut self) -> &mut FrameEncoder {
        &mut self.encoder
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let level = self.pool.level.load(Ordering::Relaxed);
        let mut encoder = std::mem::replace(&mut self.encoder, FrameEncoder::new(level));
        encoder.set_cipher(None);
        let mut kept = self.pool.encoders.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(encoder);
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
        let held = space.data.held(pages, space.space.pages);
        if held.and_then(|held| held.checked_mul(page_bytes as usize)) != Some(bytes) {
            return Err(format!(
                "space {} has {bytes} bytes for {pages} pages of {page_bytes}",
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
