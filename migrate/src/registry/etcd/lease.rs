//! Leases: etcd's, with the key of whom they stand for.

use serde_json::json;

use super::gateway::{GatewayError, Said, number};
use super::keys::Txn;
use super::records::busy;
use super::{Done, Inner, MAX_TRIES, join_lease, kept};
use crate::registry::RegistryError;
use crate::registry::request::RegistryResponse;
use crate::registry::rules;
use crate::registry::types::{Lease, LeaseRecord, LeaseSubject, LiveLease, VmRecord};

impl Inner {
    fn lease_key(&self, subject: &LeaseSubject) -> String {
        match subject {
            LeaseSubject::Node { name, .. } => self.keys.alive(name),
            LeaseSubject::Owner { vm, .. } => self.keys.owner(vm),
        }
    }

    pub(super) async fn grant(
        &self,
        subject: LeaseSubject,
        ttl_ms: u64,
        lease: u64,
    ) -> Done<RegistryResponse> {
        // etcd counts in seconds, and has a shortest lease of its own: it says how long it is.
        let ask = json!({ "ID": lease.to_string(), "TTL": ttl_ms.div_ceil(1000).to_string() });
        let ttl_ms = match self.gateway.leases("lease/grant", &ask).await {
            Ok(said) => self.ttl(&said)?.saturating_mul(1000),
            // The answer to the first try was lost on its way.
            Err(GatewayError::Exists) => ttl_ms.div_ceil(1000) * 1000,
            Err(error) => return Err(self.error(error)),
        };
        let bound = self
            .bind(
                &subject,
                LeaseRecord {
                    subject: subject.clone(),
                    ttl_ms,
                },
                lease,
            )
            .await;
        match bound {
            Ok((record, before)) => {
                if let Some(before) = before.filter(|before| before.lease != lease) {
                    self.give_back(before.lease).await?;
                }
                Ok(RegistryResponse::Lease(Lease { id: lease, ttl_ms }, record))
            }
            Err(error) => {
                // Of no use to anyone; if it cannot be given back now it runs out.
                if let Err(left) = self.give_back(lease).await {
                    tracing::debug!(%left, "a lease was left to run out");
                }
                Err(error)
            }
        }
    }

    /// Puts the key of the subject under the lease; returns the lease it had before.
    async fn bind(
        &self,
        subject: &LeaseSubject,
        record: LeaseRecord,
        lease: u64,
    ) -> Done<(Option<VmRecord>, Option<LiveLease>)> {
        let (key, value) = (self.lease_key(subject), join_lease(lease, &record));
        let live = LiveLease {
            lease,
            ttl_ms: record.ttl_ms,
        };
        for _ in 0..MAX_TRIES {
            let (txn, vm, before) = match subject {
                LeaseSubject::Node { name, id } => {
                    let found = self.read_node(name).await?;
                    let (node, at) = found.ok_or_else(|| RegistryError::NoSuchNode { name: name.clone() })?;
                    if node.id != *id {
                        let (name, address) = (node.name, node.address);
                        return Err(RegistryError::NodeTaken { name, address });
                    }
                    let txn = Txn::default().guard(&self.keys.node(name), at);
                    (txn, None, node.alive)
                }
                LeaseSubject::Owner { vm, generation } => {
                    let found = self.read_vm(vm).await?;
                    let (mut record, at) = found
                        .record
                        .ok_or_else(|| RegistryError::NoSuchVm { vm: vm.clone() })?;
                    rules::owned(&record, *generation)?;
                    let before = record.alive.replace(live);
                    record.leased = Some(generation.0);
                    // Seen by whoever looked at the record while there was no lease.
                    record.revision += 1;
                    let txn = Txn::default()
                        .guard(&self.keys.vm(vm), at)
                        .guard(&key, found.lease_revision)
                        .put(&self.keys.vm(vm), &kept(&record));
                    (txn, Some(record), before)
                }
            };
            if self.commit(&txn.put_leased(&key, &value, lease)).await?.done {
                return Ok((vm, before));
            }
        }
        busy(subject.to_string())
    }

    pub(super) async fn keep_alive(&self, subject: &LeaseSubject, lease: u64) -> Done<RegistryResponse> {
        let mut failures = Vec::new();
        for member in self.gateway.order() {
            match self.renew_at(member, subject, lease).await {
                Err(RegistryError::Unavailable { why, .. }) => failures.push(why),
                other => return other,
            }
        }
        Err(self.away(failures.join("; ")))
    }

    /// A renewal at one member; counted when that member answers a linearizable read in the same term after it.
    async fn renew_at(&self, member: usize, subject: &LeaseSubject, lease: u64) -> Done<RegistryResponse> {
        let gone = || RegistryError::LeaseGone {
            subject: subject.clone(),
        };
        let ask = json!({ "ID": lease.to_string() });
        let renewed = match self.gateway.at(member, "lease/keepalive", &ask, false).await {
            Ok(said) => Some(said),
            Err(GatewayError::NotFound) => None,
            Err(error) => return Err(self.error(error)),
        };
        // Without a time, or with none left: it ran out. The read tells all the same: whether this etcd is from the
        // past, and whether the generation is over.
        let renewed = renewed.and_then(|said| match number(&said.body["TTL"]) {
            Some(seconds) if seconds > 0 => Some((seconds.saturating_mul(1000), said.stamp.term)),
            Some(_) | None => None,
        });
        let read = match subject {
            LeaseSubject::Node { name, .. } => Txn::default().get(&self.keys.alive(name)),
            LeaseSubject::Owner { vm, .. } => Txn::default()
                .get(&self.keys.vm(vm))
                .get(&self.keys.tip(vm))
                .get(&self.keys.owner(vm)),
        };
        let said = self.gateway.at(member, "kv/txn", &read.json(), true).await;
        let committed = self.committed(said.map_err(|e| self.error(e))?)?;
        if renewed.is_some_and(|(_, term)| committed.said.stamp.term != term) {
            return Err(self.away(format!(
                "a leader was elected while the lease of {subject} was renewed"
            )));
        }
        let holds = |live: Option<LiveLease>| live.is_some_and(|live| live.lease == lease);
        let record = match subject {
            LeaseSubject::Node { .. } => {
                let [kv] = self.ranges(committed)?;
                let found = self.lease_of(kv.kvs.first())?;
                if !found.is_some_and(|(of, live)| of == *subject && holds(Some(live))) {
                    return Err(gone());
                }
                None
            }
            LeaseSubject::Owner { vm, generation } => {
                let [record, tip, kv] = self.ranges(committed)?;
                let found = self.found_vm(record.kvs.first(), tip.kvs.first(), kv.kvs.first())?;
                let (record, _) = found
                    .record
                    .ok_or_else(|| RegistryError::NoSuchVm { vm: vm.clone() })?;
                rules::owned(&record, *generation)?;
                if !holds(record.alive) {
                    return Err(gone());
                }
                Some(record)
            }
        };
        let (ttl_ms, _) = renewed.ok_or_else(gone)?;
        Ok(RegistryResponse::Lease(Lease { id: lease, ttl_ms }, record))
    }

    pub(super) async fn revoke(&self, subject: &LeaseSubject, lease: u64) -> Done<RegistryResponse> {
        let [kv] = self.read(&Txn::default().get(&self.lease_key(subject))).await?;
        let found = self.lease_of(kv.kvs.first())?;
        if found.is_some_and(|(of, live)| of == *subject && live.lease == lease) {
            self.give_back(lease).await?;
        }
        Ok(RegistryResponse::Done)
    }

    async fn give_back(&self, lease: u64) -> Done<()> {
        match self
            .gateway
            .leases("lease/revoke", &json!({ "ID": lease.to_string() }))
            .await
        {
            Ok(_) | Err(GatewayError::NotFound) => Ok(()),
            Err(error) => Err(self.error(error)),
        }
    }

    fn ttl(&self, said: &Said) -> Done<u64> {
        number(&said.body["TTL"]).ok_or_else(|| self.error(self.gateway.odd("a lease without a time")))
    }
}
