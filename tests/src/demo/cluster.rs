//! A whole cluster: nodes that are chosen, one of them lost and replaced, and a guest that outlives all that held it.
//!
//! ```text
//! etcd of three members    an S3 server    alder, birch: run and store    cedar: stores only    oak: runs the guest
//! ```

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;

use super::{Figures, ORDINARY, Options, SLOW, VM, go_on, promoted, say, watch};
use crate::etcd::Etcd;
use crate::harness::{Cluster, counter, epoch, run, run_json, wait_for};
use crate::s3::{Keys, S3};

const BUCKET: &str = "s3://understudy/demo";
/// How soon a node counts as gone, and is replaced.
const HASTY: [&str; 4] = ["--lease", "2s", "--replace-after", "1s"];

/// The figures of a cluster.
#[derive(Debug, Clone, Serialize)]
pub struct ClusterFigures {
    /// From the death of a holder until another had all that is committed, and counted.
    pub replaced_ms: f64,
    /// Restore points in the bucket at the end, and the bytes of the newest one's chain.
    pub points: u64,
    /// Bytes of the newest one's chain.
    pub newest_bytes: u64,
    /// From the command to the first words of a copy that is read where it is.
    pub copy_ms: f64,
    /// Where the guest runs at the end, which held nothing of it.
    pub node: String,
}

/// What lives as long as the cluster.
pub(super) struct Servers {
    _etcd: Etcd,
    _s3: S3,
}

fn explain(cluster: &Cluster, agent: usize) -> Result<Value> {
    run_json(cluster.standby(agent).args(["explain", VM, "--json"]))
}

fn holders(explained: &Value) -> Vec<String> {
    let list = explained["vm"]["holders"].as_array();
    list.into_iter()
        .flatten()
        .filter_map(|holder| holder.as_str().map(str::to_owned))
        .collect()
}

/// Tells the story; the figures, the number of the agent where the guest runs, and what has to live on.
pub(super) fn tell(options: &Options, cluster: &mut Cluster) -> Result<(Figures, usize, Servers)> {
    let (etcd, s3) = (Etcd::start(3), S3::start());
    s3.make_bucket("understudy");
    let keys = cluster.folder().join("credentials");
    Keys::any().write(&keys);
    let (keys, endpoint) = (keys.display().to_string(), s3.endpoint());
    let reach = ["--global-endpoint", &endpoint, "--global-credentials", &keys];
    let registry = etcd.registry_addr("demo").to_string();
    say(format!(
        "1/8  The registry is an etcd of three members; committed checkpoints also go to {BUCKET} at {endpoint}."
    ));
    cluster.use_registry(&registry);
    // A certificate without the role execute: it cannot run a VM.
    cluster.issue("cedar", "store")?;
    let labels = ["rack=1", "rack=2", "rack=3"];
    for (name, label) in ["alder", "birch", "cedar"].into_iter().zip(labels) {
        let mut more = vec!["--global", BUCKET, "--global-every", "500ms", "--label", label];
        more.extend(reach.iter().chain(&HASTY));
        let agent = cluster.start_agent(name, &more)?;
        let does = if name == "cedar" {
            "stores only"
        } else {
            "runs VMs and stores"
        };
        say(format!(
            "     {name} ({label}) {does}, at {}",
            cluster.agents[agent].address
        ));
    }

    let (memory_mib, work_mib, rate) = if options.slow { SLOW } else { ORDINARY };
    say(format!(
        "2/8  On oak, a guest of {memory_mib} MiB that writes {work_mib} MiB of stamped pages; two holders are chosen, on two \
         racks."
    ));
    // Each of them answers for the registry, so that it is none's death that takes it away.
    let all: Vec<_> = cluster.agents.iter().map(|agent| agent.address.clone()).collect();
    let any = all.join(",");
    let (memory, work) = (
        format!("{memory_mib}M"),
        format!("mib={work_mib} rate={rate} verify=4 heartbeat_ms=100"),
    );
    let protect = [
        "--memory",
        &memory,
        "--protect",
        "--replicas",
        "2",
        "--spread",
        "rack",
        "--registry",
        &any,
        "--every",
        "200ms",
    ];
    let mut machine = cluster.launch(VM, "churn", &work, &protect)?;
    for line in run(cluster.standby(0).args(["explain", VM]))?.lines() {
        say(format!("     {line}"));
    }

    say("3/8  It is checkpointed every 200 ms; the newest committed one goes to the bucket twice a second.");
    watch(cluster, &machine, options.epochs, work_mib)?;

    // One that can run a guest, so that it can take this one over at the end.
    let first = holders(&explain(cluster, 0)?);
    let lost = (0..2)
        .find(|i| first.contains(&cluster.agents[*i].address))
        .context("no node that can run a VM holds it")?;
    let other = 1 - lost;
    let (lost_at, lost_name) = (
        cluster.agents[lost].address.clone(),
        cluster.agents[lost].name.clone(),
    );
    say(format!(
        "4/8  {lost_name} dies, and its disk with it. Another takes its place:"
    ));
    let died = Instant::now();
    cluster.kill_agent(lost)?;
    fs::remove_dir_all(&cluster.agents[lost].data).context("remove the lost node's data")?;
    let second = wait_for("the lost holder to be replaced", || {
        let explained = explain(cluster, other)?;
        let now = holders(&explained);
        let settled = explained["vm"]["swap"].is_null() && now.len() == 2 && !now.contains(&lost_at);
        Ok(settled.then_some(now))
    })?;
    let replaced_ms = died.elapsed().as_secs_f64() * 1000.0;
    say(format!(
        "     after {replaced_ms:.0} ms the holders are {}, and have all that is committed",
        second.join(" and ")
    ));
    // It comes back as a new node of that name, with nothing.
    cluster.restart_emptied(lost)?;
    let seen = watch(cluster, &machine, options.epochs, work_mib)?;

    say(format!(
        "5/8  A copy on a host that has nothing, read from the bucket where it is: vmm restore {VM} --from {BUCKET}"
    ));
    let copy_ms = copy(cluster, &reach)?;
    say(format!(
        "     it was heard {copy_ms:.0} ms after the word was given; it is ended again"
    ));

    say(
        "6/8  oak dies: SIGKILL to the monitor. The holders bring the last committed checkpoint to the bucket.",
    );
    machine.kill()?;
    let last_words = machine.console()?;
    let killed_at = counter(&last_words, "writes").context("the guest never said how much it had written")?;
    let (points, newest_bytes) = wait_for("the last checkpoint to be in the bucket", || {
        let listed = run_json(cluster.standby(other).args(["ls", VM, "--global", "--json"]))?;
        let list = listed.as_array().context("no list of restore points")?;
        let Some(newest) = list.last() else {
            return Ok(None);
        };
        let committed = epoch(&explain(cluster, other)?["vm"]["newest"]["name"]);
        let there = committed > 0 && epoch(&newest["name"]) >= committed;
        Ok(there.then(|| (list.len() as u64, newest["bytes"].as_u64().unwrap_or(0))))
    })?;
    say(format!("     {points} restore points are there"));

    say("7/8  Both holders die too. Nobody is left that has anything of it.");
    for agent in (0..3).filter(|agent| *agent != lost) {
        cluster.kill_agent(agent)?;
    }
    let refused = cluster.standby(lost).args(["promote", VM]).output()?;
    if refused.status.success() {
        bail!("a promote without holders went on without being told to");
    }
    say(
        "     standby promote demo: refused, too few holders answer to fence its owner. oak is off for certain, so:",
    );
    let report = run_json(cluster.standby(lost).args(["promote", VM, "--force", "--json"]))?;
    let (running_ms, pid) = promoted(&report)?;
    say(format!(
        "     standby promote demo --force: {} from the bucket, running at {lost_name} after {running_ms:.0} ms",
        report["resumed_from"].as_str().unwrap_or("?")
    ));
    let successor = cluster.adopt(VM, lost, pid);
    say("8/8  The guest goes on, and checks every page it has.");
    let figures = go_on(cluster, &successor, &seen, &last_words, killed_at, running_ms);
    cluster.own(successor);
    let mut figures = figures?;
    figures.cluster = Some(ClusterFigures {
        replaced_ms,
        points,
        newest_bytes,
        copy_ms,
        node: lost_name,
    });
    Ok((figures, lost, Servers { _etcd: etcd, _s3: s3 }))
}

/// Restores a copy from the bucket, and ends it when it was heard; how long that took.
fn copy(cluster: &Cluster, reach: &[&str]) -> Result<f64> {
    let run_dir = cluster.folder().join("copy-run");
    let console = cluster.folder().join("copy.console");
    let start = Instant::now();
    run(cluster
        .vmm("restore", &run_dir)
        .args([VM, "--from", BUCKET, "--name", "copy", "--detach"])
        .args(reach)
        .arg("--store")
        .arg(cluster.folder().join("copy"))
        .arg("--console-log")
        .arg(&console))?;
    wait_for("the copy to be heard", || {
        let text = fs::read_to_string(&console).unwrap_or_default();
        if text.contains("BAD") {
            bail!("the copy found damage: {text}");
        }
        Ok(counter(&text, "writes"))
    })?;
    let took = start.elapsed().as_secs_f64() * 1000.0;
    run(cluster.vmm("stop", &run_dir).arg("copy"))?;
    Ok(took)
}
