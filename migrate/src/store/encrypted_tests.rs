//! Stores with keys, without, and with some.

use std::collections::BTreeSet;

use segment::{CheckpointId, Key, KeyId, Keyring};

use super::fixture::{Bytes, Fresh, Machine, encode_to_parent, load, name, put, vm};
use super::*;
use crate::image::Image;
use crate::load::LoadPlan;

const NO_KEY: u8 = 0;

fn key(n: u8) -> Key {
    Key::new([n; 32].into())
}

fn ring(keys: &[u8]) -> Keyring {
    Keyring::new(keys.iter().map(|n| key(*n)).collect())
}

fn open(dir: &Path, keys: &[u8]) -> Arc<FsStore> {
    let store = FsStore::open(dir, None, Durability::Spool).unwrap();
    store.set_keys(ring(keys));
    store
}

/// A chain `web/1/1`.. of which each link is written with the key of its number, or none; and what its tip is.
fn chain_of_keys(store: &Arc<FsStore>, keys: &[u8]) -> Bytes {
    let mut machine = Machine::new();
    let mut parent: Option<(SegmentName, CheckpointId)> = None;
    for (n, key) in (1..).zip(keys) {
        store.set_keys(ring(if *key == NO_KEY {
            &[]
        } else {
            std::slice::from_ref(key)
        }));
        for page in 0..20 {
            machine.write(0, n * 7 + page, (n * 3 + page) as u8);
            machine.write(1, n * 11 + page, (n * 5 + page) as u8);
        }
        let captured = machine.capture_now(n == 1);
        let name = name(&format!("web/1/{n}"));
        encode_to_parent(
            store,
            &name,
            &captured,
            parent.as_ref().map(|(name, id)| (name, *id)),
        )
        .unwrap();
        parent = Some((name, captured.checkpoint));
    }
    machine.at_capture
}

fn keys_of(store: &FsStore) -> Vec<Option<KeyId>> {
    store.entries(&vm("web")).iter().map(|entry| entry.key).collect()
}

/// What a store without keys holds of the same.
fn copied(dir: &Path, from: &FsStore) -> Arc<FsStore> {
    let store = open(dir, &[]);
    for entry in from.entries(&vm("web")) {
        let bytes = std::fs::read(from.segment_path(&entry.name)).unwrap();
        put(&store, &entry.name, &bytes).unwrap();
    }
    store
}

fn in_full(error: &dyn std::error::Error) -> String {
    super::scan::explain(error)
}

#[test]
fn a_chain_of_plain_and_encrypted_links_is_loaded_with_all_its_keys() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("own"), &[]);
    let expected = chain_of_keys(&store, &[NO_KEY, 1, 2, 2]);
    let id = |n: u8| Some(key(n).id());
    assert_eq!(keys_of(&store), [None, id(1), id(2), id(2)]);
    let tip = name("web/1/4");
    store.set_keys(ring(&[3, 2, 1]));
    assert!(load(&store, &tip) == expected);
    // From files, and as an image.
    let paths: Vec<_> = store
        .entries(&vm("web"))
        .iter()
        .map(|e| store.segment_path(&e.name))
        .collect();
    let fresh = Fresh::new();
    let plan = LoadPlan::from_files_with(&paths, &store.keys()).unwrap();
    assert_eq!(plan.missing_key(), None);
    plan.load_into(&fresh, 2).unwrap();
    assert!(fresh.into_bytes() == expected);
    Image::build(&store, &tip, (&dir.path().join("hot"), "web-0"), &|| true).unwrap();

    // One key is missing: it is named, with the link, before anything is loaded and when it is.
    store.set_keys(ring(&[2]));
    let plan = LoadPlan::new(&store, &tip).unwrap();
    assert_eq!(plan.missing_key(), Some((&name("web/1/2"), key(1).id())));
    let error = in_full(&plan.load_into(&Fresh::new(), 2).unwrap_err());
    assert!(
        error.contains(&format!("segment web/1/2 is encrypted with key {}", key(1).id())),
        "{error}"
    );
    assert!(error.contains("--key-file"), "{error}");
    let error = LoadPlan::from_files(&paths).unwrap().records().unwrap_err();
    assert!(
        in_full(&error).contains("segment web/1/4 is encrypted"),
        "{error}"
    );
}

#[test]
fn no_frame_of_a_store_with_keys_is_written_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let plain = open(&dir.path().join("plain"), &[]);
    chain_of_keys(&plain, &[NO_KEY]);
    let store = open(&dir.path().join("own"), &[]);
    chain_of_keys(&store, &[1]);
    let read = |store: &FsStore| std::fs::read(store.segment_path(&name("web/1/1"))).unwrap();
    let has = |bytes: Vec<u8>| bytes.windows(b"memory".len()).any(|window| window == b"memory");
    // The manifest is for everybody.
    assert!(has(read(&plain)) && has(read(&store)));
    let magic = |bytes: &[u8]| {
        let zstd = [0x28, 0xb5, 0x2f, 0xfd];
        bytes.windows(4).filter(|window| *window == zstd).count()
    };
    assert!(magic(&read(&plain)) > 2);
    assert_eq!(
        magic(&read(&store)),
        0,
        "a frame is stored without being encrypted"
    );
}

#[test]
fn a_holder_without_keys_stores_and_checks_and_does_not_merge() {
    let dir = tempfile::tempdir().unwrap();
    let owner = open(&dir.path().join("own"), &[]);
    let expected = chain_of_keys(&owner, &[1, 1, 1, 1]);
    let holder = copied(&dir.path().join("holder"), &owner);
    assert_eq!(keys_of(&holder), keys_of(&owner));
    for entry in holder.entries(&vm("web")) {
        let checked = holder.check(&entry.name, &Pace::unlimited()).unwrap();
        assert_eq!(checked.health, Health::Sound);
        holder.verify(&entry.name).unwrap();
    }
    // What is damaged it finds, as ever.
    let second = holder.segment_path(&name("web/1/2"));
    let good = std::fs::read(&second).unwrap();
    let mut bad = good.clone();
    let body = segment::SegmentReader::open(&*good)
        .unwrap()
        .header()
        .body_offset();
    bad[body as usize] ^= 1;
    std::fs::write(&second, bad).unwrap();
    let checked = holder.check(&name("web/1/2"), &Pace::unlimited()).unwrap();
    assert!(
        matches!(checked.health, Health::Damaged(_)),
        "{:?}",
        checked.health
    );
    put(&holder, &name("web/1/2"), &good).unwrap();

    // It would fold, and says that it cannot; by itself it leaves the links as they are, and says that.
    let tip = name("web/1/4");
    let error = holder.fold(&tip, 1, &Pace::unlimited()).unwrap_err();
    assert!(
        matches!(&error, StoreError::NoKey { name: of, key: with } if *of == name("web/1/1") && *with == key(1).id())
    );
    assert!(error.to_string().contains("--key-file"), "{error}");
    let policy = "last=1".parse::<KeepPolicy>().unwrap();
    let options = CollectOptions {
        max_links: 100,
        short_of_room: true,
        level: 1,
        pace: Pace::unlimited(),
    };
    let pinned = BTreeSet::new();
    assert!(!holder.wants_collecting(&vm("web"), &policy, &pinned, &options));
    let done = holder.collect(&vm("web"), &policy, &pinned, &options).unwrap();
    assert_eq!(done, Collected::default());
    assert_eq!(holder.unmergeable(), [(vm("web"), key(1).id())].into());
    assert_eq!(holder.entries(&vm("web")).len(), 4);

    // With the key, and a newer one to write with, it does: encrypted with that.
    holder.set_keys(ring(&[2, 1]));
    assert!(holder.wants_collecting(&vm("web"), &policy, &pinned, &options));
    let done = holder.collect(&vm("web"), &policy, &pinned, &options).unwrap();
    assert_eq!((done.merges, done.dropped), (1, 3), "{done:?}");
    assert_eq!(holder.unmergeable(), BTreeMap::new());
    assert_eq!(keys_of(&holder), [Some(key(2).id())]);
    holder.set_keys(ring(&[2]));
    assert!(load(&holder, &tip) == expected);
}

#[test]
fn a_merge_is_encrypted_wherever_there_is_a_key() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("own"), &[]);
    let expected = chain_of_keys(&store, &[NO_KEY, NO_KEY, NO_KEY]);
    store.set_keys(ring(&[1]));
    let entry = store
        .merge_into_newest(&["web/1/2", "web/1/3"].map(name), 1)
        .unwrap();
    assert_eq!(entry.key, Some(key(1).id()));
    assert_eq!(keys_of(&store), [None, Some(key(1).id())]);
    assert!(load(&store, &name("web/1/3")) == expected);
    let entry = store.fold(&name("web/1/3"), 1, &Pace::unlimited()).unwrap();
    assert_eq!((entry.kind, entry.key), (Kind::Full, Some(key(1).id())));
    assert!(load(&store, &name("web/1/3")) == expected);
}

#[test]
fn what_was_changed_by_one_without_the_key_is_refused_by_one_who_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let owner = open(&dir.path().join("own"), &[]);
    chain_of_keys(&owner, &[1]);
    let path = owner.segment_path(&name("web/1/1"));
    let mut bytes = std::fs::read(&path).unwrap();
    // The tag behind the index, and every digest made anew.
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    reseal(&mut bytes);
    let without = open(&dir.path().join("without"), &[]);
    put(&without, &name("web/1/1"), &bytes).unwrap();
    let with = open(&dir.path().join("with"), &[1]);
    let error = put(&with, &name("web/1/1"), &bytes).unwrap_err();
    assert!(in_full(&error).contains("was not written with key"), "{error}");
    assert!(with.all().is_empty());
    without.set_keys(ring(&[1]));
    let checked = without.check(&name("web/1/1"), &Pace::unlimited()).unwrap();
    assert!(
        matches!(checked.health, Health::Damaged(_)),
        "{:?}",
        checked.health
    );
}

/// Makes the root digest and the header's match, as anybody can.
fn reseal(bytes: &mut [u8]) {
    let (body, index) = {
        let header = segment::read_prefix(bytes).unwrap();
        (header.body_offset() as usize, header.index_offset() as usize)
    };
    let mut covered = bytes[..64].to_vec();
    covered.extend_from_slice(&bytes[128..body]);
    covered.extend_from_slice(&bytes[index..]);
    let root = blake3::derive_key("understudy segment v1 root", &covered);
    bytes[64..96].copy_from_slice(&root);
    let header = blake3::derive_key("understudy segment v1 header", &bytes[..96]);
    bytes[96..128].copy_from_slice(&header);
}
