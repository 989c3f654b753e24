//! What is fuzzed: one function a target, which takes any bytes and must neither panic nor take more memory than the
//! format's limits say.
//!
//! Noise never gets past a digest. So each target puts its input where a hostile writer would: into a part of a segment
//! whose digests are then made to match. The layout is written down here once more, from `docs/segment-format.md`.
//! Where the input turns out to be good, it is held against an obvious way to do the same.
//!
//! The crate `fuzz` runs these for long (`scripts/fuzz`); a test of the crate `migrate` runs them over the stored corpus
//! and some mutations of it.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;
use std::sync::Mutex;

use migrate::load::{LoadPlan, Target, TargetError};
use segment::{
    FrameBuf, Manifest, Page, PageIndex, RunData, SegmentReader, SegmentWriter, SpaceId, merge, read_prefix,
    xor_into,
};

/// A target.
pub type Run = fn(&[u8]);

/// Every target and its name.
pub const TARGETS: [(&str, Run); 6] = [
    ("header", header),
    ("manifest", manifest),
    ("records", records),
    ("index", index),
    ("frames", frames),
    ("chain", chain),
];

const HEADER: usize = 128;
const ENTRY: usize = 80;
/// Feature bits 0 and 1.
const FEATURES: u64 = 3;
/// The pages of the segments made here.
const PAGES: u64 = 64;
const PAGE_BYTES: usize = 512;
/// The longest body that an index is given.
const MAX_BODY: usize = 1 << 20;
/// The most links of a chain.
const MAX_LINKS: usize = 4;

/// A segment put together, its digests as they have to be.
fn seal(manifest: &[u8], records: &[u8], records_raw: u32, body: &[u8], entries: &[[u8; ENTRY]]) -> Vec<u8> {
    let mut header = [0; HEADER];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"UNDRSTDY");
    put(8, &1u16.to_le_bytes());
    put(10, &1u16.to_le_bytes());
    put(12, &(HEADER as u32).to_le_bytes());
    put(16, &FEATURES.to_le_bytes());
    put(32, &(manifest.len() as u32).to_le_bytes());
    put(36, &(records.len() as u32).to_le_bytes());
    put(40, &records_raw.to_le_bytes());
    put(44, &(entries.len() as u32).to_le_bytes());
    put(48, &(body.len() as u64).to_le_bytes());
    put(56, &((entries.len() * ENTRY) as u64).to_le_bytes());
    let covered = [&header[..64], manifest, records, entries.as_flattened()].concat();
    header[64..96].copy_from_slice(&blake3::derive_key("understudy segment v1 root", &covered));
    let own = blake3::derive_key("understudy segment v1 header", &header[..96]);
    header[96..].copy_from_slice(&own);
    [&header, manifest, records, body, entries.as_flattened()].concat()
}

fn space() -> segment::Space {
    segment::Space {
        id: SpaceId::MEMORY,
        name: "memory".into(),
        page_bytes: PAGE_BYTES as u32,
        pages: PAGES,
    }
}

fn plain(epoch: u64, parent: Option<u64>) -> Manifest {
    let name = |epoch: u64| format!("web/1/{epoch}").parse().expect("a name");
    let id = |epoch: u64| segment::CheckpointId([epoch as u8; 16]);
    Manifest {
        name: name(epoch),
        checkpoint: id(epoch),
        kind: parent.map_or(segment::Kind::Full, |parent| segment::Kind::Delta {
            parent: name(parent),
            parent_checkpoint: id(parent),
        }),
        links: u32::from(parent.is_some()),
        created_unix_ns: 1,
        producer: "fuzz".into(),
        spaces: vec![space()],
        first_epoch: None,
        label: None,
        encryption: None,
    }
}

/// The parts of a segment with this manifest and nothing in it: the manifest's bytes, the records' and their length.
fn parts(of: &Manifest) -> (Vec<u8>, Vec<u8>, u32) {
    let writer = SegmentWriter::new(Cursor::new(Vec::new()), of, &[]).expect("a manifest of ours");
    let bytes = writer.finish().expect("write to memory").0.into_inner();
    let header = read_prefix(&bytes).expect("a header of ours");
    let (records, body) = (header.records_offset() as usize, header.body_offset() as usize);
    (
        bytes[HEADER..records].to_vec(),
        bytes[records..body].to_vec(),
        header.records_raw_bytes,
    )
}

/// Reads everything there is, in every way there is.
fn exercise(bytes: &[u8]) {
    let Ok(reader) = SegmentReader::open(bytes) else {
        return;
    };
    let sound = reader.verify().is_ok();
    let _ = reader.records();
    let mut buf = FrameBuf::new();
    for i in 0..=reader.index().len() {
        let Ok(frame) = reader.read_frame(i, &mut buf) else {
            continue;
        };
        let pages: Vec<(PageIndex, Page<'_>)> = frame.pages().collect();
        let of_runs: u64 = frame.runs().map(|(range, _)| range.end - range.start).sum();
        assert_eq!(pages.len() as u64, of_runs);
        assert!(pages.is_sorted_by(|a, b| a.0 < b.0), "pages ascend");
        for (_, data) in frame.runs() {
            match data {
                RunData::Changes { xor, checks } => assert!(xor.len() >= checks.len()),
                RunData::Zero | RunData::Data(_) => {}
            }
        }
        for (page, content) in pages {
            assert_eq!(frame.get(page), Some(content));
        }
    }
    for page in [0, 1, 31, 63, 64, u64::MAX] {
        let _ = reader.read_page(SpaceId::MEMORY, PageIndex(page));
    }
    let merged = merge(&[reader], Cursor::new(Vec::new()), 1);
    assert!(
        !sound || merged.is_ok(),
        "what verifies can be written again: {merged:?}"
    );
}

/// A header alone, and one whose digest matches.
pub fn header(data: &[u8]) {
    let _ = read_prefix(data);
    let mut sealed = [0; HEADER];
    let length = data.len().min(96);
    sealed[..length].copy_from_slice(&data[..length]);
    sealed[..8].copy_from_slice(b"UNDRSTDY");
    let own = blake3::derive_key("understudy segment v1 header", &sealed[..96]);
    sealed[96..].copy_from_slice(&own);
    if let Ok(header) = read_prefix(&sealed) {
        assert!(header.file_bytes() >= HEADER as u64 && header.file_bytes() < 1 << 45);
        assert!(header.body_offset() <= header.index_offset());
    }
    // With the rest of the input behind it, as a file.
    exercise(&[&sealed[..], data.get(96..).unwrap_or_default()].concat());
}

/// A manifest: what is taken is written and read as the same again.
pub fn manifest(data: &[u8]) {
    let (_, records, raw) = parts(&plain(1, None));
    let Ok(reader) = SegmentReader::open(seal(data, &records, raw, &[], &[])) else {
        return;
    };
    let again = parts(reader.manifest()).0;
    let reread =
        SegmentReader::open(seal(&again, &records, raw, &[], &[])).expect("what was read can be written");
    assert_eq!(reader.manifest(), reread.manifest());
}

/// Records, before compression and as if compressed.
pub fn records(data: &[u8]) {
    let (manifest, ..) = parts(&plain(1, None));
    let stored = zstd::bulk::compress(data, 1).expect("compress");
    for (stored, raw) in [(stored.as_slice(), data.len() as u32), (data, 4096)] {
        let Ok(reader) = SegmentReader::open(seal(&manifest, stored, raw, &[], &[])) else {
            continue;
        };
        let Ok(records) = reader.records() else { continue };
        let writer = SegmentWriter::new(Cursor::new(Vec::new()), reader.manifest(), &records);
        let bytes = writer
            .and_then(SegmentWriter::finish)
            .expect("what was read can be written")
            .0;
        let again = SegmentReader::open(bytes.into_inner())
            .expect("ours")
            .records()
            .expect("ours");
        assert_eq!(again, records);
    }
}

/// An index of any entries, over a body that fits and digests that match where there are as many bytes.
pub fn index(data: &[u8]) {
    let (chunks, rest) = data.as_chunks::<ENTRY>();
    let mut entries = chunks.to_vec();
    let mut body: Vec<u8> = Vec::new();
    for entry in &mut entries {
        let stored = u32::from_le_bytes([entry[32], entry[33], entry[34], entry[35]]) as usize;
        if body.len() + stored > MAX_BODY {
            break;
        }
        let start = body.len();
        body.extend(rest.iter().copied().cycle().take(stored));
        body.resize(start + stored, 0);
        entry[48..].copy_from_slice(&blake3::derive_key("understudy segment v1 frame", &body[start..]));
    }
    for parent in [None, Some(1)] {
        let (manifest, records, raw) = parts(&plain(2, parent));
        exercise(&seal(&manifest, &records, raw, &body, &entries));
    }
}

/// What a frame's input says: how it is stored, what the index is to count, and its bytes.
///
/// ```text
/// 0  1  bit 0: compressed here; bit 1: as if compressed by the writer
/// 1  1  first page      3  1  data pages      5  1  same pages      7  2  length of what follows
/// 2  1  end page        4  1  zero pages      6  1  change pages    9  .. the frame
/// ```
fn take_frame<'a>(data: &mut &'a [u8]) -> Option<([u8; 7], &'a [u8])> {
    let (head, rest) = data.split_first_chunk::<9>()?;
    let length = usize::from(u16::from_le_bytes([head[7], head[8]])).min(rest.len());
    let (raw, rest) = rest.split_at(length);
    *data = rest;
    Some((
        [head[0], head[1], head[2], head[3], head[4], head[5], head[6]],
        raw,
    ))
}

/// Frames as `take_frame` takes them, as a body and its index.
fn body_of(mut data: &[u8]) -> (Vec<u8>, Vec<[u8; ENTRY]>) {
    let (mut body, mut entries) = (Vec::new(), Vec::new());
    while let Some(([how, first, end, data_pages, zero, same, change], raw)) = take_frame(&mut data) {
        let packed = zstd::bulk::compress(raw, 1).expect("compress");
        let (codec, stored, raw_bytes) = match how & 3 {
            1 if packed.len() < raw.len() => (1u16, packed.as_slice(), raw.len()),
            2 | 3 => (1, raw, usize::from(data_pages) * PAGE_BYTES + 64),
            _ => (0, raw, raw.len()),
        };
        let mut entry = [0; ENTRY];
        let mut put = |at: usize, bytes: &[u8]| entry[at..at + bytes.len()].copy_from_slice(bytes);
        put(2, &codec.to_le_bytes());
        put(4, &u16::from(same).to_le_bytes());
        put(6, &u16::from(change).to_le_bytes());
        put(8, &u64::from(first).to_le_bytes());
        put(16, &u64::from(end).to_le_bytes());
        put(24, &(body.len() as u64).to_le_bytes());
        put(32, &(stored.len() as u32).to_le_bytes());
        put(36, &(raw_bytes as u32).to_le_bytes());
        put(40, &u32::from(data_pages).to_le_bytes());
        put(44, &u32::from(zero).to_le_bytes());
        put(48, &blake3::derive_key("understudy segment v1 frame", stored));
        body.extend_from_slice(stored);
        entries.push(entry);
    }
    (body, entries)
}

/// Frames, of a full segment and of a delta.
pub fn frames(data: &[u8]) {
    let (body, entries) = body_of(data);
    for parent in [None, Some(1)] {
        let (manifest, records, raw) = parts(&plain(2, parent));
        exercise(&seal(&manifest, &records, raw, &body, &entries));
    }
}

/// A machine's memory, as bytes.
struct Memory(Mutex<Vec<u8>>);

impl Target for Memory {
    fn write(&self, _: SpaceId, first: PageIndex, data: &[u8]) -> Result<(), TargetError> {
        let at = first.0 as usize * PAGE_BYTES;
        self.0.lock().expect("no panic before")[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn read(&self, _: SpaceId, first: PageIndex, data: &mut [u8]) -> Result<(), TargetError> {
        let at = first.0 as usize * PAGE_BYTES;
        let length = data.len();
        data.copy_from_slice(&self.0.lock().expect("no panic before")[at..at + length]);
        Ok(())
    }
}

/// A chain of up to four links. Of each: a byte that says what it builds on (0: the one before; else it is mixed in),
/// the length of its frames (2 bytes), and the frames.
///
/// When loading it works, it gives what the obvious way gives, oldest first; and merged it gives the same.
pub fn chain(mut data: &[u8]) {
    let mut files: Vec<Vec<u8>> = Vec::new();
    while let (Some((head, rest)), true) = (data.split_first_chunk::<3>(), files.len() < MAX_LINKS) {
        let length = usize::from(u16::from_le_bytes([head[1], head[2]])).min(rest.len());
        let (frames, rest) = rest.split_at(length);
        data = rest;
        let epoch = files.len() as u64 + 1;
        // Also one that is not there, and a second full one.
        let parent = match (files.len(), head[0]) {
            (0, 0) | (_, 1) => None,
            (_, n) => {
                Some(epoch.saturating_sub(1 + u64::from(n / 2)).max(1)).filter(|parent| *parent < epoch)
            }
        };
        let (body, entries) = body_of(frames);
        let (manifest, records, raw) = parts(&plain(epoch, parent));
        files.push(seal(&manifest, &records, raw, &body, &entries));
    }
    // One folder for the process: fuzzers run one input at a time, and tests one target at a time.
    static FOLDER: Mutex<()> = Mutex::new(());
    let _one = FOLDER.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = folder();
    let paths: Vec<_> = (0..files.len()).map(|n| folder.join(n.to_string())).collect();
    for (path, bytes) in paths.iter().zip(&files) {
        std::fs::write(path, bytes).expect("write a segment");
    }
    let loaded = LoadPlan::from_files(&paths).and_then(|plan| {
        let memory = Memory(Mutex::new(vec![0; PAGES as usize * PAGE_BYTES]));
        plan.load_into(&memory, 1)?;
        Ok(memory.0.into_inner().expect("no panic before"))
    });
    std::fs::remove_dir_all(&folder).expect("remove the folder");
    let readers: Vec<_> = files
        .iter()
        .filter_map(|bytes| SegmentReader::open(bytes.as_slice()).ok())
        .collect();
    let merged = merge(&readers, Cursor::new(Vec::new()), 1);
    if let Ok(loaded) = loaded {
        // Frames that a newer link hides were not read, so the obvious way and the merge may meet damage there.
        if let Some(expected) = oldest_first(&readers) {
            assert!(loaded == expected, "loaded is not what the links say");
        }
        if let Ok((out, _)) = merged {
            let bytes = out.into_inner();
            let merged = SegmentReader::open(bytes.as_slice()).expect("what was merged can be read");
            merged.verify().expect("what was merged is sound");
            if merged.manifest().kind.is_full() {
                assert!(
                    oldest_first(&[merged]) == Some(loaded),
                    "merged is not what was loaded"
                );
            }
        }
    }
}

fn folder() -> std::path::PathBuf {
    // In memory, where there is such a place.
    let base = Path::new("/dev/shm");
    let base = if base.is_dir() {
        base.to_owned()
    } else {
        std::env::temp_dir()
    };
    let folder = base.join(format!("understudy-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("make a folder");
    folder
}

/// Every link's pages over those before; none when one cannot be read.
fn oldest_first(readers: &[SegmentReader<&[u8]>]) -> Option<Vec<u8>> {
    let mut memory = vec![0; PAGES as usize * PAGE_BYTES];
    let mut order: BTreeMap<u64, &SegmentReader<&[u8]>> = BTreeMap::new();
    for reader in readers {
        order.insert(reader.manifest().name.epoch.0, reader);
    }
    let mut buf = FrameBuf::new();
    for reader in order.values() {
        for i in 0..reader.index().len() {
            for (page, content) in reader.read_frame(i, &mut buf).ok()?.pages() {
                let to = &mut memory[page.0 as usize * PAGE_BYTES..][..PAGE_BYTES];
                match content {
                    Page::Zero => to.fill(0),
                    Page::Data(bytes) => to.copy_from_slice(bytes),
                    Page::Change { xor, check } => {
                        xor_into(to, xor);
                        // An older change that comes to something else is only noticed here: the newest one's check
                        // is what a load holds the result against.
                        if segment::PageCheck::of(to) != check {
                            return None;
                        }
                    }
                }
            }
        }
    }
    Some(memory)
}
