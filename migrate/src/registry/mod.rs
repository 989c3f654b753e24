//! Who owns which VM under which generation, which nodes there are, and which segments are committed.
//!
//! ```text
//!  Registry (typed operations) --RegistryRequest--> Backend --+-- Embedded: redb in an agent's data directory
//!                                                             +-- Remote: the same request to that agent
//! ```
//!
//! Invariants: each request is one transaction, durable before it is answered; a generation only rises, by
//! compare-and-swap; a segment name means one checkpoint for ever; whoever changes a VM's record or registers
//! segments names its generation and is refused when that is over; every list is paged.
//!
//! What it never does: it decides nothing about who should own a VM, and the data path never waits for it.

mod embedded;
mod error;
mod remote;
mod types;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use segment::{Generation, SegmentName, VmId};

use crate::transport::Client;

pub use embedded::{Embedded, OpenError};
pub use error::RegistryError;
pub use remote::Remote;
pub use types::*;

/// Sixteen random bytes, by which a registry knows a repeated request or a node's data directory again.
#[must_use]
pub fn random_id() -> [u8; 16] {
    let mut id = [0; 16];
    // Without randomness every claim would look like every other: nothing may go on then.
    getrandom::fill(&mut id).expect("the kernel gives random bytes");
    id
}

/// What a backend returns.
pub type Answer<'a> = Pin<Box<dyn Future<Output = Result<RegistryResponse, RegistryError>> + Send + 'a>>;

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
}

/// A registry, by its typed operations.
#[derive(Clone)]
pub struct Registry(Arc<dyn Backend>);

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registry({})", self.0.address())
    }
}

macro_rules! expect {
    ($self:ident, $request:expr, $pattern:pat => $value:expr) => {
        match $self.0.call($request).await? {
            $pattern => Ok($value),
            other => Err($self.unexpected(&other)),
        }
    };
}

impl Registry {
    /// By a backend.
    #[must_use]
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Self(backend)
    }

    /// The one that the agent at `address` (HOST:PORT) keeps. Connects when it is first asked; `name` is who asks,
    /// for the agent's log.
    #[must_use]
    pub fn remote(address: &str, name: &str) -> Self {
        Self(Arc::new(Remote::new(address, name)))
    }

    /// The one that the agents at `holders` belong to: the first that answers says where it is.
    ///
    /// # Errors
    /// [`RegistryError::Unavailable`] when none of them answers.
    pub async fn of_holders(holders: &[String], name: &str) -> Result<Self, RegistryError> {
        let mut failures = Vec::new();
        for holder in holders {
            match Client::connect(holder, name).await {
                Ok(client) => {
                    let at = client.welcome().registry.clone();
                    return Ok(Self::remote(at.as_deref().unwrap_or(holder), name));
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
        self.0.address()
    }

    /// Passes a request on as it is.
    ///
    /// # Errors
    /// What the registry refuses, or that it is not there.
    pub async fn call(&self, request: RegistryRequest) -> Result<RegistryResponse, RegistryError> {
        self.0.call(request).await
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
        } = new;
        let claim = random_id();
        let request = RegistryRequest::CreateVm {
            vm,
            owner,
            holders,
            ack_quorum,
            every_ms,
            claim,
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

    fn unexpected(&self, response: &RegistryResponse) -> RegistryError {
        RegistryError::Unavailable {
            address: self.0.address(),
            why: format!("it answered something else ({response:.60?})"),
        }
    }
}
