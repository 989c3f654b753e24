//! Ships a VM's segments from its own host's spool to its holders.
//!
//! ```text
//!               +-- task: Sender <-> connection --> holder A
//!   Spool  -----+-- task: Sender <-> connection --> holder B
//!    notify     +-- ledger: who has what -> Committed --> registrar --> registry
//!                +-- keeper: the owner's lease; its record's change of holders --> crew: tasks come and go
//! ```
//!
//! Invariants: a holder's task waits for nobody else, so a slow or dead holder holds up neither the guest nor another
//! holder; a checkpoint is committed when the quorum has it durably with all it stands on; the registry is told behind
//! the shipping and never waited for.
//!
//! What it never does: it takes no checkpoint and stops no guest; it says what has to be done by [`ShipEvent`]s.

mod connection;
mod crew;
mod holder;
mod keeper;
mod ledger;
mod registrar;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use segment::{Generation, SegmentName, VmId};
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::clock::boottime;
use crate::lease::Electors;
use crate::protocol::SenderConfig;
use crate::registry::Registry;
use crate::spool::Spool;
use crate::transport::Identity;
use crate::wire::{Held, Offer};
use crew::Crew;
use ledger::{Committed, Ledger};

/// How long an owner's lease lasts after each renewal, unless it says otherwise.
pub const LEASE_TTL: Duration = Duration::from_secs(6);
/// How often the end of a drain is looked for when nothing tells.
const DRAIN_TURN: Duration = Duration::from_millis(50);
/// How long the end waits for the registry.
const LAST_REGISTER: Duration = Duration::from_secs(1);

/// What to ship, and where to.
#[derive(Debug, Clone)]
pub struct ShipperConfig {
    /// Who ships.
    pub identity: Identity,
    /// Limits and times, and the VM, its generation and its owner.
    pub sender: SenderConfig,
    /// The holders, HOST:PORT.
    pub holders: Vec<String>,
    /// How many of them make a checkpoint committed.
    pub ack_quorum: usize,
    /// Who is told what is committed; nobody when absent.
    pub registry: Option<Registry>,
    /// How long the owner's lease in the registry lasts after each renewal, when its guest does not run under one.
    pub lease_ttl: Duration,
    /// The newest version of [`ShipEvent::Electors`] by which the owner counts the lease of its guest. An owner under a
    /// lease that never says so keeps the holders it has.
    pub adopted: Option<watch::Receiver<u64>>,
}

impl ShipperConfig {
    /// With the usual limits and times.
    #[must_use]
    pub fn new(
        vm: VmId,
        generation: Generation,
        identity: &Identity,
        holders: Vec<String>,
        ack_quorum: usize,
        registry: Option<Registry>,
    ) -> Self {
        Self {
            sender: SenderConfig::new(vm, generation, identity.name()),
            identity: identity.clone(),
            holders,
            ack_quorum,
            registry,
            lease_ttl: LEASE_TTL,
            adopted: None,
        }
    }
}

/// What the owner has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShipEvent {
    /// The ack quorum has this checkpoint durably, and so every one before it.
    Committed {
        /// The checkpoint.
        name: SegmentName,
        /// Who has it.
        holders: Vec<String>,
    },
    /// A higher generation is promised: this owner is none any more and must stop its guest.
    Fenced {
        /// Who says so: a holder, or the registry.
        holder: String,
        /// The generation that is promised.
        current: Generation,
    },
    /// The registry does not know the VM any more: somebody had it forgotten while it ran. Nothing is committed from here on.
    Forgotten {
        /// The registry that says so.
        registry: String,
    },
    /// Nothing in the spool builds on what the holder has: the next checkpoint should be a full one.
    NeedFull {
        /// The holder.
        holder: String,
    },
    /// A holder was reached.
    HolderUp {
        /// The holder.
        holder: String,
        /// Its node's name.
        node: String,
        /// The newest checkpoint it has.
        position: Option<SegmentName>,
    },
    /// The registry has another holder set for this generation, which counts from now on.
    HoldersChanged {
        /// The set.
        holders: Vec<String>,
        /// How many of them make a checkpoint committed.
        ack_quorum: u32,
    },
    /// From now on the owner's time is granted by a quorum of each of these sets. Only for owners under a lease; until
    /// one has said that it counts by them ([`ShipperConfig::adopted`]), the registry is not asked for another set.
    Electors {
        /// Counted up with every change.
        version: u64,
        /// The sets.
        sets: Vec<Electors>,
    },
    /// A holder lets nobody else run the guest for the length of the lease.
    Granted {
        /// The holder.
        holder: String,
        /// When it was asked, by [`boottime`](crate::clock::boottime).
        sent: Duration,
    },
    /// The registry has renewed the owner's lease.
    Renewed {
        /// When it was asked, by [`boottime`](crate::clock::boottime).
        sent: Duration,
    },
    /// A holder that was reached before was lost.
    HolderDown {
        /// The holder.
        holder: String,
        /// Why.
        why: String,
    },
}

/// What a holder's task is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum HolderState {
    /// Connecting for the first time, or greeting.
    Connecting,
    /// Sending what the holder lacks.
    Synchronising,
    /// The holder has all there is.
    UpToDate,
    /// The holder cannot be reached.
    Unreachable {
        /// Why.
        why: String,
    },
    /// The holder does not take what is offered.
    Refused {
        /// Why.
        why: String,
    },
    /// The holder has promised a higher generation.
    Fenced {
        /// Which.
        current: u64,
    },
}

/// How shipping to one holder goes.
#[derive(Debug, Clone, Serialize)]
pub struct HolderStatus {
    /// Where it is.
    pub address: String,
    /// Its node's name, once it was reached.
    pub node: Option<String>,
    /// What its task is doing.
    #[serde(flatten)]
    pub state: HolderState,
    /// For how long, in milliseconds.
    pub since_ms: u64,
    /// The newest checkpoint it has acknowledged.
    #[serde(serialize_with = "crate::wire::text_or_null")]
    pub acked: Option<SegmentName>,
    /// How many epochs it lacks.
    pub lag_epochs: u64,
    /// How many bytes of segments in the spool are newer than what it has.
    pub lag_bytes: u64,
    /// How many bytes of segments were sent to it.
    pub bytes_sent: u64,
}

/// How shipping goes.
#[derive(Debug, Clone, Serialize)]
pub struct ShipStatus {
    /// The newest checkpoint that the ack quorum has.
    #[serde(serialize_with = "crate::wire::text_or_null")]
    pub committed: Option<SegmentName>,
    /// The newest checkpoint in the spool.
    #[serde(serialize_with = "crate::wire::text_or_null")]
    pub newest: Option<SegmentName>,
    /// Each holder.
    pub holders: Vec<HolderStatus>,
    /// For how long the owner's lease still holds, in milliseconds; absent when it does not.
    pub lease_ms: Option<u64>,
}

#[derive(Debug)]
struct View {
    state: HolderState,
    node: Option<String>,
    since: Instant,
    sent: Arc<AtomicU64>,
    /// It is shipped to no more.
    left: bool,
}

impl View {
    fn new() -> Self {
        Self {
            state: HolderState::Connecting,
            node: None,
            since: Instant::now(),
            sent: Arc::default(),
            left: false,
        }
    }
}

/// The last renewal of the owner's lease that was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renewal {
    /// When it was sent, by [`boottime`].
    pub sent: Duration,
    /// For how long from then the registry lets nobody else in.
    pub ttl: Duration,
}

impl Renewal {
    /// For how long the lease still holds at `now`.
    #[must_use]
    pub fn left(&self, now: Duration) -> Duration {
        (self.sent + self.ttl).saturating_sub(now)
    }
}

/// What the tasks share.
#[derive(Debug)]
struct Shared {
    vm: VmId,
    generation: Generation,
    /// Who ships.
    identity: Identity,
    spool: Arc<Spool>,
    events: mpsc::UnboundedSender<ShipEvent>,
    // Written by every holder's task and read by who commits, registers and asks for the status; held for moments.
    ledger: Mutex<Ledger>,
    // Written by every holder's task, read for the status; held for moments.
    views: Mutex<Vec<View>>,
    /// The owner's lease: none before the first renewal was answered, and after it was refused.
    lease: watch::Sender<Option<Renewal>>,
    /// Changes when the ledger does.
    changes: watch::Sender<u64>,
}

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // Bookkeeping without a half-done state between two statements that could panic.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn views(&self) -> MutexGuard<'_, Vec<View>> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn position(&self, holder: usize, newest: Option<Held>) {
        let step = self.ledger().position(holder, newest);
        self.after(step);
    }

    fn stored(&self, holder: usize, offer: &Offer) {
        let step = self.ledger().stored(holder, offer);
        self.after(step);
    }

    fn after(&self, step: Option<Committed>) {
        if let Some(Committed { name, holders }) = step
            && name.generation == self.generation
        {
            tracing::debug!(%name, ?holders, "committed");
            // The VM may be gone already while its shipper still drains.
            let _ = self.events.send(ShipEvent::Committed { name, holders });
        }
        self.changes.send_modify(|n| *n += 1);
    }

    fn sent(&self, holder: usize) -> Arc<AtomicU64> {
        self.views()
            .get(holder)
            .map(|view| view.sent.clone())
            .unwrap_or_default()
    }

    fn lease_left(&self) -> Option<Duration> {
        let renewal = (*self.lease.borrow())?;
        Some(renewal.left(boottime())).filter(|left| !left.is_zero())
    }

    fn show(&self, holder: usize, state: HolderState, node: Option<&str>) {
        let mut views = self.views();
        let Some(view) = views.get_mut(holder) else { return };
        // How long it has been unreachable, not since the last try.
        if std::mem::discriminant(&view.state) != std::mem::discriminant(&state) {
            view.since = Instant::now();
        }
        view.state = state;
        view.node = node.map(str::to_owned).or(view.node.take());
    }
}

/// Ships a VM's segments.
#[derive(Debug)]
pub struct Shipper {
    shared: Arc<Shared>,
    notify: watch::Sender<u64>,
    stop: watch::Sender<bool>,
    release: watch::Sender<bool>,
    crew: Arc<Crew>,
    registrar: Option<(Registry, JoinHandle<()>)>,
    keeper: Option<JoinHandle<keeper::Keeper>>,
}

impl Shipper {
    /// Starts the tasks on `handle`. What is in the spool already is shipped at once.
    #[must_use]
    pub fn start(
        handle: &tokio::runtime::Handle,
        config: ShipperConfig,
        spool: Arc<Spool>,
        events: mpsc::UnboundedSender<ShipEvent>,
    ) -> Self {
        let ShipperConfig {
            identity,
            sender,
            holders,
            ack_quorum,
            registry,
            lease_ttl,
            adopted,
        } = config;
        for address in &holders {
            spool.add_holder(address);
        }
        let shared = Arc::new(Shared {
            vm: sender.vm.clone(),
            generation: sender.generation,
            identity,
            spool,
            events,
            ledger: Mutex::new(Ledger::new(&holders, ack_quorum)),
            views: Mutex::new(holders.iter().map(|_| View::new()).collect()),
            lease: watch::Sender::new(None),
            changes: watch::Sender::new(0),
        });
        let (notify, stop, release) = (
            watch::Sender::new(0),
            watch::Sender::new(false),
            watch::Sender::new(false),
        );
        let terms = sender.lease;
        let crew = Arc::new(Crew::new(
            handle.clone(),
            shared.clone(),
            sender,
            crew::Signals {
                notify: notify.clone(),
                release: release.clone(),
                stop: stop.clone(),
            },
        ));
        for (at, address) in holders.iter().enumerate() {
            crew.start(at, address);
        }
        let registrar = registry.clone().map(|registry| {
            let run = registrar::run(shared.clone(), registry.clone(), stop.subscribe());
            (registry, handle.spawn(run))
        });
        let keeper = registry.map(|registry| {
            let pace = keeper::Pace::new(terms, lease_ttl, adopted);
            let keeper = keeper::Keeper::new(shared.clone(), crew.clone(), registry, pace);
            handle.spawn(keeper.run(stop.subscribe()))
        });
        Self {
            shared,
            notify,
            stop,
            release,
            crew,
            registrar,
            keeper,
        }
    }

    /// The owner's lease in the registry, as it is renewed: none before the first answer, and when it was refused.
    #[must_use]
    pub fn lease(&self) -> watch::Receiver<Option<Renewal>> {
        self.shared.lease.subscribe()
    }

    /// A new segment is in the spool. Never blocks.
    pub fn notify(&self) {
        self.notify.send_modify(|n| *n += 1);
    }

    /// The guest stands still for good: nobody has to wait for what was granted and leased to this owner. The holders
    /// are told behind what they still get ([`Shipper::drain`]), the registry at the end ([`Shipper::stop`]).
    pub fn release(&self) {
        self.release.send_replace(true);
    }

    /// How shipping goes.
    #[must_use]
    pub fn status(&self) -> ShipStatus {
        let entries = self.shared.spool.store().entries(&self.shared.vm);
        let newest = entries.last().map(|e| e.name.clone());
        let ledger = self.shared.ledger();
        let views = self.shared.views();
        let stays = views.iter().enumerate().filter(|(_, view)| !view.left);
        let holders = stays.map(|(at, view)| {
            let acked = ledger.acked(at).map(|h| h.name.clone());
            let lacking = entries
                .iter()
                .filter(|e| acked.as_ref().is_none_or(|a| e.name > *a));
            let lag_bytes = lacking.clone().map(|e| e.bytes).sum();
            let lag_epochs = match (&acked, &newest) {
                // Merged ones count as what they were.
                (Some(a), Some(n)) if a.generation == n.generation => n.epoch.0.saturating_sub(a.epoch.0),
                _ => lacking.count() as u64,
            };
            HolderStatus {
                address: ledger.address(at).to_owned(),
                node: view.node.clone(),
                state: view.state.clone(),
                since_ms: view.since.elapsed().as_millis() as u64,
                acked,
                lag_epochs,
                lag_bytes,
                bytes_sent: view.sent.load(Ordering::Relaxed),
            }
        });
        let holders = holders.collect();
        ShipStatus {
            committed: ledger.committed().cloned(),
            newest,
            holders,
            lease_ms: self.shared.lease_left().map(|left| left.as_millis() as u64),
        }
    }

    /// Waits until the newest checkpoint of the spool is committed and every holder that is reached has it, at most for
    /// `deadline`; returns whether it is committed.
    pub async fn drain(&self, deadline: Duration) -> bool {
        let mut changes = self.shared.changes.subscribe();
        let everywhere = async {
            loop {
                let status = self.status();
                let waited_for = |h: &&HolderStatus| match h.state {
                    HolderState::Connecting | HolderState::Synchronising | HolderState::UpToDate => true,
                    HolderState::Unreachable { .. }
                    | HolderState::Refused { .. }
                    | HolderState::Fenced { .. } => false,
                };
                let mut holders = status.holders.iter().filter(waited_for);
                if status.newest <= status.committed && holders.all(|h| h.acked >= status.newest) {
                    return;
                }
                // A holder that goes away is no change of the ledger.
                let _ = tokio::time::timeout(DRAIN_TURN, changes.changed()).await;
            }
        };
        // Either way it is looked at what there is now.
        let _ = tokio::time::timeout(deadline, everywhere).await;
        let status = self.status();
        status.newest <= status.committed
    }

    /// Ends the tasks; what was committed is registered if the registry is there.
    pub async fn stop(self) {
        // Nobody may be left to hear it.
        let _ = self.stop.send(true);
        // First who could start another task.
        let keeper = match self.keeper {
            // One that panicked has said so.
            Some(keeper) => keeper.await.ok(),
            None => None,
        };
        for task in self.crew.take() {
            let _ = task.await;
        }
        if let Some(keeper) = keeper
            && *self.release.borrow()
        {
            // It runs out by itself when the registry is away.
            let _ = tokio::time::timeout(LAST_REGISTER, keeper.give_back()).await;
        }
        if let Some((registry, task)) = self.registrar {
            let _ = tokio::time::timeout(LAST_REGISTER, async {
                let _ = task.await;
                registrar::last(&self.shared, &registry).await;
            })
            .await;
        }
    }
}
