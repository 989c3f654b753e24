//! What a node may do is what its certificate's roles allow, and what a silent or greedy one costs the others.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

mod net_common;

use std::time::Duration;

use migrate::agent::{MAX_OF_NODE, MAX_STRANGERS};
use migrate::registry::{NewVm, NodeRecord, Registry, RegistryAddr, RegistryError, Role, VmState};
use migrate::shipper::{HolderState, Shipper, ShipperConfig};
use migrate::transport::{CertRole, Client, Link};
use migrate::wire::{
    Call, FrameHeader, FrameType, HoldingCall, MAX_CHUNK_BYTES, Message, NameCall, Nothing, PromoteCall,
    Reject, SealCall,
};
use net_common::authority::*;
use net_common::*;
use segment::Generation;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test]
async fn segments_go_from_an_owner_to_agents_over_tls() {
    let lab = Authority::new("lab");
    let dir = tempfile::tempdir().unwrap();
    let a = agent(&lab, dir.path(), "a", None, None).await;
    let b = agent(&lab, dir.path(), "b", Some(&a), None).await;
    let oak = lab.issue("oak", &[CertRole::Owner]);
    let mut owner = owner(dir.path(), &a, &[a.address(), b.address()], 2, &oak).await;
    // Larger than what is sent without being asked for, so that both directions are busy.
    for pages in [4000, 3, 5] {
        let name = owner.take(pages);
        owner.wait_committed(&name).await;
    }
    owner.shipper.stop().await;
    assert_eq!(a.store().entries(&vm("web")).len(), 3);
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn nobody_ships_or_changes_what_is_another_owners() {
    let lab = Authority::new("lab");
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let a = agent(&lab, dir.path(), "a", None, None).await;
    let (oak, elm) = (
        lab.issue("oak", &[CertRole::Owner]),
        lab.issue("elm", &[CertRole::Owner]),
    );
    let mut mine = owner(dir.path(), &a, &[a.address()], 1, &oak).await;
    let name = mine.take(3);
    mine.wait_committed(&name).await;

    // With a certificate of the cluster, and the right generation.
    let generation = mine.generation;
    let tune = |config: &mut ShipperConfig| config.identity = elm.clone();
    let mut thief = Owner::tuned(other.path(), "web", generation, &[a.address()], 1, None, tune);
    thief.take(3);
    let why = |shipper: &Shipper| match &shipper.status().holders[0].state {
        HolderState::Unreachable { why } => why.clone(),
        other => format!("{other:?}"),
    };
    eventually("the thief is refused", || {
        why(&thief.shipper).contains("elm may not ship a VM of oak")
    })
    .await;
    // It neither stopped the owner nor took its place.
    let name = mine.take(3);
    mine.wait_committed(&name).await;
    assert_eq!(a.store().promised(&vm("web")), generation);

    // Nor may it change the record, take the VM over, promote or forget it, or read its memory.
    let registry = Registry::remote(a.address(), &elm);
    let told = |e: RegistryError| e.to_string();
    let stopped = registry
        .set_vm_state(&vm("web"), generation, VmState::Stopped)
        .await;
    has(&told(stopped.unwrap_err()), &["elm", "oak"]);
    let raised = registry.raise_generation(&vm("web"), generation, "elm").await;
    has(&told(raised.unwrap_err()), &["elm", "execute"]);
    let raised = registry.raise_generation(&vm("web"), generation, "oak").await;
    has(&told(raised.unwrap_err()), &["elm", "oak"]);
    has(
        &told(registry.forget_vm(&vm("web"), true).await.unwrap_err()),
        &["elm", "operator"],
    );
    let mut client = Client::connect(a.address(), &elm).await.unwrap();
    let vm = vm("web");
    let seal = Call::Seal(SealCall {
        vm: vm.clone(),
        generation: Generation(u64::MAX),
    });
    let promote = Call::Promote(PromoteCall {
        vm: vm.clone(),
        dry_run: true,
        accept_loss: false,
        force: false,
    });
    for (call, role) in [
        (Call::Fetch(NameCall { name: name.clone() }), "execute or store"),
        (seal, "execute"),
        (promote, "operator"),
    ] {
        let refused = client.call(call, PATIENCE).await.unwrap_err();
        has(
            &refused.to_string(),
            &["elm may not", role, "its certificate has owner"],
        );
    }
    // One that may seal, seals no generation that was not given out.
    let birch = lab.issue("birch", NODE);
    let mut client = Client::connect(a.address(), &birch).await.unwrap();
    let seal = |generation| {
        Call::Seal(SealCall {
            vm: vm.clone(),
            generation,
        })
    };
    let far = client
        .call(seal(Generation(u64::MAX)), PATIENCE)
        .await
        .unwrap_err();
    has(&far.to_string(), &["never given out"]);
    let same = client.call(seal(generation), PATIENCE).await.unwrap_err();
    has(&same.to_string(), &["birch may not seal a VM of oak"]);
    assert_eq!(a.store().promised(&vm), generation);
    mine.shipper.stop().await;
    thief.shipper.stop().await;
    a.stop().await;
}

/// A node that only stores: it runs, takes and owns nothing, and says no more of itself than its certificate.
#[tokio::test]
async fn a_storage_only_node_runs_nothing() {
    let lab = Authority::new("lab");
    let dir = tempfile::tempdir().unwrap();
    let a = agent(&lab, dir.path(), "a", None, None).await;
    let (oak, elm) = (
        lab.issue("oak", &[CertRole::Owner]),
        lab.issue("elm", &[CertRole::Store]),
    );
    let mut mine = owner(dir.path(), &a, &[a.address()], 1, &oak).await;
    let name = mine.take(3);
    mine.wait_committed(&name).await;
    let (web, generation) = (vm("web"), mine.generation);

    let registry = Registry::remote(a.address(), &elm);
    let told = |e: RegistryError| e.to_string();
    let joins = |roles: &[Role]| NodeRecord {
        name: "elm".into(),
        address: "127.0.0.1:1".into(),
        id: [7; 16],
        roles: roles.iter().map(Role::to_string).collect(),
        labels: Default::default(),
        joined_unix_ms: 0,
        total_bytes: None,
        free_bytes: None,
        draining: None,
        alive: None,
    };
    let joined = registry
        .join_node(joins(&[Role::Execute, Role::Store]), false)
        .await;
    has(
        &told(joined.unwrap_err()),
        &["elm may not join with the role execute"],
    );
    registry.join_node(joins(&[Role::Store]), false).await.unwrap();
    let new = NewVm {
        vm: vm("own"),
        owner: "elm".into(),
        holders: vec![a.address().to_owned()],
        ack_quorum: 1,
        every_ms: 200,
        policy: None,
    };
    has(
        &told(registry.create_vm(new).await.unwrap_err()),
        &["elm may not register VM own", "owner or execute"],
    );
    let raised = registry.raise_generation(&web, generation, "elm").await;
    has(
        &told(raised.unwrap_err()),
        &["elm may not take VM web over", "execute"],
    );
    has(
        &told(registry.set_draining("a", true).await.unwrap_err()),
        &["elm may not drain node a", "operator"],
    );
    has(
        &told(registry.forget_vm(&web, true).await.unwrap_err()),
        &["elm may not forget VM web"],
    );
    let mut client = Client::connect(a.address(), &elm).await.unwrap();
    let promote = PromoteCall {
        vm: web.clone(),
        dry_run: false,
        accept_loss: false,
        force: false,
    };
    let seal = SealCall {
        vm: web.clone(),
        generation: Generation(generation.0 + 1),
    };
    for (call, role) in [
        (Call::Promote(promote), "operator"),
        (Call::Seal(seal), "execute"),
    ] {
        let refused = client.call(call, PATIENCE).await.unwrap_err();
        has(
            &refused.to_string(),
            &["elm may not", role, "its certificate has store"],
        );
    }
    // What it is for.
    let holding = HoldingCall {
        vm: web.clone(),
        thorough: false,
    };
    client.call(Call::Holding(holding), PATIENCE).await.unwrap();
    assert_eq!(registry.get_vm(&web).await.unwrap().owner, "oak");
    assert_eq!(a.store().promised(&web), generation);
    mine.shipper.stop().await;
    a.stop().await;
}

/// An archive brings segments of whatever VM: that is an operator's, not an owner's. Who may not, hears so after it has
/// sent more than lies in any buffer on the way, and the connection goes on.
#[tokio::test]
async fn an_archive_is_imported_for_an_operator_only() {
    let lab = Authority::new("lab");
    let dir = tempfile::tempdir().unwrap();
    let a = agent(&lab, dir.path(), "a", None, None).await;
    for (node, role, expected) in [
        ("oak", CertRole::Owner, "oak may not import an archive"),
        ("elm", CertRole::Execute, "elm may not import an archive"),
        ("yew", CertRole::Store, "yew may not import an archive"),
        ("ann", CertRole::Operator, "not a tar"),
    ] {
        let identity = lab.issue(node, &[role]);
        let mut client = Client::connect(a.address(), &identity).await.unwrap();
        let mut pieces = 0;
        let piece = || {
            pieces += 1;
            Ok((pieces <= 32).then(|| vec![pieces; 256 << 10]))
        };
        let import = Call::Import(Nothing {});
        let refused = client.call_with_file(import, piece, PATIENCE).await.unwrap_err();
        has(&refused.to_string(), &[expected]);
        assert_eq!(
            refused.to_string().contains("may not"),
            role != CertRole::Operator
        );
        client.call(Call::Status(Nothing {}), PATIENCE).await.unwrap();
    }
    a.stop().await;
}

#[tokio::test]
async fn an_owner_goes_on_while_the_registry_is_away() {
    let lab = Authority::new("lab");
    let dir = tempfile::tempdir().unwrap();
    let a = agent(&lab, dir.path(), "a", None, None).await;
    let b = agent(&lab, dir.path(), "b", Some(&a), None).await;
    let oak = lab.issue("oak", &[CertRole::Owner]);
    let mut mine = owner(dir.path(), &a, &[b.address()], 1, &oak).await;
    let name = mine.take(3);
    mine.wait_committed(&name).await;

    let registry = RegistryAddr::Agent(a.address().to_owned());
    let address = b.address().to_owned();
    a.stop().await;
    // The holder forgets what it had in memory, too.
    b.stop().await;
    let b = served(&lab, dir.path(), "b", registry, Some(&address)).await;
    let name = mine.take(3);
    mine.wait_committed(&name).await;
    mine.shipper.stop().await;
    b.stop().await;
}

/// A promise is for ever: one of the last number there is would keep the VM from ever being taken over again. One a little
/// above what is known may be right, and is given.
#[tokio::test]
async fn no_promise_is_given_far_beyond_what_the_registry_has_given_out() {
    let lab = Authority::new("lab");
    let dir = tempfile::tempdir().unwrap();
    let a = agent(&lab, dir.path(), "a", None, None).await;
    let b = agent(&lab, dir.path(), "b", Some(&a), None).await;
    let oak = lab.issue("oak", &[CertRole::Owner]);
    let mut mine = owner(dir.path(), &a, &[b.address()], 1, &oak).await;
    let (web, generation) = (mine.name(0).vm, mine.name(0).generation);
    let name = mine.take(3);
    mine.wait_committed(&name).await;
    a.stop().await;
    let elm = lab.issue("elm", &[CertRole::Execute]);
    let mut client = Client::connect(b.address(), &elm).await.unwrap();
    let mut seal = async |generation| {
        let vm = web.clone();
        client
            .call(Call::Seal(SealCall { vm, generation }), PATIENCE)
            .await
    };
    for far in [u64::MAX, generation.0 + 1_000_000] {
        let refused = seal(Generation(far)).await.unwrap_err().to_string();
        has(&refused, &["is not promised", "the registry does not confirm"]);
        assert_eq!(b.store().promised(&web), generation);
    }
    let next = Generation(generation.0 + 1);
    seal(next).await.unwrap();
    assert_eq!(b.store().promised(&web), next);
    mine.shipper.stop().await;
    b.stop().await;
}

/// An agent's certificate is checked, its owner known: what it sends first is a greeting, and no longer than one.
#[tokio::test]
async fn a_greeting_is_short() {
    let lab = Authority::new("lab");
    let dir = tempfile::tempdir().unwrap();
    let a = agent(&lab, dir.path(), "a", None, None).await;
    let oak = lab.issue("oak", &[CertRole::Owner]);
    let (mut stream, _) = oak.dial(a.address()).await.unwrap();
    // A chunk may be a MiB; before the greeting nothing may.
    let header = FrameHeader {
        kind: FrameType::Chunk,
        stream: 0,
        len: MAX_CHUNK_BYTES,
    };
    stream.write_all(&header.to_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    // Refused by its length: what waits for the MiB says nothing, and hangs up when the time for greetings is over.
    let told = Link::new(stream, "a").reader.next().await.unwrap();
    let Message::Reject(Reject { code, why }) = told.message else {
        panic!("{told:?}");
    };
    assert_eq!(code, Reject::PROTOCOL);
    has(&why, &["1048576", "4096"]);
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_of_silent_strangers_keeps_nobody_out() {
    let lab = Authority::new("lab");
    let dir = tempfile::tempdir().unwrap();
    let a = agent(&lab, dir.path(), "a", None, None).await;
    let oak = lab.issue("oak", &[CertRole::Owner]);
    let mut crowd = Vec::new();
    for at in 0..4 * MAX_STRANGERS {
        let mut stranger = TcpStream::connect(a.address()).await.unwrap();
        // Half of them begin, one byte of what would be a long record.
        if at % 2 == 0 {
            stranger.write_all(&[0x16]).await.unwrap();
        }
        crowd.push(stranger);
        if at % 50 == 0 {
            Client::connect(a.address(), &oak).await.unwrap();
        }
    }
    for _ in 0..5 {
        Client::connect(a.address(), &oak).await.unwrap();
    }
    // The oldest were dropped, the others are given up when their time is over.
    for (at, mut stranger) in crowd.into_iter().enumerate() {
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(PATIENCE, stranger.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "stranger {at} is still there");
    }
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node_does_not_take_all_connections() {
    let lab = Authority::new("lab");
    let dir = tempfile::tempdir().unwrap();
    let a = agent(&lab, dir.path(), "a", None, None).await;
    let (oak, elm) = (
        lab.issue("oak", &[CertRole::Owner]),
        lab.issue("elm", &[CertRole::Owner]),
    );
    let mut open = Vec::new();
    let refused = loop {
        assert!(open.len() <= MAX_OF_NODE, "they are not bounded");
        match Client::connect(a.address(), &oak).await {
            Ok(client) => open.push(client),
            Err(error) => break error.to_string(),
        }
    };
    assert!(open.len() == MAX_OF_NODE, "{}", open.len());
    has(&refused, &["connections of oak are open"]);
    Client::connect(a.address(), &elm).await.unwrap();
    open.pop();
    let start = std::time::Instant::now();
    while Client::connect(a.address(), &oak).await.is_err() {
        assert!(start.elapsed() < PATIENCE, "its place is not free again");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    a.stop().await;
}
