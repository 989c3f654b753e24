//! What an agent does with its store when nobody asks: collects by policy, keeps chains short, checks old segments.
//!
//! ```text
//! every few seconds, or when a segment finds no room:   for each VM: what the registry has committed -> collect
//! once in --verify-every, at --background-rate:         for each segment: read it whole -> damaged? fetch it again
//! ```
//!
//! The work is done by two threads of low priority, one job at a time each, at a bounded rate. A segment that finds the
//! store full waits for one collection without that bound, and is refused when there is still no room.
//!
//! What it never does: it drops nothing of a VM whose committed checkpoint it cannot learn, and it never touches what a
//! promote, a restore or a transfer works with.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use segment::{SegmentName, VmId};
use tokio::sync::oneshot;

use super::Inner;
use super::gather::fetch_again;
use crate::mutex::lock;
use crate::protect::DEFAULT_MAX_LINKS;
use crate::registry::RegistryError;
use crate::store::{CollectOptions, Collected, FsStore, Health, KeepPolicy, Pace, SegmentCheck, StoreError};
use crate::transport::in_full;
use crate::wire::Held;

/// How often it is looked whether something is to be collected.
const COLLECT_EVERY: Duration = Duration::from_secs(5);
/// The zstd level of what is merged: it is written once and kept.
pub(super) const FOLD_LEVEL: i32 = 3;
/// From this share of the budget on everything is freed that can be: nine tenths.
const SHORT_OF_ROOM: (u64, u64) = (9, 10);
/// How long after its start an agent waits with the first check.
const FIRST_CHECK: Duration = Duration::from_secs(60);
/// How often it is looked whether a check is due.
const CHECK_TICK: Duration = Duration::from_secs(30);
/// The niceness of the threads.
const NICE: i32 = 10;
/// When the last check of everything ended, as seconds of Unix time.
const LAST_CHECK: &str = "last-verify";

/// How an agent keeps its store.
#[derive(Debug, Clone)]
pub struct Housekeeping {
    /// What is kept of a VM for which nobody said anything else.
    pub keep: KeepPolicy,
    /// The most links a restore may read, the full segment included.
    pub max_links: u32,
    /// How often every stored segment is read again and checked; none: only on request.
    pub verify_every: Option<Duration>,
    /// The most bytes a second that are read for it, and as many for merging.
    pub rate: Option<u64>,
}

impl Default for Housekeeping {
    /// Keeps everything, and what an owner makes by default is no chain too long.
    fn default() -> Self {
        Self {
            keep: KeepPolicy::ALL,
            max_links: DEFAULT_MAX_LINKS + 1,
            verify_every: None,
            rate: None,
        }
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread of low priority that does one job after the other; it ends when the last handle is dropped.
#[derive(Debug, Clone)]
struct Quiet(mpsc::Sender<Job>);

impl Quiet {
    fn start(name: &str) -> std::io::Result<Self> {
        let (jobs, todo) = mpsc::channel::<Job>();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Linux gives each thread its own niceness. Without the right to, it is done at the usual one.
            if let Err(error) = rustix::process::setpriority_process(None, NICE) {
                tracing::debug!(%error, "background work is not niced");
            }
            todo.into_iter().for_each(|job| job());
        })?;
        Ok(Self(jobs))
    }

    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (done, result) = oneshot::channel();
        let job = move || drop(done.send(work()));
        self.0.send(Box::new(job)).ok()?;
        result.await.ok()
    }
}

/// The housekeeper's own state.
#[derive(Debug)]
pub(super) struct Housekeeper {
    config: Housekeeping,
    collecting: Quiet,
    checking: Quiet,
    collect_pace: Pace,
    check_pace: Pace,
    /// The last committed checkpoint that the registry told of each VM. Shared by passes; held for moments.
    committed: Mutex<HashMap<VmId, SegmentName>>,
    /// As what each VM was found with nothing to collect. Shared likewise.
    settled: Mutex<HashMap<VmId, (u64, KeepPolicy, bool)>>,
    /// What went wrong last, for the status. Shared likewise.
    problem: Mutex<Option<String>>,
    /// When everything was last checked, in seconds of Unix time; 0: never.
    checked_at: AtomicU64,
}

impl Housekeeper {
    pub(super) fn new(config: Housekeeping, data: &std::path::Path) -> std::io::Result<Self> {
        let pace = || config.rate.map_or_else(Pace::unlimited, Pace::bytes_per_second);
        let checked_at = std::fs::read_to_string(data.join(LAST_CHECK))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0);
        Ok(Self {
            collecting: Quiet::start("collect")?,
            checking: Quiet::start("verify")?,
            collect_pace: pace(),
            check_pace: pace(),
            committed: Mutex::default(),
            settled: Mutex::default(),
            problem: Mutex::default(),
            checked_at: AtomicU64::new(checked_at),
            config,
        })
    }

    /// What is kept of `vm`, and whether that is the agent's default.
    pub(super) fn policy(&self, store: &FsStore, vm: &VmId) -> (KeepPolicy, bool) {
        match store.policy(vm) {
            Some(policy) => (policy, false),
            None => (self.config.keep, true),
        }
    }

    /// What is kept of VMs for which nothing else was said.
    pub(super) fn default_policy(&self) -> KeepPolicy {
        self.config.keep
    }

    /// Looks at every VM anew.
    pub(super) fn look_again(&self) {
        lock(&self.settled).clear();
    }

    /// Ends the background work that is under way.
    pub(super) fn stop(&self) {
        self.collect_pace.stop();
        self.check_pace.stop();
    }

    /// What went wrong last.
    pub(super) fn problem(&self) -> Option<String> {
        lock(&self.problem).clone()
    }

    /// When every segment was last checked, in seconds of Unix time.
    pub(super) fn checked_at(&self) -> Option<u64> {
        Some(self.checked_at.load(Ordering::Relaxed)).filter(|at| *at > 0)
    }

    fn options(&self, store: &FsStore, pressed: bool) -> CollectOptions {
        let (part, whole) = SHORT_OF_ROOM;
        let near = |budget: u64| store.used_bytes() / part >= budget / whole;
        CollectOptions {
            max_links: self.config.max_links,
            short_of_room: pressed || store.budget().is_some_and(near),
            level: FOLD_LEVEL,
            pace: self.collect_pace.clone(),
        }
    }
}

/// Keeps the store until the agent stops.
pub(super) async fn run(inner: Arc<Inner>) {
    let mut stop = inner.stop.clone();
    let collecting = async {
        loop {
            tokio::time::sleep(COLLECT_EVERY).await;
            collect_all(&inner, false).await;
        }
    };
    let checking = async {
        let Some(every) = inner.housekeeper.config.verify_every else {
            return std::future::pending().await;
        };
        tokio::time::sleep(FIRST_CHECK.min(every)).await;
        loop {
            if is_due(&inner, every) {
                check_all(&inner).await;
            }
            tokio::time::sleep(CHECK_TICK.min(every)).await;
        }
    };
    tokio::select! {
        () = collecting => {}
        () = checking => {}
        _ = stop.changed() => {}
    }
    inner.housekeeper.stop();
}

/// Collects what can be, at once and without a bound on the rate: a segment waits for the room. From a thread that may
/// wait, inside the runtime.
pub(super) fn make_room(inner: &Arc<Inner>) -> u64 {
    let _hurry = inner.housekeeper.collect_pace.hurry();
    tokio::runtime::Handle::current().block_on(collect_all(inner, true))
}

/// Collects of every VM; returns the bytes that were freed.
async fn collect_all(inner: &Arc<Inner>, pressed: bool) -> u64 {
    let keeper = &inner.housekeeper;
    let before = inner.store.used_bytes();
    let mut problem = None;
    for vm in inner.store.vms() {
        if inner.promotes.is_under_way(&vm) {
            continue;
        }
        match collect_one(inner, &vm, pressed).await {
            Ok(Collected {
                dropped: 0,
                merges: 0,
                ..
            }) => {}
            Ok(Collected {
                dropped,
                freed_bytes,
                merges,
                postponed,
            }) => tracing::info!(%vm, dropped, freed_bytes, merges, postponed, "collected"),
            Err(why) => {
                tracing::warn!(%vm, %why, "could not collect");
                problem = Some(format!("collect {vm}: {why}"));
            }
        }
    }
    *lock(&keeper.problem) = problem;
    before.saturating_sub(inner.store.used_bytes())
}

async fn collect_one(inner: &Arc<Inner>, vm: &VmId, pressed: bool) -> Result<Collected, String> {
    let keeper = &inner.housekeeper;
    let (policy, _) = keeper.policy(&inner.store, vm);
    let options = keeper.options(&inner.store, pressed);
    // A store of many segments is not planned again and again while nothing comes.
    let at = (inner.store.revision(vm), policy, options.short_of_room);
    if lock(&keeper.settled).get(vm) == Some(&at) {
        return Ok(Collected::default());
    }
    // The registry is only asked when there is something to do.
    let nothing = BTreeSet::new();
    let leased = inner.store.is_leased(vm);
    let (store, of) = (inner.store.clone(), vm.clone());
    let planned = options.clone();
    let plan = move || store.wants_collecting(&of, &policy, &nothing, &planned);
    if !tokio::task::spawn_blocking(plan).await.unwrap_or(false) {
        if !leased {
            lock(&keeper.settled).insert(vm.clone(), at);
        }
        return Ok(Collected::default());
    }
    let pinned = committed(inner, vm).await?;
    let (store, of) = (inner.store.clone(), vm.clone());
    let done = keeper
        .collecting
        .run(move || store.collect(&of, &policy, &pinned, &options))
        .await;
    match done {
        None => Err("the thread that collects has ended: restart the agent".into()),
        Some(Ok(done)) => Ok(done),
        Some(Err(error)) => {
            if is_damage(&error) {
                // The one that could not be read is found, set aside and fetched again.
                check_vm(inner, vm).await;
            }
            Err(in_full(&error))
        }
    }
}

fn is_damage(error: &StoreError) -> bool {
    matches!(error, StoreError::Merge { .. } | StoreError::Damaged { .. })
}

/// What must stay of `vm` because the registry calls it committed.
async fn committed(inner: &Inner, vm: &VmId) -> Result<BTreeSet<SegmentName>, String> {
    let mut pinned = BTreeSet::new();
    match inner.registry.get_vm(vm).await {
        Ok(record) => {
            if let Some(newest) = record.newest {
                lock(&inner.housekeeper.committed).insert(vm.clone(), newest.name.clone());
                pinned.insert(newest.name);
            }
        }
        Err(RegistryError::NoSuchVm { .. }) => {}
        Err(error) => {
            let Some(last) = lock(&inner.housekeeper.committed).get(vm).cloned() else {
                return Err(format!(
                    "the registry does not say what is committed, so all is kept: {error}"
                ));
            };
            // It can only have gone on from there.
            let after = inner.store.entries(vm).into_iter().map(|entry| entry.name);
            pinned.extend(after.filter(|name| name.position() >= last.position()));
        }
    }
    Ok(pinned)
}

fn now_unix_secs() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

fn is_due(inner: &Inner, every: Duration) -> bool {
    let last = inner.housekeeper.checked_at().unwrap_or(0);
    // A clock that was set back does not put the next check off for ever.
    let now = now_unix_secs();
    last > now || now - last >= every.as_secs()
}

/// Checks every segment, quietly.
async fn check_all(inner: &Arc<Inner>) {
    let names: Vec<SegmentName> = inner.store.all().into_iter().map(|entry| entry.name).collect();
    tracing::info!(segments = names.len(), "checking every stored segment");
    let mut bytes = 0;
    for name in names {
        let pace = inner.housekeeper.check_pace.clone();
        match check_one(inner, &name, pace).await {
            Ok((check, _)) => bytes += check.bytes,
            // The pace was stopped: the agent ends.
            Err(_) if inner.housekeeper.check_pace.is_stopped() => return,
            Err(why) => tracing::warn!(segment = %name, %why, "could not check"),
        }
    }
    let now = now_unix_secs();
    inner.housekeeper.checked_at.store(now, Ordering::Relaxed);
    // Lost, the next check only comes too early.
    let _ = std::fs::write(inner.data.join(LAST_CHECK), format!("{now}\n"));
    tracing::info!(bytes, "every stored segment was checked");
}

async fn check_vm(inner: &Arc<Inner>, vm: &VmId) {
    for entry in inner.store.entries(vm) {
        if let Err(why) = check_one(inner, &entry.name, Pace::unlimited()).await {
            tracing::warn!(segment = %entry.name, %why, "could not check");
        }
    }
}

/// Checks one segment, and fetches it again from another holder when it is damaged. The text says what came of that.
pub(super) async fn check_one(
    inner: &Arc<Inner>,
    name: &SegmentName,
    pace: Pace,
) -> Result<(SegmentCheck, Option<String>), String> {
    let held = inner.store.get(name);
    let (store, of) = (inner.store.clone(), name.clone());
    let checked = inner
        .housekeeper
        .checking
        .run(move || store.check(&of, &pace))
        .await;
    let check = match checked {
        Some(Ok(check)) => check,
        Some(Err(error)) => return Err(in_full(&error)),
        None => return Err("the thread that verifies has ended: restart the agent".into()),
    };
    let note = match (&check.health, held) {
        (Health::Damaged(_), Some(entry)) => {
            let lost = Held {
                name: name.clone(),
                checkpoint: entry.checkpoint,
            };
            Some(match fetch_again(inner, lost).await {
                Ok(()) => {
                    tracing::info!(segment = %name, "repaired");
                    "repaired: fetched again from another holder".to_owned()
                }
                Err(why) => {
                    tracing::error!(segment = %name, %why, "could not be repaired");
                    format!("not repaired: {why}")
                }
            })
        }
        (Health::Unreadable(why), _) => {
            tracing::error!(segment = %name, %why, "a stored segment cannot be read");
            None
        }
        (Health::Sound | Health::Gone | Health::Damaged(_), _) => None,
    };
    Ok((check, note))
}
