//! Questions and answers: to the registry, between agents, and from the command line.

use minicbor::{Decode, Encode};
use segment::{CheckpointId, Digest, Generation, SegmentName, VmId};
use serde::Serialize;

use super::Held;
use super::takeover::*;
use crate::registry::{RegistryError, RegistryRequest, RegistryResponse, Stamp};

/// The most segments one answer lists.
pub const MAX_PAGE_SEGMENTS: u32 = 1000;

/// A question.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Call {
    /// To the registry this agent keeps.
    #[n(0)]
    Registry(#[n(0)] RegistryRequest),
    /// How the agent is.
    #[n(1)]
    Status(#[n(0)] Nothing),
    /// The segments it holds.
    #[n(2)]
    List(#[n(0)] ListCall),
    /// One segment in detail.
    #[n(3)]
    Show(#[n(0)] NameCall),
    /// Run the VM here.
    #[n(4)]
    Promote(#[n(0)] PromoteCall),
    /// Forget a VM: its segments here.
    #[n(5)]
    Forget(#[n(0)] ForgetCall),
    /// From another agent: promise the generation, and say what is here.
    #[n(6)]
    Seal(#[n(0)] SealCall),
    /// From another agent: send a segment's file, as chunks on the call's stream after the answer.
    #[n(7)]
    Fetch(#[n(0)] NameCall),
    /// From another agent: say what is here, after a look for damage. Nothing is promised.
    #[n(8)]
    Holding(#[n(0)] HoldingCall),
    /// Say or set what is kept of a VM.
    #[n(9)]
    Keep(#[n(0)] KeepCall),
    /// Write a chain as one full segment.
    #[n(10)]
    Fold(#[n(0)] FoldCall),
    /// Read stored segments again, and check every byte.
    #[n(11)]
    Verify(#[n(0)] VerifyCall),
    /// Take the archive of a restore point, which follows as chunks on the call's stream, ended by `End`.
    #[n(12)]
    Import(#[n(0)] Nothing),
    /// From another agent: copy what the holders of a VM have, to become one.
    #[n(20)]
    Copy(#[n(0)] CopyCall),
    /// From another agent: what became of an owner's process, if it is one of this host.
    #[n(21)]
    Process(#[n(0)] ProcessCall),
    /// From another agent: what this holder sees of a VM's owner.
    #[n(22)]
    OwnerView(#[n(0)] OwnerViewCall),
    /// Run a copy of a VM for a while, to see that it can be.
    #[n(23)]
    Drill(#[n(0)] DrillCall),
    /// The restore points in the global store. Their bytes are those of the whole chain.
    #[n(30)]
    GlobalList(#[n(0)] ListCall),
    /// Read what is in the global store again, and check every byte.
    #[n(31)]
    GlobalVerify(#[n(0)] VerifyCall),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Reply {
    /// Of the registry, and where that stands in its history.
    #[n(0)]
    Registry(#[n(0)] RegistryResponse, #[n(1)] Option<Stamp>),
    /// The registry's refusal.
    #[n(1)]
    RegistryRefused(#[n(0)] RegistryError, #[n(1)] Option<Stamp>),
    /// How the agent is.
    #[n(2)]
    Status(#[n(0)] AgentStatus),
    /// A page of segments.
    #[n(3)]
    List(#[n(0)] SegmentPage),
    /// One segment.
    #[n(4)]
    Show(#[n(0)] SegmentDetail),
    /// The VM runs here, or would.
    #[n(5)]
    Promoted(#[n(0)] PromoteReport),
    /// Forgotten.
    #[n(6)]
    Forgotten(#[n(0)] ForgetReport),
    /// Sealed, or asked what is here: what the holder has.
    #[n(7)]
    Sealed(#[n(0)] SealReport),
    /// The file that follows in chunks, ended by `End`.
    #[n(8)]
    Fetch(#[n(0)] SegmentBrief),
    /// The agent refuses or failed.
    #[n(9)]
    Failed(#[n(0)] Failure),
    /// The holder has promised a higher generation.
    #[n(10)]
    Fenced(#[n(0)] super::Fenced),
    /// What is kept of the VM.
    #[n(11)]
    Kept(#[n(0)] KeepReport),
    /// The chain is one segment.
    #[n(12)]
    Folded(#[n(0)] FoldReport),
    /// What the check found.
    #[n(13)]
    Verified(#[n(0)] VerifyReport),
    /// The restore point is here.
    #[n(14)]
    Imported(#[n(0)] ImportReport),
    /// What was copied.
    #[n(20)]
    Copied(#[n(0)] CopyReport),
    /// What became of the process.
    #[n(21)]
    Process(#[n(0)] ProcessReport),
    /// What the holder sees.
    #[n(22)]
    OwnerView(#[n(0)] OwnerViewReport),
    /// A copy of the VM ran.
    #[n(23)]
    Drilled(#[n(0)] DrillReport),
}

/// Nothing to say beyond the question itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
#[cbor(map)]
pub struct Nothing {}

/// Why an agent did not do what it was asked: in words, for a person.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, thiserror::Error)]
#[cbor(map)]
#[error("{why}")]
pub struct Failure {
    /// What failed, on what, why, and what to do.
    #[n(0)]
    pub why: String,
}

/// Which segments to list.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ListCall {
    /// Of this VM only.
    #[cbor(n(0), with = "crate::wire::value", has_nil)]
    pub vm: Option<VmId>,
    /// After this one.
    #[cbor(n(1), with = "crate::wire::value", has_nil)]
    pub after: Option<SegmentName>,
    /// At most so many, and at most [`MAX_PAGE_SEGMENTS`].
    #[n(2)]
    pub limit: u32,
}

/// Which segment.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct NameCall {
    /// Its name.
    #[cbor(n(0), with = "crate::wire::value")]
    pub name: SegmentName,
}

/// Which VM to forget.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ForgetCall {
    /// The VM.
    #[cbor(n(0), with = "crate::wire::value")]
    pub vm: VmId,
    /// Also when it is recorded as running.
    #[n(1)]
    pub force: bool,
    /// Only what is stored here: the registry and the other holders are left to who asks.
    #[n(2)]
    pub only_here: bool,
    /// How long the answer may wait for the end, in milliseconds; as long as the agent likes when absent.
    #[n(3)]
    pub wait_ms: Option<u32>,
}

/// What was forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct ForgetReport {
    /// How many segments were removed here.
    #[n(0)]
    pub segments: u64,
    /// How many bytes they took.
    #[n(1)]
    pub bytes: u64,
    /// What could not be reached, in words.
    #[n(2)]
    pub notes: Vec<String>,
    /// How many are still to be removed, here and elsewhere: 0 when it is done. It goes on by itself; the same call
    /// again tells how far it is.
    #[n(3)]
    pub left: u64,
}

/// What is to be kept of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct KeepCall {
    /// The VM.
    #[cbor(n(0), with = "crate::wire::value")]
    pub vm: VmId,
    /// The policy, like `last=50,hourly=24`; `default` for the agent's own; absent to ask only.
    #[n(1)]
    pub policy: Option<String>,
    /// Only here: its other holders are left to who asks.
    #[n(2)]
    pub only_here: bool,
}

/// What is kept of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct KeepReport {
    /// The policy that holds here.
    #[n(0)]
    pub policy: String,
    /// Whether it is the agent's default.
    #[n(1)]
    pub is_default: bool,
    /// How many restore points there are here.
    #[n(2)]
    pub points: u64,
    /// How many of them the policy keeps.
    #[n(3)]
    pub kept: u64,
    /// What could not be reached, in words.
    #[n(4)]
    pub notes: Vec<String>,
}

/// Which chain to fold.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct FoldCall {
    /// The VM.
    #[cbor(n(0), with = "crate::wire::value")]
    pub vm: VmId,
    /// The newest link; absent for the newest complete checkpoint.
    #[cbor(n(1), with = "crate::wire::value", has_nil)]
    pub tip: Option<SegmentName>,
}

/// A chain that is one segment now.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct FoldReport {
    /// The full segment.
    #[n(0)]
    pub segment: SegmentBrief,
    /// How many links it had.
    #[n(1)]
    pub links: u64,
    /// How many bytes they take.
    #[n(2)]
    pub bytes: u64,
}

/// What to check.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct VerifyCall {
    /// Only this VM's segments.
    #[cbor(n(0), with = "crate::wire::value", has_nil)]
    pub vm: Option<VmId>,
    /// Only so many, chosen at random.
    #[n(1)]
    pub sample: Option<u32>,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct VerifyReport {
    /// How many segments were read whole.
    #[n(0)]
    pub checked: u64,
    /// How many bytes that was.
    #[n(1)]
    pub bytes: u64,
    /// What is wrong, in words; at most 1000.
    #[n(2)]
    pub problems: Vec<String>,
    /// How many segments were damaged, cannot be read, or could not be checked.
    #[n(3)]
    pub bad: u64,
    /// How many of them were fetched again from another holder.
    #[n(4)]
    pub repaired: u64,
    /// Restore points whose chain is not whole here.
    #[n(5)]
    pub incomplete: u64,
}

/// What was imported.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct ImportReport {
    /// The restore point.
    #[n(0)]
    pub segment: SegmentBrief,
    /// Links that are new here.
    #[n(1)]
    pub added: u64,
    /// Links that were here already.
    #[n(2)]
    pub held: u64,
}

/// A stored segment in short.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct SegmentBrief {
    /// Its name.
    #[cbor(n(0), with = "crate::wire::value")]
    #[serde(serialize_with = "super::text")]
    pub name: SegmentName,
    /// Which state it is.
    #[cbor(n(1), with = "crate::wire::value")]
    #[serde(serialize_with = "super::text")]
    pub checkpoint: CheckpointId,
    /// The root digest of the file.
    #[cbor(n(2), with = "crate::wire::value")]
    #[serde(serialize_with = "super::text")]
    pub digest: Digest,
    /// The length of the file.
    #[n(3)]
    pub bytes: u64,
    /// What it stands on; absent for a full one.
    #[n(4)]
    pub parent: Option<Held>,
    /// When the guest was stopped for it, in nanoseconds of Unix time.
    #[n(5)]
    pub created_unix_ns: u64,
    /// Links of its chain, itself included.
    #[n(6)]
    pub links: u32,
    /// Whether the whole chain is here.
    #[n(7)]
    pub complete: bool,
    /// The user's label.
    #[n(8)]
    pub label: Option<String>,
}

impl SegmentBrief {
    /// The checkpoint by name and identity.
    #[must_use]
    pub fn held(&self) -> Held {
        Held {
            name: self.name.clone(),
            checkpoint: self.checkpoint,
        }
    }
}

/// A page of segments.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct SegmentPage {
    /// The segments, by name.
    #[n(0)]
    pub segments: Vec<SegmentBrief>,
    /// Whether there are more after the last.
    #[n(1)]
    pub more: bool,
}

/// One address space of a segment.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct SpaceBrief {
    /// Its number; 0 is memory.
    #[n(0)]
    pub id: u16,
    /// Its name.
    #[n(1)]
    pub name: String,
    /// Bytes of a page.
    #[n(2)]
    pub page_bytes: u32,
    /// Pages of the whole space.
    #[n(3)]
    pub pages: u64,
}

/// One segment in detail.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct SegmentDetail {
    /// In short.
    #[n(0)]
    pub segment: SegmentBrief,
    /// What made it.
    #[n(1)]
    pub producer: String,
    /// Its address spaces.
    #[n(2)]
    pub spaces: Vec<SpaceBrief>,
    /// Device and other records.
    #[n(3)]
    pub records: u64,
    /// Frames of pages.
    #[n(4)]
    pub frames: u64,
    /// The oldest epoch merged into it.
    #[n(6)]
    pub first_epoch: Option<u64>,
    /// Why its chain is not whole here; absent when it is.
    #[n(7)]
    pub incomplete: Option<String>,
    /// The key that it is encrypted with; absent when it is not. Without that key here its records are not counted.
    #[n(8)]
    pub key: Option<String>,
}

/// How an agent is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct AgentStatus {
    /// Its name.
    #[n(0)]
    pub node: String,
    /// Where it listens.
    #[n(1)]
    pub address: String,
    /// Its software.
    #[n(2)]
    pub software: String,
    /// What it does: execute, store.
    #[n(3)]
    pub roles: Vec<String>,
    /// Where the registry is: `embedded`, or HOST:PORT.
    #[n(4)]
    pub registry: String,
    /// Bytes its segments take.
    #[n(5)]
    pub used_bytes: u64,
    /// The most they may take.
    #[n(6)]
    pub budget_bytes: Option<u64>,
    /// The VMs it holds segments of.
    #[n(7)]
    pub vms: Vec<VmStatus>,
    /// Files that were found damaged when it started, and were set aside.
    #[n(8)]
    pub damaged: Vec<String>,
    /// Connections now.
    #[n(9)]
    pub connections: u32,
    /// Why the registry does not answer; absent when it does.
    #[n(10)]
    pub registry_problem: Option<String>,
    /// What is kept of VMs for which nothing else was said.
    #[n(11)]
    pub keep: Option<String>,
    /// What went wrong when the store was last collected; absent when nothing did.
    #[n(12)]
    pub store_problem: Option<String>,
    /// When every segment was last read and checked in the background, in seconds of Unix time.
    #[n(13)]
    pub verified_unix_s: Option<u64>,
    /// How the global store is; absent when it has none.
    #[n(14)]
    pub global: Option<GlobalStatus>,
}

/// How an agent keeps a global store.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct GlobalStatus {
    /// Where it is.
    #[n(0)]
    pub address: String,
    /// What is kept there.
    #[n(1)]
    pub keep: String,
    /// Why it does not take anything; absent when it does.
    #[n(2)]
    pub problem: Option<String>,
    /// The VMs that are held here, as they are there.
    #[n(3)]
    pub vms: Vec<GlobalVm>,
    /// What the agent has uploaded since it started, in bytes.
    #[n(4)]
    pub uploaded_bytes: u64,
    /// How many restore points it has made there since then.
    #[n(5)]
    pub uploaded_points: u64,
    /// How often it failed since then.
    #[n(6)]
    pub failed: u64,
}

/// What is known of one VM in the global store.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct GlobalVm {
    /// The VM.
    #[cbor(n(0), with = "crate::wire::value")]
    #[serde(serialize_with = "super::text")]
    pub vm: VmId,
    /// The newest restore point.
    #[cbor(n(1), with = "crate::wire::value", has_nil)]
    #[serde(serialize_with = "super::text_or_null")]
    pub newest: Option<SegmentName>,
    /// How many there are.
    #[n(2)]
    pub points: u64,
    /// Why nothing of it is uploaded; absent when something is.
    #[n(3)]
    pub problem: Option<String>,
}

/// What an agent knows of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct VmStatus {
    /// The VM.
    #[cbor(n(0), with = "crate::wire::value")]
    #[serde(serialize_with = "super::text")]
    pub vm: VmId,
    /// The generation promised here; 0 when none was.
    #[cbor(n(1), with = "crate::wire::value")]
    #[serde(serialize_with = "super::number")]
    pub promised: Generation,
    /// How many segments.
    #[n(2)]
    pub segments: u64,
    /// How many bytes.
    #[n(3)]
    pub bytes: u64,
    /// The newest one whose chain is whole.
    #[n(4)]
    pub newest: Option<SegmentBrief>,
    /// The owner that ships now; absent when none is connected.
    #[n(5)]
    pub shipping: Option<String>,
    /// The checkpoint that its image is at; absent when there is none.
    #[cbor(n(6), with = "crate::wire::value", has_nil)]
    #[serde(serialize_with = "super::text_or_null")]
    pub hot_at: Option<SegmentName>,
    /// Why there is no image that could be used, where there should be one.
    #[n(7)]
    pub cold: Option<String>,
    /// How the last drill of it here went.
    #[n(8)]
    pub drill: Option<LastDrill>,
}
