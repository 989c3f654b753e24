//! Takes segments apart and puts them together with digests that match: what a hostile writer can do. Knows the
//! layout by itself, from `docs/segment-format.md`, and so checks the crate's.

use std::io::Write;

use segment::{FormatError, SegmentReader, Summary};

use crate::common;

pub(crate) const HEADER: usize = 128;
pub(crate) const ENTRY: usize = 80;

fn digest(context: &str, bytes: &[u8]) -> [u8; 32] {
    blake3::derive_key(context, bytes)
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// The parts of a segment, to be changed and sealed again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) header: [u8; HEADER],
    pub(crate) manifest: Vec<u8>,
    pub(crate) records: Vec<u8>,
    pub(crate) body: Vec<u8>,
    pub(crate) entries: Vec<[u8; ENTRY]>,
    /// What is behind the entries: of one that is encrypted, the tag.
    pub(crate) tag: Vec<u8>,
    /// Changes of the header after its lengths are set and before the digests are.
    pub(crate) patches: Vec<(usize, Vec<u8>)>,
}

impl Parts {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let (header, rest) = bytes.split_first_chunk::<HEADER>().expect("header");
        let (manifest, rest) = rest.split_at(u32_at(header, 32) as usize);
        let (records, rest) = rest.split_at(u32_at(header, 36) as usize);
        let (body, index) = rest.split_at(u64_at(header, 48) as usize);
        let (entries, tag) = index.as_chunks::<ENTRY>();
        assert!(tag.is_empty() || tag.len() == 32);
        Self {
            header: *header,
            manifest: manifest.to_vec(),
            records: records.to_vec(),
            body: body.to_vec(),
            entries: entries.to_vec(),
            tag: tag.to_vec(),
            patches: Vec::new(),
        }
    }

    /// The parts of [`common::small`].
    pub(crate) fn small() -> Self {
        let (manifest, records, pages) = common::small();
        Self::of(&common::write(&manifest, &records, &pages).0)
    }

    /// Replaces records by the zstd of `raw`, and says how long it is.
    pub(crate) fn set_records(&mut self, raw: &[u8]) {
        self.records = zstd::bulk::compress(raw, 1).expect("compress");
        self.header[40..44].copy_from_slice(&(raw.len() as u32).to_le_bytes());
    }

    /// Frame `i` as stored.
    pub(crate) fn stored(&self, i: usize) -> &[u8] {
        let entry = &self.entries[i];
        &self.body[u64_at(entry, 24) as usize..][..u32_at(entry, 32) as usize]
    }

    /// Frame `i` decompressed.
    pub(crate) fn raw(&self, i: usize) -> Vec<u8> {
        match u16_at(&self.entries[i], 2) {
            0 => self.stored(i).to_vec(),
            _ => zstd::bulk::decompress(self.stored(i), 2 << 20).expect("decompress"),
        }
    }

    /// Replaces frame `i` by `stored`, which says it is `raw_bytes` long; moves the frames behind it.
    pub(crate) fn set_frame(&mut self, i: usize, codec: u16, stored: &[u8], raw_bytes: u32) {
        let mut frames: Vec<Vec<u8>> = (0..self.entries.len()).map(|k| self.stored(k).to_vec()).collect();
        frames[i] = stored.to_vec();
        self.body.clear();
        for (entry, frame) in self.entries.iter_mut().zip(&frames) {
            entry[24..32].copy_from_slice(&(self.body.len() as u64).to_le_bytes());
            entry[32..36].copy_from_slice(&(frame.len() as u32).to_le_bytes());
            entry[48..80].copy_from_slice(&digest("understudy segment v1 frame", frame));
            self.body.extend_from_slice(frame);
        }
        self.entries[i][2..4].copy_from_slice(&codec.to_le_bytes());
        self.entries[i][36..40].copy_from_slice(&raw_bytes.to_le_bytes());
    }

    pub(crate) fn patch(mut self, at: usize, bytes: impl AsRef<[u8]>) -> Self {
        self.patches.push((at, bytes.as_ref().to_vec()));
        self
    }

    pub(crate) fn entry(mut self, i: usize, at: usize, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        self.entries[i][at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// The header, with digests that match.
    pub(crate) fn seal_header(&self) -> [u8; HEADER] {
        let mut header = self.header;
        header[32..36].copy_from_slice(&(self.manifest.len() as u32).to_le_bytes());
        header[36..40].copy_from_slice(&(self.records.len() as u32).to_le_bytes());
        header[44..48].copy_from_slice(&(self.entries.len() as u32).to_le_bytes());
        header[48..56].copy_from_slice(&(self.body.len() as u64).to_le_bytes());
        let index_bytes = self.entries.len() * ENTRY + self.tag.len();
        header[56..64].copy_from_slice(&(index_bytes as u64).to_le_bytes());
        for (at, bytes) in &self.patches {
            header[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        let covered = [self.covered(&header), self.tag.clone()].concat();
        header[64..96].copy_from_slice(&digest("understudy segment v1 root", &covered));
        let own = digest("understudy segment v1 header", &header[..96]);
        header[96..].copy_from_slice(&own);
        header
    }

    /// The whole file, with digests that match.
    pub(crate) fn seal(&self) -> Vec<u8> {
        [
            &self.seal_header(),
            &*self.manifest,
            &self.records,
            &self.body,
            self.entries.as_flattened(),
            &self.tag,
        ]
        .concat()
    }

    /// What the tag behind the index is of, and the root digest but for that.
    fn covered(&self, header: &[u8; HEADER]) -> Vec<u8> {
        let entries = self.entries.as_flattened();
        [&header[..64], &self.manifest, &self.records, entries].concat()
    }

    /// The tag that belongs behind the index, by who has the key.
    pub(crate) fn index_tag(&self, key: &[u8; 32], salt: &[u8; 32]) -> Vec<u8> {
        let index_key = digest("understudy segment v1 index key", &[*key, *salt].concat());
        let all = digest("understudy segment v1 root", &self.covered(&self.seal_header()));
        blake3::keyed_hash(&index_key, &all).as_bytes().to_vec()
    }

    /// What the crate says of it.
    pub(crate) fn check(&self) -> Result<Summary, FormatError> {
        check(&self.seal())
    }

    /// Why the crate refuses it.
    pub(crate) fn refused(&self) -> String {
        match self.check() {
            Ok(_) => panic!("it was taken"),
            Err(error) => text(&error),
        }
    }
}

/// zstd of so many zeros, never all in memory; without the length at its front when `hidden`.
pub(crate) fn zeros(length: u64, hidden: bool) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).expect("encoder");
    encoder.include_contentsize(!hidden).expect("parameter");
    encoder
        .set_pledged_src_size((!hidden).then_some(length))
        .expect("parameter");
    let piece = vec![0; 1 << 20];
    for _ in 0..length >> 20 {
        encoder.write_all(&piece).expect("compress");
    }
    encoder.finish().expect("compress")
}

/// Opens and verifies everything.
pub(crate) fn check(bytes: &[u8]) -> Result<Summary, FormatError> {
    SegmentReader::open(bytes)?.verify()
}

/// An error with its sources.
pub(crate) fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

/// Refused, and for this reason.
#[track_caller]
pub(crate) fn assert_refused(parts: &Parts, why: &str) {
    let text = parts.refused();
    assert!(text.contains(why), "refused, but not for {why:?}: {text}");
}

#[test]
fn a_segment_taken_apart_and_sealed_is_the_same() {
    let (manifest, records, pages) = common::small();
    let (bytes, _) = common::write(&manifest, &records, &pages);
    assert_eq!(Parts::of(&bytes).seal(), bytes);
    let mut parts = Parts::of(&bytes);
    for i in 0..parts.entries.len() {
        let (codec, stored) = (u16_at(&parts.entries[i], 2), parts.stored(i).to_vec());
        let raw_bytes = parts.raw(i).len() as u32;
        parts.set_frame(i, codec, &stored, raw_bytes);
    }
    assert_eq!(parts.seal(), bytes);
    let codecs: Vec<u16> = parts.entries.iter().map(|entry| u16_at(entry, 2)).collect();
    assert_eq!(codecs, [1, 0], "the small segment has a frame of each codec");
}
