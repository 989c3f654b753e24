//! Who may ask what of an agent: one pure function.
//!
//! ```text
//! (this node, who asks, what is asked, whose the VM is) -> allowed | Denied{why}
//! ```
//!
//! | Asked | Allowed to |
//! |---|---|
//! | status, list (also of the global store), show; reading the registry | everyone with a certificate of the cluster |
//! | ship a VM's segments | its owner under that generation, by the registry, with the role owner or execute |
//! | seal | execute, for a generation that the registry has not given to another; owner, for one of its own |
//! | what is held of a VM, what is seen of its owner and of that process | execute, store, operator |
//! | fetch | execute, store; the VM's owner |
//! | promote, drill, fold, verify, import | operator; this node itself |
//! | forget, set what is kept | operator, execute; this node itself |
//! | join as a node | that node, with roles that its certificate has |
//! | create a VM | owner, execute, as themselves |
//! | raise a generation | execute, for themselves; owner, of a VM that was theirs |
//! | change a VM's record, register its segments, hold its owner's lease | its owner under that generation |
//! | register copies of what is committed already, propose a change of holders | execute, store |
//! | have a node copy segments | execute, store, operator; under a generation that is |
//! | add to a VM's history | every role, as itself |
//! | hold a node's lease | that node |
//! | drain or remove a node | operator; that node |
//! | forget a VM in the registry | operator, execute |
//!
//! Invariants: nothing here believes what a peer says of itself; every request that there is has an arm.
//!
//! What it never does: it asks nobody. What it must know of a VM's owner is found out before ([`whose`]).

use segment::{Generation, SegmentName, VmId};

use crate::registry::{LeaseSubject, RegistryRequest, SegmentRecord};
use crate::transport::{CertRole, NodeIdentity, Peer};
use crate::wire::Call;

/// What a peer wants.
#[derive(Debug, Clone, Copy)]
pub(super) enum Asked<'a> {
    /// To ship the segments of a VM.
    Ship {
        /// The VM.
        vm: &'a VmId,
        /// As its owner under this generation.
        generation: Generation,
    },
    /// An answer.
    Call(&'a Call),
}

/// Whose a VM is, as far as is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Owner {
    /// This node's, under this generation: the newest that the registry has given out.
    Is {
        /// The generation.
        generation: Generation,
        /// The node.
        node: String,
        /// The newest checkpoint that the registry has as committed; none when that was not asked.
        newest: Option<SegmentName>,
    },
    /// The registry has no such VM.
    Nobody,
    /// The registry is away, or was not asked.
    Unknown,
}

/// Why a peer does not get what it asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Denied {
    /// It never will.
    Never(String),
    /// Its generation is over: an owner stops its guest.
    Over {
        /// The generation that is.
        current: Generation,
    },
    /// Whether it may cannot be told now.
    Later(String),
}

/// The VM and the generation whose owner has to be known to judge this, if any.
pub(super) fn whose<'a>(asked: Asked<'a>) -> Option<(&'a VmId, Option<Generation>)> {
    let call = match asked {
        Asked::Ship { vm, generation } => return Some((vm, Some(generation))),
        Asked::Call(call) => call,
    };
    match call {
        Call::Seal(seal) => Some((&seal.vm, Some(seal.generation))),
        Call::Copy(copy) => Some((&copy.vm, Some(copy.generation))),
        Call::Fetch(fetch) => Some((&fetch.name.vm, None)),
        Call::Registry(request) => match request {
            RegistryRequest::RaiseGeneration { vm, expected, .. } => Some((vm, Some(*expected))),
            RegistryRequest::SetHolders { vm, generation, .. }
            | RegistryRequest::SetVmState { vm, generation, .. }
            | RegistryRequest::SetFailover { vm, generation, .. }
            | RegistryRequest::RegisterSegments { vm, generation, .. }
            | RegistryRequest::SetSwap { vm, generation, .. } => Some((vm, Some(*generation))),
            RegistryRequest::GrantLease { subject, .. }
            | RegistryRequest::KeepAlive { subject, .. }
            | RegistryRequest::RevokeLease { subject, .. } => match subject {
                LeaseSubject::Owner { vm, generation } => Some((vm, Some(*generation))),
                LeaseSubject::Node { .. } => None,
            },
            RegistryRequest::JoinNode { .. }
            | RegistryRequest::ListNodes { .. }
            | RegistryRequest::CreateVm { .. }
            | RegistryRequest::GetVm { .. }
            | RegistryRequest::ListVms { .. }
            | RegistryRequest::ForgetVm { .. }
            | RegistryRequest::ListSegments { .. }
            | RegistryRequest::Note { .. }
            | RegistryRequest::History { .. }
            | RegistryRequest::AwaitChanges { .. }
            | RegistryRequest::SetDraining { .. }
            | RegistryRequest::LeaveNode { .. } => None,
        },
        Call::Status(_)
        | Call::List(_)
        | Call::Show(_)
        | Call::Promote(_)
        | Call::Drill(_)
        | Call::Forget(_)
        | Call::Holding(_)
        | Call::Keep(_)
        | Call::Fold(_)
        | Call::Verify(_)
        | Call::GlobalList(_)
        | Call::GlobalVerify(_)
        | Call::Process(_)
        | Call::OwnerView(_)
        | Call::Import(_) => None,
    }
}

/// Whether what the registry has as committed matters too, when another than the owner asks.
pub(super) fn to_have_as_committed(asked: Asked<'_>) -> bool {
    matches!(
        asked,
        Asked::Call(Call::Registry(RegistryRequest::RegisterSegments { .. }))
    )
}

/// Whether `peer` may have what it asks of the node `here`.
pub(super) fn authorise(here: &str, peer: &Peer, asked: Asked<'_>, owner: &Owner) -> Result<(), Denied> {
    let node = match peer {
        // --insecure-plaintext: who can connect to loopback is trusted with everything.
        Peer::Anyone => return Ok(()),
        Peer::Node(node) => node,
    };
    let call = match asked {
        Asked::Ship { vm, generation } => return ship(node, vm, generation, owner),
        Asked::Call(call) => call,
    };
    let this_node = node.name == here;
    if node.roles.is_empty() && !this_node {
        return never(node, "ask anything here");
    }
    match call {
        Call::Status(_) | Call::List(_) | Call::Show(_) | Call::GlobalList(_) => Ok(()),
        Call::Keep(keep) if keep.policy.is_none() => Ok(()),
        // Whoever has this node's certificate is root on it.
        Call::Promote(_)
        | Call::Drill(_)
        | Call::Forget(_)
        | Call::Keep(_)
        | Call::Fold(_)
        | Call::Verify(_)
        | Call::GlobalVerify(_)
        | Call::Import(_)
            if this_node =>
        {
            Ok(())
        }
        Call::Promote(_) => one_of(node, "promote a VM", &[CertRole::Operator]),
        Call::Drill(_) => one_of(node, "have a copy of a VM run", &[CertRole::Operator]),
        Call::Fold(_) => one_of(node, "have segments folded", &[CertRole::Operator]),
        Call::Verify(_) | Call::GlobalVerify(_) => {
            one_of(node, "have segments verified", &[CertRole::Operator])
        }
        // Whose the segments are is known only when they have been read: an owner has Ship for its own.
        Call::Import(_) => one_of(node, "import an archive", &[CertRole::Operator]),
        // An agent passes these two on, for an operator, to the VM's other holders.
        Call::Forget(_) => one_of(node, "forget a VM", &[CertRole::Operator, CertRole::Execute]),
        Call::Keep(_) => one_of(
            node,
            "say what is kept of a VM",
            &[CertRole::Operator, CertRole::Execute],
        ),
        Call::Holding(_) => one_of(
            node,
            "ask what is held",
            &[CertRole::Operator, CertRole::Execute, CertRole::Store],
        ),
        Call::Process(_) | Call::OwnerView(_) => one_of(
            node,
            "ask what becomes of an owner",
            &[CertRole::Operator, CertRole::Execute, CertRole::Store],
        ),
        Call::Seal(seal) => self::seal(node, &seal.vm, seal.generation, owner),
        Call::Copy(copy) => {
            let roles = [CertRole::Operator, CertRole::Execute, CertRole::Store];
            one_of(node, "have a node copy segments", &roles)?;
            given_out(&copy.vm, copy.generation, owner).map(drop)
        }
        Call::Fetch(fetch) => {
            let allowed = [CertRole::Operator, CertRole::Execute, CertRole::Store];
            let own = matches!(owner, Owner::Is { node: owner, .. } if *owner == node.name);
            match own && node.has(CertRole::Owner) {
                true => Ok(()),
                false => one_of(node, &format!("have segments of VM {}", fetch.name.vm), &allowed),
            }
        }
        Call::Registry(request) => registry(node, request, owner),
    }
}

fn registry(node: &NodeIdentity, request: &RegistryRequest, owner: &Owner) -> Result<(), Denied> {
    match request {
        RegistryRequest::ListNodes { .. }
        | RegistryRequest::GetVm { .. }
        | RegistryRequest::ListVms { .. }
        | RegistryRequest::ListSegments { .. }
        | RegistryRequest::History { .. }
        | RegistryRequest::AwaitChanges { .. } => Ok(()),
        // Of some role it is: checked before.
        RegistryRequest::Note { entry, .. } => as_itself(node, &entry.node, "tell the history of a VM as"),
        RegistryRequest::JoinNode { node: joining, .. } => {
            one_of(node, "join as a node", &[CertRole::Execute, CertRole::Store])?;
            as_itself(node, &joining.name, "join as")?;
            let has = |role: &String| node.roles.iter().any(|r| r.to_string() == *role);
            match joining.roles.iter().find(|role| !has(role)) {
                None => Ok(()),
                Some(role) => never(node, &format!("join with the role {role}")),
            }
        }
        RegistryRequest::CreateVm { vm, owner, .. } => {
            one_of(
                node,
                &format!("register VM {vm}"),
                &[CertRole::Owner, CertRole::Execute],
            )?;
            as_itself(node, owner, "register a VM of")
        }
        RegistryRequest::RaiseGeneration { vm, new_owner, .. } => {
            as_itself(node, new_owner, "give a VM to")?;
            let own = matches!(owner, Owner::Is { node: owner, .. } if *owner == node.name);
            match own {
                true => one_of(
                    node,
                    &format!("take VM {vm} up"),
                    &[CertRole::Owner, CertRole::Execute],
                ),
                false => one_of(node, &format!("take VM {vm} over"), &[CertRole::Execute]),
            }
        }
        RegistryRequest::SetHolders { vm, generation, .. }
        | RegistryRequest::SetFailover { vm, generation, .. }
        | RegistryRequest::SetVmState { vm, generation, .. } => change(node, vm, *generation, owner),
        // Proposed by an agent that looks after the holders; carried out by the owner alone.
        RegistryRequest::SetSwap { .. } if keeps(node) => Ok(()),
        RegistryRequest::SetSwap { vm, generation, .. } => change(node, vm, *generation, owner),
        RegistryRequest::RegisterSegments {
            vm,
            generation,
            segments,
        } => match owner {
            Owner::Is {
                node: owner, newest, ..
            } if *owner != node.name && keeps(node) => copied(node, vm, segments, newest.as_ref()),
            Owner::Is { .. } | Owner::Nobody | Owner::Unknown => change(node, vm, *generation, owner),
        },
        RegistryRequest::GrantLease { subject, .. }
        | RegistryRequest::KeepAlive { subject, .. }
        | RegistryRequest::RevokeLease { subject, .. } => match subject {
            LeaseSubject::Owner { vm, generation } => change(node, vm, *generation, owner),
            LeaseSubject::Node { name, .. } => {
                one_of(node, "hold a node's lease", &[CertRole::Execute, CertRole::Store])?;
                as_itself(node, name, "hold the lease of")
            }
        },
        RegistryRequest::SetDraining { name, .. } | RegistryRequest::LeaveNode { name, .. }
            if *name == node.name =>
        {
            one_of(
                node,
                "leave",
                &[CertRole::Execute, CertRole::Store, CertRole::Operator],
            )
        }
        RegistryRequest::SetDraining { name, .. } => {
            one_of(node, &format!("drain node {name}"), &[CertRole::Operator])
        }
        RegistryRequest::LeaveNode { name, .. } => {
            one_of(node, &format!("remove node {name}"), &[CertRole::Operator])
        }
        RegistryRequest::ForgetVm { vm, .. } => one_of(
            node,
            &format!("forget VM {vm}"),
            &[CertRole::Operator, CertRole::Execute],
        ),
    }
}

/// A VM's record is changed by its owner alone.
fn change(node: &NodeIdentity, vm: &VmId, asked: Generation, owner: &Owner) -> Result<(), Denied> {
    let what = format!("change the record of VM {vm}");
    one_of(node, &what, &[CertRole::Owner, CertRole::Execute])?;
    match owner {
        Owner::Is {
            generation,
            node: owner,
            ..
        } if *generation == asked => as_itself(node, owner, "change the record of a VM of"),
        // The registry refuses these itself, and says how it stands.
        Owner::Is { .. } | Owner::Nobody | Owner::Unknown => Ok(()),
    }
}

/// Whether it is one that may hold segments.
fn keeps(node: &NodeIdentity) -> bool {
    node.has(CertRole::Execute) || node.has(CertRole::Store)
}

/// Who copied segments says that they are there too; that something is committed, its owner alone says.
fn copied(
    node: &NodeIdentity,
    vm: &VmId,
    segments: &[SegmentRecord],
    newest: Option<&SegmentName>,
) -> Result<(), Denied> {
    let committed = |s: &&SegmentRecord| newest.is_some_and(|newest| s.name.position() <= newest.position());
    match segments.iter().find(|s| !committed(s)) {
        None => Ok(()),
        Some(s) => Err(Denied::Never(format!(
            "{} may not register {} as committed: it is newer than what the owner of VM {vm} has registered",
            node.name, s.name
        ))),
    }
}

/// The owner of the generation that was asked for, when it is the newest that was given out.
fn given_out<'a>(vm: &VmId, asked: Generation, owner: &'a Owner) -> Result<&'a str, Denied> {
    match owner {
        Owner::Is { generation, .. } if *generation > asked => Err(Denied::Over { current: *generation }),
        Owner::Is { generation, .. } if *generation < asked => Err(Denied::Never(format!(
            "generation {asked} of VM {vm} was never given out: the registry is at {generation}"
        ))),
        Owner::Is { node, .. } => Ok(node),
        Owner::Nobody => Err(Denied::Never(format!(
            "the registry has no VM {vm}: it was forgotten, or this agent belongs to another registry than its owner"
        ))),
        Owner::Unknown => Err(Denied::Later(format!(
            "whose VM {vm} is under generation {asked} is not known here, and the registry is away"
        ))),
    }
}

/// What is shipped is written by the VM's owner alone.
fn ship(node: &NodeIdentity, vm: &VmId, asked: Generation, owner: &Owner) -> Result<(), Denied> {
    let what = format!("ship VM {vm}");
    one_of(node, &what, &[CertRole::Owner, CertRole::Execute])?;
    as_itself(node, given_out(vm, asked, owner)?, "ship a VM of")
}

/// A seal is asked for by the node that has raised the generation: to take the VM over, or to take up its own again.
fn seal(node: &NodeIdentity, vm: &VmId, asked: Generation, owner: &Owner) -> Result<(), Denied> {
    let what = format!("seal VM {vm}");
    let own = matches!(owner, Owner::Is { generation, node: owner, .. } if *owner == node.name && *generation == asked);
    match own {
        true => return one_of(node, &what, &[CertRole::Owner, CertRole::Execute]),
        false => one_of(node, &what, &[CertRole::Execute])?,
    }
    match given_out(vm, asked, owner) {
        Ok(owner) => as_itself(node, owner, "seal a VM of"),
        // A takeover must not fail because a holder cannot see the registry: who may execute could have raised the
        // generation itself.
        Err(Denied::Later(_)) => Ok(()),
        Err(denied) => Err(denied),
    }
}

fn one_of(node: &NodeIdentity, what: &str, roles: &[CertRole]) -> Result<(), Denied> {
    if roles.iter().any(|role| node.has(*role)) {
        return Ok(());
    }
    let needed: Vec<_> = roles.iter().map(CertRole::to_string).collect();
    let has: Vec<_> = node.roles.iter().map(CertRole::to_string).collect();
    Err(Denied::Never(format!(
        "{} may not {what}: that takes the role {}, and its certificate has {}",
        node.name,
        needed.join(" or "),
        has.join(",")
    )))
}

fn as_itself(node: &NodeIdentity, other: &str, what: &str) -> Result<(), Denied> {
    match node.name == other {
        true => Ok(()),
        false => Err(Denied::Never(format!(
            "{} may not {what} {}: its certificate is not that node's",
            node.name,
            other.chars().take(80).collect::<String>()
        ))),
    }
}

fn never(node: &NodeIdentity, what: &str) -> Result<(), Denied> {
    Err(Denied::Never(format!(
        "{} may not {what}: its certificate does not say so",
        node.name
    )))
}
