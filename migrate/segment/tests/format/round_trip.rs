//! What is written comes back.

use std::collections::BTreeMap;

use proptest::prelude::*;
use segment::{
    Codec, Epoch, FormatError, FrameBuf, FrameEncoder, Manifest, PageContent, PageIndex, Record,
    SegmentReader, Space, SpaceId, pages_per_frame, read_prefix,
};

use crate::common::{self, Pages, noise, space};

/// What a page is filled with: nothing, one byte, or noise.
pub(crate) fn content() -> impl Strategy<Value = (u8, u64)> {
    prop_oneof![Just((0, 0)), (Just(1), 1..255u64), (Just(2), any::<u64>())]
}

/// A page's bytes; all its zero pages are `None`.
pub(crate) fn fill(page_bytes: u32, (kind, seed): (u8, u64)) -> Option<Vec<u8>> {
    match kind {
        0 => None,
        1 => Some(vec![seed as u8; page_bytes as usize]),
        _ => Some(noise(seed, page_bytes as usize)),
    }
}

fn spaces() -> impl Strategy<Value = Vec<Space>> {
    proptest::collection::btree_map(0..9u16, (prop_oneof![Just(512), Just(4096)], 1..1500u64), 0..4).prop_map(
        |map| {
            map.into_iter()
                .map(|(id, (bytes, pages))| space(id, bytes, pages))
                .collect()
        },
    )
}

fn dirty() -> impl Strategy<Value = BTreeMap<u64, (u8, u64)>> {
    prop_oneof![
        proptest::collection::btree_map(0..1500u64, content(), 0..100),
        // Long runs, so that frames fill up.
        (0..700u64, 0..700u64, content()).prop_map(|(start, length, content)| {
            (start..start + length).map(|page| (page, content)).collect()
        }),
    ]
}

fn records() -> impl Strategy<Value = Vec<Record>> {
    let payload = proptest::collection::vec(any::<u8>(), 0..300);
    proptest::collection::btree_map(
        "[a-z]{1,9}(/[0-9])?",
        (any::<u16>(), any::<bool>(), payload),
        0..5,
    )
    .prop_map(|map| {
        map.into_iter()
            .map(|(tag, (version, critical, payload))| Record {
                tag,
                version,
                critical,
                payload,
            })
            .collect()
    })
}

fn check_pages(manifest: &Manifest, bytes: &[u8], pages: &Pages) {
    let full = manifest.kind.is_full();
    let reader = SegmentReader::open(bytes).expect("open");
    let expected: Pages = pages
        .iter()
        .filter(|(_, bytes)| !full || bytes.is_some())
        .map(|(k, v)| (*k, v.clone()))
        .collect();
    assert_eq!(common::read_all(&reader), expected);
    for space in &manifest.spaces {
        for page in (0..space.pages).step_by(37) {
            let found = reader.read_page(space.id, PageIndex(page)).expect("page");
            let wanted = match expected.get(&(space.id.0, page)) {
                Some(Some(bytes)) => PageContent::Data(bytes.clone()),
                Some(None) => PageContent::Zero,
                None => PageContent::Absent,
            };
            assert_eq!(found, wanted, "page {page} of space {}", space.id);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_written_comes_back(
        spaces in spaces(),
        dirty in proptest::collection::vec(dirty(), 4),
        records in records(),
        full in any::<bool>(),
        label in proptest::option::of("[a-zA-Zäöü ]{1,60}"),
        first_epoch in proptest::option::of(any::<u64>().prop_map(Epoch)),
    ) {
        let base = if full { common::full(9, &spaces) } else { common::delta(9, &spaces) };
        let manifest = Manifest { label, first_epoch, ..base };
        let pages: Pages = spaces
            .iter()
            .zip(&dirty)
            .flat_map(|(space, dirty)| {
                dirty
                    .iter()
                    .filter(|(page, _)| **page < space.pages)
                    .map(|(page, content)| ((space.id.0, *page), fill(space.page_bytes, *content)))
            })
            .collect();
        let (bytes, summary) = common::write(&manifest, &records, &pages);
        let reader = SegmentReader::open(&*bytes).expect("open");
        prop_assert_eq!(reader.manifest(), &manifest);
        prop_assert_eq!(reader.records().expect("records"), records);
        prop_assert_eq!(reader.verify().expect("verify"), summary);
        prop_assert_eq!(summary.file_bytes, bytes.len() as u64);
        prop_assert_eq!(summary.digest, reader.digest());
        prop_assert_eq!(read_prefix(&bytes[..128]).expect("prefix").file_bytes(), bytes.len() as u64);
        check_pages(&manifest, &bytes, &pages);
    }

    #[test]
    fn frames_in_finds_what_a_scan_finds(
        dirty in proptest::collection::vec(dirty(), 3),
        id in 0..4u16,
        start in 0..1500u64,
        length in 0..600u64,
    ) {
        let spaces = [space(0, 512, 1500), space(1, 512, 1500), space(3, 512, 1500)];
        let pages: Pages = spaces
            .iter()
            .zip(&dirty)
            .flat_map(|(space, dirty)| dirty.keys().map(|page| ((space.id.0, *page), None)))
            .collect();
        let (bytes, _) = common::write(&common::delta(9, &spaces), &[], &pages);
        let reader = SegmentReader::open(&*bytes).expect("open");
        let end = start + length;
        let found: Vec<usize> = reader.frames_in(SpaceId(id), PageIndex(start)..PageIndex(end)).collect();
        let scanned: Vec<usize> = (0..reader.index().len())
            .filter(|i| {
                let entry = &reader.index()[*i];
                entry.space.0 == id
                    && entry.first_page.0.max(start) < entry.end_page.0.min(end)
            })
            .collect();
        prop_assert_eq!(found, scanned);
    }
}

#[test]
fn frames_in_takes_half_open_ranges() {
    let (manifest, records, pages) = common::small();
    let (bytes, _) = common::write(&manifest, &records, &pages);
    let reader = SegmentReader::open(&*bytes).unwrap();
    let found = |space, start, end| reader.frames_in(SpaceId(space), PageIndex(start)..PageIndex(end));
    // Frame 0 has the range 3..901 of space 0, frame 1 the range 4..5 of space 1.
    assert!(found(0, 0, 3).is_empty());
    assert_eq!(found(0, 0, 4), 0..1);
    assert_eq!(found(0, 500, 501), 0..1);
    assert_eq!(found(0, 900, 2000), 0..1);
    assert!(found(0, 901, u64::MAX).is_empty());
    assert!(found(0, 500, 500).is_empty());
    assert!(found(1, 0, 4).is_empty());
    assert_eq!(found(1, 0, 5), 1..2);
    assert!(found(2, 0, u64::MAX).is_empty());
}

#[test]
fn a_segment_in_a_file() {
    let (manifest, records, pages) = common::small();
    let (bytes, _) = common::write(&manifest, &records, &pages);
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, &bytes).unwrap();
    let reader = SegmentReader::open(std::sync::Arc::new(file)).unwrap();
    assert_eq!(common::read_all(&reader), pages);
    assert_eq!(reader.records().unwrap(), records);
}

#[test]
fn zero_pages_are_found_by_the_encoder() {
    let space = space(0, 4096, 100);
    let pages: Vec<PageIndex> = (10..14).map(PageIndex).collect();
    let mut data = vec![0; 4 * 4096];
    data[2 * 4096 - 1] = 1;
    let mut encoder = FrameEncoder::new(1);

    let delta = encoder
        .encode(&space, false, &pages, &data)
        .unwrap()
        .unwrap()
        .entry;
    assert_eq!((delta.first_page.0, delta.end_page.0), (10, 14));
    assert_eq!((delta.data_pages, delta.zero_pages), (1, 3));

    let full = encoder
        .encode(&space, true, &pages, &data)
        .unwrap()
        .unwrap()
        .entry;
    assert_eq!((full.first_page.0, full.end_page.0), (11, 12));
    assert_eq!((full.data_pages, full.zero_pages), (1, 0));

    assert!(
        encoder
            .encode(&space, true, &pages, &vec![0; 4 * 4096])
            .unwrap()
            .is_none()
    );
    assert!(encoder.encode(&space, false, &[], &[]).unwrap().is_none());
}

#[test]
fn what_does_not_compress_is_stored() {
    let space = space(0, 4096, 100);
    let pages = [PageIndex(0)];
    let mut encoder = FrameEncoder::new(3);
    let frame = encoder
        .encode(&space, true, &pages, &noise(5, 4096))
        .unwrap()
        .unwrap();
    assert_eq!((frame.entry.codec, frame.bytes.len()), (Codec::Stored, 4096 + 7));
    let frame = encoder.encode(&space, true, &pages, &[9; 4096]).unwrap().unwrap();
    assert_eq!(frame.entry.codec, Codec::Zstd);
    assert!(frame.bytes.len() < 100);
}

#[test]
fn a_frame_is_a_quarter_of_a_mebibyte() {
    assert_eq!(pages_per_frame(4096), segment::FRAME_PAGES);
    assert_eq!(pages_per_frame(512), 512);
    assert_eq!(pages_per_frame(1 << 20), 1);
    assert_eq!(pages_per_frame(0), 512);
    assert_eq!(pages_per_frame(u32::MAX), 1);
}

#[test]
fn pages_and_frames_that_are_not_there() {
    let (manifest, records, pages) = common::small();
    let (bytes, _) = common::write(&manifest, &records, &pages);
    let reader = SegmentReader::open(bytes).unwrap();
    let page = |space, page| reader.read_page(SpaceId(space), PageIndex(page));
    assert_eq!(page(0, 5).unwrap(), PageContent::Absent);
    assert_eq!(page(0, 999).unwrap(), PageContent::Absent);
    assert_eq!(page(0, 4).unwrap(), PageContent::Zero);
    assert!(matches!(page(0, 1000), Err(FormatError::Invalid { .. })));
    assert!(matches!(page(2, 0), Err(FormatError::Invalid { .. })));
    assert!(matches!(
        reader.read_frame(2, &mut FrameBuf::new()),
        Err(FormatError::Invalid { .. })
    ));
}
