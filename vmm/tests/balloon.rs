//! Memory that a guest gives back: zero in every checkpoint from then on, and none of it is filled by taking one.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

mod common;

use std::time::Duration;

use common::{Guests, config, small};
use migrate::protect::CheckpointRequest;
use vm_memory::{Bytes, GuestAddress};
use vmm::devices::virtio::balloon::BalloonOptions;
use vmm::devices::virtio::setup::DeviceConfig;
use vmm::memory::GuestRam;
use vmm::session::{RestoreFrom, Session};

const PAGE: u64 = 4096;
/// Pages that the guest does not use.
const FREE: std::ops::Range<u64> = 0x1800..0x1880;

fn write(ram: &GuestRam, page: u64, value: u8) {
    let bytes = [value; PAGE as usize];
    ram.memory()
        .write_slice(&bytes, GuestAddress(page * PAGE))
        .unwrap();
}

/// The first byte of each of the pages; of a guest that is not looked at any more.
fn seen(ram: &GuestRam) -> Vec<u8> {
    let byte = |page| ram.memory().read_obj(GuestAddress(page * PAGE)).unwrap();
    FREE.map(byte).collect()
}

fn filled(ram: &GuestRam) -> Vec<u64> {
    let all = ram.populated().unwrap().into_iter().flatten();
    all.filter(|page| FREE.contains(page)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_given_back_is_zero_in_the_next_delta_and_in_the_next_full_checkpoint() {
    let guests = Guests::new();
    let dir = tempfile::tempdir().unwrap();
    let source = guests.source("ticker", "period_ms=5");
    let balloon = DeviceConfig::Balloon(BalloonOptions {
        amount_mib: 1,
        deflate_on_oom: false,
        stats_interval_s: 0,
        reporting: true,
    });
    let session = Session::boot_with(config("web", dir.path()), small(32), &source, &[balloon])
        .await
        .unwrap();
    session.resume().await.unwrap();
    let ram = session.vm().ram().clone();
    FREE.for_each(|page| write(&ram, page, 7));
    let take = |full| session.checkpoint(CheckpointRequest { full, label: None });
    take(true).await.unwrap();

    // All but the last quarter; of those some are used again.
    let given = FREE.start..FREE.end - 32;
    let count = given.end - given.start;
    assert_eq!(ram.discard(given.start * PAGE, count * PAGE).unwrap(), count);
    let again = [FREE.start + 5, FREE.start + 40];
    again.into_iter().for_each(|page| write(&ram, page, 9));
    let expected: Vec<u8> = FREE
        .map(|page| match (again.contains(&page), given.contains(&page)) {
            (true, _) => 9,
            (false, true) => 0,
            (false, false) => 7,
        })
        .collect();
    let delta = take(false).await.unwrap();
    assert_eq!(delta.kind, "delta");
    assert!(delta.zero_pages >= count - 2, "{delta:?}");
    let left: Vec<u64> = FREE
        .filter(|page| !given.contains(page) || again.contains(page))
        .collect();
    assert_eq!(filled(&ram), left, "taking it fills nothing");
    // Pages that were holes already change nothing.
    assert_eq!(ram.discard(given.start * PAGE, 5 * PAGE).unwrap(), 0);
    let next = take(false).await.unwrap();
    assert!(next.zero_pages < 16, "{next:?}");
    let full = take(true).await.unwrap();
    assert_eq!(filled(&ram), left, "nor does a full one");

    for report in [delta, full] {
        let name = report.name.parse().unwrap();
        let from = RestoreFrom::Files(session.chain_files(&name).unwrap());
        let store = dir.path().join(report.kind);
        let copy = Session::restore(config("copy", &store), from, Default::default())
            .await
            .unwrap();
        assert_eq!(filled(copy.vm().ram()), left);
        assert_eq!(seen(copy.vm().ram()), expected);
        let state = copy.vm().balloon().unwrap().state();
        assert_eq!((state.target_pages, state.actual_pages), (256, 0));
        copy.stop(Duration::ZERO).await.unwrap();
    }
    session.stop(Duration::ZERO).await.unwrap();
}
