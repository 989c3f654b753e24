//! What every backend does with a request: pure. A backend reads records, asks here, and writes what comes back in
//! one transaction that is guarded by what it read.

use segment::{Generation, SegmentName, VmId};

use super::RegistryError;
use super::request::RegistryRequest;
use super::types::{
    HistoryEntry, HolderSwap, LeaseSubject, MAX_DETAIL_BYTES, MAX_HISTORY, MAX_HOLDERS, MAX_LABELS,
    MAX_LEASE_MS, MAX_PHASES, MAX_REGISTER_SEGMENTS, MAX_TEXT_BYTES, MIN_LEASE_MS, NodeRecord, SegmentRecord,
    VmRecord, VmState,
};

/// What becomes of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step<T> {
    /// It is as the request wants it already: a repeated request.
    Keep(T),
    /// It is to be written.
    Write(T),
}

/// What a rule says.
pub type Ruled<T> = Result<T, RegistryError>;

/// What a request says of itself: lengths, counts and characters.
pub(super) fn check(request: &RegistryRequest) -> Ruled<()> {
    match request {
        RegistryRequest::JoinNode { node, .. } => check_node(node),
        RegistryRequest::CreateVm {
            owner,
            holders,
            ack_quorum,
            policy,
            ..
        } => {
            check_text("owner", owner)?;
            if let Some(policy) = policy {
                policy.check().map_err(|why| RegistryError::Invalid { why })?;
            }
            check_holders(holders, *ack_quorum)
        }
        RegistryRequest::RaiseGeneration { new_owner, .. } => check_text("owner", new_owner),
        RegistryRequest::SetHolders {
            holders, ack_quorum, ..
        } => check_holders(holders, *ack_quorum),
        RegistryRequest::SetSwap {
            swap: Some(HolderSwap { joining, leaving }),
            ..
        } => {
            check_text("holder", joining)?;
            leaving.iter().try_for_each(|l| check_text("holder", l))
        }
        RegistryRequest::RegisterSegments { segments, .. } if segments.len() > MAX_REGISTER_SEGMENTS => {
            too_many("segments in one request", MAX_REGISTER_SEGMENTS as u64)
        }
        RegistryRequest::SetFailover {
            failover: Some(failover),
            ..
        } => failover.terms().map(drop).or_else(|why| invalid(why.to_string())),
        RegistryRequest::Note { entry, .. } => check_entry(entry),
        RegistryRequest::GrantLease {
            subject,
            ttl_ms,
            lease,
        } => {
            if *lease == 0 || i64::try_from(*lease).is_err() {
                return invalid(format!("{lease} is no lease: use 1 to {}", i64::MAX));
            }
            if !(MIN_LEASE_MS..=MAX_LEASE_MS).contains(ttl_ms) {
                return invalid(format!(
                    "a lease of {ttl_ms} ms: {MIN_LEASE_MS} ms to {MAX_LEASE_MS} ms is possible"
                ));
            }
            check_subject(subject)
        }
        RegistryRequest::KeepAlive { subject, .. } | RegistryRequest::RevokeLease { subject, .. } => {
            check_subject(subject)
        }
        RegistryRequest::SetDraining { name, .. } | RegistryRequest::LeaveNode { name, .. } => {
            check_text("node name", name)
        }
        RegistryRequest::ListNodes { .. }
        | RegistryRequest::GetVm { .. }
        | RegistryRequest::ListVms { .. }
        | RegistryRequest::SetFailover { failover: None, .. }
        | RegistryRequest::SetVmState { .. }
        | RegistryRequest::SetSwap { swap: None, .. }
        | RegistryRequest::ForgetVm { .. }
        | RegistryRequest::RegisterSegments { .. }
        | RegistryRequest::ListSegments { .. }
        | RegistryRequest::History { .. }
        | RegistryRequest::AwaitChanges { .. } => Ok(()),
    }
}

fn check_entry(entry: &HistoryEntry) -> Ruled<()> {
    check_text("node name", &entry.node)?;
    check_text("event", &entry.event)?;
    if entry.detail.len() > MAX_DETAIL_BYTES {
        return invalid(format!(
            "{} bytes of an event's reason: at most {MAX_DETAIL_BYTES}",
            entry.detail.len()
        ));
    }
    if entry.detail.contains(char::is_control) {
        return invalid("an event's reason has control characters".into());
    }
    if entry.times.len() > MAX_PHASES {
        return too_many("times of an event", MAX_PHASES as u64);
    }
    entry.times.iter().try_for_each(|t| check_text("phase", &t.phase))
}

/// A history with one entry more; the oldest give way.
pub(super) fn noted(mut history: Vec<HistoryEntry>, entry: HistoryEntry, now: u64) -> Vec<HistoryEntry> {
    history.push(HistoryEntry {
        at_unix_ms: now,
        ..entry
    });
    let excess = history.len().saturating_sub(MAX_HISTORY);
    history.drain(..excess);
    history
}

fn check_subject(subject: &LeaseSubject) -> Ruled<()> {
    match subject {
        LeaseSubject::Node { name, .. } => check_text("node name", name),
        LeaseSubject::Owner { .. } => Ok(()),
    }
}

fn check_node(node: &NodeRecord) -> Ruled<()> {
    check_text("node name", &node.name)?;
    check_text("address", &node.address)?;
    if node.labels.len() > MAX_LABELS || node.roles.len() > MAX_LABELS {
        return too_many("labels of a node", MAX_LABELS as u64);
    }
    let texts = node.labels.iter().flat_map(|(k, v)| [k, v]).chain(&node.roles);
    texts.into_iter().try_for_each(|t| check_text("label or role", t))
}

/// A node joins, or says anew what it is.
pub(super) fn joined(
    known: Option<NodeRecord>,
    mut node: NodeRecord,
    replace: bool,
    now: u64,
) -> Ruled<NodeRecord> {
    node.alive = None;
    node.joined_unix_ms = now;
    match known {
        // The same data directory at another address is the same node; another node at the same address has taken
        // its place, for two cannot listen there.
        Some(old) if old.id != node.id && old.address != node.address && !replace => {
            let NodeRecord { name, address, .. } = old;
            return Err(RegistryError::NodeTaken { name, address });
        }
        // Drained by a person's word, which a restart does not take back; another node in its place is another.
        Some(old) if old.id == node.id => node.draining = old.draining,
        Some(_) | None => {}
    }
    Ok(node)
}

/// A VM is protected for the first time. `last` is the generation that an earlier VM of this id had last.
pub(super) fn created(known: Option<VmRecord>, mut new: VmRecord, last: Generation) -> Ruled<Step<VmRecord>> {
    match known {
        None => {
            // Above what holders may have promised to an earlier VM of this id.
            new.generation = last.next();
            Ok(Step::Write(new))
        }
        Some(old) if old.claim == new.claim => Ok(Step::Keep(old)),
        Some(old) => Err(RegistryError::VmTaken {
            vm: old.vm,
            owner: old.owner,
            generation: old.generation,
            state: old.state.to_string(),
        }),
    }
}

/// Refuses a caller whose generation is over.
///
/// # Errors
/// [`RegistryError::Fenced`], which says whose the VM is.
pub fn owned(record: &VmRecord, generation: Generation) -> Ruled<()> {
    if record.generation == generation {
        return Ok(());
    }
    Err(RegistryError::Fenced {
        vm: record.vm.clone(),
        asked: generation,
        current: record.generation,
        owner: record.owner.clone(),
    })
}

fn at_revision(record: &VmRecord, revision: u64) -> Ruled<()> {
    if record.revision == revision {
        return Ok(());
    }
    Err(RegistryError::Revision {
        vm: record.vm.clone(),
        expected: revision,
        current: record.revision,
    })
}

fn touched(mut record: VmRecord, now: u64) -> Step<VmRecord> {
    record.revision += 1;
    record.changed_unix_ms = now;
    Step::Write(record)
}

/// What a request that changes one VM's record makes of it. `None`: it is not such a request.
#[must_use]
pub fn changed(request: &RegistryRequest, mut record: VmRecord, now: u64) -> Option<Ruled<Step<VmRecord>>> {
    let step = match request {
        RegistryRequest::RaiseGeneration {
            expected,
            new_owner,
            claim,
            ..
        } => {
            if record.generation == expected.next() && record.claim == *claim {
                // The answer to the first try was lost on its way.
                return Some(Ok(Step::Keep(record)));
            }
            if record.generation != *expected {
                return Some(Err(RegistryError::Conflict {
                    vm: record.vm,
                    expected: *expected,
                    current: record.generation,
                    owner: record.owner,
                }));
            }
            record.generation = expected.next();
            record.owner.clone_from(new_owner);
            record.claim = *claim;
            record.state = VmState::Stopped;
            // The lease of the owner before says nothing of this one. Nor is its half-done change of holders gone on
            // with: who seals reads a set that does not move.
            record.leased = None;
            record.swap = None;
            Ok(touched(record, now))
        }
        RegistryRequest::SetHolders {
            generation,
            revision,
            holders,
            ack_quorum,
            ..
        } => owned(&record, *generation)
            .and_then(|()| at_revision(&record, *revision))
            .map(|()| {
                record.holders.clone_from(holders);
                record.ack_quorum = *ack_quorum;
                record.swap = None;
                touched(record, now)
            }),
        RegistryRequest::SetSwap {
            generation,
            revision,
            swap,
            ..
        } => owned(&record, *generation)
            .and_then(|()| at_revision(&record, *revision))
            .and_then(|()| check_swap(&record, swap.as_ref()))
            .map(|()| {
                record.swap.clone_from(swap);
                touched(record, now)
            }),
        RegistryRequest::SetFailover {
            generation, failover, ..
        } => owned(&record, *generation).map(|()| {
            if record.failover == *failover {
                return Step::Keep(record);
            }
            record.failover = *failover;
            touched(record, now)
        }),
        RegistryRequest::SetVmState {
            generation, state, ..
        } => owned(&record, *generation).map(|()| {
            if record.state == *state {
                return Step::Keep(record);
            }
            record.state = *state;
            touched(record, now)
        }),
        RegistryRequest::JoinNode { .. }
        | RegistryRequest::ListNodes { .. }
        | RegistryRequest::CreateVm { .. }
        | RegistryRequest::GetVm { .. }
        | RegistryRequest::ListVms { .. }
        | RegistryRequest::ForgetVm { .. }
        | RegistryRequest::RegisterSegments { .. }
        | RegistryRequest::ListSegments { .. }
        | RegistryRequest::GrantLease { .. }
        | RegistryRequest::KeepAlive { .. }
        | RegistryRequest::RevokeLease { .. }
        | RegistryRequest::AwaitChanges { .. }
        | RegistryRequest::SetDraining { .. }
        | RegistryRequest::Note { .. }
        | RegistryRequest::History { .. }
        | RegistryRequest::LeaveNode { .. } => return None,
    };
    Some(step)
}

/// The VM whose record a request changes, when it is one of those of [`changed`].
pub(super) fn vm_of(request: &RegistryRequest) -> Option<&VmId> {
    match request {
        RegistryRequest::RaiseGeneration { vm, .. }
        | RegistryRequest::SetHolders { vm, .. }
        | RegistryRequest::SetSwap { vm, .. }
        | RegistryRequest::SetFailover { vm, .. }
        | RegistryRequest::SetVmState { vm, .. } => Some(vm),
        _ => None,
    }
}

fn check_swap(record: &VmRecord, swap: Option<&HolderSwap>) -> Ruled<()> {
    let Some(HolderSwap { joining, leaving }) = swap else {
        return Ok(());
    };
    if let Some(other) = &record.swap
        && Some(other) != swap
    {
        return invalid(format!(
            "VM {} is changing its holders already: {} joins. One at a time",
            record.vm, other.joining
        ));
    }
    if record.holders.contains(joining) {
        return invalid(format!("{joining} is a holder of VM {} already", record.vm));
    }
    match leaving {
        Some(leaving) if !record.holders.contains(leaving) => {
            invalid(format!("{leaving} is no holder of VM {}", record.vm))
        }
        None if record.holders.len() >= MAX_HOLDERS => too_many("holders", MAX_HOLDERS as u64),
        Some(_) | None => Ok(()),
    }
}

/// Whether a VM may be forgotten.
pub(super) fn forgettable(record: &VmRecord, force: bool) -> Ruled<()> {
    let VmRecord { vm, owner, state, .. } = record;
    if *state == VmState::Running && !force {
        return invalid(format!(
            "VM {vm} is recorded as running, owned by {owner}: stop it first by `vmm stop {vm}`, or, if its host is \
             gone, forget it with --force"
        ));
    }
    Ok(())
}

/// Whether a node may leave, `holds` being the VMs that name it as a holder.
pub(super) fn may_leave(node: &NodeRecord, holds: &[VmId], force: bool) -> Ruled<()> {
    let Some(first) = holds.first() else { return Ok(()) };
    if force {
        return Ok(());
    }
    let name = &node.name;
    invalid(format!(
        "node {name} still holds segments of {} VMs ({first} is one): drain it first by `standby drain {name}` and wait \
         until `standby drain {name} --wait` ends, or, if it is gone for good, let it leave with --force",
        holds.len()
    ))
}

/// What becomes of the record of a committed segment; and whether it is new.
pub(super) fn registered(
    known: Option<SegmentRecord>,
    mut given: SegmentRecord,
) -> Ruled<(SegmentRecord, bool)> {
    match known {
        None => {
            given.holders.sort();
            given.holders.dedup();
            Ok((given, true))
        }
        Some(old) if old.checkpoint != given.checkpoint => Err(RegistryError::DuplicateName {
            name: given.name,
            held: old.checkpoint,
            given: given.checkpoint,
        }),
        Some(old) => {
            let more = old.holders.into_iter().filter(|h| !given.holders.contains(h));
            let more: Vec<_> = more.collect();
            given.holders.extend(more);
            given.holders.sort();
            given.holders.dedup();
            given.holders.truncate(MAX_HOLDERS);
            Ok((given, false))
        }
    }
}

/// Whether a segment may be registered by the owner of `record`.
pub(super) fn check_segment(record: &VmRecord, segment: &SegmentRecord) -> Ruled<()> {
    let SegmentName { vm, generation, .. } = &segment.name;
    if *vm != record.vm || *generation > record.generation {
        return invalid(format!(
            "segment {} cannot be registered for VM {} under generation {}",
            segment.name, record.vm, record.generation
        ));
    }
    if segment.holders.len() > MAX_HOLDERS {
        return too_many("holders", MAX_HOLDERS as u64);
    }
    segment.holders.iter().try_for_each(|h| check_text("holder", h))
}

fn check_holders(holders: &[String], ack_quorum: u32) -> Ruled<()> {
    if holders.len() > MAX_HOLDERS {
        return too_many("holders", MAX_HOLDERS as u64);
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

fn check_text(what: &str, text: &str) -> Ruled<()> {
    let printable = !text.is_empty() && text.len() <= MAX_TEXT_BYTES && !text.chars().any(char::is_control);
    if printable {
        return Ok(());
    }
    let shown: String = text.chars().take(40).collect();
    invalid(format!(
        "{shown:?} is no {what}: use 1 to {MAX_TEXT_BYTES} printable bytes"
    ))
}

pub(super) fn invalid<T>(why: String) -> Ruled<T> {
    Err(RegistryError::Invalid { why })
}

pub(super) fn too_many<T>(what: &str, max: u64) -> Ruled<T> {
    Err(RegistryError::TooMany {
        what: what.into(),
        max,
    })
}
