//! What a registry refuses, and why; it crosses the wire as it is.

use minicbor::{Decode, Encode};
use segment::{CheckpointId, Generation, SegmentName, VmId};

use super::types::LeaseSubject;

/// Why a registry did not do what it was asked. Nothing was changed, except where it says so.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, thiserror::Error)]
#[cbor(map)]
pub enum RegistryError {
    /// There is a VM of that name.
    #[n(0)]
    #[error(
        "there is a VM {vm} already: {owner} owns it under generation {generation} ({state}). Take another name, go \
         on with it by `standby promote {vm}`, or remove it by `standby forget {vm}`"
    )]
    VmTaken {
        /// The VM.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// Its owner.
        #[n(1)]
        owner: String,
        /// Its generation.
        #[cbor(n(2), with = "crate::wire::value")]
        generation: Generation,
        /// Running or stopped.
        #[n(3)]
        state: String,
    },
    /// There is no such VM.
    #[n(1)]
    #[error("the registry has no VM {vm}: `standby status` lists those it has")]
    NoSuchVm {
        /// The VM.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
    },
    /// A compare-and-swap found something else.
    #[n(2)]
    #[error(
        "VM {vm} changed meanwhile: {owner} owns it under generation {current}, and {expected} was expected"
    )]
    Conflict {
        /// The VM.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// What the caller expected.
        #[cbor(n(1), with = "crate::wire::value")]
        expected: Generation,
        /// What is.
        #[cbor(n(2), with = "crate::wire::value")]
        current: Generation,
        /// Who owns it.
        #[n(3)]
        owner: String,
    },
    /// The record of a VM has another revision than the caller read.
    #[n(3)]
    #[error("the record of VM {vm} changed meanwhile (revision {current}, not {expected}): read it again")]
    Revision {
        /// The VM.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// What the caller read.
        #[n(1)]
        expected: u64,
        /// What is.
        #[n(2)]
        current: u64,
    },
    /// The caller's generation is over.
    #[n(4)]
    #[error("VM {vm} is owned under generation {current} by {owner}: generation {asked} is over")]
    Fenced {
        /// The VM.
        #[cbor(n(0), with = "crate::wire::value")]
        vm: VmId,
        /// What the caller has.
        #[cbor(n(1), with = "crate::wire::value")]
        asked: Generation,
        /// What is.
        #[cbor(n(2), with = "crate::wire::value")]
        current: Generation,
        /// Who owns it.
        #[n(3)]
        owner: String,
    },
    /// A segment of that name is another checkpoint.
    #[n(5)]
    #[error(
        "segment {name} is registered as checkpoint {held}, and {given} was given: two owners wrote one name"
    )]
    DuplicateName {
        /// The name.
        #[cbor(n(0), with = "crate::wire::value")]
        name: SegmentName,
        /// The registered one.
        #[cbor(n(1), with = "crate::wire::value")]
        held: CheckpointId,
        /// The one that was given.
        #[cbor(n(2), with = "crate::wire::value")]
        given: CheckpointId,
    },
    /// There is a node of that name elsewhere.
    #[n(6)]
    #[error(
        "there is a node {name} at {address} already: give this one another --name, or, if that one is gone for good, \
         start this one once with --replace"
    )]
    NodeTaken {
        /// The name.
        #[n(0)]
        name: String,
        /// Where the other is.
        #[n(1)]
        address: String,
    },
    /// More than the registry takes.
    #[n(7)]
    #[error("the registry takes at most {max} {what}")]
    TooMany {
        /// Of what.
        #[n(0)]
        what: String,
        /// How many.
        #[n(1)]
        max: u64,
    },
    /// The request makes no sense.
    #[n(8)]
    #[error("{why}")]
    Invalid {
        /// What is wrong with it.
        #[n(0)]
        why: String,
    },
    /// The registry's own storage failed.
    #[n(9)]
    #[error("the registry could not use its file: {why}")]
    Storage {
        /// Why.
        #[n(0)]
        why: String,
    },
    /// The registry did not answer. Whether the change was made is not known; asking again is safe.
    #[n(10)]
    #[error("the registry at {address} does not answer: {why}. Is the agent there running?")]
    Unavailable {
        /// Where it is.
        #[n(0)]
        address: String,
        /// Why.
        #[n(1)]
        why: String,
    },
    /// The agent that was asked does not keep the registry.
    #[n(11)]
    #[error("the agent {node} does not keep the registry: it is at {registry}")]
    NotHere {
        /// The agent that was asked.
        #[n(0)]
        node: String,
        /// Where it is.
        #[n(1)]
        registry: String,
    },
    /// A lease that is not held any more, or never was.
    #[n(12)]
    #[error("the lease of {subject} is not held any more: it was not renewed in time, or given back")]
    LeaseGone {
        /// Whose.
        #[n(0)]
        subject: LeaseSubject,
    },
    /// There is no such node.
    #[n(13)]
    #[error("the registry has no node {name}: `standby status` lists those it has")]
    NoSuchNode {
        /// The name.
        #[n(0)]
        name: String,
    },
    /// The registry answers from before what it said earlier, or is another one.
    #[n(14)]
    #[error(
        "the registry at {address} answers from the past: {why}. It was put back from an old copy, or another took its \
         place; what it says of owners may be over, so nothing is done by its word. Put the right one back; or, to go \
         on with this one, check with `standby status` that no VM runs twice, stop the agents, remove the file \
         registry-seen in their --data directories, and start them again"
    )]
    Past {
        /// Where it is.
        #[n(0)]
        address: String,
        /// How that shows.
        #[n(1)]
        why: String,
    },
    /// The registry lets us not in, or not do this.
    #[n(15)]
    #[error(
        "the registry at {address} refuses access: {why}. Check the user, the password file and the certificates"
    )]
    Denied {
        /// Where it is.
        #[n(0)]
        address: String,
        /// Why.
        #[n(1)]
        why: String,
    },
    /// Others changed the same record again and again.
    #[n(16)]
    #[error("the registry changes too fast under {what}: try again")]
    Busy {
        /// Under what.
        #[n(0)]
        what: String,
    },
}

impl RegistryError {
    /// Whether asking again later may help without anyone doing something.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Storage { .. } | Self::Busy { .. } => true,
            Self::VmTaken { .. }
            | Self::NoSuchVm { .. }
            | Self::Conflict { .. }
            | Self::Revision { .. }
            | Self::Fenced { .. }
            | Self::DuplicateName { .. }
            | Self::NodeTaken { .. }
            | Self::TooMany { .. }
            | Self::Invalid { .. }
            | Self::NotHere { .. }
            | Self::LeaseGone { .. }
            | Self::NoSuchNode { .. }
            | Self::Past { .. }
            | Self::Denied { .. } => false,
        }
    }
}
