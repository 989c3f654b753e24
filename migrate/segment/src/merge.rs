//! A chain of segments in, one segment out.
//!
//! ```text
//! full <- delta <- delta   =>  full     (a fold)
//! delta <- delta <- delta  =>  delta    of the first one's parent
//! ```
//!
//! A walk over all inputs at once in page order: where several have a page, the newest wins. A change is applied to
//! what the next older one has, and two changes become one; a change that is left at the end of a delta stays one.
//! Pages that are the same are found again. Memory: the inputs' indexes, a frame or two of each, one frame of output,
//! and a table of bounded size.

use std::collections::HashMap;
use std::io::{Seek, Write};
use std::sync::Arc;

use crate::encode::{Form, PageIn, is_zero, xor_into};
use crate::frame::{FrameBuf, Page, PageCheck};
use crate::limits::SALT_BYTES;
use crate::same::SamePages;
use crate::{
    Cipher, Digest, FormatError, FrameEncoder, Key, Kind, Manifest, MergeError, PageIndex, ReadAt,
    SegmentReader, SegmentWriter, Space, Summary, WriteError, digest, pages_per_frame,
};

/// Writes `segments`, oldest first and each the parent of the next, as one segment.
///
/// The result has the newest one's name, identity, records, time, producer and label, and the oldest one's kind,
/// parent and links: full when the oldest is (then zero pages are left out), else a delta of the oldest's parent.
///
/// # Errors
/// When there are none, when they are not a chain or differ in their spaces, when one cannot be read, and when
/// the result cannot be written. [`MergeError::Plain`] when one is encrypted: see [`merge_encrypted`].
pub fn merge<R: ReadAt, W: Write + Seek>(
    segments: &[SegmentReader<R>],
    out: W,
    level: i32,
) -> Result<(W, Summary), MergeError> {
    let manifest = merged_manifest(segments)?;
    let encrypted = segments.iter().map(SegmentReader::manifest);
    for input in encrypted {
        if let Some(encryption) = input.encryption {
            return Err(MergeError::Plain {
                name: input.name.clone(),
                key: encryption.key,
            });
        }
    }
    merge_as(segments, &manifest, None, out, level)
}

/// The same, and the result is encrypted with `key`, whether any of the segments is or not. Those that are have to be
/// [open](SegmentReader::is_open).
///
/// `salt` is random, and for this result alone.
///
/// # Errors
/// As [`merge`], but for [`MergeError::Plain`].
pub fn merge_encrypted<R: ReadAt, W: Write + Seek>(
    segments: &[SegmentReader<R>],
    out: W,
    level: i32,
    key: &Key,
    salt: [u8; SALT_BYTES],
) -> Result<(W, Summary), MergeError> {
    let mut manifest = merged_manifest(segments)?;
    let cipher = key
        .encrypt(&mut manifest, salt)
        .map_err(|source| MergeError::Write {
            name: manifest.name.clone(),
            source: source.into(),
        })?;
    merge_as(segments, &manifest, Some(cipher), out, level)
}

fn merge_as<R: ReadAt, W: Write + Seek>(
    segments: &[SegmentReader<R>],
    manifest: &Manifest,
    cipher: Option<Arc<Cipher>>,
    out: W,
    level: i32,
) -> Result<(W, Summary), MergeError> {
    let write = |source| MergeError::Write {
        name: manifest.name.clone(),
        source,
    };
    let records = match segments.last() {
        Some(newest) => newest.records().map_err(|source| read_error(newest, source))?,
        None => return Err(MergeError::Empty),
    };
    let mut encoder = FrameEncoder::new(level);
    encoder.set_cipher(cipher.clone());
    let mut output = Output {
        writer: SegmentWriter::with_cipher(out, manifest, &records, cipher).map_err(write)?,
        encoder,
        full: manifest.kind.is_full(),
        pages: Vec::new(),
        data: Vec::new(),
        same: SamePages::new(0),
        whole: HashMap::new(),
    };
    for space in &manifest.spaces {
        merge_space(segments, space, &mut output, &write)?;
    }
    output.writer.finish().map_err(write)
}

/// Checks that the segments are a chain, and makes the result's manifest.
fn merged_manifest<R: ReadAt>(segments: &[SegmentReader<R>]) -> Result<Manifest, MergeError> {
    let (Some(oldest), Some(newest)) = (segments.first(), segments.last()) else {
        return Err(MergeError::Empty);
    };
    for pair in segments.windows(2) {
        let [parent, child] = [pair[0].manifest(), pair[1].manifest()];
        if let Some(why) = mismatch(parent, child) {
            let (parent, child) = (parent.name.clone(), child.name.clone());
            return Err(MergeError::Broken { parent, child, why });
        }
    }
    let (oldest, newest) = (oldest.manifest(), newest.manifest());
    let first_epoch = match oldest.kind {
        Kind::Delta { .. } if segments.len() > 1 => oldest.first_epoch.or(Some(oldest.name.epoch)),
        Kind::Delta { .. } | Kind::Full => oldest.first_epoch,
    };
    Ok(Manifest {
        kind: oldest.kind.clone(),
        links: oldest.links,
        first_epoch,
        encryption: None,
        ..newest.clone()
    })
}

/// Why `child` is not the next in a chain after `parent`.
fn mismatch(parent: &Manifest, child: &Manifest) -> Option<String> {
    match &child.kind {
        Kind::Full => Some("it is a full segment".into()),
        Kind::Delta { parent: name, .. } if *name != parent.name => Some(format!("its parent is {name}")),
        Kind::Delta {
            parent_checkpoint: id,
            ..
        } if *id != parent.checkpoint => Some(format!(
            "its parent is checkpoint {id}, this one is checkpoint {}: not the same state",
            parent.checkpoint
        )),
        Kind::Delta { .. } if parent.spaces != child.spaces => Some("their address spaces differ".into()),
        Kind::Delta { .. } => None,
    }
}

fn read_error<R: ReadAt>(segment: &SegmentReader<R>, source: FormatError) -> MergeError {
    MergeError::Read {
        name: segment.manifest().name.clone(),
        source,
    }
}

fn merge_space<R: ReadAt, W: Write + Seek>(
    segments: &[SegmentReader<R>],
    space: &Space,
    output: &mut Output<W>,
    write: &impl Fn(WriteError) -> MergeError,
) -> Result<(), MergeError> {
    let mut cursors = Vec::with_capacity(segments.len());
    for segment in segments {
        cursors.push(Cursor::new(segment, space)?);
    }
    output.begin(space);
    let mut content = Vec::new();
    while let Some(page) = cursors.iter().filter_map(Cursor::page).min() {
        match overlay(&cursors, page, &mut content)? {
            Some(Found::Zero) => output.take(space, page, Page::Zero).map_err(write)?,
            Some(Found::Data) => output.take(space, page, Page::Data(&content)).map_err(write)?,
            Some(Found::Change(_)) if output.full => {
                let newest = segments.last().map(|segment| segment.manifest().name.clone());
                return Err(newest.map_or(MergeError::Empty, |name| MergeError::NoBase {
                    name,
                    space: space.id,
                    page,
                }));
            }
            Some(Found::Change(check)) => {
                let xor = &content;
                output
                    .take(space, page, Page::Change { xor, check })
                    .map_err(write)?;
            }
            None => {}
        }
        for cursor in cursors.iter_mut().filter(|cursor| cursor.page() == Some(page)) {
            cursor.advance()?;
        }
    }
    output.flush(space).map_err(write)
}

/// What the segments together say of a page.
enum Found {
    Zero,
    Data,
    Change(PageCheck),
}

/// Reads a page into `content`: the newest's, applied to the older ones' as long as it is a change. `cursors` is oldest
/// first, as the segments are.
fn overlay<R: ReadAt>(
    cursors: &[Cursor<'_, R>],
    page: PageIndex,
    content: &mut Vec<u8>,
) -> Result<Option<Found>, MergeError> {
    content.clear();
    // The newest change: what all of it has to come to, and where it was read.
    let mut change: Option<(PageCheck, &Cursor<'_, R>)> = None;
    for cursor in cursors.iter().rev().filter(|cursor| cursor.page() == Some(page)) {
        let Some((_, found)) = cursor.content() else {
            continue;
        };
        let base = match found {
            Page::Change { xor, check } => {
                if change.is_none() {
                    content.extend_from_slice(xor);
                    change = Some((check, cursor));
                } else {
                    xor_into(content, xor);
                }
                continue;
            }
            Page::Zero => None,
            Page::Data(bytes) => Some(bytes),
        };
        let Some((check, newest)) = change else {
            let Some(bytes) = base else {
                return Ok(Some(Found::Zero));
            };
            content.extend_from_slice(bytes);
            return Ok(Some(Found::Data));
        };
        xor_into(content, base.unwrap_or_default());
        if PageCheck::of(content) != check {
            let what = format!(
                "page {page} as a change of what {} has",
                cursor.segment.manifest().name
            );
            let source = FormatError::Digest { what: what.into() };
            return Err(read_error(newest.segment, source));
        }
        return Ok(Some(Found::Data));
    }
    Ok(change.map(|(check, _)| Found::Change(check)))
}

/// A place in one segment's pages of one space.
struct Cursor<'a, R: ReadAt> {
    segment: &'a SegmentReader<R>,
    /// The frames still to be read.
    frames: std::ops::Range<usize>,
    buf: FrameBuf,
    /// The run of the frame in `buf`, and the page of that run.
    at: (usize, u64),
}

impl<'a, R: ReadAt> Cursor<'a, R> {
    fn new(segment: &'a SegmentReader<R>, space: &Space) -> Result<Self, MergeError> {
        let frames = segment.frames_in(space.id, PageIndex(0)..PageIndex(space.pages));
        let mut cursor = Self {
            segment,
            frames,
            buf: FrameBuf::new(),
            at: (0, 0),
        };
        cursor.settle()?;
        Ok(cursor)
    }

    fn content(&self) -> Option<(PageIndex, Page<'_>)> {
        self.buf.frame().page(self.at.0, self.at.1)
    }

    fn page(&self) -> Option<PageIndex> {
        self.content().map(|(page, _)| page)
    }

    /// Goes to the next page.
    fn advance(&mut self) -> Result<(), MergeError> {
        self.at.1 += 1;
        self.settle()
    }

    /// Goes on to the next run or frame when the current one is used up.
    fn settle(&mut self) -> Result<(), MergeError> {
        if self.content().is_some() {
            return Ok(());
        }
        self.at = (self.at.0 + 1, 0);
        if self.content().is_some() {
            return Ok(());
        }
        // Every frame has at least one page, so one step is enough.
        if let Some(i) = self.frames.next() {
            self.segment
                .read_frame(i, &mut self.buf)
                .map_err(|e| read_error(self.segment, e))?;
            self.at = (0, 0);
        }
        Ok(())
    }
}

/// Pages whose content is remembered by its digest, to find others that are the same: 3 MiB.
const MAX_WHOLE: usize = 1 << 16;

/// Gathers pages into full frames.
struct Output<W: Write + Seek> {
    writer: SegmentWriter<W>,
    encoder: FrameEncoder,
    full: bool,
    pages: Vec<(PageIndex, Taken)>,
    /// The bytes of the pages that have some.
    data: Vec<u8>,
    same: SamePages,
    /// The digests of pages that are stored whole.
    whole: HashMap<PageIndex, Digest>,
}

/// What a page of the frame will be.
#[derive(Debug, Clone, Copy)]
enum Taken {
    Data,
    Change(PageCheck),
    Same(PageIndex),
}

impl<W: Write + Seek> Output<W> {
    fn begin(&mut self, space: &Space) {
        self.same = SamePages::new(space.pages.min(MAX_WHOLE as u64));
        self.same.next_frame();
        self.whole.clear();
    }

    fn take(&mut self, space: &Space, page: PageIndex, content: Page<'_>) -> Result<(), WriteError> {
        let taken = match content {
            // Left out here and not only by the encoder, so that frames are full of what stays.
            Page::Zero if self.full => return Ok(()),
            Page::Data(bytes) if self.full && is_zero(bytes) => return Ok(()),
            Page::Zero => {
                self.data.resize(self.data.len() + space.page_bytes as usize, 0);
                Taken::Data
            }
            Page::Data(bytes) => match self.find_same(page, bytes) {
                Some(source) => Taken::Same(source),
                None => {
                    self.data.extend_from_slice(bytes);
                    Taken::Data
                }
            },
            Page::Change { xor, check } => {
                self.data.extend_from_slice(xor);
                Taken::Change(check)
            }
        };
        self.pages.push((page, taken));
        if self.pages.len() >= pages_per_frame(space.page_bytes) {
            self.flush(space)
        } else {
            Ok(())
        }
    }

    fn find_same(&mut self, page: PageIndex, bytes: &[u8]) -> Option<PageIndex> {
        if is_zero(bytes) {
            return None;
        }
        let digest = digest::page(bytes);
        let [a, b, c, d, e, f, g, h, ..] = digest.0;
        let hash = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        // By the whole digest: two contents with one are not found by anybody.
        let same = |other: PageIndex| self.whole.get(&other) == Some(&digest);
        let found = self.same.find(page, hash, true, same);
        if found.is_none() {
            if self.whole.len() >= MAX_WHOLE {
                self.whole.clear();
            }
            self.whole.insert(page, digest);
        }
        found
    }

    fn flush(&mut self, space: &Space) -> Result<(), WriteError> {
        let mut data = self.data.chunks_exact(space.page_bytes as usize);
        let mut next = || data.next().unwrap_or_default();
        let pages: Vec<PageIn<'_>> = self
            .pages
            .iter()
            .map(|&(page, taken)| {
                let form = match taken {
                    Taken::Data => Form::Data(next()),
                    Taken::Change(check) => Form::Change { xor: next(), check },
                    Taken::Same(source) => Form::Same(source),
                };
                PageIn { page, form }
            })
            .collect();
        let frame = self.encoder.encode_pages(space, self.full, &pages)?;
        self.pages.clear();
        self.data.clear();
        self.same.next_frame();
        frame.map_or(Ok(()), |frame| self.writer.push(frame))
    }
}
