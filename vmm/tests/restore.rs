//! Checkpoints of a real guest, and machines made of them.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

mod common;

use std::path::Path;
use std::time::Duration;

use common::{Guests, config, counter, small, wait_for};
use migrate::protect::CheckpointRequest;
use vmm::clock::ClockPolicy;
use vmm::cpuid::baseline::CpuModel;
use vmm::session::{RestoreFrom, Session};
use vmm::vm::MachineConfig;

fn from_store(dir: &Path) -> RestoreFrom {
    RestoreFrom::Store {
        dir: dir.to_owned(),
        segment: None,
        chosen: false,
    }
}

fn full() -> CheckpointRequest {
    CheckpointRequest {
        full: true,
        label: None,
    }
}

/// Waits until the guest has written `more` pages in this process, and returns its count. It must not have found a
/// bad page or register.
fn work(session: &Session, more: u64) -> u64 {
    let outbox = session.vm().outbox();
    let (first, last) = wait_for(outbox, |text| {
        assert!(!text.contains("BAD"), "the guest found damage:\n{text}");
        let first = text
            .lines()
            .find(|line| line.starts_with("churn beat="))
            .and_then(|l| counter(l, "writes"))?;
        let last = counter(text, "writes")?;
        (last >= first + more).then_some((first, last))
    });
    assert!(last > first);
    last
}

async fn stop(session: Session) {
    session.stop(Duration::ZERO).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_restores_in_a_row_each_from_a_checkpoint_of_the_one_before() {
    let guests = Guests::new();
    let store = tempfile::tempdir().unwrap();
    let source = guests.source("churn", "mib=24 rate=4000 heartbeat_ms=20 verify=4");
    let mut session = Session::boot(config("chain", store.path()), small(64), &source)
        .await
        .unwrap();
    session.resume().await.unwrap();
    let mut writes = tokio::task::block_in_place(|| work(&session, 200));
    for round in 0..20 {
        // A few deltas, so that the chain a restore reads has links of every age.
        for _ in 0..3 {
            session.checkpoint(CheckpointRequest::default()).await.unwrap();
        }
        let report = session
            .checkpoint(CheckpointRequest {
                full: round % 7 == 6,
                label: None,
            })
            .await
            .unwrap();
        assert_eq!(
            report.kind,
            if round % 7 == 6 || (round == 0 && report.name.ends_with("/1")) {
                "full"
            } else {
                "delta"
            }
        );
        stop(session).await;
        session = Session::restore(
            config("chain", store.path()),
            from_store(store.path()),
            ClockPolicy::CatchUp,
        )
        .await
        .unwrap();
        assert_eq!(session.status().restored_from.unwrap(), report.name);
        assert_eq!(
            session.generation().0,
            round + 2,
            "every owner has a generation of its own"
        );
        session.resume().await.unwrap();
        let now = tokio::task::block_in_place(|| work(&session, 100));
        assert!(
            now > writes,
            "round {round}: the guest went back from {writes} to {now}"
        );
        writes = now;
    }
    stop(session).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_can_be_restored_any_number_of_times() {
    let guests = Guests::new();
    let store = tempfile::tempdir().unwrap();
    let source = guests.source("churn", "mib=8 rate=2000 heartbeat_ms=20");
    let session = Session::boot(config("parent", store.path()), small(32), &source)
        .await
        .unwrap();
    session.resume().await.unwrap();
    tokio::task::block_in_place(|| work(&session, 100));
    session.checkpoint(full()).await.unwrap();
    session.checkpoint(CheckpointRequest::default()).await.unwrap();
    let files = session
        .chain_files(&session.stored().last().unwrap().name)
        .unwrap();
    assert_eq!(files.len(), 2);
    for copy in ["clone-a", "clone-b"] {
        let own = tempfile::tempdir().unwrap();
        let clone = Session::restore(
            config(copy, own.path()),
            RestoreFrom::Files(files.clone()),
            ClockPolicy::CatchUp,
        )
        .await
        .unwrap();
        clone.resume().await.unwrap();
        tokio::task::block_in_place(|| work(&clone, 100));
        // Not of the same VM: its first checkpoint stands by itself.
        assert_eq!(
            clone.checkpoint(CheckpointRequest::default()).await.unwrap().kind,
            "full"
        );
        stop(clone).await;
    }
    // The parent has run all along.
    tokio::task::block_in_place(|| work(&session, 100));
    stop(session).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_on_both_sides_of_the_hole_is_kept() {
    let guests = Guests::new();
    let store = tempfile::tempdir().unwrap();
    // More than 3 GiB to work on, so that pages in both slots are written; filled without pacing, then checked.
    let machine = MachineConfig {
        memory_bytes: 4 << 30,
        vcpus: 1,
        cpu: CpuModel::Host,
    };
    let source = guests.source("churn", "mib=3300 fill=0 rate=20000 heartbeat_ms=50 mix=0:90:10");
    let session = Session::boot(config("large", store.path()), machine, &source)
        .await
        .unwrap();
    session.resume().await.unwrap();
    tokio::task::block_in_place(|| work(&session, 20_000));
    session.checkpoint(full()).await.unwrap();
    tokio::task::block_in_place(|| work(&session, 20_000));
    let taken = session.checkpoint(CheckpointRequest::default()).await.unwrap();
    stop(session).await;
    let session = Session::restore(
        config("large", store.path()),
        from_store(store.path()),
        ClockPolicy::CatchUp,
    )
    .await
    .unwrap();
    assert_eq!(session.status().restored_from.unwrap(), taken.name);
    session.resume().await.unwrap();
    tokio::task::block_in_place(|| work(&session, 40_000));
    let pages = session.vm().ram().populated().unwrap();
    let hole = vmm::layout::LOW_RAM_END / 4096;
    assert!(
        pages.iter().any(|run| run.start > 1024 && run.end < hole),
        "nothing below the hole"
    );
    assert!(
        pages.iter().any(|run| run.start >= hole),
        "nothing above the hole"
    );
    stop(session).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_cannot_be_stored_loses_nothing() {
    let guests = Guests::new();
    let store = tempfile::tempdir().unwrap();
    let source = guests.source("churn", "mib=16 rate=3000 heartbeat_ms=20 mix=0:0:100");
    let mut small_store = config("tight", store.path());
    small_store.store_budget = Some(18 << 20);
    let session = Session::boot(small_store.clone(), small(48), &source)
        .await
        .unwrap();
    session.resume().await.unwrap();
    wait_for(session.vm().outbox(), |text| {
        text.contains("churn filled").then_some(())
    });
    let first = session.checkpoint(full()).await.unwrap();
    // Random pages do not compress: a second full one is beyond the budget.
    let refused = session.checkpoint(full()).await.unwrap_err();
    let text = vmm::session::chain(&refused);
    assert!(text.contains("full"), "the refusal does not say why: {text}");
    assert_eq!(session.stored().len(), 1);
    tokio::task::block_in_place(|| work(&session, 100));
    // What the refused one had taken from the dirty set is in this delta.
    let last = session.checkpoint(CheckpointRequest::default()).await;
    let tip = match last {
        Ok(report) => report.name,
        Err(error) => {
            assert!(vmm::session::chain(&error).contains("full"));
            first.name
        }
    };
    stop(session).await;
    let session = Session::restore(small_store, from_store(store.path()), ClockPolicy::CatchUp)
        .await
        .unwrap();
    assert_eq!(session.status().restored_from.unwrap(), tip);
    session.resume().await.unwrap();
    tokio::task::block_in_place(|| work(&session, 4_000));
    stop(session).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_restored_says_so() {
    let guests = Guests::new();
    let store = tempfile::tempdir().unwrap();
    let nothing = Session::restore(
        config("ghost", store.path()),
        from_store(store.path()),
        ClockPolicy::CatchUp,
    )
    .await
    .unwrap_err();
    assert!(vmm::session::chain(&nothing).contains("ghost"));
    let source = guests.source("ticker", "period_ms=5");
    let session = Session::boot(config("ghost", store.path()), small(32), &source)
        .await
        .unwrap();
    session.resume().await.unwrap();
    wait_for(session.vm().outbox(), |text| {
        text.contains("tick 2").then_some(())
    });
    session.checkpoint(full()).await.unwrap();
    session.checkpoint(CheckpointRequest::default()).await.unwrap();
    let files = session
        .chain_files(&session.stored().last().unwrap().name)
        .unwrap();
    stop(session).await;
    // Without the full one.
    let own = tempfile::tempdir().unwrap();
    let cut = RestoreFrom::Files(files[1..].to_vec());
    let error = Session::restore(config("copy", own.path()), cut, ClockPolicy::CatchUp)
        .await
        .unwrap_err();
    assert!(
        vmm::session::chain(&error).contains("ghost/1/1"),
        "{}",
        vmm::session::chain(&error)
    );
}

/// The page with the generation id, as it is in the guest's memory.
fn generation_id(session: &Session) -> [u8; 16] {
    let mut page = vec![0; 4096];
    session
        .vm()
        .ram()
        .read_pages(vmm::layout::GENERATION_ID / 4096, &mut page);
    assert!(page[16..].iter().all(|&byte| byte == 0));
    page[..16].try_into().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_restore_has_a_generation_id_of_its_own_and_a_reboot_keeps_it() {
    let guests = Guests::new();
    let dir = tempfile::tempdir().unwrap();
    let source = guests.source("ticker", "period_ms=2 reset_after_ticks=100");
    let session = Session::boot(config("ids", dir.path()), small(16), &source)
        .await
        .unwrap();
    let first = generation_id(&session);
    assert_ne!(first, [0; 16]);
    session.resume().await.unwrap();
    tokio::task::block_in_place(|| {
        wait_for(session.vm().outbox(), |text| {
            (text.matches("ticker up").count() >= 2).then_some(())
        });
    });
    assert_eq!(generation_id(&session), first);
    session.pause().await.unwrap();
    let taken = session.checkpoint(full()).await.unwrap();
    assert_eq!(generation_id(&session), first);
    stop(session).await;

    let mut seen = vec![first];
    for _ in 0..3 {
        let from = RestoreFrom::Store {
            dir: dir.path().to_owned(),
            segment: Some(taken.name.parse().unwrap()),
            chosen: true,
        };
        let session = Session::restore(config("ids", dir.path()), from, ClockPolicy::Frozen)
            .await
            .unwrap();
        let id = generation_id(&session);
        assert!(!seen.contains(&id), "{seen:?} {id:?}");
        seen.push(id);
        // It is a change since the checkpoint, of a guest that has not run.
        let changed = session.checkpoint(CheckpointRequest::default()).await.unwrap();
        assert_eq!(
            (changed.kind.as_str(), changed.data_pages),
            ("delta", 1),
            "{changed:?}"
        );
        stop(session).await;
    }
}

/// A guest that resets after its restore boots again, from what came with the checkpoint.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_was_restored_can_reboot_where_its_files_are_not() {
    let guests = Guests::new();
    let dir = tempfile::tempdir().unwrap();
    let source = guests.source("ticker", "period_ms=2 reset_after_ticks=150");
    let session = Session::boot(config("web", dir.path()), small(16), &source)
        .await
        .unwrap();
    session.resume().await.unwrap();
    tokio::task::block_in_place(|| {
        wait_for(session.vm().outbox(), |text| {
            text.contains("tick 20").then_some(())
        })
    });
    session.checkpoint(full()).await.unwrap();
    session.checkpoint(CheckpointRequest::default()).await.unwrap();
    stop(session).await;
    drop(guests);

    for round in 0..2 {
        let session = Session::restore(
            config("web", dir.path()),
            from_store(dir.path()),
            ClockPolicy::Frozen,
        )
        .await
        .unwrap();
        session.resume().await.unwrap();
        // Not from the checkpoint: from its first instruction on, again and again.
        tokio::task::block_in_place(|| {
            wait_for(session.vm().outbox(), |text| {
                let (_, rebooted) = text.split_once("ticker up")?;
                (rebooted.contains("ticker up") && rebooted.contains("tick 149")).then_some(())
            });
        });
        assert!(session.vm().restarts() >= 2, "{round}");
        // What it was booted from is in what this one takes, too.
        session.checkpoint(full()).await.unwrap();
        stop(session).await;
    }
}
