//! The requests that change something, each in one transaction.

use redb::{ReadableTable, WriteTransaction};
use segment::{Generation, SegmentName, VmId};

use super::{COUNTS, NODES, RETIRED, SEGMENTS, VMS, decode, encode, read_vm, storage};
use crate::registry::RegistryError;
use crate::registry::types::{
    MAX_HOLDERS, MAX_LABELS, MAX_NODES, MAX_REGISTER_SEGMENTS, MAX_SEGMENTS_PER_VM, MAX_TEXT_BYTES, MAX_VMS,
    NodeRecord, RegistryRequest, RegistryResponse, SegmentRecord, VmRecord, VmState, position,
};
use crate::wire::Held;

/// The table of segments, in a transaction.
type Segments<'a> = redb::Table<'a, (&'static str, u64, u64), &'static [u8]>;

/// One transaction that changes something.
pub(super) struct Change<'a> {
    pub(super) txn: &'a WriteTransaction,
    pub(super) now: u64,
}

impl Change<'_> {
    pub(super) fn apply(&self, request: RegistryRequest) -> Result<RegistryResponse, RegistryError> {
        match request {
            RegistryRequest::JoinNode { node, replace } => self.join(node, replace),
            RegistryRequest::CreateVm {
                vm,
                owner,
                holders,
                ack_quorum,
                every_ms,
                claim,
            } => {
                check_text("owner", &owner)?;
                check_holders(&holders, ack_quorum)?;
                self.create(VmRecord {
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
                })
            }
            RegistryRequest::RaiseGeneration {
                vm,
                expected,
                new_owner,
                claim,
            } => self.raise(vm, expected, new_owner, claim),
            RegistryRequest::SetHolders {
                vm,
                generation,
                revision,
                holders,
                ack_quorum,
            } => {
                check_holders(&holders, ack_quorum)?;
                let mut record = self.owned(vm, generation)?;
                if record.revision != revision {
                    let VmRecord {
                        vm,
                        revision: current,
                        ..
                    } = record;
                    return Err(RegistryError::Revision {
                        vm,
                        expected: revision,
                        current,
                    });
                }
                record.holders = holders;
                record.ack_quorum = ack_quorum;
                self.put_vm(record)
            }
            RegistryRequest::SetVmState {
                vm,
                generation,
                state,
            } => {
                let mut record = self.owned(vm, generation)?;
                if record.state == state {
                    return Ok(RegistryResponse::Vm(record));
                }
                record.state = state;
                self.put_vm(record)
            }
            RegistryRequest::ForgetVm { vm, force } => self.forget(&vm, force),
            RegistryRequest::RegisterSegments {
                vm,
                generation,
                segments,
            } => self.register(vm, generation, segments),
            RegistryRequest::ListNodes { .. }
            | RegistryRequest::GetVm { .. }
            | RegistryRequest::ListVms { .. }
            | RegistryRequest::ListSegments { .. } => Err(RegistryError::Invalid {
                why: "a question among changes".into(),
            }),
        }
    }

    fn join(&self, mut node: NodeRecord, replace: bool) -> Result<RegistryResponse, RegistryError> {
        check_text("node name", &node.name)?;
        check_text("address", &node.address)?;
        if node.labels.len() > MAX_LABELS || node.roles.len() > MAX_LABELS {
            return Err(RegistryError::TooMany {
                what: "labels of a node".into(),
                max: MAX_LABELS as u64,
            });
        }
        for text in node.labels.iter().flat_map(|(k, v)| [k, v]).chain(&node.roles) {
            check_text("label or role", text)?;
        }
        let mut table = self.txn.open_table(NODES).map_err(storage)?;
        let known = match table.get(node.name.as_str()).map_err(storage)? {
            Some(bytes) => Some(decode::<NodeRecord>(bytes.value())?),
            None => None,
        };
        match known {
            // The same data directory at another address is the same node; another node at the same address has
            // taken its place, for two cannot listen there.
            Some(old) if old.id != node.id && old.address != node.address && !replace => {
                return Err(RegistryError::NodeTaken {
                    name: old.name,
                    address: old.address,
                });
            }
            Some(_) => {}
            None if redb::ReadableTableMetadata::len(&table).map_err(storage)? >= MAX_NODES => {
                return Err(RegistryError::TooMany {
                    what: "nodes".into(),
                    max: MAX_NODES,
                });
            }
            None => {}
        }
        node.joined_unix_ms = self.now;
        table
            .insert(node.name.as_str(), encode(&node).as_slice())
            .map_err(storage)?;
        Ok(RegistryResponse::Node(node))
    }

    fn create(&self, mut new: VmRecord) -> Result<RegistryResponse, RegistryError> {
        let mut table = self.txn.open_table(VMS).map_err(storage)?;
        if let Some(old) = read_vm(&table, &new.vm)? {
            if old.claim == new.claim {
                return Ok(RegistryResponse::Vm(old));
            }
            return Err(RegistryError::VmTaken {
                vm: old.vm,
                owner: old.owner,
                generation: old.generation,
                state: old.state.to_string(),
            });
        }
        if redb::ReadableTableMetadata::len(&table).map_err(storage)? >= MAX_VMS {
            return Err(RegistryError::TooMany {
                what: "VMs".into(),
                max: MAX_VMS,
            });
        }
        let retired = self.txn.open_table(RETIRED).map_err(storage)?;
        // Above what holders may have promised to an earlier VM of this id.
        let last = retired
            .get(new.vm.as_str())
            .map_err(storage)?
            .map_or(0, |v| v.value());
        new.generation = Generation(last).next();
        table
            .insert(new.vm.as_str(), encode(&new).as_slice())
            .map_err(storage)?;
        Ok(RegistryResponse::Vm(new))
    }

    fn raise(
        &self,
        vm: VmId,
        expected: Generation,
        new_owner: String,
        claim: [u8; 16],
    ) -> Result<RegistryResponse, RegistryError> {
        check_text("owner", &new_owner)?;
        let mut record = self.vm(vm)?;
        if record.generation == expected.next() && record.claim == claim {
            // The answer to the first try was lost on its way.
            return Ok(RegistryResponse::Vm(record));
        }
        if record.generation != expected {
            let VmRecord {
                vm,
                generation,
                owner,
                ..
            } = record;
            return Err(RegistryError::Conflict {
                vm,
                expected,
                current: generation,
                owner,
            });
        }
        record.generation = expected.next();
        record.owner = new_owner;
        record.claim = claim;
        record.state = VmState::Stopped;
        self.put_vm(record)
    }

    fn vm(&self, vm: VmId) -> Result<VmRecord, RegistryError> {
        let table = self.txn.open_table(VMS).map_err(storage)?;
        read_vm(&table, &vm)?.ok_or(RegistryError::NoSuchVm { vm })
    }

    /// The record, when `generation` is its current one.
    fn owned(&self, vm: VmId, generation: Generation) -> Result<VmRecord, RegistryError> {
        let record = self.vm(vm)?;
        if record.generation == generation {
            return Ok(record);
        }
        let VmRecord {
            vm,
            generation: current,
            owner,
            ..
        } = record;
        Err(RegistryError::Fenced {
            vm,
            asked: generation,
            current,
            owner,
        })
    }

    fn put_vm(&self, mut record: VmRecord) -> Result<RegistryResponse, RegistryError> {
        record.revision += 1;
        record.changed_unix_ms = self.now;
        let mut table = self.txn.open_table(VMS).map_err(storage)?;
        table
            .insert(record.vm.as_str(), encode(&record).as_slice())
            .map_err(storage)?;
        Ok(RegistryResponse::Vm(record))
    }

    fn forget(&self, vm: &VmId, force: bool) -> Result<RegistryResponse, RegistryError> {
        let mut table = self.txn.open_table(VMS).map_err(storage)?;
        let Some(record) = read_vm(&table, vm)? else {
            return Ok(RegistryResponse::Done);
        };
        if record.state == VmState::Running && !force {
            return Err(RegistryError::Invalid {
                why: format!(
                    "VM {vm} is recorded as running, owned by {}: stop it first by `vmm stop {vm}`, or, if its host is \
                     gone, forget it with --force",
                    record.owner
                ),
            });
        }
        table.remove(vm.as_str()).map_err(storage)?;
        let mut retired = self.txn.open_table(RETIRED).map_err(storage)?;
        retired
            .insert(vm.as_str(), record.generation.0)
            .map_err(storage)?;
        let mut segments = self.txn.open_table(SEGMENTS).map_err(storage)?;
        let all = (vm.as_str(), 0, 0)..=(vm.as_str(), u64::MAX, u64::MAX);
        segments.retain_in(all, |_, _| false).map_err(storage)?;
        self.txn
            .open_table(COUNTS)
            .map_err(storage)?
            .remove(vm.as_str())
            .map_err(storage)?;
        Ok(RegistryResponse::Done)
    }

    fn register(
        &self,
        vm: VmId,
        generation: Generation,
        given: Vec<SegmentRecord>,
    ) -> Result<RegistryResponse, RegistryError> {
        if given.len() > MAX_REGISTER_SEGMENTS {
            let what = "segments in one request".into();
            return Err(RegistryError::TooMany {
                what,
                max: MAX_REGISTER_SEGMENTS as u64,
            });
        }
        let mut record = self.owned(vm, generation)?;
        let mut table = self.txn.open_table(SEGMENTS).map_err(storage)?;
        let mut counts = self.txn.open_table(COUNTS).map_err(storage)?;
        let mut count = counts
            .get(record.vm.as_str())
            .map_err(storage)?
            .map_or(0, |v| v.value());
        let mut newest = record.newest.clone();
        for mut segment in given {
            check_segment(&record, &segment)?;
            let (g, e) = position(&segment.name);
            let key = (record.vm.as_str(), g, e);
            let known = match table.get(key).map_err(storage)? {
                Some(bytes) => Some(decode::<SegmentRecord>(bytes.value())?),
                None => None,
            };
            match known {
                Some(old) if old.checkpoint != segment.checkpoint => {
                    let SegmentRecord {
                        name,
                        checkpoint: given,
                        ..
                    } = segment;
                    return Err(RegistryError::DuplicateName {
                        name,
                        held: old.checkpoint,
                        given,
                    });
                }
                Some(old) => {
                    let more = old.holders.into_iter().filter(|h| !segment.holders.contains(h));
                    let more: Vec<_> = more.collect();
                    segment.holders.extend(more);
                    segment.holders.sort();
                    segment.holders.truncate(MAX_HOLDERS);
                }
                None => count += 1,
            }
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
        if newest != record.newest {
            // Not a change that a compare-and-swap of the holders should stumble over: the revision stays.
            record.newest = newest;
            let mut vms = self.txn.open_table(VMS).map_err(storage)?;
            vms.insert(record.vm.as_str(), encode(&record).as_slice())
                .map_err(storage)?;
        }
        Ok(RegistryResponse::Done)
    }
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

fn check_segment(record: &VmRecord, segment: &SegmentRecord) -> Result<(), RegistryError> {
    let SegmentName { vm, generation, .. } = &segment.name;
    if *vm != record.vm || *generation > record.generation {
        let why = format!(
            "segment {} cannot be registered for VM {} under generation {}",
            segment.name, record.vm, record.generation
        );
        return Err(RegistryError::Invalid { why });
    }
    if segment.holders.len() > MAX_HOLDERS {
        return Err(RegistryError::TooMany {
            what: "holders".into(),
            max: MAX_HOLDERS as u64,
        });
    }
    segment.holders.iter().try_for_each(|h| check_text("holder", h))
}

fn check_holders(holders: &[String], ack_quorum: u32) -> Result<(), RegistryError> {
    let invalid = |why: String| Err(RegistryError::Invalid { why });
    if holders.len() > MAX_HOLDERS {
        return Err(RegistryError::TooMany {
            what: "holders".into(),
            max: MAX_HOLDERS as u64,
        });
    }
    for (i, holder) in holders.iter().enumerate() {
        check_text("holder", holder)?;
        if holders[..i].contains(holder) {
            return invalid(format!(
                "the holder {holder} is named twice: one holder counts once"
            ));
        }
    }
    if ack_quorum == 0 || ack_quorum as usize > holders.len() {
        return invalid(format!(
            "an ack quorum of {ack_quorum} with {} holders: it has to be from 1 to the number of holders",
            holders.len()
        ));
    }
    Ok(())
}

fn check_text(what: &str, text: &str) -> Result<(), RegistryError> {
    let printable = !text.is_empty() && text.len() <= MAX_TEXT_BYTES && !text.chars().any(char::is_control);
    if printable {
        return Ok(());
    }
    let shown: String = text.chars().take(40).collect();
    Err(RegistryError::Invalid {
        why: format!("{shown:?} is no {what}: use 1 to {MAX_TEXT_BYTES} printable bytes"),
    })
}
