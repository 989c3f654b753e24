//! Tells the registry what is committed: in batches, behind the shipping, which never waits for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::{Shared, ShipEvent};
use crate::registry::{MAX_REGISTER_SEGMENTS, Registry, RegistryError};

/// How long records are collected before they are sent.
const BATCH_EVERY: Duration = Duration::from_millis(100);
/// How long until a registry that is away is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// The most records of one request; half of what a registry takes.
const BATCH: usize = MAX_REGISTER_SEGMENTS / 2;

/// Runs until `stop` changes, or the registry says that the generation or the VM is no more.
pub(super) async fn run(shared: Arc<Shared>, registry: Registry, mut stop: watch::Receiver<bool>) {
    let mut changes = shared.changes.subscribe();
    let mut away = false;
    loop {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { break },
            _ = stop.changed() => break,
        }
        tokio::time::sleep(BATCH_EVERY).await;
        if !flush(&shared, &registry, &mut away, &mut stop).await {
            break;
        }
    }
}

/// Sends all there is; false when there is no more to do at all.
async fn flush(
    shared: &Shared,
    registry: &Registry,
    away: &mut bool,
    stop: &mut watch::Receiver<bool>,
) -> bool {
    loop {
        let (records, given_up) = shared.ledger().take_unregistered(BATCH);
        if given_up > 0 {
            tracing::warn!(
                count = given_up,
                "committed checkpoints were not registered: the registry was away too long"
            );
        }
        if records.is_empty() {
            return true;
        }
        let sent = registry
            .register_segments(&shared.vm, shared.generation, records.clone())
            .await;
        match sent {
            Ok(()) => {
                if std::mem::take(away) {
                    tracing::info!(registry = %registry.address(), "the registry is back");
                }
            }
            Err(RegistryError::Fenced { current, .. }) => {
                tracing::error!(generation = %shared.generation, %current, "fenced by the registry");
                let _ = shared.events.send(ShipEvent::Fenced {
                    holder: registry.address(),
                    current,
                });
                return false;
            }
            Err(RegistryError::NoSuchVm { .. }) => {
                let registry = registry.address();
                let _ = shared.events.send(ShipEvent::Forgotten { registry });
                return false;
            }
            Err(error) if error.is_transient() || matches!(error, RegistryError::Past { .. }) => {
                if !std::mem::replace(away, true) {
                    tracing::warn!(%error, "the registry is away: shipping goes on, committed checkpoints wait");
                }
                shared.ledger().put_back(records);
                tokio::select! {
                    () = tokio::time::sleep(AGAIN) => {}
                    _ = stop.changed() => return false,
                }
            }
            Err(error) => {
                // Again would end the same way.
                tracing::error!(%error, count = records.len(), "committed checkpoints cannot be registered");
            }
        }
    }
}

/// What is left when the shipper ends, once.
pub(super) async fn last(shared: &Shared, registry: &Registry) {
    let (records, _) = shared.ledger().take_unregistered(MAX_REGISTER_SEGMENTS);
    if records.is_empty() {
        return;
    }
    if let Err(error) = registry
        .register_segments(&shared.vm, shared.generation, records)
        .await
    {
        tracing::warn!(%error, "the last checkpoints were not registered");
    }
}
