//! Virtio devices: one transport (MMIO, version 2) and the devices behind it.
//!
//! ```text
//! vCPU thread   registers --> Transport ----------+
//! KVM           kicks (ioeventfd) --+            | one lock
//!                                   v            v
//! device thread                   worker --> Device: pop chains, do them or hand them on, push, interrupt
//! KVM           interrupt (irqfd) <-------------/
//! ```
//!
//! A device's work is done by a thread of its own, never by a vCPU's. All of a device (its registers, queues and
//! state) is behind one lock, held for a bounded batch; the two registers that an interrupt handler touches are
//! outside it. Slow work (disk I/O) is handed to further threads and comes back through an eventfd.
//!
//! A device is stopped in two steps for a checkpoint: it takes no new chains, then what is in flight is finished. Its
//! state is then all in its [`state::VirtioState`] and in guest memory.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use crate::memory::GuestMemory;

pub mod balloon;
pub mod block;
pub mod disk;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod setup;
pub mod state;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;
mod worker;

use mmio::Irq;
pub use mmio::Transport;
use queue::{Chain, RingError, VirtQueue};
use state::DeviceState;

/// Chains one device handles before it lets others at its lock.
const BATCH: usize = 128;

/// What a device works with while it has its lock.
pub struct Env<'a> {
    /// Guest memory.
    pub memory: &'a GuestMemory,
    queues: &'a mut [VirtQueue],
    irq: &'a Irq,
    /// The features the driver took.
    pub features: u64,
    /// Queues to look at again though nobody kicks.
    again: u64,
    budget: usize,
    /// The configuration changed.
    config: bool,
}

impl Env<'_> {
    /// The next chain of a queue. `None` also when others are to have a turn: the queue is then looked at again.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, RingError> {
        let Some(q) = self.queues.get_mut(queue) else {
            return Ok(None);
        };
        if self.budget == 0 {
            self.again |= 1 << queue;
            return Ok(None);
        }
        self.budget -= 1;
        loop {
            if let Some(chain) = q.pop(self.memory)? {
                return Ok(Some(chain));
            }
            // Asked to kick for the next one; one that came in between is not missed.
            if !q.rearm(self.memory)? {
                return Ok(None);
            }
        }
    }

    /// The chain popped last is left where it was.
    pub fn unpop(&mut self, queue: usize) {
        if let Some(q) = self.queues.get_mut(queue) {
            q.unpop();
        }
    }

    /// Gives a chain back.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn push(&mut self, queue: usize, chain: &Chain, written: u32) -> Result<(), RingError> {
        match self.queues.get_mut(queue) {
            Some(q) => q.push(self.memory, chain, written),
            None => Ok(()),
        }
    }

    /// Interrupts the guest for a queue, if its driver wants that.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn interrupt(&mut self, queue: usize) -> Result<(), RingError> {
        if let Some(q) = self.queues.get_mut(queue)
            && q.ready()
            && q.wants_interrupt(self.memory)?
        {
            self.irq.queue();
        }
        Ok(())
    }

    /// Looks at a queue again soon, without a kick.
    pub fn again(&mut self, queue: usize) {
        self.again |= 1 << queue;
    }

    /// Tells the driver, when the device is done, to read the configuration again.
    pub fn config_changed(&mut self) {
        self.config = true;
    }

    /// Whether the driver has set a queue up.
    #[must_use]
    pub fn has(&self, queue: usize) -> bool {
        self.queues.get(queue).is_some_and(VirtQueue::ready)
    }
}

/// Something a device waits for.
#[derive(Clone)]
pub struct Interest {
    /// The file, kept open as long as it is waited for.
    pub fd: Arc<dyn AsRawFd + Send + Sync>,
    /// For what.
    pub events: EventSet,
    /// The device's own word for it.
    pub token: u64,
    /// It brings back what is in flight, so it is waited for also while the device drains.
    pub completes: bool,
}

/// A device behind the transport. Its methods are called with its lock held.
pub trait Device: Send {
    /// Its logical name, like `disk:root`.
    fn name(&self) -> &str;
    /// Virtio's number for its kind.
    fn kind(&self) -> u32;
    /// The features it offers, without those of the transport and the rings.
    fn features(&self) -> u64;
    /// The most entries of each of its queues.
    fn queue_sizes(&self) -> &[u16];
    /// Its configuration space.
    fn config(&self) -> Vec<u8>;
    /// The driver writes to the configuration space. Nothing of most can be written.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}
    /// The driver is ready, with these features. Also called after a restore.
    fn activate(&mut self, features: u64);
    /// The driver resets it. Nothing is in flight any more.
    fn reset(&mut self);
    /// A queue has something, perhaps.
    ///
    /// # Errors
    /// [`RingError`]: the device stops until it is reset.
    fn kicked(&mut self, queue: usize, env: &mut Env<'_>) -> Result<(), RingError>;
    /// What it waits for now.
    fn interests(&self) -> Vec<Interest>;
    /// Something it waited for is there.
    ///
    /// # Errors
    /// [`RingError`]: the device stops until it is reset.
    fn ready(&mut self, token: u64, env: &mut Env<'_>) -> Result<(), RingError>;
    /// Chains taken and not given back, which have to be before the state is saved.
    fn in_flight(&self) -> usize;
    /// What of it is not in its registers, queues and guest memory.
    fn state(&self) -> DeviceState;
    /// The guest goes on after a restore: what the world or the guest has to be told.
    ///
    /// # Errors
    /// [`RingError`].
    fn restored(&mut self, env: &mut Env<'_>) -> Result<(), RingError>;
}
