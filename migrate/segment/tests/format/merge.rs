//! A chain merged is what its pages overlaid are.

use std::collections::BTreeMap;
use std::io::Cursor;

use proptest::prelude::*;
use segment::{
    CheckpointId, Epoch, Kind, Manifest, MergeError, PageContent, PageIndex, SegmentReader, SpaceId, merge,
    pages_per_frame,
};

use crate::common::{self, Pages, delta, full, noise, record, space};
use crate::forge::Parts;
use crate::round_trip::{content, fill};

type Reader = SegmentReader<Vec<u8>>;

fn open(manifest: &Manifest, pages: &Pages) -> Reader {
    let records = [record("epoch", &manifest.name.epoch.0.to_le_bytes())];
    SegmentReader::open(common::write(manifest, &records, pages).0).expect("open")
}

fn merged(segments: &[Reader]) -> Reader {
    let (out, summary) = merge(segments, Cursor::new(Vec::new()), 1).expect("merge");
    let reader = SegmentReader::open(out.into_inner()).expect("open");
    assert_eq!(reader.verify().expect("verify"), summary);
    reader
}

/// Every frame but the last of its space is full.
fn assert_dense(reader: &Reader) {
    for pair in reader
        .index()
        .windows(2)
        .filter(|pair| pair[0].space == pair[1].space)
    {
        let page_bytes = reader.manifest().space(pair[0].space).expect("space").page_bytes;
        let pages = pair[0].data_pages + pair[0].zero_pages + u32::from(pair[0].same_pages);
        assert_eq!(pages as usize, pages_per_frame(page_bytes), "frames are packed");
    }
}

fn dirty() -> impl Strategy<Value = BTreeMap<(u16, u64), (u8, u64)>> {
    let page = (prop_oneof![Just(0u16), Just(4)], 0..120u64);
    let few = proptest::collection::btree_map(page, content(), 0..60);
    let run = (0..1000u64, 0..600u64, content()).prop_map(|(start, length, content)| {
        (start..start + length).map(|page| ((0, page), content)).collect()
    });
    prop_oneof![few, run]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_merge_is_the_overlay(chain in proptest::collection::vec(dirty(), 1..6), fold in any::<bool>()) {
        let spaces = [space(0, 512, 1700), space(4, 4096, 120)];
        let bytes_of = |id: u16| if id == 0 { 512 } else { 4096 };
        let mut overlay = Pages::new();
        let mut segments = Vec::new();
        for (i, dirty) in chain.iter().enumerate() {
            let epoch = i as u64 + 5;
            let manifest = if i == 0 && fold { full(epoch, &spaces) } else { delta(epoch, &spaces) };
            let pages: Pages =
                dirty.iter().map(|(key, content)| (*key, fill(bytes_of(key.0), *content))).collect();
            segments.push(open(&manifest, &pages));
            overlay.extend(pages);
        }
        if fold {
            overlay.retain(|_, bytes| bytes.is_some());
        }
        let result = merged(&segments);
        prop_assert_eq!(common::read_all(&result), overlay);
        assert_dense(&result);
        let newest = segments[segments.len() - 1].manifest();
        prop_assert_eq!(&result.manifest().name, &newest.name);
        prop_assert_eq!(&result.manifest().kind, &segments[0].manifest().kind);
        prop_assert_eq!(result.records().expect("records"), segments[segments.len() - 1].records().expect("records"));
    }
}

fn pages(list: &[(u64, Option<u8>)]) -> Pages {
    list.iter()
        .map(|(page, byte)| ((0, *page), byte.map(|byte| vec![byte; 512])))
        .collect()
}

#[test]
fn a_page_that_became_zero_is_zero_afterwards() {
    let spaces = [space(0, 512, 100)];
    let base = || {
        open(
            &full(1, &spaces),
            &pages(&[(1, Some(1)), (2, Some(2)), (3, Some(3))]),
        )
    };
    let zeroed = || open(&delta(2, &spaces), &pages(&[(2, None)]));
    let before = || open(&delta(1, &spaces), &pages(&[(2, Some(2)), (7, Some(7))]));
    let page = |reader: &Reader, page| reader.read_page(SpaceId::MEMORY, PageIndex(page)).unwrap();

    // In a delta the zero has to stay, to hide what is below the delta's parent.
    let delta = merged(&[before(), zeroed()]);
    assert_eq!(page(&delta, 2), PageContent::Zero);
    assert_eq!(page(&delta, 7), PageContent::Data(vec![7; 512]));

    let fold = merged(&[base(), zeroed()]);
    assert_eq!(page(&fold, 1), PageContent::Data(vec![1; 512]));
    assert_eq!(page(&fold, 2), PageContent::Absent);
    assert_eq!(page(&fold, 3), PageContent::Data(vec![3; 512]));
    assert_eq!(fold.index().iter().map(|entry| entry.zero_pages).sum::<u32>(), 0);
}

#[test]
fn a_fold_packs_around_data_that_is_zero() {
    // Our writer notes no zero page as data; another may. 513 pages, two frames; one page less fits into one.
    let spaces = [space(0, 512, 1000)];
    let numbered: Pages = (0..513).map(|page| ((0, page), Some(vec![1; 512]))).collect();
    let mut parts = Parts::of(&common::write(&full(1, &spaces), &[], &numbered).0);
    let mut raw = parts.raw(0);
    let data = raw.len() - 512 * 512;
    raw[data..data + 512].fill(0);
    let stored = zstd::bulk::compress(&raw, 1).unwrap();
    parts.set_frame(0, 1, &stored, raw.len() as u32);
    let other = SegmentReader::open(parts.seal()).unwrap();
    assert_eq!(other.index().len(), 2);

    let fold = merged(&[other]);
    assert_eq!(fold.index().len(), 1);
    assert_eq!(
        (
            fold.index()[0].first_page,
            fold.index()[0].data_pages + u32::from(fold.index()[0].same_pages)
        ),
        (PageIndex(1), 512)
    );
}

#[test]
fn the_manifest_is_of_both_ends() {
    let spaces = [space(0, 512, 100)];
    let none = Pages::new();
    let oldest = Manifest {
        label: Some("old".into()),
        ..delta(3, &spaces)
    };
    let newest = Manifest {
        label: Some("new".into()),
        producer: "vmm 9".into(),
        ..delta(5, &spaces)
    };
    let result = merged(&[
        open(&oldest, &none),
        open(&delta(4, &spaces), &none),
        open(&newest, &none),
    ]);
    let expected = Manifest {
        kind: oldest.kind.clone(),
        links: oldest.links,
        first_epoch: Some(Epoch(3)),
        ..newest.clone()
    };
    assert_eq!(result.manifest(), &expected);

    // Merged again: the first epoch is that of the first one's first.
    let again = merged(&[result, open(&delta(6, &spaces), &none)]);
    assert_eq!(again.manifest().first_epoch, Some(Epoch(3)));
    assert_eq!(again.manifest().label, None);

    let fold = merged(&[open(&full(4, &spaces), &none), open(&newest, &none)]);
    assert_eq!(
        fold.manifest(),
        &Manifest {
            kind: Kind::Full,
            links: 0,
            first_epoch: None,
            ..newest
        }
    );
}

#[test]
fn what_is_not_a_chain_is_refused() {
    let spaces = [space(0, 512, 100)];
    let none = Pages::new();
    let refused = |segments: &[Manifest]| {
        let segments: Vec<Reader> = segments.iter().map(|manifest| open(manifest, &none)).collect();
        match merge(&segments, Cursor::new(Vec::new()), 1) {
            Err(MergeError::Broken { why, .. }) => why,
            Err(MergeError::Empty) => "empty".to_owned(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused(&[]), "empty");
    assert!(refused(&[full(1, &spaces), full(2, &spaces)]).contains("full segment"));
    assert!(refused(&[full(1, &spaces), delta(3, &spaces)]).contains("its parent is web/1/2"));
    assert!(refused(&[delta(3, &spaces), delta(2, &spaces)]).contains("its parent is web/1/1"));
    let twin = Manifest {
        checkpoint: CheckpointId([0xee; 16]),
        ..full(1, &spaces)
    };
    assert!(refused(&[twin, delta(2, &spaces)]).contains("not the same state"));
    let grown = [space(0, 512, 101)];
    assert!(refused(&[full(1, &spaces), delta(2, &grown)]).contains("address spaces differ"));
}

#[test]
fn a_damaged_input_is_named() {
    let spaces = [space(0, 512, 100)];
    let good = open(&full(1, &spaces), &pages(&[(1, Some(1))]));
    let data: Pages = [((0, 1), Some(noise(3, 512)))].into();
    let (mut bytes, _) = common::write(&delta(2, &spaces), &[], &data);
    let body = SegmentReader::open(&*bytes).unwrap().header().body_offset() as usize;
    bytes[body + 20] ^= 1;
    let bad = SegmentReader::open(bytes).unwrap();
    match merge(&[good, bad], Cursor::new(Vec::new()), 1) {
        Err(MergeError::Read { name, .. }) => assert_eq!(name, common::name("web/1/2")),
        other => panic!("{other:?}"),
    }
}
