//! A guest that is checkpointed ten thousand times, and collected by policy along the way: the store and the process
//! stay level, and what is kept is what the guest had.
//!
//! ```text
//! cargo test --release -p understudy-tests --lib -- --ignored --nocapture ten_thousand
//! UNDERSTUDY_EPOCHS=2000 UNDERSTUDY_SEED=7   fewer, and other points looked at
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use migrate::checkpoint::{CaptureKind, Captured, Source, SourceError};
use migrate::load::LoadPlan;
use migrate::protect::{CheckpointRequest, ProtectOptions, Protector};
use migrate::store::{CollectOptions, Durability, FsStore, KeepPolicy, Lineage, Pace};
use segment::{Generation, SegmentName, VmId};
use vmm::memory::GuestRam;
use vmm::replica::{RamTarget, VmSource};

use super::guest::Guest;
use super::lab::Lab;
use super::limits::Random;

const MEMORY_MIB: u64 = 16;
/// Ten minutes of the guest's life between two checkpoints, so that ten thousand are ten weeks.
const STEP_NS: u64 = 600_000_000_000;
/// The first of January 2026.
const BEGIN_NS: u64 = 1_767_225_600_000_000_000;
const POLICY: &str = "last=50,hourly=24,daily=7";
const MAX_LINKS: u32 = 100;
/// Restore points that are compared at the end.
const LOOKED_AT: usize = 20;

/// A guest whose clock runs fast.
struct Sped(VmSource, u64);

impl Source for Sped {
    fn capture(&mut self, kind: CaptureKind) -> Result<Captured, SourceError> {
        let mut captured = self.0.capture(kind)?;
        self.1 += 1;
        captured.created_unix_ns = BEGIN_NS + self.1 * STEP_NS;
        Ok(captured)
    }

    fn put_back(&mut self, captured: &Captured) {
        self.0.put_back(captured);
    }

    fn fence(&mut self, reason: &str) {
        self.0.fence(reason);
    }
}

fn number(variable: &str, default: u64) -> Result<u64> {
    match std::env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("read {variable}")),
        Err(_) => Ok(default),
    }
}

/// All of a memory as one number.
fn digest(ram: &GuestRam, buffer: &mut [u8]) -> blake3::Hash {
    ram.read_pages(0, buffer);
    blake3::hash(buffer)
}

/// KiB of this process that are resident.
fn resident_kib() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let words = line.context("no VmRSS")?.split_whitespace().next();
    words.context("no number")?.parse().context("read VmRSS")
}

#[test]
#[ignore = "takes minutes: ten thousand checkpoints of a guest"]
fn ten_thousand_epochs_stay_level_and_twenty_points_are_bit_for_bit() -> Result<()> {
    let (epochs, seed) = (
        number("UNDERSTUDY_EPOCHS", 10_000)?,
        number("UNDERSTUDY_SEED", 1)?,
    );
    let lab = Lab::new(None, false)?;
    let guest = Guest::filled(&lab, "mib=8 rate=20000", MEMORY_MIB)?;
    let folder = lab.temporary("long-")?;
    let store = FsStore::open(folder.path(), None, Durability::Spool)?;
    let (vm, policy): (VmId, KeepPolicy) = ("web".parse()?, POLICY.parse()?);
    let options = ProtectOptions {
        max_links: u32::MAX,
        ..ProtectOptions::default()
    };
    let source = Sped(VmSource::new(guest.vm.clone()), 0);
    let mut protector = Protector::new(source, store.clone(), vm.clone(), Generation(1), options);
    let collect = CollectOptions {
        max_links: MAX_LINKS,
        short_of_room: false,
        level: 1,
        pace: Pace::unlimited(),
    };
    let mut oracle: BTreeMap<SegmentName, blake3::Hash> = BTreeMap::new();
    let mut buffer = vec![0; guest.vm.ram().bytes() as usize];
    // Of each tenth: the most bytes on the disk, the most links, resident memory at its end.
    let mut tenths: Vec<(u64, u32, u64)> = Vec::new();
    let mut most = (0, 0);
    for epoch in 1..=epochs {
        // Stopped for the dump: what is captured is what is dumped.
        lab.runtime().block_on(guest.vm.pause())?;
        let taken = protector.checkpoint(CheckpointRequest::default())?;
        oracle.insert(taken.entry.name, digest(guest.vm.ram(), &mut buffer));
        lab.runtime().block_on(guest.vm.resume())?;
        std::thread::sleep(Duration::from_millis(3));
        if epoch.is_multiple_of(10) {
            store.collect(&vm, &policy, &BTreeSet::new(), &collect)?;
            let lineage = Lineage::new(store.entries(&vm));
            let links = (0..lineage.entries().len()).map(|i| lineage.links(i)).max();
            most = (most.0.max(store.used_bytes()), most.1.max(links.unwrap_or(0)));
            oracle.retain(|name, _| store.get(name).is_some());
        }
        if epoch.is_multiple_of((epochs / 10).max(1)) {
            tenths.push((most.0, most.1, resident_kib()?));
            println!(
                "epoch {epoch}: at most {} KiB and {} links, {} segments now, {} KiB resident",
                most.0 >> 10,
                most.1,
                store.entries(&vm).len(),
                resident_kib()?
            );
            most = (0, 0);
        }
    }
    // A week and a day are 1,152 epochs: from the third tenth on everything that is kept is there.
    let (early, late) = (&tenths[2..tenths.len() / 2 + 1], &tenths[tenths.len() / 2 + 1..]);
    let peak = |of: &[(u64, u32, u64)]| of.iter().map(|tenth| tenth.0).max().unwrap_or(0);
    ensure!(
        peak(late) <= peak(early) * 5 / 4,
        "the disk's use grows: {tenths:?}"
    );
    let resident = |of: &[(u64, u32, u64)]| of.iter().map(|tenth| tenth.2).max().unwrap_or(0);
    ensure!(
        resident(late) <= resident(early) * 5 / 4,
        "memory grows: {tenths:?}"
    );
    ensure!(
        tenths.iter().all(|tenth| tenth.1 <= MAX_LINKS),
        "a chain is too long: {tenths:?}"
    );

    let points = Lineage::new(store.entries(&vm)).points();
    let kept: Vec<SegmentName> = policy.keep(&points).into_iter().collect();
    println!(
        "{} points are kept; {LOOKED_AT} are compared, seed {seed}",
        kept.len()
    );
    let mut random = Random(seed);
    for _ in 0..LOOKED_AT {
        let name = &kept[(random.number() % kept.len() as u64) as usize];
        store.verify(name)?;
        let ram = GuestRam::new(guest.vm.ram().bytes()).context("make a memory")?;
        let plan = LoadPlan::new(&store, name)?;
        plan.load_into(&RamTarget(&ram), 2)?;
        ensure!(
            digest(&ram, &mut buffer) == oracle[name],
            "{name} is not what the guest had (seed {seed})"
        );
    }
    Ok(())
}
