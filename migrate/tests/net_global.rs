//! The global store of agents, against a real S3-compatible server.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod net_common;

use std::path::Path;
use std::time::Duration;

use migrate::agent::{Agent, AgentConfig, GlobalOptions};
use migrate::global::{Bucket, Checked, GlobalArgs, Place, Trouble, verify};
use migrate::registry::RegistryAddr;
use migrate::store::KeepPolicy;
use migrate::transport::Client;
use migrate::wire::{Call, GlobalStatus, ListCall, Nothing, Reply, SegmentBrief, VerifyCall};
use net_common::s3::{Keys, S3};
use net_common::{Owner, PATIENCE, config, create, first_agent, name, tester, vm};

const EVERY: Duration = Duration::from_millis(200);
const HOUR: Duration = Duration::from_secs(3600);

fn place(server: &S3, bucket: &str, credentials: &Path) -> Place {
    Place {
        addr: format!("s3://{bucket}/a").parse().unwrap(),
        args: GlobalArgs {
            global_endpoint: Some(server.endpoint()),
            global_region: None,
            global_credentials: Some(credentials.to_owned()),
        },
    }
}

fn options(place: &Place) -> GlobalOptions {
    GlobalOptions {
        place: place.clone(),
        every: EVERY,
        keep: KeepPolicy::ALL,
        grace: HOUR,
    }
}

/// An agent with a global store.
async fn agent(dir: &Path, node: &str, registry: &Agent, global: GlobalOptions) -> Agent {
    let registry = RegistryAddr::Agent(registry.address().to_owned());
    let config = AgentConfig {
        global: Some(global),
        ..config(dir, node, registry)
    };
    Agent::start(config).await.unwrap()
}

async fn ask(agent: &Agent, call: Call) -> Reply {
    let mut client = Client::connect(agent.address(), &tester()).await.unwrap();
    client.call(call, PATIENCE).await.unwrap()
}

async fn status(agent: &Agent) -> GlobalStatus {
    let Reply::Status(status) = ask(agent, Call::Status(Nothing {})).await else {
        panic!("no status");
    };
    status.global.unwrap()
}

/// Waits until the agent says so of its global store.
async fn until(what: &str, agent: &Agent, done: impl Fn(&GlobalStatus) -> bool) -> GlobalStatus {
    let start = tokio::time::Instant::now();
    loop {
        let now = status(agent).await;
        if done(&now) {
            return now;
        }
        assert!(start.elapsed() < PATIENCE, "{what}: {now:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until `web`'s checkpoint of this epoch is the newest there.
async fn is_up(agent: &Agent, epoch: u64) {
    let up = |status: &GlobalStatus| {
        let web = status.vms.iter().find(|of| of.vm == vm("web"));
        web.is_some_and(|web| web.newest.as_ref().is_some_and(|newest| newest.epoch.0 >= epoch))
    };
    until("an upload", agent, up).await;
}

async fn points(agent: &Agent) -> Vec<SegmentBrief> {
    let call = ListCall {
        vm: Some(vm("web")),
        after: None,
        limit: 1000,
    };
    match ask(agent, Call::GlobalList(call)).await {
        Reply::List(page) => page.segments,
        other => panic!("{other:?}"),
    }
}

/// Every point there, read whole.
async fn all_whole(place: &Place) -> usize {
    let bucket = Bucket::open(place).unwrap();
    let names = bucket.points(&vm("web")).await.unwrap();
    let mut checked = Checked::default();
    for name in &names {
        let record = bucket.point(name).await.unwrap();
        verify(&bucket, &record, &mut checked).await.unwrap();
    }
    names.len()
}

/// A server with a bucket, a registry's agent, and where the credentials are.
struct Lab {
    dir: tempfile::TempDir,
    server: S3,
    place: Place,
    registry: Agent,
}

impl Lab {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = S3::start();
        server.make_bucket("pool");
        let credentials = dir.path().join("credentials");
        Keys::any().write(&credentials);
        Self {
            place: place(&server, "pool", &credentials),
            registry: first_agent(dir.path()).await,
            dir,
            server,
        }
    }

    async fn owner(&self, holders: &[&str], quorum: usize) -> Owner {
        let registry = self.registry.registry().clone();
        let generation = create(&registry, "web", holders, quorum as u32).await;
        Owner::start(
            self.dir.path(),
            "web",
            generation,
            holders,
            quorum,
            Some(registry),
        )
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_committed_checkpoint_is_there_once_and_repairs_a_holder_that_has_no_other() {
    let lab = Lab::new().await;
    let b = agent(lab.dir.path(), "b", &lab.registry, options(&lab.place)).await;
    let mut owner = lab.owner(&[b.address()], 1).await;
    for round in 1..=3 {
        owner.take(40);
        let newest = owner.take(40);
        owner.wait_committed(&newest).await;
        is_up(&b, round * 2).await;
    }
    let there = points(&b).await;
    assert_eq!(there.last().unwrap().name, name("web", 1, 6));
    assert!(there.iter().all(|point| point.complete));
    let done = status(&b).await;
    assert_eq!((done.uploaded_points, done.problem), (there.len() as u64, None));
    // No link went there twice.
    let held: u64 = b
        .store()
        .entries(&vm("web"))
        .iter()
        .map(|entry| entry.bytes)
        .sum();
    assert_eq!(done.uploaded_bytes, held);
    assert_eq!(all_whole(&lab.place).await, there.len());
    let call = VerifyCall {
        vm: None,
        sample: None,
    };
    let Reply::Verified(report) = ask(&b, Call::GlobalVerify(call.clone())).await else {
        panic!("not verified");
    };
    assert_eq!((report.checked, report.bad, report.bytes), (6, 0, held));

    // A link in the middle is damaged, and no other holder has it.
    let path = b.store().segment_path(&name("web", 1, 4));
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let Reply::Verified(report) = ask(&b, Call::Verify(call)).await else {
        panic!("not verified");
    };
    assert_eq!((report.bad, report.repaired), (1, 1), "{report:?}");
    b.store().verify(&name("web", 1, 4)).unwrap();
    b.store().chain(&name("web", 1, 6)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_holder_uploads_and_another_does_when_that_one_is_gone() {
    let lab = Lab::new().await;
    let b = agent(lab.dir.path(), "b", &lab.registry, options(&lab.place)).await;
    let c = agent(lab.dir.path(), "c", &lab.registry, options(&lab.place)).await;
    let mut owner = lab.owner(&[b.address(), c.address()], 1).await;
    for round in 1..=3 {
        let newest = owner.take(30);
        owner.wait_committed(&newest).await;
        is_up(&b, round).await;
        is_up(&c, round).await;
    }
    let (at_b, at_c) = (status(&b).await, status(&c).await);
    let made = (at_b.uploaded_points, at_c.uploaded_points);
    assert!(made.0 == 0 || made.1 == 0, "both uploaded: {made:?}");
    assert_eq!(made.0 + made.1, points(&b).await.len() as u64);
    let (first, other) = if made.0 > 0 { (b, c) } else { (c, b) };
    first.stop().await;
    let newest = owner.take(30);
    owner.wait_committed(&newest).await;
    is_up(&other, 4).await;
    assert_eq!(status(&other).await.uploaded_points, 1);
    all_whole(&lab.place).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_newest_point_that_is_damaged_the_next_one_stands_alone() {
    let mut lab = Lab::new().await;
    let share = lab.dir.path().join("share");
    std::fs::create_dir(&share).unwrap();
    lab.place.addr = format!("file://{}", share.display()).parse().unwrap();
    let b = agent(lab.dir.path(), "b", &lab.registry, options(&lab.place)).await;
    let c = agent(lab.dir.path(), "c", &lab.registry, options(&lab.place)).await;
    let mut owner = lab.owner(&[b.address(), c.address()], 1).await;
    let newest = owner.take(30);
    owner.wait_committed(&newest).await;
    is_up(&b, 1).await;
    // The one that made it remembers it; the other reads it when it takes over.
    let (first, other) = if status(&b).await.uploaded_points > 0 {
        (b, c)
    } else {
        (c, b)
    };
    first.stop().await;
    let point = only_file(&share.join("web/points"));
    std::fs::write(&point, "no point").unwrap();
    let newest = owner.take(30);
    owner.wait_committed(&newest).await;
    is_up(&other, 2).await;
    let bucket = Bucket::open(&lab.place).unwrap();
    assert!(bucket.point(&name("web", 1, 1)).await.is_err());
    let alone = bucket.point(&newest).await.unwrap();
    verify(&bucket, &alone, &mut Checked::default()).await.unwrap();
    // It took up nothing of what it could not read.
    assert_eq!(
        status(&other).await.uploaded_bytes,
        alone.links().iter().map(|link| link.bytes).sum::<u64>()
    );
}

fn only_file(folder: &Path) -> std::path::PathBuf {
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.remove(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_policy_keeps_goes_and_the_rest_is_whole() {
    let lab = Lab::new().await;
    let keep = GlobalOptions {
        keep: "last=2".parse().unwrap(),
        grace: Duration::from_secs(2),
        ..options(&lab.place)
    };
    let b = agent(lab.dir.path(), "b", &lab.registry, keep).await;
    let mut owner = lab.owner(&[b.address()], 1).await;
    for round in 1..=5 {
        // Each a chain of its own.
        owner.full = true;
        let newest = owner.take(30);
        owner.wait_committed(&newest).await;
        is_up(&b, round).await;
        all_whole(&lab.place).await;
    }
    let two = |status: &GlobalStatus| status.vms.first().is_some_and(|web| web.points == 2);
    until("the old points to go", &b, two).await;
    let call = || VerifyCall {
        vm: Some(vm("web")),
        sample: None,
    };
    let Reply::Verified(report) = ask(&b, Call::GlobalVerify(call())).await else {
        panic!("not verified");
    };
    assert_eq!((report.checked, report.bad), (2, 0));
    assert_eq!(all_whole(&lab.place).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_wrong_with_a_bucket_is_told_and_protection_goes_on() {
    let mut lab = Lab::new().await;
    let poor = lab.server.user("poor");
    let rich = lab.server.user("rich");
    lab.server.allow("rich");
    lab.server.check();
    let path = |of: &str| lab.dir.path().join(of);
    poor.write(&path("poor"));
    rich.write(&path("rich"));
    let wrong = Keys {
        secret: "wrong".into(),
        ..rich.clone()
    };
    wrong.write(&path("wrong"));
    let unknown = Keys::any();
    unknown.write(&path("unknown"));
    let trouble = |place: Place| async move {
        let bucket = Bucket::open(&place).unwrap();
        match bucket.points(&vm("web")).await {
            Ok(_) => None,
            Err(migrate::global::GlobalError::Refused { trouble, .. }) => Some(trouble),
            Err(error) => panic!("{error}"),
        }
    };
    let of_pool = place(&lab.server, "pool", &path("poor"));
    let with = |bucket: &str, of: &str| place(&lab.server, bucket, &path(of));
    assert_eq!(trouble(with("pool", "rich")).await, None);
    assert_eq!(trouble(with("none-there", "rich")).await, Some(Trouble::Missing));
    assert_eq!(trouble(with("pool", "poor")).await, Some(Trouble::Permission));
    for of in ["wrong", "unknown"] {
        let told = trouble(with("pool", of)).await;
        assert!(matches!(told, Some(Trouble::Credentials(_))), "{of}: {told:?}");
    }
    let error = Bucket::open(&with("pool", "nowhere")).unwrap_err();
    assert!(error.to_string().contains("nowhere"), "{error}");

    // The agent says it, goes on, and mends by itself.
    let b = agent(lab.dir.path(), "b", &lab.registry, options(&of_pool)).await;
    let mut owner = lab.owner(&[b.address()], 1).await;
    let newest = owner.take(30);
    owner.wait_committed(&newest).await;
    let told =
        |word: &'static str| move |s: &GlobalStatus| s.problem.as_ref().is_some_and(|p| p.contains(word));
    until("the refusal to be told", &b, told("s3:PutObject")).await;
    let newest = owner.take(30);
    owner.wait_committed(&newest).await;
    lab.server.allow("poor");
    lab.server.check();
    is_up(&b, 2).await;
    until("it to be well", &b, |s| s.problem.is_none()).await;

    // The server goes away, and comes back empty: a bucket that is not there, which is made again.
    lab.server.stop();
    let newest = owner.take(30);
    owner.wait_committed(&newest).await;
    until("the silence to be told", &b, told("does not answer")).await;
    lab.server.again();
    until("the lack of a bucket to be told", &b, told("does not exist")).await;
    let newest = owner.take(30);
    owner.wait_committed(&newest).await;
    lab.server.make_bucket("pool");
    is_up(&b, 4).await;
    assert!(status(&b).await.failed >= 3);
    all_whole(&of_pool).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_vm_of_the_same_name_replaces_nothing() {
    let lab = Lab::new().await;
    let b = agent(lab.dir.path(), "b", &lab.registry, options(&lab.place)).await;
    let mut owner = lab.owner(&[b.address()], 1).await;
    for _ in 0..3 {
        owner.take(30);
    }
    owner.wait_committed(&name("web", 1, 3)).await;
    is_up(&b, 3).await;
    let before = points(&b).await;
    // One of that name in another cluster, with the same prefix.
    drop(owner);
    let dir = tempfile::tempdir().unwrap();
    let other = first_agent(dir.path()).await;
    let c = agent(dir.path(), "c", &other, options(&lab.place)).await;
    let registry = other.registry().clone();
    let generation = create(&registry, "web", &[c.address()], 1).await;
    let mut owner = Owner::start(dir.path(), "web", generation, &[c.address()], 1, Some(registry));
    let first = owner.take(30);
    owner.wait_committed(&first).await;
    let told = |s: &GlobalStatus| {
        let web = s.vms.first().and_then(|web| web.problem.as_ref());
        web.is_some_and(|problem| problem.contains("another VM that had this name"))
    };
    until("the other VM to be told of", &c, told).await;
    assert_eq!(points(&c).await, before);
    all_whole(&lab.place).await;
}
