//! Commands about the cluster: `explain`, `history`, `drill`, `drain`, `join`, `leave`.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use segment::VmId;
use serde_json::json;

use super::{Agency, CliError, connect, print, print_json};
use crate::agent::drill::{DRILL_FAILED, DRILLED};
use crate::agent::view;
use crate::placement::{self, Placing, Policy, Verdict, Watched};
use crate::registry::{HistoryEntry, NodeRecord, Registry, VmRecord};
use crate::wire::{Call, DrillCall, Reply};

/// How long a copy may take to run, beside the time it is watched.
const DRILL_DEADLINE: Duration = Duration::from_secs(300);
/// How often a drain that is waited for is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The registry that the agent belongs to.
async fn registry(agent: &Agency) -> Result<Registry, CliError> {
    let client = connect(agent).await?;
    let at = client.welcome().registry.clone();
    Ok(Registry::remote(
        at.as_deref().unwrap_or(&agent.address),
        &agent.identity,
    ))
}

#[derive(Debug, Args)]
pub(super) struct Explain {
    /// The VM.
    vm: VmId,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl Explain {
    pub(super) async fn run(self, agent: &Agency) -> Result<(), CliError> {
        let registry = registry(agent).await?;
        let vm = registry.get_vm(&self.vm).await?;
        let nodes = registry.all_nodes().await?;
        let policy = match &vm.policy {
            Some(policy) => policy.clone(),
            None => Policy {
                ack_quorum: vm.ack_quorum,
                ..Policy::of(vm.holders.len() as u32)
            },
        };
        let placing = Placing {
            vm: &vm.vm,
            policy: &policy,
            owner: &vm.owner,
            held: &vm.holders,
        };
        let placement = placement::place(&placing, &nodes);
        // For how long a node is gone is known to those who watch: here it has just gone.
        let watched: Vec<_> = nodes.into_iter().map(Watched::at_first_sight).collect();
        let verdict = match placement::repair(&vm, &watched, Duration::MAX) {
            Verdict::Right => "its holders are as they should be".to_owned(),
            Verdict::Wait(why) => format!("waiting: {why}"),
            Verdict::Short(why) => format!("it lacks a holder: {why}"),
            Verdict::GiveUp(why) => format!("a change is about to be given up: {why}"),
            Verdict::Repair(repair) => format!("{} is about to join: {}", repair.swap.joining, repair.why),
        };
        if self.json {
            return print_json(&json!({
                "vm": vm, "policy": vm.policy, "owner_lease": vm.owner_lease(), "placement": placement,
                "verdict": verdict,
            }));
        }
        let by = match &vm.policy {
            Some(policy) => format!("by policy: {policy}"),
            None => "named by a person, and left as they are until one is drained".to_owned(),
        };
        let mut out = format!(
            "{} is {} on {} under generation {}; its owner's lease: {}\nholders {}\n",
            vm.vm,
            vm.state,
            vm.owner,
            vm.generation,
            vm.owner_lease(),
            by
        );
        for choice in &placement.chosen {
            let mark = if choice.held { "holds" } else { "would" };
            out += &format!(
                "  {mark}  {} at {}: {}\n",
                choice.node, choice.address, choice.why
            );
        }
        for refusal in &placement.refused {
            let mark = if refusal.held { "holds, should not" } else { "not" };
            out += &format!("  {mark}  {}: {}\n", refusal.node, refusal.why);
        }
        print(&format!("{out}{verdict}"));
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(super) struct Drill {
    /// The VM.
    vm: VmId,
    /// For how long the copy has to be seen to run.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    watch: humantime::Duration,
    /// Run nothing: only tell how the last drill at each node went. Status 1 when one failed.
    #[arg(long, conflicts_with = "watch")]
    last: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl Drill {
    /// `--last`.
    async fn last(&self, agent: &Agency) -> Result<(), CliError> {
        let history = registry(agent).await?.history(&self.vm).await?;
        let mut newest: BTreeMap<String, HistoryEntry> = BTreeMap::new();
        let drills = |entry: &HistoryEntry| entry.event == DRILLED || entry.event == DRILL_FAILED;
        // Oldest first.
        for entry in history.into_iter().filter(drills) {
            newest.insert(entry.node.clone(), entry);
        }
        let newest: Vec<HistoryEntry> = newest.into_values().collect();
        match self.json {
            true => print_json(&newest)?,
            false if newest.is_empty() => print(&format!(
                "{} was not drilled yet: `standby drill {0}`, or `standby serve --drill-every 24h`",
                self.vm
            )),
            false => print(&view::history(&self.vm, &newest)),
        }
        let failed = newest.iter().filter(|entry| entry.event == DRILL_FAILED);
        let nodes: Vec<String> = failed.map(|entry| entry.node.clone()).collect();
        if nodes.is_empty() {
            return Ok(());
        }
        Err(CliError::DrillFailed {
            vm: self.vm.clone(),
            nodes: nodes.join(", "),
        })
    }

    pub(super) async fn run(self, agent: &Agency) -> Result<(), CliError> {
        if self.last {
            return self.last(agent).await;
        }
        let watch: Duration = self.watch.into();
        let call = Call::Drill(DrillCall {
            vm: self.vm.clone(),
            watch_ms: u64::try_from(watch.as_millis()).unwrap_or(u64::MAX),
        });
        let mut client = connect(agent).await?;
        let report = match client.call(call, DRILL_DEADLINE.saturating_add(watch)).await? {
            Reply::Drilled(report) => report,
            _ => return Err(CliError::Mismatch),
        };
        if self.json {
            return print_json(&report);
        }
        print(&format!(
            "a copy of {} ran {} ms after the word, for {:.1} s; its state was {:.1} s old. It is ended, and nothing of it is left",
            report.segment.name,
            report.recovery_us / 1000,
            report.watched_ms as f64 / 1000.0,
            report.age_ms as f64 / 1000.0
        ));
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(super) struct History {
    /// The VM.
    vm: VmId,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl History {
    pub(super) async fn run(self, agent: &Agency) -> Result<(), CliError> {
        let history = registry(agent).await?.history(&self.vm).await?;
        match self.json {
            true => print_json(&history),
            false => {
                print(&view::history(&self.vm, &history));
                Ok(())
            }
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct Drain {
    /// The node.
    node: String,
    /// Return only when it holds nothing any more.
    #[arg(long)]
    wait: bool,
}

impl Drain {
    pub(super) async fn run(self, agent: &Agency) -> Result<(), CliError> {
        let registry = registry(agent).await?;
        let node = registry.set_draining(&self.node, true).await?;
        let mut last = None;
        loop {
            let held = held_at(&registry, &node).await?;
            if held.is_empty() {
                print(&format!(
                    "{0} holds no VM any more: it can leave by `standby leave {0}`, or join again by `standby join {0}`",
                    self.node
                ));
                return Ok(());
            }
            if last != Some(held.len()) {
                let some: Vec<_> = held.iter().take(5).map(describe).collect();
                print(&format!(
                    "{} is drained: it gets no new VM, and {} are to be copied to others ({}{})",
                    self.node,
                    held.len(),
                    some.join("; "),
                    if held.len() > some.len() { "; .." } else { "" }
                ));
                last = Some(held.len());
            }
            if !self.wait {
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

fn describe(vm: &VmRecord) -> String {
    match &vm.swap {
        Some(swap) => format!("{}, {} joins", vm.vm, swap.joining),
        None => format!("{}, {}", vm.vm, vm.state),
    }
}

async fn held_at(registry: &Registry, node: &NodeRecord) -> Result<Vec<VmRecord>, CliError> {
    let vms = registry.all_vms().await?.into_iter();
    Ok(vms.filter(|vm| vm.holders.contains(&node.address)).collect())
}

#[derive(Debug, Args)]
pub(super) struct Join {
    /// The node.
    node: String,
}

impl Join {
    pub(super) async fn run(self, agent: &Agency) -> Result<(), CliError> {
        registry(agent).await?.set_draining(&self.node, false).await?;
        print(&format!("{} takes VMs again", self.node));
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(super) struct Leave {
    /// The node.
    node: String,
    /// Also when VMs still name it as a holder: for a node that is gone for good.
    #[arg(long)]
    force: bool,
}

impl Leave {
    pub(super) async fn run(self, agent: &Agency) -> Result<(), CliError> {
        registry(agent).await?.leave_node(&self.node, self.force).await?;
        print(&format!(
            "{} is no node of the cluster any more: stop its agent, or it joins again",
            self.node
        ));
        Ok(())
    }
}
