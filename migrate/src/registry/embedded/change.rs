//! The requests that change something, each in one transaction.

use std::time::Instant;

use redb::{ReadableTable, WriteTransaction};
use segment::{Generation, VmId};

use super::leases::{Key, Leases};
use super::{
    COUNTS, HISTORY, LEASES, NODES, RETIRED, SEGMENTS, VMS, all_vms, decode, encode, read_history, read_vm,
    storage,
};
use crate::registry::RegistryError;
use crate::registry::request::{Changed, RegistryRequest, RegistryResponse};
use crate::registry::rules::{self, Step};
use crate::registry::types::{
    HistoryEntry, Lease, LeaseRecord, LeaseSubject, MAX_NODES, MAX_SEGMENTS_PER_VM, MAX_VMS, NodeRecord,
    SegmentRecord, VmRecord, VmState, position,
};
use crate::wire::Held;

/// The table of segments, in a transaction.
type Segments<'a> = redb::Table<'a, (&'static str, u64, u64), &'static [u8]>;

/// What is done to the leases in memory once the transaction is durable.
pub(super) enum LeaseChange {
    Grant(u64, LeaseRecord),
    Remove(u64),
}

/// One transaction that changes something.
pub(super) struct Change<'a> {
    pub(super) txn: &'a WriteTransaction,
    pub(super) leases: &'a Leases,
    pub(super) now: u64,
    /// Whose records, or leases, are other ones afterwards.
    pub(super) changed: Vec<Changed>,
    pub(super) lease_changes: Vec<LeaseChange>,
}

impl Change<'_> {
    pub(super) fn apply(&mut self, request: RegistryRequest) -> Result<RegistryResponse, RegistryError> {
        if let Some(vm) = rules::vm_of(&request).cloned() {
            let raises = matches!(request, RegistryRequest::RaiseGeneration { .. });
            let record = self.vm(vm)?;
            let step =
                rules::changed(&request, record, self.now).unwrap_or_else(|| not_a_change(&request))?;
            let record = match step {
                Step::Keep(record) => record,
                Step::Write(record) => {
                    if raises {
                        self.end_lease(&Key::Vm(record.vm.as_str().to_owned()))?;
                    }
                    self.put_vm(&record)?;
                    record
                }
            };
            return Ok(RegistryResponse::Vm(record));
        }
        match request {
            RegistryRequest::JoinNode { node, replace } => self.join(node, replace),
            RegistryRequest::CreateVm {
                vm,
                owner,
                holders,
                ack_quorum,
                every_ms,
                claim,
                policy,
            } => self.create(VmRecord {
                vm,
                generation: Generation(0),
                revision: 1,
                owner,
                holders,
                ack_quorum,
                every_ms,
                state: VmState::Running,
                changed_unix_ms: self.now,
                newest: None,
                claim,
                policy,
                leased: None,
                swap: None,
                alive: None,
                failover: None,
            }),
            RegistryRequest::ForgetVm { vm, force } => self.forget(&vm, force),
            RegistryRequest::Note { vm, entry } => self.note(&vm, entry),
            RegistryRequest::RegisterSegments {
                vm,
                generation,
                segments,
            } => self.register(vm, generation, segments),
            RegistryRequest::GrantLease {
                subject,
                ttl_ms,
                lease,
            } => self.grant(subject, ttl_ms, lease),
            RegistryRequest::RevokeLease { subject, lease } => {
                let held = self.leases.get(lease, Instant::now());
                if held.is_some_and(|r| Key::from(&r.subject) == Key::from(&subject)) {
                    self.end_lease(&Key::from(&subject))?;
                }
                Ok(RegistryResponse::Done)
            }
            RegistryRequest::SetDraining { name, draining } => {
                let mut node = self.node(&name)?;
                if node.is_draining() != draining {
                    node.draining = draining.then_some(true);
                    self.put_node(&node)?;
                }
                Ok(RegistryResponse::Node(node))
            }
            RegistryRequest::LeaveNode { name, force } => self.leave(&name, force),
            other => not_a_change(&other),
        }
    }

    fn join(&mut self, node: NodeRecord, replace: bool) -> Result<RegistryResponse, RegistryError> {
        let known = self.node(&node.name).ok();
        if known.is_none() {
            let table = self.txn.open_table(NODES).map_err(storage)?;
            if redb::ReadableTableMetadata::len(&table).map_err(storage)? >= MAX_NODES {
                return rules::too_many("nodes", MAX_NODES);
            }
        }
        let other = known.as_ref().is_some_and(|old| old.id != node.id);
        let node = rules::joined(known, node, replace, self.now)?;
        if other {
            self.end_lease(&Key::Node(node.name.clone()))?;
        }
        self.put_node(&node)?;
        Ok(RegistryResponse::Node(node))
    }

    fn leave(&mut self, name: &str, force: bool) -> Result<RegistryResponse, RegistryError> {
        let Ok(node) = self.node(name) else {
            return Ok(RegistryResponse::Done);
        };
        let holds: Vec<_> = all_vms(&self.txn.open_table(VMS).map_err(storage)?)?
            .into_iter()
            .filter(|vm| vm.holders.contains(&node.address))
            .map(|vm| vm.vm)
            .collect();
        rules::may_leave(&node, &holds, force)?;
        self.end_lease(&Key::Node(name.to_owned()))?;
        let mut table = self.txn.open_table(NODES).map_err(storage)?;
        table.remove(name).map_err(storage)?;
        self.changed.push(Changed::Node {
            name: name.to_owned(),
        });
        Ok(RegistryResponse::Done)
    }

    fn create(&mut self, new: VmRecord) -> Result<RegistryResponse, RegistryError> {
        let known = self.vm(new.vm.clone()).ok();
        if known.is_none() {
            let table = self.txn.open_table(VMS).map_err(storage)?;
            if redb::ReadableTableMetadata::len(&table).map_err(storage)? >= MAX_VMS {
                return rules::too_many("VMs", MAX_VMS);
            }
        }
        let last = {
            let retired = self.txn.open_table(RETIRED).map_err(storage)?;
            let last = retired.get(new.vm.as_str()).map_err(storage)?;
            last.map_or(0, |v| v.value())
        };
        match rules::created(known, new, Generation(last))? {
            Step::Keep(record) => Ok(RegistryResponse::Vm(record)),
            Step::Write(record) => {
                self.put_vm(&record)?;
                Ok(RegistryResponse::Vm(record))
            }
        }
    }

    fn vm(&self, vm: VmId) -> Result<VmRecord, RegistryError> {
        let table = self.txn.open_table(VMS).map_err(storage)?;
        read_vm(&table, &vm)?.ok_or(RegistryError::NoSuchVm { vm })
    }

    fn node(&self, name: &str) -> Result<NodeRecord, RegistryError> {
        let table = self.txn.open_table(NODES).map_err(storage)?;
        let found = table.get(name).map_err(storage)?;
        let bytes = found.ok_or_else(|| RegistryError::NoSuchNode {
            name: name.to_owned(),
        })?;
        decode(bytes.value())
    }

    fn put_vm(&mut self, record: &VmRecord) -> Result<(), RegistryError> {
        let mut table = self.txn.open_table(VMS).map_err(storage)?;
        table
            .insert(record.vm.as_str(), encode(record).as_slice())
            .map_err(storage)?;
        self.changed.push(Changed::Vm {
            vm: record.vm.clone(),
        });
        Ok(())
    }

    fn put_node(&mut self, node: &NodeRecord) -> Result<(), RegistryError> {
        let mut table = self.txn.open_table(NODES).map_err(storage)?;
        table
            .insert(node.name.as_str(), encode(node).as_slice())
            .map_err(storage)?;
        self.changed.push(Changed::Node {
            name: node.name.clone(),
        });
        Ok(())
    }

    fn grant(
        &mut self,
        subject: LeaseSubject,
        ttl_ms: u64,
        lease: u64,
    ) -> Result<RegistryResponse, RegistryError> {
        let record = match &subject {
            LeaseSubject::Node { name, id } => {
                let node = self.node(name)?;
                if node.id != *id {
                    return Err(RegistryError::NodeTaken {
                        name: node.name,
                        address: node.address,
                    });
                }
                None
            }
            LeaseSubject::Owner { vm, generation } => {
                let mut record = self.vm(vm.clone())?;
                rules::owned(&record, *generation)?;
                record.leased = Some(generation.0);
                // Seen by whoever looked at the record while there was no lease.
                record.revision += 1;
                self.put_vm(&record)?;
                Some(record)
            }
        };
        self.end_lease(&Key::from(&subject))?;
        self.changed.push(super::leases::changed(&subject));
        let granted = LeaseRecord { subject, ttl_ms };
        let mut table = self.txn.open_table(LEASES).map_err(storage)?;
        table
            .insert(lease, encode(&granted).as_slice())
            .map_err(storage)?;
        self.lease_changes.push(LeaseChange::Grant(lease, granted));
        Ok(RegistryResponse::Lease(Lease { id: lease, ttl_ms }, record))
    }

    fn end_lease(&mut self, key: &Key) -> Result<(), RegistryError> {
        match self.leases.id_of(key) {
            Some(id) => self.remove_lease(id),
            None => Ok(()),
        }
    }

    /// Takes a lease out of the file, and after the commit out of memory.
    pub(super) fn remove_lease(&mut self, id: u64) -> Result<(), RegistryError> {
        let mut table = self.txn.open_table(LEASES).map_err(storage)?;
        let removed = table.remove(id).map_err(storage)?;
        if let Some(bytes) = removed {
            let record: LeaseRecord = decode(bytes.value())?;
            self.changed.push(super::leases::changed(&record.subject));
        }
        self.lease_changes.push(LeaseChange::Remove(id));
        Ok(())
    }

    fn forget(&mut self, vm: &VmId, force: bool) -> Result<RegistryResponse, RegistryError> {
        let Ok(record) = self.vm(vm.clone()) else {
            return Ok(RegistryResponse::Done);
        };
        rules::forgettable(&record, force)?;
        self.end_lease(&Key::Vm(vm.as_str().to_owned()))?;
        self.changed.push(Changed::Vm { vm: vm.clone() });
        let mut table = self.txn.open_table(VMS).map_err(storage)?;
        table.remove(vm.as_str()).map_err(storage)?;
        let mut retired = self.txn.open_table(RETIRED).map_err(storage)?;
        retired
            .insert(vm.as_str(), record.generation.0)
            .map_err(storage)?;
        let mut segments = self.txn.open_table(SEGMENTS).map_err(storage)?;
        let all = (vm.as_str(), 0, 0)..=(vm.as_str(), u64::MAX, u64::MAX);
        segments.retain_in(all, |_, _| false).map_err(storage)?;
        let mut counts = self.txn.open_table(COUNTS).map_err(storage)?;
        counts.remove(vm.as_str()).map_err(storage)?;
        let mut history = self.txn.open_table(HISTORY).map_err(storage)?;
        history.remove(vm.as_str()).map_err(storage)?;
        Ok(RegistryResponse::Done)
    }

    fn note(&mut self, vm: &VmId, entry: HistoryEntry) -> Result<RegistryResponse, RegistryError> {
        self.vm(vm.clone())?;
        let mut table = self.txn.open_table(HISTORY).map_err(storage)?;
        let history = rules::noted(read_history(&table, vm)?, entry, self.now);
        table
            .insert(vm.as_str(), encode(&history).as_slice())
            .map_err(storage)?;
        Ok(RegistryResponse::Done)
    }

    fn register(
        &mut self,
        vm: VmId,
        generation: Generation,
        given: Vec<SegmentRecord>,
    ) -> Result<RegistryResponse, RegistryError> {
        let mut record = self.vm(vm)?;
        rules::owned(&record, generation)?;
        let mut table = self.txn.open_table(SEGMENTS).map_err(storage)?;
        let mut counts = self.txn.open_table(COUNTS).map_err(storage)?;
        let mut count = counts
            .get(record.vm.as_str())
            .map_err(storage)?
            .map_or(0, |v| v.value());
        let mut newest = record.newest.clone();
        for segment in given {
            rules::check_segment(&record, &segment)?;
            let (g, e) = position(&segment.name);
            let key = (record.vm.as_str(), g, e);
            let known = match table.get(key).map_err(storage)? {
                Some(bytes) => Some(decode::<SegmentRecord>(bytes.value())?),
                None => None,
            };
            let (segment, new) = rules::registered(known, segment)?;
            count += u64::from(new);
            if newest.as_ref().is_none_or(|n| n.name < segment.name) {
                newest = Some(Held {
                    name: segment.name.clone(),
                    checkpoint: segment.checkpoint,
                });
            }
            table.insert(key, encode(&segment).as_slice()).map_err(storage)?;
        }
        while count > MAX_SEGMENTS_PER_VM && drop_oldest(&mut table, record.vm.as_str())? {
            count -= 1;
        }
        counts.insert(record.vm.as_str(), count).map_err(storage)?;
        drop((table, counts));
        if newest != record.newest {
            // Not a change that a compare-and-swap of the holders should stumble over: the revision stays. Nor one
            // that anyone waits for: it would wake them ten times a second.
            record.newest = newest;
            let mut vms = self.txn.open_table(VMS).map_err(storage)?;
            vms.insert(record.vm.as_str(), encode(&record).as_slice())
                .map_err(storage)?;
        }
        Ok(RegistryResponse::Done)
    }
}

fn not_a_change<T>(request: &RegistryRequest) -> Result<T, RegistryError> {
    rules::invalid(format!("a question among changes: {request:.40?}"))
}

/// Drops the oldest record of a VM; false when there is none.
fn drop_oldest(table: &mut Segments<'_>, id: &str) -> Result<bool, RegistryError> {
    let mut all = table
        .range((id, 0, 0)..=(id, u64::MAX, u64::MAX))
        .map_err(storage)?;
    let Some(item) = all.next() else { return Ok(false) };
    let (key, _) = item.map_err(storage)?;
    let (_, generation, epoch) = key.value();
    drop((key, all));
    table.remove((id, generation, epoch)).map_err(storage)?;
    Ok(true)
}
