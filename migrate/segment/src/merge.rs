//! A chain of segments in, one segment out.
//!
//! ```text
//! full <- delta <- delta   =>  full     (a fold)
//! delta <- delta <- delta  =>  delta    of the first one's parent
//! ```
//!
//! A walk over all inputs at once in page order: where several have a page, the newest wins. Memory: the inputs'
//! indexes, one frame of each, and one frame of output.

use std::io::{Seek, Write};

use crate::encode::is_zero;
use crate::frame::{FrameBuf, Page};
use crate::{
    FormatError, FrameEncoder, Kind, Manifest, MergeError, PageIndex, ReadAt, SegmentReader, SegmentWriter,
    Space, Summary, WriteError, pages_per_frame,
};

/// Writes `segments`, oldest first and each the parent of the next, as one segment.
///
/// The result has the newest one's name, identity, records, time, producer and label, and the oldest one's kind,
/// parent and links: full when the oldest is (then zero pages are left out), else a delta of the oldest's parent.
///
/// # Errors
/// When there are none, when they are not a chain or differ in their spaces, when one cannot be read, and when
/// the result cannot be written.
pub fn merge<R: ReadAt, W: Write + Seek>(
    segments: &[SegmentReader<R>],
    out: W,
    level: i32,
) -> Result<(W, Summary), MergeError> {
    let manifest = merged_manifest(segments)?;
    let write = |source| MergeError::Write {
        name: manifest.name.clone(),
        source,
    };
    let records = match segments.last() {
        Some(newest) => newest.records().map_err(|source| read_error(newest, source))?,
        None => return Err(MergeError::Empty),
    };
    let mut output = Output {
        writer: SegmentWriter::new(out, &manifest, &records).map_err(write)?,
        encoder: FrameEncoder::new(level),
        full: manifest.kind.is_full(),
        pages: Vec::new(),
        data: Vec::new(),
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
    while let Some(page) = cursors.iter().filter_map(Cursor::page).min() {
        // The newest that has it; `cursors` is oldest first, as the segments are.
        if let Some(newest) = cursors.iter().rev().find(|cursor| cursor.page() == Some(page))
            && let Some((_, content)) = newest.content()
        {
            output.take(space, page, content).map_err(write)?;
        }
        for cursor in cursors.iter_mut().filter(|cursor| cursor.page() == Some(page)) {
            cursor.advance()?;
        }
    }
    output.flush(space).map_err(write)
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

/// Gathers pages into full frames.
struct Output<W: Write + Seek> {
    writer: SegmentWriter<W>,
    encoder: FrameEncoder,
    full: bool,
    pages: Vec<PageIndex>,
    data: Vec<u8>,
}

impl<W: Write + Seek> Output<W> {
    fn take(&mut self, space: &Space, page: PageIndex, content: Page<'_>) -> Result<(), WriteError> {
        match content {
            // Left out here and not only by the encoder, so that frames are full of what stays.
            Page::Zero if self.full => return Ok(()),
            Page::Data(bytes) if self.full && is_zero(bytes) => return Ok(()),
            Page::Zero => self.data.resize(self.data.len() + space.page_bytes as usize, 0),
            Page::Data(bytes) => self.data.extend_from_slice(bytes),
        }
        self.pages.push(page);
        if self.pages.len() >= pages_per_frame(space.page_bytes) {
            self.flush(space)
        } else {
            Ok(())
        }
    }

    fn flush(&mut self, space: &Space) -> Result<(), WriteError> {
        let frame = self.encoder.encode(space, self.full, &self.pages, &self.data)?;
        self.pages.clear();
        self.data.clear();
        frame.map_or(Ok(()), |frame| self.writer.push(frame))
    }
}
