//! From a chain on the disk to a guest's memory, all of it resident.

use anyhow::{Context as _, Result, ensure};
use migrate::load::LoadPlan;
use std::time::Duration;
use vmm::memory::GuestRam;
use vmm::replica::MachineTarget;

use super::guest::{Guest, Taker};
use super::lab::{Lab, cores};
use super::limits::{self, timed};
use super::pages::{self, FRAME_BYTES};
use super::row::Row;
use super::stats::Samples;
use migrate::checkpoint::CaptureKind;

const NAME: &str = "restore.cold.rate";
const SHARE: f64 = 0.8;
/// Segments of the chain.
pub(crate) const LINKS: usize = 10;
/// Page writes a second between its links.
const WRITES: u64 = 5_000;

pub(crate) fn measure(lab: &Lab) -> Result<Vec<Row>> {
    let memory_mib: u64 = if lab.quick() { 256 } else { 1024 };
    let guest = Guest::filled(lab, &format!("mib={} rate={WRITES}", memory_mib - 40), memory_mib)?;
    let mut taker = Taker::new(lab, &guest)?;
    taker.take(true)?;
    for _ in 1..LINKS {
        std::thread::sleep(Duration::from_millis(if lab.quick() { 100 } else { 1000 }));
        taker.take(false)?;
    }
    let content = pages::content(&guest.capture(CaptureKind::Full)?);
    drop(guest);

    let (mut rates, mut decompress, mut populate) =
        (Samples::default(), Samples::default(), Samples::default());
    let (mut loaded, mut chain_bytes) = (0, 0);
    // The first brings the files into the page cache, if they are not there.
    for index in 0..=lab.samples(7, 2) {
        let ram = GuestRam::new(memory_mib << 20).context("fresh guest memory")?;
        let load = || -> Result<_> {
            let plan = LoadPlan::from_files(&taker.chain_files()?).context("read the chain")?;
            ensure!(plan.links() == LINKS, "the chain has {} links", plan.links());
            let stats = plan
                .load_into(
                    &MachineTarget {
                        ram: &ram,
                        disks: &[],
                    },
                    cores(),
                )
                .context("load the chain")?;
            Ok((stats.bytes_written, plan.bytes()))
        };
        let (done, time) = timed(load);
        (loaded, chain_bytes) = done?;
        drop(ram);
        if index > 0 {
            rates.push_rate(loaded, time);
            decompress.push(limits::decompress(&content.0, FRAME_BYTES, cores())?);
            populate.push(limits::populate(loaded, cores())?);
        }
    }
    let row = Row::new(NAME, "MB/s of guest memory", &rates)?
        .limit(
            decompress.median().min(populate.median()),
            "the slower of zstd decompression of the same pages and populating fresh guest memory, each on all cores",
        )
        .at_least_of_limit(SHARE)
        .param("memory_mib", memory_mib)
        .param("links", LINKS)
        .param("loaded_mib", loaded >> 20)
        .param("chain_mib", chain_bytes >> 20)
        .param("page_cache", "warm")
        .seen("decompress_limit", decompress.median())
        .seen("populate_limit", populate.median())
        // Both are work for the same cores.
        .seen("one_after_the_other", 1.0 / (1.0 / decompress.median() + 1.0 / populate.median()));
    Ok(vec![row])
}
