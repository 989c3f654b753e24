//! The holders of a VM change while it is shipped: one joins, catches up, and takes another's place; and the owner's lease.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod net_common;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use migrate::agent::{Agent, AgentConfig};
use migrate::clock::boottime;
use migrate::lease::{Electors, LeaseTerms};
use migrate::placement::Policy;
use migrate::registry::{HolderSwap, LeaseState, NewVm, Registry, RegistryAddr, VmRecord};
use migrate::shipper::ShipEvent;
use migrate::transport::Client;
use migrate::wire::{Call, CopyCall, Reply, SealCall};
use net_common::*;
use segment::{Generation, SegmentName};
use tokio::time::Instant;

/// Short, so that the record is looked at often.
const TTL: Duration = Duration::from_millis(600);

async fn record_that(registry: &Registry, what: &str, holds: impl Fn(&VmRecord) -> bool) -> VmRecord {
    let start = Instant::now();
    loop {
        let record = registry.get_vm(&vm("web")).await.unwrap();
        if holds(&record) {
            return record;
        }
        assert!(start.elapsed() < PATIENCE, "{what} did not come true: {record:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// An owner of "web" that keeps a lease in the registry of `at`.
fn leased(dir: &Path, at: &Agent, generation: Generation, holders: &[&str], quorum: usize) -> Owner {
    let registry = Some(Registry::remote(at.address(), &tester()));
    Owner::tuned(dir, "web", generation, holders, quorum, registry, |config| {
        config.lease_ttl = TTL;
    })
}

fn swap(joining: &str, leaving: Option<&str>) -> Option<HolderSwap> {
    Some(HolderSwap {
        joining: joining.to_owned(),
        leaving: leaving.map(str::to_owned),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_takes_the_place_of_a_dead_one() {
    let dir = tempfile::tempdir().unwrap();
    let a = first_agent(dir.path()).await;
    let (b, c) = (
        agent_with(dir.path(), "b", &a).await,
        agent_with(dir.path(), "c", &a).await,
    );
    let registry = Registry::remote(a.address(), &tester());
    let holders = [a.address(), b.address()];
    let generation = create(&registry, "web", &holders, 2).await;
    let mut owner = leased(dir.path(), &a, generation, &holders, 2);
    let first = owner.take(8);
    owner.wait_committed(&first).await;
    let gone = b.address().to_owned();
    b.stop().await;
    // Both are needed: nothing is committed without the dead one.
    let second = owner.take(8);
    let third = owner.take(8);
    let before = record_that(&registry, "a lease", |r| r.owner_lease() == LeaseState::Held).await;
    assert_eq!(owner.shipper.status().committed.as_ref(), Some(&first));
    registry
        .set_swap(
            &vm("web"),
            generation,
            before.revision,
            swap(c.address(), Some(&gone)),
        )
        .await
        .unwrap();
    let changed = owner
        .wait_event("the change", |e| matches!(e, ShipEvent::HoldersChanged { .. }))
        .await;
    let set = vec![a.address().to_owned(), c.address().to_owned()];
    assert_eq!(
        changed,
        ShipEvent::HoldersChanged {
            holders: set.clone(),
            ack_quorum: 2
        }
    );
    let after = record_that(&registry, "the set", |r| r.holders == set).await;
    assert_eq!(after.swap, None);
    if owner.full {
        owner.take(8);
    }
    owner.wait_committed(&third).await;
    assert!(c.store().newest_complete(&vm("web")).unwrap().name >= second);
    let status = owner.shipper.status();
    let addresses: Vec<_> = status.holders.iter().map(|h| h.address.clone()).collect();
    assert_eq!(addresses, set);
    assert!(!owner.spool.holders().contains(&gone));
    owner.shipper.stop().await;
    c.stop().await;
    a.stop().await;
}

/// The owner of a guest that runs by the grants of the old set alone must not have the new one in the registry.
#[tokio::test(flavor = "multi_thread")]
async fn an_owner_under_a_lease_counts_by_both_sets_before_the_registry_has_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let a = first_agent(dir.path()).await;
    let b = agent_with(dir.path(), "b", &a).await;
    let registry = Registry::remote(a.address(), &tester());
    let generation = create(&registry, "web", &[a.address()], 1).await;
    let of_owner = Registry::remote(a.address(), &tester());
    let (adopted, by) = tokio::sync::watch::channel(0);
    let terms = LeaseTerms {
        ttl: TTL,
        renew_every: TTL / 6,
    };
    let mut owner = Owner::tuned(
        dir.path(),
        "web",
        generation,
        &[a.address()],
        1,
        Some(of_owner),
        |config| {
            config.sender.lease = Some(terms);
            config.adopted = Some(by);
        },
    );
    let first = owner.take(8);
    owner.wait_committed(&first).await;
    // Both grant it time, and each answer is counted from when it was asked.
    let (before, renewed) = (boottime(), |e: &ShipEvent| matches!(e, ShipEvent::Renewed { .. }));
    let ShipEvent::Renewed { sent } = owner.wait_event("a renewal", renewed).await else {
        panic!("another event");
    };
    assert!(sent <= boottime());
    let granted = |e: &ShipEvent| matches!(e, ShipEvent::Granted { sent, .. } if *sent >= before);
    owner.wait_event("a grant", granted).await;
    let record = registry.get_vm(&vm("web")).await.unwrap();
    registry
        .set_swap(
            &vm("web"),
            generation,
            record.revision,
            swap(b.address(), Some(a.address())),
        )
        .await
        .unwrap();
    let both = |e: &ShipEvent| matches!(e, ShipEvent::Electors { .. });
    let ShipEvent::Electors { version, sets } = owner.wait_event("both sets", both).await else {
        panic!("another event");
    };
    let of = |address: &str| Electors::new(&[address.to_owned()], 1);
    assert_eq!(sets, [of(a.address()), of(b.address())]);
    // Many renewals later the registry has the old set still: the owner has not said that it counts by both.
    for _ in 0..5 {
        let last = boottime();
        let newer = |e: &ShipEvent| matches!(e, ShipEvent::Renewed { sent } if *sent >= last);
        owner.wait_event("a renewal", newer).await;
    }
    let record = registry.get_vm(&vm("web")).await.unwrap();
    assert_eq!(record.holders, [a.address()]);
    adopted.send_replace(version);
    record_that(&registry, "the new set", |r| {
        r.holders == [b.address()] && r.swap.is_none()
    })
    .await;
    let ShipEvent::Electors { version: last, sets } = owner.wait_event("one set", both).await else {
        panic!("another event");
    };
    assert_eq!((last, sets), (version + 1, vec![of(b.address())]));
    // It stands still for good: nobody has to wait for what it was granted.
    owner.shipper.release();
    owner.shipper.stop().await;
    record_that(&registry, "the lease given back", |r| {
        r.owner_lease() == LeaseState::Gone
    })
    .await;
    let mut client = Client::connect(b.address(), &tester()).await.unwrap();
    let seal = Call::Seal(SealCall {
        vm: vm("web"),
        generation: generation.next(),
    });
    let Reply::Sealed(sealed) = client.call(seal, PATIENCE).await.unwrap() else {
        panic!("another answer");
    };
    assert_eq!(
        sealed.grant_remaining_ms, None,
        "it was told that the guest stands still"
    );
    b.stop().await;
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_is_given_up_leaves_the_holders_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let a = first_agent(dir.path()).await;
    let registry = Registry::remote(a.address(), &tester());
    let holders = [a.address()];
    let generation = create(&registry, "web", &holders, 1).await;
    let mut owner = leased(dir.path(), &a, generation, &holders, 1);
    let first = owner.take(8);
    owner.wait_committed(&first).await;
    let record = registry.get_vm(&vm("web")).await.unwrap();
    // Nobody listens there: it never catches up.
    let begun = registry
        .set_swap(&vm("web"), generation, record.revision, swap("127.0.0.1:1", None))
        .await
        .unwrap();
    let joins = |owner: &Owner, count| owner.shipper.status().holders.len() == count;
    eventually("it is shipped to", || joins(&owner, 2)).await;
    let second = owner.take(8);
    owner.wait_committed(&second).await;
    registry
        .set_swap(&vm("web"), generation, begun.revision, None)
        .await
        .unwrap();
    eventually("it is shipped to no more", || joins(&owner, 1)).await;
    let third = owner.take(8);
    owner.wait_committed(&third).await;
    assert_eq!(registry.get_vm(&vm("web")).await.unwrap().holders, [a.address()]);
    owner.shipper.stop().await;
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_knows_until_when_its_lease_holds_and_others_see_it_go() {
    let dir = tempfile::tempdir().unwrap();
    let a = first_agent(dir.path()).await;
    let registry = Registry::remote(a.address(), &tester());
    let generation = create(&registry, "web", &[a.address()], 1).await;
    let owner = leased(dir.path(), &a, generation, &[a.address()], 1);
    let mut lease = owner.shipper.lease();
    let renewal = tokio::time::timeout(PATIENCE, lease.wait_for(Option::is_some))
        .await
        .unwrap();
    let first = (*renewal.unwrap()).unwrap();
    assert_eq!(first.ttl, TTL);
    assert!(first.sent <= boottime());
    assert!(first.left(first.sent + TTL / 2) == TTL / 2 && first.left(first.sent + TTL).is_zero());
    let newer = lease.wait_for(|r| r.is_some_and(|r| r.sent > first.sent));
    tokio::time::timeout(PATIENCE, newer).await.unwrap().unwrap();
    record_that(&registry, "held", |r| r.owner_lease() == LeaseState::Held).await;
    owner.shipper.stop().await;
    // The last renewal's time runs out by the registry's clock, never before the owner's own account of it.
    record_that(&registry, "gone", |r| r.owner_lease() == LeaseState::Gone).await;
    let last = (*lease.borrow()).unwrap();
    assert!(last.left(boottime()).is_zero());
    // An owner whose generation is over is told by its renewal.
    std::fs::create_dir(dir.path().join("old")).unwrap();
    let mut old = leased(&dir.path().join("old"), &a, generation, &[a.address()], 1);
    record_that(&registry, "held", |r| r.owner_lease() == LeaseState::Held).await;
    registry
        .raise_generation(&vm("web"), generation, "other")
        .await
        .unwrap();
    let fenced = |e: &ShipEvent| {
        matches!(
            e,
            ShipEvent::Fenced {
                current: Generation(2),
                ..
            }
        )
    };
    old.wait_event("fenced", fenced).await;
    old.shipper.stop().await;
    a.stop().await;
}

/// An agent that notices within a second that another is gone, and replaces it.
async fn hasty(dir: &Path, node: &str, registry: RegistryAddr) -> Agent {
    let config = AgentConfig {
        lease_ttl: Duration::from_millis(900),
        replace_after: Duration::from_millis(400),
        ..config(dir, node, registry)
    };
    Agent::start(config).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_dies_or_is_drained_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let a = hasty(dir.path(), "a", RegistryAddr::Embedded).await;
    let registry = Registry::remote(a.address(), &tester());
    let at = || RegistryAddr::Agent(a.address().to_owned());
    let b = hasty(dir.path(), "b", at()).await;
    let c = hasty(dir.path(), "c", at()).await;
    let d = hasty(dir.path(), "d", at()).await;
    // The registry's own node is no holder here: it stays.
    registry.set_draining("a", true).await.unwrap();
    let new = NewVm {
        vm: vm("web"),
        owner: "owner".into(),
        holders: vec![b.address().to_owned(), c.address().to_owned()],
        ack_quorum: 2,
        every_ms: 200,
        policy: Some(Policy {
            ack_quorum: 2,
            ..Policy::of(2)
        }),
    };
    let holders: Vec<_> = new.holders.clone();
    let generation = registry.create_vm(new).await.unwrap().generation;
    let holders: Vec<_> = holders.iter().map(String::as_str).collect();
    let mut owner = leased(dir.path(), &a, generation, &holders, 2);
    let mut last = owner.take(16);
    for _ in 0..5 {
        last = owner.take(16);
    }
    owner.wait_committed(&last).await;
    // Dead: its lease runs out, what it had is copied from the other, and the owner makes the change.
    let dead = c.address().to_owned();
    c.stop().await;
    let set = vec![b.address().to_owned(), d.address().to_owned()];
    record_that(&registry, "d in its place", |r| {
        r.holders == set && r.swap.is_none()
    })
    .await;
    let held = d.store().entries(&vm("web"));
    assert_eq!(held.len(), 6, "all restore points, and not the newest only");
    for entry in &held {
        d.store().verify(&entry.name).unwrap();
    }
    let next = owner.take(16);
    owner.wait_committed(&next).await;
    eventually("both have it", || {
        [&b, &d].iter().all(|n| n.store().get(&next).is_some())
    })
    .await;
    let (segments, _) = registry.list_segments(&vm("web"), None, 10).await.unwrap();
    assert!(
        segments[0].holders.contains(&d.address().to_owned()),
        "{segments:?}"
    );

    // The dead one is back, at its old address; and the first is drained: everything goes over.
    let c = Agent::start(AgentConfig {
        lease_ttl: Duration::from_millis(900),
        ..again(dir.path(), "c", at(), &dead)
    })
    .await
    .unwrap();
    registry.set_draining("b", true).await.unwrap();
    let set = vec![d.address().to_owned(), dead.clone()];
    record_that(&registry, "c again", |r| r.holders == set && r.swap.is_none()).await;
    assert!(c.store().get(&next).is_some());
    registry.leave_node("b", false).await.unwrap();
    let newest = owner.take(16);
    owner.wait_committed(&newest).await;
    owner.shipper.stop().await;
    for agent in [b, c, d, a] {
        agent.stop().await;
    }
}

/// Puts other bytes, valid by themselves, in the place of a stored segment, as a holder would that lies.
fn swap_content(store: &Path, name: &SegmentName, parent: Option<&SegmentName>, pages: u64) {
    let parent = parent.map(|p| (p, checkpoint_of(p, 1)));
    let id = checkpoint_of(name, 1);
    let (was, lie) = (
        segment_bytes(name, id, parent, pages),
        other_bytes(name, id, parent, pages, 77),
    );
    assert_eq!(was.len(), lie.len());
    let (mut folders, mut found): (Vec<PathBuf>, _) = (vec![store.to_owned()], 0);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if std::fs::read(&path).unwrap() == was {
                std::fs::write(&path, &lie).unwrap();
                found += 1;
            }
        }
    }
    assert_eq!(found, 1, "{name}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lying_and_a_dead_holder_do_not_give_comes_from_another() {
    let dir = tempfile::tempdir().unwrap();
    let a = first_agent(dir.path()).await;
    let (b, c) = (
        agent_with(dir.path(), "b", &a).await,
        agent_with(dir.path(), "c", &a).await,
    );
    let holders = [b.address(), c.address()];
    let registry = Registry::remote(a.address(), &tester());
    let dead = "127.0.0.1:1";
    let generation = create(&registry, "web", &[b.address(), c.address(), dead], 2).await;
    let mut owner = Owner::start(dir.path(), "web", generation, &holders, 2, None);
    for _ in 0..8 {
        owner.take(16);
    }
    let tip = owner.name(8);
    owner.wait_committed(&tip).await;
    let truth = c.store().entries(&vm("web"));
    for epoch in 1..=8 {
        let parent = (epoch > 1).then(|| owner.name(epoch - 1));
        let store = dir.path().join("b").join("store");
        swap_content(&store, &owner.name(epoch), parent.as_ref(), 16);
    }
    let forged: SegmentName = owner.name(9);
    owner.shipper.stop().await;
    // One that is no holder, and has something newer under the VM's name.
    let stranger = agent_with(dir.path(), "d", &a).await;
    let bytes = other_bytes(&forged, checkpoint_of(&forged, 1), None, 16, 77);
    let mut incoming = stranger.store().begin(&forged, bytes.len() as u64).unwrap();
    incoming.write_all(&bytes).unwrap();
    incoming.commit().unwrap();
    let mut client = Client::connect(a.address(), &tester()).await.unwrap();
    let call = CopyCall {
        vm: vm("web"),
        generation,
        from: [dead, stranger.address(), b.address(), c.address()]
            .map(str::to_owned)
            .into(),
    };
    let Reply::Copied(report) = client.call(Call::Copy(call), PATIENCE).await.unwrap() else {
        panic!("another answer");
    };
    assert!(
        report.notes.iter().any(|n| n.contains("announced with digest")),
        "{report:?}"
    );
    assert!(report.notes.iter().any(|n| n.contains(dead)), "{report:?}");
    assert!(
        report
            .notes
            .iter()
            .any(|n| n.contains(stranger.address()) && n.contains("is no holder")),
        "{report:?}"
    );
    assert_eq!(report.newest.unwrap().name, tip);
    let copied = a.store().entries(&vm("web"));
    assert_eq!(copied.len(), 8);
    for (copy, truth) in copied.iter().zip(&truth) {
        assert_eq!((&copy.name, copy.digest), (&truth.name, truth.digest));
        a.store().verify(&copy.name).unwrap();
    }
    for agent in [b, c, stranger, a] {
        agent.stop().await;
    }
}
