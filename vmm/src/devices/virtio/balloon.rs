//! The balloon (virtio 1.2, section 5.5): memory that the guest gives back, because it is asked to or has no use for it.
//!
//! ```text
//! host sets a size --config interrupt--> guest --inflate queue: page numbers--> discarded, zero, out of checkpoints
//!                                              --deflate queue--> used again: nothing to do, a page comes at a touch
//! guest --reporting queue: runs of free memory--> discarded too, and the guest may use them again at any time
//! guest --statistics queue--> its numbers; the buffer is given back when the next are wanted
//! ```
//!
//! The statistics' buffer stays in its ring until then: no chain is in the device's hands when the machine is saved.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Chain, RingError};
use super::state::{BalloonState, DeviceState};
use super::{Device, Env, Interest};
use crate::memory::GuestRam;

#[cfg(test)]
mod tests;

/// Virtio's number for it.
pub const KIND: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
/// Its logical name.
pub const NAME: &str = "balloon:0";
/// Pages of the balloon in a MiB: they have 4 KiB whatever the guest's pages are.
const PAGES_PER_MIB: u32 = 256;
const PAGE_SHIFT: u32 = 12;
/// Feature: there is a statistics queue.
const STATISTICS: u64 = 1 << 1;
/// Feature: the guest may take memory back when it has too little.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// Feature: there is a reporting queue.
const REPORTING: u64 = 1 << 5;
const QUEUE_SIZE: u16 = 256;
/// The most page numbers of one chain that are looked at; Linux sends 256.
const MAX_NUMBERS: usize = 4096;
/// The most runs of one report that are looked at; Linux sends 32.
const MAX_RUNS: usize = 256;
/// The most numbers of the statistics that are looked at; there are 16 kinds.
const MAX_STATISTICS: usize = 32;
/// A statistic: what it is of (2 bytes), and the number (8).
const STATISTIC_BYTES: usize = 10;
/// Configuration: size wanted, size it has, and two fields of features that are not offered.
const CONFIG_BYTES: usize = 16;
const ACTUAL: std::ops::Range<usize> = 4..8;
const RESIZED: u64 = 1;
const TIMER: u64 = 2;

/// The guest's own numbers, as far as it gives them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// By their number in the specification; see [`Statistics::get`].
    numbers: [Option<u64>; 10],
}

/// One of the guest's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statistic {
    /// Bytes swapped in.
    SwapIn = 0,
    /// Bytes swapped out.
    SwapOut = 1,
    /// Page faults that took I/O.
    MajorFaults = 2,
    /// Other page faults.
    MinorFaults = 3,
    /// Bytes of memory that nothing uses.
    FreeMemory = 4,
    /// Bytes of memory.
    TotalMemory = 5,
    /// Bytes that could be had without swapping.
    AvailableMemory = 6,
    /// Bytes of file caches.
    DiskCaches = 7,
    /// Huge pages that were given out.
    HugetlbAllocations = 8,
    /// Huge pages that could not be.
    HugetlbFailures = 9,
}

impl Statistics {
    /// A number, if the guest has given it.
    #[must_use]
    pub fn get(&self, which: Statistic) -> Option<u64> {
        self.numbers[which as usize]
    }

    fn parse(bytes: &[u8]) -> Self {
        let mut all = Self::default();
        for entry in bytes.chunks_exact(STATISTIC_BYTES) {
            let (tag, number) = entry.split_at(2);
            let tag = usize::from(u16::from_le_bytes([tag[0], tag[1]]));
            if let (Some(slot), Ok(number)) = (all.numbers.get_mut(tag), number.try_into()) {
                *slot = Some(u64::from_le_bytes(number));
            }
        }
        all
    }
}

/// What is fixed of a balloon, and its size at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonOptions {
    /// MiB that the guest is to give.
    pub amount_mib: u32,
    /// The guest may take memory back when it has too little.
    pub deflate_on_oom: bool,
    /// Seconds from one set of the guest's numbers to the next; 0: they are never asked for.
    pub stats_interval_s: u16,
    /// The guest reports memory that it has no use for.
    pub reporting: bool,
}

#[derive(Debug)]
struct Shared {
    deflate_on_oom: bool,
    reporting: bool,
    target: AtomicU32,
    actual: AtomicU32,
    interval_s: AtomicU16,
    /// The guest's newest numbers; held for a copy.
    statistics: Mutex<Statistics>,
    /// Something was set.
    changed: Arc<EventFd>,
}

/// A balloon, for who sets its size. Cloning gives another handle to the same one.
#[derive(Debug, Clone)]
pub struct Balloon(Arc<Shared>);

impl Balloon {
    /// A new one.
    ///
    /// # Errors
    /// The system's error.
    pub fn new(options: BalloonOptions) -> std::io::Result<Self> {
        Self::from_state(&BalloonState {
            target_pages: options.amount_mib.saturating_mul(PAGES_PER_MIB),
            actual_pages: 0,
            deflate_on_oom: options.deflate_on_oom,
            stats_interval_s: options.stats_interval_s,
            reporting: options.reporting,
        })
    }

    /// One of a saved machine.
    ///
    /// # Errors
    /// The system's error.
    pub fn from_state(state: &BalloonState) -> std::io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            deflate_on_oom: state.deflate_on_oom,
            reporting: state.reporting,
            target: AtomicU32::new(state.target_pages),
            actual: AtomicU32::new(state.actual_pages),
            interval_s: AtomicU16::new(state.stats_interval_s),
            statistics: Mutex::default(),
            changed: Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?),
        })))
    }

    /// What it is now.
    #[must_use]
    pub fn state(&self) -> BalloonState {
        BalloonState {
            target_pages: self.0.target.load(Ordering::SeqCst),
            actual_pages: self.0.actual.load(Ordering::SeqCst),
            deflate_on_oom: self.0.deflate_on_oom,
            stats_interval_s: self.0.interval_s.load(Ordering::SeqCst),
            reporting: self.0.reporting,
        }
    }

    /// Asks the guest to give so much, which takes its time; less than it has given lets it take the rest back.
    pub fn set_target(&self, mib: u32) {
        self.0
            .target
            .store(mib.saturating_mul(PAGES_PER_MIB), Ordering::SeqCst);
        self.poke();
    }

    /// Asks for the guest's numbers that often. Whether they are asked for at all was said at the start.
    pub fn set_interval(&self, seconds: u16) {
        self.0.interval_s.store(seconds, Ordering::SeqCst);
        self.poke();
    }

    /// The guest's newest numbers.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        *self.0.statistics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poke(&self) {
        if let Err(error) = self.0.changed.write(1) {
            tracing::debug!(%error, "tell the balloon");
        }
    }
}

impl BalloonState {
    /// MiB of pages.
    #[must_use]
    pub fn mib(pages: u32) -> u32 {
        pages / PAGES_PER_MIB
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// The device.
#[derive(Debug)]
pub struct BalloonDevice {
    balloon: Balloon,
    ram: Arc<GuestRam>,
    queue_sizes: Vec<u16>,
    /// What each queue is for: a queue whose feature the driver does not take is not counted.
    roles: Vec<Role>,
    /// When the next statistics are asked for.
    timer: Arc<OwnedFd>,
}

impl BalloonDevice {
    /// The device of `balloon`, for a guest with this memory.
    ///
    /// # Errors
    /// The system's error.
    pub fn new(balloon: &Balloon, ram: &Arc<GuestRam>) -> std::io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let mut device = Self {
            balloon: balloon.clone(),
            ram: Arc::clone(ram),
            queue_sizes: Vec::new(),
            roles: Vec::new(),
            timer: Arc::new(timerfd_create(TimerfdClockId::Monotonic, flags)?),
        };
        device.roles = roles(device.features());
        device.queue_sizes = vec![QUEUE_SIZE; device.roles.len()];
        Ok(device)
    }

    fn offers_statistics(&self) -> bool {
        self.balloon.0.interval_s.load(Ordering::SeqCst) > 0
    }

    fn set_timer(&self) {
        let seconds = self.balloon.0.interval_s.load(Ordering::SeqCst).into();
        let every = Timespec {
            tv_sec: seconds,
            tv_nsec: 0,
        };
        let spec = Itimerspec {
            it_interval: every,
            it_value: every,
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec) {
            tracing::warn!(%error, "set the balloon's timer");
        }
    }

    fn discard(&self, address: u64, bytes: u64) {
        if let Err(error) = self.ram.discard(address, bytes) {
            // It stays as it is, which the guest does not notice.
            tracing::warn!(%error, "give back memory of the guest");
        }
    }

    /// Pages by their numbers, runs of them at once.
    fn inflate(&self, chain: &Chain, env: &Env<'_>) -> Result<(), RingError> {
        let length = (chain.readable.bytes() / 4).min(MAX_NUMBERS as u64) as usize * 4;
        let mut bytes = vec![0; length];
        chain.readable.read(env.memory, 0, &mut bytes)?;
        let number = |entry: &[u8]| entry.try_into().map_or(0, u32::from_le_bytes);
        let mut numbers: Vec<u64> = bytes.chunks_exact(4).map(|entry| number(entry).into()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        for run in numbers.chunk_by(|a, b| a + 1 == *b) {
            self.discard(run[0] << PAGE_SHIFT, (run.len() as u64) << PAGE_SHIFT);
        }
        Ok(())
    }

    /// Takes all chains of a queue that is not the statistics'.
    fn take(&mut self, queue: usize, role: Role, env: &mut Env<'_>) -> Result<(), RingError> {
        while let Some(chain) = env.pop(queue)? {
            match role {
                Role::Inflate => self.inflate(&chain, env)?,
                Role::Reporting => chain
                    .writable
                    .runs()
                    .take(MAX_RUNS)
                    .for_each(|(address, bytes)| self.discard(address, bytes.into())),
                Role::Deflate | Role::Statistics => {}
            }
            env.push(queue, &chain, 0)?;
        }
        env.interrupt(queue)
    }

    /// Reads the guest's numbers, whose buffer stays where it is.
    fn read_statistics(&mut self, queue: usize, env: &mut Env<'_>) -> Result<(), RingError> {
        let Some(chain) = env.pop(queue)? else {
            return Ok(());
        };
        env.unpop(queue);
        let length = chain
            .readable
            .bytes()
            .min((MAX_STATISTICS * STATISTIC_BYTES) as u64);
        let mut bytes = vec![0; length as usize];
        chain.readable.read(env.memory, 0, &mut bytes)?;
        *self
            .balloon
            .0
            .statistics
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Statistics::parse(&bytes);
        Ok(())
    }

    /// Gives the buffer of the guest's numbers back, which asks for new ones.
    fn ask_statistics(&mut self, env: &mut Env<'_>) -> Result<(), RingError> {
        let Some(queue) = self.roles.iter().position(|role| *role == Role::Statistics) else {
            return Ok(());
        };
        if let Some(chain) = env.pop(queue)? {
            env.push(queue, &chain, 0)?;
            env.interrupt(queue)?;
            // Asks for a kick for the next one.
            if env.pop(queue)?.is_some() {
                env.unpop(queue);
                env.again(queue);
            }
        }
        Ok(())
    }
}

fn roles(features: u64) -> Vec<Role> {
    let mut roles = vec![Role::Inflate, Role::Deflate];
    roles.extend((features & STATISTICS != 0).then_some(Role::Statistics));
    roles.extend((features & REPORTING != 0).then_some(Role::Reporting));
    roles
}

impl Device for BalloonDevice {
    fn name(&self) -> &str {
        NAME
    }

    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        let when = |has: bool, feature: u64| if has { feature } else { 0 };
        when(self.balloon.0.deflate_on_oom, DEFLATE_ON_OOM)
            | when(self.balloon.0.reporting, REPORTING)
            | when(self.offers_statistics(), STATISTICS)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> Vec<u8> {
        let BalloonState {
            target_pages,
            actual_pages,
            ..
        } = self.balloon.state();
        let mut config = target_pages.to_le_bytes().to_vec();
        config.extend(actual_pages.to_le_bytes());
        config.resize(CONFIG_BYTES, 0);
        config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let mut config = self.config();
        for (at, &byte) in (offset..CONFIG_BYTES).zip(data) {
            config[at] = byte;
        }
        let actual = config[ACTUAL].try_into().map_or(0, u32::from_le_bytes);
        self.balloon.0.actual.store(actual, Ordering::SeqCst);
    }

    fn activate(&mut self, features: u64) {
        self.roles = roles(features);
        self.set_timer();
    }

    fn reset(&mut self) {
        self.balloon.0.actual.store(0, Ordering::SeqCst);
    }

    fn kicked(&mut self, queue: usize, env: &mut Env<'_>) -> Result<(), RingError> {
        match self.roles.get(queue).copied() {
            Some(Role::Statistics) => self.read_statistics(queue, env),
            Some(role) => self.take(queue, role, env),
            None => Ok(()),
        }
    }

    fn interests(&self) -> Vec<Interest> {
        let interest = |token, fd| Interest {
            fd,
            events: EventSet::IN,
            token,
            completes: false,
        };
        vec![
            interest(RESIZED, self.balloon.0.changed.clone()),
            interest(TIMER, self.timer.clone()),
        ]
    }

    fn ready(&mut self, token: u64, env: &mut Env<'_>) -> Result<(), RingError> {
        if token == TIMER {
            // How often it ran out meanwhile is of no interest.
            let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
            return self.ask_statistics(env);
        }
        let _ = self.balloon.0.changed.read();
        self.set_timer();
        env.config_changed();
        Ok(())
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn state(&self) -> DeviceState {
        DeviceState::Balloon(self.balloon.state())
    }

    fn restored(&mut self, _env: &mut Env<'_>) -> Result<(), RingError> {
        Ok(())
    }
}
