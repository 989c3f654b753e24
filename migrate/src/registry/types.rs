//! What the registry records, and the requests it answers.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use minicbor::{Decode, Encode};
use segment::{CheckpointId, Digest, Epoch, Generation, SegmentName, VmId};
use serde::Serialize;

use crate::lease::{LeaseTerms, TermsError};
use crate::placement::Policy;
use crate::wire::{Held, PhaseTime};

/// The most holders of one VM.
pub const MAX_HOLDERS: usize = 16;
/// The most bytes of a node's name, an owner or an address.
pub const MAX_TEXT_BYTES: usize = 255;
/// The most labels of a node.
pub const MAX_LABELS: usize = 64;
/// The most segments one request registers: they are one transaction, and etcd takes 128 operations in one.
pub const MAX_REGISTER_SEGMENTS: usize = 96;
/// The most records one answer lists.
pub const MAX_PAGE_RECORDS: u32 = 1000;
/// The most nodes of a cluster.
pub const MAX_NODES: u64 = 10_000;
/// The most VMs of a cluster.
pub const MAX_VMS: u64 = 100_000;
/// The shortest lease.
pub const MIN_LEASE_MS: u64 = 100;
/// The longest.
pub const MAX_LEASE_MS: u64 = 600_000;
/// The longest that a question for changes waits.
pub const MAX_WAIT_MS: u32 = 20_000;
/// The most segments of one VM; beyond, the oldest records are dropped (the holders still list what they have).
pub const MAX_SEGMENTS_PER_VM: u64 = 20_000;

/// The most entries of a VM's history; the oldest give way.
pub const MAX_HISTORY: usize = 200;
/// The most bytes of what an entry says.
pub const MAX_DETAIL_BYTES: usize = 1024;
/// The most times in one entry.
pub const MAX_PHASES: usize = 16;

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
    /// When it joined last, in milliseconds of Unix time. For people: no decision uses it, for clocks differ.
    #[n(5)]
    pub joined_unix_ms: u64,
    /// Bytes its segments may take in all; absent when it does not say.
    #[n(6)]
    pub total_bytes: Option<u64>,
    /// Bytes of them that are free, as it said last.
    #[n(7)]
    pub free_bytes: Option<u64>,
    /// It gets no more segments, and those it has are copied to others.
    #[n(8)]
    pub draining: Option<bool>,
    /// Its lease, when that is held. The registry fills it in at each answer; it is not part of the record.
    #[n(9)]
    pub alive: Option<LiveLease>,
}

impl NodeRecord {
    /// Whether its lease is held.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.alive.is_some()
    }

    /// Whether it is being drained.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining == Some(true)
    }

    /// Whether it has this role.
    #[must_use]
    pub fn has_role(&self, role: Role) -> bool {
        let role = role.to_string();
        self.roles.contains(&role)
    }
}

/// A lease that is held: nobody's clock but the registry's has run out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct LiveLease {
    /// Which.
    #[n(0)]
    pub lease: u64,
    /// How long it is held after each renewal, in milliseconds.
    #[n(1)]
    pub ttl_ms: u64,
}

/// What a lease stands for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(map)]
pub enum LeaseSubject {
    /// A node that lives.
    #[n(0)]
    Node {
        /// Its name.
        #[n(0)]
        name: String,
        /// Its id.
        #[cbor(n(1), with = "crate::wire::value")]
        id: [u8; 16],
    },
    /// An owner that lives and owns a VM under a generation.
    #[n(1)]
    Owner {
        /// The VM.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// The owner's generation.
        #[cbor(n(1), with = "crate::wire::value")]
        generation: Generation,
    },
}

impl fmt::Display for LeaseSubject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node { name, .. } => write!(f, "node {name}"),
            Self::Owner { vm, generation } => write!(f, "the owner of VM {vm} under generation {generation}"),
        }
    }
}

/// A lease as a backend keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct LeaseRecord {
    #[n(0)]
    pub(super) subject: LeaseSubject,
    #[n(1)]
    pub(super) ttl_ms: u64,
}

/// A lease as it was granted or renewed: from when the request was *sent*, it is held for `ttl_ms` at least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Lease {
    /// Its number.
    #[n(0)]
    pub id: u64,
    /// How long it is held, in milliseconds.
    #[n(1)]
    pub ttl_ms: u64,
}

/// Whether the owner of a VM lives, as the registry sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LeaseState {
    /// It is held.
    Held,
    /// It was held under this generation and ran out, or was given back.
    Gone,
    /// The owner never took one under this generation: nothing follows from its absence.
    Never,
}

impl fmt::Display for LeaseState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Held => "held",
            Self::Gone => "gone",
            Self::Never => "never taken",
        })
    }
}

/// One change of a generation's holder set, under way.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct HolderSwap {
    /// Who takes a place: has everything committed before it counts.
    #[n(0)]
    pub joining: String,
    /// Whose place it takes; absent when the set grows.
    #[n(1)]
    pub leaving: Option<String>,
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
    /// What its holders are chosen by; absent when a person named them.
    #[n(11)]
    pub policy: Option<Policy>,
    /// The generation under which its owner last took a lease.
    #[n(12)]
    pub leased: Option<u64>,
    /// A change of its holders that is under way: the owner ships to who joins, and completes it.
    #[n(13)]
    pub swap: Option<HolderSwap>,
    /// The owner's lease, when that is held. The registry fills it in at each answer; it is not part of the record.
    #[n(14)]
    pub alive: Option<LiveLease>,
    /// How it is taken over without a person's word; absent when it is not.
    #[n(15)]
    pub failover: Option<Failover>,
}

/// That a VM fails over by itself: its owner runs it under a lease, and by which terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct Failover {
    /// How long one renewal of the owner's lease lasts, in milliseconds.
    #[n(0)]
    pub ttl_ms: u64,
    /// How often it is renewed, in milliseconds.
    #[n(1)]
    pub renew_every_ms: u64,
    /// The owner's process: set before its guest runs, and as long as it may run the record names it.
    #[n(2)]
    pub process: Option<OwnerProcess>,
    /// The owner's process ends when its lease ran out, and does not wait for another.
    #[n(3)]
    pub stop_on_lapse: Option<bool>,
}

impl Failover {
    /// The terms of the lease, checked.
    ///
    /// # Errors
    /// [`TermsError`] when no lease can have them.
    pub fn terms(&self) -> Result<LeaseTerms, TermsError> {
        LeaseTerms {
            ttl: Duration::from_millis(self.ttl_ms),
            renew_every: Duration::from_millis(self.renew_every_ms),
        }
        .check()
    }
}

/// A process, so that whoever shares its host knows it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct OwnerProcess {
    /// Drawn by the host's kernel when it booted.
    #[cbor(n(0), with = "crate::wire::value")]
    #[serde(skip)]
    pub boot: [u8; 16],
    /// The inode of the process's namespace of process numbers.
    #[n(1)]
    pub namespace: u64,
    /// Its number there.
    #[n(2)]
    pub pid: u32,
    /// When it was started, in clock ticks since the boot.
    #[n(3)]
    pub started: u64,
}

impl VmRecord {
    /// Whether its owner lives, as the registry sees it.
    #[must_use]
    pub fn owner_lease(&self) -> LeaseState {
        match (self.alive, self.leased) {
            (Some(_), _) => LeaseState::Held,
            (None, Some(under)) if under == self.generation.0 => LeaseState::Gone,
            (None, _) => LeaseState::Never,
        }
    }
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

/// The order of the states of one VM, as a key.
pub(super) fn position(name: &SegmentName) -> (u64, u64) {
    let (Generation(generation), Epoch(epoch)) = name.position();
    (generation, epoch)
}

/// Something that happened to a VM.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct HistoryEntry {
    /// When, in milliseconds of Unix time; the registry fills it in. For people: no decision uses it, for clocks differ.
    #[n(0)]
    pub at_unix_ms: u64,
    /// Under which generation.
    #[cbor(n(1), with = "crate::wire::value")]
    #[serde(serialize_with = "crate::wire::number")]
    pub generation: Generation,
    /// Which node says so.
    #[n(2)]
    pub node: String,
    /// What, in a word: a newer node may have words that this build does not know.
    #[n(3)]
    pub event: String,
    /// Why and how, for a person.
    #[n(4)]
    pub detail: String,
    /// What was measured.
    #[n(5)]
    pub times: Vec<PhaseTime>,
}

impl HistoryEntry {
    /// An entry of now; too much text is cut.
    #[must_use]
    pub fn new(generation: Generation, node: &str, event: &str, mut detail: String) -> Self {
        let mut end = detail.len().min(MAX_DETAIL_BYTES);
        while !detail.is_char_boundary(end) {
            end -= 1;
        }
        detail.truncate(end);
        // For a terminal.
        let detail = detail.replace(char::is_control, " ");
        Self {
            at_unix_ms: 0,
            generation,
            node: node.to_owned(),
            event: event.to_owned(),
            detail,
            times: Vec::new(),
        }
    }
}
