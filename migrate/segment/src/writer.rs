//! Frames in, a segment file out.

use std::io::{Seek, SeekFrom, Write};
use std::sync::Arc;

use crate::header::{Header, MAJOR, ROOT_COVERS};
use crate::index::IndexCheck;
use crate::limits::{HEADER_BYTES, INDEX_TAG_BYTES};
use crate::records::{self, StoredRecords};
use crate::{
    Cipher, Digest, EncodedFrame, Features, FormatError, Manifest, Record, Summary, WriteError, digest,
};

/// Writes one segment: the manifest and records first, then frames as they come, then the index; last the header,
/// so that what was cut off has none. Frames are written in few large writes: `W` need not be buffered.
///
/// It does not sync: making the file durable and visible is the store's.
#[derive(Debug)]
pub struct SegmentWriter<W: Write + Seek> {
    out: W,
    manifest: Manifest,
    manifest_bytes: Vec<u8>,
    records: StoredRecords,
    cipher: Option<Arc<Cipher>>,
    check: IndexCheck,
    index: Vec<u8>,
    totals: Totals,
}

/// What the frames come to.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Totals {
    pub(crate) frames: u32,
    pub(crate) data_pages: u64,
    pub(crate) zero_pages: u64,
    pub(crate) same_pages: u64,
    pub(crate) change_pages: u64,
    pub(crate) raw_bytes: u64,
}

impl Totals {
    pub(crate) fn add(&mut self, manifest: &Manifest, entry: &crate::FrameEntry) {
        // At most MAX_FRAMES frames of at most MAX_FRAME_PAGES pages and MAX_FRAME_DATA_BYTES bytes.
        let page_bytes = manifest.space(entry.space).map_or(0, |space| space.page_bytes);
        self.frames += 1;
        self.data_pages += u64::from(entry.data_pages);
        self.zero_pages += u64::from(entry.zero_pages);
        self.same_pages += u64::from(entry.same_pages);
        self.change_pages += u64::from(entry.change_pages);
        self.raw_bytes += u64::from(entry.data_pages) * u64::from(page_bytes);
    }

    /// The features that a reader of these frames has to know.
    fn features(self) -> Features {
        let of = |pages: u64, feature| if pages == 0 { Features::NONE } else { feature };
        of(self.same_pages, Features::SAME_PAGES).with(of(self.change_pages, Features::PAGE_CHANGES))
    }

    pub(crate) fn summary(self, header: &Header) -> Summary {
        Summary {
            digest: header.digest,
            file_bytes: header.file_bytes(),
            frames: self.frames,
            data_pages: self.data_pages,
            zero_pages: self.zero_pages,
            same_pages: self.same_pages,
            change_pages: self.change_pages,
            raw_bytes: self.raw_bytes,
            stored_bytes: header.body_bytes,
        }
    }
}

fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> WriteError {
    move |source| WriteError::Io { what, source }
}

impl<W: Write + Seek> SegmentWriter<W> {
    /// Begins a segment at the start of `out`.
    ///
    /// # Errors
    /// When the manifest or the records break a rule, and when `out` cannot be written.
    pub fn new(out: W, manifest: &Manifest, records: &[Record]) -> Result<Self, WriteError> {
        Self::with_cipher(out, manifest, records, None)
    }

    /// The same of a segment that is encrypted with `cipher`, if there is one: the one that was
    /// [made for this manifest](crate::Key::encrypt). Its frames come from an encoder that
    /// [has it](crate::FrameEncoder::set_cipher).
    ///
    /// # Errors
    /// As [`Self::new`], and when manifest and cipher are not of each other.
    pub fn with_cipher(
        mut out: W,
        manifest: &Manifest,
        records: &[Record],
        cipher: Option<Arc<Cipher>>,
    ) -> Result<Self, WriteError> {
        let manifest_bytes = manifest.encode()?;
        let fits = match (&cipher, manifest.encryption) {
            (Some(cipher), Some(_)) => cipher.is_of(&manifest_bytes),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        if !fits {
            let why = "the manifest is not what the segment would be encrypted for";
            return Err(FormatError::invalid("encryption", why).into());
        }
        let records = records::encode(records, cipher.as_deref())?;
        out.seek(SeekFrom::Start(0)).map_err(io("header"))?;
        out.write_all(&[0; HEADER_BYTES]).map_err(io("header"))?;
        out.write_all(&manifest_bytes).map_err(io("manifest"))?;
        out.write_all(&records.bytes).map_err(io("records"))?;
        Ok(Self {
            out,
            manifest: manifest.clone(),
            manifest_bytes,
            records,
            cipher,
            // Whatever the frames use is named when the header is written.
            check: IndexCheck::new(Features::KNOWN),
            index: Vec::new(),
            totals: Totals::default(),
        })
    }

    /// Appends a frame. Frames come in ascending order of space and page.
    ///
    /// # Errors
    /// When the frame is out of order, does not fit the manifest or is not encrypted for this segment, and when `out` cannot
    /// be written.
    pub fn push(&mut self, frame: EncodedFrame) -> Result<(), WriteError> {
        let EncodedFrame {
            mut entry,
            bytes,
            encryption,
        } = frame;
        if encryption != self.manifest.encryption {
            let why = "it is not encrypted as its segment is";
            return Err(FormatError::invalid(format!("frame {}", self.totals.frames), why).into());
        }
        entry.offset = self.check.body_bytes;
        if bytes.len() != entry.stored_bytes as usize {
            let why = format!("{} bytes, its entry says {}", bytes.len(), entry.stored_bytes);
            return Err(FormatError::invalid(format!("frame {}", self.totals.frames), why).into());
        }
        self.check.take(&self.manifest, &entry)?;
        self.out.write_all(&bytes).map_err(io("frames"))?;
        self.index.extend_from_slice(&entry.encode());
        self.totals.add(&self.manifest, &entry);
        Ok(())
    }

    /// Writes the index and the header, and gives `out` back, flushed but not synced.
    ///
    /// # Errors
    /// When `out` cannot be written.
    pub fn finish(mut self) -> Result<(W, Summary), WriteError> {
        let mut features = self.totals.features();
        let mut index_bytes = self.index.len();
        if self.cipher.is_some() {
            features = features.with(Features::ENCRYPTED);
            index_bytes += INDEX_TAG_BYTES;
        }
        let mut header = Header {
            major: MAJOR,
            minor: features.minor(),
            features_required: features,
            features_optional: 0,
            // Each was checked against its limit, which is a u32.
            manifest_bytes: self.manifest_bytes.len() as u32,
            records_stored_bytes: self.records.bytes.len() as u32,
            records_raw_bytes: self.records.raw_bytes,
            frames: self.totals.frames,
            body_bytes: self.check.body_bytes,
            index_bytes: index_bytes as u64,
            digest: Digest([0; 32]),
        };
        let mut root = digest::root();
        root.update(&header.encode()[..ROOT_COVERS]);
        root.update(&self.manifest_bytes)
            .update(&self.records.bytes)
            .update(&self.index);
        if let Some(cipher) = &self.cipher {
            let tag = cipher.index_tag(digest::finish(&root));
            root.update(&tag);
            self.index.extend_from_slice(&tag);
        }
        header.digest = digest::finish(&root);
        self.out.write_all(&self.index).map_err(io("index"))?;
        self.out.seek(SeekFrom::Start(0)).map_err(io("header"))?;
        self.out.write_all(&header.encode()).map_err(io("header"))?;
        self.out
            .seek(SeekFrom::Start(header.file_bytes()))
            .map_err(io("header"))?;
        self.out.flush().map_err(io("header"))?;
        Ok((self.out, self.totals.summary(&header)))
    }
}
