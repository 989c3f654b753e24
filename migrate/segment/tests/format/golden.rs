//! Segments of version 1 as they were first written: read for ever, and written the same.
//!
//! `testdata/v1-full.seg` and `testdata/v1-delta.seg` were made by
//! `cargo test -p segment --test format -- --ignored regenerate_golden_files`. They are made anew only with a new
//! major version; what a later minor version adds gets files of its own.

use std::path::PathBuf;

use segment::{Epoch, Manifest, Record, SegmentReader};

use crate::common::{self, Pages, delta, full, noise, record, space};
use crate::forge::{Parts, u16_at};

fn path(file: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "testdata", file].iter().collect()
}

/// What is in the two files.
fn golden() -> [(&'static str, Manifest, Vec<Record>, Pages); 2] {
    let spaces = [space(0, 4096, 512), space(2, 512, 2048)];
    let records = vec![
        record("vcpu/0/regs", &noise(10, 144)),
        Record {
            tag: "serial".into(),
            version: 2,
            critical: false,
            payload: vec![3; 60],
        },
    ];
    let mut base = Pages::new();
    base.insert((0, 0), Some(noise(20, 4096)));
    base.insert((0, 1), Some(noise(21, 4096)));
    base.insert(
        (0, 130),
        Some(b"understudy ".iter().copied().cycle().take(4096).collect()),
    );
    base.insert((2, 2047), Some(noise(22, 512)));
    let mut change = Pages::new();
    change.insert((0, 1), None);
    change.insert((0, 2), Some(noise(23, 4096)));
    change.insert((0, 300), None);
    change.insert((0, 301), None);
    change.insert(
        (2, 0),
        Some(b"log line\n".iter().copied().cycle().take(512).collect()),
    );
    let of_change = Manifest {
        first_epoch: Some(Epoch(2)),
        label: Some("before the upgrade".into()),
        ..delta(4, &spaces)
    };
    [
        ("v1-full.seg", full(1, &spaces), records.clone(), base),
        ("v1-delta.seg", of_change, records[..1].to_vec(), change),
    ]
}

fn read(file: &str) -> Vec<u8> {
    std::fs::read(path(file)).expect("golden file")
}

#[test]
fn golden_files_are_read() {
    for (file, manifest, records, pages) in golden() {
        let reader = SegmentReader::open(read(file)).unwrap();
        reader.verify().unwrap();
        assert_eq!(reader.manifest(), &manifest, "{file}");
        assert_eq!(reader.records().unwrap(), records, "{file}");
        assert_eq!(common::read_all(&reader), pages, "{file}");
    }
}

/// Byte for byte where the bytes are ours. What zstd makes may differ from one version of zstd to the next, so
/// records and compressed frames are compared decompressed, and the fields that follow from them left out.
#[test]
fn golden_files_are_written_the_same() {
    for (file, manifest, records, pages) in golden() {
        let (mut was, mut is) = (
            Parts::of(&read(file)),
            Parts::of(&common::write(&manifest, &records, &pages).0),
        );
        assert_eq!(was.manifest, is.manifest, "{file}: manifest");
        let raw = |stored: &[u8]| zstd::bulk::decompress(stored, 1 << 20).unwrap();
        assert_eq!(raw(&was.records), raw(&is.records), "{file}: records");
        assert_eq!(was.entries.len(), is.entries.len(), "{file}: frames");
        let mut stored = 0;
        for i in 0..was.entries.len() {
            assert_eq!(was.raw(i), is.raw(i), "{file}: frame {i}");
            if u16_at(&was.entries[i], 2) == 0 {
                stored += 1;
                assert_eq!(was.stored(i), is.stored(i), "{file}: frame {i}");
                assert_eq!(
                    was.entries[i][48..],
                    is.entries[i][48..],
                    "{file}: digest of frame {i}"
                );
            }
        }
        assert!(stored > 0, "{file}: no frame is compared byte for byte");
        for parts in [&mut was, &mut is] {
            // Records stored bytes, body bytes, and the digests.
            parts.header[36..40].fill(0);
            parts.header[48..56].fill(0);
            parts.header[64..].fill(0);
            for entry in &mut parts.entries {
                // Offset, stored bytes, digest.
                entry[24..36].fill(0);
                entry[48..].fill(0);
            }
        }
        assert_eq!(was.header, is.header, "{file}: header");
        assert_eq!(was.entries, is.entries, "{file}: index");
    }
}

/// The example of `docs/segment-format.md`, taken from the text itself.
#[test]
fn the_documented_segment_is_one() {
    let text = std::fs::read_to_string(path("../../../docs/segment-format.md")).unwrap();
    let dump = text
        .split("```hexdump\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .unwrap();
    let mut bytes = Vec::new();
    for line in dump.lines() {
        // Offset, bytes, and what they are, with two blanks between.
        let mut columns = line.split("  ");
        let at = usize::from_str_radix(columns.next().unwrap(), 16).unwrap();
        assert_eq!(at, bytes.len(), "{line}");
        let hex = columns.next().unwrap().split_whitespace();
        bytes.extend(hex.map(|byte| u8::from_str_radix(byte, 16).unwrap()));
    }
    let reader = SegmentReader::open(&*bytes).unwrap();
    reader.verify().unwrap();
    assert_eq!(reader.manifest().name, common::name("web/1/2"));
    assert_eq!(reader.records().unwrap(), [record("rtc", &[0xca, 0xfe])]);
    let pages: Pages = [((0, 2), Some(vec![b'a'; 512])), ((0, 3), None)].into();
    assert_eq!(common::read_all(&reader), pages);
    let table = [2, 0, 0, 0, 1, 0, 1, 2, 0, 1];
    assert_eq!(Parts::of(&bytes).raw(0)[..10], table);
    assert!(
        text.contains("02 00 00 00   01 00 01   02 00 01"),
        "the table in the text"
    );
}

#[test]
#[ignore = "writes testdata/; only for a new major version"]
fn regenerate_golden_files() {
    for (file, manifest, records, pages) in golden() {
        std::fs::write(path(file), common::write(&manifest, &records, &pages).0).unwrap();
    }
}
