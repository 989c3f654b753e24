//! How long an agent needs to be there again after it was killed.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use segment::SegmentName;

use super::lab::Lab;
use super::limits::{Random, timed};
use super::pages::{self, Bytes};
use super::row::Row;
use super::stats::Samples;
use crate::harness::Binaries;
use vmm::memory::PAGE_BYTES;

const NAME: &str = "store.recover_ms";
const TARGET_MS: f64 = 2000.0;
/// Each of so many VMs has a thousand segments.
const VMS: usize = 100;
const SEGMENTS_EACH: u64 = 1000;

/// An agent's process, killed by SIGKILL when this is dropped.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Agent {
    /// Starts it, and waits until it listens.
    fn start(binaries: &Binaries, data: &Path) -> Result<(Self, Duration)> {
        let start = Instant::now();
        let mut command = Command::new(&binaries.standby);
        command
            .args([
                "serve",
                "--name",
                "bench",
                "--listen",
                "127.0.0.1:0",
                "--verify-every",
                "never",
                "--data",
            ])
            .arg(data)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut agent = Self(command.spawn().with_context(|| format!("start {command:?}"))?);
        let output = agent.0.stdout.as_mut().context("its output")?;
        let mut line = String::new();
        BufReader::new(output)
            .read_line(&mut line)
            .context("read its output")?;
        ensure!(line.starts_with("listening on"), "{command:?} said {line:?}");
        Ok((agent, start.elapsed()))
    }
}

/// Fills a store's folder as an agent that has run for long leaves it; returns how many segments it has.
fn fill(lab: &Lab, data: &Path) -> Result<u64> {
    let vms = if lab.quick() { 2 } else { VMS };
    lab.say(format!("  writing {} segments", vms as u64 * SEGMENTS_EACH));
    let bytes = Bytes(Random(1).bytes(PAGE_BYTES).into());
    for vm in 0..vms {
        let vm = format!("vm{vm}");
        let folder = data.join("store/segments").join(&vm).join("1");
        std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        for epoch in 1..=SEGMENTS_EACH {
            let name: SegmentName = pages::name(&vm, epoch)?;
            let path = folder.join(format!("{epoch}.seg"));
            std::fs::write(&path, pages::segment(&name, &bytes)?)
                .with_context(|| format!("write {}", path.display()))?;
        }
    }
    Ok(vms as u64 * SEGMENTS_EACH)
}

/// Looks up every file, and reads nothing: what no agent can do without.
fn list(data: &Path) -> Result<u64> {
    let (mut files, mut folders) = (0, vec![data.join("store/segments")]);
    while let Some(folder) = folders.pop() {
        for file in std::fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
            let file = file.context("read a folder")?;
            match file.metadata().context("look at a file")?.is_dir() {
                true => folders.push(file.path()),
                false => files += 1,
            }
        }
    }
    Ok(files)
}

pub(crate) fn measure(lab: &Lab) -> Result<Vec<Row>> {
    let (binaries, folder) = (Binaries::find()?, lab.temporary("recover-")?);
    let segments = fill(lab, folder.path())?;
    let (mut times, mut limit) = (Samples::default(), Samples::default());
    // The first has everything to find out.
    let (mut agent, first) = Agent::start(&binaries, folder.path())?;
    for _ in 0..lab.samples(7, 2) {
        drop(agent);
        let (files, bare) = timed(|| list(folder.path()));
        ensure!(files? == segments, "files are missing");
        limit.push_ms(bare);
        let time;
        (agent, time) = Agent::start(&binaries, folder.path())?;
        times.push_ms(time);
    }
    let row = Row::new(NAME, "ms", &times)?
        .limit(limit.median(), "looking up every file, reading none")
        .at_most(TARGET_MS)
        .tail(&times)
        .param("segments", segments)
        .param("disk", lab.disk())
        .seen("first_ms", first.as_secs_f64() * 1000.0);
    Ok(vec![row])
}
