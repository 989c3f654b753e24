//! What the tests of the pure protocol share: the checkpoints of an owner that exists only as numbers.

use migrate::protocol::Proof;
use migrate::wire::{Held, Offer};
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
