//! Stream sockets between the guest and processes of this host (virtio 1.2, section 5.10), which meet at a Unix socket
//! as Firecracker's users know it:
//!
//! ```text
//! a process connects to PATH and writes "CONNECT PORT\n": answered "OK HOSTPORT\n" when the guest listens there
//! the guest connects to CID 2, port P: a process that listens at PATH_P has it
//! ```
//!
//! Connections are this host's: none is in a checkpoint. A restored guest is told so (a transport reset), loses those
//! it had, and goes on to listen. What it sends leaves only as long as the VM may be heard ([`Leash`]).

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::epoll::EventSet;

use super::queue::RingError;
use super::state::{DeviceState, VsockState};
use super::{Device, Env, Interest};
use crate::leash::Leash;
use crate::socket::Socket;

mod connection;
mod mux;
mod packet;
#[cfg(test)]
mod tests;

use mux::{Mux, Ports, gone};
use packet::{HEADER_BYTES, HOST_CID, Header};

/// Virtio's number for it.
pub const KIND: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
/// Its logical name.
pub const NAME: &str = "vsock:0";
/// The addresses a guest may have: those below are the host's and reserved, and the last means "any".
pub const CIDS: std::ops::Range<u32> = 3..u32::MAX;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
/// The longest data of a packet, either way.
const MAX_DATA_BYTES: usize = 64 << 10;
/// Packets of one connection before others have a turn.
const BURST: usize = 16;
/// Event "the transport was reset".
const TRANSPORT_RESET: [u8; 4] = [0; 4];
const LISTENER: u64 = 1;
/// How often it is looked whether a VM that may not be heard may be again.
const LEASH_LOOK: Duration = Duration::from_millis(1);

/// The device.
#[derive(Debug)]
pub struct Vsock {
    mux: Mux,
    socket: Arc<Socket>,
    leash: Leash,
    /// The driver has buffers, as far as known.
    buffers: bool,
    /// The guest has to hear of a reset, and had no buffer for it.
    event: bool,
    scratch: Vec<u8>,
}

/// A listener, to be waited for.
struct Listening(Arc<Socket>);

impl std::os::fd::AsRawFd for Listening {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.listener().as_raw_fd()
    }
}

impl Vsock {
    /// The device of a guest with this address, at a socket of this host. It is heard as long as `leash` lets it.
    #[must_use]
    pub fn new(guest_cid: u32, socket: Arc<Socket>, leash: Leash) -> Self {
        Self {
            mux: Mux::new(guest_cid.into(), Arc::clone(&socket)),
            socket,
            leash,
            buffers: true,
            event: false,
            scratch: vec![0; MAX_DATA_BYTES],
        }
    }

    /// Whether what the guest sends may leave. A wait, when not: it is looked at again at once.
    fn may_speak(&self) -> bool {
        let may = self.leash.allows();
        if !may {
            std::thread::sleep(LEASH_LOOK);
        }
        may
    }

    /// Tells the guest what is not data, as far as it has buffers.
    fn tell(&mut self, env: &mut Env<'_>) -> Result<(), RingError> {
        let mut told = false;
        while self.mux.owes() {
            let Some(chain) = env.pop(RECEIVE)? else {
                self.buffers = false;
                break;
            };
            let Some(header) = self.mux.next_control() else {
                env.unpop(RECEIVE);
                break;
            };
            chain.writable.write(env.memory, 0, &header.bytes())?;
            env.push(RECEIVE, &chain, HEADER_BYTES as u32)?;
            told = true;
        }
        if told { env.interrupt(RECEIVE) } else { Ok(()) }
    }

    fn transmit(&mut self, env: &mut Env<'_>) -> Result<(), RingError> {
        loop {
            if !self.may_speak() {
                env.again(TRANSMIT);
                break;
            }
            let Some(chain) = env.pop(TRANSMIT)? else { break };
            let bytes = chain.readable.bytes();
            if bytes >= HEADER_BYTES as u64 {
                let mut header = [0; HEADER_BYTES];
                chain.readable.read(env.memory, 0, &mut header)?;
                let header = Header::parse(&header);
                let whole = header.len as usize <= MAX_DATA_BYTES
                    && u64::from(header.len) <= bytes - HEADER_BYTES as u64;
                let data = &mut self.scratch[..if whole { header.len as usize } else { 0 }];
                chain.readable.read(env.memory, HEADER_BYTES as u64, data)?;
                self.mux.packet(&header, data, whole);
            } else {
                tracing::debug!("a vsock packet without a header is dropped");
            }
            env.push(TRANSMIT, &chain, 0)?;
        }
        env.interrupt(TRANSMIT)?;
        self.tell(env)
    }

    /// Gives the guest what a process has for it.
    fn receive(&mut self, id: u64, env: &mut Env<'_>) -> Result<(), RingError> {
        let mut delivered = false;
        for _ in 0..BURST {
            let Some((ports, connection)) = self.mux.by_id(id) else {
                break;
            };
            if !self.buffers || !connection.reads() {
                break;
            }
            let Some(chain) = env.pop(RECEIVE)? else {
                self.buffers = false;
                break;
            };
            let room = usize::try_from(chain.writable.bytes()).unwrap_or(usize::MAX);
            let Some(room) = room.checked_sub(HEADER_BYTES).filter(|room| *room > 0) else {
                return Err(RingError::Buffer);
            };
            let room = room.min(MAX_DATA_BYTES);
            match connection.read(&mut self.scratch[..room]) {
                Ok(0) => {
                    env.unpop(RECEIVE);
                    let gone = gone(&connection.stream);
                    if let Err(over) = connection.host_ended(gone) {
                        self.mux.end(ports, over);
                    }
                    break;
                }
                Ok(count) => {
                    self.deliver(ports, count, &chain, env)?;
                    delivered = true;
                }
                Err(error) => {
                    env.unpop(RECEIVE);
                    if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) {
                        self.mux.end(ports, connection::Over { tell_guest: true });
                    }
                    break;
                }
            }
        }
        if delivered { env.interrupt(RECEIVE) } else { Ok(()) }
    }

    fn deliver(
        &mut self,
        ports: Ports,
        count: usize,
        chain: &super::queue::Chain,
        env: &mut Env<'_>,
    ) -> Result<(), RingError> {
        // It was there a moment ago.
        let Some(header) = self.mux.data_header(ports, count) else {
            return Ok(());
        };
        chain.writable.write(env.memory, 0, &header.bytes())?;
        chain
            .writable
            .write(env.memory, HEADER_BYTES as u64, &self.scratch[..count])?;
        env.push(RECEIVE, chain, (HEADER_BYTES + count) as u32)
    }

    fn tell_reset(&mut self, env: &mut Env<'_>) -> Result<(), RingError> {
        if self.event
            && let Some(chain) = env.pop(EVENT)?
        {
            chain.writable.write(env.memory, 0, &TRANSPORT_RESET)?;
            env.push(EVENT, &chain, TRANSPORT_RESET.len() as u32)?;
            self.event = false;
            env.interrupt(EVENT)?;
        }
        Ok(())
    }
}

impl Device for Vsock {
    fn name(&self) -> &str {
        NAME
    }

    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        // Streams need none.
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        self.mux.guest_cid.to_le_bytes().to_vec()
    }

    fn activate(&mut self, _features: u64) {
        self.buffers = true;
    }

    fn reset(&mut self) {
        self.mux.clear();
        self.event = false;
    }

    fn kicked(&mut self, queue: usize, env: &mut Env<'_>) -> Result<(), RingError> {
        match queue {
            RECEIVE => {
                self.buffers = true;
                self.tell(env)
            }
            TRANSMIT => self.transmit(env),
            _ => self.tell_reset(env),
        }
    }

    fn interests(&self) -> Vec<Interest> {
        let interest = |(token, fd, events)| Interest {
            fd,
            events,
            token,
            completes: false,
        };
        let listener: Arc<dyn std::os::fd::AsRawFd + Send + Sync> =
            Arc::new(Listening(Arc::clone(&self.socket)));
        std::iter::once((LISTENER, listener, EventSet::IN))
            .chain(self.mux.interests(self.buffers))
            .map(interest)
            .collect()
    }

    fn ready(&mut self, token: u64, env: &mut Env<'_>) -> Result<(), RingError> {
        if token == LISTENER {
            self.mux.accept();
            return Ok(());
        }
        if !self.mux.handshake(token) {
            let may_speak = self.mux.by_id(token).is_some_and(|(_, c)| c.writes()) && self.may_speak();
            if let Some((ports, connection)) = self.mux.by_id(token)
                && may_speak
                && let Err(over) = connection.flush()
            {
                self.mux.end(ports, over);
            }
            self.receive(token, env)?;
        }
        self.tell(env)
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn state(&self) -> DeviceState {
        DeviceState::Vsock(VsockState {
            // It was a u32 when the device was made.
            guest_cid: self.mux.guest_cid as u32,
        })
    }

    fn restored(&mut self, env: &mut Env<'_>) -> Result<(), RingError> {
        self.event = true;
        self.tell_reset(env)
    }
}

const _: () = assert!(LISTENER < Mux::FIRST_ID && HOST_CID < CIDS.start as u64);
