//! Commands about what a store keeps: `keep`, `fold`, `verify`.

use std::time::Duration;

use clap::Args;
use segment::{Epoch, Generation, SegmentName, VmId};

use super::{Agency, CliError, connect, print, print_json};
use crate::agent::view;
use crate::store::KeepPolicy;
use crate::transport::CallError;
use crate::wire::{Call, Failure, FoldCall, KeepCall, Reply, VerifyCall};

/// How long an agent may read and write: a store can be large, and the agent says all the while that it lives.
const WORK_DEADLINE: Duration = Duration::from_secs(7 * 24 * 3600);

#[derive(Debug, Args)]
pub(super) struct Keep {
    /// The VM.
    vm: VmId,
    /// Like last=50,hourly=24,daily=7 (also weekly, monthly, yearly); `all`; or `default` for the agent's own [default:
    /// only show what holds].
    policy: Option<String>,
    /// Only at this agent, and not at the VM's other holders.
    #[arg(long)]
    only_here: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl Keep {
    pub(super) async fn run(self, agent: &Agency) -> Result<(), CliError> {
        // Here already: the words are better beside the command line.
        if let Some(policy) = self.policy.as_deref().filter(|policy| *policy != "default")
            && let Err(error) = policy.parse::<KeepPolicy>()
        {
            return Err(CliError::Call(CallError::Failed(Failure {
                why: error.to_string(),
            })));
        }
        let mut client = connect(agent).await?;
        let call = KeepCall {
            vm: self.vm.clone(),
            policy: self.policy,
            only_here: self.only_here,
        };
        // It asks the other holders in turn.
        let Reply::Kept(report) = client.call(Call::Keep(call), WORK_DEADLINE).await? else {
            return Err(CliError::Mismatch);
        };
        match self.json {
            true => print_json(&report)?,
            false => print(&view::kept(&self.vm, &report)),
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(super) struct Fold {
    /// The VM.
    vm: VmId,
    /// Which restore point, EPOCH or GENERATION/EPOCH [default: the newest complete one].
    epoch: Option<String>,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl Fold {
    pub(super) async fn run(self, agent: &Agency) -> Result<(), CliError> {
        let mut client = connect(agent).await?;
        let tip = match &self.epoch {
            None => None,
            Some(text) => Some(find(&mut client, &self.vm, text).await?),
        };
        let call = FoldCall { vm: self.vm, tip };
        let Reply::Folded(report) = client.call(Call::Fold(call), WORK_DEADLINE).await? else {
            return Err(CliError::Mismatch);
        };
        match self.json {
            true => print_json(&report)?,
            false => print(&view::folded(&report)),
        }
        Ok(())
    }
}

/// The restore point that `text` names: `G/E`, or `E` of the newest generation that has it.
async fn find(client: &mut crate::transport::Client, vm: &VmId, text: &str) -> Result<SegmentName, CliError> {
    let refuse = |why: String| CliError::Call(CallError::Failed(Failure { why }));
    let bad = || {
        refuse(format!(
            "{text:?} is no restore point: write EPOCH or GENERATION/EPOCH"
        ))
    };
    let number = |text: &str| text.parse::<u64>().map_err(|_| bad());
    let (generation, epoch) = match text.split_once('/') {
        Some((generation, epoch)) => (Some(Generation(number(generation)?)), Epoch(number(epoch)?)),
        None => (None, Epoch(number(text)?)),
    };
    let segments = super::list(client, Some(vm.clone())).await?;
    segments
        .into_iter()
        .map(|segment| segment.name)
        .filter(|name| name.epoch == epoch && generation.is_none_or(|g| name.generation == g))
        .max()
        .ok_or_else(|| {
            refuse(format!(
                "no restore point {text} of VM {vm} is held there: see `standby ls {vm}`"
            ))
        })
}

#[derive(Debug, Args)]
pub(super) struct Verify {
    /// Only this VM's segments [default: all].
    vm: Option<VmId>,
    /// Only so many segments, chosen at random.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    sample: Option<u32>,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl Verify {
    pub(super) async fn run(self, agent: &Agency) -> Result<(), CliError> {
        let mut client = connect(agent).await?;
        let call = VerifyCall {
            vm: self.vm,
            sample: self.sample,
        };
        let Reply::Verified(report) = client.call(Call::Verify(call), WORK_DEADLINE).await? else {
            return Err(CliError::Mismatch);
        };
        match self.json {
            true => print_json(&report)?,
            false => print(&view::verified(&report)),
        }
        match report.bad - report.repaired {
            0 => Ok(()),
            bad => Err(CliError::Damaged { bad }),
        }
    }
}
