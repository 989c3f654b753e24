//! A machine that runs on an image of its memory: nothing is loaded.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Guests, config, counter, small, wait_for};
use migrate::image::{Image, TakenImage};
use migrate::protect::CheckpointRequest;
use migrate::store::{Durability, FsStore};
use migrate::wire::Held;
use segment::{CheckpointId, SegmentName};
use vmm::clock::ClockPolicy;
use vmm::devices::virtio::setup::DeviceConfig;
use vmm::session::{ImageFiles, RestoreFrom, Session};

/// An image of the newest checkpoint in `store`, and its name.
fn image(store: &Path, disks: &Path) -> (SegmentName, TakenImage) {
    let store = FsStore::open(store, None, Durability::Spool).unwrap();
    let tip = store.newest_complete(&store.vms()[0]).unwrap();
    let (image, _) = Image::build(&store, &tip.name, (disks, "image"), &|| true).unwrap();
    let at = Held {
        name: tip.name.clone(),
        checkpoint: tip.checkpoint,
    };
    (tip.name, image.take(&at).unwrap())
}

fn path_of(memory: &File) -> PathBuf {
    format!("/proc/self/fd/{}", memory.as_raw_fd()).into()
}

fn on(store: &Path, segment: &SegmentName, image: &TakenImage) -> RestoreFrom {
    RestoreFrom::Image {
        dir: store.to_owned(),
        segment: segment.clone(),
        image: ImageFiles {
            memory: path_of(&image.memory),
            checkpoint: image.at.checkpoint,
            disks: image.disks.iter().cloned().collect(),
        },
    }
}

fn full() -> CheckpointRequest {
    CheckpointRequest {
        full: true,
        label: None,
    }
}

fn writes(session: &Session, more: u64) -> u64 {
    wait_for(session.vm().outbox(), |text| {
        assert!(!text.contains("BAD"), "the guest found damage:\n{text}");
        let first = counter(
            text.lines().find(|line| line.starts_with("churn beat="))?,
            "writes",
        )?;
        counter(text, "writes").filter(|last| *last >= first + more)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_on_on_its_image_and_its_checkpoints_are_whole() {
    let guests = Guests::new();
    let folder = tempfile::tempdir().unwrap();
    let (own, disks) = (folder.path().join("own"), folder.path().join("disks"));
    let source = guests.source("churn", "mib=24 rate=4000 heartbeat_ms=20 verify=4");
    let mut session = Session::boot(config("hot", &own), small(64), &source)
        .await
        .unwrap();
    let mut before = 0;
    for round in 0..6 {
        session.resume().await.unwrap();
        let now = tokio::task::block_in_place(|| writes(&session, 200));
        assert!(now > before, "round {round}: from {before} back to {now}");
        before = now;
        // Of what ran on an image: a delta on it in one round, in the next all that has ever been written.
        if round % 2 == 0 {
            session.checkpoint(full()).await.unwrap();
        }
        session.checkpoint(CheckpointRequest::default()).await.unwrap();
        session.stop(Duration::ZERO).await.unwrap();
        drop(session);
        let (tip, taken) = image(&own, &disks);
        // As loaded from the chain: nothing that happened before it was to run has changed a page.
        let loaded = Session::restore(
            config("loaded", &folder.path().join(format!("loaded-{round}"))),
            RestoreFrom::Store {
                dir: own.clone(),
                segment: Some(tip.clone()),
                chosen: true,
            },
            ClockPolicy::CatchUp,
        )
        .await
        .unwrap();
        session = Session::restore(config("hot", &own), on(&own, &tip, &taken), ClockPolicy::CatchUp)
            .await
            .unwrap();
        drop(taken);
        let (one, other) = (loaded.vm().ram(), session.vm().ram());
        let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        for first in (0..one.pages()).step_by((1 << 20) / 4096) {
            one.read_pages(first, &mut a);
            other.read_pages(first, &mut b);
            if first == 0 {
                // But for what each restore makes its own.
                let id = vmm::layout::GENERATION_ID as usize;
                let (a, b) = (&mut a[id..id + 16], &mut b[id..id + 16]);
                assert_ne!(a, b, "one generation id twice");
                a.fill(0);
                b.fill(0);
            }
            assert!(a == b, "the MiB at page {first} differs");
        }
        loaded.stop(Duration::ZERO).await.unwrap();
    }
    session.resume().await.unwrap();
    tokio::task::block_in_place(|| writes(&session, 100));
    session.stop(Duration::ZERO).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_becomes_the_disk_without_a_copy_and_what_does_not_fit_is_refused() {
    use std::os::unix::fs::MetadataExt;
    let guests = Guests::new();
    let folder = tempfile::tempdir().unwrap();
    let (own, disks) = (folder.path().join("own"), folder.path().join("disks"));
    let root = folder.path().join("root.raw");
    let content: Vec<u8> = (0..(3u32 << 20) - 512).map(|i| (i / 4096 % 251) as u8).collect();
    std::fs::write(&root, &content).unwrap();
    let session = Session::boot_with(
        config("hot", &own),
        small(32),
        &guests.source("ticker", ""),
        &[DeviceConfig::Disk {
            name: "root".into(),
            path: root.clone(),
            read_only: false,
            flush: true,
        }],
    )
    .await
    .unwrap();
    session.resume().await.unwrap();
    session.checkpoint(full()).await.unwrap();
    session.stop(Duration::ZERO).await.unwrap();
    drop(session);

    let refused = async |from: RestoreFrom| {
        let session = Session::restore(config("hot", &own), from, ClockPolicy::CatchUp).await;
        vmm::session::chain(&session.map(drop).unwrap_err())
    };
    type Change = fn(&mut ImageFiles, &Path);
    let changes: [(Change, &str); 6] = [
        (
            |i, _| i.checkpoint = CheckpointId([1; 16]),
            "and hot/1/1 is checkpoint",
        ),
        (|i, _| i.disks = BTreeMap::new(), "the VM has {\"disk:root\"}"),
        (
            |i, _| drop(i.disks.insert("disk:b".into(), "/x".into())),
            "disk:b",
        ),
        (|i, at| i.memory = at.to_owned(), "it is no regular file"),
        (|i, at| i.memory = at.join("short"), "it has 7 bytes"),
        (
            |i, at| drop(i.disks.insert("disk:root".into(), at.join("short"))),
            "3145728 bytes",
        ),
    ];
    std::fs::write(folder.path().join("short"), b"a short").unwrap();
    for (change, expected) in changes {
        let (tip, taken) = image(&own, &disks);
        let mut from = on(&own, &tip, &taken);
        let RestoreFrom::Image { image, .. } = &mut from else {
            unreachable!()
        };
        change(image, folder.path());
        let error = refused(from).await;
        assert!(error.contains(expected), "{error}, not {expected}");
    }

    let (tip, taken) = image(&own, &disks);
    let (_, file) = taken.disks[0].clone();
    let inode = std::fs::metadata(&file).unwrap().ino();
    let from = on(&own, &tip, &taken);
    let session = Session::restore(config("hot", &own), from, ClockPolicy::CatchUp)
        .await
        .unwrap();
    drop(taken);
    let disk = own.join("disks/root.raw");
    assert_eq!(std::fs::metadata(&disk).unwrap().ino(), inode);
    assert!(std::fs::read(&disk).unwrap() == content);
    session.resume().await.unwrap();
    tokio::task::block_in_place(|| {
        wait_for(session.vm().outbox(), |text| text.contains("tick").then_some(()))
    });
    session.stop(Duration::ZERO).await.unwrap();
}
