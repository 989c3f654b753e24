use std::io::Cursor;

use proptest::prelude::*;
use segment::{Features, FormatError, SegmentReader};

use super::*;
use crate::store::fixture::{Bytes, Fresh, Machine, load, manifest, name, spaces};
use crate::store::{Durability, FsStore};

fn pool(threads: usize, cache: usize) -> EncodePool {
    EncodePool::with_delta_cache(EncodeOptions { level: 1, threads }, cache)
}

/// A few bytes of a page, so that it stays much as it was.
fn touch(machine: &mut Machine, space: usize, page: u64, value: u8) {
    let size = spaces()[space].page_bytes as usize;
    machine.bytes[space][page as usize * size + usize::from(value)] ^= 0x5a;
    machine.dirty[space][page as usize] = true;
}

/// The same pages, with the bytes of those alone that are not zero.
fn without_zeros(space: &mut CapturedPages) {
    if space.data.reader().is_some() {
        return;
    }
    let (mut bytes, mut places) = (Vec::new(), Vec::new());
    for at in 0..space.pages.len() {
        let page = space.page(at).unwrap();
        let zero = page.iter().all(|byte| *byte == 0);
        places.push((!zero).then_some((bytes.len() / page.len()) as u32));
        if !zero {
            bytes.extend_from_slice(page);
        }
    }
    space.data = PageBytes::placed(bytes, places);
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Write(usize, u64, u8),
    Touch(usize, u64, u8),
    Checkpoint { full: bool },
    Fail,
}

fn op() -> impl Strategy<Value = Op> {
    let page = || (0usize..2, 0u64..40);
    prop_oneof![
        6 => (page(), 0u8..6).prop_map(|((space, page), value)| Op::Write(space, page, value)),
        10 => (page(), any::<u8>()).prop_map(|((space, page), value)| Op::Touch(space, page, value)),
        5 => prop::bool::weighted(0.1).prop_map(|full| Op::Checkpoint { full }),
        1 => Just(Op::Fail),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// With a cache of any size, and whatever fails in between: each checkpoint loads as the memory was, by itself and
    /// after all of them were merged in two steps.
    #[test]
    fn changes_load_as_the_memory_was(
        ops in prop::collection::vec(op(), 1..120),
        cache in prop_oneof![Just(0usize), Just(8 << 10), Just(64 << 10), Just(1 << 30)],
        threads in 1usize..4,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let store = FsStore::open(dir.path(), None, Durability::Spool).unwrap();
        let (pool, mut machine) = (pool(threads, cache), Machine::new());
        let mut last: Option<(segment::SegmentName, segment::CheckpointId)> = None;
        let mut taken: Vec<(segment::SegmentName, Bytes)> = Vec::new();
        for op in ops {
            match op {
                Op::Write(space, page, value) => machine.write(space, page, value),
                Op::Touch(space, page, value) => touch(&mut machine, space, page, value),
                Op::Fail => {
                    // Captured, encoded, and never stored.
                    let captured = machine.capture_now(last.is_none());
                    let of = manifest(&name("web/1/9999"), &captured, last.as_ref().map(|(name, id)| (name, *id)));
                    pool.encode(&captured, &of, Cursor::new(Vec::new())).unwrap();
                    machine.put_back(&captured);
                }
                Op::Checkpoint { full } => {
                    let full = full || last.is_none();
                    let mut captured = machine.capture_now(full);
                    // Every second one as of a monitor that knows its zero pages.
                    if taken.len() % 2 == 1 {
                        captured.spaces.iter_mut().for_each(without_zeros);
                    }
                    let name = name(&format!("web/1/{}", taken.len() + 1));
                    let parent = last.as_ref().filter(|_| !full);
                    let of = manifest(&name, &captured, parent.map(|(name, id)| (name, *id)));
                    pool.encode_to_store(&captured, &of, &store).unwrap();
                    last = Some((name.clone(), captured.checkpoint));
                    taken.push((name, machine.at_capture.clone()));
                }
            }
        }
        for (name, was) in &taken {
            prop_assert!(&load(&store, name) == was, "{} is not as it was", name);
        }
        if let Some((tip, was)) = taken.last() {
            let chain: Vec<_> = store.chain(tip).unwrap().into_iter().map(|entry| entry.name).collect();
            let half = chain.len() / 2;
            for run in [&chain[half..], &chain[..]] {
                let held: Vec<_> = run.iter().filter(|name| store.get(name).is_some()).cloned().collect();
                if held.len() > 1 {
                    store.merge_into_newest(&held, 1).unwrap();
                }
                prop_assert!(&load(&store, tip) == was, "merged, {} is not as it was", tip);
            }
        }
    }

    /// One capture makes one segment, however many threads.
    #[test]
    fn threads_do_not_show(writes in prop::collection::vec((0u64..300, 0u8..5), 1..200)) {
        let mut machine = Machine::new();
        writes.iter().for_each(|(page, value)| machine.write(0, *page, *value));
        let captured = machine.capture_now(true);
        let of = manifest(&name("web/1/1"), &captured, None);
        let made = |threads| pool(threads, 0).encode(&captured, &of, Cursor::new(Vec::new())).unwrap().0.into_inner();
        let one = made(1);
        prop_assert!(one == made(3));
        let reader = SegmentReader::open(one).unwrap();
        reader.verify().unwrap();
    }
}

#[test]
fn a_change_of_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (pool, mut machine) = (pool(1, 1 << 20), Machine::new());
    machine.write(0, 5, 7);
    let first = machine.capture_now(true);
    let first_name = name("web/1/1");
    let of = manifest(&first_name, &first, None);
    pool.stored(&first, &of);
    let write = |captured: &Captured, of: &segment::Manifest| {
        let bytes = pool
            .encode(captured, of, Cursor::new(Vec::new()))
            .unwrap()
            .0
            .into_inner();
        let path = dir.path().join(of.name.epoch.to_string());
        std::fs::write(&path, bytes).unwrap();
        path
    };
    touch(&mut machine, 0, 5, 1);
    let second = machine.capture_now(false);
    let delta = write(
        &second,
        &manifest(&name("web/1/2"), &second, Some((&first_name, first.checkpoint))),
    );
    let reader = SegmentReader::open(std::fs::File::open(&delta).unwrap()).unwrap();
    assert_eq!(reader.header().features_required, Features::PAGE_CHANGES);

    // Under the parent's name and identity: a page that is not as it was, and no page at all.
    for (value, why) in [
        (8, "as a change of what web/1/1 has is damaged"),
        (0, "no older link has"),
    ] {
        let mut other = Machine::new();
        other.write(0, 5, value);
        let full = write(&other.capture_now(true), &of);
        let plan = crate::load::LoadPlan::from_files(&[full, delta.clone()]).unwrap();
        for threads in [1, 3] {
            let error = plan.load_into(&Fresh::new(), threads).unwrap_err();
            let text = format!(
                "{error}: {:?}",
                std::error::Error::source(&error).map(ToString::to_string)
            );
            assert!(text.contains(why), "{text}");
            let wrong = std::error::Error::source(&error).and_then(|e| e.downcast_ref::<FormatError>());
            assert!(wrong.is_none_or(|e| matches!(e, FormatError::Digest { .. })));
        }
    }
}
