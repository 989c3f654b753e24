//! Questions and answers about who runs a VM: takeovers, what they stand on, and drills.

use std::time::Duration;

use minicbor::{Decode, Encode};
use segment::{Generation, SegmentName, VmId};
use serde::Serialize;

use super::{Held, SegmentBrief};
use crate::detect::Process;
use crate::lease::MAX_TTL;
use crate::registry::OwnerProcess;

/// Which process.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ProcessCall {
    /// The process.
    #[n(0)]
    pub process: OwnerProcess,
}

/// What became of a process.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ProcessReport {
    /// What, when it is one of this host and it can be told.
    #[n(0)]
    pub process: Option<Process>,
}

/// Of which VM's owner.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct OwnerViewCall {
    /// The VM.
    #[cbor(n(0), with = "crate::wire::value")]
    pub vm: VmId,
}

/// What a holder sees of a VM's owner.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct OwnerViewReport {
    /// For how long it has not asked for time; since the holder began when it was never heard.
    #[n(0)]
    pub silent_ms: u64,
    /// Whether it was ever heard since the holder began.
    #[n(1)]
    pub heard: bool,
    /// The newest checkpoint whose chain is whole there.
    #[cbor(n(2), with = "crate::wire::value", has_nil)]
    pub newest: Option<SegmentName>,
    /// Whether that node could run the VM.
    #[n(3)]
    pub executes: bool,
    /// Whether it has an image of it to run on.
    #[n(4)]
    pub hot: Option<bool>,
}

/// Which VM to run a copy of.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct DrillCall {
    /// The VM.
    #[cbor(n(0), with = "crate::wire::value")]
    pub vm: VmId,
    /// For how long it has to be seen to run, in milliseconds.
    #[n(1)]
    pub watch_ms: u64,
}

/// How a copy of a VM ran.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct DrillReport {
    /// From which checkpoint.
    #[n(0)]
    pub segment: SegmentBrief,
    /// From the word to the running guest, in microseconds: the recovery time without the decision.
    #[n(1)]
    pub recovery_us: u64,
    /// How old that state was, in milliseconds: the recovery point. (By the clocks of this host and the one that took it.)
    #[n(2)]
    pub age_ms: u64,
    /// For how long it was seen to run, in milliseconds.
    #[n(3)]
    pub watched_ms: u64,
}

/// How the last drill of a VM at a node went.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, serde::Deserialize)]
#[cbor(map)]
pub struct LastDrill {
    /// When it ended, in milliseconds of Unix time by the node's clock.
    #[n(0)]
    pub at_unix_ms: u64,
    /// From which checkpoint a copy ran; absent when none did.
    #[cbor(n(1), with = "crate::wire::value", has_nil)]
    #[serde(
        serialize_with = "super::text_or_null",
        deserialize_with = "super::maybe_from_text"
    )]
    pub segment: Option<SegmentName>,
    /// How long until it ran, in microseconds.
    #[n(2)]
    pub recovery_us: Option<u64>,
    /// How old its state was, in milliseconds.
    #[n(3)]
    pub age_ms: Option<u64>,
    /// Why it failed, when it did.
    #[n(4)]
    pub failed: Option<String>,
}

/// Which VM to run.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct PromoteCall {
    /// The VM.
    #[cbor(n(0), with = "crate::wire::value")]
    pub vm: VmId,
    /// Only say what would be done.
    #[n(1)]
    pub dry_run: bool,
    /// Go on from the newest that is there, even if a later one was committed and is lost.
    #[n(2)]
    pub accept_loss: bool,
    /// Go on though too few holders answer to fence the owner before.
    #[cbor(n(3), default)]
    pub force: bool,
}

/// What to copy.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct CopyCall {
    /// The VM.
    #[cbor(n(0), with = "crate::wire::value")]
    pub vm: VmId,
    /// The generation it is owned under.
    #[cbor(n(1), with = "crate::wire::value")]
    pub generation: Generation,
    /// The holders that have it, HOST:PORT.
    #[n(2)]
    pub from: Vec<String>,
}

/// What was copied.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct CopyReport {
    /// How many segments.
    #[n(0)]
    pub segments: u64,
    /// How many bytes.
    #[n(1)]
    pub bytes: u64,
    /// The newest checkpoint whose chain is whole there now.
    #[n(2)]
    pub newest: Option<Held>,
    /// What went wrong on the way, in words.
    #[n(3)]
    pub notes: Vec<String>,
}

/// Promise a generation.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SealCall {
    /// The VM.
    #[cbor(n(0), with = "crate::wire::value")]
    pub vm: VmId,
    /// The generation that the caller raised to.
    #[cbor(n(1), with = "crate::wire::value")]
    pub generation: Generation,
}

/// Say what is here of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct HoldingCall {
    /// The VM.
    #[cbor(n(0), with = "crate::wire::value")]
    pub vm: VmId,
    /// Check every byte of the newest chain, however long that takes; else only of a short one.
    #[n(1)]
    pub thorough: bool,
}

/// What a holder has.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SealReport {
    /// The generation that is promised durably.
    #[cbor(n(0), with = "crate::wire::value")]
    pub generation: Generation,
    /// The newest checkpoint whose chain is whole there.
    #[n(1)]
    pub newest: Option<SegmentBrief>,
    /// The newest checkpoint it has ever acknowledged, as far as it knows.
    #[cbor(n(2), with = "crate::wire::value", has_nil)]
    pub had: Option<SegmentName>,
    /// The newest checkpoint that is there without all links of its chain, when it is newer than `newest`.
    #[n(3)]
    pub dangling: Option<SegmentBrief>,
    /// For how long nobody else may run the guest as far as this holder is concerned: what it granted before it promised
    /// has to run out. Absent when it granted nothing.
    #[n(4)]
    pub grant_remaining_ms: Option<u64>,
}

impl SealReport {
    /// [`Self::grant_remaining_ms`], as far as a holder is believed: not beyond what it can have granted.
    #[must_use]
    pub fn granted(&self) -> Duration {
        Duration::from_millis(self.grant_remaining_ms.unwrap_or(0)).min(MAX_TTL * 2)
    }
}

/// How long one phase of a promote took.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
#[cbor(map)]
pub struct PhaseTime {
    /// Its name.
    #[n(0)]
    pub phase: String,
    /// Microseconds.
    #[n(1)]
    pub us: u64,
}

/// A VM that runs here now; or, of a dry run, that would.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct PromoteReport {
    /// The VM.
    #[cbor(n(0), with = "crate::wire::value")]
    pub vm: VmId,
    /// The generation it runs under.
    #[cbor(n(1), with = "crate::wire::value")]
    pub generation: Generation,
    /// The checkpoint it goes on from.
    #[n(2)]
    pub resumed_from: Option<Held>,
    /// From the request to the running guest.
    #[n(3)]
    pub total_us: u64,
    /// Where the time went.
    #[n(4)]
    pub phases: Vec<PhaseTime>,
    /// The process; absent of a dry run.
    #[n(5)]
    pub pid: Option<u32>,
    /// Its control socket.
    #[n(6)]
    pub socket: Option<String>,
    /// What was or would be done, in words.
    #[n(7)]
    pub notes: Vec<String>,
    /// Nothing was changed.
    #[n(8)]
    pub dry_run: bool,
}
