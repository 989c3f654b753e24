//! The owner's lease, and the change of its holders: what the registry says of the VM at each renewal.
//!
//! ```text
//!   the record says        this does
//!   swap: d for c          ships to d, which does not count
//!     d has all committed  commits need a quorum of both sets; the registry is asked for the new set
//!     it has the new set   only that counts; c is shipped to no more
//!   no swap, the old set   d is shipped to no more
//! ```
//!
//! Invariants: the owner alone changes the holder set of its generation, by compare-and-swap; an answer that was lost
//! leaves both sets counting until the record tells which it is. A lease is counted from when its renewal was sent.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::crew::Crew;
use super::{Renewal, Shared, ShipEvent};
use crate::clock::boottime;
use crate::lease::{Electors, LeaseTerms};
use crate::registry::{HolderSwap, Lease, LeaseSubject, Registry, RegistryError, VmRecord, random_lease};

/// How many renewals a lease is long: two may fail.
const RENEWALS: u32 = 3;

/// How long the lease is, and how often it is renewed.
#[derive(Debug)]
pub(super) struct Pace {
    /// The guest runs under it.
    leashed: bool,
    /// How long the owner counts on it.
    ttl: Duration,
    /// How long the registry is asked to hold it: by the registry's clock, which may be the faster one.
    ask: Duration,
    every: Duration,
    /// By which electors the owner of a guest that runs under it counts.
    adopted: Option<watch::Receiver<u64>>,
}

impl Pace {
    /// By the terms that a guest runs under; without any, as long as is wanted.
    pub(super) fn new(
        terms: Option<LeaseTerms>,
        ttl: Duration,
        adopted: Option<watch::Receiver<u64>>,
    ) -> Self {
        match terms {
            Some(terms) => Self {
                leashed: true,
                ttl: terms.ttl,
                ask: terms.guard(),
                every: terms.renew_every,
                adopted,
            },
            None => Self {
                leashed: false,
                ttl,
                ask: ttl,
                every: ttl / RENEWALS,
                adopted,
            },
        }
    }
}

/// A change of holders, as far as it is.
#[derive(Debug)]
struct Changing {
    swap: HolderSwap,
    /// The number of who joins.
    at: usize,
    /// The registry was asked for the new set.
    asked: bool,
    /// The version of the electors that the owner has to count by before it is asked.
    version: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Keeper {
    shared: Arc<Shared>,
    crew: Arc<Crew>,
    registry: Registry,
    subject: LeaseSubject,
    pace: Pace,
    lease: Option<u64>,
    changing: Option<Changing>,
    /// Of the electors that were said last.
    version: u64,
    away: bool,
}

impl Keeper {
    pub(super) fn new(shared: Arc<Shared>, crew: Arc<Crew>, registry: Registry, pace: Pace) -> Self {
        let subject = LeaseSubject::Owner {
            vm: shared.vm.clone(),
            generation: shared.generation,
        };
        Self {
            shared,
            crew,
            registry,
            subject,
            pace,
            lease: None,
            changing: None,
            version: 0,
            away: false,
        }
    }

    /// Runs until `stop` changes, or the generation is over. It does not give the lease back by itself: whether the guest
    /// still runs is not for it to know, and a lease that is gone says that the owner is lost.
    pub(super) async fn run(mut self, mut stop: watch::Receiver<bool>) -> Self {
        loop {
            let begun = boottime();
            let on = tokio::select! {
                // One that takes as long as the lease is of no use any more. (A change of holders that was asked for
                // meanwhile is in the next record, or is not.)
                on = tokio::time::timeout(self.pace.ttl, self.renew()) => on,
                _ = stop.changed() => return self,
            };
            match on {
                Ok(true) => {}
                Ok(false) => return self,
                Err(_) => {
                    if !std::mem::replace(&mut self.away, true) {
                        let ttl = self.pace.ttl;
                        tracing::warn!(vm = %self.shared.vm, ?ttl, "the registry did not answer a renewal in time");
                    }
                }
            }
            let pause = self.pace.every.saturating_sub(boottime().saturating_sub(begun));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = stop.changed() => return self,
            }
        }
    }

    /// The guest stands still for good: nobody has to wait for the lease.
    pub(super) async fn give_back(self) {
        if let Some(lease) = self.lease
            && let Err(error) = self.registry.revoke_lease(&self.subject, lease).await
        {
            tracing::debug!(%error, "the owner's lease is left to run out");
        }
    }

    /// One renewal, and what follows from the record; false when the generation is over.
    async fn renew(&mut self) -> bool {
        let mut sent = boottime();
        let mut answered = match self.lease {
            Some(lease) => self.registry.keep_alive(&self.subject, lease).await,
            None => self.grant().await,
        };
        if let Err(RegistryError::LeaseGone { .. }) = answered
            && self.lease.take().is_some()
        {
            tracing::warn!(vm = %self.shared.vm, "the owner's lease ran out: it takes another");
            sent = boottime();
            answered = self.grant().await;
        }
        let record = match answered {
            Ok((lease, record)) => {
                self.lease = Some(lease.id);
                // What was asked for at most: a registry may round it up.
                let ttl = Duration::from_millis(lease.ttl_ms).min(self.pace.ttl);
                self.shared.lease.send_replace(Some(Renewal { sent, ttl }));
                if self.pace.leashed {
                    let _ = self.shared.events.send(ShipEvent::Renewed { sent });
                }
                if std::mem::take(&mut self.away) {
                    tracing::info!(vm = %self.shared.vm, "the owner's lease is renewed again");
                }
                record
            }
            Err(error) => return self.failed(&error),
        };
        match record {
            Some(record) => self.see(&record).await,
            None => true,
        }
    }

    async fn grant(&self) -> Result<(Lease, Option<VmRecord>), RegistryError> {
        let ttl_ms = self.pace.ask.as_micros().div_ceil(1000) as u64;
        self.registry
            .grant_lease(&self.subject, ttl_ms, random_lease())
            .await
    }

    fn failed(&mut self, error: &RegistryError) -> bool {
        if let RegistryError::Fenced { current, .. } = error {
            tracing::error!(generation = %self.shared.generation, %current, "fenced by the registry");
            self.shared.lease.send_replace(None);
            let _ = self.shared.events.send(ShipEvent::Fenced {
                holder: self.registry.address(),
                current: *current,
            });
            return false;
        }
        if let RegistryError::NoSuchVm { .. } = error {
            self.shared.lease.send_replace(None);
            let registry = self.registry.address();
            let _ = self.shared.events.send(ShipEvent::Forgotten { registry });
            return false;
        }
        if !std::mem::replace(&mut self.away, true) {
            tracing::warn!(vm = %self.shared.vm, %error, "the owner's lease is not renewed; protection goes on");
        }
        true
    }

    /// What the record says of the holders.
    async fn see(&mut self, record: &VmRecord) -> bool {
        if let Some(changing) = &self.changing {
            let here = record.holders.contains(&changing.swap.joining);
            if here && record.swap.as_ref() != Some(&changing.swap) {
                self.finish(record);
            } else if record.swap.as_ref() != Some(&changing.swap) {
                self.give_up(record);
            }
        }
        let Some(swap) = &record.swap else { return true };
        if self.changing.is_none() {
            tracing::info!(vm = %self.shared.vm, joining = %swap.joining, leaving = ?swap.leaving, "a holder joins");
            self.changing = Some(Changing {
                swap: swap.clone(),
                at: self.crew.learn(&swap.joining),
                asked: false,
                version: None,
            });
        }
        self.go_on(record).await
    }

    /// Asks the registry for the new set, once who joins has all that is committed.
    async fn go_on(&mut self, record: &VmRecord) -> bool {
        let Some(changing) = &mut self.changing else {
            return true;
        };
        let Changing { swap, at, .. } = &*changing;
        let stays = |h: &&String| swap.leaving.as_ref() != Some(h);
        let mut set: Vec<String> = record.holders.iter().filter(stays).cloned().collect();
        set.push(swap.joining.clone());
        let quorum = record.ack_quorum;
        // In this order: from here on nothing is committed that the new set could miss, and only then may the registry
        // have it.
        if !changing.asked && !self.shared.ledger().begin_change(&set, quorum as usize, *at) {
            return true;
        }
        if self.pace.leashed && !changing.asked {
            // Nor may it run its guest by grants of the old set alone, once a candidate may read the new one.
            let version = *changing.version.get_or_insert_with(|| {
                self.version += 1;
                let (version, old) = (self.version, Electors::new(&record.holders, quorum));
                let sets = vec![old, Electors::new(&set, quorum)];
                let _ = self.shared.events.send(ShipEvent::Electors { version, sets });
                version
            });
            let counted = self.pace.adopted.as_ref().map(|by| *by.borrow());
            if counted < Some(version) {
                return true;
            }
        }
        changing.asked = true;
        let asked = self
            .registry
            .set_holders(
                &self.shared.vm,
                self.shared.generation,
                record.revision,
                set,
                quorum,
            )
            .await;
        match asked {
            Ok(record) => {
                self.finish(&record);
                true
            }
            // The next record tells.
            Err(RegistryError::Revision { .. }) => true,
            Err(error) => self.failed(&error),
        }
    }

    fn finish(&mut self, record: &VmRecord) {
        let Some(changing) = self.changing.take() else {
            return;
        };
        if !changing.asked {
            // Somebody else set it: it counts as the registry has it, from what is known now.
            let quorum = record.ack_quorum as usize;
            self.shared
                .ledger()
                .force_change(&record.holders, quorum, changing.at);
            tracing::warn!(vm = %self.shared.vm, "the holders were set by another");
        }
        let step = self.shared.ledger().finish_change();
        self.shared.after(step);
        if let Some(leaving) = &changing.swap.leaving {
            let at = self.shared.ledger().number(leaving);
            at.into_iter().for_each(|at| self.crew.dismiss(at));
        }
        tracing::info!(vm = %self.shared.vm, holders = ?record.holders, "the holders changed");
        self.elect(record);
        let _ = self.shared.events.send(ShipEvent::HoldersChanged {
            holders: record.holders.clone(),
            ack_quorum: record.ack_quorum,
        });
    }

    /// The owner's time is granted by the holders that the record names, and by no others.
    fn elect(&mut self, record: &VmRecord) {
        if self.pace.leashed {
            self.version += 1;
            let sets = vec![Electors::new(&record.holders, record.ack_quorum)];
            let version = self.version;
            let _ = self.shared.events.send(ShipEvent::Electors { version, sets });
        }
    }

    fn give_up(&mut self, record: &VmRecord) {
        let Some(changing) = self.changing.take() else {
            return;
        };
        tracing::info!(vm = %self.shared.vm, joining = %changing.swap.joining, "the holder does not join");
        let step = self.shared.ledger().give_up_change();
        self.shared.after(step);
        self.crew.dismiss(changing.at);
        self.elect(record);
    }
}
