//! A driver for the tests: it does what Linux's does, through the registers and guest memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::{Device, Transport};
use crate::bus::MmioDevice;
use crate::memory::{GuestMemory, GuestRam};

/// Entries of a queue.
pub(crate) const SIZE: u16 = 16;
/// Where queue `n`'s rings are.
const RINGS: u64 = 0x10_0000;
const RING_BYTES: u64 = 0x4000;
/// Where buffers are.
const BUFFERS: u64 = 0x20_0000;
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Driver {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) device: Transport,
    /// Per queue: the available index, and the used index seen.
    rings: Vec<(u16, u16)>,
    next: u64,
}

impl Driver {
    pub(crate) fn new(device: Box<dyn Device>, features: u64) -> Self {
        let ram = Arc::new(GuestRam::new(16 << 20).unwrap());
        let device = Transport::new(device, &ram).unwrap();
        let driver = Self::around(ram, device);
        driver.device.unpause();
        driver.negotiate(features);
        driver
    }

    pub(crate) fn around(ram: Arc<GuestRam>, device: Transport) -> Self {
        let rings = vec![(0, 0); device.kicks().len()];
        Self {
            ram,
            device,
            rings,
            next: BUFFERS,
        }
    }

    /// The same driver, with its memory and another device.
    pub(crate) fn moved_to(self, device: impl FnOnce(&Arc<GuestRam>) -> Transport) -> Self {
        let device = device(&self.ram);
        Self { device, ..self }
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        self.ram.memory()
    }

    pub(crate) fn set(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn get(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn negotiate(&self, features: u64) {
        let features = features | 1 << 32;
        self.set(0x70, 0);
        self.set(0x70, 1);
        self.set(0x70, 3);
        for (half, value) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(0x24, half);
            self.set(0x20, value);
        }
        self.set(0x70, 11);
        assert_eq!(self.get(0x70), 11, "the device does not take {features:#x}");
        for queue in 0..self.rings.len() {
            let at = RINGS + queue as u64 * RING_BYTES;
            self.set(0x30, queue as u32);
            self.set(0x38, SIZE.into());
            for (offset, address) in [(0x80, at), (0x90, at + 0x1000), (0xa0, at + 0x2000)] {
                self.set(offset, address as u32);
                self.set(offset + 4, (address >> 32) as u32);
            }
            self.set(0x44, 1);
            assert_eq!(self.get(0x44), 1);
        }
        self.set(0x70, 15);
    }

    fn write<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory().write_obj(value, GuestAddress(at)).unwrap();
    }

    /// Memory of the driver's, with these bytes.
    pub(crate) fn buffer(&mut self, bytes: &[u8]) -> u64 {
        let at = self.next;
        self.next += (bytes.len() as u64).next_multiple_of(64);
        if self.next > self.ram.bytes() {
            self.next = BUFFERS;
            return self.buffer(bytes);
        }
        self.memory().write_slice(bytes, GuestAddress(at)).unwrap();
        at
    }

    /// Puts a raw chain of `(address, bytes, flags without NEXT)` into a queue; its head.
    pub(crate) fn put(&mut self, queue: usize, chain: &[(u64, u32, u16)]) -> u16 {
        let at = RINGS + queue as u64 * RING_BYTES;
        let available = self.rings[queue].0;
        // Chains of up to 4 descriptors each have a place of their own.
        assert!(chain.len() <= 4);
        let head = available % (SIZE / 4) * 4;
        for (number, &(address, bytes, flags)) in chain.iter().enumerate() {
            let last = number + 1 == chain.len();
            let descriptor = at + 16 * (u64::from(head) + number as u64);
            self.write(descriptor, address);
            self.write(descriptor + 8, bytes);
            self.write(descriptor + 12, flags | u16::from(!last));
            self.write(descriptor + 14, head + number as u16 + 1);
        }
        self.write(at + 0x1000 + 4 + 2 * u64::from(available % SIZE), head);
        self.rings[queue].0 = available.wrapping_add(1);
        self.write(at + 0x1000 + 2, self.rings[queue].0);
        head
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.set(0x50, queue as u32);
    }

    /// How many chains have come back and were not looked at.
    pub(crate) fn used(&self, queue: usize) -> u16 {
        let at = RINGS + queue as u64 * RING_BYTES + 0x2000;
        let index: u16 = self.memory().read_obj(GuestAddress(at + 2)).unwrap();
        index.wrapping_sub(self.rings[queue].1)
    }

    /// The next chain that comes back: its head, and how many bytes were written.
    pub(crate) fn wait(&mut self, queue: usize) -> (u16, u32) {
        let deadline = Instant::now() + PATIENCE;
        while self.used(queue) == 0 {
            assert!(Instant::now() < deadline, "the device does not answer");
            std::thread::sleep(Duration::from_micros(100));
        }
        let at = RINGS + queue as u64 * RING_BYTES + 0x2000;
        let entry = at + 4 + 8 * u64::from(self.rings[queue].1 % SIZE);
        self.rings[queue].1 = self.rings[queue].1.wrapping_add(1);
        let head: u32 = self.memory().read_obj(GuestAddress(entry)).unwrap();
        (
            head as u16,
            self.memory().read_obj(GuestAddress(entry + 4)).unwrap(),
        )
    }

    /// Sends `out`, and returns what was written into `room` bytes.
    pub(crate) fn ask(&mut self, queue: usize, out: &[u8], room: u32) -> Vec<u8> {
        let (to, from) = (self.buffer(out), self.buffer(&vec![0xee; room as usize]));
        self.put(queue, &[(to, out.len() as u32, 0), (from, room, 2)]);
        self.kick(queue);
        let (_, written) = self.wait(queue);
        assert!(written <= room);
        let mut answer = vec![0; room as usize];
        self.memory().read_slice(&mut answer, GuestAddress(from)).unwrap();
        answer
    }

    /// Writes into a queue's rings, as no driver does: values at offsets, descriptors of (address, bytes, flags, next),
    /// the available index.
    pub(crate) fn spoil(
        &self,
        queue: u64,
        rings: Vec<(u64, u64)>,
        descriptors: Vec<(u64, u32, u16, u16)>,
        available: u16,
    ) {
        let base = RINGS + queue * RING_BYTES;
        for (at, value) in rings {
            self.write(base + at, value);
        }
        for (number, (address, bytes, flags, next)) in descriptors.into_iter().enumerate() {
            let at = base + 16 * number as u64;
            self.write(at, address);
            self.write(at + 8, bytes);
            self.write(at + 12, flags);
            self.write(at + 14, next);
        }
        self.write(base + 0x1002, available);
    }

    /// A driver that begins anew, with clean rings, on the same device, which was reset.
    pub(crate) fn renewed(self) -> Self {
        let bytes = RING_BYTES * self.rings.len() as u64;
        self.memory()
            .write_slice(&vec![0; bytes as usize], GuestAddress(RINGS))
            .unwrap();
        Self::around(self.ram, self.device)
    }

    /// Waits until the device asks for a reset.
    pub(crate) fn wait_broken(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.get(0x70) & 64 == 0 {
            assert!(Instant::now() < deadline, "the device does not notice");
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}
