//! Shipping over real TCP between a shipper and agents in this process.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod net_common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use migrate::agent::Agent;
use migrate::registry::{Registry, RegistryAddr};
use migrate::shipper::{HolderState, ShipEvent};
use net_common::*;
use segment::Generation;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_arrives_is_committed_and_registered() {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    let registry = agent.registry().clone();
    let generation = create(&registry, "web", &[agent.address()], 1).await;
    let mut owner = Owner::start(
        dir.path(),
        "web",
        generation,
        &[agent.address()],
        1,
        Some(registry.clone()),
    );
    for _ in 0..20 {
        owner.take(8);
    }
    let last = owner.name(20);
    owner.wait_committed(&last).await;
    assert_eq!(agent.store().newest_complete(&vm("web")).unwrap().name, last);
    assert!(owner.shipper.drain(PATIENCE).await);
    let status = owner.shipper.status();
    assert_eq!(
        (status.holders[0].lag_epochs, status.holders[0].node.as_deref()),
        (0, Some("a"))
    );
    assert!(status.holders[0].bytes_sent > 20 * 8 * 4096);
    owner.shipper.stop().await;
    let (segments, more) = registry.list_segments(&vm("web"), None, 100).await.unwrap();
    assert_eq!((segments.len(), more), (20, false));
    assert_eq!(segments[19].holders, [agent.address()]);
    assert_eq!(
        registry.get_vm(&vm("web")).await.unwrap().newest.unwrap().name,
        last
    );
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_segment_larger_than_the_window_goes_through_and_waits_for_room() {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    // 8 MiB: more than is sent without `Accept`, and more than the window that is set here.
    let mut owner = Owner::tuned(
        dir.path(),
        "big",
        Generation(1),
        &[agent.address()],
        1,
        None,
        |c| {
            c.sender.window_bytes = 1 << 20;
        },
    );
    owner.take(2048);
    owner.take(2048);
    let last = owner.take(1);
    owner.wait_committed(&last).await;
    agent.store().verify(&owner.name(1)).unwrap();
    owner.shipper.stop().await;
    agent.stop().await;
}

/// Passes bytes on until `limit` of them went to the holder; then it breaks the connection. Connections after that
/// pass whole.
async fn breaking_proxy(target: String, limits: Vec<u64>) -> (String, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let task = tokio::spawn(async move {
        let mut limits = limits.into_iter();
        while let Ok((mut near, _)) = listener.accept().await {
            let Ok(mut far) = TcpStream::connect(&target).await else {
                continue;
            };
            let limit = limits.next().unwrap_or(u64::MAX);
            tokio::spawn(async move {
                let (mut near_read, mut near_write) = near.split();
                let (mut far_read, mut far_write) = far.split();
                let there = async {
                    let mut left = limit;
                    let mut buffer = vec![0; 16 << 10];
                    while left > 0 {
                        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                        match near_read.read(&mut buffer[..most]).await {
                            Ok(0) | Err(_) => return,
                            Ok(n) => {
                                left -= n as u64;
                                if far_write.write_all(&buffer[..n]).await.is_err() {
                                    return;
                                }
                            }
                        }
                    }
                };
                tokio::select! {
                    () = there => {}
                    _ = tokio::io::copy(&mut far_read, &mut near_write) => {}
                }
            });
        }
    });
    (address, task)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_broken_in_the_middle_of_a_segment_goes_on_where_the_holder_is() {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    // In the handshake, in the first segment, in a header of a later one, and somewhere.
    let limits = vec![10, 100_000, 400_003, 777_777, 300_000];
    let (address, proxy) = breaking_proxy(agent.address().to_owned(), limits).await;
    let mut owner = Owner::start(dir.path(), "web", Generation(1), &[&address], 1, None);
    let mut last = owner.take(32);
    for _ in 0..30 {
        last = owner.take(16);
    }
    owner.wait_committed(&last).await;
    let downs = owner
        .seen
        .iter()
        .filter(|e| matches!(e, ShipEvent::HolderDown { .. }))
        .count();
    assert!(downs >= 3, "the proxy broke {downs} connections");
    let held = agent.store().entries(&vm("web"));
    assert_eq!(held.len(), 31);
    for entry in held {
        agent.store().verify(&entry.name).unwrap();
    }
    assert_eq!(agent.store().chain(&last).unwrap().len(), 31);
    owner.shipper.stop().await;
    proxy.abort();
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_comes_back_is_served_from_the_spool_and_the_other_did_not_wait() {
    let dir = tempfile::tempdir().unwrap();
    let a = first_agent(dir.path()).await;
    let b = agent_with(dir.path(), "b", &a).await;
    let (a_address, b_address) = (a.address().to_owned(), b.address().to_owned());
    let mut owner = Owner::start(
        dir.path(),
        "web",
        Generation(1),
        &[&a_address, &b_address],
        1,
        None,
    );
    let first = owner.take(8);
    owner.wait_committed(&first).await;
    // Its answer too, not only its file: an owner counts what it heard.
    eventually("b has the first and said so", || {
        owner.shipper.status().holders[1].lag_epochs == 0
    })
    .await;
    b.stop().await;
    owner
        .wait_event("b is missed", |e| matches!(e, ShipEvent::HolderDown { .. }))
        .await;

    let mut last = first.clone();
    for _ in 0..40 {
        last = owner.take(8);
    }
    // Committed by a alone, while b is dead.
    owner.wait_committed(&last).await;
    let status = owner.shipper.status();
    assert_eq!(status.holders[0].lag_epochs, 0);
    assert_eq!(status.holders[1].lag_epochs, 40);
    assert!(status.holders[1].lag_bytes > 40 * 8 * 4096);
    eventually("b is unreachable", || {
        matches!(
            owner.shipper.status().holders[1].state,
            HolderState::Unreachable { .. }
        )
    })
    .await;
    let json = serde_json::to_value(owner.shipper.status()).unwrap();
    assert_eq!(json["holders"][1]["state"], "unreachable");
    assert_eq!(json["committed"], "web/1/41");

    let registry = RegistryAddr::Agent(a_address.clone());
    let b = Agent::start(again(dir.path(), "b", registry, &b_address))
        .await
        .unwrap();
    owner
        .wait_event("b is up where it was", |e| {
            matches!(e, ShipEvent::HolderUp { holder, position, .. }
                if *holder == b_address && position.as_ref() == Some(&first))
        })
        .await;
    let store = b.store().clone();
    eventually("b has caught up", || {
        store.newest_complete(&vm("web")).is_some_and(|e| e.name == last)
    })
    .await;
    eventually("b is up to date", || {
        owner.shipper.status().holders[1].state == HolderState::UpToDate
    })
    .await;
    drop(store);
    owner.shipper.stop().await;
    b.stop().await;
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn committed_needs_the_quorum() {
    let dir = tempfile::tempdir().unwrap();
    let a = first_agent(dir.path()).await;
    let b = agent_with(dir.path(), "b", &a).await;
    let (a_address, b_address) = (a.address().to_owned(), b.address().to_owned());
    b.stop().await;
    let mut owner = Owner::start(
        dir.path(),
        "web",
        Generation(1),
        &[&a_address, &b_address],
        2,
        None,
    );
    let first = owner.take(4);
    let store = a.store().clone();
    eventually("a has it", || store.get(&first).is_some()).await;
    drop(store);
    assert_eq!(owner.shipper.status().committed, None);
    assert!(!owner.shipper.drain(Duration::from_millis(50)).await);
    let registry = RegistryAddr::Agent(a_address.clone());
    let b = Agent::start(again(dir.path(), "b", registry, &b_address))
        .await
        .unwrap();
    let done = owner
        .wait_event("commit", |e| matches!(e, ShipEvent::Committed { .. }))
        .await;
    let mut both = vec![a_address, b_address];
    both.sort();
    let ShipEvent::Committed { name, mut holders } = done else {
        unreachable!()
    };
    holders.sort();
    assert_eq!((name, holders), (first, both));
    owner.shipper.stop().await;
    b.stop().await;
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_of_a_lower_generation_is_fenced() {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    let mut old = Owner::start(dir.path(), "web", Generation(1), &[agent.address()], 1, None);
    let first = old.take(4);
    old.wait_committed(&first).await;

    // The new owner is at generation 2: the old one hears of it at once, without having anything to ship.
    let mut new = Owner::start(dir.path(), "web", Generation(2), &[agent.address()], 1, None);
    let is = |e: &ShipEvent| {
        matches!(
            e,
            ShipEvent::Fenced {
                current: Generation(2),
                ..
            }
        )
    };
    old.wait_event("the fence", is).await;
    let second = new.take(4);
    new.wait_committed(&second).await;
    // What the old one takes after that goes nowhere.
    let late = old.take(4);
    let state = old.shipper.status().holders[0].state.clone();
    assert_eq!(state, HolderState::Fenced { current: 2 });
    assert!(agent.store().get(&late).is_none());
    old.shipper.stop().await;

    // Nor does one that comes up later, after the agent was restarted: the promise is durable.
    let address = agent.address().to_owned();
    new.shipper.stop().await;
    agent.stop().await;
    let agent = Agent::start(again(dir.path(), "a", RegistryAddr::Embedded, &address))
        .await
        .unwrap();
    drop((old.spool, old.store));
    let mut late = Owner::start(dir.path(), "web", Generation(1), &[&address], 1, None);
    late.wait_event("the fence", is).await;
    late.shipper.stop().await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_owner_ships_what_an_earlier_generation_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    let mut new = Owner::start(dir.path(), "web", Generation(2), &[agent.address()], 1, None);
    // The spool of a restored VM: the chain it was restored from, then its own first delta.
    let (one, two) = (name("web", 1, 1), name("web", 1, 2));
    put(&new.store, &one, None, 8);
    put(&new.store, &two, Some(&one), 8);
    let own = name("web", 2, 1);
    put(&new.store, &own, Some(&two), 8);
    new.shipper.notify();
    new.wait_committed(&own).await;
    let chain = agent.store().chain(&own).unwrap();
    assert!(chain.iter().any(|e| e.name == one), "{chain:?}");
    assert_eq!(agent.store().promised(&vm("web")), Generation(2));
    new.shipper.stop().await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_holder_refuses_keeps_what_it_has_and_takes_more_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let budget = Some(300 << 10);
    let config = migrate::agent::AgentConfig {
        budget,
        ..config(dir.path(), "a", RegistryAddr::Embedded)
    };
    let agent = Agent::start(config).await.unwrap();
    let mut owner = Owner::tuned(
        dir.path(),
        "web",
        Generation(1),
        &[agent.address()],
        1,
        None,
        |c| {
            c.sender.refused_first = Duration::from_millis(20);
            c.sender.refused_max = Duration::from_millis(50);
        },
    );
    // A stranger's segment takes most of the room.
    let other = name("other", 1, 1);
    put(agent.store(), &other, None, 40);
    let first = owner.take(16);
    owner.wait_committed(&first).await;
    let second = owner.take(32);
    eventually("it is refused", || {
        matches!(
            owner.shipper.status().holders[0].state,
            HolderState::Refused { .. }
        )
    })
    .await;
    let HolderState::Refused { why } = owner.shipper.status().holders[0].state.clone() else {
        panic!("no longer refused")
    };
    assert!(why.contains("full") && why.contains("web/1/2"), "{why}");
    assert_eq!(agent.store().newest_complete(&vm("web")).unwrap().name, first);
    agent.store().remove(&other).unwrap();
    owner.wait_committed(&second).await;
    owner.shipper.stop().await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_lost_its_store_asks_for_a_full_one() {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    let address = agent.address().to_owned();
    let mut owner = Owner::start(dir.path(), "web", Generation(1), &[&address], 1, None);
    owner.take(4);
    let second = owner.take(4);
    owner.wait_committed(&second).await;
    // What every holder has is dropped by the owner.
    owner.spool.make_room().unwrap();
    agent.stop().await;
    std::fs::remove_dir_all(dir.path().join("a")).unwrap();
    let agent = Agent::start(again(dir.path(), "a", RegistryAddr::Embedded, &address))
        .await
        .unwrap();
    owner
        .wait_event("a full one is asked for", |e| {
            matches!(e, ShipEvent::NeedFull { .. })
        })
        .await;
    assert!(owner.full);
    let third = owner.take(4);
    let store = agent.store().clone();
    eventually("the full one is there", || {
        store.newest_complete(&vm("web")).is_some_and(|e| e.name == third)
    })
    .await;
    drop(store);
    owner.shipper.stop().await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_away_holds_nothing_up() {
    let dir = tempfile::tempdir().unwrap();
    let keeper = first_agent(dir.path()).await;
    let keeper_address = keeper.address().to_owned();
    let holder = agent_with(dir.path(), "b", &keeper).await;
    let generation = create(keeper.registry(), "web", &[holder.address()], 1).await;
    let registry = Registry::remote(&keeper_address, &tester());
    keeper.stop().await;
    // Someone who hangs up at once, so that it is seen that it was tried in vain.
    let listener = TcpListener::bind(&keeper_address).await.unwrap();
    let mut owner = Owner::start(
        dir.path(),
        "web",
        generation,
        &[holder.address()],
        1,
        Some(registry.clone()),
    );
    for _ in 0..10 {
        owner.take(2);
    }
    let last = owner.name(10);
    owner.wait_committed(&last).await;
    drop(
        tokio::time::timeout(PATIENCE, listener.accept())
            .await
            .unwrap()
            .unwrap(),
    );
    drop(listener);
    let keeper = Agent::start(again(dir.path(), "a", RegistryAddr::Embedded, &keeper_address))
        .await
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while registry
        .list_segments(&vm("web"), None, 100)
        .await
        .map_or(0, |(s, _)| s.len())
        < 10
    {
        assert!(Instant::now() < deadline, "the registry never heard of them");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    owner.shipper.stop().await;
    holder.stop().await;
    keeper.stop().await;
}

/// Passes bytes on to a registry, but hangs up on the first `times` that name a segment; counts those it hung up on.
async fn refusing_proxy(target: String, times: usize) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let refused: Arc<AtomicUsize> = Arc::default();
    let count = refused.clone();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let mut far = TcpStream::connect(&target).await.unwrap();
            let refused = refused.clone();
            tokio::spawn(async move {
                let (mut near_read, mut near_write) = near.split();
                let (mut far_read, mut far_write) = far.split();
                let there = async {
                    let mut buffer = vec![0; 64 << 10];
                    while let Ok(n @ 1..) = near_read.read(&mut buffer).await {
                        let names = buffer[..n].windows(6).any(|bytes| bytes == b"web/1/");
                        if names && refused.load(Ordering::SeqCst) < times {
                            refused.fetch_add(1, Ordering::SeqCst);
                            return;
                        }
                        if far_write.write_all(&buffer[..n]).await.is_err() {
                            return;
                        }
                    }
                };
                tokio::select! {
                    () = there => {}
                    _ = tokio::io::copy(&mut far_read, &mut near_write) => {}
                }
            });
        }
    });
    (address, count)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_registry_did_not_take_is_told_again() {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    let generation = create(agent.registry(), "web", &[agent.address()], 1).await;
    // A connection that was there already is tried once more by itself: more than that.
    let (address, refused) = refusing_proxy(agent.address().to_owned(), 3).await;
    let registry = Registry::remote(&address, &tester());
    let mut owner = Owner::start(
        dir.path(),
        "web",
        generation,
        &[agent.address()],
        1,
        Some(registry),
    );
    for _ in 0..10 {
        owner.take(2);
    }
    let last = owner.name(10);
    owner.wait_committed(&last).await;
    let deadline = Instant::now() + PATIENCE;
    while agent
        .registry()
        .list_segments(&vm("web"), None, 100)
        .await
        .unwrap()
        .0
        .len()
        < 10
    {
        assert!(Instant::now() < deadline, "the registry never heard of them");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(refused.load(Ordering::SeqCst), 3);
    owner.shipper.stop().await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_restarted_has_everything_it_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = first_agent(dir.path()).await;
    let address = agent.address().to_owned();
    let generation = create(agent.registry(), "web", &[&address], 1).await;
    let mut owner = Owner::start(dir.path(), "web", generation, &[&address], 1, None);
    for round in 0..5 {
        for _ in 0..5 {
            owner.take(4);
        }
        let last = owner.name(owner.epoch - 2);
        owner.wait_committed(&last).await;
        let acked = owner.shipper.status().committed.unwrap();
        agent.stop().await;
        agent = Agent::start(again(dir.path(), "a", RegistryAddr::Embedded, &address))
            .await
            .unwrap();
        let newest = agent.store().newest_complete(&vm("web")).unwrap().name;
        assert!(
            newest >= acked,
            "round {round}: {newest} is there and {acked} was acknowledged"
        );
        assert_eq!(
            agent.registry().get_vm(&vm("web")).await.unwrap().generation,
            generation
        );
    }
    owner.shipper.stop().await;
    agent.stop().await;
}
