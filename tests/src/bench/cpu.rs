//! What the second and third holder cost the owner's host: its process's CPU time for a checkpoint, beside that with one.
//!
//! ```text
//! vmm run --protect-to A        utime + stime of /proc/PID/stat, over a stretch of time  --\
//! vmm run --protect-to A,B,C    the same; the agents are processes of their own          ---+--> ratio of a round
//! ```
//!
//! A checkpoint is encoded and written once; what each holder costs is reading it back, TLS and the socket. The time that
//! the guest itself computes is in both. Rounds alternate which comes first.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::lab::Lab;
use super::row::Row;
use super::stats::Samples;
use crate::harness::{Cluster, Machine, wait_for};

const NAME: &str = "ship.cpu_ratio";
const TARGET: f64 = 1.15;
/// Page writes of the guest a second.
const RATES: [u64; 2] = [1_000, 10_000];
const HOLDERS: usize = 3;
const EVERY: &str = "100ms";
const MEMORY: &str = "128M";
const WRITTEN_MIB: u64 = 64;
/// So many checkpoints are committed before it is counted.
const SETTLED: u64 = 10;

/// CPU time of a process, in seconds.
#[derive(Debug, Clone, Copy)]
struct Spent {
    all: f64,
    /// Of that: a guest's instructions.
    guest: f64,
}

/// What a checkpoint cost.
#[derive(Debug, Clone, Copy)]
struct Cost {
    cpu_ms: f64,
    guest_ms: f64,
    bytes: f64,
}

pub(crate) fn measure(lab: &Lab) -> Result<Vec<Row>> {
    let folder = lab.temporary("cpu-")?;
    let mut cluster = Cluster::new(folder.path(), false)?;
    for name in ["first", "second", "third"] {
        cluster.start_agent(name, &[])?;
    }
    RATES
        .iter()
        .map(|rate| at_rate(lab, &mut cluster, *rate))
        .collect()
}

fn at_rate(lab: &Lab, cluster: &mut Cluster, rate: u64) -> Result<Row> {
    lab.say(format!("  at {rate} page writes a second"));
    let (mut ratios, mut hosts) = (Samples::default(), Samples::default());
    let (mut one, mut three) = (Samples::default(), Samples::default());
    let (mut guest, mut bytes) = (Samples::default(), Samples::default());
    for round in 0..=lab.samples(7, 1) {
        let mut costs = [1, HOLDERS];
        if round % 2 == 1 {
            costs.reverse();
        }
        let [a, b] = costs;
        let costs = [
            cost(lab, cluster, rate, a, round)?,
            cost(lab, cluster, rate, b, round)?,
        ];
        let [alone, all] = if a == 1 { costs } else { [costs[1], costs[0]] };
        // The first brings the files into the page cache.
        if round > 0 || lab.quick() {
            ratios.push(all.cpu_ms / alone.cpu_ms);
            hosts.push((all.cpu_ms - all.guest_ms) / (alone.cpu_ms - alone.guest_ms));
            one.push(alone.cpu_ms);
            three.push(all.cpu_ms);
            guest.push(alone.guest_ms);
            bytes.push(alone.bytes);
        }
    }
    let row = Row::new(NAME, "times one holder's", &ratios)?
        .limit(1.0, "encoded once, and sending it costs nothing")
        .at_most(TARGET)
        .param("holders", HOLDERS)
        .param("pages_a_second", rate)
        .param("every", EVERY)
        .param("tls", true)
        .seen("segment_bytes", bytes.median())
        .seen("one_ms_a_checkpoint", one.median())
        .seen("three_ms_a_checkpoint", three.median())
        .seen("of_that_the_guest_ms", guest.median())
        .seen("without_the_guest", hosts.median());
    Ok(row)
}

/// Runs a guest that ships to the first of the agents, and counts what its process takes.
fn cost(lab: &Lab, cluster: &mut Cluster, rate: u64, holders: usize, round: usize) -> Result<Cost> {
    let to: Vec<_> = cluster.agents.iter().map(|agent| agent.address.clone()).collect();
    let to = to[..holders].join(",");
    let name = format!("cpu-{rate}-{holders}-{round}");
    let work = format!("mib={WRITTEN_MIB} rate={rate} heartbeat_ms=1000");
    let more = ["--memory", MEMORY, "--protect-to", &to, "--every", EVERY];
    let mut machine = cluster.launch(&name, "churn", &work, &more)?;
    let cost = count(lab, cluster, &machine);
    machine.kill()?;
    cost
}

fn count(lab: &Lab, cluster: &Cluster, machine: &Machine) -> Result<Cost> {
    wait_for("the guest to fill its memory", || {
        Ok(machine.console()?.contains("churn filled").then_some(()))
    })?;
    let first = cluster.committed(machine, 1)?;
    cluster.committed(machine, first + SETTLED)?;
    let before = counted(cluster, machine)?;
    std::thread::sleep(lab.stretch() * 4);
    let after = counted(cluster, machine)?;
    let grown = |key: &str| {
        let number = |status: &Value| {
            status[key]
                .as_u64()
                .with_context(|| format!("no {key} in the status"))
        };
        Ok::<_, anyhow::Error>((number(&after.1)? - number(&before.1)?) as f64)
    };
    let checkpoints = grown("checkpoints")?;
    ensure!(checkpoints > 0.0, "no checkpoint was taken");
    Ok(Cost {
        cpu_ms: (after.0.all - before.0.all) * 1e3 / checkpoints,
        guest_ms: (after.0.guest - before.0.guest) * 1e3 / checkpoints,
        bytes: grown("stored_bytes")? / checkpoints,
    })
}

/// What was spent until all holders keep up: what they are behind with would not be counted.
fn counted(cluster: &Cluster, machine: &Machine) -> Result<(Spent, Value)> {
    wait_for("all holders to keep up", || {
        let status = cluster.status(&machine.name, &machine.run_dir)?;
        if !keep_up(&status) {
            return Ok(None);
        }
        Ok(Some((spent(machine.pid)?, status)))
    })
}

/// Whether no holder lacks more than what is on its way.
fn keep_up(status: &Value) -> bool {
    let holders = status["protection"]["holders"].as_array();
    holders.is_some_and(|all| {
        all.iter()
            .all(|h| h["lag_epochs"].as_u64().is_some_and(|lag| lag <= 3))
    })
}

fn spent(pid: u32) -> Result<Spent> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    spent_in(&text, ticks).with_context(|| format!("{path} has no CPU time"))
}

/// proc_pid_stat(5): user and system time are fields 14 and 15, the guests' is 43; the name in field 2 may have blanks.
fn spent_in(stat: &str, ticks_a_second: f64) -> Option<Spent> {
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let seconds = |field: usize| Some(fields.get(field - 3)?.parse::<f64>().ok()? / ticks_a_second);
    Some(Spent {
        all: seconds(14)? + seconds(15)?,
        guest: seconds(43)?,
    })
}

#[cfg(test)]
mod tests {
    use super::spent_in;

    #[test]
    fn times_are_found_behind_any_name() {
        let numbers: Vec<_> = (4..=52).map(|field| field.to_string()).collect();
        let spent = spent_in(&format!("17 (a) b) S {}\n", numbers.join(" ")), 100.0).expect("a whole line");
        assert!(
            (spent.all - 0.29).abs() < 1e-9 && (spent.guest - 0.43).abs() < 1e-9,
            "{spent:?}"
        );
        assert!(spent_in("17 (a) S 1 2", 100.0).is_none());
    }
}
