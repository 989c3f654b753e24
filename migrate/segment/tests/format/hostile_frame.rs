//! Frames whose page table lies, and frames that are bombs, under digests that match.
//!
//! The small segment's frame 0 holds pages 3 (data), 4 (zero) and 900 (data) of 512 bytes; see `hostile_index`.

use crate::common::{Pages, delta, space, write};
use crate::forge::{Parts, assert_refused, zeros};

/// The small segment with another page table before the data of frame 0, stored as it is.
fn table(bytes: &[u8]) -> Parts {
    let mut parts = Parts::small();
    let raw = parts.raw(0);
    let raw = [bytes, &raw[raw.len() - 1024..]].concat();
    parts.set_frame(0, 0, &raw, raw.len() as u32);
    parts
}

/// A table of `count` and runs: kind, gap, pages, as they are to be written.
fn runs(count: u32, runs: &[&[u8]]) -> Parts {
    table(&[&count.to_le_bytes()[..], &runs.concat()].concat())
}

/// 895 as a varint: pages 5 to 899.
const GAP: [u8; 2] = [0xff, 0x06];

#[test]
fn the_table_is_as_documented() {
    runs(3, &[&[1, 0, 1], &[2, 0, 1], &[1, GAP[0], GAP[1], 1]])
        .check()
        .unwrap();
    // Data first and zero last would be as good, if the index said so.
    let swapped = runs(2, &[&[1, 0, 2], &[2, GAP[0], GAP[1], 1]]);
    swapped.check().unwrap();
}

#[test]
fn tables_that_lie() {
    let last: &[u8] = &[1, GAP[0], GAP[1], 1];
    let cases: [(Parts, &str); 20] = [
        (
            runs(3, &[&[1, 1, 1], &[2, 0, 1], &[1, 0xfe, 0x06, 1]]),
            "run 0 is not valid: the first run",
        ),
        (
            runs(3, &[&[1, 0, 1], &[2, 0, 0], last]),
            "run 1 is not valid: it has no pages",
        ),
        (
            runs(3, &[&[1, 0, 1], &[5, 0, 1], last]),
            "run 1 is not valid: its kind",
        ),
        (
            runs(3, &[&[0, 0, 1], &[2, 0, 1], last]),
            "run 0 is not valid: its kind",
        ),
        (
            runs(3, &[&[1, 0, 1], &[2, 0, 2], last]),
            "run 2 is not valid: it goes beyond",
        ),
        (
            runs(3, &[&[1, 0, 1], &[2, 0, 1], &[1, GAP[0], GAP[1], 2]]),
            "run 2 is not valid: it goes beyond",
        ),
        (
            runs(3, &[&[1, 0, 1], &[2, 0, 1], &[1, 0, 1]]),
            "its last run ends at page 6, the index says 901",
        ),
        (
            runs(3, &[&[1, 0, 1], &[1, 0, 1], last]),
            "run 2 is not valid: the table has more data pages",
        ),
        (
            runs(3, &[&[1, 0, 1], &[2, 0, 1], &[2, GAP[0], GAP[1], 1]]),
            "1 data and 2 zero pages",
        ),
        (
            runs(2, &[&[1, 0, 1], &[1, 0xff, 0x06, 1]]),
            "its last run ends at page 900",
        ),
        (
            runs(2, &[&[1, 0, 1], &[1, 0x80, 0x07, 1]]),
            "2 data and 0 zero pages, the index says 2 and 1",
        ),
        (runs(0, &[]), "its last run ends at page 3, the index says 901"),
        (
            runs(4, &[&[1, 0, 1], &[2, 0, 1], last]),
            "page table of frame 0 is cut short",
        ),
        (runs(4096, &[&[1, 0, 1], &[2, 0, 1], last]), "is cut short"),
        (
            runs(4097, &[&[1, 0, 1], &[2, 0, 1], last]),
            "frame 0: runs is too large: 4097, at most 4096",
        ),
        (
            runs(u32::MAX, &[&[1, 0, 1], &[2, 0, 1], last]),
            "frame 0: runs is too large",
        ),
        (
            runs(3, &[&[1, 0, 1], &[2, 0, 1], last, &[0]]),
            "its table ends at byte 14, its data begins at 15",
        ),
        (runs(3, &[&[1, 0, 1], &[2, 0x80, 0, 1], last]), "shortest form"),
        (
            runs(2, &[&[1, 0, 1], &[2, 0], &[0xff; 9], &[0x01]]),
            "run 1 is not valid: it goes beyond",
        ),
        (runs(2, &[&[1, 0, 1], &[2], &[0xff; 11]]), "too large"),
    ];
    for (parts, why) in cases {
        assert_refused(&parts, why);
    }
}

#[test]
fn a_table_that_is_cut_short() {
    // One byte more than the data: not even a count.
    assert_refused(
        &table(&[3]),
        "page table of frame 0 is cut short: 4 bytes needed, 1 there",
    );
    assert_refused(
        &table(&3u32.to_le_bytes()),
        "page table of frame 0 is cut short: 5 bytes needed, 4 there",
    );
}

#[test]
fn frames_that_decompress_to_another_length() {
    let mut parts = Parts::small();
    let raw = parts.raw(0);
    let stored = zstd::bulk::compress(&raw, 1).expect("compress");
    parts.set_frame(0, 1, &stored, raw.len() as u32 + 1);
    assert_refused(&parts, "frame 0 is not valid: it decompresses to");
    parts.set_frame(0, 1, &stored, raw.len() as u32 - 1);
    assert_refused(&parts, "decompress frame 0");
    parts.set_frame(0, 1, &[0xab; 50], raw.len() as u32);
    assert_refused(&parts, "decompress frame 0");
}

#[test]
fn a_bomb_stops_at_what_the_index_says() {
    for hidden in [false, true] {
        // 1 GiB for a frame that says it has 256 pages.
        let spaces = [space(0, 4096, 256)];
        let pages: Pages = (0..64).map(|page| ((0, page), Some(vec![1; 4096]))).collect();
        let bytes = write(&delta(7, &spaces), &[], &pages).0;
        let mut parts = Parts::of(&bytes);
        parts.entries[0][16..24].copy_from_slice(&256u64.to_le_bytes());
        parts.entries[0][40..44].copy_from_slice(&256u32.to_le_bytes());
        parts.set_frame(0, 1, &zeros(1 << 30, hidden), (1 << 20) + 7);
        assert_refused(&parts, "decompress frame 0");

        // 16 MiB for a frame that says it has 4 KiB.
        let pages: Pages = [((0, 5), Some(vec![1; 4096]))].into();
        let mut parts = Parts::of(&write(&delta(7, &spaces), &[], &pages).0);
        parts.set_frame(0, 1, &zeros(16 << 20, hidden), 4096 + 7);
        assert_refused(&parts, "decompress frame 0");
    }
}

#[test]
fn a_frame_moved_elsewhere_is_noticed() {
    // Digests are per frame, but the index that names them is under the root digest: swap two frames of one length.
    let spaces = [space(0, 512, 100)];
    let mut frames = Vec::new();
    for seed in [1, 2] {
        let pages: Pages = [((0, 5), Some(crate::common::noise(seed, 512)))].into();
        frames.push(Parts::of(&write(&delta(7, &spaces), &[], &pages).0));
    }
    let mut parts = frames[0].clone();
    parts.body = frames[1].body.clone();
    assert_refused(&parts, "frame 0 is damaged");
}
