//! Manifests that break a rule, under digests that match.

use minicbor::Encoder;
use minicbor::data::Type;
use segment::{Kind, Manifest, Space};

use crate::common::{delta, full, name, space};
use crate::forge::{Parts, assert_refused};

/// A manifest of the map `entries`: each a key and the CBOR of its value.
fn map(entries: &[(u64, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Encoder::new(&mut bytes).map(entries.len() as u64).expect("map");
    for (key, value) in entries {
        Encoder::new(&mut bytes).u64(*key).expect("key");
        bytes.extend_from_slice(value);
    }
    bytes
}

fn cbor(value: impl minicbor::Encode<()>) -> Vec<u8> {
    minicbor::to_vec(value).expect("cbor")
}

fn space_cbor(id: u16, name: &str, page_bytes: u32, pages: u64) -> Vec<u8> {
    map(&[
        (0, cbor(id)),
        (1, cbor(name)),
        (2, cbor(page_bytes)),
        (3, cbor(pages)),
    ])
}

fn array(items: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Encoder::new(&mut bytes).array(items.len() as u64).expect("array");
    bytes.extend(items.concat());
    bytes
}

fn id_cbor() -> Vec<u8> {
    [vec![0x50], vec![7; 16]].concat()
}

/// The entries of a good manifest, as the documentation has them; changed by `change`.
fn entries(changes: &[(u64, Vec<u8>)]) -> Vec<(u64, Vec<u8>)> {
    let spaces = array(&[space_cbor(0, "memory", 512, 1000), space_cbor(1, "disk1", 512, 5)]);
    let mut entries: std::collections::BTreeMap<u64, Vec<u8>> = [
        (0, cbor("web/1/7")),
        (1, id_cbor()),
        (2, cbor("web/1/6")),
        (3, id_cbor()),
        (4, cbor(7u32)),
        (5, cbor(1u64)),
        (6, cbor("vmm 0.1.0")),
        (7, spaces),
    ]
    .into();
    for (key, value) in changes {
        // An empty value leaves the key out.
        if value.is_empty() {
            entries.remove(key)
        } else {
            entries.insert(*key, value.clone())
        };
    }
    entries.into_iter().collect()
}

fn parts(manifest: Vec<u8>) -> Parts {
    Parts {
        manifest,
        ..Parts::small()
    }
}

fn changed(changes: &[(u64, Vec<u8>)]) -> Parts {
    parts(map(&entries(changes)))
}

#[test]
fn the_manifest_is_as_documented() {
    changed(&[]).check().unwrap();
}

#[test]
fn unknown_keys_are_skipped() {
    let nested = array(&[cbor("later"), map(&[(5, cbor(true))])]);
    changed(&[(12, nested), (400, cbor(1u8))]).check().unwrap();
}

#[test]
fn key_and_salt() {
    let bytes = |n: u8| [vec![0x58, n], vec![7; n.into()]].concat();
    for (changes, why) in [
        (vec![(10, bytes(8))], "its salt is missing"),
        (vec![(11, bytes(32))], "its key is missing"),
        (vec![(10, bytes(7)), (11, bytes(32))], "decode manifest"),
        (vec![(10, bytes(8)), (11, bytes(33))], "decode manifest"),
        (vec![(10, cbor("12345678")), (11, bytes(32))], "decode manifest"),
    ] {
        assert_refused(&changed(&changes), why);
    }
}

#[test]
fn names_and_parents() {
    let cases = [
        (vec![(0, cbor("web/1"))], "name is not valid"),
        (vec![(0, cbor("../1/7"))], "name is not valid"),
        (vec![(0, cbor("web/01/7"))], "name is not valid"),
        (vec![(2, cbor("web/1/7"))], "not earlier"),
        (vec![(2, cbor("web/1/8"))], "not earlier"),
        (vec![(2, cbor("web/2/1"))], "not earlier"),
        (vec![(2, cbor("db/1/6"))], "not of the same VM"),
        (vec![(2, Vec::new())], "its name is missing"),
        (vec![(3, Vec::new())], "checkpoint id is missing"),
        (vec![(4, cbor(0u32))], "0 in a delta"),
        (vec![(2, Vec::new()), (3, Vec::new())], "7 in a full segment"),
        (vec![(1, [vec![0x4f], vec![7; 15]].concat())], "decode manifest"),
        (vec![(0, Vec::new())], "decode manifest"),
        (vec![(4, cbor(u64::MAX))], "decode manifest"),
        (vec![(0, cbor(7u8))], "decode manifest"),
    ];
    for (changes, why) in cases {
        assert_refused(&changed(&changes), why);
    }
}

#[test]
fn texts() {
    let long = "x".repeat(257);
    for (key, what) in [(6, "producer"), (9, "label")] {
        assert_refused(&changed(&[(key, cbor(&*long))]), what);
        assert_refused(&changed(&[(key, cbor(""))]), "it is empty");
        assert_refused(&changed(&[(key, cbor("a\u{1b}[31m"))]), "control character");
        assert_refused(&changed(&[(key, vec![0x62, 0xff, 0xfe])]), "decode manifest");
        changed(&[(key, cbor(&long[1..]))]).check().unwrap();
    }
}

#[test]
fn spaces() {
    let one = |page_bytes, pages| array(&[space_cbor(0, "memory", page_bytes, pages)]);
    let ids = |ids: &[u16]| {
        let spaces: Vec<_> = ids
            .iter()
            .map(|id| space_cbor(*id, &format!("s{id}"), 512, 1000))
            .collect();
        array(&spaces)
    };
    let many: Vec<u16> = (0..65).collect();
    let cases = [
        (one(0, 1), "a power of two"),
        (one(513, 1), "a power of two"),
        (one(256, 1), "a power of two"),
        (one(2 << 20, 1), "a power of two"),
        (one(4096, (1 << 40) + 1), "space 0 is too large"),
        (one(4096, u64::MAX), "space 0 is too large"),
        (ids(&[0, 0]), "ascend"),
        (ids(&[1, 0]), "ascend"),
        (ids(&many), "number of spaces is too large"),
        (
            array(&[space_cbor(0, "a", 512, 1000), space_cbor(1, "a", 512, 1000)]),
            "the same name",
        ),
        (array(&[space_cbor(0, "", 512, 1000)]), "space name"),
        (
            vec![0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            "18446744073709551615 items",
        ),
        (vec![0x9a, 0x7f, 0xff, 0xff, 0xff], "2147483647 items"),
        (vec![0x9f, 0xff], "indefinite"),
    ];
    for (spaces, why) in cases {
        assert_refused(&changed(&[(7, spaces)]), why);
    }
    // At the limits.
    changed(&[(7, ids(&many[..64]))]).check().unwrap();
    let huge = array(&[
        space_cbor(0, "memory", 512, 1 << 43),
        space_cbor(1, "disk1", 512, 5),
    ]);
    changed(&[(7, huge)]).check().unwrap();
}

#[test]
fn nothing_may_follow_the_map_and_keys_ascend() {
    assert_refused(
        &parts([map(&entries(&[])), vec![0]].concat()),
        "1 bytes left over",
    );
    let mut twice = entries(&[]);
    twice.insert(1, (0, cbor("web/1/6")));
    assert_refused(&parts(map(&twice)), "ascending");
    assert_refused(&parts(Vec::new()), "cut short");
    let text = cbor("not a map");
    assert_eq!(minicbor::Decoder::new(&text).datatype().unwrap(), Type::String);
    assert_refused(&parts(text), "decode manifest");
}

#[test]
fn validate_takes_what_is_right() {
    let spaces = [space(0, 4096, 1 << 40), space(7, 1 << 20, 0)];
    full(1, &spaces).validate().unwrap();
    let across = Manifest {
        name: name("web/2/1"),
        ..delta(9, &spaces)
    };
    across.validate().unwrap();
    let Kind::Delta { parent, .. } = &across.kind else {
        panic!("a delta")
    };
    assert!(
        parent.epoch > across.name.epoch,
        "an earlier generation's epoch may be higher"
    );
    assert_eq!(
        Space {
            pages: u64::MAX,
            ..space(0, 512, 1)
        }
        .bytes(),
        u64::MAX
    );
}
