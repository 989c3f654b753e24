//! From the operator's word to the guest's first output on another host, with real processes.
//!
//! ```text
//! vmm run --protect-to A    full + 9 deltas committed    SIGKILL    standby promote    first byte on the console
//!                                                                   '------------- takeover -------------'
//! ```
//!
//! `running_ms` and the phases are what the agent reports. What lies between it and the median is the guest's own:
//! before its first line churn checks a 64th of its memory, and each page it touches is a fault in the new host.
//!
//! From an image the same, with three holders that all keep one: nothing is loaded. There the VM goes to and fro between two.
//!
//! The same VM is taken over again and again. Each new owner takes one checkpoint of its own at once, so the chain has
//! one link more each time.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use migrate::load::LoadPlan;
use migrate::store::FsStore;
use serde_json::Value;
use vmm::memory::{GuestRam, PAGE_BYTES};
use vmm::replica::MachineTarget;

use super::lab::{Lab, cores};
use super::limits;
use super::pages::{Bytes, FRAME_BYTES};
use super::process::Process;
use super::restore::LINKS;
use super::row::Row;
use super::stats::Samples;
use crate::harness::{Binaries, Cluster, Machine, run, run_json, wait_for};

const NAME: &str = "failover.cold.takeover_ms";
const TARGET_MS: f64 = 1_200.0;
const HOT: &str = "failover.hot.takeover_ms";
const HOT_TARGET_MS: f64 = 20.0;
const VM: &str = "failover";
/// How long the guest may be silent after it runs.
const PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_micros(500);
/// A heartbeat this often: the first output is not to be waited for.
const HEARTBEAT_MS: u64 = 10;
/// Page writes a second.
const WRITES: u64 = 2_000;

pub(crate) fn cold(lab: &Lab) -> Result<Vec<Row>> {
    let memory_mib: u64 = if lab.quick() { 256 } else { 1024 };
    let folder = lab.temporary("failover-")?;
    let mut cluster = Cluster::new(folder.path(), false)?;
    let agent = cluster.start_agent("holder", &[])?;
    let machine = protected(lab, &mut cluster, memory_mib)?;
    let (times, phases) = again_and_again(lab, &mut cluster, machine, |_, _| Ok(agent))?;
    let (limit_ms, loaded) = limit(&cluster, agent, memory_mib)?;
    let row = Row::new(NAME, "ms", &times)?
        .limit(
            limit_ms,
            "the slower of zstd decompression and populating, each on all cores, of as many bytes",
        )
        .at_most(TARGET_MS)
        .param("memory_mib", memory_mib)
        .param("links", LINKS)
        .param("loaded_mib", loaded >> 20);
    Ok(vec![phases.seen(row)])
}

pub(crate) fn hot(lab: &Lab) -> Result<Vec<Row>> {
    let memory_mib: u64 = if lab.quick() { 256 } else { 1024 };
    let folder = lab.temporary("failover-")?;
    let mut cluster = Cluster::new(folder.path(), false)?;
    for name in ["first", "second", "third"] {
        cluster.start_agent(name, &["--hot", "all"])?;
    }
    let machine = protected(lab, &mut cluster, memory_mib)?;
    // From one to the next: a host that runs it has no image of it.
    let next = |cluster: &Cluster, round: usize| {
        let agent = 1 + round % 2;
        wait_hot(cluster, agent)?;
        Ok(agent)
    };
    let (times, phases) = again_and_again(lab, &mut cluster, machine, next)?;
    let mut limit = Samples::default();
    let binaries = Binaries::find()?;
    for _ in 0..lab.samples(10, 2) {
        let (_process, time) = Process::start(Command::new(&binaries.vmm).arg("--version"))?;
        limit.push_ms(time);
    }
    let row = Row::new(HOT, "ms", &times)?
        .limit(
            limit.median(),
            "the first byte of `vmm --version`: a process that makes no VM",
        )
        .at_most(HOT_TARGET_MS)
        .param("memory_mib", memory_mib)
        .param("holders", 3);
    Ok(vec![phases.seen(row)])
}

/// Takes the VM over again and again, at the agent that `choose` says when the newest checkpoint is committed.
fn again_and_again(
    lab: &Lab,
    cluster: &mut Cluster,
    mut machine: Machine,
    choose: impl Fn(&Cluster, usize) -> Result<usize>,
) -> Result<(Samples, Phases)> {
    let (mut times, mut phases) = (Samples::default(), Phases::default());
    for round in 0..lab.samples(5, 2) {
        wait_committed(cluster, &machine)?;
        let agent = choose(cluster, round)?;
        machine.kill()?;
        let (report, time) = take_over(cluster, agent)?;
        times.push_ms(time);
        machine = successor(cluster, agent, &report)?;
        if let Err(error) = goes_well(&machine) {
            // It must not outlive this.
            cluster.own(machine);
            return Err(error);
        }
        phases.add(&report);
    }
    machine.kill()?;
    Ok((times, phases))
}

/// Waits until the agent's image of the VM is at its newest checkpoint.
fn wait_hot(cluster: &Cluster, agent: usize) -> Result<()> {
    wait_for("the image to be at the newest checkpoint", || {
        let status = run_json(cluster.standby(agent).args(["status", "--json"]))?;
        let vms = status["agent"]["vms"].as_array().into_iter().flatten();
        let mut images = vms.filter(|held| held["vm"] == VM && held["hot_at"].is_string());
        Ok(images
            .any(|held| held["hot_at"] == held["newest"]["name"])
            .then_some(()))
    })
}

/// The phases that `standby promote` reports.
#[derive(Debug, Default)]
struct Phases(Vec<(String, Samples)>);

impl Phases {
    fn seen(self, mut row: Row) -> Row {
        for (phase, samples) in self.0 {
            row = row.seen(&format!("{phase}_ms"), samples.median());
        }
        row
    }

    fn add(&mut self, report: &Value) {
        let total = report["promote_to_running_ms"].as_f64();
        let phases = report["phases"].as_object().into_iter().flatten();
        let times = phases.filter_map(|(name, ms)| Some((name.as_str(), ms.as_f64()?)));
        for (name, ms) in times.chain(total.map(|ms| ("running", ms))) {
            match self.0.iter_mut().find(|(known, _)| known == name) {
                Some((_, samples)) => samples.push(ms),
                None => {
                    let mut samples = Samples::default();
                    samples.push(ms);
                    self.0.push((name.to_owned(), samples));
                }
            }
        }
    }
}

/// A guest whose memory is filled, with a chain of [`LINKS`] at the holder.
fn protected(lab: &Lab, cluster: &mut Cluster, memory_mib: u64) -> Result<Machine> {
    let holders: Vec<_> = cluster.agents.iter().map(|agent| agent.address.clone()).collect();
    let holders = holders.join(",");
    let (memory, work) = (
        format!("{memory_mib}M"),
        format!(
            "mib={} rate={WRITES} heartbeat_ms={HEARTBEAT_MS}",
            memory_mib - 40
        ),
    );
    lab.say(format!(
        "  vmm run --memory {memory} --cmdline \"{work}\": filling its memory"
    ));
    // Checkpoints only when asked for.
    let more = ["--memory", &memory, "--protect-to", &holders, "--every", "1h"];
    let machine = cluster.launch(VM, "churn", &work, &more)?;
    wait_for("the guest to fill its memory", || {
        Ok(machine.console()?.contains("churn filled").then_some(()))
    })?;
    for link in 0..LINKS {
        let mut command = cluster.vmm("checkpoint", &machine.run_dir);
        if link == 0 {
            command.arg("--full");
        }
        run(command.arg(VM))?;
        std::thread::sleep(Duration::from_millis(if lab.quick() { 100 } else { 500 }));
    }
    Ok(machine)
}

/// Waits until the holder has the newest checkpoint.
fn wait_committed(cluster: &Cluster, machine: &Machine) -> Result<()> {
    wait_for("the newest checkpoint to be committed", || {
        let status = cluster.status(VM, &machine.run_dir)?;
        let newest = &status["newest"]["name"];
        Ok((newest.is_string() && status["committed"] == *newest).then_some(()))
    })
}

/// Whoever the agent runs the VM as.
fn successor(cluster: &Cluster, agent: usize, report: &Value) -> Result<Machine> {
    let pid = report["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    Ok(cluster.adopt(VM, agent, pid.context("the report has no pid")?))
}

/// Promotes; what the agent reports, and the time until the console had more than before.
fn take_over(cluster: &Cluster, agent: usize) -> Result<(Value, Duration)> {
    let console = cluster.adopt(VM, agent, 0).console.clone();
    let length = || std::fs::metadata(&console).map_or(0, |file| file.len());
    let before = length();
    let mut command = cluster.standby(agent);
    command.args(["promote", VM, "--json"]);
    std::thread::scope(|scope| {
        let start = Instant::now();
        let promote = scope.spawn(move || run_json(&mut command));
        let mut ended: Option<Instant> = None;
        while length() <= before {
            std::thread::sleep(POLL);
            if promote.is_finished() {
                ended.get_or_insert_with(Instant::now);
            }
            let silent = ended.is_some_and(|since| since.elapsed() > PATIENCE);
            ensure!(!silent, "the promote has ended and the guest says nothing");
        }
        let time = start.elapsed();
        let report = promote
            .join()
            .map_err(|_| anyhow!("the thread of the promote panicked"))??;
        Ok((report, time))
    })
}

/// What the successor says must be that all is well.
fn goes_well(machine: &Machine) -> Result<()> {
    wait_for("a heartbeat of the successor", || {
        let console = machine.console()?;
        ensure!(!console.contains("BAD"), "the successor found damage: {console}");
        Ok(console.contains("up_ms=").then_some(()))
    })
}

/// How long the memory alone takes, in milliseconds, and how many bytes it is.
fn limit(cluster: &Cluster, agent: usize, memory_mib: u64) -> Result<(f64, u64)> {
    let store = FsStore::open_read_only(&cluster.agents[agent].data.join("store"))
        .context("open the holder's store")?;
    let vm = VM.parse().context("name the VM")?;
    let tip = store.newest_complete(&vm).context("no chain at the holder")?;
    let ram = GuestRam::new(memory_mib << 20).context("fresh guest memory")?;
    let plan = LoadPlan::new(&store, &tip.name).context("read the chain")?;
    let loaded = plan
        .load_into(
            &MachineTarget {
                ram: &ram,
                disks: &[],
            },
            cores(),
        )
        .context("load the chain")?
        .bytes_written;
    let mut content = Vec::new();
    for run in ram.populated().context("find the guest's pages")? {
        let start = content.len();
        content.resize(start + (run.end - run.start) as usize * PAGE_BYTES, 0);
        ram.read_pages(run.start, &mut content[start..]);
    }
    drop(ram);
    let content = Bytes(content.into());
    let rate = limits::decompress(&content.0, FRAME_BYTES, cores())?.min(limits::populate(loaded, cores())?);
    Ok((loaded as f64 / 1e3 / rate, loaded))
}
