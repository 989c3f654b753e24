//! The store without crashes; `crash_tests` has those.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::{Arc, Barrier};

use segment::Generation;

use super::fixture::{Machine, chain, checkpoint_of, encode_to, id, load, name, other_checkpoint, put, vm};
use super::*;

fn open(dir: &Path) -> Arc<FsStore> {
    FsStore::open(dir, None, Durability::Durable).unwrap()
}

fn names(store: &FsStore) -> Vec<String> {
    store.all().iter().map(|entry| entry.name.to_string()).collect()
}

#[test]
fn what_was_committed_is_there_after_opening_again() {
    let dir = tempfile::tempdir().unwrap();
    let segments = chain("web", 3);
    let before = {
        let store = open(dir.path());
        for (name, bytes) in &segments {
            let stored = put(&store, name, bytes).unwrap();
            assert_eq!(stored.entry().bytes, bytes.len() as u64);
            assert_eq!(stored.entry().checkpoint, checkpoint_of(bytes));
        }
        store.all()
    };
    let store = open(dir.path());
    assert_eq!(store.all(), before);
    assert_eq!(
        store.used_bytes(),
        segments.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>()
    );
    assert_eq!(store.vms(), [vm("web")]);
    assert!(store.damaged().is_empty());
    for (name, bytes) in &segments {
        let mut held = Vec::new();
        store.open_raw(name).unwrap().0.read_to_end(&mut held).unwrap();
        assert_eq!(held, *bytes);
        store.verify(name).unwrap();
    }
    assert_eq!(store.newest_complete(&vm("web")).unwrap().name, name("web/1/3"));
    assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
}

#[test]
fn a_second_process_is_told_who_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path());
    // flock belongs to the open file, so a second open in one process is refused as another process is.
    let refused = FsStore::open(dir.path(), None, Durability::Durable).unwrap_err();
    let text = refused.to_string();
    assert!(text.contains(&dir.path().display().to_string()), "{text}");
    assert!(text.contains(&format!("pid {}", std::process::id())), "{text}");
    // Reading is allowed beside it, changing is not.
    let (segment, bytes) = chain("web", 1).remove(0);
    put(&first, &segment, &bytes).unwrap();
    let reader = FsStore::open_read_only(dir.path()).unwrap();
    reader.verify(&segment).unwrap();
    assert!(matches!(
        reader.begin(&name("web/1/2"), 10),
        Err(StoreError::ReadOnly { .. })
    ));
    assert!(matches!(
        reader.remove(&segment),
        Err(StoreError::ReadOnly { .. })
    ));
    assert!(matches!(
        reader.promise(&vm("web"), Generation(2)),
        Err(StoreError::ReadOnly { .. })
    ));
    drop(first);
    open(dir.path());
    let missing = dir.path().join("nothing");
    assert!(matches!(
        FsStore::open_read_only(&missing),
        Err(StoreError::NoStore { .. })
    ));
    assert!(!missing.exists());
}

#[test]
fn a_name_keeps_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (segment, bytes) = chain("web", 1).remove(0);
    let stored = put(&store, &segment, &bytes).unwrap();
    // Offered again: the proof comes with the refusal.
    match put(&store, &segment, &bytes).unwrap_err() {
        StoreError::AlreadyHeld { stored: again } => assert_eq!(*again, stored),
        other => panic!("{other}"),
    }
    assert_eq!(store.stored(&segment), Some(stored));
    assert_eq!(store.stored(&name("web/1/2")), None);
}

#[test]
fn of_two_that_put_one_name_one_wins_whole() {
    let (segment, first) = chain("web", 1).remove(0);
    for second in [first.clone(), other_checkpoint(&segment)] {
        let same = first == second;
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let barrier = Barrier::new(2);
        let run = |bytes: &[u8]| {
            let mut incoming = store.begin(&segment, bytes.len() as u64).unwrap();
            incoming.write_all(bytes).unwrap();
            barrier.wait();
            incoming.commit()
        };
        let (one, two) = std::thread::scope(|scope| {
            let other = scope.spawn(|| run(&second));
            (run(&first), other.join().unwrap())
        });
        assert_eq!(store.all().len(), 1);
        store.verify(&segment).unwrap();
        assert_eq!(
            store.used_bytes(),
            store.all()[0].bytes,
            "the loser is still counted"
        );
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
        if same {
            assert_eq!(one.unwrap(), two.unwrap());
            continue;
        }
        let held = store.get(&segment).unwrap().checkpoint;
        let (winner, loser) = if one.is_ok() { (one, two) } else { (two, one) };
        assert_eq!(winner.unwrap().entry().checkpoint, held);
        match loser.unwrap_err() {
            StoreError::DuplicateName { held: h, offered, .. } => {
                assert_eq!(h, held);
                assert_ne!(offered, held);
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn the_budget_counts_what_is_stored_and_what_is_on_its_way() {
    let dir = tempfile::tempdir().unwrap();
    let segments = chain("web", 2);
    let (one, two) = (segments[0].1.len() as u64, segments[1].1.len() as u64);
    let store = FsStore::open(dir.path(), Some(one + two), Durability::Durable).unwrap();
    let first = store.begin(&segments[0].0, one).unwrap();
    match store.begin(&segments[1].0, two + 1).unwrap_err() {
        StoreError::Full {
            need, used, budget, ..
        } => assert_eq!((need, used, budget), (two + 1, one, one + two)),
        other => panic!("{other}"),
    }
    drop(first);
    put(&store, &segments[0].0, &segments[0].1).unwrap();
    put(&store, &segments[1].0, &segments[1].1).unwrap();
    assert_eq!(store.used_bytes(), one + two);
    assert!(store.begin(&name("web/1/3"), 1).unwrap_err().is_full());
    store.remove(&segments[1].0).unwrap();
    assert_eq!(store.used_bytes(), one);
    store.begin(&name("web/1/3"), two).unwrap();
    // Lower than what is there: everything stays, nothing is added.
    drop(store);
    let store = FsStore::open(dir.path(), Some(1), Durability::Durable).unwrap();
    assert_eq!(names(&store), ["web/1/1"]);
    assert!(store.begin(&name("web/1/3"), 1).unwrap_err().is_full());
}

#[test]
fn an_encoder_that_outgrows_the_budget_is_told_so_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = Machine::new();
    // Bytes zstd cannot make shorter.
    let mut random = blake3::Hasher::new().finalize_xof();
    random.fill(&mut machine.bytes[0]);
    let captured = machine.capture_now(true);
    let store = FsStore::open(dir.path(), Some(500_000), Durability::Spool).unwrap();
    match encode_to(&store, &name("web/1/1"), &captured).unwrap_err() {
        crate::checkpoint::EncodeError::Store(e @ StoreError::Full { .. }) => {
            assert!(e.to_string().contains("full"))
        }
        other => panic!("{other}"),
    }
    assert_eq!((store.used_bytes(), store.all().len()), (0, 0));
    assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    // All of the budget is free again.
    store.begin(&name("web/1/2"), 500_000).unwrap();
}

#[test]
fn lengths_from_outside_are_limits() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let segment = name("web/1/1");
    assert!(matches!(
        store.begin(&segment, MAX_SEGMENT_BYTES + 1),
        Err(StoreError::TooLong { .. })
    ));
    // More than any disk has, less than the limit.
    assert!(matches!(
        store.begin(&segment, MAX_SEGMENT_BYTES),
        Err(StoreError::DiskFull { free: Some(_), .. })
    ));
    let mut incoming = store.begin(&segment, 10).unwrap();
    incoming.write_all(&[0; 10]).unwrap();
    incoming.write_all(&[0]).unwrap_err();
    assert!(matches!(
        incoming.take_failure(),
        Some(StoreError::Overrun { announced: 10, .. })
    ));
    incoming.seek(SeekFrom::Start(9)).unwrap();
    incoming.write_all(&[0]).unwrap();
    incoming.write_all(&[0]).unwrap_err();
}

#[test]
fn what_is_not_whole_is_not_committed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (segment, bytes) = chain("web", 1).remove(0);
    assert!(matches!(
        put(&store, &segment, &bytes[..bytes.len() - 1]),
        Err(StoreError::Damaged { .. })
    ));
    // In a frame, where opening alone does not see it.
    let mut flipped = bytes.clone();
    let body = SegmentReader::open(bytes.as_slice())
        .unwrap()
        .header()
        .body_offset();
    flipped[body as usize + 3] ^= 1;
    assert!(matches!(
        put(&store, &segment, &flipped),
        Err(StoreError::Damaged { .. })
    ));
    match put(&store, &name("web/1/2"), &bytes).unwrap_err() {
        StoreError::OtherName { expected, found } => {
            assert_eq!((expected, found), (name("web/1/2"), segment.clone()))
        }
        other => panic!("{other}"),
    }
    assert!(store.all().is_empty());
    put(&store, &segment, &bytes).unwrap();
}

#[test]
fn damaged_files_are_set_aside_and_the_rest_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let segments = chain("web", 4);
    {
        let store = open(dir.path());
        segments
            .iter()
            .for_each(|(name, bytes)| drop(put(&store, name, bytes).unwrap()));
    }
    let path = |epoch: &str| dir.path().join("segments/web/1").join(epoch);
    let mut flipped = segments[1].1.clone();
    flipped[200] ^= 1;
    fs::write(path("2.seg"), flipped).unwrap();
    fs::write(path("3.seg"), b"").unwrap();
    fs::copy(path("1.seg"), path("9.seg")).unwrap();
    fs::write(path("notes.txt"), b"mine").unwrap();
    // One of a format that is to come.
    let mut newer = segments[3].1.clone();
    newer[8] = 9;
    fs::write(path("4.seg"), &newer).unwrap();

    let reader = FsStore::open_read_only(dir.path()).unwrap();
    assert_eq!(
        (names(&reader), reader.damaged().len()),
        (vec!["web/1/1".to_owned()], 4)
    );
    assert!(path("2.seg").exists(), "reading moved a file");
    drop(reader);

    let store = open(dir.path());
    assert_eq!(names(&store), ["web/1/1"]);
    let mut damaged = store.damaged().to_vec();
    damaged.sort_by(|a, b| a.path.cmp(&b.path));
    let report: Vec<_> = damaged
        .iter()
        .map(|file| (file.name.to_string(), file.moved_to.is_some()))
        .collect();
    let expected = [
        ("web/1/2", true),
        ("web/1/3", true),
        ("web/1/4", false),
        ("web/1/9", true),
    ];
    assert_eq!(report, expected.map(|(name, moved)| (name.to_owned(), moved)));
    assert!(
        damaged[3].why.contains("it says it is web/1/1"),
        "{}",
        damaged[3].why
    );
    assert!(damaged[2].why.contains("newer"), "{}", damaged[2].why);
    assert_eq!(fs::read_dir(dir.path().join("damaged")).unwrap().count(), 3);
    assert!(path("notes.txt").exists() && path("4.seg").exists());
    assert_eq!(store.used_bytes(), (segments[0].1.len() + newer.len()) as u64);
    // The place is free for a good copy, and not where a newer one is.
    put(&store, &segments[1].0, &segments[1].1).unwrap();
    assert!(matches!(
        put(&store, &segments[3].0, &segments[3].1),
        Err(StoreError::Damaged { .. })
    ));
    // A second time of the same name finds another place.
    drop(store);
    fs::write(path("2.seg"), b"x").unwrap();
    drop(open(dir.path()));
    assert_eq!(fs::read_dir(dir.path().join("damaged")).unwrap().count(), 4);
}

#[test]
fn chains_are_whole_by_name_and_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let segments = chain("web", 5);
    for (name, bytes) in segments.iter().filter(|(name, _)| name.epoch.0 != 3) {
        put(&store, name, bytes).unwrap();
    }
    let (link, wanted_by) = (name("web/1/3"), name("web/1/4"));
    assert_eq!(
        store.chain(&name("web/1/5")),
        Err(ChainError::Missing { link, wanted_by })
    );
    assert_eq!(store.newest_complete(&vm("web")).unwrap().name, name("web/1/2"));
    let missing = store.chain(&name("web/1/8")).unwrap_err().to_string();
    assert_eq!(missing, "web/1/8 is missing");

    put(&store, &name("web/1/3"), &other_checkpoint(&name("web/1/3"))).unwrap();
    match store.chain(&name("web/1/5")).unwrap_err() {
        ChainError::WrongCheckpoint {
            link,
            wanted_by,
            wanted,
            held,
        } => {
            assert_eq!(
                (link, wanted_by, wanted),
                (name("web/1/3"), name("web/1/4"), id(3))
            );
            assert_ne!(held, wanted);
        }
        other => panic!("{other}"),
    }
    // The other one is full, so it is a whole chain of its own.
    assert_eq!(store.newest_complete(&vm("web")).unwrap().name, name("web/1/3"));
    store.remove(&name("web/1/3")).unwrap();
    put(&store, &segments[2].0, &segments[2].1).unwrap();
    let chain: Vec<_> = store
        .chain(&name("web/1/5"))
        .unwrap()
        .iter()
        .map(|entry| entry.name.epoch.0)
        .collect();
    assert_eq!(chain, [1, 2, 3, 4, 5]);
    assert!(matches!(
        store.remove(&name("web/1/8")),
        Err(StoreError::NotHeld { .. })
    ));
}

#[test]
fn a_promise_holds_across_opening_and_fences() {
    let dir = tempfile::tempdir().unwrap();
    let segments = chain("web", 3);
    let store = open(dir.path());
    put(&store, &segments[0].0, &segments[0].1).unwrap();
    let late = {
        let mut incoming = store.begin(&segments[1].0, segments[1].1.len() as u64).unwrap();
        incoming.write_all(&segments[1].1).unwrap();
        incoming
    };
    assert_eq!(store.promised(&vm("web")), Generation(0));
    assert_eq!(store.promise(&vm("web"), Generation(2)).unwrap(), Generation(2));
    assert_eq!(store.promise(&vm("web"), Generation(2)).unwrap(), Generation(2));
    // Begun before the promise, committed after it.
    match late.commit().unwrap_err() {
        StoreError::Fenced { asked, current, .. } => {
            assert_eq!((asked, current), (Generation(1), Generation(2)))
        }
        other => panic!("{other}"),
    }
    assert!(matches!(
        store.begin(&segments[2].0, 10),
        Err(StoreError::Fenced { .. })
    ));
    // Held or not: who is fenced is told so.
    assert!(matches!(
        store.begin(&segments[0].0, 10),
        Err(StoreError::Fenced { .. })
    ));
    assert!(matches!(
        store.promise(&vm("web"), Generation(1)),
        Err(StoreError::Fenced { .. })
    ));
    assert_eq!(names(&store), ["web/1/1"]);
    store.begin(&name("web/2/1"), 10).unwrap();
    store.begin(&name("db/1/1"), 10).unwrap();
    // What the old owner wrote may still come from the new one, and not the other way round.
    let bytes = segments[1].1.len() as u64;
    let mut incoming = store.begin_under(&segments[1].0, bytes, Generation(2)).unwrap();
    incoming.write_all(&segments[1].1).unwrap();
    incoming.commit().unwrap();
    let backwards = store.begin_under(&name("web/3/1"), 10, Generation(2));
    assert!(matches!(backwards, Err(StoreError::Fenced { .. })));
    store.remove(&segments[1].0).unwrap();
    let mut late = store.begin_under(&segments[1].0, bytes, Generation(2)).unwrap();
    late.write_all(&segments[1].1).unwrap();
    store.promise(&vm("web"), Generation(3)).unwrap();
    assert!(matches!(late.commit(), Err(StoreError::Fenced { .. })));
    drop(store);

    for durability in [Durability::Durable, Durability::Spool] {
        let store = FsStore::open(dir.path(), None, durability).unwrap();
        assert_eq!(store.promised(&vm("web")), Generation(3));
        assert!(matches!(
            store.begin(&segments[2].0, 10),
            Err(StoreError::Fenced { .. })
        ));
    }
    assert_eq!(
        FsStore::open_read_only(dir.path()).unwrap().promised(&vm("web")),
        Generation(3)
    );
    // A promise that cannot be read must not be taken for none.
    let file = dir.path().join("promises/web");
    let mut record = fs::read(&file).unwrap();
    record[8] ^= 1;
    fs::write(&file, &record).unwrap();
    match FsStore::open(dir.path(), None, Durability::Durable).unwrap_err() {
        StoreError::DamagedPromise { path, .. } => assert_eq!(path, file),
        other => panic!("{other}"),
    }
}

#[test]
fn a_merge_keeps_name_identity_and_content() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let segments = chain("web", 6);
    segments
        .iter()
        .for_each(|(name, bytes)| drop(put(&store, name, bytes).unwrap()));
    let tip = name("web/1/6");
    let before = load(&store, &tip);
    let (mut open_file, _) = store.open_raw(&name("web/1/3")).unwrap();

    let merged = store
        .merge_into_newest(&[name("web/1/4"), name("web/1/2"), name("web/1/3")], 1)
        .unwrap();
    assert_eq!((merged.name.clone(), merged.checkpoint), (name("web/1/4"), id(4)));
    assert_eq!(merged.parent(), Some((&name("web/1/1"), id(1))));
    assert_eq!(merged.first_epoch, Some(Epoch(2)));
    assert_eq!(names(&store), ["web/1/1", "web/1/4", "web/1/5", "web/1/6"]);
    assert_eq!(load(&store, &tip), before);
    let mut still = Vec::new();
    open_file.read_to_end(&mut still).unwrap();
    assert_eq!(still, segments[2].1, "an open file changed");

    // With the full one: a fold.
    let all: Vec<_> = store.all().into_iter().map(|entry| entry.name).collect();
    let folded = store.merge_into_newest(&all, 1).unwrap();
    assert!(folded.kind.is_full());
    assert_eq!(load(&store, &tip), before);
    assert_eq!(store.used_bytes(), folded.bytes);
    assert_eq!(
        store.merge_into_newest(std::slice::from_ref(&tip), 1).unwrap(),
        folded
    );
    drop(store);
    assert_eq!(open(dir.path()).all(), [folded]);
}

#[test]
fn a_merge_refuses_what_is_no_run_and_spares_what_others_build_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let segments = chain("web", 5);
    segments
        .iter()
        .for_each(|(name, bytes)| drop(put(&store, name, bytes).unwrap()));
    let all = store.all();
    assert!(matches!(
        store.merge_into_newest(&[], 1),
        Err(StoreError::NothingToMerge)
    ));
    let gap = [name("web/1/2"), name("web/1/4")];
    assert!(
        store
            .merge_into_newest(&gap, 1)
            .unwrap_err()
            .to_string()
            .contains("web/1/4 does not build on web/1/2")
    );
    assert!(matches!(
        store.merge_into_newest(&[name("web/1/9")], 1),
        Err(StoreError::NotHeld { .. })
    ));
    assert_eq!(store.all(), all);

    // A branch on 3: another owner went on from there.
    let mut machine = Machine::new();
    machine.captures = 50;
    machine.write(0, 1, 1);
    let captured = machine.capture_now(false);
    let branch = name("web/2/1");
    let of = super::fixture::manifest(&branch, &captured, Some((&name("web/1/3"), id(3))));
    super::fixture::pool()
        .encode_to_store(&captured, &of, &store)
        .unwrap();
    let (tip, before) = (load(&store, &name("web/1/5")), load(&store, &branch));
    store
        .merge_into_newest(&["web/1/2", "web/1/3", "web/1/4"].map(name), 1)
        .unwrap();
    assert_eq!(
        names(&store),
        ["web/1/1", "web/1/2", "web/1/3", "web/1/4", "web/1/5", "web/2/1"]
    );
    assert_eq!(
        (load(&store, &name("web/1/5")), load(&store, &branch)),
        (tip, before)
    );
}
