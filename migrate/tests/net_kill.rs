//! SIGKILL of the real agent at random instants while segments stream in: what it acknowledged is there, whole.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod net_common;

use std::time::{Duration, Instant};

use migrate::store::{FsStore, StoreError};
use net_common::process::Served;
use net_common::*;
use segment::{Epoch, Generation, SegmentName};

/// How often the agent is killed.
const KILLS: u64 = 50;
/// The longest it lives, once it is reached.
const LIFE_MS: u64 = 60;
/// How far the owner runs ahead of what is committed.
const AHEAD: u64 = 40;

/// splitmix64: the run is the seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}

fn seed() -> u64 {
    match std::env::var("SEED") {
        Ok(text) => text.parse().expect("SEED is a number"),
        Err(_) => u64::from_le_bytes(migrate::registry::random_id()[..8].try_into().unwrap()),
    }
}

/// Every name up to the one that was acknowledged is there and verifies; those up to `verified` were looked at before.
fn check(data: &std::path::Path, acked: &SegmentName, verified: u64, round: u64) {
    let store = FsStore::open_read_only(&data.join("store")).unwrap();
    let newest = store.newest_complete(&acked.vm).map(|e| e.name);
    assert!(
        newest.as_ref() >= Some(acked),
        "kill {round}: {acked} was acknowledged, {newest:?} is the newest"
    );
    for epoch in 1..=acked.epoch.0 {
        let name = SegmentName::new(acked.vm.clone(), acked.generation, Epoch(epoch));
        assert!(
            store.get(&name).is_some(),
            "kill {round}: {name} was acknowledged and is gone"
        );
        if epoch > verified {
            store
                .verify(&name)
                .unwrap_or_else(|e: StoreError| panic!("kill {round}: {name}: {e:?}"));
        }
    }
    assert_eq!(store.damaged().len(), 0, "kill {round}: {:?}", store.damaged());
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_was_acknowledged_survives_sigkill_at_any_instant() {
    let seed = seed();
    println!("SEED={seed} repeats the choices of this run");
    let mut random = Random(seed);
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("agent");
    let mut agent = Served::start(&data, "a", "127.0.0.1:0", &[]);
    let address = agent.address.clone();
    let mut owner = Owner::tuned(dir.path(), "web", Generation(1), &[&address], 1, None, |c| {
        c.sender.backoff_first = Duration::from_millis(5);
        c.sender.backoff_max = Duration::from_millis(20);
    });
    let (mut verified, mut in_the_middle) = (0, 0);
    let mut acked = None;
    for round in 0..KILLS {
        // It is reached, and has stored something new; then any instant.
        let before = acked.as_ref().map_or(0, |n: &SegmentName| n.epoch.0);
        let deadline = Instant::now() + PATIENCE;
        let mut until = None;
        loop {
            let committed = owner.shipper.status().committed.map_or(0, |n| n.epoch.0);
            if until.is_none() && committed > before {
                until = Some(Instant::now() + Duration::from_micros(random.below(LIFE_MS * 1000)));
            }
            if until.is_some_and(|at| Instant::now() >= at) {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "kill {round}: nothing new was committed"
            );
            if owner.epoch < committed + AHEAD {
                // From a page to more than a chunk.
                let pages = 1 + if random.below(20) == 0 {
                    random.below(400)
                } else {
                    random.below(24)
                };
                owner.take(pages);
            } else {
                tokio::time::sleep(Duration::from_micros(300)).await;
            }
        }
        agent.kill();
        // Acknowledgements that were on their way still count.
        tokio::time::sleep(Duration::from_millis(2)).await;
        acked = owner.shipper.status().committed;
        let name = acked.clone().unwrap();
        in_the_middle += u64::from(
            std::fs::read_dir(data.join("store/tmp"))
                .unwrap()
                .next()
                .is_some(),
        );
        check(&data, &name, verified, round);
        verified = name.epoch.0;
        owner.spool.make_room().unwrap();
        agent = Served::start(&data, "a", &address, &[]);
        assert!(
            std::fs::read_dir(data.join("store/tmp"))
                .unwrap()
                .next()
                .is_none(),
            "kill {round}: leftovers"
        );
    }
    let last = owner.take(1);
    owner.wait_committed(&last).await;
    owner.shipper.stop().await;
    agent.terminate();
    check(&data, &last, 0, KILLS);
    println!(
        "{KILLS} kills, {in_the_middle} in the middle of a segment, {} segments acknowledged",
        last.epoch
    );
    assert!(
        in_the_middle > 0,
        "no kill met a segment on its way: the test shows nothing"
    );
}
