//! The transport: virtio over MMIO, version 2 (virtio 1.2, section 4.2), one 4 KiB window a device.
//!
//! | offset | | offset | |
//! |---|---|---|---|
//! | 0x000 | magic "virt" (r) | 0x060 | interrupt status (r) |
//! | 0x004 | version 2 (r) | 0x064 | interrupt acknowledge (w) |
//! | 0x008 | kind of device (r) | 0x070 | status (rw); 0 resets |
//! | 0x00c | vendor (r) | 0x080, 0x084 | descriptor table (w) |
//! | 0x010, 0x014 | offered features, which half (r, w) | 0x090, 0x094 | available ring (w) |
//! | 0x020, 0x024 | taken features, which half (w) | 0x0a0, 0x0a4 | used ring (w) |
//! | 0x030 | which queue (w) | 0x0ac..0x0bc | shared memory: there is none (w, r) |
//! | 0x034, 0x038 | its largest size, its size (r, w) | 0x0fc | configuration generation (r) |
//! | 0x044 | queue ready (rw) | 0x100.. | configuration, any width |
//! | 0x050 | kick (w): KVM's ioeventfd takes it | | |
//!
//! A register that is written in a status that does not allow it keeps its value; one of another width or alignment
//! than 32 bits reads as 0 and takes nothing. No order of accesses makes the device touch memory before its driver has
//! set `DRIVER_OK`, and then only queues whose rings lie in guest memory.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{RingError, VirtQueue};
use super::state::{MAX_QUEUES, VirtioState};
use super::{BATCH, Device, Env, worker};
use crate::bus::MmioDevice;
use crate::devices::DeviceStateError;
use crate::layout::VIRTIO_QUEUE_NOTIFY;
use crate::memory::GuestRam;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"USTY");
const CONFIG: u64 = 0x100;
/// The transport's and the rings' features.
const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGED: u32 = 2;
/// How long what is in flight may take to finish. A disk that takes longer hangs.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// A device did not finish what it had taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name} did not finish {requests} requests within {} s: its storage hangs; try again when it works",
    DRAIN_DEADLINE.as_secs()
)]
pub struct DrainError {
    /// The device.
    pub name: String,
    /// What is in flight.
    pub requests: usize,
}

/// The interrupt of a device: the two registers an interrupt handler touches, outside the device's lock.
#[derive(Debug)]
pub struct Irq {
    status: AtomicU32,
    event: EventFd,
}

impl Irq {
    fn raise(&self, bits: u32) {
        // The cause before the interrupt, which makes the guest look for it.
        self.status.fetch_or(bits, Ordering::SeqCst);
        if let Err(error) = self.event.write(1) {
            tracing::debug!(%error, "raise a virtio interrupt");
        }
    }

    /// Buffers were given back.
    pub fn queue(&self) {
        self.raise(USED_BUFFER);
    }

    /// The configuration changed.
    pub fn config(&self) {
        self.raise(CONFIG_CHANGED);
    }
}

/// What the worker is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Its work.
    Running,
    /// Finish what was taken, and take nothing more.
    Draining,
    /// Nothing.
    Paused,
    /// End.
    Quit,
}

/// All of a device that is behind its lock.
pub(super) struct Inner {
    pub(super) device: Box<dyn Device>,
    pub(super) queues: Vec<VirtQueue>,
    pub(super) mode: Mode,
    /// Queues that were kicked and not looked at yet, a bit each.
    pub(super) kicked: u64,
    status: u32,
    driver_features: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    config_generation: u32,
    /// Restored, and has not run since.
    restored: bool,
}

/// What the vCPUs, the worker and the owner of the machine share of a device.
pub(super) struct Shared {
    inner: Mutex<Inner>,
    /// The mode changed, or nothing is in flight any more.
    pub(super) changed: Condvar,
    pub(super) irq: Irq,
    /// One a queue; KVM writes to them.
    pub(super) kicks: Vec<EventFd>,
    /// Makes the worker look at its mode and interests.
    pub(super) wake: EventFd,
    ram: Arc<GuestRam>,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn poke(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::debug!(%error, "wake a device's thread");
        }
    }
}

impl Inner {
    /// Whether the driver may be served.
    pub(super) fn active(&self) -> bool {
        self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
            && self.status & (VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED) == 0
    }

    /// Lets the device work, and stops it for good (until a reset) when its driver breaks the rules.
    pub(super) fn work(
        &mut self,
        shared: &Shared,
        work: impl FnOnce(&mut dyn Device, &mut Env<'_>) -> Result<(), RingError>,
    ) {
        if self.active() {
            self.work_always(shared, work);
        }
    }

    /// The same in any status: what is in flight comes back also to a driver that broke its rules meanwhile.
    pub(super) fn work_always(
        &mut self,
        shared: &Shared,
        work: impl FnOnce(&mut dyn Device, &mut Env<'_>) -> Result<(), RingError>,
    ) {
        let mut env = Env {
            memory: shared.ram.memory(),
            queues: &mut self.queues,
            irq: &shared.irq,
            features: self.driver_features,
            again: 0,
            budget: BATCH,
            config: false,
        };
        let result = work(self.device.as_mut(), &mut env);
        self.kicked |= env.again;
        if env.config {
            self.config_generation = self.config_generation.wrapping_add(1);
            shared.irq.config();
        }
        if let Err(error) = result {
            tracing::warn!(device = self.device.name(), %error, "the guest's driver is broken: the device waits for a reset");
            self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
            shared.irq.config();
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | COMMON_FEATURES
    }

    fn queue(&mut self) -> Option<&mut VirtQueue> {
        let at = usize::try_from(self.queue_sel).ok()?;
        self.queues.get_mut(at)
    }

    /// Rings may be placed: features are agreed on, and the driver is not running.
    fn setting_up(&self) -> bool {
        let bits = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET;
        self.status & bits == VIRTIO_CONFIG_S_FEATURES_OK
    }
}

/// A device behind its registers.
pub struct Transport {
    shared: Arc<Shared>,
    worker: Option<std::thread::JoinHandle<()>>,
    name: String,
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

fn event(name: &str) -> Result<EventFd, DeviceStateError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|e| DeviceStateError {
        device: "virtio",
        why: format!("make an eventfd for {name}: {e}"),
    })
}

impl Transport {
    /// A device after reset, paused: [`Transport::unpause`] lets it work.
    ///
    /// # Errors
    /// When the system gives no eventfd or thread.
    pub fn new(device: Box<dyn Device>, ram: &Arc<GuestRam>) -> Result<Self, DeviceStateError> {
        Self::make(device, ram, None)
    }

    /// A device with a saved state, paused. The interrupt it may have raised before the save is raised again: KVM
    /// delivers it a little after the write, so it may be in nobody's saved state.
    ///
    /// # Errors
    /// What is wrong with the state, or what this host's device lacks.
    pub fn from_state(
        device: Box<dyn Device>,
        state: &VirtioState,
        ram: &Arc<GuestRam>,
    ) -> Result<Self, DeviceStateError> {
        Self::make(device, ram, Some(state))
    }

    fn make(
        device: Box<dyn Device>,
        ram: &Arc<GuestRam>,
        state: Option<&VirtioState>,
    ) -> Result<Self, DeviceStateError> {
        let name = device.name().to_owned();
        let sizes = device.queue_sizes().to_vec();
        assert!(sizes.len() <= MAX_QUEUES, "a device's own number of queues");
        let kicks = sizes
            .iter()
            .map(|_| event(&name))
            .collect::<Result<Vec<_>, _>>()?;
        let mut inner = Inner {
            queues: sizes.iter().map(|&size| VirtQueue::new(size)).collect(),
            device,
            mode: Mode::Paused,
            kicked: 0,
            status: 0,
            driver_features: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            config_generation: 0,
            restored: false,
        };
        let irq = Irq {
            status: AtomicU32::new(0),
            event: event(&name)?,
        };
        if let Some(state) = state {
            restore(&mut inner, state, ram).map_err(|why| DeviceStateError {
                device: "virtio",
                why: format!("{name}: {why}"),
            })?;
            irq.status.store(
                state.interrupt_status & (USED_BUFFER | CONFIG_CHANGED),
                Ordering::SeqCst,
            );
        }
        let shared = Arc::new(Shared {
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            irq,
            kicks,
            wake: event(&name)?,
            ram: Arc::clone(ram),
        });
        let waiter =
            worker::Waiter::new(std::iter::once(&shared.wake).chain(&shared.kicks)).map_err(|e| {
                DeviceStateError {
                    device: "virtio",
                    why: format!("wait for kicks of {name}: {e}"),
                }
            })?;
        let of_worker = Arc::clone(&shared);
        let worker = std::thread::Builder::new()
            .name(thread_name(&name))
            .spawn(move || worker::run(&of_worker, waiter))
            .map_err(|e| DeviceStateError {
                device: "virtio",
                why: format!("start the thread of {name}: {e}"),
            })?;
        Ok(Self {
            shared,
            worker: Some(worker),
            name,
        })
    }

    /// Its logical name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The eventfd for KVM's irqfd.
    #[must_use]
    pub fn irq_event(&self) -> &EventFd {
        &self.shared.irq.event
    }

    /// The eventfds for KVM's ioeventfds, in the order of the queues.
    #[must_use]
    pub fn kicks(&self) -> &[EventFd] {
        &self.shared.kicks
    }

    /// Takes no new work, and waits until what is in flight is done.
    ///
    /// # Errors
    /// [`DrainError`]: it then still finishes what it has, and takes nothing new until [`Transport::unpause`].
    pub fn pause(&self) -> Result<(), DrainError> {
        let mut inner = self.shared.lock();
        match inner.mode {
            Mode::Paused | Mode::Quit => return Ok(()),
            Mode::Running | Mode::Draining => {}
        }
        if inner.device.in_flight() == 0 {
            inner.mode = Mode::Paused;
            return Ok(());
        }
        inner.mode = Mode::Draining;
        self.shared.poke();
        let (inner, _) = self
            .shared
            .changed
            .wait_timeout_while(inner, DRAIN_DEADLINE, |inner| inner.mode == Mode::Draining)
            .unwrap_or_else(PoisonError::into_inner);
        match inner.mode {
            Mode::Draining => Err(DrainError {
                name: self.name.clone(),
                requests: inner.device.in_flight(),
            }),
            Mode::Running | Mode::Paused | Mode::Quit => Ok(()),
        }
    }

    /// Lets it work.
    pub fn unpause(&self) {
        let mut inner = self.shared.lock();
        if inner.mode == Mode::Quit {
            return;
        }
        inner.mode = Mode::Running;
        if std::mem::take(&mut inner.restored) {
            // Trap 13: kicks that were on their way are in nobody's state.
            inner.kicked = u64::MAX;
            inner.work(&self.shared, |device, env| device.restored(env));
            if self.shared.irq.status.load(Ordering::SeqCst) != 0 {
                self.shared.irq.raise(0);
            }
        }
        drop(inner);
        self.shared.changed.notify_all();
        self.shared.poke();
    }

    /// The state to save.
    ///
    /// # Panics
    /// If it is not paused: the machine pauses its devices before it reads them.
    #[must_use]
    pub fn state(&self) -> VirtioState {
        let inner = self.shared.lock();
        assert_eq!(inner.mode, Mode::Paused, "a device is saved while it is paused");
        // Trap 13: the device before its transport.
        let device = inner.device.state();
        VirtioState {
            name: self.name.clone(),
            device,
            driver_features: inner.driver_features,
            device_features_sel: inner.device_features_sel,
            driver_features_sel: inner.driver_features_sel,
            queue_sel: inner.queue_sel,
            status: inner.status,
            config_generation: inner.config_generation,
            interrupt_status: self.shared.irq.status.load(Ordering::SeqCst),
            queues: inner.queues.iter().map(VirtQueue::state).collect(),
        }
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            0x000 => return MAGIC,
            0x004 => return VERSION,
            0x00c => return VENDOR,
            0x060 => return self.shared.irq.status.load(Ordering::SeqCst),
            _ => {}
        }
        let mut inner = self.shared.lock();
        let half = |value: u64, sel: u32| match sel {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        };
        match offset {
            0x008 => inner.device.kind(),
            0x010 => half(inner.offered(), inner.device_features_sel),
            0x034 => inner.queue().map_or(0, |q| q.inner().max_size().into()),
            0x044 => inner.queue().is_some_and(|q| q.ready()).into(),
            0x070 => inner.status,
            // Length and base of a shared memory region that is not there.
            0x0b0..=0x0bc => u32::MAX,
            0x0fc => inner.config_generation,
            _ => 0,
        }
    }

    fn set_register(&self, offset: u64, value: u32) {
        match offset {
            VIRTIO_QUEUE_NOTIFY => {
                // Here only without an ioeventfd (or when a guest kicks a queue that is not there).
                let kick = usize::try_from(value).ok().and_then(|q| self.shared.kicks.get(q));
                if let Some(Err(error)) = kick.map(|kick| kick.write(1)) {
                    tracing::debug!(%error, "pass a kick on");
                }
                return;
            }
            0x064 => {
                self.shared.irq.status.fetch_and(!value, Ordering::SeqCst);
                return;
            }
            0x070 => return self.set_status(value),
            _ => {}
        }
        let mut inner = self.shared.lock();
        match offset {
            0x014 => inner.device_features_sel = value,
            0x024 => inner.driver_features_sel = value,
            0x030 => inner.queue_sel = value,
            0x020 => {
                let open = VIRTIO_CONFIG_S_DRIVER;
                if inner.status & (open | VIRTIO_CONFIG_S_FEATURES_OK) != open {
                    return;
                }
                let shift = match inner.driver_features_sel {
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                inner.driver_features &= !(u64::from(u32::MAX) << shift);
                inner.driver_features |= u64::from(value) << shift;
            }
            0x038 | 0x044 | 0x080 | 0x084 | 0x090 | 0x094 | 0x0a0 | 0x0a4 => {
                self.set_queue(&mut inner, offset, value);
            }
            _ => {}
        }
    }

    fn set_queue(&self, inner: &mut Inner, offset: u64, value: u32) {
        if !inner.setting_up() {
            return;
        }
        let event_idx = inner.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let memory = self.shared.ram.memory();
        let Some(vq) = inner.queue() else { return };
        let queue = vq.inner();
        if offset == 0x044 {
            queue.set_ready(value == 1);
            queue.set_event_idx(event_idx);
            if value == 1 && !vq.is_valid(memory) {
                tracing::debug!(device = self.name, "a queue outside guest memory is not taken");
                vq.inner().set_ready(false);
            }
            return;
        }
        if queue.ready() {
            return;
        }
        match offset {
            0x038 => queue.set_size(u16::try_from(value).unwrap_or(0)),
            0x080 => queue.set_desc_table_address(Some(value), None),
            0x084 => queue.set_desc_table_address(None, Some(value)),
            0x090 => queue.set_avail_ring_address(Some(value), None),
            0x094 => queue.set_avail_ring_address(None, Some(value)),
            0x0a0 => queue.set_used_ring_address(Some(value), None),
            0x0a4 => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn set_status(&self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let mut inner = self.shared.lock();
        // Bits are only ever added, and in order; only the device sets NEEDS_RESET.
        let added = value & !inner.status & !VIRTIO_CONFIG_S_NEEDS_RESET;
        let has = |inner: &Inner, bits: u32| inner.status & bits == bits;
        if added & VIRTIO_CONFIG_S_ACKNOWLEDGE != 0 {
            inner.status |= VIRTIO_CONFIG_S_ACKNOWLEDGE;
        }
        if added & VIRTIO_CONFIG_S_DRIVER != 0 && has(&inner, VIRTIO_CONFIG_S_ACKNOWLEDGE) {
            inner.status |= VIRTIO_CONFIG_S_DRIVER;
        }
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 && has(&inner, VIRTIO_CONFIG_S_DRIVER) {
            let taken = inner.driver_features;
            // A set that cannot be is not acknowledged: the driver reads the bit back.
            if taken & !inner.offered() == 0 && taken & (1 << VIRTIO_F_VERSION_1) != 0 {
                inner.status |= VIRTIO_CONFIG_S_FEATURES_OK;
            }
        }
        if added & VIRTIO_CONFIG_S_FAILED != 0 {
            inner.status |= VIRTIO_CONFIG_S_FAILED;
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 && has(&inner, VIRTIO_CONFIG_S_FEATURES_OK) {
            inner.status |= VIRTIO_CONFIG_S_DRIVER_OK;
            let features = inner.driver_features;
            inner.device.activate(features);
            inner.kicked = u64::MAX;
            drop(inner);
            self.shared.poke();
        }
    }
}

impl MmioDevice for Transport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG {
            let config = self.shared.lock().device.config();
            let at = usize::try_from(offset - CONFIG).unwrap_or(usize::MAX);
            for (to, from) in data.iter_mut().zip(config.iter().skip(at)) {
                *to = *from;
            }
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.register(offset).to_le_bytes());
        } else {
            tracing::debug!(
                device = self.name,
                offset,
                width = data.len(),
                "odd register read"
            );
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            let at = usize::try_from(offset - CONFIG).unwrap_or(usize::MAX);
            let mut inner = self.shared.lock();
            if inner.status & VIRTIO_CONFIG_S_DRIVER != 0 {
                inner.device.write_config(at, data);
                drop(inner);
                self.shared.poke();
            }
        } else if let (true, Ok(bytes)) = (offset.is_multiple_of(4), <[u8; 4]>::try_from(data)) {
            self.set_register(offset, u32::from_le_bytes(bytes));
        } else {
            tracing::debug!(
                device = self.name,
                offset,
                width = data.len(),
                "odd register write"
            );
        }
    }

    /// What is in flight is waited for: after a reset nothing of the old driver's may still happen.
    fn reset(&self) {
        let shared = &self.shared;
        let mut inner = shared.lock();
        let start = Instant::now();
        // Nothing new is taken: the driver is gone.
        let before = inner.mode;
        if before == Mode::Running && inner.device.in_flight() > 0 {
            inner.mode = Mode::Draining;
            shared.poke();
            while inner.mode == Mode::Draining {
                let Some(left) = DRAIN_DEADLINE.checked_sub(start.elapsed()) else {
                    // It goes on being reset: the driver reads the old status, and may try again.
                    tracing::warn!(device = self.name, "a reset waits for storage that hangs");
                    inner.mode = before;
                    return;
                };
                inner = shared
                    .changed
                    .wait_timeout(inner, left)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
        }
        inner.device.reset();
        inner.queues.iter_mut().for_each(|q| q.inner().reset());
        (inner.status, inner.driver_features) = (0, 0);
        (
            inner.device_features_sel,
            inner.driver_features_sel,
            inner.queue_sel,
        ) = (0, 0, 0);
        inner.kicked = 0;
        if inner.mode == Mode::Paused {
            inner.mode = before;
        }
        shared.irq.status.store(0, Ordering::SeqCst);
        drop(inner);
        shared.changed.notify_all();
        shared.poke();
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.shared.lock().mode = Mode::Quit;
        self.shared.changed.notify_all();
        self.shared.poke();
        if let Some(worker) = self.worker.take() {
            // A panic of the thread has been reported by itself.
            let _ = worker.join();
        }
    }
}

/// At most 15 bytes, or the kernel cuts it.
fn thread_name(name: &str) -> String {
    name.chars().filter(char::is_ascii).take(15).collect()
}

fn restore(inner: &mut Inner, state: &VirtioState, ram: &GuestRam) -> Result<(), String> {
    if state.device.kind() != inner.device.kind() {
        return Err(format!(
            "the checkpoint's device is of kind {}, and this one of {}",
            state.device.kind(),
            inner.device.kind()
        ));
    }
    let missing = state.driver_features & !inner.offered();
    if missing != 0 {
        return Err(format!(
            "the guest uses features {missing:#x} that this host's device does not have"
        ));
    }
    if state.queues.len() != inner.queues.len() {
        return Err(format!(
            "{} queues, and it has {}",
            state.queues.len(),
            inner.queues.len()
        ));
    }
    for (queue, saved) in inner.queues.iter_mut().zip(&state.queues) {
        let max = queue.inner().max_size();
        *queue = VirtQueue::from_state(*saved, max)?;
        if queue.ready() && !queue.is_valid(ram.memory()) {
            return Err("a queue lies outside the guest's memory".into());
        }
    }
    let known = VIRTIO_CONFIG_S_ACKNOWLEDGE
        | VIRTIO_CONFIG_S_DRIVER
        | VIRTIO_CONFIG_S_FEATURES_OK
        | VIRTIO_CONFIG_S_DRIVER_OK
        | VIRTIO_CONFIG_S_NEEDS_RESET
        | VIRTIO_CONFIG_S_FAILED;
    if state.status & !known != 0 {
        return Err(format!("status {:#x}", state.status));
    }
    inner.status = state.status;
    inner.driver_features = state.driver_features;
    inner.device_features_sel = state.device_features_sel;
    inner.driver_features_sel = state.driver_features_sel;
    inner.queue_sel = state.queue_sel;
    inner.config_generation = state.config_generation;
    inner.restored = true;
    if inner.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
        inner.device.activate(state.driver_features);
    }
    Ok(())
}
