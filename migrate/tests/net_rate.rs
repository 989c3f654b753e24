//! How fast segments are shipped durably over loopback, and how many requests a registry answers. Not a check:
//! `cargo test --release -p migrate --test net_rate -- --ignored --nocapture` prints the figures.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod net_common;

use std::time::{Duration, Instant};

use migrate::registry::{Embedded, Registry};
use net_common::*;
use segment::Generation;

async fn rate(what: &str, count: u64, pages: u64) {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    // All of it is in the spool before the shipper begins: only the shipping is measured.
    let store = migrate::store::FsStore::open(
        &dir.path().join("spool-1"),
        None,
        migrate::store::Durability::Spool,
    );
    let store = store.unwrap();
    let mut parent = None;
    let mut bytes = 0;
    for epoch in 1..=count {
        let name = name("web", 1, epoch);
        bytes += put(&store, &name, parent.as_ref(), pages).bytes;
        parent = Some(name);
    }
    drop(store);
    let start = Instant::now();
    let mut owner = Owner::start(dir.path(), "web", Generation(1), &[agent.address()], 1, None);
    owner.wait_committed(&parent.unwrap()).await;
    let took = start.elapsed().as_secs_f64();
    println!(
        "ship {what}: {count} segments, {:.1} MB in {took:.3} s: {:.0} MB/s, {:.0} segments/s, durable",
        bytes as f64 / 1e6,
        bytes as f64 / 1e6 / took,
        count as f64 / took
    );
    owner.shipper.stop().await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "prints figures"]
async fn shipping() {
    rate("large (64 MiB)", 8, 16_384).await;
    rate("middle (4 MiB)", 60, 1024).await;
    rate("small (256 KiB)", 400, 64).await;
    rate("tiny (4 KiB)", 600, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "prints figures"]
async fn one_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let agent = first_agent(dir.path()).await;
    let mut owner = Owner::start(dir.path(), "web", Generation(1), &[agent.address()], 1, None);
    let first = owner.take(1);
    owner.wait_committed(&first).await;
    for pages in [1, 64, 256, 1024] {
        let mut times = Vec::new();
        for _ in 0..40 {
            let bytes_ready = owner.take(pages);
            let start = Instant::now();
            owner.wait_committed(&bytes_ready).await;
            times.push(start.elapsed());
        }
        times.sort();
        println!(
            "from the notice to committed, {} KiB: median {:?}, worst {:?}",
            pages * 4,
            times[20],
            times[39]
        );
    }
    owner.shipper.stop().await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "prints figures"]
async fn registry() {
    let dir = tempfile::tempdir().unwrap();
    let embedded = Registry::new(Embedded::open(&dir.path().join("r.redb")).unwrap());
    let agent = first_agent(dir.path()).await;
    for (what, r) in [
        ("embedded", embedded),
        ("remote", Registry::remote(agent.address(), &tester())),
    ] {
        create(&r, "web", &["127.0.0.1:1"], 1).await;
        let mut generation = Generation(1);
        let (start, mut n) = (Instant::now(), 0);
        while start.elapsed() < Duration::from_secs(2) {
            generation = r
                .raise_generation(&vm("web"), generation, "o")
                .await
                .unwrap()
                .generation;
            n += 1;
        }
        let writes = f64::from(n) / start.elapsed().as_secs_f64();
        let (start, mut n) = (Instant::now(), 0);
        while start.elapsed() < Duration::from_secs(1) {
            r.get_vm(&vm("web")).await.unwrap();
            n += 1;
        }
        let reads = f64::from(n) / start.elapsed().as_secs_f64();
        println!("registry {what}: {writes:.0} durable changes/s, {reads:.0} reads/s, one caller");
    }
    agent.stop().await;
}
