//! A device's thread: waits for kicks and for what the device waits for, and lets the device work.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::PoisonError;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::Interest;
use super::mmio::{Mode, Shared};

/// Events taken at a time.
const EVENTS: usize = 64;
/// What the wake event and the kicks are known by; a device's interests are known by their file's number.
const OWN: u64 = u64::MAX;

/// What is waited for: the wake event, the kicks, and the device's interests as they were last.
pub(super) struct Waiter {
    epoll: Epoll,
    interests: HashMap<RawFd, Interest>,
}

impl Waiter {
    /// Waits for the wake event and the kicks.
    pub(super) fn new<'a>(own: impl Iterator<Item = &'a EventFd>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for event in own {
            let what = EpollEvent::new(EventSet::IN, OWN);
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), what)?;
        }
        Ok(Self {
            epoll,
            interests: HashMap::new(),
        })
    }

    /// Changes what is waited for beside to `wanted`.
    fn set(&mut self, wanted: Vec<Interest>) {
        let wanted: HashMap<RawFd, Interest> = wanted
            .into_iter()
            .map(|interest| (interest.fd.as_raw_fd(), interest))
            .collect();
        let change = |operation, fd: RawFd, events| {
            if let Err(error) = self.epoll.ctl(operation, fd, EpollEvent::new(events, fd as u64)) {
                tracing::warn!(%error, "wait for a device's file");
            }
        };
        for (&fd, old) in &self.interests {
            // The number may belong to another file by now, if the device has closed and opened: the old one is still
            // open as long as it is here.
            match wanted.get(&fd) {
                Some(new) if new.events == old.events => {}
                Some(new) => change(ControlOperation::Modify, fd, new.events),
                None => change(ControlOperation::Delete, fd, EventSet::empty()),
            }
        }
        for (&fd, new) in &wanted {
            if !self.interests.contains_key(&fd) {
                change(ControlOperation::Add, fd, new.events);
            }
        }
        self.interests = wanted;
    }

    /// Waits, and returns which interests are ready.
    fn wait(&self) -> Vec<&Interest> {
        let mut events = [EpollEvent::default(); EVENTS];
        // Interrupted: nothing is ready, and the loop looks again.
        let count = self.epoll.wait(-1, &mut events).unwrap_or(0);
        events[..count]
            .iter()
            .filter(|event| event.data() != OWN)
            .filter_map(|event| self.interests.get(&RawFd::try_from(event.data()).ok()?))
            .collect()
    }
}

/// Empties an eventfd; true when it was written to.
fn drain(event: &EventFd) -> bool {
    event.read().is_ok()
}

/// Works until the device is to quit.
pub(super) fn run(shared: &Shared, mut waiter: Waiter) {
    while let Some(interests) = next(shared) {
        waiter.set(interests);
        let ready = waiter.wait();
        drain(&shared.wake);
        let mut inner = shared.lock();
        for (queue, kick) in shared.kicks.iter().enumerate() {
            if drain(kick) {
                inner.kicked |= 1 << queue;
            }
        }
        // The mode may have changed meanwhile: what is in flight comes back also when nothing new is to begin.
        let running = inner.mode == Mode::Running;
        for interest in ready.iter().filter(|interest| running || interest.completes) {
            let token = interest.token;
            if interest.completes {
                inner.work_always(shared, |device, env| device.ready(token, env));
            } else {
                inner.work(shared, |device, env| device.ready(token, env));
            }
        }
        if running {
            let kicked = std::mem::take(&mut inner.kicked);
            for queue in 0..inner.queues.len() {
                if kicked & (1 << queue) != 0 {
                    inner.work(shared, |device, env| device.kicked(queue, env));
                }
            }
        }
    }
}

/// Waits while there is nothing to do, and says what is to be waited for: `None` to end.
fn next(shared: &Shared) -> Option<Vec<Interest>> {
    let mut inner = shared.lock();
    loop {
        match inner.mode {
            Mode::Quit => return None,
            Mode::Running => {
                if inner.kicked != 0 {
                    // Something to do without waiting.
                    shared.poke();
                }
                let active = inner.active();
                let mut interests = inner.device.interests();
                interests.retain(|interest| active || interest.completes);
                return Some(interests);
            }
            Mode::Draining if inner.device.in_flight() > 0 => {
                let mut interests = inner.device.interests();
                interests.retain(|interest| interest.completes);
                return Some(interests);
            }
            Mode::Draining => {
                inner.mode = Mode::Paused;
                shared.changed.notify_all();
            }
            Mode::Paused => {
                inner = shared
                    .changed
                    .wait_while(inner, |inner| inner.mode == Mode::Paused)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}
