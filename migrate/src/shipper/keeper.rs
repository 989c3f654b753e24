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

use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;

use super::crew::Crew;
use super::{Renewal, Shared, ShipEvent};
use crate::registry::{HolderSwap, LeaseSubject, Registry, RegistryError, VmRecord, random_lease};

/// How many renewals a lease is long: two may fail.
const RENEWALS: u32 = 3;

/// A clock that goes on while the host is suspended, as the registry's does meanwhile.
#[must_use]
pub fn keeper_clock() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    // Since the boot, so neither is negative.
    Duration::new(now.tv_sec.max(0) as u64, now.tv_nsec.clamp(0, 999_999_999) as u32)
}

/// A change of holders, as far as it is.
#[derive(Debug)]
struct Changing {
    swap: HolderSwap,
    /// The number of who joins.
    at: usize,
    /// The registry was asked for the new set.
    asked: bool,
}

pub(super) struct Keeper {
    shared: Arc<Shared>,
    crew: Arc<Crew>,
    registry: Registry,
    subject: LeaseSubject,
    ttl: Duration,
    lease: Option<u64>,
    changing: Option<Changing>,
    away: bool,
}

impl Keeper {
    pub(super) fn new(shared: Arc<Shared>, crew: Arc<Crew>, registry: Registry, ttl: Duration) -> Self {
        let subject = LeaseSubject::Owner {
            vm: shared.vm.clone(),
            generation: shared.generation,
        };
        Self {
            shared,
            crew,
            registry,
            subject,
            ttl,
            lease: None,
            changing: None,
            away: false,
        }
    }

    /// Runs until `stop` changes, or the generation is over. It does not give the lease back: whether the guest still
    /// runs is not for it to know, and a lease that is gone says that the owner is lost.
    pub(super) async fn run(mut self, mut stop: watch::Receiver<bool>) {
        loop {
            let on = tokio::select! {
                on = self.renew() => on,
                _ = stop.changed() => return,
            };
            if !on {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(self.ttl / RENEWALS) => {}
                _ = stop.changed() => return,
            }
        }
    }

    /// One renewal, and what follows from the record; false when the generation is over.
    async fn renew(&mut self) -> bool {
        let sent = keeper_clock();
        let answered = match self.lease {
            Some(lease) => self.registry.keep_alive(&self.subject, lease).await,
            None => {
                let lease = random_lease();
                let ttl_ms = self.ttl.as_millis() as u64;
                self.registry.grant_lease(&self.subject, ttl_ms, lease).await
            }
        };
        let record = match answered {
            Ok((lease, record)) => {
                self.lease = Some(lease.id);
                // What was asked for at most: a registry may round it up.
                let ttl = Duration::from_millis(lease.ttl_ms).min(self.ttl);
                self.shared.lease.send_replace(Some(Renewal { sent, ttl }));
                if std::mem::take(&mut self.away) {
                    tracing::info!(vm = %self.shared.vm, "the owner's lease is renewed again");
                }
                record
            }
            Err(RegistryError::LeaseGone { .. }) => {
                tracing::warn!(vm = %self.shared.vm, "the owner's lease ran out: it takes another");
                self.lease = None;
                return true;
            }
            Err(error) => return self.failed(&error),
        };
        match record {
            Some(record) => self.see(&record).await,
            None => true,
        }
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
                self.give_up();
            }
        }
        let Some(swap) = &record.swap else { return true };
        if self.changing.is_none() {
            tracing::info!(vm = %self.shared.vm, joining = %swap.joining, leaving = ?swap.leaving, "a holder joins");
            self.changing = Some(Changing {
                swap: swap.clone(),
                at: self.crew.learn(&swap.joining),
                asked: false,
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
        let _ = self.shared.events.send(ShipEvent::HoldersChanged {
            holders: record.holders.clone(),
            ack_quorum: record.ack_quorum,
        });
    }

    fn give_up(&mut self) {
        let Some(changing) = self.changing.take() else {
            return;
        };
        tracing::info!(vm = %self.shared.vm, joining = %changing.swap.joining, "the holder does not join");
        let step = self.shared.ledger().give_up_change();
        self.shared.after(step);
        self.crew.dismiss(changing.at);
    }
}
