//! The same without anyone's help: the owner's host dies, and another host notices and takes the VM over.
//!
//! Each host is a namespace of processes: nobody on another host can look at the owner's process, and all that ran on a
//! host is gone at once. What is measured is measured by this machine's one clock.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{AutoFigures, Figures, ORDINARY, Options, SLOW, VM, go_on, say, watch};
use crate::harness::{Cluster, counter, run_json, wait_for};

fn unix() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Tells the story; the figures, and the number of the agent where the guest runs.
pub(super) fn tell(options: &Options, cluster: &mut Cluster) -> Result<(Figures, usize)> {
    say("1/6  Three hosts (namespaces of processes), an agent on each; alder keeps the registry.");
    let mut owner = 0;
    for name in ["alder", "birch", "elm"] {
        let (agent, host) = cluster.start_host(name, &[])?;
        say(format!(
            "     {name} listens on {}",
            cluster.agents[agent].address
        ));
        owner = host;
    }
    let (memory_mib, work_mib, rate) = if options.slow { SLOW } else { ORDINARY };
    say(format!(
        "2/6  On elm, a guest of {memory_mib} MiB that writes {work_mib} MiB of stamped pages and checks them all along."
    ));
    let registry = cluster.agents[0].address.clone();
    let (memory, work) = (
        format!("{memory_mib}M"),
        format!("mib={work_mib} rate={rate} verify=4 heartbeat_ms=20"),
    );
    let protect = [
        "--memory",
        &memory,
        "--protect",
        "--replicas",
        "2",
        "--registry",
        &registry,
        "--every",
        "200ms",
        "--failover",
        "auto",
        "--detect",
        &options.detect,
    ];
    let machine = cluster.launch_on(Some(owner), VM, "churn", &work, &protect)?;
    say(format!(
        "     vmm run --name {VM} --protect --replicas 2 --registry {registry} --failover auto --detect {}",
        options.detect
    ));
    let explained = run_json(cluster.standby(0).args(["explain", VM, "--json"]))?;
    let holders = explained["vm"]["holders"]
        .as_array()
        .context("the VM has no holders")?;
    for holder in holders {
        say(format!(
            "     a holder was chosen: {}",
            holder.as_str().unwrap_or("?")
        ));
    }
    say(
        "3/6  It is checkpointed every 200 ms, and runs under a lease that its holders and the registry renew.",
    );
    let seen = watch(cluster, &machine, options.epochs, work_mib)?;

    say("4/6  elm loses its power: its agent, the monitor and the guest are gone at once. Nobody is told.");
    let (killed, killed_unix) = (Instant::now(), unix());
    cluster.kill_host(owner)?;
    let last_words = machine.console()?;
    let killed_at = counter(&last_words, "writes").context("the guest never said how much it had written")?;

    say("5/6  The others notice, each by itself, and the better candidate takes over.");
    let taken = wait_for("the VM to be taken over", || {
        let history = history(cluster)?;
        let failed = history.iter().find(|e| e["event"] == "not-taken-over");
        if let Some(failed) = failed {
            bail!("{}: {}", failed["node"], failed["detail"]);
        }
        Ok(history.into_iter().find(|e| e["event"] == "taken-over"))
    })?;
    let node = taken["node"].as_str().context("nobody took it over")?.to_owned();
    let agent = cluster
        .agents
        .iter()
        .position(|a| a.name == node)
        .with_context(|| format!("{node} is no agent of this demo"))?;
    let successor = cluster.found(VM, agent);
    let total = wait_for("the guest to be heard elsewhere", || {
        let console = successor.console().unwrap_or_default();
        Ok(counter(&console, "writes").map(|_| killed.elapsed()))
    })?;
    let history = history(cluster)?;
    let lost = history
        .iter()
        .find(|e| e["event"] == "owner-lost" && e["node"] == node.as_str())
        .context("the history does not say why")?;
    let since = |entry: &Value| -> Result<f64> {
        let at = entry["at_unix_ms"].as_u64().context("an entry without a time")?;
        Ok(at as f64 - killed_unix.as_secs_f64() * 1000.0)
    };
    let (detection_ms, running_ms) = (since(lost)?, since(&taken)?);
    let auto = AutoFigures {
        detection_ms,
        takeover_ms: running_ms - detection_ms,
        total_ms: total.as_secs_f64() * 1000.0,
        cause: lost["detail"].as_str().unwrap_or("?").to_owned(),
        node: node.clone(),
    };
    say(format!("     standby history {VM}:"));
    for entry in &history {
        say(format!(
            "     {:>8.0} ms  {:<8} {:<12} {}",
            since(entry)?,
            entry["node"].as_str().unwrap_or("?"),
            entry["event"].as_str().unwrap_or("?"),
            entry["detail"].as_str().unwrap_or("?")
        ));
    }
    say(format!(
        "6/6  The guest goes on at {node}, and checks every page it has."
    ));
    let mut figures = go_on(
        cluster,
        &successor,
        &seen,
        &last_words,
        killed_at,
        auto.takeover_ms,
    )?;
    say(format!(
        "     detected after {:.0} ms, taken over in {:.0} ms; {:.0} ms from the death of its host to the guest's next \
         words",
        auto.detection_ms, auto.takeover_ms, auto.total_ms
    ));
    figures.auto = Some(auto);
    Ok((figures, agent))
}

fn history(cluster: &Cluster) -> Result<Vec<Value>> {
    let answer = run_json(cluster.standby(0).args(["history", VM, "--json"]))?;
    answer.as_array().cloned().context("the history is no list")
}
