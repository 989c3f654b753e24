//! Leases, watches, swaps and drains: what every registry does, whatever is behind it.

use std::time::Duration;

use migrate::registry::{
    Changed, HolderSwap, LeaseState, LeaseSubject, Registry, RegistryError, VmState, random_lease,
};
use segment::Generation;
use tokio::time::Instant;

use crate::conformance::{new_vm, node};
use crate::net_common::*;

/// The shortest that etcd grants with its usual election time.
const TTL_MS: u64 = 2000;

fn owner(generation: u64) -> LeaseSubject {
    LeaseSubject::Owner {
        vm: vm("web"),
        generation: Generation(generation),
    }
}

pub async fn a_lease_is_held_while_it_is_renewed(r: Registry) {
    r.create_vm(new_vm("web")).await.unwrap();
    let lease_of = async || r.get_vm(&vm("web")).await.unwrap().owner_lease();
    assert_eq!(lease_of().await, LeaseState::Never);
    let nobody = LeaseSubject::Owner {
        vm: vm("db"),
        generation: Generation(1),
    };
    let refused = r.grant_lease(&nobody, TTL_MS, random_lease()).await.unwrap_err();
    assert!(matches!(refused, RegistryError::NoSuchVm { .. }), "{refused}");
    let lease = random_lease();
    let asked = Instant::now();
    let (granted, record) = r.grant_lease(&owner(1), TTL_MS, lease).await.unwrap();
    assert_eq!(granted.id, lease);
    assert!(granted.ttl_ms >= TTL_MS);
    assert_eq!(record.unwrap().owner_lease(), LeaseState::Held);
    // The answer was lost: the same again.
    r.grant_lease(&owner(1), TTL_MS, lease).await.unwrap();
    assert_eq!(lease_of().await, LeaseState::Held);
    // Renewed for longer than it is held without.
    let long = Duration::from_millis(granted.ttl_ms) * 3 / 2;
    while asked.elapsed() < long {
        let (renewed, record) = r.keep_alive(&owner(1), lease).await.unwrap();
        assert_eq!(renewed, granted);
        assert_eq!(record.unwrap().owner_lease(), LeaseState::Held);
        tokio::time::sleep(Duration::from_millis(granted.ttl_ms / 5)).await;
    }
    // No longer renewed it goes, and not before its time.
    let last = Instant::now();
    r.keep_alive(&owner(1), lease).await.unwrap();
    while lease_of().await == LeaseState::Held {
        assert!(last.elapsed() < PATIENCE, "it never runs out");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(
        last.elapsed() >= Duration::from_millis(granted.ttl_ms),
        "{:?}",
        last.elapsed()
    );
    assert_eq!(lease_of().await, LeaseState::Gone);
    let gone = r.keep_alive(&owner(1), lease).await.unwrap_err();
    assert!(matches!(gone, RegistryError::LeaseGone { .. }), "{gone}");
    // Nobody took the VM over: its owner takes another, and gives it back.
    let second = random_lease();
    r.grant_lease(&owner(1), TTL_MS, second).await.unwrap();
    assert_eq!(lease_of().await, LeaseState::Held);
    r.revoke_lease(&owner(1), lease).await.unwrap();
    assert_eq!(lease_of().await, LeaseState::Held);
    r.revoke_lease(&owner(1), second).await.unwrap();
    assert_eq!(lease_of().await, LeaseState::Gone);
    // One lease in place of another.
    let (third, fourth) = (random_lease(), random_lease());
    r.grant_lease(&owner(1), TTL_MS, third).await.unwrap();
    r.grant_lease(&owner(1), TTL_MS, fourth).await.unwrap();
    assert!(r.keep_alive(&owner(1), third).await.is_err());
    r.keep_alive(&owner(1), fourth).await.unwrap();
    for ttl_ms in [0, 1, u64::MAX] {
        let odd = r
            .grant_lease(&owner(1), ttl_ms, random_lease())
            .await
            .unwrap_err();
        assert!(matches!(odd, RegistryError::Invalid { .. }), "{odd}");
    }
}

pub async fn a_raise_ends_the_lease_of_the_owner_before(r: Registry) {
    r.create_vm(new_vm("web")).await.unwrap();
    let lease = random_lease();
    r.grant_lease(&owner(1), 60_000, lease).await.unwrap();
    let raised = r.raise_generation(&vm("web"), Generation(1), "o2").await.unwrap();
    assert_eq!(raised.owner_lease(), LeaseState::Never);
    let fenced = RegistryError::Fenced {
        vm: vm("web"),
        asked: Generation(1),
        current: Generation(2),
        owner: "o2".into(),
    };
    assert_eq!(r.keep_alive(&owner(1), lease).await.unwrap_err(), fenced);
    assert_eq!(
        r.grant_lease(&owner(1), 60_000, random_lease())
            .await
            .unwrap_err(),
        fenced
    );
    // The new owner's is another; the old one's end does not touch it.
    let second = random_lease();
    r.grant_lease(&owner(2), 60_000, second).await.unwrap();
    r.revoke_lease(&owner(1), lease).await.unwrap();
    let (_, record) = r.keep_alive(&owner(2), second).await.unwrap();
    assert_eq!(record.unwrap().owner_lease(), LeaseState::Held);
    let (listed, _) = r.list_vms(None, 10).await.unwrap();
    assert_eq!(listed[0].alive.unwrap().lease, second);
    // A forgotten VM leaves no lease behind for the next of its name.
    r.forget_vm(&vm("web"), true).await.unwrap();
    assert_eq!(
        r.create_vm(new_vm("web")).await.unwrap().owner_lease(),
        LeaseState::Never
    );
    let listed = r.get_vm(&vm("web")).await.unwrap();
    assert_eq!(listed.owner_lease(), LeaseState::Never);
}

pub async fn who_waits_hears_of_changes_and_of_leases(r: Registry) {
    let mut watch = r.watch();
    // The first answer says from where on it knows.
    let first = tokio::time::timeout(PATIENCE, async {
        loop {
            let changes = watch.next().await.unwrap();
            if !changes.complete {
                return;
            }
        }
    });
    first.await.expect("an answer that says that it is not complete");
    let wanted_vm = Changed::Vm { vm: vm("web") };
    let wanted_node = Changed::Node { name: "n1".into() };
    let mut heard = async |wanted: &Changed| {
        let hearing = async {
            loop {
                let changes = watch.next().await.unwrap();
                if !changes.complete || changes.changed.contains(wanted) {
                    return;
                }
            }
        };
        let waited = tokio::time::timeout(PATIENCE, hearing).await;
        waited.unwrap_or_else(|_| panic!("{wanted:?} was not heard of"));
    };
    r.create_vm(new_vm("web")).await.unwrap();
    heard(&wanted_vm).await;
    r.join_node(node("n1", "127.0.0.1:9", 7), false).await.unwrap();
    heard(&wanted_node).await;
    // A lease that comes, and one that runs out with nobody doing anything.
    let subject = LeaseSubject::Node {
        name: "n1".into(),
        id: [7; 16],
    };
    r.grant_lease(&subject, TTL_MS, random_lease()).await.unwrap();
    heard(&wanted_node).await;
    heard(&wanted_node).await;
    let nodes = r.all_nodes().await.unwrap();
    assert!(nodes.iter().any(|n| n.name == "n1" && !n.is_alive()));
    r.raise_generation(&vm("web"), Generation(1), "o2").await.unwrap();
    heard(&wanted_vm).await;
}

pub async fn a_swap_is_one_at_a_time_under_a_generation(r: Registry) {
    let first = r.create_vm(new_vm("web")).await.unwrap();
    let swap = |joining: &str, leaving: Option<&str>| {
        Some(HolderSwap {
            joining: joining.into(),
            leaving: leaving.map(str::to_owned),
        })
    };
    let set = async |generation, revision, swap| {
        r.set_swap(&vm("web"), Generation(generation), revision, swap)
            .await
    };
    for odd in [
        swap("127.0.0.1:1", None),
        swap("127.0.0.1:3", Some("127.0.0.1:9")),
        swap("", None),
    ] {
        let refused = set(1, first.revision, odd).await.unwrap_err();
        assert!(matches!(refused, RegistryError::Invalid { .. }), "{refused}");
    }
    let begun = set(1, first.revision, swap("127.0.0.1:3", Some("127.0.0.1:2")))
        .await
        .unwrap();
    // The set itself is as it was.
    assert_eq!(begun.holders, first.holders);
    let second = set(1, begun.revision, swap("127.0.0.1:4", None))
        .await
        .unwrap_err();
    assert!(second.to_string().contains("127.0.0.1:3 joins"), "{second}");
    let late = set(1, first.revision, None).await.unwrap_err();
    assert!(matches!(late, RegistryError::Revision { .. }), "{late}");
    let holders = vec!["127.0.0.1:1".to_owned(), "127.0.0.1:3".to_owned()];
    let done = r
        .set_holders(&vm("web"), Generation(1), begun.revision, holders.clone(), 1)
        .await
        .unwrap();
    assert_eq!((done.holders, done.swap), (holders, None));
    // A takeover does not go on with a change that the owner before had begun.
    let begun = set(1, done.revision, swap("127.0.0.1:5", None)).await.unwrap();
    assert!(begun.swap.is_some());
    let raised = r.raise_generation(&vm("web"), Generation(1), "o2").await.unwrap();
    assert_eq!(raised.swap, None);
    assert!(matches!(
        set(1, raised.revision, None).await,
        Err(RegistryError::Fenced { .. })
    ));
}

pub async fn a_node_is_drained_and_leaves(r: Registry) {
    r.join_node(node("n1", "127.0.0.1:1", 1), false).await.unwrap();
    r.create_vm(new_vm("web")).await.unwrap();
    assert!(r.set_draining("n1", true).await.unwrap().is_draining());
    // A restart does not end it; a word does.
    let again = r.join_node(node("n1", "127.0.0.1:1", 1), false).await.unwrap();
    assert!(again.is_draining());
    assert!(!r.set_draining("n1", false).await.unwrap().is_draining());
    let none = r.set_draining("n9", true).await.unwrap_err();
    assert!(none.to_string().contains("n9"), "{none}");
    let holds = r.leave_node("n1", false).await.unwrap_err();
    assert!(
        holds.to_string().contains("web") && holds.to_string().contains("drain"),
        "{holds}"
    );
    let record = r.get_vm(&vm("web")).await.unwrap();
    r.set_holders(
        &vm("web"),
        Generation(1),
        record.revision,
        vec!["127.0.0.1:2".into()],
        1,
    )
    .await
    .unwrap();
    r.leave_node("n1", false).await.unwrap();
    r.leave_node("n1", false).await.unwrap();
    assert!(r.all_nodes().await.unwrap().iter().all(|n| n.name != "n1"));
    // By force, whatever names it.
    r.join_node(node("n2", "127.0.0.1:2", 2), false).await.unwrap();
    r.leave_node("n2", true).await.unwrap();
    r.set_vm_state(&vm("web"), Generation(1), VmState::Stopped)
        .await
        .unwrap();
}
