//! One virtqueue, and the chains of buffers a driver puts into it.
//!
//! ```text
//! driver: descriptor table + available ring --pop()--> Chain --device--> push() --> used ring --> interrupt?
//! ```
//!
//! The rings lie in guest memory and are the guest's to spoil. Invariants: a chain is bounded in length before it is
//! collected, what the device may read comes before what it may write, and every access to a buffer is a checked copy.
//! A ring that breaks its rules is a [`RingError`]: the device then asks to be reset and touches nothing more.

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;

/// The most descriptors of one chain, an indirect table's included.
pub const MAX_DESCRIPTORS: usize = 1024;

/// How a guest broke a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Its indices, or where it is.
    #[error("the ring itself is malformed")]
    Ring,
    /// A chain without an end, cut off by a descriptor that cannot be read, or too long.
    #[error("a chain loops, is cut off, or has more than {MAX_DESCRIPTORS} descriptors")]
    Chain,
    /// What the device reads follows what it writes.
    #[error("a chain has a readable descriptor after a writable one")]
    Order,
    /// A buffer that is not, or not wholly, in guest memory, or shorter than what is to be in it.
    #[error("a buffer is outside guest memory or too short")]
    Buffer,
}

/// A run of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Buffer {
    address: u64,
    bytes: u32,
}

/// Buffers of one direction, seen as one run of bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Buffers(Vec<Buffer>);

impl Buffers {
    /// Bytes of all together.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|buffer| u64::from(buffer.bytes)).sum()
    }

    /// Calls `each` with the address and the range of the caller's bytes for every piece of `offset..offset + bytes`.
    fn pieces(
        &self,
        offset: u64,
        bytes: usize,
        mut each: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), RingError>,
    ) -> Result<(), RingError> {
        let (mut skip, mut done) = (offset, 0);
        for buffer in &self.0 {
            if done == bytes {
                break;
            }
            let length = u64::from(buffer.bytes);
            if skip >= length {
                skip -= length;
                continue;
            }
            let count = usize::try_from(length - skip)
                .unwrap_or(usize::MAX)
                .min(bytes - done);
            let at = buffer.address.checked_add(skip).ok_or(RingError::Buffer)?;
            each(GuestAddress(at), done..done + count)?;
            done += count;
            skip = 0;
        }
        if done == bytes {
            Ok(())
        } else {
            Err(RingError::Buffer)
        }
    }

    /// Copies out of the buffers from `offset` on, as much as `to` holds.
    ///
    /// # Errors
    /// [`RingError::Buffer`]; part may have been copied.
    pub fn read(&self, memory: &GuestMemory, offset: u64, to: &mut [u8]) -> Result<(), RingError> {
        self.pieces(offset, to.len(), |at, range| {
            memory
                .read_slice(&mut to[range], at)
                .map_err(|_| RingError::Buffer)
        })
    }

    /// Copies into the buffers from `offset` on.
    ///
    /// # Errors
    /// [`RingError::Buffer`]; part may have been copied.
    pub fn write(&self, memory: &GuestMemory, offset: u64, from: &[u8]) -> Result<(), RingError> {
        self.pieces(offset, from.len(), |at, range| {
            memory
                .write_slice(&from[range], at)
                .map_err(|_| RingError::Buffer)
        })
    }

    /// The runs of guest memory themselves, as `(address, bytes)`: for a balloon, which gives them back.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u32)> {
        self.0.iter().map(|buffer| (buffer.address, buffer.bytes))
    }
}

/// A request of the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    /// What the driver says.
    pub readable: Buffers,
    /// Where the answer goes.
    pub writable: Buffers,
}

/// A queue of a device.
#[derive(Debug)]
pub struct VirtQueue(Queue);

impl VirtQueue {
    /// A queue after reset.
    ///
    /// # Panics
    /// If `max_size` is no power of two up to 32768: it is the device's own number.
    #[must_use]
    pub fn new(max_size: u16) -> Self {
        Self(Queue::new(max_size).expect("a device's own queue size is a power of two"))
    }

    /// A queue with a saved state, which is checked.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_state(state: QueueState, max_size: u16) -> Result<Self, String> {
        if state.max_size != max_size {
            return Err(format!(
                "a queue of at most {} entries, and this device has {max_size}",
                state.max_size
            ));
        }
        Queue::try_from(state).map(Self).map_err(|e| e.to_string())
    }

    /// The state to save.
    #[must_use]
    pub fn state(&self) -> QueueState {
        self.0.state()
    }

    /// The rings' place and size, for the transport.
    pub(super) fn inner(&mut self) -> &mut Queue {
        &mut self.0
    }

    /// Whether the driver has set it up.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.0.ready()
    }

    /// Whether its rings are in guest memory.
    #[must_use]
    pub fn is_valid(&self, memory: &GuestMemory) -> bool {
        self.0.ready() && self.0.is_valid(memory)
    }

    /// The next chain, if there is one.
    ///
    /// # Errors
    /// [`RingError`]: the driver is broken.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, RingError> {
        if !self.0.ready() {
            return Ok(None);
        }
        let Some(descriptors) = self.0.iter(memory).map_err(|_| RingError::Ring)?.next() else {
            return Ok(None);
        };
        let mut chain = Chain {
            head: descriptors.head_index(),
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        let mut ended = false;
        for (count, descriptor) in descriptors.enumerate() {
            if count >= MAX_DESCRIPTORS {
                return Err(RingError::Chain);
            }
            let buffer = Buffer {
                address: descriptor.addr().0,
                bytes: descriptor.len(),
            };
            if descriptor.is_write_only() {
                chain.writable.0.push(buffer);
            } else if chain.writable.0.is_empty() {
                chain.readable.0.push(buffer);
            } else {
                return Err(RingError::Order);
            }
            ended = !descriptor.has_next();
        }
        // The iterator ends in silence at a descriptor it cannot read and at a loop.
        if ended {
            Ok(Some(chain))
        } else {
            Err(RingError::Chain)
        }
    }

    /// The last chain that was popped is not taken: the next `pop` returns it again.
    pub fn unpop(&mut self) {
        self.0.go_to_previous_position();
    }

    /// Gives a chain back, with how many bytes were written into it.
    ///
    /// # Errors
    /// [`RingError::Ring`].
    pub fn push(&mut self, memory: &GuestMemory, chain: &Chain, written: u32) -> Result<(), RingError> {
        self.0
            .add_used(memory, chain.head, written)
            .map_err(|_| RingError::Ring)
    }

    /// Whether the driver wants to hear of what was given back since this was asked last.
    ///
    /// # Errors
    /// [`RingError::Ring`].
    pub fn wants_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, RingError> {
        self.0.needs_notification(memory).map_err(|_| RingError::Ring)
    }

    /// Asks the driver to kick for the next chain; true when one has come meanwhile.
    ///
    /// # Errors
    /// [`RingError::Ring`].
    pub fn rearm(&mut self, memory: &GuestMemory) -> Result<bool, RingError> {
        if !self.0.ready() {
            return Ok(false);
        }
        self.0.enable_notification(memory).map_err(|_| RingError::Ring)
    }
}
