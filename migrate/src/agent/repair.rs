//! Looks after the holders of VMs: a holder that is gone for too long, or is drained, is replaced.
//!
//! ```text
//!   nodes, VMs (registry) -> placement::repair -> who joins copies what others have -> the change is proposed
//!                                                                                       |
//!                                             the VM's owner ships to who joins, and sets the new holders
//! ```
//!
//! One agent looks after a VM, the first of its living holders in an order that is the same everywhere; two that think
//! differently for a moment do no harm. One VM at a time, at the rate of background work.
//!
//! What it never does: it changes no holder set itself. Only a VM's owner knows what it has committed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Inner;
use crate::placement::{self, Repair, Verdict, Watched};
use crate::registry::{NodeRecord, RegistryError, VmRecord};
use crate::transport::{Client, in_full};
use crate::wire::{Call, CopyCall, Reply};

/// How long a holder may be gone before it is replaced, unless the agent is told otherwise.
pub const REPLACE_AFTER: Duration = Duration::from_secs(300);
/// How often it is looked at least, even when nothing changed.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How long copying one VM may take.
const COPY_DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// Since when each node that is gone is gone, by this agent's clock: nobody else's counts.
#[derive(Debug, Default)]
struct Gone(HashMap<String, Instant>);

impl Gone {
    fn watch(&mut self, nodes: Vec<NodeRecord>) -> Vec<Watched> {
        let now = Instant::now();
        self.0
            .retain(|name, _| nodes.iter().any(|n| n.name == *name && !n.is_alive()));
        let watched = nodes.into_iter().map(|node| {
            let gone_for = match node.is_alive() {
                true => None,
                false => Some(now - *self.0.entry(node.name.clone()).or_insert(now)),
            };
            Watched { node, gone_for }
        });
        watched.collect()
    }
}

/// Looks until the agent stops.
pub(super) async fn run(inner: Arc<Inner>, patience: Duration) {
    let mut stop = inner.stop.clone();
    let looking = async {
        let mut gone = Gone::default();
        let mut said: HashMap<String, String> = HashMap::new();
        loop {
            tokio::time::sleep(LOOK_EVERY.min(patience / 4).max(Duration::from_millis(100))).await;
            if let Err(error) = look(&inner, &mut gone, &mut said, patience).await {
                tracing::debug!(%error, "the holders were not looked after");
            }
        }
    };
    tokio::select! {
        () = looking => {}
        _ = stop.changed() => {}
    }
}

async fn look(
    inner: &Inner,
    gone: &mut Gone,
    said: &mut HashMap<String, String>,
    patience: Duration,
) -> Result<(), RegistryError> {
    let nodes = gone.watch(inner.registry.all_nodes().await?);
    let vms = inner.registry.all_vms().await?;
    inner.metrics.told(&inner.address, &vms);
    said.retain(|vm, _| vms.iter().any(|v| v.vm.as_str() == vm));
    for vm in &vms {
        if placement::caretaker(vm, &nodes) != Some(&inner.address) {
            continue;
        }
        match placement::repair(vm, &nodes, patience) {
            Verdict::Right | Verdict::Wait(_) => {
                said.remove(vm.vm.as_str());
            }
            Verdict::Short(why) => {
                // Once, not every few seconds.
                if said.insert(vm.vm.to_string(), why.clone()).as_ref() != Some(&why) {
                    tracing::warn!(vm = %vm.vm, %why, "a VM lacks a holder");
                }
            }
            Verdict::GiveUp(why) => {
                tracing::warn!(vm = %vm.vm, %why, "a change of holders is given up");
                inner
                    .registry
                    .set_swap(&vm.vm, vm.generation, vm.revision, None)
                    .await?;
            }
            Verdict::Repair(repair) => {
                if let Err(why) = mend(inner, vm, &repair).await {
                    tracing::warn!(vm = %vm.vm, joining = %repair.swap.joining, %why, "a holder was not replaced");
                }
            }
        }
    }
    Ok(())
}

/// Has who joins copy what others have, and proposes the change.
async fn mend(inner: &Inner, vm: &VmRecord, repair: &Repair) -> Result<(), String> {
    let Repair { swap, why, sources } = repair;
    tracing::info!(vm = %vm.vm, joining = %swap.joining, leaving = ?swap.leaving, %why, "a holder is replaced");
    let mut client = Client::connect(&swap.joining, &inner.identity)
        .await
        .map_err(|e| e.in_full())?;
    let call = CopyCall {
        vm: vm.vm.clone(),
        generation: vm.generation,
        from: sources.clone(),
    };
    let report = match client.call(Call::Copy(call), COPY_DEADLINE).await {
        Ok(Reply::Copied(report)) => report,
        Ok(_) => return Err("it answered something else".into()),
        Err(e) => return Err(in_full(&e)),
    };
    for note in &report.notes {
        tracing::warn!(vm = %vm.vm, joining = %swap.joining, %note, "while copying");
    }
    // The record may have changed while it was copied: then it is looked at anew.
    inner
        .registry
        .set_swap(&vm.vm, vm.generation, vm.revision, Some(swap.clone()))
        .await
        .map_err(|e| e.to_string())?;
    Ok(())
}
