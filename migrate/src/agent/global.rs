//! Keeps the global store: committed checkpoints go up, what no policy keeps goes, and a node that has nothing takes from
//! there.
//!
//! ```text
//! each --global-every, for each VM this node holds:
//!   the newest point there --is it the newest committed?--> no: one of its holders uploads that, with what it stands on
//!                                                       +-> a VM of which another should, and did not for three times
//!                                                           as long: this one does
//! ```
//!
//! One agent uploads a VM's checkpoints, the one that looks after its holders too; two that think differently for a
//! moment do no harm. A store that is away is tried again, at growing distances of at most five minutes.
//!
//! What it never does: protection, promotes and the store never wait for it, but for a promote that finds a checkpoint
//! nowhere else.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use segment::{Epoch, Generation, SegmentName, VmId};
use tokio::time::Instant;

use super::Inner;
use crate::clock::boottime;
use crate::global::collect::{Seen, collect};
use crate::global::{
    Begun, Bucket, ChainRecord, Checked, GlobalError, Place, Trouble, Uploaded, Uploader, blocking, fetch,
    verify,
};
use crate::mutex::lock;
use crate::placement::{Watched, caretaker};
use crate::registry::VmRecord;
use crate::store::{KeepPolicy, Pace};
use crate::transport::in_full;
use crate::wire::{
    Failure, GlobalStatus, GlobalVm, Held, ListCall, MAX_PAGE_SEGMENTS, SegmentBrief, SegmentPage,
    VerifyCall, VerifyReport,
};

/// The distance to the second try, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
/// After so many rounds without an upload another holder than the one that should makes it.
const STEP_IN_AFTER: u32 = 3;
/// How long a promote waits for a look there: a share may hang, and a server be away.
const LOOK_WITHIN: Duration = Duration::from_secs(30);
/// How often in a grace it is looked what may go.
const COLLECTS_IN_GRACE: u32 = 24;
/// How many points are looked at for one that the registry knows, or that has a segment.
const MAX_LOOKED_AT: usize = 16;
/// The most problems one report lists.
const MAX_PROBLEMS: usize = 1000;

/// How an agent keeps a global store.
#[derive(Debug, Clone)]
pub struct GlobalOptions {
    /// Where it is.
    pub place: Place,
    /// How often it is looked whether something is to be uploaded.
    pub every: Duration,
    /// Which restore points stay there.
    pub keep: KeepPolicy,
    /// How long what is not needed stays.
    pub grace: Duration,
}

/// The global store as an agent has it.
#[derive(Debug)]
pub(super) struct Global {
    options: GlobalOptions,
    max_links: u32,
    pace: Pace,
    /// Opened when it is first needed: a share may be mounted later. Held for moments.
    bucket: Mutex<Option<Bucket>>,
    /// What is known and was done. Shared with the status; held for moments.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    problem: Option<String>,
    failures: u32,
    counts: Counts,
    vms: BTreeMap<VmId, Known>,
}

/// What was done since the agent started.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    points: u64,
    bytes: u64,
    failed: u64,
}

/// What is known of one VM's restore points there.
#[derive(Debug, Default)]
struct Known {
    newest: Option<SegmentName>,
    points: u64,
    problem: Option<String>,
    /// How often in a row it was not kept, and when that is tried again.
    failures: u32,
    again: Option<Instant>,
    /// What the last upload had stored when it failed.
    begun: Begun,
    /// What was newest when it was first seen that it is not what is committed, and when.
    behind: Option<(Option<SegmentName>, Instant)>,
    seen: Seen,
    records: BTreeMap<SegmentName, ChainRecord>,
    collected: Option<Duration>,
}

/// When to look again after so many failures in a row.
fn wait(failures: u32, every: Duration) -> Duration {
    match failures {
        0 => every,
        n => BACKOFF.0.saturating_mul(1 << (n - 1).min(16)).min(BACKOFF.1),
    }
}

impl Global {
    pub(super) fn new(options: GlobalOptions, max_links: u32, rate: Option<u64>) -> Self {
        Self {
            options,
            max_links,
            pace: rate.map_or_else(Pace::unlimited, Pace::bytes_per_second),
            bucket: Mutex::default(),
            state: Mutex::default(),
        }
    }

    async fn bucket(&self) -> Result<Bucket, GlobalError> {
        let known = lock(&self.bucket).clone();
        if let Some(bucket) = known {
            return Ok(bucket);
        }
        // A share may hang.
        let place = self.options.place.clone();
        let bucket = blocking(move || Bucket::open(&place)).await?;
        Ok(lock(&self.bucket).insert(bucket).clone())
    }

    /// Ends an upload that is under way.
    pub(super) fn stop(&self) {
        self.pace.stop();
    }

    /// Whether a VM that could not be kept is to be left for now.
    fn waits(&self, vm: &VmId) -> bool {
        let state = lock(&self.state);
        let again = state.vms.get(vm).and_then(|known| known.again);
        again.is_some_and(|at| Instant::now() < at)
    }

    /// How looking after a VM ended.
    fn note(&self, vm: &VmId, problem: Option<String>) {
        let mut state = lock(&self.state);
        let known = state.vms.entry(vm.clone()).or_default();
        let new = known.problem != problem;
        known.problem.clone_from(&problem);
        let Some(why) = problem else {
            (known.failures, known.again) = (0, None);
            return;
        };
        known.failures = known.failures.saturating_add(1);
        known.again = Some(Instant::now() + wait(known.failures, self.options.every));
        state.counts.failed += 1;
        if new {
            tracing::error!(%vm, %why, "the global store is not kept for a VM; its protection goes on");
        }
    }

    /// For how long the newest committed checkpoint of each VM is not there, as far as was looked.
    pub(super) fn behind(&self) -> BTreeMap<VmId, Duration> {
        let (state, now) = (lock(&self.state), Instant::now());
        let vms = state.vms.iter().map(|(vm, known)| {
            let since = known.behind.as_ref().map_or(now, |(_, since)| *since);
            (vm.clone(), now - since)
        });
        vms.collect()
    }

    /// What was done since the agent started (points, bytes, failures), and whether it goes well.
    pub(super) fn counts(&self) -> (u64, u64, u64, bool) {
        let state = lock(&self.state);
        let Counts {
            points,
            bytes,
            failed,
        } = state.counts;
        (points, bytes, failed, state.problem.is_none())
    }

    /// How it is, for the status.
    pub(super) fn status(&self) -> GlobalStatus {
        let state = lock(&self.state);
        let vms = state.vms.iter().map(|(vm, known)| GlobalVm {
            vm: vm.clone(),
            newest: known.newest.clone(),
            points: known.points,
            problem: known.problem.clone(),
        });
        GlobalStatus {
            address: self.options.place.addr.to_string(),
            keep: self.options.keep.to_string(),
            problem: state.problem.clone(),
            vms: vms.collect(),
            uploaded_bytes: state.counts.bytes,
            uploaded_points: state.counts.points,
            failed: state.counts.failed,
        }
    }
}

/// Looks until the agent stops.
pub(super) async fn run(inner: Arc<Inner>) {
    let Some(global) = &inner.global else { return };
    let mut stop = inner.stop.clone();
    let looking = async {
        if let Err(error) = global.bucket().await {
            tracing::error!(%error, "the agent goes on without, and tries again");
            lock(&global.state).problem = Some(in_full(&error));
        }
        loop {
            let failures = lock(&global.state).failures;
            tokio::time::sleep(wait(failures, global.options.every)).await;
            let result = pass(&inner, global).await;
            let mut state = lock(&global.state);
            match result {
                Ok(()) => {
                    if state.problem.take().is_some() {
                        tracing::info!(store = %global.options.place.addr, "the global store is back");
                    }
                    state.failures = 0;
                }
                Err(error) => {
                    let why = in_full(&error);
                    // Once, not at every try.
                    if state.problem.as_ref() != Some(&why) {
                        tracing::error!(%why, "the global store is not kept; protection goes on");
                    }
                    state.problem = Some(why);
                    state.failures = state.failures.saturating_add(1);
                    state.counts.failed += 1;
                }
            }
        }
    };
    tokio::select! {
        () = looking => {}
        _ = stop.changed() => {}
    }
    global.stop();
}

/// Looks after every VM that is held here. A VM's own trouble is noted with it, and tried again at growing distances; the
/// store's ends the pass.
async fn pass(inner: &Arc<Inner>, global: &Global) -> Result<(), GlobalError> {
    let bucket = global.bucket().await?;
    let (Ok(vms), Ok(nodes)) = (inner.registry.all_vms().await, inner.registry.all_nodes().await) else {
        // What is committed is not known: said where the registry's own state is.
        return Ok(());
    };
    let nodes: Vec<_> = nodes.into_iter().map(Watched::at_first_sight).collect();
    let held = |record: &&VmRecord| record.newest.is_some() && record.holders.contains(&inner.address);
    let held: Vec<_> = vms.iter().filter(held).collect();
    lock(&global.state)
        .vms
        .retain(|vm, _| held.iter().any(|record| record.vm == *vm));
    let (mut well, mut forbidden) = (false, None);
    for record in held {
        if global.waits(&record.vm) {
            continue;
        }
        let mine = caretaker(record, &nodes) == Some(inner.address.as_str());
        match keep(inner, global, &bucket, record, mine).await {
            Ok(()) => {
                well = true;
                global.note(&record.vm, None);
            }
            Err(GlobalError::Stopped) => return Ok(()),
            // What one VM's objects may not, those of another may.
            Err(
                error @ GlobalError::Refused {
                    trouble: Trouble::Permission,
                    ..
                },
            ) => forbidden = Some((&record.vm, error)),
            Err(error @ GlobalError::Refused { .. }) => return Err(error),
            Err(error) => global.note(&record.vm, Some(in_full(&error))),
        }
    }
    match forbidden {
        Some((vm, error)) if well => {
            global.note(vm, Some(in_full(&error)));
            Ok(())
        }
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// Looks after one VM.
async fn keep(
    inner: &Arc<Inner>,
    global: &Global,
    bucket: &Bucket,
    record: &VmRecord,
    mine: bool,
) -> Result<(), GlobalError> {
    let Some(committed) = &record.newest else {
        return Ok(());
    };
    let names = bucket.points(&record.vm).await?;
    let newest = names.last().cloned();
    let is_there = newest
        .as_ref()
        .is_some_and(|name| name.position() >= committed.name.position());
    let due = {
        let mut state = lock(&global.state);
        let known = state.vms.entry(record.vm.clone()).or_default();
        known.newest.clone_from(&newest);
        known.points = names.len() as u64;
        let now = Instant::now();
        match (&known.behind, is_there) {
            (_, true) => known.behind = None,
            (Some((was, _)), false) if *was == newest => {}
            (_, false) => known.behind = Some((newest.clone(), now)),
        }
        let patience = global.options.every * STEP_IN_AFTER;
        let waited = known
            .behind
            .as_ref()
            .is_some_and(|(_, since)| now - *since >= patience);
        mine || waited
    };
    if !due {
        return Ok(());
    }
    let newest = match &newest {
        Some(name) => match read(global, bucket, name).await {
            Ok(record) => Some(record),
            // A chain of its own needs nothing of it.
            Err(error @ GlobalError::Damaged { .. }) if !is_there => {
                tracing::error!(why = %in_full(&error), "the next upload of this VM stands on nothing there");
                None
            }
            Err(error) => return Err(error),
        },
        None => None,
    };
    match &newest {
        Some(there) if is_there => same_vm(inner, bucket, record, there).await?,
        newest => {
            let done = upload(inner, global, bucket, committed, newest.as_ref()).await?;
            let tip = &done.chain.tip().name;
            tracing::info!(%tip, segments = done.segments, bytes = done.bytes, to = %bucket, "uploaded");
            let mut state = lock(&global.state);
            state.counts.points += u64::from(done.made);
            state.counts.bytes += done.bytes;
            let known = state.vms.entry(record.vm.clone()).or_default();
            known.newest = Some(tip.clone());
            known.points += u64::from(done.made);
            known.behind = None;
            known.records.insert(tip.clone(), done.chain);
        }
    }
    match mine {
        true => tidy(global, bucket, &record.vm).await,
        false => Ok(()),
    }
}

/// Uploads a checkpoint; from where the last try ended, if it is the same.
async fn upload(
    inner: &Inner,
    global: &Global,
    bucket: &Bucket,
    tip: &Held,
    newest: Option<&ChainRecord>,
) -> Result<Uploaded, GlobalError> {
    let vm = &tip.name.vm;
    let mut begun = std::mem::take(&mut lock(&global.state).vms.entry(vm.clone()).or_default().begun);
    let uploader = Uploader {
        bucket,
        store: &inner.store,
        max_links: global.max_links,
        within: global.options.grace / 2,
        pace: &global.pace,
    };
    let done = uploader.upload(tip, newest, &mut begun).await;
    lock(&global.state).vms.entry(vm.clone()).or_default().begun = begun;
    done
}

/// A point, read once: it never changes.
async fn read(global: &Global, bucket: &Bucket, name: &SegmentName) -> Result<ChainRecord, GlobalError> {
    let known = |state: &State| state.vms.get(&name.vm)?.records.get(name).cloned();
    if let Some(record) = known(&lock(&global.state)) {
        return Ok(record);
    }
    let record = bucket.point(name).await?;
    let mut state = lock(&global.state);
    let known = state.vms.entry(name.vm.clone()).or_default();
    known.records.insert(name.clone(), record.clone());
    Ok(record)
}

/// What is there is of this VM, and not of another that had its name: it is a state that the registry knows.
async fn same_vm(
    inner: &Inner,
    bucket: &Bucket,
    record: &VmRecord,
    there: &ChainRecord,
) -> Result<(), GlobalError> {
    let tip = there.tip();
    // Another holder may have uploaded what was committed since the record was read.
    match inner.registry.get_vm(&record.vm).await {
        Ok(now) => match &now.newest {
            Some(committed) if committed.name == tip.name && committed.checkpoint != tip.checkpoint => {
                Err(GlobalError::DuplicateName {
                    name: tip.name.clone(),
                    place: bucket.to_string(),
                    held: tip.checkpoint,
                    offered: committed.checkpoint,
                })
            }
            Some(committed) if committed.name.position() < tip.name.position() => Err(GlobalError::Ahead {
                name: tip.name.clone(),
                place: bucket.to_string(),
                committed: committed.name.clone(),
            }),
            Some(_) | None => Ok(()),
        },
        Err(_) => Ok(()),
    }
}

/// Removes what is not needed, when it is time to.
async fn tidy(global: &Global, bucket: &Bucket, vm: &VmId) -> Result<(), GlobalError> {
    let (grace, now) = (global.options.grace, boottime());
    let every = global.options.every.max(grace / COLLECTS_IN_GRACE);
    let (mut seen, mut records) = {
        let mut state = lock(&global.state);
        let known = state.vms.entry(vm.clone()).or_default();
        if known.collected.is_some_and(|at| now.saturating_sub(at) < every) {
            return Ok(());
        }
        known.collected = Some(now);
        (
            std::mem::take(&mut known.seen),
            std::mem::take(&mut known.records),
        )
    };
    let done = collect(
        bucket,
        vm,
        &global.options.keep,
        &mut seen,
        &mut records,
        now,
        grace,
    )
    .await;
    let mut state = lock(&global.state);
    let known = state.vms.entry(vm.clone()).or_default();
    (known.seen, known.records) = (seen, records);
    let removed = done?;
    known.points = removed.points;
    drop(state);
    if removed.removed_points + removed.removed_parts > 0 {
        let (points, objects) = (removed.removed_points, removed.removed_parts);
        tracing::info!(%vm, points, objects, from = %bucket, "removed what no policy keeps");
    }
    Ok(())
}

/// The newest restore point of `vm` there that the registry has as committed, for a takeover. Who can write to the store
/// cannot make the VM go on from a checkpoint that it never took.
pub(super) async fn committed(inner: &Inner, vm: &VmId) -> Result<Option<SegmentBrief>, String> {
    let Some(global) = &inner.global else {
        return Ok(None);
    };
    match tokio::time::timeout(LOOK_WITHIN, look(inner, global, vm)).await {
        Ok(found) => found,
        Err(_) => Err(format!(
            "the global store {} did not answer within {} s",
            global.options.place.addr,
            LOOK_WITHIN.as_secs()
        )),
    }
}

/// What [`committed`] looks for. One that is damaged does not hide those before it: who promotes is told what is newer in the
/// registry, and has to want to go below that.
async fn look(inner: &Inner, global: &Global, vm: &VmId) -> Result<Option<SegmentBrief>, String> {
    let bucket = global.bucket().await.map_err(|e| in_full(&e))?;
    let names = bucket.points(vm).await.map_err(|e| in_full(&e))?;
    let mut damaged = None;
    for name in names.iter().rev().take(MAX_LOOKED_AT) {
        let Some(checkpoint) = registered(inner, name).await? else {
            continue;
        };
        match bucket.point(name).await {
            Ok(record) if record.tip().checkpoint == checkpoint => return Ok(Some(record.brief())),
            Ok(_) => {}
            Err(error @ GlobalError::Damaged { .. }) => {
                let why = in_full(&error);
                tracing::error!(%why, "a restore point of the global store is passed over");
                damaged.get_or_insert(why);
            }
            Err(error) => return Err(in_full(&error)),
        }
    }
    damaged.map_or(Ok(None), Err)
}

/// Which checkpoint the registry knows by a name.
async fn registered(inner: &Inner, name: &SegmentName) -> Result<Option<segment::CheckpointId>, String> {
    let before = match (name.generation.0, name.epoch.0) {
        (generation, epoch @ 1..) => Some((generation, epoch - 1)),
        (generation @ 1.., 0) => Some((generation - 1, u64::MAX)),
        (0, 0) => None,
    };
    let after = before.map(|(g, e)| SegmentName::new(name.vm.clone(), Generation(g), Epoch(e)));
    let (page, _) = inner
        .registry
        .list_segments(&name.vm, after, 1)
        .await
        .map_err(|e| e.to_string())?;
    let found = page.into_iter().find(|record| record.name == *name);
    Ok(found.map(|record| record.checkpoint))
}

/// Makes the chain of a checkpoint whole here from the global store; what had to be replaced, in words.
///
/// # Errors
/// In words, when it is not there.
pub(super) async fn bring(inner: &Inner, tip: &Held, generation: Generation) -> Result<Vec<String>, String> {
    let Some(global) = &inner.global else {
        return Err("there is no global store".into());
    };
    let bring = async {
        let bucket = global.bucket().await?;
        let names = bucket.points(&tip.name.vm).await?;
        let from = names.partition_point(|name| name.position() < tip.name.position());
        // A point that is newer has it as a link, when it stands on it.
        for name in names[from..].iter().take(MAX_LOOKED_AT) {
            let record = bucket.point(name).await?;
            if let Some(chain) = record.up_to(tip) {
                return fetch(&bucket, &inner.store, &chain, generation).await;
            }
        }
        Err(GlobalError::NoPoint {
            name: tip.name.clone(),
            place: bucket.to_string(),
        })
    };
    bring.await.map_err(|e| in_full(&e))
}

fn none_here(inner: &Inner) -> Failure {
    Failure {
        why: format!(
            "{} has no global store: it is named with `standby serve --global s3://BUCKET/PREFIX`",
            inner.name
        ),
    }
}

/// A page of the restore points there.
pub(super) async fn list(inner: &Inner, call: ListCall) -> Result<SegmentPage, Failure> {
    let global = inner.global.as_ref().ok_or_else(|| none_here(inner))?;
    let failed = |e: GlobalError| Failure { why: in_full(&e) };
    let bucket = global.bucket().await.map_err(failed)?;
    let limit = call.limit.min(MAX_PAGE_SEGMENTS) as usize;
    let mut vms = match call.vm {
        Some(vm) => vec![vm],
        None => bucket.vms().await.map_err(failed)?,
    };
    vms.sort();
    let mut segments: Vec<SegmentBrief> = Vec::new();
    let after = call.after.as_ref();
    for vm in vms.iter().filter(|vm| after.is_none_or(|after| **vm >= after.vm)) {
        let names = bucket.points(vm).await.map_err(failed)?;
        let rest: Vec<_> = names
            .into_iter()
            .filter(|name| after.is_none_or(|after| name > after))
            .collect();
        let room = limit - segments.len();
        let some = &rest[..rest.len().min(room)];
        let records = bucket.records(some).await.map_err(failed)?;
        segments.extend(records.iter().map(ChainRecord::brief));
        if rest.len() > room {
            return Ok(SegmentPage { segments, more: true });
        }
    }
    Ok(SegmentPage {
        segments,
        more: false,
    })
}

/// Reads what is there whole, and checks every byte.
pub(super) async fn check(inner: &Inner, call: VerifyCall) -> Result<VerifyReport, Failure> {
    let global = inner.global.as_ref().ok_or_else(|| none_here(inner))?;
    let failed = |e: GlobalError| Failure { why: in_full(&e) };
    let bucket = global.bucket().await.map_err(failed)?;
    let vms = match call.vm {
        Some(vm) => vec![vm],
        None => bucket.vms().await.map_err(failed)?,
    };
    let mut report = VerifyReport::default();
    for vm in vms {
        let names = bucket.points(&vm).await.map_err(failed)?;
        let mut checked = Checked::default();
        for name in names {
            let result = match bucket.point(&name).await {
                Ok(record) => verify(&bucket, &record, &mut checked).await,
                Err(error) => Err(error),
            };
            match result {
                // A point that went away meanwhile was not kept.
                Ok(()) | Err(GlobalError::NoPoint { .. }) => {}
                Err(error @ GlobalError::Damaged { .. }) => {
                    report.bad += 1;
                    report.incomplete += 1;
                    if report.problems.len() < MAX_PROBLEMS {
                        report.problems.push(format!("{name}: {}", in_full(&error)));
                    }
                }
                Err(error) => return Err(failed(error)),
            }
        }
        report.checked += checked.segments();
        report.bytes += checked.bytes();
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_is_away_is_asked_ever_more_rarely_and_never_given_up() {
        let every = Duration::from_secs(60);
        let waits: Vec<_> = (0..12).map(|failures| wait(failures, every).as_secs()).collect();
        assert_eq!(waits, [60, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(wait(u32::MAX, every), BACKOFF.1);
    }
}
