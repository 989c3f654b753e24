//! The node's place in the cluster: its record, and the lease that says it lives.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{AgentError, Inner, blocking};
use crate::crashsafe::{Disk, folder_of};
use crate::registry::{LeaseSubject, NodeRecord, Registry, RegistryError, Stamp, random_lease, written};

/// Where the newest place of the registry's history that was seen is written down.
pub(super) const SEEN: &str = "registry-seen";
/// How long after its last sign of life a node counts as gone, unless it says otherwise.
pub const LEASE_TTL: Duration = Duration::from_secs(6);
/// How many renewals a lease is long: two may fail.
const RENEWALS: u32 = 3;
/// How often a registry that is away is asked again, at most.
const AGAIN: Duration = Duration::from_secs(1);
/// How often the free space and what was seen of the registry are written down.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// A node that keeps its place.
pub(super) struct Member {
    pub(super) inner: Arc<Inner>,
    pub(super) node: NodeRecord,
    pub(super) replace: bool,
    pub(super) ttl: Duration,
}

/// Whose lease a node's is.
fn subject(node: &NodeRecord) -> LeaseSubject {
    LeaseSubject::Node {
        name: node.name.clone(),
        id: node.id,
    }
}

/// Tells the registry that the node is there, and takes a lease; none when the registry is away.
pub(super) async fn join(
    registry: &Registry,
    node: &NodeRecord,
    replace: bool,
    ttl: Duration,
) -> Result<Option<u64>, AgentError> {
    match enter(registry, node, replace, ttl).await {
        Ok(lease) => Ok(Some(lease)),
        Err(error) if error.is_transient() => {
            tracing::warn!(%error, "the registry is away: the agent stores segments, and joins when it is back");
            Ok(None)
        }
        // What is here must stay within reach, whatever became of the registry.
        Err(error @ RegistryError::Past { .. }) => {
            tracing::error!(%error, "the agent stores and serves segments, and does not join");
            Ok(None)
        }
        Err(error) => Err(AgentError::Refused(error)),
    }
}

async fn enter(
    registry: &Registry,
    node: &NodeRecord,
    replace: bool,
    ttl: Duration,
) -> Result<u64, RegistryError> {
    registry.join_node(node.clone(), replace).await?;
    let lease = random_lease();
    registry
        .grant_lease(&subject(node), ttl.as_millis() as u64, lease)
        .await?;
    Ok(lease)
}

impl Member {
    /// Renews the lease until the agent stops, and gives it back then.
    pub(super) async fn keep(mut self, mut lease: Option<u64>) {
        let registry = self.inner.registry.clone();
        let mut stop = self.inner.stop.clone();
        let (mut away, mut reported) = (lease.is_none(), None::<Instant>);
        loop {
            let wait = match lease {
                Some(_) => self.ttl / RENEWALS,
                None => AGAIN.min(self.ttl),
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = stop.changed() => break,
            }
            let renewed = match lease {
                Some(id) => registry.keep_alive(&subject(&self.node), id).await.map(|_| id),
                None => enter(&registry, &self.node, self.replace, self.ttl).await,
            };
            match renewed {
                Ok(id) => {
                    lease = Some(id);
                    self.inner.metrics.renewed();
                    if std::mem::take(&mut away) {
                        tracing::info!("joined: the registry is back");
                    }
                    // Only the first time: later it would take the name from one that took it from us.
                    self.replace = false;
                }
                Err(RegistryError::LeaseGone { .. } | RegistryError::NoSuchNode { .. }) => {
                    tracing::warn!("this node's lease ran out: it counted as gone, and joins again");
                    self.inner.metrics.lease_lost();
                    (lease, away) = (None, true);
                    continue;
                }
                Err(error) if error.is_transient() => {
                    self.inner.metrics.registry_away();
                    if !std::mem::replace(&mut away, true) {
                        tracing::warn!(%error, "the registry is away: the agent goes on storing segments");
                    }
                    continue;
                }
                Err(error) => {
                    if lease.is_some() {
                        self.inner.metrics.lease_lost();
                    }
                    if !std::mem::replace(&mut away, true) {
                        tracing::error!(%error, "the registry refuses this node");
                    }
                    lease = None;
                    continue;
                }
            }
            if reported.is_none_or(|at| at.elapsed() >= REPORT_EVERY) {
                reported = Some(Instant::now());
                self.report(&registry).await;
            }
        }
        if let Some(id) = lease {
            // It runs out by itself when the registry is away.
            let _ = registry.revoke_lease(&subject(&self.node), id).await;
        }
        self.note(registry.seen()).await;
    }

    /// Writes down how much is free, when that has changed much, and what was seen of the registry.
    async fn report(&mut self, registry: &Registry) {
        let (store, data) = (self.inner.store.clone(), self.inner.data.clone());
        let room =
            blocking(move || Ok::<_, RegistryError>(room(&data, store.budget(), store.used_bytes()))).await;
        if let Ok(Some((total, free))) = room {
            let told = self.node.free_bytes.zip(self.node.total_bytes);
            let near = told.is_some_and(|(f, t)| t == total && f.abs_diff(free) <= total / 50);
            if !near {
                let node = NodeRecord {
                    total_bytes: Some(total),
                    free_bytes: Some(free),
                    ..self.node.clone()
                };
                match registry.join_node(node.clone(), false).await {
                    Ok(_) => self.node = node,
                    Err(error) => tracing::debug!(%error, "the registry was not told of the free space"),
                }
            }
        }
        self.note(registry.seen()).await;
    }

    async fn note(&self, seen: Option<Stamp>) {
        let Some(stamp) = seen else { return };
        let path = self.inner.data.join(SEEN);
        let done =
            blocking(move || Disk::durable().write(folder_of(&path), SEEN, &path, written(stamp).as_bytes()));
        let done = done.await;
        if let Err(error) = done {
            tracing::warn!(%error, "what was seen of the registry cannot be written down");
        }
    }
}

/// How many bytes segments may take in all, and how many are free.
fn room(data: &Path, budget: Option<u64>, used: u64) -> Option<(u64, u64)> {
    let disk = rustix::fs::statvfs(data).ok()?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    match budget {
        Some(budget) => Some((budget, budget.saturating_sub(used).min(free))),
        None => Some((free.saturating_add(used), free)),
    }
}
