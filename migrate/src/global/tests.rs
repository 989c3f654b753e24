//! The global store against a store in memory and one in a folder, with a fault at every step; the S3 protocol has its
//! own tests, against a server.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use segment::{Generation, SegmentName};

use super::collect::{Seen, collect};
use super::upload::plan;
use super::*;
use crate::store::fixture::{chain, load, name, other_checkpoint, put, vm};
use crate::store::{Durability, FsStore, KeepPolicy, Pace};
use crate::wire::Held;

const HOUR: Duration = Duration::from_secs(3600);

/// Lets so many requests through, and fails all after them; as many as there are when it is not set.
#[derive(Debug)]
pub(super) struct Faults(AtomicI64);

impl Default for Faults {
    fn default() -> Self {
        Self(AtomicI64::new(i64::MAX))
    }
}

impl Faults {
    pub(super) fn step(&self, doing: &'static str) -> Result<(), GlobalError> {
        match self.0.fetch_sub(1, Ordering::Relaxed) > 0 {
            true => Ok(()),
            false => Err(GlobalError::Refused {
                doing,
                place: "injected".into(),
                trouble: Trouble::Away("a fault".into()),
            }),
        }
    }

    fn allow(&self, requests: i64) {
        self.0.store(requests, Ordering::Relaxed);
    }
}

/// A bucket in memory, with what is under it.
fn bucket() -> (Bucket, Arc<InMemory>) {
    let memory = Arc::new(InMemory::new());
    let bucket = Bucket::of(memory.clone(), Path::from("pool/a"), "memory".into(), None);
    (bucket, memory)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

fn open(dir: &std::path::Path) -> Arc<FsStore> {
    FsStore::open(dir, None, Durability::Spool).unwrap()
}

/// A store with the chain `web/1/1` to `web/1/<links>`.
fn filled(dir: &std::path::Path, links: u64) -> Arc<FsStore> {
    let store = open(dir);
    for (name, bytes) in chain("web", links) {
        put(&store, &name, &bytes).unwrap();
    }
    store
}

fn held(store: &FsStore, of: &str) -> Held {
    let entry = store.get(&name(of)).unwrap();
    Held {
        name: entry.name,
        checkpoint: entry.checkpoint,
    }
}

async fn up(bucket: &Bucket, store: &Arc<FsStore>, tip: &str) -> Result<Uploaded, GlobalError> {
    let newest = match bucket.points(&vm("web")).await?.last() {
        Some(name) => Some(bucket.point(name).await?),
        None => None,
    };
    let tip = held(store, tip);
    up_on(bucket, store, &tip, newest.as_ref(), HOUR, &mut Begun::default()).await
}

/// Onto that point, in that time, from where another try ended.
async fn up_on(
    bucket: &Bucket,
    store: &Arc<FsStore>,
    tip: &Held,
    newest: Option<&ChainRecord>,
    within: Duration,
    begun: &mut Begun,
) -> Result<Uploaded, GlobalError> {
    let uploader = Uploader {
        bucket,
        store,
        max_links: 1000,
        within,
        pace: &Pace::unlimited(),
    };
    uploader.upload(tip, newest, begun).await
}

/// A chain of its own.
async fn up_alone(bucket: &Bucket, store: &Arc<FsStore>, tip: &Held) -> Uploaded {
    up_on(bucket, store, tip, None, HOUR, &mut Begun::default())
        .await
        .unwrap()
}

/// Every restore point that is listed can be read whole.
async fn all_whole(bucket: &Bucket) -> Vec<SegmentName> {
    let names = bucket.points(&vm("web")).await.unwrap();
    for name in &names {
        let record = bucket.point(name).await.unwrap();
        verify(bucket, &record, &mut Checked::default()).await.unwrap();
    }
    names
}

/// How many objects there are.
async fn objects(memory: &InMemory) -> usize {
    use futures_util::StreamExt;
    memory.list(None).count().await
}

#[test]
fn what_goes_up_comes_down_the_same_and_only_what_is_new_goes_up_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(&dir.path().join("a"), 5);
    let (bucket, memory) = bucket();
    runtime().block_on(async {
        let first = up(&bucket, &store, "web/1/3").await.unwrap();
        assert_eq!((first.segments, first.made), (3, true));
        let second = up(&bucket, &store, "web/1/5").await.unwrap();
        assert_eq!((second.segments, second.chain.links().len()), (2, 5));
        assert_eq!(second.chain.links()[..3], *first.chain.links());
        // The same again makes nothing.
        let before = objects(&memory).await;
        let again = up(&bucket, &store, "web/1/5").await.unwrap();
        assert_eq!((again.segments, again.made), (0, false));
        assert_eq!(objects(&memory).await, before);
        assert_eq!(bucket.vms().await.unwrap(), [vm("web")]);
        assert_eq!(all_whole(&bucket).await, [name("web/1/3"), name("web/1/5")]);

        let other = open(&dir.path().join("b"));
        for record in bucket.records(&all_whole(&bucket).await).await.unwrap() {
            assert_eq!(
                fetch(&bucket, &other, &record, Generation(1)).await.unwrap(),
                [] as [String; 0]
            );
        }
        for of in ["web/1/3", "web/1/5"] {
            assert_eq!(load(&other, &name(of)), load(&store, &name(of)), "{of}");
        }
    });
}

/// A collection goes by the records that an agent remembers: what it sent itself may be named by no point.
#[test]
fn of_two_that_send_the_same_both_know_the_point_that_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), 3);
    let (bucket, _) = bucket();
    runtime().block_on(async {
        let tip = held(&store, "web/1/3");
        let first = up_alone(&bucket, &store, &tip).await;
        let second = up_alone(&bucket, &store, &tip).await;
        assert!(first.made && !second.made);
        let there = bucket.point(&tip.name).await.unwrap();
        assert_eq!((&first.chain, &second.chain), (&there, &there));
    });
}

#[test]
fn a_chain_that_was_folded_here_goes_on_there_until_it_is_too_long() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), 6);
    let entries = store.chain(&name("web/1/4")).unwrap();
    let there = ChainRecord::new(entries.iter().map(|e| LinkRecord::of(e, [1; 16])).collect()).unwrap();
    store.fold(&name("web/1/4"), 1, &Pace::unlimited()).unwrap();
    let here = store.chain(&name("web/1/6")).unwrap();
    assert_eq!(here.len(), 3);
    let (links, rest) = plan(&here, Some(&there), 6);
    assert_eq!((links.as_slice(), rest), (there.links(), &here[1..]));
    let (links, rest) = plan(&here, Some(&there), 5);
    assert_eq!((links.len(), rest), (0, here.as_slice()));
    // Another state of that name is not built on.
    let mut strange = there.links().to_vec();
    strange[3].checkpoint.0[0] ^= 1;
    let strange = ChainRecord::new(strange).unwrap();
    assert_eq!(plan(&here, Some(&strange), 6).1, here.as_slice());
}

#[test]
fn a_name_that_is_taken_by_another_state_is_an_error_and_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(&dir.path().join("a"), 2);
    let (bucket, _) = bucket();
    runtime().block_on(async {
        up(&bucket, &store, "web/1/2").await.unwrap();
        let other = open(&dir.path().join("b"));
        let second = name("web/1/2");
        put(&other, &second, &other_checkpoint(&second)).unwrap();
        let error = up(&bucket, &other, "web/1/2").await.unwrap_err();
        assert!(matches!(error, GlobalError::DuplicateName { .. }), "{error}");
        let there = bucket.point(&second).await.unwrap();
        assert_eq!(there.tip().checkpoint, held(&store, "web/1/2").checkpoint);
        verify(&bucket, &there, &mut Checked::default()).await.unwrap();
    });
}

#[test]
fn an_upload_that_stops_anywhere_leaves_every_point_whole_and_is_made_up_for() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), 4);
    let runtime = runtime();
    for requests in 0.. {
        let (bucket, _) = bucket();
        let done = runtime.block_on(async {
            up(&bucket, &store, "web/1/2").await.unwrap();
            bucket.faults.allow(requests);
            let done = up(&bucket, &store, "web/1/4").await.is_ok();
            bucket.faults.allow(i64::MAX);
            assert_eq!(
                all_whole(&bucket).await.len(),
                1 + usize::from(done),
                "after {requests}"
            );
            let again = up(&bucket, &store, "web/1/4").await.unwrap();
            assert_eq!(again.made, !done);
            assert_eq!(all_whole(&bucket).await.len(), 2);
            done
        });
        if done {
            assert!(requests > 4, "there were no steps to fail");
            return;
        }
    }
}

/// At whichever request it fails: the next sends what is not there yet, and nothing twice.
#[test]
fn an_upload_goes_on_where_the_last_one_failed() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), 4);
    let tip = held(&store, "web/1/4");
    let runtime = runtime();
    let whole = {
        let (bucket, memory) = bucket();
        runtime.block_on(async {
            up_alone(&bucket, &store, &tip).await;
            objects(&memory).await
        })
    };
    let (mut resumed, mut least) = (0, u64::MAX);
    for requests in 0.. {
        let (bucket, memory) = bucket();
        let ended = runtime.block_on(async {
            let begun = &mut Begun::default();
            bucket.faults.allow(requests);
            let failed = up_on(&bucket, &store, &tip, None, HOUR, begun).await;
            bucket.faults.allow(i64::MAX);
            if failed.is_ok() {
                return true;
            }
            let there = objects(&memory).await;
            let done = up_on(&bucket, &store, &tip, None, HOUR, begun).await.unwrap();
            assert!(done.made);
            assert_eq!(
                objects(&memory).await,
                whole,
                "{requests} requests, {there} there"
            );
            resumed = resumed.max(there);
            least = least.min(done.bytes);
            all_whole(&bucket).await;
            false
        });
        if ended {
            break;
        }
    }
    assert_eq!(
        (resumed, least),
        (4, 0),
        "an upload that failed before its point has all parts there, and none is sent again"
    );
}

#[test]
fn a_collection_that_stops_anywhere_leaves_every_point_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), 6);
    // So that each point has a chain of its own.
    let runtime = runtime();
    let policy: KeepPolicy = "last=2".parse().unwrap();
    let mut finished = false;
    for requests in 0..200 {
        let (bucket, memory) = bucket();
        runtime.block_on(async {
            for tip in ["web/1/1", "web/1/2", "web/1/4", "web/1/6"] {
                let tip = held(&store, tip);
                // Nothing is taken up: four chains.
                up_alone(&bucket, &store, &tip).await;
            }
            let all = objects(&memory).await;
            let (mut seen, mut known) = (Seen::default(), BTreeMap::new());
            let vm = vm("web");
            // Seen for the first time: nothing goes.
            let first = collect(&bucket, &vm, &policy, &mut seen, &mut known, HOUR, HOUR)
                .await
                .unwrap();
            assert_eq!(
                (first.points, first.removed_points, objects(&memory).await),
                (4, 0, all)
            );
            let mut now = HOUR;
            bucket.faults.allow(requests);
            let mut result = Ok(first);
            // The points go first, and what they named an hour after that.
            for _ in 0..3 {
                now += HOUR;
                result = collect(&bucket, &vm, &policy, &mut seen, &mut known, now, HOUR).await;
                if result.is_err() {
                    break;
                }
            }
            bucket.faults.allow(i64::MAX);
            let names = all_whole(&bucket).await;
            assert!(
                names.ends_with(&[name("web/1/4"), name("web/1/6")]),
                "after {requests}: {names:?}"
            );
            if result.is_ok() {
                assert_eq!(names.len(), 2);
                // Two points, and the parts of their ten links.
                assert_eq!(objects(&memory).await, 2 + 4 + 6);
                finished = true;
            }
        });
        if finished {
            assert!(requests > 10, "there were no steps to fail");
            return;
        }
    }
    panic!("the collection never ended");
}

#[test]
fn what_an_upload_that_is_under_way_builds_on_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), 6);
    let (bucket, _) = bucket();
    let policy: KeepPolicy = "last=1".parse().unwrap();
    runtime().block_on(async {
        let vm = vm("web");
        let (mut seen, mut known) = (Seen::default(), BTreeMap::new());
        up(&bucket, &store, "web/1/2").await.unwrap();
        // One that is slow has taken the newest point for what it builds on.
        let slow = bucket.point(&name("web/1/2")).await.unwrap();
        // Another makes a chain of its own meanwhile, and the point before is not kept any more.
        let other = held(&store, "web/1/4");
        up_alone(&bucket, &store, &other).await;
        for minutes in [0, 20, 40, 59] {
            let now = Duration::from_secs(minutes * 60);
            collect(&bucket, &vm, &policy, &mut seen, &mut known, now, HOUR)
                .await
                .unwrap();
        }
        // Within the grace it makes its point.
        let tip = held(&store, "web/1/6");
        let begun = &mut Begun::default();
        let done = up_on(&bucket, &store, &tip, Some(&slow), HOUR / 2, begun)
            .await
            .unwrap();
        assert_eq!(done.segments, 4);
        for hour in 1..5 {
            collect(&bucket, &vm, &policy, &mut seen, &mut known, HOUR * hour, HOUR)
                .await
                .unwrap();
        }
        assert_eq!(all_whole(&bucket).await, [name("web/1/6")]);
        // One that took longer makes none.
        let error = up_on(&bucket, &store, &tip, None, Duration::ZERO, begun)
            .await
            .unwrap_err();
        assert!(matches!(error, GlobalError::TooSlow { .. }), "{error}");
    });
}

#[test]
fn what_was_tampered_with_is_found_and_nothing_of_it_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(&dir.path().join("a"), 3);
    runtime().block_on(async {
        let (bucket, memory) = bucket();
        up(&bucket, &store, "web/1/3").await.unwrap();
        let record = bucket.point(&name("web/1/3")).await.unwrap();
        let local = open(&dir.path().join("b"));
        let all: Vec<Path> = {
            use futures_util::TryStreamExt;
            memory
                .list(None)
                .map_ok(|o| o.location)
                .try_collect()
                .await
                .unwrap()
        };
        assert_eq!(all.len(), 4);
        for path in &all {
            let good = memory.get(path).await.unwrap().bytes().await.unwrap();
            let mut flipped = good.to_vec();
            let at = flipped.len() / 2;
            flipped[at] ^= 1;
            let mut longer = good.to_vec();
            longer.push(0);
            for bad in [flipped, longer, good[..good.len() - 1].to_vec(), Vec::new()] {
                memory.put(path, bad.clone().into()).await.unwrap();
                let read = bucket.point(&name("web/1/3")).await;
                if path.as_ref().contains("/points/") {
                    let error = read.unwrap_err();
                    assert!(matches!(error, GlobalError::Damaged { .. }), "{error}");
                } else if bad.len() <= good.len() {
                    // (What follows a part's end is never asked for.)
                    let error = verify(&bucket, &read.unwrap(), &mut Checked::default())
                        .await
                        .unwrap_err();
                    assert!(matches!(error, GlobalError::Damaged { .. }), "{error}");
                    let error = fetch(&bucket, &local, &record, Generation(1)).await.unwrap_err();
                    assert!(matches!(error, GlobalError::Damaged { .. }), "{error}");
                    for entry in local.all() {
                        local.verify(&entry.name).unwrap();
                    }
                }
            }
            memory.put(path, good.into()).await.unwrap();
            local
                .all()
                .iter()
                .rev()
                .for_each(|e| local.remove(&e.name).unwrap());
        }
        // A point of another name, whole in itself, is none either.
        let point = all
            .iter()
            .find(|path| path.as_ref().contains("/points/"))
            .unwrap();
        let bytes = memory.get(point).await.unwrap().bytes().await.unwrap();
        let forged = point
            .as_ref()
            .replace("00000000000000000003", "00000000000000000009");
        memory.put(&Path::from(forged), bytes.into()).await.unwrap();
        let error = bucket.point(&name("web/1/9")).await.unwrap_err();
        assert!(error.to_string().contains("tampered"), "{error}");
        // One whose link is another segment's file.
        let mut links = record.links().to_vec();
        links[2].upload = [7; 16];
        let forged = ChainRecord::new(links).unwrap();
        let error = fetch(&bucket, &local, &forged, Generation(1)).await.unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
    });
}

#[test]
fn a_record_is_checked_before_it_is_believed() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), 3);
    let entries = store.chain(&name("web/1/3")).unwrap();
    let links: Vec<_> = entries.iter().map(|e| LinkRecord::of(e, [1; 16])).collect();
    let good = ChainRecord::new(links.clone()).unwrap();
    assert_eq!(
        ChainRecord::decode(&good.encode(), &name("web/1/3")),
        Ok(good.clone())
    );
    assert!(ChainRecord::decode(&good.encode(), &name("web/1/2")).is_err());
    for length in 0..good.encode().len() {
        assert!(ChainRecord::decode(&good.encode()[..length], &name("web/1/3")).is_err());
    }
    let refused = |change: &dyn Fn(&mut Vec<LinkRecord>)| {
        let mut links = links.clone();
        change(&mut links);
        ChainRecord::new(links).unwrap_err()
    };
    refused(&|links| links.clear());
    refused(&|links| links.swap(0, 1));
    refused(&|links| links[1].name = name("db/1/2"));
    refused(&|links| links[1].bytes = u64::MAX);
    refused(&|links| links[2].label = Some("\u{1b}[2J".into()));
}

#[test]
fn what_is_encrypted_is_uploaded_as_it_is_and_restored_with_its_key() {
    use crate::store::fixture::{Fresh, Machine, encode_to};
    use segment::{Key, Keyring};
    let keys = Keyring::new(vec![Key::new([1; 32].into())]);
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.set_keys(keys.clone());
    let mut machine = Machine::new();
    machine.write(0, 3, 3);
    encode_to(&store, &name("web/1/1"), &machine.capture_now(true)).unwrap();
    // Whoever uploads and checks has no key.
    store.set_keys(Keyring::default());
    let (bucket, _) = bucket();
    let runtime = runtime();
    runtime.block_on(up(&bucket, &store, "web/1/1")).unwrap();
    assert_eq!(runtime.block_on(all_whole(&bucket)), [name("web/1/1")]);
    let remote = Remote::new(bucket).unwrap();
    let chain = remote.find(&vm("web"), Found::Newest).unwrap();
    let fresh = Fresh::new();
    remote.plan(&chain, &keys).unwrap().load_into(&fresh, 2).unwrap();
    assert!(fresh.into_bytes() == machine.at_capture);
    let without = remote.plan(&chain, &Keyring::default()).unwrap();
    assert_eq!(
        without.missing_key().map(|(link, _)| link.clone()),
        Some(name("web/1/1"))
    );
    without.records().unwrap_err();
}

#[test]
fn a_restore_reads_only_what_newer_links_leave_open() {
    use crate::load::LoadPlan;
    use crate::store::fixture::Fresh;
    let dir = tempfile::tempdir().unwrap();
    let store = filled(dir.path(), 5);
    let (bucket, _) = bucket();
    let runtime = runtime();
    runtime.block_on(up(&bucket, &store, "web/1/5")).unwrap();
    // From a thread of a runtime too, as the monitor does.
    let loaded = runtime.block_on(async {
        let remote = Remote::new(bucket.clone()).unwrap();
        let chain = remote.find(&vm("web"), Found::Newest).unwrap();
        let plan: LoadPlan = remote.plan(&chain, &segment::Keyring::default()).unwrap();
        let fresh = Fresh::new();
        let stats = plan.load_into(&fresh, 4).unwrap();
        assert_eq!(stats.segments, 5);
        assert!(remote.fetched_bytes() <= chain.bytes());
        fresh.into_bytes()
    });
    assert_eq!(loaded, load(&store, &name("web/1/5")));
    let remote = Remote::new(bucket).unwrap();
    let at = |text: &str| remote.find(&vm("web"), Found::At(text.parse().unwrap()));
    assert_eq!(at("5").unwrap().tip().name, name("web/1/5"));
    assert!(at("4").unwrap_err().to_string().contains("web"));
    assert!(matches!(
        remote.find(&vm("db"), Found::Newest),
        Err(GlobalError::Nothing { .. })
    ));
    assert!(matches!(
        remote.find(&vm("web"), Found::Name(name("web/1/4"))),
        Err(GlobalError::NoPoint { .. })
    ));
}

#[test]
fn a_folder_is_a_global_store_and_is_not_made_when_it_is_away() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(&dir.path().join("a"), 2);
    let share = dir.path().join("share");
    let place = Place {
        addr: format!("file://{}", share.display()).parse().unwrap(),
        args: GlobalArgs::default(),
    };
    let error = Bucket::open(&place).unwrap_err();
    assert!(error.to_string().contains("mounted"), "{error}");
    std::fs::create_dir(&share).unwrap();
    let bucket = Bucket::open(&place).unwrap();
    runtime().block_on(async {
        up(&bucket, &store, "web/1/1").await.unwrap();
        up(&bucket, &store, "web/1/2").await.unwrap();
        assert_eq!(all_whole(&bucket).await.len(), 2);
        let tip = held(&store, "web/1/2");
        let other = ChainRecord::new(vec![LinkRecord {
            checkpoint: segment::CheckpointId([9; 16]),
            ..LinkRecord::of(&store.get(&tip.name).unwrap(), [1; 16])
        }])
        .unwrap();
        let error = bucket.put_point(other.clone()).await.unwrap_err();
        assert!(matches!(error, GlobalError::DuplicateName { .. }), "{error}");
        // The share goes away under it.
        std::fs::rename(&share, dir.path().join("away")).unwrap();
        let error = bucket.put_point(other.clone()).await.unwrap_err();
        let missing = matches!(
            &error,
            GlobalError::Refused {
                trouble: Trouble::Missing,
                ..
            }
        );
        assert!(missing && !share.exists(), "{error}");
    });
}
