//! Nodes and VMs: read, ruled on, written if nobody changed them meanwhile.

use std::collections::BTreeMap;

use segment::{Generation, VmId};

use super::keys::{Kv, Tip, Txn, end_of};
use super::{Done, Inner, MAX_TRIES, decode, encode, kept, living, place, unix_ms, whole};
use crate::registry::RegistryError;
use crate::registry::request::{RegistryRequest, RegistryResponse};
use crate::registry::rules::{self, Step};
use crate::registry::types::{
    HistoryEntry, MAX_NODES, MAX_SEGMENTS_PER_VM, MAX_VMS, NodeRecord, SegmentRecord, VmRecord, VmState,
};
use crate::wire::Held;

/// A VM, as one read found it.
pub(super) struct FoundVm {
    /// The record and its revision; absent when there is none.
    pub(super) record: Option<(VmRecord, u64)>,
    pub(super) tip: Tip,
    pub(super) tip_revision: u64,
    /// The revision of the owner's lease's key; 0 when it is not held.
    pub(super) lease_revision: u64,
}

fn revision(kv: Option<&Kv>) -> u64 {
    kv.map_or(0, |kv| kv.revision)
}

impl Inner {
    fn vm_txn(&self, vm: &VmId) -> Txn {
        let keys = &self.keys;
        Txn::default()
            .get(&keys.vm(vm))
            .get(&keys.tip(vm))
            .get(&keys.owner(vm))
    }

    pub(super) fn found_vm(&self, vm: Option<&Kv>, tip: Option<&Kv>, lease: Option<&Kv>) -> Done<FoundVm> {
        let (tip_revision, lease_revision) = (revision(tip), revision(lease));
        let tip: Tip = match tip {
            Some(kv) => decode(&kv.value)?,
            None => Tip::default(),
        };
        let lease = self.lease_of(lease)?;
        let record = match vm {
            Some(kv) => Some((whole(decode(&kv.value)?, &tip, lease), kv.revision)),
            None => None,
        };
        Ok(FoundVm {
            record,
            tip,
            tip_revision,
            lease_revision,
        })
    }

    pub(super) async fn read_vm(&self, vm: &VmId) -> Done<FoundVm> {
        let [record, tip, lease] = self.read(&self.vm_txn(vm)).await?;
        self.found_vm(record.kvs.first(), tip.kvs.first(), lease.kvs.first())
    }

    /// One of the requests that change a VM's record and nothing else.
    pub(super) async fn change_vm(&self, vm: &VmId, request: &RegistryRequest) -> Done<RegistryResponse> {
        let raises = matches!(request, RegistryRequest::RaiseGeneration { .. });
        for _ in 0..MAX_TRIES {
            let found = self.read_vm(vm).await?;
            let (record, at) = found
                .record
                .ok_or_else(|| RegistryError::NoSuchVm { vm: vm.clone() })?;
            let Some(step) = rules::changed(request, record, unix_ms()) else {
                return rules::invalid(format!("not a change of a VM: {request:.40?}"));
            };
            let mut record = match step? {
                Step::Keep(record) => return Ok(RegistryResponse::Vm(record)),
                Step::Write(record) => record,
            };
            let mut txn = Txn::default()
                .guard(&self.keys.vm(vm), at)
                .put(&self.keys.vm(vm), &kept(&record));
            if raises {
                // The owner before renews in vain from now on.
                txn = txn.delete(&self.keys.owner(vm));
                record.alive = None;
            }
            if self.commit(&txn).await?.done {
                return Ok(RegistryResponse::Vm(record));
            }
        }
        busy(format!("VM {vm}"))
    }

    pub(super) async fn create(&self, request: RegistryRequest) -> Done<RegistryResponse> {
        let RegistryRequest::CreateVm {
            vm,
            owner,
            holders,
            ack_quorum,
            every_ms,
            claim,
            policy,
        } = request
        else {
            return rules::invalid("not a new VM".into());
        };
        let new = VmRecord {
            vm: vm.clone(),
            generation: Generation(0),
            revision: 1,
            owner,
            holders,
            ack_quorum,
            every_ms,
            state: VmState::Running,
            changed_unix_ms: unix_ms(),
            newest: None,
            claim,
            policy,
            leased: None,
            swap: None,
            alive: None,
            failover: None,
        };
        for _ in 0..MAX_TRIES {
            let read = self
                .vm_txn(&vm)
                .get(&self.keys.retired(&vm))
                .count(&self.keys.folder("state/vm"));
            let [record, tip, lease, retired, all] = self.read(&read).await?;
            let retired = retired.kvs.first();
            let found = self.found_vm(record.kvs.first(), tip.kvs.first(), lease.kvs.first())?;
            let (known, at) = found.record.unzip();
            if known.is_none() && all.count >= MAX_VMS {
                return rules::too_many("VMs", MAX_VMS);
            }
            let last: u64 = match retired {
                Some(kv) => decode(&kv.value)?,
                None => 0,
            };
            let record = match rules::created(known, new.clone(), Generation(last))? {
                Step::Keep(record) => return Ok(RegistryResponse::Vm(record)),
                Step::Write(record) => record,
            };
            let txn = Txn::default()
                .guard(&self.keys.vm(&vm), at.unwrap_or(0))
                .guard(&self.keys.retired(&vm), revision(retired))
                .put(&self.keys.vm(&vm), &kept(&record));
            if self.commit(&txn).await?.done {
                return Ok(RegistryResponse::Vm(record));
            }
        }
        busy(format!("VM {vm}"))
    }

    pub(super) async fn forget(&self, vm: &VmId, force: bool) -> Done<RegistryResponse> {
        for _ in 0..MAX_TRIES {
            let Some((record, at)) = self.read_vm(vm).await?.record else {
                return Ok(RegistryResponse::Done);
            };
            rules::forgettable(&record, force)?;
            let segments = self.keys.segments(vm);
            let txn = Txn::default()
                .guard(&self.keys.vm(vm), at)
                .delete(&self.keys.vm(vm))
                .delete(&self.keys.owner(vm))
                .delete(&self.keys.tip(vm))
                .delete(&self.keys.history(vm))
                .delete_range(&segments, &end_of(&segments))
                .put(&self.keys.retired(vm), &encode(&record.generation.0));
            if self.commit(&txn).await?.done {
                return Ok(RegistryResponse::Done);
            }
        }
        busy(format!("VM {vm}"))
    }

    /// What happened to a VM, and the revision of its last change.
    pub(super) async fn read_history(&self, vm: &VmId) -> Done<(Vec<HistoryEntry>, u64, u64)> {
        let read = Txn::default().get(&self.keys.vm(vm)).get(&self.keys.history(vm));
        let [record, history] = self.read(&read).await?;
        let record = record
            .kvs
            .first()
            .ok_or_else(|| RegistryError::NoSuchVm { vm: vm.clone() })?;
        let history = history.kvs.first();
        let entries = match history {
            Some(kv) => decode(&kv.value)?,
            None => Vec::new(),
        };
        Ok((entries, revision(history), record.revision))
    }

    pub(super) async fn note(&self, vm: &VmId, entry: HistoryEntry) -> Done<RegistryResponse> {
        for _ in 0..MAX_TRIES {
            let (history, at, record) = self.read_history(vm).await?;
            let history = rules::noted(history, entry.clone(), unix_ms());
            let key = self.keys.history(vm);
            let txn = Txn::default()
                // Not of one that is forgotten meanwhile.
                .guard(&self.keys.vm(vm), record)
                .guard(&key, at)
                .put(&key, &encode(&history));
            if self.commit(&txn).await?.done {
                return Ok(RegistryResponse::Done);
            }
        }
        busy(format!("the history of VM {vm}"))
    }

    pub(super) async fn register(
        &self,
        vm: &VmId,
        generation: Generation,
        segments: Vec<SegmentRecord>,
    ) -> Done<RegistryResponse> {
        for _ in 0..MAX_TRIES {
            let found = self.read_vm(vm).await?;
            let (record, at) = found
                .record
                .ok_or_else(|| RegistryError::NoSuchVm { vm: vm.clone() })?;
            rules::owned(&record, generation)?;
            // Each name once: a transaction does not write a key twice.
            let mut given: BTreeMap<(u64, u64), SegmentRecord> = BTreeMap::new();
            for segment in &segments {
                rules::check_segment(&record, segment)?;
                let place = place(&segment.name);
                let (merged, _) = rules::registered(given.remove(&place), segment.clone())?;
                given.insert(place, merged);
            }
            let mut read = Txn::default();
            for place in given.keys() {
                read = read.get(&self.keys.segment(vm, *place));
            }
            let known = self.commit(&read).await?.ranges;
            let mut txn = Txn::default()
                .guard(&self.keys.vm(vm), at)
                .guard(&self.keys.tip(vm), found.tip_revision);
            let mut tip = found.tip;
            for ((place, segment), known) in given.into_iter().zip(known) {
                let known = known.kvs.first();
                let key = self.keys.segment(vm, place);
                let old = match known {
                    Some(kv) => Some(decode(&kv.value)?),
                    None => None,
                };
                let (segment, new) = rules::registered(old, segment)?;
                tip.count += u64::from(new);
                if tip.newest.as_ref().is_none_or(|n| n.name < segment.name) {
                    tip.newest = Some(Held {
                        name: segment.name.clone(),
                        checkpoint: segment.checkpoint,
                    });
                }
                txn = txn.guard(&key, revision(known)).put(&key, &encode(&segment));
            }
            txn = txn.put(&self.keys.tip(vm), &encode(&tip));
            let committed = self.commit(&txn).await?;
            if committed.done {
                if tip.count > MAX_SEGMENTS_PER_VM {
                    self.drop_oldest(vm, tip, committed.said.stamp.revision).await?;
                }
                return Ok(RegistryResponse::Done);
            }
        }
        busy(format!("the segments of VM {vm}"))
    }

    /// Drops the oldest records of a VM that has too many; another time, if something changed meanwhile.
    async fn drop_oldest(&self, vm: &VmId, mut tip: Tip, tip_revision: u64) -> Done<()> {
        let (folder, excess) = (self.keys.segments(vm), tip.count - MAX_SEGMENTS_PER_VM);
        let read = Txn::default().keys_only(&folder, &end_of(&folder), excess);
        let [oldest] = self.read(&read).await?;
        let Some(last) = oldest.kvs.last() else {
            return Ok(());
        };
        tip.count -= oldest.kvs.len() as u64;
        let txn = Txn::default()
            .guard(&self.keys.tip(vm), tip_revision)
            .delete_range(&folder, &format!("{}\0", last.key))
            .put(&self.keys.tip(vm), &encode(&tip));
        self.commit(&txn).await.map(drop)
    }

    pub(super) async fn read_node(&self, name: &str) -> Done<Option<(NodeRecord, u64)>> {
        let read = Txn::default()
            .get(&self.keys.node(name))
            .get(&self.keys.alive(name));
        let [node, lease] = self.read(&read).await?;
        let lease = self.lease_of(lease.kvs.first())?;
        Ok(match node.kvs.first() {
            Some(kv) => Some((living(decode(&kv.value)?, lease), kv.revision)),
            None => None,
        })
    }

    pub(super) async fn join(&self, node: NodeRecord, replace: bool) -> Done<RegistryResponse> {
        let name = node.name.clone();
        for _ in 0..MAX_TRIES {
            let known = self.read_node(&name).await?;
            if known.is_none() {
                let [all] = self
                    .read(&Txn::default().count(&self.keys.folder("state/node")))
                    .await?;
                if all.count >= MAX_NODES {
                    return rules::too_many("nodes", MAX_NODES);
                }
            }
            let (known, at) = known.unzip();
            let other = known.as_ref().is_some_and(|old| old.id != node.id);
            let mut alive = known.as_ref().and_then(|old| old.alive);
            let joined = rules::joined(known, node.clone(), replace, unix_ms())?;
            let key = self.keys.node(&name);
            let mut txn = Txn::default()
                .guard(&key, at.unwrap_or(0))
                .put(&key, &encode(&joined));
            if other {
                txn = txn.delete(&self.keys.alive(&name));
                alive = None;
            }
            if self.commit(&txn).await?.done {
                return Ok(RegistryResponse::Node(NodeRecord { alive, ..joined }));
            }
        }
        busy(format!("node {name}"))
    }

    pub(super) async fn set_draining(&self, name: &str, draining: bool) -> Done<RegistryResponse> {
        for _ in 0..MAX_TRIES {
            let found = self.read_node(name).await?;
            let (mut node, at) = found.ok_or_else(|| RegistryError::NoSuchNode {
                name: name.to_owned(),
            })?;
            if node.is_draining() == draining {
                return Ok(RegistryResponse::Node(node));
            }
            node.draining = draining.then_some(true);
            let record = NodeRecord {
                alive: None,
                ..node.clone()
            };
            let key = self.keys.node(name);
            let txn = Txn::default().guard(&key, at).put(&key, &encode(&record));
            if self.commit(&txn).await?.done {
                return Ok(RegistryResponse::Node(node));
            }
        }
        busy(format!("node {name}"))
    }

    pub(super) async fn leave(&self, name: &str, force: bool) -> Done<RegistryResponse> {
        for _ in 0..MAX_TRIES {
            let Some((node, at)) = self.read_node(name).await? else {
                return Ok(RegistryResponse::Done);
            };
            let holds = self.held_at(&node.address).await?;
            rules::may_leave(&node, &holds, force)?;
            let txn = Txn::default()
                .guard(&self.keys.node(name), at)
                .delete(&self.keys.node(name))
                .delete(&self.keys.alive(name));
            if self.commit(&txn).await?.done {
                return Ok(RegistryResponse::Done);
            }
        }
        busy(format!("node {name}"))
    }
}

pub(super) fn busy<T>(what: String) -> Done<T> {
    Err(RegistryError::Busy { what })
}
