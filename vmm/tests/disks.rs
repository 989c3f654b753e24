//! Disks of a VM: in the same checkpoint as its memory, and made anew where it is restored.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

mod common;

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use common::{Guests, config, small, wait_for};
use migrate::protect::CheckpointRequest;
use vmm::devices::virtio::setup::DeviceConfig;
use vmm::session::{Bindings, RestoreFrom, Session, chain};

fn disk(name: &str, path: &Path) -> DeviceConfig {
    DeviceConfig::Disk {
        name: name.into(),
        path: path.to_owned(),
        read_only: false,
        flush: true,
    }
}

/// Not a whole number of blocks, with a hole.
fn content(seed: u8) -> Vec<u8> {
    let mut content: Vec<u8> = (0..300_000u32).map(|n| (n / 7) as u8 ^ seed).collect();
    content[50_000..150_000].fill(0);
    content.truncate(300_000 / 512 * 512);
    content
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disks_are_in_the_checkpoint_and_come_back_whole() {
    let guests = Guests::new();
    let dir = tempfile::tempdir().unwrap();
    let (root, data, store) = (
        dir.path().join("root"),
        dir.path().join("data"),
        dir.path().join("store"),
    );
    fs::write(&root, content(1)).unwrap();
    fs::write(&data, content(2)).unwrap();
    let source = guests.source("ticker", "period_ms=5");
    let vsock = DeviceConfig::Vsock {
        guest_cid: 52,
        path: dir.path().join("vsock"),
    };
    let devices = [disk("root", &root), DeviceConfig::Rng, disk("data", &data), vsock];
    let session = Session::boot_with(config("web", &store), small(32), &source, &devices)
        .await
        .unwrap();
    session.resume().await.unwrap();
    tokio::task::block_in_place(|| {
        wait_for(session.vm().outbox(), |text| text.contains("tick").then_some(()))
    });

    // The same file for two VMs is refused, and nothing is left of the second.
    let other = dir.path().join("other");
    let twice = Session::boot_with(config("two", &other), small(32), &source, &devices[..1]).await;
    let error = chain(&twice.unwrap_err());
    assert!(error.contains("in use by another VM"), "{error}");
    assert!(!other.exists());

    let full = CheckpointRequest {
        full: true,
        label: None,
    };
    session.checkpoint(full).await.unwrap();
    let report = session.checkpoint(CheckpointRequest::default()).await.unwrap();
    assert_eq!(report.kind, "delta");
    let files = session.chain_files(&report.name.parse().unwrap()).unwrap();
    session.stop(Duration::ZERO).await.unwrap();

    // What its host did to the files afterwards is not in the checkpoint.
    fs::write(&root, b"spoilt").unwrap();
    let bound = dir.path().join("bound.raw");
    fs::write(&bound, content(9)).unwrap();
    let mut bindings = Bindings::from([("disk:root".into(), bound.to_str().unwrap().into())]);
    let from = RestoreFrom::Files(files.clone());
    let copy_store = dir.path().join("copy");
    let unbound = Session::restore_with(
        config("web", &copy_store),
        from.clone(),
        Default::default(),
        &bindings,
    );
    let error = chain(&unbound.await.unwrap_err());
    assert!(error.contains("--bind vsock:0=.."), "{error}");
    let meeting = dir.path().join("meeting");
    bindings = bindings.or_vsock(&meeting);
    let copy = Session::restore_with(
        config("web", &copy_store),
        from.clone(),
        Default::default(),
        &bindings,
    )
    .await
    .unwrap();
    assert_eq!(fs::read(&bound).unwrap(), content(1));
    UnixStream::connect(&meeting).unwrap();
    assert_eq!(fs::read(copy_store.join("disks/data.raw")).unwrap(), content(2));
    copy.resume().await.unwrap();
    tokio::task::block_in_place(|| wait_for(copy.vm().outbox(), |text| text.contains("tick").then_some(())));
    // A delta on the restored state holds nothing of the disks, and the chain is loaded again.
    copy.checkpoint(CheckpointRequest {
        full: true,
        label: None,
    })
    .await
    .unwrap();

    // A file that a running VM has is not replaced.
    let third = Session::restore_with(
        config("web", &dir.path().join("third")),
        from.clone(),
        Default::default(),
        &bindings,
    )
    .await;
    let error = chain(&third.unwrap_err());
    assert!(error.contains("in use by another VM"), "{error}");
    copy.stop(Duration::ZERO).await.unwrap();

    let unknown = Bindings::from([("disk:rot".into(), "x".into()), ("net:0".into(), "tap0".into())]);
    let error = chain(
        &Session::restore_with(config("web", &copy_store), from, Default::default(), &unknown)
            .await
            .unwrap_err(),
    );
    for part in ["disk:rot", "net:0", "disk:root", "disk:data"] {
        assert!(error.contains(part), "{error}");
    }
    let left: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(
        !left.iter().any(|name| name.to_str().unwrap().starts_with('.')),
        "{left:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_fails_leaves_the_file_that_was_there() {
    let guests = Guests::new();
    let dir = tempfile::tempdir().unwrap();
    let (root, store) = (dir.path().join("root"), dir.path().join("store"));
    fs::write(&root, content(1)).unwrap();
    let source = guests.source("ticker", "period_ms=5");
    let session = Session::boot_with(config("web", &store), small(32), &source, &[disk("root", &root)])
        .await
        .unwrap();
    let report = session.checkpoint(CheckpointRequest::default()).await.unwrap();
    let file = session
        .chain_files(&report.name.parse().unwrap())
        .unwrap()
        .remove(0);
    session.stop(Duration::ZERO).await.unwrap();
    drop(session);
    // A bit of the last frame, which is the disk's.
    let mut bytes = fs::read(&file).unwrap();
    let reader = segment::SegmentReader::open(fs::File::open(&file).unwrap()).unwrap();
    let last = reader.index().last().unwrap();
    let at = reader.header().body_offset() + last.offset + u64::from(last.stored_bytes) / 2;
    bytes[at as usize] ^= 1;
    let damaged = dir.path().join("damaged.seg");
    fs::write(&damaged, bytes).unwrap();
    let bindings = Bindings::from([("disk:root".into(), root.to_str().unwrap().into())]);
    let before = fs::read(&root).unwrap();
    let from = RestoreFrom::Files(vec![damaged]);
    let error = Session::restore_with(config("web", &store), from, Default::default(), &bindings)
        .await
        .unwrap_err();
    assert!(chain(&error).contains("digest"), "{}", chain(&error));
    assert_eq!(fs::read(&root).unwrap(), before);
}
