//! What may become of an etcd: a leader killed, a member that hangs, all of them away, one put back from an old copy; and
//! one that does not let everyone in.

use std::time::Duration;

use migrate::agent::{Agent, AgentConfig};
use migrate::registry::{
    Etcd, EtcdAccess, LeaseState, LeaseSubject, MAX_REGISTER_SEGMENTS, Registry, RegistryError, random_lease,
};
use migrate::shipper::ShipEvent;
use migrate::transport::Client;
use migrate::wire::{Call, PromoteCall};
use rustix::process::Signal;
use segment::Generation;
use tokio::time::Instant;

use crate::conformance::{new_vm, record};
use crate::net_common::*;

fn registry(etcd: &etcd::Etcd) -> Registry {
    Registry::new(Etcd::new(&etcd.addr("t"), &EtcdAccess::default()).unwrap())
}

fn owner(generation: u64) -> LeaseSubject {
    LeaseSubject::Owner {
        vm: vm("web"),
        generation: Generation(generation),
    }
}

/// Asks again while nobody answers, as every caller does.
async fn patiently<T>(what: &str, ask: impl AsyncFn() -> Result<T, RegistryError>) -> T {
    let start = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(error) if error.is_transient() && start.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => panic!("{what}: {error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_leader_and_a_slow_member_cost_time_only() {
    let mut etcd = etcd::Etcd::start(3);
    let r = registry(&etcd);
    r.create_vm(new_vm("web")).await.unwrap();
    let lease = random_lease();
    r.grant_lease(&owner(1), 60_000, lease).await.unwrap();

    // A member hangs: whichever it is, the others answer.
    let slow = etcd.leader().unwrap();
    etcd.signal(slow, Signal::STOP);
    let raised = patiently("raise while the leader hangs", async || {
        match r.raise_generation(&vm("web"), Generation(1), "o2").await {
            // It may have been done before the answer was lost.
            Err(RegistryError::Conflict { .. }) => r.get_vm(&vm("web")).await,
            other => other,
        }
    })
    .await;
    assert_eq!((raised.generation, raised.owner.as_str()), (Generation(2), "o2"));
    let fenced = patiently("what the old owner is told", async || {
        match r.keep_alive(&owner(1), lease).await {
            Err(error @ RegistryError::Fenced { .. }) => Ok(error),
            Err(error) => Err(error),
            Ok(_) => panic!("a lease of a generation that is over was renewed"),
        }
    })
    .await;
    assert!(fenced.to_string().contains("o2"), "{fenced}");
    etcd.signal(slow, Signal::CONT);
    // It says nothing from its past when it wakes, wherever it is asked.
    for _ in 0..20 {
        let now = patiently("read", async || r.get_vm(&vm("web")).await).await;
        assert_eq!(now.generation, Generation(2));
    }

    // The leader is killed: a lease that is renewed is held on, and records are there.
    etcd.wait_for_leader();
    let second = random_lease();
    patiently("grant", async || r.grant_lease(&owner(2), 10_000, second).await).await;
    let leader = etcd.leader().unwrap();
    etcd.kill(leader);
    patiently("register after the leader's death", async || {
        let segments = vec![record(name("web", 2, 1), 1, "h:1")];
        r.register_segments(&vm("web"), Generation(2), segments).await
    })
    .await;
    let (_, seen) = patiently("renew", async || r.keep_alive(&owner(2), second).await).await;
    assert_eq!(seen.unwrap().owner_lease(), LeaseState::Held);
    let now = patiently("read", async || r.get_vm(&vm("web")).await).await;
    assert_eq!(now.newest.unwrap().name, name("web", 2, 1));

    // With another gone there is no majority: that is unavailable, and not a refusal; and it ends by a deadline.
    etcd.run(leader);
    etcd.wait_for_leader();
    let (one, two) = (0, 1);
    etcd.kill(one);
    etcd.kill(two);
    let start = Instant::now();
    let away = r
        .raise_generation(&vm("web"), Generation(2), "o3")
        .await
        .unwrap_err();
    assert!(matches!(away, RegistryError::Unavailable { .. }), "{away}");
    assert!(start.elapsed() < PATIENCE);
    etcd.run(one);
    etcd.run(two);
    etcd.wait_for_leader();
    let now = patiently("read", async || r.get_vm(&vm("web")).await).await;
    // Not known whether it was done; known is that one generation has one owner.
    assert!(now.generation == Generation(2) || now.owner == "o3", "{now:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_was_put_back_is_refused() {
    let mut etcd = etcd::Etcd::start(1);
    let r = registry(&etcd);
    r.create_vm(new_vm("web")).await.unwrap();
    let saved = etcd.data(0).with_extension("saved");
    etcd.ctl(0, &["snapshot", "save", saved.to_str().unwrap()]);
    for generation in 1..=3 {
        r.raise_generation(&vm("web"), Generation(generation), "o2")
            .await
            .unwrap();
    }
    let seen = r.seen().unwrap();
    // Put back from the copy, at the same addresses and with the same names.
    etcd.kill(0);
    etcd.restore(0, &saved);
    etcd.wait_for_leader();
    let past = tokio::time::timeout(PATIENCE, async {
        loop {
            match r.get_vm(&vm("web")).await {
                Err(error) if error.is_transient() => tokio::time::sleep(Duration::from_millis(50)).await,
                other => return other,
            }
        }
    });
    let past = past.await.unwrap().unwrap_err();
    assert!(matches!(past, RegistryError::Past { .. }), "{past}");
    assert!(past.to_string().contains("registry-seen"), "{past}");
    // Nor is anything changed by its word: not even an owner of the generation it knows is told that it is over.
    let told = r.keep_alive(&owner(4), 1).await.unwrap_err();
    assert!(matches!(told, RegistryError::Past { .. }), "{told}");
    // A process that starts anew knows it from the one before.
    let backend = Etcd::new(&etcd.addr("t"), &EtcdAccess::default()).unwrap();
    let later = Registry::after(backend, Some(seen));
    let past = later.get_vm(&vm("web")).await.unwrap_err();
    assert!(matches!(past, RegistryError::Past { .. }), "{past}");
    // By a person's word it is gone on with.
    assert_eq!(
        registry(&etcd).get_vm(&vm("web")).await.unwrap().generation,
        Generation(1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_let_in_by_password_and_others_are_not() {
    let etcd = etcd::Etcd::start(1);
    for args in [
        ["user", "add", "root:secret"].as_slice(),
        &["user", "grant-role", "root", "root"],
        &["auth", "enable"],
    ] {
        assert!(etcd.ctl(0, args).is_some(), "{args:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let with = |password: &str| {
        let path = dir.path().join(password);
        std::fs::write(&path, format!("{password}\n")).unwrap();
        let access = EtcdAccess {
            user: Some("root".into()),
            password_file: Some(path),
            ..EtcdAccess::default()
        };
        Registry::new(Etcd::new(&etcd.addr("t"), &access).unwrap())
    };
    let r = with("secret");
    r.create_vm(new_vm("web")).await.unwrap();
    r.grant_lease(&owner(1), 5000, random_lease()).await.unwrap();
    for stranger in [with("wrong"), registry(&etcd)] {
        let denied = stranger.get_vm(&vm("web")).await.unwrap_err();
        assert!(matches!(denied, RegistryError::Denied { .. }), "{denied}");
        assert!(denied.to_string().contains("password"), "{denied}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_registry_is_away_protection_goes_on_and_nothing_is_promoted() {
    let etcd = etcd::Etcd::start(1);
    let dir = tempfile::tempdir().unwrap();
    let agent = async |node: &str| {
        let config = AgentConfig {
            // Any file: it is never to be started.
            vmm: Some(std::env::current_exe().unwrap()),
            ..config(dir.path(), node, etcd.registry_addr("t"))
        };
        Agent::start(config).await.unwrap()
    };
    let (b, c) = (agent("b").await, agent("c").await);
    let holders = [b.address(), c.address()];
    let asked = holders.join(",");
    // An owner asks the agents, and needs no access to etcd.
    let r = Registry::remote(&asked, &tester());
    let generation = create(&r, "web", &holders, 2).await;
    let of_owner = Registry::remote(&asked, &tester());
    let mut owner = Owner::tuned(
        dir.path(),
        "web",
        generation,
        &holders,
        2,
        Some(of_owner),
        |config| {
            config.lease_ttl = Duration::from_secs(3);
        },
    );
    let first = owner.take(8);
    owner.wait_committed(&first).await;
    etcd.signal(0, Signal::STOP);
    let mut last = first;
    for _ in 0..5 {
        last = owner.take(8);
        owner.wait_committed(&last).await;
    }
    let mut client = Client::connect(c.address(), &tester()).await.unwrap();
    let call = Call::Promote(PromoteCall {
        vm: vm("web"),
        dry_run: false,
        accept_loss: false,
        force: false,
    });
    let refused = client.call(call, PATIENCE).await.unwrap_err().to_string();
    assert!(
        refused.contains("does not answer") && refused.contains("Nothing was changed"),
        "{refused}"
    );
    assert!(!owner.seen.iter().any(|e| matches!(e, ShipEvent::Fenced { .. })));
    etcd.signal(0, Signal::CONT);
    // What was committed meanwhile is told, and the owner is still the owner.
    let start = Instant::now();
    loop {
        let record = patiently("read", async || r.get_vm(&vm("web")).await).await;
        assert_eq!(record.generation, generation);
        if record.newest.is_some_and(|n| n.name == last) {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "it is never registered");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    owner.shipper.stop().await;
    c.stop().await;
    b.stop().await;
}

/// What `standby status` needs of a large cluster. Prints how long it takes: on an idle machine far less than a second.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "fills an etcd for a minute: scripts/test --run-ignored only"]
async fn a_thousand_vms_with_a_hundred_restore_points_are_listed_at_once() {
    const VMS: u64 = 1000;
    const POINTS: u64 = 100;
    let etcd = etcd::Etcd::start(3);
    let r = registry(&etcd);
    for n in 0..20u8 {
        let node = crate::conformance::node(&format!("n{n}"), &format!("10.0.0.{n}:7400"), n);
        r.join_node(node, false).await.unwrap();
    }
    let mut filling = tokio::task::JoinSet::new();
    for worker in 0..16u64 {
        let r = r.clone();
        filling.spawn(async move {
            for n in (worker..VMS).step_by(16) {
                let id = format!("vm-{n:04}");
                r.create_vm(new_vm(&id)).await.unwrap();
                let points: Vec<_> = (1..=POINTS)
                    .map(|e| record(name(&id, 1, e), 1, "10.0.0.1:7400"))
                    .collect();
                for some in points.chunks(MAX_REGISTER_SEGMENTS) {
                    r.register_segments(&vm(&id), Generation(1), some.to_vec())
                        .await
                        .unwrap();
                }
            }
        });
    }
    while let Some(filled) = filling.join_next().await {
        filled.unwrap();
    }
    for _ in 0..5 {
        let start = Instant::now();
        let (nodes, vms) = (r.all_nodes().await.unwrap(), r.all_vms().await.unwrap());
        println!(
            "{} nodes and {} VMs in {:?}",
            nodes.len(),
            vms.len(),
            start.elapsed()
        );
        assert_eq!((nodes.len() as u64, vms.len() as u64), (20, VMS));
        assert!(
            vms.iter()
                .all(|v| v.newest.as_ref().is_some_and(|n| n.name.epoch.0 == POINTS))
        );
    }
}
