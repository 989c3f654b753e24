//! A segment file in, verified; pages out.

use std::fmt;
use std::ops::Range;

use crate::frame::{Frame, FrameBuf, Page, PageCheck, Reading};
use crate::header::{Header, ROOT_COVERS, read_prefix};
use crate::index::{self, FrameEntry, PageIndex};
use crate::limits::{HEADER_BYTES, INDEX_TAG_BYTES, TAG_BYTES};
use crate::writer::Totals;
use crate::{
    Cipher, Digest, Features, FormatError, Keyring, Manifest, ReadAt, Record, Space, SpaceId, digest, records,
};

/// What a segment comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// The root digest: one over all of it.
    pub digest: Digest,
    /// The length of the file.
    pub file_bytes: u64,
    /// How many frames it has.
    pub frames: u32,
    /// How many pages with data.
    pub data_pages: u64,
    /// How many pages noted as zero.
    pub zero_pages: u64,
    /// How many pages that are the same as others of it.
    pub same_pages: u64,
    /// How many of the pages with data are changes of the parent's.
    pub change_pages: u64,
    /// The length of all page data before compression.
    pub raw_bytes: u64,
    /// The length of all frames as stored.
    pub stored_bytes: u64,
}

/// What a segment says of one page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PageContent {
    /// Its bytes.
    Data(Vec<u8>),
    /// It is a change of what it is in the parent.
    Change {
        /// Its content XOR the content in the parent.
        xor: Vec<u8>,
        /// What the check of its content is.
        check: PageCheck,
    },
    /// It is zero.
    Zero,
    /// Nothing: in a delta it is as in the parent, in a full segment it is zero.
    Absent,
}

/// A segment whose header, manifest, records and index were verified on opening. Frames are verified as they are
/// read, so a page never comes out unverified.
///
/// What is in the frames and records of an encrypted one comes out only [with its key](Self::with_keys); all else needs
/// none.
pub struct SegmentReader<R: ReadAt> {
    source: R,
    header: Header,
    manifest: Manifest,
    index: Vec<FrameEntry>,
    records_digest: Digest,
    encrypted: Option<Box<Encrypted>>,
}

/// What an encrypted segment is opened with.
struct Encrypted {
    /// The manifest's bytes.
    manifest: Vec<u8>,
    /// Of all that the index's tag is of.
    all: Digest,
    tag: [u8; INDEX_TAG_BYTES],
    /// Once the key is there.
    cipher: Option<Cipher>,
}

impl<R: ReadAt> fmt::Debug for SegmentReader<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("SegmentReader");
        shown
            .field("name", &self.manifest.name)
            .field("digest", &self.header.digest)
            .finish_non_exhaustive()
    }
}

impl<R: ReadAt> SegmentReader<R> {
    /// Opens a segment: header and its digest, lengths against the limits and the file, the root digest, then the
    /// manifest and the index.
    ///
    /// # Errors
    /// When any of them is not right; see [`FormatError`].
    pub fn open(source: R) -> Result<Self, FormatError> {
        let file_bytes = source.len().map_err(|source| io("length of the file", source))?;
        // As much of the header as there is: `read_prefix` says what is missing.
        let mut prefix = vec![0; file_bytes.min(HEADER_BYTES as u64) as usize];
        read(&source, "header", 0, &mut prefix)?;
        let header = read_prefix(&prefix)?;
        check_length(&header, file_bytes)?;

        // All lengths are now both within their limits and within the file.
        let mut root = digest::root();
        root.update(&prefix[..ROOT_COVERS]);
        let mut manifest = vec![0; header.manifest_bytes as usize];
        read(&source, "manifest", header.manifest_offset(), &mut manifest)?;
        root.update(&manifest);
        let records_digest = hash_records(&source, &header, &mut root)?;
        let mut index = vec![0; header.index_bytes as usize];
        read(&source, "index", header.index_offset(), &mut index)?;
        let entries = index.len() - tag_bytes(&header);
        let (index, tag) = index.split_at(entries);
        root.update(index);
        let all = digest::finish(&root);
        root.update(tag);
        if digest::finish(&root) != header.digest {
            return Err(FormatError::Digest {
                what: "manifest, records or index".into(),
            });
        }

        let manifest_bytes = manifest;
        let manifest = Manifest::decode(&manifest_bytes)?;
        if manifest.encryption.is_some() != header.features_required.has(Features::ENCRYPTED) {
            let why = "manifest and header do not agree whether the segment is encrypted";
            return Err(FormatError::invalid("key (manifest key 10)", why));
        }
        let index = index::decode(&manifest, header.features_required, index, header.body_bytes)?;
        let encrypted = tag.first_chunk().map(|tag| {
            Box::new(Encrypted {
                manifest: manifest_bytes,
                all,
                tag: *tag,
                cipher: None,
            })
        });
        Ok(Self {
            source,
            header,
            manifest,
            index,
            records_digest,
            encrypted,
        })
    }

    /// [Opens](Self::open) a segment, and gives it its key as [`Self::with_keys`] does.
    ///
    /// # Errors
    /// As those two.
    pub fn open_with(source: R, keys: &Keyring) -> Result<Self, FormatError> {
        Self::open(source)?.with_keys(keys)
    }

    /// Gives it the key that it is encrypted with, where that is among `keys`. What is not encrypted needs none, and what is
    /// stays readable but for its frames and records.
    ///
    /// # Errors
    /// [`FormatError::Forged`] when header, manifest, records or index are not what was written with that key.
    pub fn with_keys(mut self, keys: &Keyring) -> Result<Self, FormatError> {
        if let (Some(encrypted), Some(encryption)) = (&mut self.encrypted, self.manifest.encryption)
            && let Some(key) = keys.get(encryption.key)
        {
            let name = self.manifest.name.clone();
            let cipher = Cipher::new(key, encryption, name, &encrypted.manifest)?;
            cipher.check_index(encrypted.all, encrypted.tag)?;
            encrypted.cipher = Some(cipher);
        }
        Ok(self)
    }

    /// Whether frames and records can be read: they are not encrypted, or the key is there.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.encrypted
            .as_ref()
            .is_none_or(|encrypted| encrypted.cipher.is_some())
    }

    /// What decrypts it; none when it is not encrypted.
    fn cipher(&self) -> Result<Option<&Cipher>, FormatError> {
        let (Some(encrypted), Some(encryption)) = (&self.encrypted, self.manifest.encryption) else {
            return Ok(None);
        };
        encrypted
            .cipher
            .as_ref()
            .map(Some)
            .ok_or_else(|| FormatError::NoKey {
                segment: self.manifest.name.clone(),
                key: encryption.key,
            })
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The digest of the segment: one over all of it, as the index holds the frames' digests.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.header.digest
    }

    /// The length of the file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.header.file_bytes()
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The index.
    #[must_use]
    pub fn index(&self) -> &[FrameEntry] {
        &self.index
    }

    /// Reads the records.
    ///
    /// # Errors
    /// When they cannot be read, have changed since opening, or are not well formed; [`FormatError::NoKey`].
    pub fn records(&self) -> Result<Vec<Record>, FormatError> {
        let cipher = self.cipher()?;
        let mut stored = self.stored_records()?;
        if let Some(cipher) = cipher {
            cipher.open_records(self.header.records_raw_bytes, &mut stored)?;
            stored.truncate(stored.len().saturating_sub(TAG_BYTES));
        }
        records::decode(&stored, self.header.records_raw_bytes)
    }

    /// The records as they are stored, unchanged since opening.
    fn stored_records(&self) -> Result<Vec<u8>, FormatError> {
        let mut stored = vec![0; self.header.records_stored_bytes as usize];
        read(&self.source, "records", self.header.records_offset(), &mut stored)?;
        if digest::finish(digest::records().update(&stored)) != self.records_digest {
            return Err(FormatError::Digest {
                what: "records".into(),
            });
        }
        Ok(stored)
    }

    /// Which frames have pages of `pages` in their range.
    #[must_use]
    pub fn frames_in(&self, space: SpaceId, pages: Range<PageIndex>) -> Range<usize> {
        let start = self
            .index
            .partition_point(|entry| (entry.space, entry.end_page) <= (space, pages.start));
        let end = self
            .index
            .partition_point(|entry| (entry.space, entry.first_page) < (space, pages.end));
        if pages.is_empty() {
            start..start
        } else {
            start..end
        }
    }

    /// Reads frame `i` into `buf`: verified, decompressed, its page table checked.
    ///
    /// # Errors
    /// When there is no such frame, when it cannot be read, or when it is damaged or breaks a rule; [`FormatError::NoKey`].
    pub fn read_frame<'b>(&self, i: usize, buf: &'b mut FrameBuf) -> Result<Frame<'b>, FormatError> {
        let entry = self.load_frame(i, buf)?;
        if entry.same_pages > 0 {
            let locate = |page: PageIndex| self.frames_in(entry.space, page..PageIndex(page.0 + 1)).next();
            let load = |frame: usize, buf: &mut FrameBuf| self.load_frame(frame, buf).map(drop);
            buf.resolve(self.header.digest, i, entry, locate, load)?;
        }
        Ok(buf.frame())
    }

    /// Reads frame `i` as it is, pages that are the same as others left open.
    fn load_frame(&self, i: usize, buf: &mut FrameBuf) -> Result<&FrameEntry, FormatError> {
        let bad = |why: String| FormatError::invalid(format!("frame {i}"), why);
        let entry = self
            .index
            .get(i)
            .ok_or_else(|| bad(format!("the segment has {} frames", self.index.len())))?;
        let reading = Reading {
            body_offset: self.header.body_offset(),
            page_bytes: self.space(entry.space)?.page_bytes,
            full: self.manifest.kind.is_full(),
            cipher: self.cipher()?,
        };
        buf.load(&self.source, i, entry, reading)?;
        Ok(entry)
    }

    /// Reads one page. For many, read frames.
    ///
    /// # Errors
    /// When there is no such page in the manifest's spaces, and as [`Self::read_frame`].
    pub fn read_page(&self, space: SpaceId, page: PageIndex) -> Result<PageContent, FormatError> {
        let pages = self.space(space)?.pages;
        if page.0 >= pages {
            let why = format!("space {space} has {pages} pages");
            return Err(FormatError::invalid(format!("page {page}"), why));
        }
        // Page numbers are below a space's pages, so the next one is a number too.
        let Some(i) = self.frames_in(space, page..PageIndex(page.0 + 1)).next() else {
            return Ok(PageContent::Absent);
        };
        Ok(match self.read_frame(i, &mut FrameBuf::new())?.get(page) {
            Some(Page::Data(bytes)) => PageContent::Data(bytes.to_vec()),
            Some(Page::Change { xor, check }) => PageContent::Change {
                xor: xor.to_vec(),
                check,
            },
            Some(Page::Zero) => PageContent::Zero,
            None => PageContent::Absent,
        })
    }

    /// Reads and checks everything: the records and every frame. Of what is encrypted, and the key is not there, it checks
    /// that they are the bytes that were stored.
    ///
    /// # Errors
    /// The first thing that is not right.
    pub fn verify(&self) -> Result<Summary, FormatError> {
        let open = self.is_open();
        if open {
            self.records()?;
        } else {
            self.stored_records()?;
        }
        let mut totals = Totals::default();
        let mut buf = FrameBuf::new();
        for (i, entry) in self.index.iter().enumerate() {
            if open {
                self.read_frame(i, &mut buf)?;
            } else {
                buf.load_stored(&self.source, i, entry, self.header.body_offset())?;
            }
            totals.add(&self.manifest, entry);
        }
        Ok(totals.summary(&self.header))
    }

    fn space(&self, id: SpaceId) -> Result<&Space, FormatError> {
        self.manifest
            .space(id)
            .ok_or_else(|| FormatError::invalid(format!("space {id}"), "it is not in the manifest"))
    }
}

/// How long the tag behind the index is.
fn tag_bytes(header: &Header) -> usize {
    match header.features_required.has(Features::ENCRYPTED) {
        true => INDEX_TAG_BYTES,
        false => 0,
    }
}

fn io(what: &'static str, source: std::io::Error) -> FormatError {
    FormatError::Io {
        what: what.into(),
        source,
    }
}

fn read(source: &impl ReadAt, what: &'static str, offset: u64, buf: &mut [u8]) -> Result<(), FormatError> {
    source
        .read_exact_at(offset, buf)
        .map_err(|source| io(what, source))
}

fn check_length(header: &Header, have: u64) -> Result<(), FormatError> {
    let need = header.file_bytes();
    if have < need {
        return Err(FormatError::Truncated {
            what: "file".into(),
            need,
            have,
        });
    }
    if have > need {
        return Err(FormatError::invalid(
            "file length",
            format!("{} bytes after its end", have - need),
        ));
    }
    Ok(())
}

/// Adds the stored records to the root digest, and returns their own. In pieces: they are only needed later.
fn hash_records(
    source: &impl ReadAt,
    header: &Header,
    root: &mut blake3::Hasher,
) -> Result<Digest, FormatError> {
    const PIECE: usize = 256 << 10;
    let mut own = digest::records();
    let mut at = header.records_offset();
    let mut piece = vec![0; PIECE.min(header.records_stored_bytes as usize)];
    while at < header.body_offset() {
        let length = (header.body_offset() - at).min(PIECE as u64);
        let bytes = &mut piece[..length as usize];
        read(source, "records", at, bytes)?;
        root.update(bytes);
        own.update(bytes);
        at += length;
    }
    Ok(digest::finish(&own))
}
