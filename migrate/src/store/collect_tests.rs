//! Collecting: the plan against a model of any store, and the store itself against what the machine had.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use segment::{CheckpointId, Digest, Epoch, Generation, Kind, SegmentName};

use super::fixture::{
    Bytes, DISK_PAGES, MEMORY_PAGES, Machine, chain, id, load, manifest, name, pool, put, vm,
};
use super::*;

fn options(max_links: u32, short_of_room: bool) -> CollectOptions {
    CollectOptions {
        max_links,
        short_of_room,
        level: 1,
        pace: Pace::unlimited(),
    }
}

fn entry(epoch: u64, parent: Option<u64>, bytes: u64) -> Entry {
    let kind = parent.map_or(Kind::Full, |parent| Kind::Delta {
        parent: name(&format!("web/1/{parent}")),
        parent_checkpoint: id(parent),
    });
    Entry {
        name: name(&format!("web/1/{epoch}")),
        checkpoint: id(epoch),
        links: u32::from(parent.is_some()),
        kind,
        bytes,
        digest: Digest([0; 32]),
        created_unix_ns: epoch,
        first_epoch: None,
        label: None,
        key: None,
    }
}

/// A store that is a map: every point is which links it is made of, at least.
#[derive(Debug, Clone)]
struct Model(BTreeMap<u64, Entry>);

impl Model {
    fn lineage(&self) -> Lineage {
        Lineage::new(self.0.values().cloned().collect())
    }

    /// By walking down, one by one.
    fn is_whole(&self, epoch: u64) -> bool {
        let (mut at, mut wanted): (u64, Option<CheckpointId>) = (epoch, None);
        loop {
            let Some(entry) = self.0.get(&at) else {
                return false;
            };
            if wanted.is_some_and(|wanted| wanted != entry.checkpoint) {
                return false;
            }
            match entry.parent() {
                None => return true,
                Some((parent, checkpoint)) => (at, wanted) = (parent.epoch.0, Some(checkpoint)),
            }
        }
    }

    fn apply(&mut self, action: &CollectAction) {
        match action {
            CollectAction::Drop(name) => {
                let child = self
                    .0
                    .values()
                    .find(|e| e.parent().is_some_and(|(p, _)| p == name));
                assert!(child.is_none(), "{name} is dropped under {child:?}");
                self.0.remove(&name.epoch.0).expect("it is there");
            }
            CollectAction::Merge(run) => {
                for pair in run.windows(2) {
                    let newer = &self.0[&pair[1].epoch.0];
                    assert_eq!(newer.parent().map(|(p, _)| p), Some(&pair[0]), "not a run");
                }
                let oldest = self.0[&run[0].epoch.0].clone();
                let bytes = run.iter().map(|name| self.0[&name.epoch.0].bytes).max().unwrap();
                let newest = self.0.get_mut(&run[run.len() - 1].epoch.0).unwrap();
                (newest.kind, newest.links, newest.bytes) = (oldest.kind, oldest.links, bytes + 1);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn whatever_is_there_what_is_kept_stays_whole_at_every_step(
        // For each epoch: how far back its parent is (0: full), its length, whether it is missing.
        shape in prop::collection::vec((0_u64..4, 1_u64..200, 0_u8..25), 1..90),
        last in 1_u32..8,
        pinned in prop::collection::btree_set(1_u64..90, 0..4),
        max_links in 2_u32..12,
        short_of_room: bool,
    ) {
        let mut model = Model(BTreeMap::new());
        for (i, (back, bytes, missing)) in shape.iter().enumerate() {
            let epoch = i as u64 + 1;
            // Mostly the one before, sometimes a branch, seldom full.
            let parent = match back {
                0 if epoch.is_multiple_of(5) => None,
                3 if epoch > 3 => Some(epoch - 3),
                _ => epoch.checked_sub(1).filter(|p| *p > 0),
            };
            if *missing > 0 {
                model.0.insert(epoch, entry(epoch, parent, *bytes));
            }
        }
        let policy: KeepPolicy = format!("last={last}").parse().unwrap();
        let pinned: BTreeSet<SegmentName> = pinned.iter().map(|e| name(&format!("web/1/{e}"))).collect();
        let before = model.clone();
        let kept = policy.keep(&model.lineage().points());
        let newest = before.0.keys().rev().find(|e| before.is_whole(**e)).copied();
        let must_stay: Vec<u64> = before.0.keys().copied().filter(|e| {
            let of = name(&format!("web/1/{e}"));
            before.is_whole(*e) && (kept.contains(&of) || pinned.contains(&of))
        }).collect();
        let mut rounds = 0;
        loop {
            let lineage = model.lineage();
            for (i, entry) in lineage.entries().iter().enumerate() {
                prop_assert_eq!(lineage.links(i) > 0, model.is_whole(entry.name.epoch.0));
            }
            let rules = CollectRules { kept: &policy.keep(&lineage.points()), pinned: &pinned, max_links, short_of_room };
            let actions = plan_collect(&lineage, &rules);
            if actions.is_empty() {
                break;
            }
            for action in &actions {
                model.apply(action);
                for epoch in &must_stay {
                    prop_assert!(model.is_whole(*epoch), "{epoch} is lost by {action:?}");
                }
                // What is not known to be superseded is there.
                for epoch in before.0.keys().filter(|e| newest.is_none_or(|n| **e > n)) {
                    prop_assert!(model.0.contains_key(epoch));
                }
            }
            rounds += 1;
            prop_assert!(rounds < 1000, "it does not end");
        }
        let lineage = model.lineage();
        for i in 0..lineage.entries().len() {
            prop_assert!(lineage.links(i) <= max_links, "a chain of {} links", lineage.links(i));
        }
        if short_of_room && before.0.keys().all(|e| before.is_whole(*e)) {
            // Only what is kept, and branches that two stand on.
            let extra = model.0.keys().filter(|e| !must_stay.contains(e) && newest.is_some_and(|n| **e < n));
            for epoch in extra {
                let of = name(&format!("web/1/{epoch}"));
                let children = model.0.values().filter(|e| e.parent().is_some_and(|(p, _)| *p == of)).count();
                prop_assert!(children >= 2 || pinned.contains(&of), "{epoch} is left");
            }
        }
    }
}

/// A machine that is checkpointed again and again, and what it had each time.
struct Churn {
    machine: Machine,
    parent: Option<(SegmentName, CheckpointId)>,
    oracle: BTreeMap<SegmentName, Bytes>,
    random: u64,
}

impl Churn {
    fn new(seed: u64) -> Self {
        Self {
            machine: Machine::new(),
            parent: None,
            oracle: BTreeMap::new(),
            random: seed | 1,
        }
    }

    fn next(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    /// A few pages change; at `minutes` past the beginning of 2026.
    fn epoch(&mut self, store: &Arc<FsStore>, epoch: u64, minutes: u64) -> SegmentName {
        for _ in 0..6 {
            let (page, value) = (self.next(MEMORY_PAGES), self.next(256) as u8);
            self.machine.write(0, page, value);
        }
        let (page, value) = (self.next(DISK_PAGES), self.next(256) as u8);
        self.machine.write(1, page, value);
        let mut captured = self.machine.capture_now(self.parent.is_none());
        captured.created_unix_ns = (1_767_225_600 + minutes * 60) * 1_000_000_000;
        let of = SegmentName::new(vm("web"), Generation(1), Epoch(epoch));
        let manifest = manifest(&of, &captured, self.parent.as_ref().map(|(name, id)| (name, *id)));
        pool().encode_to_store(&captured, &manifest, store).unwrap();
        self.parent = Some((of.clone(), captured.checkpoint));
        self.oracle.insert(of.clone(), self.machine.at_capture.clone());
        of
    }
}

#[test]
fn a_thousand_epochs_by_policy_stay_level_and_every_point_is_right() {
    let seed = 0x5eed;
    let dir = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    let store = FsStore::open(dir.path(), None, Durability::Spool).unwrap();
    let policy: KeepPolicy = "last=20,hourly=12,daily=3".parse().unwrap();
    let pinned = BTreeSet::new();
    let mut churn = Churn::new(seed);
    let mut most = [0, 0];
    for epoch in 1..=1000 {
        churn.epoch(&store, epoch, epoch * 10);
        if epoch.is_multiple_of(7) {
            store
                .collect(&vm("web"), &policy, &pinned, &options(40, false))
                .unwrap();
            // Three days are 432 epochs: from then on nothing new is kept without something old being given up.
            if epoch > 500 {
                let half = usize::from(epoch > 750);
                most[half] = most[half].max(store.used_bytes());
            }
            let held: BTreeSet<_> = store.all().into_iter().map(|entry| entry.name).collect();
            churn.oracle.retain(|name, _| held.contains(name));
        }
    }
    assert!(
        most[1] <= most[0] * 5 / 4,
        "it grows: {most:?} bytes in the third and fourth quarter"
    );
    assert!(store.all().len() < 100, "{} segments are left", store.all().len());
    let lineage = Lineage::new(store.entries(&vm("web")));
    let points = lineage.points();
    let kept = policy.keep(&points);
    assert_eq!(kept.len(), policy.keep(&points).len());
    assert!(kept.len() > 25, "only {} points are kept", kept.len());
    assert!((0..lineage.entries().len()).all(|i| (1..=40).contains(&lineage.links(i))));
    // Collected or not, the points the policy names by their times are those of a store that kept everything.
    let all: Vec<Point> = (1..=1000_u64)
        .map(|epoch| Point {
            name: SegmentName::new(vm("web"), Generation(1), Epoch(epoch)),
            created_unix_ns: (1_767_225_600 + epoch * 600) * 1_000_000_000,
            label: None,
        })
        .collect();
    assert_eq!(kept, policy.keep(&all));
    let kept: Vec<_> = kept.into_iter().collect();
    for _ in 0..20 {
        let point = &kept[churn.next(kept.len() as u64) as usize];
        store.verify(point).unwrap();
        assert_eq!(
            load(&store, point),
            churn.oracle[point],
            "{point} is not what the machine had (seed {seed:#x})"
        );
    }
    drop(store);
    let again = FsStore::open(dir.path(), None, Durability::Spool).unwrap();
    assert_eq!(again.damaged(), []);
    for point in &kept {
        assert_eq!(load(&again, point), churn.oracle[point]);
    }
}

#[test]
fn checkpoints_arrive_while_it_collects() {
    let dir = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    let store = FsStore::open(dir.path(), None, Durability::Durable).unwrap();
    let policy: KeepPolicy = "last=3".parse().unwrap();
    let done = AtomicBool::new(false);
    let mut churn = Churn::new(7);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                store
                    .collect(&vm("web"), &policy, &BTreeSet::new(), &options(8, true))
                    .unwrap();
            }
        });
        for epoch in 1..=150 {
            churn.epoch(&store, epoch, epoch);
            let newest = store.newest_complete(&vm("web")).unwrap();
            assert_eq!(newest.name.epoch.0, epoch, "the newest is not whole");
        }
        done.store(true, Ordering::Relaxed);
    });
    store
        .collect(&vm("web"), &policy, &BTreeSet::new(), &options(8, true))
        .unwrap();
    assert_eq!(store.all().len(), 3);
    for entry in store.all() {
        assert_eq!(load(&store, &entry.name), churn.oracle[&entry.name]);
    }
}

#[test]
fn a_fold_leaves_what_it_stood_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(dir.path(), None, Durability::Durable).unwrap();
    // More links than are merged at once.
    let segments = chain("web", 300);
    for (name, bytes) in &segments {
        put(&store, name, bytes).unwrap();
    }
    let (tip, before) = (name("web/1/300"), load(&store, &name("web/1/150")));
    let content = load(&store, &tip);
    let entry = store.fold(&tip, 1, &Pace::unlimited()).unwrap();
    assert!(entry.kind.is_full());
    assert_eq!(store.chain(&tip).unwrap().len(), 1);
    assert_eq!(store.all().len(), 300);
    assert_eq!(
        (load(&store, &tip), load(&store, &name("web/1/150"))),
        (content, before)
    );
    store.verify(&tip).unwrap();
    // Again is nothing to do, and of nothing is an error.
    assert_eq!(store.fold(&tip, 1, &Pace::unlimited()).unwrap(), entry);
    assert!(matches!(
        store.fold(&name("web/7/7"), 1, &Pace::unlimited()),
        Err(StoreError::Chain { .. })
    ));
}

#[test]
fn what_is_read_now_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(dir.path(), None, Durability::Durable).unwrap();
    for (name, bytes) in &chain("web", 9) {
        put(&store, name, bytes).unwrap();
    }
    let policy: KeepPolicy = "last=1".parse().unwrap();
    let collect = || {
        store
            .collect(&vm("web"), &policy, &BTreeSet::new(), &options(100, true))
            .unwrap()
    };
    // A restore in another process.
    let reader = FsStore::open_read_only(dir.path()).unwrap();
    assert!(collect().postponed);
    assert_eq!(store.all().len(), 9);
    drop(reader);
    // A transfer to another holder, of the chain of 4.
    let lease = store.lease(&name("web/1/4")).unwrap();
    let content = load(&store, &name("web/1/4"));
    assert!(!collect().postponed);
    let names: Vec<u64> = store.all().iter().map(|entry| entry.name.epoch.0).collect();
    assert_eq!(names, [1, 2, 3, 4, 9]);
    assert_eq!(load(&store, &name("web/1/4")), content);
    drop(lease);
    collect();
    assert_eq!(store.all().len(), 1);
    assert_eq!(store.newest_complete(&vm("web")).unwrap().name, name("web/1/9"));
    // Whatever the policy says, the newest stays, and what the registry calls committed.
    collect();
    assert_eq!(store.all().len(), 1);
}

#[test]
fn what_is_damaged_is_set_aside_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(dir.path(), None, Durability::Durable).unwrap();
    let segments = chain("web", 3);
    for (name, bytes) in &segments {
        put(&store, name, bytes).unwrap();
    }
    let bad = name("web/1/2");
    assert_eq!(
        store.check(&bad, &Pace::unlimited()).unwrap().health,
        Health::Sound
    );
    let path = store.segment_path(&bad);
    let mut bytes = std::fs::read(&path).unwrap();
    // In the frames: the header and the index are sound.
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let check = store.check(&bad, &Pace::unlimited()).unwrap();
    assert!(matches!(check.health, Health::Damaged(_)), "{check:?}");
    assert_eq!(store.get(&bad), None);
    let [damaged] = store.damaged().try_into().unwrap();
    assert_eq!(std::fs::read(damaged.moved_to.unwrap()).unwrap(), bytes);
    assert_eq!(store.newest_complete(&vm("web")).unwrap().name, name("web/1/1"));
    assert_eq!(
        store.check(&bad, &Pace::unlimited()).unwrap().health,
        Health::Gone
    );
    // Nothing that is left is dropped for it: it may come back.
    let policy: KeepPolicy = "last=1".parse().unwrap();
    store
        .collect(&vm("web"), &policy, &BTreeSet::new(), &options(100, true))
        .unwrap();
    assert_eq!(store.all().len(), 2);
    put(&store, &bad, &segments[1].1).unwrap();
    assert_eq!(store.damaged(), []);
    assert_eq!(store.newest_complete(&vm("web")).unwrap().name, name("web/1/3"));
}

#[test]
fn a_policy_is_remembered_and_a_damaged_one_keeps_everything() {
    let dir = tempfile::tempdir().unwrap();
    let policy: KeepPolicy = "last=2,yearly=1".parse().unwrap();
    {
        let store = FsStore::open(dir.path(), None, Durability::Durable).unwrap();
        assert_eq!(store.policy(&vm("web")), None);
        store.set_policy(&vm("web"), Some(policy)).unwrap();
        store.set_policy(&vm("db"), Some(policy)).unwrap();
        store.set_policy(&vm("gone"), Some(policy)).unwrap();
        store.set_policy(&vm("gone"), None).unwrap();
    }
    std::fs::write(dir.path().join("policies/db"), "last=x\n").unwrap();
    let store = FsStore::open(dir.path(), None, Durability::Durable).unwrap();
    assert_eq!(store.policy(&vm("web")), Some(policy));
    assert_eq!(store.policy(&vm("db")), Some(KeepPolicy::ALL));
    assert_eq!(store.policy(&vm("gone")), None);
}
