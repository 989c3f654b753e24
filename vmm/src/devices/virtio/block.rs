//! A disk (virtio 1.2, section 5.2): requests are parsed here and done by a few threads.
//!
//! ```text
//! kick --> parse: bounds, rights --> job --> I/O threads: pread, pwrite, fdatasync, fallocate
//!                    | refused                    |
//!                    v                            v
//!              status byte, used ring, interrupt <-- done (eventfd)
//! ```
//!
//! | request | data | here |
//! |---|---|---|
//! | IN, OUT | whole sectors, at most [`MAX_REQUEST_BYTES`] | read, write |
//! | FLUSH | | fdatasync |
//! | GET_ID | 20 bytes | the name |
//! | DISCARD, WRITE_ZEROES | segments of 16 bytes | holes, or zeros |
//!
//! Data is copied once more, through a buffer of the monitor: no other thread than the device's touches guest memory.

use std::collections::HashMap;
use std::sync::Arc;

use virtio_bindings::virtio_blk as abi;
use vmm_sys_util::epoll::EventSet;

use super::disk::{Disk, SECTOR_BYTES};
use super::queue::{Chain, RingError};
use super::state::{BlockState, DeviceState};
use super::{Device, Env, Interest};
use crate::memory::GuestMemory;

mod pool;
#[cfg(test)]
mod tests;

use pool::{Done, Job, Op, Pool};

/// Virtio's number for a disk.
pub const KIND: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
/// The longest segment of a request, which drivers keep to.
const SIZE_MAX: u32 = 64 << 10;
/// The most segments of a request, which drivers keep to.
const SEG_MAX: u32 = 62;
/// The most data of one request.
pub const MAX_REQUEST_BYTES: u64 = SIZE_MAX as u64 * SEG_MAX as u64;
/// Requests at work at the same time.
const MAX_IN_FLIGHT: usize = 64;
/// Their data.
const MAX_IN_FLIGHT_BYTES: u64 = 16 << 20;
/// The most of a disk one segment of a discard names: 1 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Segments of one discard.
const MAX_DISCARD_SEGMENTS: u32 = 16;
const QUEUE_SIZES: [u16; 1] = [256];
const HEADER_BYTES: u64 = 16;
const SEGMENT_BYTES: u64 = 16;
const DONE: u64 = 1;

const OK: u8 = abi::VIRTIO_BLK_S_OK as u8;
const IO_ERROR: u8 = abi::VIRTIO_BLK_S_IOERR as u8;
const UNSUPPORTED: u8 = abi::VIRTIO_BLK_S_UNSUPP as u8;

/// The device.
pub struct Block {
    disk: Arc<Disk>,
    /// Flushes are offered.
    flush: bool,
    pool: Pool,
    /// Requests handed to the pool.
    waiting: HashMap<u64, (Chain, u64)>,
    bytes_in_flight: u64,
    next: u64,
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Block")
            .field("disk", &self.disk)
            .finish_non_exhaustive()
    }
}

/// What becomes of a request.
enum Parsed {
    Job(Op),
    /// Done, with a status and how much was written before it.
    Now(u8, u32),
}

impl Block {
    /// A device for `disk`; with `flush` the guest's flushes reach the host's storage, without it they are not offered.
    ///
    /// # Errors
    /// When the system gives no threads.
    pub fn new(disk: Arc<Disk>, flush: bool) -> std::io::Result<Self> {
        Ok(Self {
            pool: Pool::new(&disk)?,
            disk,
            flush,
            waiting: HashMap::new(),
            bytes_in_flight: 0,
            next: 0,
        })
    }

    fn parse(&self, chain: &Chain, memory: &GuestMemory, features: u64) -> Result<Parsed, RingError> {
        let mut header = [0; HEADER_BYTES as usize];
        chain.readable.read(memory, 0, &mut header)?;
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let mut sector = [0; 8];
        sector.copy_from_slice(&header[8..]);
        let offset = u64::from_le_bytes(sector).checked_mul(SECTOR_BYTES);
        let out = chain.readable.bytes() - HEADER_BYTES;
        let room = chain.writable.bytes() - 1;
        let inside = |bytes: u64| {
            let fits = bytes <= MAX_REQUEST_BYTES && bytes.is_multiple_of(SECTOR_BYTES);
            offset.filter(|at| fits && at.checked_add(bytes).is_some_and(|end| end <= self.disk.bytes()))
        };
        let offered = |bit: u32| features & (1 << bit) != 0;
        Ok(match kind {
            abi::VIRTIO_BLK_T_IN => match inside(room) {
                Some(offset) => Parsed::Job(Op::Read {
                    offset,
                    bytes: room as usize,
                }),
                None => Parsed::Now(IO_ERROR, 0),
            },
            abi::VIRTIO_BLK_T_OUT => match inside(out) {
                Some(offset) if !self.disk.read_only() => {
                    let mut data = vec![0; out as usize];
                    chain.readable.read(memory, HEADER_BYTES, &mut data)?;
                    Parsed::Job(Op::Write { offset, data })
                }
                Some(_) | None => Parsed::Now(IO_ERROR, 0),
            },
            abi::VIRTIO_BLK_T_FLUSH if offered(abi::VIRTIO_BLK_F_FLUSH) => Parsed::Job(Op::Flush),
            abi::VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; abi::VIRTIO_BLK_ID_BYTES as usize];
                let name = self.disk.name().trim_start_matches("disk:").as_bytes();
                let length = name.len().min(id.len());
                id[..length].copy_from_slice(&name[..length]);
                let count = room.min(id.len() as u64);
                chain.writable.write(memory, 0, &id[..count as usize])?;
                Parsed::Now(OK, count as u32)
            }
            abi::VIRTIO_BLK_T_DISCARD if offered(abi::VIRTIO_BLK_F_DISCARD) => {
                self.parse_segments(chain, memory, out, true)?
            }
            abi::VIRTIO_BLK_T_WRITE_ZEROES if offered(abi::VIRTIO_BLK_F_WRITE_ZEROES) => {
                self.parse_segments(chain, memory, out, false)?
            }
            _ => Parsed::Now(UNSUPPORTED, 0),
        })
    }

    /// Segments: sector (u64), sectors (u32), flags (u32), of which bit 0 lets a write of zeros give the room back.
    fn parse_segments(
        &self,
        chain: &Chain,
        memory: &GuestMemory,
        out: u64,
        discard: bool,
    ) -> Result<Parsed, RingError> {
        let count = out / SEGMENT_BYTES;
        if !out.is_multiple_of(SEGMENT_BYTES)
            || count == 0
            || count > MAX_DISCARD_SEGMENTS.into()
            || self.disk.read_only()
        {
            return Ok(Parsed::Now(IO_ERROR, 0));
        }
        let mut ranges = Vec::with_capacity(count as usize);
        for number in 0..count {
            let mut segment = [0; SEGMENT_BYTES as usize];
            chain
                .readable
                .read(memory, HEADER_BYTES + number * SEGMENT_BYTES, &mut segment)?;
            let mut sector = [0; 8];
            sector.copy_from_slice(&segment[..8]);
            let word = |at: usize| {
                u32::from_le_bytes([segment[at], segment[at + 1], segment[at + 2], segment[at + 3]])
            };
            let (sectors, flags) = (word(8), word(12));
            let bytes = u64::from(sectors) * SECTOR_BYTES;
            let offset = u64::from_le_bytes(sector)
                .checked_mul(SECTOR_BYTES)
                .filter(|at| at.checked_add(bytes).is_some_and(|end| end <= self.disk.bytes()));
            let unmap = flags & abi::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            // A discard has no flags, and a write of zeros only the one.
            if flags & !abi::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || discard && unmap {
                return Ok(Parsed::Now(UNSUPPORTED, 0));
            }
            match offset {
                Some(offset) if sectors <= MAX_DISCARD_SECTORS => {
                    ranges.push((offset, bytes, discard || unmap))
                }
                Some(_) | None => return Ok(Parsed::Now(IO_ERROR, 0)),
            }
        }
        Ok(Parsed::Job(Op::Zero { ranges }))
    }

    fn take(&mut self, chain: Chain, env: &mut Env<'_>) -> Result<bool, RingError> {
        // Without room for a status there is no way to answer.
        if chain.writable.bytes() == 0 || chain.readable.bytes() < HEADER_BYTES {
            return Err(RingError::Buffer);
        }
        let op = match self.parse(&chain, env.memory, env.features)? {
            Parsed::Now(status, written) => {
                finish(&chain, status, written, env)?;
                return Ok(true);
            }
            Parsed::Job(op) => op,
        };
        let bytes = op.bytes();
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.bytes_in_flight += bytes;
        self.waiting.insert(number, (chain, bytes));
        self.pool.submit(Job { number, op });
        Ok(false)
    }
}

/// Status and used ring.
fn finish(chain: &Chain, status: u8, written: u32, env: &mut Env<'_>) -> Result<(), RingError> {
    let at = chain.writable.bytes() - 1;
    chain.writable.write(env.memory, at, &[status])?;
    // The status byte counts only where all before it was written, or nothing could be.
    env.push(0, chain, written.saturating_add(1))
}

impl Device for Block {
    fn name(&self) -> &str {
        self.disk.name()
    }

    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        let mut features = 1 << abi::VIRTIO_BLK_F_SIZE_MAX | 1 << abi::VIRTIO_BLK_F_SEG_MAX;
        if self.flush {
            features |= 1 << abi::VIRTIO_BLK_F_FLUSH;
        }
        if self.disk.read_only() {
            features | 1 << abi::VIRTIO_BLK_F_RO
        } else {
            features | 1 << abi::VIRTIO_BLK_F_DISCARD | 1 << abi::VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        config[..8].copy_from_slice(&(self.disk.bytes() / SECTOR_BYTES).to_le_bytes());
        let mut put = |at: usize, value: u32| config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(8, SIZE_MAX);
        put(12, SEG_MAX);
        put(36, MAX_DISCARD_SECTORS);
        put(40, MAX_DISCARD_SEGMENTS);
        // In sectors: a discard of whole tracked blocks gives room back.
        put(44, self.disk.block_bytes() / SECTOR_BYTES as u32);
        put(48, MAX_DISCARD_SECTORS);
        put(52, MAX_DISCARD_SEGMENTS);
        config[56] = 1;
        config
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {
        // Nothing in it can be written: the cache mode is not offered.
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        // The transport has waited for what was in flight.
        self.waiting.clear();
        self.bytes_in_flight = 0;
    }

    fn kicked(&mut self, queue: usize, env: &mut Env<'_>) -> Result<(), RingError> {
        let mut answered = false;
        while self.waiting.len() < MAX_IN_FLIGHT && self.bytes_in_flight < MAX_IN_FLIGHT_BYTES {
            let Some(chain) = env.pop(queue)? else { break };
            answered |= self.take(chain, env)?;
        }
        if answered { env.interrupt(queue) } else { Ok(()) }
    }

    fn interests(&self) -> Vec<Interest> {
        vec![Interest {
            fd: self.pool.event(),
            events: EventSet::IN,
            token: DONE,
            completes: true,
        }]
    }

    fn ready(&mut self, _token: u64, env: &mut Env<'_>) -> Result<(), RingError> {
        let mut result = Ok(());
        for Done {
            number,
            result: io,
            data,
        } in self.pool.done()
        {
            let Some((chain, bytes)) = self.waiting.remove(&number) else {
                continue;
            };
            self.bytes_in_flight -= bytes;
            let (status, written) = match &io {
                Ok(()) => (OK, data.len() as u32),
                Err(error) => {
                    tracing::warn!(disk = self.disk.name(), %error, "a request of the guest failed");
                    (IO_ERROR, 0)
                }
            };
            // All that came back is accounted for, also when the driver has spoilt a ring.
            result = result
                .and_then(|()| chain.writable.write(env.memory, 0, &data))
                .and_then(|()| finish(&chain, status, written, env));
        }
        result?;
        env.interrupt(0)?;
        // There is room for more.
        env.again(0);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    fn state(&self) -> DeviceState {
        DeviceState::Block(BlockState {
            bytes: self.disk.bytes(),
            read_only: self.disk.read_only(),
            flush: self.flush,
        })
    }

    fn restored(&mut self, _env: &mut Env<'_>) -> Result<(), RingError> {
        Ok(())
    }
}
