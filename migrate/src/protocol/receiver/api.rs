//! What a receiver is told, and what it says.

use std::time::Duration;

use segment::{Generation, VmId};

use crate::wire::{Held, Message, Offer, RefuseReason};

/// How a promise ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromiseResult {
    /// It is durable.
    Promised,
    /// A higher one was promised before.
    Fenced {
        /// Which.
        current: Generation,
    },
    /// The disk failed.
    Failed {
        /// Why.
        why: String,
    },
}

/// How the beginning of a transfer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BeginResult<P> {
    /// The room is reserved.
    Ready,
    /// The checkpoint is there already, with all it stands on.
    Have(P),
    /// A higher generation was promised meanwhile.
    Fenced {
        /// Which.
        current: Generation,
    },
    /// It is not taken.
    Refused {
        /// What kind of refusal.
        reason: RefuseReason,
        /// In words.
        why: String,
    },
}

/// How a commit ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommitResult<P> {
    /// It is durable, and all it stands on is there.
    Stored(P),
    /// A higher generation was promised meanwhile.
    Fenced {
        /// Which.
        current: Generation,
    },
    /// It is not taken.
    Refused {
        /// What kind of refusal.
        reason: RefuseReason,
        /// In words.
        why: String,
    },
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReceiverEvent<P> {
    /// A frame came.
    Frame {
        /// Its stream.
        stream: u32,
        /// Its message.
        message: Message,
    },
    /// The answer to [`ReceiverAction::Promise`].
    Promised(PromiseResult),
    /// The answer to [`ReceiverAction::Find`].
    Found(Option<Held>),
    /// The answer to [`ReceiverAction::Begin`].
    Begun {
        /// The transfer.
        transfer: u32,
        /// How it ended.
        result: BeginResult<P>,
    },
    /// The answer to [`ReceiverAction::Commit`].
    Committed {
        /// The transfer.
        transfer: u32,
        /// How it ended.
        result: CommitResult<P>,
    },
    /// The answer to [`ReceiverAction::Grant`]: it was granted. (One that cannot be is answered by nothing.)
    Granted {
        /// The question's number.
        seq: u64,
    },
    /// Another connection has opened the VM, or another agent has sealed it.
    Superseded {
        /// The generation that is promised now.
        current: Generation,
    },
    /// Time has passed, and frames wait to be read, for which there is no room yet: the owner lives.
    Unread,
    /// Time has passed.
    Tick,
}

/// What to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReceiverAction {
    /// Send a message.
    Send {
        /// The frame's stream.
        stream: u32,
        /// The frame's message.
        message: Message,
    },
    /// Promise the generation durably; answer `Promised`.
    Promise {
        /// The VM.
        vm: VmId,
        /// The generation.
        generation: Generation,
        /// How long the leases are that its owner will ask for: to be as durable as the promise, since a holder that
        /// restarts has to let nobody else in for as long.
        lease: Option<Duration>,
    },
    /// The owner is heard, and asks for time: to be granted only while its generation is the promised one, in one step
    /// with that look; answer `Granted`.
    Grant {
        /// The VM.
        vm: VmId,
        /// The owner's generation.
        generation: Generation,
        /// The question's number.
        seq: u64,
        /// The length of the lease.
        ttl: Duration,
    },
    /// The owner's guest stands still for good: what it was granted is over, if its generation is the promised one.
    Release {
        /// The VM.
        vm: VmId,
        /// The owner's generation.
        generation: Generation,
    },
    /// Look up the newest checkpoint whose chain is whole; answer `Found`.
    Find {
        /// The VM.
        vm: VmId,
    },
    /// Reserve the room for a segment; answer `Begun`. It has to be refused when what it stands on is not there.
    Begin {
        /// The transfer.
        transfer: u32,
        /// What was offered.
        offer: Offer,
    },
    /// Write a piece of it.
    Write {
        /// The transfer.
        transfer: u32,
        /// The piece.
        bytes: Vec<u8>,
    },
    /// Verify and publish it; answer `Committed`.
    Commit {
        /// The transfer.
        transfer: u32,
    },
    /// Forget it.
    Abort {
        /// The transfer.
        transfer: u32,
    },
    /// Say why, and close the connection. Final.
    Close {
        /// One of the constants of [`Reject`]; 0 when nothing needs to be said.
        code: u16,
        /// Why.
        why: String,
    },
}
