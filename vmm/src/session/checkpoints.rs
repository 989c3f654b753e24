//! The thread that takes a VM's checkpoints: at a steady pace while it is protected, and when asked.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use migrate::checkpoint::Seen;
use migrate::protect::{CheckpointRequest, ProtectError, Protector, Taken};
use migrate::shipper::{HolderState, ShipStatus, Shipper};
use migrate::spool::Spool;
use tokio::sync::{oneshot, watch};

use super::{CheckpointReport, SessionError, chain, lock};
use crate::control::{RunState, VmHandle};
use crate::replica::VmSource;

/// After a periodic checkpoint failed (a full disk, say) the next is not tried sooner than this.
pub(super) const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// How checkpoints go.
#[derive(Debug, Clone, Default)]
pub(super) struct Progress {
    pub(super) newest: Option<CheckpointReport>,
    pub(super) checkpoints: u64,
    pub(super) raw_bytes: u64,
    pub(super) stored_bytes: u64,
    pub(super) problem: Option<String>,
    /// Why its protection has ended by itself.
    pub(super) forgotten: Option<String>,
}

type Reply = oneshot::Sender<Result<CheckpointReport, SessionError>>;

enum Order {
    Take(CheckpointRequest, Reply),
    Every(Option<Duration>),
    Full,
    Tidy,
    End(oneshot::Sender<()>),
}

/// Orders for the thread. Cheap to clone; the thread ends when the last is dropped.
#[derive(Debug, Clone)]
pub(super) struct Orders(Sender<Order>);

impl Orders {
    /// Takes the next periodic checkpoint in full.
    pub(super) fn full(&self) {
        let _ = self.0.send(Order::Full);
    }

    /// Something was committed: there may be checkpoints that nobody lacks any more.
    pub(super) fn tidy(&self) {
        let _ = self.0.send(Order::Tidy);
    }

    /// Takes one every so often, or none of its own accord.
    pub(super) fn every(&self, every: Option<Duration>) {
        let _ = self.0.send(Order::Every(every));
    }
}

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Take(..) => "Take",
            Self::Every(_) => "Every",
            Self::Full => "Full",
            Self::Tidy => "Tidy",
            Self::End(_) => "End",
        })
    }
}

/// The thread, from outside.
#[derive(Debug)]
pub(super) struct Checkpoints {
    orders: Orders,
    /// Where new checkpoints are announced. The thread looks at it after each one and the session puts it in and
    /// takes it out; held for a moment.
    shipper: Arc<Mutex<Option<Shipper>>>,
}

impl Checkpoints {
    pub(super) fn start(
        protector: Protector<VmSource>,
        vm: &VmHandle,
        spool: Arc<Spool>,
        progress: Arc<Mutex<Progress>>,
    ) -> Result<Self, SessionError> {
        let (orders, inbox) = channel();
        let shipper = Arc::default();
        let thread = Thread {
            protector,
            state: vm.state(),
            tidy: Tidy::start(spool)?,
            progress,
            shipper: Arc::clone(&shipper),
            every: None,
            due: None,
            rested: false,
        };
        Builder::new()
            .name("checkpoint".into())
            .spawn(move || thread.serve(&inbox))
            .map_err(SessionError::Thread)?;
        Ok(Self {
            orders: Orders(orders),
            shipper,
        })
    }

    pub(super) fn orders(&self) -> Orders {
        self.orders.clone()
    }

    pub(super) fn every(&self, every: Option<Duration>) {
        self.orders.every(every);
    }

    pub(super) async fn take(&self, request: CheckpointRequest) -> Result<CheckpointReport, SessionError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.orders.0.send(Order::Take(request, reply));
        answer.await.map_err(|_| SessionError::Stopping)?
    }

    /// Ends the thread; when this returns it has let go of the local store.
    pub(super) async fn end(&self) {
        let (reply, ended) = oneshot::channel();
        let _ = self.orders.0.send(Order::End(reply));
        // A thread that is gone has ended.
        let _ = ended.await;
    }

    /// Puts another shipper in, and returns the one before.
    pub(super) fn ship(&self, shipper: Option<Shipper>) -> Option<Shipper> {
        std::mem::replace(&mut *lock(&self.shipper), shipper)
    }

    pub(super) fn shipping(&self) -> Option<ShipStatus> {
        lock(&self.shipper).as_ref().map(Shipper::status)
    }
}

/// The thread that drops and merges in the local store: that reads and writes segments, and neither the guest nor the
/// next checkpoint waits for it.
struct Tidy {
    nudges: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Tidy {
    fn start(spool: Arc<Spool>) -> Result<Self, SessionError> {
        // One nudge waits at most: the next look covers all that came before it.
        let (nudges, inbox) = sync_channel(1);
        let work = move || {
            while inbox.recv().is_ok() {
                if !spool.wants_room() {
                    continue;
                }
                match spool.make_room() {
                    Ok(room) => tracing::debug!(?room, "made room in the local store"),
                    Err(error) => {
                        tracing::warn!(error = %chain(&error), "no room could be made in the local store")
                    }
                }
            }
        };
        let thread = Builder::new()
            .name("tidy".into())
            .spawn(work)
            .map_err(SessionError::Thread)?;
        Ok(Self {
            nudges: Some(nudges),
            thread: Some(thread),
        })
    }

    fn nudge(&self) {
        if let Some(nudges) = &self.nudges {
            // Full: it will look anyway.
            let _ = nudges.try_send(());
        }
    }
}

impl Drop for Tidy {
    fn drop(&mut self) {
        self.nudges = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by itself.
            let _ = thread.join();
        }
    }
}

struct Thread {
    protector: Protector<VmSource>,
    state: watch::Receiver<RunState>,
    tidy: Tidy,
    progress: Arc<Mutex<Progress>>,
    shipper: Arc<Mutex<Option<Shipper>>>,
    every: Option<Duration>,
    due: Option<Instant>,
    /// The guest stands still and its last state has been taken: there is nothing new until it runs.
    rested: bool,
}

impl Thread {
    fn serve(mut self, inbox: &Receiver<Order>) {
        loop {
            let order = match self.due {
                Some(due) => inbox.recv_timeout(due.saturating_duration_since(Instant::now())),
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match order {
                Ok(Order::Take(request, reply)) => {
                    let taken = self.take(request).map_err(SessionError::Checkpoint);
                    // An asker that has gone away finds it in the status.
                    let _ = reply.send(taken);
                }
                Ok(Order::Every(every)) => {
                    self.every = every;
                    self.due = every.map(|_| Instant::now());
                }
                Ok(Order::Full) => {
                    self.protector.request_full();
                    self.rested = false;
                }
                Ok(Order::Tidy) => self.tidy.nudge(),
                Ok(Order::End(ended)) => {
                    drop(self);
                    let _ = ended.send(());
                    return;
                }
                Err(RecvTimeoutError::Timeout) => self.periodic(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn periodic(&mut self) {
        let Some(every) = self.every else {
            self.due = None;
            return;
        };
        let start = Instant::now();
        let mut pause = every;
        if self.state.has_changed().unwrap_or(false) {
            // It may have run since, however short.
            self.rested = false;
        }
        let state = self.state.borrow_and_update().clone();
        match state {
            RunState::Running => {
                self.rested = false;
                if self.take(CheckpointRequest::default()).is_err() {
                    pause = every.max(AFTER_FAILURE);
                }
            }
            RunState::Paused | RunState::Lapsed { .. } if !self.rested => {
                match self.take(CheckpointRequest::default()) {
                    Ok(_) => self.rested = true,
                    Err(_) => pause = every.max(AFTER_FAILURE),
                }
            }
            RunState::Paused | RunState::Lapsed { .. } => {}
            RunState::Fenced { .. } | RunState::Ended(_) | RunState::Stopped => self.every = None,
        }
        self.due = self.every.map(|_| (start + pause).max(Instant::now()));
    }

    fn take(&mut self, request: CheckpointRequest) -> Result<CheckpointReport, ProtectError> {
        let result = self.protector.checkpoint(request);
        match &result {
            Ok(taken) => {
                let report = report(taken);
                let mut progress = lock(&self.progress);
                progress.checkpoints += 1;
                progress.raw_bytes += report.raw_bytes;
                progress.stored_bytes += report.stored_bytes;
                progress.newest = Some(report);
                if progress.problem.take().is_some() {
                    tracing::info!(name = %taken.entry.name, "checkpoints work again");
                }
            }
            Err(error) => {
                let problem = chain(error);
                let mut progress = lock(&self.progress);
                if progress.problem.as_ref() != Some(&problem) {
                    tracing::error!(error = %problem, "checkpoint failed; the guest runs on");
                }
                progress.problem = Some(problem);
            }
        }
        if let Some(shipper) = lock(&self.shipper).as_ref() {
            shipper.notify();
        }
        if let (Ok(taken), Some(every)) = (&result, self.every) {
            self.adapt(taken, every);
        }
        self.tidy.nudge();
        result.map(|taken| report(&taken))
    }
}

impl Thread {
    /// Spends more time on shorter segments while the link is what holds up.
    fn adapt(&mut self, taken: &Taken, every: Duration) {
        let Some(status) = lock(&self.shipper).as_ref().map(Shipper::status) else {
            return;
        };
        // One that is away is caught up with later, from merged segments: nothing taken now waits for it.
        let in_reach = status.holders.iter().filter(|holder| match holder.state {
            HolderState::UpToDate | HolderState::Synchronising => true,
            HolderState::Connecting
            | HolderState::Unreachable { .. }
            | HolderState::Refused { .. }
            | HolderState::Fenced { .. } => false,
        });
        self.protector.adapt(Seen {
            encode: taken.encode_time,
            every,
            stored_bytes: taken.summary.file_bytes,
            waiting_bytes: in_reach.map(|holder| holder.lag_bytes).max().unwrap_or(0),
        });
    }
}

fn report(taken: &Taken) -> CheckpointReport {
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    CheckpointReport {
        name: taken.entry.name.to_string(),
        kind: if taken.entry.kind.is_full() {
            "full"
        } else {
            "delta"
        }
        .into(),
        stop_us: micros(taken.stopped),
        encode_us: micros(taken.encode_time),
        data_pages: taken.summary.data_pages,
        zero_pages: taken.summary.zero_pages,
        raw_bytes: taken.summary.raw_bytes,
        stored_bytes: taken.summary.file_bytes,
        digest: taken.entry.digest.to_string(),
    }
}
