//! Entropy (virtio 1.2, section 5.4): one queue of buffers, each filled from the kernel's random source. It has no
//! state of its own, and nothing it gives twice: a clone of the VM gets other bytes.

use super::queue::RingError;
use super::state::DeviceState;
use super::{Device, Env, Interest};

/// Virtio's number for it.
pub const KIND: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
/// Its logical name.
pub const NAME: &str = "rng:0";
/// The most bytes one buffer gets; a driver that asks for more takes what it gets.
const MAX_BYTES: u64 = 64 << 10;
const QUEUE_SIZES: [u16; 1] = [64];

/// The device.
#[derive(Debug, Default)]
pub struct Rng(());

impl Device for Rng {
    fn name(&self) -> &str {
        NAME
    }

    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn kicked(&mut self, queue: usize, env: &mut Env<'_>) -> Result<(), RingError> {
        while let Some(chain) = env.pop(queue)? {
            let mut bytes = vec![0; chain.writable.bytes().min(MAX_BYTES) as usize];
            let mut done = 0;
            while done < bytes.len() {
                match rustix::rand::getrandom(&mut bytes[done..], rustix::rand::GetRandomFlags::empty()) {
                    Ok(count) => done += count,
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => {
                        tracing::warn!(%error, "no random bytes for the guest");
                        break;
                    }
                }
            }
            chain.writable.write(env.memory, 0, &bytes[..done])?;
            env.push(queue, &chain, done as u32)?;
        }
        env.interrupt(queue)
    }

    fn interests(&self) -> Vec<Interest> {
        Vec::new()
    }

    fn ready(&mut self, _token: u64, _env: &mut Env<'_>) -> Result<(), RingError> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn state(&self) -> DeviceState {
        DeviceState::Rng
    }

    fn restored(&mut self, _env: &mut Env<'_>) -> Result<(), RingError> {
        Ok(())
    }
}
