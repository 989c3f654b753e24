//! What a sender is told, and what it says.

use std::time::Duration;

use segment::{Generation, VmId};

use crate::lease::LeaseTerms;
use crate::wire::{Held, Message, Offer};

/// The limits and times of a sender.
#[derive(Debug, Clone)]
pub struct SenderConfig {
    /// The VM.
    pub vm: VmId,
    /// The generation it is owned under.
    pub generation: Generation,
    /// Who owns it, for the holder's messages.
    pub owner: String,
    /// The most segments that are not acknowledged.
    pub window_segments: usize,
    /// The most bytes that are not acknowledged; one segment may be larger.
    pub window_bytes: u64,
    /// A segment of at most this is streamed without waiting for `Accept`.
    pub eager_bytes: u64,
    /// The lease that is asked of the holder; none when the guest runs without one.
    pub lease: Option<LeaseTerms>,
    /// Silence after which a ping is sent.
    pub ping_every: Duration,
    /// Silence after which the holder is given up.
    pub dead_after: Duration,
    /// How long something sent may stay unacknowledged without any progress, and longer by what its bytes may take; twice as
    /// long after each time that this was too short.
    pub stall_after: Duration,
    /// The slowest, in bytes a second, that a holder may be at checking a segment it has whole and at getting it to its disk.
    pub slowest_store: u64,
    /// The first pause before connecting again; doubled each time.
    pub backoff_first: Duration,
    /// The longest such pause.
    pub backoff_max: Duration,
    /// The pause after a refusal; doubled each time, up to `backoff_max` of it.
    pub refused_first: Duration,
    /// The longest such pause.
    pub refused_max: Duration,
    /// How often a full segment is asked for again while none comes.
    pub full_again: Duration,
}

impl SenderConfig {
    /// With the usual limits and times.
    #[must_use]
    pub fn new(vm: VmId, generation: Generation, owner: &str) -> Self {
        Self {
            vm,
            generation,
            owner: owner.to_owned(),
            lease: None,
            window_segments: 32,
            window_bytes: 64 << 20,
            eager_bytes: 4 << 20,
            ping_every: crate::transport::PING_EVERY,
            dead_after: crate::transport::DEAD_AFTER,
            stall_after: Duration::from_secs(60),
            slowest_store: 4 << 20,
            backoff_first: Duration::from_millis(50),
            backoff_max: Duration::from_secs(5),
            refused_first: Duration::from_secs(1),
            refused_max: Duration::from_secs(30),
            full_again: Duration::from_secs(10),
        }
    }
}

/// What the spool has after a position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// This one. Its file is kept open by the driver until it was streamed or given up.
    Segment(Offer),
    /// Nothing yet.
    UpToDate,
    /// Nothing that the holder could use: it needs a full segment.
    NeedFull,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SenderEvent {
    /// The connection is up and both have greeted.
    Connected {
        /// The number of the connection.
        connection: u64,
        /// The protocol version that both speak.
        version: u16,
    },
    /// The guest stands still for good: no more time is asked for, and the holder is told.
    Release,
    /// It could not be made, or broke, or was closed on our demand.
    Lost {
        /// The number of the connection.
        connection: u64,
        /// Why.
        why: String,
        /// Anything, to spread those who try again: 0 to 255.
        jitter: u8,
    },
    /// A frame came.
    Frame {
        /// The number of the connection.
        connection: u64,
        /// The frame's stream.
        stream: u32,
        /// The frame's message.
        message: Message,
    },
    /// The spool's answer to [`SenderAction::Next`].
    NextIs {
        /// The number of the question.
        ticket: u64,
        /// The answer.
        next: Next,
    },
    /// Some bytes of a transfer were written to the connection.
    Progress {
        /// The number of the connection.
        connection: u64,
    },
    /// The file of a transfer could not be read to its end.
    StreamFailed {
        /// The number of the connection.
        connection: u64,
        /// Why.
        why: String,
    },
    /// There is something new in the spool.
    Notify,
    /// Time has passed.
    Tick,
}

/// What to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SenderAction {
    /// Connect and greet; answer `Connected` or `Lost`.
    Connect {
        /// The number of the connection.
        connection: u64,
    },
    /// Close the connection; answer `Lost`.
    Disconnect {
        /// The number of the connection.
        connection: u64,
        /// Why.
        why: String,
    },
    /// Send a message.
    Send {
        /// The frame's stream.
        stream: u32,
        /// The frame's message.
        message: Message,
    },
    /// Send the chunks of this transfer and `End`, after what was sent before.
    Stream {
        /// The number of the transfer.
        transfer: u32,
    },
    /// Send no more of this transfer but `Abort`.
    Cancel {
        /// The number of the transfer.
        transfer: u32,
    },
    /// Ask the spool what comes after a position; answer `NextIs`.
    Next {
        /// The number of the question.
        ticket: u64,
        /// What the holder has, or will have.
        position: Option<Held>,
    },
    /// The newest checkpoint that the holder has durably, with all it stands on, as it says at the opening.
    Position {
        /// What it has.
        newest: Option<Held>,
    },
    /// The holder has what was offered durably, with all it stands on.
    Acked {
        /// What was offered.
        offer: Box<Offer>,
    },
    /// The holder lets nobody else in, counted from when it was asked.
    Granted {
        /// When it was asked, by the sender's clock.
        sent: Duration,
    },
    /// The holder needs a full segment: ask the VM for one.
    RequestFull,
    /// The owner is none any more: stop the guest. Final.
    Fence {
        /// The generation the holder has promised.
        current: Generation,
    },
}

/// What a sender is doing, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SenderState {
    /// Connecting for the first time, or greeting.
    Connecting,
    /// Sending what the holder lacks.
    Synchronising,
    /// The holder has all there is.
    UpToDate,
    /// The holder cannot be reached.
    Unreachable {
        /// Why.
        why: String,
    },
    /// The holder does not take what is offered.
    Refused {
        /// Why.
        why: String,
    },
    /// The holder has promised a higher generation.
    Fenced {
        /// Which.
        current: Generation,
    },
}
