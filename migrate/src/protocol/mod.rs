//! What an owner and a holder do, as pure state machines: events in, actions out, the time as an argument.
//!
//! ```text
//!  owner: Sender                                     holder: Receiver
//!    Open{vm, generation}  ------------------------>   Promise (durable)
//!                          <------------------------ Position{newest complete} | Fenced{current}
//!    Next{position} -> spool
//!    Offer{name, ..}, chunks, End  ---------------->   Begin, Write.., Commit (durable)
//!    Offer, chunks, End    ------------------------>     ^ several at once, in order
//!                          <------------------------ Stored | Have | Refuse{reason} | Fenced{current}
//!    Ping                  <----------------------->  Ping
//! ```
//!
//! Invariants:
//! - an [`Ack`](crate::wire::Ack) is made only from a [`Proof`], which only a store can give, after the fact;
//! - a holder answers `Stored` or `Have` for a checkpoint only when every one it stands on is there too, so an
//!   acknowledged checkpoint can be restored;
//! - after a holder has promised a generation it takes nothing of a lower one: at `Open`, at `Offer` and at the commit;
//! - `Fenced` is final for an owner: nothing is sent after it.
//!
//! What it never does: it has no socket, no clock and no randomness, and it waits for nothing.

mod receiver;
mod sender;

use segment::{Digest, Kind};

use crate::store::{Entry, Stored};
use crate::wire::Held;

pub use receiver::{
    BeginResult, CommitResult, MAX_TRANSFERS, PromiseResult, Receiver, ReceiverAction, ReceiverEvent,
};
pub use sender::{Next, Sender, SenderAction, SenderConfig, SenderEvent, SenderState};

/// Proof that a checkpoint is stored durably. [`Stored`] is the real one; the model stores of tests have their own.
pub trait Proof {
    /// Which checkpoint.
    fn held(&self) -> Held;
    /// The root digest of the file.
    fn digest(&self) -> Digest;
}

impl Proof for Stored {
    fn held(&self) -> Held {
        Held {
            name: self.entry().name.clone(),
            checkpoint: self.entry().checkpoint,
        }
    }
    fn digest(&self) -> Digest {
        self.entry().digest
    }
}

/// What a stored segment stands on; none when it is full.
#[must_use]
pub fn parent_of(entry: &Entry) -> Option<Held> {
    match &entry.kind {
        Kind::Full => None,
        Kind::Delta {
            parent,
            parent_checkpoint,
        } => Some(Held {
            name: parent.clone(),
            checkpoint: *parent_checkpoint,
        }),
    }
}
