//! The owner's lease in the registry: taken, and renewed as long as the VM is protected.
//!
//! A renewal that is not answered counts for nothing, and one that is counts from when it was sent. Whether the guest
//! may run is not decided here: see [`crate::lease`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

use super::{Shared, ShipEvent};
use crate::clock::boottime;
use crate::lease::LeaseTerms;
use crate::registry::{LeaseSubject, Registry, RegistryError, random_lease};

/// The lease, shared with who gives it back at the end.
#[derive(Debug, Clone)]
pub(super) struct Lease {
    shared: Arc<Shared>,
    registry: Registry,
    subject: LeaseSubject,
    terms: LeaseTerms,
    /// The lease that is held, 0 when none is.
    held: Arc<AtomicU64>,
}

impl Lease {
    pub(super) fn new(shared: Arc<Shared>, registry: Registry, terms: LeaseTerms) -> Self {
        let subject = LeaseSubject::Owner {
            vm: shared.vm.clone(),
            generation: shared.generation,
        };
        Self {
            shared,
            registry,
            subject,
            terms,
            held: Arc::default(),
        }
    }

    /// Runs until `stop` changes, or the registry says that the generation is over.
    pub(super) async fn keep(self, mut stop: watch::Receiver<bool>) {
        let mut away = false;
        loop {
            let sent = boottime();
            let answered = tokio::select! {
                // One that takes as long as the lease is of no use any more.
                answered = tokio::time::timeout(self.terms.ttl, self.renew()) => answered,
                _ = stop.changed() => return,
            };
            match answered {
                Ok(Ok(())) => {
                    if std::mem::take(&mut away) {
                        tracing::info!(vm = %self.shared.vm, "the owner's lease is renewed again");
                    }
                    let _ = self.shared.events.send(ShipEvent::Renewed { sent });
                }
                Ok(Err(RegistryError::Fenced { current, .. })) => {
                    tracing::error!(generation = %self.shared.generation, %current, "fenced by the registry");
                    let _ = self.shared.events.send(ShipEvent::Fenced {
                        holder: self.registry.address(),
                        current,
                    });
                    return;
                }
                // It ran out: another is taken at once, if the generation is still ours.
                Ok(Err(RegistryError::LeaseGone { .. })) if self.held.swap(0, Ordering::Relaxed) != 0 => {
                    continue;
                }
                Ok(Err(error)) => {
                    if !std::mem::replace(&mut away, true) {
                        tracing::warn!(vm = %self.shared.vm, %error, "the owner's lease is not renewed");
                    }
                }
                Err(_) => {
                    if !std::mem::replace(&mut away, true) {
                        let ttl = self.terms.ttl;
                        tracing::warn!(vm = %self.shared.vm, ?ttl, "the registry did not answer a renewal");
                    }
                }
            }
            let pause = self
                .terms
                .renew_every
                .saturating_sub(boottime().saturating_sub(sent));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = stop.changed() => return,
            }
        }
    }

    async fn renew(&self) -> Result<(), RegistryError> {
        match self.held.load(Ordering::Relaxed) {
            0 => {
                let lease = random_lease();
                // By the registry's clock, which may be the faster one.
                let ttl_ms = self.terms.guard().as_micros().div_ceil(1000) as u64;
                self.registry.grant_lease(&self.subject, ttl_ms, lease).await?;
                self.held.store(lease, Ordering::Relaxed);
            }
            lease => {
                self.registry.keep_alive(&self.subject, lease).await?;
            }
        }
        Ok(())
    }

    /// The guest stands still for good.
    pub(super) async fn give_back(&self) {
        let lease = self.held.swap(0, Ordering::Relaxed);
        if lease != 0
            && let Err(error) = self.registry.revoke_lease(&self.subject, lease).await
        {
            tracing::debug!(%error, "the owner's lease is left to run out");
        }
    }
}
