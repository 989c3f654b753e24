//! What agents keep, fold and check: through their calls.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod net_common;

use std::time::Duration;

use migrate::agent::{Agent, Housekeeping};
use migrate::registry::RegistryAddr;
use migrate::transport::Client;
use migrate::wire::{Call, FoldCall, KeepCall, Reply, VerifyCall};
use net_common::process::{standby, stderr, stdout};
use net_common::{Owner, agent_with, config, create, first_agent, name, put, tester, vm};

const PATIENCE: Duration = Duration::from_secs(60);

async fn ask(agent: &Agent, call: Call) -> Reply {
    let mut client = Client::connect(agent.address(), &tester()).await.unwrap();
    client.call(call, PATIENCE).await.unwrap()
}

async fn keep(agent: &Agent, policy: Option<&str>) -> migrate::wire::KeepReport {
    let call = KeepCall {
        vm: vm("web"),
        policy: policy.map(str::to_owned),
        only_here: false,
    };
    match ask(agent, Call::Keep(call)).await {
        Reply::Kept(report) => report,
        other => panic!("{other:?}"),
    }
}

fn fill(agent: &Agent, links: u64) {
    for epoch in 1..=links {
        let parent = (epoch > 1).then(|| name("web", 1, epoch - 1));
        put(agent.store(), &name("web", 1, epoch), parent.as_ref(), 20);
    }
}

async fn until(what: &str, done: impl Fn() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("{what}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_reaches_every_holder_and_is_carried_out() {
    let dir = tempfile::tempdir().unwrap();
    let a = first_agent(dir.path()).await;
    let b = agent_with(dir.path(), "b", &a).await;
    create(a.registry(), "web", &[a.address(), b.address()], 2).await;
    for agent in [&a, &b] {
        fill(agent, 40);
    }
    let report = keep(&a, None).await;
    assert_eq!(
        (report.policy.as_str(), report.is_default, report.kept),
        ("all", true, 40)
    );
    let report = keep(&a, Some("last=4")).await;
    assert_eq!(
        (report.policy.as_str(), report.is_default, report.kept),
        ("last=4", false, 4)
    );
    assert_eq!(report.notes, Vec::<String>::new());
    for agent in [&a, &b] {
        until("nothing was collected", || agent.store().all().len() == 4).await;
        let newest = agent.store().newest_complete(&vm("web")).unwrap();
        assert_eq!(newest.name, name("web", 1, 40));
        for entry in agent.store().all() {
            agent.store().verify(&entry.name).unwrap();
            agent.store().chain(&entry.name).unwrap();
        }
    }
    let mut client = Client::connect(b.address(), &tester()).await.unwrap();
    let call = KeepCall {
        vm: vm("web"),
        policy: Some("last=none".into()),
        only_here: true,
    };
    let refused = client
        .call(Call::Keep(call), PATIENCE)
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.contains("last=none"), "{refused}");
    assert_eq!(keep(&b, Some("default")).await.policy, "all");
    a.stop().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_is_folded_by_hand_and_when_it_is_too_long() {
    let dir = tempfile::tempdir().unwrap();
    let housekeeping = Housekeeping {
        max_links: 10,
        ..Housekeeping::default()
    };
    let config = migrate::agent::AgentConfig {
        housekeeping,
        ..config(dir.path(), "a", RegistryAddr::Embedded)
    };
    let a = Agent::start(config).await.unwrap();
    fill(&a, 35);
    let all_short = || {
        let store = a.store();
        store
            .all()
            .iter()
            .all(|entry| store.chain(&entry.name).unwrap().len() <= 10)
    };
    until("a chain stays too long", all_short).await;
    assert_eq!(a.store().all().len(), 35, "everything is kept by default");
    let tip = name("web", 1, 33);
    let call = FoldCall {
        vm: vm("web"),
        tip: Some(tip.clone()),
    };
    let Reply::Folded(report) = ask(&a, Call::Fold(call)).await else {
        panic!()
    };
    assert_eq!((report.segment.links, report.segment.name), (1, tip));
    assert!(report.segment.parent.is_none());
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_rots_is_found_and_fetched_from_the_other_holder() {
    let dir = tempfile::tempdir().unwrap();
    let a = first_agent(dir.path()).await;
    let b = agent_with(dir.path(), "b", &a).await;
    create(a.registry(), "web", &[a.address(), b.address()], 2).await;
    for agent in [&a, &b] {
        fill(agent, 5);
    }
    let verify = || VerifyCall {
        vm: Some(vm("web")),
        sample: None,
    };
    let Reply::Verified(report) = ask(&b, Call::Verify(verify())).await else {
        panic!()
    };
    assert_eq!((report.checked, report.bad, report.incomplete), (5, 0, 0));
    let rot = |agent: &Agent| {
        let path = agent.store().segment_path(&name("web", 1, 3));
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 0x10;
        std::fs::write(&path, bytes).unwrap();
    };
    rot(&b);
    let Reply::Verified(report) = ask(&b, Call::Verify(verify())).await else {
        panic!()
    };
    assert_eq!(
        (report.bad, report.repaired, report.incomplete),
        (1, 1, 0),
        "{report:?}"
    );
    b.store().verify(&name("web", 1, 3)).unwrap();
    assert_eq!(
        b.store().newest_complete(&vm("web")).unwrap().name,
        name("web", 1, 5)
    );
    // Nobody has it: it is said, and what is left is the newest whole one.
    rot(&a);
    rot(&b);
    let Reply::Verified(report) = ask(&a, Call::Verify(verify())).await else {
        panic!()
    };
    assert_eq!(
        (report.bad, report.repaired, report.incomplete),
        (1, 0, 2),
        "{report:?}"
    );
    assert!(report.problems[0].contains("not repaired"), "{report:?}");
    assert_eq!(
        a.store().newest_complete(&vm("web")).unwrap().name,
        name("web", 1, 2)
    );
    let call = VerifyCall {
        vm: None,
        sample: Some(2),
    };
    let Reply::Verified(report) = ask(&a, Call::Verify(call)).await else {
        panic!()
    };
    assert_eq!(report.checked, 2);
    a.stop().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_holder_frees_what_the_policy_does_not_keep_before_it_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let housekeeping = Housekeeping {
        keep: "last=2".parse().unwrap(),
        ..Housekeeping::default()
    };
    let config = migrate::agent::AgentConfig {
        housekeeping,
        // Room for seven segments of 20 pages.
        budget: Some(600_000),
        ..config(dir.path(), "a", RegistryAddr::Embedded)
    };
    let a = Agent::start(config).await.unwrap();
    let generation = create(a.registry(), "web", &[a.address()], 1).await;
    let mut owner = Owner::start(dir.path(), "web", generation, &[a.address()], 1, None);
    for _ in 0..30 {
        let taken = owner.take(20);
        owner.wait_committed(&taken).await;
    }
    assert!(a.store().used_bytes() <= 600_000);
    let newest = a.store().newest_complete(&vm("web")).unwrap().name;
    assert_eq!(newest, owner.name(30));
    owner.shipper.stop().await;
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_point_moves_between_agents_as_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let a = first_agent(dir.path()).await;
    fill(&a, 5);
    let cli = |agent: &Agent, args: &[&str]| {
        let mut all = args.to_vec();
        all.extend(["--agent", agent.address()]);
        standby(&all)
    };
    let listed = cli(&a, &["ls", "web"]);
    assert!(
        stdout(&listed).contains("5 restore points; the agent's policy all keeps 5"),
        "{listed:?}"
    );
    let file = dir.path().join("web.tar");
    let file = file.to_str().unwrap();
    let made = cli(&a, &["export", "web@4", file]);
    assert!(
        made.status.success() && stdout(&made).contains("web/1/4, 4 links"),
        "{made:?}"
    );
    let again = cli(&a, &["export", "web", file]);
    assert!(
        !again.status.success() && stderr(&again).contains("is there already"),
        "{again:?}"
    );
    let none = cli(&a, &["export", "web@9", "x.tar"]);
    assert!(stderr(&none).contains("no complete checkpoint 9"), "{none:?}");

    let b = agent_with(dir.path(), "b", &a).await;
    let taken = cli(&b, &["import", file]);
    assert!(
        stdout(&taken).contains("web/1/4 is here: 4 links are new"),
        "{taken:?}"
    );
    assert_eq!(
        b.store().newest_complete(&vm("web")).unwrap().name,
        name("web", 1, 4)
    );
    let taken = cli(&b, &["import", file]);
    assert!(
        stdout(&taken).contains("0 links are new, 4 were here"),
        "{taken:?}"
    );
    // Cut off, and larger than what waits in between: nothing of it is there, and it is said why.
    let mut bytes = std::fs::read(file).unwrap();
    bytes.truncate(bytes.len() - 2048);
    std::fs::write(file, bytes).unwrap();
    let c = agent_with(dir.path(), "c", &a).await;
    let refused = cli(&c, &["import", file]);
    assert!(
        !refused.status.success() && stderr(&refused).contains("archive"),
        "{refused:?}"
    );
    assert_eq!(c.store().all().len(), 0);
    for agent in [a, b, c] {
        agent.stop().await;
    }
}
