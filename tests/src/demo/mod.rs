//! The main job as a story: a guest survives the death of its host.
//!
//! ```text
//! 1 two agents   2 a guest, protected   3 checkpoints are committed   4 SIGKILL   5 promote   6 the guest goes on
//! ```

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::Value;

use crate::harness::{Cluster, counter, epoch, first_counter, run_json, wait_for};

mod auto;
mod cluster;

pub use cluster::ClusterFigures;

/// What the demo does.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Three hosts, and nobody's help: the owner's host is killed, and another takes the VM over by itself.
    #[arg(long)]
    pub auto: bool,
    /// How soon a lost owner is noticed, with --auto: default, fast, or like ttl=1000ms,renew=200ms.
    #[arg(long, value_name = "PROFILE", default_value = "default")]
    pub detect: String,
    /// A cluster: a real etcd, an S3-compatible server, a node that only stores; a holder is lost and replaced, and the
    /// guest goes on where nothing of it was, when no holder is left.
    #[arg(long, conflicts_with_all = ["auto", "keep"])]
    pub cluster: bool,
    /// Leave everything running, to play with.
    #[arg(long)]
    pub keep: bool,
    /// Where to put everything; made new [default: a temporary folder].
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
    /// Where to write the figures.
    #[arg(long, value_name = "FILE", default_value = "target/demo.json")]
    pub json: PathBuf,
    /// Checkpoints to commit before the host dies.
    #[arg(long, default_value_t = 25)]
    pub epochs: u64,
    /// A small guest that writes little, for an emulated machine.
    #[arg(long)]
    pub slow: bool,
}

impl Options {
    /// The short one of a test: all of it in `folder`, and the figures in `json`.
    #[must_use]
    pub fn short(folder: PathBuf, json: PathBuf) -> Self {
        Self {
            auto: false,
            detect: "default".into(),
            cluster: false,
            keep: false,
            folder: Some(folder),
            json,
            epochs: 5,
            slow: false,
        }
    }
}

/// What a promote reported: after how many milliseconds the guest ran, and as which process.
fn promoted(report: &Value) -> Result<(f64, u32)> {
    let running_ms = report["promote_to_running_ms"]
        .as_f64()
        .context("the report has no promote_to_running_ms")?;
    let pid = report["pid"]
        .as_u64()
        .and_then(|pid| u32::try_from(pid).ok())
        .context("the report has no pid")?;
    Ok((running_ms, pid))
}

/// The figures of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// Checkpoints that the ack quorum had when the host died.
    pub epochs_committed: u64,
    /// Pages the guest had written when it was last heard of.
    pub killed_at_count: u64,
    /// Pages it had written, for certain, when the last committed checkpoint was taken.
    pub committed_at_count: u64,
    /// Pages it had written when it was first heard of again.
    pub resumed_from_count: u64,
    /// Pages it found damaged, before and after.
    pub bad_pages: u64,
    /// From the decision (the operator's word, or the watcher's verdict) to the running guest.
    pub promote_to_running_ms: f64,
    /// What nobody had to do, of a takeover without help.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto: Option<AutoFigures>,
    /// What a cluster did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterFigures>,
    /// Bytes of the changed pages in all checkpoints.
    pub bytes_raw: u64,
    /// Bytes sent to one holder for them.
    pub bytes_shipped: u64,
}

/// The figures of a takeover without help, all by this machine's clock.
#[derive(Debug, Clone, Serialize)]
pub struct AutoFigures {
    /// From the death of the host to the verdict that the owner is lost.
    pub detection_ms: f64,
    /// From the verdict to the running guest.
    pub takeover_ms: f64,
    /// From the death of the host to the guest's first words elsewhere.
    pub total_ms: f64,
    /// Why it was taken over.
    pub cause: String,
    /// Where the guest runs now.
    pub node: String,
}

const VM: &str = "demo";
/// The guest's memory, the pages it works on (both in MiB), and its writes a second.
const ORDINARY: (u64, u64, u64) = (256, 160, 2000);
const SLOW: (u64, u64, u64) = (64, 16, 100);

fn say(text: impl AsRef<str>) {
    println!("{}", text.as_ref());
}

fn bar(length: u64, what: &str) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("      {msg:32} [{bar:30}] {pos}/{len}")?.progress_chars("=> ");
    Ok(ProgressBar::new(length)
        .with_style(style)
        .with_message(what.to_owned()))
}

/// Tells the story, and writes the figures.
///
/// # Errors
/// At the first thing that does not go as it must.
pub fn tell(options: &Options) -> Result<Figures> {
    let temporary = tempfile::Builder::new().prefix("understudy-demo-").tempdir()?;
    let folder = options
        .folder
        .clone()
        .unwrap_or_else(|| temporary.path().to_owned());
    let mut cluster = Cluster::new(&folder, options.keep)?;
    if options.keep && options.folder.is_none() {
        // The folder must outlive this process.
        let _ = temporary.keep();
    }
    let (figures, agent) = if options.cluster {
        let (figures, agent, _servers) = cluster::tell(options, &mut cluster)?;
        (figures, agent)
    } else if options.auto {
        auto::tell(options, &mut cluster)?
    } else {
        (by_hand(options, &mut cluster)?, 1)
    };
    write(&options.json, &figures)?;
    if options.keep {
        farewell(&cluster, &folder, agent);
    }
    Ok(figures)
}

fn by_hand(options: &Options, cluster: &mut Cluster) -> Result<Figures> {
    say("1/6  Two hosts: a standby agent on each, the first keeps the registry.");
    for name in ["alder", "birch"] {
        let agent = cluster.start_agent(name, &[])?;
        say(format!(
            "     {name} listens on {}",
            cluster.agents[agent].address
        ));
    }

    let (memory_mib, work_mib, rate) = if options.slow { SLOW } else { ORDINARY };
    say(format!(
        "2/6  A guest of {memory_mib} MiB that writes {work_mib} MiB of stamped pages and checks them all along."
    ));
    let holders = cluster
        .agents
        .iter()
        .map(|a| a.address.clone())
        .collect::<Vec<_>>()
        .join(",");
    let (memory, work) = (
        format!("{memory_mib}M"),
        format!("mib={work_mib} rate={rate} verify=4 heartbeat_ms=100"),
    );
    let protect = ["--memory", &memory, "--protect-to", &holders, "--every", "200ms"];
    let mut machine = cluster.launch(VM, "churn", &work, &protect)?;
    say(format!(
        "     vmm run --name {VM} --protect-to {holders} --every 200ms   (process {})",
        machine.pid
    ));

    say("3/6  It is checkpointed every 200 ms; a checkpoint counts when both agents have it on disk.");
    let seen = watch(cluster, &machine, options.epochs, work_mib)?;

    say(format!("4/6  The host dies: SIGKILL to process {}.", machine.pid));
    machine.kill()?;
    let last_words = machine.console()?;
    let killed_at = counter(&last_words, "writes").context("the guest never said how much it had written")?;
    say(format!(
        "     last heard: {killed_at} pages written; last committed checkpoint: {}",
        seen.committed
    ));

    say("5/6  birch takes over: standby promote demo");
    let start = Instant::now();
    let report = run_json(cluster.standby(1).args(["promote", VM, "--json"]))?;
    let total = start.elapsed();
    let (running_ms, pid) = promoted(&report)?;
    let from = report["resumed_from"]["name"]
        .as_str()
        .or(report["resumed_from"].as_str())
        .unwrap_or("?")
        .to_owned();
    let generation = &report["generation"];
    say(format!(
        "     generation {generation} runs from {from}, {running_ms:.0} ms after the word was given"
    ));
    say(format!("     (the command took {} ms in all)", total.as_millis()));

    let successor = cluster.adopt(VM, 1, pid);
    say("6/6  The guest goes on, and checks every page it has.");
    let result = go_on(cluster, &successor, &seen, &last_words, killed_at, running_ms);
    cluster.own(successor);
    result
}

/// What was seen of the protected guest.
struct Seen {
    /// What the guest works on, in MiB.
    work_mib: u64,
    epochs: u64,
    committed: String,
    /// What the guest had written, at least, when that checkpoint was taken.
    committed_at: u64,
    raw: u64,
    shipped: u64,
}

/// Watches until `epochs` checkpoints are committed and the guest has filled its memory.
fn watch(cluster: &Cluster, machine: &crate::harness::Machine, epochs: u64, work_mib: u64) -> Result<Seen> {
    let progress = bar(epochs, "checkpoints committed")?;
    // (epoch, count): every checkpoint after the one that follows `epoch` was taken when the guest had written at least `count`.
    let mut bounds: Vec<(u64, u64)> = Vec::new();
    let seen = wait_for("checkpoints to be committed", || {
        let count = counter(&machine.console()?, "writes").unwrap_or(0);
        let status = cluster.status(VM, &machine.run_dir)?;
        if matches!(
            status["state"].as_str(),
            Some("fenced" | "failed" | "ended" | "stopped")
        ) {
            bail!("the guest is {}: {}", status["state"], status["reason"]);
        }
        bounds.push((epoch(&status["newest"]["name"]), count));
        let committed = epoch(&status["committed"]);
        progress.set_position(committed.min(epochs));
        let filled = machine.console()?.contains("churn filled");
        let at = bounds
            .iter()
            .rev()
            // One may have been on its way to the store when that was seen.
            .find(|(epoch, _)| *epoch + 1 < committed)
            .map_or(0, |(_, count)| *count);
        Ok((committed >= epochs && filled && at > 0).then(|| Seen {
            work_mib,
            epochs: committed,
            committed: status["committed"].as_str().unwrap_or_default().to_owned(),
            committed_at: at,
            raw: status["raw_bytes"].as_u64().unwrap_or(0),
            shipped: status["shipped_bytes"].as_u64().unwrap_or(0),
        }))
    })?;
    progress.finish();
    Ok(seen)
}

/// Follows the successor until it has checked all of its memory once more.
fn go_on(
    cluster: &Cluster,
    successor: &crate::harness::Machine,
    seen: &Seen,
    last_words: &str,
    killed_at: u64,
    running_ms: f64,
) -> Result<Figures> {
    let pages = seen.work_mib << 8;
    let progress = bar(pages, "pages checked since")?;
    let (first, last) = wait_for("the guest to check its memory", || {
        let console = successor.console().unwrap_or_default();
        let (Some(first), Some(now)) = (first_counter(&console, "verified"), counter(&console, "verified"))
        else {
            return Ok(None);
        };
        progress.set_position((now - first).min(pages));
        Ok((now - first >= pages).then_some((console.clone(), console)))
    })?;
    progress.finish();
    let resumed_from = first_counter(&first, "writes").context("no heartbeat after the takeover")?;
    let now = counter(&last, "writes").context("no heartbeat after the takeover")?;
    let bad = counter(&last, "bad").context("no count of bad pages")?;
    let spoken = [last_words, &last]
        .iter()
        .flat_map(|text| text.lines())
        .filter(|line| line.starts_with("BAD"))
        .count();
    let bad_pages = bad.max(spoken as u64);
    let status = cluster.status(VM, &successor.run_dir)?;
    say(format!(
        "     first heard again at {resumed_from} pages written, {now} by now; {bad_pages} bad pages"
    ));
    match status["committed"].as_str() {
        Some(committed) => say(format!(
            "     it is protected again: {} checkpoints since, last committed {committed}",
            status["checkpoints"]
        )),
        None => say("     its holders are gone: it is protected again when they are back"),
    }
    say(format!(
        "     {} of changed pages became {} on the wire to two holders",
        ByteSize(seen.raw).display().iec(),
        ByteSize(seen.shipped).display().iec()
    ));
    if resumed_from < seen.committed_at {
        bail!(
            "the guest went back to {resumed_from}, behind {} of committed checkpoint {}",
            seen.committed_at,
            seen.committed
        );
    }
    if bad_pages > 0 {
        bail!("the guest found {bad_pages} bad pages");
    }
    Ok(Figures {
        epochs_committed: seen.epochs,
        killed_at_count: killed_at,
        committed_at_count: seen.committed_at,
        resumed_from_count: resumed_from,
        bad_pages,
        promote_to_running_ms: running_ms,
        auto: None,
        cluster: None,
        bytes_raw: seen.raw,
        bytes_shipped: seen.shipped,
    })
}

fn write(path: &Path, figures: &Figures) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let text = serde_json::to_string_pretty(figures)?;
    std::fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))?;
    say(format!("     figures: {}", path.display()));
    Ok(())
}

fn farewell(cluster: &Cluster, folder: &Path, agent: usize) {
    let agent = &cluster.agents[agent];
    let run = agent.data.join("run");
    let vmm = cluster.binaries.vmm.display();
    let standby = cluster.binaries.standby.display();
    say(format!("\nEverything is still running, in {}:", folder.display()));
    say(format!("  {vmm} ps --run-dir {}", run.display()));
    say(format!("  {vmm} console --run-dir {} {VM}", run.display()));
    say(format!("  {standby} ls --agent {}", agent.address));
    say(format!("  {vmm} stop --run-dir {} {VM}", run.display()));
    say(format!(
        "To end the agents (and hosts, with all that runs on them): kill -9 {}",
        cluster.agent_pids().join(" ")
    ));
}
