//! How long an agent takes to start when it holds very many segments, after it was killed.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use migrate::checkpoint::{EncodeOptions, EncodePool};
use migrate::store::{Durability, FsStore};
use segment::{Epoch, Generation, Kind, SegmentName};
use vmm::memory::PAGE_BYTES;

use super::lab::{self, Lab};
use super::limits::{Random, timed};
use super::pages::{self, Bytes};
use super::process::Process;
use super::row::Row;
use super::stats::Samples;
use crate::harness::Binaries;

const NAME: &str = "store.recover_ms";
const TARGET_MS: f64 = 2000.0;
const SEGMENTS: usize = 100_000;
/// Segments of one VM.
const OF_A_VM: u64 = 1000;
/// A full checkpoint every so many.
const CHAIN: u64 = 10;
/// What is read of a file at the least: its header.
const PIECE_BYTES: usize = 4096;

pub(crate) fn measure(lab: &Lab) -> Result<Vec<Row>> {
    let (binaries, folder) = (Binaries::find()?, lab.temporary("recover-")?);
    let segments = lab.samples(SEGMENTS, 2000);
    lab.say(format!("  storing {segments} segments"));
    let stored = fill(folder.path(), segments, OF_A_VM)?;
    ensure!(stored.len() == segments, "{} segments were stored", stored.len());
    let (mut times, mut limit) = (Samples::default(), Samples::default());
    for index in 0..=lab.samples(7, 2) {
        let read = touch(&stored)?;
        // It says where it listens when it has looked at everything. Dropped, it is killed (SIGKILL).
        let (agent, time) = Process::start(&mut serve(&binaries, folder.path()))?;
        drop(agent);
        // The first is the one start that follows no kill.
        if index > 0 {
            limit.push_ms(read);
            times.push_ms(time);
        }
    }
    let row = Row::new(NAME, "ms", &times)?
        .limit(
            limit.median(),
            "as many files opened, and 4 KiB of each read, by every core",
        )
        .at_most(TARGET_MS)
        .tail(&times)
        .param("segments", segments)
        .param("full_every", CHAIN)
        .param("files_cached", true)
        .param("disk", lab.disk());
    Ok(vec![row])
}

fn serve(binaries: &Binaries, data: &Path) -> Command {
    let mut command = Command::new(&binaries.standby);
    command.args([
        "serve",
        "--name",
        "a",
        "--listen",
        "127.0.0.1:0",
        "--insecure-plaintext",
        "--data",
    ]);
    command.arg(data);
    command
}

/// Chains of small segments, as an agent keeps them, so many of each VM; where they are.
pub(super) fn fill(data: &Path, segments: usize, of_a_vm: u64) -> Result<Vec<PathBuf>> {
    let root = data.join("store");
    let store = Arc::new(FsStore::open(&root, None, Durability::Spool).context("open a store")?);
    let pool = EncodePool::new(EncodeOptions { level: 1, threads: 1 });
    let bytes = Bytes(Random(1).bytes(PAGE_BYTES).into());
    for index in 0..segments as u64 {
        let (vm, at) = (index / of_a_vm, index % of_a_vm);
        let vm = vm_name(vm).parse().context("name a VM")?;
        let name = SegmentName::new(vm, Generation(1), Epoch(at + 1));
        let (mut captured, mut manifest) = pages::full(&name, &bytes);
        let links = at % CHAIN;
        if links > 0 {
            let parent = SegmentName {
                epoch: Epoch(at),
                ..name.clone()
            };
            let (_, of) = pages::full(&parent, &bytes);
            captured.full = false;
            manifest.links = u32::try_from(links)?;
            manifest.kind = Kind::Delta {
                parent,
                parent_checkpoint: of.checkpoint,
            };
        }
        pool.encode_to_store(&captured, &manifest, &store)
            .with_context(|| format!("store {name}"))?;
    }
    let mut files = Vec::with_capacity(segments);
    find(&root, &mut files)?;
    Ok(files)
}

/// The name of one of those VMs.
pub(super) fn vm_name(number: u64) -> String {
    format!("vm-{number}")
}

/// The segments' files below a folder.
fn find(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let told = || format!("read the folder {}", folder.display());
    for child in std::fs::read_dir(folder).with_context(told)? {
        let child = child.with_context(told)?;
        let path = child.path();
        if child.file_type().with_context(told)?.is_dir() {
            find(&path, files)?;
        } else if path.extension().is_some_and(|ending| ending == "seg") {
            files.push(path);
        }
    }
    Ok(())
}

/// Opens each file and reads its beginning, with all cores.
fn touch(files: &[PathBuf]) -> Result<Duration> {
    let share = files.len().div_ceil(lab::cores()).max(1);
    let (done, time) = timed(|| {
        std::thread::scope(|scope| {
            let threads: Vec<_> = files
                .chunks(share)
                .map(|some| scope.spawn(|| read_each(some)))
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
        })
    });
    done?;
    Ok(time)
}

fn read_each(files: &[PathBuf]) -> Result<()> {
    let mut piece = [0; PIECE_BYTES];
    for path in files {
        let told = || format!("read {}", path.display());
        let file = File::open(path).with_context(told)?;
        file.read_at(&mut piece, 0).with_context(told)?;
    }
    Ok(())
}
