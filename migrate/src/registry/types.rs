//! What the registry records, and the requests it answers.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use minicbor::{Decode, Encode};
use segment::{CheckpointId, Digest, Epoch, Generation, SegmentName, VmId};
use serde::Serialize;

use crate::wire::Held;

/// The most holders of one VM.
pub const MAX_HOLDERS: usize = 16;
/// The most bytes of a node's name, an owner or an address.
pub const MAX_TEXT_BYTES: usize = 255;
/// The most labels of a node.
pub const MAX_LABELS: usize = 64;
/// The most segments one request registers.
pub const MAX_REGISTER_SEGMENTS: usize = 512;
/// The most records one answer lists.
pub const MAX_PAGE_RECORDS: u32 = 1000;
/// The most nodes of a cluster.
pub const MAX_NODES: u64 = 10_000;
/// The most VMs of a cluster.
pub const MAX_VMS: u64 = 100_000;
/// The most segments of one VM; beyond, the oldest records are dropped (the holders still list what they have).
pub const MAX_SEGMENTS_PER_VM: u64 = 20_000;

/// What a node does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It can run a VM.
    Execute,
    /// It keeps segments.
    Store,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Execute => "execute",
            Self::Store => "store",
        })
    }
}

impl FromStr for Role {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "execute" => Ok(Self::Execute),
            "store" => Ok(Self::Store),
            other => Err(format!(
                "{other:?} is not a role: use execute, store, or execute,store"
            )),
        }
    }
}

/// A host of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct NodeRecord {
    /// Its name.
    #[n(0)]
    pub name: String,
    /// Where its agent listens.
    #[n(1)]
    pub address: String,
    /// Drawn when its data directory was made: tells the same node at a new address from another of that name.
    #[cbor(n(2), with = "crate::wire::value")]
    #[serde(skip)]
    pub id: [u8; 16],
    /// What it does, as text: a newer node may have a role this build does not know.
    #[n(3)]
    pub roles: Vec<String>,
    /// What placement chooses by.
    #[cbor(n(4), with = "crate::wire::value")]
    pub labels: BTreeMap<String, String>,
    /// When it joined last, in milliseconds of Unix time.
    #[n(5)]
    pub joined_unix_ms: u64,
}

/// Whether a VM is meant to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(index_only)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// Its owner runs it.
    #[n(0)]
    Running,
    /// It was stopped, or its new owner has not begun to run it yet.
    #[n(1)]
    Stopped,
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
        })
    }
}

/// A protected VM.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct VmRecord {
    /// Its id.
    #[cbor(n(0), with = "crate::wire::value")]
    #[serde(serialize_with = "crate::wire::text")]
    pub vm: VmId,
    /// The fencing token.
    #[cbor(n(1), with = "crate::wire::value")]
    #[serde(serialize_with = "crate::wire::number")]
    pub generation: Generation,
    /// Raised by one at every change of this record.
    #[n(2)]
    pub revision: u64,
    /// Who owns it under that generation.
    #[n(3)]
    pub owner: String,
    /// Where its segments go.
    #[n(4)]
    pub holders: Vec<String>,
    /// How many of them make a checkpoint committed.
    #[n(5)]
    pub ack_quorum: u32,
    /// How often a checkpoint is taken.
    #[n(6)]
    pub every_ms: u64,
    /// Whether it is meant to run.
    #[n(7)]
    pub state: VmState,
    /// When this record changed, in milliseconds of Unix time.
    #[n(8)]
    pub changed_unix_ms: u64,
    /// The newest checkpoint that was registered as committed.
    #[n(9)]
    pub newest: Option<Held>,
    /// Drawn by who made this generation: tells a repeated request from another's.
    #[cbor(n(10), with = "crate::wire::value")]
    #[serde(skip)]
    pub claim: [u8; 16],
}

/// A committed checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct SegmentRecord {
    /// Its name, unique in the cluster.
    #[cbor(n(0), with = "crate::wire::value")]
    #[serde(serialize_with = "crate::wire::text")]
    pub name: SegmentName,
    /// Which state it is.
    #[cbor(n(1), with = "crate::wire::value")]
    #[serde(serialize_with = "crate::wire::text")]
    pub checkpoint: CheckpointId,
    /// The root digest of the file as it was shipped last.
    #[cbor(n(2), with = "crate::wire::value")]
    #[serde(serialize_with = "crate::wire::text")]
    pub digest: Digest,
    /// The length of that file.
    #[n(3)]
    pub bytes: u64,
    /// What it stands on; absent for a full one.
    #[n(4)]
    pub parent: Option<Held>,
    /// Who has it durably.
    #[n(5)]
    pub holders: Vec<String>,
    /// When the guest was stopped for it, in nanoseconds of Unix time.
    #[n(6)]
    pub created_unix_ns: u64,
}

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
}

/// The order of the states of one VM, as a key.
pub(super) fn position(name: &SegmentName) -> (u64, u64) {
    let (Generation(generation), Epoch(epoch)) = name.position();
    (generation, epoch)
}

/// Where a registry is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RegistryAddr {
    /// In this agent's own data directory.
    Embedded,
    /// At the agent that keeps it, HOST:PORT.
    Agent(String),
}

impl fmt::Display for RegistryAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str("embedded"),
            Self::Agent(address) => f.write_str(address),
        }
    }
}

impl FromStr for RegistryAddr {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        if s == "embedded" {
            return Ok(Self::Embedded);
        }
        match s.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok() => {
                Ok(Self::Agent(s.to_owned()))
            }
            _ => Err(format!(
                "{s:?} is no registry: use `embedded`, or HOST:PORT of the agent that keeps it"
            )),
        }
    }
}
