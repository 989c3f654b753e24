use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::store::Durability;
use crate::store::fixture::{Bytes, DISK_PAGES, MEMORY_PAGES, Machine, id, load, name, vm};

fn protector(store: &Arc<FsStore>, max_links: u32, first: Option<Parent>) -> Protector<Machine> {
    let options = ProtectOptions {
        max_links,
        first,
        ..ProtectOptions::default()
    };
    Protector::new(Machine::new(), store.clone(), vm("web"), Generation(1), options)
}

#[derive(Debug, Clone)]
enum Op {
    Write(usize, u64, u8),
    Checkpoint { full: bool, sparse: bool },
    RequestFull,
    CaptureFails,
    StoreIsFull,
    NameIsTaken,
}

fn op() -> impl Strategy<Value = Op> {
    let pages = [MEMORY_PAGES, DISK_PAGES];
    prop_oneof![
        20 => (0usize..2, any::<prop::sample::Index>(), 0u8..4)
            .prop_map(move |(space, page, value)| Op::Write(space, page.index(pages[space] as usize) as u64, value)),
        6 => (prop::bool::weighted(0.15), any::<bool>()).prop_map(|(full, sparse)| Op::Checkpoint { full, sparse }),
        1 => Just(Op::RequestFull),
        1 => Just(Op::CaptureFails),
        1 => Just(Op::StoreIsFull),
        1 => Just(Op::NameIsTaken),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is written, captured and refused: each checkpoint that was taken loads as the memory was then.
    #[test]
    fn each_checkpoint_loads_as_it_was(ops in prop::collection::vec(op(), 1..80)) {
        let dir = tempfile::tempdir().unwrap();
        let budget = 1 << 30;
        let store = FsStore::open(dir.path(), Some(budget), Durability::Spool).unwrap();
        let mut protector = protector(&store, 4, None);
        let mut oracle: BTreeMap<SegmentName, Bytes> = BTreeMap::new();
        let mut taken: Vec<Taken> = Vec::new();
        let request = CheckpointRequest::default;
        for op in ops {
            match op {
                Op::Write(space, page, value) => protector.source_mut().write(space, page, value),
                Op::RequestFull => protector.request_full(),
                Op::Checkpoint { full, sparse } => {
                    protector.source_mut().sparse = sparse;
                    let got = protector.checkpoint(CheckpointRequest { full, label: None }).unwrap();
                    prop_assert!(got.entry.links <= 4);
                    prop_assert!(!full || got.entry.kind.is_full());
                    oracle.insert(got.entry.name.clone(), protector.source_mut().at_capture.clone());
                    taken.push(got);
                }
                Op::CaptureFails => {
                    protector.source_mut().fail_next = true;
                    let e = protector.checkpoint(request()).unwrap_err();
                    prop_assert!(matches!(e, ProtectError::Capture { .. }), "{}", e);
                }
                Op::StoreIsFull => {
                    let rest = budget - store.used_bytes();
                    let _taken = store.begin(&name("other/1/1"), rest).unwrap();
                    let e = protector.checkpoint(request()).unwrap_err();
                    prop_assert!(e.store_error().is_some_and(StoreError::is_full), "{}", e);
                }
                Op::NameIsTaken => {
                    // By a file nobody knows of, as a commit leaves one that failed after its rename.
                    let last = protector.sequence.last.next();
                    let path = store.segment_path(&SegmentName::new(vm("web"), Generation(1), last));
                    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                    std::fs::write(&path, b"x").unwrap();
                    protector.checkpoint(request()).unwrap_err();
                    std::fs::remove_file(path).unwrap();
                }
            }
        }
        // Each name once, ascending; each delta on the one stored before.
        for pair in taken.windows(2) {
            prop_assert!(pair[0].entry.name < pair[1].entry.name);
            if let Some(parent) = pair[1].entry.parent() {
                prop_assert_eq!(parent, (&pair[0].entry.name, pair[0].entry.checkpoint));
            }
        }
        prop_assert_eq!(store.entries(&vm("web")).len(), taken.len());
        for (name, bytes) in &oracle {
            prop_assert!(load(&store, name) == *bytes, "{} loads as something else", name);
        }
    }
}

#[test]
fn deltas_until_the_chain_is_long_then_a_full_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(dir.path(), None, Durability::Spool).unwrap();
    let mut protector = protector(&store, 2, None);
    let mut kinds = Vec::new();
    for n in 0..7 {
        protector.source_mut().write(0, n, 9);
        if n == 4 {
            protector.request_full();
        }
        let label = Some(format!("number {n}"));
        let taken = protector
            .checkpoint(CheckpointRequest {
                full: false,
                label: label.clone(),
            })
            .unwrap();
        assert_eq!(taken.entry.label, label);
        kinds.push(taken.entry.links);
    }
    assert_eq!(kinds, [0, 1, 2, 0, 0, 1, 2]);
    protector.fence("generation 2 owns it");
    assert_eq!(
        protector.into_source().fenced.as_deref(),
        Some("generation 2 owns it")
    );
}

#[test]
fn a_full_request_stays_until_one_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(dir.path(), None, Durability::Spool).unwrap();
    let mut protector = protector(&store, 9, None);
    protector.checkpoint(CheckpointRequest::default()).unwrap();
    protector.request_full();
    protector.source_mut().fail_next = true;
    protector.checkpoint(CheckpointRequest::default()).unwrap_err();
    let taken = protector.checkpoint(CheckpointRequest::default()).unwrap();
    assert!(taken.entry.kind.is_full());
    assert_eq!(
        taken.entry.name,
        name("web/1/3"),
        "the number of the failed one was used again"
    );
    let taken = protector.checkpoint(CheckpointRequest::default()).unwrap();
    assert!(!taken.entry.kind.is_full());
}

#[test]
fn numbers_go_on_where_the_store_ends_and_a_restored_vm_on_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(dir.path(), None, Durability::Spool).unwrap();
    let mut first = protector(&store, 9, None);
    first.source_mut().write(0, 1, 1);
    let taken = first.checkpoint(CheckpointRequest::default()).unwrap();
    let machine = first.into_source();

    let parent = Parent::from(&taken.entry);
    let mut again = protector(&store, 9, Some(parent));
    *again.source_mut() = machine;
    again.source_mut().write(1, 2, 3);
    let taken = again.checkpoint(CheckpointRequest::default()).unwrap();
    assert_eq!(taken.entry.name, name("web/1/2"));
    assert_eq!(taken.entry.parent(), Some((&name("web/1/1"), id(1))));
    assert_eq!(load(&store, &taken.entry.name), again.source_mut().bytes);
}

/// A monitor that gives less than it was asked for.
#[derive(Debug)]
struct OnlyDeltas(Machine);

impl Source for OnlyDeltas {
    fn capture(&mut self, _kind: CaptureKind) -> Result<Captured, SourceError> {
        Ok(self.0.capture_now(false))
    }
    fn put_back(&mut self, captured: &Captured) {
        self.0.put_back(captured);
    }
    fn fence(&mut self, reason: &str) {
        self.0.fence(reason);
    }
}

#[test]
fn a_delta_is_not_taken_for_a_full_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(dir.path(), None, Durability::Spool).unwrap();
    let mut machine = Machine::new();
    machine.write(0, 3, 3);
    let options = ProtectOptions::default();
    let mut protector = Protector::new(
        OnlyDeltas(machine),
        store.clone(),
        vm("web"),
        Generation(1),
        options,
    );
    let e = protector.checkpoint(CheckpointRequest::default()).unwrap_err();
    assert!(matches!(e, ProtectError::NotFull { .. }));
    assert!(protector.into_source().0.dirty[0][3], "its page was not put back");
    assert!(store.all().is_empty());
}
