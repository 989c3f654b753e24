//! One guest and ten thousand checkpoints of it, which the holder folds and collects all along. Now and then the guest's memory
//! is put aside as it was at a checkpoint; when that checkpoint has aged, it is loaded from the holder's store and compared.
//!
//! ```text
//! pause   checkpoint -> web/1/4711   a copy of the guest's memory   resume   ..many checkpoints..   load web/1/4711: the same?
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use migrate::load::{LoadPlan, Target, TargetError};
use migrate::store::FsStore;
use segment::{PageIndex, SegmentName, SpaceId};
use serde::Serialize;

use super::{Dice, EpochOptions, say};
use crate::harness::{self, Cluster, Machine, counter, epoch, run_json, wait_for};

const VM: &str = "epochs";
/// 16 MiB of stamped pages, of which so many are written a second.
const WORK: &str = "mib=16 rate=2000 heartbeat_ms=1000";
const MEMORY: &str = "32M";
const MEMORY_BYTES: usize = 32 << 20;
const MEMORY_SPACE: SpaceId = SpaceId(0);
const EVERY: &str = "10ms";
/// How many restore points the holder keeps, and at most how many links a chain has.
const KEPT: u64 = 200;
const MAX_LINKS: &str = "100";
/// A point is compared when it has aged by at least and at most so many checkpoints.
const AGE: (u64, u64) = (20, 150);
/// The next is put aside at most so many later.
const APART: u64 = 60;
/// How many copies of the memory are held at a time.
const ASIDE: usize = 4;
/// How many points have to have been compared.
const COMPARED: usize = 20;
/// How often it is said how much everything takes, in a run.
const LOOKS: u64 = 40;
/// How much what is taken in the last quarter may be of what was taken in the second; and bytes that are no growth.
const LEVEL: f64 = 1.25;
const SLACK: f64 = 1e6;

/// What everything takes, at most since the look before.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Look {
    epoch: u64,
    /// Of the holder's store, on disk.
    store_bytes: u64,
    /// Of the owner's own store.
    spool_bytes: u64,
    /// Resident, of the agent and of the monitor with its guest.
    agent_kib: u64,
    vmm_kib: u64,
}

impl Look {
    fn most(&mut self, epoch: u64, store: &Path, spool: &Path, agent: u32, vmm: u32) -> Result<()> {
        *self = Self {
            epoch,
            store_bytes: self.store_bytes.max(disk_bytes(store)?),
            spool_bytes: self.spool_bytes.max(disk_bytes(spool)?),
            agent_kib: self.agent_kib.max(resident_kib(agent)?),
            vmm_kib: self.vmm_kib.max(resident_kib(vmm)?),
        };
        Ok(())
    }
}

/// What was seen.
#[derive(Debug, Default, Serialize)]
struct Figures {
    seed: u64,
    epochs: u64,
    seconds: f64,
    /// Restore points that were put aside and compared, each the same in every byte; and how old they were then, in checkpoints.
    compared: usize,
    ages: Vec<u64>,
    /// Put aside, and collected before it was their turn.
    collected: usize,
    looks: Vec<Look>,
}

/// A restore point with the memory its guest had.
struct Aside {
    name: SegmentName,
    memory: Vec<u8>,
    /// It is compared when this checkpoint was taken.
    due: u64,
}

/// Runs it below `folder`.
///
/// # Errors
/// When a restore point is not what the guest had, or more is taken all the time.
pub(super) fn run(options: &EpochOptions, seed: u64, folder: &Path) -> Result<()> {
    let mut dice = Dice::new(seed);
    let mut cluster = Cluster::new(&folder.join("cluster"), false)?;
    let keep = format!("last={KEPT}");
    let agent = cluster.start_agent("holder", &["--keep", &keep, "--max-links", MAX_LINKS])?;
    let holder = cluster.agents[agent].address.clone();
    let more = ["--memory", MEMORY, "--every", EVERY, "--protect-to", &holder];
    let mut machine = cluster.launch(VM, "churn", WORK, &more)?;
    wait_for("the guest to fill its memory", || {
        Ok(machine.console()?.contains("churn filled").then_some(()))
    })?;
    let done = torture(options, seed, &mut dice, &cluster, &machine);
    machine.kill()?;
    let figures = done?;
    say(format!(
        "{} epochs in {:.0} s: {} restore points were compared and the same, {} to {} checkpoints old; {} were collected before",
        figures.epochs,
        figures.seconds,
        figures.compared,
        figures.ages.iter().min().unwrap_or(&0),
        figures.ages.iter().max().unwrap_or(&0),
        figures.collected
    ));
    options.common.write(&figures)?;
    ensure!(
        figures.compared >= COMPARED.min(options.count as usize / 500),
        "only {} restore points could be compared",
        figures.compared
    );
    level(&figures)
}

fn torture(
    options: &EpochOptions,
    seed: u64,
    dice: &mut Dice,
    cluster: &Cluster,
    machine: &Machine,
) -> Result<Figures> {
    let store = cluster.agents[0].data.join("store");
    let spool = cluster.folder().join("vms").join(VM);
    let agent: u32 = cluster.agent_pids()[0].parse().context("the agent's process")?;
    let mut figures = Figures {
        seed,
        ..Figures::default()
    };
    let started = Instant::now();
    let first = newest(cluster, machine)?;
    let last = first + u64::from(options.count);
    let step = (u64::from(options.count) / LOOKS).max(1);
    let (mut next_look, mut next_aside) = (first + step, first + dice.below(AGE.0));
    let mut look = Look::default();
    let mut aside: VecDeque<Aside> = VecDeque::new();
    loop {
        let now = newest(cluster, machine)?;
        look.most(now, &store, &spool, agent, machine.pid)?;
        if now >= next_look {
            next_look = now + step;
            say(format!(
                "epoch {now}: at most {} KiB in the store, {} KiB in the owner's, {} KiB the agent, {} KiB the monitor; {} compared",
                look.store_bytes >> 10,
                look.spool_bytes >> 10,
                look.agent_kib,
                look.vmm_kib,
                figures.compared
            ));
            figures.looks.push(std::mem::take(&mut look));
        }
        while let Some(at) = aside.iter().position(|point| now >= point.due)
            && let Some(point) = aside.remove(at)
        {
            if compare(&store, &point)? {
                figures.compared += 1;
                figures.ages.push(now - point.name.epoch.0);
            } else {
                figures.collected += 1;
            }
        }
        if now >= last {
            break;
        }
        if now >= next_aside && aside.len() < ASIDE {
            let mut point = put_aside(cluster, machine)?;
            point.due = point.name.epoch.0 + AGE.0 + dice.below(AGE.1 - AGE.0);
            next_aside = now + 1 + dice.below(APART);
            aside.push_back(point);
        }
        ensure!(!machine.console()?.contains("BAD"), "the guest found damage");
    }
    figures.epochs = newest(cluster, machine)? - first;
    figures.seconds = started.elapsed().as_secs_f64();
    let beats = counter(&machine.console()?, "beat").unwrap_or_default();
    ensure!(beats > 0, "the guest stood still");
    Ok(figures)
}

/// The number of the newest checkpoint that is committed.
fn newest(cluster: &Cluster, machine: &Machine) -> Result<u64> {
    Ok(epoch(&cluster.status(VM, &machine.run_dir)?["committed"]))
}

/// Takes a checkpoint of the guest while it stands still, and a copy of its memory.
fn put_aside(cluster: &Cluster, machine: &Machine) -> Result<Aside> {
    let vmm = |command: &str| cluster.vmm(command, &machine.run_dir);
    harness::run(vmm("pause").arg(VM))?;
    let report = run_json(vmm("checkpoint").arg(VM).arg("--json"));
    let memory = report.and_then(|report| Ok((report, read_memory(machine.pid)?)));
    harness::run(vmm("resume").arg(VM))?;
    let (report, memory) = memory?;
    let name = report["name"].as_str().and_then(|name| name.parse().ok());
    Ok(Aside {
        name: name.with_context(|| format!("no checkpoint in {report}"))?,
        memory,
        due: 0,
    })
}

/// All of the guest's memory, from the file that the monitor has it in.
fn read_memory(pid: u32) -> Result<Vec<u8>> {
    let folder = format!("/proc/{pid}/fd");
    for entry in std::fs::read_dir(&folder).with_context(|| format!("read {folder}"))? {
        let path = entry?.path();
        let is_ram =
            std::fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().contains("memfd:guest-ram"));
        if is_ram {
            let mut memory = vec![0; MEMORY_BYTES];
            let mut file = File::open(&path).context("open the guest's memory")?;
            file.read_exact(&mut memory).context("read the guest's memory")?;
            return Ok(memory);
        }
    }
    bail!("process {pid} has no guest's memory open")
}

/// Loads the point from the holder's store and compares it; false when the policy had it collected.
fn compare(dir: &Path, point: &Aside) -> Result<bool> {
    let loaded = match load(dir, &point.name) {
        Ok(loaded) => loaded,
        Err(error) => {
            let again = FsStore::open_read_only(dir).context("open the holder's store")?;
            if again.get(&point.name).is_none() {
                return Ok(false);
            }
            return Err(error).with_context(|| format!("load {}", point.name));
        }
    };
    ensure!(
        loaded.len() == point.memory.len(),
        "{} has a memory of {} bytes",
        point.name,
        loaded.len()
    );
    let differs = loaded.iter().zip(&point.memory).position(|(a, b)| a != b);
    match differs {
        None => Ok(true),
        Some(at) => bail!(
            "byte {at} of the memory in {} is not what the guest had",
            point.name
        ),
    }
}

/// The guest's memory at a restore point.
fn load(dir: &Path, name: &SegmentName) -> Result<Vec<u8>> {
    let store = FsStore::open_read_only(dir)?;
    let spaces = store.open_segment(name)?.manifest().spaces.clone();
    let plan = LoadPlan::new(&store, name)?;
    let target = Spaces(
        spaces
            .into_iter()
            .map(|space| {
                (
                    space.id,
                    (
                        space.page_bytes as usize,
                        Mutex::new(vec![0; space.bytes() as usize]),
                    ),
                )
            })
            .collect(),
    );
    plan.load_into(&target, 1)?;
    let memory = target.0.into_iter().find(|(id, _)| *id == MEMORY_SPACE);
    let (_, (_, memory)) = memory.context("there is no memory in it")?;
    Ok(memory.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Address spaces that are bytes, with the size of their pages.
struct Spaces(BTreeMap<SpaceId, (usize, Mutex<Vec<u8>>)>);

impl Spaces {
    fn with<T>(
        &self,
        space: SpaceId,
        first: PageIndex,
        length: usize,
        use_it: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, TargetError> {
        let none = || TargetError::new(std::io::Error::other("no such pages"));
        let (page_bytes, bytes) = self.0.get(&space).ok_or_else(none)?;
        let mut bytes = bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let start = (first.0 as usize).checked_mul(*page_bytes).ok_or_else(none)?;
        let end = start.checked_add(length).ok_or_else(none)?;
        Ok(use_it(bytes.get_mut(start..end).ok_or_else(none)?))
    }
}

impl Target for Spaces {
    fn write(&self, space: SpaceId, first: PageIndex, data: &[u8]) -> Result<(), TargetError> {
        self.with(space, first, data.len(), |bytes| bytes.copy_from_slice(data))
    }

    fn read(&self, space: SpaceId, first: PageIndex, data: &mut [u8]) -> Result<(), TargetError> {
        self.with(space, first, data.len(), |bytes| data.copy_from_slice(bytes))
    }
}

/// What files take on the disk below a folder; they may go meanwhile.
fn disk_bytes(folder: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let mut todo: Vec<PathBuf> = vec![folder.to_owned()];
    let mut bytes = 0;
    while let Some(folder) = todo.pop() {
        let Ok(list) = std::fs::read_dir(&folder) else {
            continue;
        };
        for entry in list {
            let entry = entry.with_context(|| format!("read {}", folder.display()))?;
            match entry.metadata() {
                Ok(meta) if meta.is_dir() => todo.push(entry.path()),
                Ok(meta) => bytes += meta.blocks() * 512,
                Err(_) => {}
            }
        }
    }
    Ok(bytes)
}

fn resident_kib(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let kib = text.lines().find_map(|line| {
        line.strip_prefix("VmRSS:")?
            .trim()
            .strip_suffix(" kB")?
            .parse()
            .ok()
    });
    kib.with_context(|| format!("{path} has no VmRSS"))
}

/// In the last quarter nothing takes much more than in the second, when all that is kept was there. What is at most there goes up
/// and down with what the collector is at: it is the middle one of ten that is compared.
fn level(figures: &Figures) -> Result<()> {
    let looks = &figures.looks;
    let quarter = looks.len() / 4;
    // Too short to say.
    if quarter < 2 || figures.epochs < 4 * KEPT {
        return Ok(());
    }
    let middle = |of: fn(&Look) -> u64, part: &[Look]| {
        let mut all: Vec<_> = part.iter().map(of).collect();
        all.sort_unstable();
        all[all.len() / 2] as f64
    };
    for (what, of) in [
        (
            "the holder's store",
            (|look| look.store_bytes) as fn(&Look) -> u64,
        ),
        ("the owner's store", |look| look.spool_bytes),
        ("the agent's memory", |look| look.agent_kib << 10),
        ("the monitor's memory", |look| look.vmm_kib << 10),
    ] {
        let early = middle(of, &looks[quarter..2 * quarter]);
        let late = middle(of, &looks[looks.len() - quarter..]);
        say(format!(
            "{what}: {:.1} MiB in the second quarter, {:.1} in the last",
            early / f64::from(1 << 20),
            late / f64::from(1 << 20)
        ));
        ensure!(
            late <= early * LEVEL + SLACK,
            "{what} grows: {early} bytes in the second quarter, {late} in the last"
        );
    }
    Ok(())
}
