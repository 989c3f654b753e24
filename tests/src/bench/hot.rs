//! From an image of a guest's memory to the guest that runs on it.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, anyhow};
use migrate::image::{Image, TakenImage};
use migrate::wire::Held;

use super::guest::{Guest, Taker};
use super::lab::Lab;
use super::process::Process;
use super::row::Row;
use super::stats::Samples;
use crate::harness::Binaries;

const READY: &str = "restore.hot.ready_ms";
const READY_TARGET_MS: f64 = 4.0;

/// The newest checkpoint as an image, whose files are in `disks`.
fn image(disks: &Path, taker: &Taker) -> Result<TakenImage> {
    let tip = taker.store.newest_complete(&taker.vm).context("no checkpoint")?;
    let (image, _) =
        Image::build(&taker.store, &tip.name, (disks, "image"), &|| true).context("make an image")?;
    let at = Held {
        name: tip.name,
        checkpoint: tip.checkpoint,
    };
    image
        .take(&at)
        .map_err(|_| anyhow!("the image is at another checkpoint"))
}

pub(crate) fn ready(lab: &Lab) -> Result<Vec<Row>> {
    let binaries = Binaries::find()?;
    let sizes: &[u64] = if lab.quick() { &[128] } else { &[128, 2048] };
    let mut rows = Vec::new();
    for memory_mib in sizes {
        // It speaks as often as it can: what is waited for is not the next heartbeat.
        let work = format!("mib={} rate=1000 heartbeat_ms=1", memory_mib - 40);
        let guest = Guest::filled(lab, &work, *memory_mib)?;
        let mut taker = Taker::new(lab, &guest)?;
        taker.take(true)?;
        taker.take(false)?;
        drop(guest);
        let (mut times, mut limit) = (Samples::default(), Samples::default());
        for index in 0..=lab.samples(10, 2) {
            let (disks, store) = (lab.temporary("image-")?, lab.temporary("copy-")?);
            let taken = image(disks.path(), &taker)?;
            let input = taken.memory.try_clone().context("give the image away")?;
            let mut command = Command::new(&binaries.vmm);
            command
                .args([
                    "restore",
                    "--name",
                    "copy",
                    "--segment",
                    &taken.at.name.to_string(),
                ])
                .args(["--image", "/proc/self/fd/0", "--image-checkpoint"])
                .arg(taken.at.checkpoint.to_string())
                .arg("--from")
                .arg(taker.store.dir())
                .arg("--store")
                .arg(store.path().join("store"))
                .arg("--run-dir")
                .arg(store.path().join("run"));
            // No disk, but what the guest was booted from.
            for (name, path) in &taken.disks {
                command
                    .arg("--image-disk")
                    .arg(format!("{name}={}", path.display()));
            }
            let (_process, time) = Process::start_with(&mut command, Stdio::from(input))?;
            let (_version, bare) = Process::start(Command::new(&binaries.vmm).arg("--version"))?;
            // The first brings the program into the page cache.
            if index > 0 {
                times.push_ms(time);
                limit.push_ms(bare);
            }
        }
        let row = Row::new(READY, "ms", &times)?
            .limit(
                limit.median(),
                "the first byte of `vmm --version`: a process that makes no VM",
            )
            .at_most(READY_TARGET_MS)
            .tail(&times)
            .param("guest", "churn")
            .param("memory_mib", *memory_mib);
        rows.push(row);
    }
    Ok(rows)
}
