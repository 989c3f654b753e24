//! Indexes that lie, under digests that match.
//!
//! The small segment: space 0 has 1000 pages of 512 bytes, frame 0 holds its pages 3 (data), 4 (zero) and 900
//! (data); space 1 has 5 pages, frame 1 holds its page 4 (data).

use crate::forge::{Parts, assert_refused, u32_at};

#[test]
fn fields_of_an_entry() {
    let u16 = |value: u16| value.to_le_bytes().to_vec();
    let u32 = |value: u32| value.to_le_bytes().to_vec();
    let u64 = |value: u64| value.to_le_bytes().to_vec();
    let raw = u32_at(&Parts::small().entries[0], 36);
    let cases = [
        (1, 0, u16(2), "space 2 is not in the manifest"),
        (0, 2, u16(2), "codec 2 is not known"),
        (0, 2, u16(0), "stored bytes for"),
        (
            0,
            4,
            u16(1),
            "1 pages that need the feature same-pages, which the header does not name",
        ),
        (
            0,
            6,
            u16(2),
            "2 pages that need the feature page-changes, which the header does not name",
        ),
        (0, 8, u64(901), "pages 901 to 901"),
        (0, 8, u64(u64::MAX), "pages 18446744073709551615 to 901"),
        (0, 16, u64(3), "pages 3 to 3"),
        (0, 16, u64(1001), "a space with 1000 pages"),
        (0, 16, u64(u64::MAX), "a space with 1000 pages"),
        (0, 16, u64(5), "3 pages in the range 3 to 5"),
        (
            0,
            24,
            u64(1),
            "it begins at 1 of the body, the last one ended at 0",
        ),
        (1, 24, u64(0), "it begins at 0 of the body"),
        (1, 24, u64(u64::MAX), "of the body, the last one ended"),
        (0, 32, u32(0), "0 stored bytes for"),
        (0, 32, u32(raw), "stored bytes for"),
        (0, 32, u32(u32::MAX), "stored bytes for"),
        (0, 36, u32(0), "do not hold 2 pages"),
        (0, 36, u32(1024), "do not hold 2 pages"),
        (0, 36, u32(u32::MAX), "decompressed frame is too large"),
        (0, 40, u32(4096), "pages is too large"),
        (0, 40, u32(u32::MAX), "pages is too large"),
        (0, 44, u32(u32::MAX), "pages is too large"),
        (0, 44, u32(4000), "4002 pages in the range"),
        (1, 40, u32(0), "0 pages in the range"),
    ];
    for (i, at, bytes, why) in cases {
        assert_refused(&Parts::small().entry(i, at, bytes), why);
    }
}

#[test]
fn order_and_overlap() {
    let mut swapped = Parts::small();
    swapped.entries.swap(0, 1);
    assert_refused(&swapped, "it begins at");

    // Swapped with bodies that fit, so that only the order is wrong.
    let mut parts = Parts::small();
    let (a, b) = (parts.stored(0).to_vec(), parts.stored(1).to_vec());
    let raw = [u32_at(&parts.entries[0], 36), u32_at(&parts.entries[1], 36)];
    parts.entries.swap(0, 1);
    parts.entries[0][24..32].copy_from_slice(&0u64.to_le_bytes());
    parts.entries[1][24..32].copy_from_slice(&(b.len() as u64).to_le_bytes());
    parts.body = [&*b, &*a].concat();
    assert_refused(
        &parts,
        "page 3 of space 0 comes after page 5 of space 1: out of order",
    );

    // Two frames of one space: the second begins inside the first.
    let mut twice = Parts::small();
    twice.entries[1] = twice.entries[0];
    twice.set_frame(1, 1, &a, raw[0]);
    let offset = (a.len() as u64).to_le_bytes();
    twice.body = [a.clone(), a].concat();
    twice.entries[0][32..36].copy_from_slice(&(twice.body.len() as u32 / 2).to_le_bytes());
    twice.entries[1][24..32].copy_from_slice(&offset);
    assert_refused(
        &twice,
        "page 3 of space 0 comes after page 901 of space 0: out of order or overlapping",
    );
    let inside = twice.entry(1, 8, 900u64.to_le_bytes());
    assert_refused(&inside, "page 900 of space 0 comes after page 901");
}

#[test]
fn a_full_segment_has_no_zero_pages() {
    let mut parts = Parts::small();
    // The same frames under a full segment's manifest.
    let spaces = [
        crate::common::space(0, 512, 1000),
        crate::common::space(1, 512, 5),
    ];
    let full = crate::common::write(
        &crate::common::full(7, &spaces),
        &[],
        &crate::common::Pages::new(),
    )
    .0;
    parts.manifest = Parts::of(&full).manifest;
    assert_refused(&parts, "a full segment holds no zero pages");
    // Nor when the index hides them.
    let hidden = parts.entry(0, 44, 0u32.to_le_bytes());
    assert_refused(
        &hidden,
        "frame 0 run 1 is not valid: a full segment holds no zero pages",
    );
}

#[test]
fn the_frames_are_the_whole_body() {
    let mut parts = Parts::small();
    parts.body.push(0);
    assert_refused(&parts, "the body has");
    let mut parts = Parts::small();
    parts.body.pop();
    assert_refused(&parts, "the body has");
    let mut parts = Parts::small();
    parts.entries.pop();
    assert_refused(&parts, "the body has");
    parts.entries.clear();
    assert_refused(&parts, "the body has");
    parts.body.clear();
    parts.check().unwrap();
}

#[test]
fn page_data_has_its_own_limit() {
    // 300 pages of 4 KiB in one frame are more than 1 MiB.
    let spaces = [crate::common::space(0, 4096, 1000)];
    let pages = [((0, 0), Some(vec![1; 4096])), ((0, 999), Some(vec![1; 4096]))].into();
    let bytes = crate::common::write(&crate::common::delta(7, &spaces), &[], &pages).0;
    let parts = Parts::of(&bytes).entry(0, 40, 300u32.to_le_bytes());
    assert_refused(&parts, "page data is too large: 1228800, at most 1048576");
}
