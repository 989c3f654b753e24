//! What the tests of the pure protocol share: the checkpoints of an owner that exists only as numbers.

use std::time::Duration;

use migrate::protocol::{PromiseResult, Proof, Receiver, ReceiverAction, ReceiverEvent};
use migrate::wire::{Held, Message, Offer, Open};
use segment::{CheckpointId, Digest, Epoch, Generation, SegmentName, VmId};

pub const MINE: Generation = Generation(3);

pub fn vm() -> VmId {
    VmId::new("web").unwrap()
}

pub fn held(epoch: u64) -> Held {
    let name = SegmentName::new(vm(), MINE, Epoch(epoch));
    Held {
        name,
        checkpoint: CheckpointId([epoch as u8; 16]),
    }
}

/// The checkpoint of an epoch: every fifth is full, and some are large.
pub fn offer(epoch: u64, full: bool) -> Offer {
    let Held { name, checkpoint } = held(epoch);
    let bytes = 10 + (epoch * 7) % 40;
    let parent = (!full).then(|| held(epoch - 1));
    let digest = Digest([epoch as u8; 32]);
    Offer {
        generation: MINE,
        name,
        checkpoint,
        digest,
        bytes,
        parent,
        created_unix_ns: 1,
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelProof(pub Offer);

impl Proof for ModelProof {
    fn held(&self) -> Held {
        self.0.held()
    }
    fn digest(&self) -> Digest {
        self.0.digest
    }
}

/// A receiver of a connection that has just been made.
pub fn fresh() -> Receiver {
    Receiver::new(Duration::from_secs(1), Duration::from_secs(6), Duration::ZERO)
}

/// Opens under [`MINE`], without a lease.
pub fn open() -> Message {
    Message::Open(Open {
        vm: vm(),
        generation: MINE,
        owner: "o".into(),
        lease_ttl_ms: None,
    })
}

/// A receiver that has promised [`MINE`] and told its position.
pub fn opened() -> Receiver {
    let now = Duration::ZERO;
    let mut receiver = fresh();
    frame(&mut receiver, 0, open());
    receiver.step::<ModelProof>(ReceiverEvent::Promised(PromiseResult::Promised), now);
    receiver.step::<ModelProof>(ReceiverEvent::Found(None), now);
    receiver
}

pub fn frame(receiver: &mut Receiver, stream: u32, message: Message) -> Vec<ReceiverAction> {
    receiver.step::<ModelProof>(ReceiverEvent::Frame { stream, message }, Duration::ZERO)
}

pub fn closes(actions: &[ReceiverAction]) -> bool {
    matches!(actions.last(), Some(ReceiverAction::Close { .. }))
}
