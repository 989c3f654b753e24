//! The requests a registry answers, each in one transaction, and its answers.

use minicbor::{Decode, Encode};
use segment::{Generation, SegmentName, VmId};

use super::types::{
    Failover, HistoryEntry, HolderSwap, Lease, LeaseSubject, NodeRecord, SegmentRecord, VmRecord, VmState,
};
use crate::placement::Policy;

#[cfg(doc)]
use super::{MAX_LEASE_MS, MAX_PAGE_RECORDS, MAX_REGISTER_SEGMENTS, MAX_WAIT_MS, MIN_LEASE_MS};

/// One request; the registry answers each in one transaction.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub enum RegistryRequest {
    /// A node is there. Idempotent.
    #[n(0)]
    JoinNode {
        /// The node.
        #[n(0)]
        node: NodeRecord,
        /// Take the name over from a node that is gone for good.
        #[n(1)]
        replace: bool,
    },
    /// The nodes, by name.
    #[n(1)]
    ListNodes {
        /// After this one.
        #[n(0)]
        after: Option<String>,
        /// At most so many, and at most [`MAX_PAGE_RECORDS`].
        #[n(1)]
        limit: u32,
    },
    /// Protect a new VM. Answered by its record; repeated with the same claim it is idempotent.
    #[n(2)]
    CreateVm {
        /// Its id.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// Who owns it.
        #[n(1)]
        owner: String,
        /// Where its segments go.
        #[n(2)]
        holders: Vec<String>,
        /// How many of them make a checkpoint committed.
        #[n(3)]
        ack_quorum: u32,
        /// How often a checkpoint is taken.
        #[n(4)]
        every_ms: u64,
        /// Drawn by the caller.
        #[cbor(n(5), with = "crate::wire::value")]
        claim: [u8; 16],
        /// What its holders were chosen by.
        #[n(6)]
        policy: Option<Policy>,
    },
    /// One VM.
    #[n(3)]
    GetVm {
        /// Its id.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
    },
    /// The VMs, by id.
    #[n(4)]
    ListVms {
        /// After this one.
        #[cbor(n(0), with = "crate::wire::value")]
        after: Option<VmId>,
        /// At most so many, and at most [`MAX_PAGE_RECORDS`].
        #[n(1)]
        limit: u32,
    },
    /// A new owner: the compare-and-swap of a failover. The VM is `Stopped` until the new owner says it runs.
    #[n(5)]
    RaiseGeneration {
        /// Its id.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// The generation the caller read.
        #[cbor(n(1), with = "crate::wire::value")]
        expected: Generation,
        /// Who owns it then.
        #[n(2)]
        new_owner: String,
        /// Drawn by the caller.
        #[cbor(n(3), with = "crate::wire::value")]
        claim: [u8; 16],
    },
    /// Other holders for the VM.
    #[n(6)]
    SetHolders {
        /// Its id.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// The caller's generation.
        #[cbor(n(1), with = "crate::wire::value")]
        generation: Generation,
        /// The revision the caller read.
        #[n(2)]
        revision: u64,
        /// Where its segments go.
        #[n(3)]
        holders: Vec<String>,
        /// How many of them make a checkpoint committed.
        #[n(4)]
        ack_quorum: u32,
    },
    /// The owner says whether it runs. Idempotent.
    #[n(7)]
    SetVmState {
        /// Its id.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// The caller's generation.
        #[cbor(n(1), with = "crate::wire::value")]
        generation: Generation,
        /// The new state.
        #[n(2)]
        state: VmState,
    },
    /// Remove a stopped VM and its segments' records. Its last generation stays known, so that a new VM of that id
    /// begins above what holders have promised. Idempotent.
    #[n(8)]
    ForgetVm {
        /// Its id.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// Also when it is recorded as running.
        #[n(1)]
        force: bool,
    },
    /// Committed checkpoints. Idempotent: the same checkpoint again adds its holders.
    #[n(9)]
    RegisterSegments {
        /// Of this VM.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// The caller's generation.
        #[cbor(n(1), with = "crate::wire::value")]
        generation: Generation,
        /// At most [`MAX_REGISTER_SEGMENTS`].
        #[n(2)]
        segments: Vec<SegmentRecord>,
    },
    /// The registered segments of a VM, oldest first.
    #[n(10)]
    ListSegments {
        /// Of this VM.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// After this one.
        #[cbor(n(1), with = "crate::wire::value")]
        after: Option<SegmentName>,
        /// At most so many, and at most [`MAX_PAGE_RECORDS`].
        #[n(2)]
        limit: u32,
    },
    /// A lease for a node or an owner, in place of one it had. The record it stands for has to be there.
    #[n(11)]
    GrantLease {
        /// For whom.
        #[n(0)]
        subject: LeaseSubject,
        /// How long it is to be held after each renewal: [`MIN_LEASE_MS`] to [`MAX_LEASE_MS`].
        #[n(1)]
        ttl_ms: u64,
        /// Drawn by the caller: the lease's number, not 0. A repeated request is answered the same.
        #[n(2)]
        lease: u64,
    },
    /// The holder of a lease lives. Of an owner it is answered with its VM's record.
    #[n(12)]
    KeepAlive {
        /// Whose.
        #[n(0)]
        subject: LeaseSubject,
        /// Which.
        #[n(1)]
        lease: u64,
    },
    /// Gives a lease back. Idempotent.
    #[n(13)]
    RevokeLease {
        /// Whose.
        #[n(0)]
        subject: LeaseSubject,
        /// Which.
        #[n(1)]
        lease: u64,
    },
    /// Which records changed after a revision: answered when there is something, or after `wait_ms` with nothing.
    #[n(14)]
    AwaitChanges {
        /// The revision that the last answer gave.
        #[n(0)]
        after: u64,
        /// How long to wait, at most [`MAX_WAIT_MS`].
        #[n(1)]
        wait_ms: u32,
    },
    /// Begins a change of a VM's holder set, or with none gives it up.
    #[n(15)]
    SetSwap {
        /// The VM.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// The caller's generation.
        #[cbor(n(1), with = "crate::wire::value")]
        generation: Generation,
        /// The revision the caller read.
        #[n(2)]
        revision: u64,
        /// The change.
        #[n(3)]
        swap: Option<HolderSwap>,
    },
    /// Whether a node is being drained. Idempotent.
    #[n(16)]
    SetDraining {
        /// The node.
        #[n(0)]
        name: String,
        /// Whether.
        #[n(1)]
        draining: bool,
    },
    /// The owner says how its VM fails over, and which process it is. Idempotent.
    #[n(18)]
    SetFailover {
        /// The VM.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// The caller's generation.
        #[cbor(n(1), with = "crate::wire::value")]
        generation: Generation,
        /// How; by a person's word alone when absent.
        #[n(2)]
        failover: Option<Failover>,
    },
    /// Adds an entry to a VM's history.
    #[n(19)]
    Note {
        /// The VM.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// What happened.
        #[n(1)]
        entry: HistoryEntry,
    },
    /// A VM's history, oldest first.
    #[n(20)]
    History {
        /// The VM.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
    },
    /// Removes a node that holds nothing any more. Idempotent.
    #[n(17)]
    LeaveNode {
        /// The node.
        #[n(0)]
        name: String,
        /// Also when VMs still name it as a holder.
        #[n(1)]
        force: bool,
    },
}

/// What a registry answers.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum RegistryResponse {
    /// Done.
    #[n(0)]
    Done,
    /// One node.
    #[n(1)]
    Node(#[n(0)] NodeRecord),
    /// A page of nodes, and whether there are more.
    #[n(2)]
    Nodes(#[n(0)] Vec<NodeRecord>, #[n(1)] bool),
    /// One VM.
    #[n(3)]
    Vm(#[n(0)] VmRecord),
    /// A page of VMs, and whether there are more.
    #[n(4)]
    Vms(#[n(0)] Vec<VmRecord>, #[n(1)] bool),
    /// A page of segments, and whether there are more.
    #[n(5)]
    Segments(#[n(0)] Vec<SegmentRecord>, #[n(1)] bool),
    /// A lease, and of an owner's renewal the VM's record.
    #[n(6)]
    Lease(#[n(0)] Lease, #[n(1)] Option<VmRecord>),
    /// What changed.
    #[n(7)]
    Changes(#[n(0)] Changes),
    /// A VM's history.
    #[n(8)]
    History(#[n(0)] Vec<HistoryEntry>),
}

/// A record that changed, or whose lease came or went. What it is now is read anew.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
#[cbor(map)]
pub enum Changed {
    /// Of a VM.
    #[n(0)]
    Vm {
        /// Which.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
    },
    /// Of a node.
    #[n(1)]
    Node {
        /// Which.
        #[n(0)]
        name: String,
    },
}

/// What changed after a revision.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Changes {
    /// Up to here; what to ask after next.
    #[n(0)]
    pub revision: u64,
    /// Each record once.
    #[n(1)]
    pub changed: Vec<Changed>,
    /// Whether these are all. If not (the question went too far back), everything may have changed.
    #[n(2)]
    pub complete: bool,
}
