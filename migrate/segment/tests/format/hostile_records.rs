//! Records that break a rule, under digests that match.

use minicbor::Encoder;

use crate::forge::{Parts, assert_refused, zeros};

/// One record as the documentation has it.
fn record(tag: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes);
    encoder
        .map(4)
        .expect("map")
        .u8(0)
        .expect("key")
        .str(tag)
        .expect("tag");
    encoder
        .u8(1)
        .expect("key")
        .u16(3)
        .expect("version")
        .u8(2)
        .expect("key")
        .bool(true)
        .expect("critical");
    encoder.u8(3).expect("key").bytes(payload).expect("payload");
    bytes
}

fn array(count: u64, items: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Encoder::new(&mut bytes).array(count).expect("array");
    bytes.extend(items.concat());
    bytes
}

fn parts(raw: &[u8]) -> Parts {
    let mut parts = Parts::small();
    parts.set_records(raw);
    parts
}

#[test]
fn the_records_are_as_documented() {
    let reader = segment::SegmentReader::open(parts(&array(1, &[record("a", &[5])])).seal()).unwrap();
    let found = reader.records().unwrap();
    assert_eq!(
        found,
        [segment::Record {
            tag: "a".into(),
            version: 3,
            critical: true,
            payload: vec![5]
        }]
    );
    parts(&array(0, &[])).check().unwrap();
}

#[test]
fn a_bomb_is_not_decompressed_beyond_what_the_header_says() {
    for hidden in [false, true] {
        let bomb = Parts {
            records: zeros(1 << 30, hidden),
            ..Parts::small()
        };
        assert_refused(&bomb, "decompress records");
        // Nor as far as the header says, when that is too far.
        let honest = bomb.patch(40, (1u32 << 30).to_le_bytes());
        assert_refused(&honest, "decompressed records (header offset 40) is too large");
    }
}

#[test]
fn the_length_has_to_be_exact() {
    let raw = array(1, &[record("a", &[5; 100])]);
    let length = raw.len() as u32;
    parts(&raw).check().unwrap();
    assert_refused(
        &parts(&raw).patch(40, (length + 1).to_le_bytes()),
        "the header says",
    );
    assert_refused(
        &parts(&raw).patch(40, (length - 1).to_le_bytes()),
        "decompress records",
    );
    let empty = Parts {
        records: Vec::new(),
        ..Parts::small()
    };
    assert_refused(&empty, "records");
    let junk = Parts {
        records: vec![0xab; 100],
        ..Parts::small()
    };
    assert_refused(&junk, "decompress records");
}

#[test]
fn numbers_and_tags() {
    let numbered = |count: u64| -> Vec<u8> {
        let items: Vec<_> = (0..count).map(|i| record(&format!("r{i}"), &[])).collect();
        array(count, &items)
    };
    parts(&numbered(4096)).check().unwrap();
    let one = record("a", &[]);
    let cases = [
        (numbered(4097), "number of records is too large"),
        (array(2, &[one.clone(), one.clone()]), "two tagged \"a\""),
        (array(1, &[record("", &[])]), "printable"),
        (array(1, &[record("a\n", &[])]), "printable"),
        (
            array(1, &[record(&"a".repeat(65), &[])]),
            "tag of record 0 is too large",
        ),
        (array(1, &[one.clone(), vec![0]]), "1 bytes left over"),
        (array(2, std::slice::from_ref(&one)), "cut short"),
        (array(u64::MAX, std::slice::from_ref(&one)), "items"),
        (array(1, &[vec![0xa0]]), "decode records"),
        (array(1, &[vec![0x61, b'a']]), "decode records"),
        (one, "decode records"),
        (vec![0x9f, 0xff], "indefinite"),
        (Vec::new(), "cut short"),
        (
            [vec![0x81, 0xa1, 0x03, 0x5b], vec![0xff; 8]].concat(),
            "a text of",
        ),
    ];
    for (raw, why) in cases {
        assert_refused(&parts(&raw), why);
    }
}
