//! Whatever happens to the bytes of a segment is noticed.

use std::cell::RefCell;
use std::io;

use proptest::prelude::*;
use segment::{FormatError, FrameBuf, PageContent, PageIndex, ReadAt, SegmentReader, SpaceId};

use crate::common;
use crate::forge::{Parts, check};

#[test]
fn every_flipped_bit_is_noticed() {
    let good = Parts::small().seal();
    check(&good).unwrap();
    common::each_flip(&good, |bytes, what| {
        assert!(check(bytes).is_err(), "{what} was not noticed");
    });
}

#[test]
fn every_truncation_is_noticed() {
    let good = Parts::small().seal();
    for length in 0..good.len() {
        match check(&good[..length]) {
            Err(FormatError::Truncated { have, .. }) => assert_eq!(have, length as u64),
            other => panic!("{length} of {} bytes: {other:?}", good.len()),
        }
    }
}

#[test]
fn bytes_behind_the_end_are_noticed() {
    let mut bytes = Parts::small().seal();
    bytes.push(0);
    assert!(
        check(&bytes)
            .unwrap_err()
            .to_string()
            .contains("1 bytes after its end")
    );
}

/// A file that somebody writes to while it is open.
struct Changing(RefCell<Vec<u8>>);

impl ReadAt for Changing {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.borrow().read_exact_at(offset, buf)
    }
    fn len(&self) -> io::Result<u64> {
        ReadAt::len(&*self.0.borrow())
    }
}

#[test]
fn a_change_after_opening_is_noticed() {
    let parts = Parts::small();
    let source = Changing(RefCell::new(parts.seal()));
    let reader = SegmentReader::open(&source).unwrap();
    reader.verify().unwrap();
    let (records, body) = (
        reader.header().records_offset() as usize,
        reader.header().body_offset() as usize,
    );

    source.0.borrow_mut()[records + 8] ^= 1;
    assert!(matches!(reader.records(), Err(FormatError::Digest { .. })));
    source.0.borrow_mut()[records + 8] ^= 1;
    reader.records().unwrap();

    source.0.borrow_mut()[body] ^= 1;
    let error = reader.read_frame(0, &mut FrameBuf::new()).unwrap_err();
    assert!(
        matches!(&error, FormatError::Digest { what } if what == "frame 0"),
        "{error:?}"
    );
    source.0.borrow_mut().truncate(body);
    assert!(matches!(
        reader.read_frame(0, &mut FrameBuf::new()),
        Err(FormatError::Io { .. })
    ));
}

#[test]
fn a_buffer_holds_no_pages_after_an_error() {
    let (manifest, records, pages) = common::small();
    let mut bytes = common::write(&manifest, &records, &pages).0;
    let body = SegmentReader::open(&*bytes).unwrap().header().index_offset() as usize;
    bytes[body - 1] ^= 1;
    let reader = SegmentReader::open(&*bytes).unwrap();
    let mut buf = FrameBuf::new();
    assert_eq!(reader.read_frame(0, &mut buf).unwrap().pages().count(), 3);
    reader.read_frame(1, &mut buf).unwrap_err();
    assert!(format!("{buf:?}").contains("runs: 0"), "{buf:?}");

    // Nor when the table turns out wrong after some of its runs: the last run, of page 900, becomes zero pages.
    let mut parts = Parts::small();
    let mut raw = parts.raw(0);
    raw[10] = 2;
    let length = raw.len() as u32;
    parts.set_frame(0, 0, &raw, length);
    let reader = SegmentReader::open(parts.seal()).unwrap();
    reader.read_frame(0, &mut buf).unwrap_err();
    assert!(format!("{buf:?}").contains("runs: 0"), "{buf:?}");
}

/// Opens and reads everything in every way; only whether it panics matters.
fn exercise(bytes: &[u8]) {
    let Ok(reader) = SegmentReader::open(bytes) else {
        return;
    };
    let _ = reader.verify();
    let mut buf = FrameBuf::new();
    for i in 0..=reader.index().len() {
        if let Ok(frame) = reader.read_frame(i, &mut buf) {
            frame.pages().count();
            frame.runs().count();
        }
    }
    for page in [0, 1, 3, 4, 5, 900, 999, 1000, u64::MAX] {
        for space in [0, 1, 2, u16::MAX] {
            let content = reader.read_page(SpaceId(space), PageIndex(page));
            assert!(!matches!(content, Ok(PageContent::Data(bytes)) if bytes.is_empty()));
        }
    }
    let _ = segment::merge(&[reader], io::Cursor::new(Vec::new()), 1);
}

/// Changes some bytes of `part`, and perhaps its length.
fn disturb(part: &mut Vec<u8>, noise: &[(u16, u8)], cut: Option<u16>) {
    for (at, value) in noise {
        if !part.is_empty() {
            let at = usize::from(*at) % part.len();
            part[at] = *value;
        }
    }
    if let Some(cut) = cut {
        part.truncate(usize::from(cut) % (part.len() + 1));
    }
}

/// Small numbers and the ends of ranges reach further than random ones.
fn value() -> impl Strategy<Value = u8> {
    prop_oneof![
        0u8..8,
        any::<u8>(),
        Just(0x7f),
        Just(0x80),
        Just(0xff),
        Just(0xfb),
        Just(0x9b)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Noise below the digests: a hostile writer's digests always match.
    #[test]
    fn sealed_noise_never_panics(
        layer in 0..5,
        noise in proptest::collection::vec((any::<u16>(), value()), 1..4),
        cut in proptest::option::weighted(0.2, any::<u16>()),
    ) {
        let mut parts = Parts::small();
        match layer {
            0 => disturb(&mut parts.manifest, &noise, cut),
            1 => {
                let mut raw = zstd::bulk::decompress(&parts.records, 1 << 20).expect("records");
                disturb(&mut raw, &noise, cut);
                parts.set_records(&raw);
            }
            2 => {
                let mut entries = parts.entries.as_flattened().to_vec();
                disturb(&mut entries, &noise, None);
                parts.entries = entries.as_chunks().0.to_vec();
            }
            3 => {
                // The table is at the front: most of the noise goes there.
                let mut raw = parts.raw(0);
                let mut table = raw[..16].to_vec();
                disturb(&mut table, &noise, None);
                raw[..16].copy_from_slice(&table);
                let length = raw.len() as u32;
                parts.set_frame(0, 0, &raw, length);
            }
            _ => {
                let mut stored = parts.stored(0).to_vec();
                disturb(&mut stored, &noise, cut);
                let length = u32::from_le_bytes(parts.entries[0][36..40].try_into().expect("4"));
                parts.set_frame(0, 1, &stored, length);
            }
        }
        exercise(&parts.seal());
    }
}
