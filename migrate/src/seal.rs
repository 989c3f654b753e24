//! Asking a holder to promise a generation: what every new owner does, an agent that takes over and a `vmm` that goes on.

use std::time::Duration;

use segment::{Generation, VmId};

use crate::failover::SealFailure;
use crate::transport::{CallError, Client, Identity, in_full};
use crate::wire::{Call, Reply, SealCall, SealReport};

/// Has `holder` promise `generation` durably, and hears what it has and what it granted before.
///
/// # Errors
/// [`SealFailure::Fenced`] when it has promised a higher one; anything else is no promise.
pub async fn seal(
    holder: &str,
    identity: &Identity,
    vm: &VmId,
    generation: Generation,
    deadline: Duration,
) -> Result<SealReport, SealFailure> {
    let unreachable = |why: String| SealFailure::Unreachable { why };
    let mut client = Client::connect(holder, identity)
        .await
        .map_err(|e| unreachable(e.in_full()))?;
    let call = Call::Seal(SealCall {
        vm: vm.clone(),
        generation,
    });
    match client.call(call, deadline).await {
        // A promise of anything else is not the one that was asked for.
        Ok(Reply::Sealed(report)) if report.generation == generation => Ok(report),
        Ok(_) => Err(unreachable("it answered something else".into())),
        Err(CallError::Fenced { fenced, .. }) => Err(SealFailure::Fenced {
            current: fenced.current,
        }),
        Err(e) => Err(unreachable(in_full(&e))),
    }
}
