//! Headers that lie, with digests that match.

use std::cell::Cell;
use std::io;

use segment::{FormatError, ReadAt, SegmentReader, read_prefix};

use crate::forge::{HEADER, Parts, assert_refused};

/// A source as long as anyone asks for, which can be read no further than the header.
struct HeaderOnly {
    header: [u8; HEADER],
    beyond: Cell<bool>,
}

impl ReadAt for HeaderOnly {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.beyond
            .set(self.beyond.get() || offset != 0 || buf.len() > HEADER);
        self.header.as_slice().read_exact_at(offset, buf)
    }
    fn len(&self) -> io::Result<u64> {
        Ok(u64::MAX)
    }
}

/// Refused by the header alone, before anything else is read.
fn refused_by_header(parts: &Parts) -> FormatError {
    let source = HeaderOnly {
        header: parts.seal_header(),
        beyond: Cell::new(false),
    };
    let error = SegmentReader::open(&source).expect_err("refused");
    assert!(!source.beyond.get(), "it read beyond the header: {error}");
    assert_eq!(
        read_prefix(&source.header).expect_err("refused").to_string(),
        error.to_string()
    );
    error
}

#[test]
fn lengths_above_their_limits_are_refused_before_anything_is_taken() {
    let u32s = [
        (32, (64 << 10) + 1, "manifest"),
        (36, (65 << 20) + 1, "stored records"),
        (40, (64 << 20) + 1, "decompressed records"),
        (44, (1 << 22) + 1, "frame count"),
    ];
    for (at, least, field) in u32s {
        for value in [least, u32::MAX] {
            match refused_by_header(&Parts::small().patch(at, value.to_le_bytes())) {
                FormatError::TooLarge { what, bytes, max } => {
                    assert!(what.contains(field), "{what}");
                    assert_eq!((bytes, max), (value.into(), u64::from(least) - 1));
                }
                other => panic!("{field} {value}: {other:?}"),
            }
        }
    }
    for value in [(1u64 << 44) + 1, u64::MAX] {
        let error = refused_by_header(&Parts::small().patch(48, value.to_le_bytes()));
        assert!(
            matches!(error, FormatError::TooLarge { max, .. } if max == 1 << 44),
            "{error:?}"
        );
    }
}

#[test]
fn lengths_at_their_limits_still_have_to_be_the_file_s() {
    for (at, value) in [(32, 64 << 10), (36, 65 << 20), (44, 1 << 22)] {
        let mut parts = Parts::small().patch(at, u32::to_le_bytes(value));
        if at == 44 {
            parts = parts.patch(56, (u64::from(value) * 80).to_le_bytes());
        }
        let error = SegmentReader::open(parts.seal()).unwrap_err();
        assert!(matches!(error, FormatError::Truncated { .. }), "{error:?}");
    }
}

#[test]
fn the_index_has_to_be_as_long_as_the_frames_take() {
    for value in [0u64, 80, 161, 1 << 40, u64::MAX] {
        let error = refused_by_header(&Parts::small().patch(56, value.to_le_bytes()));
        assert!(error.to_string().contains("2 frames take 160"), "{error}");
    }
}

#[test]
fn a_newer_major_version_is_called_newer_whatever_its_digests() {
    let mut bytes = Parts::small().seal();
    bytes[8] = 2;
    bytes[10] = 3;
    let error = SegmentReader::open(&*bytes).unwrap_err();
    assert!(
        matches!(
            error,
            FormatError::NewerVersion {
                major: 2,
                minor: 3,
                known: 1
            }
        ),
        "{error:?}"
    );
    assert!(error.to_string().contains("2.3 is newer"), "{error}");
    assert_refused(&Parts::small().patch(8, [0, 0]), "no version 0");
}

#[test]
fn a_newer_minor_version_is_read() {
    let parts = Parts::small().patch(10, [9, 0]);
    parts.check().unwrap();
    assert_eq!(read_prefix(&parts.seal()).unwrap().minor, 9);
}

#[test]
fn an_unknown_feature_is_refused_only_when_it_must_be_known() {
    let error = refused_by_header(&Parts::small().patch(16, 0x8000_0000_0001_0001u64.to_le_bytes()));
    // The one it knows is not among those it names.
    assert!(error.to_string().contains("(bit 16, bit 63)"), "{error}");
    let parts = Parts::small().patch(24, u64::MAX.to_le_bytes());
    parts.check().unwrap();
    assert_eq!(read_prefix(&parts.seal()).unwrap().features_optional, u64::MAX);
}

#[test]
fn the_header_is_as_long_as_it_is() {
    for length in [0u32, 64, 127, 129, u32::MAX] {
        let error = refused_by_header(&Parts::small().patch(12, length.to_le_bytes()));
        assert!(error.to_string().contains("header length"), "{error}");
    }
}

#[test]
fn digests_are_of_what_they_say() {
    // Sealed, then changed below the root digest but not below the header's.
    let parts = Parts::small();
    let mut bytes = parts.seal();
    let manifest_end = HEADER + parts.manifest.len();
    for at in [HEADER, manifest_end, bytes.len() - 1] {
        bytes[at] ^= 1;
        let error = SegmentReader::open(&*bytes).unwrap_err();
        assert!(
            matches!(&error, FormatError::Digest { what } if what.contains("manifest, records or index")),
            "byte {at}: {error:?}"
        );
        bytes[at] ^= 1;
    }
    for at in [20, 64, 96, 127] {
        bytes[at] ^= 1;
        let error = SegmentReader::open(&*bytes).unwrap_err();
        assert!(
            matches!(&error, FormatError::Digest { what } if what == "header"),
            "byte {at}: {error:?}"
        );
        bytes[at] ^= 1;
    }
}
