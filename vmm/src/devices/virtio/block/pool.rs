//! The threads that do a disk's I/O. They know the disk's file and no guest.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::disk::Disk;

/// Threads of one disk.
const THREADS: usize = 4;

/// What is to be done.
#[derive(Debug)]
pub(super) enum Op {
    Read {
        offset: u64,
        bytes: usize,
    },
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    Flush,
    /// Offset, bytes, and whether the room is given back.
    Zero {
        ranges: Vec<(u64, u64, bool)>,
    },
}

impl Op {
    /// Bytes of memory it takes.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Read { bytes, .. } => *bytes as u64,
            Self::Write { data, .. } => data.len() as u64,
            Self::Flush | Self::Zero { .. } => 0,
        }
    }

    fn run(self, disk: &Disk) -> (io::Result<()>, Vec<u8>) {
        match self {
            Self::Read { offset, bytes } => {
                let mut data = vec![0; bytes];
                match disk.read(offset, &mut data) {
                    Ok(()) => (Ok(()), data),
                    Err(error) => (Err(error), Vec::new()),
                }
            }
            Self::Write { offset, data } => (disk.write(offset, &data), Vec::new()),
            Self::Flush => (disk.flush(), Vec::new()),
            Self::Zero { ranges } => {
                let zero = |(offset, bytes, unmap)| disk.zero(offset, bytes, unmap);
                (ranges.into_iter().try_for_each(zero), Vec::new())
            }
        }
    }
}

/// One request.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) number: u64,
    pub(super) op: Op,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) number: u64,
    pub(super) result: io::Result<()>,
    /// What was read.
    pub(super) data: Vec<u8>,
}

#[derive(Debug, Default)]
struct Queues {
    jobs: VecDeque<Job>,
    done: Vec<Done>,
    quit: bool,
}

struct Shared {
    /// Held to put in and to take out.
    queues: Mutex<Queues>,
    work: Condvar,
    event: Arc<EventFd>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads; dropped, they finish what they have been given.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    pub(super) fn new(disk: &Arc<Disk>) -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let shared = Arc::new(Shared {
            queues: Mutex::default(),
            work: Condvar::new(),
            event: Arc::new(event),
        });
        let mut pool = Self {
            shared,
            threads: Vec::new(),
        };
        for _ in 0..THREADS {
            let (shared, disk) = (Arc::clone(&pool.shared), Arc::clone(disk));
            let thread = std::thread::Builder::new()
                .name("disk-io".into())
                .spawn(move || serve(&shared, &disk))?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    pub(super) fn submit(&self, job: Job) {
        self.shared.lock().jobs.push_back(job);
        self.shared.work.notify_one();
    }

    /// Readable when something is done.
    pub(super) fn event(&self) -> Arc<EventFd> {
        Arc::clone(&self.shared.event)
    }

    /// What is done.
    pub(super) fn done(&self) -> Vec<Done> {
        // Before the list is taken: what comes later makes it readable again.
        let _ = self.shared.event.read();
        std::mem::take(&mut self.shared.lock().done)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A panic of the thread has been reported by itself.
            let _ = thread.join();
        }
    }
}

fn serve(shared: &Shared, disk: &Disk) {
    loop {
        let mut queues = shared.lock();
        let job = loop {
            if let Some(job) = queues.jobs.pop_front() {
                break job;
            }
            if queues.quit {
                return;
            }
            queues = shared.work.wait(queues).unwrap_or_else(PoisonError::into_inner);
        };
        drop(queues);
        let (result, data) = job.op.run(disk);
        shared.lock().done.push(Done {
            number: job.number,
            result,
            data,
        });
        if let Err(error) = shared.event.write(1) {
            tracing::error!(%error, "say that a disk request is done");
        }
    }
}
