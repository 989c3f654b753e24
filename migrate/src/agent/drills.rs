//! Drills on a schedule: each VM that this node could take over is tried, one at a time, and how it went is kept.
//!
//! ```text
//! every --drill-every, give or take a tenth, for each VM     copy runs --> what it took
//!   (the first within half of it)                            it does not --> told loudly, in the log, the status, the history
//! ```
//!
//! Invariants: one at a time; none of a VM that runs here, that does not run at all, or whose copy this host has no memory
//! for.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use segment::{SpaceId, VmId};

use super::{Inner, blocking, drill, hot, view};
use crate::crashsafe::Disk;
use crate::mutex::lock;
use crate::registry::{Role, VmState};
use crate::wire::{DrillCall, DrillReport, Failure, LastDrill};

/// What the last drills came to, in the data folder.
const FILE: &str = "last-drills.json";
/// The most that file may have.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// How often it is looked whether a VM is due, at most and at least.
const LOOK: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// For how long a copy is watched.
const WATCH: Duration = Duration::from_secs(5);
/// Part of the memory that is free which a copy may take: three quarters.
const SHARE_OF_FREE: (u64, u64) = (3, 4);

/// The drills of this agent.
#[derive(Debug)]
pub(super) struct Drills {
    every: Option<Duration>,
    data: PathBuf,
    since: Duration,
    /// Shared by drills and the status; held for moments.
    last: Mutex<BTreeMap<VmId, LastDrill>>,
}

/// Unix time.
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

impl Drills {
    pub(super) fn open(every: Option<Duration>, data: &Path) -> Self {
        Self {
            every,
            since: now(),
            last: Mutex::new(read(&data.join(FILE))),
            data: data.to_owned(),
        }
    }

    /// How the last drill of `vm` here went.
    pub(super) fn last(&self, vm: &VmId) -> Option<LastDrill> {
        lock(&self.last).get(vm).cloned()
    }

    /// Keeps how one went.
    pub(super) fn ended(&self, vm: &VmId, done: &Result<DrillReport, Failure>) {
        let at_unix_ms = u64::try_from(now().as_millis()).unwrap_or(u64::MAX);
        let last = match done {
            Ok(report) => LastDrill {
                at_unix_ms,
                segment: Some(report.segment.name.clone()),
                recovery_us: Some(report.recovery_us),
                age_ms: Some(report.age_ms),
                failed: None,
            },
            Err(failure) => LastDrill {
                at_unix_ms,
                segment: None,
                recovery_us: None,
                age_ms: None,
                failed: Some(failure.why.clone()),
            },
        };
        let mut all = lock(&self.last);
        all.insert(vm.clone(), last);
        let texts: BTreeMap<&str, &LastDrill> = all.iter().map(|(vm, last)| (vm.as_str(), last)).collect();
        let written = serde_json::to_vec(&texts)
            .map_err(std::io::Error::from)
            .map(|json| {
                // Lost, a drill only comes too early.
                Disk::unsynced().write(&self.data, ".last-drills", &self.data.join(FILE), &json)
            });
        if let Err(error) | Ok(Err(crate::crashsafe::DiskError { source: error, .. })) = written {
            tracing::warn!(%error, "what the last drills came to cannot be written down");
        }
    }

    fn forget(&self, held: &[VmId]) {
        lock(&self.last).retain(|vm, _| held.contains(vm));
    }
}

fn read(path: &Path) -> BTreeMap<VmId, LastDrill> {
    let text = match crate::regular::read(path, MAX_FILE_BYTES) {
        Ok(text) => text,
        Err(error) => {
            if error.kind() != std::io::ErrorKind::NotFound {
                tracing::warn!(path = %path.display(), %error, "how the last drills went is not known");
            }
            return BTreeMap::new();
        }
    };
    let read: Result<BTreeMap<String, LastDrill>, _> = serde_json::from_slice(&text);
    match read {
        Ok(all) => all
            .into_iter()
            .filter_map(|(vm, last)| Some((VmId::new(&vm).ok()?, last)))
            .collect(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "how the last drills went is not known");
            BTreeMap::new()
        }
    }
}

/// When a VM is due, in Unix time: of one that was never drilled within half of `every` from `since` on; else `every` after
/// the last, give or take a tenth. Many VMs are so spread over the time, and each host has another time for one of them.
fn due_at(node: &str, vm: &VmId, last: Option<Duration>, since: Duration, every: Duration) -> Duration {
    let from = last.unwrap_or(since);
    let digest = blake3::hash(format!("{node} {vm} {}", from.as_millis()).as_bytes());
    let dice = u32::from_le_bytes([
        digest.as_bytes()[0],
        digest.as_bytes()[1],
        digest.as_bytes()[2],
        digest.as_bytes()[3],
    ]);
    let share = f64::from(dice) / f64::from(u32::MAX);
    match last {
        None => since + every.mul_f64(share / 2.0),
        Some(last) => last + every.mul_f64(0.9 + share / 5.0),
    }
}

/// Drills what is due until the agent stops.
pub(super) async fn run(inner: Arc<Inner>) {
    let Some(every) = inner.drills.every else { return };
    if !inner.roles.contains(&Role::Execute) {
        tracing::warn!("this node only stores: it drills nothing (--drill-every)");
        return;
    }
    let mut stop = inner.stop.clone();
    let work = async {
        // Those that could not be tried, until they are tried again.
        let mut not_before: HashMap<VmId, Duration> = HashMap::new();
        loop {
            let held = inner.store.vms();
            inner.drills.forget(&held);
            not_before.retain(|vm, _| held.contains(vm));
            for vm in held {
                let last = inner
                    .drills
                    .last(&vm)
                    .map(|last| Duration::from_millis(last.at_unix_ms));
                // A clock that was set back does not put it off for ever.
                let last = last.filter(|last| *last <= now());
                let due = due_at(&inner.name, &vm, last, inner.drills.since, every);
                if now() < due.max(not_before.get(&vm).copied().unwrap_or_default()) {
                    continue;
                }
                if let Err(why) = fit(&inner, &vm).await {
                    tracing::info!(%vm, why, "not drilled now");
                    not_before.insert(vm, now() + every / 10);
                    continue;
                }
                let call = DrillCall {
                    vm: vm.clone(),
                    watch_ms: WATCH.min(every).as_millis() as u64,
                };
                // How it went is told and kept by the drill itself.
                let _ = drill::drill(&inner, call).await;
            }
            tokio::time::sleep((every / 20).clamp(LOOK.0, LOOK.1)).await;
        }
    };
    tokio::select! {
        () = work => {}
        _ = stop.changed() => {}
    }
}

/// Whether a copy may run here now.
///
/// # Errors
/// Why not, in words.
async fn fit(inner: &Arc<Inner>, vm: &VmId) -> Result<(), String> {
    if inner.hot.runs_here(vm) {
        return Err("it runs here".into());
    }
    let record = inner.registry.get_vm(vm).await.map_err(|e| e.to_string())?;
    if record.state != VmState::Running {
        return Err(format!("it is {}", record.state));
    }
    if !record.holders.contains(&inner.address) {
        return Err("this node is none of its holders".into());
    }
    let Some(newest) = inner.store.newest_complete(vm) else {
        // Not one to be passed over in silence: a takeover here would fail as well.
        return Ok(());
    };
    let store = inner.store.clone();
    let spaces = blocking(move || {
        let reader = store.open_segment(&newest.name)?;
        Ok::<_, crate::store::StoreError>(reader.manifest().spaces.clone())
    });
    let Ok(spaces) = spaces.await else { return Ok(()) };
    let memory = spaces.iter().filter(|space| space.id == SpaceId::MEMORY);
    let wanted: u64 = memory.map(segment::Space::bytes).sum();
    let (part, whole) = SHARE_OF_FREE;
    let free = hot::available_memory();
    if free.is_some_and(|free| wanted > free / whole * part) {
        return Err(format!(
            "a copy takes {} of memory, and {} are free",
            view::size(wanted),
            view::size(free.unwrap_or_default())
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vms_are_due_at_different_times_and_none_too_late() {
        let (since, every) = (Duration::from_secs(1_000_000), Duration::from_secs(86_400));
        let hours = |at: Duration, from: Duration| (at - from).as_secs() / 3600;
        let vm = |n: u32| VmId::new(&format!("vm-{n}")).unwrap();
        let mut first = std::collections::BTreeSet::new();
        for n in 0..100 {
            let at = due_at("a", &vm(n), None, since, every);
            assert!(hours(at, since) < 12, "{at:?}");
            first.insert(hours(at, since));
            assert_eq!(at, due_at("a", &vm(n), None, since, every), "it moves");
            assert_ne!(at, due_at("b", &vm(n), None, since, every), "two hosts at once");
            let next = due_at("a", &vm(n), Some(at), since, every);
            assert!((21..=26).contains(&hours(next, at)), "{next:?}");
        }
        assert_eq!(first.len(), 12, "they are not spread: {first:?}");
    }

    #[test]
    fn what_the_last_ones_came_to_outlives_the_agent() {
        let data = tempfile::tempdir().unwrap();
        let vm = VmId::new("web").unwrap();
        let drills = Drills::open(None, data.path());
        assert_eq!(drills.last(&vm), None);
        let failure = Failure {
            why: "it does not run".into(),
        };
        drills.ended(&vm, &Err(failure));
        let again = Drills::open(None, data.path());
        assert_eq!(again.last(&vm), drills.last(&vm));
        assert_eq!(
            again.last(&vm).unwrap().failed.as_deref(),
            Some("it does not run")
        );
        std::fs::write(data.path().join(FILE), b"{\"web\": 7}").unwrap();
        assert_eq!(Drills::open(None, data.path()).last(&vm), None);
    }
}
