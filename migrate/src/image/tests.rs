use std::fs;

use proptest::prelude::*;
use segment::CheckpointId;

use super::*;
use crate::checkpoint::{EncodeOptions, EncodePool};
use crate::store::Durability;
use crate::store::fixture::{Bytes, Machine, chain, manifest, name, put, spaces};

const GO: GoOn<'static> = &|| true;

fn open(dir: &Path) -> Arc<FsStore> {
    FsStore::open(&dir.join("store"), None, Durability::Spool).unwrap()
}

fn filled(dir: &Path, links: u64) -> (Arc<FsStore>, Vec<(SegmentName, Vec<u8>)>) {
    let (store, segments) = (open(dir), chain("web", links));
    segments
        .iter()
        .for_each(|(name, bytes)| drop(put(&store, name, bytes).unwrap()));
    (store, segments)
}

fn held(store: &FsStore, text: &str) -> Held {
    let entry = store.get(&name(text)).unwrap();
    Held {
        name: entry.name,
        checkpoint: entry.checkpoint,
    }
}

fn build(store: &Arc<FsStore>, dir: &Path, tip: &str) -> Image {
    let disks = dir.join("hot");
    Image::build(store, &name(tip), (&disks, "web-0"), GO).unwrap().0
}

fn bytes(image: &Image) -> Bytes {
    let read = |part: &Part| {
        let mut bytes = vec![0; part.space.bytes() as usize];
        part.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    image.parts.iter().map(read).collect()
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Write(usize, u64, u8),
    Touch(usize, u64, u8),
    Checkpoint { full: bool },
    Follow,
}

fn op() -> impl Strategy<Value = Op> {
    let page = || (0usize..2, 0u64..40);
    prop_oneof![
        6 => (page(), 0u8..4).prop_map(|((space, page), value)| Op::Write(space, page, value)),
        8 => (page(), any::<u8>()).prop_map(|((space, page), value)| Op::Touch(space, page, value)),
        5 => prop::bool::weighted(0.1).prop_map(|full| Op::Checkpoint { full }),
        4 => Just(Op::Follow),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// With a delta cache of any size (whose changes may be applied once only): wherever it is brought to, it is what the
    /// memory and the disk were then, and a full checkpoint is where it does not go by itself.
    #[test]
    fn it_follows_as_the_memory_was(
        ops in prop::collection::vec(op(), 1..150),
        cache in prop_oneof![Just(0usize), Just(8 << 10), Just(1 << 30)],
    ) {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let pool = EncodePool::with_delta_cache(EncodeOptions { level: 1, threads: 1 }, cache);
        let mut machine = Machine::new();
        let mut last: Option<(SegmentName, CheckpointId)> = None;
        let (mut epoch, mut image, mut full_since) = (0, None::<Image>, false);
        for op in ops {
            match op {
                Op::Write(space, page, value) => machine.write(space, page, value),
                Op::Touch(space, page, value) => {
                    let size = spaces()[space].page_bytes as usize;
                    machine.bytes[space][page as usize * size + usize::from(value)] ^= 0x5a;
                    machine.dirty[space][page as usize] = true;
                }
                Op::Checkpoint { full } => {
                    epoch += 1;
                    let full = full || last.is_none();
                    full_since |= full;
                    let captured = machine.capture_now(full);
                    let name = name(&format!("web/1/{epoch}"));
                    let parent = last.as_ref().filter(|_| !full).map(|(name, id)| (name, *id));
                    pool.encode_to_store(&captured, &manifest(&name, &captured, parent), &store).unwrap();
                    last = Some((name, captured.checkpoint));
                }
                Op::Follow => {
                    let Some((name, checkpoint)) = last.clone() else { continue };
                    let tip = Held { name, checkpoint };
                    let mut now = match image.take() {
                        Some(image) => image,
                        None => build(&store, dir.path(), &tip.name.to_string()),
                    };
                    match now.advance(&store, &tip, GO) {
                        Ok(_) => {}
                        Err(ImageError::NotOnTheWay { .. }) => {
                            prop_assert!(full_since, "there was a way");
                            drop(now);
                            now = build(&store, dir.path(), &tip.name.to_string());
                        }
                        Err(error) => panic!("{error}"),
                    }
                    full_since = false;
                    prop_assert_eq!(now.at(), Some(&tip));
                    prop_assert!(bytes(&now) == machine.at_capture);
                    image = Some(now);
                }
            }
        }
    }
}

#[test]
fn what_is_zero_takes_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let (store, segments) = filled(dir.path(), 6);
    let mut image = build(&store, dir.path(), "web/1/2");
    image.advance(&store, &held(&store, "web/1/6"), GO).unwrap();
    let expected = crate::store::fixture::load(&store, &segments[5].0);
    assert!(bytes(&image) == expected);
    // Written in links 1 to 4, and made zero again by later ones.
    let memory = &image.parts[0].file;
    let data: u64 = expected[0]
        .chunks(4096)
        .map(|page| u64::from(page.iter().any(|b| *b != 0)))
        .sum();
    use std::os::unix::fs::MetadataExt;
    assert_eq!(memory.metadata().unwrap().blocks() * 512, data * 4096);
}

#[test]
fn it_goes_by_a_link_that_was_merged_and_keeps_what_it_is_at() {
    let dir = tempfile::tempdir().unwrap();
    let (store, segments) = filled(dir.path(), 8);
    let mut image = build(&store, dir.path(), "web/1/3");
    assert!(store.is_leased(&name("web/1/3").vm));
    store
        .merge_into_newest(&["web/1/5", "web/1/6", "web/1/7"].map(name), 1)
        .unwrap();
    let steps = image.advance(&store, &held(&store, "web/1/8"), GO).unwrap();
    assert_eq!(steps, 3, "4, 5 to 7, 8");
    assert!(bytes(&image) == crate::store::fixture::load(&store, &segments[7].0));
    drop(image);
    assert!(!store.is_leased(&name("web/1/3").vm));
}

#[test]
fn it_does_not_go_to_what_does_not_stand_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = filled(dir.path(), 5);
    let mut image = build(&store, dir.path(), "web/1/5");
    let before = bytes(&image);
    // A later generation went on from 3: what came after was never committed.
    let mut machine = Machine::new();
    machine.captures = 100;
    machine.write(0, 9, 9);
    let captured = machine.capture_now(false);
    let parent = held(&store, "web/1/3");
    let of = manifest(
        &name("web/2/6"),
        &captured,
        Some((&parent.name, parent.checkpoint)),
    );
    crate::store::fixture::pool()
        .encode_to_store(&captured, &of, &store)
        .unwrap();
    for tip in [held(&store, "web/2/6"), held(&store, "web/1/3")] {
        let error = image.advance(&store, &tip, GO).unwrap_err();
        assert!(matches!(error, ImageError::NotOnTheWay { .. }), "{error}");
        assert_eq!(image.at(), Some(&held(&store, "web/1/5")));
    }
    assert!(bytes(&image) == before);
    // The same name and another state is another checkpoint.
    let mut other = held(&store, "web/1/5");
    other.checkpoint = CheckpointId([7; 16]);
    let Err(image) = image.take(&other) else {
        panic!("taken as another checkpoint");
    };
    let taken = image.take(&held(&store, "web/1/5")).unwrap();
    assert_eq!(taken.memory.metadata().unwrap().len(), before[0].len() as u64);
    assert_eq!(taken.disks.len(), 1);
    let (disk, path) = taken.disks[0].clone();
    assert_eq!(disk, "disk0");
    assert!(fs::read(&path).unwrap() == before[1]);
    drop(taken);
    assert!(!path.exists(), "a disk nobody took is left");
}

#[test]
fn a_damaged_link_leaves_it_of_no_use() {
    let dir = tempfile::tempdir().unwrap();
    let (store, segments) = filled(dir.path(), 4);
    let mut image = build(&store, dir.path(), "web/1/2");
    let path = store.segment_path(&segments[3].0);
    let mut damaged = fs::read(&path).unwrap();
    let reader = SegmentReader::open(segments[3].1.as_slice()).unwrap();
    let last = reader.index().last().unwrap();
    damaged[(reader.header().body_offset() + last.offset) as usize] ^= 1;
    fs::write(&path, damaged).unwrap();
    let tip = held(&store, "web/1/4");
    let error = image.advance(&store, &tip, GO).unwrap_err();
    assert!(matches!(error, ImageError::Segment { .. }), "{error}");
    assert_eq!(image.at(), None);
    let error = image.advance(&store, &tip, GO).unwrap_err();
    assert!(matches!(error, ImageError::Between), "{error}");
    assert!(image.take(&tip).is_err());
}

#[test]
fn broken_off_it_stands_at_a_whole_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let (store, segments) = filled(dir.path(), 5);
    let mut image = build(&store, dir.path(), "web/1/1");
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let twice = || asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < 2;
    let steps = image.advance(&store, &held(&store, "web/1/5"), &twice).unwrap();
    assert_eq!(steps, 2);
    assert_eq!(image.at(), Some(&held(&store, "web/1/3")));
    assert!(bytes(&image) == crate::store::fixture::load(&store, &segments[2].0));
    let disks = dir.path().join("other");
    let never = Image::build(&store, &name("web/1/5"), (&disks, "web-1"), &|| false);
    assert!(matches!(never, Err(ImageError::BrokenOff)));
    assert_eq!(fs::read_dir(&disks).unwrap().count(), 0, "a disk's file is left");
}
