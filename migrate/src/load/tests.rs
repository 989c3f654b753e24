use std::fs;
use std::sync::Arc;

use std::error::Error as _;

use super::*;
use crate::store::Durability;
use crate::store::fixture::{Bytes, Fresh, chain, load, name, other_checkpoint, put};

fn filled(dir: &Path, segments: &[(SegmentName, Vec<u8>)]) -> Arc<FsStore> {
    let store = FsStore::open(dir, None, Durability::Spool).unwrap();
    segments
        .iter()
        .for_each(|(name, bytes)| drop(put(&store, name, bytes).unwrap()));
    store
}

/// The obvious way: oldest first, every page written over what was there.
fn oldest_first(segments: &[(SegmentName, Vec<u8>)]) -> Bytes {
    let mut spaces: Bytes = crate::store::fixture::spaces()
        .iter()
        .map(|s| vec![0; s.bytes() as usize])
        .collect();
    for (_, bytes) in segments {
        let reader = SegmentReader::open(bytes.as_slice()).unwrap();
        let mut buf = FrameBuf::new();
        for i in 0..reader.index().len() {
            let space = usize::from(reader.index()[i].space != SpaceId::MEMORY);
            let size = reader.manifest().spaces[space].page_bytes as usize;
            for (page, content) in reader.read_frame(i, &mut buf).unwrap().pages() {
                let to = &mut spaces[space][page.0 as usize * size..][..size];
                match content {
                    segment::Page::Zero => to.fill(0),
                    segment::Page::Data(data) => to.copy_from_slice(data),
                    segment::Page::Change { xor, .. } => segment::xor_into(to, xor),
                }
            }
        }
    }
    spaces
}

#[test]
fn newest_first_is_as_oldest_first() {
    let dir = tempfile::tempdir().unwrap();
    let segments = chain("web", 12);
    let store = filled(dir.path(), &segments);
    for tip in [1, 5, 12] {
        let plan = LoadPlan::new(&store, &segments[tip - 1].0).unwrap();
        assert_eq!(plan.links(), tip);
        assert_eq!(plan.manifest().name, segments[tip - 1].0);
        assert_eq!(plan.records().unwrap()[0].payload, [tip as u8]);
        assert_eq!(
            plan.bytes(),
            segments[..tip]
                .iter()
                .map(|(_, bytes)| bytes.len() as u64)
                .sum::<u64>()
        );
        let expected = oldest_first(&segments[..tip]);
        for threads in [1, 3] {
            // A plan loads any number of machines.
            let fresh = Fresh::new();
            let stats = plan.load_into(&fresh, threads).unwrap();
            assert_eq!(stats.segments, tip as u64);
            assert!(fresh.into_bytes() == expected, "tip {tip}, {threads} threads");
        }
    }
}

#[test]
fn frames_that_newer_links_decided_are_not_read() {
    // The newest writes everything: nothing below is needed but the frames' ranges.
    let dir = tempfile::tempdir().unwrap();
    let mut machine = crate::store::fixture::Machine::new();
    let store = FsStore::open(dir.path(), None, Durability::Spool).unwrap();
    let pool = crate::store::fixture::pool();
    let mut parent: Option<(SegmentName, CheckpointId)> = None;
    for epoch in 1..=3u8 {
        for page in 0..crate::store::fixture::MEMORY_PAGES {
            machine.write(0, page, epoch);
        }
        let captured = machine.capture_now(epoch == 1);
        let name = name(&format!("web/1/{epoch}"));
        let parent_of = parent.as_ref().map(|(name, id)| (name, *id));
        let of = crate::store::fixture::manifest(&name, &captured, parent_of);
        pool.encode_to_store(&captured, &of, &store).unwrap();
        parent = Some((name, captured.checkpoint));
    }
    let fresh = Fresh::new();
    let stats = LoadPlan::new(&store, &name("web/1/3"))
        .unwrap()
        .load_into(&fresh, 2)
        .unwrap();
    assert_eq!(stats.frames_read, 5);
    assert_eq!(stats.frames_skipped, 10);
    assert_eq!(stats.pages_written, crate::store::fixture::MEMORY_PAGES);
    assert!(fresh.into_bytes() == machine.bytes);
}

#[test]
fn an_open_plan_does_not_mind_merges_and_removals() {
    let dir = tempfile::tempdir().unwrap();
    let segments = chain("web", 6);
    let store = filled(dir.path(), &segments);
    let tip = name("web/1/6");
    let plan = LoadPlan::new(&store, &tip).unwrap();
    // A store that was opened before the merge follows the files as they are.
    let reader = FsStore::open_read_only(dir.path()).unwrap();
    store
        .merge_into_newest(&["web/1/2", "web/1/3", "web/1/4"].map(name), 1)
        .unwrap();
    assert_eq!(LoadPlan::new(&reader, &tip).unwrap().links(), 4);
    let expected = oldest_first(&segments);
    assert!(load(&reader, &tip) == expected);
    store
        .all()
        .iter()
        .for_each(|entry| store.remove(&entry.name).unwrap());
    let fresh = Fresh::new();
    plan.load_into(&fresh, 2).unwrap();
    assert!(fresh.into_bytes() == expected);
}

#[test]
fn a_chain_longer_than_the_open_files_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let segments = chain("web", MAX_OPEN_LINKS as u64 + 20);
    let store = filled(dir.path(), &segments);
    let plan = LoadPlan::new(&store, &segments.last().unwrap().0).unwrap();
    assert_eq!(
        plan.links.iter().filter(|link| link.reader.is_some()).count(),
        MAX_OPEN_LINKS
    );
    let fresh = Fresh::new();
    plan.load_into(&fresh, 2).unwrap();
    assert!(fresh.into_bytes() == oldest_first(&segments));
    // One that was closed is rewritten meanwhile.
    store
        .merge_into_newest(&["web/1/3", "web/1/4"].map(name), 1)
        .unwrap();
    match plan.load_into(&Fresh::new(), 2).unwrap_err() {
        LoadError::Changed { name } => assert_eq!(name.epoch.0, 4),
        other => panic!("{other}"),
    }
}

#[test]
fn files_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    let segments = chain("web", 3);
    let path = |n: usize| dir.path().join(format!("file{n}"));
    for (n, (_, bytes)) in segments.iter().enumerate() {
        fs::write(path(n), bytes).unwrap();
    }
    let fresh = Fresh::new();
    LoadPlan::from_file(&path(0))
        .unwrap()
        .load_into(&fresh, 1)
        .unwrap();
    assert!(fresh.into_bytes() == oldest_first(&segments[..1]));
    let fresh = Fresh::new();
    LoadPlan::from_files(&[path(1), path(2), path(0)])
        .unwrap()
        .load_into(&fresh, 1)
        .unwrap();
    assert!(fresh.into_bytes() == oldest_first(&segments));

    let why = |paths: &[PathBuf]| {
        let error = LoadPlan::from_files(paths).unwrap_err();
        let mut text = error.to_string();
        if let Some(source) = error.source() {
            text = format!("{text}: {source}");
        }
        text
    };
    assert_eq!(
        why(&[path(2), path(0)]),
        "the chain of web/1/3 is not whole: web/1/2 is missing: web/1/3 builds on it"
    );
    assert_eq!(why(&[]), "no segment was named");
    fs::copy(path(0), path(7)).unwrap();
    assert!(why(&[path(0), path(7)]).contains("both hold web/1/1"));
    fs::write(path(8), other_checkpoint(&name("db/1/1"))).unwrap();
    assert!(why(&[path(0), path(8)]).contains("leave it out"));
    fs::write(path(9), b"\x7fELF").unwrap();
    assert!(
        why(&[path(9)]).contains("file9 is not a usable segment"),
        "{}",
        why(&[path(9)])
    );
    assert!(why(&[path(10)]).contains("open "));
}

#[test]
fn damage_names_segment_and_frame() {
    let dir = tempfile::tempdir().unwrap();
    let segments = chain("web", 3);
    let store = filled(dir.path(), &segments);
    let path = store.segment_path(&name("web/1/2"));
    let mut bytes = fs::read(&path).unwrap();
    let body = SegmentReader::open(bytes.as_slice())
        .unwrap()
        .header()
        .body_offset() as usize;
    bytes[body + 1] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = LoadPlan::new(&store, &name("web/1/3"))
        .unwrap()
        .load_into(&Fresh::new(), 2)
        .unwrap_err();
    let text = format!("{error}: {}", error.source().unwrap());
    assert!(text.starts_with("read web/1/2: frame 0 is damaged"), "{text}");
    // And a missing link names both.
    store.remove(&name("web/1/2")).unwrap();
    let error = LoadPlan::new(&store, &name("web/1/3")).unwrap_err();
    let text = format!("{error}: {}", error.source().unwrap());
    assert_eq!(
        text,
        "the chain of web/1/3 is not whole: web/1/2 is missing: web/1/3 builds on it"
    );
    let error = LoadPlan::new(&store, &name("web/1/9")).unwrap_err();
    assert!(matches!(error, LoadError::Chain { .. }), "{error}");
}

/// A target that refuses.
struct Refusing;

impl Target for Refusing {
    fn write(&self, _: SpaceId, _: PageIndex, _: &[u8]) -> Result<(), TargetError> {
        Err(TargetError::new("no such memory"))
    }
    fn read(&self, _: SpaceId, _: PageIndex, _: &mut [u8]) -> Result<(), TargetError> {
        Err(TargetError::new("no such memory"))
    }
}

#[test]
fn a_target_that_refuses_ends_the_load() {
    let dir = tempfile::tempdir().unwrap();
    let segments = chain("web", 1);
    let store = filled(dir.path(), &segments);
    let error = LoadPlan::new(&store, &segments[0].0)
        .unwrap()
        .load_into(&Refusing, 2)
        .unwrap_err();
    let text = format!("{error}: {}", error.source().unwrap());
    assert!(
        text.contains("of space 0, from web/1/1: no such memory"),
        "{text}"
    );
}
