//! Who owns which VM under which generation, which nodes there are, and which segments are committed.
//!
//! ```text
//!  Registry (typed operations) --RegistryRequest--> Backend --+-- Embedded: redb in an agent's data directory
//!                                                             +-- Etcd: a cluster of its own
//!                                                             +-- Remote: the same request to an agent that has
//!                                                                         one of the two
//! ```
//!
//! Invariants: each request is one transaction, durable before it is answered; a generation only rises, by
//! compare-and-swap; a segment name means one checkpoint for ever; whoever changes a VM's record or registers
//! segments names its generation and is refused when that is over; every list is paged. An answer carries where it
//! stands in the registry's history ([`Stamp`]): one from the past is refused.
//!
//! A lease says that a node or an owner lives: it is renewed by them, and runs out by the registry's clock alone. Whoever
//! waits for changes hears of it, and every record that is read says whether its lease is held.
//!
//! What it never does: it decides nothing about who should own a VM, and the data path never waits for it.

mod addr;
mod changes;
mod embedded;
mod error;
mod etcd;
mod remote;
mod request;
pub mod rules;
mod seen;
mod types;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use segment::{Generation, SegmentName, VmId};

use crate::placement::Policy;
use crate::transport::{Client, Identity};

pub use addr::{EtcdAccess, EtcdAddr, MAX_ENDPOINTS, RegistryAddr};
pub use embedded::{Embedded, OpenError};
pub use error::RegistryError;
pub use etcd::{AccessError, Etcd};
pub use remote::Remote;
pub use request::{Changed, Changes, RegistryRequest, RegistryResponse};
pub use seen::{Seen, Stamp, recall, written};
pub use types::*;

/// Sixteen random bytes, by which a registry knows a repeated request or a node's data directory again.
#[must_use]
pub fn random_id() -> [u8; 16] {
    let mut id = [0; 16];
    // Without randomness every claim would look like every other: nothing may go on then.
    getrandom::fill(&mut id).expect("the kernel gives random bytes");
    id
}

/// A lease's number: random, and never 0.
#[must_use]
pub fn random_lease() -> u64 {
    let id = random_id();
    // 63 bits, for etcd's are signed.
    (u64::from_le_bytes(std::array::from_fn(|i| id[i])) >> 1).max(1)
}

/// What a backend says, and where that stands in the registry's history.
#[derive(Debug)]
pub struct Answered {
    /// What it did, or refuses.
    pub outcome: Result<RegistryResponse, RegistryError>,
    /// Where; unknown when the registry was not reached.
    pub stamp: Option<Stamp>,
}

/// What a backend returns.
pub type Answer<'a> = Pin<Box<dyn Future<Output = Answered> + Send + 'a>>;

/// Something that answers registry requests, each in one transaction.
pub trait Backend: Send + Sync {
    /// Answers `request`.
    fn call(&self, request: RegistryRequest) -> Answer<'_>;

    /// Where it is, for messages.
    fn address(&self) -> String;
}

/// What a new VM is protected by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVm {
    /// Its id.
    pub vm: VmId,
    /// Who owns it.
    pub owner: String,
    /// Where its segments go, as HOST:PORT.
    pub holders: Vec<String>,
    /// How many of them make a checkpoint committed.
    pub ack_quorum: u32,
    /// How often a checkpoint is taken.
    pub every_ms: u64,
    /// What its holders were chosen by; absent when a person named them.
    pub policy: Option<Policy>,
}

/// A registry, by its typed operations.
#[derive(Clone)]
pub struct Registry(Arc<Asked>);

struct Asked {
    backend: Box<dyn Backend>,
    seen: Seen,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registry({})", self.address())
    }
}

macro_rules! expect {
    ($self:ident, $request:expr, $pattern:pat => $value:expr) => {
        match $self.call($request).await? {
            $pattern => Ok($value),
            other => Err($self.unexpected(&other)),
        }
    };
}

impl Registry {
    /// By a backend.
    #[must_use]
    pub fn new(backend: impl Backend + 'static) -> Self {
        Self::after(backend, None)
    }

    /// By a backend, of which an earlier process saw `seen`.
    #[must_use]
    pub fn after(backend: impl Backend + 'static, seen: Option<Stamp>) -> Self {
        Self(Arc::new(Asked {
            backend: Box::new(backend),
            seen: Seen::from(seen),
        }))
    }

    /// The one that the agents at `address` (HOST:PORT,..) answer for. Connects when it is first asked, as
    /// `identity`.
    #[must_use]
    pub fn remote(address: &str, identity: &Identity) -> Self {
        Self::new(Remote::new(address, identity))
    }

    /// The one that the agents at `holders` belong to: the first that answers says where it is.
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`] when none of them answers.
    pub async fn of_holders(holders: &[String], identity: &Identity) -> Result<Self, RegistryError> {
        let mut failures = Vec::new();
        for holder in holders {
            match Client::connect(holder, identity).await {
                Ok(client) => {
                    let at = client.welcome().registry.clone();
                    return Ok(Self::remote(at.as_deref().unwrap_or(holder), identity));
                }
                Err(error) => failures.push(error.in_full()),
            }
        }
        let (address, why) = (holders.join(","), failures.join("; "));
        Err(RegistryError::Unavailable { address, why })
    }

    /// Where it is, for messages.
    #[must_use]
    pub fn address(&self) -> String {
        self.0.backend.address()
    }

    /// The newest place of its history that was seen.
    #[must_use]
    pub fn seen(&self) -> Option<Stamp> {
        self.0.seen.floor()
    }

    /// Passes a request on as it is.
    ///
    /// # Errors
    /// What the registry refuses, or that it is not there, or that it answers from the past.
    pub async fn call(&self, request: RegistryRequest) -> Result<RegistryResponse, RegistryError> {
        self.ask(request).await.outcome
    }

    /// Passes a request on as it is, and says where the answer stands.
    pub async fn ask(&self, request: RegistryRequest) -> Answered {
        let Asked { backend, seen } = &*self.0;
        let floor = seen.floor();
        let answered = backend.call(request).await;
        if let Some(stamp) = answered.stamp
            && let Err(past) = seen.note(&backend.address(), floor, stamp)
        {
            return Answered {
                outcome: Err(past),
                stamp: answered.stamp,
            };
        }
        answered
    }

    /// A node is there.
    ///
    /// # Errors
    /// [`RegistryError::NodeTaken`] when another has that name and `replace` is not set.
    pub async fn join_node(&self, node: NodeRecord, replace: bool) -> Result<NodeRecord, RegistryError> {
        expect!(self, RegistryRequest::JoinNode { node, replace }, RegistryResponse::Node(node) => node)
    }

    /// A page of the nodes, by name, and whether there are more.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn list_nodes(
        &self,
        after: Option<String>,
        limit: u32,
    ) -> Result<(Vec<NodeRecord>, bool), RegistryError> {
        let request = RegistryRequest::ListNodes { after, limit };
        expect!(self, request, RegistryResponse::Nodes(nodes, more) => (nodes, more))
    }

    /// Protects a new VM: its first generation is in the record.
    ///
    /// # Errors
    /// [`RegistryError::VmTaken`] when there is one of that name.
    pub async fn create_vm(&self, new: NewVm) -> Result<VmRecord, RegistryError> {
        let NewVm {
            vm,
            owner,
            holders,
            ack_quorum,
            every_ms,
            policy,
        } = new;
        let claim = random_id();
        let request = RegistryRequest::CreateVm {
            vm,
            owner,
            holders,
            ack_quorum,
            every_ms,
            claim,
            policy,
        };
        expect!(self, request, RegistryResponse::Vm(vm) => vm)
    }

    /// One VM.
    ///
    /// # Errors
    /// [`RegistryError::NoSuchVm`].
    pub async fn get_vm(&self, vm: &VmId) -> Result<VmRecord, RegistryError> {
        expect!(self, RegistryRequest::GetVm { vm: vm.clone() }, RegistryResponse::Vm(vm) => vm)
    }

    /// A page of the VMs, by id, and whether there are more.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn list_vms(
        &self,
        after: Option<VmId>,
        limit: u32,
    ) -> Result<(Vec<VmRecord>, bool), RegistryError> {
        let request = RegistryRequest::ListVms { after, limit };
        expect!(self, request, RegistryResponse::Vms(vms, more) => (vms, more))
    }

    /// Makes `new_owner` the owner, one generation above `expected`. The VM is `Stopped` then.
    ///
    /// # Errors
    /// [`RegistryError::Conflict`] when the generation is not `expected`.
    pub async fn raise_generation(
        &self,
        vm: &VmId,
        expected: Generation,
        new_owner: &str,
    ) -> Result<VmRecord, RegistryError> {
        let claim = random_id();
        let request = RegistryRequest::RaiseGeneration {
            vm: vm.clone(),
            expected,
            new_owner: new_owner.to_owned(),
            claim,
        };
        expect!(self, request, RegistryResponse::Vm(vm) => vm)
    }

    /// Sets the holders of a VM, guarded by generation and revision.
    ///
    /// # Errors
    /// [`RegistryError::Fenced`] or [`RegistryError::Revision`] when it changed meanwhile.
    pub async fn set_holders(
        &self,
        vm: &VmId,
        generation: Generation,
        revision: u64,
        holders: Vec<String>,
        ack_quorum: u32,
    ) -> Result<VmRecord, RegistryError> {
        let request = RegistryRequest::SetHolders {
            vm: vm.clone(),
            generation,
            revision,
            holders,
            ack_quorum,
        };
        expect!(self, request, RegistryResponse::Vm(vm) => vm)
    }

    /// The owner says whether it runs.
    ///
    /// # Errors
    /// [`RegistryError::Fenced`] when its generation is over.
    pub async fn set_vm_state(
        &self,
        vm: &VmId,
        generation: Generation,
        state: VmState,
    ) -> Result<VmRecord, RegistryError> {
        let request = RegistryRequest::SetVmState {
            vm: vm.clone(),
            generation,
            state,
        };
        expect!(self, request, RegistryResponse::Vm(vm) => vm)
    }

    /// The owner says how its VM fails over.
    ///
    /// # Errors
    /// [`RegistryError::Fenced`] when its generation is over.
    pub async fn set_failover(
        &self,
        vm: &VmId,
        generation: Generation,
        failover: Option<Failover>,
    ) -> Result<VmRecord, RegistryError> {
        let request = RegistryRequest::SetFailover {
            vm: vm.clone(),
            generation,
            failover,
        };
        expect!(self, request, RegistryResponse::Vm(vm) => vm)
    }

    /// Adds an entry to a VM's history.
    ///
    /// # Errors
    /// When there is no such VM, or the entry is too long.
    pub async fn note(&self, vm: &VmId, entry: HistoryEntry) -> Result<(), RegistryError> {
        let request = RegistryRequest::Note {
            vm: vm.clone(),
            entry,
        };
        expect!(self, request, RegistryResponse::Done => ())
    }

    /// What happened to a VM, oldest first: the last [`MAX_HISTORY`] entries.
    ///
    /// # Errors
    /// When there is no such VM.
    pub async fn history(&self, vm: &VmId) -> Result<Vec<HistoryEntry>, RegistryError> {
        let request = RegistryRequest::History { vm: vm.clone() };
        expect!(self, request, RegistryResponse::History(entries) => entries)
    }

    /// Removes a VM and its segments' records.
    ///
    /// # Errors
    /// [`RegistryError::Invalid`] when it is recorded as running and `force` is not set.
    pub async fn forget_vm(&self, vm: &VmId, force: bool) -> Result<(), RegistryError> {
        expect!(self, RegistryRequest::ForgetVm { vm: vm.clone(), force }, RegistryResponse::Done => ())
    }

    /// Registers committed checkpoints, at most [`MAX_REGISTER_SEGMENTS`].
    ///
    /// # Errors
    /// [`RegistryError::Fenced`], or [`RegistryError::DuplicateName`] (and then none of them is registered).
    pub async fn register_segments(
        &self,
        vm: &VmId,
        generation: Generation,
        segments: Vec<SegmentRecord>,
    ) -> Result<(), RegistryError> {
        let request = RegistryRequest::RegisterSegments {
            vm: vm.clone(),
            generation,
            segments,
        };
        expect!(self, request, RegistryResponse::Done => ())
    }

    /// A page of a VM's segments, oldest first, and whether there are more.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn list_segments(
        &self,
        vm: &VmId,
        after: Option<SegmentName>,
        limit: u32,
    ) -> Result<(Vec<SegmentRecord>, bool), RegistryError> {
        let request = RegistryRequest::ListSegments {
            vm: vm.clone(),
            after,
            limit,
        };
        expect!(self, request, RegistryResponse::Segments(segments, more) => (segments, more))
    }

    /// Begins a change of a VM's holders, or with none gives it up.
    ///
    /// # Errors
    /// [`RegistryError::Fenced`] or [`RegistryError::Revision`] when it changed meanwhile.
    pub async fn set_swap(
        &self,
        vm: &VmId,
        generation: Generation,
        revision: u64,
        swap: Option<HolderSwap>,
    ) -> Result<VmRecord, RegistryError> {
        let request = RegistryRequest::SetSwap {
            vm: vm.clone(),
            generation,
            revision,
            swap,
        };
        expect!(self, request, RegistryResponse::Vm(vm) => vm)
    }

    /// A lease that runs out `ttl_ms` after its last renewal; of an owner with its VM's record.
    ///
    /// # Errors
    /// [`RegistryError::Fenced`] when an owner's generation is over.
    pub async fn grant_lease(
        &self,
        subject: &LeaseSubject,
        ttl_ms: u64,
        lease: u64,
    ) -> Result<(Lease, Option<VmRecord>), RegistryError> {
        let request = RegistryRequest::GrantLease {
            subject: subject.clone(),
            ttl_ms,
            lease,
        };
        expect!(self, request, RegistryResponse::Lease(lease, record) => (lease, record))
    }

    /// Renews a lease; of an owner with its VM's record.
    ///
    /// # Errors
    /// [`RegistryError::LeaseGone`], or [`RegistryError::Fenced`] when an owner's generation is over.
    pub async fn keep_alive(
        &self,
        subject: &LeaseSubject,
        lease: u64,
    ) -> Result<(Lease, Option<VmRecord>), RegistryError> {
        let request = RegistryRequest::KeepAlive {
            subject: subject.clone(),
            lease,
        };
        expect!(self, request, RegistryResponse::Lease(lease, record) => (lease, record))
    }

    /// Gives a lease back.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn revoke_lease(&self, subject: &LeaseSubject, lease: u64) -> Result<(), RegistryError> {
        let request = RegistryRequest::RevokeLease {
            subject: subject.clone(),
            lease,
        };
        expect!(self, request, RegistryResponse::Done => ())
    }

    /// Which records changed after `after`; waits for something, at most for `wait_ms`. Begin with 0: the answer says
    /// that it is not complete, and from where to go on.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn await_changes(&self, after: u64, wait_ms: u32) -> Result<Changes, RegistryError> {
        let request = RegistryRequest::AwaitChanges { after, wait_ms };
        expect!(self, request, RegistryResponse::Changes(changes) => changes)
    }

    /// The changes from now on, as a stream.
    #[must_use]
    pub fn watch(&self) -> Watch {
        Watch {
            registry: self.clone(),
            after: 0,
        }
    }

    /// Whether a node is being drained.
    ///
    /// # Errors
    /// [`RegistryError::NoSuchNode`].
    pub async fn set_draining(&self, name: &str, draining: bool) -> Result<NodeRecord, RegistryError> {
        let request = RegistryRequest::SetDraining {
            name: name.to_owned(),
            draining,
        };
        expect!(self, request, RegistryResponse::Node(node) => node)
    }

    /// Removes a node that holds nothing any more.
    ///
    /// # Errors
    /// [`RegistryError::Invalid`] when VMs name it as a holder and `force` is not set.
    pub async fn leave_node(&self, name: &str, force: bool) -> Result<(), RegistryError> {
        let request = RegistryRequest::LeaveNode {
            name: name.to_owned(),
            force,
        };
        expect!(self, request, RegistryResponse::Done => ())
    }

    /// All nodes.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn all_nodes(&self) -> Result<Vec<NodeRecord>, RegistryError> {
        let mut nodes: Vec<NodeRecord> = Vec::new();
        loop {
            let after = nodes.last().map(|n| n.name.clone());
            let (page, more) = self.list_nodes(after, MAX_PAGE_RECORDS).await?;
            let end = !more || page.is_empty();
            nodes.extend(page);
            if end {
                return Ok(nodes);
            }
        }
    }

    /// All VMs, without their segments.
    ///
    /// # Errors
    /// When the registry fails.
    pub async fn all_vms(&self) -> Result<Vec<VmRecord>, RegistryError> {
        let mut vms: Vec<VmRecord> = Vec::new();
        loop {
            let after = vms.last().map(|v| v.vm.clone());
            let (page, more) = self.list_vms(after, MAX_PAGE_RECORDS).await?;
            let end = !more || page.is_empty();
            vms.extend(page);
            if end {
                return Ok(vms);
            }
        }
    }

    fn unexpected(&self, response: &RegistryResponse) -> RegistryError {
        RegistryError::Unavailable {
            address: self.address(),
            why: format!("it answered something else ({response:.60?})"),
        }
    }
}

/// How long one question for changes waits.
const WATCH_WAIT_MS: u32 = 10_000;

/// The changes of a registry, one after the other.
#[derive(Debug)]
pub struct Watch {
    registry: Registry,
    after: u64,
}

impl Watch {
    /// Waits for the next changes. They are hints: what a record says now is read anew. Answers without any from time to
    /// time, so that who waits may look around; when [`Changes::complete`] is false everything may have changed, and so
    /// it is at the first answer.
    ///
    /// # Errors
    /// When the registry fails; asking again goes on from where this one was.
    pub async fn next(&mut self) -> Result<Changes, RegistryError> {
        let changes = self.registry.await_changes(self.after, WATCH_WAIT_MS).await?;
        self.after = changes.revision;
        Ok(changes)
    }
}
