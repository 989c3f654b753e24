//! Segments for the tests, and the obvious way to read and write them.

use std::collections::BTreeMap;
use std::io::Cursor;

use segment::{
    CheckpointId, FrameBuf, FrameEncoder, Kind, Manifest, Page, PageIndex, ReadAt, Record, RunData,
    SegmentName, SegmentReader, SegmentWriter, Space, SpaceId, Summary, pages_per_frame,
};

/// The pages of a segment by space and number. `None`: the segment says the page is zero.
pub(crate) type Pages = BTreeMap<(u16, u64), Option<Vec<u8>>>;

pub(crate) fn name(text: &str) -> SegmentName {
    text.parse().expect("a name")
}

pub(crate) fn space(id: u16, page_bytes: u32, pages: u64) -> Space {
    let name = if id == 0 {
        "memory".to_owned()
    } else {
        format!("disk{id}")
    };
    Space {
        id: SpaceId(id),
        name,
        page_bytes,
        pages,
    }
}

/// A full segment's manifest; its checkpoint id is the epoch's number 16 times.
pub(crate) fn full(epoch: u64, spaces: &[Space]) -> Manifest {
    Manifest {
        name: name(&format!("web/1/{epoch}")),
        checkpoint: CheckpointId([epoch as u8; 16]),
        kind: Kind::Full,
        links: 0,
        created_unix_ns: 1_800_000_000_000_000_000 + epoch,
        producer: "vmm 0.1.0".into(),
        spaces: spaces.to_vec(),
        first_epoch: None,
        label: None,
        encryption: None,
    }
}

/// The manifest of a delta on the epoch before.
pub(crate) fn delta(epoch: u64, spaces: &[Space]) -> Manifest {
    let below = full(epoch - 1, spaces);
    let kind = Kind::Delta {
        parent: below.name,
        parent_checkpoint: below.checkpoint,
    };
    Manifest {
        kind,
        links: epoch as u32,
        ..full(epoch, spaces)
    }
}

pub(crate) fn record(tag: &str, payload: &[u8]) -> Record {
    Record {
        tag: tag.into(),
        version: 1,
        critical: true,
        payload: payload.to_vec(),
    }
}

/// Bytes that do not compress, the same for the same seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
    })
    .take(length)
    .collect()
}

/// Writes a segment to memory, its pages in frames of the usual length.
pub(crate) fn write(manifest: &Manifest, records: &[Record], pages: &Pages) -> (Vec<u8>, Summary) {
    let mut writer = SegmentWriter::new(Cursor::new(Vec::new()), manifest, records).expect("begin");
    let mut encoder = FrameEncoder::new(1);
    for space in &manifest.spaces {
        let of_space: Vec<_> = pages.range((space.id.0, 0)..=(space.id.0, u64::MAX)).collect();
        for batch in of_space.chunks(pages_per_frame(space.page_bytes)) {
            let numbers: Vec<PageIndex> = batch.iter().map(|((_, page), _)| PageIndex(*page)).collect();
            let zero = vec![0; space.page_bytes as usize];
            let data: Vec<u8> = batch
                .iter()
                .flat_map(|(_, bytes)| bytes.as_ref().unwrap_or(&zero).clone())
                .collect();
            let frame = encoder
                .encode(space, manifest.kind.is_full(), &numbers, &data)
                .expect("encode");
            if let Some(frame) = frame {
                writer.push(frame).expect("push");
            }
        }
    }
    let (out, summary) = writer.finish().expect("finish");
    (out.into_inner(), summary)
}

/// Every page of a segment, read frame by frame, both ways there are.
pub(crate) fn read_all<R: ReadAt>(reader: &SegmentReader<R>) -> Pages {
    let mut pages = Pages::new();
    let mut buf = FrameBuf::new();
    for (i, entry) in reader.index().iter().enumerate() {
        let frame = reader.read_frame(i, &mut buf).expect("frame");
        let mut of_frame = Pages::new();
        for (page, content) in frame.pages() {
            let bytes = match content {
                Page::Zero => None,
                Page::Data(bytes) => Some(bytes.to_vec()),
                Page::Change { .. } => panic!("page {page} is a change: read it with what it is a change of"),
            };
            assert!(
                of_frame.insert((entry.space.0, page.0), bytes).is_none(),
                "page {page} comes twice"
            );
        }
        let mut of_runs = Pages::new();
        for (range, data) in frame.runs() {
            let length = (range.end - range.start) as usize;
            for (k, page) in range.enumerate() {
                let bytes = match data {
                    RunData::Zero => None,
                    RunData::Data(data) => {
                        let page_bytes = data.len() / length;
                        Some(data[k * page_bytes..][..page_bytes].to_vec())
                    }
                    RunData::Changes { .. } => panic!("page {page} is a change"),
                };
                of_runs.insert((entry.space.0, page), bytes);
            }
        }
        assert_eq!(of_frame, of_runs);
        pages.append(&mut of_frame);
    }
    pages
}

/// A small delta with everything in it: two spaces, a frame that compresses, one that does not, zero pages, gaps,
/// records, a label.
pub(crate) fn small() -> (Manifest, Vec<Record>, Pages) {
    let manifest = Manifest {
        label: Some("before the upgrade".into()),
        first_epoch: Some(segment::Epoch(6)),
        ..delta(7, &[space(0, 512, 1000), space(1, 512, 5)])
    };
    let records = vec![record("vcpu/0/regs", &[7; 40]), record("serial", &[])];
    let mut pages = Pages::new();
    pages.insert((0, 3), Some(vec![b'a'; 512]));
    pages.insert((0, 4), None);
    pages.insert((0, 900), Some(vec![b'b'; 512]));
    pages.insert((1, 4), Some(noise(1, 512)));
    (manifest, records, pages)
}

/// Shows `look` each way to change one byte of `good` by one bit, or by all of them, and says which that is.
pub(crate) fn each_flip(good: &[u8], look: impl Fn(&[u8], &str)) {
    let mut bytes = good.to_vec();
    for at in 0..good.len() {
        for mask in [1, 2, 4, 8, 16, 32, 64, 128, 0xff] {
            bytes[at] ^= mask;
            look(&bytes, &format!("byte {at} changed by {mask:#x}"));
            bytes[at] ^= mask;
        }
    }
    assert_eq!(bytes, good);
}
