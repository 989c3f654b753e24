//! Encryption: who has no key learns nothing and changes nothing.
//!
//! `testdata/v1.2-encrypted.seg` was made by
//! `cargo test -p segment --test format -- --ignored regenerate_encrypted_file`, with [`key`] and [`SALT`].

use std::io::Cursor;
use std::path::PathBuf;
use std::sync::Arc;

use segment::{
    Cipher, Features, FormatError, FrameBuf, FrameEncoder, Key, Keyring, Manifest, MergeError, PageIndex,
    ReadAt, Record, SegmentReader, SegmentWriter, Summary, merge, merge_encrypted, pages_per_frame,
    read_prefix,
};

use crate::common::{self, Pages, delta, full, noise, record, space};
use crate::forge::{Parts, text, u32_at, u64_at};

const SALT: [u8; 32] = [0x5a; 32];
/// A page that is looked for in files.
const SECRET: &[u8] = b"the guest's own secret, which is in no file";

fn key(n: u8) -> Key {
    Key::new([n; 32].into())
}

fn ring(keys: &[u8]) -> Keyring {
    Keyring::new(keys.iter().map(|n| key(*n)).collect())
}

fn secret(page_bytes: usize) -> Vec<u8> {
    SECRET.iter().copied().cycle().take(page_bytes).collect()
}

/// As [`common::write`], encrypted.
fn write(
    manifest: &Manifest,
    records: &[Record],
    pages: &Pages,
    key: &Key,
    salt: [u8; 32],
) -> (Vec<u8>, Summary) {
    let mut manifest = manifest.clone();
    let cipher = key.encrypt(&mut manifest, salt).expect("cipher");
    let out = Cursor::new(Vec::new());
    let mut writer =
        SegmentWriter::with_cipher(out, &manifest, records, Some(Arc::clone(&cipher))).expect("begin");
    for frame in frames(&manifest, pages, Some(&cipher)) {
        writer.push(frame).expect("push");
    }
    let (out, summary) = writer.finish().expect("finish");
    (out.into_inner(), summary)
}

fn frames(manifest: &Manifest, pages: &Pages, cipher: Option<&Arc<Cipher>>) -> Vec<segment::EncodedFrame> {
    let mut encoder = FrameEncoder::new(1);
    encoder.set_cipher(cipher.cloned());
    let mut frames = Vec::new();
    for space in &manifest.spaces {
        let of_space: Vec<_> = pages.range((space.id.0, 0)..=(space.id.0, u64::MAX)).collect();
        for batch in of_space.chunks(pages_per_frame(space.page_bytes)) {
            let numbers: Vec<PageIndex> = batch.iter().map(|((_, page), _)| PageIndex(*page)).collect();
            let zero = vec![0; space.page_bytes as usize];
            let bytes = |(_, bytes): &(_, &Option<Vec<u8>>)| bytes.as_ref().unwrap_or(&zero).clone();
            let data: Vec<u8> = batch.iter().flat_map(bytes).collect();
            let frame = encoder.encode(space, manifest.kind.is_full(), &numbers, &data);
            frames.extend(frame.expect("encode"));
        }
    }
    frames
}

/// [`common::small`], with a frame more and a secret in page and record.
fn small() -> (Manifest, Vec<Record>, Pages) {
    let (manifest, mut records, mut pages) = common::small();
    pages.insert((0, 3), Some(secret(512)));
    for page in 0..600 {
        pages.insert((0, page + 200), Some(noise(page, 512)));
    }
    records.push(record("secret", SECRET));
    (manifest, records, pages)
}

fn small_encrypted() -> Vec<u8> {
    let (manifest, records, pages) = small();
    write(&manifest, &records, &pages, &key(1), SALT).0
}

fn open<R: ReadAt>(bytes: R, keys: &Keyring) -> Result<SegmentReader<R>, FormatError> {
    SegmentReader::open_with(bytes, keys)
}

/// Opens and reads everything with the key.
fn check(bytes: &[u8]) -> Result<Summary, FormatError> {
    open(bytes, &ring(&[1]))?.verify()
}

fn holds(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn what_is_encrypted_comes_back_with_its_key_alone() {
    let (manifest, records, pages) = small();
    let (bytes, summary) = write(&manifest, &records, &pages, &key(1), SALT);
    // In whatever order the keys are.
    for keys in [ring(&[1]), ring(&[2, 1])] {
        let reader = open(&*bytes, &keys).unwrap();
        assert!(reader.is_open());
        assert_eq!(reader.verify().unwrap(), summary);
        assert_eq!(reader.records().unwrap(), records);
        assert_eq!(common::read_all(&reader), pages);
        let got = Manifest {
            encryption: None,
            ..reader.manifest().clone()
        };
        assert_eq!(got, manifest);
    }
    // Nor is there anything of it in the file, which the same without a key has.
    assert!(!holds(&bytes, &SECRET[..8]));
    assert!(!holds(&bytes, &noise(7, 512)[..16]));
    let (plain, plainly) = common::write(&manifest, &records, &pages);
    assert!(holds(&plain, &noise(7, 512)[..16]));
    // 16 bytes a frame, and for the records; 32 for the index; and the manifest's two keys.
    assert_eq!(
        summary.stored_bytes,
        plainly.stored_bytes + 16 * u64::from(summary.frames)
    );
    let header = read_prefix(&bytes).unwrap();
    let was = read_prefix(&plain).unwrap();
    assert_eq!((header.major, header.minor), (1, 2));
    assert_eq!(header.features_required, Features::ENCRYPTED);
    assert_eq!(header.index_bytes, was.index_bytes + 32);
    assert_eq!(header.records_stored_bytes, was.records_stored_bytes + 16);
}

#[test]
fn without_its_key_a_segment_is_checked_and_not_read() {
    let bytes = small_encrypted();
    for keys in [ring(&[]), ring(&[2, 3])] {
        let reader = open(&*bytes, &keys).unwrap();
        assert!(!reader.is_open());
        let summary = reader.verify().unwrap();
        assert_eq!(summary, check(&bytes).unwrap());
        let mut buf = FrameBuf::new();
        for error in [
            reader.records().unwrap_err(),
            reader.read_frame(0, &mut buf).unwrap_err(),
            reader.read_page(segment::SpaceId(1), PageIndex(4)).unwrap_err(),
        ] {
            assert!(matches!(error, FormatError::NoKey { .. }), "{error:?}");
            let id = key(1).id();
            let expected = format!("segment web/1/7 is encrypted with key {id}");
            assert!(error.to_string().starts_with(&expected), "{error}");
            assert!(error.to_string().contains("--key-file"), "{error}");
        }
        assert!(format!("{buf:?}").contains("runs: 0"));
    }
    // What is stored is checked all the same, frame by frame, and the records.
    let header = read_prefix(&bytes).unwrap();
    for at in [
        header.records_offset(),
        header.body_offset(),
        header.index_offset() - 1,
    ] {
        let mut bytes = bytes.clone();
        bytes[at as usize] ^= 1;
        let checked = SegmentReader::open(&*bytes).and_then(|reader| reader.verify());
        assert!(
            matches!(checked, Err(FormatError::Digest { .. })),
            "{at}: {checked:?}"
        );
    }
}

#[test]
fn every_flipped_bit_and_truncation_is_noticed() {
    let (manifest, records, pages) = common::small();
    let good = write(&manifest, &records, &pages, &key(1), SALT).0;
    check(&good).unwrap();
    common::each_flip(&good, |bytes, what| {
        assert!(check(bytes).is_err(), "{what} was not noticed");
        let without = SegmentReader::open(bytes).and_then(|reader| reader.verify());
        assert!(without.is_err(), "{what} was not noticed without the key");
    });
    for length in 0..good.len() {
        assert!(check(&good[..length]).is_err(), "{length} bytes");
    }
}

/// Refused though every digest is right, and not because of what is inside.
#[track_caller]
fn assert_forged(parts: &Parts, what: &str) {
    let error = match check(&parts.seal()) {
        Err(error @ FormatError::Forged { .. }) => text(&error),
        found => panic!("{what}: {found:?}"),
    };
    assert!(error.contains("of segment web/1/"), "{what}: {error}");
    assert!(error.contains("was not written with key"), "{what}: {error}");
}

/// The same, where the tag behind the index is made anew too: as if whoever changed it knew that one, and not the key of the
/// frames. So each part stands for itself.
#[track_caller]
fn assert_forged_inside(parts: &Parts, what: &str) {
    let encryption_salt = manifest_salt(parts);
    let mut parts = parts.clone();
    parts.tag = parts.index_tag(&[1; 32], &encryption_salt);
    let bytes = parts.seal();
    // It opens: the tag is right.
    let reader = open(&*bytes, &ring(&[1])).unwrap_or_else(|e| panic!("{what}: {}", text(&e)));
    let found = reader.verify();
    assert!(
        matches!(found, Err(FormatError::Forged { .. })),
        "{what}: {found:?}"
    );
}

fn manifest_salt(parts: &Parts) -> [u8; 32] {
    // The last of the map: key 11, 32 bytes.
    let at = parts.manifest.len() - 32;
    assert_eq!(parts.manifest[at - 3..at], [11, 0x58, 32]);
    parts.manifest[at..].try_into().expect("32 bytes")
}

#[test]
fn frames_stand_for_their_places_and_are_all_there() {
    // Three frames of the same lengths: 512 pages that do not compress.
    let pages: Pages = (0..3 * 512)
        .map(|page| ((0, page), Some(noise(page, 512))))
        .collect();
    let bytes = write(&full(1, &[space(0, 512, 2000)]), &[], &pages, &key(1), SALT).0;
    let good = Parts::of(&bytes);
    assert_eq!((good.seal(), good.entries.len()), (bytes, 3));
    let frame = |parts: &Parts, i: usize| (parts.stored(i).to_vec(), u32_at(&parts.entries[i], 36));
    // Two of them change places.
    let (a, b) = (0, 1);
    assert_eq!(
        u32_at(&good.entries[a], 32),
        u32_at(&good.entries[b], 32),
        "as long"
    );
    let mut swapped = good.clone();
    let ((first, raw), (second, raw_too)) = (frame(&good, a), frame(&good, b));
    swapped.set_frame(a, crate::forge::u16_at(&good.entries[a], 2), &second, raw_too);
    swapped.set_frame(b, crate::forge::u16_at(&good.entries[b], 2), &first, raw);
    assert_forged(&swapped, "two frames swapped");
    assert_forged_inside(&swapped, "two frames swapped");
    // One is left out, the last and one in the middle: no other is touched, so only the tag tells.
    for i in [1, good.entries.len() - 1] {
        let mut cut = good.clone();
        let entry = cut.entries.remove(i);
        let (at, bytes) = (u64_at(&entry, 24) as usize, u32_at(&entry, 32) as usize);
        cut.body.drain(at..at + bytes);
        for entry in &mut cut.entries[i..] {
            let moved = u64_at(entry, 24) - bytes as u64;
            entry[24..32].copy_from_slice(&moved.to_le_bytes());
        }
        let frames = cut.entries.len() as u32;
        cut.header[44..48].copy_from_slice(&frames.to_le_bytes());
        assert_forged(&cut, "a frame left out");
    }
}

#[test]
fn what_the_index_and_the_manifest_say_cannot_be_changed() {
    let good = Parts::of(&small_encrypted());
    let last = good.entries.len() - 1;
    for (i, at, bytes, what) in [
        (0, 8, 2u64.to_le_bytes().to_vec(), "first page"),
        (last - 1, 16, 999u64.to_le_bytes().to_vec(), "end page"),
        (0, 40, 500u32.to_le_bytes().to_vec(), "data pages"),
        (
            0,
            36,
            (u32_at(&good.entries[0], 36) + 1).to_le_bytes().to_vec(),
            "raw bytes",
        ),
    ] {
        let changed = good.clone().entry(i, at, bytes);
        // What the index's own rules do not refuse, the frame's tag does.
        match SegmentReader::open(changed.seal()) {
            Ok(_) => {
                assert_forged(&changed, what);
                assert_forged_inside(&changed, what);
            }
            Err(error) => assert!(matches!(error, FormatError::Invalid { .. }), "{what}: {error:?}"),
        }
    }
    // A text of the manifest: the label, the producer, the VM's name, and the checkpoint's id.
    for (from, to) in [
        (&b"before the upgrade"[..], &b"behind the upgrade"[..]),
        (b"vmm 0.1.0", b"vmm 0.1.1"),
        (b"web/1/7", b"web/1/8"),
        (&[7; 16], &[8; 16]),
    ] {
        let at = good
            .manifest
            .windows(from.len())
            .position(|window| window == from)
            .unwrap();
        let mut changed = good.clone();
        changed.manifest[at..at + to.len()].copy_from_slice(to);
        assert_forged(&changed, "manifest");
        assert_forged_inside(&changed, "manifest");
    }
    // The length of the records.
    let raw = u32_at(&good.header, 40);
    let mut changed = good;
    changed.header[40..44].copy_from_slice(&(raw + 1).to_le_bytes());
    assert_forged(&changed, "records");
    assert_forged_inside(&changed, "records");
}

#[test]
fn nothing_moves_from_one_segment_to_another() {
    let (manifest, records, pages) = small();
    let good = Parts::of(&write(&manifest, &records, &pages, &key(1), SALT).0);
    // The same checkpoint written again with the same key, as a merge does: only the salt differs.
    let other = Parts::of(&write(&manifest, &records, &pages, &key(1), [9; 32]).0);
    for i in 0..good.entries.len() {
        assert_ne!(good.stored(i), other.stored(i), "frame {i}");
        let mut moved = good.clone();
        let codec = crate::forge::u16_at(&other.entries[i], 2);
        moved.set_frame(i, codec, other.stored(i), u32_at(&other.entries[i], 36));
        assert_forged(&moved, "a frame of another segment");
        assert_forged_inside(&moved, "a frame of another segment");
    }
    assert_ne!(good.records, other.records);
    let mut moved = good;
    moved.records = other.records;
    assert_forged(&moved, "records of another segment");
    assert_forged_inside(&moved, "records of another segment");
    // The salt with them: the manifest is not the one they were written with.
    let mut salted = moved;
    let at = salted.manifest.len() - 32;
    salted.manifest[at..].copy_from_slice(&[9; 32]);
    assert_forged(&salted, "records and salt of another segment");
}

#[test]
fn header_and_manifest_agree_about_encryption() {
    let good = Parts::of(&small_encrypted());
    let plain = Parts::of(&common::write(&small().0, &small().1, &small().2).0);
    // The bit without the keys of the manifest, and the other way round; each with an index as long as it should be.
    let mut bit = plain;
    bit.header[16] |= 4;
    bit.tag = vec![0; 32];
    let mut no_bit = good.clone();
    no_bit.header[16] &= !4;
    no_bit.tag.clear();
    for parts in [bit, no_bit] {
        let error = text(&check(&parts.seal()).unwrap_err());
        assert!(
            error.contains("do not agree whether the segment is encrypted"),
            "{error}"
        );
    }
    // A key without its salt.
    let mut half = good;
    half.manifest[0] -= 1;
    half.manifest.truncate(half.manifest.len() - 35);
    let error = text(&check(&half.seal()).unwrap_err());
    assert!(error.contains("its salt is missing"), "{error}");
    // A frame no longer than its tag.
    let mut short = Parts::of(&small_encrypted());
    let raw = u32_at(&short.entries[0], 36);
    short.set_frame(0, 1, &[0; 16], raw);
    let error = text(&check(&short.seal()).unwrap_err());
    assert!(error.contains("16 stored bytes"), "{error}");
}

#[test]
fn a_writer_takes_only_what_is_encrypted_for_its_segment() {
    let (mut manifest, records, pages) = small();
    let plain = frames(&manifest, &pages, None);
    let mut other = manifest.clone();
    let stranger = key(1).encrypt(&mut other, [9; 32]).unwrap();
    let strange = frames(&other, &pages, Some(&stranger));
    let unencrypted = manifest.clone();
    let cipher = key(1).encrypt(&mut manifest, SALT).unwrap();
    let begin = |manifest: &Manifest, cipher: Option<&Arc<Cipher>>| {
        SegmentWriter::with_cipher(Cursor::new(Vec::new()), manifest, &records, cipher.cloned())
    };
    for frame in [&plain[0], &strange[0]] {
        let mut writer = begin(&manifest, Some(&cipher)).unwrap();
        let error = text(&writer.push(frame.clone()).unwrap_err());
        assert!(
            error.contains("frame 0 is not valid: it is not encrypted as its segment is"),
            "{error}"
        );
    }
    let mut writer = begin(&unencrypted, None).unwrap();
    writer.push(strange[0].clone()).unwrap_err();
    // Nor is there a segment whose manifest and cipher are not of each other.
    for (manifest, cipher) in [
        (&manifest, None),
        (&unencrypted, Some(&cipher)),
        (&manifest, Some(&stranger)),
        (&other, Some(&cipher)),
    ] {
        let error = text(&begin(manifest, cipher).unwrap_err());
        assert!(
            error.contains("not what the segment would be encrypted for"),
            "{error}"
        );
    }
}

#[test]
fn chains_of_both_kinds_and_several_keys_are_merged() {
    let spaces = [space(0, 512, 1000)];
    let page = |n: u8| Some(noise(n.into(), 512));
    let all: [Pages; 3] = [
        [((0, 1), page(1)), ((0, 2), page(2)), ((0, 900), page(3))].into(),
        [((0, 2), page(4)), ((0, 5), page(5))].into(),
        [((0, 5), page(6)), ((0, 900), None)].into(),
    ];
    let records = [record("r", SECRET)];
    let plain = common::write(&full(1, &spaces), &records, &all[0]).0;
    let old = write(&delta(2, &spaces), &records, &all[1], &key(2), SALT).0;
    let new = write(&delta(3, &spaces), &records, &all[2], &key(1), SALT).0;
    let readers = |keys: &Keyring| -> Vec<SegmentReader<&[u8]>> {
        [&*plain, &*old, &*new]
            .map(|bytes| open(bytes, keys).unwrap())
            .into()
    };
    let keys = ring(&[1, 2]);
    let out = || Cursor::new(Vec::new());
    let (bytes, _) = merge_encrypted(&readers(&keys), out(), 1, &key(1), [3; 32]).unwrap();
    let bytes = bytes.into_inner();
    let merged = open(&*bytes, &ring(&[1])).unwrap();
    let expected: Pages = [((0, 1), page(1)), ((0, 2), page(4)), ((0, 5), page(6))].into();
    merged.verify().unwrap();
    assert_eq!(common::read_all(&merged), expected);
    assert_eq!(merged.records().unwrap(), records);
    assert_eq!(merged.manifest().encryption.unwrap().key, key(1).id());
    assert!(!holds(&bytes, &noise(1, 512)[..16]));
    // Never the plain of it by mistake, and nothing without all keys.
    assert!(matches!(
        merge(&readers(&keys), out(), 1),
        Err(MergeError::Plain { name, .. }) if name == common::name("web/1/2")
    ));
    match merge_encrypted(&readers(&ring(&[1])), out(), 1, &key(1), [3; 32]) {
        Err(MergeError::Read {
            name,
            source: FormatError::NoKey { .. },
        }) => assert_eq!(name, common::name("web/1/2")),
        other => panic!("{other:?}"),
    }
    // One alone is encrypted anew.
    let (again, _) = merge_encrypted(&readers(&keys)[..1], out(), 1, &key(2), [4; 32]).unwrap();
    assert_eq!(
        common::read_all(&open(again.into_inner(), &ring(&[2])).unwrap()),
        all[0]
    );
}

#[test]
fn no_text_shows_a_key() {
    let key = key(0x2a);
    let mut manifest = small().0;
    let cipher = key.encrypt(&mut manifest, SALT).unwrap();
    let shown = format!(
        "{key:?} {cipher:?} {:?} {}",
        Keyring::new(vec![key.clone()]),
        key.id()
    );
    assert!(!shown.contains("42, 42") && !shown.contains("2a2a2a"), "{shown}");
}

fn golden() -> (Manifest, Vec<Record>, Pages) {
    let manifest = delta(2, &[space(0, 512, 8)]);
    let pages: Pages = [((0, 2), Some(noise(2, 512))), ((0, 3), None)].into();
    (manifest, vec![record("rtc", &[0xca, 0xfe])], pages)
}

fn golden_path() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "testdata", "v1.2-encrypted.seg"]
        .iter()
        .collect()
}

#[test]
fn the_golden_file_is_read_and_written_the_same() {
    let bytes = std::fs::read(golden_path()).unwrap();
    let (manifest, records, pages) = golden();
    let reader = open(&*bytes, &ring(&[1])).unwrap();
    reader.verify().unwrap();
    assert_eq!(reader.records().unwrap(), records);
    assert_eq!(common::read_all(&reader), pages);
    let (was, is) = (
        Parts::of(&bytes),
        Parts::of(&write(&manifest, &records, &pages, &key(1), SALT).0),
    );
    assert_eq!(was.manifest, is.manifest);
    // Its page does not compress, so zstd decides nothing of its frame.
    assert_eq!((&was.body, &was.entries), (&is.body, &is.entries));
    let ids = bytes.windows(8).filter(|window| *window == key(1).id().0).count();
    assert_eq!(ids, 1, "the key's id is in the manifest");
}

/// What is in the frame and behind the index, found as the documentation says and not by the crate.
#[test]
fn the_golden_file_is_what_is_documented() {
    let parts = Parts::of(&std::fs::read(golden_path()).unwrap());
    assert_eq!(parts.tag, parts.index_tag(&[1; 32], &SALT));
    let id = blake3::derive_key("understudy key id v1", &[1; 32]);
    assert_eq!(key(1).id().0, id[..8]);
}

#[test]
#[ignore = "writes testdata/; only for a new major version"]
fn regenerate_encrypted_file() {
    let (manifest, records, pages) = golden();
    std::fs::write(golden_path(), write(&manifest, &records, &pages, &key(1), SALT).0).unwrap();
}
