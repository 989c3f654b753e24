//! A network card (virtio 1.2, section 5.1) on a TAP interface of the host.
//!
//! ```text
//! guest --transmit queue--> header and frame --> TAP          offloads: the header says what is left to do, for the
//! guest <--receive queue-- header and frame <--- TAP          guest's frames and for the host's
//! ```
//!
//! A frame that finds no buffers waits, and with it the TAP; one that fits into none is dropped, as on a wire. Frames
//! are the network's: none is in a checkpoint, and a restored VM tells the switches where it is now.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_net as abi;
use vmm_sys_util::epoll::EventSet;

use super::queue::{Chain, RingError};
use super::state::{DeviceState, NetState};
use super::{Device, Env, Interest};
use crate::leash::Leash;
use crate::random;

#[allow(unsafe_code)]
pub mod tap;
#[cfg(test)]
mod tests;

use tap::{HEADER_BYTES, Tap};

/// Virtio's number for it.
pub const KIND: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_NET;
/// The longest frame, with segmentation offload, and its header.
const MAX_FRAME: usize = HEADER_BYTES + 14 + 65_550;
const QUEUE_SIZES: [u16; 2] = [256, 256];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const TAP_READY: u64 = 1;
/// Where in the header the number of buffers of a frame is.
const BUFFER_COUNT: usize = 10;
/// How often a restored VM says where it is.
const ANNOUNCEMENTS: usize = 3;

/// A hardware address.
pub type Mac = [u8; 6];

/// Where frames go: the TAP, or a stand-in.
pub(crate) trait Wire: Send + Sync + std::os::fd::AsRawFd {
    fn set_offload(&self, flags: u32) -> io::Result<()>;
    fn receive(&self, to: &mut [u8]) -> io::Result<usize>;
    fn send(&self, frame: &[u8]) -> io::Result<()>;
}

impl Wire for Tap {
    fn set_offload(&self, flags: u32) -> io::Result<()> {
        Tap::set_offload(self, flags)
    }

    fn receive(&self, to: &mut [u8]) -> io::Result<usize> {
        Tap::receive(self, to)
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        Tap::send(self, frame)
    }
}

/// The device.
pub struct Net {
    name: String,
    mac: Mac,
    wire: Arc<dyn Wire>,
    fd: Arc<dyn std::os::fd::AsRawFd + Send + Sync>,
    /// A frame that found no buffers.
    waiting: Option<Vec<u8>>,
    buffer: Vec<u8>,
    /// Until when the VM may be heard.
    leash: Leash,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// A hardware address nobody has been given: random, locally administered.
///
/// # Errors
/// When the kernel gives no random bytes.
pub fn random_mac() -> io::Result<Mac> {
    let mut mac = random::bytes()?;
    mac[0] = mac[0] & 0xfc | 0x02;
    Ok(mac)
}

fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

impl Net {
    /// The card `name`, like `net:0`, on `tap`.
    #[must_use]
    pub fn new(name: &str, mac: Mac, tap: &Tap) -> Self {
        Self::on(name, mac, tap.clone())
    }

    pub(crate) fn on(name: &str, mac: Mac, wire: impl Wire + Clone + 'static) -> Self {
        Self {
            name: name.to_owned(),
            mac,
            fd: Arc::new(wire.clone()),
            wire: Arc::new(wire),
            waiting: None,
            buffer: vec![0; MAX_FRAME],
            leash: Leash::default(),
        }
    }

    /// One that sends only as long as this lets it: another host may run the VM when it does not.
    #[must_use]
    pub fn under(mut self, leash: Leash) -> Self {
        self.leash = leash;
        self
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        match self.leash.allows() {
            true => self.wire.send(frame),
            // As on a wire that was pulled out.
            false => Err(io::Error::other("the VM has no lease")),
        }
    }

    /// Gives the guest a frame; false when it has no buffers for it now.
    fn deliver(&mut self, frame: &[u8], env: &mut Env<'_>) -> Result<bool, RingError> {
        let merge = has(env.features, abi::VIRTIO_NET_F_MRG_RXBUF);
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0u64;
        while room < frame.len() as u64 && (merge || chains.is_empty()) {
            let Some(chain) = env.pop(RECEIVE)? else {
                chains.iter().for_each(|_| env.unpop(RECEIVE));
                return Ok(false);
            };
            room = room.saturating_add(chain.writable.bytes());
            chains.push(chain);
        }
        if room < frame.len() as u64 {
            // One buffer, and too small: it goes back, and the frame is lost.
            chains.iter().for_each(|_| env.unpop(RECEIVE));
            return Ok(true);
        }
        // At most 256 entries of the queue.
        let count = (chains.len() as u16).to_le_bytes();
        let mut rest = frame;
        for (number, chain) in chains.iter().enumerate() {
            let length = usize::try_from(chain.writable.bytes())
                .unwrap_or(usize::MAX)
                .min(rest.len());
            let (piece, after) = rest.split_at(length);
            chain.writable.write(env.memory, 0, piece)?;
            if number == 0 {
                // A driver whose buffer does not even hold the header gets what it asked for.
                if length >= HEADER_BYTES {
                    chain.writable.write(env.memory, BUFFER_COUNT as u64, &count)?;
                } else {
                    return Err(RingError::Buffer);
                }
            }
            env.push(RECEIVE, chain, length as u32)?;
            rest = after;
        }
        Ok(true)
    }

    fn receive(&mut self, env: &mut Env<'_>) -> Result<(), RingError> {
        let mut delivered = false;
        let result = loop {
            let frame = match self.waiting.take() {
                Some(frame) => frame,
                None => match self.wire.receive(&mut self.buffer) {
                    Ok(count) if count >= HEADER_BYTES => self.buffer[..count].to_vec(),
                    Ok(_) => break Ok(()),
                    Err(error) => {
                        if error.kind() != io::ErrorKind::WouldBlock {
                            tracing::debug!(device = self.name, %error, "receive");
                        }
                        break Ok(());
                    }
                },
            };
            match self.deliver(&frame, env) {
                Ok(true) => delivered = true,
                Ok(false) => {
                    self.waiting = Some(frame);
                    break Ok(());
                }
                Err(error) => break Err(error),
            }
        };
        if delivered {
            env.interrupt(RECEIVE)?;
        }
        result
    }

    fn transmit(&mut self, env: &mut Env<'_>) -> Result<(), RingError> {
        while let Some(chain) = env.pop(TRANSMIT)? {
            let length = chain.readable.bytes();
            if length > HEADER_BYTES as u64 && length <= MAX_FRAME as u64 {
                let mut frame = vec![0; length as usize];
                chain.readable.read(env.memory, 0, &mut frame)?;
                // The count of buffers is for the other direction.
                frame[BUFFER_COUNT..HEADER_BYTES].fill(0);
                if let Err(error) = self.send(&frame) {
                    // A full or downed TAP drops frames, as a wire does.
                    tracing::debug!(device = self.name, %error, "transmit");
                }
            }
            env.push(TRANSMIT, &chain, 0)?;
        }
        env.interrupt(TRANSMIT)
    }
}

/// A frame by which switches learn where a hardware address is: RARP, "who am I".
fn announcement(mac: Mac) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    // RARP; Ethernet, IPv4, their address lengths; request.
    frame.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    for _ in 0..2 {
        frame.extend(mac);
        frame.extend([0; 4]);
    }
    frame.resize(HEADER_BYTES + 60, 0);
    frame
}

impl Device for Net {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        [
            abi::VIRTIO_NET_F_MAC,
            abi::VIRTIO_NET_F_MRG_RXBUF,
            abi::VIRTIO_NET_F_CSUM,
            abi::VIRTIO_NET_F_GUEST_CSUM,
            abi::VIRTIO_NET_F_HOST_TSO4,
            abi::VIRTIO_NET_F_HOST_TSO6,
            abi::VIRTIO_NET_F_GUEST_TSO4,
            abi::VIRTIO_NET_F_GUEST_TSO6,
        ]
        .iter()
        .fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        self.mac.to_vec()
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {
        // A card of virtio 1 has its address changed by a command, which is not offered.
    }

    fn activate(&mut self, features: u64) {
        let pairs = [
            (abi::VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
            (abi::VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
            (abi::VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        ];
        let flags = pairs
            .iter()
            .filter(|(bit, _)| has(features, *bit))
            .fold(0, |flags, (_, flag)| flags | *flag);
        if let Err(error) = self.wire.set_offload(flags) {
            // The guest takes less than it could: frames come without offloads.
            tracing::warn!(device = self.name, %error, "set the TAP's offloads");
        }
    }

    fn reset(&mut self) {
        self.waiting = None;
    }

    fn kicked(&mut self, queue: usize, env: &mut Env<'_>) -> Result<(), RingError> {
        match queue {
            RECEIVE => self.receive(env),
            _ => self.transmit(env),
        }
    }

    fn interests(&self) -> Vec<Interest> {
        // A TAP that nobody can take from is not waited for: the driver kicks when there are buffers again.
        if self.waiting.is_some() {
            return Vec::new();
        }
        vec![Interest {
            fd: Arc::clone(&self.fd),
            events: EventSet::IN,
            token: TAP_READY,
            completes: false,
        }]
    }

    fn ready(&mut self, _token: u64, env: &mut Env<'_>) -> Result<(), RingError> {
        self.receive(env)
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn state(&self) -> DeviceState {
        DeviceState::Net(NetState { mac: self.mac })
    }

    fn restored(&mut self, _env: &mut Env<'_>) -> Result<(), RingError> {
        let frame = announcement(self.mac);
        for _ in 0..ANNOUNCEMENTS {
            if let Err(error) = self.send(&frame) {
                tracing::warn!(device = self.name, %error, "tell the network where the VM is now");
            }
        }
        Ok(())
    }
}
